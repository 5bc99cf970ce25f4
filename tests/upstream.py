"""A scripted OpenAI-compatible server for tests of the whole node: the model's name says how it behaves.

It stands where a real engine stands, behind a real socket. It writes down every request and every
client that went away, so that tests can tell what left the node and whether work was stopped.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CODER = "qwen2.5-coder-test"  # as `agent`, under a name that the documented policy's agent may use
MODELS = ("ok", "slow", "garbage", "dies", "silent", "refuses", "agent", "nonsense", "looping", "huge", CODER)
USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


class Upstream:
    """The server's notebook and its address."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []  # type: ignore[type-arg]
        self.gone = threading.Event()  # some client left before its answer ended
        self.script: list[dict] = []  # type: ignore[type-arg]
        self.step = 0
        self.rename: dict[str, str] = {}  # behave as another model
        self.pause_s = 0.0  # before each answer of model `agent`
        self.url = ""

    def play(self, *calls: tuple[str, dict], pause_s: float = 0.0) -> None:  # type: ignore[type-arg]
        """Let model `agent` call these tools, in this order."""
        self.script = [{"tool": tool, "arguments": arguments} for tool, arguments in calls]
        self.step, self.pause_s = 0, pause_s

    def count(self, model: str) -> int:
        return sum(body.get("model") == model for body in self.bodies)


@contextmanager
def upstream() -> Iterator[Upstream]:
    """Serve while the context lasts."""
    notebook = Upstream()

    class Handler(_Handler):
        book = notebook

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    notebook.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield notebook
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are written apart: 40 ms for each answer otherwise
    book: Upstream

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            rows = [{"id": name, "object": "model", "created": 0, "owned_by": "test"} for name in MODELS]
            return self._json(200, {"object": "list", "data": rows})
        return self._json(404, {"error": {"message": "no such path"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.book.bodies.append(body)
        if self.path == "/v1/embeddings":
            inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
            data = [
                {"index": i, "object": "embedding", "embedding": [0.5, -0.5]} for i, _ in enumerate(inputs)
            ]
            return self._json(200, {"object": "list", "model": body["model"], "data": data, "usage": USAGE})
        try:
            return self._behave(body)
        except (BrokenPipeError, ConnectionResetError):
            self.book.gone.set()
            self.close_connection = True
            return None

    def _behave(self, body: dict) -> None:  # type: ignore[type-arg]
        match self.book.rename.get(body["model"], body["model"]):
            case "silent":
                self._wait_for_goodbye(300)
            case "refuses":
                self._json(400, {"error": {"message": "too long", "type": "exceed_context_size_error"}})
            case "garbage":
                self._raw(b"<html>not json</html>")
            case "dies":
                self._stream_head()
                self._event({"choices": [{"index": 0, "delta": {"content": "begin"}, "finish_reason": None}]})
                self.close_connection = True
                self.connection.shutdown(2)
            case "slow":
                self._stream(body, [f"w{i} " for i in range(400)], pause_s=0.05)
            case "huge":
                self._answer(body, "x" * 10_000_000)
            case "nonsense":
                self._answer(body, '{"tool": "no_such_tool", "arguments": {"x": 1}}')
            case "looping":
                self._answer(body, '{"tool": "fs_list", "arguments": {"path": "."}}')
            case "agent" | "qwen2.5-coder-test":
                self._answer(body, self._next_call(body))
            case _:
                self._answer(body, "Hello there")

    def _next_call(self, body: dict) -> str:  # type: ignore[type-arg]
        """Call the tools of the test's script, one a request; the last one again and again."""
        calls, index = self.book.script, min(self.book.step, len(self.book.script) - 1)
        self.book.step += 1
        del body
        time.sleep(self.book.pause_s)
        return json.dumps(calls[index])

    def _answer(self, body: dict, text: str) -> None:  # type: ignore[type-arg]
        if body.get("stream"):
            return self._stream(body, [text])
        message = {"role": "assistant", "content": text}
        choices = [{"index": 0, "message": message, "text": text, "finish_reason": "stop"}]
        return self._json(200, {"object": "chat.completion", "choices": choices, "usage": USAGE})

    def _stream(self, body: dict, words: list[str], pause_s: float = 0.0) -> None:  # type: ignore[type-arg]
        del body
        self._stream_head()
        for word in words:
            choice = {"index": 0, "delta": {"content": word}, "text": word, "finish_reason": None}
            self._event({"choices": [choice]})
            time.sleep(pause_s)
        self._event({"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "stop"}]})
        self._event({"choices": [], "usage": USAGE})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _stream_head(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()

    def _event(self, value: dict) -> None:  # type: ignore[type-arg]
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _json(self, status: int, value: dict) -> None:  # type: ignore[type-arg]
        self._raw(json.dumps(value).encode(), status)

    def _raw(self, data: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _wait_for_goodbye(self, at_most_s: float) -> None:
        self.connection.settimeout(at_most_s)
        if self.connection.recv(1) == b"":
            self.book.gone.set()
        self.close_connection = True
