"""`mycoswarmctl enroll`: bring this node, or this person's laptop, into a swarm with a code."""

import getpass
import importlib
import os
import platform
import re
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from mycoswarmd.core.names import MAX_NAME_CHARS, check_name
from mycoswarmd.ctl.members import SHORT_ID
from mycoswarmd.ctl.plain import examples, typer
from mycoswarmd.ctl.refusals import Doc
from mycoswarmd.ctl.screen import line
from mycoswarmd.ctl.session import JSON, Session, begin, guarded
from mycoswarmd.errors import BadRequest, ConfigError, Conflict, MycoswarmError

# What reads codes, and what holds an operator's key: hashing and cryptography, which --help does without.
_CODES = "mycoswarmd.core.enrol"
_JOINING = "mycoswarmd.ctl.joining"
_FINDING = "mycoswarmd.ctl.finding"
_TRIES = 3
_MAX_CODE_BYTES = 4096
# The person at the inviting node has two minutes for a yes or no, and may be slow to begin.
_JOIN_S = 240.0

ENROLL_EXAMPLES = examples(
    "mycoswarmctl enroll",
    "mycoswarmctl enroll 79D96-8QGKT-TQ75Z-9H5C1-5 --address 10.0.0.7",
    "mycoswarmctl enroll --operator --name anna",
)


@guarded
def enroll(
    ctx: typer.Context,
    code: str = typer.Argument(
        None, metavar="[CODE]", help="What `invite` printed. Asked for when left out."
    ),
    address: list[str] = typer.Option(
        [], "--address", metavar="HOST[:PORT]", help="Where the inviting node is; may be given again."
    ),
    name: str = typer.Option(
        None, "--name", metavar="NAME", help="What to be called. Default: the host name."
    ),
    token_file: Path = typer.Option(None, "--token-file", metavar="FILE", help="Read the code from a file."),
    operator: bool = typer.Option(
        False, "--operator", help="Enrol yourself, at this computer, instead of a node; needs no daemon."
    ),
    as_json: bool = JSON,
) -> None:
    """Join a swarm with a code.

    The inviting node is found by its announcement on the network, or at --address. Each side proves that
    it knows the code before anything else is said, so nobody in between can join in its place.
    """
    session = begin(ctx, as_json=as_json)
    if name is not None:
        check_name(name, "you" if operator else "this node")
    text = _code(session, code, token_file)
    finding = importlib.import_module(_FINDING)
    addresses = [found for given in address for found in finding.resolve(given)]
    if operator:
        joined: Doc = importlib.import_module(_JOINING).join(session, text, addresses, name or own_name())
    else:
        joined = _join_node(session, text, [finding.show(one) for one in addresses], name)
    if as_json:
        session.document(joined)
        return
    who = "you are" if operator else "this node is"
    session.text(f"joined swarm {line(joined.get('swarm'))}")
    session.text(f"{who} {line(joined.get('name'))}, {line(joined.get('id'))}")
    rows = [
        (
            str(row.get("id", ""))[:SHORT_ID],
            row.get("name"),
            f"{row.get('role')}{', signer' if row.get('signer') else ''}",
        )
        for row in joined.get("nodes") or []
    ]
    session.table(("ID", "NAME", "ROLE"), rows, empty="no other members")
    if not operator:
        session.aside(
            "as far as the policy allows it, other nodes may answer prompts of this one from now on:"
        )
        session.aside("  mycoswarmctl policy show")


def own_name() -> str:
    """Return what an operator is called when nobody said: the account and the host name."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without an account
        user = "operator"
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{user}-{platform.node().split('.')[0]}").strip("-._")
    return words[:MAX_NAME_CHARS] or "operator"


def _join_node(session: Session, code: str, addresses: Sequence[str], name: str | None) -> Doc:
    body = {"code": code, "addresses": list(addresses)} | ({"name": name} if name else {})
    _check_free(session.local.get("/api/swarm"))
    try:
        return session.local.post(
            "/api/swarm/enroll", body, timeout_s=_JOIN_S, on_wait=lambda: _words(session)
        )
    except KeyboardInterrupt:
        session.aside("\nthe node itself goes on trying, for up to three minutes; if it joins after all:")
        session.aside("  mycoswarmctl leave")
        raise


def _check_free(known: Doc) -> None:
    """Refuse a node that is in a swarm, or was put out of one, before anybody waits for anything."""
    if found := known.get("swarm"):
        is_member = any(row.get("self") for row in known.get("nodes") or [])
        standing = "is in" if is_member else "was put out of"
        raise Conflict(
            "already-in-swarm",
            f"cannot join: this node {standing} swarm {found.get('name')!r}",
            hint="mycoswarmctl leave first",
        )


def _words(session: Session) -> None:
    try:
        own = session.local.get("/api/swarm").get("self") or {}
    except MycoswarmError:
        own = {}
    if own.get("id"):
        words = importlib.import_module(_CODES).six_words(str(own["id"]))
        session.aside(f"the six words of this node: {words}")
    session.aside("waiting for the inviting node; somebody may have to say yes there")


def _code(session: Session, given: str | None, token_file: Path | None) -> str:
    """Return the code as it is spelled out; typing errors are found here, and nothing is sent."""
    codes = importlib.import_module(_CODES)
    if given is not None and token_file is not None:
        raise BadRequest("bad-option", "cannot use both a code and --token-file", hint="give one of them")
    if token_file is not None:
        given = _read_token(token_file)
    if given is not None:
        return str(codes.format_code(codes.parse_code(given)))
    for left in reversed(range(_TRIES if session.is_interactive() else 1)):
        if session.is_interactive():
            print("code: ", end="", file=sys.stderr, flush=True)
        untrusted = sys.stdin.readline(_MAX_CODE_BYTES)
        if not untrusted.strip():
            break
        try:
            return str(codes.format_code(codes.parse_code(untrusted)))
        except BadRequest as exc:
            if left == 0:
                raise
            session.aside(exc.message)
    raise BadRequest(
        "no-code", "cannot join without a code", hint="`mycoswarmctl invite` on a member prints one"
    )


def _read_token(path: Path) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ConfigError("token-unreadable", f"cannot read a code from {str(path)!r}: not a file")
            untrusted = file.read(_MAX_CODE_BYTES)
    except OSError as exc:
        raise ConfigError(
            "token-unreadable", f"cannot read a code from {str(path)!r}: {exc.strerror}"
        ) from exc
    return untrusted.decode("utf-8", "replace").strip()
