"""Commands about the node itself: status, models, version."""

import sys
import time

from mycoswarmd import __version__
from mycoswarmd.ctl.members import ago
from mycoswarmd.ctl.place import engine_command
from mycoswarmd.ctl.plain import examples, typer
from mycoswarmd.ctl.refusals import Doc
from mycoswarmd.ctl.screen import count, line, size, span
from mycoswarmd.ctl.session import JSON, Session, begin, guarded
from mycoswarmd.errors import Denied, NotFound, Unreachable

_COLOURS = {"green": "green", "yellow": "yellow", "red": "red"}
_EVERY_S = 1.0
# Erase the screen and go to its top left corner (ECMA-48: ED 2, CUP).
_CLEAR = "\x1b[2J\x1b[H"

# As wide as the longest name that `status` has for a line, "receipts".
_LABEL = 8
_HOLDS = {True: "yes", False: "NO", None: "unknown"}

STATUS_EXAMPLES = examples("mycoswarmctl status", "mycoswarmctl status --json | jq .state")
MODELS_EXAMPLES = examples("mycoswarmctl models", "mycoswarmctl models --json | jq -r '.models[].name'")


@guarded
def status(
    ctx: typer.Context,
    watch: bool = typer.Option(False, "--watch", "-w", help="Show it again every second until Ctrl-C."),
    security: bool = typer.Option(
        False, "--security", help="Also show what each unit has proved about its confinement."
    ),
    as_json: bool = JSON,
) -> None:
    """Show how the node is.

    Policy, engines, tasks, receipts, sandbox.
    """
    session = begin(ctx, as_json=as_json)
    has_answered = False
    while True:
        try:
            answer = _whole_status(session)
            proved = _proved(session) if security else {}
        except Unreachable as exc:
            if not has_answered:  # after an answer it is a restart: whoever watches wants to see it come back
                raise
            session.aside(exc.message)
            time.sleep(_EVERY_S)
            continue
        has_answered = watch
        if watch and as_json:
            session.record(answer | proved)
        elif as_json:
            session.document(answer | proved)
        else:
            if watch and sys.stdout.isatty():
                print(_CLEAR, end="")
            _status(session, answer, security=security)
            _security(session, proved.get("security"))
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
    session.table(headers, rows, empty=f"no models; `{engine_command()}` brings a small one")


@guarded
def version(ctx: typer.Context, as_json: bool = JSON) -> None:
    """Print versions.

    That of this command, and that of the node when it runs.
    """
    session = begin(ctx, as_json=as_json)
    try:
        node = str(session.client.get("/api/status").get("version", "")) or None
    except Unreachable as exc:
        node = None
        if session.is_remote:
            session.aside(exc.message)
    if as_json:
        session.document({"mycoswarmctl": __version__, "mycoswarmd": node})
    else:
        session.text(f"mycoswarmctl {__version__}" + (f"\nmycoswarmd {node}" if node else ""))


def _whole_status(session: Session) -> Doc:
    """Return the node's status, with what it says of the members of its swarm as `swarm.members`."""
    answer = session.client.get("/api/status")
    summary = answer.get("swarm")
    if not isinstance(summary, dict):
        return answer
    try:
        known = session.client.get("/api/swarm")
    except Denied:
        return answer  # for who may not administer the node, the summary has to do
    found = known.get("swarm") or {}
    return answer | {
        "swarm": {
            **summary,
            "members": known.get("nodes") or [],
            "revoked": known.get("revoked") or [],
            "problems": found.get("problems") or [],
        }
    }


def _status(session: Session, answer: Doc, *, security: bool) -> None:
    state = str(answer.get("state", "unknown"))
    name = f"{line(_name(answer))} {line(answer.get('version', ''))}"
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
            ("tasks", ", ".join(f"{number} {key}" for key, number in tasks.items() if number) or "none"),
            ("receipts", f"{receipts.get('count')}, head {receipts.get('head')}"),
            ("sandbox", (answer.get("sandbox") or {}).get("level")),
            ("listens", ", ".join(map(str, answer.get("listeners") or []))),
        ]
    )
    for engine in answer.get("engines") or []:
        _engine(session, engine)
    if isinstance(answer.get("swarm"), dict):
        _swarm(session, answer["swarm"])
    if security:
        for fact in (answer.get("sandbox") or {}).get("facts") or []:
            mark = session.paint("green", "✓") if fact.get("ok") else session.paint("yellow", "✗")
            hint = f" ({line(fact['hint'])})" if fact.get("hint") and not fact.get("ok") else ""
            print(f"  {mark} {line(fact.get('name'))}: {line(fact.get('detail', ''))}{hint}")


