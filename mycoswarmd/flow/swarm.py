"""This node's membership of a swarm: what the roster says, and every act that changes it.

Law: a statement is verified, then on disk, then believed, in this order; what is believed only grows,
until an epoch of the recovery key begins it anew. Nothing here rests on the wall clock: freshness is
counted by signers and measured by the time since boot.
Source: docs/wire.md.
"""

import asyncio
import base64
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress

from mycoswarmd.core.names import numbered
from mycoswarmd.core.roster import (
    MAX_REKEYS,
    MAX_STATEMENTS,
    Kind,
    Member,
    ReadCert,
    Roster,
    Statement,
    StatementSet,
    Verify,
    encode_beacon,
    encode_statement,
    make_body,
    parse_beacon,
    parse_statement,
    read_new,
    sign_beacon,
    signed,
)
from mycoswarmd.core.types import UNKNOWN, Role, Unknown
from mycoswarmd.errors import BadRequest, ConfigError, Conflict, NotFound, StoreError, Unavailable
from mycoswarmd.flow.ports import Entropy, ReceiptLog
from mycoswarmd.flow.swarmports import BeaconRow, BootClock, Identity, IdentityStore, RosterStore, Signer

log = logging.getLogger(__name__)

# Signers say this often that they are there; a node's roster is as old as the last word it heard.
BEACON_S = 6 * 3600.0
# A peer that asks hears a new one, but not more often than this; and where it does not know how old its
# roster is, because it was just started, that.
_BEACON_AT_MOST_S = 60.0
_BEACON_IN_NEED_S = 5.0
# Signatures are checked in a thread from this many statements on; each takes about 0.15 ms.
_INLINE_STATEMENTS = 20
# What a roster means is worked out in a thread from this many statements on: 10,000 take 0.3 s.
_INLINE_ROSTER = 500
_MIN_PREFIX = 4
_MIN_KEY_PREFIX = 8
# As many keys are removed at once; one node can have more only by the doing of a stolen signer.
_MAX_REMOVALS = 64
_HASH_CHARS = 64
# Who begins with an empty database has started less often than the others remember, so it needs a new key.
_DAMAGED_HINT = (
    "restore a backup; or move the database and its -wal file away, start, and do mycoswarmctl leave, then"
    " enroll again"
)


