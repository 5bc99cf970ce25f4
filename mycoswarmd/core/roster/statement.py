"""Statements: what signers, members and the recovery key say of a swarm, in the one form that is accepted.

Law: a statement is its bytes. Whatever does not come out byte for byte as it came in is refused, so there
is one hash for one meaning; every signature is checked before anything else looks at the contents.
Source: docs/wire.md.
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final, NewType

from mycoswarmd.core.names import NAME
from mycoswarmd.core.types import Role
from mycoswarmd.errors import BadRequest

NodeId = NewType("NodeId", str)
# (public key, signature, message) -> whether the holder of the key signed the message.
Verify = Callable[[bytes, bytes, bytes], bool]

SIGNING_CONTEXT: Final = b"mycoswarm-roster-v1\0"
MAX_BODY_BYTES: Final = 64 << 10
# Of those that list what stays: as many hashes as a roster can have.
MAX_KEEP_BODY_BYTES: Final = 1 << 20
MAX_REASON_CHARS: Final = 200
# A number that a person could reach; the recovery key cannot lock itself out with a giant one.
MAX_EPOCH: Final = 1_000_000
_MAX_CERT_CHARS: Final = 4_096
_MAX_SIGNERS: Final = 64
_VERSION: Final = 1
_KEEP: Final = b'"keep":['
_KEEP_WITHIN_BYTES: Final = 128
_NODE_ID: Final = re.compile(r"[a-z2-7]{26}")
_HEX_16_BYTES: Final = re.compile(r"[0-9a-f]{32}")
_HEX_32_BYTES: Final = re.compile(r"[0-9a-f]{64}")
_HEX_64_BYTES: Final = re.compile(r"[0-9a-f]{128}")
# What stands before the 32 bytes of an Ed25519 key in its SubjectPublicKeyInfo (RFC 8410).
_SPKI: Final = bytes.fromhex("302a300506032b6570032100")


class Kind(StrEnum):
    """What a statement does."""

    GENESIS = "genesis"
    ADMIT = "admit"
    REVOKE = "revoke"
    LEAVE = "leave"
    ADD_SIGNER = "signer+"
    DROP_SIGNER = "signer-"
    REKEY = "rekey"
    EPOCH = "epoch"


@dataclass(frozen=True, slots=True)
class CertFacts:
    """Whose certificate it is."""

    node_id: str
    public_key: bytes


# Raises BadRequest("bad-certificate") for anything but the certificate of a node's key.
ReadCert = Callable[[bytes], CertFacts]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Statement:
    """A statement whose form and signatures were checked; whether it counts is for the set to say.

    Attributes:
        body: canonical JSON, what was signed.
        sha256: of the body, in hex; two statements are the same if this is.
        signatures: (public key, signature) in hex, in the order of the kind.
        facts: the fields of the body; `admit` and `rekey` also have `node` and `public_key` (of the
            certificate) and `cert_der`.
    """

    kind: Kind
    body: bytes
    sha256: str
    signatures: tuple[tuple[str, str], ...]
    facts: Mapping[str, Any]

    @property
    def swarm(self) -> str:
        """The hash of the genesis that this speaks of."""
        return self.sha256 if self.kind is Kind.GENESIS else self.facts["swarm"]

    @property
    def epoch(self) -> int:
        """The epoch that this belongs to."""
        return 0 if self.kind is Kind.GENESIS else self.facts["epoch"]

    @property
    def signer(self) -> str:
        """The first key that signed, in hex."""
        return self.signatures[0][0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Statement) and other.sha256 == self.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)


def node_id_of(public_key: bytes) -> NodeId:
    """Return the id of a node's key."""
    return NodeId(base64.b32encode(hashlib.sha256(_SPKI + public_key).digest()).decode("ascii")[:26].lower())


