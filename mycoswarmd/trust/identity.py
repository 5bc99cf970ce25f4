"""This node's own key and certificate, in a directory of its own.

Law: `node.key` is who this node is; the rename that puts it there is the one moment at which that changes.
The certificate beside it follows from it and is made again where it does not fit.
"""

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from mycoswarmd.errors import BadRequest, NotFound
from mycoswarmd.trust.certificate import make_certificate, node_id, read_certificate
from mycoswarmd.trust.keyfile import move_file, read_key, remove_files, write_file, write_key
from mycoswarmd.trust.keys import make_seed, public_key, sign

_MAX_CERT_BYTES = 16_384


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """A key and its certificate; implements flow.swarmports.Identity."""

    node_id: str
    public_key: bytes
    cert_der: bytes
    seed: bytes = field(repr=False)  # for trust.tlsctx.Tls, and nobody else

    @classmethod
    def of(cls, seed: bytes, cert_der: bytes | None = None) -> "NodeIdentity":
        """Return the identity of a private key, with the certificate that was made of it earlier."""
        public = public_key(seed)
        return cls(node_id(public), public, cert_der or make_certificate(seed), seed)

    def sign(self, message: bytes) -> bytes:
        """Sign with the node's key."""
        return sign(self.seed, message)


class IdentityFile:
    """Keeps the identity in a directory; implements flow.swarmports.IdentityStore.

    Files: `node.key`, `node.crt`, and `next.key` while a change of key is under way. One daemon at a time.
    """

    def __init__(self, directory: Path) -> None:
        self._key = directory / "node.key"
        self._cert = directory / "node.crt"
        self._next_key = directory / "next.key"

    def load(self) -> NodeIdentity | None:
        """Return the identity, or None when there is none; ConfigError when it cannot be used."""
        seed = read_key(self._key)
        if seed is None:
            return None
        kept = self._read_cert(public_key(seed))
        identity = NodeIdentity.of(seed, kept)
        if kept is None:  # the power went off between the two files, or somebody removed it
            self._write_cert(identity)
        return identity

    def create(self) -> NodeIdentity:
        """Make a key if there is none, durably, and return the identity."""
        return self.load() or self._put(NodeIdentity.of(make_seed()))

    def prepare_next(self) -> NodeIdentity:
        """Make the key that will replace this one, durably; the same one until it is adopted."""
        seed = read_key(self._next_key)
        if seed is None:
            seed = make_seed()
            write_key(self._next_key, seed)
        return NodeIdentity.of(seed)

    def adopt_next(self) -> NodeIdentity:
        """Put the prepared key in the place of the current one, atomically."""
        seed = read_key(self._next_key)
        if seed is None:
            raise NotFound("no-next-key", f"cannot change the key: there is no {str(self._next_key)!r}")
        identity = NodeIdentity.of(seed)
        move_file(self._next_key, self._key)
        self._write_cert(identity)
        return identity

    def destroy(self) -> None:
        """Forget the keys. Idempotent."""
        remove_files(self._key, self._next_key, self._cert)

    def _put(self, identity: NodeIdentity) -> NodeIdentity:
        write_key(self._key, identity.seed)
        self._write_cert(identity)
        return identity

    def _write_cert(self, identity: NodeIdentity) -> None:
        write_file(self._cert, ssl.DER_cert_to_PEM_cert(identity.cert_der).encode("ascii"))

    def _read_cert(self, public: bytes) -> bytes | None:
        """Return the certificate on disk where it is one of this key."""
        try:
            with self._cert.open("rb") as file:
                der = ssl.PEM_cert_to_DER_cert(file.read(_MAX_CERT_BYTES).decode("ascii"))
            return der if read_certificate(der).public_key == public else None
        except (OSError, ValueError, BadRequest):
            return None
