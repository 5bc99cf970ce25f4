"""What the core and the signer's unit say to one another: JSON, one object a line, on their connection.

Laws:

1. There is a request for each thing that flow.swarmports.Signer can do and for nothing else; none of them
   returns the private key, and no answer has a field that could hold it.
2. Who signs looks at what it signs: the message travels whole, never as a hash.
3. Each line is bounded, and whatever is not expected in it is refused.

Source: systemd/README.md.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from mycoswarmd.errors import BadRequest
from mycoswarmd.wire.jsonv import bad_range, get_choice, get_int, get_object, get_str, parse_object
from mycoswarmd.wire.proof import Proof, parse_proof_body, proof_body

VERSION: Final = 1
# The longest statement lists all that an epoch keeps: a mebibyte of it (core/roster/statement.py).
MESSAGE_BYTES: Final = (1 << 20) + 4096
# In base64, and what stands around it.
REQUEST_BYTES: Final = MESSAGE_BYTES * 4 // 3 + 1024
ANSWER_BYTES: Final = 8192
PUBLIC_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
_TEXT_CHARS: Final = 500
_CODE: Final = re.compile(r"[a-z][a-z0-9-]{0,39}\Z")


class Do(StrEnum):
    """What is asked for."""

    CREATE = "create"  # make the key where there is none; the public half is the answer
    PUBLIC = "public"  # the public half, or none
    SIGN = "sign"
    DESTROY = "destroy"
    PROVE = "prove"


@dataclass(frozen=True, slots=True)
class Request:
    """One request; only `sign` has a message."""

    do: Do
    message: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of it.

    Attributes:
        public: the public half, where it was asked for and there is a key.
    """

    public: bytes | None = None
    signature: bytes | None = None
    proof: Proof | None = None


class Failure(StrEnum):
    """Why there is no answer: the classes of errors that a signer has."""

    REFUSED = "refused"  # no signer signs this
    NO_KEY = "no-key"
    BAD_KEY = "bad-key"  # damaged, or others could have read it
    DISK = "disk"
    BUSY = "busy"  # it has signed very much


@dataclass(frozen=True, slots=True)
class Failed:
    """It could not be done; why, for a person, and what to do."""

    kind: Failure
    code: str
    text: str
    hint: str = ""


def encode_request(request: Request) -> bytes:
    """Encode a request as a line."""
    body: dict[str, object] = {"v": VERSION, "do": request.do.value}
    if request.do is Do.SIGN:
        if len(request.message) > MESSAGE_BYTES:
            raise bad_range("message", f"at most {MESSAGE_BYTES} bytes")
        body["message"] = base64.b64encode(request.message).decode("ascii")
    return _line(body, REQUEST_BYTES)


def parse_request(untrusted: bytes) -> Request:
    """Parse a line of the core's."""
    body = parse_object(untrusted, what="a request")
    get_int(body, "v", where="", low=VERSION, high=VERSION)
    do = Do(get_choice(body, "do", where="", choices=[one.value for one in Do]))
    known = {"v", "do", "message"} if do is Do.SIGN else {"v", "do"}
    if body.keys() - known:
        raise bad_range("", "a request of known fields")
    if do is not Do.SIGN:
        return Request(do)
    return Request(do, _bytes(body, "message", most_bytes=MESSAGE_BYTES))


def encode_answer(answer: Answer | Failed) -> bytes:
    """Encode what came of a request as a line."""
    if isinstance(answer, Failed):
        failed = {
            "kind": answer.kind.value,
            "code": answer.code,
            "text": answer.text[:_TEXT_CHARS],
            "hint": answer.hint[:_TEXT_CHARS],
        }
        return _line({"failed": failed}, ANSWER_BYTES)
    done: dict[str, object] = {}
    if answer.public is not None:
        done["public"] = answer.public.hex()
    if answer.signature is not None:
        done["signature"] = answer.signature.hex()
    if answer.proof is not None:
        done["proof"] = proof_body(answer.proof)
    return _line({"done": done}, ANSWER_BYTES)


def parse_answer(untrusted: bytes) -> Answer | Failed:
    """Parse a line of the signer's."""
    body = parse_object(untrusted, what="an answer of the signer")
    if "failed" in body:
        failed = get_object(body, "failed", where="")
        kind = get_choice(failed, "kind", where="failed", choices=[one.value for one in Failure])
        code = get_str(failed, "code", where="failed", max_len=64)
        if not _CODE.match(code):
            raise bad_range("failed.code", "the code of an error")
        return Failed(
            Failure(kind),
            code,
            _clean(get_str(failed, "text", where="failed", max_len=_TEXT_CHARS)),
            _clean(get_str(failed, "hint", where="failed", max_len=_TEXT_CHARS, default="")),
        )
    done = get_object(body, "done", where="")
    return Answer(
        public=_hex(done, "public", PUBLIC_BYTES),
        signature=_hex(done, "signature", SIGNATURE_BYTES),
        proof=parse_proof_body(done["proof"]) if "proof" in done else None,
    )


def _hex(obj: dict[str, object], key: str, size_bytes: int) -> bytes | None:
    if key not in obj:
        return None
    text = get_str(obj, key, where="done", max_len=2 * size_bytes, min_len=2 * size_bytes)
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != size_bytes:  # it had spaces in it, or no digits
        raise bad_range(f"done.{key}", f"{size_bytes} bytes in hex")
    return found


def _bytes(obj: dict[str, object], key: str, *, most_bytes: int) -> bytes:
    text = get_str(obj, key, where="", max_len=most_bytes * 4 // 3 + 4)
    try:
        found = base64.b64decode(text.encode("ascii", "replace"), validate=True)
    except binascii.Error as exc:
        raise BadRequest("bad-request", f"cannot read {key!r}: it is not base64", where=key) from exc
    if len(found) > most_bytes:
        raise bad_range(key, f"at most {most_bytes} bytes")
    return found


def _clean(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


def _line(body: Mapping[str, object], most_bytes: int) -> bytes:
    line = json.dumps(body, separators=(",", ":"), ensure_ascii=True).encode("ascii") + b"\n"
    if len(line) > most_bytes:
        raise bad_range("", f"a line of at most {most_bytes} bytes, found {len(line)}")
    return line
