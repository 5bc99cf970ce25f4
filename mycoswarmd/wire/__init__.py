"""Ring 1. Bytes to types and back, bounded and pure."""
