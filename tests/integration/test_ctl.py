"""mycoswarmctl as a person runs it, against a real daemon with real cages and a scripted engine."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mycoswarmd import __version__
from tests.nodes import NodeProcess, node, write_private
from tests.upstream import Upstream, upstream

pytestmark = pytest.mark.integration

DEMO = Path(__file__).parents[2] / "docs" / "demo" / "policy.toml"
ASKS = """
[tools.fs_edit]

[agents.editor]
model = "*"
tools = ["fs_read", "fs_edit"]
paths = { read = ["."], write = ["."] }
limit = { wall = "1m", memory = "1GiB", disk = "32MiB", steps = 8 }

[[rule]]
id = "edits-are-asked"
why = "a person looks at each edit"
effect = "ask"
action = "tool"
agent = ["editor"]
tool = ["fs_edit"]

[[rule]]
id = "editor-reads"
why = "reading is harmless"
effect = "allow"
action = "tool"
agent = ["editor"]
tool = ["fs_read"]
"""
READ = ("fs_read", {"path": "notes.txt"})
WRITE = ("fs_write", {"path": "SUMMARY.md", "content": "in short\n"})
EDIT = ("fs_edit", {"path": "notes.txt", "old": "hello", "new": "goodbye"})
FINISH = ("finish", {"summary": "done"})
DONE_S = 60


@pytest.fixture(scope="module")
def engine() -> Iterator[Upstream]:
    with upstream() as running:
        yield running


def prepare(state: Path, engine: Upstream) -> Path:
    write_private(state / "policy.toml", DEMO.read_text() + ASKS)
    text = f'managed_engine = false\n[engines.up]\nkind = "openai"\nurl = "{engine.url}"\n'
    write_private(state / "mycoswarm.toml", text)
    return state


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, engine: Upstream) -> Iterator[NodeProcess]:
    with node(prepare(tmp_path_factory.mktemp("n"), engine)) as running:
        wait_for_models(running)
        yield running


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    directory = tmp_path / "work"
    directory.mkdir()
    (directory / "notes.txt").write_text("hello world\n")
    return directory


def wait_for_models(running: NodeProcess) -> None:
    give_up_s = time.monotonic() + DONE_S
    while not running.call("GET", "/api/models").json["models"]:
        assert time.monotonic() < give_up_s, running.log()
        time.sleep(0.05)


def command(state: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "mycoswarmd.ctl.main", "--state", str(state), *arguments]


def ctl(running: NodeProcess, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; it must exit as said and never show a traceback."""
    ran = subprocess.run(
        command(running.state, *arguments),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=DONE_S,
    )
    assert "Traceback" not in ran.stderr
    assert ran.returncode == code, (ran, running.log()[-2000:])
    return ran


def document(running: NodeProcess, *arguments: str, code: int = 0) -> dict[str, Any]:
    value = json.loads(ctl(running, *arguments, "--json", code=code).stdout)
    assert isinstance(value, dict)
    return value


# --- the node ------------------------------------------------------------------------------------


def test_the_state_of_the_node_is_shown_to_people_and_programs(daemon: NodeProcess) -> None:
    assert document(daemon, "status")["pid"] == daemon.pid
    assert "demo" in ctl(daemon, "status").stdout
    assert document(daemon, "version") == {"mycoswarmctl": __version__, "mycoswarmd": __version__}
    assert "ok" in {row["name"] for row in document(daemon, "models")["models"]}
    # What is broken about this machine is not this test's business: exit status and document agree.
    ran = subprocess.run(command(daemon.state, "doctor", "--json"), capture_output=True, text=True)
    checks = json.loads(ran.stdout)["checks"]
    assert {"node", "policy", "clock", "disk", "engine: up"} <= {check["name"] for check in checks}
    assert ran.returncode == any(check["severity"] == "broken" for check in checks)


def test_status_answers_at_once(daemon: NodeProcess) -> None:
    took_s: list[float] = []
    # A busy machine needs more now and then.
    while not took_s or (min(took_s) >= 1.0 and len(took_s) < 20):
        before_s = time.perf_counter()
        ctl(daemon, "status")
        took_s.append(time.perf_counter() - before_s)
    assert min(took_s) < 1.0


