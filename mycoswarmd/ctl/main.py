"""mycoswarmctl: the command. A client of the daemon's socket; --help loads nothing that it does not need."""

import importlib
import sys
from pathlib import Path

from mycoswarmd.ctl import ask, node, run, tasks
from mycoswarmd.ctl.audit import audit_app
from mycoswarmd.ctl.keys import keys_app
from mycoswarmd.ctl.plain import examples, make_app, typer
from mycoswarmd.ctl.policy import policy_app
from mycoswarmd.ctl.session import Session, drop_stdout

_HELP = """Ask models, give tasks to agents and look after a mycoswarm node.

The options below stand before the command, all others after it.

Exit codes: 0 ok, 1 failed, 2 usage, 3 denied by the policy, 4 cannot reach the daemon."""
_ENGINE_HELP = "Install an engine and a small model."


def make_ctl(argv: list[str]) -> typer.Typer:
    """Build the application; the installer is loaded only when the command line names it."""
    app = make_app(
        _HELP,
        epilog=examples('mycoswarmctl ask "why is the sky blue?"', "mycoswarmctl run --help"),
        completes=True,
    )
    app.callback(invoke_without_command=False)(_start)
    app.command("ask", epilog=ask.ASK_EXAMPLES)(ask.ask)
    app.command("run", epilog=run.RUN_EXAMPLES)(run.run)
    app.command("submit", epilog=run.SUBMIT_EXAMPLES)(run.submit)
    app.command("tasks", epilog=tasks.TASKS_EXAMPLES)(tasks.tasks)
    app.command("task", epilog=tasks.TASK_EXAMPLES)(tasks.task)
    app.command("logs", epilog=tasks.LOGS_EXAMPLES)(tasks.logs)
    app.command("apply", epilog=tasks.APPLY_EXAMPLES)(tasks.apply)
    app.command("cancel")(tasks.cancel)
    app.command("retry")(tasks.retry)
    app.command("approvals")(tasks.approvals)
    app.command("approve", epilog=tasks.APPROVE_EXAMPLES)(tasks.approve)
    app.command("status", epilog=node.STATUS_EXAMPLES)(node.status)
    app.command("models", epilog=node.MODELS_EXAMPLES)(node.models)
    app.command("doctor")(node.doctor)
    app.command("version")(node.version)
    app.add_typer(policy_app, name="policy")
    app.add_typer(audit_app, name="audit")
    app.add_typer(keys_app, name="keys")
    app.add_typer(_engine_app(argv), name="engine", help=_ENGINE_HELP)
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
) -> None:
    ctx.obj = Session(socket, state)


def _engine_app(argv: list[str]) -> typer.Typer:
    if _first_word(argv[1:]) != "engine":
        return make_app(_ENGINE_HELP)
    app: typer.Typer = importlib.import_module("mycoswarmd.ctl.engine_install").engine_app
    return app


def _first_word(arguments: list[str]) -> str:
    """Return the command: the first word that is no option and no option's value."""
    is_value = False
    for word in arguments:
        if not is_value and not word.startswith("-"):
            return word
        is_value = word in {"--socket", "--state"}
    return ""


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a C locale cannot print every answer
    try:
        make_ctl(sys.argv)(prog_name="mycoswarmctl")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        drop_stdout()
        sys.exit(141)


if __name__ == "__main__":
    main()
