"""What another node answers: read within bounds, its words, its refusals, and how it fails to.

Law: nothing of it is believed to be well formed; whatever is wrong with it is one of our errors.

Source: docs/wire.md.
"""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp

from mycoswarmd.engines.peerline import failed, leave, refused
from mycoswarmd.engines.upstream import BROKEN
from mycoswarmd.errors import (
    BadRequest,
    Conflict,
    Denied,
    MycoswarmError,
    NotFound,
    Unavailable,
)
from mycoswarmd.wire.jsonv import parse_object
from mycoswarmd.wire.peer import MAX_WORD_BYTES, Word, parse_word

# A roster of 10,000 admits is some 15 MB; nothing else is nearly as large.
MAX_ANSWER_BYTES = 32 << 20
_MAX_ERROR_BYTES = 64 << 10
# Python makes twenty times as much of each of these; a roster of 10,000 statements has 120,000.
_PARTS = (b"[", b"{", b":")
_MAX_PARTS = 1 << 19
_INLINE_BYTES = 1 << 20
_ERROR_S = 5.0
_SAID_CHARS = 300
_CODE = re.compile(r"[a-z][a-z0-9-]{0,63}\Z")
_RULE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_RECEIPT = re.compile(r"[0-9]{1,19}-[0-9a-f]{8}\Z")


class Words:
    """Finds the newest word in what a watch yields.

    Attributes:
        has_beat: whether the last piece ended some line.
    """

    def __init__(self, node_id: str, name: str) -> None:
        self._id = node_id
        self._name = name
        self._rest = b""
        self.has_beat = False

    def feed(self, untrusted: bytes) -> Word | None:
        """Return the last word that is complete now; earlier ones are out of date."""
        *lines, self._rest = (self._rest + untrusted).split(b"\n")
        self.has_beat = bool(lines)
        if len(self._rest) > MAX_WORD_BYTES:
            raise failed(self._name, "its word does not end")
        said = next((line for line in reversed(lines) if line.strip()), None)
        if said is None:
            return None
        try:
            word = parse_word(said)
        except BadRequest as exc:
            raise failed(self._name, exc.message) from exc
        if word.id != self._id:
            raise failed(self._name, "it speaks for another node")
        return word


async def read_answer(response: aiohttp.ClientResponse, name: str) -> Mapping[str, object]:
    """Read a whole JSON answer, or raise what it says."""
    try:
        if response.status != 200:
            await raise_refusal(response, name)
        untrusted = await _read(response, MAX_ANSWER_BYTES, name)
    finally:
        leave(response)
    try:
        if len(untrusted) <= _INLINE_BYTES:
            return parse_object(untrusted, what="the answer")
        return await asyncio.to_thread(parse_object, untrusted, what="the answer")
    except BadRequest as exc:
        raise failed(name, exc.message) from exc


async def _read(response: aiohttp.ClientResponse, limit_bytes: int, name: str) -> bytes:
    pieces: list[bytes] = []
    length = parts = 0
    try:
        while piece := await response.content.readany():
            length += len(piece)
            parts += sum(map(piece.count, _PARTS))
            if length > limit_bytes or parts > _MAX_PARTS:
                raise failed(name, "its answer is too large")
            pieces.append(piece)
    except BROKEN as exc:
        raise failed(name, "it broke off in the middle of its answer") from exc
    return b"".join(pieces)


async def raise_refusal(response: aiohttp.ClientResponse, name: str) -> None:
    """Raise what an answer with an error status says."""
    try:
        async with asyncio.timeout(_ERROR_S):
            untrusted = await _read(response, _MAX_ERROR_BYTES, name)
    except TimeoutError as exc:
        raise failed(name, "its answer does not end") from exc
    raise parse_refusal(response.status, untrusted, response.headers, name=name)


@dataclass(frozen=True, slots=True)
class Said:
    """What a refusal of another node says, each part of a bounded, harmless form or empty."""

    code: str
    message: str
    rule: str
    receipt: str


def parse_said(untrusted: bytes, untrusted_headers: Mapping[str, str]) -> Said:
    """Read the refusal of another node; what is not of the right form is left out."""
    try:
        error = parse_object(untrusted).get("error")
    except BadRequest:
        error = None
    facts = error if isinstance(error, dict) else {}
    texts = {key: facts[key] for key in ("code", "message", "rule") if isinstance(facts.get(key), str)}
    code, rule = texts.get("code", ""), texts.get("rule", "")
    receipt = untrusted_headers.get("X-Mycoswarm-Receipt", "")
    message = "".join(char if char.isprintable() else " " for char in texts.get("message", "")[:_SAID_CHARS])
    return Said(
        code=code if _CODE.match(code) else "",
        message=message,
        rule=rule if _RULE.match(rule) else "",
        receipt=receipt if _RECEIPT.match(receipt) else "",
    )


def parse_refusal(
    status: int, untrusted: bytes, untrusted_headers: Mapping[str, str], *, name: str
) -> MycoswarmError:
    """Make our error of a node's answer with an error status. No prompts go through here."""
    said = parse_said(untrusted, untrusted_headers)
    message = said.message or f"cannot get an answer from {name}: it answers with status {status}"
    hint = f"this is what {name} says" if said.message else ""
    error: MycoswarmError
    match status:
        case 401:
            error = refused(name)
        case 403:
            error = Denied(said.code or "peer-denied", message, hint=hint, rule=said.rule)
        case 404:
            error = NotFound(said.code or "not-found", message, hint=hint)
        case 409:
            error = Conflict(said.code or "conflict", message, hint=hint)
        case 429 | 503:
            error = Unavailable(said.code or "peer-busy", message, hint=hint, http_status=status)
        case _ if 400 <= status < 500:
            error = BadRequest(said.code or "bad-request", message, hint=hint)
        case _:
            error = failed(name, f"it answers with status {status}")
    error.receipt = said.receipt
    return error