class Swarm:
    """The roster of this node, kept on disk before it is believed. One per daemon."""

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

    async def run(self) -> None:
        """Sign a beacon now and then, where this node is a signer."""
        while True:
            await self._try_beacon()
            await asyncio.sleep(BEACON_S)

    # --- what is known ---------------------------------------------------------------------------

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

    def member(self, node_id: str) -> Member | None:
        """Return a live member."""
        roster = self.roster
        return roster.members.get(node_id) if roster is not None else None

    def find(self, text: str) -> Member:
        """Return the live member with this name, id or beginning of an id; NotFound("unknown-node")."""
        members = list(self._require_roster().members.values())
        named = [one for one in members if text in {one.name, one.id}]
        if not named and len(text) >= _MIN_PREFIX:
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

    def age_s(self) -> int | Unknown:
        """Return for how long no signer was heard; UNKNOWN since a boot without any word."""
        roster = self.roster
        if roster is None:
            return UNKNOWN
        heard = [at_s for signer, at_s in self._heard_at_s.items() if signer in roster.signers]
        if not heard:
            return UNKNOWN
        return max(0, int(self._clock.boot_s() - max(heard)))

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call a function right after each change is believed; returns what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    # --- exchange --------------------------------------------------------------------------------

    def hashes(self) -> list[str]:
        """Return the hash of each statement held."""
        roster = self.roster
        return sorted(roster.hashes) if roster is not None else []

    def missing(self, have: frozenset[str]) -> list[dict[str, object]]:
        """Return the statements that somebody with these hashes lacks, in wire form."""
        if self._set is None:
            return []
        return [encode_statement(one) for one in self._set.missing(have)]

    async def _lacked(self, have: frozenset[str]) -> list[dict[str, object]]:
        if self._set is None or len(self._set) - len(have) < _INLINE_ROSTER:
            return self.missing(have)
        return await asyncio.to_thread(self.missing, have)

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
        if len(whole) + len(statements) > _INLINE_ROSTER:
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

    def _changed(self) -> None:
        self.version += 1
        for listener in list(self._listeners):
            listener()

    async def pull(self, untrusted_body: Mapping[str, object]) -> dict[str, object]:
        """Answer anybody's question for the statements it lacks: they prove themselves."""
        self._require_roster()
        return {"statements": await self._lacked(_hashes(untrusted_body)), "digest": self.digest}

    async def sync(self, untrusted_body: Mapping[str, object]) -> dict[str, object]:
        """Take what a member sends and answer with what it lacks and what we still want."""
        given = untrusted_body.get("statements", [])
        if not isinstance(given, list):
            raise BadRequest("bad-request", "cannot take statements: not a list", where="statements")
        have = _hashes(untrusted_body)
        if given:
            await self.merge(given)
        is_needed = untrusted_body.get("fresh") is True
        await self._beacon_if_older(_BEACON_IN_NEED_S if is_needed else _BEACON_AT_MOST_S)
        mine = frozenset(self.hashes())
        return {
            "statements": await self._lacked(have),
            "want": sorted(have - mine),
            "digest": self.digest,
            "beacons": self.beacons(),
            "peers": dict(self.reached()),
        }

    # --- freshness -------------------------------------------------------------------------------

    def beacons(self) -> list[Mapping[str, object]]:
        """Return the newest beacon of each signer, in wire form."""
        return [row.beacon for row in self._beacons.values()]

    async def merge_beacons(self, untrusted: Sequence[object]) -> None:
        """Take the beacons that are newer than what was heard; ignore all others."""
        roster = self.roster
        if roster is None:
            return
        known_ones = self.beacons()
        for one in untrusted[:64]:
            if one in known_ones:
                continue
            beacon = parse_beacon(one, verify=self._verify)
            known = self._beacons.get(beacon.signer)
            is_ours = beacon.swarm == roster.swarm_id and beacon.signer in roster.signers
            if not is_ours or (known is not None and beacon.n <= known.n):
                continue
            await self._keep_beacon(BeaconRow(signer=beacon.signer, n=beacon.n, beacon=encode_beacon(beacon)))

    async def _keep_beacon(self, row: BeaconRow) -> None:
        async with self._lock:
            if self.roster is None or row.beacon["swarm"] != self.roster.swarm_id:
                return  # it was left meanwhile
            await self._store.put_beacon(row)
            self._beacons[row.signer] = row
            self._heard_at_s[row.signer] = self._clock.boot_s()

    async def _try_beacon(self) -> None:
        """Sign a beacon; that the disk is full or the signer away is no reason to stop anything else."""
        try:
            await self._beacon()
        except (StoreError, Unavailable) as exc:
            log.warning("no beacon was signed: %s", exc.message)

    async def _beacon_if_older(self, than_s: float) -> None:
        key = self._signer.public_key()
        heard_s = self._heard_at_s.get(key.hex()) if key is not None else None
        if heard_s is None or self._clock.boot_s() - heard_s >= than_s:
            await self._try_beacon()

    async def _beacon(self) -> None:
        key, roster = self._signer.public_key(), self.roster
        if key is None or roster is None or not self.is_signer():
            return
        known = self._beacons.get(key.hex())
        beacon = sign_beacon(
            swarm=roster.swarm_id,
            epoch=roster.epoch,
            signer=key,
            n=(known.n if known is not None else 0) + 1,
            sign=self._signer.sign,
        )
        await self._keep_beacon(BeaconRow(signer=key.hex(), n=_number(beacon), beacon=beacon))

    # --- acts of a person ------------------------------------------------------------------------

    async def init(self, name: str, *, node_name: str, recovery_public_hex: str) -> dict[str, object]:
        """Begin a swarm of one: this node, its signer, and the recovery key that the person wrote down."""
        async with self._acts:
            self._require_none("begin a swarm")
            identity = await asyncio.to_thread(self._identities.create)
            signer = await asyncio.to_thread(self._signer.create)
            body = make_body(
                Kind.GENESIS,
                name=name,
                recovery=recovery_public_hex,
                signer=signer.hex(),
                nonce=self._entropy.token(16),
                node=identity.node_id,
            )
            genesis = self._parse(signed(body, (signer, self._signer.sign)))
            whole = StatementSet(genesis)
            cert = _b64(identity.cert_der)
            admit = self._sign(Kind.ADMIT, genesis.sha256, 0, cert=cert, name=node_name, role="node")
            whole.add([self._parse(admit)])
            await self._note("init", swarm=genesis.sha256, node=identity.node_id)
            await self._begin(whole, identity)
        await self._try_beacon()
        return {"swarm": genesis.sha256, "id": identity.node_id, "name": node_name}

    async def join(self, statements: Sequence[object], *, genesis_sha256: str, identity: Identity) -> None:
        """Believe the roster of the swarm that admitted this node."""
        whole = await asyncio.to_thread(self._read_set, statements)
        if whole.roster.swarm_id != genesis_sha256 or identity.node_id not in whole.roster.members:
            raise BadRequest("bad-bundle", "cannot join: the roster that came does not admit this node")
        async with self._acts:
            self._require_none("join")
            kept = await asyncio.to_thread(self._identities.load)
            if kept is None or kept.node_id != identity.node_id:
                raise Conflict("key-changed", "cannot join: the key of this node is another one meanwhile")
            await self._note("join", swarm=genesis_sha256, node=identity.node_id)
            await self._begin(whole, identity)

    def _require_none(self, what: str) -> None:
        if self.roster is not None:
            raise Conflict(
                "already-in-swarm",
                f"cannot {what}: this node is in swarm {self.roster.name!r} already",
                hint="mycoswarmctl leave first",
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

    async def admit(self, *, cert_der: bytes, name: str, role: str, invite: str) -> Member:
        """Sign a newcomer in and use up its invitation, both or neither.

        A member that asks again, because the answer was lost, is welcome with what it is.
        """
        node_id = self._read_cert(cert_der).node_id
        async with self._lock:
            self.require_signer()
            known = self.member(node_id)
            if known is not None and known.role.value == role:
                with suppress(Conflict):  # used up by itself, and the answer was lost
                    await self._believe([], invite=invite)
                return known
            if self._was_here(node_id):
                raise Conflict(
                    "id-used",
                    "cannot admit this key: it was in this swarm before, and ids are never used again",
                    hint="make a new key on that machine: mycoswarmctl leave, then enroll again",
                )
            statement = self._new(Kind.ADMIT, cert=_b64(cert_der), name=self._free_name(name), role=role)
            await self._note("admit", node=node_id, role=role, statement=statement.sha256)
            await self._believe([statement], invite=invite)
            member = self.member(node_id)
        if member is None:
            raise Conflict("not-admitted", "cannot admit this key: the roster is against it")
        return member

    def _was_here(self, node_id: str) -> bool:
        """Tell whether an id has or had a place in the swarm, or was put out before it came."""
        return any(
            node_id in (one.facts.get("node"), one.facts.get("old"))
            for one in self._whole().by_hash.values()
            if one.kind in (Kind.ADMIT, Kind.REKEY, Kind.REVOKE, Kind.LEAVE)
        )

    async def revoke(self, text: str, reason: str) -> Member:
        """Put a member out for ever; a signer loses its signature too, and so does whom it made a signer.

        Whoever has a stolen signing key makes more of them. Whom these admitted stays, and an honest one is
        made a signer again. Where all rests on the stolen one, a person must look at who is left.
        """
        async with self._lock:
            member = self.find(text)
            keys = self._keys_of(member.id)
            if member.is_signer:
                self._check_signers_left(member.name, keys)
            revocation = self._new(Kind.REVOKE, node=member.id, reason=reason)
            own = self._signer.public_key() or b""
            made = [key for key in self._whole().led_to(keys) if key != own.hex()] if keys else []
            keys += made[:_MAX_REMOVALS]
            removals = self._removals(keys, but=made[_MAX_REMOVALS:])
            await self._note("revoke", node=member.id, reason=reason, keys=keys)
            await self._believe([revocation, *removals])
        await self._spread()
        return member

    async def add_signer(self, text: str) -> Member:
        """Let another node sign too; it makes its key itself and says the public half.

        A key that it had before, and has lost, is removed: one node has one key.
        """
        async with self._acts:
            member = self.find(text)
            if member.role is not Role.NODE or self.ask_signer_key is None:
                raise Conflict("not-a-node", f"cannot make {member.name!r} a signer: only a node can sign")
            is_me = member.id == self.self_id
            key = self.make_signer_key() if is_me else await self.ask_signer_key(member.id)
            async with self._lock:
                others = [one for one in self._keys_of(member.id) if one != key]
                removals = self._removals(others)
                statement = self._new(Kind.ADD_SIGNER, key=key, node=member.id)
                await self._note("signer+", node=member.id, key=key)
                await self._believe([*removals, statement])
        await self._spread()
        member = self.find(member.id)
        if not member.is_signer:
            raise Conflict(
                "not-a-signer", f"cannot make {member.name!r} a signer: its key is in dispute or was removed"
            )
        return member

    async def remove_signer(self, text: str) -> Member | None:
        """Void a signer's key, also by the key itself; what it signed and this node has seen stays.

        Returns whose it was, or None where that is no member.
        """
        async with self._lock:
            member, keys = self._signer_of(text)
            self._check_signers_left(text, keys)
            removals = self._removals(keys)
            await self._note("signer-", node=member.id if member is not None else "", keys=keys)
            await self._believe(removals)
        await self._spread()
        return self.member(member.id) if member is not None else None

    def signer_names(self) -> list[str]:
        """Return who may sign: names, and the beginnings of keys that belong to no member."""
        roster = self._require_roster()
        members = {key: roster.members.get(node) for key, node in roster.signers.items()}
        return sorted(one.name if one is not None else key[:16] for key, one in members.items())

    async def leave(self) -> None:
        """Say so to the others, then forget the swarm and the keys; without a swarm, what is left of keys."""
        async with self._acts:
            if self._set is not None:
                await self._say_goodbye()
            elif self.identity is None and await asyncio.to_thread(self._identities.load) is None:
                self._require_roster()
            async with self._lock:
                await self._forget()

    async def _say_goodbye(self) -> None:
        roster, identity = self._require_roster(), self.identity
        me = self.member(identity.node_id) if identity is not None else None
        if identity is None or me is None:
            return
        if me.is_signer and len(roster.members) > 1:
            self._check_signers_left(me.name, self._keys_of(me.id))
        body = make_body(
            Kind.LEAVE,
            swarm=roster.swarm_id,
            epoch=roster.epoch,
            node=identity.node_id,
            key=identity.public_key.hex(),
        )
        await self._note("leave", node=identity.node_id)
        await self._give(signed(body, (identity.public_key, identity.sign)))

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

    async def rekey(self) -> dict[str, object]:
        """Put a new key in the place of this node's; the old id is never used again."""
        async with self._acts:
            roster, old = self._require_roster(), self.identity
            if old is None or not self.is_member():
                raise Conflict("not-a-member", "cannot change the key: this node is not a live member")
            following = await asyncio.to_thread(self._identities.prepare_next)
            body = make_body(
                Kind.REKEY,
                swarm=roster.swarm_id,
                epoch=roster.epoch,
                old=old.node_id,
                key=old.public_key.hex(),
                cert=_b64(following.cert_der),
            )
            wire = signed(body, (old.public_key, old.sign), (following.public_key, following.sign))
            statement = self._parse(wire)
            self._check_takes(statement)
            await self._note("rekey", node=old.node_id, to=following.node_id)
            await self._give(wire)  # while the others still know the old key
            async with self._lock:
                await self._believe([statement])
            if self.self_id != following.node_id:
                raise Conflict(
                    "overtaken",
                    "cannot change the key: the swarm was recovered meanwhile, or this node was put out",
                    hint="mycoswarmctl nodes shows what this node is now; then try again",
                )
            return {"id": following.node_id, "old": old.node_id}

    def _check_takes(self, statement: Statement) -> None:
        """Raise where the roster would not take a change of key, before anybody hears of it."""
        if statement not in self._whole().copy().add([statement]):
            raise Conflict(
                "too-many-keys",
                f"cannot change the key again: {MAX_REKEYS} times are the most",
                hint="mycoswarmctl leave, then enroll again; or recover, which begins to count anew",
            )

    def recovery_draft(self, without: Sequence[str], restore: Sequence[str]) -> dict[str, object]:
        """Return the body of a new epoch for the recovery key to sign, and whom it keeps and drops."""
        roster, whole = self._require_roster(), self._whole()
        identity = self.identity
        assert identity is not None
        out = {self.find(text).id for text in without}
        if identity.node_id in out:
            raise Conflict("recover-elsewhere", "cannot drop the node on which recover runs")
        back = {self._revoked_id(text) for text in restore} | {identity.node_id}
        kept = {node_id for node_id in roster.members if node_id not in out} | back
        keep = whole.admissions(kept)
        key = self.make_signer_key()
        body = make_body(
            Kind.EPOCH,
            swarm=roster.swarm_id,
            epoch=roster.epoch + 1,
            n=roster.epoch + 1,
            signers=[{"key": key, "node": identity.node_id}],
            keep=sorted(keep),
        )
        return {"body": _b64(body), "keeps": sorted(kept), "drops": sorted(set(roster.members) - kept)}

    async def recover(self, untrusted_statement: object) -> dict[str, object]:
        """Begin the epoch that the recovery key signed."""
        statement = self._parse(untrusted_statement)
        if statement.kind is not Kind.EPOCH:
            raise BadRequest("bad-statement", "cannot recover: this is no statement of the recovery key")
        async with self._acts:
            await self._note("recover", statement=statement.sha256)
            async with self._lock:
                await self._believe([statement])
            if statement.sha256 not in self._require_roster().hashes:
                raise Conflict(
                    "overtaken",
                    "cannot recover: the swarm was recovered elsewhere meanwhile",
                    hint="look at mycoswarmctl nodes, then decide again",
                )
        await self._try_beacon()
        await self._spread()
        return {"epoch": self._require_roster().epoch}

    def make_signer_key(self) -> str:
        """Make this node's signing key where there is none in use, and return its public half."""
        key = self._signer.public_key()
        if key is not None and self._set is not None and key.hex() in self._set.removed_keys():
            self._signer.destroy()
        return self._signer.create().hex()

    # --- helpers ---------------------------------------------------------------------------------

    def _whole(self) -> StatementSet:
        if self._set is None:
            raise Conflict(
                "no-swarm",
                "cannot do this: this node is in no swarm",
                hint="mycoswarmctl init begins one, mycoswarmctl enroll joins one",
            )
        return self._set

    def _require_roster(self) -> Roster:
        return self._whole().roster

    def _new(self, kind: Kind, **facts: object) -> Statement:
        """Sign a statement that counts now, or say why this node cannot."""
        roster = self.require_signer()
        return self._parse(self._sign(kind, roster.swarm_id, roster.epoch, **facts))

    def require_signer(self) -> Roster:
        """Return the roster where this node may sign; Conflict("not-a-signer") says who may."""
        roster = self._require_roster()
        if not self.is_signer():
            holders = ", ".join(sorted(m.name for m in roster.members.values() if m.is_signer))
            raise Conflict(
                "not-a-signer",
                "cannot sign this: this node is no signer",
                hint=f"do it on {holders}" if holders else "mycoswarmctl recover, with the paper key",
            )
        return roster

    def _sign(self, kind: Kind, swarm_id: str, epoch: int, **facts: object) -> dict[str, object]:
        key = self._signer.public_key()
        assert key is not None
        body = make_body(kind, swarm=swarm_id, epoch=epoch, by=key.hex(), **facts)
        return signed(body, (key, self._signer.sign))

    def _keys_of(self, node_id: str) -> list[str]:
        """Return the signing keys of a node, disputed ones too."""
        keys = [key for key, holders in self._whole().signing_keys().items() if node_id in holders]
        return keys[:_MAX_REMOVALS]

    def _signer_of(self, text: str) -> tuple[Member | None, list[str]]:
        """Return whom a person means by a name, an id or the beginning of a key, and the keys to remove."""
        used = self._whole().signing_keys()
        named = [key for key in used if len(text) >= _MIN_KEY_PREFIX and key.startswith(text)]
        if len(named) == 1:
            holder, *_ = sorted(used[named[0]])
            return self.member(holder), named
        member = self.find(text)
        keys = self._keys_of(member.id)
        if not keys:
            raise NotFound("not-a-signer", f"cannot remove {member.name!r}: it is no signer")
        return member, keys

    def _removals(self, keys: Iterable[str], *, but: Sequence[str] = ()) -> list[Statement]:
        whole = self._whole()
        return [
            self._new(Kind.DROP_SIGNER, key=key, keep=sorted(whole.signed_by(key, but=but))) for key in keys
        ]

    def _check_signers_left(self, name: str, keys: Sequence[str]) -> None:
        if self._require_roster().signers.keys() <= set(keys):
            raise Conflict(
                "last-signer",
                f"cannot put out {name!r}: it is the only signer, and nobody could sign after it",
                hint="mycoswarmctl signers add another node first, or recover with the paper key elsewhere",
            )

    def _free_name(self, wanted: str) -> str:
        taken = {member.given_name for member in self._require_roster().members.values()}
        names = [wanted, *(numbered(wanted, n) for n in range(2, MAX_STATEMENTS))]
        return next(name for name in names if name not in taken)

    def _revoked_id(self, text: str) -> str:
        found = [one for one in self._require_roster().revoked if one.startswith(text)]
        if len(found) != 1 or len(text) < _MIN_PREFIX:
            raise NotFound("unknown-node", f"cannot restore {text[:80]!r}: give the id of a revoked node")
        return found[0]

    async def _spread(self) -> None:
        if self.spread is not None:
            await self.spread()

    async def _give(self, *statements: Mapping[str, object]) -> None:
        """Hand statements to everybody who can be reached, before they take effect here."""
        if self.give is not None:
            await self.give(statements)

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


def _hashes(untrusted_body: Mapping[str, object]) -> frozenset[str]:
    have = untrusted_body.get("have", [])
    if not isinstance(have, list) or len(have) > MAX_STATEMENTS:
        raise BadRequest("bad-request", "cannot compare rosters: have is no list of hashes", where="have")
    for one in have:
        if not isinstance(one, str) or len(one) != _HASH_CHARS:
            raise BadRequest("bad-request", "cannot compare rosters: not a sha256 in hex", where="have")
    return frozenset(have)


def _number(beacon: Mapping[str, object]) -> int:
    n = beacon["n"]
    assert isinstance(n, int)
    return n


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
