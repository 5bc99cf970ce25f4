"""The facts at the head of a GGUF model file that decide how it is served; bounded, and nothing more.

Rule: counts and lengths come from a file that anybody may have dropped in, so each is checked before
it is used. What a file's tensors are worth only loading them in a child process can tell.
Source: ggml docs/gguf.md, versions 2 and 3.
"""

import struct
from dataclasses import dataclass
from typing import BinaryIO

from mycoswarmd.errors import BadRequest

MAGIC = b"GGUF"
# Real files have some 30 entries; vocabularies have up to 300,000 words, each with a score and a type.
_MAX_ENTRIES = 4096
_MAX_ITEMS = 4 << 20
_MAX_TEXT_BYTES = 4 << 20
_MAX_KEY_BYTES = 65_535
# Value types by number: fixed-size ones by their struct format.
_FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Architectures whose models only embed.
_EMBEDDING = frozenset(
    {
        "bert", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "modern-bert",
        "neo-bert", "nomic-bert", "nomic-bert-moe", "t5encoder",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFacts:
    """What the head of a model file says."""

    architecture: str
    context_tokens: int | None
    is_embedding: bool
    has_chat_template: bool


def read_gguf(untrusted: BinaryIO) -> GgufFacts:
    """Read the head of a model file, or raise BadRequest("bad-gguf")."""
    return _Reader(untrusted).facts()


class _Reader:
    def __init__(self, untrusted: BinaryIO) -> None:
        self._untrusted = untrusted

    def facts(self) -> GgufFacts:
        if self._take(4) != MAGIC:
            raise _bad("it is not a GGUF file")
        version = self._number("I")
        if version not in {2, 3}:
            raise _bad(f"its version {version} is not 2 or 3, or it is big-endian")
        self._number("Q")  # the number of tensors
        entries = self._number("Q")
        if entries > _MAX_ENTRIES:
            raise _bad(f"it claims {entries} metadata entries")
        found: dict[str, object] = {}
        for _ in range(entries):
            key = self._text(_MAX_KEY_BYTES)
            found[key] = self._value(self._number("I"))
        architecture = found.get("general.architecture")
        if not isinstance(architecture, str):
            raise _bad("it does not name its architecture")
        context = found.get(f"{architecture}.context_length")
        pooling = found.get(f"{architecture}.pooling_type")
        return GgufFacts(
            architecture=architecture,
            context_tokens=context if isinstance(context, int) and context > 0 else None,
            # Chat models say nothing of pooling, or 0 for none.
            is_embedding=architecture in _EMBEDDING or pooling not in {None, 0},
            has_chat_template=bool(found.get("tokenizer.chat_template")),
        )

    def _take(self, count: int) -> bytes:
        data = self._untrusted.read(count)
        if len(data) != count:
            raise _bad("it ends within its head; is it still being copied?")
        return data

    def _number(self, kind: str) -> int:
        value = struct.unpack("<" + kind, self._take(struct.calcsize("<" + kind)))[0]
        assert isinstance(value, int)
        return value

    def _text(self, max_bytes: int) -> str:
        length = self._number("Q")
        if length > max_bytes:
            raise _bad(f"it has a text of {length} bytes in its head")
        return self._take(length).decode("utf-8", "replace")

    def _value(self, kind: int) -> object:
        if kind == _STRING:
            return self._text(_MAX_TEXT_BYTES)
        if kind == _ARRAY:
            self._skip_array()
            return None
        return self._fixed(kind)

    def _fixed(self, kind: int) -> object:
        if kind not in _FIXED:
            raise _bad(f"it has a value of unknown type {kind}")
        value: object = struct.unpack("<" + _FIXED[kind], self._take(struct.calcsize("<" + _FIXED[kind])))[0]
        return value

    def _skip_array(self) -> None:
        kind, count = self._number("I"), self._number("Q")
        if count > _MAX_ITEMS:
            raise _bad(f"it has a list of {count} items in its head")
        if kind == _STRING:
            for _ in range(count):
                self._text(_MAX_KEY_BYTES)
        elif kind in _FIXED:
            self._take(count * struct.calcsize("<" + _FIXED[kind]))
        else:
            raise _bad(f"it has a list of unknown type {kind}")


def _bad(cause: str) -> BadRequest:
    return BadRequest("bad-gguf", f"cannot use the model file: {cause}")
