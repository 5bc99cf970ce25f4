"""Which statements belong to the set of a swarm: those that its keys vouch for, in the newest epoch.

Law: a function of the set alone. Settling what two nodes hold together gives the same on both, whatever
came first; so what is left out is left out everywhere. Authority only grows here: a key that ever was a
signer may always take away, and whether it may still give is for the view to say.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Final

from mycoswarmd.core.roster.statement import Kind, Statement

MAX_REKEYS: Final = 16  # of one member in one epoch
# Two are the proof that a key speaks with two tongues; more would let one member fill the roster.
_FORK: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Footing:
    """Where trust starts: in the genesis, or in what the recovery key said last."""

    epoch: int
    roots: Mapping[str, str]  # key -> node: signers from the start
    suspects: frozenset[str]  # keys that one of several epochs of this number names; they only take away
    keep: frozenset[str]  # hashes of older statements that stay
    statements: tuple[Statement, ...]

    def keeps(self, one: Statement) -> bool:
        """Tell whether a statement stays although it is older."""
        is_old = one.epoch < self.epoch and one.kind in (Kind.ADMIT, Kind.REKEY)
        return is_old and one.sha256 in self.keep


@dataclass(slots=True, kw_only=True)
class Settled:
    """A set in order: each statement after those that vouch for it, what takes away before what gives."""

    genesis: Statement
    footing: Footing
    by_kind: dict[Kind, list[Statement]] = field(default_factory=lambda: defaultdict(list))
    refused: list[Statement] = field(default_factory=list)  # nobody of this swarm vouches for these

    def ordered(self) -> Iterable[Statement]:
        """Yield what belongs to the set."""
        yield self.genesis
        yield from self.footing.statements
        for kind in (Kind.ADD_SIGNER, Kind.DROP_SIGNER, Kind.REVOKE, Kind.ADMIT, Kind.REKEY, Kind.LEAVE):
            yield from self.by_kind[kind]


def settle(genesis: Statement, statements: Iterable[Statement]) -> Settled:
    """Sort statements into those that belong, those that are overtaken, and those that nobody vouches for."""
    given: dict[Kind, list[Statement]] = defaultdict(list)
    foreign = []
    for one in sorted(statements, key=attrgetter("sha256")):
        if one == genesis:
            continue
        is_ours = one.swarm == genesis.sha256
        is_forged = one.kind is Kind.EPOCH and one.signer != genesis.facts["recovery"]
        if is_ours and not is_forged:
            given[one.kind].append(one)
        else:
            foreign.append(one)
    settled = Settled(genesis=genesis, footing=_footing(genesis, given[Kind.EPOCH]), refused=foreign)
    current = {
        kind: _of_epoch(settled, given[kind]) for kind in Kind if kind not in (Kind.GENESIS, Kind.EPOCH)
    }
    ever = _signers_ever(settled, current[Kind.ADD_SIGNER])
    for kind in (Kind.DROP_SIGNER, Kind.REVOKE, Kind.ADMIT):
        for one in current[kind]:
            is_vouched = one.facts["by"] in ever or settled.footing.keeps(one)
            (settled.by_kind[kind] if is_vouched else settled.refused).append(one)
    _settle_members(settled, current[Kind.REKEY], current[Kind.LEAVE])
    return settled


def _footing(genesis: Statement, epochs: Sequence[Statement]) -> Footing:
    newest = max((one.epoch for one in epochs), default=0)
    if newest == 0:
        roots = {genesis.facts["signer"]: genesis.facts["node"]}
        return Footing(epoch=0, roots=roots, suspects=frozenset(), keep=frozenset(), statements=())
    # The recovery key was used twice for one number, on nodes that did not hear each other: what only one
    # of them says is not enough to give, and enough to take away.
    equal = [one for one in epochs if one.epoch == newest]
    signers = [{signer["key"]: signer["node"] for signer in one.facts["signers"]} for one in equal]
    common = set.intersection(*(set(each) for each in signers))
    return Footing(
        epoch=newest,
        roots={key: signers[0][key] for key in sorted(common)},
        suspects=frozenset(key for each in signers for key in each) - common,
        keep=frozenset.intersection(*(frozenset(one.facts["keep"]) for one in equal)),
        statements=tuple(equal),
    )


def _of_epoch(settled: Settled, statements: Iterable[Statement]) -> list[Statement]:
    """Return those of this epoch and those that it keeps; older ones are overtaken, not refused."""
    footing = settled.footing
    chosen = []
    for one in statements:
        if one.epoch == footing.epoch or footing.keeps(one):
            chosen.append(one)
        elif one.epoch > footing.epoch:
            settled.refused.append(one)
    return chosen


def _signers_ever(settled: Settled, additions: Sequence[Statement]) -> set[str]:
    """Return every key that a chain of signers leads to, whoever was removed since."""
    by_signer = defaultdict(list)
    for one in additions:
        by_signer[one.facts["by"]].append(one)
    ever = {*settled.footing.roots, *settled.footing.suspects}
    reached = sorted(ever)
    for key in reached:  # grows while it is walked
        for one in by_signer.pop(key, ()):
            settled.by_kind[Kind.ADD_SIGNER].append(one)
            if one.facts["key"] not in ever:
                ever.add(one.facts["key"])
                reached.append(one.facts["key"])
    settled.refused.extend(one for rest in by_signer.values() for one in rest)
    return ever


def _settle_members(settled: Settled, rekeys: Sequence[Statement], leaves: Sequence[Statement]) -> None:
    """Take what members say of their own keys, a bounded number of statements for each admission.

    What is said of keys that nobody admitted is not refused: the admission may be overtaken, here and not
    where it comes from.
    """
    by_old = defaultdict(list)
    for one in rekeys:
        by_old[one.facts["old"]].append(one)
    depths = dict.fromkeys((one.facts["node"] for one in settled.by_kind[Kind.ADMIT]), 0)
    for node in (reached := list(depths)):  # breadth first: `reached` grows while it is walked
        branches = by_old[node][:_FORK] if depths[node] < MAX_REKEYS else []
        settled.by_kind[Kind.REKEY] += branches
        if len(branches) == 1 and (new := branches[0].facts["node"]) not in depths:
            depths[new] = depths[node] + 1
            reached.append(new)
    settled.by_kind[Kind.LEAVE] += [one for one in leaves if one.facts["node"] in depths]
