"""A tool's JSON schema, cut down to what constrained decoding takes, with everything bounded.

Rule: every string and list of a compiled schema has a length bound, for a small model that is not
stopped goes on for ever. Keywords that decoders refuse or ignore (pattern, not, if) are dropped: they
only narrow, and whoever runs the tool checks its arguments anyway.
Source: llama.cpp common/json-schema-to-grammar.cpp.
"""

import re
from collections.abc import Mapping

from mycoswarmd.errors import BadRequest

# llama.cpp's grammars refuse more than 2,000 repetitions in one rule.
MAX_STRING_CHARS = 1500
MAX_ITEMS = 16
# Depth of objects in objects; deeper ones are a mistake or an attack on the decoder.
MAX_DEPTH = 12
# An example's text for a string of which nothing is known.
_SAMPLE_TEXT = "example"
# What arguments are often called, and what they then hold.
_SAMPLES: Mapping[str, str] = {
    "args": "-l",
    "city": "Rome",
    "code": "print(1)",
    "command": "date",
    "content": "Hello, world.",
    "country": "Italy",
    "date": "2026-03-01",
    "email": "anna@example.org",
    "file": "notes.txt",
    "filename": "notes.txt",
    "host": "localhost",
    "language": "Italian",
    "location": "Rome",
    "message": "Dinner is ready",
    "name": "Anna",
    "new": "tomorrow",
    "old": "today",
    "path": "notes.txt",
    "pattern": "garden",
    "program": "ls",
    "query": "solar panels",
    "question": "How far is the moon?",
    "room": "hall",
    "summary": "Wrote the list of plants to notes.txt",
    "text": "Hello, world.",
    "title": "Garden plan",
    "url": "http://localhost/",
    "user": "anna",
}
_SCALARS = ("integer", "number", "boolean", "null")
_TEXT: Mapping[str, object] = {"type": "string", "maxLength": MAX_STRING_CHARS}


def bounded_schema(schema: Mapping[str, object], *, where: str) -> dict[str, object]:
    """Return a tool's schema of arguments with references resolved, bounds set and the rest dropped."""
    bounded = _bound(schema, schema, where=where, depth=0)
    if bounded.get("type") != "object" and "anyOf" not in bounded:
        bounded = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
    return bounded


def _bound(untrusted: object, root: Mapping[str, object], *, where: str, depth: int) -> dict[str, object]:
    if depth > MAX_DEPTH:
        raise BadRequest(
            "bad-request", f"cannot use the schema {where!r}: it is nested too deeply", where=where
        )
    if not isinstance(untrusted, Mapping):
        return dict(_TEXT)
    schema = _resolve(untrusted, root, where=where)
    for key in ("const", "enum"):
        if key in schema:
            return {key: schema[key]}
    options = _options(schema)
    if options:
        return {"anyOf": [_bound(one, root, where=where, depth=depth + 1) for one in options[:MAX_ITEMS]]}
    kind = schema.get("type")
    if kind == "object" or "properties" in schema:
        return _bound_object(schema, root, where=where, depth=depth)
    if kind == "array":
        items = _bound(schema.get("items"), root, where=where, depth=depth + 1)
        return {"type": "array", "items": items, **_lengths(schema, "Items", MAX_ITEMS)}
    if kind in _SCALARS:
        return {key: schema[key] for key in ("type", "minimum", "maximum") if key in schema}
    # A string, or something of which nothing is known: text is what every model can write.
    return {"type": "string", **_lengths(schema, "Length", MAX_STRING_CHARS)}


def _options(schema: Mapping[str, object]) -> list[object]:
    """Return the alternatives of a schema, however it spells them."""
    for key in ("anyOf", "oneOf"):
        options = schema.get(key)
        if isinstance(options, list):
            return options
    kinds = schema.get("type")
    return [{**schema, "type": kind} for kind in kinds] if isinstance(kinds, list) else []


def _bound_object(
    schema: Mapping[str, object], root: Mapping[str, object], *, where: str, depth: int
) -> dict[str, object]:
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    required = schema.get("required")
    required = required if isinstance(required, list) else []
    return {
        "type": "object",
        "properties": {
            name: _bound(one, root, where=f"{where}.{name}", depth=depth + 1)
            for name, one in properties.items()
        },
        "required": [name for name in properties if name in required],
        "additionalProperties": False,
    }


def _lengths(schema: Mapping[str, object], unit: str, bound: int) -> dict[str, object]:
    high = schema.get(f"max{unit}")
    high = min(high, bound) if isinstance(high, int) and high >= 0 else bound
    low = schema.get(f"min{unit}")
    lowest = {f"min{unit}": min(low, high)} if isinstance(low, int) and low > 0 else {}
    return {**lowest, f"max{unit}": high}


def _resolve(schema: Mapping[str, object], root: Mapping[str, object], *, where: str) -> Mapping[str, object]:
    """Follow references inside the schema itself; what they point to moves into place."""
    for _ in range(MAX_DEPTH):
        reference = schema.get("$ref")
        if reference is None:
            return schema
        target: object = root
        if isinstance(reference, str) and reference.startswith("#/"):
            for part in reference[2:].split("/"):
                target = target.get(part) if isinstance(target, Mapping) else None
        else:
            target = None
        if not isinstance(target, Mapping):
            break
        schema = target
    raise BadRequest("bad-request", f"cannot use the schema {where!r}: its $ref leads nowhere", where=where)


def sample(schema: Mapping[str, object], *, name: str = "") -> object:
    """Return a value that fits a bounded schema, for an example; `name` is the argument's."""
    match schema:
        case {"const": value} | {"enum": [value, *_]}:
            return value
        case {"anyOf": [Mapping() as first, *_]}:
            return sample(first, name=name)
        case {"type": "object", "properties": Mapping() as properties}:
            wanted = schema.get("required") or list(properties)[:1]
            return {
                key: sample(one, name=key)
                for key, one in properties.items()
                if isinstance(one, Mapping) and isinstance(wanted, list) and key in wanted
            }
        case {"type": "array", "items": Mapping() as items}:
            return [sample(items, name=name)]
        case {"type": "integer" | "number"}:
            low = schema.get("minimum", 1)
            return low if isinstance(low, (int, float)) and low > 1 else 1
        case {"type": "boolean"}:
            return True
        case {"type": "null"}:
            return None
        case _:
            high = schema.get("maxLength")
            return _sample_text(name)[: high if isinstance(high, int) else None]


def _sample_text(name: str) -> str:
    """Return a text that an argument of this name could well have: a model learns more from "Rome"."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((_SAMPLES[word] for word in reversed(words) if word in _SAMPLES), _SAMPLE_TEXT)
