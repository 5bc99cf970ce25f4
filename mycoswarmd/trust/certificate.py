"""A node's certificate: self-signed, one for each key, the same bytes but for the key and its signature.

Law: a certificate says nothing that its key does not say. It has no authority, no expiry that is looked at
and no choice in it, so reading one is comparing it with what this key's certificate must be; nothing that a
stranger sends is parsed as ASN.1 here.

The fields are what OpenSSL wants under X509_STRICT: RFC 5280, with "no well-defined expiration" (4.1.2.5) as
the end, key identifiers by RFC 7093 section 2 (1), and the serial number 1: no key issues a second one.
"""

import hashlib
from typing import Final

from mycoswarmd.core.roster import CertFacts, node_id_of
from mycoswarmd.errors import BadRequest
from mycoswarmd.trust.keys import PUBLIC_BYTES, SIGNATURE_BYTES, is_usable, public_key, sign, verify

DOMAIN = "mycoswarm.internal"

_SEQUENCE, _SET, _INTEGER, _BOOLEAN, _BITS, _OCTETS, _OID, _UTF8 = (
    0x30,
    0x31,
    0x02,
    0x01,
    0x03,
    0x04,
    0x06,
    0x0C,
)
_GENERALIZED_TIME, _UTC_TIME = 0x18, 0x17
_TRUE = b"\xff"
_WHOLE_OCTETS = b"\x00"  # a bit string that ends on a byte

_ED25519 = bytes.fromhex("2b6570")
_COMMON_NAME = bytes.fromhex("550403")
_SUBJECT_KEY_ID = bytes.fromhex("551d0e")
_KEY_USAGE = bytes.fromhex("551d0f")
_ALT_NAME = bytes.fromhex("551d11")
_BASIC_CONSTRAINTS = bytes.fromhex("551d13")
_AUTHORITY_KEY_ID = bytes.fromhex("551d23")
_EXTENDED_KEY_USAGE = bytes.fromhex("551d25")
_SERVER_AUTH = bytes.fromhex("2b06010505070301")
_CLIENT_AUTH = bytes.fromhex("2b06010505070302")


def node_id(public: bytes) -> str:
    """Return the id of a key: base32 of SHA-256 over its SubjectPublicKeyInfo, 26 characters (130 bits)."""
    return node_id_of(public)


def server_name(node: str) -> str:
    """Return the name that a node's certificate carries and its clients ask for."""
    return f"{node}.{DOMAIN}"


def make_certificate(seed: bytes) -> bytes:
    """Return the certificate of a key, in DER."""
    to_be_signed = _to_be_signed(public_key(seed))
    return _whole(to_be_signed, sign(seed, to_be_signed))


def read_certificate(untrusted_der: bytes) -> CertFacts:
    """Return whose certificate this is, or raise BadRequest("bad-certificate")."""
    if len(untrusted_der) != CERTIFICATE_BYTES:
        raise _refused(
            f"it has {len(untrusted_der)} bytes, and every certificate here has {CERTIFICATE_BYTES}"
        )
    public = untrusted_der[_PUBLIC_AT : _PUBLIC_AT + PUBLIC_BYTES]
    signature = untrusted_der[-SIGNATURE_BYTES:]
    to_be_signed = _to_be_signed(public)
    if untrusted_der != _whole(to_be_signed, signature):
        raise _refused("its fields are not those that a certificate of its key has")
    if not is_usable(public):
        raise _refused("anybody can sign for its key")
    if not verify(public, signature, to_be_signed):
        raise _refused("it is not signed by its own key")
    return CertFacts(node_id=node_id(public), public_key=public)


def _refused(why: str) -> BadRequest:
    return BadRequest(
        "bad-certificate",
        f"cannot use the certificate: {why}",
        hint="certificates are made by mycoswarmd only; docs/wire.md has the form",
    )


def _to_be_signed(public: bytes) -> bytes:
    name = node_id(public)
    key_id = hashlib.sha256(public).digest()[:20]
    subject = _tlv(
        _SEQUENCE,
        _tlv(_SET, _tlv(_SEQUENCE, _tlv(_OID, _COMMON_NAME), _tlv(_UTF8, name.encode("ascii")))),
    )
    return _tlv(
        _SEQUENCE,
        _tlv(0xA0, _tlv(_INTEGER, b"\x02")),  # version 3
        _tlv(_INTEGER, b"\x01"),  # serial number
        _tlv(_SEQUENCE, _tlv(_OID, _ED25519)),
        subject,  # issuer
        _tlv(_SEQUENCE, _tlv(_UTC_TIME, b"200101000000Z"), _tlv(_GENERALIZED_TIME, b"99991231235959Z")),
        subject,
        _public_key_info(public),
        _tlv(
            0xA3,
            _tlv(
                _SEQUENCE,
                _extension(_BASIC_CONSTRAINTS, _tlv(_SEQUENCE), critical=True),  # no CA
                _extension(_KEY_USAGE, _tlv(_BITS, b"\x07\x80"), critical=True),  # digitalSignature
                _extension(
                    _EXTENDED_KEY_USAGE,
                    _tlv(_SEQUENCE, _tlv(_OID, _SERVER_AUTH), _tlv(_OID, _CLIENT_AUTH)),
                ),
                _extension(_SUBJECT_KEY_ID, _tlv(_OCTETS, key_id)),
                _extension(_AUTHORITY_KEY_ID, _tlv(_SEQUENCE, _tlv(0x80, key_id))),
                _extension(
                    _ALT_NAME,
                    _tlv(
                        _SEQUENCE,
                        _tlv(0x82, server_name(name).encode("ascii")),  # dNSName
                        _tlv(0x86, f"mycoswarm:node:{name}".encode("ascii")),  # uniformResourceIdentifier
                    ),
                ),
            ),
        ),
    )


def _public_key_info(public: bytes) -> bytes:
    return _tlv(_SEQUENCE, _tlv(_SEQUENCE, _tlv(_OID, _ED25519)), _tlv(_BITS, _WHOLE_OCTETS, public))


def _extension(oid: bytes, value: bytes, *, critical: bool = False) -> bytes:
    mark = (_tlv(_BOOLEAN, _TRUE),) if critical else ()
    return _tlv(_SEQUENCE, _tlv(_OID, oid), *mark, _tlv(_OCTETS, value))


def _whole(to_be_signed: bytes, signature: bytes) -> bytes:
    algorithm = _tlv(_SEQUENCE, _tlv(_OID, _ED25519))
    return _tlv(_SEQUENCE, to_be_signed, algorithm, _tlv(_BITS, _WHOLE_OCTETS, signature))


def _tlv(tag: int, *contents: bytes) -> bytes:
    content = b"".join(contents)
    if len(content) < 0x80:
        return bytes((tag, len(content))) + content
    size = len(content).to_bytes((len(content).bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(size))) + size + content


_SAMPLE: Final = bytes(range(PUBLIC_BYTES))
CERTIFICATE_BYTES: Final = len(_whole(_to_be_signed(_SAMPLE), bytes(SIGNATURE_BYTES)))
_PUBLIC_AT: Final = _whole(_to_be_signed(_SAMPLE), bytes(SIGNATURE_BYTES)).index(_SAMPLE)
