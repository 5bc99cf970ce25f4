"""The statements that a node holds of its swarm, and what they mean together.

Law: a set, and nothing but a set. The order in which statements came, and in which parts, leaves no trace;
adding is all or nothing; and what it means is worked out anew from all of them after each change.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Final

from mycoswarmd.core.roster.settle import settle
from mycoswarmd.core.roster.statement import Kind, Statement, canonical
from mycoswarmd.core.roster.view import Roster, View
from mycoswarmd.errors import BadRequest, Unavailable

MAX_STATEMENTS: Final = 10_000
MAX_ROSTER_BYTES: Final = 14 << 20  # of the bodies together; in base64 and in JSON it is below 24 MiB
# Of both bounds, what only the putting out of somebody may use: a stolen signer that fills the roster
# cannot keep the others from removing it.
RESERVED_STATEMENTS: Final = 500
# Whoever was named by a stolen signer, and by whoever that named, is no better than that.
MAX_QUIET_STATEMENTS: Final = 2_000
RESERVED_BYTES: Final = 2 << 20
# A stranger may send 512 KiB: so many hashes fit. The answer of a larger roster has some that are known.
MAX_PULL_HASHES: Final = 7_000
# A member may send 4 MiB, of which the hashes of a full roster are 0.7.
_PORTION_BYTES: Final = 2 << 20


class StatementSet:
    """The statements of one swarm.

    Args:
        genesis: what the swarm began with; its hash is the swarm's id.
        pinned: the hash that it must have, where that is known before.
    """

    def __init__(self, genesis: Statement, *, pinned: str | None = None) -> None:
        if genesis.kind is not Kind.GENESIS:
            raise BadRequest("bad-statement", "cannot read the roster: it does not begin with a genesis")
        if pinned is not None and genesis.sha256 != pinned:
            raise _other_swarm()
        self._genesis = genesis
        self._settled = settle(genesis, ())
        self._by_hash = {genesis.sha256: genesis}
        self._pruned: tuple[str, ...] = ()

    @property
    def by_hash(self) -> Mapping[str, Statement]:
        """The statements by hash; each stands after those that vouch for it."""
        return MappingProxyType(self._by_hash)

    @property
    def pruned(self) -> tuple[str, ...]:
        """The hashes that the latest change dropped: a new epoch, or a proof, took their place."""
        return self._pruned

    @cached_property
    def _view(self) -> View:
        return View(self._settled)

    @cached_property
    def roster(self) -> Roster:
        """What the statements mean."""
        return self._view.roster()

    def __len__(self) -> int:
        return len(self._by_hash)

    def copy(self) -> "StatementSet":
        """Return a set that can change while this one stays as it is."""
        other = StatementSet.__new__(StatementSet)
        other.__dict__.update(self.__dict__)  # what is in it is replaced, never changed
        return other

    def add(self, statements: Iterable[Statement], *, whole: bool = False) -> tuple[Statement, ...]:
        """Add statements that belong here and return those that were new, in order.

        Those that are known, or overtaken by a newer epoch, are ignored. One whose signer is none of this
        swarm, judged by the set and all that come with it, refuses them all; so does one too many. The last
        places are for what is `urgent`, unless this is the `whole` of what somebody holds.

        Raises:
            BadRequest: bad-statement, other-swarm.
            Unavailable: roster-full.
        """
        new = {one.sha256: one for one in statements if one.sha256 not in self._by_hash}
        if not new:
            return ()
        settled = settle(self._genesis, [*self._by_hash.values(), *new.values()])
        # What is held already never stands in the way: a new epoch may leave it without a voucher.
        for one in settled.refused:
            if one.sha256 in new:
                raise self._refusal(one)
        by_hash = {one.sha256: one for one in settled.ordered()}
        added = tuple(one for one in by_hash.values() if one.sha256 in new)
        if self._is_too_much(by_hash, added, whole=whole):
            raise Unavailable(
                "roster-full",
                f"cannot keep more than {MAX_STATEMENTS:,} statements, or {MAX_ROSTER_BYTES >> 20} MiB, in a "
                "roster",
                hint="mycoswarmctl recover begins a new epoch, which drops what is not needed any more",
            )
        if by_hash.keys() == self._by_hash.keys():
            return ()
        self._pruned = tuple(sorted(self._by_hash.keys() - by_hash.keys()))
        self._settled, self._by_hash = settled, by_hash
        for worked_out in ("_view", "roster", "_loud"):
            self.__dict__.pop(worked_out, None)
        return added

    def missing(self, have: frozenset[str]) -> list[Statement]:
        """Return what somebody with these hashes lacks; every beginning of the list can be added alone."""
        return [one for sha256, one in self._by_hash.items() if sha256 not in have]

    def signed_by(self, key: str, *, but: Iterable[str] = ()) -> frozenset[str]:
        """Return the hashes of what a key (in hex) gave and still counts: what its removal should keep.

        Not the signing keys of who is no member, nor those in `but`.
        """
        return self._view.signed_by(key, but=frozenset(but))

    def led_to(self, keys: Iterable[str]) -> list[str]:
        """Return the keys in use that only these, and whom they named, vouch for; none for a root."""
        return self._view.led_to(frozenset(keys))

    def signing_keys(self) -> Mapping[str, frozenset[str]]:
        """Return the keys in use, disputed ones too, with the ids that are said to hold each.

        A key stands after the one that named it.
        """
        return self._view.claims()

    def removed_keys(self) -> frozenset[str]:
        """Return the keys that sign no more in this epoch."""
        return self._view.removed

    def admissions(self, ids: Iterable[str]) -> frozenset[str]:
        """Return the hashes that make these ids members, also ids that are out: what an epoch should keep."""
        return self._view.admissions(ids)

    def check_swarm(self, swarm_id: str) -> None:
        """Raise BadRequest("other-swarm") for what is not of this one."""
        if swarm_id != self._genesis.sha256:
            raise _other_swarm()

    def vouching(self) -> tuple[set[str], set[str], set[str]]:
        """Return each key that ever signed here, the hashes that an epoch keeps, and each id that was in."""
        footing = self._settled.footing
        keys = {*footing.roots, *footing.suspects}
        keys |= {one.facts["key"] for one in self._settled.by_kind[Kind.ADD_SIGNER]}
        ids = {one.facts["node"] for kind in (Kind.ADMIT, Kind.REKEY) for one in self._settled.by_kind[kind]}
        return keys, set(footing.keep), ids

    def urgent(self, statements: Iterable[Statement]) -> list[Statement]:
        """Return the epochs, and what puts out somebody who is in, by signers that do not flood."""
        return [one for one in statements if self._is_urgent(one)]

    def _is_urgent(self, one: Statement) -> bool:
        is_signed = one.facts.get("by") in self.roster.signers and one.facts["by"] not in self._loud
        match one.kind:
            case Kind.EPOCH:
                return True
            case Kind.REVOKE:
                return is_signed and one.facts["node"] in self.roster.members
            case Kind.DROP_SIGNER:
                return is_signed and one.facts["key"] in self.signing_keys()
            case _:
                return False

    @cached_property
    def _loud(self) -> frozenset[str]:
        """The keys of those lines of signers that said very much: a line is who a root named, and so on."""
        line_of = self._view.lines()
        said = Counter(line_of.get(one.facts.get("by", "")) for one in self._by_hash.values())
        return frozenset(key for key, line in line_of.items() if said[line] > MAX_QUIET_STATEMENTS)

    def _is_too_much(
        self, after: Mapping[str, Statement], fresh: Sequence[Statement], *, whole: bool
    ) -> bool:
        statements, size_bytes = len(after), sum(len(one.body) for one in after.values())
        is_urgent = whole or all(map(self._is_urgent, fresh))
        room = 0 if is_urgent else 1
        is_over = statements > MAX_STATEMENTS - room * RESERVED_STATEMENTS
        is_over = is_over or size_bytes > MAX_ROSTER_BYTES - room * RESERVED_BYTES
        return is_over and not all(one.kind is Kind.EPOCH for one in fresh)

    def _refusal(self, one: Statement) -> BadRequest:
        if one.swarm != self._genesis.sha256:
            return _other_swarm()
        return BadRequest(
            "bad-statement",
            f"cannot accept the statement {one.sha256[:8]} ({one.kind}): nobody in this swarm vouches for it",
        )


def _other_swarm() -> BadRequest:
    return BadRequest("other-swarm", "cannot accept the statements: they are of another swarm")


def portions(wires: Iterable[dict[str, object]]) -> Iterator[list[dict[str, object]]]:
    """Divide statements in wire form, in their order, into what one request may carry."""
    portion: list[dict[str, object]] = []
    size = 0
    for one in wires:
        size += (more := len(canonical(one)) + 1)
        if portion and size > _PORTION_BYTES:
            yield portion
            portion, size = [], more
        portion.append(one)
    if portion:
        yield portion
