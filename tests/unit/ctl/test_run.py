import hashlib
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from mycoswarmd.ctl import follow
from mycoswarmd.wire.workspace import read_workspace
from tests.unit.ctl.fakenode import Asked, FakeNode, Reply, answer, ctl, events, refuse
from tests.unit.ctl.tasks_data import FACTS, ID, PENDING, TRANSCRIPT, event, serve_task, task


@pytest.fixture
def ready(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> FakeNode:
    """A node that takes any task and has it ended already; waits are short."""
    monkeypatch.setattr(follow, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(follow, "_LAST_WAIT_S", 0.002)
    serve_task(node)
    node.on("GET", "/api/policy", answer({"agents": {"scribe": {}}}))
    node.on("POST", "/api/tasks", answer({"task": task(state="queued")}, 202))
    return node


def posted(node: FakeNode) -> dict[str, Any]:
    return next(asked.json for asked in node.asked if (asked.method, asked.path) == ("POST", "/api/tasks"))


def put_workspace(node: FakeNode, directory: Path) -> None:
    """Let the node accept the workspace with whatever hash it has."""

    def take(asked: Asked) -> Reply:
        digest = asked.path.rpartition("/")[2]
        if digest != hashlib.sha256(asked.body).hexdigest():
            return refuse(400, "wrong-hash")
        return answer({"sha256": digest})

    first = node.reply

    def reply(asked: Asked) -> Reply:
        if asked.method == "PUT" and asked.path.startswith("/api/blobs/"):
            node.asked.append(asked)
            return take(asked)
        return first(asked)

    node.reply = reply  # type: ignore[method-assign]
    (directory / "notes.txt").write_bytes(b"milk\neggs\n")
    (directory / "old.txt").write_bytes(b"gone\n")


def test_run_follows_and_shows_result_and_patch(ready: FakeNode) -> None:
    ran = ctl(ready, "run", "summarise")
    assert ran.code == 0, ran.err
    for words in ("allowed by rule", "refused by rule default-deny", "I wrote it.", "+milk, eggs"):
        assert words in ran.out
    assert f"mycoswarmctl apply {ID}" in ran.err
    assert "\x1b" not in ran.out
    body = posted(ready)
    assert (body["prompt"], body["agent"], body["repeatable"]) == ("summarise", "scribe", True)
    assert len(body["idempotency_key"]) >= 16


def test_run_for_programs_is_one_json_object_a_line(ready: FakeNode) -> None:
    ran = ctl(ready, "run", "--json", "summarise")
    assert ran.code == 0
    first, *rows, last = ran.lines
    assert first["task"]["state"] == "queued"
    assert rows == list(TRANSCRIPT)
    assert last["task"]["state"] == "succeeded" and "+milk, eggs" in last["patch"]
    assert ran.err == ""


def test_options_of_a_task_reach_the_node(ready: FakeNode) -> None:
    options = ["--agent", "coder", "--label", "secret", "--model", "m", "--priority", "1", "--deadline", "2h"]
    assert ctl(ready, "submit", *options, "--once", "do it").out == f"{ID}\n"
    body = posted(ready)
    del body["idempotency_key"]
    assert body == {
        "prompt": "do it",
        "agent": "coder",
        "label": "secret",
        "model": "m",
        "priority": 1,
        "deadline_s": 7200,
        "repeatable": False,
    }
    assert "GET /api/policy" not in ready.paths()
    assert ctl(ready, "submit", "--json", "do it").json["task"]["id"] == ID


@pytest.mark.parametrize("deadline", ["0", "-1", "2 weeks", "1h30m", "9" * 30])
def test_a_deadline_that_is_none_is_refused_here(ready: FakeNode, deadline: str) -> None:
    assert ctl(ready, "submit", f"--deadline={deadline}", "do it").code == 2
    assert "POST /api/tasks" not in ready.paths()


@pytest.mark.parametrize("agents", [{}, {"coder": {}, "scribe": {}}])
def test_an_agent_must_be_named_unless_there_is_one(ready: FakeNode, agents: dict[str, object]) -> None:
    ready.on("GET", "/api/policy", answer({"agents": agents}))
    ran = ctl(ready, "run", "do it")
    assert ran.code == 2
    assert "--agent" in ran.err
    assert all(name in ran.err for name in agents)


@pytest.mark.parametrize(
    ("state", "code", "exit_code"),
    [
        ("failed", "engine-failed", 1),
        ("expired", "deadline", 1),
        ("cancelled", "cancelled", 1),
        ("parked", "node-died", 1),
        ("failed", "policy-denied", 3),
        ("failed", "not-approved", 3),
    ],
)
def test_run_exits_by_how_the_task_ended(ready: FakeNode, state: str, code: str, exit_code: int) -> None:
    last = event(
        2, "state", **{"from": "running", "to": state, "code": code, "message": "cannot \x1b[2Jgo on"}
    )
    serve_task(ready, last, state=state, code=code, message="cannot \x1b[2Jgo on")
    ran = ctl(ready, "run", "do it")
    assert ran.code == exit_code
    assert code in ran.err and "cannot \\x1b[2Jgo on" in ran.err
    assert ctl(ready, "run", "--json", "do it").code == exit_code


def test_a_refused_submission_exits_3(ready: FakeNode) -> None:
    ready.on("POST", "/api/tasks", refuse(403, "policy-denied", rule="default-deny"))
    assert ctl(ready, "run", "do it").code == 3
    assert ctl(ready, "submit", "do it").code == 3


def test_a_workspace_is_packed_and_sent_before_the_task(ready: FakeNode, tmp_path: Path) -> None:
    put_workspace(ready, tmp_path)
    assert ctl(ready, "submit", "--workspace", str(tmp_path), "do it").code == 0
    sent = next(asked for asked in ready.asked if asked.method == "PUT")
    assert {entry.path for entry in read_workspace(sent.body)} == {"notes.txt", "old.txt"}
    assert posted(ready)["workspace"] == sent.path.rpartition("/")[2]


def test_apply_changes_the_workspace_only_when_asked_to(ready: FakeNode, tmp_path: Path) -> None:
    put_workspace(ready, tmp_path)
    assert ctl(ready, "run", "--workspace", str(tmp_path), "do it").code == 0
    assert not (tmp_path / "new.txt").exists()
    assert ctl(ready, "run", "--workspace", str(tmp_path), "--apply", "do it").code == 2
    no = ctl(ready, "run", "--workspace", str(tmp_path), "--apply", "do it", terminal=True, stdin="\n")
    assert no.code == 0
    assert not (tmp_path / "new.txt").exists()
    ran = ctl(ready, "run", "--workspace", str(tmp_path), "--apply", "--yes", "do it")
    assert ran.code == 0, ran.err
    assert (tmp_path / "new.txt").read_bytes() == b"milk, eggs\n"
    assert not (tmp_path / "old.txt").exists()


def test_changes_of_a_failed_task_are_never_applied(ready: FakeNode, tmp_path: Path) -> None:
    put_workspace(ready, tmp_path)
    serve_task(ready, state="failed", code="step-limit")
    assert ctl(ready, "run", "--workspace", str(tmp_path), "--apply", "--yes", "do it").code == 1
    assert not (tmp_path / "new.txt").exists()


def test_apply_needs_a_workspace(ready: FakeNode) -> None:
    assert ctl(ready, "run", "--apply", "--yes", "do it").code == 2
    assert ready.asked == []


def test_a_missing_workspace_is_said_before_anything_is_sent(ready: FakeNode, tmp_path: Path) -> None:
    ran = ctl(ready, "run", "--agent", "a", "--workspace", str(tmp_path / "none"), "do it")
    assert ran.code != 0
    assert "none" in ran.err and "Traceback" not in ran.err
    assert ready.asked == []


@pytest.mark.parametrize(("typed", "said"), [("y\n", True), ("\n", False), ("", False)])
def test_a_question_is_put_to_the_person_at_the_terminal(ready: FakeNode, typed: str, said: bool) -> None:
    serve_task(ready, PENDING, TRANSCRIPT[-1])
    ready.on("POST", "/api/approvals/a-0011223344", answer({"approval": {}}))
    ran = ctl(ready, "run", "do it", terminal=True, stdin=typed)
    assert ran.code == 0
    assert next(asked.json for asked in ready.asked if "approvals" in asked.path) == {"approve": said}


def test_a_question_shows_all_that_a_yes_would_allow(ready: FakeNode) -> None:
    arguments = json.dumps({"argv": ["sh", "-c", "true " * 200 + "; rm -rf \x1b[8m ."]})
    facts = {**FACTS, "arguments": arguments}
    pending = event(7, "approval", id="a-1", state="pending", facts=facts)
    serve_task(ready, pending, TRANSCRIPT[-1])
    row = {"id": "a-1", "task_id": ID, "facts": facts, "state": "pending", "expires_at_ms": 1}
    ready.on("GET", "/api/approvals", answer({"approvals": [row]}))
    ready.on("GET", f"/api/tasks/{ID}", answer({"task": task(), "approvals": [row]}))
    for arguments_of_ctl in (("run", "do it"), ("approvals",), ("task", ID)):
        ran = ctl(ready, *arguments_of_ctl, terminal=True, env={"COLUMNS": "80"})
        shown = (ran.out + ran.err).replace("\n", "").replace(" ", "")
        assert arguments.replace(" ", "") in shown, arguments_of_ctl


def test_a_question_waits_where_nobody_is_at_a_terminal(ready: FakeNode) -> None:
    serve_task(ready, PENDING, TRANSCRIPT[-1])
    for flags in ((), ("--yes",), ("--json",)):
        assert ctl(ready, "run", *flags, "do it", stdin="y\n").code == 0
    assert not [path for path in ready.paths() if "/api/approvals" in path]


def test_a_question_answered_elsewhere_does_not_end_the_run(ready: FakeNode) -> None:
    serve_task(ready, PENDING, TRANSCRIPT[-1])
    ready.on("POST", "/api/approvals/a-0011223344", refuse(409, "already-decided", "cannot: it is answered"))
    assert ctl(ready, "run", "do it", terminal=True, stdin="y\n").code == 0


def test_run_goes_on_where_it_was_when_the_node_restarts(ready: FakeNode) -> None:
    path = f"/api/tasks/{ID}"
    ready.on("GET", f"{path}/events", [events(*TRANSCRIPT[:2], cut=True), events(*TRANSCRIPT[2:])])
    ran = ctl(ready, "run", "--json", "do it")
    assert ran.code == 0
    assert [row["seq"] for row in ran.lines[1:-1]] == [row["seq"] for row in TRANSCRIPT]
    assert [part for part in ready.paths() if "/events" in part] == [
        f"GET {path}/events?after=0&follow=1",
        f"GET {path}/events?after=2&follow=1",
    ]


def test_run_goes_on_when_the_connection_ends_before_the_task(ready: FakeNode) -> None:
    path = f"/api/tasks/{ID}"
    still = answer({"task": task(state="running"), "approvals": []})
    ready.on("GET", path, [still, answer({"task": task(), "approvals": []})])
    ready.on("GET", f"{path}/events", [events(*TRANSCRIPT[:3]), events(*TRANSCRIPT[3:])])
    ran = ctl(ready, "run", "--json", "do it")
    assert [row["seq"] for row in ran.lines[1:-1]] == [row["seq"] for row in TRANSCRIPT]


def test_run_gives_up_on_a_node_that_stays_away(ready: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_TRIES", 3)
    ready.on("GET", f"/api/tasks/{ID}/events", events(TRANSCRIPT[0], cut=True))
    ready.on("GET", f"/api/tasks/{ID}/events", [events(TRANSCRIPT[0], cut=True), events(cut=True)])
    ran = ctl(ready, "run", "do it")
    assert ran.code == 4
    assert "waiting" in ran.err


def test_a_task_sent_twice_is_one_task(ready: FakeNode) -> None:
    taken = answer({"task": task(state="queued")})
    lost = Reply(body=b"{", cut=True)
    ready.on("POST", "/api/tasks", [lost, taken])
    assert ctl(ready, "submit", "do it").code == 0
    keys = {asked.json["idempotency_key"] for asked in ready.asked if asked.method == "POST"}
    assert len(keys) == 1


def test_ctrl_c_leaves_the_task_and_says_how_to_follow_it(ready: FakeNode) -> None:
    hold = threading.Event()

    def slow(asked: Asked) -> Reply:
        os.kill(os.getpid(), signal.SIGINT)
        hold.wait(10)
        return events(*TRANSCRIPT)

    ready.on("GET", f"/api/tasks/{ID}/events", slow)
    try:
        ran = ctl(ready, "run", "do it")
    finally:
        hold.set()
    assert ran.code == 130
    assert f"mycoswarmctl logs -f {ID}" in ran.err and "Traceback" not in ran.err
    assert not [path for path in ready.paths() if "cancel" in path]
