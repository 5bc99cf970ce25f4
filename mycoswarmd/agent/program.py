"""The tool that runs programs: an argv, no shell, bounded in time and output.

When a program ends, is late or is cancelled, its process group is killed, and then whoever left that
group: in a cage that is everybody else there (`sweep`).
"""

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO

from mycoswarmd.agent.confine import CHILDREN_FD
from mycoswarmd.agent.files import OUTPUT_BYTES, Outcome
from mycoswarmd.errors import CageError

# A test suite fits; what takes longer belongs outside an agent's step.
RUN_S = 120.0
_TICK_S = 0.2
_READ_BYTES = 64 << 10
# What may still be in the pipe at the end; a background child that prints on must not hold us.
_LAST_READS = 64
_FIRST_PIDS = 10
# Each generation of orphans is found when the one before it has died.
_SWEEPS = 1000
# Fresh: nothing of the daemon's or the cage's environment reaches a program.
_ENVIRONMENT: Mapping[str, str] = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "PYTHONDONTWRITEBYTECODE": "1",
    "GIT_CONFIG_NOSYSTEM": "1",
}


class Output:
    """Keeps the first and the last part of what a program prints; counts the rest."""

    def __init__(self) -> None:
        self.total = 0
        self._head = bytearray()
        self._tail = bytearray()

    def add(self, data: bytes) -> None:
        """Take more output."""
        self.total += len(data)
        room = OUTPUT_BYTES // 2 - len(self._head)
        self._head += data[:room]
        self._tail += data[max(room, 0) :]
        del self._tail[: -OUTPUT_BYTES // 2]

    def text(self) -> str:
        """Return it as text, with what was left out named."""
        left_out = self.total - len(self._head) - len(self._tail)
        middle = f"\n[{left_out} bytes left out]\n".encode() if left_out else b""
        return (bytes(self._head) + middle + bytes(self._tail)).decode("utf-8", "replace")


# Where a bare name is looked for.
_DIRECTORIES = ("/usr/bin", "/bin", "/usr/sbin")


def find_program(name: str, programs: tuple[str, ...]) -> str | None:
    """Return the allowed file that a name or path means, or None."""
    for program in programs:
        if name in {program, program.rpartition("/")[2]}:
            return program
    # The policy's programs are resolved files: "python3" there is /usr/bin/python3.11 here.
    for directory in _DIRECTORIES:
        file = os.path.join(directory, name)
        if "/" not in name and os.path.realpath(file) in programs:
            return file
    return None


def run_program(
    argv: list[str],
    stdin: str,
    *,
    directory: str,
    wall_s: float,
    watch: tuple[int, Callable[[], None]],
    sweep_rest: Callable[[], None],
) -> Outcome:
    """Run a program to its end; `watch` is a descriptor and what to call when it has something to read.

    Whatever that call raises goes on to the caller, after the program and its children were killed.
    """
    process = subprocess.Popen(
        argv,
        cwd=directory,
        env={**_ENVIRONMENT, "HOME": directory},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    output = Output()
    try:
        is_late = _pump(process, stdin.encode(), output, time.monotonic() + wall_s, watch)
    finally:
        _kill(process, sweep_rest)
    ending = f"killed: it ran longer than {wall_s:g} s" if is_late else _ending(process.returncode)
    text = f"{output.text().rstrip()}\n[{ending}]".lstrip()
    return Outcome(ok=process.returncode == 0 and not is_late, text=text, changed=True)


def _pump(
    process: subprocess.Popen[bytes],
    stdin: bytes,
    output: Output,
    until_s: float,
    watch: tuple[int, Callable[[], None]],
) -> bool:
    """Move bytes until the program has ended; return whether it was still running at its limit."""
    assert process.stdin is not None
    assert process.stdout is not None
    source, sink = process.stdout, process.stdin
    pending = memoryview(stdin)
    os.set_blocking(sink.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(watch[0], selectors.EVENT_READ)
        selector.register(source, selectors.EVENT_READ)
        selector.register(sink, selectors.EVENT_WRITE)
        # A child in the background may hold the pipe for ever, so the program's own end counts.
        while process.poll() is None:
            if time.monotonic() > until_s:
                return True
            for key, _ in selector.select(_TICK_S):
                if key.fileobj == watch[0]:
                    watch[1]()
                elif key.fileobj is source and not _take(source, output):
                    selector.unregister(source)
                elif key.fileobj is sink:
                    pending = _feed(sink, pending)
                    if not pending:
                        selector.unregister(sink)
                        sink.close()
    os.set_blocking(source.fileno(), False)
    with suppress(BlockingIOError):
        for _ in range(_LAST_READS):
            if not _take(source, output):
                break
    return False


def _take(source: IO[bytes], output: Output) -> bool:
    data = os.read(source.fileno(), _READ_BYTES)
    output.add(data)
    return bool(data)


def _feed(sink: IO[bytes], pending: memoryview) -> memoryview:
    try:
        return pending[os.write(sink.fileno(), pending[:_READ_BYTES]) :]
    except BrokenPipeError:
        return memoryview(b"")


def _kill(process: subprocess.Popen[bytes], sweep_rest: Callable[[], None]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()  # a session's leader cannot leave its group: it is dying
    sweep_rest()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()


def sweep() -> None:
    """Kill everybody else. Only for a cage, whose process namespace holds nobody but the agent's children."""
    # On a machine the first numbers are the kernel's own: an agent that has one is in a namespace.
    if os.getpid() >= _FIRST_PIDS:
        raise CageError("cage-setup", "cannot end programs: the agent has no process namespace of its own")
    with suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)


def sweep_children() -> None:
    """Kill all descendants, where other processes live as well; orphans have become children (`adopt`)."""
    for _ in range(_SWEEPS):
        children = os.pread(CHILDREN_FD, _READ_BYTES, 0).split()
        if not children:
            return
        for child in children:
            os.kill(int(child), signal.SIGKILL)  # not yet waited for: the number cannot be another's
            os.waitpid(int(child), 0)
    raise CageError("cage-setup", "cannot end programs: they multiply faster than they die")


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    with suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
