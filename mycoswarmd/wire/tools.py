"""Tool calls for models that know no tools: one JSON schema and a few examples, and the way back.

Why: a real server silently drops `tools` when the model's template has none, and a "required" choice
gave 0 of 20 valid calls; constrained decoding with one example per tool gave 20 of 20 from a model
of 135 million parameters. The model answers with one object, {"tool": NAME, "arguments": {...}}; an
optional answer in words is one more, made-up tool, whose argument is the answer's text.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace

from mycoswarmd.errors import BadRequest, EngineError
from mycoswarmd.wire.prompt import (
    Answer,
    Delta,
    Finish,
    Message,
    Prompt,
    PromptKind,
    ReasoningDelta,
    TextDelta,
    Tool,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from mycoswarmd.wire.toolschema import MAX_STRING_CHARS, bounded_schema, sample

# Where a prompt sets no bound: a call with the longest string that the schema permits, twice over.
DEFAULT_MAX_TOKENS = 1024
# A description is for telling tools apart; a small model drowns in more.
_MAX_DESCRIPTION_CHARS = 300
# What one answer in this form can be at most, for a stream that is collected.
_MAX_CALL_CHARS = 1 << 20
_ANSWER = "answer"
_ANSWER_TEXT = "text"
_ANSWER_SCHEMA: Mapping[str, object] = {
    "type": "object",
    "properties": {_ANSWER_TEXT: {"type": "string", "maxLength": MAX_STRING_CHARS}},
    "required": [_ANSWER_TEXT],
    "additionalProperties": False,
}


def compile_tools(prompt: Prompt) -> Prompt:
    """Return the prompt for a model without tools; the same prompt where it has nothing of tools."""
    if prompt.kind is not PromptKind.CHAT:
        return prompt
    tools = _offered(prompt)
    has_calls = any(one.tool_calls or one.role == "tool" for one in prompt.messages)
    if not tools and not has_calls:
        return prompt if not prompt.tools else replace(prompt, tools=(), tool_choice="auto")
    messages = _without_calls(prompt)
    params = {key: value for key, value in prompt.params.items() if key != "parallel_tool_calls"}
    if not tools:
        return replace(prompt, messages=messages, params=params, tools=(), tool_choice="auto")
    if prompt.response_format is not None:
        raise BadRequest(
            "bad-request",
            f"cannot combine tools and response_format: model {prompt.model[:80]!r} has no tools of its own",
            hint="set tool_choice to none, or leave one of the two out",
            where="response_format",
        )
    schemas = {tool.name: bounded_schema(tool.parameters, where=f"tools.{tool.name}") for tool in tools}
    lines = [f"- {tool.name}({', '.join(_names(schemas[tool.name]))}): {_brief(tool)}" for tool in tools]
    if _may_answer(prompt):
        name = _answer_name(prompt)
        schemas[name] = dict(_ANSWER_SCHEMA)
        lines.append(f"- {name}({_ANSWER_TEXT}): Answer the user in words, when no other tool is needed")
    params.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
    return replace(
        prompt,
        messages=_with_examples(prompt, messages, tools, schemas, lines),
        params=params,
        tools=(),
        tool_choice="auto",
        response_format=_format(schemas),
    )


def _offered(prompt: Prompt) -> tuple[Tool, ...]:
    if prompt.tool_choice == "none":
        return ()
    if prompt.tool_choice in {"auto", "required"}:
        return prompt.tools
    return tuple(tool for tool in prompt.tools if tool.name == prompt.tool_choice)


def _may_answer(prompt: Prompt) -> bool:
    return prompt.tool_choice == "auto"


def _answer_name(prompt: Prompt) -> str:
    """Return the made-up tool's name: one that no real tool has."""
    name = _ANSWER
    while any(tool.name == name for tool in prompt.tools):
        name += "_"
    return name


def _names(schema: Mapping[str, object]) -> list[str]:
    properties = schema.get("properties")
    return list(properties) if isinstance(properties, Mapping) else []


def _brief(tool: Tool) -> str:
    return " ".join(tool.description.split())[:_MAX_DESCRIPTION_CHARS]


