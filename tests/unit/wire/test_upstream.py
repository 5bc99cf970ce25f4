import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycoswarmd.errors import BadRequest, EngineError, MycoswarmError, NotFound, Unavailable
from mycoswarmd.wire.openai import parse_chat, parse_completion, parse_embedding
from mycoswarmd.wire.prompt import (
    Finish,
    PromptKind,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from mycoswarmd.wire.upstream import (
    ChunkParser,
    encode_request,
    parse_answer,
    parse_embeddings,
    parse_error,
    parse_models,
    parse_props,
)

MARKER = "SECRET-MARKER"
TOKENS = {"prompt_tokens": 3, "completion_tokens": 4}
TOOL = {"type": "function", "function": {"name": "get", "description": "d", "parameters": {"type": "object"}}}


def dumps(value: object) -> bytes:
    return json.dumps(value).encode()


def sent(body: dict[str, object], *, stream: bool = False) -> dict[str, Any]:
    prompt = parse_chat(dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], **body}))
    found = json.loads(encode_request(prompt, stream=stream))
    assert isinstance(found, dict)
    return found


def test_only_known_fields_are_forwarded() -> None:
    assert sent({"user": "u", "temperature": 0.5, "extra": 1, "parallel_tool_calls": False}) == {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "temperature": 0.5,
    }
    with_tools = sent({"tools": [TOOL], "parallel_tool_calls": False}, stream=True)
    assert with_tools["parallel_tool_calls"] is False
    assert with_tools["tool_choice"] == "auto"
    assert with_tools["tools"] == [TOOL]
    assert with_tools["stream_options"] == {"include_usage": True}
    named = sent({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "get"}}})
    assert named["tool_choice"] == {"type": "function", "function": {"name": "get"}}
    named_user = [{"role": "user", "content": "x", "name": "anna"}]
    assert sent({"messages": named_user})["messages"] == named_user
    call = {"id": "c", "type": "function", "function": {"name": "get", "arguments": "{}"}}
    turns = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "r", "tool_call_id": "c"},
    ]
    assert sent({"messages": turns})["messages"] == [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "r", "tool_call_id": "c"},
    ]
    text = parse_completion(b'{"model": "m", "prompt": "x", "max_tokens": 2}')
    assert json.loads(encode_request(text, stream=False)) == {"model": "m", "prompt": "x", "max_tokens": 2}
    vector = parse_embedding(b'{"model": "m", "input": "x", "encoding_format": "base64"}')
    assert json.loads(encode_request(vector, stream=False)) == {
        "model": "m",
        "input": ["x"],
        "encoding_format": "float",
    }


def test_infinity_in_a_schema_is_refused() -> None:
    schema = b'{"type": "json_schema", "json_schema": {"name": "s", "schema": {"maximum": 1e999}}}'
    prompt = parse_chat(
        b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "response_format": ' + schema + b"}"
    )
    with pytest.raises(BadRequest):
        encode_request(prompt, stream=False)


def test_what_is_sent_on_is_no_larger_than_what_came() -> None:
    text = "Grüße 你好 🍄 " * 1000
    body = json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": text}]}, ensure_ascii=False
    ).encode()
    whole = encode_request(parse_chat(body), stream=False)
    assert len(whole) <= len(body) and json.loads(whole)["messages"][0]["content"] == text
    # Half of a pair is in UTF-8 nothing, and in JSON an escape.
    schema = b'{"type": "json_schema", "json_schema": {"name": "s", "schema": {"const": "\\ud800"}}}'
    odd = parse_chat(
        b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "response_format": ' + schema + b"}"
    )
    assert b'"\\ud800"' in encode_request(odd, stream=False)


def answer(message: object, **more: object) -> bytes:
    return dumps(
        {"choices": [{"message": message, "finish_reason": "stop", **more}], "usage": {"prompt_tokens": 1}}
    )


