"""Child processes: the one place where any is started.

A child gets a fresh environment and no descriptor but those it is given. Its end is seen through a pidfd, so that no
thread and no signal handler is needed, and no number can be confused with a later process.
"""

import asyncio
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mycoswarmd.errors import CageError


class Child:
    """One started process; whoever starts it must await `wait` or `kill`."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
        stderr: int = subprocess.DEVNULL,
        keep_fds: Sequence[int] = (),
        identity: tuple[int, int] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        """Start it, as another uid and gid and with no groups when `identity` says so."""
        uid, gid = identity or (None, None)
        try:
            self._process = subprocess.Popen(
                list(argv),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=tuple(keep_fds),
                env=environment or {},
                cwd="/",
                user=uid,
                group=gid,
                extra_groups=None if identity is None else [],
                start_new_session=True,  # a Ctrl-C in the terminal is the daemon's, not its children's
            )
            self._pidfd = os.pidfd_open(self._process.pid)
        except OSError as exc:
            raise CageError("cage-setup", f"cannot start {argv[0]!r}: {exc.strerror}") from exc

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def signal(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal; nothing happens when it has ended."""
        if self._process.returncode is None:
            self._process.send_signal(number)

    async def wait(self) -> int:
        """Wait for its end and return its code, negative for a signal."""
        if self._process.returncode is None:
            await wait_pidfd(self._pidfd)
            self._process.wait()
            os.close(self._pidfd)
        return self._process.returncode

    async def kill(self) -> int:
        """End it at once and return its code."""
        self.signal(signal.SIGKILL)
        return await self.wait()


async def wait_pidfd(pidfd: int) -> None:
    """Wait until the process of a pidfd has ended, also when several wait for the same."""
    loop = asyncio.get_running_loop()
    # An own descriptor for each waiter: the loop keeps one reader for a number.
    watched = os.dup(pidfd)
    ended: asyncio.Future[None] = loop.create_future()
    loop.add_reader(watched, lambda: ended.done() or ended.set_result(None))
    try:
        await ended
    finally:
        loop.remove_reader(watched)
        os.close(watched)


def describe_end(code: int) -> str:
    """Say how a process ended, for a person."""
    if code >= 0:
        return f"exited with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def is_executable(path: str) -> bool:
    """Tell whether a program is there and may be run."""
    return Path(path).is_file() and os.access(path, os.X_OK)
