"""`mycoswarmctl invite`: a code that lets one newcomer in, and the person who watches it happen.

Law: the code is shown once and kept nowhere. What a newcomer is admitted as was fixed when the code was
made; the person at --confirm only says yes or no to the key that came with it.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence

from mycoswarmd.core.names import check_name
from mycoswarmd.ctl.client import segment
from mycoswarmd.ctl.members import fetch
from mycoswarmd.ctl.plain import examples, typer
from mycoswarmd.ctl.refusals import Doc
from mycoswarmd.ctl.run import parse_seconds
from mycoswarmd.ctl.screen import line, span
from mycoswarmd.ctl.session import JSON, Session, begin, guarded
from mycoswarmd.errors import BadRequest, Conflict, Denied, NotFound

_EVERY_S = 0.5
_TTL_S = (10, 24 * 3600)
_CLEAR_LINE = "\r\x1b[K"
_ENDINGS = {
    "expired": Conflict("invite-expired", "cannot wait longer: the invitation has expired"),
    "cancelled": Conflict("invite-cancelled", "cannot wait longer: the invitation was cancelled"),
    "burnt": Conflict(
        "invite-burnt",
        "cannot wait longer: somebody tried wrong codes against the invitation, so it is void",
        hint="make a new one; if those were not your typing errors, somebody on this network is guessing",
    ),
}

INVITE_EXAMPLES = examples(
    "mycoswarmctl invite --name kitchen-pi",
    "mycoswarmctl invite --operator --ttl 5m --confirm",
    "mycoswarmctl invite --no-wait --json | jq -r .code",
)


@guarded
def invite(
    ctx: typer.Context,
    name: str = typer.Option(None, "--name", metavar="NAME", help="Name of the newcomer. Default: its own."),
    operator: bool = typer.Option(False, "--operator", help="Invite a person's laptop instead of a node."),
    ttl: str = typer.Option("15m", "--ttl", metavar="TIME", help="How long the code is good."),
    confirm: bool = typer.Option(False, "--confirm", help="Ask here before the newcomer is let in."),
    wait: bool = typer.Option(
        None, "--wait/--no-wait", help="Wait until somebody joined. Default: yes at a terminal."
    ),
    show_list: bool = typer.Option(False, "--list", help="List the invitations instead."),
    cancel: str = typer.Option(None, "--cancel", metavar="ID", help="Cancel an invitation instead."),
    as_json: bool = JSON,
) -> None:
    """Make a code that lets one newcomer in.

    Only a node that may sign can do it. The code works once; type it on the newcomer, after
    `mycoswarmctl enroll`.
    """
    session = begin(ctx, as_json=as_json)
    if _does_other(session, cancel, shows=show_list):
        return
    waits = _waits(session, wait, confirm=confirm)
    if confirm and not (waits and session.is_interactive()):
        raise BadRequest(
            "cannot-ask",
            "cannot ask you to confirm: nobody is at a terminal to answer",
            hint="leave out --confirm, or run it at a terminal without --no-wait",
        )
    if name is not None:
        check_name(name, "the newcomer")
    role = "operator" if operator else "node"
    body = {"role": role, "name": name or "", "ttl_s": _ttl(ttl), "confirm": confirm}
    made = session.local.post("/api/swarm/invites", body)
    if as_json:
        session.record(made)
    else:
        _show(session, made, role)
        if made.get("is_taken"):
            session.aside(
                f"the name {name} is taken: the newcomer will be {name}-2, or the next that is free"
            )
    if waits:
        _wait(session, made)


def _does_other(session: Session, cancel: str | None, *, shows: bool) -> bool:
    if shows and cancel is not None:
        raise BadRequest("bad-option", "cannot both list and cancel", hint="say one of them")
    if shows:
        _list(session)
    elif cancel is not None:
        _cancel(session, cancel)
    return shows or cancel is not None


def _waits(session: Session, wait: bool | None, *, confirm: bool) -> bool:
    return wait if wait is not None else confirm or session.is_interactive()


def _ttl(text: str) -> int:
    ttl_s = parse_seconds(text)
    if not _TTL_S[0] <= ttl_s <= _TTL_S[1]:
        raise BadRequest("bad-time", f"cannot make a code that is good for {text}", hint="from 10s to 24h")
    return ttl_s


def _show(session: Session, made: Doc, role: str) -> None:
    print()
    print(f"    {session.paint('bold', line(made.get('code')))}")
    print()
    command = "mycoswarmctl enroll --operator" if role == "operator" else f"{_sudo()}mycoswarmctl enroll"
    where = "on the laptop" if role == "operator" else "on the new node"
    print(f"good once, for {span(made.get('expires_in_s'))}. {where}, type: {command}", flush=True)


def _sudo() -> str:
    """Return what goes before a command to a node, if the newcomer is installed as this one is."""
    return "sudo " if os.geteuid() == 0 else ""


def _list(session: Session) -> None:
    answer = fetch(session, here=True)
    rows = answer.get("invites") or []
    if session.as_json:
        session.document({"invites": rows})
        return
    shown = [
        (
            row.get("invite"),
            row.get("role"),
            row.get("name") or "(its own)",
            "waits for your yes or no" if row.get("pending") else row.get("state"),
            span(row.get("expires_in_s")) if row.get("state") == "open" else "",
        )
        for row in rows
    ]
    session.table(("ID", "ROLE", "NAME", "STATE", "TIME LEFT"), shown, empty="no invitations")


def _cancel(session: Session, invite_id: str) -> None:
    # Whoever pastes the whole code means the invitation; the secret part of it is not sent anywhere.
    short = invite_id.strip().upper()[:4]
    if len(short) < 4:
        raise BadRequest(
            "bad-id", f"cannot cancel {invite_id!r}: no id", hint="see `mycoswarmctl invite --list`"
        )
    answer = session.local.delete(f"/api/swarm/invites/{segment(short)}")
    if session.as_json:
        session.document(answer)
    else:
        session.aside(f"invitation {short} is cancelled")


def _wait(session: Session, made: Doc) -> None:
    invite_id = str(made.get("invite"))
    asked: set[str] = set()
    before: set[str] | None = None
    shows = sys.stderr.isatty() and not session.as_json
    for answer, row in _polled(session, invite_id):
        pending = row.get("pending")
        ids = {str(one.get("id")) for one in answer.get("nodes") or []}
        before = ids if before is None else before
        if isinstance(pending, dict) and str(pending.get("id")) not in asked:
            asked.add(str(pending.get("id")))
            _erase(shows=shows)
            _decide(session, invite_id, pending)
        elif row.get("state") == "used":
            _erase(shows=shows)
            _joined(
                session,
                invite_id,
                [one for one in answer.get("nodes") or [] if str(one.get("id")) in ids - before],
            )
            return
        elif (ending := _ENDINGS.get(str(row.get("state")))) is not None:
            _erase(shows=shows)
            raise ending
        elif shows:
            left = span(row.get("expires_in_s"))
            print(
                f"{_CLEAR_LINE}waiting for the newcomer, {left} left (Ctrl-C: stop waiting)",
                end="",
                file=sys.stderr,
            )
            sys.stderr.flush()
        time.sleep(_EVERY_S)


def _polled(session: Session, invite_id: str) -> Iterator[tuple[Doc, Doc]]:
    while True:
        answer = fetch(session, here=True)
        rows = [row for row in answer.get("invites") or [] if row.get("invite") == invite_id]
        if not rows:
            raise NotFound(
                "unknown-invite", f"cannot wait longer: there is no invitation {invite_id} any more"
            )
        yield answer, rows[0]


def _decide(session: Session, invite_id: str, pending: Doc) -> None:
    print(f"\n{line(pending.get('name'))}  {line(pending.get('id'))}")
    print(f"its six words: {session.paint('bold', line(pending.get('words')))}")
    is_yes = session.confirm("does the newcomer show the same words, and may it join?")
    path = f"/api/swarm/invites/{segment(invite_id)}"
    session.local.post(path, {"decision": "yes" if is_yes else "no"})
    if not is_yes:
        with contextlib.suppress(Conflict, NotFound):  # somebody else has the code: it must not go on working
            session.local.delete(path)
        raise Denied("not-confirmed", "cannot let the newcomer in: you said no", hint="the code is void")


def _joined(session: Session, invite_id: str, newcomers: Sequence[Doc]) -> None:
    if session.as_json:
        session.record({"invite": invite_id, "state": "used", "joined": newcomers})
        return
    names = " and ".join(f"{line(one.get('name'))}, {line(one.get('id'))}" for one in newcomers)
    session.aside(f"joined: {names}" if names else "somebody has joined; `mycoswarmctl nodes` shows who")


def _erase(*, shows: bool) -> None:
    if shows:
        print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)
