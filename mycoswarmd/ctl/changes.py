"""Workspaces: packed and sent; what a task changed fetched, shown as a patch, applied when the user says so.

Loaded by the commands that need it by name: reading tars and comparing files costs
`--help` time that it does not have.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from mycoswarmd.ctl.client import segment
from mycoswarmd.ctl.refusals import Doc
from mycoswarmd.ctl.screen import count, size
from mycoswarmd.ctl.session import Session
from mycoswarmd.ctl.workspace import apply_changes, pack_directory
from mycoswarmd.errors import BadRequest, Conflict
from mycoswarmd.wire.patch import make_patch
from mycoswarmd.wire.workspace import Entry, overlay, read_workspace

# A person reads ten lines; a thousand hide what matters.
_NAMED = 10


def send_workspace(session: Session, directory: Path) -> str:
    """Send a copy of a directory to the node and return its hash."""
    packed = pack_directory(directory)
    for path, reason in packed.skipped[:_NAMED]:
        session.aside(f"left out: {path}: {reason}")
    if len(packed.skipped) > _NAMED:
        session.aside(f"left out: {len(packed.skipped) - _NAMED} more")
    session.aside(f"sending a copy of {directory} ({size(len(packed.tar))})")
    digest = hashlib.sha256(packed.tar).hexdigest()
    session.client.put_bytes(f"/api/blobs/{digest}", packed.tar)
    return digest


def fetch_patch(session: Session, task: Doc) -> str:
    """Return what a task changed as a patch; "" when nothing."""
    changes, deleted = _changes(session, task)
    if not changes and not deleted:
        return ""
    before = _before(session, task)
    return make_patch(before, overlay(before, changes, deleted))


def apply_task(session: Session, task: Doc, directory: Path, *, yes: bool) -> Sequence[str]:
    """Apply a task's changes to a directory, asking first unless told not to; return the changed paths."""
    if not yes and not session.is_interactive():
        raise BadRequest(
            "cannot-ask", "cannot apply changes without asking: nobody is at a terminal", hint="say --yes"
        )
    changes, deleted = _changes(session, task)
    if not changes and not deleted:
        return ()
    how_many = count(len(changes) + len(deleted), "change")
    if not yes and not session.confirm(f"Apply {how_many} to {directory}?"):
        return ()
    return apply_changes(directory, changes, deleted, before=_before(session, task))


def _changes(session: Session, task: Doc) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    untrusted = session.client.get_bytes(f"{_path(task)}/changes")
    if untrusted and hashlib.sha256(untrusted).hexdigest() != task.get("changes"):
        # What is applied is what was shown: the hash came with the task, before the patch.
        raise Conflict("changed-meanwhile", "cannot use the changes: the task has others by now")
    deleted = task.get("deleted")
    paths = tuple(str(path) for path in deleted) if isinstance(deleted, list) else ()
    return (read_workspace(untrusted) if untrusted else ()), paths


def _before(session: Session, task: Doc) -> tuple[Entry, ...]:
    untrusted = session.client.get_bytes(f"{_path(task)}/workspace")
    return read_workspace(untrusted) if untrusted else ()


def _path(task: Doc) -> str:
    return f"/api/tasks/{segment(str(task['id']))}"
