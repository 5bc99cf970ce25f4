"""One running cage: frames in and out, its proof, its end. Implements flow.ports.CageSession."""

import abc
import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress

from mycoswarmd.core.types import Proof, SandboxLevel
from mycoswarmd.errors import BadRequest, CageError, CageNotUp
from mycoswarmd.sandbox.child import Child, describe_end
from mycoswarmd.wire.frames import HEADER, Frame, FrameType, decode_frame, decode_header, encode_frame

# Proving takes a few milliseconds; a Pi under load gets this long.
PROOF_S = 20.0
# After the socket closes, what is left of a cage has this long to say how it ended.
LAST_WORDS_S = 5.0
# What a person needs of bubblewrap's last words, and what an agent may write before nobody listens.
ERRORS_TAIL_BYTES = 2000
ERRORS_BYTES = 1 << 20
# More than a piece of a workspace need not wait in memory between two reads.
READ_BYTES = 1 << 18


class Session(abc.ABC):
    """What every running cage has: frames, a proof and a wall time; how it is killed is its maker's affair.

    `prove` must succeed before anything else is sent.
    """

    def __init__(self, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], *, wall_s: float) -> None:
        self._reader, self._writer = streams
        self._buffer = bytearray()
        self._proof: Proof | None = None
        self._is_expired = False
        self._wall_s = wall_s
        self._timer: asyncio.TimerHandle | None = None
        self._closing = asyncio.Lock()
        self._is_closed = False
        self._on_gone: Callable[[], object] = lambda: None

    def on_gone(self, tell: Callable[[], object]) -> None:
        """Have `tell` called once, when all processes of the cage are gone."""
        self._on_gone = tell

    @property
    def proof(self) -> Proof:
        """What the cage proved."""
        assert self._proof is not None
        return self._proof

    async def prove(self, confine: Frame, *, is_sent: bool = False) -> None:
        """Have the cage confine itself and prove it, or close it and raise CageError."""
        try:
            async with asyncio.timeout(PROOF_S):
                if not is_sent:
                    await self.send(confine)
                answer = await self.receive()
                self._proof = await self._check(answer, confine)
            # How long it took to come up is not the agent's time.
            self._timer = asyncio.get_running_loop().call_later(self._wall_s, self._expire)
        except TimeoutError as exc:
            await self.close()
            raise CageNotUp("cage-unproved", f"cannot use the cage: no proof within {PROOF_S:.0f} s") from exc
        except CageError as exc:
            await self.close()
            if exc.code != "cage-gone":
                raise
            # No task was sent yet, so its last words cannot hold any of it.
            words = self._last_words()
            raise CageNotUp("cage-setup", f"{exc.message}: {words}" if words else exc.message) from exc
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
            self._send_kill()
            raise CageError("cage-garbage", f"cannot understand the agent: {exc.message}") from exc
        return frame

    async def close(self) -> None:
        """Kill the cage with all its children and wait for them. Idempotent."""
        async with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
            try:
                await self._kill()
            finally:
                self._release()
                with suppress(OSError):
                    await self._writer.wait_closed()
                self._on_gone()

    async def _check(self, answer: Frame, confine: Frame) -> Proof:
        """Return what the answer to CONFINE proves, or raise CageError."""
        return check_proof(answer, confine)

    @abc.abstractmethod
    def _send_kill(self) -> None:
        """Have all processes of the cage killed, without waiting."""

    @abc.abstractmethod
    async def _kill(self) -> None:
        """Kill all processes of the cage and wait until they are gone."""

    @abc.abstractmethod
    async def _describe_end(self) -> str:
        """See to it that the cage ends, and say how it did, as in "exited with 1"."""

    def _last_words(self) -> str:
        """Return what the cage said beside its frames before it was given a task."""
        return ""

    def _release(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._writer.transport.abort()

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
        how = await self._describe_end()
        if self._is_expired:
            return CageError(
                "cage-timeout",
                "cannot go on: the task used up its wall time",
                hint="raise the agent's limit `wall`",
            )
        return CageError("cage-gone", f"cannot reach the agent: its cage {how}")

    def _expire(self) -> None:
        self._is_expired = True
        self._send_kill()


class BubblewrapSession(Session):
    """One running cage that bubblewrap built."""

    def __init__(
        self,
        child: Child,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        *,
        errors_fd: int,
        wall_s: float,
    ) -> None:
        super().__init__(streams, wall_s=wall_s)
        self._child = child
        self._errors_fd: int | None = errors_fd
        self._errors = b""
        self._errors_bytes = 0
        asyncio.get_running_loop().add_reader(errors_fd, self._read_errors)

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
        return cls(child, streams, errors_fd=errors_fd, wall_s=wall_s)

    @property
    def pid(self) -> int:
        """The process to look for in a list: bubblewrap itself."""
        return self._child.pid

    def _send_kill(self) -> None:
        self._child.send_kill()

    async def _kill(self) -> None:
        await self._child.kill()

    async def _describe_end(self) -> str:
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                code = await self._child.wait()
        except TimeoutError:
            self._child.send_kill()
            code = await self._child.wait()
        # bubblewrap reports a signal of its child as 128 + number, as a shell does.
        return describe_end(128 - code if code > 128 else code)

    def _last_words(self) -> str:
        return self._errors.decode("utf-8", "replace").strip().rpartition("\n")[2]

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
        super()._release()


def check_proof(answer: Frame, confine: Frame) -> Proof:
    """Return the proof if it holds: every demanded probe held, none broken, and nothing else was said.

    What was only wanted and did not hold is absent; then the level is REDUCED whatever was hoped for.
    """
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
    wanted = _names(confine, "wanted") if "wanted" in confine.body else []
    absent = (*_names(confine, "absent"), *(name for name in wanted if name not in set(held)))
    hoped = SandboxLevel(str(confine.body["level"]))
    level = SandboxLevel.REDUCED if absent and hoped is SandboxLevel.FULL else hoped
    return Proof(held=tuple(held), broken=(), absent=absent, level=level)


def _names(frame: Frame, key: str) -> list[str]:
    value = frame.body.get(key)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CageError("cage-unproved", f"cannot use the cage: its proof has no list {key!r}")
    return value
