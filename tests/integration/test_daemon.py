"""Starting, stopping and dying: what a person is told, and what is still there afterwards."""

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mycoswarmd.wire.workspace import Entry, EntryKind, write_workspace
from tests.nodes import WAIT_S, NodeProcess, node, until, write_private
from tests.upstream import Upstream, upstream

POLICY = """
schema = 1
name = "test"
[agents.scribe]
model = "*"
[[rule]]
id = "all"
why = "the owner does everything here"
effect = "allow"
action = ["infer", "task", "admin"]
zone = ["self"]
"""
FINISH = ("finish", {"summary": "done"})
FINAL = ("succeeded", "failed", "cancelled", "expired", "parked")


@pytest.fixture(scope="module")
def engine() -> Iterator[Upstream]:
    with upstream() as running:
        yield running


@pytest.fixture
def state(tmp_path: Path, engine: Upstream) -> Path:
    directory = tmp_path / "node"
    write_private(directory / "policy.toml", POLICY)
    text = f'managed_engine = false\n[engines.up]\nkind = "openai"\nurl = "{engine.url}"\n'
    write_private(directory / "mycoswarm.toml", text)
    return directory


def refuses_to_start(state: Path, *arguments: str) -> str:
    """Start a daemon that must not start, and return what it said."""
    daemon = NodeProcess(state, arguments=arguments or ("--no-listen",))
    daemon.start(wait=False)
    assert daemon.wait_exit() == 1
    said = daemon.log()
    assert "Traceback" not in said
    assert "mycoswarmd: cannot" in said
    return said


def test_a_node_is_ready_soon_and_stops_cleanly(state: Path) -> None:
    daemon = NodeProcess(state)
    daemon.start()
    assert daemon.call("GET", "/api/status").json["state"] in {"green", "yellow"}
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log()


def test_everything_that_the_node_keeps_is_private(state: Path) -> None:
    with node(state) as daemon:
        daemon.submit("x", model="ok")
        for path in (state / "mycoswarm.db", state / "policy", state / "blobs"):
            if path.exists():
                assert path.stat().st_mode & 0o077 == 0, path


def test_a_damaged_database_is_said_and_left_alone(state: Path) -> None:
    with node(state):
        pass
    database = state / "mycoswarm.db"
    data = bytearray(database.read_bytes())
    data[100:4000] = os.urandom(3900)
    database.write_bytes(data)
    assert "store-corrupt" in refuses_to_start(state)
    assert database.read_bytes() == bytes(data)


def test_bad_settings_are_said(state: Path) -> None:
    write_private(state / "mycoswarm.toml", "task_slots = 0")
    said = refuses_to_start(state)
    assert "task_slots" in said
    assert "config-invalid" in said


