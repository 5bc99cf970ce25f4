"""One running cage: frames in and out, its proof, its end. Implements flow.ports.CageSession."""

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress

from mycoswarmd.core.types import Proof, SandboxLevel
from mycoswarmd.errors import BadRequest, CageError
from mycoswarmd.sandbox.child import Child, describe_end
from mycoswarmd.wire.frames import HEADER, Frame, FrameType, decode_frame, decode_header, encode_frame

# Proving takes a few milliseconds; a Pi under load gets this long.
PROOF_S = 20.0
# After the socket closes, what is left of a cage has this long to say how it ended.
LAST_WORDS_S = 0.5
# What a person needs of bubblewrap's last words, and what an agent may write before nobody listens.
ERRORS_TAIL_BYTES = 2000
ERRORS_BYTES = 1 << 20
# More than a piece of a workspace need not wait in memory between two reads.
READ_BYTES = 1 << 18


class BubblewrapSession:
    """One running cage. `prove` must succeed before anything else is sent."""

    def __init__(
        self, child: Child, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], errors_fd: int
    ) -> None:
        self._child = child
        self._reader, self._writer = streams
        self._buffer = bytearray()
        self._errors_fd: int | None = errors_fd
        self._errors = b""
        self._errors_bytes = 0
        self._proof: Proof | None = None
        self._is_expired = False
        self._timer: asyncio.TimerHandle | None = None
        self._closing = asyncio.Lock()
        self._is_closed = False
        self._on_gone: Callable[[], object] = lambda: None

    @classmethod
    async def start(
        cls, child: Child, near: socket.socket, *, errors_fd: int, wall_s: float
    ) -> "BubblewrapSession":
        """Take over a started child and its descriptors; from now on `close` ends them all."""
        try:
            streams = await asyncio.open_connection(sock=near)
        except BaseException:
            await child.kill()
            os.close(errors_fd)
            raise
        session = cls(child, streams, errors_fd)
        loop = asyncio.get_running_loop()
        loop.add_reader(errors_fd, session._read_errors)
        session._timer = loop.call_later(wall_s, session._expire)
        return session

    def on_gone(self, tell: Callable[[], object]) -> None:
        """Have `tell` called once, when all processes of the cage are gone."""
        self._on_gone = tell

    @property
    def proof(self) -> Proof:
        """What the cage proved."""
        assert self._proof is not None
        return self._proof

    @property
    def pid(self) -> int:
        """The process to look for in a list: bubblewrap itself."""
        return self._child.pid

    async def prove(self, confine: Frame) -> None:
        """Have the cage confine itself and prove it, or close it and raise CageError."""
        try:
            async with asyncio.timeout(PROOF_S):
                await self.send(confine)
                answer = await self.receive()
            self._proof = check_proof(answer, confine)
        except TimeoutError as exc:
            await self.close()
            raise CageError("cage-unproved", f"cannot use the cage: no proof within {PROOF_S:.0f} s") from exc
        except CageError as exc:
            await self.close()
            if exc.code != "cage-gone":
                raise
            # No task was sent yet, so what is on stderr cannot hold any of it.
            words = self._errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise CageError("cage-setup", f"{exc.message}: {words}" if words else exc.message) from exc
        except BaseException:
            await self.close()
            raise

    async def send(self, frame: Frame) -> None:
        """Send a frame; CageError("cage-gone") when the cage has ended."""
        try:
            self._writer.write(encode_frame(frame))
            await self._writer.drain()
        except OSError as exc:
            raise await self._gone() from exc

    async def receive(self) -> Frame:
        """Return the next frame; CageError "cage-gone" at the end, "cage-timeout" past the wall limit.

        Cancelling loses nothing: a frame that came half stays.
        """
        try:
            while (frame := self._take_frame()) is None:
                piece = await self._reader.read(READ_BYTES)
                if not piece:
                    raise await self._gone()
                self._buffer += piece
        except OSError as exc:
            raise await self._gone() from exc
        except BadRequest as exc:
            self._child.send_kill()
            raise CageError("cage-garbage", f"cannot understand the agent: {exc.message}") from exc
        return frame

    async def close(self) -> None:
        """Kill the cage with all its children and wait for them. Idempotent."""
        async with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
            try:
                await self._child.kill()
            finally:
                self._release()
                with suppress(OSError):
                    await self._writer.wait_closed()
                self._on_gone()

    def _take_frame(self) -> Frame | None:
        if len(self._buffer) < HEADER.size:
            return None
        json_bytes, payload_bytes = decode_header(bytes(self._buffer[: HEADER.size]))
        end = HEADER.size + json_bytes + payload_bytes
        if len(self._buffer) < end:
            return None
        middle = HEADER.size + json_bytes
        frame = decode_frame(bytes(self._buffer[HEADER.size : middle]), bytes(self._buffer[middle:end]))
        del self._buffer[:end]
        return frame

    async def _gone(self) -> CageError:
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                code = await self._child.wait()
        except TimeoutError:
            self._child.send_kill()
            code = await self._child.wait()
        if self._is_expired:
            return CageError(
                "cage-timeout",
                "cannot go on: the task used up its wall time",
                hint="raise the agent's limit `wall`",
            )
        # bubblewrap reports a signal of its child as 128 + number, as a shell does.
        end = describe_end(128 - code if code > 128 else code)
        return CageError("cage-gone", f"cannot reach the agent: its cage {end}")

    def _expire(self) -> None:
        self._is_expired = True
        self._child.send_kill()

    def _read_errors(self) -> None:
        assert self._errors_fd is not None
        try:
            piece = os.read(self._errors_fd, READ_BYTES)
        except BlockingIOError:
            return
        self._errors = (self._errors + piece)[-ERRORS_TAIL_BYTES:]
        self._errors_bytes += len(piece)
        if not piece or self._errors_bytes > ERRORS_BYTES:
            self._close_errors()

    def _close_errors(self) -> None:
        if self._errors_fd is not None:
            asyncio.get_running_loop().remove_reader(self._errors_fd)
            os.close(self._errors_fd)
            self._errors_fd = None

    def _release(self) -> None:
        if self._errors_fd is not None:
            self._read_errors()
        self._close_errors()
        if self._timer is not None:
            self._timer.cancel()
        self._writer.transport.abort()


def check_proof(answer: Frame, confine: Frame) -> Proof:
    """Return the proof if it holds: every demanded probe held, none broken, and nothing else was said."""
    error = answer.body.get("error")
    if answer.type is not FrameType.PROOF or error is not None:
        raise CageError("cage-unproved", f"cannot use the cage: {error or 'it did not prove itself'}")
    demanded = [str(name) for name in _names(confine, "probes")]
    held, broken = _names(answer, "held"), _names(answer, "broken")
    missing = [name for name in demanded if name not in set(held)]
    if broken or missing or not demanded:
        found = "; ".join(broken or missing[:5] or ["nothing was probed"])
        raise CageError(
            "cage-unproved",
            f"cannot use the cage: it does not hold ({found[:1000]})",
            hint="`mycoswarmctl doctor` says what this machine can enforce",
        )
    return Proof(
        held=tuple(held),
        broken=(),
        absent=tuple(_names(confine, "absent")),
        level=SandboxLevel(str(confine.body["level"])),
    )


def _names(frame: Frame, key: str) -> list[str]:
    value = frame.body.get(key)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CageError("cage-unproved", f"cannot use the cage: its proof has no list {key!r}")
    return value
