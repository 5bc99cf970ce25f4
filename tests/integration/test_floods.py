"""One account, or one program, that asks too much: what it takes from others."""

import asyncio
import contextlib
import json
import os
import socket
import sys
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp.web_response import StreamResponse

from mycoswarmd.api import access, app, lines
from mycoswarmd.api.access import Who
from mycoswarmd.api.call import Call, json_answer
from mycoswarmd.api.lines import Bounds
from mycoswarmd.api.room import PER_BYTE, UNCOUNTED_BYTES, Size, weigh
from mycoswarmd.api.routes import ROUTES, SYNC_PATH, Gate, Handler, Route
from mycoswarmd.ctl.unixhttp import open_answer
from mycoswarmd.errors import Unavailable
from tests.fakes import OPENAI, Turn, serving
from tests.integration.apis import API_KEY, Answer, Connection, Running, local_user, running_api

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="asks as several accounts: root is needed")
_HOARD = """
import os, socket, sys
os.setgroups([]); os.setresgid(*[int(sys.argv[2])] * 3); os.setresuid(*[int(sys.argv[2])] * 3)
held = [socket.socket(socket.AF_UNIX) for _ in range(int(sys.argv[3]))]
for one in held:
    one.connect(sys.argv[1])
    one.sendall(sys.argv[4].encode())
print("held", flush=True)
sys.stdin.read()
"""
# For what comes in a moment, on a machine that is busy; less than the node's own patience with a body.
_WAIT_S = 30.0
KNOWN = {"Authorization": f"Bearer {API_KEY}"}
# More than what is not counted.
_HALF_A_PROMPT = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {8 << 20}\r\n\r\n" + "x" * (
    100 << 10
)
# Accounts that every Debian has, each in the group of its name.
DAEMON, BIN, SYS, NOBODY = 1, 2, 3, 65534
# Of ten connections, an account has four and owners keep two for themselves.
FEW = Bounds(local=10, local_of_user=4, local_kept=2, local_patience_s=300, patience_s=60)
NOT_SHARED_OUT = Bounds(local=10, local_of_user=10, local_kept=0, local_patience_s=300, patience_s=60)


def routes_with(path: str, handler: Handler) -> list[Route]:
    """Return the table with another handler of one path."""
    return [replace(route, handler=handler) if route.path == path else route for route in ROUTES]


def head_of(one: Connection, path: str, length: str) -> bytes:
    """Return the head of a program's request."""
    known = f"Host: {one.host}\r\nAuthorization: Bearer {API_KEY}"
    return f"POST {path} HTTP/1.1\r\n{known}\r\n{length}\r\n\r\n".encode()


