"""A hardened node service: the owner's policy decides where prompts go and what agents may do."""

__version__ = "0.1.0"
