"""Engines as confined children, with a stand-in for the engine that says what it sees."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mycoswarmd.errors import CageError
from mycoswarmd.sandbox import process as process_module
from mycoswarmd.sandbox.process import ENGINE_UID, Process, start_engine
from tests.integration.cages import HERE, processes_in

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not Path("/usr/bin/bwrap").exists() and "CI" not in os.environ, reason="bubblewrap is not installed"
    ),
]
ENGINE = """
import json, os, socket, sys, time
run, models, secret = sys.argv[1:]
def attempt(function, *arguments):
    try:
        return function(*arguments) and "done"
    except OSError as exc:
        return exc.errno
def dial(family, address):
    with socket.socket(family) as sock:
        sock.settimeout(2)
        sock.connect(address)
        return True
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
said = {
    "model": open(models + "/a.gguf").read(), "uid": os.getuid(), "groups": os.getgroups(),
    "write-model": attempt(open, models + "/new", "w"), "write-usr": attempt(open, "/usr/x", "w"),
    "secret": attempt(open, secret), "home": attempt(os.listdir, "/root"),
    "etc": attempt(open, "/etc/passwd"),
    "network": attempt(dial, socket.AF_INET, ("127.0.0.1", int(os.environ["PORT"]))),
    "environment": sorted(os.environ), "fds": os.listdir("/proc/self/fd"), "pids": os.getpid(),
    "capabilities": int(status["CapEff"], 16) | int(status["CapBnd"], 16),
    "no-new-privileges": int(status["NoNewPrivs"]), "namespace": os.readlink("/proc/self/ns/pid"),
}
if os.fork() == 0:
    time.sleep(600)
server = socket.socket(socket.AF_UNIX)
server.bind(run + "/unready")
server.listen()
os.rename(run + "/unready", run + "/engine.sock")
while True:
    connection, _ = server.accept()
    connection.sendall(json.dumps(said).encode())
    connection.close()
"""


@asynccontextmanager
async def engine(state: Path, **options: bool) -> AsyncIterator[tuple[Process, dict[str, Any]]]:
    """Start the stand-in below a private state directory and return what it says on its socket."""
    state.chmod(0o700)
    models, run, secret = state / "models", state / "run", state / "secret"
    for directory in (models, run):
        directory.mkdir(mode=0o700)
    (models / "a.gguf").write_text("weights")
    (models / "a.gguf").chmod(0o600)
    secret.write_text("key")
    with socket.create_server(("127.0.0.1", 0)) as server:
        child = start_engine(
            ["/usr/bin/python3", "-I", "-S", "-c", ENGINE, str(run), str(models), str(secret)],
            read_paths=[models],
            write_paths=[run],
            env={"PORT": str(server.getsockname()[1])},
            log_path=state / "engine.log",
            **options,
        )
        try:
            yield child, await ask(run / "engine.sock", child, state / "engine.log")
        finally:
            await child.kill()


async def ask(path: Path, child: Process, log: Path) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while not path.exists():
            assert Path(f"/proc/{child.pid}").exists(), log.read_text()
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_unix_connection(str(path))
        said = json.loads(await reader.read())
        writer.close()
        await writer.wait_closed()
    assert isinstance(said, dict)
    return said


async def test_an_engine_sees_its_files_and_nothing_else(tmp_path: Path) -> None:
    async with engine(tmp_path) as (child, said):
        assert child.confined
        assert child.reason == ""
        assert said["model"] == "weights"
        assert said["uid"] == (ENGINE_UID if os.geteuid() == 0 else os.geteuid())
        assert said["write-model"] == said["write-usr"] == 30  # EROFS
        assert said["secret"] == said["etc"] == said["home"] == 2  # ENOENT
        assert said["network"] in {101, 111}  # no route, or a loopback of its own on which nobody listens
        assert set(said["environment"]) <= {"LANG", "LC_CTYPE", "PATH", "PORT", "PWD"}
        assert len(said["fds"]) == 4
        assert said["capabilities"] == 0
        assert said["no-new-privileges"] == 1
        if os.geteuid() == 0:
            assert said["groups"] == []


async def test_killing_an_engine_leaves_nothing(tmp_path: Path) -> None:
    async with engine(tmp_path) as (child, said):
        namespace = str(said["namespace"])
        assert len(processes_in(namespace)) == 3
        await child.kill()
        assert processes_in(namespace) == set()
        assert await child.wait() != 0


async def test_an_engine_that_ends_says_how(tmp_path: Path) -> None:
    for code, expected in (("raise SystemExit(4)", 4), ("import os; os.kill(os.getpid(), 11)", 128 + 11)):
        child = start_engine(
            ["/usr/bin/python3", "-I", "-S", "-c", f"print('words', flush=True); {code}"],
            read_paths=[],
            write_paths=[],
            env={},
            log_path=tmp_path / "log",
        )
        async with asyncio.timeout(60):
            assert await child.wait() == expected
    assert (tmp_path / "log").read_text() == "words\nwords\n"


async def test_an_engine_that_talks_a_lot_does_not_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "LOG_CHECK_S", 0.01)
    # Each time it waits to be noticed.
    code = """
