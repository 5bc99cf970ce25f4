"""Reads what others send: first what costs little, and signatures only of what may be new and may belong.

Law: this only leaves out and refuses early what the set would ignore or refuse; nothing is believed here.
Whoever signs nothing for this swarm costs no signatures but the first that is forged.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mycoswarmd.core.roster.statement import Kind, Statement, peek, refused
from mycoswarmd.core.roster.statements import StatementSet

# Verified before what rests on it: a forgery among it ends the reading.
_BY_SIGNERS = (Kind.ADD_SIGNER, Kind.DROP_SIGNER, Kind.REVOKE, Kind.ADMIT)


@dataclass(frozen=True, slots=True)
class _Said:
    """What has the form of a statement; nobody knows who signed it."""

    kind: Kind
    facts: Mapping[str, Any]
    sha256: str
    wire: object


def read_new(
    untrusted: Sequence[object], held: StatementSet, *, parse: Callable[[object], Statement]
) -> list[Statement]:
    """Return the statements that a set does not hold, parsed; what it would ignore may be missing.

    Raises:
        BadRequest: bad-statement, bad-certificate, other-swarm.
    """
    unheld = list(_unheld(untrusted, held))
    keys, kept, ids = held.vouching()
    parsed = []
    for one in (each for each in unheld if each.kind is Kind.EPOCH):
        parsed.append(epoch := parse(one.wire))
        if epoch.signer != held.roster.recovery.hex():
            raise refused("it is not signed by the recovery key")
        keys.update(signer["key"] for signer in epoch.facts["signers"])
        kept.update(epoch.facts["keep"])
    current = [one for one in unheld if one.facts["epoch"] >= held.roster.epoch or one.sha256 in kept]
    keys.update(one.facts["key"] for one in current if one.kind is Kind.ADD_SIGNER)
    for wanted in _BY_SIGNERS:
        for one in (each for each in current if each.kind is wanted):
            # Kept ones may be of signers that nobody knows any more.
            if one.facts["by"] not in keys and one.sha256 not in kept:
                raise refused("nobody in this swarm vouches for it")
            parsed.append(parse(one.wire))
    ids.update(one.facts["node"] for one in parsed if one.kind is Kind.ADMIT)
    rekeys = [one for one in current if one.kind is Kind.REKEY]
    while ready := [one for one in rekeys if one.facts["old"] in ids]:
        rekeys = [one for one in rekeys if one.facts["old"] not in ids]
        more = [parse(one.wire) for one in ready]
        ids.update(one.facts["node"] for one in more)
        parsed += more
    leaves = [one for one in current if one.kind is Kind.LEAVE and one.facts["node"] in ids]
    return [*parsed, *(parse(one.wire) for one in leaves)]


def _unheld(untrusted: Sequence[object], held: StatementSet) -> Iterator[_Said]:
    """Yield what is of this swarm and is not held; each once."""
    seen = set(held.by_hash)
    for wire in untrusted:
        kind, body, facts = peek(wire)
        sha256 = hashlib.sha256(body).hexdigest()
        if sha256 in seen:
            continue
        seen.add(sha256)
        held.check_swarm(sha256 if kind is Kind.GENESIS else facts["swarm"])
        yield _Said(kind, facts, sha256, wire)
