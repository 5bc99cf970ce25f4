"""A machine without a daemon: its owner's commands ask the nodes over the network."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.swarm.lab import Host, wait_until

_UNREACHED = 4  # what a command ends with where it reached nobody


class Laptop:
    """A person in front of one of the small machines."""

    def __init__(self, host: Host, home: Path) -> None:
        self.host = host
        self.home = home

    def ctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = (f"HOME={self.home}", f"XDG_DATA_HOME={self.home}", f"XDG_RUNTIME_DIR={self.home}")
        # As any person but root: root's daemon would be looked for in /run.
        socket = ("MYCOSWARM_SOCKET=",)
        return subprocess.run(
            [
                *self.host.prefix,
                "env",
                *env,
                *socket,
                sys.executable,
                "-m",
                "mycoswarmd.ctl.main",
                *arguments,
            ],
            capture_output=True,
            text=True,
            timeout=300,
        )

    def ok(self, *arguments: str) -> dict[str, Any]:
        """Ask until somebody is reached: on a machine that is busy a person, too, has to try again."""
        ran = wait_until(lambda: self.answered(*arguments, "--json"))
        assert ran is not None
        assert ran.returncode == 0, (ran.stdout, ran.stderr)
        value = json.loads(ran.stdout)
        assert isinstance(value, dict)
        return value

    def answered(self, *arguments: str) -> subprocess.CompletedProcess[str] | None:
        """Return what was answered, or None where nobody was reached."""
        ran = self.ctl(*arguments)
        return None if ran.returncode == _UNREACHED or "no-swarm-found" in ran.stdout else ran
