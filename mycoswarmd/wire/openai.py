"""The OpenAI dialect as we speak it to clients: requests in, answers, chunks and errors out.

Rule: unknown fields are dropped, known ones are checked, and no error repeats text of a prompt.
The model named in an answer is the one that was asked for (M10).
Source: the OpenAI API reference, "Chat completions", "Completions", "Embeddings", "Models".
"""

import base64
import json
import re
import struct
from collections.abc import Iterable

from mycoswarmd.errors import (
    BadRequest,
    Conflict,
    Denied,
    MycoswarmError,
    NotFound,
    PolicyInvalid,
    Unauthenticated,
    Unavailable,
)
from mycoswarmd.wire import params
from mycoswarmd.wire.jsonv import (
    as_bool,
    as_list,
    as_object,
    as_str,
    bad_range,
    bad_value,
    get_bool,
    get_choice,
    get_list,
    get_object,
    get_str,
    opt_str,
    parse_object,
)
from mycoswarmd.wire.prompt import (
    Answer,
    Delta,
    Embeddings,
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

# The body's bound (the caller's) is the real one for text; these keep each part in proportion.
MAX_TEXT_CHARS = 8 << 20
MAX_MESSAGES = 4096
MAX_PARTS = 256
MAX_TOOLS = 128  # OpenAI's own
MAX_TOOL_CALLS = 128
MAX_INPUTS = 2048  # OpenAI's own, for embeddings
MAX_NAME_CHARS = 256
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")
# A Prompt's tool_choice is one of these words or a tool's name, so no tool may be called so.
_CHOICES = ("auto", "none", "required")
_ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name for the same thing
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_ENCODINGS = ("float", "base64")


def parse_chat(untrusted: bytes) -> Prompt:
    """Parse the body of /v1/chat/completions."""
    body = parse_object(untrusted)
    raw = get_list(body, "messages", where="", max_items=MAX_MESSAGES)
    if not raw:
        raise bad_range("messages", "at least one message")
    tools = _parse_tools(body.get("tools"))
    stream, include_usage = _parse_stream(body)
    return Prompt(
        kind=PromptKind.CHAT,
        model=_parse_model(body),
        messages=tuple(_parse_message(one, where=f"messages[{i}]") for i, one in enumerate(raw)),
        params=params.parse_params(body, params.CHAT),
        tools=tools,
        tool_choice=_parse_tool_choice(body.get("tool_choice"), tools),
        response_format=_parse_format(body.get("response_format")),
        stream=stream,
        include_usage=include_usage,
    )


def parse_completion(untrusted: bytes) -> Prompt:
    """Parse the body of /v1/completions."""
    body = parse_object(untrusted)
    value = body.get("prompt")
    where = "prompt"
    if isinstance(value, list) and len(value) == 1:
        value, where = value[0], "prompt[0]"
    if isinstance(value, list):
        raise bad_range(
            where, "one text; send several prompts as several requests, and text instead of tokens"
        )
    stream, include_usage = _parse_stream(body)
    return Prompt(
        kind=PromptKind.TEXT,
        model=_parse_model(body),
        text=as_str(value, where=where, max_len=MAX_TEXT_CHARS),
        params=params.parse_params(body, params.SAMPLING),
        stream=stream,
        include_usage=include_usage,
    )


def parse_embedding(untrusted: bytes) -> Prompt:
    """Parse the body of /v1/embeddings; `params["encoding_format"]` is how the client wants the vectors."""
    body = parse_object(untrusted)
    value = body.get("input")
    inputs: tuple[str, ...]
    if isinstance(value, str):
        inputs = (as_str(value, where="input", min_len=1, max_len=MAX_TEXT_CHARS),)
    else:
        items = as_list(value, where="input", max_items=MAX_INPUTS)
        if not items:
            raise bad_range("input", "at least one text")
        inputs = tuple(
            as_str(one, where=f"input[{i}]", min_len=1, max_len=MAX_TEXT_CHARS) for i, one in enumerate(items)
        )
    encoding = "float"
    if body.get("encoding_format") is not None:
        encoding = get_choice(body, "encoding_format", where="", choices=_ENCODINGS)
    return Prompt(
        kind=PromptKind.EMBEDDING,
        model=_parse_model(body),
        inputs=inputs,
        params={**params.parse_params(body, {}), "encoding_format": encoding},
    )


def _parse_model(body: dict[str, object]) -> str:
    return get_str(body, "model", where="", min_len=1, max_len=MAX_NAME_CHARS)


def _parse_stream(body: dict[str, object]) -> tuple[bool, bool]:
    stream = get_bool(body, "stream", where="", default=False)
    options = body.get("stream_options")
    if options is None:
        return stream, False
    where = "stream_options"
    return stream, get_bool(as_object(options, where=where), "include_usage", where=where, default=False)


def _parse_message(untrusted: object, *, where: str) -> Message:
    obj = as_object(untrusted, where=where)
    role = _ROLES[get_choice(obj, "role", where=where, choices=_ROLES)]
    calls = _parse_calls(obj.get("tool_calls"), where=f"{where}.tool_calls")
    if calls and role != "assistant":
        raise bad_range(f"{where}.tool_calls", "only messages of the assistant to have them")
    call_id = opt_str(obj, "tool_call_id", where=where, max_len=MAX_NAME_CHARS)
    if role == "tool" and not call_id:
        raise bad_value(f"{where}.tool_call_id", "the id of the call that this answers", None)
    content = obj.get("content")
    if content is None and role == "assistant":
        text = ""  # it made calls, or said nothing
    else:
        text = _parse_content(content, where=f"{where}.content")
    return Message(
        role=role,
        content=text,
        tool_calls=calls,
        tool_call_id=call_id if role == "tool" else None,
        name=opt_str(obj, "name", where=where, max_len=64),
    )


def _parse_content(untrusted: object, *, where: str) -> str:
    if isinstance(untrusted, str):
        return as_str(untrusted, where=where, max_len=MAX_TEXT_CHARS)
    if not isinstance(untrusted, list):
        raise bad_value(where, "a string or a list of text parts", untrusted)
    texts = []
    for i, part in enumerate(as_list(untrusted, where=where, max_items=MAX_PARTS)):
        here = f"{where}[{i}]"
        obj = as_object(part, where=here)
        if obj.get("type") != "text":
            raise BadRequest(
                "unsupported-content",
                f"cannot accept {here!r}: only parts of type text are supported",
                where=here,
                hint="send images, audio and files as text, or leave them out",
            )
        texts.append(get_str(obj, "text", where=here, max_len=MAX_TEXT_CHARS))
    return "\n".join(texts)


def _parse_calls(untrusted: object, *, where: str) -> tuple[ToolCall, ...]:
    if untrusted is None:
        return ()
    calls = []
    for i, one in enumerate(as_list(untrusted, where=where, max_items=MAX_TOOL_CALLS)):
        here = f"{where}[{i}]"
        obj = as_object(one, where=here)
        function = get_object(obj, "function", where=here)
        calls.append(
            ToolCall(
                id=get_str(obj, "id", where=here, min_len=1, max_len=MAX_NAME_CHARS),
                name=_tool_name(function, where=f"{here}.function"),
                arguments=get_str(function, "arguments", where=f"{here}.function", max_len=MAX_TEXT_CHARS),
            )
        )
    return tuple(calls)


def _tool_name(function: dict[str, object], *, where: str) -> str:
    name = get_str(function, "name", where=where, max_len=64)
    if not _TOOL_NAME.match(name) or name in _CHOICES:
        raise bad_range(
            f"{where}.name", "1 to 64 letters, digits, _, - or ., and not the word auto, none or required"
        )
    return name


def _parse_tools(untrusted: object) -> tuple[Tool, ...]:
    if untrusted is None:
        return ()
    tools: dict[str, Tool] = {}
    for i, one in enumerate(as_list(untrusted, where="tools", max_items=MAX_TOOLS)):
        here = f"tools[{i}]"
        obj = as_object(one, where=here)
        get_choice(obj, "type", where=here, choices=("function",))
        function = get_object(obj, "function", where=here)
        name = _tool_name(function, where=f"{here}.function")
        if name in tools:
            raise bad_range(f"{here}.function.name", "each tool's name once")
        schema = function.get("parameters")
        tools[name] = Tool(
            name=name,
            description=opt_str(function, "description", where=f"{here}.function", max_len=1 << 16) or "",
            parameters={} if schema is None else as_object(schema, where=f"{here}.function.parameters"),
        )
    return tuple(tools.values())


def _parse_tool_choice(untrusted: object, tools: tuple[Tool, ...]) -> str:
    if untrusted is None:
        return "auto"
    where = "tool_choice"
    if isinstance(untrusted, str):
        if untrusted not in _CHOICES:
            raise bad_range(where, "auto, none, required or a function's name as an object")
        choice = untrusted
    else:
        function = get_object(as_object(untrusted, where=where), "function", where=where)
        choice = _tool_name(function, where=f"{where}.function")
        if choice not in {tool.name for tool in tools}:
            raise bad_range(f"{where}.function.name", "the name of one of `tools`")
    if choice == "required" and not tools:
        raise bad_range(where, "at least one of `tools` to require")
    return choice


def _parse_format(untrusted: object) -> dict[str, object] | None:
    if untrusted is None:
        return None
    where = "response_format"
    obj = as_object(untrusted, where=where)
    kind = get_choice(obj, "type", where=where, choices=("text", "json_object", "json_schema"))
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "json_object"}
    spec = get_object(obj, "json_schema", where=where)
    here = f"{where}.json_schema"
    return {
        "type": "json_schema",
        "json_schema": {
            "name": get_str(spec, "name", where=here, min_len=1, max_len=64),
            "strict": True if spec.get("strict") is None else as_bool(spec["strict"], where=f"{here}.strict"),
            "schema": get_object(spec, "schema", where=here),
        },
    }


