"""How much memory bodies take at once: bounded for each caller, and for all of a kind together.

Law: room is taken for a body before the part of it that counts is read, for what it makes of memory and not
for what it has of bytes, and given back when the request is answered, also where its caller went away and the
handler goes on, so that what callers send can never outgrow what the service may use. Who finds none waits,
and is then told so. A body larger than a bound has it alone.

Source: sys.getsizeof of CPython 3.11; tests/integration/test_body_memory.py measures it.
"""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from mycoswarmd.errors import BadRequest, Unavailable

Keep = Callable[[int], Awaitable[None]]
# A body, its text with four bytes for each character (one beyond the BMP makes all of them as wide), and what
# goes on from here.
PER_BYTE = 6
# So little is not counted: a connection's own buffers are larger, and who only says that it will send much
# takes nothing.
UNCOUNTED_BYTES = 32 << 10
# An empty list, an empty object, a key with its place in its object, an item that is a short text.
_PER_SIGN = {b"[": 64, b"{": 64, b":": 168, b",": 64}
_REST_BYTES = 8 << 10
# Ten times what the longest conversation makes that is accepted; a large roster needs as much.
_OBJECTS_BYTES = 32 << 20
_STRINGS = 1 << 17
_STRING = re.compile(rb'"[^"]*"')


@dataclass(frozen=True, slots=True)
class Size:
    """So much for one caller, and for all: bytes, or whatever is counted."""

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
            Unavailable: too-many-bodies when they do not become free in time; from what is yielded, when
                more is needed and not there, for whoever holds some must not wait for more.
        """
        try:
            async with asyncio.timeout(self._patience_s), self._freed:
                await self._freed.wait_for(lambda: self._fits(who, size_bytes))
                self._of[who] += size_bytes
        except TimeoutError as exc:
            raise _full() from exc
        held_bytes = size_bytes

        async def keep(still_bytes: int) -> None:
            nonlocal held_bytes
            self._of[who] -= held_bytes
            if still_bytes > held_bytes and not self._fits(who, still_bytes):
                self._of[who] += held_bytes
                raise _full()
            self._of[who] += still_bytes
            held_bytes = still_bytes
            if not self._of[who]:
                del self._of[who]
            async with self._freed:
                self._freed.notify_all()

        try:
            yield keep
        finally:
            await keep(0)

    @contextmanager
    def taken_now(self, who: str, size_bytes: int) -> Iterator[None]:
        """Hold so many bytes of what is in memory already, or raise Unavailable.

        One that is larger than its caller's part counts as that: others still have theirs.
        """
        size_bytes = min(size_bytes, self._size.each_bytes)
        if not self._fits(who, size_bytes):
            raise _full()
        self._of[who] += size_bytes
        try:
            yield
        finally:
            self._of[who] -= size_bytes
            if not self._of[who]:
                del self._of[who]

    def _fits(self, who: str, size_bytes: int) -> bool:
        mine, everybodys = self._of[who], self._of.total()
        return (not mine or mine + size_bytes <= self._size.each_bytes) and (
            not everybodys or everybodys + size_bytes <= self._size.all_bytes
        )


def weigh(body: bytes) -> int:
    """Return how much memory a JSON body takes at most, in bytes, until it is answered.

    Raises:
        BadRequest: too-intricate when most of that would be objects: it would take long to parse, too.
    """
    objects_bytes = _objects_bytes(body)
    if objects_bytes > _OBJECTS_BYTES:  # a long text is full of such signs
        bare = body.replace(rb"\\", b"").replace(rb"\"", b"")
        is_sane = bare.count(b'"') <= 2 * _STRINGS
        objects_bytes = _objects_bytes(_STRING.sub(b"", bare)) if is_sane else objects_bytes
    if objects_bytes > _OBJECTS_BYTES:
        raise BadRequest("too-intricate", "cannot read the request: it has too many parts", http_status=413)
    return _REST_BYTES + PER_BYTE * len(body) + objects_bytes


def _objects_bytes(body: bytes) -> int:
    return sum(size_bytes * body.count(sign) for sign, size_bytes in _PER_SIGN.items())


def _full() -> Unavailable:
    return Unavailable(
        "too-many-bodies",
        "cannot take or answer the request: others that came before it fill the memory for them",
        hint="send fewer large ones at a time",
    )
