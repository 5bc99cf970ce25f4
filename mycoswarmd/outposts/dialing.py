"""The core's side of the LAN dialer: it gets sockets that somebody else made.

Laws:

1. One connection to the dialer for each request, one packet each way, everything within a time.
2. With a yes to `connect` or `listen` comes exactly one descriptor, and it is the socket that was asked
   for; whatever else arrives is closed.
3. All that fails is an OSError, as if one had connected oneself, so that callers need to know nothing.

Source: wire/dial.py; unix(7).
"""

import array
import asyncio
import errno
import os
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from mycoswarmd.errors import BadRequest
from mycoswarmd.wire.dial import (
    LOOPBACK,
    MAX_WITHIN_MS,
    PACKET_BYTES,
    Code,
    Connect,
    DialRequest,
    Done,
    Failed,
    Listen,
    Prove,
    clean_host,
    encode_request,
    parse_answer,
)
from mycoswarmd.wire.proof import Proof, Unit

# Its first answer comes once systemd has started it, on a small machine that boots.
_LISTEN_S = 30.0
# The dialer serves 64 at once. Dead addresses of members cannot take the last ones: engines need them.
_AT_ONCE = 48
# More than are ever due, so that surplus ones are seen and closed.
_FDS = 4
_FULL_S = 0.02
_ERRNO = {
    Code.REFUSED: errno.ECONNREFUSED,
    Code.UNREACHABLE: errno.EHOSTUNREACH,
    Code.DENIED: errno.EACCES,
    Code.BUSY: errno.EBUSY,
    Code.IN_USE: errno.EADDRINUSE,
}


class LanDialer:
    """Asks the LAN dialer behind a unix socket. Holds nothing; safe to use concurrently."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places = asyncio.Semaphore(_AT_ONCE)

    async def connect(self, host: str, port: int, within_s: float) -> socket.socket:
        """Return a connected, non-blocking socket; fits flow.ports.Dial."""
        host = clean_host(host) or host
        async with asyncio.timeout(within_s):
            if host == LOOPBACK:
                return await self._connect(host, port, within_s)
            async with self._places:
                return await self._connect(host, port, within_s)

    async def listen(self, host: str, port: int) -> socket.socket:
        """Return a bound, listening, non-blocking socket; "::" takes IPv4 too."""
        host = clean_host(host) or host
        async with asyncio.timeout(_LISTEN_S):
            _, sock = await self._ask(Listen(host, port))
        if sock is None:
            raise _strange("it gave no socket")
        return _checked(sock, sock.getsockname, host, port)

    async def prove(self) -> Proof:
        """Return what the dialer proved of its own confinement."""
        async with asyncio.timeout(_LISTEN_S):
            answer, sock = await self._ask(Prove())
        if sock is not None:
            sock.close()
            raise _strange("it gave a socket that nobody asked for")
        if answer.proof is None or answer.proof.unit is not Unit.LAN:
            raise _strange("it gave no proof")
        return answer.proof

    async def _connect(self, host: str, port: int, within_s: float) -> socket.socket:
        within_ms = min(max(round(within_s * 1000), 1), MAX_WITHIN_MS)
        _, sock = await self._ask(Connect(host, port, within_ms))
        if sock is None:
            raise _strange("it gave no socket")
        return _checked(sock, sock.getpeername, host, port)

    async def _ask(self, request: DialRequest) -> tuple[Done, socket.socket | None]:
        """Ask once; the caller bounds the time and owns the socket."""
        try:
            packet = encode_request(request)
        except BadRequest as exc:
            raise OSError(errno.EINVAL, exc.message) from exc
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
            line.settimeout(0)
            await self._reach(line)
            # Who is refused at once may be so before it has said a word; the answer is there all the same.
            with suppress(BrokenPipeError):
                line.send(packet)
            await _readable(line)
            try:
                return _read(*_receive(line))
            except ConnectionResetError as exc:
                raise _strange("it broke off") from exc

    async def _reach(self, line: socket.socket) -> None:
        while True:
            try:
                line.connect(str(self._path))
            except BlockingIOError:  # its queue is full; asyncio would take that for a yes
                await asyncio.sleep(_FULL_S)
            except OSError as exc:
                raise OSError(errno.ENETDOWN, "the LAN dialer does not answer at its socket") from exc
            else:
                return


async def _readable(line: socket.socket) -> None:
    """Wait for a packet, or for the end."""
    loop = asyncio.get_running_loop()
    came = asyncio.Event()
    loop.add_reader(line.fileno(), came.set)
    try:
        await came.wait()
    finally:
        loop.remove_reader(line.fileno())


def _receive(line: socket.socket) -> tuple[bytes, list[int]]:
    """Take one packet and every descriptor with it."""
    fds = array.array("i")
    wanted = (PACKET_BYTES + 1, socket.CMSG_SPACE(_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    try:
        untrusted, controls, flags, _ = line.recvmsg(*wanted)
    except ConnectionResetError:  # it did not read what we said, which it tells before what it said
        untrusted, controls, flags, _ = line.recvmsg(*wanted)
    for level, kind, data in controls:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        _close(fds)
        raise _strange("it sent too much")
    return untrusted, list(fds)


def _read(untrusted: bytes, fds: list[int]) -> tuple[Done, socket.socket | None]:
    """Make an answer and at most one socket of what came."""
    try:
        answer = _answer_of(untrusted)
        if len(fds) > 1:
            raise _strange("it sent too much")
        sock = _socket_of(fds[0]) if fds else None
    except OSError:
        _close(fds)
        raise
    return answer, sock


def _answer_of(untrusted: bytes) -> Done:
    if not untrusted:
        raise _strange("it broke off")
    try:
        answer = parse_answer(untrusted)
    except BadRequest as exc:
        raise _strange(exc.message) from exc
    if isinstance(answer, Failed):
        raise _failure(answer)
    return answer


def _socket_of(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
    except OSError as exc:  # the descriptor is open still
        raise _strange("it gave what is no socket") from exc
    sock.settimeout(0)
    return sock


def _failure(answer: Failed) -> OSError:
    """Make of a no what a connect of one's own would have raised."""
    text = f"the LAN dialer says {answer.code.value}: {answer.detail}"
    if answer.code is Code.TIMEOUT:
        return TimeoutError(text)
    return OSError(_ERRNO[answer.code], text)


def _checked(
    sock: socket.socket, name: Callable[[], tuple[str | int, ...]], host: str, port: int
) -> socket.socket:
    """Return the socket if it is TCP and really is at that address."""
    try:
        is_tcp = sock.family in {socket.AF_INET, socket.AF_INET6} and sock.type == socket.SOCK_STREAM
        found = name()[:2] if is_tcp else ("", 0)
    except OSError:  # it is not connected
        found = ("", 0)
    # Interfaces of other network namespaces have no names here, so scopes are left out.
    if (str(found[0]).partition("%")[0], found[1]) == (host.partition("%")[0], port):
        return sock
    sock.close()
    raise _strange("it gave another socket")


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _strange(what: str) -> OSError:
    return OSError(errno.EPROTO, f"the LAN dialer cannot be used: {what}")
