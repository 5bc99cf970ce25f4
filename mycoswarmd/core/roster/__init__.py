"""The roster: who belongs to a swarm, as a set of signed statements. Pure; signatures by functions passed in.

`statement` has the form, `sift` reads what others send, `settle` says which statements belong, `view` what
they mean, `statements` holds them; `beacon` is beside: how fresh all this is.
"""

from mycoswarmd.core.roster.beacon import (
    BEACON_CONTEXT,
    Beacon,
    encode_beacon,
    make_beacon_message,
    parse_beacon,
    sign_beacon,
)
from mycoswarmd.core.roster.settle import MAX_REKEYS
from mycoswarmd.core.roster.sift import read_new
from mycoswarmd.core.roster.statement import (
    MAX_BODY_BYTES,
    MAX_EPOCH,
    MAX_KEEP_BODY_BYTES,
    SIGNING_CONTEXT,
    CertFacts,
    Kind,
    NodeId,
    ReadCert,
    Statement,
    Verify,
    canonical,
    encode_statement,
    make_body,
    node_id_of,
    parse_statement,
    signed,
)
from mycoswarmd.core.roster.statements import (
    MAX_PULL_HASHES,
    MAX_ROSTER_BYTES,
    MAX_STATEMENTS,
    StatementSet,
    portions,
)
from mycoswarmd.core.roster.view import Member, Roster, digest_of

__all__ = [
    "BEACON_CONTEXT",
    "MAX_BODY_BYTES",
    "MAX_EPOCH",
    "MAX_KEEP_BODY_BYTES",
    "MAX_PULL_HASHES",
    "MAX_REKEYS",
    "MAX_ROSTER_BYTES",
    "MAX_STATEMENTS",
    "SIGNING_CONTEXT",
    "Beacon",
    "CertFacts",
    "Kind",
    "Member",
    "NodeId",
    "ReadCert",
    "Roster",
    "Statement",
    "StatementSet",
    "Verify",
    "canonical",
    "digest_of",
    "encode_beacon",
    "encode_statement",
    "make_beacon_message",
    "make_body",
    "node_id_of",
    "parse_beacon",
    "parse_statement",
    "portions",
    "read_new",
    "sign_beacon",
    "signed",
]
