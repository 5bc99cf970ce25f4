"""A prompt and what an engine says back, free of any dialect.

The OpenAI dialect (wire/openai.py) and the engines' dialects translate from and to these.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class PromptKind(StrEnum):
    """What is asked of an engine."""

    CHAT = "chat"
    TEXT = "text"
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call; `parameters` is its JSON schema."""

    name: str
    description: str
    parameters: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that the model made. `arguments` is JSON text, as the OpenAI dialect has it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str  # system | user | assistant | tool
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One inference request, parsed and bounded.

    Attributes:
        params: only names and ranges that wire/openai.py lists, such as temperature, max_tokens.
        tool_choice: "auto", "none", "required", or the name of one tool.
        response_format: None, {"type": "json_object"} or {"type": "json_schema", ...}.
    """

    kind: PromptKind
    model: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    inputs: tuple[str, ...] = ()
    params: Mapping[str, object]
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    response_format: Mapping[str, object] | None = None
    stream: bool = False
    include_usage: bool = False


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what a reasoning model thinks aloud; OpenAI-compatible `reasoning_content`."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a tool call; `id` and `name` come with the first piece of each index."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class Finish:
    """Why the model stopped: stop | length | tool_calls | content_filter."""

    reason: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What it took, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Via:
    """Which other node answers, and the id of its receipt, or ""."""

    node: str
    receipt: str


Delta = TextDelta | ReasoningDelta | ToolCallDelta | Finish | Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer to a chat or text prompt."""

    text: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish: str
    usage: Usage
    via: Via | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """One vector for each input, in order."""

    vectors: tuple[tuple[float, ...], ...]
    usage: Usage
    via: Via | None = None
