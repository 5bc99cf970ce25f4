"""The laws of the policy language, over many small policies and requests."""

from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mycoswarmd.core.policy.administer import nobody_administers
from mycoswarmd.core.policy.diff import changed_requests
from mycoswarmd.core.policy.evaluate import Approval, NeedsApproval, Permit, evaluate
from mycoswarmd.core.policy.explain import explain
from mycoswarmd.core.policy.globs import shortest_names
from mycoswarmd.core.policy.model import Conditions, Policy
from mycoswarmd.core.policy.prove import prove
from mycoswarmd.core.policy.request import facts_of, parse_request
from mycoswarmd.core.policy.space import Space, Wanted
from mycoswarmd.core.policy.table import table_of
from mycoswarmd.core.types import UNKNOWN, Action, Effect, Principal, Request, Start, Unknown, Zone
from mycoswarmd.errors import Denied, PolicyInvalid, Problem
from tests.policies import (
    EFFECTS,
    LABELS,
    PRINCIPALS,
    RANK,
    REQUESTS,
    checked,
    conditions,
    naive_decision,
    naive_match,
    naive_refusal,
    policies,
    policy_of,
    rule_of,
    sensible_requests,
    word,
)

# On a slow machine the most thorough of them take minutes.
pytestmark = pytest.mark.timeout(600)
ANY_REQUEST = st.one_of(sensible_requests(), sensible_requests(), REQUESTS)
many = settings(max_examples=100, deadline=None)
fewer = settings(max_examples=50, deadline=None)


def _told(one: Policy, two: Policy) -> list[str]:
    """Return the changes that are told; that there may be more is said of policies of many classes."""
    return [line for line in changed_requests(one, two) if not line.startswith("and perhaps")]


@many
@given(policies(), st.lists(ANY_REQUEST, min_size=5, max_size=5))
def test_the_evaluator_decides_as_the_specification_does(policy: Policy, requests: list[Request]) -> None:
    for request in requests:
        assert word(evaluate(policy, request)) == naive_decision(policy, request)


@many
@given(policies(), ANY_REQUEST, st.data())
def test_permuting_the_rules_changes_nothing(policy: Policy, request: Request, data: st.DataObject) -> None:
    other = replace(policy, rules=tuple(data.draw(st.permutations(policy.rules))))
    one, two = evaluate(policy, request), evaluate(other, request)
    assert (word(one), one.rule, one.where) == (word(two), two.rule, two.where)


@many
@given(policies(), conditions(), st.sampled_from(EFFECTS), ANY_REQUEST)
def test_adding_a_rule_moves_only_its_own_way_and_only_what_it_matches(
    policy: Policy, some: object, effect: Effect, request: Request
) -> None:
    rule = rule_of(99, effect, some)  # type: ignore[arg-type]
    before = RANK[word(evaluate(policy, request))]
    after = RANK[word(evaluate(replace(policy, rules=(*policy.rules, rule)), request))]
    if effect is Effect.FORBID:
        assert after <= before
    if effect is Effect.ALLOW:
        assert after >= before
    if not naive_match(policy, rule.conditions, request, is_forbid=effect is Effect.FORBID):
        assert after == before


@fewer
@given(REQUESTS)
def test_no_rules_deny_everything(request: Request) -> None:
    for policy in (None, policy_of([])):
        outcome = evaluate(policy, request)
        assert isinstance(outcome, Denied)
        assert outcome.message.startswith("cannot ")


@many
@given(policies(), REQUESTS)
def test_an_explanation_says_what_is_decided(policy: Policy, request: Request) -> None:
    outcome, said = evaluate(policy, request), explain(policy, request)
    assert (said.decision, said.rule, said.where) == (word(outcome), outcome.rule, outcome.where)
    assert {*said.matched, *(one.rule for one in said.lacking)} == {rule.id for rule in policy.rules}
    assert all(one.missing for one in said.lacking)
    for rule in policy.rules:
        matches = naive_match(policy, rule.conditions, request, is_forbid=rule.effect is Effect.FORBID)
        assert matches == (rule.id in said.matched)


@many
@given(policies(), sensible_requests(), PRINCIPALS)
def test_an_approval_permits_only_by_a_person_and_only_what_was_asked(
    policy: Policy, request: Request, by: Principal
) -> None:
    rules = [rule for rule in policy.rules if rule.effect is not Effect.FORBID]
    policy = policy_of([*rules, rule_of(99, Effect.ASK, Conditions())])
    needs = evaluate(policy, request)
    assume(isinstance(needs, NeedsApproval))
    assert isinstance(needs, NeedsApproval)
    outcome = evaluate(policy, request, approval=Approval(what=needs.what, by=by))
    may = by.is_owner and (by.agent, by.key, by.node) == (None, None, None)
    assert isinstance(outcome, Permit) == may
    other = evaluate(policy, request, approval=Approval(what="0" * 64, by=Principal(is_owner=True)))
    assert isinstance(other, NeedsApproval)