def test_answers_are_read() -> None:
    call = {"id": "", "function": {"name": "get", "arguments": {"a": 1}}}
    found = parse_answer(
        answer({"content": None, "reasoning_content": "hm", "tool_calls": [call]}), kind=PromptKind.CHAT
    )
    assert found.tool_calls == (ToolCall(id="call_0", name="get", arguments='{"a": 1}'),)
    assert (found.text, found.reasoning, found.finish, found.usage) == ("", "hm", "tool_calls", Usage(1, 0))
    text = parse_answer(b'{"choices": [{"text": "hi", "finish_reason": "eos"}]}', kind=PromptKind.TEXT)
    assert (text.text, text.finish, text.usage) == ("hi", "stop", Usage(0, 0))


@pytest.mark.parametrize(
    "untrusted",
    [
        b"<html>",
        b"[]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [3]}',
        b'{"choices": {}}',
        b'{"choices": [{"message": "x"}]}',
        answer({"content": 3}),
        answer({"content": "\ud800"}),
        answer({"content": "x", "tool_calls": {}}),
        answer({"content": "x", "tool_calls": [{"function": {"name": 3}}]}),
        answer({"content": "x", "tool_calls": [{}] * 200}),
        b'{"choices": [{"message": {"content": "x"}}], "usage": 3}',
        b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": -1}}',
        b'{"choices": [{"message": {"content": "\xff"}}]}',
    ],
)
def test_a_garbled_answer_is_refused(untrusted: bytes) -> None:
    with pytest.raises(BadRequest, match="cannot"):
        parse_answer(untrusted, kind=PromptKind.CHAT)


def chunk(delta: object = None, **more: object) -> bytes:
    return dumps({"choices": [{"delta": delta, "finish_reason": None, **more}]})


def test_chunks_are_read() -> None:
    parser = ChunkParser(PromptKind.CHAT)
    call = {"index": 1, "id": "c", "function": {"name": "get", "arguments": "{"}}
    found = [
        delta
        for data in (
            chunk(None),
            chunk({"role": "assistant", "content": ""}),
            chunk({"reasoning_content": "hm"}),
            chunk({"content": "a"}),
            chunk({"tool_calls": [call]}),
            chunk({"tool_calls": [{"index": 1, "function": {"arguments": "}"}}]}),
            chunk({}, finish_reason="stop"),
            chunk({}, finish_reason="stop"),
            dumps({"choices": [], "usage": {**TOKENS, "prompt_tokens_details": {"cached_tokens": 2}}}),
            b"[DONE]",
        )
        for delta in parser.feed(data)
    ]
    assert found == [
        ReasoningDelta("hm"),
        TextDelta("a"),
        ToolCallDelta(1, "c", "get", "{"),
        ToolCallDelta(1, None, None, "}"),
        Finish("tool_calls"),
    ]
    assert parser.usage == Usage(3, 4, 2)
    assert parser.is_done
    text = ChunkParser(PromptKind.TEXT)
    assert text.feed(b'{"choices": [{"text": "a", "finish_reason": "length"}]}') == [
        TextDelta("a"),
        Finish("length"),
    ]


@pytest.mark.parametrize(
    "untrusted",
    [b"{", b"3", chunk(3), chunk({"content": 3}), chunk({"tool_calls": 3}), b'{"choices": 3}', b"\xff"],
)
def test_a_garbled_chunk_is_refused(untrusted: bytes) -> None:
    with pytest.raises(BadRequest):
        ChunkParser(PromptKind.CHAT).feed(untrusted)


def test_an_error_in_a_stream_is_an_error() -> None:
    with pytest.raises(EngineError):
        ChunkParser(PromptKind.CHAT).feed(dumps({"error": {"message": MARKER, "code": 500}}))


def test_an_endless_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mycoswarmd.wire.upstream.MAX_TEXT_CHARS", 10)
    parser = ChunkParser(PromptKind.CHAT)
    pieces = [chunk({"content": "aaaa"})] * 100
    with pytest.raises(BadRequest):
        [parser.feed(piece) for piece in pieces]


@given(st.binary(max_size=100))
def test_any_bytes_from_an_engine_are_read_or_refused(untrusted: bytes) -> None:
    for read in (
        lambda: parse_answer(untrusted, kind=PromptKind.CHAT),
        lambda: ChunkParser(PromptKind.CHAT).feed(untrusted),
        lambda: parse_embeddings(untrusted, count=1),
        lambda: parse_models(untrusted),
        lambda: parse_props(untrusted),
    ):
        with suppress(BadRequest, EngineError, NotFound, Unavailable):
            assert read() is not None
    assert isinstance(parse_error(500, untrusted), MycoswarmError)