def canonical(value: object) -> bytes:
    """Return the one JSON text of a value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def make_body(kind: Kind, **facts: object) -> bytes:
    """Return the bytes to sign, or raise BadRequest("bad-statement"); `keep` may come in any order."""
    keep = facts.get("keep")
    if isinstance(keep, (list, tuple, set, frozenset)):
        facts["keep"] = sorted(set(keep))
    body = canonical({"v": _VERSION, "kind": kind.value, **facts})
    _read_body(body)
    return body


def signed(body: bytes, *pairs: tuple[bytes, Callable[[bytes], bytes]]) -> dict[str, object]:
    """Return the wire form of a body, signed by each (public key, what signs with it)."""
    message = SIGNING_CONTEXT + body
    sigs = [[public_key.hex(), sign(message).hex()] for public_key, sign in pairs]
    return {"body": base64.b64encode(body).decode("ascii"), "sigs": sigs}


def encode_statement(statement: Statement) -> dict[str, object]:
    """Return the wire form."""
    return {
        "body": base64.b64encode(statement.body).decode("ascii"),
        "sigs": [list(pair) for pair in statement.signatures],
    }


def parse_statement(untrusted: object, *, verify: Verify, read_cert: ReadCert) -> Statement:
    """Check form, certificate and signatures of a statement in wire form.

    Raises:
        BadRequest: bad-statement, bad-certificate.
    """
    kind, body, facts = peek(untrusted)
    assert isinstance(untrusted, dict)
    if "cert" in facts:
        der = base64.b64decode(facts["cert"])
        owner = read_cert(der)
        if owner.node_id != node_id_of(owner.public_key):
            raise BadRequest("bad-certificate", "cannot use the certificate: its id is not that of its key")
        facts |= {"cert_der": der, "node": owner.node_id, "public_key": owner.public_key}
    claims = _signatures(untrusted["sigs"])
    signers = _signers(kind, facts, claims)
    if claims.keys() != set(signers):
        raise refused("it is not signed by exactly those whose statement it is")
    message = SIGNING_CONTEXT + body
    return Statement(
        kind=kind,
        body=body,
        sha256=hashlib.sha256(body).hexdigest(),
        signatures=tuple((key, check_signature(key, claims[key], message, verify)) for key in signers),
        facts=MappingProxyType(facts),
    )


def peek(untrusted: object) -> tuple[Kind, bytes, dict[str, Any]]:
    """Return kind, body and fields of what has the form of a statement; nobody says that it was signed."""
    if not isinstance(untrusted, dict) or untrusted.keys() != {"body", "sigs"}:
        raise refused("it is not an object with a body and its signatures")
    body = _base64(untrusted["body"], max_chars=(MAX_KEEP_BODY_BYTES + 2) // 3 * 4)
    if body is None:
        raise refused(f"its body is not base64 of at most {MAX_KEEP_BODY_BYTES:,} bytes")
    kind, facts = _read_body(body)
    return kind, body, facts


def refused(why: str, *, hint: str = "", where: str = "") -> BadRequest:
    """Make the error for a statement that has not the form."""
    return BadRequest("bad-statement", f"cannot accept the statement: {why}", hint=hint, where=where)


def is_public_key(value: object) -> bool:
    """Tell whether this is a public key in hex."""
    return isinstance(value, str) and _HEX_32_BYTES.fullmatch(value) is not None


def is_number(value: object, low: int, high: int) -> bool:
    """Tell whether this is an integer, no boolean, within bounds."""
    return type(value) is int and low <= value <= high


def check_signature(public_key: str, untrusted_signature: object, message: bytes, verify: Verify) -> str:
    """Return the signature in hex, or raise BadRequest("bad-statement")."""
    if not isinstance(untrusted_signature, str) or _HEX_64_BYTES.fullmatch(untrusted_signature) is None:
        raise refused("a signature is not 64 bytes in hex")
    if not verify(bytes.fromhex(public_key), bytes.fromhex(untrusted_signature), message):
        raise refused("a signature is not of its key over these bytes")
    return untrusted_signature


def _signatures(untrusted: object) -> dict[str, object]:
    """Return who claims to have signed, one or two keys, with what."""
    claims: dict[str, object] = {}
    for pair in untrusted if isinstance(untrusted, list) and len(untrusted) <= 2 else ():
        if not isinstance(pair, list) or len(pair) != 2 or not is_public_key(pair[0]):
            raise refused("a signature is not a pair of a key and its signature")
        claims[pair[0]] = pair[1]
    if not isinstance(untrusted, list) or not claims or len(claims) != len(untrusted):
        raise refused("its signatures are not a list of one or two, each of another key")
    return claims


def _signers(kind: Kind, facts: Mapping[str, Any], claims: Mapping[str, object]) -> tuple[str, ...]:
    """Return the keys that must have signed; an epoch does not name its own, the set knows it."""
    match kind:
        case Kind.GENESIS:
            return (facts["signer"],)
        case Kind.LEAVE:
            if node_id_of(bytes.fromhex(facts["key"])) != facts["node"]:
                raise refused("the key that leaves is not that of the node")
            return (facts["key"],)
        case Kind.REKEY:
            if node_id_of(bytes.fromhex(facts["key"])) != facts["old"] or facts["old"] == facts["node"]:
                raise refused("the old key is not that of the old id, or is the new one too")
            return (facts["key"], facts["public_key"].hex())
        case Kind.EPOCH:
            return tuple(claims)[:1]
        case Kind.ADMIT | Kind.REVOKE | Kind.ADD_SIGNER | Kind.DROP_SIGNER:
            return (facts["by"],)


def _read_body(untrusted: bytes) -> tuple[Kind, dict[str, Any]]:
    """Return the fields of a body that has exactly those of its kind, in canonical form."""
    has_keep = _KEEP in untrusted[:_KEEP_WITHIN_BYTES]  # it is sorted, so this is near the beginning
    most = MAX_KEEP_BODY_BYTES if has_keep else MAX_BODY_BYTES
    if len(untrusted) > most:
        raise refused(f"it has more than {most:,} bytes")
    try:
        body = json.loads(untrusted)
        is_canonical = canonical(body) == untrusted
    except (ValueError, RecursionError):  # no JSON or Unicode, NaN, a giant number; or nested too deeply
        is_canonical, body = False, None
    if not is_canonical or not isinstance(body, dict):
        raise refused("it is not an object in canonical JSON")
    kind = body.get("kind")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise refused("its kind is unknown")
    fields = _FIELDS[Kind(kind)]
    if body.keys() != fields.keys():
        raise refused(f"its fields are not exactly those of {kind!r}")
    for name, is_valid in fields.items():
        if not is_valid(body[name]):
            raise refused(f"{name!r} is not what it must be", hint=_HINTS.get(name, ""), where=name)
    if kind == Kind.EPOCH and body["n"] != body["epoch"]:
        raise refused("an epoch has two numbers")
    return Kind(kind), body


def _base64(value: object, *, max_chars: int) -> bytes | None:
    if not isinstance(value, str) or len(value) > max_chars or not value.isascii():
        return None
    try:
        data = base64.b64decode(value, validate=True)
    except binascii.Error:
        return None
    return data if base64.b64encode(data).decode("ascii") == value else None


# --- the fields of each kind ---------------------------------------------------------------------


def _matches(pattern: re.Pattern[str]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_cert(value: object) -> bool:
    return bool(_base64(value, max_chars=_MAX_CERT_CHARS))


def _is_reason(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_REASON_CHARS and value.isprintable()


def _is_keep(value: object) -> bool:
    """Tell whether this is a sorted list of distinct hashes."""
    if not isinstance(value, list) or not all(map(is_public_key, value)):
        return False
    return value == sorted(set(value))


def _are_signers(value: object) -> bool:
    """Tell whether this is a list of some {key, node} with distinct keys."""
    if not isinstance(value, list) or not 0 < len(value) <= _MAX_SIGNERS:
        return False
    if not all(isinstance(one, dict) and one.keys() == {"key", "node"} for one in value):
        return False
    if not all(is_public_key(one["key"]) and _is_node(one["node"]) for one in value):
        return False
    return len({one["key"] for one in value}) == len(value)


# For the fields that a person types.
_HINTS: Final[Mapping[str, str]] = {
    "name": "a name has 1 to 64 letters, digits, '.', '_' or '-' and begins with a letter or digit",
    "reason": f"a reason has at most {MAX_REASON_CHARS} printable characters",
}
_is_node = _matches(_NODE_ID)
_COMMON: Final[Mapping[str, Callable[[object], bool]]] = {
    "v": lambda value: is_number(value, _VERSION, _VERSION),
    "kind": lambda _: True,  # it chose the fields
}
_OF_SWARM: Final[Mapping[str, Callable[[object], bool]]] = {
    **_COMMON,
    "swarm": is_public_key,
    "epoch": lambda value: is_number(value, 0, MAX_EPOCH),
}
_FIELDS: Final[Mapping[str, Mapping[str, Callable[[object], bool]]]] = {
    Kind.GENESIS: {
        **_COMMON,
        "name": _matches(NAME),
        "recovery": is_public_key,
        "signer": is_public_key,
        "nonce": _matches(_HEX_16_BYTES),
        "node": _is_node,
    },
    Kind.ADMIT: {
        **_OF_SWARM,
        "cert": _is_cert,
        "name": _matches(NAME),
        "role": lambda value: value in (Role.NODE.value, Role.OPERATOR.value),
        "by": is_public_key,
    },
    Kind.REVOKE: {**_OF_SWARM, "node": _is_node, "reason": _is_reason, "by": is_public_key},
    Kind.LEAVE: {**_OF_SWARM, "node": _is_node, "key": is_public_key},
    Kind.ADD_SIGNER: {**_OF_SWARM, "key": is_public_key, "node": _is_node, "by": is_public_key},
    Kind.DROP_SIGNER: {**_OF_SWARM, "key": is_public_key, "keep": _is_keep, "by": is_public_key},
    Kind.REKEY: {**_OF_SWARM, "old": _is_node, "cert": _is_cert, "key": is_public_key},
    Kind.EPOCH: {
        **_OF_SWARM,
        "n": lambda value: is_number(value, 1, MAX_EPOCH),
        "signers": _are_signers,
        "keep": _is_keep,
    },
}