def test_a_prompt_streams_and_leaves_a_receipt(daemon: NodeProcess) -> None:
    ran = ctl(daemon, "ask", "--model", "ok", "-v", "hi")
    assert ran.stdout == "Hello there\n"
    assert "answered-here" in ran.stderr
    answer = document(daemon, "ask", "--model", "ok", "hi")
    receipt = document(daemon, "audit", "show", answer["mycoswarm"]["receipt"])
    assert receipt["body"]["rule"] == "answered-here"


def test_a_vendors_name_is_refused_with_exit_3_and_never_leaves(
    daemon: NodeProcess, engine: Upstream
) -> None:
    ran = ctl(daemon, "ask", "--model", "gpt-4o", "hi", code=3)
    assert ran.stdout == ""
    assert "default-deny" in ran.stderr
    assert engine.count("gpt-4o") == 0
    said = document(
        daemon,
        "policy",
        "explain",
        "--action",
        "infer",
        "--model",
        "gpt-4o",
        "--zone",
        "cloud",
        "--dest",
        "bigcloud",
    )
    assert said["decision"] == "deny"


def test_a_model_that_nobody_serves_is_explained_as_such(daemon: NodeProcess) -> None:
    """The policy allows it here; a person who asks why a prompt fails is told the rest."""
    what = ("policy", "explain", "--action", "infer", "--model")
    for where in ((), ("--zone", "self")):
        said = document(daemon, *what, "nosuch", *where)
        assert (said["decision"], said["served"]) == ("allow", False)
        assert ctl(daemon, *what, "nosuch", *where).stdout.startswith("No node serves nosuch")
        assert document(daemon, *what, "ok", *where)["served"] is True
        assert "No node" not in ctl(daemon, *what, "ok", *where).stdout
    assert document(daemon, *what, "ok", "--zone", "lan")["served"] is False  # it is here, not there
    assert "served" not in document(daemon, *what[:-1])
    ctl(daemon, "ask", "--model", "nosuch", "hi", code=1)


def test_an_engine_that_dies_is_a_failure_after_what_came(daemon: NodeProcess) -> None:
    ran = ctl(daemon, "ask", "--model", "dies", "hi", code=1)
    assert ran.stdout == "begin\n"


def test_a_key_is_made_listed_and_revoked(daemon: NodeProcess) -> None:
    assert ctl(daemon, "keys", "create", "editor").stdout.startswith("mk-")
    assert "editor" in ctl(daemon, "keys", "list").stdout
    ctl(daemon, "keys", "revoke", "editor")
    ctl(daemon, "keys", "revoke", "nobody", code=1)


def test_the_policy_is_shown_checked_and_reloaded(daemon: NodeProcess) -> None:
    path = daemon.state / "policy.toml"
    assert ctl(daemon, "policy", "show").stdout.startswith(path.read_text()[:40])
    assert document(daemon, "policy", "check")["path"] == str(path)
    ctl(daemon, "policy", "test")
    ctl(daemon, "policy", "prove")
    good = path.read_text()
    path.write_text(good + "\nnonsense = 1\n")
    try:
        ran = ctl(daemon, "policy", "reload", code=1)
        assert "nonsense" in ran.stderr and f"{path}:" in ran.stderr
        assert "nonsense" in ctl(daemon, "policy", "check", code=1).stderr
    finally:
        path.write_text(good)
    assert document(daemon, "policy", "reload")["changed"] == []


def test_the_chain_is_verified_against_a_head(daemon: NodeProcess) -> None:
    head = document(daemon, "audit", "head")
    ctl(daemon, "ask", "--model", "ok", "hi")
    assert document(daemon, "audit", "verify", "--head", head["id"])["ok"] is True
    ctl(daemon, "audit", "verify")
    assert "answered-here" in ctl(daemon, "audit", "tail", "-n", "5").stdout
    rows = [json.loads(row) for row in ctl(daemon, "audit", "tail", "--json").stdout.splitlines()]
    assert [row["seq"] for row in rows] == sorted(row["seq"] for row in rows)


# --- tasks ---------------------------------------------------------------------------------------


