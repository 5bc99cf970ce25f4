"""The task store against the table of core.tasks: any sequence of operations, crashes included.

The model is a dictionary of what every task must be; the store must agree after every step, and every
task's transcript must tell the same path through the table.
"""

import asyncio
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mycoswarmd.core.tasks import (
    FINAL,
    LAST_RETRY_MS,
    MAX_ATTEMPTS,
    TRANSITIONS,
    Event,
    Task,
    TaskEvent,
    TaskSpec,
    TaskState,
)
from mycoswarmd.core.types import Principal, TaskId
from mycoswarmd.errors import Conflict, Unavailable
from mycoswarmd.store.db import Database
from mycoswarmd.store.tasks import SqliteTaskStore

# On a slow machine the most thorough of them take minutes.
pytestmark = pytest.mark.timeout(600)
T = TypeVar("T")

RANKS = {"public": 0, "private": 1, "secret": 2}
MAX_OPEN = 4


class Model:
    """What one task must be."""

    def __init__(self, spec: TaskSpec) -> None:
        self.spec = spec
        self.state = TaskState.QUEUED
        self.attempt = 0
        self.base = 0
        self.label = spec.label
        self.summary = ""
        self.path = [TaskState.QUEUED]

    def go(self, to: TaskState) -> None:
        if self.state in FINAL:
            self.base = self.attempt
        self.state = to
        self.path.append(to)


class StoreMachine(RuleBasedStateMachine):
    """Drives one store; `crash` drops every promise that a process could keep only in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.scratch = tempfile.TemporaryDirectory()
        self.now_ms = 1_000_000
        self.models: dict[TaskId, Model] = {}

    def wait(self, awaitable: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(awaitable)

    def outcome(self, awaitable: Coroutine[Any, Any, T]) -> T | str:
        try:
            return self.wait(awaitable)
        except (Conflict, Unavailable) as exc:
            return exc.code

    @initialize()
    def start(self) -> None:
        self.db = Database(Path(self.scratch.name) / "state" / "mycoswarm.db")
        self.wait(self.db.open())
        self.store = SqliteTaskStore(self.db, lambda label: RANKS.get(label, 9))

    def teardown(self) -> None:
        self.wait(self.db.close())
        self.wait(self.loop.shutdown_default_executor())
        self.loop.close()
        self.scratch.cleanup()

    def pick(self, data: st.DataObject) -> tuple[TaskId, Model]:
        return data.draw(st.sampled_from(sorted(self.models.items(), key=lambda item: item[0])))

    @rule(
        priority=st.integers(0, 2),
        repeatable=st.booleans(),
        label=st.sampled_from(sorted(RANKS)),
        key=st.sampled_from([None, "k1", "k2"]),
    )
    def enqueue(self, priority: int, repeatable: bool, label: str, key: str | None) -> None:
        name = TaskId(f"t-{len(self.models):03}")
        spec = TaskSpec(
            prompt="p",
            agent="a",
            label=label,
            submitter=Principal(user="u"),
            priority=priority,
            repeatable=repeatable,
            idempotency_key=key,
        )
        known = [item for item in self.models.items() if key and item[1].spec.idempotency_key == key]
        room = sum(model.state not in FINAL for model in self.models.values()) < MAX_OPEN
        got = self.outcome(self.store.enqueue(spec, task_id=name, now_ms=self.now_ms, max_open=MAX_OPEN))
        if known and known[0][1].spec != spec:
            assert got == "idempotency-mismatch"
        elif not known and not room:
            assert got == "queue-full"
        else:
            assert isinstance(got, tuple)
            assert (got[0].id, got[1]) == ((known[0][0], False) if known else (name, True))
            if not known:
                self.models[name] = Model(spec)

    @rule()
    def claim(self) -> None:
        self.now_ms += LAST_RETRY_MS  # past every back-off
        queued = [(m.spec.priority, name) for name, m in self.models.items() if m.state is TaskState.QUEUED]
        task = self.wait(self.store.claim(now_ms=self.now_ms))
        if not queued:
            assert task is None
            return
        assert task is not None
        assert task.id == min(queued)[1]
        model = self.models[task.id]
        model.attempt += 1
        model.go(TaskState.RUNNING)

    @precondition(lambda self: self.models)
    @rule(data=st.data(), to=st.sampled_from(TaskState), stale=st.integers(0, 3))
    def move(self, data: st.DataObject, to: TaskState, stale: int) -> None:
        name, model = self.pick(data)
        attempt = model.attempt - (stale == 3)
        steps = TRANSITIONS.get(model.state, {})
        is_legal = to in {reached for event, reached in steps.items() if event is not TaskEvent.CLAIM}
        summary = f"{name} {model.attempt} {len(model.path)}"
        got = self.outcome(
            self.store.move(name, attempt=attempt, to=to, now_ms=self.now_ms, code="c", summary=summary)
        )
        if attempt != model.attempt:
            assert got == "stale-attempt"
        elif not is_legal:
            assert got == "illegal-transition"
        else:
            assert isinstance(got, Task)
            assert (got.state, got.summary) == (to, summary)
            model.go(to)
            model.summary = summary

    @precondition(lambda self: self.models)
    @rule(data=st.data(), label=st.sampled_from(sorted(RANKS)))
    def note(self, data: st.DataObject, label: str) -> None:
        name, model = self.pick(data)
        got = self.outcome(
            self.store.note(
                name, attempt=model.attempt, now_ms=self.now_ms, kind="note", data={}, label=label
            )
        )
        if model.state in FINAL:
            assert got == "task-ended"
        else:
            assert isinstance(got, Event)
            model.label = max(model.label, label, key=RANKS.__getitem__)

    @rule()
    def crash(self) -> None:
        self.wait(self.db.close())
        self.start()
        self.wait(self.store.recover(now_ms=self.now_ms))
        for model in self.models.values():
            if model.state is TaskState.RUNNING:
                model.summary = ""
                if not model.spec.repeatable:
                    model.go(TaskState.PARKED)
                elif model.attempt - model.base < MAX_ATTEMPTS:
                    model.go(TaskState.QUEUED)
                else:
                    model.go(TaskState.FAILED)

    @invariant()
    def agrees(self) -> None:
        if not self.models:
            return
        tasks = self.wait(self.store.list(states=None, limit=1_000))
        found = {
            task.id: (task.spec, task.state, task.attempt, task.attempt_base, task.label, task.summary)
            for task in tasks
        }
        assert found == {
            name: (model.spec, model.state, model.attempt, model.base, model.label, model.summary)
            for name, model in self.models.items()
        }
        counts = self.wait(self.store.counts())
        for state in TaskState:
            assert counts[state] == sum(model.state is state for model in self.models.values())

    @invariant()
    def transcripts_tell_the_path(self) -> None:
        for name, model in self.models.items():
            events = self.wait(self.store.events(name, after=0, limit=1_000))
            assert [event.seq for event in events] == list(range(1, len(events) + 1))
            steps = [event.data["to"] for event in events if event.kind == "state"]
            assert steps == [state.value for state in model.path]


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
