"""How many bytes of bodies are in memory at once: bounded for each caller, and for all of a kind together.

Law: room is taken for all of a body before the part of it that counts is read, and given back when the
request is answered, also where its caller went away and the handler goes on, so that what callers send can
never outgrow what the service may use. Who finds none waits, and is then told so. A body larger than a bound
has it alone.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from mycoswarmd.errors import Unavailable

Keep = Callable[[int], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Size:
    """So many bytes for one caller, and for all."""

    each_bytes: int
    all_bytes: int


class BodyRoom:
    """Room for bodies."""

    def __init__(self, size: Size, *, patience_s: float) -> None:
        self._size = size
        self._patience_s = patience_s
        self._of: Counter[str] = Counter()
        self._freed = asyncio.Condition()

    @asynccontextmanager
    async def taken(self, who: str, size_bytes: int) -> AsyncIterator[Keep]:
        """Hold so many bytes for a caller, or what is then said to be still needed.

        Raises:
            Unavailable: too-many-bodies when they do not become free in time.
        """
        try:
            async with asyncio.timeout(self._patience_s), self._freed:
                await self._freed.wait_for(lambda: self._fits(who, size_bytes))
                self._of[who] += size_bytes
        except TimeoutError as exc:
            raise Unavailable(
                "too-many-bodies",
                "cannot read the request: others that came before it fill the memory for them",
                hint="send fewer large ones at a time",
            ) from exc
        held_bytes = size_bytes

        async def keep(still_bytes: int) -> None:
            nonlocal held_bytes
            self._of[who] -= held_bytes - still_bytes
            held_bytes = still_bytes
            if not self._of[who]:
                del self._of[who]
            async with self._freed:
                self._freed.notify_all()

        try:
            yield keep
        finally:
            await keep(0)

    def _fits(self, who: str, size_bytes: int) -> bool:
        mine, everybodys = self._of[who], self._of.total()
        return (not mine or mine + size_bytes <= self._size.each_bytes) and (
            not everybodys or everybodys + size_bytes <= self._size.all_bytes
        )
