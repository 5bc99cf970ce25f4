"""HTTP to the other nodes of a swarm over TLS, and to strangers for enrolment and the roster pull.

Laws:

1. An address is a hint. Nothing is sent to a member before whoever is there has proved the member's key;
   that is the TLS context's doing, made for exactly one certificate and one name.
2. In TLS 1.3 a connection that stands is no proof that the other side accepts *us*: only an answer is.
3. No proxy, no redirect, no cookie, no resolver of the machine; all that comes back is bounded in size and
   time, and every way to fail is one of our errors.

Source: docs/wire.md; RFC 8446 section 4.4.2 (the server judges the client last).
"""

import asyncio
import json
import re
import socket
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import reduce
from ssl import SSLContext
from types import SimpleNamespace
from weakref import WeakSet

import aiohttp
from aiohttp.connector import Connection
from aiohttp.tracing import Trace

from mycoswarmd.core.roster import Member
from mycoswarmd.engines.dialled import DialledConnector, dial_directly
from mycoswarmd.engines.upstream import BROKEN, as_payload
from mycoswarmd.errors import (
    BadRequest,
    Conflict,
    Denied,
    EngineError,
    MycoswarmError,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from mycoswarmd.flow.ports import Dial
from mycoswarmd.flow.swarmports import AddressBook, PeerAddress
from mycoswarmd.wire.jsonv import parse_object
from mycoswarmd.wire.peer import MAX_WORD_BYTES, SILENT_S, Word, parse_word

SERVER_NAME = "{}.mycoswarm.internal"
_STRANGER = SERVER_NAME.format("stranger")
MAX_ADDRESSES = 16
# A roster of 10,000 admits is some 15 MB; nothing else is nearly as large.
MAX_ANSWER_BYTES = 32 << 20
_MAX_ERROR_BYTES = 64 << 10
# Python makes twenty times as much of each of these; a roster of 10,000 statements has 120,000.
_PARTS = (b"[", b"{", b":")
_MAX_PARTS = 1 << 19
_INLINE_BYTES = 1 << 20
# On a LAN a connection with its handshake takes milliseconds; behind a dead hint is nobody for ever.
_CONNECT_S = 1.5
_WATCH_HEAD_S = 10.0
# Bytes that nobody acknowledges for this long end a connection, whatever it carries.
_UNHEARD_MS = 4_000
# A machine that dies says nothing: on a watch the kernel asks after 2 s of silence, once a second, and gives
# up at 4 s. It does so without waking this process, which heartbeats as frequent would do all day.
_PROBES = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
)
# A member's addresses are tried this far apart where none of them is proved yet.
_STAGGER_S = 0.25
# A server that refuses our certificate ends the connection at once; one that worked for longer has failed.
_EARLY_S = 5.0
_KNOCK_S = 3.0
_ERROR_S = 5.0
# Words come at most 5 times a second; a node that floods is read no faster than this.
_WORD_PAUSE_S = 0.05
# Shorter than the 75 s for which our own server keeps an idle connection.
_KEEPALIVE_S = 30.0
# Connections to old addresses are closed, the longest unused first.
_MAX_LINES = 32
# A step of the enrolment takes seconds where a code has to be stretched on a small machine.
_STRANGER_S = 15.0
_SAID_CHARS = 300
_JSON = {"Content-Type": "application/json"}
_CODE = re.compile(r"[a-z][a-z0-9-]{0,63}\Z")
_RULE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_RECEIPT = re.compile(r"[0-9]{1,19}-[0-9a-f]{8}\Z")
# How OpenSSL names the alerts of a server that does not want our certificate, or wants one.
_REFUSED = re.compile(r"ALERT_(?:UNKNOWN_CA|ACCESS_DENIED|DECRYPT_ERROR|[A-Z_]*CERTIFICATE[A-Z_]*)")


