"""What flow needs of the outside, as protocols. Only daemon/wiring.py names the classes behind them."""

import socket
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from mycoswarmd.core.policy.evaluate import Permit
from mycoswarmd.core.tasks import Event, Task, TaskSpec, TaskState
from mycoswarmd.core.types import CageSpec, Proof, TaskId, Zone
from mycoswarmd.wire.engineunit import Serving
from mycoswarmd.wire.frames import Frame
from mycoswarmd.wire.prompt import Answer, Delta, Embeddings, Prompt, PromptKind, Via
from mycoswarmd.wire.workspace import ReadAt

T = TypeVar("T")


class Clock(Protocol):
    """Time, from one place."""

    def now_ms(self) -> int:
        """Return Unix time in milliseconds. For people and receipts, never for security."""
        ...

    def monotonic_s(self) -> float:
        """Return a clock that only goes forward, in seconds."""
        ...

    def minute_of_day(self) -> int | None:
        """Return the local time of day in minutes, or None where the clock is not to be trusted."""
        ...


class Dial(Protocol):
    """Makes TCP connections for a core that has no network; None in its place means: connect yourself."""

    async def __call__(self, host: str, port: int, within_s: float) -> socket.socket:
        """Return a connected, non-blocking socket that the caller owns.

        The host is an IP address in numbers, with %scope where it is link-local IPv6. All that fails is an
        OSError, as if one had connected oneself: ConnectionRefusedError, TimeoutError, PermissionError...
        """
        ...


class Entropy(Protocol):
    """Randomness, from one place."""

    def token(self, bytes_count: int) -> str:
        """Return that many random bytes as lower-case hex."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model that an engine says it can serve.

    Attributes:
        zone: where a prompt to it would go. CLOUD for a local engine that would itself forward.
        dest: the declared destination for CLOUD, or None when it is not declared.
        node: the member that computes the answer, for LAN; None for engines of this node.
        tier: what that member says of its size.
    """

    name: str
    engine: str
    zone: Zone
    kinds: frozenset[PromptKind]
    dest: str | None = None
    context_tokens: int | None = None
    native_tools: bool = False
    loaded: bool = False
    size_bytes: int | None = None
    node: str | None = None
    tier: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineHealth:
    """How an engine is, for status and placement.

    Attributes:
        absent: the models that it would serve if it were up, where that is known.
    """

    name: str
    kind: str  # managed | ollama | openai | peer
    state: str  # starting | ready | down | stopped
    detail: str = ""  # for a person: why it is down and what to do
    models: int = 0
    running: int = 0  # prompts in progress
    waiting: int = 0  # prompts held back by its concurrency bound
    pid: int | None = None
    restarts: int = 0
    node: str | None = None  # of kind peer: which member
    absent: tuple[str, ...] = ()


class Engine(Protocol):
    """Turns a prompt into tokens. Every method that sends a prompt takes the Permit for it.

    Implementations call `permit.covers(zone=..., dest=..., model=..., node=...)` before the first byte and
    raise errors.LocalProtocolError if it does not. They raise NotFound("model-not-found"),
    Unavailable("engine-down" or "engine-busy"), EngineError("engine-failed"),
    BadRequest("context-too-long" or "bad-request").
    """

    @property
    def name(self) -> str:
        """The engine's name in settings and status."""
        ...

    def models(self) -> Sequence[ModelInfo]:
        """Return the latest known models, without waiting."""
        ...

    def health(self) -> EngineHealth:
        """Return the engine's state, without waiting."""
        ...

    async def run(self) -> None:
        """Start, watch, probe and restart the engine until cancelled."""
        ...

    def stream(self, permit: Permit, prompt: Prompt) -> AsyncGenerator[Delta | Via, None]:
        """Yield the answer piece by piece; closing the iterator stops the engine's work.

        Ends with Finish and then Usage, always. Begins with Via where another node computes it.
        """
        ...

    async def complete(self, permit: Permit, prompt: Prompt) -> Answer:
        """Return the whole answer; cancelling stops the engine's work."""
        ...

    async def embed(self, permit: Permit, prompt: Prompt) -> Embeddings:
        """Return one vector for each input."""
        ...


class EngineProcess(Protocol):
    """A running engine, as whoever started it holds it."""

    @property
    def pid(self) -> int:
        """The first process started for it."""
        ...

    @property
    def confined(self) -> bool:
        """Whether it runs without network and sees only its own files."""
        ...

    async def wait(self) -> int:
        """Wait for its end and return its code, negative for a signal."""
        ...

    async def kill(self) -> None:
        """End it with all its children, and wait until they are gone. Idempotent."""
        ...


