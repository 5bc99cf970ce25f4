"""One engine's HTTP server, from the side that asks: bounded, without proxies, redirects or cookies.

Rule: bytes go to the one place that was given, whatever an answer, the environment or a model's name
says. Everything that comes back is bounded in size and in time, and every way in which it can fail
is one of our errors. Closing a stream, or cancelling, closes the connection: that is what tells an
engine to stop. Where an engine's directory is another's to write, who listens there is looked at first.

Source: unix(7), SO_PEERCRED.
"""

import asyncio
import io
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from mycoswarmd.engines.address import Address
from mycoswarmd.engines.dialled import DialledConnector
from mycoswarmd.errors import BadRequest, EngineError, MycoswarmError, Unavailable
from mycoswarmd.flow.ports import Dial
from mycoswarmd.wire.prompt import Answer, Delta, Embeddings, Finish, Prompt
from mycoswarmd.wire.sse import SseParser
from mycoswarmd.wire.tools import TranslateCalls, compile_tools, deltas_of
from mycoswarmd.wire.upstream import (
    PATHS,
    ChunkParser,
    encode_request,
    parse_answer,
    parse_embeddings,
    parse_error,
)

T = TypeVar("T")

# The body of an error or of a small answer such as a list of models.
_SMALL_BYTES = 1 << 20
# A whole answer: twice the longest text that is accepted, for what JSON adds to it.
_ANSWER_BYTES = 16 << 20
# Vectors as text: 2,048 of 1,024 numbers are about 40 MB.
_EMBEDDINGS_BYTES = 48 << 20
_MANY_VECTORS = 64
# How long such an answer may take once it has begun, and may wait for the one before it.
_VECTORS_S, _TURN_S = 60.0, 90.0
_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
# Python parses JSON without letting any other thread run, and makes twenty times as much of each list,
# object and key. So they are counted first; no text that a model writes has as many of these signs.
_PARTS = (b"[", b"{", b":")
_MAX_PARTS = 1 << 18
# Larger bodies are parsed beside the loop.
_INLINE_BYTES = 1 << 20
# aiohttp warns above this size that plain bytes hold up the loop.
_PLAIN_BODY_BYTES = 1 << 20
# llama.cpp's server drops idle connections after 5 s; leaving first avoids sending into a closing one.
_KEEPALIVE_S = 4.0
# The end of the body follows [DONE] at once; waiting for it lets the connection be used again.
_END_S = 0.25
# From unix(7): the process that called listen(), its user and its group.
_CREDENTIALS = struct.Struct("3i")
_JSON = {"Content-Type": "application/json"}
# Of the error for an engine in whose place somebody else listens.
USURPED = "engine-usurped"
# What aiohttp raises when the other side breaks off or speaks no HTTP.
BROKEN = (aiohttp.ClientError, HttpProcessingError, OSError, UnicodeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to wait for an engine, in seconds.

    Attributes:
        connect_s: for a connection; local ones take microseconds, so this finds a hung listener.
        first_byte_s: a cold prompt of 1,500 tokens took 11 s on two cores; a large one takes minutes.
        idle_s: between two pieces of one answer.
        answer_s: for a whole answer that is not streamed.
        probe_s: for questions about the engine itself.
    """

    connect_s: float = 5.0
    first_byte_s: float = 300.0
    idle_s: float = 60.0
    answer_s: float = 1200.0
    probe_s: float = 10.0


def as_payload(body: bytes | None) -> bytes | io.BytesIO | None:
    """Wrap a large body so that it is sent in pieces between which others have their turn."""
    return io.BytesIO(body) if body is not None and len(body) > _PLAIN_BODY_BYTES else body


class StrangerError(ConnectionError):
    """Another process than the engine's listens on its socket."""


class _Doorstep:
    """Connects to a unix socket and looks who listens there: a `Dial` to that one place.

    Every engine's unit may write where the sockets of all are; a bad one could put its own in a neighbour's
    place, or a link to a socket of the node's.
    """

    def __init__(self, path: str, listener_pid: int) -> None:
        self._path = path
        self._listener_pid = listener_pid

    async def __call__(self, host: str, port: int, within_s: float) -> socket.socket:
        """Return a connection to the one process, or raise StrangerError before a byte is sent."""
        del host, port
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(0)
            async with asyncio.timeout(within_s):
                await asyncio.get_running_loop().sock_connect(sock, self._path)
            self._look(sock)
        except BaseException:
            sock.close()
            raise
        return sock

    def _look(self, sock: socket.socket) -> None:
        found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(found)[0] != self._listener_pid:
            raise StrangerError


class Exchange(ABC):
    """Prompts to one server in the OpenAI dialect; a subclass says how a request gets there.

    Attributes:
        _engine: the name that stands in errors.
        _patience: how long each step may take.
    """

    def __init__(self, engine: str, *, patience: Patience | None = None) -> None:
        self._engine = engine
        self._patience = patience or Patience()

    @abstractmethod
    async def _send(self, path: str, body: bytes | None) -> aiohttp.ClientResponse:
        """Send a request and return what its answer begins with; all that fails is one of our errors."""

    def _leave(self, response: aiohttp.ClientResponse) -> None:
        """Be done with an answer, read to its end or not."""
        # One that was read to its end has given its connection back; any other is cut off.
        response.close()

    def _refusal(self, response: aiohttp.ClientResponse, untrusted: bytes, prompt: Prompt) -> MycoswarmError:
        """Make our error of an answer with an error status."""
        return parse_error(response.status, untrusted, engine=self._engine, model=prompt.model)

    async def fetch(self, path: str, *, body: bytes | None = None) -> tuple[int, bytes]:
        """Return status and body of a small answer about the engine itself."""
        wait_s = self._patience.probe_s
        async with self._request(path, body, wait_s=wait_s) as response:
            return response.status, await self._read(response, _SMALL_BYTES, wait_s)

    async def complete(self, prompt: Prompt, *, native_tools: bool) -> Answer:
        """Return the whole answer."""
        sent = prompt if native_tools else compile_tools(prompt)
        untrusted = await self._ask(sent, _ANSWER_BYTES)
        answer = await self._parse_whole(untrusted, partial(parse_answer, kind=prompt.kind))
        return answer if native_tools else TranslateCalls(prompt).answer(answer)

    async def embed(self, prompt: Prompt) -> Embeddings:
        """Return one vector for each input."""
        body = encode_request(prompt, stream=False)
        async with self._request(PATHS[prompt.kind], body, wait_s=self._patience.answer_s) as response:
            await self._check_status(response, prompt)
            # Only now: whoever waits for its turn waits for an answer that comes, and not for an engine,
            # which may be a node that waits for this one.
            async with self._turn(len(prompt.inputs)):
                untrusted = await self._read(response, _EMBEDDINGS_BYTES, _VECTORS_S)
                return await self._parse_whole(untrusted, partial(parse_embeddings, count=len(prompt.inputs)))

    @asynccontextmanager
    async def _turn(self, vectors: int) -> AsyncIterator[None]:
        """Have many vectors alone in memory: they are three times their text, which is tens of MB."""
        if vectors <= _MANY_VECTORS:
            yield
            return
        turn = _turns.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(1))
        try:
            async with asyncio.timeout(_TURN_S):
                await turn.acquire()
        except TimeoutError as exc:
            raise Unavailable(
                "engine-busy",
                f"cannot answer now: others fetch many vectors as well as this prompt from {self._engine!r}",
                hint="ask for fewer at a time",
                retry_after_s=5,
            ) from exc
        try:
            yield
        finally:
            turn.release()

    async def stream(self, prompt: Prompt, *, native_tools: bool) -> AsyncGenerator[Delta, None]:
        """Yield the answer piece by piece, then Finish, then Usage; closing it stops the engine."""
        sent = prompt if native_tools else compile_tools(prompt)
        translate = TranslateCalls(prompt) if sent is not prompt else None
        body = encode_request(sent, stream=True)
        async with self._request(PATHS[prompt.kind], body, wait_s=self._patience.first_byte_s) as response:
            await self._check_status(response, prompt)
            if response.content_type != "text/event-stream":
                # A server that cannot stream: its whole answer is one piece.
                untrusted = await self._read(response, _ANSWER_BYTES, self._patience.answer_s)
                answer = await self._parse_whole(untrusted, partial(parse_answer, kind=prompt.kind))
                for delta in deltas_of(answer if translate is None else translate.answer(answer)):
                    yield delta
                return
            events = SseParser()
            chunks = ChunkParser(prompt.kind, engine=self._engine)
            while not chunks.is_done and (untrusted := await self._piece(response)):
                for delta in self._parse(untrusted, events, chunks):
                    if translate is None:
                        yield delta
                    else:
                        for own in translate.feed(delta):
                            yield own
            if not chunks.is_finished:
                if not chunks.is_done:
                    raise self._failed("it broke off in the middle of its answer")
                finish = Finish("stop")
                for delta in (finish,) if translate is None else translate.feed(finish):
                    yield delta
            yield chunks.usage
            await self._end(response)

    def _parse(self, untrusted: bytes, events: SseParser, chunks: ChunkParser) -> list[Delta]:
        with self._reading():
            return [delta for data in events.feed(untrusted) for delta in chunks.feed(data)]

    async def _parse_whole(self, untrusted: bytes, parse: Callable[[bytes], T]) -> T:
        with self._reading():
            if len(untrusted) <= _INLINE_BYTES:
                return parse(untrusted)
            return await asyncio.to_thread(parse, untrusted)

    async def _ask(self, prompt: Prompt, limit_bytes: int) -> bytes:
        body = encode_request(prompt, stream=False)
        wait_s = self._patience.answer_s
        async with self._request(PATHS[prompt.kind], body, wait_s=wait_s) as response:
            await self._check_status(response, prompt)
            return await self._read(response, limit_bytes, wait_s)

    @asynccontextmanager
    async def _request(
        self, path: str, body: bytes | None, *, wait_s: float
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with asyncio.timeout(wait_s):
                response = await self._send(path, body)
        except TimeoutError as exc:
            raise self._failed(f"it sent nothing for {wait_s:g} s") from exc
        try:
            yield response
        finally:
            self._leave(response)

    async def _check_status(self, response: aiohttp.ClientResponse, prompt: Prompt) -> None:
        if response.status != 200:
            untrusted = await self._read(response, _SMALL_BYTES, self._patience.probe_s)
            raise self._refusal(response, untrusted, prompt)

    async def _read(self, response: aiohttp.ClientResponse, limit_bytes: int, wait_s: float) -> bytes:
        pieces: list[bytes] = []
        length = parts = 0
        try:
            async with asyncio.timeout(wait_s):
                while piece := await response.content.readany():
                    length += len(piece)
                    if length > limit_bytes:
                        raise self._failed(f"its answer is larger than {limit_bytes} bytes")
                    parts += sum(map(piece.count, _PARTS))
                    if parts > _MAX_PARTS:
                        raise self._failed("its answer has too many parts")
                    pieces.append(piece)
        except TimeoutError as exc:
            raise self._failed(f"its answer did not end within {wait_s:g} s") from exc
        except BROKEN as exc:
            raise self._failed("it broke off in the middle of its answer") from exc
        return b"".join(pieces)

    async def _piece(self, response: aiohttp.ClientResponse) -> bytes:
        """Return what has arrived, waiting for at least something; b"" at the end."""
        try:
            async with asyncio.timeout(self._patience.idle_s):
                return await response.content.readany()
        except TimeoutError as exc:
            raise self._failed(f"it sent nothing for {self._patience.idle_s:g} s") from exc
        except BROKEN as exc:
            raise self._failed("it broke off in the middle of its answer") from exc

    async def _end(self, response: aiohttp.ClientResponse) -> None:
        """Wait briefly for the end of a body whose content is complete."""
        try:
            async with asyncio.timeout(_END_S):
                await response.content.readany()
        except (TimeoutError, *BROKEN):
            return  # the answer is whole; only its connection is not used again

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn what is wrong with an engine's bytes into an error of the engine."""
        try:
            yield
        except BadRequest as exc:
            if exc.code == "context-too-long":
                raise
            raise self._failed(exc.message) from exc

    def _failed(self, cause: str) -> EngineError:
        return EngineError("engine-failed", f"cannot get an answer from engine {self._engine!r}: {cause}")


class Upstream(Exchange):
    """A client of one engine's server on this machine; works only inside `async with upstream.opened()`.

    With `listener_pid`, only that process is spoken to at the address, which is a unix socket's.
    """

    def __init__(
        self,
        engine: str,
        address: Address,
        *,
        patience: Patience | None = None,
        dial: Dial | None = None,
        listener_pid: int | None = None,
    ) -> None:
        super().__init__(engine, patience=patience)
        self._address = address
        self._dial = dial
        self._listener_pid = listener_pid
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Hold the connections; they are closed at the end, which stops the engine's work."""
        session = aiohttp.ClientSession(
            connector=self._connector(),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._patience.connect_s),
            headers={"Accept-Encoding": "identity", "User-Agent": "mycoswarmd"},
        )
        async with session:
            self._session = session
            try:
                yield
            finally:
                self._session = None

    def _connector(self) -> aiohttp.BaseConnector:
        path = self._address.socket_path
        if path is not None and self._listener_pid is not None:
            return DialledConnector(
                _Doorstep(path, self._listener_pid), "", 0, limit=0, keepalive_timeout=_KEEPALIVE_S
            )
        if path is not None:
            return aiohttp.UnixConnector(path, limit=0, keepalive_timeout=_KEEPALIVE_S)
        if self._dial is None:
            return aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
        url = urlsplit(self._address.base_url)
        return DialledConnector(
            self._dial, url.hostname or "", url.port or 80, limit=0, keepalive_timeout=_KEEPALIVE_S
        )

    async def _send(self, path: str, body: bytes | None) -> aiohttp.ClientResponse:
        """Send a request and return what its answer begins with."""
        try:
            return await self._send_once(path, body)
        except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError) as exc:
            raise self._unreachable(exc) from exc
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
            # llama.cpp's server closes a connection after a stream without saying so beforehand; a prompt
            # that met such an end was not read. Nothing came back yet, so asking again repeats nothing.
            pass
        except BROKEN as exc:
            raise self._failed("it speaks no HTTP") from exc
        try:
            return await self._send_once(path, body)
        except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError) as exc:
            raise self._unreachable(exc, " any more") from exc
        except BROKEN as exc:
            raise self._failed("it closed the connection") from exc

    async def _send_once(self, path: str, body: bytes | None) -> aiohttp.ClientResponse:
        if self._session is None:
            raise self.down("it is not running")
        return await self._session.request(
            "GET" if body is None else "POST",
            self._address.base_url + path,
            data=as_payload(body),
            headers=_JSON if body is not None else None,
            allow_redirects=False,
        )

    def _unreachable(self, exc: Exception, since: str = "") -> Unavailable:
        if isinstance(exc, aiohttp.ClientConnectorError) and isinstance(exc.os_error, StrangerError):
            return Unavailable(
                USURPED,
                f"cannot trust engine {self._engine!r}: another process listens on its socket",
                hint="a model file may have taken over its engine: remove the newest, restart mycoswarmd",
            )
        return self.down(_why(exc) + since)

    def down(self, cause: str) -> Unavailable:
        """Make the error for an engine that is not there, for now."""
        return Unavailable(
            "engine-down",
            f"cannot reach engine {self._engine!r}: {cause}",
            hint="is it started? mycoswarmctl status shows each engine",
            retry_after_s=5,
        )


def _why(exc: Exception) -> str:
    """Say why there is no connection."""
    if isinstance(exc, aiohttp.ClientConnectorError) and isinstance(exc.os_error, PermissionError):
        return "the LAN dialer takes only engines at 127.0.0.1, with ports that the settings declare"
    return "nothing answers at its address"
