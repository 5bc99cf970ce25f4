"""An outpost that is a connection: what it may do to the node that made it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mycoswarmd.errors import CageError
from mycoswarmd.sandbox.outpost import UnitOutpost, connect_outpost

Program = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def unit(directory: Path, program: Program, *, line_bytes: int = 64) -> AsyncIterator[UnitOutpost]:
    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await program(reader, writer)
        writer.close()

    path = directory / "x.sock"
    server = await asyncio.start_unix_server(run, path)
    try:
        outpost = await connect_outpost(path, line_bytes=line_bytes)
        try:
            yield outpost
        finally:
            await outpost.kill()
    finally:
        server.close()


async def test_lines_go_both_ways_and_the_end_is_said(tmp_path: Path) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"you said " + await reader.readline())

    async with unit(tmp_path, echo) as outpost:
        outpost.send(b"hello\n")
        assert await outpost.read_line() == b"you said hello\n"
        with pytest.raises(CageError) as caught:
            await outpost.read_line()
    assert (caught.value.code, caught.value.hint) == ("outpost-gone", "journalctl -u mycoswarm-x@*")
    assert outpost.pid == 0


async def test_half_a_line_is_an_end_and_an_endless_one_is_garbage(tmp_path: Path) -> None:
    async def half(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"no end")

    async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"x" * 10_000)
        await writer.drain()

    for program, code in ((half, "outpost-gone"), (endless, "outpost-garbage")):
        async with unit(tmp_path, program) as outpost:
            with pytest.raises(CageError) as caught:
                await outpost.read_line()
        assert caught.value.code == code


def send_much(outpost: UnitOutpost) -> None:
    for _ in range(10_000):  # 10 MB
        outpost.send(b"x" * 1023 + b"\n")


async def test_one_that_does_not_read_costs_bounded_memory(tmp_path: Path) -> None:
    over = asyncio.Event()

    async def deaf(_: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        await over.wait()

    async with unit(tmp_path, deaf) as outpost:
        with pytest.raises(CageError, match="it does not read"):
            send_much(outpost)
        over.set()


async def test_killed_the_program_sees_its_end_and_nothing_more_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mycoswarmd.sandbox.outpost._END_S", 60.0)
    ended = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        assert await reader.read() == b""
        ended.set()

    async with unit(tmp_path, wait) as outpost:
        await outpost.kill()
        assert ended.is_set()  # it was waited for
        await outpost.kill()
        with pytest.raises(CageError, match="it was stopped"):
            outpost.send(b"x\n")


async def test_without_a_unit_the_socket_to_look_at_is_named(tmp_path: Path) -> None:
    with pytest.raises(CageError) as caught:
        await connect_outpost(tmp_path / "x.sock", line_bytes=64)
    assert caught.value.message == "cannot start mycoswarm-x: No such file or directory"
    assert caught.value.hint == "systemctl status mycoswarm-x.socket"
