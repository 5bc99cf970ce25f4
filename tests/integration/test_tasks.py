"""Tasks on a real daemon with real cages: decided step by step, ended exactly once, whatever happens."""

import hashlib
import io
import json
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engines import is_alive
from tests.nodes import NodeProcess, node, write_private
from tests.upstream import Upstream, upstream

pytestmark = pytest.mark.timeout(300)
POLICY = """
schema = 1
name = "test"
[tools.fs_list]
[tools.fs_read]
[tools.fs_write]
[tools.fs_edit]
[tools.run]
programs = ["ls"]

[agents.scribe]
model = "*"
tools = ["fs_list", "fs_read", "fs_write"]
paths = { read = ["."], write = ["."] }
limit = { wall = "120s", memory = "1GiB", processes = 16, disk = "32MiB", steps = 8, tokens = 100_000 }

[agents.asker]
model = "*"
tools = ["fs_read", "fs_edit"]
paths = { read = ["."], write = ["."] }
limit = { wall = "120s", memory = "1GiB", disk = "32MiB", steps = 8 }

[agents.hasty]
model = "*"
tools = ["fs_list"]
limit = { wall = "2s", memory = "1GiB", disk = "32MiB", steps = 8 }

[[rule]]
id = "owner"
why = "the owner runs this node"
effect = "allow"
action = ["task", "admin"]
origin = ["owner"]
[[rule]]
id = "here"
why = "prompts are answered here"
effect = "allow"
action = "infer"
zone = ["self"]
[[rule]]
id = "tools"
why = "agents may use their tools"
effect = "allow"
action = "tool"
tool = ["fs_list", "fs_read", "fs_write"]
[[rule]]
id = "edits-are-asked"
why = "a person looks at each edit"
effect = "ask"
action = "tool"
tool = ["fs_edit"]
[[rule]]
id = "no-secret-writing"
why = "secret tasks write nothing"
effect = "forbid"
action = "tool"
tool = ["fs_write"]
label = { min = "secret" }
"""
READ = ("fs_read", {"path": "notes.txt"})
WRITE = ("fs_write", {"path": "SUMMARY.md", "content": "in short\n"})
EDIT = ("fs_edit", {"path": "notes.txt", "old": "hello", "new": "goodbye"})
FINISH = ("finish", {"summary": "done"})
STATES = ("succeeded", "failed", "cancelled", "expired", "parked")


def tar_of(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def put(daemon: NodeProcess, files: dict[str, bytes]) -> str:
    data = tar_of(files)
    sha256 = hashlib.sha256(data).hexdigest()
    answer = daemon.call("PUT", f"/api/blobs/{sha256}", data)
    assert answer.status == 200, answer.body
    return sha256


def prepare(state: Path, engine: Upstream, *, more: str = "") -> Path:
    write_private(state / "policy.toml", POLICY)
    text = f'managed_engine = false\n{more}\n[engines.up]\nkind = "openai"\nurl = "{engine.url}"\n'
    write_private(state / "mycoswarm.toml", text)
    return state


def kinds(daemon: NodeProcess, task_id: str) -> list[str]:
    return [event["kind"] for event in daemon.events(task_id)]


@pytest.fixture(scope="module")
def engine() -> Iterator[Upstream]:
    with upstream() as running:
        yield running


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, engine: Upstream) -> Iterator[NodeProcess]:
    with node(prepare(tmp_path_factory.mktemp("node"), engine)) as running:
        running.wait_for_models()
        yield running


@pytest.fixture(scope="module")
def workspace(daemon: NodeProcess) -> str:
    return put(daemon, {"notes.txt": b"hello world\n"})


# --- the ordinary course ------------------------------------------------------------------------


