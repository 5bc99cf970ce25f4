import json
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from mycoswarmd.ctl.screen import Paint
from mycoswarmd.ctl.transcript import render
from tests.unit.ctl.fakenode import FakeNode, Reply, answer, ctl, events, refuse
from tests.unit.ctl.tasks_data import FACTS, ID, PENDING, RULE, TRANSCRIPT, serve_task, task

APPROVAL = {
    "id": "a-0011223344",
    "task_id": ID,
    "facts": FACTS,
    "state": "pending",
    "asked_at_ms": 1,
    "expires_at_ms": 1_790_000_000_000,
    "decided_by": "",
}


def test_tasks_are_listed_for_people_and_programs(node: FakeNode) -> None:
    serve_task(node)
    ran = ctl(node, "tasks")
    assert ran.code == 0
    head, row = ran.out.splitlines()
    assert head.split()[:3] == ["ID", "STATE", "AGENT"]
    assert row.split()[:4] == [ID, "succeeded", "scribe", "private"]
    assert ctl(node, "tasks", "--json").json == {"tasks": [task()]}


def test_tasks_can_be_narrowed(node: FakeNode) -> None:
    serve_task(node)
    assert ctl(node, "tasks", "--state", "waiting", "--limit", "3").code == 0
    assert parse_qs(urlsplit(node.asked[-1].path).query) == {"state": ["waiting"], "limit": ["3"]}
    assert ctl(node, "tasks", "--state", "sleeping").code == 2
    assert ctl(node, "tasks", "--limit", "0").code == 2
    assert len(node.asked) == 1


def test_no_tasks_is_said_to_people_only(node: FakeNode) -> None:
    node.on("GET", "/api/tasks", answer({"tasks": []}))
    ran = ctl(node, "tasks")
    assert (ran.code, ran.out) == (0, "")
    assert "no tasks" in ran.err
    assert ctl(node, "tasks", "--json").json == {"tasks": []}


def test_a_task_is_shown_with_result_and_open_questions(node: FakeNode) -> None:
    serve_task(node, state="waiting", tainted=True, code="approval-needed", summary="a\x1b[2Jb")
    found = task(state="waiting", tainted=True, code="approval-needed", summary="a\x1b[2Jb")
    node.on("GET", f"/api/tasks/{ID}", answer({"task": found, "approvals": [APPROVAL]}))
    ran = ctl(node, "task", ID)
    assert ran.code == 0
    for fact in (
        ID,
        "waiting",
        "scribe",
        "tainted",
        "approval-needed",
        "a-0011223344",
        "a\\x1b[2Jb",
        "summarise",
    ):
        assert fact in ran.out
    assert "\x1b" not in ran.out
    assert ctl(node, "task", ID, "--json").json["task"] == found


def test_a_task_is_found_by_the_beginning_of_its_id(node: FakeNode) -> None:
    serve_task(node)
    for given in ("t-01", "01", ID.removeprefix("t-")):
        assert ctl(node, "task", given).code == 0, given
        assert node.paths()[-1] == f"GET /api/tasks/{ID}"
    other = task(id="t-01ff")
    node.on("GET", "/api/tasks", answer({"tasks": [task(), other]}))
    ran = ctl(node, "cancel", "t-01")
    assert ran.code == 2
    assert "t-01ff" in ran.err
    assert not [path for path in node.paths() if path.startswith("POST")]


@pytest.mark.parametrize("given", ["t-9", "", "../status", "t-0123456789ab/cancel"])
def test_an_unknown_task_is_unknown(node: FakeNode, given: str) -> None:
    serve_task(node)
    ran = ctl(node, "task", given)
    assert ran.code == 1 and "hint: `mycoswarmctl tasks`" in ran.err
    assert "GET /api/status" not in node.paths()


def test_a_tasks_patch_can_be_piped(node: FakeNode) -> None:
    serve_task(node)
    ran = ctl(node, "task", ID, "--patch")
    assert ran.code == 0
    assert ran.out.startswith("diff --git")
    assert "+milk, eggs\n" in ran.out and "deleted file mode 100644" in ran.out
    assert ctl(node, "task", ID, "--patch", "--json").json["patch"] == ran.out