@many
@given(policies(with_invariant=True), st.lists(sensible_requests(), min_size=10, max_size=10))
def test_no_request_breaks_what_is_proved_and_a_counterexample_does(
    policy: Policy, requests: list[Request]
) -> None:
    (proof,) = prove(policy)
    never = policy.invariants[0].never
    if proof.holds:
        for request in requests:
            if naive_match(policy, never, request, is_forbid=True):
                assert naive_decision(policy, request) == "deny"
    else:
        found = proof.counterexample
        assert found is not None
        assert naive_match(policy, never, found, is_forbid=True)
        assert word(evaluate(policy, found)) in {"ask", "allow"}
        assert proof.by_rule in explain(policy, found).matched


@fewer
@given(policies(with_invariant=True))
def test_a_proof_agrees_with_asking_every_point(policy: Policy) -> None:
    """Compare with a proof that prunes nothing: each shape with each value of each column."""
    (proof,) = prove(policy)
    table = table_of(policy_of([*policy.rules, rule_of(98, Effect.FORBID, policy.invariants[0].never)]))
    space = Space(policy, table)
    columns = [
        c for name, c in table.columns.items() if name not in {"zone", "dest", "tool", "agent", "start"}
    ]
    is_broken, tried = False, 0
    for shape in space.shapes:
        for values in product(*(list(column.values(shape, table.every)) for column in columns)):
            tried += 1
            assume(tried < 20_000)
            fields = {column.field: value for column, value in zip(columns, values, strict=True)}
            request = replace(shape, **fields)  # type: ignore[arg-type]
            if naive_match(policy, policy.invariants[0].never, request, is_forbid=True):
                is_broken = is_broken or word(evaluate(policy, request)) != "deny"
        if is_broken:
            break
    assert proof.holds == (not is_broken)


@settings(max_examples=20, deadline=None)
@given(policies(), st.data())
def test_permuting_the_rules_is_no_difference(policy: Policy, data: st.DataObject) -> None:
    assert not _told(policy, replace(policy, rules=tuple(data.draw(st.permutations(policy.rules)))))


@settings(max_examples=25, deadline=None)
@given(policies(), policies(), st.lists(ANY_REQUEST, min_size=10, max_size=10))
def test_a_difference_is_always_told(one: Policy, two: Policy, requests: list[Request]) -> None:
    if any(naive_decision(one, request) != naive_decision(two, request) for request in requests):
        assert changed_requests(one, two)
    assert not _told(one, one)


@many
@given(policies(), sensible_requests())
def test_what_is_decided_can_be_found(policy: Policy, request: Request) -> None:
    """Whatever rule matches some request is found to be able to match."""
    space = Space(policy, table_of(policy))
    for i, rule in enumerate(policy.rules):
        if naive_match(policy, rule.conditions, request, is_forbid=rule.effect is Effect.FORBID):
            wanted = Wanted(
                every=1 << i, some=1 << i, none=0, is_open=naive_refusal(policy, request) is False
            )
            assert space.find(wanted) is not None


@many
@given(policies(), ANY_REQUEST)
def test_unknown_facts_never_help(policy: Policy, request: Request) -> None:
    # An ask that cannot be told does not match (language, point 3), so an allow beside it may then decide.
    policy = replace(policy, rules=tuple(rule for rule in policy.rules if rule.effect is not Effect.ASK))
    unknown = replace(request, minute_of_day=UNKNOWN, roster_age_s=UNKNOWN, sandbox=UNKNOWN)
    assert RANK[word(evaluate(policy, unknown))] <= RANK[word(evaluate(policy, request))]


@many
@given(REQUESTS)
def test_a_request_survives_being_written_down(request: Request) -> None:
    policy = policy_of([])
    facts = facts_of(request)
    again = parse_request(facts, policy)
    assert facts_of(again) == facts


