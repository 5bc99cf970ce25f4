"""This node's membership of a swarm: every act of a person that changes it.

Law: one act at a time. Its receipt is written before it takes effect; what it signs goes the way of all
statements; what others have to hear first is given to them first. What is known and how it is believed is
in flow/swarmroster.py, how it is exchanged and how fresh it is in flow/swarmexchange.py.
Source: docs/wire.md.
"""

import asyncio
import base64
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from mycoswarmd.core.names import check_name, numbered
from mycoswarmd.core.roster import (
    MAX_REKEYS,
    MAX_STATEMENTS,
    Kind,
    Member,
    Roster,
    Statement,
    StatementSet,
    encode_statement,
    make_body,
    signed,
)
from mycoswarmd.core.types import Role
from mycoswarmd.errors import BadRequest, Conflict, NotFound, Unavailable
from mycoswarmd.flow.swarmexchange import SwarmExchange
from mycoswarmd.flow.swarmports import Identity
from mycoswarmd.flow.swarmroster import MIN_PREFIX

_MIN_KEY_PREFIX = 8
# As many keys are removed at once; one node can have more only by the doing of a stolen signer.
_MAX_REMOVALS = 64


class Swarm(SwarmExchange):
    """The swarm, for people and for the rest of the daemon. One per daemon."""

    async def init(self, name: str, *, node_name: str, recovery_public_hex: str) -> dict[str, object]:
        """Begin a swarm of one: this node, its signer, and the recovery key that the person wrote down."""
        check_name(name, "the swarm")
        check_name(node_name, "this node")
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

    async def admit(self, *, cert_der: bytes, name: str, role: str, invite: str) -> Member:
        """Sign a newcomer in and use up its invitation, both or neither.

        A member that asks again, because the answer was lost, is welcome with what it is.
        """
        node_id = self._read_cert(cert_der).node_id
        async with self._lock:
            await self._wake_signer()
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
            await self._wake_signer()
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
            if member.id == self.self_id:  # its links end with its membership: the others hear of it first
                await self._give(*(encode_statement(one) for one in (revocation, *removals)))
            await self._believe([revocation, *removals])
        await self._spread()
        return member

    async def add_signer(self, text: str) -> Member:
        """Let another node sign too; it makes its key itself and says the public half.

        A key that it had before, and has lost, is removed: one node has one key.
        """
        async with self._acts:
            self.require_signer()
            member = self.find(text)
            if member.role is not Role.NODE or self.ask_signer_key is None:
                raise Conflict("not-a-node", f"cannot make {member.name!r} a signer: only a node can sign")
            is_me = member.id == self.self_id
            key = await (self.make_signer_key() if is_me else self.ask_signer_key(member.id))
            async with self._lock:
                await self._wake_signer()
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
            await self._wake_signer()
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

    async def leave(self) -> list[str] | None:
        """Say so to the others, then forget the swarm and the keys; without a swarm, what is left of keys.

        Returns who of the others heard of it, or None where there is nobody to tell.
        """
        told: list[str] | None = None
        async with self._acts:
            if self._set is not None:
                told = await self._say_goodbye()
            elif self.identity is None and await asyncio.to_thread(self._identities.load) is None:
                self._require_roster()
            async with self._lock:
                await self._forget()
        return told

    async def _say_goodbye(self) -> list[str] | None:
        roster, identity = self._require_roster(), self.identity
        if identity is None:
            return None
        me = self.member(identity.node_id)
        if me is None:  # put out, perhaps from here, and nobody has heard of it
            return await self._tell(*map(encode_statement, self._against(identity.node_id)))
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
        return await self._tell(signed(body, (identity.public_key, identity.sign)))

    def _against(self, node_id: str) -> list[Statement]:
        """Return what puts a node out: its revocations, and the ends of signing keys."""
        return [
            one
            for one in self._whole().by_hash.values()
            if one.kind is Kind.DROP_SIGNER or (one.kind is Kind.REVOKE and one.facts.get("node") == node_id)
        ]

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

    async def recovery_draft(self, without: Sequence[str], restore: Sequence[str]) -> dict[str, object]:
        """Return the body of a new epoch for the recovery key to sign, and whom it keeps and drops."""
        self._require_roster()
        key = await self.make_signer_key()
        roster, whole = self._require_roster(), self._whole()
        identity = self.identity
        assert identity is not None
        out = {self.find(text).id for text in without}
        if identity.node_id in out:
            raise Conflict("recover-elsewhere", "cannot drop the node on which recover runs")
        back = {self._revoked_id(text) for text in restore} | {identity.node_id}
        kept = {node_id for node_id in roster.members if node_id not in out} | back
        keep = whole.admissions(kept)
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

    async def make_signer_key(self) -> str:
        """Make this node's signing key where there is none in use, and return its public half."""
        await asyncio.to_thread(self._signer.wake)
        key = self._signer.public_key()
        if key is not None and self._set is not None and key.hex() in self._set.removed_keys():
            await asyncio.to_thread(self._signer.destroy)
        return (await asyncio.to_thread(self._signer.create)).hex()

    # --- helpers -----------------------------------------------------------------------------------

    def _new(self, kind: Kind, **facts: object) -> Statement:
        """Sign a statement that counts now, or say why this node cannot."""
        roster = self.require_signer()
        return self._parse(self._sign(kind, roster.swarm_id, roster.epoch, **facts))

    def require_signer(self) -> Roster:
        """Return the roster where this node may sign; Conflict("not-a-signer") says who may."""
        roster = self._require_roster()
        if self.self_id in roster.signers.values() and self._signer.public_key() is None:
            raise Unavailable(
                "signer-unreachable",
                "cannot sign this: the signing key of this node is out of reach",
                hint="mycoswarmctl status says why",
            )
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
        if len(found) != 1 or len(text) < MIN_PREFIX:
            raise NotFound("unknown-node", f"cannot restore {text[:80]!r}: give the id of a revoked node")
        return found[0]

    async def _spread(self) -> None:
        if self.spread is not None:
            await self.spread()

    async def _tell(self, *statements: Mapping[str, object]) -> list[str] | None:
        """Hand over what somebody has to hear before it can be said no more; return who did."""
        if self.tell is None:
            await self._give(*statements)
        if self.tell is None or not self.peers():
            return None
        return list(await self.tell(statements))

    async def _give(self, *statements: Mapping[str, object]) -> None:
        """Hand statements to everybody who can be reached, before they take effect here."""
        if self.give is not None:
            await self.give(statements)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
