"""What comes out of a cage as changes, from agents that do as they like: whole and looked at, or nothing."""

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mycoswarmd.core.policy.check import check_policy
from mycoswarmd.core.tasks import FINAL, Task, TaskState
from mycoswarmd.core.types import TaskId
from mycoswarmd.wire.workspace import Entry, EntryKind, write_workspace
from tests.blobs import get, put
from tests.integration.apis import POLICY, Running, running_api
from tests.integration.cages import agent_zip

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(180),
    pytest.mark.skipif(
        not Path("/usr/bin/bwrap").exists() and "CI" not in os.environ, reason="bubblewrap is not installed"
    ),
]

# Proves its confinement, takes the workspace, and then does what the task's prompt says, in Python.
AGENT = """
import os, time
from mycoswarmd.agent import confine, prove
from mycoswarmd.agent.channel import Channel
from mycoswarmd.wire.frames import Frame, FrameType

def main():
    channel = Channel.take()
    frame = channel.receive()
    before = prove.survey(frame.body)
    confine.apply(frame.body, frame.payload)
    channel.send(Frame(FrameType.PROOF, prove.run(frame.body, before)))
    given = b""
    while (frame := channel.receive()).type is FrameType.WORKSPACE:
        assert not given or frame.payload or frame.body["last"]
        given += frame.payload

    def changes(data):
        channel.send(Frame(FrameType.CHANGES, {"last": False}, data))

    def result(**body):
        channel.send(Frame(FrameType.RESULT, {"state": "succeeded", "code": "", "summary": "done", **body}))

    exec(str(frame.body["prompt"]), globals() | locals())
"""


GIVEN = write_workspace([Entry(path="given", kind=EntryKind.FILE, data=b"x" * 700_000)])
MADE = """
from mycoswarmd.wire.workspace import Entry, EntryKind, write_workspace
made = write_workspace([
    Entry(path="a.txt", kind=EntryKind.FILE, data=b"one"),
    Entry(path="b/c", kind=EntryKind.FILE, data=b"x" * 300_000),
])
"""
SEND_HALF = MADE + "changes(made[:200_000])\n"


@asynccontextmanager
async def working(*, wall_s: int = 60) -> AsyncIterator[tuple[Running, Callable[[], object]]]:
    """Run a node with the agent above and its workers; also give what stops those."""
    async with running_api(agent=agent_zip(AGENT)) as node, asyncio.TaskGroup() as group:
        limit = f'model = "*"\nlimit = {{ wall = "{wall_s}s", disk = "1MiB" }}\n'
        text = POLICY.replace(b'model = "*"\n', limit.encode())
        assert text != POLICY
        checked = check_policy(text, path="test.toml", resolve_program=lambda _: None)
        node.services.policy.policy = checked.policy  # type: ignore[misc]
        workers = group.create_task(node.services.tasks.run())
        yield node, workers.cancel
        workers.cancel()


def names(node: Running) -> list[str]:
    directory = node.directory / "state" / "blobs"
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


async def begun(node: Running, prompt: str) -> TaskId:
    anna = await node.admit("anna", role="operator")
    workspace = await put(node.services.blobs, GIVEN)
    body = {"prompt": prompt, "agent": "scribe", "model": "m", "workspace": workspace, "repeatable": False}
    posted = await node.ask(anna, "POST", "/api/tasks", body)
    assert posted.status == 202, posted.body
    return TaskId(posted.json["task"]["id"])


async def ended(node: Running, task_id: TaskId) -> Task:
    async with asyncio.timeout(60):
        while (task := await node.services.task_store.get(task_id)).state not in {*FINAL, TaskState.PARKED}:
            await asyncio.sleep(0.05)
    return task


