"""mycoswarmd: the command that runs a node.

Heavy modules are loaded by the command that needs them, so that --help answers at once.
"""

import importlib
import sys
from pathlib import Path

from mycoswarmd import __version__
from mycoswarmd.ctl.plain import make_app, typer
from mycoswarmd.errors import MycoswarmError

app = make_app("Run a node: the policy decides where prompts go and what agents may do.")

_STATE = typer.Option(None, "--state", metavar="DIR", help="Keep everything under DIR, the socket too.")
_CONFIG = typer.Option(
    None, "--config", metavar="FILE", help="Settings; default /etc/mycoswarm/mycoswarm.toml."
)
_POLICY = typer.Option(None, "--policy", metavar="FILE", help="Policy; default /etc/mycoswarm/policy.toml.")
_LISTEN = typer.Option(
    None, "--listen", metavar="HOST:PORT", help="Loopback address for programs with an API key."
)
_SWARM = typer.Option(
    None, "--swarm-listen", metavar="HOST:PORT", help="Address for the swarm; default [::]:7437; or none."
)
_NO_LISTEN = typer.Option(False, "--no-listen", help="Serve on the unix socket only.")
_LOG = typer.Option("info", "--log-level", metavar="LEVEL", help="debug, info, warning or error.")


@app.command()
def run(
    state: Path = _STATE,
    config: Path = _CONFIG,
    policy: Path = _POLICY,
    listen: str = _LISTEN,
    no_listen: bool = _NO_LISTEN,
    swarm_listen: str = _SWARM,
    log_level: str = _LOG,
) -> None:
    """Run a node in the foreground until it is told to stop (SIGTERM, Ctrl-C); SIGHUP reloads the policy."""
    serve = importlib.import_module("mycoswarmd.daemon.serve")
    serve.run_forever(
        state=state,
        config=config,
        policy=policy,
        listen="none" if no_listen else listen,
        swarm_listen=swarm_listen,
        log_level=log_level,
    )


@app.command()
def check(
    state: Path = _STATE, config: Path = _CONFIG, policy: Path = _POLICY, listen: str = _LISTEN
) -> None:
    """Check the settings and the policy and print what would be used; change nothing."""
    serve = importlib.import_module("mycoswarmd.daemon.serve")
    print(serve.check(state=state, config=config, policy=policy, listen=listen))


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def main() -> None:
    """Run the command line; a deliberate error is one line on stderr, never a traceback."""
    try:
        app()
    except MycoswarmError as exc:
        print(f"mycoswarmd: {exc}", file=sys.stderr)
        sys.exit(exc.exit_code)


if __name__ == "__main__":
    main()
