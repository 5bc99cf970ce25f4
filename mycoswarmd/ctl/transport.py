"""HTTP/1.1 over a unix socket: one connection per request, everything bounded.

Law: whatever goes wrong between here and the daemon is `Unreachable` (exit code 4).
"""

import http.client
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mycoswarmd.errors import BadRequest, Unreachable

# Long enough for a node that writes a large workspace to a slow disk, or a model's first token on a slow
# one. A follower whose task is silent for longer connects again.
_TIMEOUT_S = 300.0
# The largest answer is a tar of changes, which the daemon bounds at 256 MiB.
_MAX_BODY_BYTES = 300 << 20
# One event of a transcript holds a few texts of 4 KiB.
_MAX_LINE_BYTES = 4 << 20
_PIECE_BYTES = 64 << 10


class _UnixConnection(http.client.HTTPConnection):
    """http.client on a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("mycoswarm", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        """Connect, or raise Unreachable with what to do."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(self.timeout)
        try:
            sock.connect(str(self._path))
        except OSError as exc:
            sock.close()
            raise _unreachable(self._path, exc) from exc
        self.sock = sock


def _unreachable(path: Path, exc: OSError) -> Unreachable:
    if isinstance(exc, PermissionError):
        hint = "join the group mycoswarm, or ask whoever runs the node"
        return Unreachable("no-access", f"cannot open {str(path)!r}: permission denied", hint=hint)
    why = exc.strerror or str(exc)
    if isinstance(exc, FileNotFoundError):
        why = "there is no such socket"
    elif isinstance(exc, ConnectionRefusedError):
        why = "nobody listens there"
    hint = "start it with `mycoswarmd run`, or name another with --socket, --state or MYCOSWARM_SOCKET"
    return Unreachable("no-daemon", f"cannot reach the node at {str(path)!r}: {why}", hint=hint)


def _lost(exc: Exception | None = None) -> Unreachable:
    if isinstance(exc, TimeoutError):
        return Unreachable(
            "daemon-silent",
            f"cannot go on: the node was silent for {_TIMEOUT_S:.0f} s",
            hint="mycoswarmctl status",
        )
    return Unreachable(
        "connection-lost",
        "cannot go on: the node closed the connection before its answer was complete",
        hint="it may be restarting; try again",
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer whose body is still being written."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    response: http.client.HTTPResponse

    def pieces(self) -> Iterator[bytes]:
        """Yield the body as it comes; Unreachable when it is cut short."""
        while True:
            try:
                piece = self.response.read1(_PIECE_BYTES)
            except (OSError, http.client.HTTPException) as exc:
                raise _lost(exc) from exc
            if not piece:
                break
            yield piece
        if self.response.length:  # bytes that Content-Length promised and nobody sent
            raise _lost()

    def lines(self) -> Iterator[bytes]:
        """Yield the body's lines as they come."""
        rest = b""
        for piece in self.pieces():
            *whole, rest = (rest + piece).split(b"\n")
            if len(rest) > _MAX_LINE_BYTES:
                raise BadRequest("bad-answer", f"cannot read a line of more than {_MAX_LINE_BYTES} bytes")
            yield from whole
        if rest:
            yield rest

    def body(self) -> bytes:
        """Return the whole body."""
        body = bytearray()
        for piece in self.pieces():
            body += piece
            if len(body) > _MAX_BODY_BYTES:
                raise BadRequest("bad-answer", f"cannot take an answer of more than {_MAX_BODY_BYTES} bytes")
        return bytes(body)


@contextmanager
def exchange(
    path: Path, method: str, target: str, data: bytes | None, headers: Mapping[str, str]
) -> Iterator[Answer]:
    """Send one request; the answer's body can be read while the context lasts."""
    connection = _UnixConnection(path)
    try:
        response = _ask(connection, method, target, data, headers)
        yield Answer(
            response.status, {name.lower(): value for name, value in response.getheaders()}, response
        )
    finally:
        connection.close()


def _ask(
    connection: _UnixConnection, method: str, target: str, data: bytes | None, headers: Mapping[str, str]
) -> http.client.HTTPResponse:
    refused: OSError | None = None
    try:
        connection.request(method, target, data, dict(headers))
    except (BrokenPipeError, ConnectionResetError) as exc:
        refused = exc  # a body too large: the daemon has answered and hung up; read what it said
    except OSError as exc:
        raise _lost(exc) from exc
    try:
        return connection.getresponse()
    except (OSError, http.client.HTTPException) as exc:
        raise _lost(exc) from refused or exc
