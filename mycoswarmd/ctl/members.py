"""Commands about the members of a swarm: nodes, revoke, signers, leave, rekey.

Law: what cannot be taken back is shown first and asked about; where nobody can be asked, --yes says so.
"""

import importlib
import re
from collections.abc import Mapping, Sequence

from mycoswarmd.ctl.client import segment
from mycoswarmd.ctl.plain import examples, make_app, typer
from mycoswarmd.ctl.refusals import Doc
from mycoswarmd.ctl.screen import line, span
from mycoswarmd.ctl.session import JSON, Session, begin, guarded
from mycoswarmd.errors import BadRequest, Conflict, MycoswarmError, NotFound

# Enough of an id to know a node again; the node takes any beginning of four and more.
SHORT_ID = 8
_PINGS = 16
_PORT = ":7437"
_KEY_OR_ID = re.compile(r"[0-9a-f]{16,64}|[a-z2-7]{26}")
# It holds an operator's key, and brings cryptography.
_JOINING = "mycoswarmd.ctl.joining"

# As the node has it (flow/enrol.py); checked here too, before a person has done anything in vain.

_NODE = typer.Argument(..., metavar="NODE", help="A node's name, its id, or the beginning of its id.")
_YES = typer.Option(False, "--yes", "-y", help="Do not ask.")

NODES_EXAMPLES = examples("mycoswarmctl nodes", "mycoswarmctl nodes --json | jq -r '.nodes[].name'")
REVOKE_EXAMPLES = examples('mycoswarmctl revoke kitchen-pi --reason "stolen"')

nodes_app = make_app("List the members of the swarm, or try to reach them.")
signers_app = make_app("Say which nodes may admit and revoke others.")


@nodes_app.callback(invoke_without_command=True, no_args_is_help=False, epilog=NODES_EXAMPLES)
@guarded
def nodes(ctx: typer.Context, as_json: bool = JSON) -> None:
    """List the members of the swarm.

    Who they are, where they were last seen, and why one cannot be reached.
    """
    if ctx.invoked_subcommand is not None:
        return
    session = begin(ctx, as_json=as_json)
    answer = fetch(session)
    if as_json:
        session.document(answer)
        return
    _headline(session, answer)
    rows = answer.get("nodes") or []
    headers = ("ID", "NAME", "ROLE", "TIER", "ADDRESS", "LAST SEEN", "ROSTER", "STATE")
    session.table(headers, [_row(row) for row in rows], empty="no members")
    for gone in answer.get("revoked") or []:
        why = f": {line(gone['reason'])}" if gone.get("reason") else ""
        session.aside(f"revoked: {line(gone.get('id'))}{why}")


@nodes_app.command("ping", epilog=examples("mycoswarmctl nodes ping", "mycoswarmctl nodes ping kitchen-pi"))
@guarded
def ping(
    ctx: typer.Context,
    node: str = typer.Argument(None, metavar="[NODE]", help="A node's name or id. Default: all of them."),
    as_json: bool = JSON,
) -> None:
    """Ask nodes for a sign of life.

    Each proves its key anew; exit 1 when one does not answer.
    """
    session = begin(ctx, as_json=as_json)
    known = others(fetch(session))
    targets = [(node, node)] if node else [(str(row["name"]), str(row["id"])) for row in known]
    results = _ping_all(session, targets)
    if as_json:
        session.document({"pings": results})
    else:
        rows = [
            (row["node"], f"{row['ms']:.1f} ms" if "ms" in row else "-", row.get("address"), _why(row))
            for row in results
        ]
        session.table(("NODE", "TOOK", "ADDRESS", "STATE"), rows, empty="this node is alone in its swarm")
    if any("error" in row for row in results):
        raise typer.Exit(1)


@guarded
def revoke(
    ctx: typer.Context,
    node: str = _NODE,
    reason: str = typer.Option(
        "", "--reason", metavar="TEXT", help="Why; every member sees it, and who can reach one."
    ),
    yes: bool = _YES,
    as_json: bool = JSON,
) -> None:
    """Shut a member out of the swarm, for good.

    Every member that hears of it refuses the node at once. Its id never returns: a node that was revoked by
    mistake is invited again and gets a new one.
    """
    session = begin(ctx, as_json=as_json)
    known = fetch(session, here=True)
    row = member(known, node)
    own = known.get("self") or {}
    if own.get("signer") is False:
        raise _no_signer(known)
    if not as_json:
        session.text(f"{line(row.get('name'))}  {line(row.get('id'))}  {_role(row)}")
    if row.get("self"):
        session.aside("this is the node that you are talking to; to leave in peace: mycoswarmctl leave")
    ask_first(session, f"revoke {line(row.get('name'))} for good?", yes=yes)
    answer = session.local.post("/api/swarm/revoke", {"node": row["id"], "reason": reason})
    if as_json:
        session.document(answer)
    else:
        session.aside(f"{row.get('name')} is revoked; every member refuses it from when it hears of it")


