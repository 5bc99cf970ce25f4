"""A cage that does not come up at once costs its task nothing, also one that may not run twice."""

import asyncio
from collections.abc import Sequence

import pytest

from mycoswarmd.core.tasks import Task, TaskState
from mycoswarmd.core.types import CageSpec
from mycoswarmd.errors import CageError, CageNotUp
from mycoswarmd.flow.ports import CageMaker, CageSession
from tests.integration.test_changes import begun, ended, working


class Hindered:
    """Cages of another maker; the first few have a trouble each, an error or seconds that they take."""

    def __init__(self, maker: CageMaker, troubles: Sequence[Exception | float]) -> None:
        self._maker = maker
        self._troubles = list(troubles)
        self.opened = 0

    @property
    def level(self) -> str:
        return self._maker.level

    async def open(self, spec: CageSpec) -> CageSession:
        self.opened += 1
        trouble = self._troubles.pop(0) if self._troubles else 0.0
        if isinstance(trouble, Exception):
            raise trouble
        await asyncio.sleep(trouble)
        return await self._maker.open(spec)

    def close(self) -> None:
        """Let go of what the maker holds."""


async def outcome(troubles: Sequence[Exception | float], *, wall_s: int = 60) -> tuple[Task, int]:
    """Return how a task ended that may not be repeated, and how many cages were asked for."""
    async with working(wall_s=wall_s) as (node, _):
        tasks = node.services.tasks
        hindered = tasks._cages = Hindered(tasks._cages, troubles)
        task = await ended(node, await begun(node, "result()"))
        return task, hindered.opened


NOT_UP = CageNotUp("cage-unproved", "cannot use the cage: no proof within 20 s")


@pytest.mark.parametrize("trouble", [NOT_UP, OSError(24, "Too many open files")], ids=["late", "descriptors"])
async def test_it_is_tried_again(trouble: Exception) -> None:
    task, opened = await outcome([trouble, trouble])
    assert (task.state, task.attempt, opened) == (TaskState.SUCCEEDED, 3, 3), task


async def test_its_time_is_not_the_agents() -> None:
    task, opened = await outcome([7.0], wall_s=6)
    assert (task.state, opened) == (TaskState.SUCCEEDED, 1), task


async def test_a_cage_that_does_not_hold_is_not_tried_again() -> None:
    broken = CageError("cage-unproved", "cannot use the cage: it does not hold (namespace=net)")
    task, opened = await outcome([broken])
    assert (task.state, task.code, opened) == (TaskState.FAILED, "cage-unproved", 1), task


async def test_what_was_told_something_is_not_told_it_twice() -> None:
    async with working() as (node, _):
        tasks = node.services.tasks
        hindered = tasks._cages = Hindered(tasks._cages, [])
        task = await ended(node, await begun(node, "os._exit(1)"))
    assert (task.state, task.code, hindered.opened) == (TaskState.FAILED, "cage-gone", 1), task
