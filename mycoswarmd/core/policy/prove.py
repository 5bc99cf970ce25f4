"""Proof by enumeration: an invariant holds when no point of the whole space breaks it.

The space over-approximates (core.policy.space), so "never" is sound: no proof where there is a
counterexample. An outcome of ask breaks a `never` as allow does: a person in a hurry says yes.
"""

from dataclasses import dataclass

from mycoswarmd.core.policy.model import Invariant, Policy
from mycoswarmd.core.policy.space import MAX_POINTS, Space, Wanted
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
    """Prove every invariant, or find a request that breaks it. May raise globs.TooManyGlobs."""
    return tuple(_prove(policy, invariant) for invariant in policy.invariants)


def _prove(policy: Policy, invariant: Invariant) -> ProofResult:
    rows = [Row(rule.conditions, rule.effect) for rule in policy.rules]
    # The invariant is one more row, and counts as a forbid: what cannot be told satisfies it.
    table = Table(policy, [*rows, Row(invariant.never, Effect.FORBID)])
    broken = 1 << len(rows)
    wanted = Wanted(every=broken, some=table.allow | table.ask, none=table.forbid & ~broken)
    space = Space(policy, table)
    points = space.size(wanted)
    if points > MAX_POINTS and space.tried(wanted) > MAX_POINTS:
        return ProofResult(
            invariant=invariant.id, line=invariant.line, holds=False, points=points, is_too_large=True
        )
    found = space.find(wanted)
    if found is None:
        return ProofResult(invariant=invariant.id, line=invariant.line, holds=True, points=points)
    opening = table.match(found) & wanted.some
    return ProofResult(
        invariant=invariant.id,
        line=invariant.line,
        holds=False,
        points=points,
        counterexample=found,
        by_rule=policy.rules[(opening & -opening).bit_length() - 1].id,
    )
