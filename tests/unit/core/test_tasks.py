"""The table of a task's life, and the arithmetic of retries."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycoswarmd.core.tasks import (
    FINAL,
    LAST_RETRY_MS,
    MAX_ATTEMPTS,
    OPEN,
    TRANSITIONS,
    Task,
    TaskEvent,
    TaskSpec,
    TaskState,
    after_crash,
    event_between,
    retry_delay_ms,
    spread,
    transition,
    tries,
)
from mycoswarmd.core.types import Principal, TaskId
from mycoswarmd.errors import Conflict

LEGAL = [(state, event, to) for state, row in TRANSITIONS.items() for event, to in row.items()]
ILLEGAL = [
    (state, event) for state in TaskState for event in TaskEvent if event not in TRANSITIONS.get(state, {})
]


def make_task(state: TaskState, *, attempt: int = 1, base: int = 0, repeatable: bool = True) -> Task:
    spec = TaskSpec(
        prompt="p", agent="a", label="public", submitter=Principal(user="u"), repeatable=repeatable
    )
    return Task(
        id=TaskId("t"),
        spec=spec,
        state=state,
        label="public",
        tainted=False,
        attempt=attempt,
        attempt_base=base,
        created_at_ms=0,
        updated_at_ms=0,
        not_before_ms=0,
    )


@pytest.mark.parametrize(("state", "event", "to"), LEGAL)
def test_a_legal_event_leads_where_the_table_says(state: TaskState, event: TaskEvent, to: TaskState) -> None:
    assert transition(state, event) is to
    assert event_between(state, to) is event


@pytest.mark.parametrize(("state", "event"), ILLEGAL)
def test_an_illegal_event_raises(state: TaskState, event: TaskEvent) -> None:
    with pytest.raises(Conflict, match="cannot") as caught:
        transition(state, event)
    assert caught.value.code == "illegal-transition"


def test_two_states_never_name_two_events() -> None:
    pairs = [(state, to) for state, _, to in LEGAL]
    assert len(pairs) == len(set(pairs))


def test_only_a_persons_retry_leaves_a_final_state_and_open_states_can_always_end() -> None:
    out_of_final = {(state, event) for state, event, _ in LEGAL if state in FINAL}
    assert out_of_final == {(TaskState.FAILED, TaskEvent.RETRY), (TaskState.PARKED, TaskEvent.RETRY)}
    for state in OPEN:
        assert {TaskEvent.CANCEL, TaskEvent.EXPIRE} <= set(TRANSITIONS[state])


def test_there_is_no_step_from_a_state_to_itself() -> None:
    for state in TaskState:
        with pytest.raises(Conflict):
            event_between(state, state)


@pytest.mark.parametrize(
    ("state", "attempt", "base", "repeatable", "to"),
    [
        (TaskState.RUNNING, 1, 0, True, TaskState.QUEUED),
        (TaskState.RUNNING, MAX_ATTEMPTS - 1, 0, True, TaskState.QUEUED),
        (TaskState.RUNNING, MAX_ATTEMPTS, 0, True, TaskState.FAILED),
        (TaskState.RUNNING, MAX_ATTEMPTS + 1, MAX_ATTEMPTS, True, TaskState.QUEUED),
        (TaskState.RUNNING, 1, 0, False, TaskState.PARKED),
        (TaskState.RUNNING, MAX_ATTEMPTS, 0, False, TaskState.PARKED),
        (TaskState.WAITING, 1, 0, True, TaskState.WAITING),
        (TaskState.WAITING, 1, 0, False, TaskState.WAITING),
        (TaskState.QUEUED, 2, 0, True, TaskState.QUEUED),
        (TaskState.SUCCEEDED, 1, 0, True, TaskState.SUCCEEDED),
    ],
)
def test_after_a_crash(state: TaskState, attempt: int, base: int, repeatable: bool, to: TaskState) -> None:
    task = make_task(state, attempt=attempt, base=base, repeatable=repeatable)
    assert after_crash(task) is to
    assert tries(task) == attempt - base


@given(st.integers(-5, 10**9), st.floats(0, 1, exclude_max=True))
def test_a_delay_is_bounded_and_at_least_half_certain(attempt: int, jitter: float) -> None:
    delay = retry_delay_ms(attempt, jitter)
    certain, longest = retry_delay_ms(attempt, 0), retry_delay_ms(attempt, 1)
    assert 500 <= certain <= delay <= longest <= LAST_RETRY_MS
    assert longest <= 2 * certain


def test_delays_double() -> None:
    assert [retry_delay_ms(n, 1) for n in (1, 2, 3, 4)] == [1_000, 2_000, 4_000, 8_000]
    assert retry_delay_ms(100, 1) == LAST_RETRY_MS


@given(st.text(min_size=1))
def test_the_spread_of_a_task_is_its_own_and_steady(name: str) -> None:
    assert 0 <= spread(TaskId(name)) < 1
    assert spread(TaskId(name)) == spread(TaskId(name))


def test_the_spread_of_two_tasks_differs() -> None:
    assert len({spread(TaskId(f"t-{n}")) for n in range(100)}) == 100
