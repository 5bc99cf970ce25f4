"""The other nodes: where they may be, which of them answer, and what they say about themselves."""
