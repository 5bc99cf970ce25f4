"""Cages built by systemd. Implements flow.ports.CageMaker.

A connection to the socket of mycoswarm-task.socket is a cage: PID 1 starts mycoswarm-task@.service for it and
confines it, and closing the connection ends it with all that is in it (agent/guard.py). No D-Bus, no
privilege here.

Laws: the other side is believed to be such a unit because the kernel says so: PID 1 listens, and the process
that answers is in a control group of that unit. Nothing of the task passes `open` before the cage has proved
itself. What bounds the whole cage is read here, from outside, and never taken from the cage's word.

Source: systemd.exec(5), as of 252; unix(7), SO_PEERCRED and SO_PASSCRED.
"""

import asyncio
import logging
import os
import re
import select
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mycoswarmd.core.types import CageSpec, Proof, SandboxLevel
from mycoswarmd.errors import CageError, CageNotUp
from mycoswarmd.sandbox.child import wait_readable
from mycoswarmd.sandbox.host import Host, check_programs, read_host
from mycoswarmd.sandbox.seccomp import build_filter
from mycoswarmd.sandbox.session import PROOF_S, Session, check_proof
from mycoswarmd.sandbox.unitspec import DYNAMIC_UIDS, GROUP_BOUNDS, absent, confinement
from mycoswarmd.wire.frames import Frame, FrameType, encode_frame

log = logging.getLogger(__name__)

SOCKET = Path("/run/mycoswarm-outposts/task.sock")
# Where cgroup2 is: alone, or beside the older ones.
GROUP_ROOTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
# The unit of NAME.sock is mycoswarm-NAME@.service, and each connection has an instance of its own.
UNIT_GROUP = r"(?:/[A-Za-z0-9_.@\\-]+)*/{}@[0-9_-]{{1,60}}\.service"
CREDENTIALS = struct.Struct("=iII")  # pid, uid, gid
# PID 1 accepts at once, unless it is busy with a boot.
CONNECT_S = 10.0
# PID 1 needs milliseconds to kill what is left of a unit; a Pi that swaps gets this long.
END_S = 10.0
# A cage that waits is as good as a new one, but it began to use up the unit's RuntimeMaxSec.
SPARE_S = 3600.0
LOOK_AGAIN_S = 0.01
HINT = "systemctl status mycoswarm-task.socket; journalctl -u 'mycoswarm-task@*'"


@dataclass(frozen=True, slots=True)
class Peer:
    """Who a process on the other side is, as the kernel says."""

    pid: int
    uid: int
    gid: int


