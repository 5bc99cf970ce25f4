"""In the middle: relays that end TLS themselves, or that pass its records on with changes."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from tests.swarm.attackers.kit import Key
from tests.swarm.attackers.talk import client_context, server_context
from tests.swarm.lab import PORT, Host

APPLICATION_DATA: Final = 23
Alter = Callable[[str, int, bytes], Sequence[bytes]]  # direction, index of the record, the record


def _unchanged(direction: str, index: int, record: bytes) -> Sequence[bytes]:
    del direction, index
    return (record,)


@dataclass
class Notebook:
    """What the one in the middle saw, in clear."""

    up: bytes = b""  # from who called to who was meant
    down: bytes = b""
    connections: int = 0
    errors: list[str] = field(default_factory=list)


class serving:  # noqa: N801 - reads as a context
    """Accepts on a machine, a thread for each connection, until it is closed."""

    def __init__(self, host: Host, handle: Callable[[socket.socket], None], port: int) -> None:
        self._listener = host.listen(port)
        self._listener.settimeout(0.1)
        self._handle = handle
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._open: list[socket.socket] = []

    def __enter__(self) -> None:
        self._threads[0].start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._threads[0].join()
        self._listener.close()
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()
        for sock in self._open:
            sock.close()

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            self._handle(sock)

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                continue
            sock.settimeout(60)
            self._open.append(sock.dup())  # TLS takes the descriptor away; this one ends the connection
            thread = threading.Thread(target=self._serve, args=(sock,))
            self._threads.append(thread)
            thread.start()


@contextlib.contextmanager
def impostor(
    host: Host,
    target: tuple[str, int],
    *,
    key: Key | None = None,
    port: int = PORT,
    reply: Callable[[bytes], bytes] | None = None,
) -> Iterator[Notebook]:
    """End TLS on both sides with a key of its own and write down what goes through.

    With `reply` it answers what it is asked by itself instead of asking on.
    """
    key = key or Key()
    book = Notebook()
    below = server_context(key)

    def handle(sock: socket.socket) -> None:
        book.connections += 1
        try:
            with below.wrap_socket(sock, server_side=True) as caller:
                if reply is not None:
                    while data := caller.recv(65_536):
                        book.up += data
                        caller.sendall(reply(data))
                    return
                with client_context().wrap_socket(host.connect(*target), server_hostname="x") as meant:
                    _pump_both(caller, meant, book)
        except (OSError, ssl.SSLError) as error:
            book.errors.append(repr(error))

    with serving(host, handle, port):
        yield book


def _pump_both(caller: ssl.SSLSocket, meant: ssl.SSLSocket, book: Notebook) -> None:
    def up() -> None:
        with contextlib.suppress(OSError):
            while data := caller.recv(65_536):
                book.up += data
                meant.sendall(data)
        with contextlib.suppress(OSError):
            meant.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=up)
    thread.start()
    with contextlib.suppress(OSError):
        while data := meant.recv(65_536):
            book.down += data
            caller.sendall(data)
    with contextlib.suppress(OSError):
        caller.shutdown(socket.SHUT_RDWR)
    thread.join()


@dataclass
class Records:
    """What a relay of records saw."""

    seen: list[tuple[str, int, bytes]] = field(default_factory=list)  # direction, content type, record

    def count(self, direction: str) -> int:
        return sum(1 for where, kind, _ in self.seen if where == direction and kind == APPLICATION_DATA)


@contextlib.contextmanager
def tamperer(
    host: Host,
    target: tuple[str, int],
    alter: Alter = _unchanged,
    *,
    port: int = PORT,
    via: Host | None = None,
) -> Iterator[Records]:
    """Pass TLS records on, each as `alter` says: none, twice, changed, or kept for later."""
    book = Records()
    via = via or host

    def handle(sock: socket.socket) -> None:
        with contextlib.suppress(OSError), via.connect(*target) as meant:
            thread = threading.Thread(target=_pass_records, args=("up", sock, meant, alter, book))
            thread.start()
            _pass_records("down", meant, sock, alter, book)
            thread.join()

    with serving(host, handle, port):
        yield book


def _pass_records(
    direction: str, source: socket.socket, sink: socket.socket, alter: Alter, book: Records
) -> None:
    index = 0
    with contextlib.suppress(OSError, EOFError):
        while True:
            head = _exactly(source, 5)
            record = head + _exactly(source, int.from_bytes(head[3:5], "big"))
            book.seen.append((direction, record[0], record))
            for piece in alter(direction, index, record):
                sink.sendall(piece)
            index += 1
    for sock in (source, sink):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


@contextlib.contextmanager
def listener(host: Host, *, port: int = PORT, hello: bytes = b"") -> Iterator[Notebook]:
    """Accept TCP, say nothing (or `hello`), and write down the bytes as they come."""
    book = Notebook()

    def handle(sock: socket.socket) -> None:
        book.connections += 1
        with contextlib.suppress(OSError):
            if hello:
                sock.sendall(hello)
            while data := sock.recv(65_536):
                book.up += data

    with serving(host, handle, port):
        yield book