def test_a_task_reads_writes_and_comes_back_as_changes(
    daemon: NodeProcess, engine: Upstream, workspace: str
) -> None:
    engine.play(READ, WRITE, FINISH)
    task_id = daemon.submit("Summarise notes.txt", model="agent", workspace=workspace)
    task = daemon.wait_task(task_id, *STATES)
    assert (task["state"], task["summary"], task["steps"]) == ("succeeded", "done", 3), daemon.events(task_id)
    answer = daemon.call("GET", f"/api/tasks/{task_id}/changes")
    with tarfile.open(fileobj=io.BytesIO(answer.body)) as tar:
        assert tar.getnames() == ["SUMMARY.md"]
        member = tar.extractfile("SUMMARY.md")
        assert member is not None
        assert member.read() == b"in short\n"


def test_each_step_has_its_decision_and_its_receipt(
    daemon: NodeProcess, engine: Upstream, workspace: str
) -> None:
    engine.play(READ, FINISH)
    task_id = daemon.submit("Read it", model="agent", workspace=workspace)
    daemon.wait_task(task_id, "succeeded")
    events = daemon.events(task_id)
    decision = next(event["data"] for event in events if event["kind"] == "decision")
    assert (decision["tool"], decision["decision"], decision["rule"]) == ("fs_read", "allow", "tools")
    receipt = daemon.call("GET", f"/api/receipts/{decision['receipt']}").json
    assert (receipt["body"]["action"], receipt["body"]["task"]) == ("tool", task_id)
    model = next(event["data"] for event in events if event["kind"] == "model")
    assert daemon.call("GET", f"/api/receipts/{model['receipt']}").json["body"]["by"] == "agent:scribe"
    proof = next(event["data"] for event in events if event["kind"] == "proof")
    assert proof["level"] == "reduced"


def test_the_cage_proves_itself_before_the_first_prompt(daemon: NodeProcess, engine: Upstream) -> None:
    engine.play(FINISH)
    task_id = daemon.submit("Nothing", model="agent")
    daemon.wait_task(task_id, "succeeded")
    order = kinds(daemon, task_id)
    assert order.index("proof") < order.index("model")


def test_a_forbidden_tool_is_refused_and_the_agent_goes_on(
    daemon: NodeProcess, engine: Upstream, workspace: str
) -> None:
    engine.play(READ, WRITE, FINISH)
    task_id = daemon.submit("Summarise", model="agent", workspace=workspace, label="secret")
    task = daemon.wait_task(task_id, *STATES)
    decisions = [event["data"] for event in daemon.events(task_id) if event["kind"] == "decision"]
    refused = [d for d in decisions if d["decision"] == "deny"]
    assert [d["rule"] for d in refused] == ["no-secret-writing"]
    assert task["changes"] is None
    assert task["state"] == "succeeded"


def test_follow_ends_with_the_final_state(daemon: NodeProcess, engine: Upstream) -> None:
    engine.play(FINISH)
    task_id = daemon.submit("Nothing", model="agent")
    answer = daemon.call("GET", f"/api/tasks/{task_id}/events?follow=1")
    last = json.loads(answer.body.splitlines()[-1])
    assert (last["kind"], last["data"]["to"]) == ("state", "succeeded")


# --- models that misbehave ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "agent", "codes"),
    [
        ("nonsense", "scribe", {"agent-nonsense"}),
        ("looping", "scribe", {"agent-looped", "agent-nonsense"}),
        ("huge", "scribe", {"agent-nonsense", "engine-failed"}),
        ("silent", "hasty", {"agent-timeout"}),
        ("refuses", "scribe", {"context-too-long"}),
    ],
)
def test_a_bad_model_ends_in_a_clear_final_state(
    daemon: NodeProcess, workspace: str, model: str, agent: str, codes: set[str]
) -> None:
    task_id = daemon.submit("Do it", model=model, agent=agent, workspace=workspace)
    task = daemon.wait_task(task_id, *STATES, within_s=60)
    assert task["state"] == "failed", task
    assert task["code"] in codes, task
    assert task["message"]


# --- approvals ----------------------------------------------------------------------------------


