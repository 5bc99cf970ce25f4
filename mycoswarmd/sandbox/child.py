"""Child processes: the one place where any is started.

A child gets a fresh environment and no descriptor but those it is given. Its end is seen through a pidfd,
so that no thread and no signal handler is needed, and no number can be confused with a later process.

How a confined child ends: bubblewrap's init is the first process of its pid namespace, so the kernel
ends all others with it, and its pidfd becomes readable only when they are gone. It dies with bubblewrap,
and bubblewrap with the daemon, also when that is killed.
"""

import asyncio
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from mycoswarmd.errors import CageNotUp

# How long bubblewrap has to name its init or to collect it: a millisecond, once it gets a processor.
COLLECT_S = 10.0


class Child:
    """One started process; whoever starts it must await `wait` or `kill`.

    Attributes:
        pid: the number of the process that was started, bubblewrap's own for a confined child.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
        stderr: int = subprocess.DEVNULL,
        keep_fds: Sequence[int] = (),
        info_fd: int | None = None,
        identity: tuple[int, int] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it; as another uid and gid and with no groups when `identity` says so.

        `info_fd` is the reading end of what bubblewrap writes to its --info-fd; it is closed with the child.
        """
        uid, gid = identity or (None, None)
        try:
            self._process = subprocess.Popen(
                list(argv),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=tuple(keep_fds),
                env=dict(environment or {}),
                cwd="/",
                user=uid,
                group=gid,
                extra_groups=None if identity is None else [],
                start_new_session=True,  # a Ctrl-C in the terminal is the daemon's, not its children's
            )
        except OSError as exc:
            raise CageNotUp("cage-setup", f"cannot start {argv[0]!r}: {exc.strerror}") from exc
        self.pid = self._process.pid
        self._pidfd: int | None = os.pidfd_open(self.pid)
        self._info_fd = info_fd
        self._init_pidfd: int | None = None

    async def wait(self) -> int:
        """Wait for the end of the started process and return its code, negative for a signal."""
        if self._process.returncode is None:
            assert self._pidfd is not None
            await wait_readable(self._pidfd)
            self._process.wait()
        return self._process.returncode

    async def kill(self) -> int:
        """Kill it with all that is confined with it, wait until all are gone, and return its code.

        A cancelled caller is told so afterwards: to leave earlier would leave a zombie, and the kernel needs
        milliseconds.
        """
        cancelled: asyncio.CancelledError | None = None
        code: int | None = None
        while code is None:
            try:
                await self._meet_init()
                self.send_kill()
                code = await self._wait_all()
            except asyncio.CancelledError as exc:
                cancelled = exc
        self._release()
        if cancelled is not None:
            raise cancelled
        return code

    def send_kill(self) -> None:
        """Send SIGKILL to what is confined, or where nothing is, to the child's group, without waiting."""
        self._find_init()
        if self._init_pidfd is None:
            self._kill_group()
            return
        # bubblewrap itself is left to collect its init, or that would stay a zombie until somebody else does.
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._init_pidfd, signal.SIGKILL)

    async def _wait_all(self) -> int:
        if self._init_pidfd is not None:
            await wait_readable(self._init_pidfd)
            with suppress(TimeoutError):
                async with asyncio.timeout(COLLECT_S):
                    return await self.wait()
            self._kill_group()
        return await self.wait()

    def _kill_group(self) -> None:
        # Until it is collected its number cannot be another's, and it leads a group of that number.
        if self._process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)

    async def _meet_init(self) -> None:
        """Wait until bubblewrap has told of its init: killed before, it could leave one that waits for it."""
        self._find_init()
        if self._info_fd is not None and self._init_pidfd is None and self._process.poll() is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(COLLECT_S):
                    await wait_readable(self._info_fd)

    def _find_init(self) -> None:
        """Learn the first process of the confined, as soon as bubblewrap has told it."""
        if self._info_fd is None or self._init_pidfd is not None:
            return
        with suppress(BlockingIOError):
            self._init_pidfd = open_init(os.read(self._info_fd, 4096))

    def _release(self) -> None:
        for fd in (self._pidfd, self._info_fd, self._init_pidfd):
            if fd is not None:
                os.close(fd)
        self._pidfd = self._info_fd = self._init_pidfd = None


def open_init(untrusted_info: bytes) -> int | None:
    """Return a pidfd of the process that bubblewrap's --info-fd names; None where there is none any more.

    The document arrives in several writes, of which the first names the process: it may be cut off here.
    """
    found = re.search(rb'"child-pid": ([0-9]{1,9})', untrusted_info)
    if found is None:
        return None
    try:
        return os.pidfd_open(int(found[1]))
    except ProcessLookupError:
        return None


def describe_end(code: int) -> str:
    """Say how a process ended, for a person."""
    if code >= 0:
        return f"exited with {code}"
    with suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


def is_executable(path: str) -> bool:
    """Tell whether a program is there and may be run."""
    return Path(path).is_file() and os.access(path, os.X_OK)


def ends_well(argv: Sequence[str], *, identity: tuple[int, int] | None = None, within_s: float) -> str:
    """Run a short program; return "" when it exits with 0 in time, otherwise its last words."""
    uid, gid = identity or (None, None)
    try:
        done = subprocess.run(
            list(argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={},
            cwd="/",
            user=uid,
            group=gid,
            extra_groups=None if identity is None else [],
            timeout=within_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return str(exc)
    words = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
    return "" if done.returncode == 0 else words or describe_end(done.returncode)


async def wait_readable(fd: int) -> None:
    """Wait until a descriptor can be read, as a pidfd can at the end; several may wait for the same."""
    loop = asyncio.get_running_loop()
    # An own descriptor for each waiter: the loop keeps one reader for a number.
    watched = os.dup(fd)
    ended: asyncio.Future[None] = loop.create_future()

    def end() -> None:
        if not ended.done():
            ended.set_result(None)

    loop.add_reader(watched, end)
    try:
        await ended
    finally:
        loop.remove_reader(watched)
        os.close(watched)
