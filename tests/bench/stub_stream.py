"""An upstream that streams 200 chunks, 10 ms apart; each says when it was sent."""

import asyncio
import json
import sys
import time

from aiohttp import web

MODELS = {"object": "list", "data": [{"id": "stub", "object": "model", "created": 1, "owned_by": "x"}]}


def event(delta: dict[str, str], finish: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "stub", "choices": [choice]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


async def chat(request: web.Request) -> web.StreamResponse:
    await request.read()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for _ in range(200):
        await response.write(event({"role": "assistant", "content": f"T{time.monotonic():.9f} "}, None))
        await asyncio.sleep(0.01)
    await response.write(event({}, "stop") + b"data: [DONE]\n\n")
    return response


async def other(_: web.Request) -> web.Response:
    return web.json_response(MODELS)


def main() -> None:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/{path:.*}", other)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)


if __name__ == "__main__":
    main()