class EngineStarter(Protocol):
    """Starts an engine's process; engines start none themselves."""

    def __call__(
        self,
        argv: Sequence[str],
        *,
        read_paths: Sequence[Path],
        write_paths: Sequence[Path],
        env: Mapping[str, str],
        log_path: Path,
    ) -> EngineProcess:
        """Start it, or raise CageError. It dies with this process."""
        ...


class UnitEngine(EngineProcess, Protocol):
    """A running engine in a unit of its own; `wait` raises CageError when the unit ends without a word."""

    @property
    def socket_path(self) -> Path:
        """Where it will listen."""
        ...


class EngineUnitStarter(Protocol):
    """Has somebody else start an engine, who looks up by itself what the names mean."""

    async def __call__(self, *, engine: str, model: str, serving: Serving, log_path: Path) -> UnitEngine:
        """Start it; CageError or ConfigError where no engine can be, EngineError where not with this model.

        Its last words are written to `log_path`. It dies with this process.
        """
        ...


@dataclass(frozen=True, slots=True)
class Receipt:
    """The place of one record in the chain. `id` is what people and headers carry: SEQ-HASH8."""

    seq: int
    id: str
    sha256: str


class ReceiptLog(Protocol):
    """The hash-chained log of decisions and their outcomes."""

    def append(self, kind: str, body: Mapping[str, object]) -> Receipt:
        """Chain a record and hand it to the writer; durable within 50 ms.

        Raises StoreError("receipts-unwritable") when an earlier record could not be written: no
        receipt, no effect.
        """
        ...

    async def durable(self, receipt: Receipt) -> None:
        """Wait until the record is on disk (fsynced); raise StoreError if it cannot be."""
        ...


class TaskStore(Protocol):
    """The durable queue. Every change of state is one transaction with its event."""

    async def enqueue(
        self, spec: TaskSpec, *, task_id: TaskId, now_ms: int, max_open: int
    ) -> tuple[Task, bool]:
        """Store a task and return it and True; with a known idempotency key, the earlier one and False.

        Raises Unavailable("queue-full") at max_open tasks that are not final and
        Conflict("idempotency-mismatch") when the key is known with another spec.
        """
        ...

    async def claim(self, *, now_ms: int) -> Task | None:
        """Take the most urgent runnable task: QUEUED to RUNNING, attempt + 1."""
        ...

    async def get(self, task_id: TaskId) -> Task:
        """Return a task or raise NotFound("unknown-task")."""
        ...

    async def list(
        self, *, states: frozenset[TaskState] | None, limit: int, submitter: str | None = None
    ) -> Sequence[Task]:
        """Return the newest tasks first; `submitter` is a Principal.describe()."""
        ...

    async def move(
        self,
        task_id: TaskId,
        *,
        attempt: int,
        to: TaskState,
        now_ms: int,
        code: str = "",
        message: str = "",
        summary: str = "",
        changes: str | None = None,
        not_before_ms: int = 0,
    ) -> Task:
        """Change a task's state under its fence, with its event, in one transaction.

        Raises Conflict("stale-attempt") when `attempt` is not the current one, Conflict("illegal-transition")
        when the table has no such step.
        """
        ...

    async def note(
        self,
        task_id: TaskId,
        *,
        attempt: int,
        now_ms: int,
        kind: str,
        data: Mapping[str, object],
        label: str | None = None,
        tainted: bool | None = None,
        steps: int = 0,
        tokens: int = 0,
    ) -> Event:
        """Append to the transcript under the fence; raise the label, add steps and tokens."""
        ...

    async def events(
        self, task_id: TaskId, *, after: int, limit: int, last: int | None = None
    ) -> Sequence[Event]:
        """Return events with seq > after, oldest first; or the `last` ones."""
        ...

    async def recover(self, *, now_ms: int) -> Sequence[Task]:
        """At start: end every attempt of a dead daemon by the table (back to the queue, or parked)."""
        ...

    async def due(self, *, now_ms: int) -> Sequence[Task]:
        """Return open tasks whose deadline has passed."""
        ...

    async def counts(self) -> Mapping[TaskState, int]:
        """Return how many tasks are in each state."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovalRow:
    """A question to a person. `facts` has no text of a prompt."""

    id: str
    task_id: TaskId | None  # None: an interactive prompt waits
    what: str  # sha256 of what exactly is asked, so that a later attempt finds its answer
    facts: Mapping[str, object]
    state: str  # pending | approved | denied | expired
    asked_at_ms: int
    expires_at_ms: int
    decided_by: str = ""


class ApprovalStore(Protocol):
    """Questions and answers, durable."""

    async def ask(self, row: ApprovalRow) -> ApprovalRow:
        """Store a question; if the same task asked the same before, return that row."""
        ...

    async def decide(self, approval_id: str, *, state: str, by: str, now_ms: int) -> ApprovalRow:
        """Answer a pending question; Conflict("already-decided") otherwise, NotFound("unknown-approval")."""
        ...

    async def get(self, approval_id: str) -> ApprovalRow:
        """Return one question."""
        ...

    async def pending(self, *, task_id: TaskId | None = None) -> Sequence[ApprovalRow]:
        """Return open questions, oldest first."""
        ...


class NewBlob(Protocol):
    """A blob that is being written; nobody sees it before it is finished."""

    size_bytes: int

    async def write(self, piece: bytes) -> None:
        """Append a piece; BadRequest("blob-too-large") or StoreError("disk-full") where it must not grow."""
        ...

    async def inspect(self, look: Callable[[ReadAt], T]) -> T:
        """Call something, in a thread, that reads at offsets what was written so far.

        When the caller is cancelled, the next read ends it.
        """
        ...

    async def finish(self) -> str:
        """Make it durable, and return its sha256 in hex."""
        ...


class OpenBlob(Protocol):
    """A blob that is being read."""

    size_bytes: int

    def pieces(self, at_most_bytes: int) -> AsyncGenerator[bytes, None]:
        """Yield all of it, or raise StoreError."""
        ...


class BlobStore(Protocol):
    """Workspaces and changes, by content; on the disk, never in memory."""

    def writing(self, *, expect_sha256: str | None = None) -> AbstractAsyncContextManager[NewBlob]:
        """Hold a new blob, which is gone at the end if it was not finished.

        `finish` raises BadRequest("wrong-hash") when it is not the expected one.
        """
        ...

    def reading(self, sha256: str) -> AbstractAsyncContextManager[OpenBlob]:
        """Hold a blob open that is there and whole, or raise NotFound("unknown-blob") or StoreError."""
        ...

    async def check_there(self, sha256: str) -> None:
        """Raise NotFound("unknown-blob") where there is none; whether it is whole is seen when it is read."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRow:
    """An API key; the secret itself is not stored."""

    id: str
    name: str
    created_at_ms: int
    last_used_at_ms: int | None
    revoked_at_ms: int | None


