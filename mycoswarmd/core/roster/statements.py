"""The statements that a node holds of its swarm, and what they mean together.

Law: a set, and nothing but a set. The order in which statements came, and in which parts, leaves no trace;
adding is all or nothing; and what it means is worked out anew from all of them after each change.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Final

from mycoswarmd.core.roster.settle import settle
from mycoswarmd.core.roster.statement import Kind, Statement
from mycoswarmd.core.roster.view import Roster, View
from mycoswarmd.errors import BadRequest, Unavailable

MAX_STATEMENTS: Final = 10_000


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

    def add(self, statements: Iterable[Statement]) -> tuple[Statement, ...]:
        """Add statements that belong here and return those that were new, in order.

        Those that are known, or overtaken by a newer epoch, are ignored. One whose signer is none of this
        swarm, judged by the set and all that come with it, refuses them all; so does one too many.

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
        if len(by_hash) > MAX_STATEMENTS:
            raise Unavailable(
                "roster-full",
                f"cannot keep more than {MAX_STATEMENTS:,} statements in a roster",
                hint="mycoswarmctl recover begins a new epoch, which drops what is not needed any more",
            )
        if by_hash.keys() == self._by_hash.keys():
            return ()
        self._pruned = tuple(sorted(self._by_hash.keys() - by_hash.keys()))
        added = tuple(one for one in by_hash.values() if one.sha256 in new)
        self._settled, self._by_hash = settled, by_hash
        self.__dict__.pop("_view", None)
        self.__dict__.pop("roster", None)
        return added

    def missing(self, have: frozenset[str]) -> list[Statement]:
        """Return what somebody with these hashes lacks; every beginning of the list can be added alone."""
        return [one for sha256, one in self._by_hash.items() if sha256 not in have]

    def signed_by(self, key: str) -> frozenset[str]:
        """Return the hashes of what a key (in hex) gave and still counts: what its removal should keep."""
        return self._view.signed_by(key)

    def admissions(self, ids: Iterable[str]) -> frozenset[str]:
        """Return the hashes that make these ids members, also ids that are out: what an epoch should keep."""
        return self._view.admissions(ids)

    def _refusal(self, one: Statement) -> BadRequest:
        if one.swarm != self._genesis.sha256:
            return _other_swarm()
        return BadRequest(
            "bad-statement",
            f"cannot accept the statement {one.sha256[:8]} ({one.kind}): nobody in this swarm vouches for it",
        )


def _other_swarm() -> BadRequest:
    return BadRequest("other-swarm", "cannot accept the statements: they are of another swarm")
