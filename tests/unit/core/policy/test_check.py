"""What refuses a file: each mistake with its line and what would have been accepted, all at once."""
# ruff: noqa: E501 (one case a line)

import re
from pathlib import Path

import pytest

from mycoswarmd.core.policy.administer import NOBODY
from mycoswarmd.core.policy.check import check_policy
from mycoswarmd.core.policy.evaluate import Permit, evaluate
from mycoswarmd.core.policy.parse import MAX_BYTES, parse_policy
from mycoswarmd.core.policy.prove import prove
from mycoswarmd.core.policy.request import describe, parse_request
from mycoswarmd.core.types import Action, Limits, Principal, Request
from mycoswarmd.errors import Denied, PolicyInvalid, Problem
from tests.policies import checked

DOCS = Path(__file__).parents[4] / "docs" / "policy.md"
FOUND = re.findall(r"^```toml\n(schema = 1\n.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)
SAMPLE: str = FOUND[0]
HEAD = """schema = 1
name = "p"
[origins]
alice = { user = "alice" }
pi = { node = "pi" }
[destinations.big]
url = "https://api.example.com/v1"
[tools.fs_read]
[tools.run]
programs = ["ls"]
[tools.web_fetch]
hosts = ["docs.python.org", "*.example.org"]
[agents.coder]
tools = ["fs_read", "run"]
"""
HERE = HEAD.count("\n") + 1  # the line of the first thing after the head


def rule(*lines: str, name: str = "r", effect: str = "allow") -> str:
    return "\n".join([f'[[rule]]\nid = "{name}"\nwhy = "because"\neffect = "{effect}"', *lines, ""])


def problems(text: str) -> list[Problem]:
    with pytest.raises(PolicyInvalid) as caught:
        checked(text)
    assert all(problem.path == "policy.toml" for problem in caught.value.problems)
    assert all(problem.message.startswith("cannot ") for problem in caught.value.problems)
    return list(caught.value.problems)


def test_the_head_of_these_tests_is_fine() -> None:
    owner = rule('action = "admin"', 'origin = "owner"', name="owner")
    assert checked(HEAD + owner + rule('action = "infer"', 'zone = ["self"]')).warnings == ()


def test_the_documented_policy_loads_proves_and_warns_of_interpreters() -> None:
    assert len(FOUND) == 1
    found = checked(SAMPLE)
    assert [(proof.invariant, proof.holds) for proof in found.proofs] == [("private-never-leaves", True)]
    assert found.proofs[0].points > 10
    assert [test.passed for test in found.tests] == [True]
    assert {warning.line for warning in found.warnings} == {SAMPLE.splitlines().index("[tools.run]") + 2}
    assert found.policy.agents["coder"].limits == Limits(
        wall_s=1200,
        memory_bytes=1 << 30,
        processes=64,
        disk_bytes=2 << 30,
        cpu_percent=100,
        steps=60,
        tokens=200_000,
    )
    assert found.policy.tools["run"].programs[0] == "/usr/bin/git"
    assert found.policy.prefer == ("self", "lan", "bigcloud")


@pytest.mark.parametrize(
    ("text", "line", "message", "hint"),
    [
        ('lables = 1\nschema = 1\nname = "x"\n', 1, "cannot use key 'lables' in the file", "did you mean 'labels'?"),
        (HEAD.replace("schema = 1", "schema = 2"), 1, "schema 2", "schema = 1"),
        (HEAD.replace("schema = 1", "schema = true"), 1, "schema True", "schema = 1"),
        (HEAD.replace('name = "p"', 'name = "a b"'), 2, "'a b' as a name", "letters"),
        (HEAD + '[labels]\norder = ["a", "a"]\ndefault = "a"\n', HERE + 1, "'a' twice", ""),
        (HEAD + '[labels]\norder = ["a", "b"]\ndefault = "c"\n', HERE + 2, "'c' for labels.default", "known: a, b"),
        (HEAD + "[labels]\norder = []\n", HERE + 1, "empty list", "leave the key out"),
        (HEAD.replace("alice =", "owner ="), 4, "built in", ""),
        (HEAD.replace('{ user = "alice" }', '{ user = "a", key = "b" }'), 4, "not one speaker", "one of user"),
        (HEAD.replace('{ user = "alice" }', '{ usr = "a" }'), 4, "'usr'", "did you mean 'user'?"),
        (HEAD.replace("destinations.big", "destinations.lan"), 6, "that is a zone", ""),
        (HEAD.replace("https://api", "ftp://api"), 7, "as a url", "https://"),
        (HEAD.replace("https://api", "https://me:pw@api"), 7, "as a url", "https://"),
        (HEAD.replace("[tools.fs_read]", "[tools.fs_red]"), 8, "no such tool", "did you mean 'fs_read'?"),
        (HEAD.replace('programs = ["ls"]', ""), 9, "without 'programs'", ""),
        (HEAD.replace('programs = ["ls"]', 'program = ["ls"]'), 10, "'program'", "did you mean 'programs'?"),
        (HEAD.replace("*.example.org", "*"), 12, "host '*'", "*.python.org"),
        (HEAD.replace('["fs_read", "run"]', '["fs_read", "rum"]'), 14, "'rum'", "did you mean 'run'?"),
        (HEAD + 'paths = { write = ["../up"] }\n', HERE, "path '../up'", "inside of the workspace"),
        (HEAD + 'paths = { write = ["/etc"] }\n', HERE, "path '/etc'", "inside of the workspace"),
        (HEAD + 'limit = { memory = "1GB" }\n', HERE, "'1GB'", "1GiB"),
        (HEAD + "limit = { steps = 0 }\n", HERE, "0 for 'steps'", ""),
        (HEAD + 'limit = { wall = 20 }\n', HERE, "a whole number for agents.coder.limit.wall", ""),
        (HEAD + rule(), HERE, "without a condition", "always = true"),
        (HEAD + rule("always = true", 'zone = "self"'), HERE + 4, "together with conditions", ""),
        (HEAD + rule("always = false"), HERE, "without a condition", "always = true"),
        (HEAD + rule('zoen = "self"'), HERE + 4, "'zoen'", "did you mean 'zone'?"),
        (HEAD + rule('zone = "slef"'), HERE + 4, "'slef'", "did you mean 'self'?"),
        (HEAD + rule('zone = "self"', effect="alow"), HERE + 3, "'alow'", "did you mean 'allow'?"),
        (HEAD + rule("zone = []"), HERE + 4, "empty list", "leave the key out"),
        (HEAD + rule("zone = [1]"), HERE + 4, "whole number", ""),
        (HEAD + rule('action = "infer"', 'label = { max = "privat" }'), HERE + 5, "'privat'", "did you mean 'private'?"),
        (HEAD + rule('action = "infer"', "label = {}"), HERE + 5, "empty range", ""),
        (
            HEAD + rule('zone = "self"', 'label = { min = "secret", max = "public" }'),
            HERE + 5,
            "min is above its max",
            "",
        ),
        (HEAD + rule('dest = "bigg"', 'label = { max = "public" }'), HERE + 4, "'bigg'", "did you mean 'big'?"),
        (HEAD + rule('dest = "web:evil.org"'), HERE + 4, "web_fetch may not reach it", "web:*.example.org"),
        (HEAD + rule('origin = "alcie"'), HERE + 4, "'alcie'", "did you mean 'alice'?"),
        (HEAD + rule('agent = "codr"'), HERE + 4, "'codr'", "did you mean 'coder'?"),
        (HEAD + rule('tool = "fs_write"'), HERE + 4, "'fs_write'", "did you mean 'fs_read'?"),
        (HEAD + rule('tainted = "yes"'), HERE + 4, "tainted", ""),
        (HEAD + rule('hours = "8-20"'), HERE + 4, "'8-20'", "08:00-20:00"),
        (HEAD + rule('roster_age = { max = "1w" }'), HERE + 4, "'1w'", "7d"),
        (HEAD + rule('min_sandbox = "fulll"'), HERE + 4, "'fulll'", "did you mean 'full'?"),
        (HEAD + rule('zone = "self"', name="default-deny"), HERE + 1, "built-in answers", ""),
        (HEAD + rule('zone = "self"', 'approve_by = ["owner"]'), HERE + 5, "no meaning there", ""),
        (HEAD + rule('zone = "self"', 'approve_by = ["pi"]', effect="ask"), HERE + 5, "'pi'", "alice, owner"),
        (HEAD + rule('zone = "self"', "limit = { max_tokens = 1 }", effect="forbid"), HERE + 5, "no meaning", ""),
        (HEAD + rule('zone = "self"', "limit = { tokens = 1 }"), HERE + 5, "'tokens'", "did you mean 'max_tokens'?"),
        (HEAD + rule('zone = "self"') + rule('zone = "lan"'), HERE + 6, f"'r' twice: line {HERE}", ""),
        (HEAD + '[[invariant]]\nid = "i"\nnever = {}\n', HERE + 2, "what never happens", "never ="),
        (HEAD + '[[invariant]]\nid = "i"\nnever = { zone = ["clod"] }\n', HERE + 2, "'clod'", "did you mean 'cloud'?"),
        (HEAD + '[[test]]\nname = "t"\nexpect = "deny"\n', HERE, "without a request", ""),
        (HEAD + '[[test]]\nname = "t"\nrequest = { action = "infr" }\nexpect = "deny"\n', HERE + 2, "'infr'", "'infer'"),
        (
            HEAD + '[[test]]\nname = "t"\nrequest = { action = "infer", label = "x" }\nexpect = "deny"\n',
            HERE + 2,
            "'x'",
            "public",
        ),
        (HEAD + '[[test]]\nname = "t"\nrequest = { action = "infer" }\nexpect = "no"\n', HERE + 3, "'no'", "allow, ask"),
        ("rule = 1\n" + HEAD, 1, "a whole number for rule", ""),
        (HEAD + "rule = [1]\n", HERE, "'rule' in agents.coder", ""),
        ("schema = 1\nname = 'x'\nrule = [1]\n", 3, "it is not a table", ""),
        ("labels = 3\n" + HEAD, 1, "a whole number for labels", ""),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_line(text: str, line: int, message: str, hint: str) -> None:
    found = problems(text)
    told = [problem for problem in found if problem.line == line and message in problem.message]
    assert told, found
    assert any(hint in problem.hint for problem in told), told


@pytest.mark.parametrize(
    ("data", "line", "message"),
    [
        (b"schema = \n", 1, "TOML"),
        (b"schema = 1\nname = 'x'\nname = 'y'\n", 3, "TOML"),
        (b"schema = 1\nname = '\xff'\n", 2, "not UTF-8"),
        (b"x = " + b"[" * 5000, 1, "TOML"),
        (b"#" * (MAX_BYTES + 1), 1, "262145 bytes"),
        (b"a = 1\r", 1, "TOML"),
        (b"schema = " + b"1" * 5000, 1, "too many digits"),
        (b"schema = 0x" + b"f" * 5000, 1, "64 bits"),
        (b"name = [-9_223_372_036_854_775_809]", 1, "64 bits"),
        (b"name." + b".".join([b"a"] * 1500) + b" = 1", 1, "nested too deeply"),
    ],
)
def test_what_is_no_toml_is_told(data: bytes, line: int, message: str) -> None:
    with pytest.raises(PolicyInvalid) as caught:
        check_policy(data, path="policy.toml", resolve_program=lambda _: None)
    (problem,) = caught.value.problems
    assert message in problem.message
    assert problem.line == line


@pytest.mark.parametrize("key", ["origin", "tag"])
def test_more_groups_or_tags_than_can_be_combined_are_refused_and_nobody_waits(key: str) -> None:
    words = [f"w{i}" for i in range(40)]
    text = 'schema = 1\nname = "p"\n[origins]\n' + "".join(f'{w} = {{ group = "{w}" }}\n' for w in words)
    text += rule('action = "infer"', 'zone = ["self"]')
    text += "".join(rule(f'{key} = ["{word}"]', name=word, effect="forbid") for word in words)
    (problem,) = problems(text)
    assert "combinations of groups, or of tags" in problem.message


def test_all_problems_are_told_at_once_in_order() -> None:
    text = HEAD.replace("fs_read]", "fs_red]") + rule('zoen = "self"') + rule('zone = "clod"', name="s")
    assert [problem.line for problem in problems(text)] == [8, 14, HERE, HERE + 4, HERE + 9]


def test_an_empty_file_is_no_policy_and_a_policy_without_rules_denies() -> None:
    assert problems("")
    policy = checked('schema = 1\nname = "p"\n').policy
    assert isinstance(evaluate(policy, parse_request({"action": "admin", "origin": "owner"}, policy)), Denied)


@pytest.mark.parametrize(
    "lines",
    [
        ('action = "infer"', 'tool = "run"'),
        ('action = "admin"', 'label = { max = "secret" }'),
        ('action = "admin"', 'zone = "lan"'),
        ('action = "task"', 'zone = "cloud"'),
        ('tool = "run"', 'zone = "lan"'),
        ('dest = "big"', 'zone = "lan"', 'label = { max = "public" }'),
        ('tool = "fs_read"', 'model = "x"'),
    ],
)
@pytest.mark.parametrize("effect", ["allow", "ask", "forbid"])
def test_a_rule_that_matches_nothing_is_an_error(lines: tuple[str, ...], effect: str) -> None:
    found = problems(HEAD + rule(*lines, effect=effect))
    assert [(one.line, one.message) for one in found] == [
        (HERE, "cannot use rule 'r': no request can match it")
    ]


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        (rule('zone = "self"') + rule('zone = "self"', name="f", effect="forbid"), True),
        (rule('zone = "self"') + rule('zone = "self"', "tainted = true", name="f", effect="forbid"), False),
        (rule('action = "infer"', 'zone = "self"') + rule('zone = "self"', name="a", effect="ask"), True),
        (
            rule('zone = "self"', 'hours = "10:00-12:00"')
            + rule('hours = "09:00-13:00"', name="f", effect="forbid"),
            True,
        ),
        (
            rule('zone = "self"', 'hours = "10:00-14:00"')
            + rule('hours = "09:00-13:00"', name="f", effect="forbid"),
            False,
        ),
        (
            rule('action="infer"', 'zone="self"', 'model = "ab*"')
            + rule('model = "a*"', name="f", effect="forbid"),
            True,
        ),
        (
            rule('action="infer"', 'zone="self"', 'model = "a*"')
            + rule('model = "ab*"', name="f", effect="forbid"),
            False,
        ),
        (rule('tool = "web_fetch"', 'label = { max = "public" }'), True),
        (rule('zone = "cloud"', effect="forbid"), False),
    ],
)
def test_a_rule_that_never_decides_is_a_warning(text: str, warned: bool) -> None:
    found = [str(warning) for warning in checked(HEAD + text).warnings if NOBODY not in warning.message]
    assert ["rule 'r' never decides" in one for one in found] == ([True] if warned else [])


@pytest.mark.parametrize(
    ("lines", "is_refused"),
    [
        (('action = "infer"',), True),
        (("always = true",), True),
        (('dest = "big"',), True),
        (('dest = "big"', 'label = { min = "public" }'), True),
        (('dest = "big"', 'label = { max = "public" }'), False),
        (('action = "infer"', 'zone = ["self", "lan"]'), False),
        (('action = "infer"', 'from = "peer"'), False),
        (('agent = "coder"', 'action = "tool"'), False),
        (('action = ["task", "admin"]',), False),
    ],
)
@pytest.mark.parametrize("effect", ["allow", "ask"])
def test_a_way_to_a_cloud_needs_a_label(lines: tuple[str, ...], is_refused: bool, effect: str) -> None:
    text = HEAD + rule(*lines, effect=effect)
    if is_refused:
        assert any("without a limit on the label" in problem.message for problem in problems(text))
    else:
        checked(text)


def test_an_agent_must_not_hold_the_lethal_trifecta() -> None:
    text = HEAD.replace('["fs_read", "run"]', '["fs_read", "web_fetch"]')
    (problem,) = problems(text)
    assert (problem.line, "private data, untrusted input and a way out" in problem.message) == (13, True)
    checked(text + 'i_accept_the_lethal_trifecta = "the workspace is public"\n')
    checked(HEAD.replace('["fs_read", "run"]', '["web_fetch"]'))


def test_a_failing_test_refuses_the_file_and_says_what_was_decided() -> None:
    test = '[[test]]\nname = "t"\nrequest = { action = "infer" }\nexpect = "deny"\n'
    (problem,) = problems(HEAD + rule('action = "infer"', 'zone = "self"') + test)
    assert problem.message == "cannot accept: test 't' expects deny, the rules say allow by r"
    assert problem.hint == "infer zone=self"
    by_rule = test.replace('"deny"', '"allow"\nrule = "s"')
    more = rule('zone = "lan"', name="s")
    assert (
        "expects allow by s"
        in problems(HEAD + rule('action = "infer"', 'zone = "self"') + more + by_rule)[0].message
    )


@pytest.mark.parametrize("effect", ["allow", "ask"])
def test_a_broken_invariant_refuses_the_file_with_a_request(effect: str) -> None:
    text = HEAD + rule('dest = "big"', 'label = { max = "private" }', effect=effect)
    text += '[[invariant]]\nid = "i"\nnever = { zone = "cloud", label = { min = "internal" } }\n'
    (problem,) = problems(text)
    assert "rule 'r' breaks invariant 'i'" in problem.message
    assert "zone=cloud" in problem.hint
    assert "dest=big" in problem.hint
    policy, _ = parse_policy(text.encode(), path="p", resolve_program=lambda name: f"/bin/{name}")
    (proof,) = prove(policy)
    assert proof.counterexample is not None
    assert describe(proof.counterexample) in problem.hint
    assert not isinstance(evaluate(policy, proof.counterexample), Denied)


def test_a_forbid_that_covers_more_rules_does_not_hide_what_it_leaves_open() -> None:
    """Names like ab1 match more rules, and are forbidden; it is the others that break the invariant."""
    text = HEAD + rule('action = "infer"', 'zone = "lan"') + rule('zone = "lan"', 'model = "ab*"', name="s")
    text += rule('model = "ab*"', name="f", effect="forbid")
    found = problems(text + '[[invariant]]\nid = "i"\nnever = { zone = "lan" }\n')
    assert ["rule 'r' breaks invariant 'i'" in problem.message for problem in found] == [True]


def test_hosts_below_a_suffix_are_told_apart_from_a_named_one() -> None:
    """A forbidden any.example.org does not prove anything about the other hosts below example.org."""
    agent = '[agents.surfer]\ntools = ["web_fetch"]\n'
    text = HEAD + agent + rule('agent = "surfer"', 'action = "tool"', 'label = { max = "public" }')
    text += rule('dest = "web:any.example.org"', name="f", effect="forbid")
    text += '[[invariant]]\nid = "i"\nnever = { dest = "web:*.example.org" }\n'
    (problem,) = problems(text)
    assert "dest=web:any-other.example.org" in problem.hint


def test_what_is_too_large_to_prove_is_refused_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = HEAD + rule('action = "infer"', 'zone = "lan"') + rule('zone = "lan"', name="f", effect="forbid")
    text += '[[invariant]]\nid = "i"\nnever = { zone = "lan" }\n'
    assert [proof.holds for proof in checked(text).proofs] == [True]
    monkeypatch.setattr("mycoswarmd.core.policy.prove.MAX_POINTS", 0)
    (problem,) = problems(text)
    assert "cannot prove anything about" in problem.message
    assert problem.line == text.splitlines().index("[[invariant]]") + 1


def test_too_many_combinations_are_refused_with_advice() -> None:
    globs = ", ".join(f'"*{a}*{b}*{c}*"' for a in "abc" for b in "def" for c in "ghi")
    found = problems(HEAD + rule('action = "infer"', 'zone = "self"', f"model = [{globs}]"))
    assert any("cannot prove anything" in problem.message and "globs" in problem.hint for problem in found)


def test_a_program_that_is_not_here_is_a_warning_and_cannot_run() -> None:
    text = HEAD.replace('["ls"]', '["ls", "no-such"]')
    found = check_policy(
        text.encode(), path="p", resolve_program=lambda name: "/usr/bin/ls" if name == "ls" else None
    )
    assert found.policy.tools["run"].programs == ("/usr/bin/ls",)
    assert "'no-such' is not on this node" in found.warnings[0].message


ADMIN = 'action = "admin"'


@pytest.mark.parametrize(
    ("text", "locked"),
    [
        ("", True),
        (rule('action = "infer"', 'zone = ["self"]'), True),
        (rule(ADMIN), False),
        (rule('zone = "self"', 'origin = "owner"'), False),  # every action is this one, too
        (rule(ADMIN, 'origin = "alice"'), False),
        (rule(ADMIN, 'from = "local"'), False),
        (rule(ADMIN, 'hours = "08:00-09:00"'), False),  # at eight somebody may
        (rule(ADMIN, 'from = "peer"'), True),  # another node never administers this one
        (rule(ADMIN, 'origin = "pi"'), True),
        (rule(ADMIN, 'origin = ["pi", "alice"]'), False),
        (rule('action = ["task", "admin"]', 'label = { max = "secret" }'), True),  # it has no label
        (rule(ADMIN, effect="ask"), True),  # who would say yes has to administer first
        (rule(ADMIN) + rule(ADMIN, effect="ask", name="a"), True),
        (rule(ADMIN) + rule('zone = "self"', effect="forbid", name="f"), True),
        (rule(ADMIN) + rule(ADMIN, 'origin = "owner"', effect="forbid", name="f"), False),  # others may
        (rule(ADMIN, 'origin = "owner"') + rule(ADMIN, 'origin = "owner"', effect="forbid", name="f"), True),
        (
            rule(ADMIN, 'origin = ["owner", "alice"]')
            + rule(ADMIN, 'origin = "owner"', effect="forbid", name="f"),
            False,
        ),
        (rule(ADMIN, 'origin = "owner"') + rule(ADMIN, 'origin = "alice"', effect="forbid", name="f"), False),
    ],
)
def test_a_policy_that_lets_nobody_administer_the_node_is_a_warning(text: str, locked: bool) -> None:
    found = checked(HEAD + text)
    assert found.is_locked is locked
    said = [one for one in found.warnings if one.message == NOBODY]
    assert [(one.path, one.line, "owner" in one.hint) for one in said] == (
        [("policy.toml", 1, True)] if locked else []
    )
    # The same code that decides says so: of everybody whom the file can tell apart, nobody is let in.
    people = [Principal(is_owner=owner, user=user) for owner in (False, True) for user in (None, "alice")]
    allowed = [
        isinstance(
            evaluate(found.policy, Request(action=Action.ADMIN, principal=one, minute_of_day=8 * 60)), Permit
        )
        for one in people
    ]
    assert any(allowed) is not locked


def test_large_policies_are_checked_in_reasonable_time() -> None:
    """200 rules over 40 origins, 40 models, hours and labels: far more than five million combinations."""
    origins = "[origins]\n" + "".join(f'g{i} = {{ group = "g{i}" }}\n' for i in range(12))
    text = origins.join(HEAD.split("[origins]\n"))
    for i in range(200):
        lines = [f'model = "vendor{i % 40}-*"', f'origin = "g{i % 12}"', 'zone = ["self", "lan"]']
        lines += [f'hours = "{i % 20:02}:00-{i % 20 + 3:02}:00"', 'label = { max = "private" }']
        text += rule(*lines, name=f"r{i}", effect="forbid" if i % 3 else "allow")
    text += '[[invariant]]\nid = "i"\nnever = { zone = "cloud" }\n'
    text += '[[invariant]]\nid = "j"\nnever = { label = { min = "secret" }, zone = "lan" }\n'
    found = checked(text)
    assert all(proof.holds for proof in found.proofs)
    request = parse_request(
        {"action": "infer", "model": "vendor0-x", "origin": {"group": "g0"}, "hour": "01:30"}, found.policy
    )
    assert isinstance(evaluate(found.policy, request), Permit)


def test_more_than_a_thousand_rules_are_refused() -> None:
    def shortest(count: int) -> str:
        each = '[[rule]]\nid="r{}"\nwhy="w"\neffect="forbid"\nzone="lan"\n'
        return 'schema = 1\nname = "p"\n' + "".join(each.format(number) for number in range(count))

    (problem,) = problems(shortest(1001))
    assert problem.message == "cannot use 1001 rules"
    assert problem.line == 3
    assert len(checked(shortest(1000)).policy.rules) == 1000
