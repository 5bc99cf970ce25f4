"""Ring 1. The only starter of processes: cages by bubblewrap, Landlock and seccomp."""
