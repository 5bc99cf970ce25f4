"""The queue: order, bounds, fences, idempotency, labels, recovery."""

import asyncio
from pathlib import Path

import pytest

from mycoswarmd.core.tasks import LAST_RETRY_MS, MAX_ATTEMPTS, Task, TaskSpec, TaskState
from mycoswarmd.core.types import Principal, TaskId
from mycoswarmd.errors import BadRequest, Conflict, LocalProtocolError, NotFound, Unavailable
from mycoswarmd.store.db import Database
from mycoswarmd.store.taskrows import MAX_EVENT_BYTES, MAX_PROMPT_BYTES, MAX_SUMMARY_BYTES
from mycoswarmd.store.tasks import SqliteTaskStore

ALICE = Principal(user="alice", uid=1000, groups=frozenset({"users", "audio"}))
RANKS = {"public": 0, "private": 1, "secret": 2}


def rank(label: str) -> int:
    return RANKS.get(label, 99)


@pytest.fixture
def store(db: Database) -> SqliteTaskStore:
    return SqliteTaskStore(db, rank)


def make_spec(
    *,
    prompt: str = "list the files",
    label: str = "public",
    submitter: Principal = ALICE,
    priority: int = 5,
    deadline_at_ms: int | None = None,
    workspace: str | None = None,
    repeatable: bool = True,
    key: str | None = None,
) -> TaskSpec:
    return TaskSpec(
        prompt=prompt,
        agent="scribe",
        label=label,
        submitter=submitter,
        priority=priority,
        deadline_at_ms=deadline_at_ms,
        workspace=workspace,
        repeatable=repeatable,
        idempotency_key=key,
    )


async def put(
    store: SqliteTaskStore, name: str, spec: TaskSpec | None = None, *, now_ms: int = 1, max_open: int = 1000
) -> Task:
    task, _ = await store.enqueue(spec or make_spec(), task_id=TaskId(name), now_ms=now_ms, max_open=max_open)
    return task


async def claimed(store: SqliteTaskStore, *, now_ms: int = 1) -> str | None:
    task = await store.claim(now_ms=now_ms)
    return task.id if task is not None else None


async def kinds(store: SqliteTaskStore, name: str) -> list[tuple[int, object]]:
    events = await store.events(TaskId(name), after=0, limit=100)
    return [(event.attempt, event.data.get("to", event.kind)) for event in events]


# -- enqueue --------------------------------------------------------------------------------------


async def test_a_task_comes_back_as_it_was_submitted(store: SqliteTaskStore) -> None:
    spec = TaskSpec(
        prompt="Ünïcode \0 and\nlines",
        agent="scribe",
        label="secret",
        submitter=ALICE,
        model="m",
        priority=3,
        deadline_at_ms=99,
        workspace="a" * 64,
        repeatable=False,
        idempotency_key="k",
    )
    task, is_new = await store.enqueue(spec, task_id=TaskId("t"), now_ms=7, max_open=1)
    assert is_new
    assert task == await store.get(TaskId("t"))
    assert task.spec == spec
    assert (task.state, task.label, task.attempt, task.tainted) == (TaskState.QUEUED, "secret", 0, False)
    assert (task.created_at_ms, task.updated_at_ms) == (7, 7)
    assert await kinds(store, "t") == [(0, "queued")]


async def test_a_full_queue_refuses_and_makes_room_again(store: SqliteTaskStore) -> None:
    await put(store, "a", max_open=2)
    await put(store, "b", max_open=2)
    with pytest.raises(Unavailable) as caught:
        await put(store, "c", max_open=2)
    assert (caught.value.code, caught.value.http_status) == ("queue-full", 429)
    await claimed(store)  # running is open too
    with pytest.raises(Unavailable):
        await put(store, "c", max_open=2)
    await store.move(TaskId("a"), attempt=1, to=TaskState.SUCCEEDED, now_ms=2)
    await put(store, "c", max_open=2)
    with pytest.raises(NotFound):
        await store.get(TaskId("d"))


async def test_a_known_key_gives_the_same_task_also_after_a_restart_and_in_a_full_queue(
    store: SqliteTaskStore, db: Database, path: Path
) -> None:
    first = await put(store, "a", make_spec(key="k", deadline_at_ms=10), max_open=1)
    again = await store.enqueue(
        make_spec(key="k", deadline_at_ms=20), task_id=TaskId("b"), now_ms=9, max_open=1
    )
    assert again == (first, False)
    await db.close()
    reopened = Database(path)
    await reopened.open()
    restarted = SqliteTaskStore(reopened, rank)
    assert await restarted.enqueue(make_spec(key="k"), task_id=TaskId("c"), now_ms=9, max_open=1) == (
        first,
        False,
    )
    await reopened.close()


