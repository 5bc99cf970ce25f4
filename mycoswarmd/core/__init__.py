"""Ring 0, decides. Pure: standard library only; no I/O, clock, randomness or logging."""
