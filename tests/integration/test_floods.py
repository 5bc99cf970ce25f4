"""One account, or one program, that asks too much: what it takes from others."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
from aiohttp.web_response import StreamResponse

from mycoswarmd.api import app
from mycoswarmd.api.call import Call, json_answer
from mycoswarmd.api.lines import Bounds
from mycoswarmd.api.routes import ROUTES, SYNC_PATH
from tests.integration.apis import API_KEY, Running, local_user, running_api

pytestmark = pytest.mark.integration
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="asks as several accounts: root is needed")
_HOARD = """
import os, socket, sys
os.setgroups([]); os.setresgid(*[int(sys.argv[2])] * 3); os.setresuid(*[int(sys.argv[2])] * 3)
held = [socket.socket(socket.AF_UNIX) for _ in range(int(sys.argv[3]))]
for one in held:
    one.connect(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""
# Of ten connections, an account has four and root keeps two for itself.
FEW = Bounds(local=10, local_of_user=4, local_kept=2, local_patience_s=30)
NOT_SHARED_OUT = Bounds(local=10, local_of_user=10, local_kept=0, local_patience_s=30)


@asynccontextmanager
async def hoarder(node: Running, *, uid: int, connections: int) -> AsyncIterator[None]:
    """Hold connections that never say a byte."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-c", _HOARD, str(node.unix), str(uid), str(connections),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        assert await process.stdout.readline() == b"held\n"
        yield
    finally:
        process.stdin.close()
        await process.wait()


async def status_of(node: Running, *, uid: int) -> int:
    """Ask as a user what models there are."""
    async with local_user(node, uid=uid) as user:
        return (await user.ask("GET", "/v1/models")).status


@as_root
async def test_silent_connections_of_one_account_keep_nobody_else_out() -> None:
    async with running_api(bounds=FEW) as node, hoarder(node, uid=65534, connections=12):
        assert await status_of(node, uid=65533) == 200
        assert await status_of(node, uid=0) == 200
        assert await status_of(node, uid=65534) == 503
        async with hoarder(node, uid=65532, connections=12):  # a second one: all are taken but root's
            assert await status_of(node, uid=65533) == 503
            assert await status_of(node, uid=0) == 200


@as_root
async def test_control_one_bound_for_all_would_keep_root_out() -> None:
    async with running_api(bounds=NOT_SHARED_OUT) as node, hoarder(node, uid=65534, connections=12):
        assert await status_of(node, uid=0) == 503


async def test_who_says_nothing_is_not_waited_for() -> None:
    async with running_api(bounds=Bounds(local_patience_s=0.2)) as node, node.program() as silent:
        assert await silent.is_closed()


async def test_who_breaks_off_after_an_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "KEEPALIVE_S", 0.2)
    async with running_api(bounds=Bounds(local_patience_s=0.2)) as node, node.program() as slow:
        await slow.send("GET", "/v1/models")
        await slow.answer()
        slow.writer.write(b"GET /v1/mod")  # half a head
        assert await slow.is_closed()


@pytest.mark.parametrize("each_bytes", [16 << 20, 1 << 30], ids=["bounded", "control"])
async def test_bodies_of_one_program_take_so_much_memory_and_no_more(
    each_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a whole prompt but for its last byte: more than two are not read while those are not done."""
    monkeypatch.setattr(app, "_ROOM_OF_CALLER_BYTES", each_bytes)
    monkeypatch.setattr(app, "_ROOM_BYTES", each_bytes * 2)
    body = b'{"model": "ok", "messages": "' + b"x" * ((8 << 20) - 64)
    async with running_api() as node, AsyncExitStack() as stack:
        read = 0
        for _ in range(5):
            one = await stack.enter_async_context(node.program())
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {one.host}\r\nAuthorization: Bearer {API_KEY}"
            one.writer.write(f"{head}\r\nContent-Length: {len(body) + 1}\r\n\r\n".encode() + body)
            try:
                async with asyncio.timeout(1):
                    await one.writer.drain()
                read += 1
            except TimeoutError:
                pass
        assert read == (2 if each_bytes == 16 << 20 else 5)
        async with local_user(node, uid=0) as owner:  # its bodies have room of their own
            assert (await owner.ask("POST", "/v1/chat/completions", {"model": "none"})).status in {400, 404}


async def test_who_hangs_up_gets_no_room_back_while_the_body_is_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The handler goes on when its caller has gone away, and has the body for so long."""
    body = b"x" * (200 << 10)
    monkeypatch.setattr(app, "_ROOM_OF_CALLER_BYTES", 2 * len(body))
    held, may_end = [], asyncio.Event()

    async def slow(call: Call) -> StreamResponse:
        held.append(len(call.untrusted_body))
        await may_end.wait()
        return json_answer({})

    routes = [replace(route, handler=slow) if route.path == SYNC_PATH else route for route in ROUTES]
    async with running_api(routes=routes) as node:
        nina = await node.admit("nina")
        for _ in range(4):
            async with node.connected(nina) as one:
                await one.send("POST", SYNC_PATH, body)
                await asyncio.sleep(0.3)
        assert held == [len(body)] * 2
        may_end.set()
        assert (await node.ask(nina, "POST", SYNC_PATH, body)).status == 200
