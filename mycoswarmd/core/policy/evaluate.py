"""May this be done? The one function that can make a Permit.

The decision, in this order (the numbers recur in the code):

1. No policy: denied.
2. What no rule may open is denied before any rule is asked: see `refusal`.
3. All matching rules are collected. A forbid denies; otherwise an ask asks; otherwise an allow allows;
   nothing matching is a denial.
4. An ask becomes a permit only with an approval of exactly this request, by a person whom every
   matching ask rule accepts.

Facts that cannot be told count against the request, and attributes that an action does not have never
match it; both laws live in core.policy.table and core.policy.model.
"""

import re
from dataclasses import dataclass
from typing import Final, NoReturn

from mycoswarmd.core.policy.model import Obligations, Policy, Rule, is_person, origins_of
from mycoswarmd.core.policy.request import brief, fingerprint
from mycoswarmd.core.policy.table import table_of
from mycoswarmd.core.policy.tools import TOOLS
from mycoswarmd.core.types import Action, Principal, Request, Start, Zone
from mycoswarmd.errors import Denied

WEB: Final = "web:"
# The zones in which each action can have its effect; a tool's zone is its own.
_ZONES: Final = {
    Action.INFER: frozenset(Zone),
    Action.TOOL: frozenset(Zone),
    Action.TASK: frozenset({Zone.SELF, Zone.LAN}),
    Action.ADMIN: frozenset({Zone.SELF}),
}
_HOST: Final = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")
# What `refusal` and `evaluate` answer with; no rule of a file may have one of these ids.
NO_POLICY: Final = "no-policy"
DEFAULT_DENY: Final = "default-deny"
BUILT_IN: Final = frozenset(
    {
        NO_POLICY,
        DEFAULT_DENY,
        "peer-stays-here",
        "impossible-zone",
        "undeclared-destination",
        "destination-models",
        "tool-not-listed",
    }
)
_SEAL: Final = object()


class Permit:
    """Proof that the policy allowed one request. Sending a prompt or running a tool takes one.

    Only `evaluate` makes them: constructing, copying, replacing, pickling, subclassing and assigning
    fail. That stops mistakes and makes cheating visible in review; it cannot stop hostile code in the
    same process.

    Attributes:
        request: what was allowed, exactly.
        rule: the id of the deciding rule.
        where: file:line of that rule.
        matched: the ids of all matching rules.
        limits: what comes with it; the strictest of all matching rules.
        policy_sha256: the policy that said so.
    """

    __slots__ = ("limits", "matched", "policy_sha256", "request", "rule", "where")
    request: Request
    rule: str
    where: str
    matched: tuple[str, ...]
    limits: Obligations
    policy_sha256: str

    def __init__(
        self,
        seal: object,
        request: Request,
        rule: Rule,
        *,
        matched: tuple[str, ...],
        limits: Obligations,
        sha: str,
    ) -> None:
        if seal is not _SEAL:
            raise TypeError("only core.policy.evaluate makes a Permit")
        put = object.__setattr__
        put(self, "request", request)
        put(self, "rule", str(rule.id))
        put(self, "where", rule.where)
        put(self, "matched", matched)
        put(self, "limits", limits)
        put(self, "policy_sha256", sha)

    def covers(
        self, *, zone: Zone, dest: str | None = None, model: str | None = None, node: str | None = None
    ) -> bool:
        """Tell whether a prompt may go there under this permit; without a model, any action's effect.

        In zone lan it may go to the one node that was decided about, and to no other of the swarm.
        """
        request = self.request
        return (
            request.zone is zone
            and request.dest == dest
            and (zone is not Zone.LAN or (node is not None and request.node == node))
            and (model is None or (request.action is Action.INFER and request.model == model))
        )

    def __init_subclass__(cls) -> NoReturn:
        raise TypeError("a Permit has no other kinds")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise TypeError("a Permit does not change")

    def __delattr__(self, name: str) -> NoReturn:
        raise TypeError("a Permit does not change")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a Permit is not copied")

    __reduce__ = __reduce_ex__  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedsApproval:
    """The policy asks for a person first.

    Attributes:
        approve_by: who may answer; each element must hold, and within one any of its names does.
        what: the hash of exactly what is asked, for Approval.
    """

    request: Request
    rule: str
    where: str
    why: str
    approve_by: tuple[str, ...]
    limits: Obligations
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """A person's yes to what a NeedsApproval asked."""

    what: str
    by: Principal


@dataclass(frozen=True, slots=True)
class Refusal:
    """A denial that no rule can lift: which law, and why."""

    rule: str
    why: str