def encode_answer(prompt: Prompt, answer: Answer, *, id: str, created_s: int) -> bytes:  # noqa: A002
    """Encode a whole answer to a chat or text prompt."""
    choice: dict[str, object] = {"index": 0, "logprobs": None, "finish_reason": answer.finish}
    if prompt.kind is PromptKind.TEXT:
        choice["text"] = answer.text
    else:
        message: dict[str, object] = {
            "role": "assistant",
            "content": None if answer.tool_calls and not answer.text else answer.text,
            "refusal": None,
        }
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.tool_calls:
            message["tool_calls"] = [encode_call(call) for call in answer.tool_calls]
        choice["message"] = message
    return _dumps(
        {
            "id": id,
            "object": "text_completion" if prompt.kind is PromptKind.TEXT else "chat.completion",
            "created": created_s,
            "model": prompt.model,
            "choices": [choice],
            "usage": _usage(answer.usage),
        }
    )


def encode_call(call: ToolCall) -> dict[str, object]:
    """Return a tool call as the dialect's object."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


class ChunkEncoder:
    """Encodes the pieces of one streamed answer as server-sent events.

    The constant part of a chunk is made once: this runs for every token.
    """

    def __init__(self, prompt: Prompt, id: str, created_s: int) -> None:  # noqa: A002
        self._chat = prompt.kind is not PromptKind.TEXT
        self._include_usage = prompt.include_usage
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        head = json.dumps({"id": id, "object": kind, "created": created_s, "model": prompt.model})
        self._head = f"data: {head[:-1]}, "
        # OpenAI sends `usage: null` in every chunk but the last when usage was asked for.
        self._tail = ', "usage": null}\n\n' if prompt.include_usage else "}\n\n"
        self._role = '"role": "assistant", ' if self._chat else ""

    def encode(self, delta: Delta) -> bytes:
        """Return the delta's event, or b"" for usage that was not asked for."""
        match delta:
            case TextDelta(text):
                return self._piece("content" if self._chat else "text", json.dumps(text))
            case ReasoningDelta(text):
                return self._piece("reasoning_content", json.dumps(text)) if self._chat else b""
            case ToolCallDelta():
                return self._piece("tool_calls", json.dumps([_call_delta(delta)]))
            case Finish(reason):
                return self._choice('"delta": {}' if self._chat else '"text": ""', json.dumps(reason))
            case Usage():
                if not self._include_usage:
                    return b""
                return f'{self._head}"choices": [], "usage": {json.dumps(_usage(delta))}}}\n\n'.encode()

    def _piece(self, key: str, value: str) -> bytes:
        if not self._chat:
            return self._choice(f'"text": {value}', "null")
        role, self._role = self._role, ""
        return self._choice(f'"delta": {{{role}"{key}": {value}}}', "null")

    def _choice(self, content: str, finish: str) -> bytes:
        return (
            f'{self._head}"choices": [{{"index": 0, {content}, "logprobs": null, "finish_reason": {finish}}}]'
            f"{self._tail}"
        ).encode()

    def done(self) -> bytes:
        """Return the event that ends every complete stream."""
        return b"data: [DONE]\n\n"