@signers_app.callback(invoke_without_command=True, no_args_is_help=False)
@guarded
def signers(ctx: typer.Context, as_json: bool = JSON) -> None:
    """List the nodes that may admit and revoke others."""
    if ctx.invoked_subcommand is not None:
        return
    session = begin(ctx, as_json=as_json)
    rows = [row for row in fetch(session).get("nodes") or [] if row.get("signer")]
    if as_json:
        session.document({"signers": rows})
        return
    session.table(
        ("ID", "NAME", "STATE"), [(_short(r), _name(r), _state(r)) for r in rows], empty="no signers"
    )


@signers_app.command("add", epilog=examples("mycoswarmctl signers add study-pc"))
@guarded
def add_signer(ctx: typer.Context, node: str = _NODE, yes: bool = _YES, as_json: bool = JSON) -> None:
    """Let another node admit and revoke, after asking at a terminal.

    It makes a signing key of its own. Two signers are better than one: the second revokes the first when
    that is stolen.
    """
    session = begin(ctx, as_json=as_json)
    rows = fetch(session, here=True).get("nodes") or []
    if any(row.get("signer") and node in {row.get("name"), row.get("id")} for row in rows):
        raise Conflict("signer-already", f"cannot make {node!r} a signer: it is one")
    if session.is_interactive():  # in a script it is said by calling it: it can be taken back
        ask_first(session, f"shall {line(node)} admit and revoke members, too?", yes=yes)
    answer = session.local.post("/api/swarm/signers", {"node": node})
    if as_json:
        session.document(answer)
    else:
        session.aside(f"{node} may now admit and revoke members")


@signers_app.command("remove", epilog=examples("mycoswarmctl signers remove study-pc"))
@guarded
def remove_signer(ctx: typer.Context, node: str = _NODE, yes: bool = _YES, as_json: bool = JSON) -> None:
    """Take the right to admit and revoke from a node.

    Whom it admitted until now stays; what it signs from now on counts for nothing.
    """
    session = begin(ctx, as_json=as_json)
    known = fetch(session, here=True)
    if not _KEY_OR_ID.fullmatch(node):  # either may be that of a signer which is no member
        member(known, node)
    ask_first(session, f"shall {line(node)} sign no more?", yes=yes)
    answer = session.local.delete(f"/api/swarm/signers/{segment(node)}")
    if as_json:
        session.document(answer)
    else:
        session.aside(f"{node} signs no more; it is still a member")


@guarded
def leave(
    ctx: typer.Context,
    operator: bool = typer.Option(
        False, "--operator", help="Leave as the operator that you are at this computer, instead of the node."
    ),
    yes: bool = _YES,
    as_json: bool = JSON,
) -> None:
    """Take this node out of its swarm, in peace.

    The others are told, then its key and its roster are destroyed. Tasks, receipts and models stay.
    """
    session = begin(ctx, as_json=as_json)
    known: Doc = {}
    if operator:
        ask_first(session, "leave the swarm and destroy your key on this computer?", yes=yes)
        answer: Doc = importlib.import_module(_JOINING).leave(session)
    else:
        found = session.local.get("/api/swarm")
        known = found.get("self") or {}
        if found.get("swarm") or known:  # else nothing but what is left of keys can be lost
            ask_first(session, "take this node out of its swarm and destroy its key?", yes=yes)
        answer = session.local.post("/api/swarm/leave")
    if as_json:
        session.document(answer)
    else:
        session.aside("done: you left the swarm" if operator else "done: this node is in no swarm")
        if answer.get("told") == []:
            name = f" {line(known['name'])}" if known.get("name") else ""
            session.aside(f"nobody could be told: on another node, mycoswarmctl revoke{name or ' it'}")


@guarded
def rekey(ctx: typer.Context, yes: bool = _YES, as_json: bool = JSON) -> None:
    """Give this node a new key.

    It keeps its name and its place; its id changes, and the old one never returns. Other nodes need no help.
    """
    session = begin(ctx, as_json=as_json)
    ask_first(session, "replace the key of this node? its id changes", yes=yes)
    answer = session.local.post("/api/swarm/rekey")
    if as_json:
        session.document(answer)
    else:
        session.aside(f"this node is now {answer.get('id')} (it was {answer.get('old')})")


def fetch(session: Session, *, here: bool = False) -> Doc:
    """Return what the node (or the one `here`) says of its swarm; Conflict when it is in none."""
    answer = (session.local if here else session.client).get("/api/swarm")
    if not answer.get("swarm"):
        raise Conflict(
            "no-swarm",
            "cannot do this: this node is in no swarm",
            hint="mycoswarmctl init --name home begins one, mycoswarmctl enroll joins one",
        )
    return answer


def _no_signer(known: Doc) -> Conflict:
    holders = ", ".join(str(row.get("name")) for row in known.get("nodes") or [] if row.get("signer"))
    return Conflict(
        "not-a-signer",
        "cannot revoke: this node is no signer",
        hint=f"do it on {holders}" if holders else "mycoswarmctl recover, with the paper key",
    )