@asynccontextmanager
async def hoarder(node: Running, *, uid: int, connections: int, says: str = "") -> AsyncIterator[None]:
    """Hold connections that never say more."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-c", _HOARD, str(node.unix), str(uid), str(connections), says,
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
    async with running_api(bounds=FEW) as node, hoarder(node, uid=DAEMON, connections=12):
        assert await status_of(node, uid=BIN) == 200
        assert await status_of(node, uid=0) == 200
        assert await status_of(node, uid=DAEMON) == 503
        async with hoarder(node, uid=SYS, connections=12):  # a second one: all are taken but the owners'
            assert await status_of(node, uid=BIN) == 503
            assert await status_of(node, uid=0) == 200


@as_root
async def test_places_are_kept_for_owners_that_are_not_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "OWNER_GROUP", "bin")
    async with running_api(bounds=FEW) as node, AsyncExitStack() as stack:
        for uid in (DAEMON, SYS):
            await stack.enter_async_context(hoarder(node, uid=uid, connections=12))
        assert await status_of(node, uid=NOBODY) == 503
        assert await status_of(node, uid=BIN) == 200


@as_root
async def test_accounts_without_a_name_have_the_connections_of_one() -> None:
    async with running_api(bounds=FEW) as node, AsyncExitStack() as stack:
        for uid in (300_000, 300_001):
            await stack.enter_async_context(hoarder(node, uid=uid, connections=12))
        assert await status_of(node, uid=300_002) == 503
        assert await status_of(node, uid=BIN) == 200


@as_root
async def test_control_one_bound_for_all_would_keep_root_out() -> None:
    async with running_api(bounds=NOT_SHARED_OUT) as node, hoarder(node, uid=DAEMON, connections=12):
        assert await status_of(node, uid=0) == 503


async def test_who_is_one_too_many_hears_it_also_where_those_are_many() -> None:
    def ask(path: Path) -> None:
        with open_answer(path, "GET", "/v1/models", None, {}, timeout_s=60):
            pass

    async with running_api(bounds=Bounds(local=0, refused=0)) as node:
        for _ in range(20):
            with pytest.raises(Unavailable, match="too many of your kind"):
                await asyncio.to_thread(ask, node.unix)


async def test_who_says_nothing_is_not_waited_for() -> None:
    async with running_api(bounds=Bounds(patience_s=0.2)) as node, node.program() as silent:
        assert await silent.is_closed()


async def test_who_breaks_off_after_an_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "KEEPALIVE_S", 0.2)
    async with running_api(bounds=Bounds(local_patience_s=0.2)) as node, node.program() as slow:
        assert (await slow.ask("GET", "/v1/models", headers=KNOWN)).status == 200
        slow.writer.write(b"GET /v1/mod")  # half a head
        assert await slow.is_closed()


async def test_connections_without_a_key_keep_no_program_out() -> None:
    bounds = Bounds(local=4, unproved=4, refused=0, patience_s=60)
    async with running_api(bounds=bounds) as node, AsyncExitStack() as stack:

        async def program() -> Connection:
            return await stack.enter_async_context(node.program())

        first = await program()
        assert (await first.ask("GET", "/v1/models", headers=KNOWN)).status == 200
        silent = [await program() for _ in range(12)]
        assert all([await one.is_closed() for one in silent[:8]])
        assert (await first.ask("GET", "/v1/models", headers=KNOWN)).status == 200
        for _ in range(3):
            one = await program()
            assert (await one.ask("GET", "/v1/models", headers=KNOWN)).status == 200


async def test_the_connections_of_one_key_are_bounded() -> None:
    async with running_api(bounds=Bounds(of_key=2, patience_s=60)) as node, AsyncExitStack() as stack:
        held = [await stack.enter_async_context(node.program()) for _ in range(4)]
        answers = [await one.ask("GET", "/v1/models", headers=KNOWN) for one in held[:3]]
        assert [one.status for one in answers] == [200, 200, 503]
        assert answers[2].code == "too-many-connections"
        assert await held[2].is_closed()
        assert (await held[1].ask("GET", "/v1/models", headers=KNOWN)).status == 200
        held[0].writer.transport.abort()
        async with asyncio.timeout(_WAIT_S):
            while (await one_answer(node)).status != 200:
                await asyncio.sleep(0.02)


async def one_answer(node: Running) -> Answer:
    """Ask as a program, on a connection of its own."""
    async with node.program() as one:
        return await one.ask("GET", "/v1/models", headers=KNOWN)


@pytest.mark.parametrize("each_bytes", [16 << 20, 1 << 30], ids=["bounded", "control"])
async def test_bodies_of_one_program_take_so_much_memory_and_no_more(
    each_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a whole prompt but for its last byte: more than two are not read while those are not done."""
    monkeypatch.setitem(app._ROOMS, Who.PROGRAM, Size(each_bytes * PER_BYTE, each_bytes * 2 * PER_BYTE))
    body = b'{"model": "ok", "messages": "' + b"x" * ((8 << 20) - 64)
    async with running_api() as node, AsyncExitStack() as stack:
        read, most = 0, 2 if each_bytes == 16 << 20 else 5
        for number in range(5):
            one = await stack.enter_async_context(node.program())
            one.writer.write(head_of(one, "/v1/completions", f"Content-Length: {len(body) + 1}") + body)
            try:
                async with asyncio.timeout(_WAIT_S if number < most else 1):
                    await one.writer.drain()
                read += 1
            except TimeoutError:
                pass
        assert read == most
        async with local_user(node, uid=0) as owner:  # its bodies have room of their own
            assert (await owner.ask("POST", "/v1/chat/completions", {"model": "none"})).status in {400, 404}


