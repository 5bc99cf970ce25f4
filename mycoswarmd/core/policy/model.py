"""A policy as data: what a file says after parsing, before anything is decided.

Law: order never matters, so nothing here has an order that a decision could use. A `Policy` from
`core.policy.check` has passed every check; nothing else may be put in force.
Source: design, policy language.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Final

from mycoswarmd.core.types import (
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

# Shell globs match one name; a longer one is a mistake or an attack on the matcher.
MAX_NAME: Final = 256
_NODE_ID: Final = re.compile(r"[a-z2-7]{26}")
OWNER: Final = "owner"

# Which attribute exists for which action. A condition on an attribute that an action does not have
# never matches it, whatever the effect: an `admin` request has no label, so a rule about labels is
# not about it.
_EVERY: Final = frozenset(Action)
_CONTENT: Final = frozenset({Action.INFER, Action.TOOL, Action.TASK})
APPLIES: Final[Mapping[str, frozenset[Action]]] = {
    "action": _EVERY,
    "zone": _EVERY,
    "start": _EVERY,
    "origin": _EVERY,
    "hours": _EVERY,
    "roster_age": _EVERY,
    "dest": frozenset({Action.INFER, Action.TOOL}),
    "node": _CONTENT,
    "tag": _CONTENT,
    "tier": _CONTENT,
    "model": frozenset({Action.INFER}),
    "label": _CONTENT,
    "agent": _CONTENT,
    "tool": frozenset({Action.TOOL}),
    "tainted": _CONTENT,
    "min_sandbox": _CONTENT,
}


def key_of(attribute: str) -> str:
    """Return the word for an attribute in a policy file: `from` cannot be a name in Python."""
    return "from" if attribute == "start" else attribute


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A closed range of label ranks or of seconds; None is unbounded."""

    low: int | None = None
    high: int | None = None

    def holds(self, value: int) -> bool:
        """Tell whether a value lies inside."""
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What must all be true of a request; None is no condition. A tuple means any of, never empty."""

    action: tuple[Action, ...] | None = None
    zone: tuple[Zone, ...] | None = None
    dest: tuple[str, ...] | None = None
    start: tuple[Start, ...] | None = None
    node: tuple[str, ...] | None = None  # globs
    tag: tuple[str, ...] | None = None  # globs
    tier: tuple[str, ...] | None = None
    model: tuple[str, ...] | None = None  # globs
    label: Span | None = None
    origin: tuple[str, ...] | None = None
    agent: tuple[str, ...] | None = None
    tool: tuple[str, ...] | None = None
    tainted: bool | None = None
    hours: tuple[tuple[int, int], ...] | None = None  # minutes of the day
    roster_age: Span | None = None
    min_sandbox: SandboxLevel | None = None

    def named(self) -> tuple[str, ...]:
        """Return the attributes that have a condition."""
        return tuple(one.name for one in fields(self) if getattr(self, one.name) is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Obligations:
    """What comes with a permission; of several, the strictest counts."""

    tokens_per_day: int | None = None
    requests_per_minute: int | None = None
    max_tokens: int | None = None
    log: bool = False  # also one line in the journal, for someone who watches

    def and_also(self, other: "Obligations") -> "Obligations":
        """Return the stricter of both in every respect."""
        return Obligations(
            tokens_per_day=_lower(self.tokens_per_day, other.tokens_per_day),
            requests_per_minute=_lower(self.requests_per_minute, other.requests_per_minute),
            max_tokens=_lower(self.max_tokens, other.max_tokens),
            log=self.log or other.log,
        )


def _lower(one: int | None, other: int | None) -> int | None:
    given = [value for value in (one, other) if value is not None]
    return min(given) if given else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One [[rule]]. `path` is the file it came from, so that layers need no new fields."""

    id: RuleId
    why: str
    effect: Effect
    conditions: Conditions
    limits: Obligations
    approve_by: tuple[str, ...]  # origins, any of; only for `ask`
    path: str
    line: int

    @property
    def where(self) -> str:
        """The place of the rule, as file:line."""
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Invariant:
    """One [[invariant]]: requests that must never be allowed, nor asked about."""

    id: str
    never: Conditions
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTest:
    """One [[test]]: a request and its expected outcome, and by which rule if the file says."""

    name: str
    request: Request
    expect: str  # allow | ask | deny
    rule: str | None
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """The labels, least sensitive first."""

    order: tuple[str, ...] = ("public", "internal", "private", "secret")
    default: str = "private"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A name for a speaker: exactly one of the kinds `user group key node agent`, and which."""

    name: str
    kind: str
    value: str

    def is_one_of(self, principal: Principal) -> bool:
        """Tell whether a principal claims to be this. What has the form of a key's id is never a name."""
        if self.kind == "group":
            return self.value in principal.groups
        if self.kind == "node" and is_node_id(self.value):
            return principal.node_id == self.value
        return bool(getattr(principal, self.kind) == self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """A declared way out of the swarm. Declaring one opens nothing: a rule must allow it."""

    name: str
    api: str  # openai | anthropic
    url: str
    credential: str | None
    models: tuple[str, ...] | None  # globs; None: any name

    def serves(self, model: str | None) -> bool:
        """Tell whether this name may be asked of it."""
        if self.models is None:
            return True
        return model is not None and any(fnmatchcase(model, glob) for glob in self.models)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolDecl:
    """A tool that exists on this node; programs are absolute, resolved files."""

    name: str
    programs: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()  # exact names, or *.suffix

    def reaches(self, host: str) -> bool:
        """Tell whether the tool may fetch from a host."""
        return any(host.endswith(one[1:]) if one.startswith("*.") else host == one for one in self.hosts)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentProfile:
    """What an agent has. `model` is a glob; None: a task must name one. Paths are inside the workspace."""

    name: str
    model: str | None
    tools: tuple[str, ...]
    read_paths: tuple[str, ...]
    write_paths: tuple[str, ...]
    limits: Limits
    i_accept_the_lethal_trifecta: str = ""
    line: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Policy:
    """A whole policy. Compared by identity: two loads of one file are two policies."""

    name: str
    sha256: str
    path: str
    labels: Labels
    origins: Mapping[str, Origin]
    destinations: Mapping[str, Destination]
    prefer: tuple[str, ...]
    tools: Mapping[str, ToolDecl]
    agents: Mapping[str, AgentProfile]
    rules: tuple[Rule, ...]
    invariants: tuple[Invariant, ...]
    tests: tuple[PolicyTest, ...]

    def label_rank(self, label: str | None) -> int:
        """Return how sensitive a label is: None is the default, an unknown one the highest."""
        order = self.labels.order
        name = self.labels.default if label is None else label
        return order.index(name) if name in order else len(order) - 1

    def highest(self, *labels: str | None) -> str:
        """Return the most sensitive of some labels; of none, the default."""
        ranks = [self.label_rank(label) for label in labels]
        return self.labels.order[max(ranks, default=self.label_rank(None))]


def is_node_id(word: str) -> bool:
    """Tell whether a word has the form of the id of a key: 26 characters of base32."""
    return _NODE_ID.fullmatch(word) is not None


def node_principal(word: str) -> Principal:
    """Return another node as a speaker, by its name or by the id of its key."""
    return Principal(node=word, node_id=word if is_node_id(word) else None)


def is_person(principal: Principal) -> bool:
    """Tell whether a principal is somebody at this node or an operator, not an agent, a key or a node."""
    return principal.agent is None and principal.key is None and principal.node is None


def origins_of(policy: Policy, principal: Principal) -> frozenset[str]:
    """Return every origin that a principal claims to be. An agent, a key or a node is never the owner."""
    names = {name for name, origin in policy.origins.items() if origin.is_one_of(principal)}
    if principal.is_owner and is_person(principal):
        names.add(OWNER)
    return frozenset(names)
