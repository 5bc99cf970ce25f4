"""The command starts at once, loads nothing that it does not need, and ends quietly."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from mycoswarmd.ctl import plain
from mycoswarmd.ctl.main import make_ctl
from tests.unit.ctl.fakenode import Asked, FakeNode, Reply, answer, ctl

HEAVY = {
    "aiohttp",
    "zeroconf",
    "cryptography",
    "psutil",
    "sqlite3",
    "asyncio",
    "http.client",
    "ssl",
    "tomllib",
    "tarfile",
    "mycoswarmd.core.roster",
    "pydantic",
}


def start(*arguments: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, "-m", "mycoswarmd.ctl.main", *arguments]
    env = {**os.environ, "COLUMNS": "100"}
    env.pop("TYPER_USE_RICH", None)
    return subprocess.run(command, capture_output=True, text=True, env=env)


def loaded(ran: subprocess.CompletedProcess[str]) -> set[str]:
    rows = [row for row in ran.stderr.splitlines() if row.startswith("import time")]
    return {row.rpartition("|")[2].strip() for row in rows}


def heavy(names: set[str], of: set[str]) -> set[str]:
    # Old typer asks for rich, and is refused; rich itself would bring modules of its own.
    return {name for name in names if name.split(".")[0] in of or name in of or name.startswith("rich.")}


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("run", "--help"),
        ("policy", "--help"),
        ("ask", "--help"),
        ("init", "--help"),
        ("enroll", "--help"),
        ("nodes", "--help"),
        ("restore", "--help"),
    ],
)
def test_help_loads_nothing_heavy(arguments: tuple[str, ...]) -> None:
    ran = start(*arguments, flags=("-X", "importtime"))
    assert ran.returncode == 0
    names = loaded(ran)
    assert "mycoswarmd.ctl.main" in names or "mycoswarmd.ctl.session" in names
    assert heavy(names, HEAVY) == set()
    assert {name for name in names if re.match(r"mycoswarmd\.(?!ctl|core|wire|errors|_)", name)} <= {
        "mycoswarmd.errors"
    }


def test_a_command_loads_no_server_and_no_rich(node: FakeNode) -> None:
    node.on("GET", "/api/models", answer({"models": [{"name": "small"}]}))
    ran = start("--socket", str(node.path), "models", flags=("-X", "importtime"))
    assert ran.returncode == 0, ran.stderr
    assert heavy(loaded(ran), {"aiohttp", "zeroconf", "cryptography", "pydantic"}) == set()


def test_a_command_about_the_swarm_here_loads_no_keys(node: FakeNode) -> None:
    node.on("GET", "/api/swarm", answer({"swarm": {"name": "home"}, "nodes": []}))
    ran = start("--socket", str(node.path), "nodes", flags=("-X", "importtime"))
    assert ran.returncode == 0, ran.stderr
    assert heavy(loaded(ran), {"cryptography", "mycoswarmd.core.roster", "mycoswarmd.trust"}) == set()


def test_help_is_plain_text_with_examples_and_exit_codes() -> None:
    ran = start("--help")
    assert "\x1b" not in ran.stdout and "─" not in ran.stdout
    assert "Examples:" in ran.stdout and "4 cannot reach" in ran.stdout
    assert ran.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [("nonsense",), ("ask",), ("ask", "--nonsense", "x"), ("run", "--priority", "11", "x"), ("--nonsense",)],
)
def test_a_wrong_command_line_exits_2_and_is_no_traceback(arguments: tuple[str, ...]) -> None:
    ran = start(*arguments)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "Traceback" not in ran.stderr and "Usage:" in ran.stderr


def test_a_word_that_is_nearly_a_command_is_answered_with_it() -> None:
    ran = start("stauts")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "hint: did you mean 'status'?" in ran.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("init",),
        ("ask", "--nonsense", "x"),
        ("run", "--priority", "11", "x"),
        ("run", "--priority", "high", "x"),
        ("policy", "nonsense"),
        ("nodes", "ping", "a", "b"),
        ("nonsense",),
        ("enroll", "--operator=perhaps"),
        ("--node", "", "status"),
    ],
)
def test_a_wrong_command_line_is_said_in_json_where_json_is_wanted(arguments: tuple[str, ...]) -> None:
    ran = start(*arguments, "--json")
    assert (ran.returncode, ran.stderr) == (2, "")
    error = json.loads(ran.stdout)["error"]
    assert error["exit_code"] == 2 and error["message"].startswith("cannot ")
    assert start(*arguments).stdout == ""


def test_json_does_not_change_how_commands_end(node: FakeNode) -> None:
    node.on("GET", "/api/status", answer({}))
    node.on("GET", "/api/doctor", answer({"checks": [{"name": "x", "severity": "fail"}]}))
    assert ctl(node, "doctor", "--json").code == 1
    assert ctl(node, "models", "--json").code == 1
    node.on("GET", "/api/models", answer({"models": []}))
    assert ctl(node, "models", "--json").code == 0
    ran = start("status", "--help", "--json")
    assert ran.returncode == 0 and "Usage:" in ran.stdout


def test_a_command_loads_no_other(node: FakeNode) -> None:
    node.on("GET", "/api/models", answer({"models": []}))
    ran = start("--socket", str(node.path), "models", flags=("-X", "importtime"))
    assert ran.returncode == 0, ran.stderr
    assert loaded(ran).isdisjoint({"mycoswarmd.ctl.tasks", "mycoswarmd.ctl.ask", "mycoswarmd.core.tasks"})


def test_every_command_is_there_by_itself_as_in_the_whole() -> None:
    whole = start("--help").stdout
    names = re.findall(r"^  ([a-z]+) {2,}\S", whole.partition("Commands:")[2], re.MULTILINE)
    assert {"ask", "init", "nodes", "engine", "restore"} <= set(names)
    group: Any = get_command(make_ctl(["mycoswarmctl"]))
    assert set(names) == set(group.commands)
    for name in names:
        alone: Any = get_command(make_ctl(["mycoswarmctl", name], only_named=True))
        assert set(alone.commands) == {name}
        if name != "engine":
            assert [one.opts for one in alone.commands[name].params] == [
                one.opts for one in group.commands[name].params
            ]


def test_arguments_are_converted_as_typer_does(
    node: FakeNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of argument, by the light way and by typer's own, where that is another."""
    node.on("GET", "/api/policy", answer({"agents": {"coder": {}}}))
    node.on("POST", "/api/tasks", answer({"task": {"id": "t-1"}}))
    secret = tmp_path / "secret"
    secret.write_text("x")
    lines: list[tuple[str, ...]] = [
        ("submit", "--priority", "07", "hi"),
        ("submit", "--priority", "-1", "hi"),
        ("submit", "--priority", "1.5", "hi"),
        ("submit", "--priority", "", "hi"),
        ("submit", "--model", "", "hi"),
        ("submit", "hi"),
        ("recover", "--without", "a", "--without", "b", "--yes"),
        ("recover", "--yes"),
        ("enroll", "--token-file", str(secret)),
        ("enroll", "--token-file", str(tmp_path / "none")),
        ("enroll", "--token-file", str(tmp_path)),
        ("enroll", "--token-file", "-"),
        ("tasks", "--limit", "1001"),
        ("nodes", "ping", "--json"),
    ]
    seen = []
    for light in (True, False):
        if not light:
            monkeypatch.setattr("mycoswarmd.ctl.plain._converted", lambda *_: plain._OTHER)
        node.asked.clear()
        ends = [ctl(node, *one) for one in lines]
        bodies = [{**asked.json, "idempotency_key": ""} for asked in node.asked if asked.body]
        seen.append(([(one.code, one.out, one.err) for one in ends], bodies))
    assert seen[0] == seen[1]
    assert len(seen[0][1]) == 3


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_reader_that_goes_away_ends_it_quietly(node: FakeNode, size: int) -> None:
    node.on("GET", "/api/policy", answer({"text": "x" * size + "\n"}))
    command = [sys.executable, "-m", "mycoswarmd.ctl.main", "--socket", str(node.path), "policy", "show"]
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert ran.returncode == 141
    assert b"Traceback" not in ran.stderr and b"Exception" not in ran.stderr


