"""The recovery key on paper: what was written is what is read, and a slip shows."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycoswarmd.core.enrol import CROCKFORD
from mycoswarmd.core.recovery import format_recovery, parse_recovery
from mycoswarmd.errors import BadRequest, LocalProtocolError

SEED = bytes(range(32))


@given(st.binary(min_size=32, max_size=32))
def test_every_key_survives_paper(seed: bytes) -> None:
    shown = format_recovery(seed)
    assert [len(group) for group in shown.split("-")] == [4] * 13
    assert parse_recovery(shown) == seed
    assert parse_recovery(shown.lower().replace("-", "\n").replace("0", "O").replace("1", "i")) == seed


def test_the_form_is_the_documented_one() -> None:
    check = hashlib.sha256(b"mycoswarm-recovery-v1\0" + SEED).digest()[0] >> 4
    bits = "".join(f"{byte:08b}" for byte in SEED) + f"{check:04b}"
    chars = "".join(CROCKFORD[int(bits[at : at + 5], 2)] for at in range(0, 260, 5))
    assert format_recovery(SEED).replace("-", "") == chars


def read_or_none(text: str) -> bytes | None:
    try:
        return parse_recovery(text)
    except BadRequest:
        return None


def test_most_slips_show_at_once() -> None:
    chars = format_recovery(SEED).replace("-", "")
    read = [
        read_or_none(chars[:place] + wrong + chars[place + 1 :])
        for place, right in enumerate(chars)
        for wrong in set(CROCKFORD) - {right}
    ]
    assert sum(seed is None for seed in read) / len(read) > 0.9
    # What passes is another key, of which the roster does not name the public half.
    assert SEED not in read


@pytest.mark.parametrize("text", ["", "0" * 51, "0" * 53, "U" * 52, "ß" * 52, "x" * 10_000])
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_recovery(text)
    assert caught.value.code == "bad-recovery-key"


def test_the_error_does_not_repeat_the_key() -> None:
    shown = format_recovery(SEED)
    with pytest.raises(BadRequest) as caught:
        parse_recovery(shown + "0")
    assert shown[:9] not in str(caught.value)


def test_another_size_is_a_bug_of_ours() -> None:
    with pytest.raises(LocalProtocolError):
        format_recovery(b"short")
