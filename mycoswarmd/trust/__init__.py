"""Keys, certificates, TLS: the only importer of cryptography and the only maker of TLS contexts.

Law: who somebody is, is a key. No wall clock, no authority and no name decides it.
"""
