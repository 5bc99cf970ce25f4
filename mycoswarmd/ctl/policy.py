"""`mycoswarmctl policy`: check, test and prove a file here; explain, show and reload through the node."""

import importlib
from pathlib import Path

from mycoswarmd.ctl.plain import examples, make_app, typer
from mycoswarmd.ctl.refusals import Doc
from mycoswarmd.ctl.screen import count, line
from mycoswarmd.ctl.session import JSON, Session, begin, guarded
from mycoswarmd.errors import BadRequest, Denied, Unreachable

policy_app = make_app("Check, test, prove, explain, show and reload the policy.")

# core.types.Action, which only the reader loads.
ACTIONS = ("infer", "tool", "task", "admin")
_FALLBACK = Path("/etc/mycoswarm/policy.toml")
_FILE = typer.Argument(None, metavar="[FILE]", help="A policy file. Default: the node's.")
# Loaded only here: reading a policy needs modules that no other command needs.
_READER = "mycoswarmd.ctl.policyfile"


@policy_app.command(
    "check", epilog=examples("mycoswarmctl policy check", "mycoswarmctl policy check ./policy.toml --json")
)
@guarded
def check(ctx: typer.Context, file: Path = _FILE, as_json: bool = JSON) -> None:
    """Check a file as the node would.

    Syntax, names, tests and proofs; changes nothing. Exit 1 when anything is wrong.
    """
    session = begin(ctx, as_json=as_json)
    report: Doc = importlib.import_module(_READER).check(*_source(session, file))
    if as_json:
        session.document(report)
        return
    for warning in report["warnings"]:
        session.aside(f"warning: {warning['text']}")
    passed, proved = count(len(report["tests"]), "test"), count(len(report["proofs"]), "invariant")
    counts = f"{count(report['rules'], 'rule')}, {passed} passed, {proved} proved"
    print(f"{session.paint('green', 'valid')}: policy {line(report['name'])}: {counts}")


@policy_app.command("test", epilog=examples("mycoswarmctl policy test ./policy.toml"))
@guarded
def run_tests(ctx: typer.Context, file: Path = _FILE, as_json: bool = JSON) -> None:
    """Run the [[test]] cases of a file.

    Exit 1 when one fails.
    """
    session = begin(ctx, as_json=as_json)
    report: Doc = importlib.import_module(_READER).run_cases(*_source(session, file))
    if as_json:
        session.document(report)
    else:
        for row in report["tests"]:
            mark = session.paint("green", "pass") if row["ok"] else session.paint("red", "FAIL")
            said = "" if row["ok"] else f": expected {line(row['expected'])}, got {line(row['actual'])}"
            print(f"{mark}  {line(row['name'])}{said}")
        passed = sum(row["ok"] for row in report["tests"])
        session.aside(f"{passed} of {len(report['tests'])} passed")
    if not report["ok"]:
        raise typer.Exit(1)


@policy_app.command("prove", epilog=examples("mycoswarmctl policy prove ./policy.toml"))
@guarded
def prove(ctx: typer.Context, file: Path = _FILE, as_json: bool = JSON) -> None:
    """Prove the invariants of a file.

    Over all requests; or print the request that breaks one, and exit 1.
    """
    session = begin(ctx, as_json=as_json)
    report: Doc = importlib.import_module(_READER).prove_all(*_source(session, file))
    if as_json:
        session.document(report)
    else:
        for row in report["proofs"]:
            print(_verdict(session, row))
    if not report["ok"]:
        raise typer.Exit(1)


@policy_app.command(
    "explain",
    epilog=examples(
        "mycoswarmctl policy explain --action infer --model gpt-4o --label private",
        "mycoswarmctl policy explain --action infer --zone cloud --dest bigcloud --label public",
        "mycoswarmctl policy explain --action tool --tool run --agent coder --tainted",
    ),
)
@guarded
def explain(
    ctx: typer.Context,
    action: str = typer.Option(
        ..., "--action", metavar="ACTION", help=f"{', '.join(ACTIONS[:-1])} or {ACTIONS[-1]}."
    ),
    label: str = typer.Option(None, "--label", metavar="LABEL", help="Default: the policy's default."),
    model: str = typer.Option(None, "--model", metavar="NAME", help="Name of the model asked for."),
    origin: str = typer.Option(None, "--origin", metavar="NAME", help="Who asks. Default: you."),
    start: str = typer.Option(None, "--from", metavar="START", help="local or peer. Default: local."),
    zone: str = typer.Option(
        None, "--zone", metavar="ZONE", help="self, lan or cloud; without one, infer shows every candidate."
    ),
    dest: str = typer.Option(None, "--dest", metavar="NAME", help="A declared destination, or web:HOST."),
    tool: str = typer.Option(None, "--tool", metavar="NAME", help="Which tool."),
    agent: str = typer.Option(None, "--agent", metavar="NAME", help="Whose task, or which agent it is for."),
    tainted: bool = typer.Option(False, "--tainted", help="After untrusted input was taken in."),
    as_json: bool = JSON,
) -> None:
    """Say what would be decided, and why.

    By which rule, and what each other rule lacked; for infer without a zone, for each engine. Does nothing.
    """
    session = begin(ctx, as_json=as_json)
    if action not in ACTIONS:
        raise BadRequest("bad-action", f"cannot explain {action!r}", hint=f"one of {', '.join(ACTIONS)}")
    given = {
        "action": action,
        "label": label,
        "model": model,
        "origin": origin,
        "from": start,
        "zone": zone,
        "dest": dest,
        "tool": tool,
        "agent": agent,
        "tainted": tainted or None,
    }
    body = {key: value for key, value in given.items() if value is not None}
    answer = session.client.post("/api/policy/explain", body)
    if as_json:
        session.document(answer)
    else:
        _explanation(session, answer, f"{model} in zone {zone}" if zone else str(model))