async def test_who_hangs_up_gets_no_room_back_while_the_body_is_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The handler goes on when its caller has gone away, and has the body for so long."""
    body = b"x" * (200 << 10)
    monkeypatch.setitem(app._ROOMS, Who.NODE, Size(2 * weigh(body), 1 << 30))
    held, may_end = [], asyncio.Event()

    async def slow(call: Call) -> StreamResponse:
        held.append(len(call.untrusted_body))
        await may_end.wait()
        return json_answer({})

    async with running_api(routes=routes_with(SYNC_PATH, slow)) as node:
        nina = await node.admit("nina")
        for number in range(4):
            async with node.connected(nina) as one:
                await one.send("POST", SYNC_PATH, body)
                async with asyncio.timeout(_WAIT_S):
                    while len(held) <= number < 2:
                        await asyncio.sleep(0.02)
                await asyncio.sleep(0.3)
        assert held == [len(body)] * 2
        may_end.set()
        assert (await node.ask(nina, "POST", SYNC_PATH, body)).status == 200


# Each a kind of caller's whole room, if what is declared counts.
DECLARED = f"Content-Length: {8 << 20}"
CHUNKED = "Transfer-Encoding: chunked"


@pytest.mark.parametrize(("length", "first"), [(DECLARED, b"x"), (CHUNKED, b"1\r\nx\r\n")])
async def test_who_says_how_much_it_will_send_and_does_not_takes_nothing(
    length: str, first: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(app._ROOMS, Who.PROGRAM, Size(PER_BYTE * 8 << 20, PER_BYTE * 8 << 20))
    async with running_api() as node, AsyncExitStack() as stack:
        for _ in range(4):
            one = await stack.enter_async_context(node.program())
            one.writer.write(head_of(one, "/v1/completions", length) + first)
            await one.writer.drain()
        await asyncio.sleep(0.2)
        last = await stack.enter_async_context(node.program())
        async with asyncio.timeout(_WAIT_S):
            answer = await last.ask("POST", "/v1/completions", {"model": "none"}, KNOWN)
        assert answer.status == 400


async def test_a_kind_of_caller_takes_the_room_of_its_kind_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(app._ROOMS, Who.PROGRAM, Size(PER_BYTE * 8 << 20, PER_BYTE * 8 << 20))
    large = {"model": "none", "prompt": "x" * (200 << 10)}
    async with running_api() as node, AsyncExitStack() as stack:
        nina = await node.admit("nina")
        one, other = [await stack.enter_async_context(node.program()) for _ in range(2)]
        one.writer.write(head_of(one, "/v1/completions", DECLARED) + b"x" * (200 << 10))
        await one.writer.drain()
        await asyncio.sleep(0.2)
        async with asyncio.timeout(_WAIT_S):
            assert (await node.ask(nina, "POST", "/v1/completions", large)).status == 404
        await other.send("POST", "/v1/completions", large, KNOWN)
        with pytest.raises(TimeoutError):  # its own kind waits
            async with asyncio.timeout(0.5):
                await other.answer()
        one.writer.transport.abort()
        async with asyncio.timeout(_WAIT_S):
            assert (await other.answer()).status == 404


async def test_a_chunked_body_keeps_no_more_room_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(app._ROOMS, Who.PROGRAM, Size(PER_BYTE * 9 << 20, PER_BYTE * 9 << 20))
    running, may_end = [], asyncio.Event()

    async def slow(call: Call) -> StreamResponse:
        running.append(len(call.untrusted_body))
        await may_end.wait()
        return json_answer({})

    async with running_api(routes=routes_with("/v1/completions", slow)) as node, AsyncExitStack() as stack:
        for _ in range(3):
            one = await stack.enter_async_context(node.program())
            one.writer.write(head_of(one, "/v1/completions", CHUNKED) + b"32000\r\n")
            one.writer.write(b"x" * 0x32000 + b"\r\n0\r\n\r\n")
            await one.writer.drain()
        async with asyncio.timeout(_WAIT_S):
            while len(running) < 3:
                await asyncio.sleep(0.02)
        may_end.set()


@as_root
async def test_accounts_without_a_name_have_the_part_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has a range of them in /etc/subuid takes no more than anybody."""
    monkeypatch.setitem(app._ROOMS, Who.LOCAL, Size(PER_BYTE * 8 << 20, PER_BYTE * 16 << 20))
    async with running_api() as node, AsyncExitStack() as stack:
        for uid in (300_000, 300_001, 300_002):
            await stack.enter_async_context(hoarder(node, uid=uid, connections=1, says=_HALF_A_PROMPT))
        await asyncio.sleep(0.3)
        bob = await stack.enter_async_context(local_user(node, uid=NOBODY))
        async with asyncio.timeout(_WAIT_S):
            body = {"model": "none", "prompt": "x" * (200 << 10)}
            assert (await bob.ask("POST", "/v1/completions", body)).status in {403, 404}


