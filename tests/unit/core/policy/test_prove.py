"""Proofs: none where some request breaks the invariant, however oddly the rules divide requests."""

import pytest

from mycoswarmd.core.policy.evaluate import evaluate
from mycoswarmd.core.policy.model import Policy
from mycoswarmd.core.policy.parse import parse_policy
from mycoswarmd.core.policy.prove import ProofResult, prove
from mycoswarmd.core.policy.request import parse_request
from mycoswarmd.errors import Denied, PolicyInvalid

HEAD = 'schema = 1\nname = "t"\n'
WEB = """[tools.web_fetch]
hosts = ["*.python.org"]
[agents.surfer]
tools = ["web_fetch"]
"""
CLOUD = """[destinations.big]
url = "https://api.example.com/v1"
models = ["gpt-*"]
"""
GROUPS = """[origins]
x = { group = "g1" }
y = { group = "g1" }
z = { group = "g2" }
"""


def rule(name: str, effect: str, text: str) -> str:
    return f'[[rule]]\nid = "{name}"\nwhy = "w"\neffect = "{effect}"\n{text}\n'


def never(text: str) -> str:
    return f'[[invariant]]\nid = "i"\nnever = {{ {text} }}\n'


def parsed(text: str) -> Policy:
    policy, _ = parse_policy((HEAD + text).encode(), path="p.toml", resolve_program=lambda _: None)
    return policy


def proof(text: str) -> ProofResult:
    policy = parsed(text)
    (result,) = prove(policy)
    if result.counterexample is not None:  # it is one: really asked
        assert not isinstance(evaluate(policy, result.counterexample), Denied)
    return result


INFER_LAN = 'action = "infer"\nzone = "lan"\n'
# Each of these allows the request, which breaks the invariant; what the forbids leave open is narrow.
BROKEN: dict[str, tuple[str, dict[str, object]]] = {
    "one model between forbidden ones": (
        rule("a", "allow", f'{INFER_LAN}model = ["gpt-[1-5]*"]')
        + rule("f", "forbid", 'model = ["gpt-1*", "gpt-2*", "gpt-4*", "gpt-5*"]')
        + never('zone = "lan"'),
        {"action": "infer", "zone": "lan", "model": "gpt-3"},
    ),
    "two names for one group": (
        GROUPS
        + rule("a", "allow", f'{INFER_LAN}origin = ["x", "z"]')
        + rule("f", "forbid", 'origin = ["y"]')
        + never('zone = "lan"'),
        {"action": "infer", "zone": "lan", "origin": {"group": "g2"}},
    ),
    "one host of a suffix": (
        WEB
        + rule("a", "allow", 'action = "tool"\nlabel = { max = "public" }\ndest = ["web:*.python.org"]')
        + rule("f", "forbid", 'dest = ["web:any.python.org", "web:any-other.python.org"]')
        + never('zone = "cloud"'),
        {
            "action": "tool",
            "tool": "web_fetch",
            "agent": "surfer",
            "dest": "web:docs.python.org",
            "label": "public",
        },
    ),
    "a destination's own models": (
        CLOUD
        + rule("a", "allow", 'action = "infer"\ndest = ["big"]\nlabel = { max = "public" }')
        + rule("f", "forbid", 'model = ["gpt-4*"]')
        + never('dest = ["big"]'),
        {"action": "infer", "dest": "big", "model": "gpt-3", "label": "public"},
    ),
    "one minute of the day": (
        rule("a", "allow", INFER_LAN)
        + rule("f", "forbid", 'hours = ["00:00-12:00", "12:01-00:00"]')
        + never('zone = "lan"'),
        {"action": "infer", "zone": "lan", "hour": "12:00"},
    ),
    "one age of the roster": (
        rule("a", "allow", f'{INFER_LAN}roster_age = {{ max = "2h" }}')
        + rule("f", "forbid", 'roster_age = { max = "119m" }')
        + never('zone = "lan"'),
        {"action": "infer", "zone": "lan", "roster_age": "7200s"},
    ),
    "two tags at once": (
        rule("a", "ask", f'{INFER_LAN}tag = ["gpu*"]')
        + rule("f", "forbid", 'tag = ["slow"]')
        + never('tag = ["gpu-big"]'),
        {"action": "infer", "zone": "lan", "tags": ["gpu-big", "fast"]},
    ),
    "a person who is no owner": (
        rule("a", "allow", INFER_LAN) + rule("f", "forbid", 'origin = ["owner"]') + never('zone = "lan"'),
        {"action": "infer", "zone": "lan", "origin": {"user": "somebody"}},
    ),
    "an agent that is not declared": (
        "[agents.undeclared]\n"
        + rule("a", "allow", INFER_LAN)
        + rule("f", "forbid", 'agent = ["undeclared"]')
        + never('zone = "lan"'),
        {"action": "infer", "zone": "lan", "agent": "stranger"},
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_not_proved(name: str) -> None:
    text, facts = BROKEN[name]
    policy = parsed(text)
    assert not isinstance(evaluate(policy, parse_request(facts, policy)), Denied)
    result = proof(text)
    assert not result.holds
    assert result.by_rule == "a"
    assert result.counterexample is not None


PROVED = {
    "no model can be both": (
        rule("a", "allow", f'{INFER_LAN}model = ["gpt-*"]') + never('model = ["qwen*"]\n'.strip())
    ),
    "a destination that does not serve it": (
        CLOUD
        + rule("a", "allow", 'action = "infer"\nlabel = { max = "public" }')
        + never('dest = "big", model = ["qwen*"]')
    ),
    "a peer's prompt goes nowhere else": (
        CLOUD
        + rule("a", "allow", 'action = "infer"\nlabel = { max = "public" }')
        + never('from = "peer", zone = ["lan", "cloud"]')
    ),
    "an admin has no label": rule("a", "allow", 'action = "admin"') + never('label = { min = "public" }'),
    "hours that meet nowhere": (
        rule("a", "allow", 'action = "infer"\nhours = "08:00-20:00"')
        + rule("f", "forbid", 'hours = "19:59-08:00"')
        + never('hours = "19:59-08:00"')
    ),
}


@pytest.mark.parametrize("name", PROVED)
def test_what_holds_is_proved(name: str) -> None:
    assert proof(PROVED[name]).holds


def test_an_unknown_hour_breaks_a_never() -> None:
    result = proof(rule("a", "allow", 'action = "infer"') + never('hours = "00:00-01:00"'))
    assert not result.holds


@pytest.mark.parametrize(
    "dest", ["web:do?s.python.org", "web:d*.python.org", "web:*s.python.org", "web:[ab].python.org", "web:*"]
)
def test_hosts_have_no_globs_but_a_suffix(dest: str) -> None:
    with pytest.raises(PolicyInvalid, match="it is not a host"):
        parsed(WEB + rule("a", "allow", f'action = "tool"\nlabel = {{ max = "public" }}\ndest = ["{dest}"]'))
