"""The tools of an agent as data: what the model is shown, and what both sides check arguments against.

Rule: arguments are checked by `check_arguments` before a permit is asked for and again by whoever
acts on them. The schemas use only type, enum, bounds, properties and required, so that this module's
checker knows all of them.
"""

import json
from collections.abc import Mapping

from mycoswarmd.errors import BadRequest
from mycoswarmd.wire.prompt import Tool

# A model writes no longer text in one call; with escapes it still fits a frame (4 MiB).
MAX_CONTENT_CHARS = 512 << 10
_PATH: Mapping[str, object] = {"type": "string", "minLength": 1, "maxLength": 1024}
_TEXT: Mapping[str, object] = {"type": "string", "maxLength": MAX_CONTENT_CHARS}

FINISH = "finish"


def _tool(name: str, description: str, properties: Mapping[str, object], required: tuple[str, ...]) -> Tool:
    return Tool(
        name=name,
        description=description,
        parameters={
            "type": "object",
            "properties": properties,
            "required": list(required),
            "additionalProperties": False,
        },
    )


_ALL = (
    _tool(
        "fs_read",
        "Read a file. For a long file, go on at a byte offset.",
        {
            "path": _PATH,
            "offset": {"type": "integer", "minimum": 0, "maximum": 1 << 40},
            "limit": {"type": "integer", "minimum": 1, "maximum": 32 << 10},
        },
        ("path",),
    ),
    _tool(
        "fs_write",
        "Write a whole file; it is created, or replaced.",
        {"path": _PATH, "content": _TEXT},
        ("path", "content"),
    ),
    _tool(
        "fs_edit",
        "Replace one piece of text in a file. `old` must occur exactly once.",
        {"path": _PATH, "old": {**_TEXT, "minLength": 1}, "new": _TEXT},
        ("path", "old", "new"),
    ),
    _tool("fs_list", "List a directory.", {"path": _PATH}, ("path",)),
    _tool(
        "fs_search",
        "Find lines that contain a text, or with kind=name files by a shell pattern such as *.py.",
        {
            "pattern": {"type": "string", "minLength": 1, "maxLength": 200},
            "path": _PATH,
            "kind": {"type": "string", "enum": ["text", "name"]},
        },
        ("pattern",),
    ),
    _tool(
        "run",
        "Run a program with arguments. There is no shell.",
        {
            "program": {"type": "string", "minLength": 1, "maxLength": 255},
            "args": {"type": "array", "items": {"type": "string", "maxLength": 16 << 10}, "maxItems": 256},
            "stdin": _TEXT,
        },
        ("program", "args"),
    ),
    _tool(
        FINISH,
        "End the task and say in a few words what was done.",
        {"summary": {"type": "string", "maxLength": 4000}},
        ("summary",),
    ),
)
TOOL_SCHEMAS: Mapping[str, Tool] = {tool.name: tool for tool in _ALL}


def parse_arguments(tool: str, untrusted: str) -> dict[str, object]:
    """Parse the JSON text of a call's arguments, or raise BadRequest("bad-arguments")."""
    try:
        value = json.loads(untrusted)
    except (ValueError, RecursionError) as exc:
        raise _bad(tool, "arguments", "are not JSON") from exc
    return check_arguments(tool, value)


def check_arguments(tool: str, untrusted: object) -> dict[str, object]:
    """Return the arguments of a call if they fit the tool's schema, or raise BadRequest."""
    if tool not in TOOL_SCHEMAS:
        raise BadRequest(
            "unknown-tool", f"cannot call {tool[:80]!r}: there is no such tool", hint=", ".join(TOOL_SCHEMAS)
        )
    if not isinstance(untrusted, dict):
        raise _bad(tool, "arguments", "are not an object")
    schema = TOOL_SCHEMAS[tool].parameters
    properties, required = schema["properties"], schema["required"]
    assert isinstance(properties, Mapping)
    assert isinstance(required, list)
    for key in required:
        if key not in untrusted:
            raise _bad(tool, key, "is missing")
    for key, value in untrusted.items():
        if key not in properties:
            raise _bad(tool, str(key)[:80], "is not an argument", "accepted: " + ", ".join(properties))
        problem = _problem(properties[key], value)
        if problem:
            raise _bad(tool, key, problem)
    return untrusted


def _problem(schema: Mapping[str, object], value: object) -> str:
    """Return what is wrong with a value, or ""."""
    match schema["type"]:
        case "string":
            return _string_problem(schema, value)
        case "integer":
            return _integer_problem(schema, value)
        case _:
            return _array_problem(schema, value)


def _string_problem(schema: Mapping[str, object], value: object) -> str:
    if not isinstance(value, str):
        return "is not a string"
    low, high = _bound(schema, "minLength", 0), _bound(schema, "maxLength", MAX_CONTENT_CHARS)
    if not low <= len(value) <= high:
        return f"has {len(value)} characters; {low} to {high} are accepted"
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        return "has half a surrogate pair"
    choices = schema.get("enum")
    if isinstance(choices, list) and value not in choices:
        return "is not one of " + ", ".join(choices)
    return ""


def _integer_problem(schema: Mapping[str, object], value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int):
        return "is not an integer"
    low, high = _bound(schema, "minimum", 0), _bound(schema, "maximum", 0)
    return "" if low <= value <= high else f"is out of range; {low} to {high} are accepted"


def _array_problem(schema: Mapping[str, object], value: object) -> str:
    most = _bound(schema, "maxItems", 0)
    if not isinstance(value, list):
        return "is not a list"
    if len(value) > most:
        return f"has {len(value)} items; at most {most} are accepted"
    items = schema["items"]
    assert isinstance(items, Mapping)
    for number, item in enumerate(value):
        problem = _problem(items, item)
        if problem:
            return f"item {number} {problem}"
    return ""


def _bound(schema: Mapping[str, object], key: str, default: int) -> int:
    value = schema.get(key, default)
    assert isinstance(value, int)
    return value


def _bad(tool: str, key: str, why: str, hint: str = "") -> BadRequest:
    return BadRequest("bad-arguments", f"cannot call {tool}: {key!r} {why}", hint=hint, where=key)
