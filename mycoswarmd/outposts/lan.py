"""The LAN dialer: makes TCP sockets for the node, whose own process has no network, and hands them over.

A process of its own, `python3 -I -m mycoswarmd.outposts.lan`, in the appliance a unit with an IP filter: the
kernel judges a socket by the control group of whoever made it, so what is handed over stays on the LAN.
It takes its listening socket from systemd, and then serves the node's user and believes the node's settings;
or, as `--fd N`, from whoever started it, whom it serves.

Laws:

1. Only one user may ask, one packet for each connection; what cannot be read or is not allowed is refused
   before anything is sent anywhere. The rules are wire/dial.py's; the unit's filter says them again.
2. Nothing that is dialled and no name that is resolved is the dialer's own idea.
3. It holds nothing between two requests, serves 64 at once, refuses more, and never ends by itself.

Source: wire/dial.py; unix(7), sd_listen_fds(3), sd_notify(3).
"""

import argparse
import asyncio
import errno
import fcntl
import logging
import os
import pwd
import socket
import struct
import sys
import tomllib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mycoswarmd.errors import BadRequest
from mycoswarmd.outposts.callfilter import forbid_packet_pairs
from mycoswarmd.outposts.selftest import prove
from mycoswarmd.wire.dial import (
    LOOPBACK,
    PACKET_BYTES,
    Code,
    Connect,
    DialAnswer,
    DialRequest,
    Done,
    Failed,
    Listen,
    Prove,
    Rules,
    encode_answer,
    objection,
    parse_request,
    parse_rules,
)
from mycoswarmd.wire.proof import Proof, Unit

AT_ONCE = 64
EXIT_USAGE = 2
# Whom the unit serves, and where the settings of its node are.
_NODE_USER = "_mycoswarm"
_NODE_SETTINGS = Path("/etc/mycoswarm/mycoswarm.toml")
_FIRST_FD = 3
# From netdevice(7): the index of an interface.
_SIOCGIFINDEX = 0x8933
_BACKLOG = 128
# The core sends its packet at once, unless it is stopped for a moment, as a busy machine may do.
_PACKET_S = 10.0
_TIRED_S = 0.1
# Of refusals that are logged, each once.
_REASONS = 256
_MAX_SETTINGS_BYTES = 64 << 10
_CODES = {
    errno.ECONNREFUSED: Code.REFUSED,
    errno.ETIMEDOUT: Code.TIMEOUT,
    errno.EPERM: Code.DENIED,
    errno.EACCES: Code.DENIED,
    errno.EADDRINUSE: Code.IN_USE,
    errno.EMFILE: Code.BUSY,
    errno.ENFILE: Code.BUSY,
    errno.ENOBUFS: Code.BUSY,
    errno.ENOMEM: Code.BUSY,
    errno.EAGAIN: Code.BUSY,
    errno.EADDRNOTAVAIL: Code.UNREACHABLE,
}
_OWN = "that address is this machine's own"
log = logging.getLogger("mycoswarmd.lan")


