"""HTTP over the daemon's unix socket: bounded, streaming, its refusals turned into our errors.

Rules: every answer is bounded before it is read; a connection is closed when its caller leaves, also by
Ctrl-C, and that is what cancels the request on the other side. One connection for each request: the
socket is local, and nothing then is left half-read.
"""

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from mycoswarmd.errors import (
    BadRequest,
    Conflict,
    Denied,
    EngineError,
    LocalProtocolError,
    MycoswarmError,
    NotFound,
    PolicyInvalid,
    Problem,
    Unauthenticated,
    Unavailable,
    Unreachable,
)
from mycoswarmd.wire.sse import SseParser

Doc = dict[str, Any]

# A unix socket answers at once or not at all; a long queue of connections is worth a moment.
_CONNECT_S = 5.0
# The slowest short answer is a check of a long receipt chain.
_ANSWER_S = 120.0
# Lists are paged by the daemon; its largest answers are a workspace (256 MiB) and a page of receipts.
_JSON_BYTES = 64 << 20
_BLOB_BYTES = 300 << 20
_ERROR_BYTES = 1 << 20
_LINE_BYTES = 8 << 20
_PIECE_BYTES = 64 << 10
_CLASSES: Mapping[int, type[MycoswarmError]] = {
    400: BadRequest,
    401: Unauthenticated,
    404: NotFound,
    405: BadRequest,
    408: BadRequest,
    409: Conflict,
    413: BadRequest,
    429: Unavailable,
    502: EngineError,
    503: Unavailable,
}


class _UnixConnection(http.client.HTTPConnection):
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


class Client:
    """Talks to one daemon."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, path: str, **query: object) -> Doc:
        """Fetch a JSON document; a value of None leaves its name out of the query."""
        return self._document("GET", with_query(path, query))

    def post(self, path: str, body: object = None) -> Doc:
        """Send a JSON document and return the answer."""
        return self._document("POST", path, _json({} if body is None else body))

    def delete(self, path: str) -> Doc:
        """Delete a thing and return the answer."""
        return self._document("DELETE", path)

    def put_bytes(self, path: str, body: bytes) -> Doc:
        """Upload bytes and return the answer."""
        return self._document("PUT", path, body, content_type="application/x-tar")

    def get_bytes(self, path: str) -> bytes | None:
        """Download bytes; None when the node says that there are none."""
        with self._open("GET", path) as response:
            return None if response.status == 204 else _read(response, _BLOB_BYTES)

    def lines(self, path: str, **query: object) -> Iterator[Doc]:
        """Yield the objects of a stream of JSON lines as they come; waits as long as it takes."""
        with self._open("GET", with_query(path, query), timeout_s=None) as response:
            while untrusted := response.readline(_LINE_BYTES):
                if not untrusted.endswith(b"\n"):
                    raise EOFError
                yield _object(untrusted)

    def events(
        self, path: str, body: object, headers: Mapping[str, str]
    ) -> Iterator[tuple[Mapping[str, str], bytes]]:
        """Yield (headers of the answer, data of an event) for each server-sent event, as they come.

        A daemon that answers with a whole JSON document instead yields that, once.
        """
        kind = {"Content-Type": "application/json"}
        with self._open("POST", path, _json(body), {**headers, **kind}, timeout_s=None) as response:
            said = dict(response.headers.items())
            if "event-stream" not in response.headers.get("Content-Type", ""):
                yield said, _read(response, _JSON_BYTES)
                return
            parser = SseParser(max_event_bytes=_LINE_BYTES)
            while untrusted := response.read1(_PIECE_BYTES):
                for data in parser.feed(untrusted):
                    yield said, data

    def _document(
        self, method: str, path: str, body: bytes | None = None, content_type: str = "application/json"
    ) -> Doc:
        headers = {"Content-Type": content_type} if body is not None else {}
        with self._open(method, path, body, headers) as response:
            return _object(_read(response, _JSON_BYTES))

    @contextlib.contextmanager
    def _open(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        timeout_s: float | None = _ANSWER_S,
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request and yield the answer's head; its failures, and those of reading on, become ours."""
        connection = _UnixConnection(self.path, timeout_s)
        try:
            connection.connect()
        except OSError as exc:
            connection.close()
            raise self._not_there(exc) from exc
        try:
            # A refused upload breaks the pipe; the answer that says why is there already.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, path, body, dict(headers or {}))
            with connection.getresponse() as response:
                if response.status >= 400:
                    raise refusal(response.status, _read(response, _ERROR_BYTES))
                yield response
        except TimeoutError as exc:
            raise Unreachable(
                "no-answer",
                f"cannot wait longer for the daemon at {str(self.path)!r}",
                hint="it may be busy: see its log",
            ) from exc
        except (OSError, http.client.HTTPException, EOFError) as exc:
            raise Unreachable(
                "connection-lost",
                f"cannot finish: the daemon at {str(self.path)!r} went away in the middle",
                hint="is it restarting? try again",
            ) from exc
        finally:
            connection.close()

    def _not_there(self, exc: OSError) -> Unreachable:
        path = str(self.path)
        if isinstance(exc, FileNotFoundError | ConnectionRefusedError):
            return Unreachable(
                "daemon-not-running",
                f"cannot reach the daemon: nothing listens at {path!r}",
                hint="start it with `mycoswarmd run`, or say where it is: --socket, --state or $MYCOSWARM_SOCKET",
            )
        if isinstance(exc, PermissionError):
            return Unreachable(
                "socket-forbidden",
                f"cannot reach the daemon: you may not open {path!r}",
                hint="ask its owner to add you to the group mycoswarm",
            )
        return Unreachable(
            "daemon-unreachable", f"cannot reach the daemon at {path!r}: {exc.strerror or exc}"
        )


