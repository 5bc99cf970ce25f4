"""How a newcomer and an inviter prove to each other that they know the same code; messages only, no I/O.

Laws:

1. Each side's proof covers both certificates, the newcomer's as sent and the inviter's as the newcomer saw
   it on its own connection. Whoever stands between has another certificate, and no proof fits.
2. The inviter proves itself first, and the newcomer sends nothing before that but a public key, a nonce and
   the name that it would like. The code itself is never sent.
3. Every message has exactly its fields, each with exactly one encoding.

The code's 80 secret bits, stretched, are out of reach of guessing, on line and off line: that is why there is
no PAKE. Who reads the code over a shoulder can use it: that is what asking a person (`confirm`) is for.
Source: docs/wire.md, "Enrolment"; RFC 7914 (scrypt), RFC 5869 (HKDF).
"""

import base64
import binascii
import hashlib
import hmac
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from mycoswarmd.core.names import NAME
from mycoswarmd.core.roster import MAX_STATEMENTS, ReadCert, Verify
from mycoswarmd.core.words import six_words
from mycoswarmd.errors import (
    BadRequest,
    Conflict,
    LocalProtocolError,
    MycoswarmError,
    NotFound,
    Unauthenticated,
    Unavailable,
    Unreachable,
)

__all__ = [
    "CROCKFORD",
    "Code",
    "CodeKeys",
    "Hello",
    "Joiner",
    "Welcome",
    "challenge",
    "check_confirm",
    "derive",
    "format_code",
    "make_code",
    "most_telling",
    "parse_code",
    "parse_hello",
    "read_crockford",
    "seal_bundle",
    "six_words",
]

VERSION: Final = 1
NONCE_BYTES: Final = 32
MAX_CERT_BYTES: Final = 4_096
MAX_SESSION_CHARS: Final = 16_384
MAX_BUNDLE_BYTES: Final = 24 << 20
ROLES: Final = ("node", "operator")

CROCKFORD: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_INVITE_CHARS: Final = 4
_SECRET_CHARS: Final = 16
_CODE_CHARS: Final = _INVITE_CHARS + _SECRET_CHARS + 1
_GROUP_CHARS: Final = 5
_MAX_TYPED_CHARS: Final = 200

_SALT: Final = b"mycoswarm-invite-v1"
_LABEL: Final = b"mycoswarm-enrol-v1"
_POSSESSION: Final = b"mycoswarm-pop"
_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 1 << 15, 8, 1
_SCRYPT_MAX_BYTES: Final = 64 << 20  # it takes 32 MiB and a little

_INVITE = re.compile(f"[{CROCKFORD}]{{{_INVITE_CHARS}}}")


# --- the code ----------------------------------------------------------------------------------------


# Nobody was there to say anything of the code; and what is said by members that do not hold it.
_SILENCE = (Unavailable, Unreachable)
_BYSTANDERS = frozenset({"invite-unknown", "nobody-invited", "no-such-route", "not-found"})
_GONE = frozenset({"peer-unreachable", "no-answer", "node-unreachable", "connection-lost"})
_SHOWN = 4
_IS_IT_ON = "is the machine that made the code on, and is this its address? --address HOST says where it is"


@dataclass(frozen=True, slots=True)
class Code:
    """An invitation as a person carries it: who is asked (public) and what both must know."""

    invite: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class CodeKeys:
    """What is derived from a code: one key for each proof, so that none can be played back as another."""

    inviter: bytes = field(repr=False)
    joiner: bytes = field(repr=False)
    bundle: bytes = field(repr=False)


def make_code(random_bytes: bytes) -> Code:
    """Return the code that these random bytes (13 or more) give."""
    if len(random_bytes) < 13:
        raise LocalProtocolError("bad-entropy", "cannot make a code of fewer than 13 random bytes")
    number = int.from_bytes(random_bytes[:13], "big") >> 4  # 100 bits, five for each character
    chars = "".join(CROCKFORD[number >> shift & 31] for shift in range(95, -1, -5))
    return Code(chars[:_INVITE_CHARS], chars[_INVITE_CHARS:])


def format_code(code: Code) -> str:
    """Return the code as it is shown: groups of five, and a check character."""
    chars = code.invite + code.secret
    groups = [chars[at : at + _GROUP_CHARS] for at in range(0, len(chars), _GROUP_CHARS)]
    return "-".join([*groups, CROCKFORD[_check(chars, open_end=True)]])


