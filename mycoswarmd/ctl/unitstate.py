"""What systemd says of the node's service, for who has asked the node and hears nothing.

The node's socket belongs to systemd, so a connection is taken also while the node behind it cannot start.
Law: this only looks; whoever may connect may look; where systemd does not know the service, nothing is said.
Source: org.freedesktop.systemd1(5); systemctl(1).
"""

import subprocess
import time
from pathlib import Path

from mycoswarmd.ctl.place import SYSTEM_SOCKET
from mycoswarmd.errors import Unreachable

_UNIT = "mycoswarmd.service"
_SYSTEMCTL, _JOURNALCTL = "/usr/bin/systemctl", "/usr/bin/journalctl"
_ASKED = (
    *("LoadState", "ActiveState", "SubState", "Result", "NRestarts", "StatusText", "ExecMainStatus"),
    "ActiveExitTimestampMonotonic",
)
# systemd is slow to answer while a small machine boots, which is when it is asked.
_ANSWER_S = 30
_TEXT_CHARS = 600
# A node that was killed comes back in a second or two; one that is killed again and again does not. Restarts
# are counted since somebody started it, weeks maybe: they say nothing alone.
_MANY_RESTARTS, _GONE_S = 3, 5
LOOK = "systemctl status mycoswarmd; sudo journalctl -xeu mycoswarmd"


def is_service(socket: Path) -> bool:
    """Tell whether what listens at this path is systemd, for the node's service."""
    return socket == SYSTEM_SOCKET and Path("/run/systemd/system").is_dir()


def may_answer_yet() -> bool:
    """Tell whether the service is still on its way up; False: it runs, or nothing is known of it.

    Raises Unreachable where it does not come up.
    """
    state = _state()
    if state.get("LoadState") != "loaded" or state.get("ActiveState") in {"active", "reloading"}:
        return False
    if _is_failing(state):
        raise Unreachable(
            "service-failing",
            f"cannot reach the node: its service does not start: {_why(state)}",
            hint=LOOK,
        )
    return True


def stopped() -> Unreachable | None:
    """Return the error for a node whose service does not even listen; None where there is no service."""
    state = _state()
    if state.get("LoadState") == "masked":
        why, hint = "is masked", "sudo systemctl unmask mycoswarmd.service mycoswarmd.socket"
    elif state.get("LoadState") != "loaded":
        return None
    elif _is_failing(state):
        why, hint = f"does not start: {_why(state)}", LOOK
    else:
        why, hint = "is stopped", "sudo systemctl start mycoswarmd"
    return Unreachable("service-stopped", f"cannot reach the node: its service {why}", hint=hint)


def _is_failing(state: dict[str, str]) -> bool:
    if state.get("ActiveState") == "failed":
        return True
    if not state.get("SubState", "").startswith("auto-restart"):
        return False
    if state.get("Result") == "exit-code" and (_error(state) or not state.get("StatusText")):
        return True  # systemd forgets the text at each start: this one had not got so far as to say anything
    gone_s = time.monotonic() - _number(state, "ActiveExitTimestampMonotonic") / 1e6
    return _number(state, "NRestarts") >= _MANY_RESTARTS and gone_s > _GONE_S


def _why(state: dict[str, str]) -> str:
    """Return why it ended: what it told systemd, or if we may read it the end of its log, or how it ended."""
    said = _error(state)
    if not said and state.get("Result") == "exit-code":
        said = _ask(_JOURNALCTL, "--quiet", "--boot", "--output=cat", "--lines=1", f"_SYSTEMD_UNIT={_UNIT}")
    ended = f"it ended ({state.get('Result')}, status {state.get('ExecMainStatus')})"
    return " ".join(said.split())[:_TEXT_CHARS] or ended


def _error(state: dict[str, str]) -> str:
    """Return the service's last word where it is an error, and not what it said while all was well."""
    said = state.get("StatusText", "")
    return said if said.startswith("cannot ") else ""


def _number(state: dict[str, str], name: str) -> int:
    value = state.get(name, "")
    return int(value) if value.isdigit() else 0


def _state() -> dict[str, str]:
    said = _ask(_SYSTEMCTL, "show", _UNIT, f"--property={','.join(_ASKED)}")
    return {name: value for name, _, value in (line.partition("=") for line in said.splitlines())}


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603 - fixed programs and arguments
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_ANSWER_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