@pytest.mark.parametrize("each_bytes", [24 << 20, 1 << 40], ids=["bounded", "control"])
async def test_answers_that_nobody_takes_fill_their_room_and_no_more(
    each_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(app._ANSWERS, Who.PROGRAM, Size(each_bytes, 1 << 40))

    async def much(call: Call) -> StreamResponse:
        return json_answer({"text": "x" * (10 << 20)})

    routes = routes_with("/v1/completions", much)
    async with running_api(routes=routes) as node, AsyncExitStack() as stack:
        begun = [await begun_answer(stack, node) for _ in range(4)]
        assert begun.count(b"503") == (2 if each_bytes == 24 << 20 else 0), begun
    # Who takes none of it is left, and there is room again.
    monkeypatch.setattr("mycoswarmd.api.answer._READER_S", 1.0)
    async with running_api(routes=routes) as node, AsyncExitStack() as stack:
        begun = [await begun_answer(stack, node) for _ in range(2)]
        async with asyncio.timeout(_WAIT_S):
            while await begun_answer(stack, node) != b"200":
                await asyncio.sleep(0.1)


async def begun_answer(stack: AsyncExitStack, node: Running) -> bytes:
    """Ask as a program that takes no more of its answer than the status, and return that."""
    one = await stack.enter_async_context(node.program())
    await one.send("POST", "/v1/completions", {}, KNOWN)
    return (await one.reader.readline())[9:12]


@pytest.mark.parametrize("inputs", [100, 4], ids=["many", "control"])
async def test_of_many_vectors_one_answer_is_read_at_a_time(inputs: int) -> None:
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def halts(turn: Turn) -> None:
        rows = [{"index": number, "embedding": [0.5]} for number in range(inputs)]
        data = json.dumps({"data": rows, "usage": {"prompt_tokens": 4}}).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        await turn.write(head.encode() + data[:10])
        if not begun.is_set():
            begun.set()
            await may_end.wait()
        await turn.write(data[10:])

    body = {"model": "small", "input": ["x"] * inputs}
    async with (
        serving({**OPENAI, "/v1/embeddings": halts}) as fake,
        running_api(engine_url=fake.address) as node,
        local_user(node, uid=0) as one,
        local_user(node, uid=0) as other,
    ):
        while not node.services.prompts.models():
            await asyncio.sleep(0.01)
        first = asyncio.create_task(one.ask("POST", "/v1/embeddings", body))
        await begun.wait()
        await asyncio.sleep(0.2)
        second = asyncio.create_task(other.ask("POST", "/v1/embeddings", body))
        done, _ = await asyncio.wait([second], timeout=1.0 if inputs == 100 else _WAIT_S)
        assert bool(done) == (inputs == 4)
        may_end.set()
        assert [len((await answer).json["data"]) for answer in (first, second)] == [inputs] * 2


# Small, but it makes 0.9 MB of objects.
_HEAVY = b'{"model": "none", "prompt": [' + b",".join([b'{"a":{}}'] * 2500) + b"]}"


@pytest.mark.parametrize("all_bytes", [1 << 20, 1 << 30], ids=["bounded", "control"])
async def test_a_small_body_counts_for_what_it_makes(all_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(app._ROOMS, Who.PROGRAM, Size(all_bytes, all_bytes))
    assert len(_HEAVY) < UNCOUNTED_BYTES and weigh(_HEAVY) > 600 << 10
    running, may_end = 0, asyncio.Event()

    async def slow(call: Call) -> StreamResponse:
        nonlocal running
        running += 1
        await may_end.wait()
        return json_answer({})

    async with running_api(routes=routes_with("/v1/completions", slow)) as node, AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(node.program()) for _ in range(3)]
        for one in callers:
            await one.send("POST", "/v1/completions", _HEAVY, KNOWN)
        wanted = 1 if all_bytes == 1 << 20 else 3
        async with asyncio.timeout(_WAIT_S):
            while running < wanted:
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.3)
        assert running == wanted
        may_end.set()
        assert [(await one.answer()).status for one in callers] == [200] * 3


