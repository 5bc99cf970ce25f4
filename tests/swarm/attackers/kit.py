"""What an attacker has: keys, certificates, codes and statements, written from the protocol's description.

Nothing here imports the product: that both sides understand one another is itself tested, and what the
product refuses to make (an altered certificate, a forged statement) is made here.
"""

import base64
import datetime as dt
import hashlib
import hmac
import json
import os
import ssl
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
ROSTER_CONTEXT: Final = b"mycoswarm-roster-v1\0"
BEACON_CONTEXT: Final = b"mycoswarm-beacon-v1\0"
_DER = serialization.Encoding.DER
_PEM = serialization.Encoding.PEM


def canonical(value: object) -> bytes:
    """JSON as the swarm signs it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def id_of(certificate_der: bytes) -> str:
    """Return the node id that a certificate's key has."""
    key = x509.load_der_x509_certificate(certificate_der).public_key()
    spki = key.public_bytes(_DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return base64.b32encode(hashlib.sha256(spki).digest()).decode()[:26].lower()


@dataclass(frozen=True, slots=True)
class Key:
    """An Ed25519 key with everything that can be made of it."""

    private: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    @classmethod
    def from_seed(cls, seed: bytes) -> "Key":
        """Take a stolen key."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @property
    def public(self) -> bytes:
        raw = serialization.PublicFormat.Raw
        return self.private.public_key().public_bytes(serialization.Encoding.Raw, raw)

    @property
    def node_id(self) -> str:
        spki = self.private.public_key().public_bytes(_DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        return base64.b32encode(hashlib.sha256(spki).digest()).decode()[:26].lower()

    def certificate(self, *, claims_id: str | None = None, serial: int = 1) -> bytes:
        """Return a certificate; `claims_id` lies about whose it is, `serial` alters it without a new key."""
        node_id = claims_id or self.node_id
        key_id = hashlib.sha256(self.public).digest()[:20]
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node_id)])
        public = self.private.public_key()
        names = [
            x509.DNSName(f"{node_id}.mycoswarm.internal"),
            x509.UniformResourceIdentifier(f"mycoswarm:node:{node_id}"),
        ]
        usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
        both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(public)
            .serial_number(serial)
            .not_valid_before(dt.datetime(2020, 1, 1))  # noqa: DTZ001
            .not_valid_after(dt.datetime(9999, 12, 31, 23, 59, 59))  # noqa: DTZ001
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(both, critical=False)
            .add_extension(x509.SubjectKeyIdentifier(key_id), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier(key_id, None, None), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
        )
        return builder.sign(self.private, None).public_bytes(_DER)

    def load_into(self, context: ssl.SSLContext, certificate_der: bytes) -> None:
        """Let a TLS context present a certificate with this key."""
        pem = ssl.DER_cert_to_PEM_cert(certificate_der).encode()
        key = self.private.private_bytes(
            _PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        with tempfile.NamedTemporaryFile(suffix=".pem") as file:
            Path(file.name).write_bytes(pem + key)
            context.load_cert_chain(file.name)

    def sign(self, message: bytes) -> bytes:
        return self.private.sign(message)


def statement(body: dict[str, object], *keys: Key) -> dict[str, object]:
    """Return a statement in wire form, signed by whoever."""
    data = canonical(body)
    sigs = [[key.public.hex(), key.sign(ROSTER_CONTEXT + data).hex()] for key in keys]
    return {"body": b64(data), "sigs": sigs}


def body_of(wire: dict[str, object]) -> dict[str, object]:
    """Read a statement in wire form."""
    value = json.loads(base64.b64decode(str(wire["body"])))
    assert isinstance(value, dict)
    return value


def hash_of(wire: dict[str, object]) -> str:
    """Return a statement's hash."""
    return hashlib.sha256(base64.b64decode(str(wire["body"]))).hexdigest()


def beacon(swarm: str, epoch: int, n: int, key: Key) -> dict[str, object]:
    """Return a freshness counter, signed by whoever."""
    facts: dict[str, object] = {"swarm": swarm, "epoch": epoch, "signer": key.public.hex(), "n": n}
    return {**facts, "sig": key.sign(BEACON_CONTEXT + canonical(facts)).hex()}


def split_code(code: str) -> tuple[str, str]:
    """Return the public and the secret part of a code as it is shown."""
    text = code.upper().replace("-", "").replace(" ", "")
    assert len(text) == 21, code
    return text[:4], text[4:20]


@dataclass(frozen=True, slots=True)
class CodeKeys:
    """What both sides derive from the code."""

    inviter: bytes
    joiner: bytes
    bundle: bytes


def derive(invite: str, secret: str) -> CodeKeys:
    """Stretch a code and make its three keys."""
    salt = b"mycoswarm-invite-v1" + invite.encode()
    root = hashlib.scrypt(secret.encode(), salt=salt, n=2**15, r=8, p=1, dklen=32, maxmem=64 << 20)
    extracted = hmac.digest(bytes(32), root, "sha256")
    keys = (
        hmac.digest(extracted, b"mycoswarm-enrol-v1 " + part + b"\x01", "sha256")
        for part in (b"inviter", b"joiner", b"bundle")
    )
    return CodeKeys(*keys)


def transcript(*parts: bytes) -> bytes:
    """Hash the parts, each behind its length, so that none can be shifted into the next."""
    digest = hashlib.sha256(b"mycoswarm-enrol-v1")
    for part in parts:
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()


def nonce() -> bytes:
    return os.urandom(32)