class KeyStore(Protocol):
    """API keys, by the hash of their secret."""

    async def create(self, *, key_id: str, name: str, secret_sha256: str, now_ms: int) -> KeyRow:
        """Store a key; Conflict("key-exists") when a live key has the name."""
        ...

    async def list(self) -> Sequence[KeyRow]:
        """Return all keys, also revoked ones."""
        ...

    async def revoke(self, name_or_id: str, *, now_ms: int) -> KeyRow:
        """Revoke a key or raise NotFound("unknown-key")."""
        ...

    def lookup(self, secret_sha256: str) -> KeyRow | None:
        """Return the live key of this secret, from memory."""
        ...


class UsageStore(Protocol):
    """Counters behind the policy's limits, durable."""

    async def add(self, counter: str, *, window: int, amount: int) -> int:
        """Add to a counter in a window (for example a day number) and return its total."""
        ...

    async def read(self, counter: str, *, window: int) -> int:
        """Return a counter's total."""
        ...


class CageSession(Protocol):
    """One running cage that has proved itself."""

    @property
    def proof(self) -> Proof:
        """What it proved."""
        ...

    async def send(self, frame: Frame) -> None:
        """Send a frame; CageError("cage-gone") when the cage has ended."""
        ...

    async def receive(self) -> Frame:
        """Return the next frame; CageError("cage-gone") at its end, with how it ended in the message."""
        ...

    async def close(self) -> None:
        """Kill the cage with all its children and wait for them. Idempotent."""
        ...


class CageMaker(Protocol):
    """Builds cages."""

    @property
    def level(self) -> str:
        """What this machine can enforce: a SandboxLevel."""
        ...

    async def open(self, spec: CageSpec) -> CageSession:
        """Start a cage and have it prove itself; CageError("cage-unproved" or "cage-setup") otherwise.

        CageNotUp, with the same codes, where it may come up another time.
        """
        ...