def test_ctrl_c_is_quiet_and_exits_130(node: FakeNode) -> None:
    ended = threading.Event()

    def hang(asked: Asked) -> Reply:
        ended.wait(60)
        return Reply()

    node.on("POST", "/v1/chat/completions", hang)
    command = [
        sys.executable,
        "-m",
        "mycoswarmd.ctl.main",
        "--socket",
        str(node.path),
        "ask",
        "-m",
        "x",
        "hi",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        with node.changed:
            assert node.changed.wait_for(lambda: bool(node.asked), 60)
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=60)
    ended.set()
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in said


def test_the_answer_of_a_model_survives_a_terminal_without_unicode(node: FakeNode) -> None:
    chunk = {"choices": [{"message": {"content": "Grüße 世界"}, "finish_reason": "stop"}]}
    node.on("POST", "/v1/chat/completions", answer(chunk))
    command = [
        sys.executable,
        "-m",
        "mycoswarmd.ctl.main",
        "--socket",
        str(node.path),
        "ask",
        "-m",
        "x",
        "hi",
    ]
    env = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }
    ran = subprocess.run(command, capture_output=True, env=env)
    assert (ran.returncode, ran.stdout) == (0, rb"Gr\xfc\xdfe \u4e16\u754c" + b"\n")


def test_the_installed_command_is_this_one() -> None:
    script = Path(sys.executable).with_name("mycoswarmctl")
    if not script.exists():
        pytest.skip("the package is not installed in this environment")
    assert subprocess.run([script, "--help"], capture_output=True).returncode == 0


def test_an_option_of_the_node_is_refused_after_the_command(node: FakeNode) -> None:
    assert ctl(node, "models", "--socket", "x").code == 2
