"""A decision in words: which rule decides, and what each other rule lacked. The same code as the decision."""

from dataclasses import dataclass

from mycoswarmd.core.policy.evaluate import NeedsApproval, Permit, evaluate, rules_of
from mycoswarmd.core.policy.model import Conditions, Policy, Span, key_of, origins_of
from mycoswarmd.core.policy.request import describe
from mycoswarmd.core.policy.table import table_of
from mycoswarmd.core.types import UNKNOWN, Effect, Request, RuleId

_FIELDS = {"hours": "minute_of_day", "roster_age": "roster_age_s", "min_sandbox": "sandbox", "tag": "tags"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lacking:
    """A rule that did not match, and on what."""

    rule: str
    where: str
    effect: Effect
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Everything there is to say about one decision."""

    decision: str  # allow | ask | deny
    rule: str
    why: str
    where: str
    request: str
    matched: tuple[str, ...]
    lacking: tuple[Lacking, ...]
    policy_sha256: str

    def as_json(self) -> dict[str, object]:
        """Return it for programs."""
        return {
            "decision": self.decision,
            "rule": self.rule,
            "why": self.why,
            "where": self.where,
            "request": self.request,
            "matched": list(self.matched),
            "lacking": [
                {
                    "rule": one.rule,
                    "where": one.where,
                    "effect": one.effect.value,
                    "missing": list(one.missing),
                }
                for one in self.lacking
            ],
            "policy": self.policy_sha256,
        }

    def render(self) -> str:
        """Return it for people."""
        lines = [f"{self.decision}: {self.request}", f"  decided by {self.rule} {self.where}".rstrip()]
        if self.why:
            lines.append(f"  {self.why}")
        others = [rule for rule in self.matched if rule != self.rule]
        if others:
            lines.append(f"  also matched: {', '.join(others)}")
        lines += [
            f"  {one.effect.value} {one.rule} ({one.where}) does not match: {'; '.join(one.missing)}"
            for one in self.lacking
        ]
        return "\n".join(lines)


def explain(policy: Policy | None, request: Request) -> Explanation:
    """Decide a request and say why."""
    outcome = evaluate(policy, request)
    match outcome:
        case Permit():
            whys = {rule.id: rule.why for rule in policy.rules} if policy is not None else {}
            decision, why = "allow", whys[RuleId(outcome.rule)]
        case NeedsApproval():
            decision, why = "ask", f"{outcome.why}; to be approved by {' and '.join(outcome.approve_by)}"
        case _:
            decision, why = "deny", outcome.message
    mask = table_of(policy).match(request) if policy is not None else 0
    return Explanation(
        decision=decision,
        rule=outcome.rule,
        why=why,
        where=outcome.where,
        request=describe(request),
        matched=tuple(rule.id for rule in rules_of(policy, mask)) if policy is not None else (),
        lacking=_lacking(policy, request, mask) if policy is not None else (),
        policy_sha256=policy.sha256 if policy is not None else "",
    )


def _lacking(policy: Policy, request: Request, mask: int) -> tuple[Lacking, ...]:
    table = table_of(policy)
    return tuple(
        Lacking(
            rule=rule.id,
            where=rule.where,
            effect=rule.effect,
            missing=tuple(
                f"{key_of(name)} is {_have(policy, request, name)}, "
                f"not {_wanted(policy, rule.conditions, name)}"
                for name in table.failing(request, index)
            ),
        )
        for index, rule in enumerate(policy.rules)
        if not mask >> index & 1
    )


def _have(policy: Policy, request: Request, name: str) -> str:
    if name == "origin":
        return ", ".join(sorted(origins_of(policy, request.principal))) or "none that is declared"
    if name == "label":
        return policy.highest(request.label)
    value = getattr(request, _FIELDS.get(name, name))
    if value is UNKNOWN:
        return "not known"
    if value is None or value == frozenset():
        return "none"
    if name == "hours":
        return f"{value // 60:02}:{value % 60:02}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _wanted(policy: Policy, conditions: Conditions, name: str) -> str:
    wanted = getattr(conditions, name)
    if isinstance(wanted, Span):
        names = policy.labels.order if name == "label" else None
        ends = (("at least", wanted.low), ("at most", wanted.high))
        return " and ".join(f"{word} {names[end] if names else end}" for word, end in ends if end is not None)
    if name == "hours":
        return " or ".join(f"{a // 60:02}:{a % 60:02}-{b // 60:02}:{b % 60:02}" for a, b in wanted)
    if isinstance(wanted, tuple):
        return " or ".join(str(one) for one in wanted)
    return str(wanted).lower()
