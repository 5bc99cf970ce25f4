"""Tasks and transcripts as the daemon sends them."""

import hashlib
from typing import Any

from mycoswarmd.wire.workspace import Entry, EntryKind, write_workspace
from tests.unit.ctl.fakenode import FakeNode, Reply, answer, events

ID = "t-0123456789ab"
RULE = "scribe-works-in-its-copy"


def task(**fields: object) -> dict[str, Any]:
    return {
        "id": ID,
        "state": "succeeded",
        "agent": "scribe",
        "label": "private",
        "tainted": False,
        "model": "small",
        "submitter": "user:alice",
        "priority": 5,
        "attempt": 1,
        "created_at_ms": 1_790_000_000_000,
        "updated_at_ms": 1_790_000_001_000,
        "deadline_at_ms": None,
        "code": "",
        "message": "",
        "steps": 2,
        "tokens": 120,
        "repeatable": True,
        "prompt": "summarise",
        "summary": "I wrote it.",
        "workspace": "aa" * 32,
        "changes": hashlib.sha256(write_workspace(CHANGES)).hexdigest(),
        "deleted": ["old.txt"],
        **fields,
    }


def event(seq: int, kind: str, **data: object) -> dict[str, Any]:
    return {"seq": seq, "at_ms": 1_790_000_000_000 + seq, "attempt": 1, "kind": kind, "data": data}


FACTS = {
    "action": "tool",
    "tool": "run",
    "arguments": '{"argv": ["make"]}',
    "rule": "ask-first",
    "why": "risky",
}
TRANSCRIPT = (
    event(1, "state", **{"from": "queued", "to": "running", "code": "", "message": ""}),
    event(2, "proof", level="full", held=23, absent=["landlock"]),
    event(
        3,
        "model",
        step=1,
        text="I will read \x1b[31mit",
        tool_calls=[{"name": "fs_read", "arguments": "{}"}],
        usage={"prompt_tokens": 50, "completion_tokens": 10},
        model="small",
        node="box",
        zone="self",
        rule="answered-here",
        receipt="8-aaaaaaaa",
        duration_ms=1500,
    ),
    event(4, "tool", id=1, tool="fs_read", arguments='{"path": "notes\x07.txt"}'),
    event(5, "decision", action="tool", tool="fs_read", decision="allow", rule=RULE, why="", receipt="9-bb"),
    event(6, "tool-result", id=1, tool="fs_read", ok=True, text="milk\neggs", bytes=9, duration_ms=3),
    event(7, "tool", id=2, tool="run", arguments='{"argv": ["curl"]}'),
    event(
        8,
        "decision",
        action="tool",
        tool="run",
        decision="deny",
        rule="default-deny",
        why="cannot use it",
        receipt="",
    ),
    event(9, "note", text="the task is tainted"),
    event(10, "changes", files=[{"path": "new\x1b.txt", "kind": "written", "bytes": 4}], count=1),
    event(11, "state", **{"from": "running", "to": "succeeded", "code": "", "message": ""}),
)
PENDING = event(7, "approval", id="a-0011223344", state="pending", facts=FACTS)


def file(path: str, data: bytes) -> Entry:
    return Entry(path=path, kind=EntryKind.FILE, data=data)


BEFORE = (file("notes.txt", b"milk\neggs\n"), file("old.txt", b"gone\n"))
CHANGES = (file("new.txt", b"milk, eggs\n"),)


def serve_task(node: FakeNode, *rows: dict[str, Any], **fields: object) -> FakeNode:
    """Script a node that has one task, ended, with its workspace and changes."""
    found = task(**fields)
    node.on("GET", "/api/tasks", answer({"tasks": [found]}))
    node.on("GET", f"/api/tasks/{ID}", answer({"task": found, "approvals": []}))
    node.on("GET", f"/api/tasks/{ID}/events", events(*(rows or TRANSCRIPT)))
    node.on("GET", f"/api/tasks/{ID}/workspace", Reply(body=write_workspace(BEFORE)))
    node.on("GET", f"/api/tasks/{ID}/changes", Reply(body=write_workspace(CHANGES)))
    return node
