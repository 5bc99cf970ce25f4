"""Canonical bytes, the chain, and the walk that finds each kind of tampering."""

import math
from dataclasses import replace
from enum import IntEnum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycoswarmd.core.receipts import (
    GENESIS,
    MAX_BODY_BYTES,
    Record,
    canonical,
    chain,
    chain_bytes,
    check_kind,
    receipt_id,
    verify_chain,
)
from mycoswarmd.core.types import Zone
from mycoswarmd.errors import BadRequest, LocalProtocolError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
BODIES = st.dictionaries(st.text(max_size=5), JSON, max_size=4)


def make_chain(count: int, *, salt: str = "") -> list[Record]:
    rows: list[Record] = []
    prev = GENESIS
    for seq in range(1, count + 1):
        body: dict[str, object] = {"n": seq, "salt": salt}
        sha256 = chain(prev, seq, 1000 + seq, "decision", body)
        rows.append(
            Record(
                seq=seq,
                at_ms=1000 + seq,
                kind="decision",
                body=canonical(body),
                prev_sha256=prev,
                sha256=sha256,
            )
        )
        prev = sha256
    return rows


@given(BODIES)
def test_the_order_of_keys_does_not_matter(body: dict[str, object]) -> None:
    assert canonical(body) == canonical(dict(reversed(body.items())))


@given(BODIES, BODIES)
def test_two_bodies_have_one_encoding_only_when_they_are_equal(
    one: dict[str, object], other: dict[str, object]
) -> None:
    assert (canonical(one) == canonical(other)) == (repr_typed(one) == repr_typed(other))


