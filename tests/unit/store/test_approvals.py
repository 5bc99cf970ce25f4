"""Questions and answers: once per task and question, answered once, never after their time."""

import asyncio
from dataclasses import replace

import pytest

from mycoswarmd.core.tasks import TaskSpec
from mycoswarmd.core.types import Principal, TaskId
from mycoswarmd.errors import Conflict, LocalProtocolError, NotFound, StoreError
from mycoswarmd.flow.ports import ApprovalRow
from mycoswarmd.store.approvals import MAX_FACTS_BYTES, SqliteApprovalStore
from mycoswarmd.store.db import Database
from mycoswarmd.store.tasks import SqliteTaskStore

TASK = TaskId("t-1")


@pytest.fixture
async def store(db: Database) -> SqliteApprovalStore:
    spec = TaskSpec(prompt="p", agent="a", label="public", submitter=Principal(user="u"))
    await SqliteTaskStore(db, len).enqueue(spec, task_id=TASK, now_ms=1, max_open=10)
    return SqliteApprovalStore(db)


def make_row(name: str, *, task_id: TaskId | None = TASK, what: str = "w", at_ms: int = 10) -> ApprovalRow:
    return ApprovalRow(
        id=name,
        task_id=task_id,
        what=what,
        facts={"tool": "run", "argv": ["git", "status"]},
        state="pending",
        asked_at_ms=at_ms,
        expires_at_ms=at_ms + 90,
    )


async def test_a_question_comes_back_as_asked(store: SqliteApprovalStore) -> None:
    row = make_row("a-1")
    assert await store.ask(row) == row
    assert await store.get("a-1") == row
    assert await store.pending() == await store.pending(task_id=TASK) == [row]
    assert await store.pending(task_id=TaskId("other")) == []


async def test_the_same_question_of_a_task_is_asked_once_whatever_the_answer(
    store: SqliteApprovalStore,
) -> None:
    await store.ask(make_row("a-1"))
    assert (await store.ask(make_row("a-2"))).id == "a-1"
    for state in ("approved", "denied"):
        what = f"what-{state}"
        await store.ask(make_row(f"first-{state}", what=what))
        await store.decide(f"first-{state}", state=state, by="user:alice", now_ms=20)
        again = await store.ask(make_row(f"second-{state}", what=what))
        assert (again.id, again.state, again.decided_by) == (f"first-{state}", state, "user:alice")
    assert (await store.ask(make_row("other", what="other"))).id == "other"


async def test_what_nobody_answered_may_be_asked_again(store: SqliteApprovalStore) -> None:
    await store.ask(make_row("a-1"))
    await store.decide("a-1", state="expired", by="", now_ms=100)
    assert (await store.ask(make_row("a-2"))).id == "a-2"


async def test_prompts_on_open_connections_ask_each_for_themselves(store: SqliteApprovalStore) -> None:
    for name in ("a-1", "a-2"):
        assert (await store.ask(make_row(name, task_id=None))).id == name
    assert [row.id for row in await store.pending()] == ["a-1", "a-2"]


async def test_a_question_is_answered_once(store: SqliteApprovalStore) -> None:
    await store.ask(make_row("a-1"))
    answered = await store.decide("a-1", state="denied", by="user:bob", now_ms=20)
    assert (answered.state, answered.decided_by) == ("denied", "user:bob")
    with pytest.raises(Conflict, match="already-decided"):
        await store.decide("a-1", state="approved", by="user:alice", now_ms=21)
    assert await store.get("a-1") == answered
    assert await store.pending() == []


async def test_of_two_answers_at_once_one_counts(store: SqliteApprovalStore) -> None:
    await store.ask(make_row("a-1"))
    said: list[str] = []

    async def answer(state: str) -> None:
        try:
            said.append((await store.decide("a-1", state=state, by="u", now_ms=20)).state)
        except Conflict as exc:
            said.append(exc.code)

    async with asyncio.TaskGroup() as group:
        group.create_task(answer("approved"))
        group.create_task(answer("denied"))
    assert sorted(said) == ["already-decided", (await store.get("a-1")).state]


async def test_no_approval_after_its_time(store: SqliteApprovalStore) -> None:
    await store.ask(make_row("a-1"))
    with pytest.raises(Conflict, match="its time is over"):
        await store.decide("a-1", state="approved", by="u", now_ms=100)
    assert (await store.decide("a-1", state="expired", by="", now_ms=100)).state == "expired"


async def test_the_unknown_and_the_absurd_are_refused(store: SqliteApprovalStore) -> None:
    with pytest.raises(NotFound, match="unknown-approval"):
        await store.get("nobody")
    with pytest.raises(NotFound, match="unknown-approval"):
        await store.decide("nobody", state="denied", by="u", now_ms=1)
    with pytest.raises(NotFound, match="unknown-task"):
        await store.ask(make_row("a-1", task_id=TaskId("nobody")))
    with pytest.raises(LocalProtocolError, match="bad-answer"):
        await store.decide("a-1", state="pending", by="u", now_ms=1)
    with pytest.raises(LocalProtocolError, match="facts-too-large"):
        await store.ask(replace(make_row("a-1"), facts={"x": "x" * MAX_FACTS_BYTES}))
    await store.ask(make_row("a-1"))
    with pytest.raises(StoreError):
        await store.ask(make_row("a-1", what="another"))
