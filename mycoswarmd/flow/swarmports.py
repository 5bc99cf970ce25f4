"""What membership of a swarm needs of the outside, as protocols; daemon/wiring.py names the classes.

Law: an address is a hint. What is behind it is proved by its key before anything is sent there.
"""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from mycoswarmd.core.roster import Member
from mycoswarmd.flow.ports import Clock
from mycoswarmd.wire.peer import Word


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Where somebody may listen: an IP address in numbers (with %scope for link-local IPv6) and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    """Somebody said that a node listens somewhere. `node_id` is None for a static peer."""

    address: PeerAddress
    node_id: str | None = None
    digest: str | None = None  # of the roster that is announced, its first 16 hex digits


class BootClock(Clock, Protocol):
    """A clock that also counts while the machine sleeps, and tells one boot from the next."""

    def boot_s(self) -> float:
        """Return seconds since the machine booted, sleep included; wall-clock changes do not move it."""
        ...

    def boot_id(self) -> str:
        """Return what names this boot of the machine."""
        ...


class Reach(StrEnum):
    """How a link to a member is."""

    UNKNOWN = "unknown"  # nobody has said yet where it is
    CONNECTING = "connecting"
    READY = "ready"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerState:
    """What this node knows of another just now."""

    member: Member
    state: Reach
    detail: str = ""  # for a person: why it is not ready
    code: str = ""  # of the error that says so
    address: PeerAddress | None = None  # where it was last reached
    last_seen_s: float | None = None  # ago
    rtt_ms: float | None = None
    word: Word | None = None  # only while it is ready
    alarm: str = ""  # "cloned: ..." when two machines seem to have its key


class Signer(Protocol):
    """Holds this node's signing key, where it has one."""

    def public_key(self) -> bytes | None:
        """Return the public half at once, or None: this node signs nothing, or nobody has said so yet."""
        ...

    def create(self) -> bytes:
        """Make the key if there is none, durably, and return its public half."""
        ...

    def wake(self) -> None:
        """Wait, in a thread, until the public half is known and a signature takes no time."""
        ...

    def sign(self, message: bytes) -> bytes:
        """Sign; raise NotFound("not-a-signer") where there is no key."""
        ...

    def destroy(self) -> None:
        """Forget the key. Idempotent."""
        ...


class Identity(Protocol):
    """This node's own key and certificate."""

    @property
    def node_id(self) -> str:
        """The id of the key."""
        ...

    @property
    def cert_der(self) -> bytes:
        """The certificate."""
        ...

    @property
    def public_key(self) -> bytes:
        """The raw public key, 32 bytes."""
        ...

    def sign(self, message: bytes) -> bytes:
        """Sign with the node's key."""
        ...


