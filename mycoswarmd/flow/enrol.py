"""How a newcomer joins: the inviter's side and the newcomer's, message by message.

Law: neither side sends anything secret before the other has proved that it knows the code, over both
certificates. The inviter keeps no memory of a greeting, so that a flood of them costs nobody a place;
only a failed proof counts against an invitation, and the fifth burns it.
Source: docs/wire.md, "Enrolment".
"""

import asyncio
import hmac
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from mycoswarmd.core.enrol import (
    CodeKeys,
    Hello,
    Joiner,
    Welcome,
    challenge,
    check_confirm,
    derive,
    format_code,
    make_code,
    most_telling,
    parse_code,
    parse_hello,
    seal_bundle,
)
from mycoswarmd.core.names import check_name
from mycoswarmd.core.roster import ReadCert
from mycoswarmd.core.words import six_words
from mycoswarmd.errors import (
    BadRequest,
    Conflict,
    Denied,
    MycoswarmError,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from mycoswarmd.flow.ports import Entropy
from mycoswarmd.flow.swarm import Swarm
from mycoswarmd.flow.swarmports import (
    BootClock,
    IdentityStore,
    InviteRow,
    PeerAddress,
    PeerDialer,
    RosterStore,
)

HELLO_PATH = "/swarm/enroll/hello"
CONFIRM_PATH = "/swarm/enroll/confirm"
# A code of 80 secret bits cannot be guessed; this is for the log that a person reads.
MAX_FAILURES = 5
MAX_TTL_S = 24 * 3600
MAX_OPEN = 16
# A newcomer answers the challenge at once; a Pi needs two seconds for it.
_SESSION_S = 60.0
_DECIDE_S = 120.0
_AGAIN_S = 1.0
# How often a message is sent again that a busy inviter or a broken connection did not answer.
_TRIES = 8
_CLOSED = {
    "used": ("invite-used", "it was used already"),
    "burnt": ("invite-burnt", "it was tried with a wrong code too often"),
    "expired": ("invite-expired", "it has expired"),
    "cancelled": ("invite-expired", "it was cancelled"),
}


@dataclass(slots=True)
class Waiting:
    """A newcomer that proved itself and waits for a person's yes."""

    node_id: str
    name: str
    words: str
    decision: bool | None = None


class Invitations:
    """The inviter's side. One per daemon."""

    def __init__(
        self, *, swarm: Swarm, store: RosterStore, clock: BootClock, entropy: Entropy, check: "Checks"
    ) -> None:
        self._swarm = swarm
        self._store = store
        self._clock = clock
        self._entropy = entropy
        self._check = check
        self._secret = bytes.fromhex(entropy.token(32))
        self._rows: dict[str, InviteRow] = {}
        self._waiting: dict[str, Waiting] = {}
        self._asks_again_until_s = 0.0
        self._lock = asyncio.Lock()
        swarm.subscribe(self._on_roster)

    def _on_roster(self) -> None:
        """An invitation is of one swarm, and ends with this node's part in it, as on the disk."""
        if self._swarm.roster is None:
            self._rows.clear()
            self._waiting.clear()

    async def load(self) -> None:
        """Read the invitations of this boot; those of an earlier one are dead."""
        rows = await self._store.invites(boot_id=self._clock.boot_id())
        self._rows = {row.invite: row for row in reversed(rows)}

    def is_open(self) -> bool:
        """Tell whether a newcomer is expected, or one that has just been admitted may ask again."""
        if self._clock.boot_s() < self._asks_again_until_s:
            return True
        return any(self._state(row) == "open" for row in self._rows.values())

    async def open(self, *, role: str, name: str, ttl_s: int, needs_confirm: bool) -> dict[str, object]:
        """Make an invitation; its code is in the answer and nowhere else."""
        self._swarm.require_signer()
        if role not in {"node", "operator"}:
            raise BadRequest("bad-request", "cannot invite: the role is node or operator", where="role")
        if name:
            check_name(name)
        if not 1 <= ttl_s <= MAX_TTL_S:
            raise BadRequest("bad-request", f"cannot invite for {ttl_s} s: from 1 s to 24 h", where="ttl_s")
        if sum(self._state(row) == "open" for row in self._rows.values()) >= MAX_OPEN:
            raise Conflict("too-many-invites", f"cannot invite: {MAX_OPEN} invitations are open already")
        code = make_code(bytes.fromhex(self._entropy.token(32)))
        while code.invite in self._rows:
            code = make_code(bytes.fromhex(self._entropy.token(32)))
        keys = await asyncio.to_thread(derive, code)
        row = InviteRow(
            invite=code.invite,
            keys=keys.inviter + keys.joiner + keys.bundle,
            role=role,
            name=name,
            needs_confirm=needs_confirm,
            expires_at_boot_ms=round((self._clock.boot_s() + ttl_s) * 1000),
            failures=0,
            state="open",
        )
        await self._store.put_invite(row, boot_id=self._clock.boot_id())
        self._rows[row.invite] = row
        made = {"code": format_code(code), "invite": row.invite, "expires_in_s": ttl_s}
        return {**made, "name": name, "is_taken": bool(name) and self._is_taken(name)}

    def _is_taken(self, name: str) -> bool:
        roster = self._swarm.roster
        return roster is not None and any(one.given_name == name for one in roster.members.values())

    def listed(self) -> list[dict[str, object]]:
        """Return what a person may know of each invitation of this boot."""
        now_ms = self._clock.boot_s() * 1000
        return [
            {
                "invite": row.invite,
                "role": row.role,
                "name": row.name,
                "state": self._state(row),
                "failures": row.failures,
                "expires_in_s": max(0, round((row.expires_at_boot_ms - now_ms) / 1000)),
                "pending": (
                    {"name": waiting.name, "id": waiting.node_id, "words": waiting.words}
                    if (waiting := self._waiting.get(row.invite)) is not None and waiting.decision is None
                    else None
                ),
            }
            for row in self._rows.values()
        ]

    async def cancel(self, invite: str) -> None:
        """Close an open invitation."""
        row = self._rows.get(invite)
        if row is None:
            raise NotFound(
                "invite-unknown",
                f"cannot cancel: there is no invitation {invite[:8]!r} here",
                hint="`mycoswarmctl invite --list` shows them all",
            )
        if (state := self._state(row)) != "open":
            code, cause = _CLOSED[state]
            raise Conflict(code, f"cannot cancel the invitation: {cause}")
        self._asks_again_until_s = self._clock.boot_s() + _SESSION_S  # whoever waits is told
        await self._store.close_invite(invite, state="cancelled")
        self._set_state(row, "cancelled")

    def decide(self, invite: str, *, yes: bool) -> None:
        """Answer for a newcomer that waits."""
        waiting = self._waiting.get(invite)
        if waiting is None or waiting.decision is not None:
            raise NotFound("nobody-waits", f"cannot decide: nobody waits at invitation {invite[:8]!r}")
        waiting.decision = yes

    async def hello(self, untrusted_body: Mapping[str, object]) -> dict[str, object]:
        """Answer a greeting with this node's proof; remember nothing of it."""
        greeting = parse_hello(untrusted_body, read_cert=self._check.read_cert)
        row = self._row(greeting.invite)
        self._check_open(row)
        if greeting.role != row.role:
            raise BadRequest(
                "wrong-role",
                f"cannot join as {greeting.role}: this invitation is for role {row.role}",
                hint="mycoswarmctl invite --operator is for a person's laptop, without it for a machine",
            )
        nonce = bytes.fromhex(self._entropy.token(32))
        sent = challenge(
            _keys(row),
            greeting,
            nonce=nonce,
            cert_der=self._own_cert(),
            genesis_sha256=self._genesis(),
        )
        return {**sent, "session": self._seal(greeting, nonce)}

    async def confirm(self, untrusted_body: Mapping[str, object]) -> dict[str, object]:
        """Check the newcomer's proof, sign it in, and hand over the roster; or say what it waits for."""
        greeting, nonce = self._unseal(untrusted_body.get("session"))
        async with self._lock:  # one at a time: the fifth failure burns, whoever comes sixth
            row = self._row(greeting.invite)
            known = self._swarm.member(self._check.read_cert(greeting.cert_der).node_id)
            if not (row.state == "used" and known is not None):  # a lost answer may be asked for again
                self._check_not_declined(row, greeting)
                self._check_open(row)
            try:
                transcript = check_confirm(
                    _keys(row),
                    greeting,
                    untrusted_body,
                    nonce=nonce,
                    cert_der=self._own_cert(),
                    genesis_sha256=self._genesis(),
                    read_cert=self._check.read_cert,
                    verify=self._check.verify,
                )
            except Unauthenticated:
                failures = await self._store.count_failure(row.invite, at_most=MAX_FAILURES)
                self._rows[row.invite] = _with(
                    row, failures, "burnt" if failures >= MAX_FAILURES else row.state
                )
                raise
            if row.needs_confirm and row.state == "open" and not self._is_decided(row, greeting):
                return {"pending": True}
            if row.state == "open":
                await self._swarm.admit(
                    cert_der=greeting.cert_der,
                    name=row.name or greeting.name,
                    role=row.role,
                    invite=row.invite,
                )
                self._set_state(row, "used")
                self._asks_again_until_s = self._clock.boot_s() + _SESSION_S
                self._waiting.pop(row.invite, None)
        bundle = {"statements": self._swarm.missing(frozenset())}
        return seal_bundle(_keys(row), transcript, bundle)

    def _is_decided(self, row: InviteRow, greeting: Hello) -> bool:
        """Tell whether a person said yes to this very key; raise Denied at no."""
        node_id = self._check.read_cert(greeting.cert_der).node_id
        waiting = self._waiting.get(row.invite)
        if waiting is None or waiting.node_id != node_id:
            if waiting is not None:
                raise Conflict("invite-busy", "cannot join: another machine waits with this code")
            waiting = Waiting(node_id, row.name or greeting.name, six_words(node_id))
            self._waiting[row.invite] = waiting
        if waiting.decision is False:
            self._waiting.pop(row.invite, None)
            raise _declined()
        return waiting.decision is True

    def _check_not_declined(self, row: InviteRow, greeting: Hello) -> None:
        """Raise Denied where a person said no and then closed the invitation: the no is the reason."""
        waiting = self._waiting.get(row.invite)
        if self._state(row) == "open" or waiting is None or waiting.decision is not False:
            return
        if waiting.node_id == self._check.read_cert(greeting.cert_der).node_id:
            raise _declined()

    def _seal(self, greeting: Hello, nonce: bytes) -> str:
        """Put what the next message needs into a string that only this process can have made."""
        expires_s = self._clock.boot_s() + (_DECIDE_S + _SESSION_S)
        data = json.dumps(
            {
                "invite": greeting.invite,
                "nonce_j": greeting.nonce.hex(),
                "cert": greeting.cert_der.hex(),
                "role": greeting.role,
                "name": greeting.name,
                "nonce_a": nonce.hex(),
                "until_s": expires_s,
            }
        ).encode()
        return (hmac.digest(self._secret, data, "sha256") + data).hex()

    def _unseal(self, untrusted: object) -> tuple[Hello, bytes]:
        stale = BadRequest("bad-session", "cannot go on: this enrolment was not begun here, or too long ago")
        if not isinstance(untrusted, str) or len(untrusted) > 16_384:
            raise stale
        try:
            raw = bytes.fromhex(untrusted)
        except ValueError:
            raise stale from None
        mac, data = raw[:32], raw[32:]
        if not hmac.compare_digest(mac, hmac.digest(self._secret, data, "sha256")):
            raise stale
        kept = json.loads(data)  # ours: the MAC says so
        if kept["until_s"] < self._clock.boot_s():
            raise stale
        greeting = Hello(
            invite=kept["invite"],
            nonce=bytes.fromhex(kept["nonce_j"]),
            cert_der=bytes.fromhex(kept["cert"]),
            role=kept["role"],
            name=kept["name"],
        )
        return greeting, bytes.fromhex(kept["nonce_a"])

    def _row(self, invite: str) -> InviteRow:
        row = self._rows.get(invite)
        if row is None:
            raise NotFound(
                "invite-unknown",
                "cannot join: there is no such invitation here",
                hint="the code may be of another swarm, or older than that machine: ask for a new one",
            )
        return row

    def _check_open(self, row: InviteRow) -> None:
        state = self._state(row)
        if state != "open":
            code, cause = _CLOSED[state]
            raise Conflict(
                code, f"cannot join with this code: {cause}", hint="mycoswarmctl invite makes a new one"
            )

    def _state(self, row: InviteRow) -> str:
        if row.state == "open" and row.expires_at_boot_ms <= self._clock.boot_s() * 1000:
            return "expired"
        return row.state

    def _set_state(self, row: InviteRow, state: str) -> None:
        self._rows[row.invite] = _with(row, row.failures, state)

    def _own_cert(self) -> bytes:
        identity = self._swarm.identity
        assert identity is not None
        return identity.cert_der

    def _genesis(self) -> str:
        roster = self._swarm.roster
        if roster is None:
            raise Conflict("no-swarm", "cannot join: this node is in no swarm")
        return roster.swarm_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """What needs cryptography, passed in because this ring has none."""

    verify: Callable[[bytes, bytes, bytes], bool]
    read_cert: ReadCert


class Newcomer:
    """The newcomer's side."""

    def __init__(
        self,
        *,
        swarm: Swarm,
        identities: IdentityStore,
        dialer: PeerDialer,
        entropy: Entropy,
        found_at: Callable[[str, PeerAddress], None],
    ) -> None:
        self._swarm = swarm
        self._identities = identities
        self._dialer = dialer
        self._entropy = entropy
        self._found_at = found_at

    async def join(self, code_text: str, addresses: Sequence[PeerAddress], name: str) -> dict[str, object]:
        """Join the swarm whose invitation this code belongs to; nothing is kept when that fails.

        Each address is tried in turn. Raises BadRequest("bad-code"), Conflict or NotFound with the
        inviter's word on the code, Unauthenticated("inviter-unproved"), Unavailable.
        """
        code = parse_code(code_text)
        check_name(name)
        if self._swarm.roster is not None:
            raise Conflict(
                "already-in-swarm",
                f"cannot join: this node is in swarm {self._swarm.roster.name!r} already",
                hint="mycoswarmctl leave first",
            )
        keys = await asyncio.to_thread(derive, code)
        identity = await asyncio.to_thread(self._identities.create)
        self._swarm.identity = identity  # shown while a person at the other machine compares its words
        tried: list[tuple[str, MycoswarmError]] = []
        for address in addresses:
            joiner = Joiner(
                keys,
                code.invite,
                nonce=bytes.fromhex(self._entropy.token(32)),
                cert_der=identity.cert_der,
                role="node",
                name=name,
            )
            try:
                async with asyncio.timeout(_DECIDE_S + _SESSION_S):
                    welcome, server_cert = await self._exchange(joiner, address, identity.sign)
            except TimeoutError:
                late = Unavailable("no-answer", f"cannot join at {address}: no answer in time")
                tried.append((str(address), late))
                continue
            except MycoswarmError as exc:
                tried.append((str(address), exc))
                continue
            await self._swarm.join(
                welcome.statements, genesis_sha256=welcome.genesis_sha256, identity=identity
            )
            self._remember(server_cert, address)
            return self._summary(identity.node_id)
        if tried:
            raise most_telling(tried)
        raise Unavailable(
            "no-swarm-found",
            "cannot find a swarm on this network",
            hint="say where one is: mycoswarmctl enroll --address HOST",
        )

    async def _exchange(
        self, joiner: Joiner, address: PeerAddress, sign: Callable[[bytes], bytes]
    ) -> tuple[Welcome, bytes]:
        """Greet, prove and be welcomed; what a busy inviter or a lost connection costs is time."""
        untrusted, server_cert = await self._post(address, HELLO_PATH, joiner.hello())
        answer = joiner.confirm(untrusted, server_cert, sign)
        while True:
            untrusted, cert_now = await self._post(address, CONFIRM_PATH, answer)
            if cert_now != server_cert:
                raise Unauthenticated(
                    "inviter-unproved", "cannot join: the other side changed its certificate"
                )
            if untrusted.get("pending") is not True:
                return joiner.welcome(untrusted), server_cert
            await asyncio.sleep(_AGAIN_S)

    async def _post(
        self, address: PeerAddress, path: str, body: Mapping[str, object]
    ) -> tuple[Mapping[str, object], bytes]:
        """Send a message that may be sent twice, and return the answer and the certificate of that moment."""
        for is_last in (*[False] * _TRIES, True):
            try:
                async with self._dialer.stranger(address) as client:
                    answer = await client.post(path, body)
                    return answer, client.server_cert_der
            except Unavailable as exc:
                if is_last or (exc.code == "peer-unreachable" and path == HELLO_PATH):
                    raise
            await asyncio.sleep(_AGAIN_S)
        raise AssertionError

    def _remember(self, server_cert: bytes, address: PeerAddress) -> None:
        for member in self._swarm.peers():
            if member.cert_der == server_cert:
                self._found_at(member.id, address)

    def _summary(self, node_id: str) -> dict[str, object]:
        roster = self._swarm.roster
        assert roster is not None
        return {
            "swarm": roster.name,
            "id": node_id,
            "name": roster.members[node_id].name,
            "nodes": [
                {"id": member.id, "name": member.name, "role": member.role.value, "signer": member.is_signer}
                for member in roster.members.values()
            ],
        }


def _declined() -> Denied:
    return Denied("invite-declined", "cannot join: a person said no at the inviting machine")


def _keys(row: InviteRow) -> CodeKeys:
    return CodeKeys(inviter=row.keys[:32], joiner=row.keys[32:64], bundle=row.keys[64:])


def _with(row: InviteRow, failures: int, state: str) -> InviteRow:
    return replace(row, failures=failures, state=state)
