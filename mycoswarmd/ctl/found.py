"""`init` and `recover`: the two commands that hold the paper key of a swarm."""

import importlib
import os
from collections.abc import Sequence

from mycoswarmd.core.names import check_name
from mycoswarmd.ctl.members import SHORT_ID, ask_first, fetch, member
from mycoswarmd.ctl.plain import examples, typer
from mycoswarmd.ctl.refusals import Doc
from mycoswarmd.ctl.screen import line
from mycoswarmd.ctl.session import JSON, Session, begin, guarded
from mycoswarmd.errors import BadRequest, Conflict, Denied, MycoswarmError

# It brings cryptography, which --help does without.
_PAPER = "mycoswarmd.ctl.paperkey"

INIT_EXAMPLES = examples(
    "mycoswarmctl init --name home", "mycoswarmctl init --name home --node-name study-pc"
)
RECOVER_EXAMPLES = examples(
    "mycoswarmctl recover --without old-server",
    "mycoswarmctl recover --restore 2f6kq7ab --without thief-pi",
    "mycoswarmctl recover --only study-pc --only kitchen-pi",
)


@guarded
def init(
    ctx: typer.Context,
    name: str = typer.Option(..., "--name", metavar="NAME", help="What the swarm is called."),
    node_name: str = typer.Option(
        None, "--node-name", metavar="NAME", help="What this node is called in it. Default: its own name."
    ),
    qr: bool = typer.Option(False, "--qr", help="Show the recovery key also as a QR code."),
    written: bool = typer.Option(
        False, "--yes-i-wrote-it-down", help="For scripts: print the key and do not ask it back."
    ),
    as_json: bool = JSON,
) -> None:
    """Begin a swarm, with this node as its first.

    A recovery key is made here and shown once, for paper: the node never sees it. It outranks everybody
    and helps when all nodes that may sign are lost or stolen.
    """
    session = begin(ctx, as_json=as_json)
    check_name(name, "the swarm")
    if node_name is not None:
        check_name(node_name, "this node")
    paper = importlib.import_module(_PAPER)
    drawer = paper.find_qr() if qr else None
    if not written and not session.is_interactive():
        raise BadRequest(
            "cannot-ask",
            "cannot ask the recovery key back: nobody is at a terminal",
            hint="say --yes-i-wrote-it-down, and keep the key that is printed",
        )
    known = session.local.get("/api/swarm")
    if found := known.get("swarm"):
        raise Conflict(
            "already-in-swarm",
            f"cannot begin a swarm: the node is in {found.get('name')!r}",
            hint="mycoswarmctl leave first",
        )
    if known.get("may_admin") is False:
        why = "the policy does not let you command this node"
        hint = "" if os.geteuid() == 0 else "if this machine is yours: use sudo"
        raise Denied("policy-denied", f"cannot begin a swarm: {why}", hint=hint)
    key = paper.make()
    if not as_json:
        paper.show(session, key, drawer)
    if not written:
        paper.ask_back(session, key)
    body = {"name": name, "recovery": key.public_hex} | ({"node_name": node_name} if node_name else {})
    try:
        answer = session.local.post("/api/swarm/init", body)
    except MycoswarmError:
        session.aside("the recovery key that was shown belongs to no swarm: throw it away")
        raise
    if as_json:
        session.document({**answer, "recovery_key": key.text})
    else:
        session.text(
            f"swarm {line(name)} has begun; this node is {line(answer.get('name'))}, {line(answer.get('id'))}"
        )
        session.aside("invite the next one with `mycoswarmctl invite`")


@guarded
def recover(
    ctx: typer.Context,
    without: list[str] = typer.Option(
        [], "--without", metavar="NODE", help="Leave this member out; may be given again."
    ),
    restore: list[str] = typer.Option(
        [], "--restore", metavar="ID", help="Take this revoked member back; may be given again."
    ),
    only: list[str] = typer.Option(
        [], "--only", metavar="NODE", help="Keep this member and leave out all others; may be given again."
    ),
    yes: bool = typer.Option(False, "--yes", "-y", help="Do not ask; the key is read from standard input."),
    as_json: bool = JSON,
) -> None:
    """Take the swarm back with the recovery key.

    This node becomes the only one that may sign; who is kept and who is dropped is shown first. The key is
    read and used here: the node never sees it.
    """
    session = begin(ctx, as_json=as_json)
    if only and without:
        raise BadRequest("bad-option", "cannot use both --only and --without", hint="give one of them")
    answer = fetch(session, here=True)
    out = _all_but(answer, only) if only else without
    drafted = session.local.post("/api/swarm/recovery/draft", {"without": out, "restore": restore})
    paper = importlib.import_module(_PAPER)
    own, swarm = answer.get("self") or {}, answer["swarm"]
    epoch = swarm.get("epoch")
    draft = paper.read_draft(
        str(drafted.get("body", "")),
        swarm_id=str(swarm.get("id")),
        epoch=epoch if isinstance(epoch, int) else 0,
        node_id=str(own.get("id")),
    )
    if not as_json:
        _show(session, answer, drafted)
        said = (
            f"signs, alone: {own.get('name') or 'this node'}, {own.get('id')}; statements kept: {draft.kept}"
        )
        session.text(f"{said}; recovery number {draft.number} of this swarm")
    ask_first(session, "take the swarm back like this?", yes=yes)
    key = paper.read(session, swarm=str(swarm.get("name")), public_hex=str(swarm.get("recovery")))
    statement = key.sign(draft)
    done = session.local.post("/api/swarm/recovery", {"statement": statement})
    if as_json:
        told = {
            "keeps": drafted.get("keeps", []),
            "drops": drafted.get("drops", []),
            "statements": draft.kept,
        }
        session.document({**done, **told})
    else:
        session.aside("done: this node alone may sign now; add another with `mycoswarmctl signers add`")


def _all_but(answer: Doc, only: Sequence[str]) -> list[str]:
    """Return the ids of all members but these and this node."""
    kept = {str(member(answer, one)["id"]) for one in only}
    rows = [row for row in answer.get("nodes") or [] if not row.get("self")]
    return [str(row["id"]) for row in rows if row["id"] not in kept]


def _show(session: Session, answer: Doc, draft: Doc) -> None:
    names = {str(row.get("id")): row.get("name") for row in answer.get("nodes") or []}
    names.setdefault(str((answer.get("self") or {}).get("id")), "this node")  # where it was put out
    for key, colour in (("keeps", "green"), ("drops", "red")):
        for node_id in map(str, draft.get(key) or []):
            name = f"{names[node_id]} ({node_id[:SHORT_ID]})" if node_id in names else node_id
            print(f"  {session.paint(colour, key)}  {line(name)}")