async def test_an_agent_gets_its_workspace_and_its_changes_come_out_whole() -> None:
    scope: dict[str, bytes] = {}
    exec(MADE, scope)
    given = hashlib.sha256(GIVEN).hexdigest()
    prompt = f"""
import hashlib
assert hashlib.sha256(given).hexdigest() == {given!r}
{MADE}
for start in range(0, len(made), 70_000):
    changes(made[start:start + 70_000])
result(deleted=["old", 7, "older"])
"""
    async with working() as (node, _):
        task = await ended(node, await begun(node, prompt))
        assert task.state is TaskState.SUCCEEDED, task
        assert task.changes == hashlib.sha256(scope["made"]).hexdigest()
        assert await get(node.services.blobs, task.changes) == scope["made"]
        assert names(node) == sorted([given, task.changes])
        events = await node.services.task_store.events(task.id, after=0, limit=100)
        (event,) = [one for one in events if one.kind == "changes"]
        assert event.data == {
            "files": [
                {"path": "a.txt", "kind": "written", "bytes": 3},
                {"path": "b/c", "kind": "written", "bytes": 300_000},
                {"path": "old", "kind": "deleted", "bytes": 0},
                {"path": "older", "kind": "deleted", "bytes": 0},
            ],
            "count": 4,
        }


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        (SEND_HALF + "raise SystemExit(1)", "cage-gone"),
        (SEND_HALF + "channel.send(Frame(FrameType.PROOF, {}))\ntime.sleep(600)", "bad-frame"),
        (SEND_HALF + "os.write(3, bytes(100))\ntime.sleep(600)", "cage-garbage"),
        (SEND_HALF + "result()", "bad-workspace"),
        ("changes(b'no tar at all')\nresult()", "bad-workspace"),
        ("for _ in range(20): changes(bytes(100_000))\ntime.sleep(600)", "too-many-changes"),
    ],
    ids=["gone", "wrong frame", "garbage", "half an archive", "no archive", "too much"],
)
async def test_changes_that_do_not_end_well_leave_nothing(prompt: str, code: str) -> None:
    async with working() as (node, _):
        task = await ended(node, await begun(node, prompt))
        assert (task.code, task.changes) == (code, None), task
        assert names(node) == [hashlib.sha256(GIVEN).hexdigest()]


async def test_a_workspace_that_was_damaged_fails_its_task_and_one_sent_again_does_not() -> None:
    async with working() as (node, _):
        sha256 = await put(node.services.blobs, GIVEN)
        (node.directory / "state" / "blobs" / sha256).write_bytes(GIVEN[:-1] + b"?")
        anna = await node.admit("anna", role="operator")
        body = {"prompt": "result()", "agent": "scribe", "model": "m", "workspace": sha256}
        posted = await node.ask(anna, "POST", "/api/tasks", body)
        assert posted.status == 202, posted.body
        task = await ended(node, TaskId(posted.json["task"]["id"]))
        assert (task.state, task.code) == (TaskState.FAILED, "blob-damaged")
        assert task.attempt == 1
        await put(node.services.blobs, GIVEN)
        again = await node.ask(anna, "POST", f"/api/tasks/{task.id}/retry", {})
        assert again.status == 200, again.body
        assert (await ended(node, task.id)).state is TaskState.SUCCEEDED


@pytest.mark.parametrize("how", ["cancelled", "out of time", "node stopped"])
async def test_who_ends_a_task_does_not_wait_for_the_look_at_its_changes(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, looks = os.pread, 0

    def slow(fd: int, size_bytes: int, offset: int) -> bytes:
        nonlocal looks
        if size_bytes == 512:  # a header
            looks += 1
            time.sleep(0.02)
        return real(fd, size_bytes, offset)

    monkeypatch.setattr("mycoswarmd.store.blobs.os.pread", slow)
    many = """
from mycoswarmd.wire.workspace import Entry, EntryKind, write_workspace
made = write_workspace([Entry(path=f"f{n}", kind=EntryKind.FILE) for n in range(1900)])
for start in range(0, len(made), 70_000):
    changes(made[start:start + 70_000])
result()
"""
    async with working(wall_s=10 if how == "out of time" else 60) as (node, stop):
        task_id = await begun(node, many)
        async with asyncio.timeout(60):
            while not looks:
                await asyncio.sleep(0.02)
        if how == "cancelled":
            await node.services.tasks.cancel(task_id)
        elif how == "node stopped":
            stop()
        if how != "node stopped":
            state = TaskState.CANCELLED if how == "cancelled" else TaskState.FAILED
            assert (await ended(node, task_id)).state is state
        async with asyncio.timeout(60):
            while names(node) != [hashlib.sha256(GIVEN).hexdigest()]:
                await asyncio.sleep(0.02)
        assert looks < 1000  # of 1900, and 20 s


@pytest.mark.parametrize("how", ["cancelled", "out of time", "node stopped"])
async def test_changes_that_are_cut_off_leave_nothing(how: str) -> None:
    async with working(wall_s=8 if how == "out of time" else 60) as (node, stop):
        task_id = await begun(node, SEND_HALF + "time.sleep(600)")
        async with asyncio.timeout(60):
            while not any(name.startswith(".new-") for name in names(node)):
                await asyncio.sleep(0.02)
        if how == "cancelled":
            await node.services.tasks.cancel(task_id)
            assert (await ended(node, task_id)).state is TaskState.CANCELLED
        elif how == "out of time":
            assert (await ended(node, task_id)).code in {"agent-timeout", "cage-timeout"}
        else:
            stop()
        async with asyncio.timeout(60):
            while names(node) != [hashlib.sha256(GIVEN).hexdigest()]:
                await asyncio.sleep(0.02)
