"""Questions to a person and their answers, durable; one answer per task and question."""

import json
import sqlite3
from collections.abc import Sequence

from mycoswarmd.core.types import TaskId
from mycoswarmd.errors import Conflict, LocalProtocolError, NotFound
from mycoswarmd.flow.ports import ApprovalRow
from mycoswarmd.store.db import Database

ANSWERS = frozenset({"approved", "denied", "expired"})
# Facts are a dozen names and hashes, shown to a person on one screen.
MAX_FACTS_BYTES = 65_536
MAX_LIST = 1_000

_COLUMNS = "id, task_id, what, facts, state, asked_at_ms, expires_at_ms, decided_by"


class SqliteApprovalStore:
    """Approvals in the database; implements flow.ports.ApprovalStore."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def ask(self, row: ApprovalRow) -> ApprovalRow:
        """Store a question; if the same task asked the same before, return that row.

        A question that expired was answered by nobody: a later attempt may ask it again.
        """
        facts = json.dumps(dict(row.facts), sort_keys=True, separators=(",", ":"), allow_nan=False)
        if len(facts) > MAX_FACTS_BYTES:
            raise LocalProtocolError(
                "facts-too-large",
                f"cannot store a question with facts of {len(facts):,} bytes: at most {MAX_FACTS_BYTES:,}",
            )

        def store(connection: sqlite3.Connection) -> ApprovalRow:
            if row.task_id is not None:
                known = connection.execute(
                    f"SELECT {_COLUMNS} FROM approvals WHERE task_id = ? AND what = ? AND state <> 'expired'",  # noqa: S608
                    (row.task_id, row.what),
                ).fetchone()
                if known is not None:
                    return _decode(known)
                if connection.execute("SELECT 1 FROM tasks WHERE id = ?", (row.task_id,)).fetchone() is None:
                    raise NotFound("unknown-task", f"cannot find task {row.task_id[:80]!r}")
            connection.execute(
                f"INSERT INTO approvals ({_COLUMNS}) VALUES (?, ?, ?, ?, 'pending', ?, ?, '')",  # noqa: S608
                (row.id, row.task_id, row.what, facts, row.asked_at_ms, row.expires_at_ms),
            )
            return _get(connection, row.id)

        return await self._db.run(store)

    async def decide(self, approval_id: str, *, state: str, by: str, now_ms: int) -> ApprovalRow:
        """Answer a pending question; Conflict("already-decided") otherwise, also when its time is over."""
        if state not in ANSWERS:
            raise LocalProtocolError("bad-answer", f"cannot answer a question with {state!r}")

        def answer(connection: sqlite3.Connection) -> ApprovalRow:
            row = _get(connection, approval_id)
            if row.state != "pending":
                raise Conflict("already-decided", f"cannot answer {approval_id!r}: it is {row.state} already")
            if state == "approved" and now_ms >= row.expires_at_ms:
                raise Conflict("already-decided", f"cannot approve {approval_id!r}: its time is over")
            connection.execute(
                "UPDATE approvals SET state = ?, decided_by = ?, decided_at_ms = ? WHERE id = ?",
                (state, by, now_ms, approval_id),
            )
            return _get(connection, approval_id)

        return await self._db.run(answer)

    async def get(self, approval_id: str) -> ApprovalRow:
        """Return one question or raise NotFound("unknown-approval")."""
        return await self._db.read(lambda connection: _get(connection, approval_id))

    async def pending(self, *, task_id: TaskId | None = None) -> Sequence[ApprovalRow]:
        """Return open questions, oldest first."""

        def select(connection: sqlite3.Connection) -> Sequence[ApprovalRow]:
            rows = connection.execute(
                f"SELECT {_COLUMNS} FROM approvals WHERE state = 'pending'"  # noqa: S608 - a constant
                " AND (:task IS NULL OR task_id = :task) ORDER BY n LIMIT :limit",
                {"task": task_id, "limit": MAX_LIST},
            )
            return [_decode(row) for row in rows]

        return await self._db.read(select)


def _get(connection: sqlite3.Connection, approval_id: str) -> ApprovalRow:
    row = connection.execute(f"SELECT {_COLUMNS} FROM approvals WHERE id = ?", (approval_id,)).fetchone()  # noqa: S608
    if row is None:
        raise NotFound("unknown-approval", f"cannot find the question {approval_id[:80]!r}")
    return _decode(row)


def _decode(row: sqlite3.Row) -> ApprovalRow:
    return ApprovalRow(**{**dict(row), "facts": json.loads(row["facts"])})