class SystemdCages:
    """Has systemd build cages, each for one connection.

    PID 1 needs 0.1 s and more for one, so the next is always being built while somebody has the last.
    """

    def __init__(
        self,
        socket_path: Path = SOCKET,
        *,
        listener: Peer = Peer(1, 0, 0),
        group_roots: tuple[Path, ...] = GROUP_ROOTS,
        keep_spare: bool = True,
    ) -> None:
        self._socket_path = socket_path
        self._listener = listener
        self._group_roots = group_roots
        self._keep_spare = keep_spare
        self._host: Host | None = None
        self._uids: set[int] = set()
        self._spare: socket.socket | None = None
        self._spare_until_s = 0.0

    @property
    def level(self) -> str:
        """What such a cage can be at best: a SandboxLevel."""
        if not self._socket_path.is_socket():
            return SandboxLevel.NONE.value
        has_bounds = {"cpu", "memory", "pids"} <= set(controllers(self._group_roots))
        is_full = has_bounds and not absent(self._read_host())
        return (SandboxLevel.FULL if is_full else SandboxLevel.REDUCED).value

    async def open(self, spec: CageSpec) -> "SystemdSession":
        """Start a cage and have it prove itself; CageError("cage-setup" or "cage-unproved") otherwise."""
        host = self._read_host()
        check_programs(spec.programs)
        program = build_filter(host.machine, may_execute=bool(spec.programs), may_stop=False)
        confine = Frame(FrameType.CONFINE, confinement(spec, host), program)
        near = self._take_spare() or await self._connect()
        session = await SystemdSession.start(
            near,
            confine,
            wall_s=spec.limits.wall_s,
            unit=f"mycoswarm-{self._socket_path.stem}",
            group_roots=self._group_roots,
        )
        await session.prove(confine, is_sent=True)
        try:
            await self._settle(session)
            await self._build_spare()
        except BaseException:
            await session.close()
            raise
        return session

    def close(self) -> None:
        """Let go of the cage that waits for a task, if there is one."""
        if self._spare is not None:
            self._spare.close()
            self._spare = None

    async def _build_spare(self) -> None:
        if self._keep_spare and self._spare is None:
            with suppress(CageError, OSError):  # whoever opens the next one is told
                spare = await self._connect()
                self.close()  # somebody else may have been as quick
                self._spare = spare
                self._spare_until_s = asyncio.get_running_loop().time() + SPARE_S

    def _take_spare(self) -> socket.socket | None:
        """Return a connection whose unit waits already for its first frame: each is taken once."""
        near, self._spare = self._spare, None
        if near is None:
            return None
        # One that says anything before it was asked has ended, or is not what it should be.
        poll = select.poll()  # descriptors of a busy node are too high for select
        poll.register(near, select.POLLIN)
        is_silent = not poll.poll(0)
        if is_silent and asyncio.get_running_loop().time() < self._spare_until_s:
            return near
        near.close()
        return None

    async def _settle(self, session: "SystemdSession") -> None:
        """Count a cage's user as taken until the cage is gone; refuse one who is taken already.

        Processes of one user can kill each other, in whatever namespaces they are.
        """
        if session.uid in self._uids:
            await session.close()
            raise _unproved(f"another cage runs as the same user {session.uid}")
        self._uids.add(session.uid)
        session.on_gone(partial(self._uids.discard, session.uid))

    def _read_host(self) -> Host:
        self._host = self._host or read_host()
        return self._host

    async def _connect(self) -> socket.socket:
        """Return a connection of which the kernel says that PID 1 made the socket."""
        near = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # Before anything can be sent: the kernel notes the sender of what is sent after this alone.
            near.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            async with asyncio.timeout(CONNECT_S):
                await asyncio.get_running_loop().sock_connect(near, str(self._socket_path))
            self._check_listener(near)
        except OSError as exc:  # TimeoutError is one
            near.close()
            raise CageNotUp(
                "cage-setup",
                f"cannot reach systemd for a cage: {exc.strerror or 'it does not answer'}",
                hint=HINT,
            ) from exc
        except BaseException:
            near.close()
            raise
        return near

    def _check_listener(self, near: socket.socket) -> None:
        found = near.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        if Peer(*CREDENTIALS.unpack(found)) != self._listener:
            raise CageError(
                "cage-setup",
                f"cannot trust {str(self._socket_path)!r}: systemd does not listen there",
                hint=HINT,
            )


