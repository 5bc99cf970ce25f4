"""The OpenAI dialect as we speak it to engines: prompts out, answers, chunks and errors in.

Rule: an engine is not trusted. What it sends is bounded and checked, what is wrong is a BadRequest
that says where (the adapter makes an EngineError of it), and no text of an engine's error is passed
on, for it may repeat the prompt: only words that look like codes are.
Source: the OpenAI API reference; llama.cpp tools/server/README.md.
"""

import json
import re
from dataclasses import dataclass

from mycoswarmd.errors import BadRequest, EngineError, MycoswarmError, NotFound, Unavailable
from mycoswarmd.wire.jsonv import (
    as_int,
    as_list,
    as_number,
    as_object,
    as_str,
    get_list,
    get_object,
    get_str,
    parse_object,
)
from mycoswarmd.wire.openai import MAX_TEXT_CHARS, encode_call
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
    ToolCall,
    ToolCallDelta,
    Usage,
)

# No vector of any known embedding model is as long.
MAX_DIMENSIONS = 65_536
# More models than any home serves; a list longer than this is garbage.
MAX_MODELS = 4096
# Tool calls in one answer.
_MAX_CALLS = 128
_MAX_COUNT = 2**53
_CODE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}\Z")
_FINISHES = ("stop", "length", "tool_calls", "content_filter")
PATHS = {
    PromptKind.CHAT: "/v1/chat/completions",
    PromptKind.TEXT: "/v1/completions",
    PromptKind.EMBEDDING: "/v1/embeddings",
}


def encode_request(prompt: Prompt, *, stream: bool) -> bytes:
    """Encode a prompt as the body for its kind's path; usage is always asked for."""
    body: dict[str, object] = {"model": prompt.model}
    if prompt.kind is PromptKind.EMBEDDING:
        # Always numbers: how the client wants them is decided when we answer it.
        body |= {"input": list(prompt.inputs), "encoding_format": "float"}
        return _dumps(body)
    if prompt.kind is PromptKind.CHAT:
        body["messages"] = [_message(one) for one in prompt.messages]
    else:
        body["prompt"] = prompt.text
    body |= prompt.params
    if prompt.tools:
        body["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.parameters,
                },
            }
            for tool in prompt.tools
        ]
        body["tool_choice"] = _tool_choice(prompt.tool_choice)
    else:
        body.pop("parallel_tool_calls", None)  # OpenAI refuses it without tools
    if prompt.response_format is not None:
        body["response_format"] = prompt.response_format
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return _dumps(body)


def _tool_choice(choice: str) -> object:
    if choice in {"auto", "none", "required"}:
        return choice
    return {"type": "function", "function": {"name": choice}}


