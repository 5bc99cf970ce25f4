"""How many prompts one engine works on at once, and how many may wait for that."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mycoswarmd.errors import Unavailable

# Waiting longer than this serves nobody: a client would rather be told and try again.
DEFAULT_WAIT_S = 30.0
# Each one waiting holds its prompt in memory.
DEFAULT_MAX_WAITING = 64


class Slots:
    """A bounded number of places, with bounded waiting for one.

    Attributes:
        running: places that are taken.
        waiting: prompts that wait for a place.
    """

    def __init__(
        self,
        engine: str,
        *,
        limit: int,
        max_waiting: int = DEFAULT_MAX_WAITING,
        wait_s: float = DEFAULT_WAIT_S,
    ) -> None:
        self._engine = engine
        self._places = asyncio.Semaphore(limit)
        self._max_waiting = max_waiting
        self._wait_s = wait_s
        self.running = 0
        self.waiting = 0

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """Hold a place; Unavailable("engine-busy") when too many wait, or it takes too long."""
        if self._places.locked():
            await self._wait()
        else:
            await self._places.acquire()
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._places.release()

    async def _wait(self) -> None:
        if self.waiting >= self._max_waiting:
            raise self._busy(f"{self.waiting} prompts wait already")
        self.waiting += 1
        try:
            async with asyncio.timeout(self._wait_s):
                await self._places.acquire()
        except TimeoutError as exc:
            raise self._busy(f"no place became free within {self._wait_s:g} s") from exc
        finally:
            self.waiting -= 1

    def _busy(self, cause: str) -> Unavailable:
        return Unavailable(
            "engine-busy",
            f"cannot answer now: engine {self._engine!r} works on {self.running} prompts and {cause}",
            hint="try again, or give the engine more concurrency",
            retry_after_s=5,
        )