def test_a_patch_is_coloured_on_a_terminal_unless_no_color(node: FakeNode) -> None:
    serve_task(node)
    coloured = ctl(node, "task", ID, "--patch", terminal=True, env={"NO_COLOR": ""}).out
    assert "\x1b[32m+milk, eggs\x1b[0m" in coloured
    assert "\x1b" not in ctl(node, "task", ID, "--patch", terminal=True, env={"NO_COLOR": "1"}).out


def test_a_task_that_changed_nothing_has_an_empty_patch(node: FakeNode) -> None:
    serve_task(node, changes=None, deleted=[])
    node.on("GET", f"/api/tasks/{ID}/changes", Reply(status=204))
    ran = ctl(node, "task", ID, "--patch")
    assert (ran.code, ran.out) == (0, "")


def test_logs_show_each_step_with_its_rule_and_no_control_characters(node: FakeNode) -> None:
    serve_task(node)
    ran = ctl(node, "logs", ID)
    assert ran.code == 0
    for words in (
        "running",
        "full",
        "without landlock",
        "I will read \\x1b[31mit",
        "answered-here",
        "fs_read",
        "notes",
        f"allowed by rule {RULE}",
        "refused by rule default-deny: cannot use it",
        "tainted",
        "new\\x1b.txt",
        "succeeded",
    ):
        assert words in ran.out, words
    assert "\x1b" not in ran.out and "\x07" not in ran.out
    assert "follow=0" in node.asked[-1].path


def test_logs_for_programs_are_the_events_line_by_line(node: FakeNode) -> None:
    serve_task(node)
    assert ctl(node, "logs", ID, "--json").lines == list(TRANSCRIPT)


def test_logs_survive_events_of_a_newer_node(node: FakeNode) -> None:
    odd = (
        {"seq": 1, "kind": "new", "data": {"x": "\x1b"}},
        {"seq": 2, "kind": "model", "data": None},
        {"seq": 3},
    )
    serve_task(node, *odd)
    ran = ctl(node, "logs", ID)
    assert ran.code == 0
    assert "\x1b" not in ran.out


def test_logs_follow_until_the_task_has_ended(node: FakeNode) -> None:
    serve_task(node)
    ran = ctl(node, "logs", "-f", ID)
    assert ran.code == 0
    assert "succeeded" in ran.out
    assert any("follow=1" in path for path in node.paths())


def test_logs_of_a_question_say_how_to_answer_it(node: FakeNode) -> None:
    serve_task(node, PENDING)
    ran = ctl(node, "logs", ID)
    assert "make" in ran.out and "ask-first" in ran.out
    assert "mycoswarmctl approve a-0011223344" in ran.err


@pytest.mark.parametrize(("verb", "state"), [("cancel", "cancelled"), ("retry", "queued")])
def test_a_task_is_cancelled_or_tried_again(node: FakeNode, verb: str, state: str) -> None:
    serve_task(node)
    node.on("POST", f"/api/tasks/{ID}/{verb}", answer({"task": task(state=state)}))
    ran = ctl(node, verb, "t-0123")
    assert (ran.code, ran.out) == (0, f"{ID}: {state}\n")
    assert ctl(node, verb, ID, "--json").json["task"]["state"] == state
    node.on("POST", f"/api/tasks/{ID}/{verb}", refuse(409, "illegal-transition"))
    assert ctl(node, verb, ID).code == 1


@pytest.mark.parametrize(("flags", "said"), [((), True), (("--deny",), False)])
def test_a_question_is_answered(node: FakeNode, flags: tuple[str, ...], said: bool) -> None:
    state = "approved" if said else "denied"
    node.on("POST", "/api/approvals/a-0011223344", answer({"approval": {**APPROVAL, "state": state}}))
    ran = ctl(node, "approve", "a-0011223344", *flags)
    assert ran.code == 0
    assert state in ran.out
    assert json.loads(node.asked[-1].body) == {"approve": said}
    assert ctl(node, "approve", "a-0011223344", *flags, "--json").json["approval"]["state"] == state


@pytest.mark.parametrize(("given", "full"), [("a-00", "a-0011223344"), ("t-01", ID)])
def test_a_question_is_found_by_the_beginning_of_an_id(node: FakeNode, given: str, full: str) -> None:
    node.on("GET", "/api/approvals", answer({"approvals": [APPROVAL]}))
    node.on("POST", f"/api/approvals/{given}", refuse(404, "unknown-approval"))
    node.on("POST", f"/api/approvals/{full}", answer({"approval": APPROVAL}))
    assert ctl(node, "approve", given).code == 0
    assert ctl(node, "approve", "zz").code == 1


