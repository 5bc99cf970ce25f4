"""Commands about tasks that exist: tasks, task, logs, cancel, retry, apply, approvals, approve."""

import importlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from mycoswarmd.core.tasks import TaskState
from mycoswarmd.ctl.client import segment
from mycoswarmd.ctl.follow import CHANGES, follow, show
from mycoswarmd.ctl.plain import examples, typer
from mycoswarmd.ctl.refusals import Doc
from mycoswarmd.ctl.screen import clip
from mycoswarmd.ctl.session import JSON, Session, begin, guarded
from mycoswarmd.ctl.transcript import asked
from mycoswarmd.errors import BadRequest, MycoswarmError, NotFound

# Enough to know the task again; the whole is in --json.
_PROMPT_CHARS = 300

_ID = typer.Argument(..., metavar="ID", help="A task's id, or the beginning of it.")

TASKS_EXAMPLES = examples(
    "mycoswarmctl tasks --state waiting", "mycoswarmctl tasks --json | jq -r '.tasks[].id'"
)
TASK_EXAMPLES = examples("mycoswarmctl task t-3f9c", "mycoswarmctl task t-3f9c --patch | git apply")
LOGS_EXAMPLES = examples("mycoswarmctl logs -f t-3f9c", "mycoswarmctl logs t-3f9c --json | jq .kind")
APPLY_EXAMPLES = examples("mycoswarmctl apply t-3f9c --workspace .")
APPROVE_EXAMPLES = examples("mycoswarmctl approve a-51d0", "mycoswarmctl approve t-3f9c --deny")


@guarded
def tasks(
    ctx: typer.Context,
    state: str = typer.Option(
        None, "--state", metavar="STATE", help=f"Only tasks in this state: {', '.join(TaskState)}."
    ),
    limit: int = typer.Option(20, "--limit", "-n", min=1, max=1000, metavar="N", help="At most so many."),
    as_json: bool = JSON,
) -> None:
    """List tasks, the newest first."""
    session = begin(ctx, as_json=as_json)
    if state and state not in list(TaskState):
        raise BadRequest(
            "unknown-state", f"cannot list tasks in state {state!r}", hint=f"one of {', '.join(TaskState)}"
        )
    answer = session.client.get("/api/tasks", state=state, limit=limit)
    if as_json:
        session.document(answer)
        return
    rows = [
        (
            row.get("id"),
            row.get("state"),
            row.get("agent"),
            row.get("label"),
            row.get("submitter"),
            row.get("steps"),
            at(row.get("created_at_ms")),
            row.get("code") or "",
        )
        for row in answer.get("tasks", [])
    ]
    headers = ("ID", "STATE", "AGENT", "LABEL", "FROM", "STEPS", "CREATED", "CODE")
    session.table(headers, rows, empty="no tasks")


@guarded
def task(
    ctx: typer.Context,
    task_id: str = _ID,
    patch: bool = typer.Option(False, "--patch", help="Print only what it changed, as a patch."),
    as_json: bool = JSON,
) -> None:
    """Show one task.

    Its state, result, and what it waits for; with --patch, what it changed.
    """
    session = begin(ctx, as_json=as_json)
    answer = session.client.get(f"/api/tasks/{segment(session.task_id(task_id))}")
    found: Doc = answer["task"]
    text: str = importlib.import_module(CHANGES).fetch_patch(session, found) if patch else ""
    if as_json:
        session.document({**answer, "patch": text} if patch else answer)
    elif patch:
        print(session.paint.patch(text), end="")
    else:
        _describe(session, found, answer.get("approvals", []))


@guarded
def logs(
    ctx: typer.Context,
    task_id: str = _ID,
    is_following: bool = typer.Option(False, "--follow", "-f", help="Go on until the task has ended."),
    as_json: bool = typer.Option(False, "--json", help="Print each event as one line of JSON."),
) -> None:
    """Print the transcript of a task.

    Model calls, decisions with their rules, tool calls and results.
    """
    session = begin(ctx, as_json=as_json)
    full_id = session.task_id(task_id)
    if is_following:
        for event in follow(session, full_id):
            show(session, event, asks=False)
        return
    for event in session.client.lines(f"/api/tasks/{segment(full_id)}/events", after=0, follow=0):
        show(session, event, asks=False)


@guarded
def cancel(ctx: typer.Context, task_id: str = _ID, as_json: bool = JSON) -> None:
    """End a task.

    Its cage is killed; what it changed is dropped.
    """
    _act(begin(ctx, as_json=as_json), task_id, "cancel")


@guarded
def retry(ctx: typer.Context, task_id: str = _ID, as_json: bool = JSON) -> None:
    """Run a failed or parked task again."""
    _act(begin(ctx, as_json=as_json), task_id, "retry")


