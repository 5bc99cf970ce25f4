"""Proof by enumeration: an invariant holds when no point of the whole space breaks it.

The space over-approximates (core.policy.space), so "never" is sound: no proof where there is a
counterexample. An outcome of ask breaks a `never` as allow does: a person in a hurry says yes.
"""

from dataclasses import dataclass

from mycoswarmd.core.policy.evaluate import refusal
from mycoswarmd.core.policy.model import Invariant, Policy
from mycoswarmd.core.policy.space import MAX_POINTS, Space
from mycoswarmd.core.policy.table import Row, Table
from mycoswarmd.core.types import Effect, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofResult:
    """What came of one invariant.

    Attributes:
        points: how many classes of request there were.
        counterexample: a request that breaks it, or None.
        by_rule: the rule that allows the counterexample.
        is_too_large: there were more points than are tried; nothing is proved.
    """

    invariant: str
    line: int
    holds: bool
    points: int
    counterexample: Request | None = None
    by_rule: str | None = None
    is_too_large: bool = False


def prove(policy: Policy) -> tuple[ProofResult, ...]:
    """Prove every invariant, or find a request that breaks it."""
    return tuple(_prove(policy, invariant) for invariant in policy.invariants)


def _prove(policy: Policy, invariant: Invariant) -> ProofResult:
    rows = [Row(rule.conditions, rule.effect) for rule in policy.rules]
    table = Table(policy, [*rows, Row(invariant.never, Effect.FORBID)])
    space, broken = Space(policy, table), 1 << len(rows)
    points = space.size(table.every)
    if points > MAX_POINTS:
        return ProofResult(
            invariant=invariant.id, line=invariant.line, holds=False, points=points, is_too_large=True
        )
    opening, forbidding = table.allow | table.ask, table.forbid & ~broken
    for mask, request in space.points(broken, table.every):
        if mask & opening and not mask & forbidding and refusal(policy, request) is None:
            first = (mask & opening & -(mask & opening)).bit_length() - 1
            return ProofResult(
                invariant=invariant.id,
                line=invariant.line,
                holds=False,
                points=points,
                counterexample=request,
                by_rule=policy.rules[first].id,
            )
    return ProofResult(invariant=invariant.id, line=invariant.line, holds=True, points=points)