def evaluate(
    policy: Policy | None, request: Request, *, approval: Approval | None = None
) -> Permit | Denied | NeedsApproval:
    """Decide one request. Total: it never raises, and what is not allowed is Denied, returned."""
    if policy is None:  # (1)
        return _denied(request, NO_POLICY, "there is no valid policy, so everything is denied")
    refused = refusal(policy, request)  # (2)
    if refused is not None:
        return _denied(request, refused.rule, refused.why)
    table = table_of(policy)
    mask = table.match(request)
    if forbidding := mask & table.forbid:  # (3)
        rule = _first(policy, forbidding)
        return _denied(request, rule.id, f"rule {rule.id!r} forbids it: {rule.why}", where=rule.where)
    if not mask:
        return _denied(request, DEFAULT_DENY, "no rule allows it")
    asking = mask & table.ask
    rule = _first(policy, asking or mask)
    matching = rules_of(policy, mask)
    limits = matching[0].limits
    for one in matching[1:]:
        limits = limits.and_also(one.limits)
    if asking:  # (4)
        askers = rules_of(policy, asking)
        what = fingerprint(request, label=policy.highest(request.label))
        if approval is None or approval.what != what or not _may_approve(policy, askers, approval.by):
            return NeedsApproval(
                request=request,
                rule=rule.id,
                where=rule.where,
                why=rule.why,
                approve_by=tuple(sorted({" or ".join(one.approve_by) for one in askers})),
                limits=limits,
                what=what,
            )
    matched = tuple([one.id for one in matching])
    return Permit(_SEAL, request, rule, matched=matched, limits=limits, sha=policy.sha256)


def refusal(policy: Policy, request: Request) -> Refusal | None:
    """Return why a request is denied before any rule is asked, or None."""
    zone, dest = request.zone, request.dest
    if request.start is Start.PEER and zone is not Zone.SELF:
        return Refusal(
            "peer-stays-here", "what came from another node is answered on this node or not at all"
        )
    if zone not in _ZONES[request.action]:
        return Refusal("impossible-zone", f"{request.action} has no effect in zone {zone}")
    if request.action is Action.TOOL:
        return _tool_refusal(policy, request)
    if zone is not Zone.CLOUD:
        if dest is None:
            return None
        return Refusal("impossible-zone", f"a destination is in zone cloud, and this would go to zone {zone}")
    destination = policy.destinations.get(dest or "")
    if destination is None:
        why = f"the policy declares no destination {dest!r}" if dest else "zone cloud needs a destination"
        return Refusal("undeclared-destination", why)
    if not destination.serves(request.model):
        return Refusal(
            "destination-models", f"destination {dest!r} is not declared to serve model {request.model!r}"
        )
    return None


def _tool_refusal(policy: Policy, request: Request) -> Refusal | None:
    """Refuse a tool that is not on the agent's list, or an effect that the tool cannot have."""
    agent, tool = policy.agents.get(request.agent or ""), request.tool or ""
    if agent is None or tool not in agent.tools:
        return Refusal("tool-not-listed", f"agent {request.agent!r} does not list tool {request.tool!r}")
    if request.zone is not TOOLS[tool].zone:
        return Refusal("impossible-zone", f"{tool} has no effect in zone {request.zone}")
    if request.zone is not Zone.CLOUD:
        return None if request.dest is None else Refusal("impossible-zone", f"{tool} has no destination")
    host = (request.dest or "").removeprefix(WEB)
    if f"{WEB}{host}" != request.dest or not _HOST.fullmatch(host) or not policy.tools[tool].reaches(host):
        return Refusal("undeclared-destination", f"the policy declares no host {request.dest!r} for {tool}")
    return None


def rules_of(policy: Policy, mask: int) -> list[Rule]:
    """Return the rules whose bits are set."""
    found = []
    while mask:
        low = mask & -mask
        found.append(policy.rules[low.bit_length() - 1])
        mask ^= low
    return found


def _first(policy: Policy, mask: int) -> Rule:
    """Return one of several rules that say the same: the smallest id, so that order never matters."""
    return min(rules_of(policy, mask), key=lambda rule: rule.id)


def _may_approve(policy: Policy, askers: list[Rule], by: Principal) -> bool:
    if not is_person(by):
        return False
    names = origins_of(policy, by)
    return all(names & set(rule.approve_by) for rule in askers)


def _denied(request: Request, rule: str, why: str, *, where: str = "") -> Denied:
    return Denied("policy-denied", f"cannot {brief(request)}: {why}", rule=rule, where=where)
