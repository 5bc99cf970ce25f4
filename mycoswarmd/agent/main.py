"""The agent's work, confined and proved: take a workspace and a job, work, hand back the changes.

Rule: what comes before is in threshold.py, and there is no way round it. When the node closes the socket
the agent ends, at any point. Errors end in a RESULT with a code; their tracebacks go to standard error,
which the node bounds.
"""

import os
import sys
import traceback
from collections.abc import Mapping

from mycoswarmd.agent import confine
from mycoswarmd.agent.link import Cancelled, Frames, Link
from mycoswarmd.agent.loop import Ending, Loop, parse_job
from mycoswarmd.agent.program import sweep, sweep_children
from mycoswarmd.agent.snapshot import Harvest, made_directories, unpack
from mycoswarmd.agent.tools import Workbench
from mycoswarmd.errors import BadRequest, CageError, MycoswarmError
from mycoswarmd.wire.frames import MAX_PAYLOAD_BYTES, FrameType
from mycoswarmd.wire.jsonv import as_bool, as_list, as_str
from mycoswarmd.wire.workspace import DEFAULT_LIMITS, EntryKind, read_workspace, show_path

WORKSPACE = "/workspace"
# The largest workspace with its headers; the node sends no more.
_MAX_TAR_BYTES = DEFAULT_LIMITS.bytes * 2
_MAX_NOTES = 20


def main(channel: Frames, confinement: Mapping[str, object]) -> None:
    """Carry out the task of one proved cage; the exit status is 1 when no RESULT could be sent."""
    try:
        serve(channel, confinement)
    except CageError as exc:
        if exc.code != "cage-gone":
            traceback.print_exc()
        sys.exit(1)


def serve(channel: Frames, confinement: Mapping[str, object]) -> None:
    """Take the workspace and the job, work, and send CHANGES and RESULT."""
    link = Link(channel)
    try:
        work(channel, link, confinement)
    except Cancelled:
        _result(link, Ending(is_ok=False, code="cancelled", summary="cannot go on: cancelled", steps=0), ())
    except CageError as exc:
        if exc.code == "cage-gone":
            raise
        _fail(link, exc)
    except MycoswarmError as exc:
        _fail(link, exc)
    except (OSError, MemoryError, RecursionError) as exc:
        traceback.print_exc()
        reason = os.strerror(exc.errno) if isinstance(exc, OSError) and exc.errno else type(exc).__name__
        _fail(link, CageError("agent-crashed", f"cannot go on: {reason} in the cage"))


def work(channel: Frames, link: Link, confinement: Mapping[str, object]) -> None:
    """Carry out one task in /workspace; raise what stops it."""
    entries = read_workspace(_take_workspace(channel))
    root = os.open(WORKSPACE, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    before = unpack(root, entries)
    shown = {show_path(entry.path): entry.path for entry in entries}
    files = [show_path(entry.path) for entry in entries if entry.kind is EntryKind.FILE]
    del entries
    confine.narrow(confinement)
    narrow = confinement.get("narrow")
    made = made_directories(narrow["make"] if isinstance(narrow, dict) else (), WORKSPACE)
    before = tuple({entry.path: entry for entry in (*made, *before)}.values())
    frame = channel.receive()
    if frame.type is FrameType.CANCEL:
        raise Cancelled
    if frame.type is not FrameType.JOB:
        raise BadRequest("bad-frame", f"cannot take {frame.type.value!r} for a job")
    programs = as_list(confinement.get("programs"), where="programs", max_items=1024)
    bench = Workbench(
        root=root,
        directory=WORKSPACE,
        programs=tuple(as_str(one, where="programs", max_len=4096) for one in programs),
        shown_names={name: path for name, path in shown.items() if name != path},
        watch=(link.fileno(), link.check),
        # Where other processes live beside the agent it ends those that it knows.
        sweep=sweep_children if confinement.get("maps_root") is True else sweep,
    )
    ending = Loop(job=parse_job(frame.body), link=link, bench=bench, files=files).run()
    harvest = Harvest(root, before)
    tar, deleted = harvest.collect()
    for note in harvest.left_behind[:_MAX_NOTES]:
        link.tell(FrameType.NOTE, {"text": f"left behind in the cage: {note}"})
    for start in range(0, len(tar), MAX_PAYLOAD_BYTES):
        piece = tar[start : start + MAX_PAYLOAD_BYTES]
        link.tell(FrameType.CHANGES, {"last": start + MAX_PAYLOAD_BYTES >= len(tar)}, piece)
    _result(link, ending, deleted)


def _take_workspace(channel: Frames) -> bytes:
    data = bytearray()
    while True:
        frame = channel.receive()
        if frame.type is FrameType.CANCEL:
            raise Cancelled
        if frame.type is not FrameType.WORKSPACE:
            raise BadRequest("bad-frame", f"cannot take {frame.type.value!r} for a piece of the workspace")
        data += frame.payload
        if len(data) > _MAX_TAR_BYTES:
            raise BadRequest("workspace-too-large", "cannot take the workspace: it is too large")
        if as_bool(frame.body.get("last"), where="last"):
            return bytes(data)


def _fail(link: Link, exc: MycoswarmError) -> None:
    _result(link, Ending(is_ok=False, code=exc.code, summary=exc.message, steps=0), ())


def _result(link: Link, ending: Ending, deleted: tuple[str, ...]) -> None:
    link.tell(
        FrameType.RESULT,
        {
            "state": "succeeded" if ending.is_ok else "failed",
            "code": ending.code,
            "summary": ending.summary,
            "steps": ending.steps,
            "deleted": list(deleted),
        },
    )
