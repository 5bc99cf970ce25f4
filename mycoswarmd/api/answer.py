"""What is answered: errors as answers; large answers in pieces, counted for as long as they are in memory.

Law: every error that is ours has its status, its code and what helps; of one that is a bug the caller learns
nothing but that. An answer that is not read in time takes its connection with it.
"""

import asyncio

from aiohttp.web_request import BaseRequest
from aiohttp.web_response import Response, StreamResponse

from mycoswarmd.api.call import ROSTER_HEADER
from mycoswarmd.api.handler import abort
from mycoswarmd.api.lines import Line
from mycoswarmd.api.room import UNCOUNTED_BYTES, BodyRoom
from mycoswarmd.errors import Denied, MycoswarmError, Unavailable
from mycoswarmd.wire.openai import encode_error

_PIECE_BYTES = 256 << 10
_BESIDE = ("Server", ROSTER_HEADER)
_READER_S = 120.0  # the largest at 0.3 MB/s


def refusal(exc: MycoswarmError) -> Response:
    """Return what a caller is told of an error."""
    headers = {}
    if isinstance(exc, Unavailable):
        headers["Retry-After"] = str(exc.retry_after_s)
    if exc.receipt:
        headers["X-Mycoswarm-Receipt"] = exc.receipt
    if isinstance(exc, Denied) and exc.rule:
        headers["X-Mycoswarm-Rule"] = exc.rule
    if exc.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    response = Response(
        body=encode_error(exc), status=exc.http_status, content_type="application/json", headers=headers
    )
    if exc.http_status in {408, 413} or exc.code == "too-many-connections":
        response.force_close()  # the rest of the body, or of the connection, is not worth having
    return response


def last(response: StreamResponse) -> StreamResponse:
    """Make a response the last one of its connection."""
    if not response.prepared:
        response.force_close()
    return response


async def send(line: Line, request: BaseRequest, response: StreamResponse, room: BodyRoom) -> StreamResponse:
    """Send an answer that is large, and count it for as long as that takes."""
    if not isinstance(response, Response) or response.prepared or not isinstance(response.body, bytes):
        return response
    if (size_bytes := len(whole := response.body)) <= UNCOUNTED_BYTES or request.method == "HEAD":
        return response
    try:
        with room.taken_now(line.who, size_bytes):
            async with asyncio.timeout(_READER_S):
                await response.prepare(request)
                # aiohttp keeps it until the next request on this connection.
                response.body = None
                # In pieces: of one that is whole, TLS takes all at once, and says that it is gone.
                for start in range(0, size_bytes, _PIECE_BYTES):
                    await response.write(whole[start : start + _PIECE_BYTES])
                await response.write_eof()
    except Unavailable as exc:
        refused = refusal(exc)
        # What a member or a stranger is told beside every answer, and nothing else.
        refused.headers.update({name: response.headers[name] for name in _BESIDE if name in response.headers})
        return last(refused) if response.keep_alive is False else refused
    except TimeoutError:
        abort(line.transport)
    return response