def parse_code(untrusted_text: str) -> Code:
    """Return the code that a person typed, or raise BadRequest("bad-code"); never repeats it."""
    chars = read_crockford(untrusted_text, count=_CODE_CHARS, code="bad-code", what="the code")
    if _check(chars, open_end=False) != 0:
        raise BadRequest(
            "bad-code",
            "cannot use the code: one of its characters is wrong, or two are swapped",
            hint="compare it with the inviting machine's screen",
        )
    return Code(chars[:_INVITE_CHARS], chars[_INVITE_CHARS:-1])


def read_crockford(untrusted_text: str, *, count: int, code: str, what: str) -> str:
    """Return so many characters of Crockford's base32, however they were grouped and written."""
    if len(untrusted_text) > _MAX_TYPED_CHARS:
        raise BadRequest(code, f"cannot use {what}: it is too long")
    chars = "".join(untrusted_text.split()).replace("-", "").upper().translate(_ALIKE)
    strange = [char for char in chars if char not in CROCKFORD]
    if strange:
        raise BadRequest(
            code,
            f"cannot use {what}: it has a character that none has",
            hint="only digits and letters but U; O is read as 0, I and L as 1",
        )
    if len(chars) != count:
        raise BadRequest(
            code,
            f"cannot use {what}: it has {len(chars)} characters instead of {count} (dashes not counted)",
        )
    return chars


_ALIKE = str.maketrans("OIL", "011")


def _check(chars: str, *, open_end: bool) -> int:
    """Return the sum of the characters weighted by powers of 2 in GF(32), x^5 + x^2 + 1.

    With the check character in place the sum is 0. All 21 weights differ, so one wrong character and two that
    are swapped, wherever they stand, always show.
    """
    total = 0
    for char in chars:
        total = _double(total) ^ CROCKFORD.index(char)
    return _double(total) if open_end else total


def _double(value: int) -> int:
    return value << 1 ^ (0b100101 if value & 0b10000 else 0)


def derive(code: Code) -> CodeKeys:
    """Return the keys of a code. Takes 0.1 s (a Pi: 0.5 s) and 32 MiB, on purpose."""
    stretched = hashlib.scrypt(
        code.secret.encode("ascii"),
        salt=_SALT + code.invite.encode("ascii"),
        n=_SCRYPT_N,
        r=_SCRYPT_R,
        p=_SCRYPT_P,
        maxmem=_SCRYPT_MAX_BYTES,
        dklen=32,
    )
    return CodeKeys(
        inviter=_expand(stretched, b"inviter"),
        joiner=_expand(stretched, b"joiner"),
        bundle=_expand(stretched, b"bundle"),
    )


def _expand(stretched: bytes, purpose: bytes) -> bytes:
    """HKDF-SHA256 without a salt, one block."""
    extracted = hmac.digest(bytes(32), stretched, "sha256")
    return hmac.digest(extracted, _LABEL + b" " + purpose + b"\x01", "sha256")


# --- the messages ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """A newcomer's greeting. Nothing in it is proved yet."""

    invite: str
    nonce: bytes
    cert_der: bytes
    role: str  # node | operator
    name: str  # what the newcomer would like to be called


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """What the inviter handed over, proved by the code: the statements still have to prove themselves."""

    genesis_sha256: str
    statements: tuple[object, ...]


