import base64
import json
import struct
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mycoswarmd.errors import (
    BadRequest,
    Denied,
    EngineError,
    MycoswarmError,
    NotFound,
    PolicyInvalid,
    Problem,
    Unauthenticated,
    Unavailable,
)
from mycoswarmd.wire.openai import (
    ChunkEncoder,
    encode_answer,
    encode_embeddings,
    encode_error,
    encode_models,
    parse_chat,
    parse_completion,
    parse_embedding,
)
from mycoswarmd.wire.prompt import (
    Answer,
    Delta,
    Embeddings,
    Finish,
    Prompt,
    PromptKind,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)

MARKER = "SECRET-MARKER"
TOOL = {"type": "function", "function": {"name": "get", "description": "d", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "get", "arguments": "{}"}}


def body(**more: object) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": MARKER}], **more}


def chat(**more: object) -> Prompt:
    return parse_chat(json.dumps(body(**more)).encode())


def test_a_full_chat_is_parsed() -> None:
    prompt = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                "name": "anna",
            },
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "42"},
        ],
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "get"}},
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
        stream=True,
        stream_options={"include_usage": True},
        max_completion_tokens=5,
        temperature=0,
        stop="x",
        seed=7,
        user="dropped",
        store=True,
        anything={"at": "all"},
        n=1,
        logprobs=False,
        logit_bias={},
    )
    assert prompt.kind is PromptKind.CHAT
    assert [one.role for one in prompt.messages] == ["system", "user", "assistant", "tool"]
    assert prompt.messages[1].content == "a\nb"
    assert prompt.messages[2].tool_calls == (ToolCall(id="c1", name="get", arguments="{}"),)
    assert prompt.messages[3].tool_call_id == "c1"
    assert prompt.params == {"max_tokens": 5, "temperature": 0, "stop": ["x"], "seed": 7}
    assert prompt.tools[0].name == "get"
    assert prompt.tool_choice == "get"
    assert prompt.response_format is not None
    assert prompt.stream
    assert prompt.include_usage


# Each row: what is sent, and where the error must point.
BAD = [
    ({"model": None}, "model"),
    ({"model": ""}, "model"),
    ({"model": "x" * 300}, "model"),
    ({"model": 3}, "model"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [{}] * 5000}, "messages"),
    ({"messages": ["x"]}, "messages[0]"),
    ({"messages": [{"role": "king", "content": MARKER}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
        "messages[0].content[0].text",
    ),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user", "content": "x", "name": "n" * 65}]}, "messages[0].name"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]},
        "messages[0].tool_calls[0].function",
    ),
    ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "messages[0].tool_calls"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 10**7}, "max_tokens"),
    ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**70}, "seed"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ["a", "x" * 65]}, "stop[1]"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": ""}, "stop[0]"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"presence_penalty": -3}, "presence_penalty"),
    ({"n": 2}, "n"),
    ({"n": True}, "n"),
    ({"logprobs": True}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logit_bias": {"1": 100}}, "logit_bias"),
    ({"functions": []}, "functions"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": []}, "stream_options"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"tools": {}}, "tools"),
    ({"tools": [TOOL] * 129}, "tools"),
    ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
    ({"tools": [{"type": "code"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "auto"}}]}, "tools[0].function.name"),
    (
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
        "tools[0].function.parameters",
    ),
    ({"tool_choice": "always"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"function": {"name": "other"}}, "tools": [TOOL]}, "tool_choice.function.name"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": 1}}},
        "response_format.json_schema.schema",
    ),
]


