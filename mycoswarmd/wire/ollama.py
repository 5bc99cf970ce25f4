"""What Ollama's own endpoints say of its models, parsed with distrust.

Rule: anything that hints at a remote model makes it one; only what names no remote at all is local.
Source: Ollama docs/api.md, "List local models", "Show model information", "List running models".
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from mycoswarmd.errors import BadRequest
from mycoswarmd.wire.jsonv import as_object, get_list, get_str, parse_object
from mycoswarmd.wire.upstream import MAX_MODELS, positive_or_none

_MAX_CHARS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Tagged:
    """One row of /api/tags."""

    name: str
    digest: str
    is_remote: bool
    remote_host: str
    size_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What /api/show says of one model."""

    is_remote: bool = False
    remote_host: str = ""
    context_tokens: int | None = None
    capabilities: frozenset[str] = frozenset()


def parse_tags(untrusted: bytes) -> tuple[Tagged, ...]:
    """Parse the answer of /api/tags."""
    rows: dict[str, Tagged] = {}
    body = parse_object(untrusted, what="the list of models")
    for i, one in enumerate(get_list(body, "models", where="", max_items=MAX_MODELS)):
        where = f"models[{i}]"
        obj = as_object(one, where=where)
        key = "name" if obj.get("name") else "model"
        name = get_str(obj, key, where=where, min_len=1, max_len=256)
        rows[name] = Tagged(
            name=name,
            digest=get_str(obj, "digest", where=where, max_len=_MAX_CHARS, default=""),
            is_remote=_is_remote(obj),
            remote_host=_remote_host(obj, where=where),
            size_bytes=positive_or_none(obj.get("size")),
        )
    return tuple(rows.values())


def parse_show(untrusted: bytes) -> Shown:
    """Parse the answer of /api/show."""
    body = parse_object(untrusted, what="the model's description")
    info = body.get("model_info")
    info = info if isinstance(info, dict) else {}
    capabilities = body.get("capabilities")
    return Shown(
        is_remote=_is_remote(body),
        remote_host=_remote_host(body, where=""),
        context_tokens=positive_or_none(info.get(f"{info.get('general.architecture')}.context_length")),
        capabilities=frozenset(one for one in capabilities if isinstance(one, str))
        if isinstance(capabilities, list)
        else frozenset(),
    )


def parse_ps(untrusted: bytes) -> Mapping[str, int | None]:
    """Parse the answer of /api/ps: the context of each model in memory."""
    body = parse_object(untrusted, what="the list of running models")
    found: dict[str, int | None] = {}
    for i, one in enumerate(get_list(body, "models", where="", max_items=MAX_MODELS)):
        where = f"models[{i}]"
        obj = as_object(one, where=where)
        name = get_str(obj, "name", where=where, max_len=256, default="")
        found[name] = positive_or_none(obj.get("context_length"))
    return found


def is_version(untrusted: bytes) -> bool:
    """Whether this is what Ollama answers at /api/version."""
    try:
        return isinstance(parse_object(untrusted).get("version"), str)
    except BadRequest:
        return False


def encode_show(model: str) -> bytes:
    """Encode the question to /api/show."""
    return json.dumps({"model": model}).encode("ascii")


def _is_remote(obj: Mapping[str, object]) -> bool:
    return any(obj.get(key) not in (None, "") for key in ("remote_host", "remote_model"))


def _remote_host(obj: dict[str, object], *, where: str) -> str:
    return get_str(obj, "remote_host", where=where, max_len=_MAX_CHARS, default="")
