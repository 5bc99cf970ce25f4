"""The durable queue. Every change of a task's state is one transaction with its event.

1. What may follow what is core.tasks' table, and nothing here.
2. A change carries the attempt it belongs to; one of an older attempt is refused.
3. Labels only rise, taint only spreads, steps and tokens only grow.
4. The most urgent runnable task is the one with the lowest priority number, then the oldest row; the
   clock has no say in the order.
"""

import sqlite3
from collections.abc import Callable, Mapping, Sequence

from mycoswarmd.core.tasks import (
    FINAL,
    LAST_RETRY_MS,
    MAX_ATTEMPTS,
    OPEN,
    Event,
    Task,
    TaskEvent,
    TaskSpec,
    TaskState,
    after_crash,
    event_between,
    retry_delay_ms,
    spread,
    tries,
)
from mycoswarmd.core.types import TaskId
from mycoswarmd.errors import Conflict, LocalProtocolError, NotFound, Unavailable
from mycoswarmd.store.db import Database
from mycoswarmd.store.taskrows import (
    MAX_EVENTS,
    MAX_MESSAGE_BYTES,
    MAX_NAME_CHARS,
    MAX_SUMMARY_BYTES,
    TASK_COLUMNS,
    check_spec,
    cut,
    decode_event,
    decode_task,
    encode_data,
    encode_spec,
    fingerprint,
)

# What one answer lists at most; a page of `mycoswarmctl tasks` is far less.
MAX_LIST = 1_000

# Why a crash left a task where it is: code and message of the step.
_CRASH_REASONS: Mapping[TaskState, tuple[str, str]] = {
    TaskState.QUEUED: ("node-stopped", "the node stopped while the task ran; it runs again"),
    TaskState.PARKED: (
        "needs-a-person",
        "cannot tell how far the task came before the node stopped, and it may not be repeated by itself",
    ),
    TaskState.FAILED: (
        "too-many-attempts",
        f"cannot finish the task: the node stopped in each of {MAX_ATTEMPTS} attempts",
    ),
}

_INSERT_EVENT = "INSERT INTO events (task_id, seq, at_ms, attempt, kind, data) VALUES (?, ?, ?, ?, ?, ?)"
_FIRST_STEP = encode_data({"from": None, "to": TaskState.QUEUED, "code": "", "message": ""})


