"""A false node: takes TLS from anybody, with a key of its own, and answers as a rich member would."""

import contextlib
import json
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tests.swarm.attackers.kit import Key
from tests.swarm.attackers.middle import serving
from tests.swarm.attackers.talk import server_context
from tests.swarm.lab import PORT, Host

ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "ok",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "I read it all"}, "finish_reason": "stop"}
    ],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


@dataclass
class Takings:
    """What came to the false node."""

    hellos: int = 0
    requests: list[tuple[str, bytes]] = field(default_factory=list)  # "METHOD path", body
    errors: list[str] = field(default_factory=list)

    @property
    def paths(self) -> set[str]:
        return {line for line, _ in self.requests}

    def everything(self) -> bytes:
        return b"\n".join(line.encode() + body for line, body in self.requests)


@contextlib.contextmanager
def liar(
    host: Host,
    *,
    key: Key | None = None,
    certificate_der: bytes | None = None,
    word: dict[str, object] | None = None,
    statements: list[object] | None = None,
    port: int = PORT,
) -> Iterator[Takings]:
    """Be a false node while the context lasts."""
    takings = Takings()
    context = server_context(key or Key(), certificate_der)
    roster = {"statements": statements or [], "want": [], "digest": "0" * 64, "beacons": []}

    def handle(sock: socket.socket) -> None:
        takings.hellos += 1
        try:
            with context.wrap_socket(sock, server_side=True) as caller:
                _serve(caller, takings, word or {}, roster)
        except (OSError, ssl.SSLError, ValueError) as error:
            takings.errors.append(repr(error))

    with serving(host, handle, port):
        yield takings


def _serve(
    caller: ssl.SSLSocket, takings: Takings, word: dict[str, object], roster: Mapping[str, object]
) -> None:
    reader = caller.makefile("rb")
    while line := reader.readline():
        method, path, _ = line.decode().split()
        size = 0
        while (head := reader.readline()) not in {b"\r\n", b""}:
            name, _, value = head.decode().partition(":")
            size = int(value) if name.lower() == "content-length" else size
        takings.requests.append((f"{method} {path}", reader.read(size)))
        if path == "/swarm/watch":
            caller.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            _chunk(caller, json.dumps(word).encode() + b"\n")
            while True:
                time.sleep(0.5)
                _chunk(caller, b"\n")
        answer = {"/swarm/word": word, "/swarm/sync": roster, "/swarm/pull": roster}.get(path, ANSWER)
        body = json.dumps(answer).encode()
        head_ = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        caller.sendall(head_.encode() + body)


def _chunk(caller: ssl.SSLSocket, data: bytes) -> None:
    caller.sendall(f"{len(data):x}\r\n".encode() + data + b"\r\n")
