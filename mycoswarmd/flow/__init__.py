"""Ring 1. What happens to a prompt and to a task: orchestration over ports."""