def others(answer: Doc) -> list[Doc]:
    """Return the nodes of the swarm but the one that answered; operators listen nowhere."""
    return [row for row in answer.get("nodes") or [] if not row.get("self") and row.get("role") != "operator"]


def member(answer: Doc, text: str) -> Doc:
    """Find a member by its name, its id or the beginning of its id; NotFound, or BadRequest for several."""
    rows: Sequence[Doc] = answer.get("nodes") or []
    found = [row for row in rows if text in {row.get("name"), row.get("id")}]
    if not found and len(text) >= 4:
        found = [row for row in rows if str(row.get("id", "")).startswith(text)]
    if len(found) == 1:
        return found[0]
    if found:
        shown = ", ".join(str(row.get("id"))[:SHORT_ID] for row in found)
        raise BadRequest("ambiguous-node", f"cannot tell which node {text!r} is", hint=f"it fits {shown}")
    if any(text and str(row.get("id", "")).startswith(text) for row in answer.get("revoked") or []):
        raise NotFound("unknown-node", f"cannot find {text!r}: it was revoked already")
    raise NotFound(
        "unknown-node", f"cannot find a member {text!r}", hint="`mycoswarmctl nodes` lists them all"
    )


def ask_first(session: Session, question: str, *, yes: bool) -> None:
    """Return when a person agrees or --yes was given; else raise, and nothing was done."""
    if yes:
        return
    if not session.is_interactive():
        raise BadRequest(
            "cannot-ask", "cannot ask whether to do this: nobody is at a terminal", hint="say --yes"
        )
    if not session.confirm(question):
        raise Conflict("not-agreed", "cannot go on: you did not say yes", hint="nothing was changed")


def _headline(session: Session, answer: Doc) -> None:
    swarm = answer.get("swarm") or {}
    age = answer.get("roster_age_s")
    heard = f"confirmed {span(age)} ago" if isinstance(age, int | float) else "not confirmed since the start"
    session.text(
        f"swarm {line(swarm.get('name'))}: roster {line(str(swarm.get('digest', ''))[:12])}, {heard}"
    )
    for problem in swarm.get("problems") or []:
        print(f"  {session.paint('yellow', '!')} {line(problem)}")


def _row(row: Doc) -> tuple[object, ...]:
    word = row.get("word") or {}
    is_here = bool(row.get("self"))
    seen = None if is_here else ago(row.get("last_seen_s"))
    roster = None if is_here else _roster(row)
    return (
        _short(row),
        _name(row),
        _role(row),
        word.get("tier"),
        _short_address(row.get("address")),
        seen,
        roster,
        _state(row),
    )


def _short_address(address: object) -> object:
    """Return where a node listens, without the port that all have."""
    is_usual = isinstance(address, str) and address.endswith(_PORT)
    return str(address).removesuffix(_PORT).strip("[]") if is_usual else address


def ago(seconds: object) -> str | None:
    """Return how long ago something was, in whole seconds at least; None for what is not known."""
    return f"{span(max(1, round(seconds)))} ago" if isinstance(seconds, int | float) else None


def _roster(row: Doc) -> str | None:
    """Tell whether a node has our roster; nothing, where it has not said which one it has."""
    verified = row.get("verified")
    if not row.get("word") or not isinstance(verified, Mapping):
        return None
    return "same" if verified.get("digest_same") else "differs"


def _short(row: Doc) -> str:
    return str(row.get("id", ""))[:SHORT_ID]


def _name(row: Doc) -> str:
    return f"{row.get('name')}{' *' if row.get('self') else ''}"


def _role(row: Doc) -> str:
    return f"{row.get('role')}{', signer' if row.get('signer') else ''}"


def _state(row: Doc) -> str:
    if row.get("self"):
        return "this node"
    if row.get("role") == "operator":
        return "a person"
    said = str(row.get("state") or "unknown")
    said += f": {row['detail']}" if row.get("detail") else ""
    return f"{said} (ALARM: {row['alarm']})" if row.get("alarm") else said


def _ping_all(session: Session, targets: Sequence[tuple[str, str]]) -> list[Doc]:
    """Ping all at once: one that is away is waited for, and not by the others."""
    if session.is_remote or len(targets) < 2:  # from afar there is one connection
        return [_ping(session, name, node_id) for name, node_id in targets]
    futures = importlib.import_module("concurrent.futures")
    with futures.ThreadPoolExecutor(min(_PINGS, len(targets))) as pool:
        return list(pool.map(lambda target: _ping(session, *target), targets))


def _ping(session: Session, node: str, node_id: str) -> Doc:
    try:
        answer = session.client.get(f"/api/swarm/nodes/{segment(node_id)}/ping")
    except MycoswarmError as exc:
        if exc.exit_code == 4:
            raise  # this node itself is not there
        return {"node": node, "error": {"code": exc.code, "message": exc.message}}
    return {"node": node, **answer}


def _why(row: Doc) -> str:
    return str(row["error"]["message"]) if "error" in row else "alive"