@policy_app.command("show")
@guarded
def show(ctx: typer.Context, as_json: bool = JSON) -> None:
    """Print the policy in force on the node."""
    session = begin(ctx, as_json=as_json)
    answer = session.client.get("/api/policy")
    if as_json:
        session.document(answer)
        return
    session.aside(f"# {answer.get('path') or 'no file'} (sha256 {str(answer.get('sha256', ''))[:12]})")
    if answer.get("problem"):
        session.aside(f"# problem: {answer['problem']}")
    session.text(str(answer.get("text", "")).rstrip("\n"))


@policy_app.command("reload")
@guarded
def reload(ctx: typer.Context, as_json: bool = JSON) -> None:
    """Have the node read its file again.

    Prints the requests that are now decided differently. A bad file is refused and the old policy kept.
    """
    session = begin(ctx, as_json=as_json)
    answer = session.client.post("/api/policy/reload")
    if as_json:
        session.document(answer)
        return
    for warning in answer.get("warnings") or []:
        session.aside(f"warning: {warning}")
    for change in answer.get("changed") or []:
        session.text(change)
    session.aside(f"in force: sha256 {str(answer.get('sha256', ''))[:12]}")
    if not answer.get("changed"):
        session.aside("no decision changed")


def _verdict(session: Session, row: Doc) -> str:
    name, points = line(row["invariant"]), f"{row['points']:,}"
    if row["holds"]:
        return f"{session.paint('green', 'proved')}  {name}: over {points} kinds of request"
    if row["too_large"]:
        return f"{session.paint('red', 'TOO LARGE')}  {name}: {points} kinds of request, more than are tried"
    found = f"rule {line(row['rule'])} opens {line(row['counterexample'])}"
    return f"{session.paint('red', 'BROKEN')}  {name}: {found}"


def _source(session: Session, file: Path | None) -> tuple[Path, str | None]:
    """Return the file to read; where there is none, also the text that the node has in force instead."""
    if file is not None:
        return file, None
    try:
        answer = session.client.get("/api/policy")
    except (Unreachable, Denied):
        return _FALLBACK, None
    path = Path(str(answer.get("path") or _FALLBACK))
    text = answer.get("text")
    return (path, None) if path.exists() or not isinstance(text, str) else (path, text)


def _explanation(session: Session, answer: Doc, model: str) -> None:
    is_served = answer.get("served") is not False
    if not is_served:  # first of all: an "allow" that comes to nothing would mislead
        print(f"No node serves {line(model)} now: a prompt for it fails, whatever the policy says.")
    rows = answer.get("candidates") or []
    if rows:
        keys = ("node", "engine", "model", "zone", "decision", "rule", "why")
        cells = [[row.get(key) for key in keys] for row in rows]
        session.table([key.upper() for key in keys], cells, empty="")
    if not is_served:
        print(f"\nThe policy itself{', of zone self' if 'candidates' in answer else ''}:")
    elif rows:
        print("\nFor the first of them:")
    decision = str(answer.get("decision", ""))
    colour = {"allow": "green", "ask": "yellow"}.get(decision, "red")
    where = f" ({line(answer['where'])})" if answer.get("where") else ""
    print(f"{session.paint(colour, line(decision))} by rule {line(answer.get('rule', ''))}{where}")
    if answer.get("why"):
        print(f"  {line(answer['why'])}")
    for row in answer.get("lacking") or []:
        missing = "; ".join(line(part) for part in row.get("missing") or [])
        name = session.paint("dim", line(row.get("rule")))
        print(f"  {name} ({line(row.get('effect'))}) lacked: {missing}")
