"""Following a task live, also across a restart of the daemon; answering its questions inline.

Law: the daemon says when a task has ended; a connection that ends says nothing about the task.
"""

import time
from collections.abc import Iterator

from mycoswarmd.core.tasks import FINAL
from mycoswarmd.ctl.client import segment
from mycoswarmd.ctl.refusals import Doc
from mycoswarmd.ctl.session import Session
from mycoswarmd.ctl.transcript import asked, render
from mycoswarmd.errors import Conflict, Denied, NotFound, Unreachable

# What deals with workspaces and patches; see there why it is loaded by name.
CHANGES = "mycoswarmd.ctl.changes"
# A restart takes 1.5 s, after an upgrade a minute; 40 tries are about 75 s.
_TRIES = 40
_FIRST_WAIT_S = 0.1
_LAST_WAIT_S = 2.0


def follow(session: Session, task_id: str, *, after: int = 0) -> Iterator[Doc]:
    """Yield a task's events from `after` on until it has ended; waits for a daemon that restarts."""
    path = f"/api/tasks/{segment(task_id)}"
    tries = 0
    while True:
        try:
            for event in session.client.lines(f"{path}/events", after=after, follow=1):
                after, tries = int(event["seq"]), 0
                yield event
            if session.client.get(path)["task"]["state"] in FINAL:
                return
        except Unreachable:
            if tries == _TRIES:
                raise
            if tries == 0:
                session.aside("the node went away; waiting for it to come back (the task is safe)")
        wait(tries)
        tries += 1


def wait(tries: int) -> None:
    """Sleep before the next try: twice as long each time, bounded."""
    time.sleep(min(_FIRST_WAIT_S * 2 ** min(tries, 10), _LAST_WAIT_S))


def show(session: Session, event: Doc, *, asks: bool) -> None:
    """Print an event; when `asks`, put its open question to the person at the terminal."""
    if session.as_json:
        session.record(event)
        return
    if text := render(event, session.paint):
        print(text, flush=True)
    data = event.get("data")
    if event.get("kind") == "approval" and isinstance(data, dict) and data.get("state") == "pending":
        _question(session, data, asks=asks)


def _question(session: Session, data: Doc, *, asks: bool) -> None:
    approval_id = str(data.get("id", ""))
    if not asks:
        session.aside(f"  answer it with: mycoswarmctl approve {approval_id}   or the same with --deny")
        return
    is_yes = session.confirm(f"  allow {asked(data.get('facts'))}?")
    try:
        session.client.post(f"/api/approvals/{segment(approval_id)}", {"approve": is_yes})
    except (Conflict, NotFound, Denied) as exc:
        session.aside(f"  {exc.message}")  # answered elsewhere, expired, or not ours to answer
