"""`run` and `submit`: give a task to an agent; `run` follows it and shows what came of it."""

import importlib
import re
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

from mycoswarmd.ctl.ask import read_prompt
from mycoswarmd.ctl.client import segment
from mycoswarmd.ctl.follow import CHANGES, follow, show, wait
from mycoswarmd.ctl.plain import examples, typer
from mycoswarmd.ctl.refusals import Doc
from mycoswarmd.ctl.screen import line
from mycoswarmd.ctl.session import JSON, Session, begin, guarded
from mycoswarmd.errors import BadRequest, Denied, Unreachable

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
# Codes of tasks that ended because the policy, or a person asked by it, said no.
_REFUSED = re.compile(r"(.*-)?(denied|not-approved|no-policy|over-limit)")

# A daemon that restarts is back within seconds; 15 tries are about 20 s.
_TRIES = 15

_PROMPT = typer.Argument(..., metavar="PROMPT", help="What the agent is to do; - reads it from stdin.")
_AGENT = typer.Option(
    None, "--agent", "-a", metavar="NAME", help="Agent of the policy. Default: its only one."
)
_WORKSPACE = typer.Option(
    None, "--workspace", "-w", metavar="DIR", help="Directory the agent works on a copy of. Default: none."
)
_LABEL = typer.Option(None, "--label", "-l", metavar="LABEL", help="How sensitive the task is.")
_MODEL = typer.Option(None, "--model", "-m", metavar="NAME", help="Model to use instead of the agent's.")
_PRIORITY = typer.Option(
    5, "--priority", min=0, max=9, metavar="N", help="Place in the queue: 0 first, 9 last."
)
_DEADLINE = typer.Option(
    None, "--deadline", metavar="TIME", help="Give up after this long, such as 90s, 30m, 2h."
)
_ONCE = typer.Option(
    False, "--once", help="Never run it twice: if the node dies in the middle, park it for a person."
)

RUN_EXAMPLES = examples(
    'mycoswarmctl run --workspace . "add docstrings to src/parser.py"',
    'mycoswarmctl run --agent coder --workspace . --apply "fix the failing test"',
    'mycoswarmctl run --deadline 10m --json "list what is in this workspace" | jq',
)
SUBMIT_EXAMPLES = examples(
    'id=$(mycoswarmctl submit --workspace . "write a summary to SUMMARY.md")',
    'mycoswarmctl logs -f "$id" && mycoswarmctl apply "$id" --workspace .',
)


@guarded
def run(
    ctx: typer.Context,
    prompt: str = _PROMPT,
    agent: str = _AGENT,
    workspace: Path = _WORKSPACE,
    apply: bool = typer.Option(False, "--apply", help="Apply the changes to the workspace, after asking."),
    label: str = _LABEL,
    model: str = _MODEL,
    priority: int = _PRIORITY,
    deadline: str = _DEADLINE,
    once: bool = _ONCE,
    yes: bool = typer.Option(
        False, "--yes", "-y", help="Apply without asking. Never answers what the policy asks."
    ),
    as_json: bool = JSON,
) -> None:
    """Give a task to an agent and follow it.

    The result and a patch of what it changed are shown; the workspace itself is changed only with --apply.

    Exit code: 0 succeeded; 1 failed, cancelled, expired or parked; 3 refused by the policy; 130 after
    Ctrl-C, and the task goes on.
    """
    session = begin(ctx, as_json=as_json)
    if apply and workspace is None:
        raise BadRequest("no-workspace", "cannot apply changes: no workspace", hint="give --workspace DIR")
    if apply and not yes and not session.is_interactive():
        raise BadRequest(
            "cannot-ask", "cannot ask before applying: nobody is at a terminal", hint="say --apply --yes"
        )
    fields = _fields(prompt, label, model, priority, deadline, once=once)
    task = _submit(session, fields, agent, workspace)
    try:
        _watch(session, task)
        task = session.client.get(f"/api/tasks/{segment(task['id'])}")["task"]
    except KeyboardInterrupt:
        _goes_on(session, task)
        raise
    _finish(session, task, workspace if apply else None, yes=yes)
    if code := exit_code(task):
        raise typer.Exit(code)


@guarded
def submit(
    ctx: typer.Context,
    prompt: str = _PROMPT,
    agent: str = _AGENT,
    workspace: Path = _WORKSPACE,
    label: str = _LABEL,
    model: str = _MODEL,
    priority: int = _PRIORITY,
    deadline: str = _DEADLINE,
    once: bool = _ONCE,
    as_json: bool = JSON,
) -> None:
    """Give a task to an agent; print its id.

    The task runs on its own: see tasks, logs, apply.
    """
    session = begin(ctx, as_json=as_json)
    task = _submit(session, _fields(prompt, label, model, priority, deadline, once=once), agent, workspace)
    if as_json:
        session.document({"task": task})
    else:
        session.text(task["id"])