def test_someone_who_may_not_approve_is_denied(node: FakeNode) -> None:
    node.on("POST", "/api/approvals/a-1", refuse(403, "not-approver", rule="approval-by-a-person"))
    assert ctl(node, "approve", "a-1").code == 3


def test_open_questions_are_listed(node: FakeNode) -> None:
    node.on("GET", "/api/approvals", answer({"approvals": [APPROVAL]}))
    ran = ctl(node, "approvals")
    assert "a-0011223344" in ran.out and "make" in ran.out and "ask-first" in ran.out
    assert ctl(node, "approvals", "--json").json == {"approvals": [APPROVAL]}


def test_changes_are_applied_to_a_directory(node: FakeNode, tmp_path: Path) -> None:
    serve_task(node)
    (tmp_path / "notes.txt").write_bytes(b"milk\neggs\n")
    (tmp_path / "old.txt").write_bytes(b"gone\n")
    ran = ctl(node, "apply", "t-01", "--workspace", str(tmp_path), "--yes")
    assert ran.code == 0, ran.err
    assert (tmp_path / "new.txt").read_bytes() == b"milk, eggs\n"
    assert not (tmp_path / "old.txt").exists()
    assert "new.txt" in ran.err


def test_nothing_is_applied_without_a_yes(node: FakeNode, tmp_path: Path) -> None:
    serve_task(node)
    (tmp_path / "old.txt").write_bytes(b"gone\n")
    piped = ctl(node, "apply", ID, "--workspace", str(tmp_path))
    assert piped.code == 2
    refused = ctl(node, "apply", ID, "--workspace", str(tmp_path), terminal=True, stdin="n\n")
    assert refused.code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.txt"]
    assert ctl(node, "apply", ID, "--workspace", str(tmp_path), terminal=True, stdin="y\n").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.txt"]


def test_applied_changes_are_listed_for_programs(node: FakeNode, tmp_path: Path) -> None:
    serve_task(node)
    (tmp_path / "old.txt").write_bytes(b"gone\n")
    ran = ctl(node, "apply", ID, "--workspace", str(tmp_path), "--yes", "--json")
    assert sorted(ran.json["applied"]) == ["new.txt", "old.txt"]


def test_a_file_changed_since_is_not_overwritten(node: FakeNode, tmp_path: Path) -> None:
    serve_task(node)
    (tmp_path / "old.txt").write_bytes(b"mine now\n")
    ran = ctl(node, "apply", ID, "--workspace", str(tmp_path), "--yes")
    assert ran.code != 0
    assert (tmp_path / "old.txt").read_bytes() == b"mine now\n"
    assert not (tmp_path / "new.txt").exists()


def test_changes_that_would_leave_the_directory_are_refused(node: FakeNode, tmp_path: Path) -> None:
    serve_task(node, deleted=["../old.txt"])
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "old.txt").write_bytes(b"gone\n")
    assert ctl(node, "apply", ID, "--workspace", str(inside), "--yes").code != 0
    assert (tmp_path / "old.txt").exists()


def test_a_transcript_that_is_cut_is_no_success(node: FakeNode) -> None:
    serve_task(node)
    node.on("GET", f"/api/tasks/{ID}/events", events(TRANSCRIPT[0], cut=True))
    assert ctl(node, "logs", ID).code == 4


def test_changes_that_are_not_the_ones_shown_are_refused(node: FakeNode, tmp_path: Path) -> None:
    serve_task(node, changes="bb" * 32)
    assert ctl(node, "apply", ID, "--workspace", str(tmp_path), "--yes").code == 1
    assert not (tmp_path / "new.txt").exists()


def test_a_step_without_an_answer_has_no_empty_facts() -> None:
    bare = Paint(is_on=False)
    assert render({"kind": "model", "data": {"step": 1}}, bare) == "step 1: model"
    full = {"step": 1, "zone": "lan", "rule": "r", "model": "m"}
    assert render({"kind": "model", "data": full}, bare) == "step 1: m  (zone lan, rule r)"
