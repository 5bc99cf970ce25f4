"""Receipts: canonical bytes, the hash chain over them, and the walk that finds what was tampered with.

Each record's SHA-256 covers its place, time, kind and body and the hash of the record before it. So:

1. a record that was changed does not match its own hash;
2. a record that was removed leaves a hole in the sequence;
3. a record that was swapped, inserted or rewritten with a matching hash does not fit its neighbour.

What the chain alone cannot show: records cut off at the end, or the whole tail rewritten. Both show
only against a head that was copied elsewhere before: pass it as `expected_head`. A head of eight hex
digits (what people copy) guards against accidents; against an attacker who can compute, copy all 64.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mycoswarmd.errors import BadRequest, LocalProtocolError

GENESIS = "0" * 64  # what the first record follows
ID_HEX_DIGITS = 8
# A record holds facts, never text of a prompt; 16 KiB is an order of magnitude above the largest.
MAX_BODY_BYTES = 16_384
MAX_DEPTH = 8

_KIND = re.compile(r"[a-z][a-z0-9-]{0,39}")
_HEAD = re.compile(r"(?:(?P<seq>[0-9]{1,18})-)?(?P<sha256>[0-9a-f]{8,64})")
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False, check_circular=False)
_INT_LIMIT = 1 << 63
_PLAIN = (str, bool, type(None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One receipt as it is stored.

    Attributes:
        body: canonical JSON bytes of an object.
        prev_sha256: the hash of the record before, GENESIS for the first.
    """

    seq: int
    at_ms: int
    kind: str
    body: bytes
    prev_sha256: str
    sha256: str

    @property
    def id(self) -> str:
        """What people and headers carry."""
        return receipt_id(self.seq, self.sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult:
    """What a walk of the chain found.

    Attributes:
        count: how many records were walked and found in order.
        bad_seq: the first record that does not hold, or None.
        reason: changed | removed | displaced | cut-off, with an explanation, or "".
    """

    count: int
    ok: bool
    bad_seq: int | None = None
    reason: str = ""


def canonical(body: Mapping[str, object]) -> bytes:
    """Return the one encoding of a body: sorted keys, ASCII, no blanks, no floats."""
    _check(body, MAX_DEPTH)
    encoded = _ENCODER.encode(body).encode("ascii")
    if len(encoded) > MAX_BODY_BYTES:
        raise LocalProtocolError(
            "receipt-too-large",
            f"cannot write a receipt of {len(encoded):,} bytes: at most {MAX_BODY_BYTES:,} are accepted",
        )
    return encoded


def chain(prev_sha256: str, seq: int, at_ms: int, kind: str, body: Mapping[str, object]) -> str:
    """Return the hash of a record."""
    return chain_bytes(prev_sha256, seq, at_ms, kind, canonical(body))


def chain_bytes(prev_sha256: str, seq: int, at_ms: int, kind: str, body: bytes) -> str:
    """Return the hash of a record whose body is already canonical."""
    # Only the body can hold a line feed's escape, never the byte: five lines, one reading.
    return hashlib.sha256(f"{prev_sha256}\n{seq}\n{at_ms}\n{kind}\n".encode() + body).hexdigest()


def receipt_id(seq: int, sha256: str) -> str:
    """Return SEQ-HASH8."""
    return f"{seq}-{sha256[:ID_HEX_DIGITS]}"


def check_kind(kind: str) -> None:
    """Refuse a kind that is not kebab-case of at most 40 characters."""
    if _KIND.fullmatch(kind) is None:
        raise LocalProtocolError("receipt-kind", f"cannot write a receipt of kind {kind!r}: not kebab-case")


def verify_chain(rows: Iterable[Record], expected_head: str | None = None) -> VerifyResult:
    """Walk records in the order given and say which, if any, does not hold.

    Args:
        rows: all records, from the first.
        expected_head: a head copied earlier, as SHA256, SEQ-SHA256 or SEQ-HASH8: it must be in the chain.
    """
    walk = ChainWalk(expected_head)
    for row in rows:
        if not walk.step(row):
            break
    return walk.finish()


class ChainWalk:
    """The same walk, one record at a time, for a log that is read in pieces."""

    __slots__ = ("_expected", "_expected_seq", "_found", "_prev", "_result", "_seq")

    def __init__(self, expected_head: str | None = None) -> None:
        self._prev = GENESIS
        self._seq = 0
        self._result: VerifyResult | None = None
        self._expected, self._expected_seq = _parse_head(expected_head)
        self._found = self._expected == ""

    def step(self, row: Record) -> bool:
        """Check the next record; False when the chain is broken here and walking on is pointless."""
        seq = self._seq + 1
        fault = self._fault(row, seq)
        if fault:
            bad_seq = seq if fault.startswith("removed") else row.seq
            self._result = VerifyResult(count=self._seq, ok=False, bad_seq=bad_seq, reason=fault)
            return False
        self._seq, self._prev = seq, row.sha256
        if row.sha256.startswith(self._expected) and self._expected_seq in {None, seq}:
            self._found = True
        return True

    def _fault(self, row: Record, seq: int) -> str:
        if row.seq > seq:
            return f"removed: record {seq} is missing, {row.seq} comes in its place"
        if row.seq < seq:
            return f"displaced: record {row.seq} comes again after record {self._seq}"
        if chain_bytes(row.prev_sha256, row.seq, row.at_ms, row.kind, row.body) != row.sha256:
            return f"changed: record {seq} does not match its own hash"
        if row.prev_sha256 != self._prev:
            return f"displaced: record {seq} does not follow record {seq - 1}; one of the two was replaced"
        return ""

    def finish(self) -> VerifyResult:
        """Return the result; the copied head must have been met by now."""
        if self._result is not None:
            return self._result
        if self._found:
            return VerifyResult(count=self._seq, ok=True)
        bad_seq = self._expected_seq if self._expected_seq is not None else self._seq + 1
        return VerifyResult(
            count=self._seq,
            ok=False,
            bad_seq=bad_seq,
            reason="cut-off: the copied head is not in this log; its end was removed or rewritten",
        )


def _parse_head(expected_head: str | None) -> tuple[str, int | None]:
    if expected_head is None:
        return "", None
    match = _HEAD.fullmatch(expected_head)
    if match is None or (match["seq"] is None and len(match["sha256"]) != 64):
        raise BadRequest(
            "bad-head",
            f"cannot verify against the head {expected_head[:80]!r}",
            hint="a head is SEQ-HASH as `audit head` prints it, or the 64 hex digits alone",
            where="head",
        )
    return match["sha256"], int(match["seq"]) if match["seq"] is not None else None


def _check(value: object, depth: int) -> None:
    """Refuse what has no single encoding: floats, NaN, keys that are not strings, huge integers."""
    if isinstance(value, _PLAIN):
        return
    if isinstance(value, int):
        if -_INT_LIMIT <= value < _INT_LIMIT:
            return
    elif depth > 0 and isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                break
            if not isinstance(item, _PLAIN):
                _check(item, depth - 1)
        else:
            return
    elif depth > 0 and isinstance(value, list | tuple):
        for item in value:
            _check(item, depth - 1)
        return
    raise LocalProtocolError(
        "receipt-body",
        f"cannot encode a receipt with a {type(value).__name__} here",
        hint="accepted: objects with string keys, lists, strings, 64-bit integers, booleans, null; 8 deep",
    )
