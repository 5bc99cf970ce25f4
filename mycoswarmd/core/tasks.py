"""A task's life as a table: which event leads from which state to which. Illegal is absent.

Two rules. Nothing here reads a clock or draws a random number; both are arguments, times in Unix
milliseconds. And two states always name one event (a test holds it), so that a store which knows
where a task is and where it is to go knows what happened.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from mycoswarmd.core.types import Principal, TaskId
from mycoswarmd.errors import Conflict

# Five tries are the default of systemd's StartLimitBurst too: what fails five times is not bad luck.
MAX_ATTEMPTS = 5
# The first retry is soon, because most crashes are restarts of the node; the last waits as long as a
# person who was told would.
FIRST_RETRY_MS = 1_000
LAST_RETRY_MS = 300_000


class TaskState(StrEnum):
    """Where a task is. The last five are final."""

    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"  # for an approval
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"  # its deadline passed before it ended
    PARKED = "parked"  # may have acted and must not be repeated: a person decides


FINAL = frozenset(
    {
        TaskState.SUCCEEDED,
        TaskState.FAILED,
        TaskState.CANCELLED,
        TaskState.EXPIRED,
        TaskState.PARKED,
    }
)


OPEN = frozenset(TaskState) - FINAL


class TaskEvent(StrEnum):
    """What happens to a task."""

    CLAIM = "claim"  # a worker takes it: the only step that raises the attempt
    ASK = "ask"  # it needs a person's approval
    RESUME = "resume"  # the answer came while its cage still stood
    REQUEUE = "requeue"  # the attempt is over, another may follow
    SUCCEED = "succeed"
    FAIL = "fail"
    CANCEL = "cancel"
    EXPIRE = "expire"
    PARK = "park"
    RETRY = "retry"  # a person says: again


# One row per state that can be left. Whatever is not here is illegal.
TRANSITIONS: Mapping[TaskState, Mapping[TaskEvent, TaskState]] = {
    TaskState.QUEUED: {
        TaskEvent.CLAIM: TaskState.RUNNING,
        TaskEvent.CANCEL: TaskState.CANCELLED,
        TaskEvent.EXPIRE: TaskState.EXPIRED,
    },
    TaskState.RUNNING: {
        TaskEvent.ASK: TaskState.WAITING,
        TaskEvent.REQUEUE: TaskState.QUEUED,
        TaskEvent.SUCCEED: TaskState.SUCCEEDED,
        TaskEvent.FAIL: TaskState.FAILED,
        TaskEvent.CANCEL: TaskState.CANCELLED,
        TaskEvent.EXPIRE: TaskState.EXPIRED,
        TaskEvent.PARK: TaskState.PARKED,
    },
    TaskState.WAITING: {
        TaskEvent.RESUME: TaskState.RUNNING,
        TaskEvent.REQUEUE: TaskState.QUEUED,
        TaskEvent.FAIL: TaskState.FAILED,
        TaskEvent.CANCEL: TaskState.CANCELLED,
        TaskEvent.EXPIRE: TaskState.EXPIRED,
        TaskEvent.PARK: TaskState.PARKED,
    },
    TaskState.FAILED: {TaskEvent.RETRY: TaskState.QUEUED},
    TaskState.PARKED: {TaskEvent.RETRY: TaskState.QUEUED},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """What was submitted. The prompt is stored with the task and nowhere else."""

    prompt: str
    agent: str
    label: str
    submitter: Principal
    model: str | None = None  # None: the agent's
    priority: int = 5  # 0 (first) .. 9 (last)
    deadline_at_ms: int | None = None
    workspace: str | None = None  # sha256 of a stored tar
    repeatable: bool = True  # False: park instead of running again after a crash
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One row of the queue."""

    id: TaskId
    spec: TaskSpec
    state: TaskState
    label: str  # starts as the spec's; only rises
    tainted: bool
    attempt: int  # the fencing number: results of an older attempt are refused
    created_at_ms: int
    updated_at_ms: int
    not_before_ms: int
    code: str = ""  # why it failed, kebab-case
    message: str = ""  # for a person; no text of the prompt
    summary: str = ""  # the agent's own words: a result, shown to the submitter only
    changes: str | None = None  # sha256 of a stored tar of what the agent changed
    steps: int = 0
    tokens: int = 0
    attempt_base: int = 0  # `attempt` when a person last said retry: tries are counted from here


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of a task's transcript."""

    seq: int
    at_ms: int
    attempt: int
    kind: str  # state | model | tool | tool-result | decision | approval | note
    data: dict[str, object]


def transition(state: TaskState, event: TaskEvent) -> TaskState:
    """Return the state that an event leads to, or raise Conflict("illegal-transition")."""
    to = TRANSITIONS.get(state, {}).get(event)
    if to is None:
        accepted = ", ".join(sorted(TRANSITIONS.get(state, {}))) or "nothing: it has ended"
        raise Conflict(
            "illegal-transition",
            f"cannot {event} a task that is {state}",
            hint=f"a task that is {state} accepts {accepted}",
        )
    return to


def event_between(state: TaskState, to: TaskState) -> TaskEvent:
    """Return the event that leads from one state to another, or raise Conflict("illegal-transition")."""
    for event, reached in TRANSITIONS.get(state, {}).items():
        if reached is to:
            return event
    raise Conflict("illegal-transition", f"cannot have this task {to}: it is {state}")


def tries(task: Task) -> int:
    """Return how often a task was started since it was submitted or a person last said retry."""
    return task.attempt - task.attempt_base


def after_crash(task: Task) -> TaskState:
    """Return where a task belongs after the node that held it died."""
    if task.state is not TaskState.RUNNING:
        return task.state  # a question outlives the node that asked it
    if not task.spec.repeatable:
        return TaskState.PARKED
    return TaskState.QUEUED if tries(task) < MAX_ATTEMPTS else TaskState.FAILED


def retry_delay_ms(attempt: int, jitter: float) -> int:
    """Return how long to wait after the given try: doubling, bounded, at least half of it certain.

    Args:
        attempt: 1 for the first; anything lower counts as 1.
        jitter: in [0, 1); spreads tasks that failed together.
    """
    doublings = min(max(attempt, 1) - 1, 20)  # 2**20 s is far above the bound; no huge integers
    whole = min(FIRST_RETRY_MS << doublings, LAST_RETRY_MS)
    return whole // 2 + int(whole / 2 * min(max(jitter, 0.0), 1.0))


def spread(task_id: TaskId) -> float:
    """Return a jitter in [0, 1) that differs from task to task and is the same for one task always."""
    digest = hashlib.sha256(task_id.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") / (1 << 32)