def test_embeddings_keep_their_order() -> None:
    rows = [{"index": 1, "embedding": [3, 4.5]}, {"index": 0, "embedding": [1, 2]}]
    assert parse_embeddings(dumps({"data": rows}), count=2).vectors == ((1, 2), (3, 4.5))


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"index": 0, "embedding": [1]}],
        [{"index": 0, "embedding": [1]}, {"index": 0, "embedding": [1]}],
        [{"index": 0, "embedding": [1]}, {"index": 1, "embedding": [1, 2]}],
        [{"index": 0, "embedding": [1]}, {"index": 9, "embedding": [1]}],
        [{"index": 0, "embedding": ["x"]}, {"index": 1, "embedding": [1]}],
        [{"index": 0, "embedding": [1e300]}, {"index": 1, "embedding": [1]}],
        [{"index": 0}, {"index": 1}],
    ],
)
def test_garbled_vectors_are_refused(rows: list[object]) -> None:
    with pytest.raises(BadRequest):
        parse_embeddings(dumps({"data": rows}), count=2)


def test_lists_of_models() -> None:
    untrusted = dumps(
        {
            "data": [
                {"id": "llama", "meta": {"n_ctx": 4096, "n_ctx_train": 8192, "size": 5}},
                {"id": "vllm", "max_model_len": 32768},
                {"id": "plain", "meta": 3},
            ]
        }
    )
    found = parse_models(untrusted)
    assert [(one.name, one.context_tokens, one.size_bytes) for one in found] == [
        ("llama", 4096, 5),
        ("vllm", 32768, None),
        ("plain", None, None),
    ]
    garbled: list[object] = [
        {},
        {"data": {}},
        {"data": [{}]},
        {"data": [{"id": ""}]},
        {"data": [{"id": "x" * 300}]},
    ]
    for bad in garbled:
        with pytest.raises(BadRequest):
            parse_models(dumps(bad))


def test_props() -> None:
    full = {"default_generation_settings": {"n_ctx": 4096}, "chat_template_caps": {"supports_tools": True}}
    assert (parse_props(dumps(full)).context_tokens, parse_props(dumps(full)).supports_tools) == (4096, True)
    assert (parse_props(b"{}").context_tokens, parse_props(b"{}").supports_tools) == (None, False)


@pytest.mark.parametrize(
    ("status", "error", "kind", "code"),
    [
        (
            400,
            {"code": 400, "type": "exceed_context_size_error", "n_prompt_tokens": 9, "n_ctx": 4},
            BadRequest,
            "context-too-long",
        ),
        (400, {"code": "context_length_exceeded"}, BadRequest, "context-too-long"),
        (404, {"code": "model_not_found"}, NotFound, "model-not-found"),
        (404, {"message": f"model {MARKER} not found"}, NotFound, "model-not-found"),
        (404, None, EngineError, "engine-failed"),
        (400, {"type": "invalid_request_error"}, BadRequest, "bad-request"),
        (501, {"type": "not_supported_error"}, BadRequest, "bad-request"),
        (503, {"type": "unavailable_error"}, Unavailable, "engine-busy"),
        (429, {}, Unavailable, "engine-busy"),
        (500, {"code": 503}, Unavailable, "engine-busy"),
        (500, {"type": f"{MARKER} is no code"}, EngineError, "engine-failed"),
        (302, None, EngineError, "engine-failed"),
        (401, "no", EngineError, "engine-failed"),
    ],
)
def test_errors_are_mapped_and_their_text_is_dropped(
    status: int, error: object, kind: type[MycoswarmError], code: str
) -> None:
    body = error if error is None or isinstance(error, str) else {"message": MARKER, **error}  # type: ignore[dict-item]
    untrusted = b"<html>" if error is None else dumps({"error": body})
    found = parse_error(status, untrusted, engine="e", model="m")
    assert (type(found), found.code) == (kind, code)
    assert MARKER not in str(found)
