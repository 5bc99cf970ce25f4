import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycoswarmd.errors import BadRequest
from mycoswarmd.wire.ollama import encode_show, is_version, parse_ps, parse_show, parse_tags


def dumps(value: object) -> bytes:
    return json.dumps(value).encode()


def test_local_and_remote_rows() -> None:
    rows = [
        {"name": "llama3:8b", "digest": "d1", "size": 5},
        {"model": "qwen3:480b", "remote_host": "https://ollama.example:443"},
        {"name": "x", "remote_model": "y"},
        {"name": "z", "remote_host": "", "remote_model": None},
    ]
    found = parse_tags(dumps({"models": rows}))
    assert [(one.name, one.is_remote, one.remote_host) for one in found] == [
        ("llama3:8b", False, ""),
        ("qwen3:480b", True, "https://ollama.example:443"),
        ("x", True, ""),
        ("z", False, ""),
    ]
    assert (found[0].digest, found[0].size_bytes) == ("d1", 5)


def test_what_show_says() -> None:
    full = {
        "model_info": {"general.architecture": "llama", "llama.context_length": 4096},
        "capabilities": ["completion", "tools", 3],
    }
    found = parse_show(dumps(full))
    assert (found.is_remote, found.context_tokens) == (False, 4096)
    assert found.capabilities == {"completion", "tools"}
    assert parse_show(dumps({"remote_model": "m"})).is_remote
    assert parse_show(dumps({"remote_host": {"odd": 1}, "remote_model": 0} | {"remote_host": "h"})).is_remote
    assert not parse_show(b"{}").is_remote


def test_running_models() -> None:
    assert parse_ps(dumps({"models": [{"name": "a", "context_length": 9}, {"name": "b"}]})) == {
        "a": 9,
        "b": None,
    }


@pytest.mark.parametrize(
    "bad", [{}, {"models": {}}, {"models": [3]}, {"models": [{}]}, {"models": [{"name": 3}]}]
)
def test_garbled_lists_are_refused(bad: object) -> None:
    with pytest.raises(BadRequest):
        parse_tags(dumps(bad))


@pytest.mark.parametrize("value", [3, [], {}, True, 0, False])
def test_a_remote_host_of_an_odd_kind_is_never_local(value: object) -> None:
    """What cannot be understood is refused or counts as remote; 0 and False are odd, too."""
    try:
        assert parse_show(dumps({"remote_host": value})).is_remote
    except BadRequest as exc:
        assert exc.where == "remote_host"  # noqa: PT017 - either is right


@given(st.binary(max_size=60))
def test_any_bytes_are_refused(untrusted: bytes) -> None:
    for parse in (parse_tags, parse_ps):
        with pytest.raises(BadRequest):
            parse(untrusted)


def test_the_question_is_json() -> None:
    assert json.loads(encode_show('a"b')) == {"model": 'a"b'}


def test_what_ollama_says_of_its_version() -> None:
    assert is_version(b'{"version": "0.13.1"}')
    for other in (b"{}", b'{"version": 3}', b'"0.13"', b"<html>", b'{"version": ', b"\xff"):
        assert not is_version(other)
