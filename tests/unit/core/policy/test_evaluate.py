"""Decisions, the laws that no rule lifts, and the seal of a Permit."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mycoswarmd.core.policy.evaluate import Approval, NeedsApproval, Permit, evaluate
from mycoswarmd.core.policy.model import Conditions, Obligations, Span
from mycoswarmd.core.policy.request import parse_request
from mycoswarmd.core.types import Action, Effect, Principal, Request, SandboxLevel, Start, Zone
from mycoswarmd.errors import Denied
from tests.policies import checked, policy_of, rule_of, word

EVERYTHING = policy_of([rule_of(0, Effect.ALLOW, Conditions())])
OWNER = Principal(is_owner=True, uid=1000, user="me")


def permit() -> Permit:
    request = Request(action=Action.INFER, principal=OWNER, model="gpt-4", zone=Zone.CLOUD, dest="big")
    outcome = evaluate(EVERYTHING, request)
    assert isinstance(outcome, Permit)
    return outcome


@pytest.mark.parametrize(
    "forge",
    [
        lambda one: Permit(object(), one.request, EVERYTHING.rules[0], matched=(), limits=one.limits, sha=""),
        copy.copy,
        copy.deepcopy,
        pickle.dumps,
        lambda one: replace(one, rule="x"),
        lambda one: setattr(one, "request", None),
        lambda one: delattr(one, "request"),
        lambda _one: type("Mine", (Permit,), {}),
        lambda one: one.__reduce__(),
        lambda one: setattr(one, "more", 1),
    ],
)
def test_a_permit_cannot_be_forged(forge: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError):
        forge(permit())


def test_a_permit_covers_only_what_was_asked() -> None:
    one = permit()
    assert one.covers(zone=Zone.CLOUD, dest="big", model="gpt-4")
    assert not one.covers(zone=Zone.CLOUD, dest="big", model="gpt-5")
    assert not one.covers(zone=Zone.CLOUD, dest="open", model="gpt-4")
    assert not one.covers(zone=Zone.CLOUD, model="gpt-4")
    assert not one.covers(zone=Zone.SELF, model="gpt-4")


def test_a_tools_permit_covers_no_prompt() -> None:
    tool = evaluate(EVERYTHING, Request(action=Action.TOOL, principal=OWNER, agent="coder", tool="run"))
    assert isinstance(tool, Permit)
    assert not tool.covers(zone=Zone.SELF, model="m")


@pytest.mark.parametrize(
    ("facts", "rule"),
    [
        ({"action": "infer", "zone": "cloud", "model": "gpt-4"}, "undeclared-destination"),
        ({"action": "infer", "dest": "nowhere", "model": "gpt-4"}, "undeclared-destination"),
        ({"action": "infer", "dest": "web:docs.python.org"}, "undeclared-destination"),
        ({"action": "infer", "dest": "big", "model": "qwen-max"}, "destination-models"),
        ({"action": "infer", "dest": "big"}, "destination-models"),
        ({"action": "infer", "dest": "big", "zone": "lan", "model": "gpt-4"}, "impossible-zone"),
        ({"action": "infer", "zone": "lan", "from": "peer"}, "peer-stays-here"),
        ({"action": "infer", "dest": "open", "from": "peer"}, "peer-stays-here"),
        ({"action": "task", "zone": "cloud", "dest": "open"}, "impossible-zone"),
        ({"action": "admin", "zone": "lan"}, "impossible-zone"),
        ({"action": "tool", "tool": "run"}, "tool-not-listed"),
        (
            {"action": "tool", "tool": "web_fetch", "agent": "coder", "dest": "web:docs.python.org"},
            "tool-not-listed",
        ),
        ({"action": "tool", "tool": "fs_write", "agent": "coder"}, "tool-not-listed"),
        ({"action": "tool", "tool": "no-such", "agent": "coder"}, "tool-not-listed"),
        ({"action": "tool", "tool": "run", "agent": "stranger"}, "tool-not-listed"),
        ({"action": "tool", "agent": "coder"}, "tool-not-listed"),
        ({"action": "tool", "tool": "run", "agent": "coder", "zone": "lan"}, "impossible-zone"),
        (
            {"action": "tool", "tool": "run", "agent": "coder", "zone": "self", "dest": "open"},
            "impossible-zone",
        ),
        ({"action": "tool", "tool": "web_fetch", "agent": "surfer"}, "undeclared-destination"),
        (
            {"action": "tool", "tool": "web_fetch", "agent": "surfer", "dest": "open"},
            "undeclared-destination",
        ),
        (
            {"action": "tool", "tool": "web_fetch", "agent": "surfer", "dest": "web:evil.org"},
            "undeclared-destination",
        ),
        (
            {"action": "tool", "tool": "web_fetch", "agent": "surfer", "dest": "web:example.org"},
            "undeclared-destination",
        ),
        (
            {"action": "tool", "tool": "web_fetch", "agent": "surfer", "dest": "web:evil.org\0.example.org"},
            "undeclared-destination",
        ),
        (
            {"action": "tool", "tool": "web_fetch", "agent": "surfer", "dest": "docs.python.org"},
            "undeclared-destination",
        ),
    ],
)
def test_no_rule_lifts_a_built_in_law(facts: dict[str, object], rule: str) -> None:
    outcome = evaluate(EVERYTHING, parse_request(facts, EVERYTHING))
    assert isinstance(outcome, Denied)
    assert (outcome.rule, outcome.code) == (rule, "policy-denied")


@pytest.mark.parametrize(
    "facts",
    [
        {"action": "infer", "dest": "big", "model": "gpt-4"},
        {"action": "infer", "dest": "open", "model": "anything"},
        {"action": "infer", "zone": "lan"},
        {"action": "infer", "from": "peer"},
        {"action": "task", "zone": "lan"},
        {"action": "admin"},
        {"action": "tool", "tool": "run", "agent": "coder"},
        {"action": "tool", "tool": "web_fetch", "agent": "surfer", "dest": "web:a.b.example.org"},
    ],
)
def test_always_true_allows_what_no_law_refuses(facts: dict[str, object]) -> None:
    assert isinstance(evaluate(EVERYTHING, parse_request(facts, EVERYTHING)), Permit)


@pytest.mark.parametrize("kind", ["agent", "key", "node"])
def test_an_agent_a_key_and_a_node_are_never_the_owner(kind: str) -> None:
    policy = policy_of([rule_of(0, Effect.ALLOW, Conditions(origin=("owner",)))])
    request = Request(action=Action.ADMIN, principal=OWNER)
    assert word(evaluate(policy, request)) == "allow"
    other = replace(request, principal=replace(OWNER, **{kind: "x"}))  # type: ignore[arg-type]
    assert word(evaluate(policy, other)) == "deny"


def test_a_peers_claims_help_it_nowhere_and_count_against_it() -> None:
    request = Request(action=Action.INFER, principal=OWNER, start=Start.PEER)
    alice = Principal(user="alice", groups=frozenset({"adm"}))
    node = Principal(node="pi")
    allow = policy_of(
        [rule_of(0, Effect.ALLOW, Conditions(origin=("owner", "alice", "adm", "tablet", "pi")))]
    )
    for who in (OWNER, alice, Principal(key="tablet")):
        assert word(evaluate(allow, replace(request, principal=who))) == "deny"
        assert word(evaluate(allow, replace(request, principal=who, start=Start.LOCAL))) == "allow"
    assert word(evaluate(allow, replace(request, principal=node))) == "allow"
    forbid = policy_of([*EVERYTHING.rules, rule_of(1, Effect.FORBID, Conditions(origin=("alice",)))])
    assert word(evaluate(forbid, replace(request, principal=alice))) == "deny"


def test_an_unknown_label_counts_as_the_highest() -> None:
    policy = checked(
        'schema = 1\nname = "p"\n[[rule]]\nid = "r"\nwhy = "w"\neffect = "allow"\naction = "infer"\n'
        'label = { max = "private" }\n'
    ).policy
    request = Request(action=Action.INFER, principal=OWNER)
    assert word(evaluate(policy, request)) == "allow"
    assert word(evaluate(policy, replace(request, label="top-secret"))) == "deny"
    assert policy.highest("public", "internal") == "internal"
    assert policy.highest("public", "top-secret") == "secret"
    assert policy.highest() == "private"


def test_the_strictest_of_all_matching_limits_counts() -> None:
    rules = [
        replace(rule_of(0, Effect.ALLOW, Conditions()), limits=Obligations(tokens_per_day=100, max_tokens=5)),
        replace(rule_of(1, Effect.ALLOW, Conditions()), limits=Obligations(tokens_per_day=50, log=True)),
    ]
    outcome = evaluate(policy_of(rules), Request(action=Action.INFER, principal=OWNER))
    assert isinstance(outcome, Permit)
    assert outcome.limits == Obligations(tokens_per_day=50, max_tokens=5, log=True)
    assert outcome.matched == ("r0", "r1")


def test_every_asking_rule_must_accept_the_approver() -> None:
    rules = [
        replace(rule_of(0, Effect.ASK, Conditions()), approve_by=("alice", "adm")),
        replace(rule_of(1, Effect.ASK, Conditions()), approve_by=("owner",)),
    ]
    policy, request = policy_of(rules), Request(action=Action.INFER, principal=Principal(key="tablet"))
    needs = evaluate(policy, request)
    assert isinstance(needs, NeedsApproval)
    assert needs.approve_by == ("alice or adm", "owner")
    for by, expected in (
        (Principal(user="alice"), "ask"),
        (Principal(is_owner=True), "ask"),
        (Principal(is_owner=True, user="alice"), "allow"),
        (Principal(is_owner=True, groups=frozenset({"adm"})), "allow"),
        (Principal(is_owner=True, groups=frozenset({"adm"}), agent="coder"), "ask"),
    ):
        assert word(evaluate(policy, request, approval=Approval(what=needs.what, by=by))) == expected


@pytest.mark.parametrize("kind", ["agent", "key", "node"])
def test_only_a_person_approves_whatever_else_is_claimed(kind: str) -> None:
    policy = policy_of([replace(rule_of(0, Effect.ASK, Conditions()), approve_by=("adm",))])
    request = Request(action=Action.INFER, principal=OWNER)
    needs = evaluate(policy, request)
    assert isinstance(needs, NeedsApproval)
    person = Principal(groups=frozenset({"adm"}))
    other = replace(person, **{kind: "x"})  # type: ignore[arg-type]
    assert word(evaluate(policy, request, approval=Approval(what=needs.what, by=person))) == "allow"
    assert word(evaluate(policy, request, approval=Approval(what=needs.what, by=other))) == "ask"


def test_an_answer_is_for_exactly_what_was_asked_at_any_hour() -> None:
    policy = policy_of([rule_of(0, Effect.ASK, Conditions())])
    request = Request(action=Action.INFER, principal=OWNER, model="m", label="public", minute_of_day=5)

    def what(one: Request) -> str:
        needs = evaluate(policy, one)
        assert isinstance(needs, NeedsApproval)
        return needs.what

    changes: list[dict[str, Any]] = [
        {"model": "n"},
        {"label": "secret"},
        {"zone": Zone.LAN},
        {"tainted": True},
        {"principal": Principal(user="alice")},
        {"principal": replace(OWNER, is_owner=False)},
        {"principal": replace(OWNER, uid=1001)},
        {"principal": replace(OWNER, groups=frozenset({"adm"}))},
        {"node": "pi"},
        {"action": Action.TASK},
    ]
    assert len({what(request), *(what(replace(request, **one)) for one in changes)}) == len(changes) + 1
    assert what(replace(request, minute_of_day=900, roster_age_s=1)) == what(request)
    assert what(replace(request, label=None)) == what(replace(request, label="internal"))


def test_nothing_of_a_forbid_needs_a_clock() -> None:
    hours = Conditions(hours=((0, 60),))
    request = Request(action=Action.INFER, principal=OWNER)
    for effect, expected in ((Effect.ALLOW, "deny"), (Effect.ASK, "deny"), (Effect.FORBID, "deny")):
        rules = [rule_of(0, effect, hours)] + (
            [rule_of(1, Effect.ALLOW, Conditions())] if effect is Effect.FORBID else []
        )
        assert word(evaluate(policy_of(rules), request)) == expected
    noon = replace(request, minute_of_day=720)
    policy = policy_of([rule_of(0, Effect.FORBID, hours), rule_of(1, Effect.ALLOW, Conditions())])
    assert word(evaluate(policy, noon)) == "allow"


@pytest.mark.parametrize(
    ("conditions", "change", "expected"),
    [
        (Conditions(min_sandbox=SandboxLevel.REDUCED), {"sandbox": SandboxLevel.NONE}, "deny"),
        (Conditions(min_sandbox=SandboxLevel.REDUCED), {"sandbox": SandboxLevel.REDUCED}, "allow"),
        (Conditions(min_sandbox=SandboxLevel.REDUCED), {"sandbox": SandboxLevel.FULL}, "allow"),
        (Conditions(min_sandbox=SandboxLevel.NONE), {}, "deny"),
        (Conditions(roster_age=Span(high=60)), {"roster_age_s": 60}, "allow"),
        (Conditions(roster_age=Span(high=60)), {"roster_age_s": 61}, "deny"),
        (Conditions(roster_age=Span(low=60)), {"roster_age_s": 59}, "deny"),
        (Conditions(roster_age=Span(low=60)), {"roster_age_s": 60}, "allow"),
        (Conditions(roster_age=Span(low=60)), {}, "deny"),
        (Conditions(hours=((1320, 360),)), {"minute_of_day": 1320}, "allow"),
        (Conditions(hours=((1320, 360),)), {"minute_of_day": 359}, "allow"),
        (Conditions(hours=((1320, 360),)), {"minute_of_day": 360}, "deny"),
        (Conditions(hours=((1320, 1440),)), {"minute_of_day": 0}, "deny"),
        (Conditions(tag=("g*",)), {"tags": frozenset({"slow", "gpu"})}, "allow"),
        (Conditions(tag=("g*",)), {"tags": frozenset({"slow"})}, "deny"),
        (Conditions(tag=("g*",)), {}, "deny"),
        (Conditions(model=("*",)), {}, "deny"),
        (Conditions(tainted=False), {"tainted": True}, "deny"),
        (Conditions(tainted=False), {}, "allow"),
        (Conditions(tier=("small",)), {"tier": "large"}, "deny"),
        (Conditions(tier=("small",)), {"tier": "small"}, "allow"),
    ],
)
def test_conditions_hold_at_their_edges_only(
    conditions: Conditions, change: dict[str, Any], expected: str
) -> None:
    request = replace(Request(action=Action.INFER, principal=OWNER), **change)
    assert word(evaluate(policy_of([rule_of(0, Effect.ALLOW, conditions)]), request)) == expected


@pytest.mark.parametrize("effect", list(Effect))
def test_of_rules_that_say_the_same_the_order_never_decides(effect: Effect) -> None:
    rules = [rule_of(number, effect, Conditions()) for number in range(3)]
    request = Request(action=Action.ADMIN, principal=OWNER)
    for some in (rules, rules[::-1], [rules[1], rules[2], rules[0]]):
        assert evaluate(policy_of(some), request).rule == "r0"
