"""How a body is read."""

import asyncio
import tracemalloc
from unittest.mock import Mock

from aiohttp.base_protocol import BaseProtocol
from aiohttp.streams import StreamReader
from aiohttp.test_utils import make_mocked_request

from mycoswarmd.api.body import read_body
from mycoswarmd.api.room import PER_BYTE, Keep, weigh


async def test_a_body_is_in_memory_once() -> None:
    size_bytes, piece = 16 << 20, b"x" * (64 << 10)
    protocol = BaseProtocol(loop=asyncio.get_running_loop())
    protocol.connection_made(Mock())
    content = StreamReader(protocol, limit=1 << 16, loop=asyncio.get_running_loop())
    request = make_mocked_request("PUT", "/", {"Content-Length": str(size_bytes)}, payload=content)

    async def send() -> None:
        for _ in range(size_bytes // len(piece)):
            content.feed_data(piece)
            await asyncio.sleep(0)
        content.feed_eof()

    taken, kept = [], []

    async def take_room(size_bytes: int) -> Keep:
        taken.append(size_bytes)
        return keep

    async def keep(still_bytes: int) -> None:
        kept.append(still_bytes)

    tracemalloc.start()
    try:
        sending = asyncio.create_task(send())
        body = await read_body(request, size_bytes, take_room)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        await sending
    finally:
        tracemalloc.stop()
    assert type(body) is bytes and len(body) == size_bytes
    assert peak_bytes < size_bytes * 1.4
    assert (taken, kept) == ([PER_BYTE * size_bytes], [weigh(body)])
