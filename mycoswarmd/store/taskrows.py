"""A task as rows: what is stored in which column, how much of it, and back again."""

import hashlib
import json
import re
import sqlite3
from collections.abc import Mapping

from mycoswarmd.core.tasks import Event, Task, TaskSpec, TaskState
from mycoswarmd.core.types import Principal, TaskId
from mycoswarmd.errors import BadRequest, LocalProtocolError

# A prompt of 1 MiB is about 250,000 tokens, more than any model served here takes.
MAX_PROMPT_BYTES = 1 << 20
MAX_NAME_CHARS = 256
# What an agent says at its end is read by a person; what a model says in one step is cut to 4 KiB by flow.
MAX_SUMMARY_BYTES = 65_536
MAX_MESSAGE_BYTES = 4_096
MAX_EVENT_BYTES = 262_144
# 40 steps of a dozen lines are usual; this bounds what a looping agent can leave on the disk.
MAX_EVENTS = 10_000
LAST_PRIORITY = 9
_MAX_TIME_MS = 1 << 52

TASK_COLUMNS = (
    "id, state, label, tainted, spec, prompt, priority, attempt, attempt_base, created_at_ms, updated_at_ms,"
    " not_before_ms, deadline_at_ms, code, message, summary, changes, steps, tokens, idempotency_key"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_spec(spec: TaskSpec) -> None:
    """Refuse a spec that is too large, or that no column could hold, naming the field."""
    names = {"agent": spec.agent, "label": spec.label, "model": spec.model, "key": spec.idempotency_key}
    for where, name in names.items():
        if name is not None and not (0 < len(name) <= MAX_NAME_CHARS and name.isprintable()):
            raise BadRequest(
                "bad-task",
                f"cannot take a task whose {where} is {name[:40]!r}",
                hint=f"1 to {MAX_NAME_CHARS} printable characters are accepted",
                where="idempotency_key" if where == "key" else where,
            )
    try:
        prompt_bytes = len(spec.prompt.encode())
    except UnicodeEncodeError as exc:
        raise BadRequest(
            "bad-task", "cannot take a task whose prompt has half a surrogate pair", where="prompt"
        ) from exc
    if prompt_bytes > MAX_PROMPT_BYTES:
        raise BadRequest(
            "task-too-large",
            f"cannot take a task with a prompt of {prompt_bytes:,} bytes",
            hint=f"at most {MAX_PROMPT_BYTES:,} are accepted; put large inputs into the workspace",
            where="prompt",
            http_status=413,
        )
    if not 0 <= spec.priority <= LAST_PRIORITY:
        raise BadRequest(
            "bad-task", f"cannot take a task of priority {spec.priority}: 0 to 9 exist", where="priority"
        )
    if spec.workspace is not None and _SHA256.fullmatch(spec.workspace) is None:
        raise BadRequest("bad-task", "cannot take a task whose workspace is no sha256", where="workspace")
    if spec.deadline_at_ms is not None and not 0 <= spec.deadline_at_ms < _MAX_TIME_MS:
        raise BadRequest("bad-task", "cannot take a task with an absurd deadline", where="deadline")


def encode_spec(spec: TaskSpec) -> str:
    """Encode what has no column of its own."""
    by = spec.submitter
    return _json(
        {
            "agent": spec.agent,
            "label": spec.label,
            "model": spec.model,
            "workspace": spec.workspace,
            "repeatable": spec.repeatable,
            "submitter": {
                "is_owner": by.is_owner,
                "uid": by.uid,
                "user": by.user,
                "groups": sorted(by.groups),
                "key": by.key,
                "node": by.node,
                "node_id": by.node_id,
                "operator": by.operator,
                "operator_id": by.operator_id,
                "agent": by.agent,
            },
        }
    )


def fingerprint(spec: TaskSpec) -> str:
    """Hash what must be equal for two submissions with one idempotency key to be the same.

    The deadline is left out: it is counted from the arrival, so a repeated submission has another.
    So is the submitter: keys of two submitters never meet.
    """
    same = [spec.prompt, spec.agent, spec.label, spec.model, spec.priority, spec.workspace, spec.repeatable]
    return hashlib.sha256(_json(same).encode()).hexdigest()


def decode_task(row: sqlite3.Row) -> Task:
    """Build the task that a row with TASK_COLUMNS holds."""
    spec = json.loads(row["spec"])
    by = spec["submitter"]
    return Task(
        id=TaskId(row["id"]),
        spec=TaskSpec(
            prompt=row["prompt"],
            agent=spec["agent"],
            label=spec["label"],
            submitter=Principal(**{**by, "groups": frozenset(by["groups"])}),
            model=spec["model"],
            priority=row["priority"],
            deadline_at_ms=row["deadline_at_ms"],
            workspace=spec["workspace"],
            repeatable=spec["repeatable"],
            idempotency_key=row["idempotency_key"],
        ),
        state=TaskState(row["state"]),
        label=row["label"],
        tainted=bool(row["tainted"]),
        attempt=row["attempt"],
        created_at_ms=row["created_at_ms"],
        updated_at_ms=row["updated_at_ms"],
        not_before_ms=row["not_before_ms"],
        code=row["code"],
        message=row["message"],
        summary=row["summary"],
        changes=row["changes"],
        steps=row["steps"],
        tokens=row["tokens"],
        attempt_base=row["attempt_base"],
    )


def encode_data(data: Mapping[str, object]) -> str:
    """Encode an event's data, bounded."""
    encoded = _json(data)
    if len(encoded) > MAX_EVENT_BYTES:
        raise LocalProtocolError(
            "event-too-large",
            f"cannot write an event of {len(encoded):,} bytes: at most {MAX_EVENT_BYTES:,} are accepted",
        )
    return encoded


def decode_event(row: sqlite3.Row) -> Event:
    """Build the event that a row holds."""
    return Event(
        seq=row["seq"],
        at_ms=row["at_ms"],
        attempt=row["attempt"],
        kind=row["kind"],
        data=json.loads(row["data"]),
    )


def cut(text: str, max_bytes: int) -> str:
    """Shorten words that came from an agent: an end that cannot be written would never end the task."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= max_bytes:
        return encoded.decode()
    return encoded[: max_bytes - 3].decode("utf-8", "ignore") + "…"


def _json(value: object) -> str:
    # ASCII: half a surrogate pair from a model survives as an escape.
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