class Joiner:
    """The newcomer's side of one enrolment: `hello`, `confirm`, `welcome`, each once and in this order."""

    def __init__(
        self, keys: CodeKeys, invite: str, *, nonce: bytes, cert_der: bytes, role: str, name: str
    ) -> None:
        if len(nonce) != NONCE_BYTES:
            raise LocalProtocolError("bad-nonce", "cannot greet with a nonce that has not 32 bytes")
        self._keys = keys
        self._hello = Hello(invite=invite, nonce=nonce, cert_der=cert_der, role=role, name=name)
        self._genesis_sha256 = ""
        self._transcript: bytes | None = None

    def hello(self) -> dict[str, object]:
        """Return the greeting."""
        hello = self._hello
        return {
            "v": VERSION,
            "invite": hello.invite,
            "nonce": hello.nonce.hex(),
            "cert": _to_base64(hello.cert_der),
            "role": hello.role,
            "name": hello.name,
        }

    def confirm(
        self, untrusted_challenge: object, server_cert_der: bytes, sign: Callable[[bytes], bytes]
    ) -> dict[str, object]:
        """Check the inviter's proof against the certificate of this connection, and return our own proof.

        Raises Unauthenticated("inviter-unproved") where the other side does not know the code or is not
        whom we are connected to. Nothing was given away then.
        """
        if self._transcript is not None:
            raise LocalProtocolError("enrolment-order", "cannot confirm an enrolment twice")
        fields = _fields(untrusted_challenge, ("session", "nonce", "genesis", "mac"))
        session = _session(fields["session"])
        nonce = _hex(fields["nonce"], NONCE_BYTES, "nonce")
        genesis = _hex(fields["genesis"], 32, "genesis")
        mac = _hex(fields["mac"], 32, "mac")
        transcript = _transcript(self._hello, nonce=nonce, cert_der=server_cert_der, genesis=genesis)
        if not hmac.compare_digest(mac, hmac.digest(self._keys.inviter, transcript, "sha256")):
            raise Unauthenticated(
                "inviter-unproved",
                "cannot trust the other machine: it did not prove that it made this code",
                hint="compare the code with the inviting machine's screen; if it fits, somebody is between",
            )
        self._transcript, self._genesis_sha256 = transcript, genesis.hex()
        return {
            "session": session,
            "mac": hmac.digest(self._keys.joiner, transcript, "sha256").hex(),
            "sig": sign(_POSSESSION + transcript).hex(),
        }

    def welcome(self, untrusted: object) -> Welcome:
        """Return what the inviter handed over; Unauthenticated("inviter-unproved") where it is not its."""
        if self._transcript is None:
            raise LocalProtocolError("enrolment-order", "cannot read a bundle before the inviter's proof")
        fields = _fields(untrusted, ("bundle", "mac"))
        bundle = _from_base64(fields["bundle"], MAX_BUNDLE_BYTES, "bundle")
        mac = _hex(fields["mac"], 32, "mac")
        if not hmac.compare_digest(mac, hmac.digest(self._keys.bundle, self._transcript + bundle, "sha256")):
            raise Unauthenticated(
                "inviter-unproved", "cannot trust the roster that came: it was changed on its way"
            )
        statements = _fields(_json(bundle), ("statements",))["statements"]
        if not isinstance(statements, list) or not 1 <= len(statements) <= MAX_STATEMENTS:
            raise _malformed("bundle.statements", f"expected a list of 1 to {MAX_STATEMENTS} statements")
        return Welcome(genesis_sha256=self._genesis_sha256, statements=tuple(statements))


def parse_hello(untrusted: object, *, read_cert: ReadCert) -> Hello:
    """Return a greeting, or raise BadRequest("bad-enrolment" or "bad-certificate")."""
    fields = _fields(untrusted, ("v", "invite", "nonce", "cert", "role", "name"))
    if fields["v"] != VERSION or isinstance(fields["v"], bool):
        raise BadRequest(
            "unknown-version",
            "cannot enrol: the newcomer speaks another version of the protocol",
            hint="install the same version of mycoswarmd on both machines",
            where="v",
        )
    invite, role, name = fields["invite"], fields["role"], fields["name"]
    if not isinstance(invite, str) or not _INVITE.fullmatch(invite):
        raise _malformed("invite", "expected the four public characters of a code")
    if not isinstance(role, str) or role not in ROLES:
        raise _malformed("role", "expected node or operator")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise _malformed("name", "expected 1 to 64 letters, digits, dots, dashes and underscores")
    cert_der = _from_base64(fields["cert"], MAX_CERT_BYTES, "cert")
    read_cert(cert_der)
    nonce = _hex(fields["nonce"], NONCE_BYTES, "nonce")
    return Hello(invite=invite, nonce=nonce, cert_der=cert_der, role=role, name=name)


def challenge(
    keys: CodeKeys, hello: Hello, *, nonce: bytes, cert_der: bytes, genesis_sha256: str
) -> dict[str, object]:
    """Return the inviter's proof, over the certificate that it presents; the caller adds `session`."""
    if len(nonce) != NONCE_BYTES:
        raise LocalProtocolError("bad-nonce", "cannot answer with a nonce that has not 32 bytes")
    genesis = bytes.fromhex(genesis_sha256)
    transcript = _transcript(hello, nonce=nonce, cert_der=cert_der, genesis=genesis)
    return {
        "nonce": nonce.hex(),
        "genesis": genesis_sha256,
        "mac": hmac.digest(keys.inviter, transcript, "sha256").hex(),
    }


def check_confirm(
    keys: CodeKeys,
    hello: Hello,
    untrusted: object,
    *,
    nonce: bytes,
    cert_der: bytes,
    genesis_sha256: str,
    read_cert: ReadCert,
    verify: Verify,
) -> bytes:
    """Return the transcript if the newcomer knows the code and holds the key of its certificate.

    Raises Unauthenticated("joiner-unproved") otherwise, and BadRequest("bad-enrolment") for what is no proof
    at all.
    """
    fields = _fields(untrusted, ("session", "mac", "sig"))
    mac = _hex(fields["mac"], 32, "mac")
    signature = _hex(fields["sig"], 64, "sig")
    transcript = _transcript(hello, nonce=nonce, cert_der=cert_der, genesis=bytes.fromhex(genesis_sha256))
    knows_code = hmac.compare_digest(mac, hmac.digest(keys.joiner, transcript, "sha256"))
    if not (knows_code and verify(read_cert(hello.cert_der).public_key, signature, _POSSESSION + transcript)):
        raise Unauthenticated(
            "joiner-unproved",
            "cannot admit the newcomer: it did not prove that it knows the code and holds its key",
            hint="compare the code; a few failures more and the invitation is void",
        )
    return transcript


