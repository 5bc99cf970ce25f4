"""Policies and requests for tests: strategies over a small world, and an evaluator by the specification."""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from hypothesis import strategies as st

from mycoswarmd.core.policy.check import Checked, check_policy
from mycoswarmd.core.policy.evaluate import NeedsApproval, Permit
from mycoswarmd.core.policy.model import (
    AgentProfile,
    Conditions,
    Destination,
    Invariant,
    Labels,
    Obligations,
    Origin,
    Policy,
    Rule,
    Span,
    ToolDecl,
)
from mycoswarmd.core.types import (
    UNKNOWN,
    Action,
    Effect,
    Limits,
    Principal,
    Request,
    RuleId,
    SandboxLevel,
    Start,
    Zone,
)
from mycoswarmd.errors import Denied

LABELS = ("public", "internal", "secret")
GLOBS = ("gpt-*", "*-mini", "q*", "?", "[a-m]*", "gpt-4")
MODELS = ("gpt-4", "gpt-mini", "qwen", "q-mini", "llama", "z", "a", "-mini")
TAGS = ("gpu", "slow", "qx")
HOSTS = ("docs.python.org", "*.example.org", "any.example.org")
AGENTS = {"coder": ("fs_read", "run"), "surfer": ("web_fetch",)}
ORIGINS = {
    "alice": ("user", "alice"),
    "adm": ("group", "adm"),
    "staff": ("group", "staff"),
    "admins": ("group", "adm"),  # two names for one group
    "tablet": ("key", "tablet"),
    "pi": ("node", "pi"),
    "bot": ("agent", "coder"),
}
EFFECTS = tuple(Effect)
RANK = {"deny": 0, "ask": 1, "allow": 2}


def word(outcome: Permit | Denied | NeedsApproval) -> str:
    """Name an outcome."""
    return {Permit: "allow", NeedsApproval: "ask", Denied: "deny"}[type(outcome)]


def checked(text: str) -> Checked:
    """Check a policy on a machine that has every program."""
    return check_policy(text.encode(), path="policy.toml", resolve_program=lambda name: f"/usr/bin/{name}")


def rule_of(number: int, effect: Effect, conditions: Conditions) -> Rule:
    return Rule(
        id=RuleId(f"r{number}"),
        why="because",
        effect=effect,
        conditions=conditions,
        limits=Obligations(),
        approve_by=("owner",),
        path="p.toml",
        line=number + 1,
    )


def policy_of(rules: Sequence[Rule], never: Conditions | None = None) -> Policy:
    """Return a policy of the small world."""
    return Policy(
        name="small",
        sha256="0" * 64,
        path="p.toml",
        labels=Labels(order=LABELS, default="internal"),
        origins={name: Origin(name=name, kind=kind, value=value) for name, (kind, value) in ORIGINS.items()},
        destinations={
            "big": Destination(
                name="big", api="openai", url="https://b", credential=None, models=("gpt-*", "?")
            ),
            "open": Destination(name="open", api="openai", url="https://o", credential=None, models=None),
        },
        prefer=(),
        tools={
            "fs_read": ToolDecl(name="fs_read"),
            "run": ToolDecl(name="run", programs=("/bin/ls",)),
            "web_fetch": ToolDecl(name="web_fetch", hosts=HOSTS),
        },
        agents={
            name: AgentProfile(
                name=name, model=None, tools=tools, read_paths=(".",), write_paths=(), limits=Limits()
            )
            for name, tools in AGENTS.items()
        },
        rules=tuple(rules),
        invariants=(Invariant(id="never", never=never, line=1),) if never is not None else (),
        tests=(),
    )


def _some(values: Sequence[object]) -> st.SearchStrategy[object]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=2, unique=True).map(tuple)


