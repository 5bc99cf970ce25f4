"""aiohttp's end of a connection, with a bound of what a caller can make it keep that is no body.

Law: a head without an end, trailers without an end, a body in pieces of one byte, requests that come long
before their answers: each ends the connection, and all of them together have little memory. aiohttp before
3.14, which Debian 12 and 13 have, bounds none of that; a later one does, and is left alone.
"""

import asyncio
from contextlib import suppress

from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

BOUNDS_ITSELF = hasattr(RequestHandler, "_max_msg_queue_size")
# What one connection may have the node keep, and all of a listener: a head is a few hundred bytes and comes
# at once. Parsed, such bytes take up to thirty times as much.
_EACH_BYTES, _ALL_BYTES = 16 << 10, 1 << 20
_HEAD_BYTES = 2 << 10
# Requests that may come ahead of answers.
_AHEAD = 8


def abort(transport: asyncio.WriteTransport) -> None:
    """End a connection at once, also one that is closed already, which Python before 3.11.4 cannot bear."""
    with suppress(AttributeError):
        transport.abort()


class Kept:
    """What all connections of a listener make the node keep.

    Attributes:
        all_bytes: so much, as it came.
    """

    all_bytes = 0


class BoundedHandler(RequestHandler):
    """The handler of one connection, which is cut at its bound.

    Attributes:
        kept: what it counts for.
    """

    kept = Kept()
    _mine_bytes = 0
    _body: StreamReader | None = None
    _body_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Parse what has come, and count what of it is no body."""
        before = self._request_count
        super().data_received(data)
        body_bytes = self._body.total_bytes - self._body_bytes if self._body is not None else 0
        mine_bytes = self._mine_bytes
        if new := min(self._request_count - before, len(self._messages)):
            bodies = [self._messages[-number][1] for number in range(1, new + 1)]
            body_bytes += sum(body.total_bytes for body in bodies)
            self._body, mine_bytes = bodies[0], -new * _HEAD_BYTES
        if self._body is not None:
            self._body_bytes = self._body.total_bytes
        self._count(mine_bytes + len(data) - body_bytes)
        is_much = self._mine_bytes > _EACH_BYTES + self._body_bytes // 2
        is_too_much = self.kept.all_bytes > _ALL_BYTES and self._mine_bytes > _HEAD_BYTES
        if is_much or is_too_much or len(self._messages) > _AHEAD:
            assert self.transport is not None
            abort(self.transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Forget what was kept."""
        self._count(0)
        super().connection_lost(exc)

    def _count(self, mine_bytes: int) -> None:
        mine_bytes = max(0, mine_bytes)
        self.kept.all_bytes += mine_bytes - self._mine_bytes
        self._mine_bytes = mine_bytes