def repr_typed(value: object) -> object:
    """Python says True == 1; JSON does not."""
    if isinstance(value, dict):
        return {key: repr_typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [repr_typed(item) for item in value]
    return (type(value).__name__, value)


def test_enums_are_their_values() -> None:
    class Level(IntEnum):
        TWO = 2

    assert canonical({"z": Zone.LAN, "l": Level.TWO}) == b'{"l":2,"z":"lan"}'


@pytest.mark.parametrize(
    "value",
    [
        1.5,
        math.nan,
        math.inf,
        2**63,
        -(2**63) - 1,
        b"x",
        {1: "x"},
        {"s"},
        object(),
        [[1.0]],
        [[[[[[[[1]]]]]]]],
    ],
)
def test_what_has_no_single_encoding_is_refused(value: object) -> None:
    with pytest.raises(LocalProtocolError) as caught:
        canonical({"key": value})
    assert caught.value.code == "receipt-body"


def test_a_body_is_bounded() -> None:
    room = MAX_BODY_BYTES - len('{"k":""}')
    assert len(canonical({"k": "x" * room})) == MAX_BODY_BYTES
    with pytest.raises(LocalProtocolError, match="receipt-too-large"):
        canonical({"k": "x" * (room + 1)})


@pytest.mark.parametrize("kind", ["", "A", "two words", "x\n", "1x", "x" * 41])
def test_a_kind_is_kebab_case(kind: str) -> None:
    with pytest.raises(LocalProtocolError, match="receipt-kind"):
        check_kind(kind)


def test_an_id_is_the_place_and_the_first_of_the_hash() -> None:
    row = make_chain(1)[0]
    assert row.id == receipt_id(1, row.sha256) == f"1-{row.sha256[:8]}"


def test_a_whole_chain_verifies_with_and_without_a_head() -> None:
    rows = make_chain(5)
    assert verify_chain(rows) == verify_chain(iter(rows))
    for head in (None, rows[-1].id, rows[2].id, rows[2].sha256, f"3-{rows[2].sha256}"):
        result = verify_chain(rows, head)
        assert (result.ok, result.count, result.bad_seq, result.reason) == (True, 5, None, "")


def test_an_empty_log_verifies_unless_a_head_is_expected() -> None:
    assert verify_chain([]).ok
    assert verify_chain([], "3-" + "a" * 64).bad_seq == 3


FIELDS: list[dict[str, object]] = [
    {"at_ms": 1},
    {"kind": "other"},
    {"body": b'{"n":99}'},
    {"prev_sha256": "f" * 64},
    {"sha256": "f" * 64},
]


@given(st.integers(1, 8), st.data())
def test_a_changed_record_is_named(count: int, data: st.DataObject) -> None:
    rows = make_chain(count)
    at = data.draw(st.integers(0, count - 1))
    field = data.draw(st.sampled_from(FIELDS))
    rows[at] = replace(rows[at], **field)  # type: ignore[arg-type]
    result = verify_chain(rows)
    assert (result.ok, result.count, result.bad_seq) == (False, at, at + 1)
    assert result.reason.startswith("changed")


@given(st.integers(2, 8), st.data())
def test_a_record_rewritten_with_its_hash_is_found_at_the_next(count: int, data: st.DataObject) -> None:
    rows = make_chain(count)
    at = data.draw(st.integers(0, count - 2))
    body = canonical({"n": "forged"})
    sha256 = chain_bytes(rows[at].prev_sha256, at + 1, 5, "decision", body)
    rows[at] = replace(rows[at], at_ms=5, body=body, sha256=sha256)
    result = verify_chain(rows)
    assert (result.ok, result.bad_seq) == (False, at + 2)
    assert result.reason.startswith("displaced")


@given(st.integers(2, 8), st.data())
def test_a_removed_record_is_named(count: int, data: st.DataObject) -> None:
    rows = make_chain(count)
    at = data.draw(st.integers(0, count - 2))
    del rows[at]
    result = verify_chain(rows)
    assert (result.ok, result.bad_seq) == (False, at + 1)
    assert result.reason.startswith("removed")


@given(st.integers(2, 8), st.data())
def test_swapped_records_are_found_at_the_first(count: int, data: st.DataObject) -> None:
    rows = make_chain(count)
    one = data.draw(st.integers(0, count - 2))
    other = data.draw(st.integers(one + 1, count - 1))
    rows[one], rows[other] = rows[other], rows[one]
    assert verify_chain(rows).bad_seq == one + 1
    # The same with their places exchanged as well, as an UPDATE of seq would do it.
    rows[one], rows[other] = replace(rows[one], seq=one + 1), replace(rows[other], seq=other + 1)
    result = verify_chain(rows)
    assert (result.ok, result.bad_seq) == (False, one + 1)
    assert result.reason.startswith("changed")


@given(st.integers(1, 8), st.data())
def test_an_inserted_record_is_found(count: int, data: st.DataObject) -> None:
    rows, others = make_chain(count), make_chain(count, salt="other")
    at = data.draw(st.integers(0, count - 1))
    rows.insert(at, others[at])
    result = verify_chain(rows)
    assert not result.ok
    assert result.bad_seq in {at + 1, at + 2}


@given(st.integers(1, 8), st.data())
def test_a_cut_off_end_shows_only_against_a_copied_head(count: int, data: st.DataObject) -> None:
    rows = make_chain(count)
    keep = data.draw(st.integers(0, count - 1))
    assert verify_chain(rows[:keep]).ok
    for head in (rows[-1].id, rows[-1].sha256):
        result = verify_chain(rows[:keep], head)
        assert not result.ok
        assert result.reason.startswith("cut-off")


def test_a_tail_rewritten_whole_shows_only_against_a_copied_head() -> None:
    rows, forged = make_chain(4), make_chain(4, salt="forged")
    assert verify_chain(forged).ok
    result = verify_chain(forged, rows[3].sha256)
    assert (result.ok, result.reason[:7]) == (False, "cut-off")


@pytest.mark.parametrize("head", ["", "x", "12345678", "1-123", "1-ABCDEF01", "-" + "a" * 64, "a" * 65])
def test_a_head_that_is_none_is_refused(head: str) -> None:
    with pytest.raises(BadRequest, match="bad-head"):
        verify_chain([], head)
