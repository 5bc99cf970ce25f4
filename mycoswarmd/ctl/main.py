"""mycoswarmctl: a client of the daemon's socket. It loads what its command needs, and no more."""

import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mycoswarmd.ctl.plain import examples, make_app, quick_imports, typer
from mycoswarmd.ctl.screen import Paint
from mycoswarmd.ctl.session import Session, drop_stdout, error_document, error_text
from mycoswarmd.errors import BadRequest, MycoswarmError

_HELP = """Ask models, give tasks to agents and look after a mycoswarm node.

The options below stand before the command, all others after it.

Exit codes: 0 ok, 1 failed, 2 usage, 3 denied by the policy, 4 cannot reach the daemon."""
_ENGINE_HELP = "Install an engine and a small model."

# A shell that completes sets it, and wants to know of all commands.
_COMPLETES = "_MYCOSWARMCTL_COMPLETE"

# Each command: the module in mycoswarmd.ctl that has it, its name there, and that of its examples.
_COMMANDS = {
    "ask": ("ask", "ask", "ASK_EXAMPLES"),
    "run": ("run", "run", "RUN_EXAMPLES"),
    "submit": ("run", "submit", "SUBMIT_EXAMPLES"),
    "tasks": ("tasks", "tasks", "TASKS_EXAMPLES"),
    "task": ("tasks", "task", "TASK_EXAMPLES"),
    "logs": ("tasks", "logs", "LOGS_EXAMPLES"),
    "apply": ("tasks", "apply", "APPLY_EXAMPLES"),
    "cancel": ("tasks", "cancel", None),
    "retry": ("tasks", "retry", None),
    "approvals": ("tasks", "approvals", None),
    "approve": ("tasks", "approve", "APPROVE_EXAMPLES"),
    "status": ("node", "status", "STATUS_EXAMPLES"),
    "models": ("node", "models", "MODELS_EXAMPLES"),
    "doctor": ("doctor", "doctor", "DOCTOR_EXAMPLES"),
    "version": ("node", "version", None),
    "init": ("found", "init", "INIT_EXAMPLES"),
    "invite": ("invite", "invite", "INVITE_EXAMPLES"),
    "enroll": ("enroll", "enroll", "ENROLL_EXAMPLES"),
    "revoke": ("members", "revoke", "REVOKE_EXAMPLES"),
    "leave": ("members", "leave", None),
    "rekey": ("members", "rekey", None),
    "recover": ("found", "recover", "RECOVER_EXAMPLES"),
    "backup": ("backup", "backup", "BACKUP_EXAMPLES"),
    "restore": ("backup", "restore", "RESTORE_EXAMPLES"),
}
_GROUPS = {
    "nodes": ("members", "nodes_app"),
    "signers": ("members", "signers_app"),
    "policy": ("policy", "policy_app"),
    "audit": ("audit", "audit_app"),
    "keys": ("keys", "keys_app"),
    "service": ("service", "service_app"),
}


def make_ctl(argv: list[str], *, only_named: bool = False) -> typer.Typer:
    """Build the application; the installer is loaded only when the command line names it.

    With `only_named`, a command line that names a command gets that one alone.
    """
    app = make_app(
        _HELP,
        epilog=examples('mycoswarmctl ask "why is the sky blue?"', "mycoswarmctl run --help"),
        completes=True,
    )
    app.callback(invoke_without_command=False)(_start)
    word = _first_word(argv[1:])
    is_known = word in _COMMANDS or word in _GROUPS or word == "engine"
    named = {word} if only_named and is_known else {*_COMMANDS, *_GROUPS, "engine"}
    for name, (module, attribute, shown) in _COMMANDS.items():
        if name in named:
            code = importlib.import_module(f"mycoswarmd.ctl.{module}")
            app.command(name, epilog=getattr(code, shown) if shown else None)(getattr(code, attribute))
    for name, (module, attribute) in _GROUPS.items():
        if name in named:
            app.add_typer(getattr(importlib.import_module(f"mycoswarmd.ctl.{module}"), attribute), name=name)
    if "engine" in named:
        app.add_typer(_engine_app(word), name="engine", help=_ENGINE_HELP)
    return app


def _start(
    ctx: typer.Context,
    socket: Path = typer.Option(
        None,
        "--socket",
        metavar="PATH",
        help="The daemon's socket. Default: $MYCOSWARM_SOCKET or the usual place.",
    ),
    state: Path = typer.Option(None, "--state", metavar="DIR", help="DIR of `mycoswarmd run --state DIR`."),
    on_node: str = typer.Option(
        None,
        "--node",
        metavar="NODE",
        help="As an operator, ask this node: its name, id or HOST:PORT. Default: $MYCOSWARM_NODE.",
    ),
) -> None:
    try:
        ctx.obj = Session(socket, state, on_node)
    except MycoswarmError as exc:
        if _wants_json(sys.argv):
            print(json.dumps({"error": error_document(exc)}))
        else:
            print(error_text(exc, Paint(is_on=False)), file=sys.stderr)
        raise typer.Exit(exc.exit_code) from exc


def _engine_app(word: str) -> typer.Typer:
    if word != "engine":
        return make_app(_ENGINE_HELP)
    app: typer.Typer = importlib.import_module("mycoswarmd.ctl.engine_install").engine_app
    return app


def _first_word(arguments: list[str]) -> str:
    """Return the command: the first word that is no option and no option's value."""
    is_value = False
    for word in arguments:
        if not is_value and not word.startswith("-"):
            return word
        is_value = word in {"--socket", "--state", "--node"}
    return ""


def _check_command(word: str) -> None:
    """Exit for a word that is nearly a command; typer itself says no more than that there is none."""
    known = [*_COMMANDS, *_GROUPS, "engine"]
    if not word or word in known:
        return
    near = importlib.import_module("difflib").get_close_matches(word, known, n=1, cutoff=0.7)
    if near:
        wrong = BadRequest("bad-usage", f"cannot find a command {word!r}", hint=f"did you mean {near[0]!r}?")
        print(error_text(wrong, Paint(is_on=False)), file=sys.stderr)
        sys.exit(wrong.exit_code)


def _wants_json(argv: Sequence[str]) -> bool:
    """Tell whether the caller wants JSON, also where the command line is wrong."""
    words = argv[: argv.index("--")] if "--" in argv else argv
    return "--json" in words


def _run_for_program(app: typer.Typer) -> int:
    """Run the command line; what is wrong with it is said as JSON, as any other error."""
    # typer brings a click of its own, or uses another: the class is found by what typer hands out.
    wrong_usage: Any = typer.BadParameter.__mro__[1]
    try:
        code = app(prog_name="mycoswarmctl", standalone_mode=False)
    except wrong_usage as exc:
        said = str(exc.format_message())
        wrong = BadRequest(
            "bad-usage",
            f"cannot use this command line: {said[:1].lower()}{said[1:]}",
            hint="the command with --help says what it takes",
        )
        print(json.dumps({"error": error_document(wrong)}), flush=True)
        return wrong.exit_code
    return code if isinstance(code, int) else 0


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a C locale cannot print every answer
    try:
        with quick_imports():
            app = make_ctl(sys.argv, only_named=_COMPLETES not in os.environ)
        if _wants_json(sys.argv):
            sys.exit(_run_for_program(app))
        _check_command(_first_word(sys.argv[1:]))
        app(prog_name="mycoswarmctl")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        drop_stdout()
        sys.exit(141)


if __name__ == "__main__":
    main()
