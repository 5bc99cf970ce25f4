"""Starts an outpost: a program of ours in a process of its own, spoken to in lines.

As a child it runs with the same Python, isolated from the environment and from the user's packages, and
confines itself before it reads anything (mycoswarmd/outposts/confine.py). Its descriptors are the two pipes;
it ends with them. In the appliance it is a unit of systemd's, `Accept=yes`: to connect is to start it, PID 1
builds its confinement, and it ends with the connection. This side bounds what it takes from either.
Source: systemd.socket(5).
"""

import asyncio
import os
import select
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mycoswarmd.errors import CageError
from mycoswarmd.sandbox.child import Child, describe_end

# PID 1 accepts in milliseconds; a box that swaps gets this long.
_CONNECT_S = 10.0
# A program that has lost its connection ends; one that does not is left to its unit's own bounds.
_END_S = 2.0
# What it has not read of us; an order is some hundred bytes.
_UNREAD_BYTES = 64 << 10


class Outpost:
    """A running outpost; whoever starts it must await `kill`.

    Attributes:
        pid: its process.
    """

    def __init__(
        self, child: Child, orders_fd: int, reader: asyncio.StreamReader, transport: asyncio.ReadTransport
    ) -> None:
        self._child = child
        self._orders_fd: int | None = orders_fd
        self._reader = reader
        self._transport = transport
        self.pid = child.pid

    async def read_line(self) -> bytes:
        """Return its next line; CageError "outpost-gone" when it has ended, "outpost-garbage" for none."""
        try:
            line = await self._reader.readline()
        except ValueError as exc:
            raise CageError("outpost-garbage", "cannot understand the outpost: its line has no end") from exc
        if not line.endswith(b"\n"):
            code = await self._child.wait()
            raise CageError("outpost-gone", f"cannot hear the outpost: it {describe_end(code)}")
        return line

    def send(self, line: bytes) -> None:
        """Hand it a line of at most PIPE_BUF bytes, whole or not at all; CageError("outpost-gone")."""
        if self._orders_fd is None or len(line) > select.PIPE_BUF:
            raise CageError("outpost-gone", "cannot tell the outpost anything: it was stopped")
        try:
            os.write(self._orders_fd, line)
        except OSError as exc:  # it has ended, or does not read
            raise CageError("outpost-gone", f"cannot tell the outpost anything: {exc.strerror}") from exc

    async def kill(self) -> None:
        """End it and wait until it is gone. Idempotent."""
        if self._orders_fd is None:
            return
        os.close(self._orders_fd)
        self._orders_fd = None
        self._transport.close()
        await self._child.kill()


async def start_outpost(module: str, *, line_bytes: int, arguments: Sequence[str] = ()) -> Outpost:
    """Start a module of ours; CageError where that cannot be done."""
    try:
        orders_r, orders_w = os.pipe2(os.O_CLOEXEC)
    except OSError as exc:
        raise CageError("cage-setup", f"cannot start {module!r}: {exc.strerror}") from exc
    try:
        reports_r, reports_w = os.pipe2(os.O_CLOEXEC)
    except OSError as exc:
        os.close(orders_r)
        os.close(orders_w)
        raise CageError("cage-setup", f"cannot start {module!r}: {exc.strerror}") from exc
    try:
        child = Child(
            [sys.executable, "-I", "-m", module, *arguments],
            stdin=orders_r,
            stdout=reports_w,
            environment={"LANG": "C.UTF-8"},
        )
    except CageError:
        os.close(orders_w)
        os.close(reports_r)
        raise
    finally:
        os.close(orders_r)
        os.close(reports_w)
    os.set_blocking(orders_w, False)
    reader = asyncio.StreamReader(limit=line_bytes)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reports_r, "rb", buffering=0)
    )
    return Outpost(child, orders_w, reader, transport)


class UnitOutpost:
    """A running outpost of the appliance; whoever connected must await `kill`.

    Attributes:
        pid: 0, for it is systemd's child: what the socket tells is PID 1.
    """

    def __init__(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._name = name
        self._reader = reader
        self._writer = writer
        self._is_ended = False
        self.pid = 0

    async def read_line(self) -> bytes:
        """Return its next line; CageError "outpost-gone" when it has ended, "outpost-garbage" for none."""
        try:
            line = await self._reader.readline()
        except ValueError as exc:
            said = f"cannot understand {self._name}: its line has no end"
            raise CageError("outpost-garbage", said) from exc
        except OSError as exc:
            raise self._gone(exc.strerror or "the connection broke") from exc
        if not line.endswith(b"\n"):
            raise self._gone("it has ended")
        return line

    def send(self, line: bytes) -> None:
        """Hand it a line, whole or not at all; CageError("outpost-gone") when it does not read."""
        transport = self._writer.transport
        if self._is_ended or transport.is_closing():
            raise self._gone("it was stopped")
        if transport.get_write_buffer_size() + len(line) > _UNREAD_BYTES:
            raise self._gone("it does not read")
        self._writer.write(line)

    async def kill(self) -> None:
        """End the connection, with which it ends, and wait for that a moment. Idempotent."""
        if self._is_ended:
            return
        self._is_ended = True
        try:
            with suppress(OSError, TimeoutError):
                self._writer.write_eof()
                async with asyncio.timeout(_END_S):
                    while await self._reader.read(_UNREAD_BYTES):
                        pass
        finally:
            self._writer.transport.abort()

    def _gone(self, why: str) -> CageError:
        return CageError(
            "outpost-gone",
            f"cannot go on with {self._name}: {why}",
            hint=f"journalctl -u {self._name}@*",
        )


async def connect_outpost(path: Path, *, line_bytes: int) -> UnitOutpost:
    """Start an outpost of the appliance by connecting to its unit; CageError where that cannot be done."""
    unit = f"mycoswarm-{path.stem}"
    try:
        async with asyncio.timeout(_CONNECT_S):
            reader, writer = await asyncio.open_unix_connection(str(path), limit=line_bytes)
    except OSError as exc:  # a timeout is one, too
        why = exc.strerror or "nobody accepts"
        raise CageError(
            "outpost-gone",
            f"cannot start {unit}: {why}",
            hint=f"systemctl status {unit}.socket",
        ) from exc
    return UnitOutpost(unit, reader, writer)
