"""mycoswarmd: the command that runs a node.

Heavy modules are loaded by the command that needs them, so that --help answers at once. The client has typer;
this process lives for months, on small machines too, and typer would be 5 MB of it.
"""

import argparse
import importlib
import sys
from pathlib import Path

from mycoswarmd import __version__
from mycoswarmd.errors import MycoswarmError

_RUN = "Run a node in the foreground until it is told to stop (SIGTERM, Ctrl-C); SIGHUP reloads the policy."
_CHECK = "Check the settings and the policy and print what would be used; change nothing."


def make_parser() -> argparse.ArgumentParser:
    """Make the command line."""
    parser = argparse.ArgumentParser(
        "mycoswarmd",
        description="Run a node: the policy decides where prompts go and what agents may do.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    both = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    both.add_argument("--state", type=Path, metavar="DIR", help="keep everything under DIR, the socket too")
    both.add_argument(
        "--config", type=Path, metavar="FILE", help="settings; default /etc/mycoswarm/mycoswarm.toml"
    )
    both.add_argument(
        "--policy", type=Path, metavar="FILE", help="policy; default /etc/mycoswarm/policy.toml"
    )
    both.add_argument("--listen", metavar="HOST:PORT", help="loopback address for programs with an API key")
    both.add_argument(
        "--appliance", action="store_true", help="be what mycoswarmd.service runs, inside systemd's units"
    )
    run = commands.add_parser("run", help=_RUN, description=_RUN, parents=[both], allow_abbrev=False)
    run.add_argument("--no-listen", action="store_true", help="serve on the unix socket only")
    run.add_argument(
        "--swarm-listen", metavar="HOST:PORT", help="address for the swarm; default [::]:7437; or none"
    )
    # For tests: where the sockets of the units are, in place of /run.
    run.add_argument("--outposts", type=Path, help=argparse.SUPPRESS)
    run.add_argument(
        "--log-level", metavar="LEVEL", default="info", help="debug, info (the default), warning or error"
    )
    check = commands.add_parser("check", help=_CHECK, description=_CHECK, parents=[both], allow_abbrev=False)
    check.add_argument("--quiet", action="store_true", help="print only what is wrong")
    check.add_argument(
        "--policy-only", action="store_true", help="check what a reload reads; settings are no failure"
    )
    version = "Print the version."
    commands.add_parser("version", help=version, description=version, allow_abbrev=False)
    return parser


def main() -> None:
    """Run the command line; a deliberate error is one line on stderr, never a traceback."""
    parser = make_parser()
    if len(sys.argv) == 1:
        parser.print_help()
        sys.exit(2)
    given = parser.parse_args()
    try:
        _carry_out(given)
    except MycoswarmError as exc:
        print(f"mycoswarmd: {exc}", file=sys.stderr)
        sys.exit(exc.exit_code)


def _carry_out(given: argparse.Namespace) -> None:
    if given.command == "version":
        print(__version__)
        return
    serve = importlib.import_module("mycoswarmd.daemon.serve")
    if given.command == "check":
        text = serve.check(
            state=given.state,
            config=given.config,
            policy=given.policy,
            listen=given.listen,
            appliance=given.appliance,
            policy_only=given.policy_only,
        )
        if not given.quiet:
            print(text)
        return
    serve.run_forever(
        state=given.state,
        config=given.config,
        policy=given.policy,
        listen="none" if given.no_listen else given.listen,
        swarm_listen=given.swarm_listen,
        log_level=given.log_level,
        appliance=given.appliance,
        outposts=given.outposts,
    )


if __name__ == "__main__":
    main()
