"""Scripted engines: real servers on loopback or a unix socket that behave, or misbehave, as told.

A path's script writes bytes to the connection itself, so that it can also speak no HTTP at all. The
server writes down every request and notices when a client leaves before its answer has ended.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from ssl import SSLContext
from typing import Any

Script = Callable[["Turn"], Awaitable[None]]


@dataclass(slots=True, kw_only=True)
class Turn:
    """One request and the way to answer it."""

    path: str
    headers: dict[str, str]
    body: bytes
    writer: asyncio.StreamWriter
    server: "FakeServer"

    @property
    def json(self) -> dict[str, Any]:
        found = json.loads(self.body)
        assert isinstance(found, dict)
        return found

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()
        await asyncio.sleep(0)  # over TLS, a drain to somebody who has left does not give way to others

    async def answer(self, value: object, *, status: int = 200, kind: str = "application/json") -> None:
        """Answer at once, with JSON or with bytes as they are."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        await self.write(head.encode() + body)

    async def begin(self, kind: str = "text/event-stream") -> None:
        await self.write(
            f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )

    async def piece(self, data: bytes) -> None:
        await self.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    async def event(self, value: object) -> None:
        await self.piece(
            b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"
        )

    async def end(self) -> None:
        await self.write(b"0\r\n\r\n")

    def cut(self) -> None:
        """Break the connection off, as a process that dies does."""
        self.writer.transport.abort()


@dataclass(slots=True, kw_only=True)
class FakeServer:
    """What it was asked, and how it answers.

    Attributes:
        left: set when a client goes away in the middle of an answer.
    """

    scripts: dict[str, Script]
    address: str = ""
    turns: list[Turn] = field(default_factory=list)
    connections: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)

    def paths(self) -> list[str]:
        return [turn.path for turn in self.turns]

    def prompts(self) -> list[dict[str, Any]]:
        return [turn.json for turn in self.turns if turn.path.startswith("/v1/") and turn.body]


@asynccontextmanager
async def serving(
    scripts: dict[str, Script], *, socket: Path | None = None, tls: SSLContext | None = None
) -> AsyncIterator[FakeServer]:
    """Serve until the end of the context."""
    fake = FakeServer(scripts=scripts)
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        fake.connections += 1
        try:
            await _talk(fake, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            fake.left.set()
        except asyncio.CancelledError:
            pass  # the server is closed: asyncio would log this end of a connection as an error
        finally:
            tasks.discard(task)
            writer.transport.abort()

    if socket is None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls)
        fake.address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    else:
        server = await asyncio.start_unix_server(connected, socket)
        fake.address = f"unix:{socket}"
    try:
        yield fake
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        while tasks:
            await asyncio.sleep(0)


async def _talk(fake: FakeServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while line := await reader.readline():
        path = line.split()[1].decode()
        headers = {}
        while (head := await reader.readline()) not in {b"\r\n", b""}:
            name, _, value = head.decode().partition(":")
            headers[name.lower()] = value.strip()
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        if headers.get("transfer-encoding") == "chunked":
            body = await _read_chunked(reader)
        turn = Turn(path=path, headers=headers, body=body, writer=writer, server=fake)
        fake.turns.append(turn)
        script = fake.scripts.get(path, not_found)
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(_watch(fake, reader, writer))
            await script(turn)
            watcher.cancel()


async def _watch(fake: FakeServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Notice a client that leaves while it is being answered."""
    while not reader.at_eof() and reader.exception() is None and not writer.transport.is_closing():
        await asyncio.sleep(0.005)
    fake.left.set()


async def _read_chunked(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while length := int(await reader.readline(), 16):
        body += await reader.readexactly(length)
        await reader.readline()
    await reader.readline()
    return body


async def not_found(turn: Turn) -> None:
    await turn.answer(b"<html>404</html>", status=404, kind="text/html")


def listing(*names: str) -> Script:
    async def script(turn: Turn) -> None:
        await turn.answer({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

    return script


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}


def chunk(text: str | None = None, finish: str | None = None) -> dict[str, object]:
    delta = {} if text is None else {"content": text}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


async def chat_ok(turn: Turn) -> None:
    """Answer a chat as every such server should."""
    if not turn.json.get("stream"):
        message = {"role": "assistant", "content": "Hello there"}
        await turn.answer(
            {"model": "liar", "choices": [{"message": message, "finish_reason": "stop"}], "usage": USAGE}
        )
        return
    await turn.begin()
    await turn.event(chunk("Hello"))
    await turn.event(chunk(" there"))
    await turn.event(chunk(None, "stop"))
    await turn.event({"choices": [], "usage": USAGE})
    await turn.event(b"[DONE]")
    await turn.end()


async def text_ok(turn: Turn) -> None:
    choice = {"index": 0, "text": "Hello there", "finish_reason": "stop"}
    if not turn.json.get("stream"):
        await turn.answer({"choices": [choice], "usage": USAGE})
        return
    await turn.begin()
    await turn.event({"choices": [choice], "usage": USAGE})
    await turn.event(b"[DONE]")
    await turn.end()


async def embed_ok(turn: Turn) -> None:
    rows = [{"index": i, "embedding": [float(i), 0.5]} for i, _ in enumerate(turn.json["input"])]
    await turn.answer({"data": rows, "usage": {"prompt_tokens": 4}})


OPENAI: dict[str, Script] = {
    "/v1/models": listing("small"),
    "/v1/chat/completions": chat_ok,
    "/v1/completions": text_ok,
    "/v1/embeddings": embed_ok,
}


def ollama_scripts(
    *models: dict[str, Any], shows: dict[str, dict[str, Any]] | None = None
) -> dict[str, Script]:
    """Make the scripts of an Ollama server; `shows` is what /api/show says of a model, else a local one."""

    async def version(turn: Turn) -> None:
        await turn.answer({"version": "0.13.1"})

    async def tags(turn: Turn) -> None:
        await turn.answer({"models": list(models)})

    async def show(turn: Turn) -> None:
        local = {"model_info": {}, "capabilities": ["completion", "tools", "embedding"]}
        said = (shows or {}).get(turn.json["model"], local)
        await turn.answer(said, status=500 if "error" in said else 200)

    async def ps(turn: Turn) -> None:
        await turn.answer({"models": [{"name": models[0]["name"], "context_length": 2048}] if models else []})

    return {**OPENAI, "/api/version": version, "/api/tags": tags, "/api/show": show, "/api/ps": ps}
