"""The policy that the documentation shows works: it checks and proves, and a node lives under it."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nodes import NodeProcess, node, write_private
from tests.policies import checked
from tests.upstream import CODER, Upstream, upstream

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```toml\n(schema = 1\n.*?)^```$", re.DOTALL | re.MULTILINE)
MODEL = "ok"


def sample() -> str:
    """Return the one whole policy of the how-to."""
    (text,) = BLOCK.findall((ROOT / "docs" / "policy.md").read_text())
    assert isinstance(text, str)
    return text


def test_the_sample_loads_proves_and_its_test_passes() -> None:
    found = checked(sample())
    assert found.policy.name == "home"
    assert [proof.invariant for proof in found.proofs if proof.holds] == ["private-never-leaves"]
    assert [test.passed for test in found.tests] == [True]


def test_the_first_policy_that_people_copy_leaves_them_in_charge() -> None:
    """README's own, put where README says."""
    (text,) = BLOCK.findall((ROOT / "README.md").read_text())
    found = checked(text)
    assert (found.is_locked, found.warnings) == (False, ())
    owner = text.index('[[rule]]\nid     = "owner"')
    assert checked(text[:owner] + text[text.index("[[rule]]", owner + 1) :]).is_locked


def test_the_sample_uses_every_kind_of_section() -> None:
    text = sample()
    for section in (
        "[labels]",
        "[origins]",
        "[destinations.",
        "[routing]",
        "[tools.",
        "[agents.",
        "[[rule]]",
    ):
        assert section in text
    assert "[[invariant]]" in text
    assert "[[test]]" in text


def test_the_page_of_the_language_names_everything_that_the_sample_uses() -> None:
    page = (ROOT / "policy" / "README.md").read_text()
    keys = set(re.findall(r"^(\w+)\s*=", sample(), re.MULTILINE)) - {"request"}
    assert [key for key in sorted(keys) if f"`{key}`" not in page and key != "never"] == []


@pytest.fixture(scope="module")
def engine() -> Iterator[Upstream]:
    with upstream() as running:
        yield running


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, engine: Upstream) -> Iterator[NodeProcess]:
    state = tmp_path_factory.mktemp("node")
    write_private(state / "policy.toml", sample())
    settings = f'managed_engine = false\n[engines.up]\nkind = "openai"\nurl = "{engine.url}"\n'
    write_private(state / "mycoswarm.toml", settings)
    with node(state) as running:
        running.wait_for_models()
        yield running


def ask(daemon: NodeProcess, label: str, model: str = MODEL) -> tuple[int, str]:
    """Ask, and return the status with the rule that decided."""
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    answer = daemon.call("POST", "/v1/chat/completions", body, {"X-Mycoswarm-Label": label})
    rule = answer.headers.get("X-Mycoswarm-Rule") or answer.json.get("error", {}).get("rule")
    return answer.status, str(rule)


@pytest.mark.integration
def test_a_node_under_the_sample_answers_here_and_says_by_which_rule(daemon: NodeProcess) -> None:
    assert ask(daemon, "secret") == (200, "secret-here")
    assert ask(daemon, "public")[0] == 200
    status = daemon.call("GET", "/api/status").json
    assert status["policy"]["name"] == "home"
    assert status["policy"]["invariants_proved"] == 1


@pytest.mark.integration
def test_a_node_under_the_sample_explains_the_cloud(daemon: NodeProcess) -> None:
    facts = {"action": "infer", "model": "gpt-4o", "dest": "bigcloud"}
    said = daemon.call("POST", "/api/policy/explain", {**facts, "label": "public"}).json
    assert (said["decision"], said["rule"]) == ("ask", "cloud-for-public")
    for facts_of_nobody, key, meant in (
        ({"label": "privat"}, "label", "private"),
        ({"agent": "codr"}, "agent", "coder"),
        ({"action": "tool", "agent": "coder", "tool": "fs_raed"}, "tool", "fs_read"),
    ):
        refused = daemon.call("POST", "/api/policy/explain", {**facts, **facts_of_nobody})
        assert refused.status == 400, refused.json
        error = refused.json["error"]
        assert (error["code"], error["where"]) == ("bad-facts", key)
        assert error["hint"] == f"did you mean '{meant}'?"
    said = daemon.call("POST", "/api/policy/explain", {**facts, "label": "secret"}).json
    assert (said["decision"], said["rule"]) == ("deny", "secret-never-travels")


@pytest.mark.integration
def test_a_task_of_the_sample_uses_its_tools_and_no_other(daemon: NodeProcess, engine: Upstream) -> None:
    outside = daemon.call("POST", "/api/tasks", {"prompt": "x", "agent": "coder", "model": MODEL})
    assert outside.status == 400
    assert "qwen2.5-coder*" in outside.json["error"]["message"]
    note = {"path": "src/note.txt", "content": "hello"}
    engine.play(
        ("fs_write", note), ("run", {"program": "ls", "args": ["src"]}), ("finish", {"summary": "noted"})
    )
    task_id = daemon.submit("write a note", agent="coder", label="internal")
    task = daemon.wait_task(task_id, "succeeded", "failed", "parked")
    events = daemon.events(task_id)
    assert (task["state"], task["summary"], engine.count(CODER)) == ("succeeded", "noted", 3), events
    tools = [event["data"] for event in events if event["kind"] == "decision"]
    decided = [(one["tool"], one["decision"], one["rule"]) for one in tools if one["action"] == "tool"]
    assert decided == [("fs_write", "allow", "coder-tools"), ("run", "allow", "coder-tools")]


@pytest.mark.integration
def test_a_reload_under_the_sample_tells_requests_and_a_broken_edit_changes_nothing(
    daemon: NodeProcess,
) -> None:
    path = daemon.state / "policy.toml"
    stricter = sample().replace('label  = { max = "private" }', 'label  = { max = "internal" }')
    assert stricter != sample()
    write_private(path, stricter)
    answer = daemon.call("POST", "/api/policy/reload")
    assert answer.status == 200, answer.body
    assert any(line.startswith("now denied: infer zone=lan label=private") for line in answer.json["changed"])
    write_private(path, sample().replace('"guest-tablet"]', '"gest-tablet"]').replace("forbid", "forbit"))
    answer = daemon.call("POST", "/api/policy/reload")
    assert answer.status >= 400
    problem = answer.json["error"]["problems"][0]
    assert problem["path"] == str(path)
    assert "did you mean 'forbid'?" in problem["hint"]
    assert daemon.call("GET", "/api/status").json["state"] == "yellow"
    write_private(path, sample())
    assert daemon.call("POST", "/api/policy/reload").status == 200
    assert daemon.call("GET", "/api/status").json["policy"]["problem"] == ""