def with_query(path: str, query: Mapping[str, object]) -> str:
    """Return a path with a query string of all values that are not None."""
    given = {key: str(value) for key, value in query.items() if value is not None}
    return f"{path}?{urlencode(given)}" if given else path


def segment(text: str) -> str:
    """Quote text as one segment of a path, also "." and ".."."""
    quoted = quote(text, safe="", errors="replace")
    return quoted.replace(".", "%2E") if quoted in {".", ".."} else quoted


def refusal(status: int, untrusted: bytes) -> MycoswarmError:
    """Turn an error answer into the class of its status."""
    try:
        document = json.loads(untrusted)
    except (ValueError, RecursionError):
        document = None
    error = document.get("error") if isinstance(document, dict) else None
    return to_error(status, error if isinstance(error, dict) else {})


def to_error(status: int, error: Doc) -> MycoswarmError:
    """Turn an error object into the class of its status; exit code 3 is kept for refusals alone."""
    code = str(error.get("code") or f"http-{status}")
    message = str(error.get("message") or f"cannot do this: the daemon answered {status} without a reason")
    hint = str(error.get("hint") or "")
    made: MycoswarmError
    if code == "policy-invalid" and isinstance(error.get("problems"), list):
        made = PolicyInvalid(tuple(_problem(row) for row in error["problems"]), hint=hint)
    elif status == 403:
        rule, where = str(error.get("rule") or ""), str(error.get("where") or "")
        made = Denied(code, message, hint=hint, rule=rule, where=where)
    else:
        made = _CLASSES.get(status, LocalProtocolError)(code, message, hint=hint)
        if made.exit_code == BadRequest.exit_code:
            made.exit_code = 1  # the daemon refused what our own checks let through: no usage error
    made.receipt = str(error.get("receipt") or "")
    return made


def _problem(row: object) -> Problem:
    fields: Doc = row if isinstance(row, dict) else {}
    line = fields.get("line")
    return Problem(
        path=str(fields.get("path", "")),
        line=line if isinstance(line, int) else 0,
        message=str(fields.get("message", row)),
        hint=str(fields.get("hint") or ""),
    )


def _json(body: object) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")


def _object(untrusted: bytes) -> Doc:
    try:
        value = json.loads(untrusted)
    except (ValueError, RecursionError) as exc:
        raise LocalProtocolError("bad-answer", "cannot read the daemon's answer: it is not JSON") from exc
    if not isinstance(value, dict):
        raise LocalProtocolError("bad-answer", "cannot read the daemon's answer: it is not an object")
    return value


def _read(response: http.client.HTTPResponse, at_most_bytes: int) -> bytes:
    data = response.read(at_most_bytes + 1)
    if len(data) > at_most_bytes:
        raise LocalProtocolError(
            "bad-answer", f"cannot read the daemon's answer: more than {at_most_bytes} bytes"
        )
    if response.length:  # read(n) says nothing of a body that ended too early
        raise EOFError
    return data
