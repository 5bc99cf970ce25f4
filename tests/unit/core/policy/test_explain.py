"""A decision in words, requests as text, differences, and kernel rights."""
# ruff: noqa: E501 (one case a line)

import pytest

from mycoswarmd.core.policy.diff import changed_requests
from mycoswarmd.core.policy.explain import explain
from mycoswarmd.core.policy.request import describe, facts_of, parse_request
from mycoswarmd.core.policy.rights import compile_rights
from mycoswarmd.core.types import UNKNOWN, Action, CageSpec, Principal, Request, SandboxLevel, Start, Zone
from mycoswarmd.errors import BadRequest
from tests.policies import checked

TEXT = """schema = 1
name = "p"
[origins]
alice = { user = "alice" }
[destinations.big]
url = "https://api.example.com/v1"
models = ["gpt-*"]
[tools.fs_read]
[tools.fs_write]
[tools.run]
programs = ["ls"]
[agents.coder]
tools = ["fs_read", "fs_write", "run"]
paths = { read = ["."], write = ["src"] }
limit = { steps = 7 }
[[rule]]
id = "here"
why = "this machine answers"
effect = "allow"
action = "infer"
zone = "self"
label = { max = "private" }
hours = "08:00-20:00"
[[rule]]
id = "confirm"
why = "a person confirms"
effect = "ask"
dest = "big"
label = { max = "public" }
[[rule]]
id = "not-alice"
why = "alice is on holiday"
effect = "forbid"
origin = "alice"
[[rule]]
id = "tools"
why = "the coder works"
effect = "allow"
action = "tool"
agent = "coder"
"""
POLICY = checked(TEXT).policy


def said(**facts: object) -> str:
    return explain(POLICY, parse_request(facts, POLICY)).render()


def test_an_allowed_request_is_explained() -> None:
    assert said(action="infer", label="public", hour="09:30").splitlines() == [
        "allow: infer zone=self label=public hour=09:30",
        "  decided by here policy.toml:16",
        "  this machine answers",
        "  ask confirm (policy.toml:24) does not match: dest is none, not big",
        "  forbid not-alice (policy.toml:30) does not match: origin is none that is declared, not alice",
        "  allow tools (policy.toml:35) does not match: action is infer, not tool",
    ]


def test_a_denied_request_is_explained() -> None:
    text = said(action="infer", label="secret", origin="alice")
    assert (
        "deny: infer zone=self label=secret origin=user:alice\n  decided by not-alice policy.toml:30" in text
    )
    assert "rule 'not-alice' forbids it: alice is on holiday" in text
    assert "label is secret, not at most private; hours is not known, not 08:00-20:00" in text
    assert "decided by default-deny\n" in said(action="infer", label="secret")
    assert "decided by destination-models\n" in said(action="infer", dest="big", model="qwen-max")
    assert "also matched: here" in said(action="infer", origin="alice", hour="10:00")


def test_an_asked_request_says_who_answers() -> None:
    explanation = explain(
        POLICY, parse_request({"action": "infer", "dest": "big", "model": "gpt-4", "label": "public"}, POLICY)
    )
    assert (explanation.decision, explanation.rule) == ("ask", "confirm")
    assert explanation.why == "a person confirms; to be approved by owner"
    body = explanation.as_json()
    assert body["decision"] == "ask"
    assert body["matched"] == ["confirm"]
    assert {
        "rule": "tools",
        "where": "policy.toml:35",
        "effect": "allow",
        "missing": ["action is infer, not tool"],
    } in (
        body["lacking"]  # type: ignore[operator]
    )


def test_without_a_policy_everything_is_denied_and_explained() -> None:
    explanation = explain(None, parse_request({"action": "admin", "origin": "owner"}, None))
    assert (explanation.decision, explanation.rule, explanation.lacking) == ("deny", "no-policy", ())
    assert "there is no valid policy" in explanation.why


