"""One run of one command: where the daemon is, how to print, and how errors become exit codes.

Law: standard output carries results only; what is said about them goes to standard error. With --json,
standard output is one JSON document, or one a line where there are many.

Exit codes (design section 7): 0 ok, 1 failed, 2 usage, 3 denied, 4 cannot reach the daemon; 130 after
Ctrl-C and 141 after a closed pipe, as shells have them.
"""

import functools
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec

from mycoswarmd.ctl.client import Client, segment
from mycoswarmd.ctl.place import find_place
from mycoswarmd.ctl.plain import quick_imports, typer
from mycoswarmd.ctl.refusals import Doc
from mycoswarmd.ctl.screen import Paint, clean, columns, line, terminal_width, wants_colour
from mycoswarmd.errors import BadRequest, Denied, MycoswarmError, NotFound, PolicyInvalid

P = ParamSpec("P")

JSON = typer.Option(False, "--json", help="Print JSON instead of text for people.")


class Session:
    """What every command needs; made by the first callback, found in typer's context."""

    def __init__(self, socket: Path | None, state: Path | None, node: str | None = None) -> None:
        self.as_json = False
        self._place = find_place(socket, state, node)
        self.paint = Paint(is_on=wants_colour(sys.stdout))
        self.alert = Paint(is_on=wants_colour(sys.stderr))

    @property
    def is_remote(self) -> bool:
        """Whether the node that this run is about is reached over the network."""
        return self._place.is_remote

    def stay_here(self) -> None:
        """Raise BadRequest where another node was named, for what is done only on the machine itself."""
        if self._place.node:
            raise BadRequest(
                "not-from-afar",
                f"cannot do this from here to {self._place.node!r}: only on the node itself",
                hint="log in there, or leave out --node (and $MYCOSWARM_NODE)",
            )

    @functools.cached_property
    def local(self) -> Client:
        """The daemon of this machine, for what can be done only there; BadRequest with --node."""
        self.stay_here()
        return Client(self._place.socket)

    @functools.cached_property
    def client(self) -> Client:
        """The node that this run is about: the daemon here, or as an operator another one."""
        if not self._place.is_remote:
            return self.local
        # It brings TLS and cryptography, which no command on the node itself needs.
        with quick_imports():
            remote = importlib.import_module("mycoswarmd.ctl.tlshttp")
        return Client(remote.open_remote(self._place.node, self.aside))

    def close(self) -> None:
        """End the connection that a command has used, if it has used one."""
        if isinstance(used := self.__dict__.get("client"), Client):
            used.close()

    def document(self, value: object) -> None:
        """Print one JSON document. ASCII only, so that it too is safe on a terminal."""
        print(json.dumps(value, indent=2))

    def record(self, value: object) -> None:
        """Print one line of a JSON stream, at once."""
        print(json.dumps(value), flush=True)

    def text(self, value: object = "") -> None:
        """Print text from outside, escaped."""
        print(clean(value))

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str) -> None:
        """Print rows in columns, or one line on stderr when there are none."""
        if not rows:
            self.aside(empty)
            return
        print(columns(headers, rows, width=terminal_width(sys.stdout)))

    def fields(self, pairs: Sequence[tuple[str, object]]) -> None:
        """Print names and values; None and empty values are left out."""
        shown = [(name, value) for name, value in pairs if value not in (None, "", [], {})]
        width = max((len(name) for name, _ in shown), default=0)
        for name, value in shown:
            print(f"{self.paint('dim', name.ljust(width))}  {line(value)}")

    def aside(self, value: object) -> None:
        """Say something on stderr that is no part of the result; nothing with --json."""
        if not self.as_json:
            sys.stdout.flush()
            print(clean(value), file=sys.stderr, flush=True)

    def is_interactive(self) -> bool:
        """Tell whether a person can be asked."""
        return sys.stdin.isatty() and sys.stderr.isatty() and not self.as_json

    def confirm(self, question: str) -> bool:
        """Ask a person; anything but yes is no. What is asked about was printed before."""
        sys.stdout.flush()
        print(f"{clean(question)} [y/N] ", end="", file=sys.stderr, flush=True)
        answer = sys.stdin.readline()
        return answer.strip().lower() in {"y", "yes"}

    def fail(self, exc: MycoswarmError) -> None:
        """Print an error: on stdout as JSON with --json, else on stderr for a person."""
        if self.as_json:
            self.record({"error": error_document(exc)})
            return
        sys.stdout.flush()
        print(error_text(exc, self.alert), file=sys.stderr)

    def task_id(self, given: str) -> str:
        """Complete the beginning of a task's id; NotFound, or BadRequest when it fits several."""
        try:
            return str(self.client.get(f"/api/tasks/{segment(given)}")["task"]["id"])
        except NotFound as exc:
            listed = self.client.get("/api/tasks", limit=1000).get("tasks", [])
            starts = (given, f"t-{given}")  # the sign of a task may be left out
            found = [str(task["id"]) for task in listed if given and str(task["id"]).startswith(starts)]
            if not found:
                exc.hint = exc.hint or "`mycoswarmctl tasks` lists them"
                raise
        if len(found) > 1:
            shown = ", ".join(found[:3])
            raise BadRequest("ambiguous-id", f"cannot tell which task {given!r} is", hint=f"it fits {shown}")
        return found[0]