import os, time
for n in range(8):
    print("x" * (1 << 20), flush=True)
    while os.fstat(1).st_size > 1 << 20:
        time.sleep(0.01)
print("end")
"""
    log = tmp_path / "log"
    log.write_bytes(b"old" * (1 << 20))
    for _ in range(2):  # also what an earlier one left
        child = start_engine(
            ["/usr/bin/python3", "-I", "-S", "-c", code], read_paths=[], write_paths=[], env={}, log_path=log
        )
        assert log.stat().st_size < 3 << 20
        async with asyncio.timeout(60):
            assert await child.wait() == 0
        assert log.stat().st_blocks * 512 <= 4 << 20  # of 8
        assert log.read_bytes().endswith(b"end\n")


async def test_the_node_can_be_killed_and_takes_its_engine_along(tmp_path: Path) -> None:
    code = """
import asyncio, sys
from pathlib import Path
from mycoswarmd.sandbox.process import start_engine
engine = "import os, time; print(os.readlink('/proc/self/ns/pid'), flush=True); time.sleep(600)"
async def main():
    start_engine(["/usr/bin/python3", "-I", "-S", "-c", engine], read_paths=[], write_paths=[], env={},
                 log_path=Path(sys.argv[1]))
    print("started", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    log = tmp_path / "log"
    argv = [sys.executable, "-c", code, str(log)]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, cwd=HERE.parent.parent, env={"PYTHONPATH": "."}
    ) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        until = time.monotonic() + 60
        while not log.read_text().endswith("\n") and time.monotonic() < until:
            time.sleep(0.01)
        namespace = log.read_text().strip()
        assert processes_in(namespace)
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    until = time.monotonic() + 60
    while processes_in(namespace) and time.monotonic() < until:
        time.sleep(0.01)
    assert processes_in(namespace) == set()


def test_a_plain_engine_dies_with_the_node_too(tmp_path: Path) -> None:
    code = """
import asyncio, sys
from pathlib import Path
from mycoswarmd.sandbox import process
process.BWRAP = "/does/not/exist"
async def main():
    child = process.start_engine(["/usr/bin/sleep", "600"], read_paths=[], write_paths=[], env={},
                                 log_path=Path(sys.argv[1]))
    print(child.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    argv = [sys.executable, "-c", code, str(tmp_path / "log")]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, cwd=HERE.parent.parent, env={"PYTHONPATH": "."}
    ) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        # Only when it has become the engine has it been asked to die.
        until = time.monotonic() + 60
        while Path(f"/proc/{pid}/comm").read_text() != "sleep\n" and time.monotonic() < until:
            time.sleep(0.01)
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    until = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()


async def test_without_bubblewrap_an_engine_runs_plainly_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "BWRAP", str(tmp_path / "bwrap"))
    async with engine(tmp_path) as (child, said):
        assert not child.confined
        assert child.reason == "bubblewrap is not installed"
        assert said["model"] == "weights"
        assert said["network"] == "done"


async def test_a_bubblewrap_that_cannot_work_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'No permissions to create a new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(process_module, "BWRAP", str(broken))
    async with engine(tmp_path) as (child, _):
        assert child.reason == "bubblewrap cannot work here: No permissions to create a new namespace"


def test_a_program_that_is_missing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "BWRAP", str(tmp_path / "bwrap"))
    with pytest.raises(CageError, match="cannot start '/does/not/exist'"):
        start_engine(["/does/not/exist"], read_paths=[], write_paths=[], env={}, log_path=tmp_path / "log")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root hands files to another uid")
async def test_what_lies_above_the_engines_files_stays_closed(tmp_path: Path) -> None:
    async with engine(tmp_path):
        assert tmp_path.stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "secret").stat().st_gid != ENGINE_UID
        model = (tmp_path / "models" / "a.gguf").stat()
        assert (model.st_uid, model.st_gid, model.st_mode & 0o777) == (0, ENGINE_UID, 0o640)