@pytest.mark.parametrize("read_bytes", [lines._READ_BYTES, 256 << 10], ids=["bounded", "control"])
async def test_a_connection_that_waits_for_room_holds_little(
    read_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "_READ_BYTES", read_bytes)
    monkeypatch.setitem(app._ROOMS, Who.PROGRAM, Size(PER_BYTE * 8 << 20, PER_BYTE * 8 << 20))
    async with running_api(bounds=Bounds(patience_s=60)) as node, AsyncExitStack() as stack:
        first, *waiting = [await stack.enter_async_context(node.program()) for _ in range(11)]
        head = head_of(first, "/v1/completions", DECLARED)
        first.writer.write(head + b"x" * (100 << 10))  # has all the room
        await asyncio.sleep(0.2)
        sent = head + b"x" * (1 << 20)
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        for one in waiting:
            # Not by its writer, which would keep what it has not sent.
            one.writer.transport.pause_reading()  # type: ignore[attr-defined]
            sock = socket.socket(fileno=os.dup(one.writer.get_extra_info("socket").fileno()))
            stack.callback(sock.close)
            sent_bytes = 0
            for _ in range(20):
                with contextlib.suppress(BlockingIOError):
                    sent_bytes += sock.send(sent[sent_bytes:])
                await asyncio.sleep(0.005)
        held_bytes = tracemalloc.get_traced_memory()[0] // 10
    assert (held_bytes < 200 << 10) == (read_bytes < 256 << 10), held_bytes


@pytest.mark.parametrize("each", [3, 1000], ids=["bounded", "control"])
async def test_tasks_that_wait_for_a_person_without_their_callers_are_bounded(
    each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "_POSTED", Size(each, 1000))
    posted, may_end = 0, asyncio.Event()

    async def slow(call: Call) -> StreamResponse:
        nonlocal posted
        posted += 1
        await may_end.wait()
        return json_answer({})

    routes = [replace(one, handler=slow) if one.may_wait_for_people else one for one in ROUTES]
    async with running_api(routes=routes) as node:
        anna, olga = await node.admit("anna", role="operator"), await node.admit("olga", role="operator")
        for number in range(8):
            async with node.connected(anna) as one:
                await one.send("POST", "/api/tasks", b"{}")
                async with asyncio.timeout(_WAIT_S):
                    while posted <= number < each:
                        await asyncio.sleep(0.02)
                await asyncio.sleep(0.05)
        assert posted == min(each, 8)
        # Who decides is not kept out, and nobody else is.
        assert (await node.ask(anna, "POST", "/api/policy/reload", {})).status == 200
        asked = asyncio.create_task(node.ask(olga, "POST", "/api/tasks", b"{}"))
        if each == 3:
            assert (await node.ask(anna, "POST", "/api/tasks", b"{}")).code == "too-many-waiting"
        may_end.set()
        assert (await asked).status == 200
        assert (await node.ask(anna, "POST", "/api/tasks", b"{}")).status == 200


async def test_a_member_that_does_not_read_keeps_answers_from_no_person(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(app._ANSWERS, Who.NODE, Size(8 << 20, 8 << 20))

    async def much(call: Call) -> StreamResponse:
        return json_answer({"text": "x" * (24 << 20)})

    routes = [
        *routes_with("/v1/completions", much),
        Route("GET", "/much", frozenset(Who), Gate.OPEN, 0, much),
    ]
    async with running_api(routes=routes) as node:
        nina, otto = await node.admit("nina"), await node.admit("otto")
        anna = await node.admit("anna", role="operator")
        async with node.connected(nina) as silent:
            await silent.send("POST", "/v1/completions", {})
            await silent.reader.readline()
            refused = await node.ask(otto, "POST", "/v1/completions", {})
            assert (refused.status, refused.code) == (503, "too-many-bodies")
            assert refused.headers["server"] == "mycoswarmd"  # and not which libraries
            assert (await node.ask(anna, "GET", "/much")).status == 200


async def test_an_answer_that_was_read_is_kept_by_nobody() -> None:
    async def much(call: Call) -> StreamResponse:
        return json_answer({"text": "x" * (5 << 20)})

    async with running_api(routes=routes_with("/v1/completions", much)) as node, AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(node.program()) for _ in range(12)]
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        for one in callers:
            assert len((await one.ask("POST", "/v1/completions", {}, KNOWN)).body) > 5 << 20
        assert tracemalloc.get_traced_memory()[0] < 12 << 20


@pytest.mark.parametrize("read_bytes", [lines._READ_BYTES, 256 << 10], ids=["bounded", "control"])
async def test_a_connection_of_a_member_takes_little_memory(
    read_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each, both ends are in this process."""
    monkeypatch.setattr(lines, "_READ_BYTES", read_bytes)
    async with running_api() as node, AsyncExitStack() as stack:
        nina = await node.admit("nina")
        await stack.enter_async_context(node.connected(nina))
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        for _ in range(20):
            await stack.enter_async_context(node.connected(nina))
        each_bytes = tracemalloc.get_traced_memory()[0] // 20
    assert (each_bytes < 160 << 10) == (read_bytes < 256 << 10), each_bytes