def test_a_taken_port_is_said(state: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        assert "port-taken" in refuses_to_start(state, "--listen", f"127.0.0.1:{port}")


def test_a_listener_on_the_network_is_refused(state: Path) -> None:
    assert "loopback" in refuses_to_start(state, "--listen", "0.0.0.0:7436")


def test_a_path_that_is_too_long_for_a_socket_is_said(tmp_path: Path, state: Path) -> None:
    long = tmp_path / ("x" * 100)
    shutil.copytree(state, long)
    assert "socket-path-too-long" in refuses_to_start(long)


def test_a_broken_policy_denies_everything_but_status(state: Path) -> None:
    write_private(state / "policy.toml", POLICY.replace("effect", "efect"))
    with node(state) as daemon:
        status = daemon.call("GET", "/api/status").json
        assert status["state"] == "red"
        assert "policy.toml" in status["policy"]["problem"]
        body = {"model": "ok", "messages": [{"role": "user", "content": "hi"}]}
        answer = daemon.call("POST", "/v1/chat/completions", body)
        assert (answer.status, answer.json["error"]["rule"]) == (403, "no-policy")
        assert daemon.call("GET", "/api/receipts?last=1").status == 403
        assert daemon.call("POST", "/api/tasks", {"prompt": "x", "agent": "scribe"}).status == 403


def test_a_node_that_stopped_leaves_no_socket(state: Path) -> None:
    with node(state) as it:
        assert it.socket.exists()
    assert not it.socket.exists()


def test_the_owner_mends_a_policy_that_was_broken_from_the_start(state: Path) -> None:
    good = (state / "policy.toml").read_text()
    write_private(state / "policy.toml", "schema = 1\nname = ")
    with node(state) as it:
        assert it.call("POST", "/api/policy/reload").status == 403  # still broken: said, and nothing changes
        assert it.call("GET", "/api/keys").status == 403
        write_private(state / "policy.toml", good)
        assert it.call("POST", "/api/policy/reload").status == 200
        assert it.call("GET", "/api/keys").status == 200


def test_an_owner_who_is_locked_out_is_told_so_and_how_to_get_in(state: Path) -> None:
    good = (state / "policy.toml").read_text()
    with node(state) as it:
        until(lambda: not it.call("GET", "/api/status").json["problems"])
        write_private(state / "policy.toml", good.replace('["infer", "task", "admin"]', '["infer"]'))
        said = it.call("POST", "/api/policy/reload").json
        assert [one for one in said["warnings"] if "nobody may administer this node" in one]
        way = (
            f'edit {state / "policy.toml"}: allow action "admin" to origin "owner"; then: kill -HUP {it.pid}'
        )
        status = it.call("GET", "/api/status").json
        assert status["problems"] == [f"nobody may administer this node: {way}"]
        answer = it.call("POST", "/api/policy/reload")
        assert (answer.status, answer.json["error"]["hint"]) == (403, way)
        # The way out is one.
        write_private(state / "policy.toml", good)
        os.kill(it.pid, signal.SIGHUP)
        until(lambda: not it.call("GET", "/api/status").json["problems"])
        assert it.call("GET", "/api/keys").status == 200


def test_a_failed_reload_keeps_the_policy_and_turns_status_yellow(state: Path) -> None:
    body = {"model": "ok", "messages": [{"role": "user", "content": "hi"}]}
    with node(state) as daemon:
        daemon.wait_for_models()
        for text in (POLICY.replace("effect", "efect"), "x" * 1_000_000, "\0"):
            write_private(state / "policy.toml", text)
            answer = daemon.call("POST", "/api/policy/reload", {})
            assert (answer.status, answer.json["error"]["code"]) == (403, "policy-invalid")
            assert answer.json["error"]["problems"][0]["line"] >= 1
        (state / "policy.toml").unlink()
        assert daemon.call("POST", "/api/policy/reload", {}).status == 403
        assert daemon.call("GET", "/api/status").json["state"] == "yellow"
        assert daemon.call("POST", "/v1/chat/completions", body).status == 200
        write_private(state / "policy.toml", POLICY.replace('"infer", ', ""))
        changed = daemon.call("POST", "/api/policy/reload", {}).json["changed"]
        assert any("infer" in line for line in changed)
        assert daemon.call("POST", "/v1/chat/completions", body).status == 403
        kinds = [row["kind"] for row in daemon.call("GET", "/api/receipts?last=20").json["receipts"]]
        assert "policy" in kinds


def test_the_check_refuses_what_a_reload_refuses(state: Path) -> None:
    """It is what fails `systemctl reload`: whatever the node keeps its old policy for has to fail it."""
    policy = state / "policy.toml"
    command = [sys.executable, "-m", "mycoswarmd.daemon.main", "check", "--quiet", "--policy-only"]
    command += ["--state", str(state)]

    def check() -> tuple[int, str]:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
        assert done.stdout == ""
        return done.returncode, done.stderr

    with node(state) as daemon:
        assert check() == (0, "")
        for spoil, said in (
            (lambda: write_private(policy, POLICY.replace("effect", "efect")), "rule 1.effect"),
            (lambda: write_private(policy, POLICY).chmod(0o666), "others than its owner may write it"),
            (policy.unlink, "no such file"),  # there was one: the shipped default does not take its place
        ):
            spoil()
            assert daemon.call("POST", "/api/policy/reload", {}).status == 403
            code, words = check()
            assert (code, f"cannot use the policy: {policy}:" in words, said in words) == (1, True, True), (
                words
            )


def test_a_signal_reloads_the_policy(state: Path) -> None:
    with node(state) as daemon:
        before = daemon.call("GET", "/api/status").json["policy"]["sha256"]
        write_private(state / "policy.toml", POLICY + "\n# changed\n")
        os.kill(daemon.pid, 1)
        until(lambda: daemon.call("GET", "/api/status").json["policy"]["sha256"] != before)


@pytest.mark.timeout(300)
@pytest.mark.skipif(os.geteuid() != 0 and "CI" not in os.environ, reason="mounting a small disk needs root")
def test_a_full_disk_is_a_clear_error_and_loses_nothing(tmp_path: Path, engine: Upstream) -> None:
    state = tmp_path / "node"
    state.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=0700", "none", state], check=True)
    try:
        write_private(state / "policy.toml", POLICY)
        text = f'managed_engine = false\n[engines.up]\nkind = "openai"\nurl = "{engine.url}"\n'
        write_private(state / "mycoswarm.toml", text)
        daemon = NodeProcess(state)
        daemon.log_path = tmp_path / "log"
        daemon.start()
        try:
            daemon.wait_for_models()
            engine.play(FINISH)
            first = daemon.submit("before", model="agent")
            daemon.wait_task(first, "succeeded")
            filler = state / "filler"
            fd = os.open(filler, os.O_WRONLY | os.O_CREAT)
            with contextlib.suppress(OSError):
                while os.write(fd, bytes(4096)):
                    pass
            os.close(fd)
            refused = False
            for _ in range(200):
                answer = daemon.call("POST", "/api/tasks", {"prompt": "x" * 5000, "agent": "scribe"})
                if answer.status == 503:
                    refused = True
                    assert answer.json["error"]["code"] in {"disk-full", "receipts-unwritable"}
                    break
            assert refused
            filler.unlink()
            engine.play(FINISH)
            after = {"prompt": "after", "agent": "scribe", "model": "agent", "idempotency_key": "after"}
            until(lambda: daemon.call("POST", "/api/tasks", after).status == 202)
            daemon.wait_task(daemon.submit(**after), "succeeded", within_s=120)
            assert daemon.task(first)["state"] == "succeeded"
            assert daemon.call("POST", "/api/receipts/verify", {}).json["ok"]
            assert "Traceback" not in daemon.log()
        finally:
            daemon.stop()
    finally:
        subprocess.run(["umount", state], check=True)


@pytest.mark.timeout(900)
def test_kill_9_at_each_sync_loses_nothing_acknowledged(state: Path, engine: Upstream) -> None:
    engine.play(FINISH)
    acknowledged: list[str] = []
    killed = 0
    for number in range(1, 17):
        daemon = NodeProcess(state)
        inject = f"inject=fsync,fdatasync:signal=SIGKILL:when={number}"
        daemon.start(
            prefix=(
                "strace",
                "-D",
                "-f",
                "-qq",
                "-o",
                "/dev/null",
                "-e",
                "trace=fsync,fdatasync",
                "-e",
                inject,
            ),
            wait=False,
        )
        acknowledged += submit_until_dead(daemon, f"n{number}")
        try:
            daemon.wait_exit(5)
            killed += 1
        except subprocess.TimeoutExpired:
            daemon.stop()
    assert killed >= 10
    with node(state) as daemon:
        daemon.wait_for_models()
        for task_id in acknowledged:
            daemon.wait_task(task_id, *FINAL, within_s=60)
            finals = [e for e in daemon.events(task_id) if e["kind"] == "state" and e["data"]["to"] in FINAL]
            assert len(finals) == 1, daemon.events(task_id)
        assert daemon.call("POST", "/api/receipts/verify", {}).json["ok"]


def submit_until_dead(daemon: NodeProcess, name: str) -> list[str]:
    """Submit a few tasks to a daemon that will be killed; return those that were acknowledged."""
    found = []
    give_up_s = time.monotonic() + WAIT_S
    number = 0
    while time.monotonic() < give_up_s and number < 4:
        try:
            body = {"prompt": "x", "agent": "scribe", "model": "agent", "idempotency_key": f"{name}-{number}"}
            answer = daemon.call("POST", "/api/tasks", body)
        except (OSError, http.client.HTTPException):  # before its answer, or in the middle of that
            if not daemon.is_running():
                break
            time.sleep(0.05)
            continue
        if answer.status in {200, 202}:
            found.append(str(answer.json["task"]["id"]))
        number += 1
    return found


# --- what a hostile or hasty caller does ---------------------------------------------------------


def test_doctor_says_what_helps_that_engine_and_no_other(
    state: Path, tmp_path: Path, engine: Upstream
) -> None:
    with (state / "mycoswarm.toml").open("a") as file:
        file.write('[engines.off]\nkind = "ollama"\nurl = "http://127.0.0.1:9"\n')
    text = (state / "mycoswarm.toml").read_text().replace("managed_engine = false", "managed_engine = true")
    write_private(state / "mycoswarm.toml", f'node_name = "living room"\n{text}')
    with node(state) as daemon:
        daemon.wait_for_models()
        assert daemon.call("GET", "/api/status").json["node"] == "living-room"
        assert "so it is 'living-room'" in daemon.log()
        rows: dict[str, dict[str, str]] = {}

        def is_down() -> bool:
            rows.update({row["name"]: row for row in daemon.call("GET", "/api/doctor").json["checks"]})
            return "systemctl status ollama" in rows["engine: off"]["fix"]

        until(is_down)
        assert "so it is 'living-room'" in rows["settings"]["detail"]
        assert rows["engine: up"]["severity"] == "ok"
        assert rows["engine: embedded"]["severity"] == "note"
        assert rows["engine: embedded"]["fix"].startswith("managed_engine = false")


def test_receipts_that_were_handed_out_survive_a_stop(state: Path) -> None:
    body = {"model": "ok", "messages": [{"role": "user", "content": "hi"}]}
    daemon = NodeProcess(state)
    daemon.start()
    daemon.wait_for_models()
    handed_out = [
        daemon.call("POST", "/v1/chat/completions", body).headers["X-Mycoswarm-Receipt"] for _ in range(5)
    ]
    assert daemon.stop() == 0
    with node(state) as again:
        for receipt in handed_out:
            assert again.call("GET", f"/api/receipts/{receipt}").status == 200
        assert again.call("POST", "/api/receipts/verify", {}).json["ok"]


def raw(daemon: NodeProcess, request: bytes, *, read: bool = True) -> bytes:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(WAIT_S)
        sock.connect(str(daemon.socket))
        sock.sendall(request)
        return sock.recv(4096) if read else b""


def test_a_malformed_body_is_refused_and_not_logged(state: Path) -> None:
    marker = b"MARKER-55aa-otter"
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
    with node(state) as daemon:
        raw(daemon, head + b"Transfer-Encoding: chunked\r\n\r\n5\r\n" + marker + b"\r\nzz\r\n" + marker)
        packed = raw(daemon, head + b"Content-Encoding: gzip\r\nContent-Length: 17\r\n\r\n" + marker)
        assert b" 415 " in packed.split(b"\r\n")[0]
        raw(daemon, b"GARBAGE " + marker + b"\r\n\r\n")
        assert daemon.is_answering()
        assert marker.decode() not in daemon.log()
        assert "Traceback" not in daemon.log()


def test_four_cancels_at_once_are_one(state: Path) -> None:
    with node(state) as daemon:
        daemon.wait_for_models()
        task_id = daemon.submit("Wait", model="silent")
        daemon.wait_task(task_id, "running")
        request = (
            f"POST /api/tasks/{task_id}/cancel HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode()
        )
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: raw(daemon, request), range(4)))
        codes = sorted(answer[9:12] for answer in answers)
        assert set(codes) <= {b"200", b"409"}
        assert b"200" in codes
        assert daemon.task(task_id)["state"] == "cancelled"
        assert "Traceback" not in daemon.log()


