"""Where the daemon listens: --socket, --state, $MYCOSWARM_SOCKET, then the defaults of root or of XDG.

The defaults are those of the daemon's own settings; a test compares them.
"""

import os
from pathlib import Path


def find_socket(socket: Path | None, state: Path | None) -> Path:
    """Return the path of the API socket; nothing is touched."""
    if socket is not None:
        return socket
    if state is not None:
        return state / "run" / "api.sock"
    if named := os.environ.get("MYCOSWARM_SOCKET"):
        return Path(named)
    return _runtime_dir() / "api.sock"


def _runtime_dir() -> Path:
    if os.geteuid() == 0:
        return Path("/run/mycoswarm")
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "mycoswarm"
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "mycoswarm" / "run"