def _call_delta(delta: ToolCallDelta) -> dict[str, object]:
    if delta.name is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": function}


def encode_models(models: Iterable[tuple[str, int, str]]) -> bytes:
    """Encode the list of models, each as name, Unix time in seconds, and who owns it."""
    data = [
        {"id": name, "object": "model", "created": created_s, "owned_by": owner}
        for name, created_s, owner in models
    ]
    return _dumps({"object": "list", "data": data})


def encode_embeddings(prompt: Prompt, embeddings: Embeddings) -> bytes:
    """Encode vectors, as numbers or as base64 of little-endian 32-bit floats, as was asked."""
    packed = prompt.params.get("encoding_format") == "base64"
    data = [
        {"object": "embedding", "index": i, "embedding": _pack(vector) if packed else vector}
        for i, vector in enumerate(embeddings.vectors)
    ]
    tokens = embeddings.usage.prompt_tokens
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return _dumps({"object": "list", "data": data, "model": prompt.model, "usage": usage})


def _pack(vector: tuple[float, ...]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")


def _usage(usage: Usage) -> dict[str, object]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


# OpenAI's word for each class of error; the first that fits counts.
_TYPES: tuple[tuple[type[MycoswarmError], str], ...] = (
    (Denied, "permission_error"),
    (Unauthenticated, "authentication_error"),
    (BadRequest, "invalid_request_error"),
    (NotFound, "invalid_request_error"),
    (Conflict, "invalid_request_error"),
    (Unavailable, "overloaded_error"),
    (MycoswarmError, "server_error"),
)


def encode_error(error: MycoswarmError) -> bytes:
    """Encode an error in OpenAI's shape, with our code, hint, rule and place."""
    body: dict[str, object] = {
        "message": error.message + (f"; {error.hint}" if error.hint else ""),
        "type": next(word for kind, word in _TYPES if isinstance(error, kind)),
        "code": error.code,
        "param": None,
        "hint": error.hint,
    }
    if isinstance(error, BadRequest) and error.where:
        body["param"] = body["where"] = error.where
    if isinstance(error, Denied):
        body["rule"] = error.rule
        body["where"] = error.where
    if isinstance(error, PolicyInvalid):
        body["problems"] = [
            {"path": one.path, "line": one.line, "message": one.message, "hint": one.hint}
            for one in error.problems
        ]
    return _dumps({"error": body})


def _dumps(body: dict[str, object]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode("ascii")
