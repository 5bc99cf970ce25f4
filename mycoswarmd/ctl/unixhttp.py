"""HTTP/1.1 on a unix socket: one request on one connection, bounded, closed when its user leaves.

Law: what goes wrong between here and the daemon is Unreachable (exit code 4); what the daemon answered
is the class of its status. One connection for each request, so that nothing is ever left half-read.
ctl/tlshttp.py does the same over the network, with `exchange`.
"""

import contextlib
import http.client
import select
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from mycoswarmd.ctl import unitstate
from mycoswarmd.ctl.place import SYSTEM_SOCKET, has_service
from mycoswarmd.ctl.refusals import refusal
from mycoswarmd.errors import LocalProtocolError, Unreachable

# A unix socket answers at once or not at all; a long queue of connections is worth a moment.
_CONNECT_S = 5.0
_NATURAL_S = 1.5
_LOOK_S = 0.5
_ERROR_BYTES = 1 << 20
_PIECE_BYTES = 64 << 10


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float | None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path
        self._timeout_s = timeout_s

    def connect(self) -> None:
        """Connect to the unix socket instead of a host."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_CONNECT_S)
        self.sock.connect(str(self._path))
        self.sock.settimeout(self._timeout_s)


class HttpAnswer:
    """An answer, as ctl/client.py wants it."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers: Mapping[str, str] = {key.lower(): value for key, value in response.headers.items()}

    def body(self, at_most_bytes: int) -> bytes:
        """Return the whole body; LocalProtocolError when it is larger."""
        data = self._response.read(at_most_bytes + 1)
        if len(data) > at_most_bytes:
            raise _too_large(at_most_bytes)
        self._check_end()
        return data

    def is_whole(self) -> bool:
        """Tell whether all of it was read."""
        return self._response.isclosed()

    def lines(self, at_most_bytes: int) -> Iterator[bytes]:
        """Yield whole lines as they come."""
        # Not readline: of a chunked body that ends too early it says nothing.
        rest = b""
        for piece in self.pieces():
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                yield line + b"\n"
            if len(rest) > at_most_bytes:
                raise _too_large(at_most_bytes)
        if rest:
            raise EOFError

    def pieces(self) -> Iterator[bytes]:
        """Yield what comes, as it comes."""
        while piece := self._response.read1(_PIECE_BYTES):
            yield piece
        self._check_end()

    def _check_end(self) -> None:
        if self._response.length:  # read(n) says nothing of a body that ended too early
            raise EOFError


@contextlib.contextmanager
def open_answer(
    path: Path,
    method: str,
    target: str,
    body: bytes | None,
    headers: Mapping[str, str],
    *,
    timeout_s: float | None,
    on_wait: Callable[[], None] | None = None,
) -> Iterator[HttpAnswer]:
    """Send a request to the socket at `path` and yield the head of its answer; see `exchange`."""
    connection = _Connection(path, timeout_s)
    has_unit = unitstate.is_service(path)
    try:
        connection.connect()
    except OSError as exc:
        connection.close()
        raise (has_unit and unitstate.stopped()) or _not_there(path, exc) from exc
    with exchange(
        connection,
        method,
        target,
        body,
        headers,
        who=f"the daemon at {str(path)!r}",
        on_wait=on_wait,
        look=unitstate.may_answer_yet if has_unit else None,
    ) as answer:
        yield answer


@contextlib.contextmanager
def exchange(
    connection: http.client.HTTPConnection,
    method: str,
    target: str,
    body: bytes | None,
    headers: Mapping[str, str],
    *,
    who: str,
    on_wait: Callable[[], None] | None = None,
    look: Callable[[], bool] | None = None,
    on_head: Callable[[Mapping[str, str]], None] | None = None,
    keeps: bool = False,
) -> Iterator[HttpAnswer]:
    """Send a request and yield the head of its answer; an answer of 400 and above is raised.

    Args:
        connection: where to; connected, with the time that the other side may be silent. Closed at the end,
            but for `keeps`.
        method: the HTTP method.
        target: path and query.
        body: what to send.
        headers: further headers.
        who: what the other side is called in errors.
        on_wait: called once, when it is silent for longer than people find natural.
        look: called again and again while it is silent, until it returns False; may raise Unreachable.
        on_head: called with the headers of any answer, of a refusal too.
        keeps: leave the connection open for another request, where the answer was read to its end.
    """
    is_kept = False
    try:
        # A refused upload breaks the pipe; the answer that says why is there already.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(method, target, body, dict(headers))
        _await_answer(connection.sock, on_wait, look)
        with connection.getresponse() as response:
            answer = HttpAnswer(response)
            if on_head is not None:
                on_head(answer.headers)
            if answer.status >= 400:
                receipt = answer.headers.get("x-mycoswarm-receipt", "")
                raise refusal(answer.status, answer.body(_ERROR_BYTES), receipt=receipt)
            yield answer
            is_kept = keeps and answer.is_whole()
    except TimeoutError as exc:
        raise Unreachable(
            "no-answer", f"cannot wait longer for {who}", hint="it may be busy: see its log"
        ) from exc
    except (OSError, http.client.HTTPException, EOFError) as exc:
        raise Unreachable(
            "connection-lost",
            f"cannot finish: {who} went away in the middle",
            hint="is it restarting? try again",
        ) from exc
    finally:
        if not is_kept:
            connection.close()


def _await_answer(
    sock: socket.socket, on_wait: Callable[[], None] | None, look: Callable[[], bool] | None
) -> None:
    """Return when an answer comes, or when there is nothing to do but wait."""
    silent_s = 0.0
    while on_wait is not None or look is not None:
        if select.select([sock], [], [], _LOOK_S)[0]:
            return
        silent_s += _LOOK_S
        if on_wait is not None and silent_s >= _NATURAL_S:
            on_wait()
            on_wait = None
        if look is not None and not look():
            look = None


def _too_large(at_most_bytes: int) -> LocalProtocolError:
    return LocalProtocolError(
        "bad-answer", f"cannot read the daemon's answer: more than {at_most_bytes} bytes"
    )


def _start(path: Path) -> str:
    return "sudo systemctl start mycoswarmd" if path == SYSTEM_SOCKET and has_service() else "mycoswarmd run"


def _not_there(path: Path, exc: OSError) -> Unreachable:
    if isinstance(exc, FileNotFoundError | ConnectionRefusedError):
        return Unreachable(
            "daemon-not-running",
            f"cannot reach the daemon: nothing listens at {str(path)!r}",
            hint=f"start it with `{_start(path)}`, or say where it is with --socket or --state",
        )
    if isinstance(exc, PermissionError):
        return Unreachable(
            "socket-forbidden",
            f"cannot reach the daemon: you may not open {str(path)!r}",
            hint="ask its owner to add you to the group mycoswarm",
        )
    why = exc.strerror or str(exc)
    return Unreachable("daemon-unreachable", f"cannot reach the daemon at {str(path)!r}: {why}")