def _message(message: Message) -> dict[str, object]:
    obj: dict[str, object] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        obj["tool_calls"] = [encode_call(call) for call in message.tool_calls]
        obj["content"] = message.content or None
    if message.tool_call_id is not None:
        obj["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        obj["name"] = message.name
    return obj


def parse_answer(untrusted: bytes, *, kind: PromptKind) -> Answer:
    """Parse a whole answer to a chat or text prompt."""
    body = parse_object(untrusted, what="the answer")
    choice = _first_choice(body)
    reasoning = ""
    calls: tuple[ToolCall, ...] = ()
    if kind is PromptKind.TEXT:
        text = _text(choice, "text", where="choices[0]")
    else:
        where = "choices[0].message"
        message = as_object(choice.get("message"), where=where)
        text = _text(message, "content", where=where)
        reasoning = _text(message, "reasoning_content", where=where)
        calls = _calls(message.get("tool_calls"), where=f"{where}.tool_calls")
    finish = _finish(choice.get("finish_reason"))
    return Answer(
        text=text,
        reasoning=reasoning,
        tool_calls=calls,
        finish="tool_calls" if calls and finish == "stop" else finish,
        usage=_usage(body.get("usage")),
    )


def _first_choice(body: dict[str, object]) -> dict[str, object]:
    choices = get_list(body, "choices", where="", max_items=16)
    return as_object(choices[0] if choices else None, where="choices[0]")


def _text(obj: dict[str, object], key: str, *, where: str) -> str:
    return get_str(obj, key, where=where, max_len=MAX_TEXT_CHARS, default="")


def _finish(value: object) -> str:
    # Servers invent reasons ("eos", "abort"); what none of OpenAI's words says is a plain stop.
    return value if isinstance(value, str) and value in _FINISHES else "stop"


def _calls(untrusted: object, *, where: str) -> tuple[ToolCall, ...]:
    if untrusted is None:
        return ()
    calls = []
    for i, one in enumerate(as_list(untrusted, where=where, max_items=_MAX_CALLS)):
        here = f"{where}[{i}]"
        obj = as_object(one, where=here)
        function = get_object(obj, "function", where=here)
        calls.append(
            ToolCall(
                id=get_str(obj, "id", where=here, max_len=256, default="") or f"call_{i}",
                name=get_str(function, "name", where=f"{here}.function", max_len=256),
                arguments=_arguments(function.get("arguments"), where=f"{here}.function.arguments"),
            )
        )
    return tuple(calls)


def _arguments(untrusted: object, *, where: str) -> str:
    if isinstance(untrusted, dict):  # some servers forget that it is JSON text
        return json.dumps(untrusted)
    return as_str("" if untrusted is None else untrusted, where=where, max_len=MAX_TEXT_CHARS)


def _usage(untrusted: object) -> Usage:
    """Read usage; a server that gives none counts as 0, which is what the client is then told."""
    if untrusted is None:
        return Usage(0, 0)
    obj = as_object(untrusted, where="usage")
    details = obj.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return Usage(
        _count(obj.get("prompt_tokens"), where="usage.prompt_tokens"),
        _count(obj.get("completion_tokens"), where="usage.completion_tokens"),
        _count(cached, where="usage.prompt_tokens_details.cached_tokens"),
    )


def _count(value: object, *, where: str) -> int:
    return 0 if value is None else as_int(value, where=where, low=0, high=_MAX_COUNT)


class ChunkParser:
    """Turns the events of one streamed answer into deltas; this runs for every token.

    Attributes:
        is_finished: whether a reason to stop was seen.
        usage: what the server said it took, or zeros.
    """

    def __init__(self, kind: PromptKind, *, engine: str = "") -> None:
        self._engine = engine
        self._is_chat = kind is not PromptKind.TEXT
        self.is_finished = False
        self.is_done = False
        self.usage = Usage(0, 0)
        self._chars = 0
        self._has_calls = False

    def feed(self, untrusted: bytes) -> list[Delta]:
        """Return what one event's data says, but for usage, which is kept until the end."""
        if untrusted == b"[DONE]":
            self.is_done = True
            return []
        body = parse_object(untrusted, what="a chunk")
        if "error" in body:
            raise parse_error(500, untrusted, engine=self._engine)
        if body.get("usage") is not None:
            self.usage = _usage(body["usage"])
        choices = body.get("choices")
        if not choices:
            return []
        choice = _first_choice(body)
        deltas: list[Delta] = []
        if self._is_chat:
            self._chat(choice.get("delta"), deltas)
        elif text := _text(choice, "text", where="choices[0]"):
            deltas.append(TextDelta(text))
        self._bound(untrusted)
        if choice.get("finish_reason") is not None and not self.is_finished:
            self.is_finished = True
            reason = _finish(choice["finish_reason"])
            deltas.append(Finish("tool_calls" if self._has_calls and reason == "stop" else reason))
        return deltas

    def _chat(self, untrusted: object, deltas: list[Delta]) -> None:
        if untrusted is None:
            return
        where = "choices[0].delta"
        delta = as_object(untrusted, where=where)
        if delta.get("reasoning_content"):
            deltas.append(ReasoningDelta(_text(delta, "reasoning_content", where=where)))
        if delta.get("content"):
            deltas.append(TextDelta(_text(delta, "content", where=where)))
        if delta.get("tool_calls"):
            items = as_list(delta["tool_calls"], where=f"{where}.tool_calls", max_items=_MAX_CALLS)
            deltas.extend(_call_piece(one, i) for i, one in enumerate(items))
            self._has_calls = True

    def _bound(self, untrusted: bytes) -> None:
        self._chars += len(untrusted)
        # Each token costs some 200 bytes of chunk; this is more than a hundred thousand tokens' worth.
        if self._chars > 32 * MAX_TEXT_CHARS:
            raise BadRequest("too-large", "cannot read the answer: it does not end")


def _call_piece(untrusted: object, position: int) -> ToolCallDelta:
    where = f"choices[0].delta.tool_calls[{position}]"
    obj = as_object(untrusted, where=where)
    function = as_object(obj.get("function") or {}, where=f"{where}.function")
    index = obj.get("index")
    index = position if index is None else as_int(index, where=f"{where}.index", low=0, high=_MAX_CALLS)
    name = get_str(function, "name", where=f"{where}.function", max_len=256, default="") or None
    call_id = get_str(obj, "id", where=where, max_len=256, default="") or None
    return ToolCallDelta(
        index,
        (call_id or f"call_{index}") if name else None,
        name,
        _arguments(function.get("arguments"), where=f"{where}.function.arguments"),
    )


def parse_embeddings(untrusted: bytes, *, count: int) -> Embeddings:
    """Parse vectors, which must be one for each of `count` inputs and all of one length."""
    body = parse_object(untrusted, what="the answer")
    data = get_list(body, "data", where="", max_items=count)
    if len(data) != count:
        raise BadRequest("bad-answer", f"cannot use the answer: {count} vectors expected, found {len(data)}")
    vectors: dict[int, tuple[float, ...]] = {}
    for i, one in enumerate(data):
        obj = as_object(one, where=f"data[{i}]")
        index = as_int(obj.get("index", i), where=f"data[{i}].index", low=0, high=count - 1)
        vectors[index] = _vector(obj.get("embedding"), where=f"data[{i}].embedding")
    if len(vectors) != count or len({len(vector) for vector in vectors.values()}) != 1:
        raise BadRequest("bad-answer", "cannot use the answer: vectors are missing or differ in length")
    return Embeddings(vectors=tuple(vectors[i] for i in range(count)), usage=_usage(body.get("usage")))


def _vector(untrusted: object, *, where: str) -> tuple[float, ...]:
    items = as_list(untrusted, where=where, max_items=MAX_DIMENSIONS)
    # The range is that of a 32-bit float, in which form the client may want them.
    return tuple(as_number(x, where=where, low=-3.4e38, high=3.4e38) for x in items)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedModel:
    """A model in an engine's own list."""

    name: str
    context_tokens: int | None
    size_bytes: int | None


def parse_models(untrusted: bytes) -> tuple[ListedModel, ...]:
    """Parse the answer of /v1/models, with what llama.cpp and vLLM add to it."""
    body = parse_object(untrusted, what="the list of models")
    models: dict[str, ListedModel] = {}
    for i, one in enumerate(get_list(body, "data", where="", max_items=MAX_MODELS)):
        obj = as_object(one, where=f"data[{i}]")
        name = get_str(obj, "id", where=f"data[{i}]", min_len=1, max_len=256)
        meta = obj.get("meta")
        meta = meta if isinstance(meta, dict) else {}
        models[name] = ListedModel(
            name=name,
            context_tokens=positive_or_none(
                obj.get("max_model_len"), meta.get("n_ctx"), meta.get("n_ctx_train")
            ),
            size_bytes=positive_or_none(meta.get("size")),
        )
    return tuple(models.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Props:
    """What llama.cpp says about the model it has loaded."""

    context_tokens: int | None
    supports_tools: bool


def parse_props(untrusted: bytes) -> Props:
    """Parse the answer of llama.cpp's /props."""
    body = parse_object(untrusted, what="the properties")
    settings = body.get("default_generation_settings")
    caps = body.get("chat_template_caps")
    return Props(
        context_tokens=positive_or_none(settings.get("n_ctx") if isinstance(settings, dict) else None),
        supports_tools=isinstance(caps, dict) and caps.get("supports_tools") is True,
    )


def positive_or_none(*values: object) -> int | None:
    """Return the first of the values that is a positive integer of a sane size."""
    for value in values:
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MAX_COUNT:
            return value
    return None


# What servers call a prompt that does not fit: llama.cpp, OpenAI and vLLM.
_TOO_LONG = frozenset({"exceed_context_size_error", "context_length_exceeded"})
_NO_MODEL = frozenset({"model_not_found", "model_not_found_error"})


def parse_error(http_status: int, untrusted: bytes, *, engine: str = "", model: str = "") -> MycoswarmError:
    """Make our error of an engine's answer with an error status, or of an error in a stream."""
    error = _error_object(untrusted)
    words = [
        word for key in ("type", "code") if isinstance(word := error.get(key), str) and _CODE.match(word)
    ]
    status = error.get("code") if isinstance(error.get("code"), int) else http_status
    said = f" ({', '.join(dict.fromkeys(words))})" if words else ""
    if _TOO_LONG & set(words):
        return _too_long(error)
    if _NO_MODEL & set(words) or (status == 404 and error):
        return NotFound(
            "model-not-found", f"cannot find model {model[:80]!r}: engine {engine!r} does not serve it"
        )
    if status in {400, 413, 415, 422, 501}:
        return BadRequest(
            "bad-request",
            f"cannot answer: engine {engine!r} refused the request with status {status}{said}",
            hint="the model or its server does not support something in the request",
        )
    if status in {429, 503}:
        return Unavailable(
            "engine-busy", f"cannot answer now: engine {engine!r} says it is busy{said}", retry_after_s=2
        )
    return EngineError("engine-failed", f"cannot answer: engine {engine!r} failed with status {status}{said}")


def _error_object(untrusted: bytes) -> dict[str, object]:
    """Return the error object of a body, or {} for what is not one (HTML, plain text)."""
    try:
        body = parse_object(untrusted)
    except BadRequest:
        return {}
    error = body.get("error", body)
    if isinstance(error, str):  # Ollama's own endpoints
        return {"message": error}
    return error if isinstance(error, dict) else {}


def _too_long(error: dict[str, object]) -> BadRequest:
    has, takes = positive_or_none(error.get("n_prompt_tokens")), positive_or_none(error.get("n_ctx"))
    sizes = f": it has {has} tokens, the model takes {takes}" if has and takes else ""
    return BadRequest(
        "context-too-long",
        f"cannot answer: the prompt is too long for the model{sizes}",
        hint="shorten the conversation, or ask a model with a longer context",
        where="messages",
    )


def _dumps(body: dict[str, object]) -> bytes:
    try:
        # As it came in: escapes make six bytes of two, and a member takes no more than this node does.
        text = json.dumps(body, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
        try:
            return text.encode()
        except UnicodeEncodeError:  # half of a pair, which JSON may have and UTF-8 may not
            return json.dumps(body, separators=(",", ":")).encode("ascii")
    except (ValueError, RecursionError) as exc:  # 1e999 in a schema is read as infinity
        raise BadRequest("bad-request", "cannot send the request: it has a number out of range") from exc
