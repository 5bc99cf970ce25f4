"""Who listens in an engine's place: units share a directory, and one may be in a bad model's hand."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from mycoswarmd.engines.address import Address
from mycoswarmd.engines.upstream import USURPED, Upstream
from mycoswarmd.errors import Unavailable
from mycoswarmd.wire.prompt import TextDelta
from tests.fakes import Turn, serving
from tests.unit.engines.running import PATIENT, chat

# What a taken-over engine does: another unit's socket goes, its own is there, and it answers and keeps all.
STRANGER = """
import http.server, json, os, socketserver, sys
path = sys.argv[1]
class Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        open(path + ".stolen", "ab").write(body)
        text = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "a lie"},
                             "finish_reason": "stop"}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
        said = json.dumps(text).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)
    def log_message(self, *words): pass
    def address_string(self): return ""
if os.path.exists(path): os.unlink(path)
server = socketserver.ThreadingUnixStreamServer(path, Answers)
print("here", flush=True)
server.serve_forever()
"""


@contextmanager
def stranger(path: Path) -> Iterator[Path]:
    """Hold another process in the place of a socket; yield where it keeps what it was sent."""
    with subprocess.Popen([sys.executable, "-c", STRANGER, str(path)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"here\n"
            yield Path(f"{path}.stolen")
        finally:
            process.kill()


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="e-") as name:
        yield Path(name) / "e7.sock"


@asynccontextmanager
async def upstream(path: Path, listener_pid: int | None) -> AsyncIterator[Upstream]:
    address = Address(base_url="http://engine", socket_path=str(path))
    one = Upstream("embedded", address, patience=PATIENT, listener_pid=listener_pid)
    async with one.opened():
        yield one


async def words(turn: Turn) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}
    await turn.answer({"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})


async def ask(one: Upstream) -> str:
    return (await one.complete(chat(), native_tools=True)).text


async def test_the_engines_own_process_is_spoken_to(path: Path) -> None:
    async with serving({"/v1/chat/completions": words}, socket=path) as fake:
        async with upstream(path, os.getpid()) as one:
            assert await ask(one) == "Hello"
            assert await ask(one) == "Hello"
            deltas = [delta async for delta in one.stream(chat(), native_tools=True)]
            assert TextDelta("Hello") in deltas
        assert fake.connections < len(fake.turns) == 3  # a connection that was looked at is used again


@pytest.mark.parametrize("is_looked_at", [False, True])
async def test_a_neighbour_in_its_place_gets_no_prompt(path: Path, is_looked_at: bool) -> None:
    async with serving({"/v1/chat/completions": words}, socket=path):
        with stranger(path) as stolen:
            async with upstream(path, os.getpid() if is_looked_at else None) as one:
                if not is_looked_at:  # the attack succeeds
                    assert await ask(one) == "a lie"
                    assert "SECRET-MARKER" in stolen.read_text()
                    return
                with pytest.raises(Unavailable) as caught:
                    await ask(one)
                assert caught.value.code == USURPED
                assert not stolen.exists()


@pytest.mark.parametrize("is_looked_at", [False, True])
async def test_a_link_to_another_socket_of_the_node_is_sent_nothing(path: Path, is_looked_at: bool) -> None:
    """The signer's, say, which only the node's user may open."""
    other = path.with_name("signer.sock")
    heard = asyncio.Queue[bytes]()

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.put_nowait(await reader.read(1 << 16))
        writer.close()

    async with await asyncio.start_unix_server(hear, other):
        path.symlink_to(other)
        # Here this process listens, so the engine is said to be another one.
        async with upstream(path, 1 if is_looked_at else None) as one:
            with pytest.raises(Exception) as caught:  # noqa: PT011 - what it is depends
                await ask(one)
            async with asyncio.timeout(60):
                first = await heard.get()
    if is_looked_at:
        assert isinstance(caught.value, Unavailable)
        assert caught.value.code == USURPED
        assert first == b""
    else:
        assert first.startswith(b"POST /v1/chat/completions")
        assert json.loads(first.partition(b"\r\n\r\n")[2])["messages"][0]["content"] == "SECRET-MARKER"
