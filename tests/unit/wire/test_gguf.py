import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycoswarmd.errors import BadRequest
from mycoswarmd.wire.gguf import GgufFacts, read_gguf


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def gguf(*entries: bytes, version: int = 3, count: int | None = None) -> bytes:
    return (
        b"GGUF"
        + struct.pack("<IQQ", version, 0, len(entries) if count is None else count)
        + b"".join(entries)
    )


def array(kind: int, *items: bytes) -> bytes:
    return struct.pack("<IQ", kind, len(items)) + b"".join(items)


ARCH = entry("general.architecture", 8, text("llama"))
CHAT = gguf(
    ARCH,
    entry("llama.context_length", 4, struct.pack("<I", 8192)),
    entry("tokenizer.ggml.tokens", 9, array(8, text("a"), text("b"))),
    entry("tokenizer.ggml.scores", 9, array(6, *[struct.pack("<f", 1.0)] * 3)),
    entry("tokenizer.chat_template", 8, text("{{ x }}")),
    entry("general.flag", 7, b"\x01"),
)


def test_a_chat_model() -> None:
    assert read_gguf(io.BytesIO(CHAT)) == GgufFacts(
        architecture="llama", context_tokens=8192, is_embedding=False, has_chat_template=True
    )


@pytest.mark.parametrize(
    ("entries", "is_embedding"),
    [
        ([entry("general.architecture", 8, text("bert"))], True),
        ([ARCH, entry("llama.pooling_type", 4, struct.pack("<I", 3))], True),
        ([ARCH, entry("llama.pooling_type", 4, struct.pack("<I", 0))], False),
        ([ARCH], False),
    ],
)
def test_embedding_models_are_told_apart(entries: list[bytes], is_embedding: bool) -> None:
    found = read_gguf(io.BytesIO(gguf(*entries)))
    assert found.is_embedding is is_embedding
    assert not found.has_chat_template
    assert found.context_tokens is None


@pytest.mark.parametrize(
    ("untrusted", "says"),
    [
        (b"", "ends within its head"),
        (b"hello world", "not a GGUF file"),
        (gguf(ARCH, version=1), "version 1"),
        (gguf(ARCH, version=50331648), "big-endian"),
        (gguf(ARCH, count=10**9), "1000000000 metadata entries"),
        (gguf(ARCH, count=2), "still being copied"),
        (gguf(), "architecture"),
        (gguf(entry("general.architecture", 4, b"\0\0\0\0")), "architecture"),
        (gguf(entry("k", 99, b"")), "unknown type 99"),
        (gguf(entry("k", 8, struct.pack("<Q", 2**62))), "bytes in its head"),
        (gguf(entry("k", 9, struct.pack("<IQ", 0, 2**62))), "items in its head"),
        (gguf(entry("k", 9, struct.pack("<IQ", 9, 1))), "list of unknown type 9"),
    ],
)
def test_a_bad_file_is_refused(untrusted: bytes, says: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read_gguf(io.BytesIO(untrusted))
    assert caught.value.code == "bad-gguf"
    assert says in caught.value.message


@pytest.mark.parametrize("length", range(len(CHAT)))
def test_every_cut_is_noticed(length: int) -> None:
    with pytest.raises(BadRequest):
        read_gguf(io.BytesIO(CHAT[:length]))


@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(untrusted: bytes) -> None:
    with pytest.raises(BadRequest):
        read_gguf(io.BytesIO(b"GGUF\x03\0\0\0" + untrusted))
