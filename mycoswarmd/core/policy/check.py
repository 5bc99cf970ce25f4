"""The one door to a policy in force: parse, built-in laws, reachability, tests, proofs.

Whatever fails here refuses the whole file; nothing of it is used.
Source: design, policy language, points 4, 11, 12, 13.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mycoswarmd.core.policy.administer import CURE, NOBODY, nobody_administers
from mycoswarmd.core.policy.evaluate import NeedsApproval, Permit, evaluate
from mycoswarmd.core.policy.globs import TooManyGlobs
from mycoswarmd.core.policy.model import Policy, PolicyTest
from mycoswarmd.core.policy.parse import parse_policy
from mycoswarmd.core.policy.prove import ProofResult, prove
from mycoswarmd.core.policy.request import describe
from mycoswarmd.core.policy.space import MAX_POINTS, Space, Wanted
from mycoswarmd.core.policy.table import table_of
from mycoswarmd.core.policy.tools import TOOLS
from mycoswarmd.core.types import Effect, Zone
from mycoswarmd.errors import PolicyInvalid, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTestResult:
    """What came of one [[test]]."""

    name: str
    line: int
    passed: bool
    expected: str
    got: str
    request: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A policy that may be put in force, and what was found on the way.

    Attributes:
        is_locked: it is proved that nobody may administer the node; one of the warnings says so.
    """

    policy: Policy
    warnings: tuple[Problem, ...]
    proofs: tuple[ProofResult, ...]
    tests: tuple[PolicyTestResult, ...]
    is_locked: bool = False


def check_policy(data: bytes, *, path: str, resolve_program: Callable[[str], str | None]) -> Checked:
    """Parse and check a policy; raise PolicyInvalid with every problem found."""
    policy, warnings = parse_policy(data, path=path, resolve_program=resolve_program)
    problems = list(_trifecta(policy))
    tests = run_tests(policy)
    for test in tests:
        if not test.passed:
            message = f"cannot accept: test {test.name!r} expects {test.expected}, the rules say {test.got}"
            problems.append(_problem(policy, test.line, message, test.request))
    proofs: tuple[ProofResult, ...] = ()
    try:
        _reach(policy, problems, warnings)
        proofs = prove(policy)
    except TooManyGlobs as exc:
        message = f"cannot prove anything about this file: {exc}"
        problems.append(_problem(policy, 1, message, "use fewer globs with several stars, groups and tags"))
    problems += [_disproved(policy, proof) for proof in proofs if not proof.holds]
    if problems:
        raise PolicyInvalid(tuple(sorted(problems, key=lambda problem: problem.line)))
    is_locked = nobody_administers(policy)
    if is_locked:
        warnings.append(_problem(policy, 1, NOBODY, CURE))
    return Checked(policy=policy, warnings=tuple(warnings), proofs=proofs, tests=tests, is_locked=is_locked)


def run_tests(policy: Policy) -> tuple[PolicyTestResult, ...]:
    """Run the file's own tests."""
    return tuple(_run_test(policy, test) for test in policy.tests)


def _run_test(policy: Policy, test: PolicyTest) -> PolicyTestResult:
    outcome = evaluate(policy, test.request)
    got = "allow" if isinstance(outcome, Permit) else "ask" if isinstance(outcome, NeedsApproval) else "deny"
    return PolicyTestResult(
        name=test.name,
        line=test.line,
        passed=got == test.expect and test.rule in {None, outcome.rule},
        expected=test.expect + (f" by {test.rule}" if test.rule else ""),
        got=f"{got} by {outcome.rule}",
        request=describe(test.request),
    )


def _disproved(policy: Policy, proof: ProofResult) -> Problem:
    if proof.is_too_large:
        return _too_many(policy, proof.line, proof.points)
    message = f"cannot accept this file: rule {proof.by_rule!r} breaks invariant {proof.invariant!r}"
    example = describe(proof.counterexample) if proof.counterexample is not None else ""
    return _problem(policy, proof.line, message, f"for example: {example}")


def _too_many(policy: Policy, line: int, points: int) -> Problem:
    message = f"cannot prove anything about {points:,} classes of request: at most {MAX_POINTS:,} are tried"
    return _problem(policy, line, message, "use fewer different globs, origins, hours or ages")


def _trifecta(policy: Policy) -> Iterable[Problem]:
    """No agent holds private data, untrusted input and a way out at once, unless its owner says why."""
    for agent in policy.agents.values():
        held = [TOOLS[name] for name in agent.tools]
        holds_all = (
            any(tool.reads_private for tool in held)
            and any(tool.untrusted_input for tool in held)
            and any(tool.way_out for tool in held)
        )
        if holds_all and not agent.i_accept_the_lethal_trifecta:
            yield _problem(
                policy,
                agent.line,
                f"cannot give agent {agent.name!r} private data, untrusted input and a way out at once",
                'take a tool away, or write i_accept_the_lethal_trifecta = "<why>"',
            )


def _reach(policy: Policy, problems: list[Problem], warnings: list[Problem]) -> None:
    """Every rule must be able to match; one that never decides is said; ways to a cloud need a label."""
    table = table_of(policy)
    space = Space(policy, table)
    # What keeps a rule from deciding: any forbid, and for an allow any ask too.
    stronger = {Effect.FORBID: 0, Effect.ASK: table.forbid, Effect.ALLOW: table.forbid | table.ask}
    for index, rule in enumerate(policy.rules):
        this = 1 << index
        if space.find(Wanted(every=this, some=this, none=0, is_open=False)) is None:
            message = f"cannot use rule {rule.id!r}: no request can match it"
            problems.append(_problem(policy, rule.line, message, "its conditions exclude one another"))
            continue
        if rule.effect is Effect.FORBID:  # it decides wherever it matches, or the request is refused anyway
            continue
        wanted = Wanted(every=this, some=this, none=stronger[rule.effect])
        if space.tried(wanted) > MAX_POINTS:
            problems.append(_too_many(policy, rule.line, space.tried(wanted)))
        elif space.find(wanted) is None:
            message = f"rule {rule.id!r} never decides: whatever it matches, others deny or ask about"
            warnings.append(_problem(policy, rule.line, message))
        has_max = rule.conditions.label is not None and rule.conditions.label.high is not None
        if not has_max and any(shape.zone is Zone.CLOUD for shape in space.matched(this)):
            message = f"cannot use rule {rule.id!r}: it can send to a cloud without a limit on the label"
            hint = 'add label = { max = "…" }, or a zone that is not cloud'
            problems.append(_problem(policy, rule.line, message, hint))


def _problem(policy: Policy, line: int, message: str, hint: str = "") -> Problem:
    return Problem(path=policy.path, line=line, message=message, hint=hint)