def _proved(session: Session) -> Doc:
    """Return as `security` what the node's units have proved; nothing of a node that does not know."""
    try:
        return {"security": session.client.get("/v1/security")}
    except NotFound:
        return {}


def _security(session: Session, answer: object) -> None:
    if not isinstance(answer, dict):
        return
    rows = [
        (proof.get("unit"), check.get("name"), _HOLDS.get(check.get("ok"), "?"), check.get("detail", ""))
        for proof in answer.get("proofs") or []
        for check in proof.get("checks") or []
    ]
    rows += [(one.get("unit"), "", "?", one.get("problem")) for one in answer.get("unheard") or []]
    cages = answer.get("cages") or {}
    held, absent = cages.get("held") or [], cages.get("absent") or []
    said = f"{cages.get('level')}, {count(len(held), 'probe')} held" if held else cages.get("problem")
    said = f"{said}; this machine has no {', '.join(map(str, absent))}" if absent else said
    rows.append(("task", f"cages by {cages.get('by')}", "yes" if held else "?", said))
    if not answer.get("appliance"):
        session.aside("this node is not run by systemd's units, so no unit of it has proved anything")
    session.table(("UNIT", "WHAT", "HOLDS", "SEEN"), rows, empty="")


def _name(answer: Doc) -> str:
    """Return what the node is called: by its swarm, where it is in one, and by its own settings."""
    own = str(answer.get("node", "?"))
    swarm = answer.get("swarm")
    members = swarm.get("members") or [] if isinstance(swarm, dict) else []
    name = next((str(row["name"]) for row in members if row.get("self") and row.get("name")), own)
    return name if name == own else f"{name} ({own} in its settings)"


def _engine(session: Session, engine: Doc) -> None:
    state, models = str(engine.get("state")), engine.get("models") or 0
    if state == "ready" and not models:
        state = "no model"
    colour = {"ready": "green", "starting": "yellow", "no model": "yellow"}.get(state, "red")
    said = [count(models, "model")] if models else []
    said += [f"{engine.get('running', 0)} running"] if models or engine.get("running") else []
    said += [f"{engine['waiting']} waiting"] if engine.get("waiting") else []
    print(
        f"{session.paint('dim', 'engine'.ljust(_LABEL))}  {line(engine.get('name'))}: "
        f"{', '.join([session.paint(colour, line(state)), *map(line, said)])}"
    )
    if engine.get("detail"):
        print(f"{' ' * _LABEL}  {line(engine['detail'])}")


def _swarm(session: Session, swarm: Doc) -> None:
    age = swarm.get("roster_age_s")
    heard = f"confirmed {span(age)} ago" if isinstance(age, int | float) else "not confirmed since the start"
    reached = f"{swarm.get('reachable')} of {swarm.get('nodes')} nodes reached"
    print(f"swarm {session.paint('bold', line(swarm.get('name')))}: {line(reached)}, roster {heard}")
    for problem in swarm.get("problems") or []:
        print(f"  {session.paint('yellow', '!')} {line(problem)}")
    members = [row for row in swarm.get("members") or [] if row.get("role") != "operator"]
    if members:
        headers = ("NODE", "SAYS", "TIER", "SANDBOX", "MODELS", "RUNNING", "VERIFIED HERE")
        session.table(headers, [_member(row) for row in members], empty="")


def _member(row: Doc) -> tuple[object, ...]:
    """Return a row: first the node's own word, then what this node verified."""
    word = row.get("word") or {}
    models = word.get("models") or []
    loaded = sum(bool(model.get("loaded")) for model in models)
    said = (
        word.get("state"),
        word.get("tier"),
        word.get("sandbox"),
        f"{len(models)} ({loaded} loaded)" if word else None,
        f"{word.get('running', 0)}{' +' + str(word['waiting']) if word.get('waiting') else ''}"
        if word
        else None,
    )
    return (f"{row.get('name')}{' *' if row.get('self') else ''}", *said, _verified(row))


def _verified(row: Doc) -> str:
    if row.get("self"):
        return "this node"
    facts = row.get("verified") or {}
    if row.get("state") != "ready":
        seen = ago(row.get("last_seen_s"))
        said = f"{row.get('state') or 'unknown'}{': ' + str(row['detail']) if row.get('detail') else ''}"
        said += f", last seen {seen}" if seen else ""
    else:
        rtt = row.get("rtt_ms")
        took = f", {rtt:.1f} ms" if isinstance(rtt, int | float) else ""
        said = f"its key{took}" if facts.get("key") else "NOT its key"
        said += ", same roster" if facts.get("digest_same") else ", another roster"
    return f"{said}; ALARM: {row['alarm']}" if row.get("alarm") else said