def test_an_approved_edit_happens_and_a_refused_one_does_not(
    daemon: NodeProcess, engine: Upstream, workspace: str
) -> None:
    for says_yes, kind in ((True, ["written"]), (False, [])):
        engine.play(READ, EDIT, FINISH)
        task_id = daemon.submit("Edit it", model="agent", agent="asker", workspace=workspace)
        daemon.wait_task(task_id, "waiting")
        (question,) = daemon.call("GET", "/api/approvals").json["approvals"]
        assert question["facts"]["tool"] == "fs_edit"
        assert daemon.call("POST", f"/api/approvals/{task_id}", {"approve": says_yes}).status == 200
        task = daemon.wait_task(task_id, *STATES)
        assert task["state"] == "succeeded", daemon.events(task_id)
        changed = [event["data"]["files"] for event in daemon.events(task_id) if event["kind"] == "changes"]
        assert [file["kind"] for files in changed for file in files] == kind
        again = daemon.call("POST", f"/api/approvals/{question['id']}", {"approve": True})
        assert again.json["error"]["code"] == "already-decided"


def test_an_approval_is_remembered_across_kill_and_restart(tmp_path: Path, engine: Upstream) -> None:
    state = prepare(tmp_path / "node", engine)
    with node(state) as first:
        first.wait_for_models()
        engine.play(READ, EDIT, FINISH)
        workspace = put(first, {"notes.txt": b"hello world\n"})
        task_id = first.submit("Edit it", model="agent", agent="asker", workspace=workspace)
        first.wait_task(task_id, "waiting")
        first.kill()
    with node(state) as second:
        second.wait_for_models()
        assert second.task(task_id)["state"] == "waiting"
        engine.play(READ, EDIT, FINISH)
        assert second.call("POST", f"/api/approvals/{task_id}", {"approve": True}).status == 200
        task = second.wait_task(task_id, *STATES)
        assert task["state"] == "succeeded", second.events(task_id)
        assert task["changes"]


def test_nobody_answering_is_a_no(tmp_path: Path, engine: Upstream) -> None:
    state = prepare(tmp_path / "node", engine, more='approval_time = "1s"')
    with node(state) as daemon:
        daemon.wait_for_models()
        engine.play(READ, EDIT, FINISH)
        workspace = put(daemon, {"notes.txt": b"hello world\n"})
        task_id = daemon.submit("Edit it", model="agent", agent="asker", workspace=workspace)
        task = daemon.wait_task(task_id, *STATES)
        assert task["changes"] is None
        decision = [e["data"] for e in daemon.events(task_id) if e["kind"] == "decision"][-1]
        assert (decision["decision"], decision["code"]) == ("deny", "not-approved")


# --- cancel, deadline, queue --------------------------------------------------------------------


def test_cancel_kills_the_cage_and_the_prompt(daemon: NodeProcess, engine: Upstream) -> None:
    engine.gone.clear()
    before = engine.count("silent")
    task_id = daemon.submit("Wait", model="silent")
    while "proof" not in kinds(daemon, task_id) or engine.count("silent") == before:
        time.sleep(0.05)
    assert cages_of(daemon.pid)
    answer = daemon.call("POST", f"/api/tasks/{task_id}/cancel", {})
    assert (answer.status, answer.json["task"]["state"]) == (200, "cancelled")
    assert engine.gone.wait(60)
    assert gone_within(cages_of(daemon.pid), 60)
    assert daemon.call("POST", f"/api/tasks/{task_id}/cancel", {}).json["error"]["code"] == "already-ended"


def test_a_deadline_ends_a_running_task(daemon: NodeProcess) -> None:
    task_id = daemon.submit("Wait", model="silent", deadline_s=1)
    task = daemon.wait_task(task_id, *STATES)
    assert (task["state"], task["code"]) == ("expired", "deadline")