_SPANS = st.sampled_from([Span(low=1), Span(high=0), Span(high=1), Span(low=1, high=1), Span(low=2)])
_CONDITION: dict[str, st.SearchStrategy[object]] = {
    "action": _some(tuple(Action)),
    "zone": _some(tuple(Zone)),
    "dest": _some(("big", "open", "web:docs.python.org", "web:*.example.org", "web:any.example.org")),
    "start": _some(tuple(Start)),
    "node": _some(("pi*", "pc")),
    "tag": _some(("g*", "slow", "*x")),
    "tier": _some(("small", "large")),
    "model": _some(GLOBS),
    "label": _SPANS,
    "origin": _some(("owner", *ORIGINS)),
    "agent": _some(tuple(AGENTS)),
    "tool": _some(("fs_read", "run", "web_fetch")),
    "tainted": st.booleans(),
    "hours": _some(((0, 60), (1380, 60), (600, 1440))),
    "roster_age": st.sampled_from([Span(high=3600), Span(low=60), Span(low=60, high=60)]),
    "min_sandbox": st.sampled_from(tuple(SandboxLevel)),
}


@st.composite
def conditions(draw: st.DrawFn, *, least: int = 0) -> Conditions:
    """Draw conditions on a few attributes."""
    names = draw(st.lists(st.sampled_from(sorted(_CONDITION)), min_size=least, max_size=4, unique=True))
    return Conditions(**{name: draw(_CONDITION[name]) for name in names})  # type: ignore[arg-type]


@st.composite
def policies(draw: st.DrawFn, *, with_invariant: bool = False) -> Policy:
    """Draw a policy of up to six rules."""
    drawn = draw(st.lists(st.tuples(st.sampled_from(EFFECTS), conditions()), max_size=6))
    rules = [rule_of(i, effect, some) for i, (effect, some) in enumerate(drawn)]
    return policy_of(rules, draw(conditions(least=1)) if with_invariant else None)


PRINCIPALS = st.one_of(
    st.builds(
        Principal,
        is_owner=st.booleans(),
        user=st.sampled_from([None, "alice", "bob"]),
        groups=st.frozensets(st.sampled_from(["adm", "staff", "other"])),
    ),
    st.builds(Principal, key=st.sampled_from(["tablet", "phone"]), is_owner=st.booleans()),
    st.builds(Principal, node=st.sampled_from(["pi", "pc"]), is_owner=st.booleans()),
    st.builds(Principal, agent=st.sampled_from(["coder", "surfer"]), is_owner=st.booleans()),
)
REQUESTS = st.builds(
    Request,
    action=st.sampled_from(Action),
    principal=PRINCIPALS,
    zone=st.sampled_from(Zone),
    start=st.sampled_from(Start),
    label=st.sampled_from([None, *LABELS, "unheard-of"]),
    model=st.sampled_from([None, *MODELS]),
    dest=st.sampled_from(
        [
            None,
            "big",
            "open",
            "nowhere",
            "web:docs.python.org",
            "web:x.example.org",
            "web:any.example.org",
            "web:evil.org",
        ]
    ),
    node=st.sampled_from([None, "pi4", "pc", "other"]),
    tags=st.frozensets(st.sampled_from(TAGS)),
    tier=st.sampled_from([None, "small", "huge"]),
    agent=st.sampled_from([None, "coder", "surfer", "stranger"]),
    tool=st.sampled_from([None, "fs_read", "run", "web_fetch", "fs_write"]),
    tainted=st.booleans(),
    minute_of_day=st.sampled_from([UNKNOWN, 0, 59, 60, 600, 1380, 1439]),
    roster_age_s=st.sampled_from([UNKNOWN, 0, 59, 60, 61, 3600, 3601]),
    sandbox=st.sampled_from([UNKNOWN, *SandboxLevel]),
)


@st.composite
def sensible_requests(draw: st.DrawFn) -> Request:
    """Draw requests that mostly get past the built-in laws, so that rules decide them."""
    request = draw(REQUESTS)
    if request.action is Action.INFER:
        dest = draw(st.sampled_from(["big", "open"])) if request.zone is Zone.CLOUD else None
        request = replace(request, dest=dest)
    elif request.action is Action.TOOL:
        agent = draw(st.sampled_from(sorted(AGENTS)))
        tool = draw(st.sampled_from(AGENTS[agent]))
        hosts = ["web:docs.python.org", "web:x.example.org", "web:any.example.org"]
        is_web = tool == "web_fetch"
        request = replace(
            request,
            agent=agent,
            tool=tool,
            zone=Zone.CLOUD if is_web else Zone.SELF,
            dest=draw(st.sampled_from(hosts)) if is_web else None,
        )
    else:
        request = replace(request, zone=Zone.SELF, dest=None)
    return request


# --- the specification, once more and slowly ---------------------------------------------------------