def test_a_request_is_read_from_facts() -> None:
    facts = {
        "action": "tool",
        "zone": "lan",
        "from": "peer",
        "origin": {"user": "bob", "group": ["a", "b"], "owner": True},
        "tags": ["gpu"],
        "tainted": True,
        "hour": "23:59",
        "roster_age": "2h",
        "sandbox": "full",
        "model": "m",
        "dest": "web:x",
        "node": "pi",
        "tier": "large",
        "label": "unheard-of",
        "agent": "coder",
        "tool": "run",
    }
    request = parse_request(facts, POLICY)
    assert request == Request(
        action=Action.TOOL,
        principal=Principal(is_owner=True, user="bob", groups=frozenset({"a", "b"})),
        zone=Zone.LAN,
        start=Start.PEER,
        label="unheard-of",
        model="m",
        dest="web:x",
        node="pi",
        tags=frozenset({"gpu"}),
        tier="large",
        agent="coder",
        tool="run",
        tainted=True,
        minute_of_day=1439,
        roster_age_s=7200,
        sandbox=SandboxLevel.FULL,
    )
    assert parse_request(facts_of(request), POLICY) == request
    assert describe(request) == (
        "tool zone=lan from=peer model=m dest=web:x node=pi tier=large label=unheard-of agent=coder tool=run "
        "origin=owner:true+user:bob+group:a,b tags=gpu tainted=true hour=23:59 roster_age=7200s sandbox=full"
    )


def test_what_is_not_said_is_unknown_or_absent() -> None:
    request = parse_request({"action": "infer"}, POLICY, speaker=Principal(key="k"))
    assert request == Request(action=Action.INFER, principal=Principal(key="k"))
    assert (request.minute_of_day, request.roster_age_s, request.sandbox) == (UNKNOWN, UNKNOWN, UNKNOWN)
    assert parse_request({"action": "infer", "dest": "big"}, POLICY).zone is Zone.CLOUD
    assert parse_request({"action": "tool", "tool": "web_fetch"}, POLICY).zone is Zone.CLOUD
    assert parse_request({"action": "tool", "tool": "run"}, POLICY).zone is Zone.SELF


