"""How many bytes of bodies are in memory at once: bounded for each caller, and for all of them together.

Law: room is taken before the first byte is read and given back when the request is answered, also where
its caller went away and the handler goes on, so that what callers send can never outgrow what the service
may use. Who finds none waits, and is then told so. A body larger than a bound has it alone.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mycoswarmd.errors import Unavailable


class BodyRoom:
    """Room for bodies."""

    def __init__(self, *, all_bytes: int, each_bytes: int, patience_s: float) -> None:
        self._all_bytes = all_bytes
        self._each_bytes = each_bytes
        self._patience_s = patience_s
        self._of: Counter[str] = Counter()
        self._freed = asyncio.Condition()

    @asynccontextmanager
    async def taken(self, who: str, size_bytes: int) -> AsyncIterator[None]:
        """Hold so many bytes for a caller; raise Unavailable when they do not become free in time."""
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
        try:
            yield
        finally:
            self._of[who] -= size_bytes
            if not self._of[who]:
                del self._of[who]
            async with self._freed:
                self._freed.notify_all()

    def _fits(self, who: str, size_bytes: int) -> bool:
        mine, everybodys = self._of[who], self._of.total()
        return (not mine or mine + size_bytes <= self._each_bytes) and (
            not everybodys or everybodys + size_bytes <= self._all_bytes
        )