def exit_code(task: Mapping[str, object]) -> int:
    """Return what `run` exits with for a task that has ended."""
    if task.get("state") == "succeeded":
        return 0
    return Denied.exit_code if _REFUSED.fullmatch(str(task.get("code", ""))) else 1


def parse_seconds(text: str) -> int:
    """Parse a time such as 90s, 30m, 2h, 1d or a plain number of seconds."""
    found = re.fullmatch(r"([0-9]{1,7})([smhd]?)", text.strip())
    if found is None or int(found[1]) == 0:
        raise BadRequest("bad-time", f"cannot read {text!r} as a time", hint="such as 90s, 30m, 2h or 1d")
    return int(found[1]) * _UNITS[found[2]]


def _fields(
    prompt: str, label: str | None, model: str | None, priority: int, deadline: str | None, *, once: bool
) -> Doc:
    fields: Doc = {"prompt": read_prompt(prompt), "priority": priority, "repeatable": not once}
    if label:
        fields["label"] = label
    if model:
        fields["model"] = model
    if deadline:
        fields["deadline_s"] = parse_seconds(deadline)
    return fields


def _submit(session: Session, fields: Doc, agent: str | None, workspace: Path | None) -> Doc:
    fields["agent"] = agent or _only_agent(session)
    if workspace is not None:
        fields["workspace"] = importlib.import_module(CHANGES).send_workspace(session, workspace)
    # With a key, sending it again after a lost connection makes no second task.
    fields["idempotency_key"] = f"ctl-{secrets.token_hex(16)}"
    task: Doc = _post_until_answered(session, fields)["task"]
    return task


def _post_until_answered(session: Session, fields: Doc) -> Doc:
    tries = 0
    while True:
        try:
            return session.client.post("/api/tasks", fields)
        except Unreachable as exc:
            if tries == _TRIES or (tries == 0 and exc.code != "connection-lost"):
                raise
        wait(tries)
        tries += 1


def _only_agent(session: Session) -> str:
    try:
        names = sorted(session.client.get("/api/policy").get("agents", {}))
    except Denied as exc:
        raise BadRequest(
            "no-agent",
            "cannot choose an agent: you may not read the policy",
            hint=f"name one with --agent{'; ' + exc.hint if exc.hint else ''}",
        ) from exc
    if len(names) != 1:
        has = f"it has {', '.join(names)}" if names else "it has none: add [agents.NAME]"
        raise BadRequest("no-agent", "cannot choose an agent of the policy", hint=f"{has}; say --agent NAME")
    return str(names[0])


def _watch(session: Session, task: Doc) -> None:
    if session.as_json:
        session.record({"task": task})
    else:
        session.aside(f"task {task['id']}: agent {task['agent']}, label {task['label']}")
    for event in follow(session, str(task["id"])):
        show(session, event, asks=session.is_interactive())


def _goes_on(session: Session, task: Doc) -> None:
    session.aside(
        f"\ntask {task['id']} goes on.  follow it: mycoswarmctl logs -f {task['id']}"
        f"   stop it: mycoswarmctl cancel {task['id']}"
    )


def _finish(session: Session, task: Doc, apply_to: Path | None, *, yes: bool) -> None:
    changes = importlib.import_module(CHANGES)
    patch: str = changes.fetch_patch(session, task)
    applied: list[str] = []
    if not session.as_json:
        _report(session, task, patch)
    if patch and apply_to is not None and task.get("state") == "succeeded":
        applied = list(changes.apply_task(session, task, apply_to, yes=yes))
        session.aside(f"applied to {apply_to}: {', '.join(applied)}" if applied else "not applied")
    elif not patch and task.get("workspace"):
        session.aside("the task changed nothing")
    elif patch:
        session.aside(f"nothing was applied; to do so: mycoswarmctl apply {task['id']} --workspace DIR")
    if session.as_json:
        session.record({"task": task, "patch": patch, "applied": applied})


def _report(session: Session, task: Doc, patch: str) -> None:
    if task.get("summary"):
        print()
        session.text(task["summary"])
    if patch:
        print()
        print(session.paint.patch(patch), end="" if patch.endswith("\n") else "\n")
    if task.get("state") != "succeeded":
        sys.stdout.flush()
        why = f": {line(task['message'])}" if task.get("message") else ""
        print(
            f"{session.alert('red', line(task.get('state')))} ({line(task.get('code', ''))}){why}",
            file=sys.stderr,
        )
