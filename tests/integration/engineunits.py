"""What PID 1 does for mycoswarm-engine@.service, without confinement: a program for each connection."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

PROGRAM = [sys.executable, "-I", "-m", "mycoswarmd.outposts.engine"]


class Manager:
    """Accepts connections and starts a program for each, as Accept=yes does."""

    def __init__(self, path: Path, argv: list[str]) -> None:
        self.path = path
        self.programs: list[subprocess.Popen[bytes]] = []
        self._argv = argv

    async def run(self) -> None:
        """Accept until cancelled."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.path))
            listener.listen()
            listener.setblocking(False)
            while True:
                connection, _ = await asyncio.get_running_loop().sock_accept(listener)
                with connection:
                    connection.setblocking(True)
                    self.programs.append(
                        subprocess.Popen(self._command(), stdin=connection.fileno(), env={"LANG": "C.UTF-8"})
                    )

    def _command(self) -> list[str]:
        """Return the command of one more unit, with a directory of its own for its socket."""
        argv = list(self._argv)
        if "--sockets" in argv:
            at = argv.index("--sockets") + 1
            own = Path(argv[at]) / f"{len(self.programs)}-1-0"
            own.mkdir()
            argv[at] = str(own)
        return argv

    def end(self) -> None:
        """End and collect what is left."""
        for program in self.programs:
            with suppress(ProcessLookupError):
                os.kill(program.pid, signal.SIGKILL)
            program.wait()


@asynccontextmanager
async def manager(path: Path, *arguments: str, program: list[str] | None = None) -> AsyncIterator[Manager]:
    """Listen at a path; each connection gets a program of its own."""
    one = Manager(path, [*(program or PROGRAM), *arguments])
    async with asyncio.TaskGroup() as group:
        task = group.create_task(one.run(), name="manager")
        while not path.exists():
            await asyncio.sleep(0.001)
        try:
            yield one
        finally:
            task.cancel()
            one.end()
