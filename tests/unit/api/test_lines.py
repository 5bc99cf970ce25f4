"""How many handshakes may be under way."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

from mycoswarmd.api.lines import Bounds, Lines

FEW = Bounds(handshakes=4, handshakes_of_source=3)


@asynccontextmanager
async def shaking(lines: Lines, *sources: str) -> AsyncIterator[list["asyncio.Task[None]"]]:
    """Hold handshakes that never end, in this order."""

    async def shake(source: str) -> None:
        with lines.shaking(source):
            await asyncio.get_running_loop().create_future()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(shake(source)) for source in sources]
        await asyncio.sleep(0)
        yield tasks
        for task in tasks:
            task.cancel()


async def test_one_source_has_its_part_and_no_more() -> None:
    lines = Lines(FEW)
    async with shaking(lines, "a", "a"):
        assert lines.has_room("a")
        async with shaking(lines, "a"):
            assert not lines.has_room("a")
            assert lines.has_room("b")
        assert lines.has_room("a")


async def test_the_oldest_of_who_holds_most_makes_room() -> None:
    lines = Lines(FEW)
    async with shaking(lines, "b", "a", "a", "a") as tasks:
        assert lines.has_room("c")
        await asyncio.sleep(0)
        assert [task.cancelled() for task in tasks] == [False, True, False, False]


async def test_who_would_hold_as_much_as_anybody_has_to_wait() -> None:
    lines = Lines(FEW)
    async with shaking(lines, "a", "a", "b", "b") as tasks:
        assert not lines.has_room("b")
        assert not any(task.cancelled() or task.cancelling() for task in tasks)
        assert lines.has_room("c")


async def test_a_handshake_is_counted_while_it_lasts() -> None:
    lines = Lines(Bounds(handshakes=1))
    with ExitStack() as stack:
        assert lines.has_room("a")
        stack.enter_context(lines.shaking("a"))
        assert not lines.has_room("b")
    assert lines.has_room("b")