class SettingsFile:
    """The rules that the node's settings add, read again when the file has changed."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._read_as: tuple[int, ...] | None = None
        self._rules = Rules()

    def rules(self) -> Rules:
        """Return the rules of now; a file that cannot be read or understood adds none."""
        if self._path is None:
            return Rules(engine_ports=None)
        try:
            about = self._path.stat()
            seen = (about.st_ino, about.st_mtime_ns, about.st_size)
            if seen == self._read_as:
                return self._rules
            with self._path.open("rb") as file:
                text = file.read(_MAX_SETTINGS_BYTES + 1)
        except OSError:
            self._read_as, self._rules = None, Rules()
            return self._rules
        self._read_as, self._rules = seen, Rules()
        if len(text) <= _MAX_SETTINGS_BYTES:
            with suppress(UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError):
                self._rules = parse_rules(tomllib.loads(text.decode("utf-8")))
        return self._rules


class Dialer:
    """Serves the requests of one user."""

    def __init__(self, *, user_id: int, settings: SettingsFile, proof: Proof) -> None:
        self._user_id = user_id
        self._settings = settings
        self._proof = proof
        self._serving = 0
        self._told: set[str] = set()

    async def serve(self, listener: socket.socket) -> None:
        """Take connections until cancelled."""
        loop = asyncio.get_running_loop()
        listener.settimeout(0)
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    line, _ = await loop.sock_accept(listener)
                except OSError:  # no descriptors are left; some will be
                    await asyncio.sleep(_TIRED_S)
                    continue
                refusal = self._refusal(line)
                if refusal is None:
                    self._serving += 1
                    group.create_task(self._serve_one(line))
                else:
                    _answer(line, refusal, None)

    def _refusal(self, line: socket.socket) -> Failed | None:
        """Say why a connection is not served at all."""
        peer = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, user_id, _ = struct.unpack("3i", peer)
        if user_id != self._user_id:
            return Failed(Code.DENIED, "this socket is for another user")
        return Failed(Code.BUSY, f"{AT_ONCE} requests at once") if self._serving >= AT_ONCE else None

    async def _serve_one(self, line: socket.socket) -> None:
        sock: socket.socket | None = None
        try:
            answer, sock = await self._handle(line)
            _answer(line, answer, sock)
        finally:
            self._serving -= 1
            line.close()
            if sock is not None:
                sock.close()

    async def _handle(self, line: socket.socket) -> tuple[DialAnswer, socket.socket | None]:
        try:
            async with asyncio.timeout(_PACKET_S):
                # Descriptors that come with it are dropped by the kernel: there is no room for them.
                untrusted = await asyncio.get_running_loop().sock_recv(line, PACKET_BYTES + 1)
            request = parse_request(untrusted)
        except TimeoutError:
            return Failed(Code.DENIED, f"no packet came within {_PACKET_S:g} s"), None
        except OSError as exc:
            return _failed(exc), None
        except BadRequest as exc:
            return Failed(Code.DENIED, exc.message), None
        reason = objection(request, self._settings.rules())
        if reason is not None:
            if reason not in self._told and len(self._told) < _REASONS:  # the core asks again and again
                self._told.add(reason)
                log.warning("refused %s: %s", type(request).__name__.lower(), reason)
            return Failed(Code.DENIED, reason), None
        return await self._do(request, line)

    async def _do(self, request: DialRequest, line: socket.socket) -> tuple[DialAnswer, socket.socket | None]:
        try:
            match request:
                case Connect():
                    return Done(), await _connect(request, line)
                case Listen():
                    return Done(), _listen(request)
                case Prove():
                    return Done(self._proof), None
        except TimeoutError as exc:
            return Failed(Code.TIMEOUT, exc.strerror or "no answer"), None
        except OSError as exc:
            return _failed(exc), None


def _failed(exc: OSError) -> Failed:
    return Failed(_CODES.get(exc.errno or 0, Code.UNREACHABLE), exc.strerror or type(exc).__name__)


async def _connect(request: Connect, line: socket.socket) -> socket.socket:
    """Connect, for as long as whoever asked waits for it."""
    loop = asyncio.get_running_loop()
    sock = _new_socket(request.host)
    try:
        address = _socket_address(sock, request.host, request.port)
        if request.host != LOOPBACK:
            _check_far(sock, (address[0], 0, *address[2:]))
        async with asyncio.timeout(request.within_ms / 1000) as deadline:

            def leave() -> None:
                """Stop: the other side has hung up, or says what nobody asked."""
                loop.remove_reader(line.fileno())
                deadline.reschedule(loop.time())

            loop.add_reader(line.fileno(), leave)
            try:
                await loop.sock_connect(sock, address)
            finally:
                loop.remove_reader(line.fileno())
        _look_at(sock, request)
    except BaseException:
        sock.close()
        raise
    return sock


def _check_far(like: socket.socket, address: tuple[str | int, ...]) -> None:
    """Refuse an address of this machine before anything is sent: what can be bound is one.

    Programs that listen on every address would be within reach, though no setting declares them. The route
    does not tell: it has the machine's first address of a network as the source, also to its second.
    Where any address can be bound (the setting ip_nonlocal_bind), only `_look_at` is left.
    """
    nobodys = "2001:db8::1" if like.family == socket.AF_INET6 else "192.0.2.1"  # of examples
    if _can_bind(like.family, address) and not _can_bind(like.family, (nobodys, 0)):
        raise PermissionError(errno.EACCES, _OWN)


def _can_bind(family: int, address: tuple[str | int, ...]) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(address)
        except OSError as exc:
            if exc.errno == errno.EADDRNOTAVAIL:
                return False
            raise  # no descriptors, or a filter: whoever cannot look does not connect
    return True


def _look_at(sock: socket.socket, request: Connect) -> None:
    """Refuse a connection that ends on this machine where that was not asked for."""
    own, other = sock.getsockname(), sock.getpeername()
    if own == other:  # TCP can meet itself where nobody listens
        raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody listens there")
    if own[0] == other[0] and request.host != LOOPBACK:
        raise PermissionError(errno.EACCES, _OWN)  # it became one in between


def _listen(request: Listen) -> socket.socket:
    sock = _new_socket(request.host)
    try:
        address = _socket_address(sock, request.host, request.port)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if request.host == "::" else 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _new_socket(host: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.settimeout(0)
    return sock


def _socket_address(sock: socket.socket, host: str, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
    """Return a clean address as the kernel wants it; no resolver is asked."""
    text, _, scope = host.partition("%")
    if ":" not in text:
        return text, port
    index = int(scope) if scope.isdigit() else _interface_index(sock, scope) if scope else 0
    return text, port, 0, index


def _interface_index(sock: socket.socket, name: str) -> int:
    """Ask the kernel over a socket that is there: the C library would make one of a family we have not."""
    answer = fcntl.ioctl(sock, _SIOCGIFINDEX, struct.pack("16si20x", name.encode("ascii"), 0))
    return int(struct.unpack("16si20x", answer)[1])


def _answer(line: socket.socket, answer: DialAnswer, sock: socket.socket | None) -> None:
    """Send the answer, with the descriptor where there is one; whoever has left does not get it."""
    with suppress(OSError), line:
        if sock is None:
            line.send(encode_answer(answer))
        else:
            socket.send_fds(line, [encode_answer(answer)], [sock.fileno()])


class Manager:
    """The service manager, where there is one."""

    def __init__(self, variables: dict[str, str]) -> None:
        where = variables.get("NOTIFY_SOCKET", "")
        self._where = "\0" + where[1:] if where.startswith("@") else where
        usec = variables.get("WATCHDOG_USEC", "")
        self._every_s = int(usec) / 2_000_000 if usec.isdigit() else 0.0

    def tell(self, what: str) -> None:
        """Say how this process is."""
        if not self._where:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.settimeout(0)
            out.sendto(what.encode("ascii", "replace"), self._where)

    async def watch(self) -> None:
        """Say again and again that the loop turns, where that is asked for."""
        while self._every_s:
            self.tell("WATCHDOG=1")
            await asyncio.sleep(self._every_s)


def _passed_fd(variables: dict[str, str]) -> int | None:
    """Return the one socket that systemd passed."""
    is_mine = variables.get("LISTEN_PID") == str(os.getpid())
    return _FIRST_FD if is_mine and variables.get("LISTEN_FDS") == "1" else None


def _take_listener(fd: int | None) -> socket.socket | None:
    """Return the socket if it is one that takes connections with packets."""
    if fd is None:
        return None
    try:
        os.set_inheritable(fd, False)  # noqa: FBT003
        listener = socket.socket(fileno=fd)
        is_right = listener.family == socket.AF_UNIX and listener.type == socket.SOCK_SEQPACKET
        is_right = is_right and bool(listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return None
    return listener if is_right else None


def _user_id(name: str) -> int | None:
    try:
        return int(name) if name.isdigit() else pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


async def _run(dialer: Dialer, listener: socket.socket, manager: Manager) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(manager.watch())
        await dialer.serve(listener)


def main(argv: Iterable[str]) -> int:
    """Serve until killed."""
    parser = argparse.ArgumentParser(prog="mycoswarmd.outposts.lan")
    parser.add_argument("--fd", type=int, help="the listening socket; default: what systemd passed")
    parser.add_argument("--user", help="who may ask, by name or number")
    parser.add_argument("--settings", type=Path, help="the node's settings, which declare its engines")
    options = parser.parse_args(list(argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    names = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC")
    given = os.environ  # noqa: TID251 - systemd speaks in the environment
    variables = {name: given.pop(name) for name in names if name in given}
    is_unit = options.fd is None
    listener = _take_listener(_passed_fd(variables) if is_unit else options.fd)
    user_id = _user_id(options.user or (_NODE_USER if is_unit else str(os.getuid())))
    settings = SettingsFile(options.settings or (_NODE_SETTINGS if is_unit else None))
    if listener is None or user_id is None:
        log.error(
            "cannot serve: %s", "no listening socket was passed" if listener is None else "no such user"
        )
        return EXIT_USAGE
    forbid_packet_pairs()
    proof = prove(Unit.LAN)
    for check in proof.weak():
        log.warning("not proved: %s (%s)", check.name.value, check.detail)
    manager = Manager(variables)
    manager.tell(f"READY=1\nSTATUS=serving; {len(proof.weak())} of {len(proof.checks)} checks not proved")
    dialer = Dialer(user_id=user_id, settings=settings, proof=proof)
    asyncio.run(_run(dialer, listener, manager))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
