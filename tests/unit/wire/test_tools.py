import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycoswarmd.errors import BadRequest, EngineError
from mycoswarmd.wire.openai import parse_chat, parse_completion
from mycoswarmd.wire.prompt import (
    Answer,
    Delta,
    Finish,
    Prompt,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from mycoswarmd.wire.tools import TranslateCalls, compile_tools, deltas_of
from mycoswarmd.wire.toolschema import MAX_STRING_CHARS, bounded_schema, sample

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["c", "f"]}},
    "required": ["city"],
}


def tool(
    name: str, parameters: object = None, description: str = "Get the weather for a city"
) -> dict[str, object]:
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


def ask(**more: object) -> Prompt:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [tool("weather", WEATHER)],
        **more,
    }
    return parse_chat(json.dumps(body).encode())


def schema_of(prompt: Prompt) -> list[Any]:
    spec: Any = prompt.response_format
    assert spec is not None
    options = spec["json_schema"]["schema"]["anyOf"]
    assert isinstance(options, list)
    return options


def names(prompt: Prompt) -> list[str]:
    return [one["properties"]["tool"]["const"] for one in schema_of(prompt)]


def test_tools_become_one_schema_with_examples() -> None:
    compiled = compile_tools(
        ask(tools=[tool("weather", WEATHER), tool("stop", None, "Stop it.")], tool_choice="required")
    )
    assert compiled.tools == ()
    assert names(compiled) == ["weather", "stop"]
    arguments = schema_of(compiled)[0]["properties"]["arguments"]
    assert arguments["properties"]["city"] == {"type": "string", "maxLength": MAX_STRING_CHARS}
    assert arguments["additionalProperties"] is False
    assert schema_of(compiled)[1]["properties"]["arguments"]["properties"] == {}
    system, *shots, last = compiled.messages
    assert "- weather(city, unit): Get the weather for a city" in system.content
    assert [(one.role, one.content) for one in shots] == [
        ("user", "Get the weather for Rome"),
        ("assistant", '{"tool": "weather", "arguments": {"city": "Rome"}}'),
        ("user", "Stop it"),
        ("assistant", '{"tool": "stop", "arguments": {}}'),
    ]
    assert last.content == "hi"
    assert compiled.params["max_tokens"] == 1024


def test_the_tools_own_example_is_used_and_the_callers_limit_kept() -> None:
    own = {**WEATHER, "examples": [{"city": "Oslo", "unit": "c"}]}
    compiled = compile_tools(ask(tools=[tool("weather", own)], tool_choice="required", max_tokens=7))
    assert compiled.messages[1].content == "Get the weather for Oslo: c"
    assert compiled.params["max_tokens"] == 7
    odd = compile_tools(ask(tools=[tool("weather", {**WEATHER, "examples": ["Oslo"]})]))
    assert odd.messages[3].content == "Get the weather for a city"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", ["weather", "other", "answer"]),
        ("required", ["weather", "other"]),
        ({"function": {"name": "other"}}, ["other"]),
    ],
)
def test_the_choice_decides_what_is_offered(choice: object, expected: list[str]) -> None:
    prompt = ask(tools=[tool("weather", WEATHER), tool("other")], tool_choice=choice)
    assert names(compile_tools(prompt)) == expected


def test_no_tools_no_schema() -> None:
    none = compile_tools(ask(tool_choice="none"))
    assert (none.tools, none.response_format) == ((), None)
    assert none.messages == ask().messages
    plain = ask(tools=None)
    assert compile_tools(plain) is plain
    text = parse_completion(b'{"model": "m", "prompt": "x"}')
    assert compile_tools(text) is text
    assert TranslateCalls(text).feed(TextDelta("x")) == [TextDelta("x")]


def test_the_made_up_tool_avoids_real_names() -> None:
    assert names(compile_tools(ask(tools=[tool("answer"), tool("answer_")]))) == [
        "answer",
        "answer_",
        "answer__",
    ]


def test_a_response_format_with_tools_is_refused() -> None:
    with pytest.raises(BadRequest) as caught:
        compile_tools(ask(response_format={"type": "json_object"}))
    assert caught.value.where == "response_format"


