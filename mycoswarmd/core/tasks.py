"""A task's life as a table: which event leads from which state to which. Illegal is absent.

Rule: nothing here reads a clock; times are arguments, in Unix milliseconds.
"""

from dataclasses import dataclass
from enum import StrEnum

from mycoswarmd.core.types import Principal, TaskId


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of a task's transcript."""

    seq: int
    at_ms: int
    attempt: int
    kind: str  # state | model | tool | tool-result | decision | approval | note
    data: dict[str, object]
