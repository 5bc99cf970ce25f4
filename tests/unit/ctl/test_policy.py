import json
import os
from pathlib import Path

import pytest

from mycoswarmd.core.types import Action
from mycoswarmd.ctl.policy import ACTIONS
from tests.unit.ctl.fakenode import FakeNode, answer, ctl, refuse

DEMO = Path(__file__).parents[3] / "docs" / "demo" / "policy.toml"
EXPLANATION = {
    "decision": "deny",
    "rule": "default-deny",
    "why": "no rule allows it",
    "where": "",
    "matched": [],
    "lacking": [
        {
            "rule": "answered-here",
            "where": "policy.toml:33",
            "effect": "allow",
            "missing": ["zone is cloud\x1b"],
        }
    ],
    "candidates": [
        {
            "node": "box",
            "engine": "local",
            "model": "gpt-4o",
            "zone": "cloud",
            "dest": "bigcloud",
            "decision": "deny",
            "rule": "default-deny",
            "why": "",
        }
    ],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_bytes(DEMO.read_bytes())
    return path


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# --- check, test, prove: here ----------------------------------------------------------------


def test_a_good_file_is_checked_without_a_node(file: Path) -> None:
    nowhere = ("--socket", "/nowhere")
    ran = ctl(None, *nowhere, "policy", "check", str(file))
    assert ran.code == 0, ran.err
    assert "valid" in ran.out and "demo" in ran.out
    document = ctl(None, *nowhere, "policy", "check", str(file), "--json").json
    assert document["name"] == "demo"
    assert (document["rules"], len(document["tests"]), len(document["proofs"])) == (3, 1, 1)


def test_a_file_that_lets_nobody_administer_is_valid_with_a_warning(file: Path) -> None:
    change(file, 'action = ["task", "admin"]', 'action = "task"')
    ran = ctl(None, "--socket", "/nowhere", "policy", "check", str(file))
    assert ran.code == 0, ran.err
    assert f"warning: {file}:1: nobody may administer this node" in ran.err


def test_every_mistake_is_listed_with_its_line(file: Path) -> None:
    change(
        file,
        "[[invariant]]",
        '[[rule]]\nid = "x"\neffekt = "allow"\n\n[[rule]]\nid = "y"\nzoen = ["self"]\n\n[[invariant]]',
    )
    ran = ctl(None, "--socket", "/nowhere", "policy", "check", str(file))
    assert ran.code == 1
    assert "effekt" in ran.err and "zoen" in ran.err
    assert f"{file}:" in ran.err and "Traceback" not in ran.err
    document = ctl(None, "--socket", "/nowhere", "policy", "check", str(file), "--json").json
    assert len(document["error"]["problems"]) >= 2


@pytest.mark.parametrize("command", ["test", "check"])
def test_a_failing_case_exits_1(file: Path, command: str) -> None:
    change(file, 'expect  = "deny"', 'expect  = "allow"')
    ran = ctl(None, "--socket", "/nowhere", "policy", command, str(file))
    assert ran.code == 1
    assert "opens no door" in ran.out + ran.err


@pytest.mark.parametrize("command", ["prove", "check"])
def test_a_broken_invariant_exits_1(file: Path, command: str) -> None:
    change(file, 'zone   = ["self"]', 'zone   = ["self", "cloud"]')
    ran = ctl(None, "--socket", "/nowhere", "policy", command, str(file))
    assert ran.code == 1
    assert "nothing-leaves" in ran.out + ran.err


@pytest.mark.parametrize("command", ["test", "prove"])
def test_what_passes_is_named(file: Path, command: str) -> None:
    ran = ctl(None, "--socket", "/nowhere", "policy", command, str(file))
    assert ran.code == 0
    assert ("nothing-leaves" if command == "prove" else "opens no door") in ran.out
    assert ctl(None, "--socket", "/nowhere", "policy", command, str(file), "--json").code == 0


def test_the_nodes_file_is_taken_where_none_is_named(node: FakeNode, file: Path) -> None:
    node.on("GET", "/api/policy", answer({"path": str(file)}))
    assert ctl(node, "policy", "check", "--json").json["path"] == str(file)


def test_a_file_that_is_none_is_said_so(tmp_path: Path) -> None:
    fifo, big = tmp_path / "fifo", tmp_path / "big"
    os.mkfifo(fifo)
    big.write_bytes(b"# x\n" * (100 << 10))
    for path in (fifo, big, tmp_path, tmp_path / "none"):
        ran = ctl(None, "--socket", "/nowhere", "policy", "check", str(path))
        assert ran.code == 1, path
        assert path.name in ran.err and "cannot" in ran.err and "Traceback" not in ran.err


def test_a_file_that_is_no_text_is_said_so(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_bytes(b"\xff\xfe\x00")
    ran = ctl(None, "--socket", "/nowhere", "policy", "check", str(path))
    assert ran.code == 1
    assert "Traceback" not in ran.err


# --- explain, show, reload: through the node --------------------------------------------------


def test_explain_sends_what_was_asked_and_says_what_each_rule_lacked(node: FakeNode) -> None:
    node.on("POST", "/api/policy/explain", answer(EXPLANATION))
    given = {"action": "infer", "model": "gpt-4o", "label": "private", "dest": "bigcloud", "zone": "cloud"}
    flags = [part for name, value in given.items() for part in (f"--{name}", value)]
    ran = ctl(node, "policy", "explain", *flags, "--origin", "alice", "--from", "peer", "--tainted")
    assert ran.code == 0
    assert json.loads(node.asked[-1].body) == {**given, "origin": "alice", "from": "peer", "tainted": True}
    for words in (
        "deny",
        "default-deny",
        "no rule allows it",
        "answered-here",
        "zone is cloud\\x1b",
        "gpt-4o",
    ):
        assert words in ran.out, words
    assert ctl(node, "policy", "explain", "--action", "infer", "--json").json == EXPLANATION
    assert json.loads(node.asked[-1].body) == {"action": "infer"}


def test_explain_without_a_zone_begins_with_where_the_prompt_would_go(node: FakeNode) -> None:
    # The decision for this machine alone would mislead: no engine here has the model.
    said = {**EXPLANATION, "decision": "allow", "rule": "answered-here"}
    node.on("POST", "/api/policy/explain", answer(said))
    ran = ctl(node, "policy", "explain", "--action", "infer", "--model", "gpt-4o")
    assert ran.out.index("default-deny") < ran.out.index("answered-here")
    assert not ran.out.startswith("allow")


@pytest.mark.parametrize("flags", [(), ("--zone", "lan")], ids=["anywhere", "in-a-zone"])
def test_explain_says_first_that_nobody_serves_what_the_policy_allows(
    node: FakeNode, flags: tuple[str, ...]
) -> None:
    gone = {"node": "box", "engine": "local", "decision": "absent", "why": "the model is not there"}
    said = {**EXPLANATION, "decision": "allow", "rule": "answered-here", "served": False}
    for rows in ([gone], []):
        found = {key: value for key, value in said.items() if key != "candidates"}
        node.on("POST", "/api/policy/explain", answer(found if flags else {**found, "candidates": rows}))
        ran = ctl(node, "policy", "explain", "--action", "infer", "--model", "nosuch\x1b", *flags)
        assert ran.code == 0
        first, *_ = ran.out.splitlines()
        where = "in zone lan " if flags else ""
        assert first.startswith(f"No node serves nosuch\\x1b {where}now: a prompt for it fails"), ran.out
        assert ran.out.index("The policy itself") < ran.out.index("allow by rule answered-here")
        assert "For the first of them" not in ran.out
    node.on("POST", "/api/policy/explain", answer({**said, "served": True}))
    served = ctl(node, "policy", "explain", "--action", "infer", "--model", "nosuch", *flags)
    assert "No node serves" not in served.out and "For the first of them" in served.out


def test_explain_needs_an_action(node: FakeNode) -> None:
    assert ctl(node, "policy", "explain").code == 2
    node.on("POST", "/api/policy/explain", refuse(400, "bad-request", "cannot explain: no such action"))
    assert ctl(node, "policy", "explain", "--action", "tool").code == 1


def test_the_policy_in_force_is_shown(node: FakeNode) -> None:
    shown = {"path": "/etc/p.toml", "sha256": "ab" * 32, "text": 'name = "x"\n', "problem": "broken\x1b now"}
    node.on("GET", "/api/policy", answer(shown))
    ran = ctl(node, "policy", "show")
    assert (ran.code, ran.out) == (0, 'name = "x"\n')
    assert "/etc/p.toml" in ran.err and "broken\\x1b now" in ran.err
    assert ctl(node, "policy", "show", "--json").json == shown


def test_a_reload_says_what_is_decided_differently(node: FakeNode) -> None:
    done = {
        "changed": ["infer to cloud: deny -> allow"],
        "warnings": ["rule 'x' never matches"],
        "sha256": "cd" * 32,
    }
    node.on("POST", "/api/policy/reload", answer(done))
    ran = ctl(node, "policy", "reload")
    assert ran.code == 0
    assert "deny -> allow" in ran.out and "never matches" in ran.err
    assert ctl(node, "policy", "reload", "--json").json == done


def test_an_action_that_is_none_is_wrong_usage(node: FakeNode) -> None:
    ran = ctl(node, "policy", "explain", "--action", "nonsense")
    assert ran.code == 2 and "infer" in ran.err
    assert node.asked == []
    assert set(ACTIONS) == {one.value for one in Action}
