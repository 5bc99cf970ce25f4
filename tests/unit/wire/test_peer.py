import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycoswarmd.errors import BadRequest
from mycoswarmd.wire.peer import (
    MAX_BEACONS,
    MAX_MODELS,
    MAX_WORD_BYTES,
    ModelWord,
    Word,
    encode_word,
    parse_word,
)
from mycoswarmd.wire.prompt import PromptKind

BEACON = {"swarm": "a" * 64, "epoch": 0, "signer": "b" * 64, "n": 7, "sig": "c" * 128}
WORD = Word(
    id="abcdefghijklmnopqrstuvwx23",
    version="1.2.3",
    boot=4,
    instance="0123456789abcdef",
    port=7437,
    digest="d" * 64,
    statements=3,
    beacons=(BEACON,),
    tier="small",
    sandbox="full",
    state="yellow",
    uptime_s=60,
    running=1,
    waiting=2,
    models=(
        ModelWord(
            name="qwen2.5:7b",
            kinds=frozenset({PromptKind.CHAT, PromptKind.TEXT}),
            context_tokens=32768,
            native_tools=True,
            loaded=True,
            size_bytes=5_000_000_000,
        ),
        ModelWord(name="bge", kinds=frozenset({PromptKind.EMBEDDING})),
    ),
)


def said(**changes: object) -> dict[str, Any]:
    body = json.loads(encode_word(WORD))
    assert isinstance(body, dict)
    return {**body, **changes}


def model(**changes: object) -> dict[str, Any]:
    return said(models=[{**said()["models"][0], **changes}])


def test_a_word_comes_back_as_it_was_said() -> None:
    line = encode_word(WORD)
    assert b"\n" not in line
    assert parse_word(line) == WORD
    assert parse_word(json.loads(line)) == WORD
    plain = Word(
        id=WORD.id, version="1", boot=0, instance=WORD.instance, port=1, digest="0" * 64, statements=0
    )
    assert parse_word(encode_word(plain)) == plain


def test_a_newer_node_is_understood() -> None:
    body = said(news=1, models=[{**said()["models"][1], "kinds": ["embedding", "speech"], "speed": 3}])
    found = parse_word(body)
    assert found.models == (ModelWord(name="bge", kinds=frozenset({PromptKind.EMBEDDING})),)
    assert not hasattr(found, "news")


def test_what_a_beacon_carries_besides_is_dropped() -> None:
    assert parse_word(said(beacons=[{**BEACON, "more": "x" * 1000}])).beacons == (BEACON,)


BAD: dict[str, dict[str, Any]] = {
    "another version": said(v=2),
    "no id": {key: value for key, value in said().items() if key != "id"},
    "a short id": said(id="abc"),
    "an id in capitals": said(id=WORD.id.upper()),
    "an id with a line feed": said(id=WORD.id[:-1] + "\n"),
    "an escape in the version": said(version="1\x1b[2J"),
    "a boot below zero": said(boot=-1),
    "a boot that is true": said(boot=True),
    "a boot as text": said(boot="4"),
    "an instance of another length": said(instance="0" * 15),
    "port zero": said(port=0),
    "a large port": said(port=65536),
    "a digest that is no hex": said(digest="g" * 64),
    "a state that is no colour": said(state="blue"),
    "a sandbox of another name": said(sandbox="total"),
    "a tier with an escape": said(tier="\x1b[31m"),
    "half a surrogate pair": said(tier="\ud800"),
    "an endless number": said(uptime_s=10**400),
    "models that are no list": said(models={}),
    "a model that is no object": said(models=["m"]),
    "a model without a name": model(name=""),
    "a long name": model(name="m" * 257),
    "a name with a line feed": model(name="a\nb"),
    "kinds that are no list": model(kinds="chat"),
    "a context of none": model(context_tokens=0),
    "a size as text": model(size_bytes="5"),
    "loaded as text": model(loaded="yes"),
    "a model twice": said(models=[said()["models"][0]] * 2),
    "too many models": said(models=[{"name": f"m{i}", "kinds": []} for i in range(MAX_MODELS + 1)]),
    "too many beacons": said(beacons=[BEACON] * (MAX_BEACONS + 1)),
    "a beacon that is no object": said(beacons=["x"]),
    "a beacon with a large signature": said(beacons=[{**BEACON, "sig": "c" * 129}]),
    "a beacon with a short key": said(beacons=[{**BEACON, "signer": "bb"}]),
    "a beacon with a number for a key": said(beacons=[{**BEACON, "signer": 5}]),
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_a_bad_word_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_word(body)
    assert caught.value.code == "bad-word"
    assert caught.value.message.startswith("cannot accept a node's word: ")


@pytest.mark.parametrize(
    "line",
    [b"", b"null", b"[]", b'"x"', b"{", b"\xff", b"[" * 100_000, b'{"v":NaN}', b" " * (MAX_WORD_BYTES + 1)],
)
def test_what_is_no_word_at_all_is_refused(line: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_word(line)
    assert caught.value.code == "bad-word"


def test_what_nobody_would_take_is_not_said() -> None:
    odd = tuple(replace(WORD.models[0], name=name) for name in ("", "a\nb", "\x1b[2J", "m" * 257, "good"))
    assert [one.name for one in parse_word(encode_word(replace(WORD, models=odd))).models] == ["good"]
    many = tuple(replace(WORD.models[0], name=f"{i}") for i in range(MAX_MODELS + 9))
    assert len(parse_word(encode_word(replace(WORD, models=many))).models) == MAX_MODELS
    large = tuple(replace(WORD.models[0], name=f"{i}" + "é" * 250) for i in range(MAX_MODELS))
    line = encode_word(replace(WORD, models=large, beacons=(BEACON,) * 200))
    assert len(line) <= MAX_WORD_BYTES
    found = parse_word(line)
    assert found.models == large[: MAX_MODELS // 4]
    assert len(found.beacons) == MAX_BEACONS


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@given(key=st.sampled_from([*said(), "models.0"]), value=JSON)
def test_any_value_anywhere_is_taken_or_refused(key: str, value: object) -> None:
    body = said(models=[value]) if key == "models.0" else said(**{key: value})
    with suppress(BadRequest):
        found = parse_word(body)
        assert parse_word(encode_word(found)) == found


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(line: bytes) -> None:
    with suppress(BadRequest):
        raise AssertionError(parse_word(line))