@guarded
def apply(
    ctx: typer.Context,
    task_id: str = _ID,
    workspace: Path = typer.Option(
        ..., "--workspace", "-w", metavar="DIR", help="Directory to change; the one that was sent."
    ),
    yes: bool = typer.Option(False, "--yes", "-y", help="Do not ask first."),
    as_json: bool = JSON,
) -> None:
    """Apply what a task changed to a directory.

    The patch is shown first, and nothing is done before you agree.
    """
    session = begin(ctx, as_json=as_json)
    changes = importlib.import_module(CHANGES)
    found: Doc = session.client.get(f"/api/tasks/{segment(session.task_id(task_id))}")["task"]
    if not as_json:
        print(session.paint.patch(changes.fetch_patch(session, found)), end="", flush=True)
    done = list(changes.apply_task(session, found, workspace, yes=yes))
    if as_json:
        session.document({"applied": done})
    else:
        session.aside(f"applied to {workspace}: {', '.join(done)}" if done else "nothing was applied")


@guarded
def approvals(ctx: typer.Context, as_json: bool = JSON) -> None:
    """List what waits for a person's approval."""
    session = begin(ctx, as_json=as_json)
    answer = session.client.get("/api/approvals")
    if as_json:
        session.document(answer)
        return
    rows = answer.get("approvals", [])
    for row in rows:  # no table: a terminal's width must not cut what is asked
        source = f"task {row['task_id']}" if row.get("task_id") else "a prompt"
        session.text(f"{row.get('id')}  {source}  expires {at(row.get('expires_at_ms'))}")
        session.text(f"  {asked(row.get('facts'))}")
    if not rows:
        session.aside("nothing waits for approval")


@guarded
def approve(
    ctx: typer.Context,
    approval_id: str = typer.Argument(
        ..., metavar="ID", help="An approval's id, or that of a task with one open question."
    ),
    deny: bool = typer.Option(False, "--deny", help="Say no instead."),
    as_json: bool = JSON,
) -> None:
    """Answer what waits for approval.

    Yes, or no with --deny.
    """
    session = begin(ctx, as_json=as_json)
    answer = _answer(session, approval_id, {"approve": not deny})
    if as_json:
        session.document(answer)
    else:
        row = answer.get("approval", answer)
        session.text(f"{row.get('id', approval_id)}: {row.get('state', 'denied' if deny else 'approved')}")


def at(at_ms: object) -> str:
    """Return a time in Unix milliseconds as local date and time."""
    if not isinstance(at_ms, int | float) or isinstance(at_ms, bool):
        return "-"
    try:
        return datetime.fromtimestamp(at_ms / 1000, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return "?"


def _answer(session: Session, given: str, body: Doc) -> Doc:
    try:
        return session.client.post(f"/api/approvals/{segment(given)}", body)
    except NotFound as exc:
        full = _complete(session, given, exc)
        return session.client.post(f"/api/approvals/{segment(full)}", body)


def _complete(session: Session, given: str, otherwise: MycoswarmError) -> str:
    """Complete the beginning of an approval's id, or of the id of a task that waits."""
    rows = session.client.get("/api/approvals").get("approvals", [])
    for key in ("id", "task_id"):
        found = {str(row[key]) for row in rows if given and str(row.get(key) or "").startswith(given)}
        if len(found) == 1:
            return found.pop()
    raise otherwise


def _act(session: Session, given: str, verb: str) -> None:
    answer = session.client.post(f"/api/tasks/{segment(session.task_id(given))}/{verb}")
    if session.as_json:
        session.document(answer)
    else:
        session.text(f"{answer['task']['id']}: {answer['task']['state']}")


def _describe(session: Session, found: Doc, waiting: Sequence[Doc]) -> None:
    why = " - ".join(str(found[key]) for key in ("code", "message") if found.get(key))
    session.fields(
        [
            ("id", found.get("id")),
            ("state", found.get("state")),
            ("why", why),
            ("agent", found.get("agent")),
            ("model", found.get("model")),
            ("label", f"{found.get('label')}{' (tainted)' if found.get('tainted') else ''}"),
            ("from", found.get("submitter")),
            ("priority", found.get("priority")),
            ("attempt", found.get("attempt")),
            ("steps", found.get("steps")),
            ("tokens", found.get("tokens")),
            ("created", at(found.get("created_at_ms"))),
            ("updated", at(found.get("updated_at_ms"))),
            ("deadline", at(found["deadline_at_ms"]) if found.get("deadline_at_ms") else None),
            ("prompt", clip(found.get("prompt", ""), _PROMPT_CHARS)),
            ("changes", "see --patch" if found.get("changes") or found.get("deleted") else None),
        ]
    )
    if found.get("summary"):
        print()
        session.text(found["summary"])
    for row in waiting:
        session.text(f"\nwaits for approval {row.get('id')}: {asked(row.get('facts'))}")
