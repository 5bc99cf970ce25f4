"""How an attacker talks: TLS and HTTP by hand, with any certificate, and with every byte under control."""

import json
import socket
import ssl
import time
from collections.abc import Mapping
from typing import Self

from tests.swarm.attackers.kit import Key
from tests.swarm.lab import PORT, Host, LabNode

NO_CHECK_TIME = 0x200000


def client_context(key: Key | None = None, certificate_der: bytes | None = None) -> ssl.SSLContext:
    """Return a context that believes everything and presents what it is given."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if key is not None:
        key.load_into(context, certificate_der or key.certificate())
    return context


def server_context(key: Key, certificate_der: bytes | None = None) -> ssl.SSLContext:
    """Return a server's context that asks nobody who he is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    key.load_into(context, certificate_der or key.certificate())
    return context


class Reply:
    """An HTTP answer."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def json(self) -> dict:  # type: ignore[type-arg]
        value = json.loads(self.body)
        assert isinstance(value, dict), self.body
        return value

    def __repr__(self) -> str:
        return f"<{self.status} {self.body[:300]!r}>"


class Talk:
    """One TLS connection to a node, HTTP/1.1 over it."""

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext | None = None,
        *,
        server_name: str = "mycoswarm.internal",
        session: ssl.SSLSession | None = None,
    ) -> None:
        sock.settimeout(60)
        self.sock = (context or client_context()).wrap_socket(
            sock, server_hostname=server_name, session=session
        )
        self._buffer = b""
        self.host = server_name

    @classmethod
    def to(
        cls,
        source: Host,
        address: str,
        *,
        key: Key | None = None,
        certificate_der: bytes | None = None,
        server_name: str = "mycoswarm.internal",
        port: int = PORT,
    ) -> Self:
        """Connect from a machine, as a stranger or with a key."""
        context = client_context(key, certificate_der)
        return cls(source.connect(address, port), context, server_name=server_name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    @property
    def server_cert_der(self) -> bytes:
        """What the other side presented."""
        der = self.sock.getpeercert(binary_form=True)
        assert der is not None
        return der

    def send(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a request."""
        self.sock.sendall(request_bytes(method, path, body, {"Host": self.host, **(headers or {})}))

    def head(self) -> tuple[int, dict[str, str]]:
        """Read an answer's head."""
        head = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in head[1:] if line)
        return int(head[0].split()[1]), {name.strip().lower(): value.strip() for name, _, value in fields}

    def receive(self) -> Reply:
        """Read one whole answer."""
        status, headers = self.head()
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while chunk := self.chunk():
                body += chunk
        else:
            body = self._exactly(int(headers.get("content-length", "0")))
        return Reply(status, headers, body)

    def closed_within(self, seconds: float) -> float | None:
        """Read to the end; return how long that took, or None where the other side went on talking."""
        begun_s = time.monotonic()
        self.sock.settimeout(0.2)
        while time.monotonic() - begun_s < seconds:
            try:
                if not self.sock.recv(65_536):
                    return time.monotonic() - begun_s
            except TimeoutError:
                continue
            except OSError:
                return time.monotonic() - begun_s
        return None

    def chunk(self) -> bytes:
        """Read one chunk of a chunked answer; empty at the end."""
        size = int(self._until(b"\r\n").split(b";")[0], 16)
        data = self._exactly(size)
        self._exactly(2)
        return data

    def call(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """Ask and read the answer."""
        self.send(method, path, body, headers)
        return self.receive()

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._buffer:
            self._more()
        found, _, self._buffer = self._buffer.partition(mark)
        return found

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._more()
        found, self._buffer = self._buffer[:size], self._buffer[size:]
        return found

    def _more(self) -> None:
        data = self.sock.recv(65_536)
        if not data:
            raise ConnectionResetError("the other side closed")
        self._buffer += data


def request_bytes(
    method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
) -> bytes:
    """Return an HTTP request as bytes; `body` may be bytes that are no JSON."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    fields = {"Host": "mycoswarm.internal", "Content-Type": "application/json", **(headers or {})}
    if data or method == "POST":
        fields["Content-Length"] = str(len(data))
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data


def as_member(source: Host, node: LabNode, key: Key, certificate_der: bytes | None = None) -> Talk:
    """Connect to a node with a member's key."""
    name = f"{node.id}.mycoswarm.internal"
    return Talk.to(source, node.host.ip, key=key, certificate_der=certificate_der, server_name=name)


def attempt(
    source: Host,
    address: str,
    method: str,
    path: str,
    body: object = None,
    *,
    key: Key | None = None,
    certificate_der: bytes | None = None,
    server_name: str = "mycoswarm.internal",
) -> Reply | None:
    """Ask once over a connection of its own; None when there was no answer, only a refusal to talk."""
    try:
        with Talk.to(
            source, address, key=key, certificate_der=certificate_der, server_name=server_name
        ) as talk:
            return talk.call(method, path, body)
    except (ssl.SSLError, OSError):
        return None