def test_unknown_tasks_are_unknown(daemon: NodeProcess) -> None:
    for path in ("", "/events", "/changes"):
        answer = daemon.call("GET", f"/api/tasks/t-0000{path}")
        assert (answer.status, answer.json["error"]["code"]) == (404, "unknown-task")


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"agent": "nobody"}, "unknown-agent"),
        ({"label": "cosmic"}, "unknown-label"),
        ({"workspace": "0" * 64}, "unknown-blob"),
        ({"workspace": "../../etc/passwd"}, "bad-request"),
        ({"priority": 11}, "bad-request"),
        ({"prompt": "  "}, "bad-request"),
    ],
)
def test_bad_tasks_are_refused_when_submitted(
    daemon: NodeProcess, fields: dict[str, object], code: str
) -> None:
    answer = daemon.call("POST", "/api/tasks", {"prompt": "x", "agent": "scribe", **fields})
    assert answer.status in {400, 404}
    assert answer.json["error"]["code"] == code


def test_what_was_done_to_a_large_task_is_said_without_it(daemon: NodeProcess) -> None:
    """A large answer may find no room; that a task was posted, cancelled or retried is always said."""
    body = {"prompt": "x" * 500_000, "agent": "scribe", "model": "silent"}
    posted = daemon.call("POST", "/api/tasks", body)
    path = f"/api/tasks/{posted.json['task']['id']}"
    cancelled = daemon.call("POST", f"{path}/cancel", {})
    assert (posted.status, cancelled.status) == (202, 200)
    assert cancelled.json["task"]["state"] == "cancelled"
    assert max(len(posted.body), len(cancelled.body)) < 2000
    assert len(daemon.call("GET", path).json["task"]["prompt"]) == 500_000


def test_a_key_gives_one_task(daemon: NodeProcess, engine: Upstream) -> None:
    engine.play(FINISH)
    first = daemon.submit("Once", model="agent", idempotency_key="k1")
    assert daemon.submit("Once", model="agent", idempotency_key="k1") == first
    other = daemon.call("POST", "/api/tasks", {"prompt": "Other", "agent": "scribe", "idempotency_key": "k1"})
    assert (other.status, other.json["error"]["code"]) == (409, "idempotency-mismatch")


def test_a_full_queue_says_so(tmp_path: Path, engine: Upstream) -> None:
    with node(prepare(tmp_path / "node", engine, more="max_open_tasks = 2\ntask_slots = 1")) as daemon:
        for _ in range(2):
            daemon.submit("Wait", model="silent")
        answer = daemon.call("POST", "/api/tasks", {"prompt": "x", "agent": "scribe"})
        assert (answer.status, answer.json["error"]["code"]) == (429, "queue-full")
        assert int(answer.headers["Retry-After"]) >= 1


def test_urgent_tasks_go_first(tmp_path: Path, engine: Upstream) -> None:
    with node(prepare(tmp_path / "node", engine, more="task_slots = 1")) as daemon:
        daemon.wait_for_models()
        engine.play(FINISH)
        first = daemon.submit("first", model="silent")
        daemon.wait_task(first, "running")
        late = [daemon.submit(f"p{priority}", model="agent", priority=priority) for priority in (9, 5, 0)]
        assert daemon.call("POST", f"/api/tasks/{first}/cancel", {}).status == 200
        for task_id in late:
            daemon.wait_task(task_id, "succeeded")
        started = {
            task_id: next(e["at_ms"] for e in daemon.events(task_id) if e["data"].get("to") == "running")
            for task_id in late
        }
        assert sorted(late, key=lambda task_id: started[task_id]) == list(reversed(late))


# --- kill -9 ------------------------------------------------------------------------------------


class Halting(list[dict[str, object]]):
    """A script of which only the first call is made until it is let go on."""

    def __init__(self, calls: list[dict]) -> None:  # type: ignore[type-arg]
        super().__init__(calls)
        self.may_go = threading.Event()

    def __getitem__(self, index: Any) -> Any:
        if index:
            self.may_go.wait(60)
        return super().__getitem__(index)


