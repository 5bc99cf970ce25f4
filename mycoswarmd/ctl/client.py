"""HTTP to a node, by its socket or the network: documents, lines and events out of what a command asks for.

Rules: every answer is bounded before it is read; a connection is closed when its caller leaves, also by
Ctrl-C, and that is what cancels the request on the other side.
"""

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, urlencode

from mycoswarmd.ctl.refusals import Doc
from mycoswarmd.errors import LocalProtocolError
from mycoswarmd.wire.sse import SseParser

# The slowest short answer is a check of a long receipt chain.
_ANSWER_S = 120.0
# A backup begins with a copy of the whole database.
_STREAM_S = 900.0
# Lists are paged by the daemon; its largest answers are a workspace (256 MiB) and a page of receipts.
_JSON_BYTES = 64 << 20
_BLOB_BYTES = 300 << 20
_LINE_BYTES = 8 << 20
_IS_JSON = {"Content-Type": "application/json"}


class Answer(Protocol):
    """An answer whose body is still to be read; reading raises Unreachable when it breaks off."""

    @property
    def status(self) -> int:
        """The HTTP status; always below 400."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers, their names in lower case."""
        ...

    def body(self, at_most_bytes: int) -> bytes:
        """Return the whole body; LocalProtocolError when it is larger."""
        ...

    def lines(self, at_most_bytes: int) -> Iterator[bytes]:
        """Yield whole lines as they come."""
        ...

    def pieces(self) -> Iterator[bytes]:
        """Yield what comes, as it comes."""
        ...


class Transport(Protocol):
    """The way to one node."""

    def open(
        self,
        method: str,
        target: str,
        body: bytes | None,
        headers: Mapping[str, str],
        *,
        timeout_s: float | None,
        on_wait: Callable[[], None] | None = None,
    ) -> AbstractContextManager[Answer]:
        """Send a request and hold its answer; what is refused or unreachable is raised."""
        ...

    def close(self) -> None:
        """End what was kept open."""
        ...


class UnixTransport:
    """The way to the daemon on this machine: its socket."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(
        self,
        method: str,
        target: str,
        body: bytes | None,
        headers: Mapping[str, str],
        *,
        timeout_s: float | None,
        on_wait: Callable[[], None] | None = None,
    ) -> AbstractContextManager[Answer]:
        """Send a request on a connection of its own."""
        # http.client costs a fifth of what --help may take, so it is loaded with the first request.
        http = importlib.import_module("mycoswarmd.ctl.unixhttp")
        opened: AbstractContextManager[Answer] = http.open_answer(
            self.path, method, target, body, headers, timeout_s=timeout_s, on_wait=on_wait
        )
        return opened

    def close(self) -> None:
        """Do nothing: no connection is kept."""


class Client:
    """Talks to one daemon: to the one at a socket, or by another way."""

    def __init__(self, where: Path | Transport) -> None:
        self._transport = UnixTransport(where) if isinstance(where, Path) else where

    def close(self) -> None:
        """End what is open. Idempotent."""
        self._transport.close()

    def get(self, path: str, **query: object) -> Doc:
        """Fetch a JSON document; a value of None leaves its name out of the query."""
        return self._document("GET", with_query(path, query))

    def post(
        self,
        path: str,
        body: object = None,
        *,
        timeout_s: float = _ANSWER_S,
        on_wait: Callable[[], None] | None = None,
    ) -> Doc:
        """Send a JSON document and return the answer; `on_wait` is called once when it does not come soon."""
        data = _json({} if body is None else body)
        with self._open("POST", path, data, _IS_JSON, timeout_s=timeout_s, on_wait=on_wait) as answer:
            return _object(answer.body(_JSON_BYTES))

    def delete(self, path: str) -> Doc:
        """Delete a thing and return the answer."""
        return self._document("DELETE", path)

    def put_bytes(self, path: str, body: bytes) -> Doc:
        """Upload bytes and return the answer."""
        return self._document("PUT", path, body, content_type="application/x-tar")

    def get_bytes(self, path: str) -> bytes | None:
        """Download bytes; None when the node says that there are none."""
        with self._open("GET", path) as answer:
            return None if answer.status == 204 else answer.body(_BLOB_BYTES)

    def stream(self, path: str) -> Iterator[bytes]:
        """Yield the bytes of a long answer as they come; the node may take its time to begin."""
        with self._open("GET", path, timeout_s=_STREAM_S) as answer:
            yield from answer.pieces()

    def lines(self, path: str, **query: object) -> Iterator[Doc]:
        """Yield the objects of a stream of JSON lines as they come; waits as long as it takes."""
        with self._open("GET", with_query(path, query), timeout_s=None) as answer:
            for untrusted in answer.lines(_LINE_BYTES):
                yield _object(untrusted)

    def events(
        self,
        path: str,
        body: object,
        headers: Mapping[str, str],
        *,
        on_wait: Callable[[], None] | None = None,
    ) -> Iterator[tuple[Mapping[str, str], bytes]]:
        """Yield (headers of the answer, data of an event) for each server-sent event, as they come.

        A daemon that answers with a whole JSON document instead yields that, once. `on_wait` is called once
        when it does not answer soon.
        """
        with self._open(
            "POST", path, _json(body), {**headers, **_IS_JSON}, timeout_s=None, on_wait=on_wait
        ) as answer:
            if "event-stream" not in answer.headers.get("content-type", ""):
                yield answer.headers, answer.body(_JSON_BYTES)
                return
            parser = SseParser(max_event_bytes=_LINE_BYTES)
            for untrusted in answer.pieces():
                for data in parser.feed(untrusted):
                    yield answer.headers, data

    def _document(
        self, method: str, path: str, body: bytes | None = None, content_type: str = "application/json"
    ) -> Doc:
        headers = {"Content-Type": content_type} if body is not None else {}
        with self._open(method, path, body, headers) as answer:
            return _object(answer.body(_JSON_BYTES))

    def _open(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        timeout_s: float | None = _ANSWER_S,
        on_wait: Callable[[], None] | None = None,
    ) -> AbstractContextManager[Answer]:
        return self._transport.open(
            method, path, body, dict(headers or {}), timeout_s=timeout_s, on_wait=on_wait
        )


def with_query(path: str, query: Mapping[str, object]) -> str:
    """Return a path with a query string of all values that are not None."""
    given = {key: str(value) for key, value in query.items() if value is not None}
    return f"{path}?{urlencode(given)}" if given else path


def segment(text: str) -> str:
    """Quote text as one segment of a path, also "." and ".."."""
    quoted = quote(text, safe="", errors="replace")
    return quoted.replace(".", "%2E") if quoted in {".", ".."} else quoted


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
