"""A node's word: what a member says about itself to the others, as JSON of one line.

Law: a word is untrusted also when its sender is proved. Every part is bounded and checked, unknown
fields are dropped so that a newer node can still talk, and nothing in it opens a door: the roster says who a
member is, the policy what may go there. Any fault is BadRequest("bad-word").
Source: docs/wire.md.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mycoswarmd.errors import BadRequest
from mycoswarmd.wire.jsonv import (
    as_int,
    as_list,
    as_object,
    get_bool,
    get_choice,
    get_int,
    get_list,
    get_str,
    parse_object,
)
from mycoswarmd.wire.prompt import PromptKind

VERSION = 1
# On a watch something comes this often; whoever is silent for longer than two beats and a half hangs.
HEARTBEAT_S = 10.0
SILENT_S = 25.0
MAX_WORD_BYTES = 256 << 10
MAX_MODELS = 512
# A swarm has a handful of signers; each has one beacon.
MAX_BEACONS = 64
MAX_STATEMENTS = 10_000
STATES = ("green", "yellow", "red")
SANDBOXES = ("none", "reduced", "full")
_ID = re.compile(r"[a-z2-7]{26}\Z")
_INSTANCE = re.compile(r"[0-9a-f]{16}\Z")
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_KEY = _DIGEST
_SIGNATURE = re.compile(r"[0-9a-f]{128}\Z")
# What is shown in terminals and named in policies: visible ASCII, no spaces.
_WORD = re.compile(r"[!-~]*\Z")
_NAME_CHARS = 256
_MAX_COUNT = 1 << 31
_MAX_EXACT = 1 << 53


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWord:
    """A model that the member itself serves, in its own zone `self`."""

    name: str
    kinds: frozenset[PromptKind]
    context_tokens: int | None = None
    native_tools: bool = False
    loaded: bool = False
    size_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """What a member says about itself.

    Attributes:
        boot: counts the starts of its daemon; with `instance` it gives a copied key away.
        instance: random, new with each start.
        port: where its swarm listener is.
        digest: of its roster's statements, of which it has `statements`.
        beacons: in wire form, shaped but not verified.
    """

    id: str
    version: str
    boot: int
    instance: str
    port: int
    digest: str
    statements: int
    beacons: tuple[Mapping[str, object], ...] = ()
    tier: str | None = None
    sandbox: str = "none"  # none | reduced | full
    state: str = "green"  # green | yellow | red
    uptime_s: int = 0
    running: int = 0
    waiting: int = 0
    models: tuple[ModelWord, ...] = ()
    v: int = VERSION


def encode_word(word: Word) -> bytes:
    """Encode a word as one line of JSON without its end; models that nobody would accept are left out."""
    models = [model for model in word.models if _is_name(model.name)][:MAX_MODELS]
    line = _line(word, models)
    while len(line) > MAX_WORD_BYTES and models:
        models = models[: len(models) // 2]
        line = _line(word, models)
    return line


def _line(word: Word, models: Sequence[ModelWord]) -> bytes:
    return json.dumps(
        {
            "v": word.v,
            "id": word.id,
            "version": word.version,
            "boot": word.boot,
            "instance": word.instance,
            "port": word.port,
            "digest": word.digest,
            "statements": word.statements,
            "beacons": list(word.beacons[:MAX_BEACONS]),
            "tier": word.tier,
            "sandbox": word.sandbox,
            "state": word.state,
            "uptime_s": word.uptime_s,
            "running": word.running,
            "waiting": word.waiting,
            "models": [_model_object(model) for model in models],
        },
        separators=(",", ":"),
        allow_nan=False,
    ).encode("ascii")


def _is_name(text: str) -> bool:
    return 0 < len(text) <= _NAME_CHARS and text.isprintable()


def _model_object(model: ModelWord) -> dict[str, object]:
    return {
        "name": model.name,
        "kinds": sorted(kind.value for kind in model.kinds),
        "context_tokens": model.context_tokens,
        "native_tools": model.native_tools,
        "loaded": model.loaded,
        "size_bytes": model.size_bytes,
    }


def parse_word(untrusted: bytes | Mapping[str, object]) -> Word:
    """Parse a word from a line of JSON or from an object that was parsed already."""
    if isinstance(untrusted, bytes):
        if len(untrusted) > MAX_WORD_BYTES:
            raise _bad(f"it is larger than {MAX_WORD_BYTES} bytes")
        try:
            untrusted = parse_object(untrusted, what="a node's word")
        except BadRequest as exc:
            raise _bad("it is not an object in JSON") from exc
    try:
        return _word(dict(untrusted))
    except BadRequest as exc:
        if exc.code == "bad-word":
            raise
        raise _bad(exc.message.removeprefix("cannot accept "), exc.where) from exc


def _word(body: dict[str, object]) -> Word:
    models = [
        _model(one, where=f"models[{i}]")
        for i, one in enumerate(get_list(body, "models", where="", max_items=MAX_MODELS))
    ]
    if len({model.name for model in models}) != len(models):
        raise _bad("a model is named twice", "models")
    beacons = get_list(body, "beacons", where="", max_items=MAX_BEACONS)
    return Word(
        v=get_int(body, "v", where="", low=VERSION, high=VERSION),
        id=_shaped(body, "id", _ID, 26),
        version=_shaped(body, "version", _WORD, 64),
        boot=get_int(body, "boot", where="", low=0, high=_MAX_EXACT),
        instance=_shaped(body, "instance", _INSTANCE, 16),
        port=get_int(body, "port", where="", low=1, high=65535),
        digest=_shaped(body, "digest", _DIGEST, 64),
        statements=get_int(body, "statements", where="", low=0, high=MAX_STATEMENTS),
        beacons=tuple(_beacon(one, where=f"beacons[{i}]") for i, one in enumerate(beacons)),
        tier=None if body.get("tier") is None else _shaped(body, "tier", _WORD, 64),
        sandbox=get_choice(body, "sandbox", where="", choices=SANDBOXES),
        state=get_choice(body, "state", where="", choices=STATES),
        uptime_s=get_int(body, "uptime_s", where="", high=_MAX_EXACT),
        running=get_int(body, "running", where="", high=_MAX_COUNT),
        waiting=get_int(body, "waiting", where="", high=_MAX_COUNT),
        models=tuple(models),
    )


def _model(untrusted: object, *, where: str) -> ModelWord:
    obj = as_object(untrusted, where=where)
    name = get_str(obj, "name", where=where, max_len=_NAME_CHARS)
    if not _is_name(name):
        raise _bad("a model's name is empty or has characters that cannot be shown", f"{where}.name")
    known = {kind.value for kind in PromptKind}
    kinds = as_list(obj.get("kinds"), where=f"{where}.kinds", max_items=16)
    return ModelWord(
        name=name,
        # Kinds that a newer node knows are none of ours.
        kinds=frozenset(PromptKind(kind) for kind in kinds if isinstance(kind, str) and kind in known),
        context_tokens=_count(obj, "context_tokens", _MAX_COUNT, where=where),
        native_tools=get_bool(obj, "native_tools", where=where, default=False),
        loaded=get_bool(obj, "loaded", where=where, default=False),
        size_bytes=_count(obj, "size_bytes", _MAX_EXACT, where=where),
    )


def _beacon(untrusted: object, *, where: str) -> dict[str, object]:
    """Check a beacon's shape, so that what is kept of it is small; its signature is the roster's business."""
    obj = as_object(untrusted, where=where)
    return {
        "swarm": _shaped(obj, "swarm", _DIGEST, 64, where=where),
        "epoch": get_int(obj, "epoch", where=where, high=_MAX_EXACT),
        "signer": _shaped(obj, "signer", _KEY, 64, where=where),
        "n": get_int(obj, "n", where=where, high=_MAX_EXACT),
        "sig": _shaped(obj, "sig", _SIGNATURE, 128, where=where),
    }


def _count(obj: dict[str, object], key: str, high: int, *, where: str) -> int | None:
    value = obj.get(key)
    return None if value is None else as_int(value, where=f"{where}.{key}", low=1, high=high)


def _shaped(
    obj: dict[str, object], key: str, shape: re.Pattern[str], max_len: int, *, where: str = ""
) -> str:
    value = get_str(obj, key, where=where, max_len=max_len)
    if not shape.match(value):
        raise _bad(f"{key!r} has another form", f"{where}.{key}" if where else key)
    return value


def _bad(why: str, where: str = "") -> BadRequest:
    return BadRequest("bad-word", f"cannot accept a node's word: {why}", where=where)
