"""What a body is said to take of memory is at least what it takes."""

import asyncio
import json
import tracemalloc
from collections.abc import Callable

import pytest

from mycoswarmd.api.room import BodyRoom, Size, weigh
from mycoswarmd.errors import BadRequest, Unavailable
from mycoswarmd.wire.openai import parse_chat
from mycoswarmd.wire.upstream import encode_request


def chat(content: str) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": content}]}
    return json.dumps(body, ensure_ascii=False).encode()


def schema(item: Callable[[int], str], count: int, *, around: str = "[]") -> bytes:
    """Return a prompt with a tool whose schema has so many items."""
    whole = around[0] + ",".join(map(item, range(count))) + around[1]
    tool = '{"type":"function","function":{"name":"f","parameters":{"type":"object","x":' + whole + "}}}"
    return ('{"model":"m","messages":[{"role":"user","content":"x"}],"tools":[' + tool + "]}").encode()


BODIES = {
    "text": chat("x" * 4_000_000),
    "one wide character": chat("x" * 4_000_000 + "\U0001f344"),
    "escapes": chat("\n" * 2_000_000),
    "wide text": chat("\U0001f344" * 1_000_000),
    "objects": schema(lambda _: "{}", 150_000),
    "lists": schema(lambda _: "[]", 150_000),
    "objects with a key": schema(lambda _: '{"a":1}', 60_000),
    "objects with their own keys": schema(lambda n: f'{{"k{n}":1}}', 60_000),
    "keys": schema(lambda n: f'"k{n}":0', 100_000, around="{}"),
    "short texts": schema(lambda n: f'"{n}"', 400_000),
    "numbers": schema(lambda n: f"{n}.5", 400_000),
    "messages": json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": str(n)} for n in range(4000)]}
    ).encode(),
}


@pytest.mark.parametrize("name", BODIES)
def test_no_body_takes_more_than_it_weighs(name: str) -> None:
    weight_bytes = weigh(BODIES[name])
    tracemalloc.start()
    try:
        body = bytes(bytearray(BODIES[name]))
        prompt = parse_chat(body)
        sent = encode_request(prompt, stream=True)
        held_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sent and held_bytes <= weight_bytes, (held_bytes, weight_bytes)
    # And not so much more that nobody would have room.
    assert weight_bytes < 6.5 * held_bytes


@pytest.mark.parametrize(
    "body",
    [
        schema(lambda n: f'"k{n}":{{}}', 200_000, around="{}"),
        schema(lambda _: "[]", 400_000),
        b'"' + b":" * 300_000 + b'"' + b'"' * 300_000,
        b'"\\"' + b":" * 300_000,
    ],
    ids=["keys", "lists", "more texts than there may be", "a text without an end"],
)
def test_what_would_mostly_be_objects_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        weigh(body)
    assert (caught.value.code, caught.value.http_status) == ("too-intricate", 413)


@pytest.mark.parametrize("text", ['{"a": [1, 2]}', '\\"{:,}\\"', "\\\\", '"'], ids=str)
def test_signs_in_a_text_are_no_objects(text: str) -> None:
    assert weigh(chat(text * 600_000)) <= 8 * len(chat(text * 600_000))


async def test_who_holds_room_is_given_more_only_where_there_is_some() -> None:
    room = BodyRoom(Size(100, 150), patience_s=0.05)
    async with room.taken("anna", 60) as keep:
        await keep(90)
        async with room.taken("bert", 50):
            with pytest.raises(Unavailable):
                await keep(110)
            await keep(20)
            async with room.taken("anna", 80):
                with pytest.raises(Unavailable):
                    async with room.taken("carl", 1):
                        raise AssertionError
            await asyncio.sleep(0)
        await keep(100)
    async with room.taken("carl", 150), asyncio.timeout(60):
        pass


def test_what_is_larger_than_its_callers_part_leaves_others_theirs() -> None:
    room = BodyRoom(Size(100, 200), patience_s=0)
    with room.taken_now("anna", 5000):
        with pytest.raises(Unavailable), room.taken_now("anna", 1):
            raise AssertionError
        with room.taken_now("bert", 90), pytest.raises(Unavailable), room.taken_now("carl", 20):
            raise AssertionError
        with room.taken_now("carl", 5000):
            pass
    assert not room._of
