"""The shipped agent in a real cage, served by a scripted node: tools, leftovers, cancel, narrow paths."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mycoswarmd.core.types import CageSpec, Limits
from mycoswarmd.errors import CageError
from mycoswarmd.flow.ports import CageSession
from mycoswarmd.sandbox.bwrap import BubblewrapCages
from mycoswarmd.sandbox.zipapp import build_agent
from mycoswarmd.wire.frames import Frame, FrameType
from mycoswarmd.wire.workspace import Entry, EntryKind, read_workspace, write_workspace

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        not Path("/usr/bin/bwrap").exists() and "CI" not in os.environ, reason="needs bubblewrap"
    ),
]

PYTHON = os.path.realpath("/usr/bin/python3")
Step = list[tuple[str, dict[str, object]]]
FINISH: Step = [("finish", {"summary": "done"})]
GIVEN = (
    Entry(path="notes.txt", kind=EntryKind.FILE, data=b"buy milk"),
    Entry(path="src/a.py", kind=EntryKind.FILE, data=b"x = 1\n"),
    Entry(path="two\nlines", kind=EntryKind.FILE, data=b"n"),
)


@asynccontextmanager
async def cage(
    tmp_path: Path, *, programs: tuple[str, ...] = (), write: tuple[str, ...] = (".",)
) -> AsyncIterator[CageSession]:
    cages = BubblewrapCages(build_agent(), tmp_path)
    session = await cages.open(
        CageSpec(
            task_id="t-1",
            attempt=1,
            read_paths=(".",),
            write_paths=write,
            programs=programs,
            limits=Limits(wall_s=40),
        )
    )
    try:
        yield session
    finally:
        await session.close()


async def work(
    session: CageSession, *steps: Step, on_tool: Callable[[Frame], Awaitable[None]] | None = None
) -> list[Frame]:
    """Hand the task in, answer by the script, permit every tool, return all frames up to RESULT."""
    await session.send(Frame(FrameType.WORKSPACE, {"last": True}, write_workspace(GIVEN)))
    tools = ["fs_read", "fs_write", "fs_edit", "fs_list", "fs_search", "run"]
    limits = {"steps": 20, "tokens": 9999, "context_tokens": 4096}
    job = {"task": "t-1", "prompt": "x", "model": "m", "native_tools": True, "tools": tools, "limits": limits}
    await session.send(Frame(FrameType.JOB, job))
    pending = list(steps)
    seen: list[Frame] = []
    while not seen or seen[-1].type is not FrameType.RESULT:
        frame = await session.receive()
        seen.append(frame)
        if frame.type is FrameType.MODEL:
            calls = [
                {"id": "c", "name": name, "arguments": json.dumps(arguments)}
                for name, arguments in pending.pop(0)
            ]
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0}
            body = {"text": "", "tool_calls": calls, "finish": "tool_calls", "usage": usage}
            await session.send(Frame(FrameType.MODEL_OK, {"id": frame.body["id"], **body}))
        elif frame.type is FrameType.TOOL:
            await session.send(Frame(FrameType.PERMIT, {"id": frame.body["id"], "rule": "r"}))
            if on_tool is not None:
                await on_tool(frame)
    return seen


def texts(seen: list[Frame]) -> list[str]:
    return [str(frame.body["text"]) for frame in seen if frame.type is FrameType.TOOL_DONE]


def changed(seen: list[Frame]) -> dict[str, bytes]:
    tar = b"".join(frame.payload for frame in seen if frame.type is FrameType.CHANGES)
    return {entry.path: entry.data for entry in read_workspace(tar) if entry.kind is EntryKind.FILE}


async def test_a_task_is_carried_out_in_a_cage(tmp_path: Path) -> None:
    async with cage(tmp_path) as session:
        seen = await work(
            session,
            [("fs_list", {"path": "."}), ("fs_read", {"path": "two\\nlines"})],
            [("fs_write", {"path": "new/SUMMARY.md", "content": "milk"})],
            [("fs_edit", {"path": "src/a.py", "old": "1", "new": "2"})],
            FINISH,
        )
    assert seen[-1].body == {"state": "succeeded", "code": "", "summary": "done", "steps": 4, "deleted": []}
    assert texts(seen)[:2] == ["notes.txt (8 bytes)\nsrc/\ntwo\\nlines (1 bytes)", "n"]
    assert changed(seen) == {"new/SUMMARY.md": b"milk", "src/a.py": b"x = 2\n"}


async def test_a_program_runs_and_leaves_nobody_behind(tmp_path: Path) -> None:
    escape = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        while not os.path.exists('go'):\n"
        "            time.sleep(0.01)\n"
        "        open('late', 'w').write('still here')\n"
        "        os._exit(0)\n"
        "    os._exit(0)\n"
        "open('early', 'w').write('x')\n"
        "os.unlink('notes.txt')\n"
    )
    wait = "import os, time; open('go', 'w').close(); time.sleep(1.5); os.unlink('go')"
    async with cage(tmp_path, programs=(PYTHON,)) as session:
        seen = await work(
            session,
            [("run", {"program": PYTHON, "args": ["-I", "-S", "-c", escape]})],
            [("run", {"program": PYTHON, "args": ["-I", "-S", "-c", wait]})],
            FINISH,
        )
    assert texts(seen) == ["[exit status 0]", "[exit status 0]"]
    assert changed(seen) == {"early": b"x"}
    assert seen[-1].body["deleted"] == ["notes.txt"]


async def test_what_the_policy_does_not_let_write_cannot_be_written_and_is_no_change(tmp_path: Path) -> None:
    async with cage(tmp_path, write=("src", "made/by/cage")) as session:
        seen = await work(
            session,
            [("fs_write", {"path": "notes.txt", "content": "no"})],
            [("fs_write", {"path": "src/b.py", "content": "yes"})],
            FINISH,
        )
    assert texts(seen)[0] == "fs_write failed: Permission denied."
    assert changed(seen) == {"src/b.py": b"yes"}
    assert [frame.type for frame in seen].count(FrameType.CHANGES) == 1
    tar = b"".join(frame.payload for frame in seen if frame.type is FrameType.CHANGES)
    assert [entry.path for entry in read_workspace(tar)] == ["src/b.py"]


async def test_no_program_runs_that_is_not_in_the_policy(tmp_path: Path) -> None:
    async with cage(tmp_path) as session:
        seen = await work(session, [("run", {"program": "python3", "args": []})], FINISH)
    assert texts(seen) == ["There is no such program here. Allowed: none."]


async def test_cancel_during_a_program_ends_the_task_at_once(tmp_path: Path) -> None:
    cancelled_s = 0.0
    async with cage(tmp_path, programs=(PYTHON,)) as session:

        async def cancel(_: Frame) -> None:
            nonlocal cancelled_s
            await asyncio.sleep(0.3)
            await session.send(Frame(FrameType.CANCEL, {}))
            cancelled_s = time.monotonic()

        sleep = [("run", {"program": PYTHON, "args": ["-I", "-S", "-c", "import time; time.sleep(600)"]})]
        seen = await work(session, sleep, on_tool=cancel)  # type: ignore[arg-type]
        assert time.monotonic() - cancelled_s < 30
    assert (seen[-1].body["state"], seen[-1].body["code"]) == ("failed", "cancelled")


async def test_a_hostile_workspace_is_refused_inside_too(tmp_path: Path) -> None:
    async with cage(tmp_path) as session:
        await session.send(Frame(FrameType.WORKSPACE, {"last": True}, b"not a tar" * 100))
        frame = await session.receive()
        assert (frame.type, frame.body["code"]) == (FrameType.RESULT, "bad-workspace")
        with pytest.raises(CageError):
            await session.receive()
