"""Cages on this machine: they open, prove, carry frames, and leave nothing behind. M6."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mycoswarmd.core.types import CageSpec, Limits, SandboxLevel
from mycoswarmd.errors import CageError
from mycoswarmd.sandbox import session as session_module
from mycoswarmd.sandbox.bwrap import FIRST_UID, BubblewrapCages
from mycoswarmd.sandbox.capability import probe_machine
from mycoswarmd.sandbox.host import Host
from mycoswarmd.sandbox.spec import Identity, Operation
from mycoswarmd.wire.frames import Frame, FrameType
from tests import nodes
from tests.integration.cages import (
    HERE,
    PYTHON,
    agent_zip,
    cage,
    do,
    left_on_machine,
    make_spec,
    processes_in,
)
from tests.integration.engines import until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        not Path("/usr/bin/bwrap").exists() and "CI" not in os.environ, reason="bubblewrap is not installed"
    ),
]
NOWHERE = Path("/nonexistent")
PID_NAMESPACE = "result = os.readlink('/proc/self/ns/pid')"
# An agent that never confines itself, and then: send bytes, hang, or leave.
SCRIPT = """
import os, time
from mycoswarmd.agent.channel import Channel
from mycoswarmd.wire.frames import Frame, FrameType
def main():
    channel = Channel.take()
    frame = channel.receive()
"""


async def test_a_cage_proves_itself_and_carries_frames() -> None:
    async with cage() as session:
        assert len(session.proof.held) > 150
        assert not session.proof.broken
        assert session.proof.level is SandboxLevel.REDUCED
        assert {"memory-cgroup", "cpu-cgroup"} <= set(session.proof.absent)
        assert await do(session, "result = [os.getuid() != 0, os.listdir('/workspace')]") == [True, []]
        big = Frame(FrameType.JOB, {"prompt": "import sys; channel.send"}, bytes(1 << 20))
        await session.send(big)
        assert (await session.receive()).type is FrameType.RESULT


async def test_concurrent_cages_are_different_users_when_started_by_root() -> None:
    cages = BubblewrapCages(agent_zip(), NOWHERE)
    async with cage(cages=cages) as first, cage(cages=cages) as second:
        uids = [await do(session, "result = os.getuid()") for session in (first, second)]
    expected = [FIRST_UID, FIRST_UID + 1] if os.geteuid() == 0 else [os.geteuid()] * 2
    assert uids == expected
    async with cage(cages=cages) as third:
        assert await do(third, "result = os.getuid()") == expected[0]


async def test_the_environment_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_DAEMON", "hunter2")
    async with cage() as session:
        assert "hunter2" not in str(await do(session, "result = dict(os.environ)"))
        found = await do(
            session, "result = [fd for fd in range(256) if os.path.exists(f'/proc/self/fd/{fd}')]"
        )
        assert found == [0, 1, 2, 3]


async def test_allowed_programs_run_and_others_do_not() -> None:
    programs = ("/usr/bin/git", "/usr/bin/python3", "/usr/bin/ls")
    code = """
import subprocess
def run(*argv):
    try:
        done = subprocess.run(argv, capture_output=True, text=True, cwd="/workspace")
        return [done.returncode, done.stdout.strip() or done.stderr.strip()]
    except OSError as exc:
        return [type(exc).__name__, exc.errno]