class _Connector(DialledConnector):
    """Knows its connections, so that all can be cut at once.

    Attributes:
        cert_der: what the other side presented on the newest connection.
    """

    def __init__(self, address: PeerAddress, dial: Dial, *, is_single: bool) -> None:
        super().__init__(dial, address.host, address.port, limit=128, keepalive_timeout=_KEEPALIVE_S)
        self._is_single = is_single
        self._cuts = 0
        self._transports: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()
        self._newest: asyncio.Transport | None = None
        self.cert_der = b""

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - as aiohttp has it
    ) -> Connection:
        """Return a connection, kept or new."""
        cuts = self._cuts
        connection = await super().connect(req, traces, timeout)
        transport = connection.transport
        is_another = self._is_single and self._newest is not None and transport is not self._newest
        if transport is None or cuts != self._cuts or is_another:
            if transport is not None:
                abort(transport)
            connection.close()
            raise aiohttp.ClientConnectionError("the connection is gone")
        if transport is not self._newest:
            self._newest = transport
            self._transports.add(transport)
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNHEARD_MS)
            tls = transport.get_extra_info("ssl_object")
            self.cert_der = (tls.getpeercert(binary_form=True) if tls is not None else None) or b""
        return connection

    def cut(self) -> None:
        """Drop every connection now."""
        self._cuts += 1
        for transport in list(self._transports):
            abort(transport)


async def _note_reuse(_session: aiohttp.ClientSession, context: SimpleNamespace, _params: object) -> None:
    context.trace_request_ctx.is_reused = True


def abort(transport: asyncio.WriteTransport) -> None:
    """End a connection at once, also one that is closed already, which Python before 3.11.4 cannot bear."""
    with suppress(AttributeError):
        transport.abort()


def _probe(response: aiohttp.ClientResponse) -> None:
    """Have the kernel find out when the other machine is gone."""
    connection = response.connection
    if connection is not None and connection.transport is not None:
        for option in _PROBES:
            connection.transport.get_extra_info("socket").setsockopt(*option)


def leave(response: aiohttp.ClientResponse) -> None:
    """Be done with an answer: a connection that still carries some of it is dropped at once.

    Closing it in the way of TLS would wait for the other side, which may go on sending.
    """
    connection = response.connection
    if connection is not None and connection.transport is not None:
        abort(connection.transport)
    response.close()