@pytest.mark.parametrize(
    "other",
    [
        make_spec(key="k", prompt="other"),
        make_spec(key="k", label="secret"),
        make_spec(key="k", priority=1),
        make_spec(key="k", workspace="b" * 64),
        make_spec(key="k", repeatable=False),
    ],
)
async def test_a_known_key_with_another_spec_is_a_conflict(store: SqliteTaskStore, other: TaskSpec) -> None:
    await put(store, "a", make_spec(key="k"))
    with pytest.raises(Conflict, match="idempotency-mismatch"):
        await put(store, "b", other)


async def test_keys_of_two_submitters_do_not_meet(store: SqliteTaskStore) -> None:
    await put(store, "a", make_spec(key="k"))
    other = make_spec(key="k", submitter=Principal(key="laptop"), prompt="another")
    assert (await put(store, "b", other)).id == "b"


async def test_an_id_is_used_once(store: SqliteTaskStore) -> None:
    await put(store, "a")
    with pytest.raises(Conflict, match="task-exists"):
        await put(store, "a")


@pytest.mark.parametrize(
    ("spec", "where", "status"),
    [
        (make_spec(prompt="x" * (MAX_PROMPT_BYTES + 1)), "prompt", 413),
        (make_spec(prompt="é" * (MAX_PROMPT_BYTES // 2 + 1)), "prompt", 413),
        (make_spec(prompt="\ud800"), "prompt", 400),
        (make_spec(label="x" * 257), "label", 400),
        (make_spec(label="two\nlines"), "label", 400),
        (make_spec(key=""), "idempotency_key", 400),
        (make_spec(priority=-1), "priority", 400),
        (make_spec(priority=10), "priority", 400),
        (make_spec(workspace="../../etc/passwd"), "workspace", 400),
        (make_spec(deadline_at_ms=1 << 80), "deadline", 400),
    ],
)
async def test_a_spec_is_bounded_and_the_field_is_named(
    store: SqliteTaskStore, spec: TaskSpec, where: str, status: int
) -> None:
    with pytest.raises(BadRequest) as caught:
        await put(store, "a", spec)
    assert (caught.value.where, caught.value.http_status) == (where, status)
    assert await store.list(states=None, limit=10) == []


async def test_the_largest_prompt_is_kept_whole(store: SqliteTaskStore) -> None:
    task = await put(store, "a", make_spec(prompt="x" * MAX_PROMPT_BYTES))
    assert len(task.spec.prompt) == MAX_PROMPT_BYTES


# -- claim ----------------------------------------------------------------------------------------


async def test_the_most_urgent_then_the_oldest_is_claimed_whatever_the_clock_says(
    store: SqliteTaskStore,
) -> None:
    for name, priority, at in (("late", 9, 1), ("old", 5, 99), ("new", 5, 2), ("first", 0, 50)):
        await put(store, name, make_spec(priority=priority), now_ms=at)
    assert [await claimed(store, now_ms=100) for _ in range(5)] == ["first", "old", "new", "late", None]


async def test_a_claim_is_the_next_attempt_with_its_event(store: SqliteTaskStore) -> None:
    await put(store, "a")
    task = await store.claim(now_ms=5)
    assert task is not None
    assert (task.state, task.attempt, task.updated_at_ms) == (TaskState.RUNNING, 1, 5)
    assert await kinds(store, "a") == [(0, "queued"), (1, "running")]


async def test_two_claims_never_get_the_same_task(store: SqliteTaskStore) -> None:
    for n in range(40):
        await put(store, f"t-{n}")
    got: list[str | None] = []

    async def worker() -> None:
        got.extend([await claimed(store) for _ in range(5)])

    async with asyncio.TaskGroup() as group:
        for _ in range(10):
            group.create_task(worker())
    names = [name for name in got if name is not None]
    assert len(names) == len(set(names)) == 40
    assert got.count(None) == 10


async def test_a_back_off_is_waited_for_but_not_past_a_clock_that_was_set_back(
    store: SqliteTaskStore,
) -> None:
    now = 10 * LAST_RETRY_MS
    await put(store, "a")
    await claimed(store, now_ms=now)
    task = await store.move(
        TaskId("a"), attempt=1, to=TaskState.QUEUED, now_ms=now, not_before_ms=now + 5_000
    )
    assert task.not_before_ms == now + 5_000
    assert await claimed(store, now_ms=now + 4_999) is None
    assert await claimed(store, now_ms=now + 5_000) == "a"
    await store.move(TaskId("a"), attempt=2, to=TaskState.QUEUED, now_ms=now, not_before_ms=1 << 50)
    assert (await store.get(TaskId("a"))).not_before_ms == now + LAST_RETRY_MS
    assert await claimed(store, now_ms=1_000) == "a"  # 1970 again


async def test_an_overdue_task_is_not_claimed_but_due(store: SqliteTaskStore) -> None:
    await put(store, "a", make_spec(deadline_at_ms=10))
    await put(store, "b", make_spec(deadline_at_ms=20))
    await put(store, "c")
    assert await store.due(now_ms=9) == []
    assert [task.id for task in await store.due(now_ms=10)] == ["a"]
    assert await claimed(store, now_ms=10) == "b"
    assert [task.id for task in await store.due(now_ms=30)] == ["a", "b"]
    await store.move(TaskId("a"), attempt=0, to=TaskState.EXPIRED, now_ms=30)
    assert [task.id for task in await store.due(now_ms=30)] == ["b"]


# -- move and note --------------------------------------------------------------------------------


async def test_a_step_is_written_with_its_reason_in_one_event(store: SqliteTaskStore) -> None:
    await put(store, "a")
    await claimed(store)
    task = await store.move(
        TaskId("a"),
        attempt=1,
        to=TaskState.FAILED,
        now_ms=9,
        code="agent-timeout",
        message="cannot finish",
        summary="half done",
        changes="c" * 64,
    )
    assert (task.state, task.code, task.message) == (TaskState.FAILED, "agent-timeout", "cannot finish")
    assert (task.summary, task.changes, task.updated_at_ms) == ("half done", "c" * 64, 9)
    last = (await store.events(TaskId("a"), after=2, limit=9))[-1]
    assert (last.seq, last.at_ms, last.kind) == (3, 9, "state")
    assert last.data == {
        "from": "running",
        "to": "failed",
        "code": "agent-timeout",
        "message": "cannot finish",
    }


async def test_an_older_attempt_changes_nothing(store: SqliteTaskStore) -> None:
    await put(store, "a")
    await claimed(store)
    await store.move(TaskId("a"), attempt=1, to=TaskState.QUEUED, now_ms=2)
    await claimed(store)
    before = await store.get(TaskId("a")), await kinds(store, "a")
    with pytest.raises(Conflict, match="stale-attempt"):
        await store.move(TaskId("a"), attempt=1, to=TaskState.SUCCEEDED, now_ms=9, summary="stale")
    with pytest.raises(Conflict, match="stale-attempt"):
        await store.note(TaskId("a"), attempt=1, now_ms=9, kind="note", data={}, tokens=5)
    assert (await store.get(TaskId("a")), await kinds(store, "a")) == before


async def test_an_illegal_step_changes_nothing(store: SqliteTaskStore) -> None:
    await put(store, "a")
    before = await store.get(TaskId("a")), await kinds(store, "a")
    for to in (TaskState.RUNNING, TaskState.SUCCEEDED, TaskState.QUEUED, TaskState.PARKED):
        with pytest.raises(Conflict, match="illegal-transition"):
            await store.move(TaskId("a"), attempt=0, to=to, now_ms=9)
    assert (await store.get(TaskId("a")), await kinds(store, "a")) == before


async def test_a_result_is_written_once(store: SqliteTaskStore) -> None:
    await put(store, "a")
    await claimed(store)
    await store.move(TaskId("a"), attempt=1, to=TaskState.SUCCEEDED, now_ms=2, summary="first")
    for to in TaskState:
        with pytest.raises(Conflict, match="illegal-transition"):
            await store.move(TaskId("a"), attempt=1, to=to, now_ms=3, summary="second")
    with pytest.raises(Conflict, match="task-ended"):
        await store.note(TaskId("a"), attempt=1, now_ms=3, kind="note", data={})
    assert (await store.get(TaskId("a"))).summary == "first"


async def test_a_person_can_retry_and_the_tries_start_again(store: SqliteTaskStore) -> None:
    await put(store, "a")
    await claimed(store)
    await store.move(TaskId("a"), attempt=1, to=TaskState.PARKED, now_ms=2, code="x", message="y")
    task = await store.move(TaskId("a"), attempt=1, to=TaskState.QUEUED, now_ms=3)
    assert (task.attempt, task.attempt_base, task.code, task.message) == (1, 1, "", "")
    assert await claimed(store) == "a"


async def test_an_unknown_task_is_unknown(store: SqliteTaskStore) -> None:
    name = TaskId("nobody")
    with pytest.raises(NotFound, match="unknown-task"):
        await store.get(name)
    with pytest.raises(NotFound, match="unknown-task"):
        await store.move(name, attempt=0, to=TaskState.CANCELLED, now_ms=1)
    with pytest.raises(NotFound, match="unknown-task"):
        await store.note(name, attempt=0, now_ms=1, kind="note", data={})
    with pytest.raises(NotFound, match="unknown-task"):
        await store.events(name, after=0, limit=1)


async def test_labels_rise_taint_spreads_and_counts_grow(store: SqliteTaskStore) -> None:
    await put(store, "a", make_spec(label="private"))
    await claimed(store)
    seen = []
    task = await store.get(TaskId("a"))
    for label, tainted in (("public", None), (None, True), ("secret", False), ("private", None)):
        event = await store.note(
            TaskId("a"),
            attempt=1,
            now_ms=2,
            kind="model",
            data={"n": 1},
            label=label,
            tainted=tainted,
            steps=1,
            tokens=10,
        )
        task = await store.get(TaskId("a"))
        seen.append((event.seq, task.label, task.tainted, task.steps, task.tokens))
    assert seen == [
        (3, "private", False, 1, 10),
        (4, "private", True, 2, 20),
        (5, "secret", True, 3, 30),
        (6, "secret", True, 4, 40),
    ]
    assert task.spec.label == "private"
    with pytest.raises(LocalProtocolError, match="bad-count"):
        await store.note(TaskId("a"), attempt=1, now_ms=2, kind="model", data={}, tokens=-1)


async def test_words_of_an_agent_are_cut_not_refused_and_events_are_bounded(store: SqliteTaskStore) -> None:
    await put(store, "a")
    await claimed(store)
    with pytest.raises(LocalProtocolError, match="event-too-large"):
        await store.note(TaskId("a"), attempt=1, now_ms=1, kind="note", data={"text": "x" * MAX_EVENT_BYTES})
    event = await store.note(TaskId("a"), attempt=1, now_ms=1, kind="note", data={"text": "half \ud83d pair"})
    assert (await store.events(TaskId("a"), after=2, limit=1))[0] == event
    task = await store.move(
        TaskId("a"), attempt=1, to=TaskState.SUCCEEDED, now_ms=2, summary="é" * MAX_SUMMARY_BYTES + "\ud83d"
    )
    assert len(task.summary.encode()) <= MAX_SUMMARY_BYTES
    assert task.summary.endswith("é…")


async def test_the_transcript_is_bounded_but_the_end_is_always_written(
    store: SqliteTaskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mycoswarmd.store.tasks.MAX_EVENTS", 3)
    await put(store, "a")
    await claimed(store)
    await store.note(TaskId("a"), attempt=1, now_ms=1, kind="note", data={})
    with pytest.raises(Conflict, match="transcript-full"):
        await store.note(TaskId("a"), attempt=1, now_ms=1, kind="note", data={}, tokens=3)
    task = await store.move(TaskId("a"), attempt=1, to=TaskState.FAILED, now_ms=2)
    assert (task.tokens, (await kinds(store, "a"))[-1]) == (0, (1, "failed"))


async def test_events_are_read_in_pieces(store: SqliteTaskStore) -> None:
    await put(store, "a")
    await claimed(store)
    for n in range(5):
        await store.note(TaskId("a"), attempt=1, now_ms=1, kind="note", data={"n": n})
    first = await store.events(TaskId("a"), after=0, limit=3)
    rest = await store.events(TaskId("a"), after=3, limit=100)
    assert [event.seq for event in (*first, *rest)] == [1, 2, 3, 4, 5, 6, 7]
    assert await store.events(TaskId("a"), after=7, limit=100) == []


async def test_every_kind_of_submitter_comes_back(store: SqliteTaskStore) -> None:
    everybody = [
        Principal(user="u", uid=7, groups=frozenset({"g"})),
        Principal(key="laptop"),
        Principal(node="pi", node_id="a" * 26),
        Principal(operator="anna", operator_id="b" * 26, is_owner=True),
        Principal(agent="scribe"),
    ]
    for number, by in enumerate(everybody):
        await put(store, f"t{number}", make_spec(submitter=by))
        assert (await store.get(TaskId(f"t{number}"))).spec.submitter == by


# -- lists, recovery ------------------------------------------------------------------------------


async def test_lists_are_newest_first_and_filtered(store: SqliteTaskStore) -> None:
    bob = Principal(user="bob")
    for name, by in (("a", ALICE), ("b", bob), ("c", ALICE)):
        await put(store, name, make_spec(submitter=by))
    await claimed(store)
    every = await store.list(states=None, limit=10)
    assert [task.id for task in every] == ["c", "b", "a"]
    assert [task.id for task in await store.list(states=None, limit=2)] == ["c", "b"]
    queued = await store.list(states=frozenset({TaskState.QUEUED}), limit=10, submitter="user:alice")
    assert [task.id for task in queued] == ["c"]
    assert await store.list(states=frozenset(), limit=10) == []
    assert await store.list(states=None, limit=-1) == []
    counts = await store.counts()
    assert (counts[TaskState.QUEUED], counts[TaskState.RUNNING], counts[TaskState.PARKED]) == (2, 1, 0)


async def test_recovery_follows_the_table(store: SqliteTaskStore) -> None:
    for name, repeatable in (("again", True), ("parked", False), ("waits", True), ("queued", True)):
        await put(store, name, make_spec(repeatable=repeatable))
    for _ in range(3):
        await claimed(store)
    await store.move(TaskId("waits"), attempt=1, to=TaskState.WAITING, now_ms=2)
    settled = await store.recover(now_ms=1_000)
    assert {task.id: task.state.value for task in settled} == {"again": "queued", "parked": "parked"}
    assert {task.id: task.code for task in settled} == {"again": "node-stopped", "parked": "needs-a-person"}
    again = await store.get(TaskId("again"))
    assert 1_500 <= again.not_before_ms <= 2_000
    assert (await store.get(TaskId("waits"))).state is TaskState.WAITING
    assert (await store.get(TaskId("queued"))).state is TaskState.QUEUED
    assert await store.recover(now_ms=1_000) == []
    await store.move(TaskId("waits"), attempt=1, to=TaskState.QUEUED, now_ms=3)  # approved, its cage gone


async def test_a_task_that_kills_the_node_each_time_fails_in_the_end(store: SqliteTaskStore) -> None:
    await put(store, "a")
    now_ms, task = 0, await store.get(TaskId("a"))
    for _ in range(MAX_ATTEMPTS):
        now_ms += LAST_RETRY_MS
        assert await claimed(store, now_ms=now_ms) == "a"
        (task,) = await store.recover(now_ms=now_ms)
    assert (task.state, task.code, task.attempt) == (TaskState.FAILED, "too-many-attempts", MAX_ATTEMPTS)


async def test_the_blobs_in_use_are_known(store: SqliteTaskStore) -> None:
    await put(store, "a", make_spec(workspace="a" * 64))
    await put(store, "b", make_spec(workspace="b" * 64))
    await put(store, "c")
    await claimed(store)
    await store.move(TaskId("a"), attempt=1, to=TaskState.SUCCEEDED, now_ms=2, changes="c" * 64)
    assert await store.blobs() == {"a" * 64, "b" * 64, "c" * 64}


async def test_two_hundred_enqueues_at_once_are_bounded_and_durable(
    store: SqliteTaskStore, db: Database, path: Path
) -> None:
    accepted: list[str] = []
    refused: list[str] = []

    async def submit(n: int) -> None:
        try:
            accepted.append((await put(store, f"t-{n}", max_open=150)).id)
        except Unavailable as exc:
            refused.append(exc.code)

    async with asyncio.TaskGroup() as group:
        for n in range(200):
            group.create_task(submit(n))
    assert (len(accepted), refused) == (150, ["queue-full"] * 50)
    await db.close()
    again = Database(path)
    await again.open()
    found = await SqliteTaskStore(again, rank).list(states=None, limit=1000)
    assert {task.id for task in found} == set(accepted)
    await again.close()