def test_earlier_calls_are_said_in_words() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [call, {**call, "id": "c2"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
        {"role": "user", "content": "And now?"},
    ]
    spelled = '{"tool": "weather", "arguments": {"city": "Oslo"}}'
    compiled = compile_tools(ask(messages=turns))
    assert compiled.messages[0].content.endswith("\n\nBe kind.")
    assert [(one.role, one.content) for one in compiled.messages[-5:]] == [
        ("user", "Oslo?"),
        ("assistant", f"{spelled}\n{spelled}"),
        ("user", "Result of weather:\nrain"),
        ("assistant", '{"tool": "answer", "arguments": {"text": "It rains."}}'),
        ("user", "And now?"),
    ]
    bare = compile_tools(ask(messages=turns, tools=None))
    assert [one.role for one in bare.messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert bare.messages[4].content == "It rains."
    assert bare.response_format is None


def whole(text: str, *, finish: str = "stop", **more: object) -> Answer:
    return TranslateCalls(ask(**more)).answer(Answer(text=text, finish=finish, usage=Usage(1, 2)))


def streamed(pieces: list[str], *, finish: str = "stop", **more: object) -> list[Delta]:
    translate = TranslateCalls(ask(**more))
    deltas: list[Delta] = [*map(TextDelta, pieces), Finish(finish), Usage(1, 2)]
    return [own for delta in deltas for own in translate.feed(delta)]


def test_a_call_comes_back_as_a_call() -> None:
    found = whole(' {"tool": "weather", "arguments": {"city": "Köln"}}')
    assert found.finish == "tool_calls"
    assert found.text == ""
    assert found.tool_calls[0].name == "weather"
    assert json.loads(found.tool_calls[0].arguments) == {"city": "Köln"}
    assert found.tool_calls[0].id.startswith("call_")


def test_words_come_back_as_words() -> None:
    found = whole('{"tool": "answer", "arguments": {"text": "It is \\"fine\\"."}}')
    assert (found.text, found.tool_calls, found.finish) == ('It is "fine".', (), "stop")
    assert whole("just text").text == "just text"
    assert whole('{"city": "Oslo"}').text == '{"city": "Oslo"}'  # the engine ignored the schema
    assert whole('{"tool": "answer", "arguments": {"text": "It is', finish="length").text == "It is"


def test_half_a_call_is_nothing() -> None:
    found = whole('{"tool": "weather", "arguments": {"ci', finish="length")
    assert (found.text, found.tool_calls, found.finish) == ("", (), "length")


@pytest.mark.parametrize(
    "text", ["no", '{"tool": "rm", "arguments": {}}', '{"tool": "answer", "arguments": {"text": "x"}}']
)
def test_a_required_call_that_is_missing_is_an_error(text: str) -> None:
    with pytest.raises(EngineError):
        whole(text, tool_choice="required")
    with pytest.raises(EngineError):
        streamed([text], tool_choice="required")


CALL = '{"tool": "weather", "arguments": {"city": "Köln"}}'
WORDS = '{ "tool" : "answer",\n"arguments": {"text": "a\\n\\u00e9\\ud83d\\ude00 \\"q\\" ü\\\\"}} '
SAID = 'a\né😀 "q" ü\\'


def joined(deltas: list[Delta]) -> str:
    return "".join(one.text for one in deltas if isinstance(one, TextDelta))


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_streams_are_translated_however_they_are_cut(step: int) -> None:
    words = streamed([WORDS[i : i + step] for i in range(0, len(WORDS), step)])
    assert joined(words) == SAID
    assert words[-2:] == [Finish("stop"), Usage(1, 2)]
    call = streamed([CALL[i : i + step] for i in range(0, len(CALL), step)])
    assert isinstance(call[0], ToolCallDelta)
    assert (call[0].name, json.loads(call[0].arguments)) == ("weather", {"city": "Köln"})
    assert call[1:] == [Finish("tool_calls"), Usage(1, 2)]


def test_words_stream_as_they_come() -> None:
    translate = TranslateCalls(ask())
    assert translate.feed(TextDelta('{"tool": "answer", "arguments": {"text": "')) == []
    assert translate.feed(TextDelta("It ")) == [TextDelta("It ")]
    assert translate.feed(ReasoningDelta("hm")) == [ReasoningDelta("hm")]
    assert translate.feed(TextDelta('is"}}')) == [TextDelta("is")]


@given(
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30), st.integers(1, 9), st.booleans()
)
def test_any_words_survive_the_way_there_and_back(text: str, step: int, ascii_only: bool) -> None:
    said = json.dumps({"tool": "answer", "arguments": {"text": text}}, ensure_ascii=ascii_only)
    assert whole(said).text == text
    assert joined(streamed([said[i : i + step] for i in range(0, len(said), step)])) == text


@given(st.text(max_size=40), st.sampled_from(["stop", "length"]))
def test_any_text_is_translated(text: str, finish: str) -> None:
    assert whole(text, finish=finish).finish in {"stop", "length", "tool_calls"}
    assert streamed(list(text), finish=finish)[-1] == Usage(1, 2)


def test_plain_text_streams_through() -> None:
    assert joined(streamed(["  He", "llo", " {"])) == "  Hello {"


def test_an_endless_call_is_refused() -> None:
    with pytest.raises(EngineError):
        streamed(['{"tool": "weather", "x": "' + "x" * (1 << 19)] * 3)


def test_ids_differ_between_turns() -> None:
    longer = [{"role": "user", "content": "hi"}, {"role": "user", "content": "again"}]
    assert whole(CALL).tool_calls[0].id != whole(CALL, messages=longer).tool_calls[0].id


def test_a_whole_answer_as_deltas() -> None:
    found = deltas_of(
        Answer(text="a", reasoning="r", tool_calls=whole(CALL).tool_calls, finish="stop", usage=Usage(1, 2))
    )
    assert [type(one) for one in found] == [ReasoningDelta, TextDelta, ToolCallDelta, Finish, Usage]


def test_schemas_are_bounded_and_resolved() -> None:
    schema = {
        "type": "object",
        "$defs": {
            "place": {
                "type": "object",
                "properties": {"zip": {"type": "string", "maxLength": 5, "minLength": 9}},
            }
        },
        "properties": {
            "where": {"$ref": "#/$defs/place"},
            "many": {
                "type": "array",
                "items": {"type": "integer", "minimum": 2},
                "maxItems": 999,
                "minItems": 1,
            },
            "free": {"type": "array"},
            "either": {"type": ["string", "null"], "pattern": "x"},
            "one": {"oneOf": [{"const": 3}, {"type": "number"}]},
            "any": {},
            "odd": 3,
            "implied": {"properties": {"a": {"type": "boolean"}}},
        },
        "required": ["many", "nothing"],
    }
    text = {"type": "string", "maxLength": MAX_STRING_CHARS}
    found: Any = bounded_schema(schema, where="t")
    assert found["properties"] == {
        "where": {
            "type": "object",
            "properties": {"zip": {"type": "string", "minLength": 5, "maxLength": 5}},
            "required": [],
            "additionalProperties": False,
        },
        "many": {"type": "array", "items": {"type": "integer", "minimum": 2}, "minItems": 1, "maxItems": 16},
        "free": {"type": "array", "items": text, "maxItems": 16},
        "either": {"anyOf": [text, {"type": "null"}]},
        "one": {"anyOf": [{"const": 3}, {"type": "number"}]},
        "any": text,
        "odd": text,
        "implied": {
            "type": "object",
            "properties": {"a": {"type": "boolean"}},
            "required": [],
            "additionalProperties": False,
        },
    }
    assert found["required"] == ["many"]
    assert sample(found) == {"many": [2]}
    everything: Any = {**found, "required": list(found["properties"])}
    assert sample(everything) == {
        "where": {"zip": "examp"},
        "many": [2],
        "free": ["example"],
        "either": "example",
        "one": 3,
        "any": "example",
        "odd": "example",
        "implied": {"a": True},
    }
    assert sample({"type": "null"}) is None


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/nowhere"},
        {"$ref": "http://example.com/x"},
        {"$ref": 3},
        {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"},
    ],
)
def test_a_schema_that_leads_nowhere_is_refused(schema: dict[str, object]) -> None:
    with pytest.raises(BadRequest):
        bounded_schema(schema, where="t")


def test_what_is_no_object_becomes_one() -> None:
    assert bounded_schema({"type": "string"}, where="t")["type"] == "object"
