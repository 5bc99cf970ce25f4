"""The conversation with the model, kept within what it can read at once.

Rule: the instructions and the task are never cut. What goes first is the text of old tool results, then
of old calls, then whole old exchanges.
"""

import json
from collections.abc import Mapping, Sequence

from mycoswarmd.wire.prompt import ToolCall

# Tokens of English and code are four characters or more on average; three leaves room for other languages.
_CHARS_PER_TOKEN = 3
# What an old text is shortened to: enough to recall what it was.
_STUB_CHARS = 160
# What each message costs beside its text in every chat template we know.
_MESSAGE_CHARS = 24


class Context:
    """The messages so far. The first `fixed` ones stay whole."""

    def __init__(self, fixed: Sequence[Mapping[str, object]], *, budget_tokens: int) -> None:
        self._fixed = [dict(message) for message in fixed]
        self._turns: list[list[dict[str, object]]] = []  # an assistant's message and the results it got
        self._budget_chars = budget_tokens * _CHARS_PER_TOKEN

    def add_calls(self, text: str, calls: Sequence[ToolCall]) -> None:
        """Append what the model said."""
        message: dict[str, object] = {"role": "assistant", "content": clean(text)}
        if calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name or "none", "arguments": _repeatable(call.arguments)},
                }
                for call in calls
            ]
        self._turns.append([message])

    def add_result(self, call_id: str, text: str) -> None:
        """Append what a tool gave."""
        self._turns[-1].append({"role": "tool", "tool_call_id": call_id, "content": clean(text)})

    def add_hint(self, text: str) -> None:
        """Append a word of ours to the model."""
        self._turns.append([{"role": "user", "content": text}])

    def messages(self) -> list[dict[str, object]]:
        """Return what fits, shortening what is oldest for good."""
        for shorten in (_shorten_results, _shorten_calls):
            for turn in self._turns[:-1]:
                if self._size() <= self._budget_chars:
                    break
                shorten(turn)
        while len(self._turns) > 1 and self._size() > self._budget_chars:
            del self._turns[0]
        if self._turns and self._size() > self._budget_chars:
            self._clip_last()
        return [*self._fixed, *(message for turn in self._turns for message in turn)]

    def _size(self) -> int:
        whole = [*self._fixed, *(message for turn in self._turns for message in turn)]
        return sum(_MESSAGE_CHARS + _length(message) for message in whole)

    def _clip_last(self) -> None:
        """Shorten even the newest results: a model that sees half a file beats one that refuses."""
        results = [message for message in self._turns[-1] if message["role"] == "tool"]
        excess = self._size() - self._budget_chars
        for message in results:
            text = str(message["content"])
            keep = max(_STUB_CHARS, len(text) - excess // max(1, len(results)) - 40)
            if keep < len(text):
                message["content"] = text[:keep] + "\n[the rest does not fit]"


def _length(message: Mapping[str, object]) -> int:
    return len(str(message["content"])) + len(json.dumps(message.get("tool_calls", "")))


def _shorten_results(turn: list[dict[str, object]]) -> None:
    for message in turn:
        text = str(message["content"])
        if message["role"] == "tool" and len(text) > _STUB_CHARS:
            message["content"] = text[:_STUB_CHARS] + "\n[shortened]"


def _shorten_calls(turn: list[dict[str, object]]) -> None:
    for message in turn:
        message["content"] = str(message["content"])[:_STUB_CHARS]
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else []:
            call["function"]["arguments"] = _shorten_arguments(call["function"]["arguments"])


def _shorten_arguments(text: str) -> str:
    """Return arguments that are JSON still, with long texts cut."""
    if len(text) <= _STUB_CHARS:
        return text
    arguments = json.loads(text)
    short = {
        key: value[:_STUB_CHARS] if isinstance(value, str) else value for key, value in arguments.items()
    }
    return json.dumps(short)


def _repeatable(untrusted: str) -> str:
    """Return arguments as an engine can take them back: a JSON object, or an empty one for nonsense."""
    try:
        arguments = json.loads(untrusted)
        return json.dumps(arguments) if isinstance(arguments, dict) else "{}"
    except (ValueError, RecursionError):
        return "{}"


def clean(text: str) -> str:
    """Return text that every JSON reader takes: no half surrogate pairs."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
