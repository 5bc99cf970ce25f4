"""Commands about the node itself: status, models, doctor, version."""

import sys
import time

from mycoswarmd import __version__
from mycoswarmd.ctl.plain import examples, typer
from mycoswarmd.ctl.refusals import Doc
from mycoswarmd.ctl.screen import count, line, size, span
from mycoswarmd.ctl.session import JSON, Session, begin, guarded
from mycoswarmd.errors import Unreachable

_COLOURS = {"green": "green", "yellow": "yellow", "red": "red"}
_EVERY_S = 1.0
# Erase the screen and go to its top left corner (ECMA-48: ED 2, CUP).
_CLEAR = "\x1b[2J\x1b[H"

STATUS_EXAMPLES = examples("mycoswarmctl status", "mycoswarmctl status --json | jq .state")
MODELS_EXAMPLES = examples("mycoswarmctl models", "mycoswarmctl models --json | jq -r '.models[].name'")


@guarded
def status(
    ctx: typer.Context,
    watch: bool = typer.Option(False, "--watch", "-w", help="Show it again every second until Ctrl-C."),
    security: bool = typer.Option(False, "--security", help="Also show what the kernel enforces here."),
    as_json: bool = JSON,
) -> None:
    """Show how the node is.

    Policy, engines, tasks, receipts, sandbox.
    """
    session = begin(ctx, as_json=as_json)
    has_answered = False
    while True:
        try:
            answer = session.client.get("/api/status")
        except Unreachable as exc:
            if not has_answered:  # after an answer it is a restart: whoever watches wants to see it come back
                raise
            session.aside(exc.message)
            time.sleep(_EVERY_S)
            continue
        has_answered = watch
        if watch and as_json:
            session.record(answer)
        elif as_json:
            session.document(answer)
        else:
            if watch and sys.stdout.isatty():
                print(_CLEAR, end="")
            _status(session, answer, security=security)
            sys.stdout.flush()
        if not watch:
            return
        time.sleep(_EVERY_S)


@guarded
def models(ctx: typer.Context, as_json: bool = JSON) -> None:
    """List models and where prompts to them go."""
    session = begin(ctx, as_json=as_json)
    answer = session.client.get("/api/models")
    if as_json:
        session.document(answer)
        return
    rows = [
        (
            row.get("name"),
            row.get("zone"),
            row.get("dest") or row.get("engine"),
            row.get("context_tokens"),
            ",".join(row.get("kinds") or []),
            "native" if row.get("native_tools") else "schema",
            "yes" if row.get("loaded") else "no",
            size(row.get("size_bytes")),
        )
        for row in answer.get("models", [])
    ]
    headers = ("NAME", "ZONE", "VIA", "CONTEXT", "KINDS", "TOOLS", "LOADED", "SIZE")
    session.table(headers, rows, empty="no models; `mycoswarmctl engine install` brings a small one")


@guarded
def doctor(ctx: typer.Context, as_json: bool = JSON) -> None:
    """Check this machine and the node.

    Says what is missing or weak and how to mend it; exit 1 when something fails.
    """
    session = begin(ctx, as_json=as_json)
    answer = session.client.get("/api/doctor")
    checks = answer.get("checks", [])
    if as_json:
        session.document(answer)
    else:
        marks = {"ok": ("green", "ok  "), "warn": ("yellow", "warn"), "fail": ("red", "fail")}
        for check in checks:
            colour, word = marks.get(str(check.get("severity")), ("red", "?   "))
            head = f"{session.paint(colour, word)}  {line(check.get('name'))}"
            print(f"{head}: {line(check.get('detail', ''))}")
            if check.get("fix") and check.get("severity") != "ok":
                print(f"      {session.paint('dim', 'fix: ' + line(check['fix']))}")
    if any(check.get("severity") == "fail" for check in checks):
        raise typer.Exit(1)


@guarded
def version(ctx: typer.Context, as_json: bool = JSON) -> None:
    """Print versions.

    That of this command, and that of the node when it runs.
    """
    session = begin(ctx, as_json=as_json)
    try:
        node = str(session.client.get("/api/status").get("version", "")) or None
    except Unreachable:
        node = None
    if as_json:
        session.document({"mycoswarmctl": __version__, "mycoswarmd": node})
    else:
        session.text(f"mycoswarmctl {__version__}" + (f"\nmycoswarmd {node}" if node else ""))


def _status(session: Session, answer: Doc, *, security: bool) -> None:
    state = str(answer.get("state", "unknown"))
    name = f"{line(answer.get('node', '?'))} {line(answer.get('version', ''))}"
    print(f"{session.paint(_COLOURS.get(state, 'red'), '● ' + line(state))}  {session.paint('bold', name)}")
    for problem in answer.get("problems") or []:
        print(f"  {session.paint('yellow', '!')} {line(problem)}")
    policy = answer.get("policy") or {}
    rules = count(policy.get("rules") or 0, "rule")
    proved = count(policy.get("invariants_proved") or 0, "invariant")
    tasks = answer.get("tasks") or {}
    receipts = answer.get("receipts") or {}
    host = answer.get("host") or {}
    gpus = ", ".join(f"{gpu.get('name')} {size(gpu.get('memory_bytes'))}" for gpu in host.get("gpus") or [])
    session.fields(
        [
            ("up", f"{span(answer.get('uptime_s'))} (pid {answer.get('pid')})"),
            ("host", f"{host.get('hostname')}, {host.get('cpus')} cpus, {size(host.get('memory_bytes'))}"),
            ("gpu", gpus),
            ("policy", f"{policy.get('name')}: {rules}, {proved} proved"),
            ("", policy.get("path")),
            ("problem", policy.get("problem")),
            ("tasks", ", ".join(f"{number} {key}" for key, number in tasks.items() if number) or "none"),
            ("receipts", f"{receipts.get('count')}, head {receipts.get('head')}"),
            ("sandbox", (answer.get("sandbox") or {}).get("level")),
            ("listens", ", ".join(map(str, answer.get("listeners") or []))),
        ]
    )
    for engine in answer.get("engines") or []:
        _engine(session, engine)
    if security:
        for fact in (answer.get("sandbox") or {}).get("facts") or []:
            mark = session.paint("green", "✓") if fact.get("ok") else session.paint("yellow", "✗")
            hint = f" ({line(fact['hint'])})" if fact.get("hint") and not fact.get("ok") else ""
            print(f"  {mark} {line(fact.get('name'))}: {line(fact.get('detail', ''))}{hint}")


def _engine(session: Session, engine: Doc) -> None:
    state = str(engine.get("state"))
    colour = {"ready": "green", "starting": "yellow"}.get(state, "red")
    counts = f"{count(engine.get('models') or 0, 'model')}, {engine.get('running', 0)} running"
    counts += f", {engine['waiting']} waiting" if engine.get("waiting") else ""
    detail = f"  {line(engine['detail'])}" if engine.get("detail") else ""
    print(f"engine {line(engine.get('name'))}: {session.paint(colour, line(state))}, {line(counts)}{detail}")
