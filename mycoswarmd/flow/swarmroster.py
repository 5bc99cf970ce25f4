"""The roster of this node: what its statements say, kept on disk before it is believed.

Law: a statement is verified, then on disk, then believed, in this order; what is believed only grows,
until an epoch of the recovery key begins it anew.
Source: docs/wire.md.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

from mycoswarmd.core.roster import (
    MAX_STATEMENTS,
    Kind,
    Member,
    ReadCert,
    Roster,
    Statement,
    StatementSet,
    Verify,
    encode_statement,
    parse_beacon,
    parse_statement,
    read_new,
)
from mycoswarmd.core.types import Role
from mycoswarmd.errors import BadRequest, ConfigError, Conflict, NotFound, StoreError, Unavailable
from mycoswarmd.flow.ports import Entropy, ReceiptLog
from mycoswarmd.flow.swarmports import BeaconRow, BootClock, Identity, IdentityStore, RosterStore, Signer

log = logging.getLogger(__name__)

# Signatures are checked in a thread from this many statements on; each takes about 0.15 ms.
_INLINE_STATEMENTS = 20
# What a roster means is worked out in a thread from this many statements on: 10,000 take 0.3 s.
INLINE_ROSTER = 500
MIN_PREFIX = 4
# Who begins with an empty database has started less often than the others remember, so it needs a new key.
_DAMAGED_HINT = (
    "restore a backup; or move the database and its -wal file away, start, and do mycoswarmctl leave, then"
    " enroll again"
)


class SwarmRoster:
    """Holds the statements. What is exchanged is in swarmexchange.py, what people do to them in swarm.py."""

    def __init__(
        self,
        *,
        store: RosterStore,
        identities: IdentityStore,
        signer: Signer,
        receipts: ReceiptLog,
        clock: BootClock,
        entropy: Entropy,
        verify: Verify,
        read_cert: ReadCert,
    ) -> None:
        self._store = store
        self._identities = identities
        self._signer = signer
        self._receipts = receipts
        self._clock = clock
        self._entropy = entropy
        self._verify = verify
        self._read_cert = read_cert
        self._set: StatementSet | None = None
        # One act of a person at a time; and one change of disk and belief, taken after that.
        self._acts = asyncio.Lock()
        self._lock = asyncio.Lock()
        self._listeners: list[Callable[[], None]] = []
        self._beacons: dict[str, BeaconRow] = {}
        self._heard_at_s: dict[str, float] = {}  # by signer, on the boot clock
        self.identity: Identity | None = None
        self.version = 0
        self.boot = 0
        self.instance = entropy.token(8)
        # How another node's signing key is asked for, and how news is spread; set by the wiring.
        self.ask_signer_key: Callable[[str], Awaitable[str]] | None = None
        self.spread: Callable[[], Awaitable[None]] | None = None
        self.give: Callable[[Sequence[Mapping[str, object]]], Awaitable[None]] | None = None
        self.tell: Callable[[Sequence[Mapping[str, object]]], Awaitable[Sequence[str]]] | None = None
        self.reached: Callable[[], Mapping[str, Sequence[str]]] = dict

    async def start(self, *, boots: int = 1) -> None:
        """Read what is on disk; StoreError for a damaged roster, ConfigError for one without a key.

        `boots` is what this start counts for: more than one after a restore, so that nobody takes this node
        for a copy of itself.
        """
        self.boot = await self._store.next_boot(by=boots)
        self.identity = await asyncio.to_thread(self._identities.load)
        statements, beacons = await self._store.load()
        if not statements:
            return
        try:
            self._set = await asyncio.to_thread(self._read_set, statements)
        except (BadRequest, Unavailable) as exc:
            raise StoreError(
                "roster-damaged",
                f"cannot use the roster in the database: it is damaged ({exc.message})",
                hint=_DAMAGED_HINT,
            ) from exc
        self._beacons = {row.signer: row for row in beacons if self._is_whole(row)}
        self.version += 1
        if self.identity is None:
            raise ConfigError(
                "identity-missing",
                "cannot use this state directory: it has a roster and no node key",
                hint="restore a backup, or move the database away and enroll again",
            )
        if self.member(self.identity.node_id) is None:
            await self._adopt_prepared_key()

    def _is_whole(self, row: BeaconRow) -> bool:
        """Tell whether a beacon from the disk is what was written; the others would refuse any other."""
        try:
            beacon = parse_beacon(row.beacon, verify=self._verify)
        except BadRequest as exc:
            log.warning("a damaged beacon in the database is left out: %s", exc.message)
            return False
        return (beacon.signer, beacon.n) == (row.signer, row.n)

    def _read_set(self, statements: Sequence[object]) -> StatementSet:
        parsed = [self._parse(one) for one in statements]
        whole = StatementSet(parsed[0])
        whole.add(parsed[1:], whole=True)
        return whole

    def _parse(self, untrusted: object) -> Statement:
        return parse_statement(untrusted, verify=self._verify, read_cert=self._read_cert)

    async def _adopt_prepared_key(self) -> None:
        """Finish a rekey that was interrupted between its statement and the change of files."""
        following = await asyncio.to_thread(self._identities.prepare_next)
        if self.member(following.node_id) is not None:
            self.identity = following  # the roster says so, whatever becomes of the files
            self.identity = await asyncio.to_thread(self._identities.adopt_next)

    # --- what is known -----------------------------------------------------------------------------

    @property
    def roster(self) -> Roster | None:
        """What the statements say, or None: this node is in no swarm."""
        return self._set.roster if self._set is not None else None

    @property
    def self_id(self) -> str | None:
        """This node's id, once it has a key."""
        return self.identity.node_id if self.identity is not None else None

    @property
    def digest(self) -> str:
        """The hash of all statements, or "" without a swarm."""
        roster = self.roster
        return roster.digest if roster is not None else ""

    def is_member(self) -> bool:
        """Tell whether this node is a live member of its swarm."""
        return self.self_id is not None and self.member(self.self_id) is not None

    def is_signer(self) -> bool:
        """Tell whether this node may sign statements that count."""
        roster, key = self.roster, self._signer.public_key()
        return roster is not None and key is not None and roster.signers.get(key.hex()) == self.self_id

    async def _wake_signer(self) -> None:
        """Have who holds the key ready to sign, so that a signature does not stop everything else."""
        roster = self.roster
        if roster is not None and self.self_id in roster.signers.values():
            await asyncio.to_thread(self._signer.wake)

    def member(self, node_id: str) -> Member | None:
        """Return a live member."""
        roster = self.roster
        return roster.members.get(node_id) if roster is not None else None

    def find(self, text: str) -> Member:
        """Return the live member with this name, id or beginning of an id; NotFound("unknown-node")."""
        members = list(self._require_roster().members.values())
        named = [one for one in members if text in {one.name, one.id}]
        if not named and len(text) >= MIN_PREFIX:
            named = [one for one in members if one.id.startswith(text)]
        if len(named) == 1:
            return named[0]
        known = ", ".join(sorted(one.name for one in members)[:8])
        cause = "its name fits several" if named else "it is not in the roster"
        raise NotFound(
            "unknown-node", f"cannot find node {text[:80]!r}: {cause}", hint=f"nodes here: {known}"
        )

    def peers(self) -> list[Member]:
        """Return the live members that compute, without this node."""
        roster = self.roster
        members = roster.members.values() if roster is not None else ()
        return [one for one in members if one.role is Role.NODE and one.id != self.self_id]

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call a function right after each change is believed; returns what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def hashes(self) -> list[str]:
        """Return the hash of each statement held."""
        roster = self.roster
        return sorted(roster.hashes) if roster is not None else []

    def missing(self, have: frozenset[str]) -> list[dict[str, object]]:
        """Return the statements that somebody with these hashes lacks, in wire form."""
        if self._set is None:
            return []
        return [encode_statement(one) for one in self._set.missing(have)]

    def _whole(self) -> StatementSet:
        if self._set is None:
            raise Conflict(
                "no-swarm",
                "cannot do this: this node is in no swarm",
                hint="mycoswarmctl init --name home begins one, mycoswarmctl enroll joins one",
            )
        return self._set

    def _require_roster(self) -> Roster:
        return self._whole().roster

    # --- what is believed --------------------------------------------------------------------------

    async def merge(self, untrusted: Sequence[object]) -> int:
        """Verify, store and then believe statements; return how many were new.

        Raises BadRequest for a statement that is malformed or that nobody vouches for; then none is kept.
        """
        whole = self._whole()
        if len(untrusted) > MAX_STATEMENTS:
            raise BadRequest("roster-full", f"cannot take more than {MAX_STATEMENTS} statements at once")
        if len(untrusted) > _INLINE_STATEMENTS:
            parsed = await asyncio.to_thread(read_new, untrusted, whole, parse=self._parse)
        else:
            parsed = read_new(untrusted, whole, parse=self._parse)
        async with self._lock:
            try:
                return await self._believe(parsed)
            except Unavailable:  # full: whoever filled it does not keep us from hearing that it is out
                await self._believe(self._whole().urgent(parsed))
                raise

    async def _believe(self, statements: Sequence[Statement], *, invite: str | None = None) -> int:
        """Store statements and believe them, and use up an invitation, all or nothing. Under `_lock`."""
        whole = self._whole()
        before = whole.roster
        after = whole.copy()
        if len(whole) + len(statements) > INLINE_ROSTER:
            fresh = await asyncio.to_thread(_added, after, statements)
        else:
            fresh = _added(after, statements)
        if not fresh and invite is None:
            return 0
        done = _Done()

        def settled(failure: BaseException | None) -> None:
            if failure is None and fresh:
                self._set = after
            done.set()

        try:
            was_cancelled = await done.settle(
                self._store.add(
                    [(one.sha256, encode_statement(one)) for one in fresh],
                    drop=sorted(before.hashes - after.roster.hashes),
                    invite=invite,
                    settled=settled,
                )
            )
            if self.self_id in {one.facts["old"] for one in fresh if one.kind is Kind.REKEY}:
                await self._adopt_prepared_key()
            _go_on(was_cancelled)
        except StoreError as exc:
            if self._set is not after:
                raise
            log.error("the key on disk is not the new one yet: %s", exc)  # noqa: TRY400 - in its own words
        finally:
            if self._set is after:
                self._report_returned(before, after.roster)
                self._changed()
        return len(fresh)

    def _report_returned(self, before: Roster, after: Roster) -> None:
        """Say who was out and is back by the word of the recovery key; perhaps it did not know."""
        for node_id in sorted(before.revoked.keys() & after.members.keys()):
            log.warning(
                "%s (%s) was out, %r, and is a member again since the swarm was recovered: if that was not "
                "meant, revoke it again",
                after.members[node_id].name,
                node_id,
                before.revoked[node_id],
            )

    async def _begin(self, whole: StatementSet, identity: Identity) -> None:
        """Store and believe a whole roster."""
        done = _Done()

        def settled(failure: BaseException | None) -> None:
            if failure is None:
                self.identity, self._set = identity, whole
            done.set()

        async with self._lock:
            rows = [(one.sha256, encode_statement(one)) for one in whole.missing(frozenset())]
            try:
                _go_on(await done.settle(self._store.add(rows, settled=settled)))
            finally:
                if self._set is whole:
                    self._changed()

    async def _forget(self) -> None:
        """Drop roster and keys; this node is in no swarm afterwards. Under `_lock`."""
        done = _Done()

        def settled(failure: BaseException | None) -> None:
            if failure is None:
                self._set = self.identity = None
                self._beacons, self._heard_at_s = {}, {}
            done.set()

        try:
            was_cancelled = await done.settle(self._store.clear(settled=settled))
            await asyncio.to_thread(self._destroy_keys)
            _go_on(was_cancelled)
        finally:
            if self._set is None:
                self._changed()

    def _destroy_keys(self) -> None:
        self._signer.destroy()
        self._identities.destroy()

    def _changed(self) -> None:
        self.version += 1
        for listener in list(self._listeners):
            listener()

    async def _note(self, what: str, **facts: object) -> None:
        """Write the receipt of a change before it takes effect."""
        await self._receipts.durable(self._receipts.append("swarm", {"what": what, **facts}))


class _Done:
    """Waits until the disk has settled a write, also when the caller is cancelled meanwhile.

    Whoever hangs up in the middle does not leave disk and belief apart.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.set = self._event.set

    async def settle(self, write: Awaitable[None]) -> bool:
        """Await a write that calls `set` in its end; tell whether the caller was cancelled meanwhile."""
        try:
            await write
        except asyncio.CancelledError:
            while not self._event.is_set():
                with suppress(asyncio.CancelledError):
                    await self._event.wait()
            return True
        return False


def _go_on(was_cancelled: bool) -> None:  # noqa: FBT001
    """End what was cancelled while it could not be interrupted."""
    if was_cancelled:
        raise asyncio.CancelledError


def _added(whole: StatementSet, statements: Sequence[Statement]) -> tuple[Statement, ...]:
    """Add statements and work out what the set means then."""
    fresh = whole.add(statements)
    _ = whole.roster  # kept in the set from now on
    return fresh
