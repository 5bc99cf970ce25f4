"""What the HTTP interface needs of the node, as protocols; daemon/wiring.py fills them in."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mycoswarmd.api.room import BodyRoom, Size
from mycoswarmd.core.policy.model import Policy
from mycoswarmd.flow.approve import ApprovalDesk
from mycoswarmd.flow.enrol import Invitations
from mycoswarmd.flow.ports import ApprovalStore, BlobStore, Clock, Entropy, KeyStore, ReceiptLog, TaskStore
from mycoswarmd.flow.prompt import Prompts
from mycoswarmd.flow.swarm import Swarm
from mycoswarmd.flow.swarmports import Hint, PeerAddress, PeerState
from mycoswarmd.flow.task import Tasks
from mycoswarmd.wire.peer import Word


class ReceiptBook(ReceiptLog, Protocol):
    """The receipts, also for reading."""

    async def page(self, *, after: int, limit: int, last: int | None) -> Sequence[Mapping[str, object]]:
        """Return receipts with seq > after, oldest first, or the `last` newest ones."""
        ...

    async def one(self, reference: str) -> Mapping[str, object]:
        """Return a receipt by id or seq; NotFound("unknown-receipt")."""
        ...

    async def top(self) -> Mapping[str, object]:
        """Return {seq, id, sha256, count} of the head."""
        ...

    async def check(self, head: str | None) -> Mapping[str, object]:
        """Walk the chain; return {ok, count, bad_seq, reason}."""
        ...


class PolicyDesk(Protocol):
    """The policy in force and its file."""

    @property
    def policy(self) -> Policy | None:
        """The policy in force, or None: everything is denied."""
        ...

    @property
    def way_back(self) -> str:
        """How the owner gets in again whom the policy locks out, as a hint."""
        ...

    def report(self) -> Mapping[str, object]:
        """Describe the file, its text, its problem, warnings and proofs."""
        ...

    async def reload(self) -> Mapping[str, object]:
        """Read the file again; swap, or raise PolicyInvalid and keep the old one."""
        ...


class Machine(Protocol):
    """The node as a whole."""

    async def status(self) -> Mapping[str, object]:
        """Report everything that `mycoswarmctl status` shows."""
        ...

    async def security(self) -> Mapping[str, object]:
        """Report what each unit has proved about its own confinement."""
        ...

    async def doctor(self) -> Sequence[Mapping[str, object]]:
        """Check what is missing or weak on this machine, with the command that fixes it."""
        ...


class Fleet(Protocol):
    """What is known of the other members just now."""

    def states(self) -> Sequence[PeerState]:
        """Return how each live member but this node is."""
        ...

    def hint(self, hint: Hint) -> None:
        """Hear that somebody may listen somewhere; bounded, and proved before it is used."""
        ...

    async def ping(self, node_id: str) -> float:
        """Ask a member something small and return the milliseconds until its answer."""
        ...


class Newcomer(Protocol):
    """Joins a swarm."""

    async def join(self, code_text: str, addresses: Sequence[PeerAddress], name: str) -> Mapping[str, object]:
        """Join the swarm whose invitation this code belongs to; nothing is kept when that fails."""
        ...


class OwnWord(Protocol):
    """What this node says about itself to the others."""

    def now(self) -> Word:
        """Return the word of this moment."""
        ...

    async def next_change(self) -> None:
        """Wait until the word differs from what it was."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmDesk:
    """Everything about the swarm.

    Attributes:
        nearby: where swarms were seen on this network; waits a few seconds for the first.
    """

    swarm: Swarm
    invitations: Invitations
    newcomer: Newcomer
    fleet: Fleet
    word: OwnWord
    nearby: Callable[[], Awaitable[Sequence[PeerAddress]]]


# How many blobs may come or go at once, each with an open file and its hashing: of one caller, and of all of
# that kind. No kind waits for another.
_BLOBS = {"owner": Size(16, 64), "operator": Size(4, 64), "account": Size(4, 64)}
_BLOB_PATIENCE_S = 5.0


def _blob_rooms() -> Mapping[str, BodyRoom]:
    return {kind: BodyRoom(size, patience_s=_BLOB_PATIENCE_S) for kind, size in _BLOBS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Everything that handlers may use.

    Attributes:
        blob_rooms: for how many blobs that come or go at once there is room.
    """

    prompts: Prompts
    tasks: Tasks
    task_store: TaskStore
    approvals: ApprovalStore
    desk: ApprovalDesk
    blobs: BlobStore
    keys: KeyStore
    receipts: ReceiptBook
    policy: PolicyDesk
    machine: Machine
    clock: Clock
    entropy: Entropy
    swarm: SwarmDesk | None = None
    backup: Callable[[], AsyncGenerator[bytes, None]] | None = None
    blob_rooms: Mapping[str, BodyRoom] = field(default_factory=_blob_rooms)