class IdentityStore(Protocol):
    """Keeps this node's key on disk, and makes new ones."""

    def load(self) -> Identity | None:
        """Return the identity, or None when there is none; ConfigError when it cannot be used."""
        ...

    def create(self) -> Identity:
        """Make a key if there is none, durably, and return the identity."""
        ...

    def prepare_next(self) -> Identity:
        """Make the key that will replace this one, durably, beside it; the same one until it is adopted."""
        ...

    def adopt_next(self) -> Identity:
        """Put the prepared key in the place of the current one, atomically."""
        ...

    def destroy(self) -> None:
        """Forget the keys. Idempotent."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class InviteRow:
    """An open invitation. The code itself is not stored, only the keys that were derived from it."""

    invite: str  # four public characters
    keys: bytes  # inviter, joiner and bundle key, 32 bytes each
    role: str  # node | operator
    name: str  # "" lets the newcomer name itself
    needs_confirm: bool
    expires_at_boot_ms: int  # on CLOCK_BOOTTIME of this boot
    failures: int
    state: str  # open | used | burnt | expired | cancelled


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRow:
    """What is remembered of a member across restarts: hints and the clone alarm, never trust."""

    node_id: str
    addresses: tuple[PeerAddress, ...]
    boot: int
    instance: str
    last_seen_at_ms: int
    alarm: str  # "" or what was seen


@dataclass(frozen=True, slots=True, kw_only=True)
class BeaconRow:
    """The newest counter that a signer signed, as received (wire form in `beacon`)."""

    signer: str  # public key, hex
    n: int
    beacon: Mapping[str, object]


class RosterStore(Protocol):
    """Statements, invitations, beacons, peers and this node's counters; durable when a call returns."""

    async def load(self) -> tuple[Sequence[Mapping[str, object]], Sequence[BeaconRow]]:
        """Return all statements in wire form, genesis first, and the newest beacon of each signer."""
        ...

    async def add(
        self,
        statements: Sequence[tuple[str, Mapping[str, object]]],
        *,
        drop: Sequence[str] = (),
        invite: str | None = None,
        settled: Callable[[BaseException | None], None] | None = None,
    ) -> None:
        """Store (hash, wire form) pairs, drop pruned hashes and use up an invitation, in one transaction.

        `settled` is called with the failure, if any, in the end, also when the caller was cancelled.
        Raises Conflict("invite-used") and stores nothing when the invitation is not open any more.
        """
        ...

    async def clear(self, *, settled: Callable[[BaseException | None], None] | None = None) -> None:
        """Forget the swarm: statements, beacons, invitations and peers. The boot counter stays."""
        ...

    async def put_beacon(self, row: BeaconRow) -> None:
        """Keep a beacon if its counter is higher than the kept one."""
        ...

    async def next_boot(self, *, by: int = 1) -> int:
        """Count this start of the daemon and return the number, from 1; after a restore, far ahead."""
        ...

    async def put_invite(self, row: InviteRow, *, boot_id: str) -> None:
        """Store an invitation that lives until this boot of the machine ends."""
        ...

    async def invites(self, *, boot_id: str) -> Sequence[InviteRow]:
        """Return the invitations of this boot, newest first, at most 100, used and burnt ones too."""
        ...

    async def close_invite(self, invite: str, *, state: str) -> None:
        """Mark an open invitation burnt, expired or cancelled."""
        ...

    async def count_failure(self, invite: str, *, at_most: int) -> int:
        """Count a failed proof, burn the invitation at `at_most`, and return the new count."""
        ...

    async def peers(self) -> Sequence[PeerRow]:
        """Return what is remembered of members."""
        ...

    async def put_peer(self, row: PeerRow) -> None:
        """Remember a member; at most 16 addresses, the newest first."""
        ...


class PeerClient(Protocol):
    """HTTP to one member over connections on which it proved its key. Kept alive; safe to use concurrently.

    All methods raise Unavailable("peer-unreachable") when there is no answer, Unauthenticated
    ("peer-unproved") when what answers has another key, Denied / BadRequest / NotFound / Unavailable as
    the member answered, and EngineError("peer-failed") when it answers garbage.
    """

    async def ask(
        self, method: str, path: str, body: Mapping[str, object] | None = None, *, within_s: float = 5.0
    ) -> Mapping[str, object]:
        """Return a bounded JSON answer."""
        ...

    def watch(self) -> AsyncGenerator[Word | None, None]:
        """Yield the member's words as they come, None for a heartbeat; ends when the connection does."""
        ...

    def remote_address(self) -> PeerAddress | None:
        """Return where the member was last reached."""
        ...

    def cut(self) -> None:
        """Drop every connection now, also in the middle of a stream."""
        ...


class PeerDialer(Protocol):
    """Makes clients of members."""

    def member(self, member: Member, addresses: "AddressBook") -> AbstractAsyncContextManager[PeerClient]:
        """Hold a client of one member; it dials the addresses that the book has at that moment."""
        ...

    def stranger(self, address: PeerAddress) -> AbstractAsyncContextManager["StrangerClient"]:
        """Hold one connection to whoever listens there; presents nothing and believes nothing."""
        ...


class AddressBook(Protocol):
    """Where a member may be just now, best first."""

    def addresses(self, node_id: str) -> Sequence[PeerAddress]:
        """Return at most 16 addresses to try."""
        ...


class StrangerClient(Protocol):
    """One TLS connection to somebody unproved, for enrolment and the roster pull."""

    @property
    def server_cert_der(self) -> bytes:
        """The certificate that the other side presented; known after the first answer."""
        ...

    async def post(self, path: str, body: Mapping[str, object]) -> Mapping[str, object]:
        """Send and return JSON on the same connection; errors as in PeerClient."""
        ...