def error_document(exc: MycoswarmError) -> Doc:
    """Return an error as programs read it."""
    error: Doc = {"code": exc.code, "message": exc.message, "hint": exc.hint, "exit_code": exc.exit_code}
    if exc.receipt:
        error["receipt"] = exc.receipt
    if isinstance(exc, Denied):
        error |= {"rule": exc.rule, "where": exc.where}
    if isinstance(exc, PolicyInvalid):
        rows = [{"path": p.path, "line": p.line, "message": p.message, "hint": p.hint} for p in exc.problems]
        error["problems"] = rows
    return error


def error_text(exc: MycoswarmError, paint: Paint) -> str:
    """Return an error as a person reads it: what, by which rule, what to do."""
    if isinstance(exc, PolicyInvalid) and exc.problems:
        count = len(exc.problems)
        head = f"cannot use the policy: {count} problem{'s' if count > 1 else ''}"
        lines = [f"{paint('red', 'error:')} {head}", *(f"  {clean(problem)}" for problem in exc.problems)]
    else:
        kind = "denied:" if isinstance(exc, Denied) else "error:"
        lines = [f"{paint('red', kind)} {clean(exc.message)} ({line(exc.code)})"]
    if isinstance(exc, Denied) and exc.rule and not isinstance(exc, PolicyInvalid):
        lines.append(f"  rule: {line(exc.rule)}" + (f" at {line(exc.where)}" if exc.where else ""))
    if exc.receipt:
        lines.append(f"  receipt: {line(exc.receipt)}")
    if exc.hint:
        lines.append(f"  hint: {clean(exc.hint)}")
    return "\n".join(lines)


def begin(ctx: typer.Context, *, as_json: bool) -> Session:
    """Return the session of this run."""
    session = ctx.find_root().obj
    assert isinstance(session, Session)
    session.as_json = as_json
    return session


def guarded(function: Callable[P, None]) -> Callable[P, None]:
    """Turn a command's errors into messages and exit codes. The command's first argument is `ctx`."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        ctx: Any = kwargs["ctx"]
        session = ctx.find_root().obj
        try:
            function(*args, **kwargs)
            sys.stdout.flush()
        except MycoswarmError as exc:
            session.fail(exc)
            raise typer.Exit(exc.exit_code) from exc
        except KeyboardInterrupt as exc:
            raise typer.Exit(128 + signal.SIGINT) from exc
        except BrokenPipeError as exc:
            drop_stdout()
            raise typer.Exit(128 + signal.SIGPIPE) from exc
        finally:
            session.close()

    return run


def drop_stdout() -> None:
    """Send the rest of the output nowhere, so that the interpreter's last flush says nothing."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
