"""The bare pass-through: as little as aiohttp can do between a client and an upstream."""

import sys
from collections.abc import AsyncIterator

from aiohttp import ClientSession, TCPConnector, web

UPSTREAM = web.AppKey("session", ClientSession)


async def handle(request: web.Request) -> web.StreamResponse:
    body = await request.read()
    session = request.app[UPSTREAM]
    headers = {"Content-Type": "application/json"}
    async with session.request(
        request.method, sys.argv[2] + request.path_qs, data=body, headers=headers
    ) as up:
        if up.content_type == "text/event-stream":
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            async for piece in up.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response
        return web.Response(body=await up.read(), status=up.status, content_type="application/json")


async def session(app: web.Application) -> AsyncIterator[None]:
    async with ClientSession(connector=TCPConnector(limit=0)) as made:
        app[UPSTREAM] = made
        yield


def main() -> None:
    app = web.Application()
    app.cleanup_ctx.append(session)
    app.router.add_route("*", "/{path:.*}", handle)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)


if __name__ == "__main__":
    main()