@pytest.mark.parametrize(("change", "where"), BAD, ids=[f"{where}-{i}" for i, (_, where) in enumerate(BAD)])
def test_a_bad_field_is_refused_by_name(change: dict[str, object], where: str) -> None:
    with pytest.raises(BadRequest) as caught:
        chat(**change)
    assert caught.value.where == where
    assert MARKER not in str(caught.value)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.text(max_size=3)
    | st.sampled_from(["user", "text", "function"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "function", "name", "id"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@settings(max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from([*body(), "tools", "tool_choice", "response_format", "stop", "input", "prompt"]), JSON
    )
)
def test_any_json_parses_or_is_a_bad_request(change: dict[str, object]) -> None:
    for parse in (parse_chat, parse_completion, parse_embedding):
        with suppress(BadRequest):
            assert parse(json.dumps({**body(), **change}).encode()).model


def test_plain_text_is_no_format() -> None:
    assert chat(response_format={"type": "text"}).response_format is None
    assert chat(response_format={"type": "json_object"}).response_format == {"type": "json_object"}
    text = parse_completion(b'{"model": "m", "prompt": "x"}')
    assert ChunkEncoder(text, id="x", created_s=9).encode(ReasoningDelta("hm")) == b""


def test_completions() -> None:
    prompt = parse_completion(b'{"model": "m", "prompt": ["Once"], "max_tokens": 3, "messages": 5}')
    assert (prompt.kind, prompt.text, prompt.params) == (PromptKind.TEXT, "Once", {"max_tokens": 3})
    for bad in (["a", "b"], [1, 2], None, [[1]]):
        with pytest.raises(BadRequest):
            parse_completion(json.dumps({"model": "m", "prompt": bad}).encode())
    for extra in ({"echo": True}, {"suffix": "x"}, {"best_of": 2}, {"logprobs": 1}):
        with pytest.raises(BadRequest) as caught:
            parse_completion(json.dumps({"model": "m", "prompt": "x", **extra}).encode())
        assert caught.value.where == next(iter(extra))


def test_embeddings_are_parsed_and_packed() -> None:
    prompt = parse_embedding(b'{"model": "m", "input": ["a", "b"], "encoding_format": "base64"}')
    assert prompt.inputs == ("a", "b")
    answer = Embeddings(vectors=((1.0, -2.5), (0.0, 3.25)), usage=Usage(4, 0))
    packed = json.loads(encode_embeddings(prompt, answer))
    assert packed["model"] == "m"
    assert packed["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    assert struct.unpack("<2f", base64.b64decode(packed["data"][0]["embedding"])) == (1.0, -2.5)
    plain = json.loads(encode_embeddings(parse_embedding(b'{"model": "m", "input": "a"}'), answer))
    assert plain["data"][1] == {"object": "embedding", "index": 1, "embedding": [0.0, 3.25]}
    for bad in ("", [], [""], [1, 2], None, ["x"] * 2049):
        with pytest.raises(BadRequest):
            parse_embedding(json.dumps({"model": "m", "input": bad}).encode())
    for extra in ({"encoding_format": "int8"}, {"dimensions": 5}):
        with pytest.raises(BadRequest):
            parse_embedding(json.dumps({"model": "m", "input": "x", **extra}).encode())


def test_an_answer_names_the_model_that_was_asked_for() -> None:
    answer = Answer(text="hi", reasoning="hm", finish="stop", usage=Usage(1, 2, 1))
    done = json.loads(encode_answer(chat(), answer, id="x", created_s=9))
    assert (done["model"], done["id"], done["created"], done["object"]) == ("m", "x", 9, "chat.completion")
    assert done["choices"][0]["message"]["content"] == "hi"
    assert done["choices"][0]["message"]["reasoning_content"] == "hm"
    assert done["usage"]["total_tokens"] == 3
    calls = Answer(
        text="",
        tool_calls=(ToolCall(id="c", name="get", arguments="{}"),),
        finish="tool_calls",
        usage=Usage(1, 2),
    )
    message = json.loads(encode_answer(chat(), calls, id="x", created_s=9))["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"] == [
        {"id": "c", "type": "function", "function": {"name": "get", "arguments": "{}"}}
    ]
    text = parse_completion(b'{"model": "m", "prompt": "x"}')
    assert json.loads(encode_answer(text, answer, id="x", created_s=9))["choices"][0]["text"] == "hi"


def chunks(prompt: Prompt, *deltas: Delta) -> list[dict[str, Any]]:
    encoder = ChunkEncoder(prompt, id="x", created_s=9)
    events = [event for delta in deltas if (event := encoder.encode(delta))]
    assert all(
        event.startswith(b"data: ") and event.endswith(b"\n\n") and event.count(b"\n") == 2
        for event in events
    )
    assert encoder.done() == b"data: [DONE]\n\n"
    return [json.loads(event[6:]) for event in events]


def test_chunks_carry_every_kind_of_delta() -> None:
    deltas = (
        ReasoningDelta("hm"),
        TextDelta('a"\n\u2028\ud83d'),
        ToolCallDelta(0, "c", "get", "{"),
        ToolCallDelta(0, None, None, "}"),
        Finish("stop"),
        Usage(1, 2),
    )
    found = chunks(chat(stream_options={"include_usage": True}), *deltas)
    assert [one["choices"][0]["delta"] if one["choices"] else None for one in found] == [
        {"role": "assistant", "reasoning_content": "hm"},
        {"content": 'a"\n\u2028\ud83d'},
        {
            "tool_calls": [
                {"index": 0, "id": "c", "type": "function", "function": {"name": "get", "arguments": "{"}}
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]},
        {},
        None,
    ]
    assert [one["usage"] for one in found[:-1]] == [None] * 5
    assert found[-1]["usage"]["completion_tokens"] == 2
    assert {one["model"] for one in found} == {"m"}
    assert found[4]["choices"][0]["finish_reason"] == "stop"
    without = chunks(chat(), *deltas)
    assert len(without) == 5
    assert "usage" not in without[0]
    text = chunks(parse_completion(b'{"model": "m", "prompt": "x"}'), *deltas[1:2], *deltas[4:])
    assert [one["choices"][0]["text"] for one in text] == ['a"\n\u2028\ud83d', ""]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BadRequest("bad-request", "cannot x", where="a.b"), "invalid_request_error"),
        (NotFound("n", "cannot x"), "invalid_request_error"),
        (Denied("policy-denied", "cannot x", rule="r", where="f:3"), "permission_error"),
        (PolicyInvalid((Problem(path="p", line=2, message="bad"),)), "permission_error"),
        (Unauthenticated("u", "cannot x"), "authentication_error"),
        (Unavailable("engine-down", "cannot x", hint="wait"), "overloaded_error"),
        (EngineError("engine-failed", "cannot x"), "server_error"),
    ],
)
def test_errors_have_openais_shape(error: MycoswarmError, kind: str) -> None:
    found = json.loads(encode_error(error))["error"]
    assert (found["code"], found["type"], found["hint"]) == (error.code, kind, error.hint)
    assert found["message"].startswith(error.message)
    if isinstance(error, BadRequest):
        assert found["param"] == found["where"] == "a.b"
    if isinstance(error, Denied) and not isinstance(error, PolicyInvalid):
        assert (found["rule"], found["where"]) == ("r", "f:3")
    if isinstance(error, PolicyInvalid):
        assert found["problems"][0]["line"] == 2


def test_the_list_of_models() -> None:
    assert json.loads(encode_models([("m", 5, "embedded")])) == {
        "object": "list",
        "data": [{"id": "m", "object": "model", "created": 5, "owned_by": "embedded"}],
    }
