"""Small programs of their own beside the node: each holds one dangerous thing and nothing else."""
