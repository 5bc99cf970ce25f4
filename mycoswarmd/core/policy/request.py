"""Requests as people and programs write them, and back: `{ action = "infer", zone = "lan" }`.

Used by [[test]], by `policy explain`, in counterexamples and in what a reload prints.
"""

import difflib
import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Final

from mycoswarmd.core.policy.model import MAX_NAME, OWNER, Policy, node_principal
from mycoswarmd.core.policy.tools import TOOLS
from mycoswarmd.core.types import UNKNOWN, Action, Principal, Request, SandboxLevel, Start, Unknown, Zone
from mycoswarmd.core.units import DAY_MINUTES, parse_duration_s
from mycoswarmd.errors import BadRequest

KINDS: Final = ("user", "group", "key", "node", "agent")
_WORDS: Final = ("model", "dest", "node", "tier", "label", "agent", "tool")
KEYS: Final = (
    "action",
    "zone",
    "from",
    "origin",
    "tags",
    "tainted",
    "hour",
    "roster_age",
    "sandbox",
    *_WORDS,
)


def near(word: str, known: Collection[str]) -> str:
    """Say what would have been accepted: the nearest known word if one is near, else all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"did you mean '{close[0]}'?"  # not !r: known words may be members of an enum
    return f"known: {', '.join(sorted(known))}" if known else "none is declared"


def parse_request(
    facts: Mapping[str, object], policy: Policy | None, *, speaker: Principal | None = None
) -> Request:
    """Read a request from a table of facts; BadRequest names the key that is wrong.

    A label, tool or destination that the policy does not declare is a legal question here. Without a
    zone, a destination or `web_fetch` means cloud and everything else this node.

    Args:
        facts: the table.
        policy: where named origins are looked up; None knows only "owner".
        speaker: who speaks where the table has no origin; nobody in particular without one.
    """
    for key in facts:
        if key not in KEYS:
            raise _bad(key, f"there is no fact {key[:MAX_NAME]!r}", near(key, KEYS))
    words = {key: _word(facts, key) for key in _WORDS}
    action = _one_of(facts, "action", list(Action))
    if action is None:
        raise _bad("action", "a request has an action", f"one of {', '.join(Action)}")
    tool = TOOLS.get(words["tool"] or "")
    zone = tool.zone if tool is not None else Zone.CLOUD if words["dest"] else Zone.SELF
    tags, tainted = facts.get("tags", []), facts.get("tainted", False)
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise _bad("tags", "it is not a list of words")
    if not isinstance(tainted, bool):
        raise _bad("tainted", "it is not true or false")
    age = _word(facts, "roster_age")
    sandbox = _one_of(facts, "sandbox", list(SandboxLevel))
    return Request(
        action=Action(action),
        principal=_principal(facts["origin"], policy) if "origin" in facts else speaker or Principal(),
        zone=Zone(_one_of(facts, "zone", list(Zone)) or zone),
        start=Start(_one_of(facts, "from", list(Start)) or Start.LOCAL),
        tags=frozenset(tags),
        tainted=tainted,
        minute_of_day=_minute(_word(facts, "hour")),
        roster_age_s=_duration(age) if age else UNKNOWN,
        sandbox=SandboxLevel(sandbox) if sandbox else UNKNOWN,
        **words,
    )


def check_declared(request: Request, policy: Policy) -> None:
    """Refuse a label, agent or tool that the policy does not have: who asks about it means another."""
    for key, word, known in (
        ("label", request.label, policy.labels.order),
        ("agent", request.agent, policy.agents),
        ("tool", request.tool, policy.tools),
    ):
        if word is not None and word not in known:
            raise _bad(key, f"the policy has no {key} {word[:MAX_NAME]!r}", near(word, known))


def facts_of(request: Request) -> dict[str, object]:
    """Return what is notable about a request, under the keys that parse_request reads."""
    facts: dict[str, object] = {"action": request.action.value, "zone": request.zone.value}
    if request.start is Start.PEER:
        facts["from"] = request.start.value
    facts |= {key: getattr(request, key) for key in _WORDS if getattr(request, key) is not None}
    if request.principal != Principal():
        facts["origin"] = _origin(request.principal)
    if request.tags:
        facts["tags"] = sorted(request.tags)
    if request.tainted:
        facts["tainted"] = True
    if isinstance(request.minute_of_day, int):
        facts["hour"] = f"{request.minute_of_day // 60:02}:{request.minute_of_day % 60:02}"
    if isinstance(request.roster_age_s, int):
        facts["roster_age"] = f"{request.roster_age_s}s"
    if isinstance(request.sandbox, SandboxLevel):
        facts["sandbox"] = request.sandbox.value
    return facts


def describe(request: Request) -> str:
    """Print a request in one line: `infer zone=lan label=internal`."""
    facts = facts_of(request)
    return " ".join([str(facts.pop("action")), *(f"{key}={_shown(value)}" for key, value in facts.items())])


def brief(request: Request) -> str:
    """Say in a few words what was asked for, without who and when."""
    if request.action is Action.ADMIN:
        return "administer this node"
    facts = facts_of(request)
    for key in ("origin", "hour", "roster_age", "sandbox", "tags", "node", "tier"):
        facts.pop(key, None)
    return " ".join([str(facts.pop("action")), *(f"{key}={_shown(value)}" for key, value in facts.items())])


def fingerprint(request: Request, *, label: str) -> str:
    """Hash what exactly is asked. The hour and the roster's age are left out: an answer outlives them."""
    principal = request.principal
    facts = [
        [request.action, request.zone, request.start, label, request.tainted, sorted(request.tags)],
        [getattr(request, key) for key in _WORDS if key != "label"],
        [principal.is_owner, principal.uid, sorted(principal.groups)],
        [getattr(principal, kind) for kind in (*KINDS, "node_id", "operator") if kind != "group"],
        request.sandbox.value,
    ]
    return hashlib.sha256(json.dumps(facts, ensure_ascii=True).encode()).hexdigest()


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "+".join(f"{key}:{_shown(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ",".join(_shown(one) for one in value)
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if text.isprintable() and " " not in text and text else repr(text)


def _origin(principal: Principal) -> object:
    named = {kind: getattr(principal, kind) for kind in KINDS if kind != "group"}
    claims: dict[str, object] = {kind: value for kind, value in named.items() if value is not None}
    if principal.groups:
        claims["group"] = sorted(principal.groups)
    if principal.is_owner:
        return OWNER if not claims else {"owner": True, **claims}
    return claims or f"uid:{principal.uid}"


def _principal(value: object, policy: Policy | None) -> Principal:
    if isinstance(value, str):
        if value == OWNER:
            return Principal(is_owner=True)
        declared = policy.origins if policy is not None else {}
        if value not in declared:
            raise _bad("origin", f"there is no origin {value[:MAX_NAME]!r}", near(value, [OWNER, *declared]))
        value = {declared[value].kind: declared[value].value}
    if not isinstance(value, dict) or not value or not set(value) <= {*KINDS, OWNER}:
        raise _bad(
            "origin", "it is not the name of an origin, nor a table", "accepted: { user = … } or group, key …"
        )
    groups = value.get("group", [])
    groups = [groups] if isinstance(groups, str) else groups
    named = {kind: value[kind] for kind in KINDS if kind != "group" and kind in value}
    is_owner = value.get(OWNER, False)
    texts = [*named.values(), *(groups if isinstance(groups, list) else [None])]
    if not all(isinstance(text, str) for text in texts) or not isinstance(is_owner, bool):
        raise _bad("origin", "its values are not words")
    if len(named) + bool(groups and "user" not in named) > 1:
        raise _bad("origin", "a speaker is one of user, key, node and agent; only a user is in groups")
    if "node" in named and not is_owner:
        return node_principal(named["node"])
    return Principal(is_owner=is_owner, groups=frozenset(groups), **named)


def _bad(key: str, reason: str, hint: str = "") -> BadRequest:
    return BadRequest(
        "bad-facts", f"cannot use {key[:MAX_NAME]!r} of a request: {reason}", hint=hint, where=key
    )


def _word(facts: Mapping[str, object], key: str) -> str | None:
    value = facts.get(key)
    if value is not None and (not isinstance(value, str) or not 0 < len(value) <= MAX_NAME):
        raise _bad(key, f"it is not a word of at most {MAX_NAME} characters")
    return value


def _one_of(facts: Mapping[str, object], key: str, known: Collection[str]) -> str | None:
    word = _word(facts, key)
    if word is not None and word not in known:
        raise _bad(key, f"there is no {word!r}", near(word, known))
    return word


def _minute(text: str | None) -> int | Unknown:
    if text is None:
        return UNKNOWN
    hour, _, minute = text.partition(":")
    if hour.isdecimal() and minute.isdecimal() and int(minute) < 60 and int(hour) * 60 < DAY_MINUTES:
        return int(hour) * 60 + int(minute)
    raise _bad("hour", 'it is not a time of day such as "23:30"')


def _duration(text: str) -> int:
    try:
        return 0 if text == "0s" else parse_duration_s(text)
    except ValueError as exc:
        raise _bad("roster_age", f"it is not {exc}") from exc
