"""mycoswarmctl: the command. A client of the daemon's socket; --help loads nothing that it does not need."""

import importlib
import sys
from pathlib import Path

from mycoswarmd.ctl import ask, backup, enroll, found, invite, members, node, run, tasks
from mycoswarmd.ctl.audit import audit_app
from mycoswarmd.ctl.keys import keys_app
from mycoswarmd.ctl.plain import examples, make_app, typer
from mycoswarmd.ctl.policy import policy_app
from mycoswarmd.ctl.screen import Paint
from mycoswarmd.ctl.session import Session, drop_stdout, error_text
from mycoswarmd.errors import MycoswarmError

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
    app.command("init", epilog=found.INIT_EXAMPLES)(found.init)
    app.command("invite", epilog=invite.INVITE_EXAMPLES)(invite.invite)
    app.command("enroll", epilog=enroll.ENROLL_EXAMPLES)(enroll.enroll)
    app.add_typer(members.nodes_app, name="nodes")
    app.command("revoke", epilog=members.REVOKE_EXAMPLES)(members.revoke)
    app.add_typer(members.signers_app, name="signers")
    app.command("leave")(members.leave)
    app.command("rekey")(members.rekey)
    app.command("recover", epilog=found.RECOVER_EXAMPLES)(found.recover)
    app.command("backup", epilog=backup.BACKUP_EXAMPLES)(backup.backup)
    app.command("restore", epilog=backup.RESTORE_EXAMPLES)(backup.restore)
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
        print(error_text(exc, Paint(is_on=False)), file=sys.stderr)
        raise typer.Exit(exc.exit_code) from exc


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
        is_value = word in {"--socket", "--state", "--node"}
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