class SqliteTaskStore:
    """The queue in the database; implements flow.ports.TaskStore.

    Args:
        db: open.
        rank: how high a label is in the policy in force; decides what "rise" means.
    """

    def __init__(self, db: Database, rank: Callable[[str], int]) -> None:
        self._db = db
        self._rank = rank

    async def enqueue(
        self, spec: TaskSpec, *, task_id: TaskId, now_ms: int, max_open: int
    ) -> tuple[Task, bool]:
        """Store a task and return it and True; with a known idempotency key, the earlier one and False."""
        check_spec(spec)
        if not 0 < len(task_id) <= MAX_NAME_CHARS:
            raise LocalProtocolError("bad-task-id", f"cannot store a task with the id {task_id[:40]!r}")
        encoded, sha256, by = encode_spec(spec), fingerprint(spec), spec.submitter.describe()
        task = Task(
            id=task_id,
            spec=spec,
            state=TaskState.QUEUED,
            label=spec.label,
            tainted=False,
            attempt=0,
            created_at_ms=now_ms,
            updated_at_ms=now_ms,
            not_before_ms=0,
        )

        def store(connection: sqlite3.Connection) -> tuple[Task, bool]:
            known = _known(connection, by, spec.idempotency_key, sha256)
            if known is not None:
                return known, False
            _check_room(connection, max_open)
            try:
                connection.execute(
                    "INSERT INTO tasks (id, state, label, submitter, spec, prompt, spec_sha256,"
                    " idempotency_key, priority, created_at_ms, updated_at_ms, deadline_at_ms, events)"
                    " VALUES (?, 'queued', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1)",
                    (
                        task_id,
                        spec.label,
                        by,
                        encoded,
                        spec.prompt,
                        sha256,
                        spec.idempotency_key,
                        spec.priority,
                        now_ms,
                        now_ms,
                        spec.deadline_at_ms,
                    ),
                )
            except sqlite3.IntegrityError as exc:
                raise Conflict("task-exists", f"cannot store task {task_id!r}: there is one already") from exc
            connection.execute(_INSERT_EVENT, (task_id, 1, now_ms, 0, "state", _FIRST_STEP))
            return task, True

        return await self._db.run(store)

    async def claim(self, *, now_ms: int) -> Task | None:
        """Take the most urgent runnable task: QUEUED to RUNNING, attempt + 1."""

        def take(connection: sqlite3.Connection) -> Task | None:
            # No back-off is longer than LAST_RETRY_MS: one that lies further ahead was written before the
            # clock was set back, and would wait for years.
            row = connection.execute(
                "SELECT id, attempt FROM tasks WHERE state = 'queued'"
                " AND (not_before_ms <= :now OR not_before_ms > :now + :longest)"
                " AND (deadline_at_ms IS NULL OR deadline_at_ms > :now) ORDER BY priority, n LIMIT 1",
                {"now": now_ms, "longest": LAST_RETRY_MS},
            ).fetchone()
            if row is None:
                return None
            task_id, attempt = TaskId(row["id"]), row["attempt"] + 1
            connection.execute(
                "UPDATE tasks SET state = 'running', attempt = ?, updated_at_ms = ?, not_before_ms = 0,"
                " code = '', message = '' WHERE id = ?",
                (attempt, now_ms, task_id),
            )
            step = {"from": TaskState.QUEUED, "to": TaskState.RUNNING}
            _append(connection, task_id, attempt, now_ms, "state", step)
            return _get(connection, task_id)

        return await self._db.run(take)

    async def get(self, task_id: TaskId) -> Task:
        """Return a task or raise NotFound("unknown-task")."""
        return await self._db.read(lambda connection: _get(connection, task_id))

    async def list(
        self, *, states: frozenset[TaskState] | None, limit: int, submitter: str | None = None
    ) -> Sequence[Task]:
        """Return the newest tasks first; `submitter` is a Principal.describe()."""
        wanted: list[str | int] = sorted(states if states is not None else frozenset(TaskState))
        where = f"state IN ({', '.join('?' * len(wanted))})"
        if submitter is not None:
            where += " AND submitter = ?"
            wanted.append(submitter)

        def select(connection: sqlite3.Connection) -> Sequence[Task]:
            rows = connection.execute(
                f"SELECT {TASK_COLUMNS} FROM tasks WHERE {where} ORDER BY n DESC LIMIT ?",  # noqa: S608
                (*wanted, max(0, min(limit, MAX_LIST))),
            )
            return [decode_task(row) for row in rows]

        return await self._db.read(select)

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
        """Change a task's state under its fence, with its event, in one transaction."""

        def change(connection: sqlite3.Connection) -> Task:
            task = _fenced(connection, task_id, attempt)
            if event_between(task.state, to) is TaskEvent.CLAIM:
                raise Conflict("illegal-transition", f"cannot start task {task_id!r} this way: claim it")
            return _move(
                connection,
                task,
                to=to,
                now_ms=now_ms,
                code=code,
                message=message,
                summary=summary,
                changes=changes,
                not_before_ms=not_before_ms,
            )

        return await self._db.run(change)

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
        """Append to the transcript under the fence; raise the label, add steps and tokens.

        Raises Conflict("task-ended") after the final state's event, Conflict("transcript-full").
        """
        if steps < 0 or tokens < 0:
            raise LocalProtocolError("bad-count", "cannot take steps or tokens back from a task")
        encoded = encode_data(data)

        def write(connection: sqlite3.Connection) -> Event:
            task = _fenced(connection, task_id, attempt)
            if task.state in FINAL:
                raise Conflict("task-ended", f"cannot write to the transcript of {task_id!r}: it has ended")
            higher = label is not None and self._rank(label) > self._rank(task.label)
            connection.execute(
                "UPDATE tasks SET label = ?, tainted = ?, steps = steps + ?, tokens = tokens + ?,"
                " updated_at_ms = ? WHERE id = ?",
                (
                    label if higher else task.label,
                    task.tainted or bool(tainted),
                    steps,
                    tokens,
                    now_ms,
                    task_id,
                ),
            )
            seq = _append_encoded(connection, task_id, attempt, now_ms, kind, encoded)
            if seq > MAX_EVENTS:
                raise Conflict(
                    "transcript-full",
                    f"cannot write to the transcript of {task_id!r}: it has {MAX_EVENTS:,} events",
                )
            return Event(seq=seq, at_ms=now_ms, attempt=attempt, kind=kind, data=dict(data))

        return await self._db.run(write)

    async def events(
        self, task_id: TaskId, *, after: int, limit: int, last: int | None = None
    ) -> Sequence[Event]:
        """Return events with seq > after, oldest first, or the `last` ones; NotFound("unknown-task")."""

        def select(connection: sqlite3.Connection) -> Sequence[Event]:
            rows = connection.execute(
                "SELECT seq, at_ms, attempt, kind, data FROM events WHERE task_id = ? AND seq > ?"  # noqa: S608
                + (" ORDER BY seq DESC LIMIT ?" if last is not None else " ORDER BY seq LIMIT ?"),
                (task_id, after, max(0, min(limit if last is None else last, MAX_LIST))),
            ).fetchall()
            if not rows:
                _get(connection, task_id)
            found = [decode_event(row) for row in rows]
            return found if last is None else found[::-1]

        return await self._db.read(select)

    async def recover(self, *, now_ms: int) -> Sequence[Task]:
        """At start: end every attempt of a dead daemon by the table (back to the queue, or parked).

        The state directory's lock makes this sound: whatever is `running` then has nobody left to run it.
        """

        def settle(connection: sqlite3.Connection) -> Sequence[Task]:
            rows = connection.execute(f"SELECT {TASK_COLUMNS} FROM tasks WHERE state = 'running' ORDER BY n")  # noqa: S608
            settled = []
            for task in [decode_task(row) for row in rows]:
                to = after_crash(task)
                code, message = _CRASH_REASONS[to]
                delay_ms = retry_delay_ms(tries(task), spread(task.id)) if to is TaskState.QUEUED else 0
                settled.append(
                    _move(
                        connection,
                        task,
                        to=to,
                        now_ms=now_ms,
                        code=code,
                        message=message,
                        not_before_ms=now_ms + delay_ms,
                    )
                )
            return settled

        return await self._db.run(settle)

    async def due(self, *, now_ms: int) -> Sequence[Task]:
        """Return open tasks whose deadline has passed."""

        def select(connection: sqlite3.Connection) -> Sequence[Task]:
            rows = connection.execute(
                f"SELECT {TASK_COLUMNS} FROM tasks WHERE deadline_at_ms IS NOT NULL AND deadline_at_ms <= ?"  # noqa: S608
                " AND state IN ('queued', 'running', 'waiting') ORDER BY deadline_at_ms LIMIT ?",
                (now_ms, MAX_LIST),
            )
            return [decode_task(row) for row in rows]

        return await self._db.read(select)

    async def counts(self) -> Mapping[TaskState, int]:
        """Return how many tasks are in each state."""

        def select(connection: sqlite3.Connection) -> Mapping[TaskState, int]:
            known = dict(connection.execute("SELECT state, n FROM task_counts").fetchall())
            return {state: known.get(state.value, 0) for state in TaskState}

        return await self._db.read(select)

    async def blobs(self) -> set[str]:
        """Return the sha256 of every workspace and every set of changes that a task refers to."""

        def select(connection: sqlite3.Connection) -> set[str]:
            rows = connection.execute(
                "SELECT json_extract(spec, '$.workspace') FROM tasks UNION SELECT changes FROM tasks"
            )
            return {sha256 for (sha256,) in rows if sha256 is not None}

        return await self._db.read(select)


