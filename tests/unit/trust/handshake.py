"""Nodes with keys, and handshakes over real sockets."""

import datetime as dt
import hashlib
import socket
import ssl
import threading
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mycoswarmd.trust import keys
from mycoswarmd.trust.certificate import make_certificate, node_id, server_name
from mycoswarmd.trust.tlsctx import Tls


@dataclass(frozen=True)
class Node:
    """A key with its certificate and contexts."""

    seed: bytes = field(default_factory=keys.make_seed)

    @property
    def public(self) -> bytes:
        return keys.public_key(self.seed)

    @property
    def id(self) -> str:
        return node_id(self.public)

    @property
    def name(self) -> str:
        return server_name(self.id)

    @property
    def cert(self) -> bytes:
        return make_certificate(self.seed)

    @property
    def tls(self) -> Tls:
        return Tls(self.seed, self.cert)


@dataclass
class Outcome:
    """What both ends saw of one connection."""

    client_error: str = ""
    server_error: str = ""
    client_cert: bytes | None = None  # as the server saw it
    server_cert: bytes | None = None  # as the client saw it
    answer: bytes = b""
    reused: bool = False
    session: ssl.SSLSession | None = None
    tickets: bool = False
    version: str | None = None

    @property
    def ok(self) -> bool:
        return self.answer == b"pong"


def connect(
    server: ssl.SSLContext,
    client: ssl.SSLContext,
    name: str | None,
    *,
    session: ssl.SSLSession | None = None,
) -> Outcome:
    """Shake hands over TCP on the loopback, and have the server answer one question."""
    seen = Outcome()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        thread = threading.Thread(target=_serve, args=(listener, server, seen))
        thread.start()
        try:
            with socket.create_connection(listener.getsockname(), timeout=60) as raw:
                _ask(raw, client, name, session, seen)
        except OSError as exc:
            seen.client_error = str(exc)
        finally:
            thread.join()
    return seen


def _serve(listener: socket.socket, context: ssl.SSLContext, seen: Outcome) -> None:
    raw, _ = listener.accept()
    raw.settimeout(60)
    try:
        with raw, context.wrap_socket(raw, server_side=True) as connection:
            seen.client_cert = connection.getpeercert(binary_form=True)
            if connection.recv(4) == b"ping":
                connection.sendall(b"pong")
    except OSError as exc:
        seen.server_error = str(exc)


def _ask(
    raw: socket.socket,
    context: ssl.SSLContext,
    name: str | None,
    session: ssl.SSLSession | None,
    seen: Outcome,
) -> None:
    with context.wrap_socket(raw, server_hostname=name, session=session) as connection:
        seen.server_cert = connection.getpeercert(binary_form=True)
        seen.version = connection.version()
        connection.sendall(b"ping")
        seen.answer = connection.recv(4)
        # In TLS 1.3 tickets come after the handshake, so they are known only now.
        seen.reused = bool(connection.session_reused)
        seen.session = connection.session
        seen.tickets = connection.session is not None and connection.session.has_ticket


DAY = dt.timedelta(days=1)


def build_certificate(
    seed: bytes,
    *,
    serial: int = 1,
    start: dt.datetime = dt.datetime(2020, 1, 1, tzinfo=dt.UTC),
    end: dt.datetime = dt.datetime(9999, 12, 31, 23, 59, 59, tzinfo=dt.UTC),
    signed_with: bytes | None = None,
) -> bytes:
    """Make a certificate with another library, as a second implementation would."""
    key = ed25519.Ed25519PrivateKey.from_private_bytes(seed)
    public = keys.public_key(seed)
    name = node_id(public)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    key_id = hashlib.sha256(public).digest()[:20]
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    names = [
        x509.DNSName(f"{name}.mycoswarm.internal"),
        x509.UniformResourceIdentifier(f"mycoswarm:node:{name}"),
    ]
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectKeyIdentifier(key_id), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier(key_id, None, None), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )
    signer = ed25519.Ed25519PrivateKey.from_private_bytes(signed_with or seed)
    return builder.sign(signer, None).public_bytes(serialization.Encoding.DER)