_ALWAYS = ["action", "zone", "start", "origin", "hours", "roster_age"]
_OF_WORK = ["node", "tag", "tier", "label", "agent", "tainted", "min_sandbox"]
_ABOUT = {
    Action.INFER: [*_ALWAYS, *_OF_WORK, "dest", "model"],
    Action.TOOL: [*_ALWAYS, *_OF_WORK, "dest", "tool"],
    Action.TASK: [*_ALWAYS, *_OF_WORK],
    Action.ADMIN: _ALWAYS,
}


def naive_decision(policy: Policy, request: Request) -> str:
    """Decide a request as the language page says, rule by rule."""
    if naive_refusal(policy, request):
        return "deny"
    effects = {
        rule.effect
        for rule in policy.rules
        if naive_match(policy, rule.conditions, request, is_forbid=rule.effect is Effect.FORBID)
    }
    if Effect.FORBID in effects or not effects:
        return "deny"
    return "ask" if Effect.ASK in effects else "allow"


def naive_refusal(policy: Policy, request: Request) -> bool:
    """Tell whether a request is denied before any rule is asked."""
    zone, dest = request.zone, request.dest
    if request.start is Start.PEER and zone is not Zone.SELF:
        return True
    match request.action:
        case Action.ADMIN:
            return zone is not Zone.SELF or dest is not None
        case Action.TASK:
            return zone is Zone.CLOUD or dest is not None
        case Action.INFER if zone is Zone.CLOUD:
            if dest == "open":
                return False
            return (
                dest != "big"
                or request.model is None
                or not (request.model.startswith("gpt-") or len(request.model) == 1)
            )
        case Action.INFER:
            return dest is not None
        case Action.TOOL:
            if request.tool not in AGENTS.get(request.agent or "", ()):
                return True
            if request.tool == "web_fetch":
                hosts = {"web:docs.python.org", "web:x.example.org", "web:any.example.org"}
                return zone is not Zone.CLOUD or dest not in hosts
            return zone is not Zone.SELF or dest is not None


def naive_match(policy: Policy, wanted: Conditions, request: Request, *, is_forbid: bool) -> bool:
    """Tell whether every condition holds; what cannot be told counts against the request."""
    return all(
        name in _ABOUT[request.action] and _holds(policy, name, getattr(wanted, name), request, is_forbid)
        for name in wanted.named()
    )


def _holds(policy: Policy, name: str, wanted: object, request: Request, is_forbid: bool) -> bool:
    if name == "label":
        assert isinstance(wanted, Span)
        label = "internal" if request.label is None else request.label
        return wanted.holds(LABELS.index(label) if label in LABELS else len(LABELS) - 1)
    if name == "origin":
        assert isinstance(wanted, tuple)
        return bool(_speakers(request, is_forbid) & set(wanted))
    if name == "tag":
        assert isinstance(wanted, tuple)
        return any(fnmatchcase(tag, glob) for tag in request.tags for glob in wanted)
    fields = {"hours": "minute_of_day", "roster_age": "roster_age_s", "min_sandbox": "sandbox"}
    fact = getattr(request, fields.get(name, name))
    if fact is UNKNOWN:
        return is_forbid
    if name == "roster_age":
        assert isinstance(wanted, Span)
        return wanted.holds(fact)
    if name == "min_sandbox":
        assert isinstance(wanted, SandboxLevel)
        return list(SandboxLevel).index(fact) >= list(SandboxLevel).index(wanted)
    if name == "tainted":
        return bool(fact == wanted)
    assert isinstance(wanted, tuple)
    if name == "hours":
        return any(a <= fact < b if a < b else fact >= a or fact < b for a, b in wanted)
    if name in {"model", "node", "dest"}:
        return fact is not None and any(fnmatchcase(fact, glob) for glob in wanted)
    return fact in wanted


def _speakers(request: Request, is_forbid: bool) -> set[str]:
    who = request.principal
    claims = {
        name
        for name, (kind, value) in ORIGINS.items()
        if (value in who.groups if kind == "group" else getattr(who, kind) == value)
    }
    if who.is_owner and (who.agent, who.key, who.node) == (None, None, None):
        claims.add("owner")
    if request.start is Start.PEER and not is_forbid:
        return claims & {"pi"}
    return claims
