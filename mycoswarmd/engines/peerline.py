"""The way to one address of another node: its connections, and what it means when they fail.

Law: in TLS 1.3 a connection that stands is no proof that the other side accepts *us*: only an answer is.

Source: RFC 8446 section 4.4.2 (the server judges the client last); tcp(7).
"""

import asyncio
import re
import socket
import weakref
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from ssl import SSLContext
from types import SimpleNamespace
from weakref import WeakSet

import aiohttp
from aiohttp.connector import Connection
from aiohttp.tracing import Trace

from mycoswarmd.engines.dialled import DialledConnector
from mycoswarmd.engines.upstream import as_payload
from mycoswarmd.errors import EngineError, MycoswarmError, Unauthenticated, Unavailable
from mycoswarmd.flow.ports import Dial
from mycoswarmd.flow.swarmports import PeerAddress

# On a LAN a connection with its handshake takes milliseconds; behind a dead hint is nobody for ever.
CONNECT_S = 1.5
# Bytes that nobody acknowledges for this long end a connection, whatever it carries.
UNHEARD_MS = 4_000
# A machine that dies says nothing: on a watch the kernel asks after 2 s of silence, once a second, and gives
# up at 4 s. It does so without waking this process, which heartbeats as frequent would do all day.
PROBES = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
)
# Shorter than the 75 s for which our own server keeps an idle connection.
KEEPALIVE_S = 30.0
_JSON = {"Content-Type": "application/json"}
# How OpenSSL names the alerts of a server that does not want our certificate, or wants one.
_REFUSED = re.compile(r"ALERT_(?:UNKNOWN_CA|ACCESS_DENIED|DECRYPT_ERROR|[A-Z_]*CERTIFICATE[A-Z_]*)")


class Connector(DialledConnector):
    """Knows its connections, so that all can be cut at once.

    Attributes:
        cert_der: what the other side presented on the newest connection.
    """

    def __init__(self, address: PeerAddress, dial: Dial, *, is_single: bool) -> None:
        super().__init__(dial, address.host, address.port, limit=128, keepalive_timeout=KEEPALIVE_S)
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
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNHEARD_MS)
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


def probe(response: aiohttp.ClientResponse) -> None:
    """Have the kernel find out when the other machine is gone."""
    connection = response.connection
    if connection is not None and connection.transport is not None:
        for option in PROBES:
            connection.transport.get_extra_info("socket").setsockopt(*option)


def leave(response: aiohttp.ClientResponse) -> None:
    """Be done with an answer: a connection that still carries some of it is dropped at once.

    Closing it in the way of TLS would wait for the other side, which may go on sending.
    """
    connection = response.connection
    if connection is not None and connection.transport is not None:
        abort(connection.transport)
    response.close()


class Line:
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
        self.connector = Connector(address, dial, is_single=is_single)
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_note_reuse)
        self._session = aiohttp.ClientSession(
            connector=self.connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
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
class Failure:
    """Why an address did not do.

    Attributes:
        is_nobody: nothing was sent there, so the next address may be tried.
        is_early_end: the member proved its key, and the connection ended before any answer.
    """

    error: MycoswarmError
    is_nobody: bool
    is_early_end: bool = False


def explain(name: str, address: PeerAddress, exc: Exception) -> Failure:
    """Say what an exception of aiohttp means."""
    if isinstance(exc, aiohttp.ClientConnectorCertificateError):
        error: MycoswarmError = Unauthenticated(
            "peer-unproved",
            f"cannot reach {name}: what answers at {address} does not have its key",
            hint="another machine has that address now, or somebody pretends to be the node",
        )
        return Failure(error, is_nobody=True)
    if isinstance(exc, TimeoutError):
        return Failure(
            unreachable(name, f"no connection to {address} within {CONNECT_S:g} s"), is_nobody=True
        )
    if isinstance(exc, aiohttp.ClientConnectorError):
        return Failure(unreachable(name, f"nothing speaks for it at {address}"), is_nobody=True)
    if _REFUSED.search(str(exc)):
        return Failure(refused(name), is_nobody=False)
    if isinstance(exc, aiohttp.ClientOSError | aiohttp.ServerDisconnectedError):
        error = unreachable(name, f"it closed the connection at {address}")
        return Failure(error, is_nobody=False, is_early_end=True)
    if isinstance(exc, aiohttp.ClientConnectionError | OSError):
        return Failure(unreachable(name, f"the connection to {address} is gone"), is_nobody=False)
    return Failure(failed(name, "it speaks no HTTP"), is_nobody=False)


class Race:
    """The same question to several addresses; the first answer ends it."""

    def __init__(self) -> None:
        self.runners: list[asyncio.Task[None]] = []
        self._answers: list[aiohttp.ClientResponse] = []
        self._failures: list[MycoswarmError] = []
        self._ended = asyncio.Event()

    async def run(self, asking: Awaitable[aiohttp.ClientResponse | Failure]) -> None:
        """Take part."""
        answer = await asking
        self._ended.set()
        if isinstance(answer, Failure):
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
            raise reduce(lambda worst, one: graver(one, worst), self._failures)
        for response in self._answers[1:]:
            leave(response)
        return self._answers[0]

    def leave_all(self) -> None:
        """Be done with every answer."""
        for response in self._answers:
            leave(response)


def graver(error: MycoswarmError, than: MycoswarmError) -> MycoswarmError:
    """Return the failure that tells more; of two alike, the first argument."""
    order = ("peer-unproved", "peer-refuses-us")
    ranks = [order.index(one.code) + 1 if one.code in order else 0 for one in (error, than)]
    return error if ranks[0] >= ranks[1] else than


def unreachable(name: str, cause: str) -> Unavailable:
    """Say that a node does not answer."""
    return Unavailable(
        "peer-unreachable",
        f"cannot reach {name}: {cause}",
        hint="is it on, and on this network?",
        retry_after_s=2,
    )


def refused(name: str) -> Unauthenticated:
    """Say that a node does not want us."""
    return Unauthenticated(
        "peer-refuses-us",
        f"cannot ask {name}: it does not accept this node's key",
        hint="was this node put out of the swarm, or has that one not heard of it yet?",
    )


def failed(name: str, cause: str) -> EngineError:
    """Say that a node answers something that is of no use."""
    return EngineError("peer-failed", f"cannot use what {name} answers: {cause}")
