"""`mycoswarmctl audit`: the chain of receipts, read and verified."""

import json
import time

from mycoswarmd.ctl.client import segment
from mycoswarmd.ctl.plain import examples, make_app, typer
from mycoswarmd.ctl.refusals import Doc
from mycoswarmd.ctl.screen import clip, count, line
from mycoswarmd.ctl.session import JSON, Session, begin, guarded
from mycoswarmd.ctl.tasks import at

audit_app = make_app("Read and verify the receipts of decisions.")

_EVERY_S = 0.5
_WIDE = 160
# What a glance needs first; the rest follows as it comes.
_FIRST = ("decision", "action", "tool", "agent", "model", "zone", "dest", "label", "rule", "by", "task")


@audit_app.command(
    "tail", epilog=examples("mycoswarmctl audit tail -n 50", "mycoswarmctl audit tail -f --json | jq .body")
)
@guarded
def tail(
    ctx: typer.Context,
    is_following: bool = typer.Option(False, "--follow", "-f", help="Go on as records come, until Ctrl-C."),
    last: int = typer.Option(20, "--last", "-n", min=1, max=1000, metavar="N", help="Begin with the last N."),
    as_json: bool = typer.Option(False, "--json", help="Print each record as one line of JSON."),
) -> None:
    """Print the newest receipts, oldest first."""
    session = begin(ctx, as_json=as_json)
    after = 0
    for row in session.client.get("/api/receipts", last=last).get("receipts", []):
        after = int(row["seq"])
        _show(session, row)
    while is_following:
        rows = session.client.get("/api/receipts", after=after, limit=1000).get("receipts", [])
        for row in rows:
            after = int(row["seq"])
            _show(session, row)
        if not rows:
            time.sleep(_EVERY_S)


@audit_app.command("show", epilog=examples("mycoswarmctl audit show 42-9f8e7d6c"))
@guarded
def show(
    ctx: typer.Context,
    receipt_id: str = typer.Argument(..., metavar="ID", help="A receipt's id (SEQ-HASH) or number."),
    as_json: bool = JSON,
) -> None:
    """Show one receipt whole."""
    session = begin(ctx, as_json=as_json)
    row = session.client.get(f"/api/receipts/{segment(receipt_id)}")
    if as_json:
        session.document(row)
        return
    names = ("id", "seq", "kind", "prev_sha256", "sha256")
    session.fields([("at", at(row.get("at_ms"))), *((name, row.get(name)) for name in names)])
    body = row.get("body")
    pairs = body.items() if isinstance(body, dict) else ()
    session.fields([(line(key), _text(value)) for key, value in pairs])


@audit_app.command(
    "verify", epilog=examples("mycoswarmctl audit verify", "mycoswarmctl audit verify --head 42-9f8e7d6c")
)
@guarded
def verify(
    ctx: typer.Context,
    head: str = typer.Option(
        None, "--head", metavar="ID", help="A head kept elsewhere that must still be in the chain."
    ),
    as_json: bool = JSON,
) -> None:
    """Verify the whole chain.

    Exit 1 when a record was changed, removed or swapped.

    A chain cut off at its end is found only against a head that was kept elsewhere: see `audit head`.
    """
    session = begin(ctx, as_json=as_json)
    answer = session.client.post("/api/receipts/verify", {"head": head} if head else {})
    is_good = answer.get("ok") is True
    if as_json:
        session.document(answer)
    elif is_good:
        how_many = count(int(answer.get("count") or 0), "receipt")
        print(f"{session.paint('green', 'verified')}: {how_many}, chain unbroken")
    else:
        where = f" at record {line(answer['bad_seq'])}" if answer.get("bad_seq") is not None else ""
        print(f"{session.paint('red', 'BROKEN')}{where}: {line(answer.get('reason', ''))}")
    if not is_good:
        raise typer.Exit(1)


@audit_app.command("head", epilog=examples("mycoswarmctl audit head | ssh backup 'cat >> heads'"))
@guarded
def head(ctx: typer.Context, as_json: bool = JSON) -> None:
    """Print the newest id and hash.

    Kept elsewhere, it shows later whether the end of the chain was cut off.
    """
    session = begin(ctx, as_json=as_json)
    answer = session.client.get("/api/receipts/head")
    if as_json:
        session.document(answer)
    else:
        print(f"{line(answer.get('id'))} {line(answer.get('sha256'))}")


def _show(session: Session, row: Doc) -> None:
    if session.as_json:
        session.record(row)
        return
    body = row.get("body")
    body = body if isinstance(body, dict) else {}
    keys = [*(key for key in _FIRST if key in body), *(key for key in body if key not in _FIRST)]
    facts = " ".join(f"{key}={_text(body[key])}" for key in keys if body[key] not in (None, "", [], {}))
    head = f"{at(row.get('at_ms'))}  {line(row.get('id'))}  {line(row.get('kind', ''))}"
    print(f"{session.paint('dim', head)}  {clip(facts, _WIDE)}", flush=True)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