class _Line:
    """The way to one address. `aclose` it."""

    def __init__(
        self,
        address: PeerAddress,
        server_name: str,
        context: SSLContext,
        dial: Dial,
        *,
        is_single: bool = False,
    ) -> None:
        self.address = address
        self._base_url = f"https://{server_name}:{address.port}"
        self._context = context
        self._responses: WeakSet[aiohttp.ClientResponse] = WeakSet()
        self.connector = _Connector(address, dial, is_single=is_single)
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_note_reuse)
        self._session = aiohttp.ClientSession(
            connector=self.connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            headers={"Accept-Encoding": "identity", "User-Agent": "mycoswarmd"},
            trace_configs=[trace],
        )

    def cut(self) -> None:
        """Drop the connections, and tell whoever reads from one."""
        self.connector.cut()
        # A session that closes forgets its readers, and they would wait for ever.
        for response in list(self._responses):
            if not response.content.is_eof():
                response.content.set_exception(aiohttp.ServerDisconnectedError())

    async def aclose(self) -> None:
        """Drop the connections for good."""
        self.cut()
        await self._session.close()

    async def send(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        """Send once, and once more where a kept connection turned out to be closed before any answer."""
        use = SimpleNamespace(is_reused=False)
        try:
            return await self._send_once(method, path, body, headers, use)
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as exc:
            if isinstance(exc, aiohttp.ClientConnectorError) or not use.is_reused:
                raise
        return await self._send_once(method, path, body, headers, use)

    async def _send_once(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], use: SimpleNamespace
    ) -> aiohttp.ClientResponse:
        if self._session.closed:  # the member was put out while this was on its way
            raise aiohttp.ServerDisconnectedError
        response = await self._session.request(
            method,
            self._base_url + path,
            data=as_payload(body),
            headers={**(_JSON if body is not None else {}), **headers},
            ssl=self._context,
            allow_redirects=False,
            trace_request_ctx=use,
        )
        self._responses.add(response)
        return response


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why an address did not do.

    Attributes:
        is_nobody: nothing was sent there, so the next address may be tried.
        is_early_end: the member proved its key, and the connection ended before any answer.
    """

    error: MycoswarmError
    is_nobody: bool
    is_early_end: bool = False


def _explain(name: str, address: PeerAddress, exc: Exception) -> _Failure:
    """Say what an exception of aiohttp means."""
    if isinstance(exc, aiohttp.ClientConnectorCertificateError):
        error: MycoswarmError = Unauthenticated(
            "peer-unproved",
            f"cannot reach {name}: what answers at {address} does not have its key",
            hint="another machine has that address now, or somebody pretends to be the node",
        )
        return _Failure(error, is_nobody=True)
    if isinstance(exc, TimeoutError):
        return _Failure(
            _unreachable(name, f"no connection to {address} within {_CONNECT_S:g} s"), is_nobody=True
        )
    if isinstance(exc, aiohttp.ClientConnectorError):
        return _Failure(_unreachable(name, f"nothing speaks for it at {address}"), is_nobody=True)
    if _REFUSED.search(str(exc)):
        return _Failure(_refused(name), is_nobody=False)
    if isinstance(exc, aiohttp.ClientOSError | aiohttp.ServerDisconnectedError):
        error = _unreachable(name, f"it closed the connection at {address}")
        return _Failure(error, is_nobody=False, is_early_end=True)
    if isinstance(exc, aiohttp.ClientConnectionError | OSError):
        return _Failure(_unreachable(name, f"the connection to {address} is gone"), is_nobody=False)
    return _Failure(_failed(name, "it speaks no HTTP"), is_nobody=False)


class _Race:
    """The same question to several addresses; the first answer ends it."""

    def __init__(self) -> None:
        self.runners: list[asyncio.Task[None]] = []
        self._answers: list[aiohttp.ClientResponse] = []
        self._failures: list[MycoswarmError] = []
        self._ended = asyncio.Event()

    async def run(self, asking: Awaitable[aiohttp.ClientResponse | _Failure]) -> None:
        """Take part."""
        answer = await asking
        self._ended.set()
        if isinstance(answer, _Failure):
            self._failures.append(answer.error)
            return
        self._answers.append(answer)
        for runner in self.runners:
            if runner is not asyncio.current_task():
                runner.cancel()

    async def is_over(self, *, within_s: float) -> bool:
        """Wait until some runner has ended, or a while, and tell whether there is an answer."""
        self._ended.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._ended.wait()
        return bool(self._answers)

    def winner(self) -> aiohttp.ClientResponse:
        """Return the first answer, or raise the gravest failure."""
        if not self._answers:
            raise reduce(lambda worst, one: _graver(one, worst), self._failures)
        for response in self._answers[1:]:
            leave(response)
        return self._answers[0]

    def leave_all(self) -> None:
        """Be done with every answer."""
        for response in self._answers:
            leave(response)


class MemberClient:
    """HTTP to one member at whichever of its addresses it proves its key."""

    def __init__(
        self,
        member: Member,
        addresses: AddressBook,
        context: SSLContext,
        knock_context: Callable[[], SSLContext],
        dial: Dial,
    ) -> None:
        self._id = member.id
        self._cert_der = member.cert_der
        self._knock_context = knock_context
        self._name = f"node {member.name!r}"
        self._addresses = addresses
        self._context = context
        self._dial = dial
        self._lines: dict[PeerAddress, _Line] = {}  # the longest unused first
        self._best: PeerAddress | None = None
        self._is_closed = False
        self._cuts = 0
        self._tries = 0
        self._failed_at: dict[PeerAddress, int] = {}  # counted in tries

    async def aclose(self) -> None:
        """Drop every connection for good."""
        self._is_closed = True
        self.cut()
        for line in list(self._lines.values()):
            await line.aclose()
        self._lines.clear()

    def remote_address(self) -> PeerAddress | None:
        """Return where the member was last reached."""
        return self._best

    def cut(self) -> None:
        """Drop every connection now, also in the middle of a stream."""
        self._cuts += 1
        for line in self._lines.values():
            line.cut()

    async def ask(
        self, method: str, path: str, body: Mapping[str, object] | None = None, *, within_s: float = 5.0
    ) -> Mapping[str, object]:
        """Return a bounded JSON answer."""
        try:
            async with asyncio.timeout(within_s):
                response = await self.send(method, path, _encode(body))
                return await _read_answer(response, self._name)
        except TimeoutError as exc:
            raise _unreachable(self._name, f"it did not answer within {within_s:g} s") from exc

    async def watch(self) -> AsyncGenerator[Word | None, None]:
        """Yield the member's words as they come, None for a heartbeat; ends when the connection does."""
        try:
            async with asyncio.timeout(_WATCH_HEAD_S):
                response = await self.send("GET", "/swarm/watch")
        except TimeoutError as exc:
            raise _unreachable(self._name, f"it did not answer within {_WATCH_HEAD_S:g} s") from exc
        try:
            if response.status != 200:
                await _raise_refusal(response, self._name)
            _probe(response)
            lines = _Lines(self._id, self._name)
            while untrusted := await self._next_piece(response):
                word = lines.feed(untrusted)
                if word is not None or lines.has_beat:
                    yield word
                    await asyncio.sleep(_WORD_PAUSE_S)
        finally:
            leave(response)

    async def _next_piece(self, response: aiohttp.ClientResponse) -> bytes:
        """Return what has arrived, waiting for at least something; b"" where the connection has ended."""
        try:
            async with asyncio.timeout(SILENT_S):
                return await response.content.readany()
        except TimeoutError as exc:
            raise _unreachable(self._name, f"it was silent for {SILENT_S:g} s") from exc
        except BROKEN:
            return b""

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> aiohttp.ClientResponse:
        """Send to the first address where the member proves its key, and return how its answer begins.

        The caller bounds the time and closes the response.
        """
        while len(self._lines) > _MAX_LINES:
            await self._lines.pop(next(iter(self._lines))).aclose()
        addresses = self._in_order()
        if method == "GET" and self._best is None and len(addresses) > 1:
            return await self._race(addresses, path, headers or {})
        worst: MycoswarmError = _unreachable(self._name, "no address of it is known")
        for address in addresses:
            answer = await self._send_to(address, method, path, body, headers or {})
            if not isinstance(answer, _Failure):
                return answer
            if not answer.is_nobody:
                raise answer.error
            worst = _graver(answer.error, worst)
        raise worst

    async def _send_to(
        self, address: PeerAddress, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse | _Failure:
        begun_s, cuts = asyncio.get_running_loop().time(), self._cuts
        try:
            response = await self._line(address).send(method, path, body, headers)
        except BROKEN as exc:
            self._tries += 1
            self._failed_at[address] = self._tries
            failure = _explain(self._name, address, exc)
            is_early = asyncio.get_running_loop().time() - begun_s < _EARLY_S and cuts == self._cuts
            if failure.is_early_end and is_early and await self._hears_strangers(address):
                return _Failure(_refused(self._name), is_nobody=False)
            return failure
        self._best = address
        self._failed_at.pop(address, None)
        return response

    async def _hears_strangers(self, address: PeerAddress) -> bool:
        """Tell whether the member answers there, as long as it is not shown our certificate.

        A server that refuses a certificate just ends the connection: asyncio does not send the alert.
        """
        name = SERVER_NAME.format(self._id)
        line = _Line(address, name, self._knock_context(), self._dial, is_single=True)
        try:
            async with asyncio.timeout(_KNOCK_S):
                response = await line.send("GET", "/swarm/word", None, {})
                response.close()
        except BROKEN:  # a TimeoutError is one of them
            return False
        finally:
            await line.aclose()
        return line.connector.cert_der == self._cert_der

    async def _race(
        self, addresses: Sequence[PeerAddress], path: str, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        """Ask at all addresses, a little apart, and return the first answer: most of them may be dead."""
        race = _Race()
        try:
            async with asyncio.TaskGroup() as group:
                for address in addresses:
                    asking = self._send_to(address, "GET", path, None, headers)
                    race.runners.append(group.create_task(race.run(asking)))
                    if await race.is_over(within_s=_STAGGER_S):
                        break
        except BaseException:
            race.leave_all()
            raise
        return race.winner()

    def _in_order(self) -> list[PeerAddress]:
        """Begin with where it was reached last; what failed comes last, the longest ago first."""
        known = list(dict.fromkeys(self._addresses.addresses(self._id)))[:MAX_ADDRESSES]
        self._failed_at = {one: at for one, at in self._failed_at.items() if one in known}
        return sorted(known, key=lambda one: (self._failed_at.get(one, 0), one != self._best))

    def _line(self, address: PeerAddress) -> _Line:
        if self._is_closed:
            raise aiohttp.ClientConnectionError("the client is closed")
        line = self._lines.pop(address, None)
        if line is None:
            line = _Line(address, SERVER_NAME.format(self._id), self._context, self._dial)
        self._lines[address] = line
        return line


class Stranger:
    """One connection to whoever is there; nothing is ever sent over a second one."""

    def __init__(self, address: PeerAddress, context: SSLContext, dial: Dial) -> None:
        self._line = _Line(address, _STRANGER, context, dial, is_single=True)
        self._name = str(address)

    @property
    def server_cert_der(self) -> bytes:
        """The certificate that the other side presented; known after the first answer."""
        return self._line.connector.cert_der

    async def post(self, path: str, body: Mapping[str, object]) -> Mapping[str, object]:
        """Send and return JSON on the same connection."""
        try:
            async with asyncio.timeout(_STRANGER_S):
                response = await self._line.send("POST", path, _encode(body), {})
                return await _read_answer(response, self._name)
        except aiohttp.ServerTimeoutError as exc:  # of the connection; it is a TimeoutError, too
            raise _explain(self._name, self._line.address, exc).error from exc
        except TimeoutError as exc:
            raise _unreachable(self._name, f"it did not answer within {_STRANGER_S:g} s") from exc
        except BROKEN as exc:
            raise _explain(self._name, self._line.address, exc).error from exc

    async def aclose(self) -> None:
        """Drop the connection."""
        await self._line.aclose()


class PeerHttp:
    """Makes clients of members and of strangers; without a dialer, this process connects by itself."""

    def __init__(
        self,
        *,
        client_context: Callable[[bytes], SSLContext],
        knock_context: Callable[[], SSLContext],
        dial: Dial | None = None,
    ) -> None:
        self._client_context = client_context
        self._knock_context = knock_context
        self._dial = dial or dial_directly

    @asynccontextmanager
    async def member(self, member: Member, addresses: AddressBook) -> AsyncIterator[MemberClient]:
        """Hold a client of one member; it dials the addresses that the book has at that moment."""
        context = self._client_context(member.cert_der)
        client = MemberClient(member, addresses, context, self._knock_context, self._dial)
        try:
            yield client
        finally:
            await client.aclose()

    @asynccontextmanager
    async def stranger(self, address: PeerAddress) -> AsyncIterator[Stranger]:
        """Hold one connection to whoever listens there; presents nothing and believes nothing."""
        client = Stranger(address, self._knock_context(), self._dial)
        try:
            yield client
        finally:
            await client.aclose()


class _Lines:
    """Finds the newest word in what a watch yields.

    Attributes:
        has_beat: whether the last piece ended some line.
    """

    def __init__(self, node_id: str, name: str) -> None:
        self._id = node_id
        self._name = name
        self._rest = b""
        self.has_beat = False

    def feed(self, untrusted: bytes) -> Word | None:
        """Return the last word that is complete now; earlier ones are out of date."""
        *lines, self._rest = (self._rest + untrusted).split(b"\n")
        self.has_beat = bool(lines)
        if len(self._rest) > MAX_WORD_BYTES:
            raise _failed(self._name, "its word does not end")
        said = next((line for line in reversed(lines) if line.strip()), None)
        if said is None:
            return None
        try:
            word = parse_word(said)
        except BadRequest as exc:
            raise _failed(self._name, exc.message) from exc
        if word.id != self._id:
            raise _failed(self._name, "it speaks for another node")
        return word


def _encode(body: Mapping[str, object] | None) -> bytes | None:
    if body is None:
        return None
    return json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii")


async def _read_answer(response: aiohttp.ClientResponse, name: str) -> Mapping[str, object]:
    """Read a whole JSON answer, or raise what it says."""
    try:
        if response.status != 200:
            await _raise_refusal(response, name)
        untrusted = await _read(response, MAX_ANSWER_BYTES, name)
    finally:
        leave(response)
    try:
        if len(untrusted) <= _INLINE_BYTES:
            return parse_object(untrusted, what="the answer")
        return await asyncio.to_thread(parse_object, untrusted, what="the answer")
    except BadRequest as exc:
        raise _failed(name, exc.message) from exc


async def _read(response: aiohttp.ClientResponse, limit_bytes: int, name: str) -> bytes:
    pieces: list[bytes] = []
    length = parts = 0
    try:
        while piece := await response.content.readany():
            length += len(piece)
            parts += sum(map(piece.count, _PARTS))
            if length > limit_bytes or parts > _MAX_PARTS:
                raise _failed(name, "its answer is too large")
            pieces.append(piece)
    except BROKEN as exc:
        raise _failed(name, "it broke off in the middle of its answer") from exc
    return b"".join(pieces)


async def _raise_refusal(response: aiohttp.ClientResponse, name: str) -> None:
    """Raise what an answer with an error status says."""
    try:
        async with asyncio.timeout(_ERROR_S):
            untrusted = await _read(response, _MAX_ERROR_BYTES, name)
    except TimeoutError as exc:
        raise _failed(name, "its answer does not end") from exc
    raise parse_refusal(response.status, untrusted, response.headers, name=name)


@dataclass(frozen=True, slots=True)
class Said:
    """What a refusal of another node says, each part of a bounded, harmless form or empty."""

    code: str
    message: str
    rule: str
    receipt: str


def parse_said(untrusted: bytes, untrusted_headers: Mapping[str, str]) -> Said:
    """Read the refusal of another node; what is not of the right form is left out."""
    try:
        error = parse_object(untrusted).get("error")
    except BadRequest:
        error = None
    facts = error if isinstance(error, dict) else {}
    texts = {key: facts[key] for key in ("code", "message", "rule") if isinstance(facts.get(key), str)}
    code, rule = texts.get("code", ""), texts.get("rule", "")
    receipt = untrusted_headers.get("X-Mycoswarm-Receipt", "")
    message = "".join(char if char.isprintable() else " " for char in texts.get("message", "")[:_SAID_CHARS])
    return Said(
        code=code if _CODE.match(code) else "",
        message=message,
        rule=rule if _RULE.match(rule) else "",
        receipt=receipt if _RECEIPT.match(receipt) else "",
    )


def parse_refusal(
    status: int, untrusted: bytes, untrusted_headers: Mapping[str, str], *, name: str
) -> MycoswarmError:
    """Make our error of a node's answer with an error status. No prompts go through here."""
    said = parse_said(untrusted, untrusted_headers)
    message = said.message or f"cannot get an answer from {name}: it answers with status {status}"
    hint = f"this is what {name} says" if said.message else ""
    error: MycoswarmError
    match status:
        case 401:
            error = _refused(name)
        case 403:
            error = Denied(said.code or "peer-denied", message, hint=hint, rule=said.rule)
        case 404:
            error = NotFound(said.code or "not-found", message, hint=hint)
        case 409:
            error = Conflict(said.code or "conflict", message, hint=hint)
        case 429 | 503:
            error = Unavailable(said.code or "peer-busy", message, hint=hint, http_status=status)
        case _ if 400 <= status < 500:
            error = BadRequest(said.code or "bad-request", message, hint=hint)
        case _:
            error = _failed(name, f"it answers with status {status}")
    error.receipt = said.receipt
    return error


def _graver(error: MycoswarmError, than: MycoswarmError) -> MycoswarmError:
    """Return the failure that tells more; of two alike, the first argument."""
    order = ("peer-unproved", "peer-refuses-us")
    ranks = [order.index(one.code) + 1 if one.code in order else 0 for one in (error, than)]
    return error if ranks[0] >= ranks[1] else than


def _unreachable(name: str, cause: str) -> Unavailable:
    return Unavailable(
        "peer-unreachable",
        f"cannot reach {name}: {cause}",
        hint="is it on, and on this network?",
        retry_after_s=2,
    )


def _refused(name: str) -> Unauthenticated:
    return Unauthenticated(
        "peer-refuses-us",
        f"cannot ask {name}: it does not accept this node's key",
        hint="was this node put out of the swarm, or has that one not heard of it yet?",
    )


def _failed(name: str, cause: str) -> EngineError:
    return EngineError("peer-failed", f"cannot use what {name} answers: {cause}")