def test_an_engine_that_is_down_does_not_drain_the_queue(state: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        text = f'managed_engine = false\n[engines.up]\nkind = "openai"\nurl = "{url}"\n'
        write_private(state / "mycoswarm.toml", text)
        with node(state) as daemon:
            task_id = daemon.submit("Later", model="agent")
            time.sleep(2.5)
            assert daemon.task(task_id)["state"] in {"queued", "running"}


@pytest.mark.parametrize("state_path", ["/proc/nope", "FILE"])
def test_a_state_directory_that_cannot_be_is_said(tmp_path: Path, state_path: str) -> None:
    path = tmp_path / "file"
    path.write_text("")
    target = path if state_path == "FILE" else Path(state_path)
    daemon = NodeProcess(target)
    daemon.log_path = tmp_path / "log"
    daemon.start(wait=False)
    assert daemon.wait_exit() == 1
    assert "Traceback" not in daemon.log()
    assert "mycoswarmd: cannot" in daemon.log()


def test_settings_that_are_a_fifo_do_not_hang_the_start(state: Path) -> None:
    (state / "mycoswarm.toml").unlink()
    os.mkfifo(state / "mycoswarm.toml")
    assert "config-unreadable" in refuses_to_start(state)


STRANGER = """
import http.client, json, socket, sys
answers = []
for method, path, body in CALLS:
    connection = http.client.HTTPConnection("node")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(sys.argv[1])
    connection.request(method, path, body or None)
    response = connection.getresponse()
    answers.append((response.status, response.read().decode()))
print(json.dumps(answers))
"""
ASKING = """
schema = 1
name = "asking"
[tools.fs_edit]
[tools.fs_read]
[agents.scribe]
model = "*"
tools = ["fs_edit", "fs_read"]
paths = { read = ["."], write = ["."] }
[[rule]]
id = "here"
why = "prompts are answered here"
effect = "allow"
action = ["infer"]
zone = ["self"]
[[rule]]
id = "owner"
why = "the owner does everything here"
effect = "allow"
action = ["task", "admin"]
origin = ["owner"]
[[rule]]
id = "read"
why = "reading is fine"
effect = "allow"
action = "tool"
tool = ["fs_read"]
[[rule]]
id = "edits"
why = "a person looks"
effect = "ask"
action = "tool"
tool = ["fs_edit"]
"""


def waiting_task(daemon: NodeProcess, engine: Upstream) -> str:
    daemon.wait_for_models()
    engine.play(
        ("fs_read", {"path": "a.txt"}), ("fs_edit", {"path": "a.txt", "old": "a", "new": "b"}), FINISH
    )
    data = write_workspace((Entry(path="a.txt", kind=EntryKind.FILE, data=b"aha\n"),))
    sha256 = hashlib.sha256(data).hexdigest()
    assert daemon.call("PUT", f"/api/blobs/{sha256}", data).status == 200
    task_id = daemon.submit("Edit", model="agent", workspace=sha256)
    daemon.wait_task(task_id, "waiting")
    return task_id


@pytest.mark.timeout(300)
def test_an_answer_whose_sender_has_gone_still_counts(state: Path, engine: Upstream) -> None:
    write_private(state / "policy.toml", ASKING)
    with node(state) as daemon:
        for delay_s in (0.0, 0.002, 0.005, 0.01):
            task_id = waiting_task(daemon, engine)
            body = b'{"approve": true}'
            head = f"POST /api/approvals/{task_id} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(daemon.socket))
                sock.sendall(head.encode() + body)
                time.sleep(delay_s)
            assert daemon.wait_task(task_id, *FINAL)["state"] == "succeeded", daemon.events(task_id)


@pytest.mark.skipif(os.geteuid() != 0 and "CI" not in os.environ, reason="becoming another user needs root")
def test_another_user_of_the_machine_sees_and_answers_nothing(state: Path, engine: Upstream) -> None:
    write_private(state / "policy.toml", ASKING)
    with node(state) as daemon:
        task_id = waiting_task(daemon, engine)
        for directory in (*list(state.parents)[:-2], state, daemon.socket.parent):
            if directory.stat().st_uid == os.geteuid() and str(directory).startswith("/tmp/"):
                directory.chmod(0o755)
        calls = [
            ("POST", f"/api/approvals/{task_id}", '{"approve": true}'),
            ("GET", f"/api/tasks/{task_id}", ""),
            ("GET", "/api/approvals", ""),
            ("GET", "/api/receipts", ""),
            ("PUT", f"/api/blobs/{'0' * 64}", "x" * 100),
            ("POST", "/api/keys", '{"name": "mine"}'),
        ]
        script = STRANGER.replace("CALLS", repr(calls))
        command = [
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "/usr/bin/python3",
            "-c",
            script,
        ]
        done = subprocess.run([*command, str(daemon.socket)], capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stderr
        answers = json.loads(done.stdout)
        assert [status for status, _ in answers] == [404, 403, 403, 403, 403, 403], answers
        assert not any("a.txt" in text for _, text in answers)
        for _, text in answers[3:]:
            assert "sudo usermod -aG mycoswarm nobody" in json.loads(text)["error"]["hint"], text
        assert daemon.call("POST", f"/api/approvals/{task_id}", {"approve": True}).status == 200
        daemon.wait_task(task_id, "succeeded")


def test_a_node_does_not_ask_itself(state: Path) -> None:
    """An engine's socket that leads back to the node would make the engine the owner."""
    text = f'managed_engine = false\n[engines.up]\nkind = "openai"\nurl = "unix:{state}/run/api.sock"\n'
    write_private(state / "mycoswarm.toml", text)
    with node(state) as daemon:
        until(lambda: daemon.call("GET", "/api/status").json["engines"][0]["state"] == "down")
        engine = daemon.call("GET", "/api/status").json["engines"][0]
        assert (engine["state"], engine["models"]) == ("down", 0)


def test_rules_about_the_machine_and_the_hour_hold_for_tasks_and_administration(state: Path) -> None:
    always = '[[rule]]\nid = "hour"\nwhy = "at every hour"\neffect = "allow"\naction = ["task", "admin"]\n'
    hours = 'hours = ["00:00-12:00", "12:00-24:00"]\n'
    text = POLICY.replace('["infer", "task", "admin"]', '["infer"]') + always + hours
    write_private(state / "policy.toml", text)
    with node(state) as daemon:
        tier = daemon.call("GET", "/api/status").json["host"]["tier"]
        assert daemon.call("GET", "/api/receipts").status == 200
        assert daemon.call("POST", "/api/tasks", {"prompt": "x", "agent": "scribe"}).status == 202
        forbid = '[[rule]]\nid = "not-here"\nwhy = "no tasks on this kind of machine"\neffect = "forbid"\n'
        write_private(state / "policy.toml", f'{text}{forbid}action = ["task"]\ntier = ["{tier}"]\n')
        assert daemon.call("POST", "/api/policy/reload", {}).status == 200
        answer = daemon.call("POST", "/api/tasks", {"prompt": "x", "agent": "scribe"})
        assert (answer.status, answer.json["error"]["rule"]) == (403, "not-here")


def test_leaving_early_does_not_avoid_the_daily_limit(state: Path) -> None:
    text = POLICY + "limit = { tokens_per_day = 5 }\n"
    write_private(state / "policy.toml", text)
    body = json.dumps(
        {"model": "slow", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with node(state) as daemon:
        daemon.wait_for_models()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(daemon.socket))
            sock.sendall(head + body)
            received = b""
            while received.count(b"data: ") < 8:
                received += sock.recv(65536)

        def has_ended() -> bool:
            rows = daemon.call("GET", "/api/receipts?last=3").json["receipts"]
            return any(row["kind"] == "outcome" for row in rows)

        until(has_ended)
        again = {"model": "ok", "messages": [{"role": "user", "content": "hi"}]}
        answer = daemon.call("POST", "/v1/chat/completions", again)
        assert (answer.status, answer.json["error"]["code"]) == (403, "over-limit")