open("/workspace/a.txt", "w").write("hello")
result = [
    run("git", "init", "-q", "."),
    run("git", "add", "a.txt"),
    run("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "one"),
    run("git", "log", "--format=%s"),
    run("python3", "-c", "import json, sqlite3, ssl; print(json.dumps(1))"),
    run("ls", "/workspace"),
    run("/usr/bin/id"),
    run("/bin/sh", "-c", "true"),
]
"""
    async with cage(make_spec(programs=programs)) as session:
        found = await do(session, code)
    assert (
        found
        == [[0, ""], [0, ""], [0, ""], [0, "one"], [0, "1"], [0, "a.txt"]] + [["PermissionError", 13]] * 2
    )


async def test_without_programs_nothing_runs() -> None:
    async with cage() as session:
        for path in (PYTHON, "/usr/bin/true", "/lib64/ld-linux-x86-64.so.2"):
            found = await do(session, f"os.execv({path!r}, [{path!r}, '--version'])")
            assert isinstance(found, dict)
            assert found["raised"] in {"PermissionError", "FileNotFoundError"}


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("/nonexistent/tool", "no plain file below /usr"),
        (str(HERE / "cage_agent.py"), "no plain file below /usr"),
    ],
)
async def test_programs_that_a_cage_cannot_show_are_refused(program: str, says: str) -> None:
    with pytest.raises(CageError, match=says):
        await BubblewrapCages(agent_zip(), NOWHERE).open(make_spec(programs=(program,)))


async def test_the_work_may_use_only_the_paths_of_the_task() -> None:
    code = """
from mycoswarmd.agent import confine
os.mkdir("/workspace/src"); os.makedirs("/workspace/private/sub")
os.symlink("/workspace/private", "/workspace/link")
open("/workspace/private/key", "w").write("k"); open("/workspace/top", "w").write("t")
confine.narrow(body)
def attempt(function, *arguments):
    try:
        function(*arguments)
        return "done"
    except OSError as exc:
        return exc.errno
result = [
    attempt(open, "/workspace/src/new", "w"), attempt(open, "/workspace/made/new", "w"),
    attempt(open, "/tmp/x", "w"), attempt(open, "/workspace/top"),
    attempt(open, "/workspace/top", "a"), attempt(open, "/workspace/other", "w"),
    attempt(open, "/workspace/private/key"), attempt(os.listdir, "/workspace/private"),
    attempt(open, "/workspace/link/new", "w"), attempt(os.unlink, "/workspace/private/key"),
    attempt(os.rename, "/workspace/src/new", "/workspace/moved"), attempt(os.truncate, "/workspace/top", 0),
    attempt(open, "/workspace/private/sub/new", "w"),  # by way of a link the rule would be about this
]
"""
    spec = make_spec(read_paths=("src", "top", "missing"), write_paths=("src", "made", "link", "link/sub"))
    async with cage(spec) as session:
        found = await do(session, code)
    assert found == ["done", "done", "done", "done", *[13] * 9]


class Weakened(BubblewrapCages):
    """Builds cages without a network namespace of their own."""

    def operations(self, spec: CageSpec, host: Host, who: Identity) -> tuple[Operation, ...]:
        return tuple(step for step in super().operations(spec, host, who) if step.option != "--unshare-net")


async def test_a_cage_that_does_not_hold_is_refused_before_it_is_told_anything() -> None:
    with pytest.raises(CageError, match="namespace=net") as refusal:
        await Weakened(agent_zip(), NOWHERE).open(make_spec())
    assert refusal.value.code == "cage-unproved"
    assert refusal.value.hint


BAD_AGENTS = [
    ("garbage", "    os.write(3, b'\\x00\\x00\\x00\\x05\\x00\\x00\\x00\\x00hello')", "cage-garbage"),
    ("oversized", "    os.write(3, b'\\xff' * 64)", "cage-garbage"),
    ("not-json", "    os.write(3, b'GET / HTTP/1.1\\r\\n' * 8)", "cage-garbage"),
    ("another-frame", "    channel.send(Frame(FrameType.NOTE, {'text': 'hi'}))", "cage-unproved"),
    ("no-lists", "    channel.send(Frame(FrameType.PROOF, {}))", "cage-unproved"),
    ("nothing-held", "    channel.send(Frame(FrameType.PROOF, {'held': [], 'broken': []}))", "cage-unproved"),
    (
        "one-missing",
        "    channel.send(Frame(FrameType.PROOF, {'held': frame.body['probes'][1:], 'broken': []}))",
        "cage-unproved",
    ),
    (
        "one-broken",
        "    channel.send(Frame(FrameType.PROOF, {'held': frame.body['probes'], 'broken': ['x']}))",
        "cage-unproved",
    ),
    ("leaves", "    os._exit(7)", "cage-setup"),
    ("crashes", "    raise RuntimeError('boom')", "cage-setup"),
    ("silent", "    time.sleep(600)", "cage-unproved"),
]


@pytest.mark.parametrize(("name", "body", "code"), BAD_AGENTS, ids=[row[0] for row in BAD_AGENTS])
async def test_an_agent_that_does_not_prove_gets_no_task(
    name: str, body: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "silent":
        monkeypatch.setattr(session_module, "PROOF_S", 0.5)
    before = left_on_machine()
    with pytest.raises(CageError) as refusal:
        await BubblewrapCages(agent_zip(f"{SCRIPT}{body}\n    time.sleep(60)\n"), NOWHERE).open(make_spec())
    assert refusal.value.code == code
    if name == "crashes":
        assert "boom" in refusal.value.message
    assert left_on_machine() == before


async def test_garbage_after_the_proof_ends_the_cage() -> None:
    async with cage() as session:
        await session.send(Frame(FrameType.JOB, {"prompt": "os.write(3, b'\\xff' * 64)"}))
        with pytest.raises(CageError, match="cannot understand the agent") as ended:
            await session.receive()
        assert ended.value.code == "cage-garbage"
        with pytest.raises(CageError) as gone:
            await session.receive()
        assert gone.value.code in {"cage-garbage", "cage-gone"}


async def test_a_frame_that_came_half_survives_a_cancelled_receive() -> None:
    code = """
from mycoswarmd.wire.frames import *
begun, data = (encode_frame(Frame(FrameType.NOTE, {"text": text})) for text in ("begun", "whole"))
os.write(3, begun + data[:11]); channel.receive(); os.write(3, data[11:])
"""
    async with cage() as session:
        await session.send(Frame(FrameType.JOB, {"prompt": code}))
        assert (await session.receive()).body == {"text": "begun"}
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.15):
                await session.receive()
        await session.send(Frame(FrameType.JOB, {"prompt": "go on"}))
        assert (await session.receive()).body == {"text": "whole"}


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("os._exit(9)", "exited with 9"),
        ("import signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("import ctypes; ctypes.CDLL(None).syscall(0x40000000 + 39)", "SIGSYS"),
    ],
)
async def test_how_an_agent_ended_is_said(code: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "LAST_WORDS_S", 60)
    async with cage() as session:
        await session.send(Frame(FrameType.JOB, {"prompt": code}))
        with pytest.raises(CageError, match=says) as ended:
            await session.receive()
        assert ended.value.code == "cage-gone"
        with pytest.raises(CageError, match="cannot reach the agent"):
            await session.send(Frame(FrameType.JOB, {"prompt": "x" * (1 << 20)}))


async def test_wall_time_ends_a_cage_whoever_waits() -> None:
    async with cage(make_spec(limits=Limits(wall_s=5))) as session:
        namespace = await do(session, PID_NAMESPACE)
        await session.send(Frame(FrameType.JOB, {"prompt": "import time; time.sleep(600)"}))
        with pytest.raises(CageError) as ended:
            await session.receive()
        assert ended.value.code == "cage-timeout"
        await session.close()
        assert processes_in(str(namespace)) == set()


async def test_closing_kills_children_that_hide() -> None:
    code = """
import signal, time
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.fork() == 0:
            os.closerange(0, 64)
        time.sleep(600)
result = os.readlink('/proc/self/ns/pid')
"""
    async with cage() as session:
        namespace = str(await do(session, code))
        await until(lambda: len(processes_in(namespace)) == 12, "init, agent, and five pairs")
        await session.close()
        assert processes_in(namespace) == set()
        await session.close()


async def test_children_die_with_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "LAST_WORDS_S", 60)
    code = """
import time
if os.fork() == 0:
    os.setsid()
    os.closerange(0, 64)
    time.sleep(600)
from mycoswarmd.wire.frames import Frame, FrameType
channel.send(Frame(FrameType.NOTE, {"text": os.readlink('/proc/self/ns/pid')}))
os._exit(0)
"""
    async with cage() as session:
        await session.send(Frame(FrameType.JOB, {"prompt": code}))
        namespace = str((await session.receive()).body["text"])
        with pytest.raises(CageError, match="exited with 0"):
            await session.receive()
        await until(lambda: not processes_in(namespace), "its children are gone")


async def test_a_flood_on_stderr_is_neither_kept_nor_waited_for() -> None:
    code = """
written = 0
try:
    for _ in range(64):
        written += os.write(2, b"x" * 65536)
except BrokenPipeError:
    pass
result = written
"""
    async with cage() as session:
        written = await do(session, code)
        assert isinstance(written, int)
        assert written < 4 << 20
        assert len(session._errors) <= session_module.ERRORS_TAIL_BYTES
        assert await do(session, "result = 1") == 1


async def test_twenty_cages_leave_nothing() -> None:
    cages = BubblewrapCages(agent_zip(), NOWHERE)
    async with cage(cages=cages):
        pass
    before = left_on_machine()
    for _ in range(20):
        async with cage(cages=cages):
            pass
    assert left_on_machine() == before


async def test_cancelling_an_opening_cage_leaves_nothing() -> None:
    cages = BubblewrapCages(agent_zip(), NOWHERE)
    async with cage(cages=cages):
        pass
    before = left_on_machine()
    for delay_s in (0.001, 0.005, 0.01, 0.02, 0.03):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(delay_s), cage(cages=cages):
                await asyncio.sleep(1)
        assert left_on_machine() == before, delay_s
    assert cages._slots == set()


def test_killing_the_daemon_kills_its_cages(tmp_path: Path) -> None:
    path = tmp_path / "agent.pyz"
    path.write_bytes(agent_zip())
    argv = [sys.executable, str(HERE / "cage_owner.py"), str(path)]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, text=True, cwd=HERE.parent.parent, env={"PYTHONPATH": "."}
    ) as owner:
        assert owner.stdout is not None
        namespace = owner.stdout.readline().strip()
        assert len(processes_in(namespace)) >= 3
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    nodes.until(lambda: not processes_in(namespace))


async def test_a_machine_without_bubblewrap_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mycoswarmd.sandbox.bwrap.BWRAP", str(tmp_path / "bwrap"))
    cages = BubblewrapCages(agent_zip(), NOWHERE)
    assert cages.level == "none"
    with pytest.raises(CageError, match="is missing") as refusal:
        await cages.open(make_spec())
    assert "apt" in refusal.value.hint or "install" in refusal.value.hint


async def test_a_bubblewrap_that_fails_says_why() -> None:
    class Wrong(BubblewrapCages):
        def operations(self, spec: CageSpec, host: Host, who: Identity) -> tuple[Operation, ...]:
            return (*super().operations(spec, host, who), Operation("--ro-bind", ("/does/not/exist", "/x")))

    with pytest.raises(CageError, match="/does/not/exist") as refusal:
        await Wrong(agent_zip(), NOWHERE).open(make_spec())
    assert refusal.value.code == "cage-setup"


def test_the_machine_is_probed_quickly_and_can_build_cages() -> None:
    took_s, capability = [], probe_machine()
    for _ in range(5):
        started_s = time.perf_counter()
        probe_machine()
        took_s.append(time.perf_counter() - started_s)
    # The budget is 100 ms; a machine shared with other tests may take some of it.
    assert min(took_s) < 1.0
    assert capability.level is SandboxLevel.REDUCED
    facts = {fact.name: fact for fact in capability.facts}
    assert facts["user namespaces"].ok
    assert not facts["memory"].ok
    assert all(fact.hint for fact in capability.facts if not fact.ok)
