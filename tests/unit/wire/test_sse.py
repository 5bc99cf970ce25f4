import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycoswarmd.errors import BadRequest
from mycoswarmd.wire.sse import SseParser

STREAM = (
    b": hello\r\n\r\ndata: one\n\ndata:two\r\ndata:  more\r\n\r\nevent: x\nid: 3\ndata: three\n\n\n\n"
    b"data\n\ndata: \xff\xfe\n\ndata: [DONE]\n\ndata: cut off"
)
EVENTS = [b"one", b"two\n more", b"three", b"\xff\xfe", b"[DONE]"]


def feed(pieces: list[bytes], **options: int) -> list[bytes]:
    parser = SseParser(**options)
    return [event for piece in pieces for event in parser.feed(piece)]


def test_events_are_the_same_whole_and_byte_by_byte() -> None:
    assert feed([STREAM]) == EVENTS
    assert feed([STREAM[i : i + 1] for i in range(len(STREAM))]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_are_the_same_however_they_are_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    assert feed([STREAM[a:b] for a, b in itertools.pairwise(edges)]) == EVENTS


@given(st.lists(st.binary(max_size=60), max_size=8))
def test_any_bytes_are_read(pieces: list[bytes]) -> None:
    assert feed(pieces) == feed([b"".join(pieces)])


@pytest.mark.parametrize(
    "untrusted",
    [b"data: " + b"x" * 2000, b"x" * 2000, b"data: " + b"x" * 2000 + b"\n\n", b"data: abc\n" * 300],
)
@pytest.mark.parametrize("step", [1, 100, 5000])
def test_an_endless_event_is_refused(untrusted: bytes, step: int) -> None:
    pieces = [untrusted[i : i + step] for i in range(0, len(untrusted), step)]
    with pytest.raises(BadRequest):
        feed(pieces, max_event_bytes=1000)