class SystemdSession(Session):
    """One running cage that systemd built."""

    def __init__(
        self,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        *,
        wall_s: float,
        peer: Peer,
        unit: str,
        group_roots: tuple[Path, ...],
    ) -> None:
        super().__init__(streams, wall_s=wall_s)
        self._peer = peer
        self._unit = unit
        self._group_roots = group_roots
        self._group: Path | None = None
        self._pidfd: int | None = None
        with suppress(ProcessLookupError):
            self._pidfd = os.pidfd_open(peer.pid)

    @classmethod
    async def start(
        cls, near: socket.socket, confine: Frame, *, wall_s: float, unit: str, group_roots: tuple[Path, ...]
    ) -> "SystemdSession":
        """Send CONFINE and learn who answers; what `near` leads to ends with it where that fails."""
        try:
            async with asyncio.timeout(PROOF_S):
                await asyncio.get_running_loop().sock_sendall(near, encode_frame(confine))
                await wait_readable(near.fileno())
            peer = read_sender(near)
            streams = await asyncio.open_connection(sock=near)
        except OSError as exc:
            near.close()
            why = "it does not answer" if isinstance(exc, TimeoutError) else exc.strerror
            raise CageNotUp("cage-setup", f"cannot use the cage: {why}", hint=HINT) from exc
        except BaseException:
            near.close()
            raise
        return cls(streams, wall_s=wall_s, peer=peer, unit=unit, group_roots=group_roots)

    @property
    def pid(self) -> int:
        """The process to look for in a list: the agent."""
        return self._peer.pid

    @property
    def uid(self) -> int:
        """Whom the agent runs as, for as long as its unit lives."""
        return self._peer.uid

    async def _check(self, answer: Frame, confine: Frame) -> Proof:
        proof = check_proof(answer, confine)
        if not DYNAMIC_UIDS[0] <= self._peer.uid <= DYNAMIC_UIDS[1]:
            raise _unproved(f"it runs as user {self._peer.uid}, who outlives it")
        root = group_root(self._group_roots)
        held: list[str] = []
        lacking = ["own-group", *GROUP_BOUNDS]
        if root is not None:
            self._group = own_group(root, answer.body.get("group"), unit=self._unit, pid=self._peer.pid)
            held = [
                "own-group",
                *(name for name, file in GROUP_BOUNDS.items() if is_bounded(self._group / file)),
            ]
            lacking = [name for name in GROUP_BOUNDS if name not in held]
        level = SandboxLevel.REDUCED if lacking else proof.level
        return replace(proof, held=(*proof.held, *held), absent=(*proof.absent, *lacking), level=level)

    def _send_kill(self) -> None:
        self._writer.transport.abort()

    async def _kill(self) -> None:
        self._send_kill()
        # In a task of its own: in one that is being cancelled, Python 3.11.2 takes the end of a timeout
        # for one more cancellation.
        async with asyncio.TaskGroup() as group:
            group.create_task(self._see_end(), name="cage-end")

    async def _see_end(self) -> None:
        try:
            async with asyncio.timeout(END_S):
                await self._ended()
        except TimeoutError:
            log.error("a cage has not ended within %.0f s: %s", END_S, HINT, extra={"event": "cage-lingers"})  # noqa: TRY400

    async def _ended(self) -> None:
        """Wait until the agent is gone, and then everybody else in the unit."""
        if self._pidfd is not None:
            await wait_readable(self._pidfd)
        # PID 1 does it now; the kernel tells of it by a file that the loop cannot wait for.
        while self._group is not None and is_populated(self._group):  # noqa: ASYNC110
            await asyncio.sleep(LOOK_AGAIN_S)

    async def _describe_end(self) -> str:
        self._send_kill()
        return "has ended (journalctl -u 'mycoswarm-task@*')"

    def _release(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        super()._release()


def read_sender(near: socket.socket) -> Peer:
    """Return who sent the first byte that waits on a socket, and leave it there."""
    data, control, _, _ = near.recvmsg(1, socket.CMSG_SPACE(CREDENTIALS.size), socket.MSG_PEEK)
    if not data:
        raise CageNotUp(
            "cage-setup", "cannot use the cage: its unit ended before it said anything", hint=HINT
        )
    for level, kind, value in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS) and len(value) == CREDENTIALS.size:
            return Peer(*CREDENTIALS.unpack(value))
    raise _unproved("the kernel does not say who answers")


def group_root(roots: tuple[Path, ...]) -> Path | None:
    """Return where cgroup2 is mounted, or None."""
    return next((root for root in roots if (root / "cgroup.controllers").exists()), None)


def controllers(roots: tuple[Path, ...]) -> list[str]:
    """Return what cgroup2 can bound on this machine."""
    root = group_root(roots)
    return _read(root / "cgroup.controllers").split() if root else []


def own_group(root: Path, untrusted_name: object, *, unit: str, pid: int) -> Path:
    """Return the control group that a cage names, if it is one of the unit's and this process is in it."""
    pattern = UNIT_GROUP.format(re.escape(unit))
    if not isinstance(untrusted_name, str) or not re.fullmatch(pattern, untrusted_name):
        raise _unproved(f"it does not run as {unit}@.service")
    group = root / untrusted_name.lstrip("/")
    if str(pid) not in _read(group / "cgroup.procs").split():
        raise _unproved("the process that answers is not in the unit it names")
    return group


def is_bounded(path: Path) -> bool:
    """Tell whether a limit of a control group is a number; a controller that is not there has no file."""
    return _read(path).split(" ")[0].strip().isdigit()


def is_populated(group: Path) -> bool:
    """Tell whether any process is left in a control group or below."""
    return "populated 1" in _read(group / "cgroup.events")


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except OSError:
        return ""


def _unproved(why: str) -> CageError:
    return CageError("cage-unproved", f"cannot use the cage: {why}", hint=HINT)