def seal_bundle(keys: CodeKeys, transcript: bytes, bundle: Mapping[str, object]) -> dict[str, object]:
    """Return what a proved newcomer is given, bound to this enrolment."""
    data = json.dumps(bundle, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    if len(data) > MAX_BUNDLE_BYTES:
        raise Conflict(
            "roster-too-big",
            f"cannot hand over a roster of {len(data)} bytes: at most {MAX_BUNDLE_BYTES}",
            hint="mycoswarmctl recover begins a new epoch, without what is not needed any more",
        )
    mac = hmac.digest(keys.bundle, transcript + data, "sha256")
    return {"bundle": _to_base64(data), "mac": mac.hex()}


def most_telling(tried: Sequence[tuple[str, MycoswarmError]]) -> MycoswarmError:
    """Return what to tell a person after every address (as people write it) has failed.

    The word of whoever holds the invitation goes before that of a bystander, which only says that it holds
    none; that the code is no good any more is said only by its holder.
    """
    held = [exc for _, exc in tried if not isinstance(exc, _SILENCE) and exc.code not in _BYSTANDERS]
    if held:
        return min(held, key=lambda exc: not exc.code.startswith("invite"))
    silent = [where for where, exc in tried if isinstance(exc, _SILENCE)]
    bystanders = [where for where, exc in tried if not isinstance(exc, _SILENCE)]
    if not bystanders:
        problem = tried[0][1]
        if problem.code in _GONE:
            others = f"; also tried: {_several(silent[1:])}" if silent[1:] else ""
            problem.hint = f"{_IS_IT_ON}{others}"
        return problem
    quiet = f", and no answer came from {_several(silent)}" if silent else ""
    return NotFound(
        "nobody-invited",
        f"cannot join: no invitation with this code is open at {_several(bystanders)}{quiet}",
        hint=f"{_IS_IT_ON}; once used, cancelled or expired, ask for a new code: mycoswarmctl invite",
    )


def _several(names: Sequence[str]) -> str:
    shown = list(dict.fromkeys(names))
    rest = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + rest


def _transcript(hello: Hello, *, nonce: bytes, cert_der: bytes, genesis: bytes) -> bytes:
    """Return the hash of everything that both sides must agree on, each part with its length before it."""
    digest = hashlib.sha256(_LABEL)
    for part in (
        hello.invite.encode("ascii"),
        hello.nonce,
        nonce,
        hashlib.sha256(cert_der).digest(),
        hashlib.sha256(hello.cert_der).digest(),
        genesis,
        hello.role.encode("ascii"),
        hello.name.encode("utf-8"),
    ):
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()


# --- reading what a stranger sent --------------------------------------------------------------------


def _malformed(where: str, expected: str) -> BadRequest:
    return BadRequest("bad-enrolment", f"cannot enrol: {where!r} is wrong: {expected}", where=where)


def _fields(untrusted: object, names: tuple[str, ...]) -> Mapping[str, object]:
    if not isinstance(untrusted, Mapping) or set(untrusted) != set(names):
        raise BadRequest(
            "bad-enrolment", f"cannot enrol: expected a message of exactly {', '.join(sorted(names))}"
        )
    return untrusted


def _session(value: object) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_SESSION_CHARS or not value.isascii():
        raise _malformed("session", f"expected 1 to {MAX_SESSION_CHARS} ASCII characters")
    return value


def _hex(value: object, size: int, where: str) -> bytes:
    expected = f"expected {size} bytes in lower-case hex"
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]*", value) or len(value) != 2 * size:
        raise _malformed(where, expected)
    return bytes.fromhex(value)


def _from_base64(value: object, max_bytes: int, where: str) -> bytes:
    expected = f"expected at most {max_bytes} bytes in base64"
    if not isinstance(value, str) or len(value) > (max_bytes + 2) // 3 * 4:
        raise _malformed(where, expected)
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters beyond ASCII
        raise _malformed(where, expected) from None
    if _to_base64(data) != value or len(data) > max_bytes:  # one encoding for each content
        raise _malformed(where, expected)
    return data


def _to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _json(data: bytes) -> object:
    try:
        value: object = json.loads(data.decode("ascii"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, ValueError):
        raise _malformed("bundle", "expected JSON") from None
    return value