def _get(connection: sqlite3.Connection, task_id: TaskId) -> Task:
    row = connection.execute(f"SELECT {TASK_COLUMNS} FROM tasks WHERE id = ?", (task_id,)).fetchone()  # noqa: S608
    if row is None:
        raise NotFound("unknown-task", f"cannot find task {task_id[:80]!r}")
    return decode_task(row)


def _fenced(connection: sqlite3.Connection, task_id: TaskId, attempt: int) -> Task:
    task = _get(connection, task_id)
    if task.attempt != attempt:
        raise Conflict(
            "stale-attempt",
            f"cannot change task {task_id!r} for attempt {attempt}: attempt {task.attempt} is current",
        )
    return task


def _known(connection: sqlite3.Connection, by: str, key: str | None, sha256: str) -> Task | None:
    if key is None:
        return None
    row = connection.execute(
        "SELECT id, spec_sha256 FROM tasks WHERE submitter = ? AND idempotency_key = ?", (by, key)
    ).fetchone()
    if row is None:
        return None
    if row["spec_sha256"] != sha256:
        raise Conflict(
            "idempotency-mismatch",
            f"cannot take the task: the idempotency key {key!r} was used for a different one, {row['id']!r}",
            hint="use a new key for a new task",
        )
    return _get(connection, TaskId(row["id"]))