def test_a_task_survives_kill_9_in_the_middle_and_ends_once(tmp_path: Path, engine: Upstream) -> None:
    state = prepare(tmp_path / "node", engine)
    with node(state) as daemon:
        daemon.wait_for_models()
        workspace = put(daemon, {"notes.txt": b"hello\n"})
        engine.play(READ, WRITE, FINISH)
        engine.script = Halting(engine.script)
        task_id = daemon.submit("Summarise", model="agent", workspace=workspace)
        once = daemon.submit("Summarise", model="silent", workspace=workspace, repeatable=False)
        while "model" not in kinds(daemon, task_id) or "proof" not in kinds(daemon, once):
            time.sleep(0.02)
        cages = cages_of(daemon.pid)
        daemon.kill()
        assert cages
        engine.script.may_go.set()
        assert gone_within(cages, 60)
    engine.play(READ, WRITE, FINISH)
    with node(state) as daemon:
        daemon.wait_for_models()
        task = daemon.wait_task(task_id, *STATES)
        assert (task["state"], task["attempt"]) == ("succeeded", 2), daemon.events(task_id)
        finals = [e for e in daemon.events(task_id) if e["kind"] == "state" and e["data"]["to"] in STATES]
        assert len(finals) == 1
        daemon.wait_task(once, "parked")
        assert daemon.call("POST", "/api/receipts/verify", {}).json["ok"]


def test_random_kills_lose_nothing(tmp_path: Path, engine: Upstream) -> None:
    state = prepare(tmp_path / "node", engine)
    engine.play(FINISH, pause_s=0.05)
    acknowledged: list[str] = []
    for round_number in range(6):
        daemon = NodeProcess(state)
        daemon.start()
        acknowledged += [daemon.submit(f"r{round_number}-{i}", model="agent") for i in range(3)]
        time.sleep(0.07 * round_number)
        daemon.kill()
    with node(state) as daemon:
        for task_id in acknowledged:
            task = daemon.wait_task(task_id, *STATES, within_s=60)
            finals = [e for e in daemon.events(task_id) if e["kind"] == "state" and e["data"]["to"] in STATES]
            assert len(finals) == 1, daemon.events(task_id)
            assert task["state"] in {"succeeded", "failed"}
        assert daemon.call("POST", "/api/receipts/verify", {}).json["ok"]


def test_two_daemons_on_one_state_directory_are_refused(daemon: NodeProcess) -> None:
    second = NodeProcess(daemon.state)
    second.log_path = daemon.state / "second-log"
    second.start(wait=False)
    assert second.wait_exit() == 1
    assert "state-locked" in second.log()
    assert "Traceback" not in second.log()
    assert daemon.is_answering()


# --- where bytes go -----------------------------------------------------------------------------


def test_no_text_of_a_task_is_in_receipts_or_logs(daemon: NodeProcess, engine: Upstream) -> None:
    marker = "MARKER-91c2-heron"
    workspace = put(daemon, {"notes.txt": f"{marker}\n".encode()})
    content = {"path": "out.txt", "content": marker}
    engine.play(READ, ("fs_write", content), ("finish", {"summary": marker}))
    task_id = daemon.submit(marker, model="agent", workspace=workspace)
    daemon.wait_task(task_id, "succeeded")
    receipts = daemon.call("GET", "/api/receipts?last=1000").body
    assert task_id.encode() in receipts
    assert marker.encode() not in receipts
    assert marker not in daemon.log()


def cages_of(pid: int) -> list[int]:
    """Return the processes below a daemon."""
    out = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    children = [int(line) for line in out.split()]
    return children + [grandchild for child in children for grandchild in cages_of(child)]


def gone_within(pids: list[int], seconds: float) -> bool:
    give_up_s = time.monotonic() + seconds
    while any(is_alive(pid) for pid in pids):
        if time.monotonic() > give_up_s:
            return False
        time.sleep(0.02)
    return True
