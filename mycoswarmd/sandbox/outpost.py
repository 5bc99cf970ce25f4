"""Starts an outpost: a program of ours in a process of its own, spoken to in lines.

It runs with the same Python, isolated from the environment and from the user's packages, and confines
itself before it reads anything (mycoswarmd/outposts/confine.py); this side bounds what it takes from it.
Its descriptors are the two pipes; it ends with them.
"""

import asyncio
import os
import select
import sys
from collections.abc import Sequence

from mycoswarmd.errors import CageError
from mycoswarmd.sandbox.child import Child, describe_end


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