@many
@given(st.lists(st.text(alphabet="ab*?", min_size=1, max_size=4), min_size=1, max_size=4, unique=True))
def test_globs_combine_exactly_as_names_show(globs: list[str]) -> None:
    def signature(name: str) -> tuple[bool, ...]:
        return tuple(fnmatchcase(name, glob) for glob in globs)

    found = [signature(name) for name in shortest_names(globs)]
    assert len(found) == len(set(found))
    names = ("".join(chars) for length in range(1, 6) for chars in product("abx", repeat=length))
    assert {signature(name) for name in names} <= set(found)


@many
@given(st.lists(st.text(alphabet="ac*?[]!-", min_size=1, max_size=6), min_size=1, max_size=3, unique=True))
def test_globs_with_sets_combine_as_names_show(globs: list[str]) -> None:
    def signature(name: str) -> tuple[bool, ...]:
        return tuple(fnmatchcase(name, glob) for glob in globs)

    found = {signature(name) for name in shortest_names(globs)}
    names = ("".join(chars) for length in range(1, 4) for chars in product("abcz[]!-", repeat=length))
    assert {signature(name) for name in names} <= found


@many
@given(policies(), sensible_requests(), st.text(alphabet="agpt-4miniq[", max_size=8))
def test_every_request_lies_at_a_point_that_matches_the_same_rules(
    policy: Policy, request: Request, model: str
) -> None:
    """What the space leaves out, no proof and no warning would know about."""
    table = table_of(policy)
    space = Space(policy, table)
    for one in (request, replace(request, model=model)):
        mask = table.match(one)
        if mask and not naive_refusal(policy, one):
            wanted = Wanted(every=mask, some=mask, none=table.every & ~mask)
            assert space.find(wanted) is not None, one


@many
@given(policies(), sensible_requests())
def test_what_a_peer_claims_never_helps_it(policy: Policy, request: Request) -> None:
    from_peer = replace(request, start=Start.PEER, zone=Zone.SELF, dest=None)
    proved = replace(from_peer, principal=Principal(node=request.principal.node))
    assert RANK[word(evaluate(policy, from_peer))] <= RANK[word(evaluate(policy, proved))]


@many
@given(policies(), sensible_requests())
def test_a_label_that_nobody_knows_counts_as_the_highest(policy: Policy, request: Request) -> None:
    unheard, highest = (replace(request, label=label) for label in ("unheard-of", LABELS[-1]))
    assert evaluate(policy, unheard).rule == evaluate(policy, highest).rule
    assert word(evaluate(policy, unheard)) == word(evaluate(policy, highest))


_SAMPLE = (Path(__file__).parents[2] / "policy" / "profiles" / "family.toml").read_text()


@fewer
@given(st.integers(0, len(_SAMPLE)), st.integers(0, 60), st.text(alphabet="[]{}\"'=#\n,.a1 é\0", max_size=6))
def test_any_damage_to_a_file_is_refused_or_still_a_whole_policy(at: int, gone: int, new: str) -> None:
    problems: tuple[Problem, ...] = ()
    try:
        found = checked(_SAMPLE[:at] + new + _SAMPLE[at + gone :])
    except PolicyInvalid as exc:
        problems = exc.problems
    else:
        assert all(proof.holds for proof in found.proofs)
        assert all(test.passed for test in found.tests)
        return
    assert problems
    assert all(problem.line >= 1 and problem.message.startswith("cannot ") for problem in problems)


_PEOPLE = [
    Principal(is_owner=owner, user=user, groups=frozenset(groups))
    for owner, user, groups in product(
        (False, True), (None, "alice"), ((), ("adm",), ("staff",), ("adm", "staff"))
    )
]
_MINUTES: tuple[int | Unknown, ...] = (UNKNOWN, 0, 60, 600, 1380)
_AGES_S: tuple[int | Unknown, ...] = (UNKNOWN, 0, 60, 61, 3601)


@many
@given(policies())
def test_nobody_administers_is_said_exactly_where_no_person_ever_may(drawn: Policy) -> None:
    """Also of rules about every action: of each, what is left is what can be told of an admin request."""
    about_people = [
        replace(
            rule,
            conditions=Conditions(
                start=rule.conditions.start,
                origin=rule.conditions.origin,
                hours=rule.conditions.hours,
                roster_age=rule.conditions.roster_age,
            ),
        )
        for rule in drawn.rules
    ]
    for policy in (drawn, replace(drawn, rules=tuple(about_people))):
        asked = (
            Request(action=Action.ADMIN, principal=who, minute_of_day=minute, roster_age_s=age_s)
            for who, minute, age_s in product(_PEOPLE, _MINUTES, _AGES_S)
        )
        may = any(isinstance(evaluate(policy, request), Permit) for request in asked)
        assert nobody_administers(policy) is not may