def _format(schemas: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    options = [
        {
            "type": "object",
            "properties": {"tool": {"const": name}, "arguments": schema},
            "required": ["tool", "arguments"],
            "additionalProperties": False,
        }
        for name, schema in schemas.items()
    ]
    schema = {"anyOf": options}
    return {"type": "json_schema", "json_schema": {"name": "call", "strict": True, "schema": schema}}


def _spell(name: str, arguments: object) -> str:
    return json.dumps({"tool": name, "arguments": arguments}, ensure_ascii=False)


def _with_examples(
    prompt: Prompt,
    messages: tuple[Message, ...],
    tools: tuple[Tool, ...],
    schemas: Mapping[str, Mapping[str, object]],
    lines: list[str],
) -> tuple[Message, ...]:
    system = "You choose one tool for the user request and answer only with JSON. Tools:\n" + "\n".join(lines)
    if messages and messages[0].role == "system":
        # The caller's own instructions come last: small models heed what is near.
        system = f"{system}\n\n{messages[0].content}"
        messages = messages[1:]
    shots: list[Message] = []
    if _may_answer(prompt):
        shots.append(Message(role="user", content="Hi."))
        greeting = _spell(_answer_name(prompt), {_ANSWER_TEXT: "Hello!"})
        shots.append(Message(role="assistant", content=greeting))
    for tool in tools:
        user, arguments = _example(tool, schemas[tool.name])
        shots.append(Message(role="user", content=user))
        shots.append(Message(role="assistant", content=_spell(tool.name, arguments)))
    return (Message(role="system", content=system), *shots, *messages)


def _example(tool: Tool, schema: Mapping[str, object]) -> tuple[str, object]:
    """Make a request in words and its arguments, from the schema's own examples where it has some."""
    given = tool.parameters.get("examples")
    arguments = given[0] if isinstance(given, list) and given else sample(schema)
    request = (_brief(tool) or tool.name.replace("_", " ")).split(". ")[0].rstrip(".")
    if not isinstance(arguments, Mapping):
        return request, arguments
    left: list[str] = []
    for name, value in arguments.items():
        # "Get the weather for a city" reads best as "Get the weather for Rome".
        shown = _show(value)
        place = re.search(rf"\b(?:an?|the) {re.escape(name)}\b", request)
        if isinstance(value, str) and place is not None:
            request = request[: place.start()] + shown + request[place.end() :]
        else:
            left.append(shown if isinstance(value, str) else f"{name} {shown}")
    return f"{request}: {', '.join(left)}" if left else request, arguments


def _show(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _without_calls(prompt: Prompt) -> tuple[Message, ...]:
    """Say earlier calls and their results in words that any chat template takes."""
    names: dict[str, str] = {}
    said: list[Message] = []
    offers = bool(_offered(prompt))
    for message in prompt.messages:
        if message.role == "tool":
            name = names.get(message.tool_call_id or "", "the tool")
            said.append(Message(role="user", content=f"Result of {name}:\n{message.content}"))
        elif message.tool_calls:
            names |= {call.id: call.name for call in message.tool_calls}
            calls = [_spell(call.name, _loads_or_text(call.arguments)) for call in message.tool_calls]
            said.append(Message(role="assistant", content="\n".join(calls)))
        elif message.role == "assistant" and offers and _may_answer(prompt):
            spelled = _spell(_answer_name(prompt), {_ANSWER_TEXT: message.content})
            said.append(Message(role="assistant", content=spelled))
        else:
            said.append(message)
    return tuple(said)


def _loads_or_text(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


class TranslateCalls:
    """Turns what a model says to a compiled prompt back into tool calls; one per answer.

    An answer in words streams through as it comes. A call is passed on when it is complete: half
    a call is of no use to anybody, and then it was at least well formed.
    """

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._offered = {tool.name for tool in _offered(prompt)} if prompt.kind is PromptKind.CHAT else set()
        self._answer_name = _answer_name(prompt) if _may_answer(prompt) else None
        self._collected = ""
        self._words = _Words(self._answer_name) if self._answer_name is not None else None

    def answer(self, answer: Answer) -> Answer:
        """Translate a whole answer."""
        if not self._offered:
            return answer
        text, call = self._read(answer.text, finish=answer.finish)
        if call is None:
            return replace(answer, text=text)
        return replace(answer, text="", tool_calls=(call,), finish="tool_calls")

    def feed(self, delta: Delta) -> list[Delta]:
        """Translate one piece of a stream."""
        if not self._offered:
            return [delta]
        match delta:
            case TextDelta(text):
                self._collected += text
                if len(self._collected) > _MAX_CALL_CHARS:
                    raise EngineError("no-tool-call", "cannot read the model's tool call: it does not end")
                words = self._words.feed(text) if self._words is not None else ""
                return [TextDelta(words)] if words else []
            case Finish(reason):
                return self._finish(reason)
            case ReasoningDelta() | ToolCallDelta() | Usage():
                return [delta]

    def _finish(self, reason: str) -> list[Delta]:
        if self._words is not None and self._words.has_begun:
            return [Finish(reason)]
        text, call = self._read(self._collected, finish=reason)
        if call is None:
            return [TextDelta(text), Finish(reason)] if text else [Finish(reason)]
        return [ToolCallDelta(0, call.id, call.name, call.arguments), Finish("tool_calls")]

    def _read(self, text: str, *, finish: str) -> tuple[str, ToolCall | None]:
        """Return either words or a call; a call that was cut off by a token limit is neither."""
        said = _loads_or_text(text)
        match said:
            case {"tool": str(name), "arguments": {**arguments}}:
                if name == self._answer_name:
                    return _show(arguments.get(_ANSWER_TEXT, "")), None
                if name in self._offered:
                    return "", self._call(name, arguments)
            case _:
                pass
        if finish == "length":
            words = _Words(self._answer_name).feed(text) if self._answer_name is not None else ""
            return words, None
        if self._answer_name is None:
            raise EngineError(
                "no-tool-call",
                f"cannot use the answer of model {self._prompt.model[:80]!r}: it made no tool call",
                hint="the engine may not support response_format json_schema",
            )
        return text, None  # the engine ignored the schema; words are words

    def _call(self, name: str, arguments: object) -> ToolCall:
        spelled = json.dumps(arguments, ensure_ascii=False)
        # Nothing here is random; the conversation's length keeps ids apart from those before.
        seed = f"{len(self._prompt.messages)}:{name}:{spelled}"
        digest = hashlib.sha256(seed.encode("utf-8", "surrogatepass")).hexdigest()
        return ToolCall(id=f"call_{digest[:24]}", name=name, arguments=spelled)


class _Words:
    """Reads the text out of an answer in words, as it grows.

    Attributes:
        has_begun: whether any of it was passed on.
    """

    def __init__(self, name: str) -> None:
        parts = (
            "{",
            '"tool"',
            ":",
            json.dumps(name),
            ",",
            '"arguments"',
            ":",
            "{",
            f'"{_ANSWER_TEXT}"',
            ":",
            '"',
        )
        self._head = re.compile("".join(r"\s*" + re.escape(part) for part in parts))
        self._pending = ""
        self._is_plain = False
        self._is_ended = False
        self.has_begun = False

    def feed(self, text: str) -> str:
        """Return the words that are certain by now."""
        if self._is_plain or self._is_ended:
            return text if self._is_plain else ""
        self._pending += text
        if not self.has_begun:
            start = self._pending.lstrip()
            if start and not start.startswith("{"):  # not our form at all: it is passed on as it is
                self._is_plain = self.has_begun = True
                return self._pending
            head = self._head.match(self._pending)
            if head is None:
                return ""
            self._pending = self._pending[head.end() :]
            self.has_begun = True
        return self._decode()

    def _decode(self) -> str:
        """Take the longest prefix of the pending text that is whole characters of a JSON string."""
        taken = _WHOLE.match(self._pending)
        assert taken is not None  # the pattern matches the empty text
        body, self._pending = taken.group(), self._pending[taken.end() :]
        self._is_ended = self._pending.startswith('"')
        return str(json.loads(f'"{body}"', strict=False))


# Plain characters and whole escapes. Half of a surrogate pair waits for its other half.
_WHOLE = re.compile(
    r'(?:[^"\\]|\\["\\/bfnrt]|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}'
    r"|\\u(?![dD][89abAB])[0-9a-fA-F]{4})*"
)


def deltas_of(answer: Answer) -> list[Delta]:
    """Return a whole answer as the pieces of a stream."""
    deltas: list[Delta] = []
    if answer.reasoning:
        deltas.append(ReasoningDelta(answer.reasoning))
    if answer.text:
        deltas.append(TextDelta(answer.text))
    deltas += [
        ToolCallDelta(i, call.id, call.name, call.arguments) for i, call in enumerate(answer.tool_calls)
    ]
    return [*deltas, Finish(answer.finish), answer.usage]
