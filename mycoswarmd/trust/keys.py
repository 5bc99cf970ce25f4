"""Ed25519 keys as plain bytes: a seed of 32 bytes, its public half of 32, signatures of 64.

Law: verification answers yes or no and never raises, whatever bytes it is given.
Source: RFC 8032, in OpenSSL's cofactorless form; `S` above the group's order is refused, so that nobody but
the holder of a key can make a second signature of the same message.
"""

import secrets

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from mycoswarmd.errors import LocalProtocolError

SEED_BYTES = 32
PUBLIC_BYTES = 32
SIGNATURE_BYTES = 64

# The points of small order, sign bit cleared, in every encoding that fits. With one of these as the public
# key anybody can make valid signatures, so it would be a name that everybody can speak under.
_SMALL_ORDER = frozenset(
    bytes.fromhex(point)
    for point in (
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    )
)


def make_seed() -> bytes:
    """Return a new private key."""
    return secrets.token_bytes(SEED_BYTES)


def public_key(seed: bytes) -> bytes:
    """Return the public half of a private key."""
    return (
        _private(seed).public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    )


def sign(seed: bytes, message: bytes) -> bytes:
    """Sign; the same key and message give the same signature."""
    return _private(seed).sign(message)


def verify(public: bytes, signature: bytes, message: bytes) -> bool:
    """Tell whether the holder of `public` signed the message."""
    if len(signature) != SIGNATURE_BYTES or not is_usable(public):
        return False
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):  # ValueError: not a point, in some versions
        return False
    return True


def is_usable(public: bytes) -> bool:
    """Tell whether these bytes can be somebody's public key: the size, and not of small order."""
    if len(public) != PUBLIC_BYTES:
        return False
    return public[:-1] + bytes((public[-1] & 0x7F,)) not in _SMALL_ORDER


def to_pem(seed: bytes) -> bytes:
    """Return the private key as unencrypted PKCS #8, what OpenSSL and the key file hold."""
    return _private(seed).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def from_pem(pem: bytes) -> bytes:
    """Return the seed of a PKCS #8 file; ValueError where it holds no such key."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (TypeError, UnsupportedAlgorithm) as exc:  # TypeError: it is encrypted
        raise ValueError("the key cannot be read") from exc
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ValueError("the key is not an Ed25519 key")  # noqa: TRY004 - the file's contents are a value
    return key.private_bytes(
        serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
    )


def _private(seed: bytes) -> ed25519.Ed25519PrivateKey:
    if len(seed) != SEED_BYTES:
        raise LocalProtocolError("bad-seed", "cannot use a private key that has not 32 bytes")
    return ed25519.Ed25519PrivateKey.from_private_bytes(seed)