def _check_room(connection: sqlite3.Connection, max_open: int) -> None:
    open_states = sorted(OPEN)
    marks = ", ".join("?" * len(open_states))
    query = f"SELECT coalesce(sum(n), 0) FROM task_counts WHERE state IN ({marks})"  # noqa: S608 - marks only
    (count,) = connection.execute(query, open_states).fetchone()
    if count >= max_open:
        raise Unavailable(
            "queue-full",
            f"cannot take the task: {count:,} tasks are open, at most {max_open:,} are accepted",
            hint="wait for some to end, or cancel some; `mycoswarmctl tasks` lists them",
            retry_after_s=10,
            http_status=429,
        )


def _move(
    connection: sqlite3.Connection,
    task: Task,
    *,
    to: TaskState,
    now_ms: int,
    code: str = "",
    message: str = "",
    summary: str = "",
    changes: str | None = None,
    not_before_ms: int = 0,
) -> Task:
    event = event_between(task.state, to)
    message = cut(message, MAX_MESSAGE_BYTES)
    connection.execute(
        "UPDATE tasks SET state = ?, updated_at_ms = ?, code = ?, message = ?, summary = ?, changes = ?,"
        " not_before_ms = ?, attempt_base = ? WHERE id = ?",
        (
            to,
            now_ms,
            code,
            message,
            cut(summary, MAX_SUMMARY_BYTES),
            changes,
            min(not_before_ms, now_ms + LAST_RETRY_MS) if to is TaskState.QUEUED else 0,
            task.attempt if event is TaskEvent.RETRY else task.attempt_base,
            task.id,
        ),
    )
    step = {"from": task.state, "to": to, "code": code, "message": message}
    _append(connection, task.id, task.attempt, now_ms, "state", step)
    return _get(connection, task.id)


def _append(
    connection: sqlite3.Connection,
    task_id: TaskId,
    attempt: int,
    now_ms: int,
    kind: str,
    data: Mapping[str, object],
) -> int:
    whole = {"code": "", "message": "", **data} if kind == "state" else data
    return _append_encoded(connection, task_id, attempt, now_ms, kind, encode_data(whole))


def _append_encoded(
    connection: sqlite3.Connection, task_id: TaskId, attempt: int, now_ms: int, kind: str, data: str
) -> int:
    (seq,) = connection.execute(
        "UPDATE tasks SET events = events + 1 WHERE id = ? RETURNING events", (task_id,)
    ).fetchone()
    connection.execute(_INSERT_EVENT, (task_id, seq, now_ms, attempt, kind, data))
    return int(seq)
