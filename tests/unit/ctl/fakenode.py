"""A node for tests of its client: a real HTTP server on a unix socket with scripted answers; and a way to
run the real command line against it inside this process."""

import contextlib
import io
import json
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from unittest import mock

from mycoswarmd.ctl.main import main


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request that arrived."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        value = json.loads(self.body)
        assert isinstance(value, dict)
        return value


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer. `pieces` are sent chunked, one by one; `cut` ends the connection without an end."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    pieces: tuple[bytes, ...] | None = None
    cut: bool = False


Script = Reply | list[Reply] | Callable[[Asked], Reply]


def answer(document: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """Answer with JSON."""
    return Reply(status=status, body=json.dumps(document).encode(), headers=headers or {})


def refuse(status: int, code: str, message: str = "cannot do this", **fields: object) -> Reply:
    """Answer with an error, spelled as the daemon does."""
    hint = fields.get("hint")
    error = {"code": code, "message": f"{message}; {hint}" if hint else message, "type": "x", **fields}
    return answer({"error": error}, status)


def events(*rows: Mapping[str, object], cut: bool = False) -> Reply:
    """Answer with a transcript, one line a piece."""
    return Reply(pieces=tuple(json.dumps(row).encode() + b"\n" for row in rows), cut=cut)


def sse(
    *chunks: object, done: bool = True, cut: bool = False, headers: Mapping[str, str] | None = None
) -> Reply:
    """Answer with a stream of server-sent events."""
    pieces = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks]
    return Reply(
        pieces=(*pieces, *([b"data: [DONE]\n\n"] if done else [])),
        cut=cut,
        headers={"Content-Type": "text/event-stream; charset=utf-8", **(headers or {})},
    )


class FakeNode:
    """Answers by a script: (method, path without its query) -> answers; the last one is repeated."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.script: dict[tuple[str, str], Script] = {}
        self.asked: list[Asked] = []
        self.changed = threading.Condition()

    def on(self, method: str, path: str, script: Script) -> "FakeNode":
        self.script[method, path] = script
        return self

    def reply(self, asked: Asked) -> Reply:
        with self.changed:
            self.asked.append(asked)
            self.changed.notify_all()
            script = self.script.get((asked.method, asked.path.partition("?")[0]))
            if isinstance(script, list):
                return script.pop(0) if len(script) > 1 else script[0]
        if script is None:
            return refuse(404, "no-such-route", f"cannot find {asked.path}")
        return script if isinstance(script, Reply) else script(asked)

    def paths(self) -> list[str]:
        return [f"{asked.method} {asked.path}" for asked in self.asked]

    @contextlib.contextmanager
    def serving(self) -> Iterator["FakeNode"]:
        """Listen while the context lasts; may be entered again, as a node that restarts."""
        node = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                asked = Asked(method=self.command, path=self.path, headers=headers, body=body)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.send(node.reply(asked))

            do_GET = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815 - http.server's names

            def send(self, reply: Reply) -> None:
                self.close_connection = True
                self.send_response(reply.status)
                kind = {"Content-Type": "application/json"} | dict(reply.headers)
                for name, value in kind.items():
                    self.send_header(name.replace("_", "-"), value)
                if reply.pieces is None:
                    self.send_header("Content-Length", str(len(reply.body) + (1 if reply.cut else 0)))
                    self.end_headers()
                    self.wfile.write(reply.body)
                    return
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for piece in reply.pieces:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                    self.wfile.flush()
                if not reply.cut:
                    self.wfile.write(b"0\r\n\r\n")

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Say nothing."""

            def address_string(self) -> str:
                return "unix"

        class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True
            request_queue_size = 64

        self.path.unlink(missing_ok=True)
        server = Server(str(self.path), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
            self.path.unlink(missing_ok=True)


class _Terminal(io.TextIOWrapper):
    """A stream that says whether it is a terminal."""

    def __init__(self, data: bytes = b"", *, is_terminal: bool = False) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8", write_through=True)
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    def text(self) -> str:
        buffer = self.buffer
        assert isinstance(buffer, io.BytesIO)
        return buffer.getvalue().decode("utf-8")


@dataclass(frozen=True, kw_only=True)
class Ran:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


def ctl(
    node: FakeNode | None,
    *arguments: str,
    stdin: str | bytes = "",
    terminal: bool = False,
    env: Mapping[str, str] | None = None,
) -> Ran:
    """Run mycoswarmctl as main() does, with streams of its own."""
    where = ["--socket", str(node.path)] if node is not None else []
    data = stdin.encode() if isinstance(stdin, str) else stdin
    typed = _Terminal(data, is_terminal=terminal)
    out, err = _Terminal(is_terminal=terminal), _Terminal(is_terminal=terminal)
    with (
        mock.patch.object(sys, "argv", ["mycoswarmctl", *where, *arguments]),
        mock.patch.object(sys, "stdin", typed),
        mock.patch.object(sys, "stdout", out),
        mock.patch.object(sys, "stderr", err),
        mock.patch.dict("os.environ", {"COLUMNS": "200", "TERM": "xterm", **(env or {})}),
    ):
        code: object = 0
        try:
            main()
        except SystemExit as exc:
            code = exc.code
    assert code is None or isinstance(code, int), code
    return Ran(code=code or 0, out=out.text(), err=err.text())