@pytest.mark.parametrize(
    ("facts", "where", "hint"),
    [
        ({}, "action", "infer"),
        ({"action": "infr"}, "action", "did you mean 'infer'?"),
        ({"action": "infer", "lable": "x"}, "lable", "did you mean 'label'?"),
        ({"action": "infer", "zone": "clod"}, "zone", "did you mean 'cloud'?"),
        ({"action": "infer", "label": 3}, "label", ""),
        ({"action": "infer", "model": "x" * 257}, "model", ""),
        ({"action": "infer", "model": ""}, "model", ""),
        ({"action": "infer", "tags": "gpu"}, "tags", ""),
        ({"action": "infer", "tags": [1]}, "tags", ""),
        ({"action": "infer", "tainted": "no"}, "tainted", ""),
        ({"action": "infer", "hour": "24:00"}, "hour", ""),
        ({"action": "infer", "hour": "noon"}, "hour", ""),
        ({"action": "infer", "roster_age": "old"}, "roster_age", ""),
        ({"action": "infer", "origin": "alcie"}, "origin", "did you mean 'alice'?"),
        ({"action": "infer", "origin": {}}, "origin", "user"),
        ({"action": "infer", "origin": {"usr": "x"}}, "origin", "user"),
        ({"action": "infer", "origin": {"user": 3}}, "origin", ""),
        ({"action": "infer", "origin": {"group": [3]}}, "origin", ""),
        ({"action": "infer", "origin": {"group": 3}}, "origin", ""),
        ({"action": "infer", "origin": {"owner": "yes"}}, "origin", ""),
        ({"action": "infer", "origin": 3}, "origin", ""),
        ({"action": "infer", "origin": {"user": "a", "key": "b"}}, "origin", ""),
        ({"action": "infer", "origin": {"node": "a", "group": "b"}}, "origin", ""),
        ({"action": "infer", "sandbox": "best"}, "sandbox", ""),
    ],
)
def test_a_bad_fact_is_told(facts: dict[str, object], where: str, hint: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_request(facts, POLICY)
    assert (caught.value.code, caught.value.where) == ("bad-facts", where)
    assert hint in caught.value.hint


def rights(text: str, sandbox: SandboxLevel = SandboxLevel.FULL) -> CageSpec:
    policy = checked(text).policy
    return compile_rights(policy, policy.agents["coder"], task_id="t", attempt=1, sandbox=sandbox)


def test_rights_are_what_the_profile_and_the_rules_can_permit() -> None:
    spec = rights(TEXT)
    assert (spec.read_paths, spec.write_paths, spec.programs) == ((".",), ("src",), ("/usr/bin/ls",))
    assert (spec.limits.steps, spec.task_id, spec.attempt) == (7, "t", 1)


def more(*lines: str, effect: str = "forbid") -> str:
    return TEXT + "\n".join(['[[rule]]\nid = "m"\nwhy = "w"', f'effect = "{effect}"', *lines, ""])


def test_what_the_rules_always_deny_leaves_no_right() -> None:
    assert rights(more('tool = "run"')).programs == ()
    assert rights(more('tool = "run"')).write_paths == ("src",)
    assert rights(more('tool = ["run", "fs_write"]')).write_paths == ()
    assert rights(more('action = "tool"')).read_paths == ()
    assert rights(TEXT.replace('"fs_read", "fs_write", "run"]', '"fs_read"]')).programs == ()


def test_what_may_still_be_permitted_keeps_its_right() -> None:
    assert rights(more('tool = "run"', "tainted = true")).programs
    assert rights(more('tool = "run"', 'label = { min = "private" }')).programs
    assert rights(more('tool = "run"', effect="ask")).programs
    assert rights(more('tool = "run"', 'hours = "00:00-12:00"')).programs


def test_rights_depend_on_what_this_machine_enforces() -> None:
    text = TEXT.replace('agent = "coder"\n', 'agent = "coder"\nmin_sandbox = "full"\n')
    assert rights(text, SandboxLevel.FULL).programs
    assert rights(text, SandboxLevel.REDUCED).programs == ()
    assert rights(text, SandboxLevel.REDUCED).read_paths == ()


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ('max = "private"', 'max = "internal"', ["now denied: infer zone=self label=private (was allowed)"]),
        (
            'zone = "self"',
            'zone = ["self", "lan"]',
            [
                "now allowed: infer zone=lan label=internal,private,public hour=08:00 origin=other (was denied)"
            ],
        ),
        ('"public" }', '"internal" }', ["now asked: infer zone=cloud model=gpt- dest=big label=internal"]),
        (
            'effect = "ask"',
            'effect = "allow"',
            ["now allowed: infer zone=cloud model=gpt- dest=big label=public"],
        ),
        ('programs = ["ls"]', 'programs = ["cat"]', []),
        ('"alice" }', '"bob" }', ["now allowed: infer zone=self", "now denied: infer zone=self"]),
        (
            'tools = ["fs_read", ',
            "tools = [",
            ["now denied: tool zone=self tool=fs_read", "agent=coder (was allowed)"],
        ),
    ],
)
def test_a_difference_is_told_as_requests(old: str, new: str, changed: list[str]) -> None:
    lines = changed_requests(POLICY, checked(TEXT.replace(old, new, 1)).policy)
    assert bool(lines) == bool(changed)
    text = "\n".join(lines)
    for part in changed:
        words = part.replace(" (was", " % (was").split(" ")
        assert all(word in text for word in words if word != "%"), text


def test_a_first_policy_and_a_long_difference_stay_readable() -> None:
    lines = changed_requests(None, POLICY)
    assert 0 < len(lines) <= 51
    assert all(line.startswith(("now allowed: ", "now asked: ")) for line in lines)
    hours = "".join(
        f'[[rule]]\nid = "h{i}"\nwhy = "w"\neffect = "forbid"\nmodel = "m{i}"\nhours = "{i:02}:00-{i:02}:30"\n'
        for i in range(24)
    )
    lines = changed_requests(POLICY, checked(TEXT + hours).policy)
    assert len(lines) <= 52
