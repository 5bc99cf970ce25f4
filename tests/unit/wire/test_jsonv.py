import json
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycoswarmd.errors import BadRequest
from mycoswarmd.wire import jsonv

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("untrusted", "says"),
    [
        (b"", "not JSON"),
        (b"{", "line 1, column 2"),
        (b'{"a": \xff}', "not UTF-8 (byte 6)"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": NaN}', "number out of range"),
        (b'{"a": -Infinity}', "number out of range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "number out of range"),
        (b"[]", "expected an object, found a list"),
        (b"null", "found nothing"),
    ],
)
def test_what_is_no_object_is_refused(untrusted: bytes, says: str) -> None:
    with pytest.raises(BadRequest, match="cannot") as caught:
        jsonv.parse_object(untrusted)
    assert says in caught.value.message


@given(st.binary(max_size=200))
def test_any_bytes_parse_or_are_a_bad_request(untrusted: bytes) -> None:
    with suppress(BadRequest):
        assert isinstance(jsonv.parse_object(untrusted), dict)


@given(JSON)
def test_what_json_writes_is_read_back(value: object) -> None:
    assert jsonv.parse_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (
            lambda v: jsonv.as_str(v, where="a.b", max_len=3),
            ["", "abc", "äöü"],
            [1, None, "abcd", "\ud800", []],
        ),
        (lambda v: jsonv.as_int(v, where="a.b", low=0, high=9), [0, 9, 3.0], [-1, 10, True, "1", 1.5, 1e300]),
        (
            lambda v: jsonv.as_number(v, where="a.b", low=0, high=2),
            [0, 2, 1.5],
            [-0.1, 2.1, False, "1", 10**400],
        ),
        (lambda v: jsonv.as_bool(v, where="a.b"), [True, False], [0, 1, "true", None]),
        (lambda v: jsonv.as_list(v, where="a.b", max_items=1), [[], [1]], [[1, 2], {}, "x", None]),
        (lambda v: jsonv.as_object(v, where="a.b"), [{}, {"a": 1}], [[], "x", None]),
    ],
)
def test_getters_take_the_right_kind_only(
    check: Callable[[object], object], good: list[object], bad: list[object]
) -> None:
    for value in good:
        assert check(value) == value
    for value in bad:
        with pytest.raises(BadRequest) as caught:
            check(value)
        assert caught.value.where == "a.b"


def test_an_error_never_repeats_the_value() -> None:
    with pytest.raises(BadRequest) as caught:
        jsonv.as_int("MARKER", where="n", low=0, high=1)
    assert "MARKER" not in str(caught.value)


def test_defaults_are_for_what_is_absent() -> None:
    assert jsonv.get_str({}, "k", where="", default="d") == "d"
    assert jsonv.get_int({"k": None}, "k", where="", default=3) == 3
    assert jsonv.get_bool({}, "k", where="", default=False) is False
    assert jsonv.opt_str({}, "k", where="", max_len=3) is None
    for absent in (jsonv.get_str, jsonv.get_int, jsonv.get_bool, jsonv.get_object):
        with pytest.raises(BadRequest) as caught:
            absent({}, "k", where="w")
        assert caught.value.where == "w.k"
    with pytest.raises(BadRequest, match="one of a, b"):
        jsonv.get_choice({"k": "c"}, "k", where="", choices=("b", "a"))
