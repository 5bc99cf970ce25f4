"""wire/agent_tools: what is accepted as arguments of a tool, and how each refusal reads."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycoswarmd.errors import BadRequest
from mycoswarmd.wire.agent_tools import FINISH, TOOL_SCHEMAS, check_arguments, parse_arguments

GOOD: dict[str, dict[str, object]] = {
    "fs_read": {"path": "a", "offset": 0, "limit": 5},
    "fs_write": {"path": "a", "content": ""},
    "fs_edit": {"path": "a", "old": "x", "new": ""},
    "fs_list": {"path": "."},
    "fs_search": {"pattern": "*", "kind": "name"},
    "run": {"program": "git", "args": ["status", ""], "stdin": "x"},
    "finish": {"summary": ""},
}


def test_every_tool_has_an_example_here() -> None:
    assert GOOD.keys() == TOOL_SCHEMAS.keys()
    assert FINISH in GOOD


@pytest.mark.parametrize("tool", GOOD)
def test_good_arguments_pass_and_each_required_one_is_required(tool: str) -> None:
    assert parse_arguments(tool, json.dumps(GOOD[tool])) == GOOD[tool]
    required = TOOL_SCHEMAS[tool].parameters["required"]
    assert isinstance(required, list)
    assert required
    for key in required:
        less = {name: value for name, value in GOOD[tool].items() if name != key}
        with pytest.raises(BadRequest, match=f"{key!r} is missing"):
            check_arguments(tool, less)
    with pytest.raises(BadRequest, match="'extra' is not an argument"):
        check_arguments(tool, {**GOOD[tool], "extra": 1})


@pytest.mark.parametrize(
    ("tool", "key", "value", "why"),
    [
        ("fs_read", "path", "", "0 characters"),
        ("fs_read", "path", "x" * 1025, "1025 characters"),
        ("fs_read", "path", None, "not a string"),
        ("fs_read", "path", "\ud800", "surrogate"),
        ("fs_read", "offset", -1, "out of range"),
        ("fs_read", "offset", True, "not an integer"),
        ("fs_read", "offset", 1.5, "not an integer"),
        ("fs_read", "limit", 1 << 30, "out of range"),
        ("fs_write", "content", "x" * (600 << 10), "characters"),
        ("fs_edit", "old", "", "0 characters"),
        ("fs_search", "kind", "regex", "not one of text, name"),
        ("run", "args", "status", "not a list"),
        ("run", "args", ["a", 1], "item 1 is not a string"),
        ("run", "args", ["a"] * 257, "257 items"),
    ],
)
def test_bad_arguments_are_refused_with_what_and_where(tool: str, key: str, value: object, why: str) -> None:
    with pytest.raises(BadRequest, match=why) as caught:
        check_arguments(tool, {**GOOD[tool], key: value})
    assert (caught.value.code, caught.value.where) == ("bad-arguments", key)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000])
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_arguments("fs_read", text)
    assert caught.value.code == "bad-arguments"


def test_an_unknown_tool_is_refused_with_those_there_are() -> None:
    with pytest.raises(BadRequest) as caught:
        check_arguments("sudo", {})
    assert caught.value.code == "unknown-tool"
    assert "fs_read" in caught.value.hint


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.sampled_from(sorted(GOOD)), JSON, st.sampled_from(["path", "content", "args", "pattern", "summary"])
)
def test_any_json_is_accepted_or_refused(tool: str, value: object, key: str) -> None:
    for untrusted in (value, {key: value}, {**GOOD[tool], key: value}):
        try:
            accepted = check_arguments(tool, untrusted)
        except BadRequest:
            continue
        assert accepted is untrusted
