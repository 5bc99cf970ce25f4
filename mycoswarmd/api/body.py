"""How the body of a request is read: within its route's bound, counted in memory, and in time.

Law: a body that is too large by the word of its head is refused unread; beyond a little, room is taken for it
(room.py) before the rest is read.
"""

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

from aiohttp import web
from aiohttp.web_request import BaseRequest

from mycoswarmd.api.room import PER_BYTE, UNCOUNTED_BYTES, Keep, weigh
from mycoswarmd.errors import BadRequest

# A client that sends its body slower than this holds a connection for nothing.
BODY_S = 60.0
_PARTS = (b"[", b"{", b":")


async def read_body(
    request: BaseRequest, at_most_bytes: int, take_room: Callable[[int], Awaitable[Keep]]
) -> bytes:
    """Read the body within the route's bound; refuse a larger one before reading it where it says so."""
    check_head(request, at_most_bytes)
    length = request.content_length
    body = io.BytesIO()  # hands over what it holds without a copy
    first_bytes = min(UNCOUNTED_BYTES, at_most_bytes)
    keep: Keep | None = None
    if not await _read_on(request, body, first_bytes) and at_most_bytes > first_bytes:
        keep = await take_room(PER_BYTE * (at_most_bytes if length is None else length))
        await _read_on(request, body, at_most_bytes)
    if body.tell() > at_most_bytes:
        raise _too_large(at_most_bytes)
    whole = body.getvalue()
    weight_bytes = weigh(whole)
    if keep is not None:
        await keep(weight_bytes)
    elif weight_bytes > UNCOUNTED_BYTES:
        await take_room(weight_bytes)
    return whole


async def _read_on(request: BaseRequest, body: io.BytesIO, to_bytes: int) -> bool:
    """Read until the end, or until there is more than so much; tell whether that was the end."""
    with _body_errors():
        async with asyncio.timeout(BODY_S):
            async for piece in request.content.iter_any():
                body.write(piece)
                if body.tell() > to_bytes:
                    return False
    return True


def check_head(request: BaseRequest, at_most_bytes: int) -> None:
    """Refuse a body by what its request says of it."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise BadRequest("compressed-body", "cannot read a compressed body: send it plain", http_status=415)
    if request.content_length is not None and request.content_length > at_most_bytes:
        raise _too_large(at_most_bytes)


async def pieces_of(request: BaseRequest, at_most_bytes: int) -> AsyncIterator[bytes]:
    """Yield the body within the route's bound as it comes; what its taker does with it costs no time."""
    clock = asyncio.get_running_loop().time
    left_s, size_bytes = BODY_S, 0
    while True:
        asked_s = clock()
        with _body_errors():
            async with asyncio.timeout(left_s):
                piece = await request.content.readany()
        left_s -= clock() - asked_s
        size_bytes += len(piece)
        if size_bytes > at_most_bytes:
            raise _too_large(at_most_bytes)
        if not piece:
            return
        yield piece


@contextlib.contextmanager
def _body_errors() -> Iterator[None]:
    """Say what can go wrong while a body comes."""
    try:
        yield
    except web.RequestPayloadError:
        raise BadRequest("bad-body", "cannot read the request: its body is malformed") from None
    except TimeoutError as exc:
        raise BadRequest(
            "slow-body", f"cannot read the request: no end after {BODY_S:.0f} s", http_status=408
        ) from exc


def check_parts(body: bytes, at_most: int) -> None:
    """Refuse what would take long to parse, and a lot of memory."""
    if len(body) > at_most and sum(map(body.count, _PARTS)) > at_most:
        raise BadRequest("too-intricate", "cannot read the request: it has too many parts", http_status=413)


def _too_large(at_most_bytes: int) -> BadRequest:
    return BadRequest(
        "too-large",
        f"cannot take a body of more than {at_most_bytes} bytes here",
        http_status=413,
    )
