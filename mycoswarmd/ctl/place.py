"""Where the node is that a command talks to: a socket here, or as an operator a member of the swarm.

A socket: --socket, --state, $MYCOSWARM_SOCKET, then the defaults of root or of XDG, which are those of the
daemon's own settings; a test compares them. Who runs no node of their own gets the machine's. A member:
--node or $MYCOSWARM_NODE; without either, where there is no daemon and this person is enrolled as an
operator, whichever member is nearest.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from mycoswarmd.errors import BadRequest

# What an operator's directory has in it once a swarm has admitted the operator.
ROSTER_FILE = "roster.json"
_PROBE_S = 1.0
# Of the node that belongs to the machine; the policy decides what each user may do with it.
SYSTEM_SOCKET = Path("/run/mycoswarm/api.sock")
# Where a package or `service install` puts the unit of that node.
UNIT_FILES = tuple(Path(f"/{place}/systemd/system/mycoswarmd.service") for place in ("etc", "usr/lib", "lib"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where to go.

    Attributes:
        socket: of the daemon on this machine, whether it is there or not.
        is_remote: the node is reached over the network, as an operator.
        node: which one: a name, an id or HOST:PORT; "" is the nearest.
    """

    socket: Path
    is_remote: bool = False
    node: str = ""


def find_place(socket_path: Path | None, state: Path | None, node: str | None) -> Place:
    """Decide where this run goes; nothing is sent."""
    path = find_socket(socket_path, state)
    is_told = socket_path is not None or state is not None
    if node and is_told:
        raise BadRequest("bad-option", "cannot use both --node and a socket", hint="give one of them")
    if node is not None and not node.strip():  # such as "$BOX" where it is unset
        raise BadRequest(
            "bad-option", "cannot use an empty name for --node", hint="leave it out, or name one"
        )
    named = node or ("" if is_told else os.environ.get("MYCOSWARM_NODE", ""))
    if named:
        return Place(socket=path, is_remote=True, node=named)
    may_be_alone = not (is_told or os.environ.get("MYCOSWARM_SOCKET"))
    is_operator = may_be_alone and (operator_dir() / ROSTER_FILE).exists()
    return Place(socket=path, is_remote=is_operator and not _listens(path))


def _listens(path: Path) -> bool:
    """Tell whether there is a daemon; a socket that one left behind is none, one that is forbidden may be."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:
            return True
    return True


def operator_dir() -> Path:
    """Return where this person's key and roster are, where they are an operator."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "mycoswarm" / "operator"


def find_socket(socket_path: Path | None, state: Path | None) -> Path:
    """Return the path of the API socket; nothing is touched."""
    if socket_path is not None:
        return socket_path
    if state is not None:
        return state / "run" / "api.sock"
    if named := os.environ.get("MYCOSWARM_SOCKET"):
        return Path(named)
    own = _runtime_dir() / "api.sock"
    is_of_machine = SYSTEM_SOCKET.exists() or has_service()
    return SYSTEM_SOCKET if is_of_machine and not own.exists() else own


def has_service() -> bool:
    """Tell whether the node of this machine is a service; it need not run."""
    return any(path.exists() for path in UNIT_FILES)


def engine_command() -> str:
    """Return the command that gives the node of this machine an engine: a service's needs root."""
    return f"{'sudo ' if has_service() else ''}mycoswarmctl engine install"


def _runtime_dir() -> Path:
    if os.geteuid() == 0:
        return SYSTEM_SOCKET.parent
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "mycoswarm"
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "mycoswarm" / "run"