def test_run_shows_each_step_and_applies_the_changes(
    daemon: NodeProcess, engine: Upstream, workspace: Path
) -> None:
    engine.play(READ, WRITE, FINISH)
    ran = ctl(
        daemon,
        "run",
        "--agent=scribe",
        "--model=agent",
        "--workspace",
        str(workspace),
        "--apply",
        "--yes",
        "Summarise",
    )
    for words in ("fs_read", "allowed by rule scribe-works-in-its-copy", "+in short", "succeeded"):
        assert words in ran.stdout, ran.stdout
    assert (workspace / "SUMMARY.md").read_text() == "in short\n"


def test_a_submitted_task_is_followed_shown_and_applied_later(
    daemon: NodeProcess, engine: Upstream, workspace: Path
) -> None:
    engine.play(READ, WRITE, FINISH)
    given = ("--agent", "scribe", "--model", "agent", "--workspace", str(workspace))
    task_id = ctl(daemon, "submit", *given, "Summarise").stdout.strip()
    assert "succeeded" in ctl(daemon, "logs", "-f", task_id[:10]).stdout
    assert task_id in ctl(daemon, "tasks", "--state", "succeeded").stdout
    found = document(daemon, "task", task_id)["task"]
    assert (found["state"], found["summary"]) == ("succeeded", "done")
    assert "+in short" in ctl(daemon, "task", task_id, "--patch").stdout
    assert not (workspace / "SUMMARY.md").exists()
    ctl(daemon, "apply", task_id, "--workspace", str(workspace), code=2)
    ctl(daemon, "apply", task_id, "--workspace", str(workspace), "--yes")
    assert (workspace / "SUMMARY.md").read_text() == "in short\n"
    ctl(daemon, "cancel", task_id, code=1)


def test_a_question_is_answered_with_approve(daemon: NodeProcess, engine: Upstream, workspace: Path) -> None:
    engine.play(READ, EDIT, FINISH)
    given = ("--agent", "editor", "--model", "agent", "--workspace", str(workspace))
    with subprocess.Popen(
        command(daemon.state, "run", *given, "--json", "Edit it"),
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    ) as following:
        assert following.stdout is not None
        task_id = json.loads(following.stdout.readline())["task"]["id"]
        daemon.wait_task(task_id, "waiting", within_s=DONE_S)
        assert "edits-are-asked" in ctl(daemon, "approvals").stdout
        assert document(daemon, "approve", task_id)["approval"]["state"] == "approved"
        last = json.loads(following.stdout.read().splitlines()[-1])
    assert following.returncode == 0
    assert "+goodbye world" in last["patch"]


@pytest.mark.timeout(180)
def test_run_goes_on_when_the_node_is_killed_and_started_again(
    tmp_path: Path, engine: Upstream, workspace: Path
) -> None:
    state = prepare(tmp_path / "n", engine)
    given = ("--agent", "scribe", "--model", "agent", "--workspace", str(workspace))
    with node(state) as first:
        wait_for_models(first)
        engine.play(READ, WRITE, FINISH, pause_s=0.3)
        with subprocess.Popen(
            command(state, "run", *given, "--json", "Summarise"), stdout=subprocess.PIPE, text=True
        ) as following:
            assert following.stdout is not None
            task_id = json.loads(following.stdout.readline())["task"]["id"]
            while json.loads(following.stdout.readline())["kind"] != "model":
                pass
            first.kill()
            engine.play(READ, WRITE, FINISH)
            with node(state) as second:
                out = following.communicate(timeout=DONE_S)[0]
                assert second.task(task_id)["state"] == "succeeded"
    rows = [json.loads(row) for row in out.splitlines()]
    assert following.returncode == 0
    assert rows[-1]["task"]["state"] == "succeeded" and "+in short" in rows[-1]["patch"]
    seqs = [row["seq"] for row in rows if "seq" in row]
    assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))


def test_a_stopped_node_cannot_be_reached(tmp_path: Path, engine: Upstream) -> None:
    with node(prepare(tmp_path / "n", engine)) as running:
        ctl(running, "status")
    ran = ctl(running, "status", code=4)
    assert "mycoswarmd run" in ran.stderr
