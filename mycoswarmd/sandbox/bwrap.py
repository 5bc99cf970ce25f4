"""Cages built by bubblewrap. Implements flow.ports.CageMaker.

Law: nothing of the task passes `open` before the cage has proved, probe by probe, that it holds. When in
doubt, it is killed.

Source: bwrap(1), as of 0.8.0.
"""

import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from mycoswarmd.core.types import CageSpec, SandboxLevel
from mycoswarmd.errors import CageError
from mycoswarmd.sandbox.child import Child, is_executable
from mycoswarmd.sandbox.host import BWRAP, Host, check_programs, read_host
from mycoswarmd.sandbox.seccomp import build_filter
from mycoswarmd.sandbox.session import BubblewrapSession
from mycoswarmd.sandbox.spec import Identity, Operation, command, confinement, operations
from mycoswarmd.wire.frames import Frame, FrameType

# A range that no distribution assigns: above adduser's and systemd's dynamic users, below 2^31.
FIRST_UID = 1_900_000_000


class BubblewrapCages:
    """Builds cages, each with a uid of its own when the daemon is root."""

    def __init__(self, agent_zipapp: bytes, runtime_dir: Path) -> None:
        self._agent = agent_zipapp
        self._runtime_dir = runtime_dir
        self._slots: set[int] = set()
        self._host: Host | None = None

    @property
    def level(self) -> str:
        """What such a cage can be at best: a SandboxLevel."""
        return SandboxLevel.REDUCED.value if is_executable(BWRAP) else SandboxLevel.NONE.value

    async def open(self, spec: CageSpec) -> BubblewrapSession:
        """Start a cage and have it prove itself; CageError("cage-setup" or "cage-unproved") otherwise."""
        if not is_executable(BWRAP):
            raise CageError(
                "cage-setup",
                f"cannot build a cage: {BWRAP!r} is missing",
                hint="install the package bubblewrap",
            )
        host = self._host = self._host or read_host()
        check_programs(spec.programs)
        program = build_filter(host.machine, may_execute=bool(spec.programs))
        slot = self._take_slot()
        who = self.identity(slot)
        try:
            body = self.confinement(spec, host, who)
            session = await start_session(
                self.operations(spec, host, who),
                command(host),
                identity=who if os.geteuid() == 0 else None,
                wall_s=spec.limits.wall_s,
            )
        except BaseException:
            self._slots.discard(slot)
            raise
        session.on_gone(partial(self._slots.discard, slot))
        await session.prove(Frame(FrameType.CONFINE, body, program))
        return session

    def operations(self, spec: CageSpec, host: Host, who: Identity) -> tuple[Operation, ...]:
        """Return what bubblewrap is told to do."""
        return operations(spec, host, who, self._agent)

    def confinement(self, spec: CageSpec, host: Host, who: Identity) -> dict[str, object]:
        """Return the body of the CONFINE frame."""
        return confinement(spec, host, who)

    def identity(self, slot: int) -> Identity:
        """Return whom the cage of a slot runs as."""
        if os.geteuid() == 0:
            return Identity(FIRST_UID + slot, FIRST_UID + slot)
        return Identity(os.geteuid(), os.getegid())

    def _take_slot(self) -> int:
        slot = next(number for number in range(len(self._slots) + 1) if number not in self._slots)
        self._slots.add(slot)
        return slot


async def start_session(
    steps: Sequence[Operation], argv: Sequence[str], *, identity: Identity | None, wall_s: float
) -> BubblewrapSession:
    """Start bubblewrap and return the unproved session with what runs in it."""
    # `ours` is closed when the child cannot be started; after that it belongs to the session.
    with ExitStack() as ours, ExitStack() as theirs:
        near, far = socket.socketpair()
        ours.enter_context(near)
        theirs.enter_context(far)
        errors_r, errors_w = pipe_pair(ours, theirs)
        info_r, info_w = pipe_pair(ours, theirs)
        options, contents = render(steps, theirs)
        child = Child(
            [BWRAP, *options, "--info-fd", str(info_w), "--", *argv],
            stdin=far.fileno(),
            stderr=errors_w,
            keep_fds=[info_w, *contents],
            info_fd=info_r,
            identity=None if identity is None else (identity.uid, identity.gid),
        )
        ours.pop_all()
    # Outside: only when our copies of its ends are closed does the end of a cage show.
    return await BubblewrapSession.start(child, near, errors_fd=errors_r, wall_s=wall_s)


def render(steps: Sequence[Operation], files: ExitStack) -> tuple[list[str], list[int]]:
    """Return the options of bubblewrap, and the descriptors that hold contents, closed with `files`."""
    options: list[str] = []
    contents: list[int] = []
    for step in steps:
        options.append(step.option)
        if step.content is not None:
            fd = _content(step.content)
            files.callback(os.close, fd)
            contents.append(fd)
            options.append(str(fd))
        options.extend(step.arguments)
    return options, contents


def _content(data: bytes) -> int:
    """Return a descriptor from which bubblewrap can read the data, whatever its uid may open."""
    fd = os.memfd_create("mycoswarm-cage")
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def pipe_pair(ours: ExitStack, theirs: ExitStack) -> tuple[int, int]:
    """Return a reading end that does not block, closed with `ours`, and a writing one, with `theirs`."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(reader, False)
    ours.callback(os.close, reader)
    theirs.callback(os.close, writer)
    return reader, writer
