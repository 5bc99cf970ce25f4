"""The agent's end of its one socket: blocking frames on file descriptor 3.

The cage gives the socket on standard input, because that is the one descriptor that every starter can
place; `take` moves it to 3 and leaves /dev/null behind, so that no tool inherits it.
"""

import os

from mycoswarmd.errors import CageError
from mycoswarmd.wire.frames import HEADER, Frame, decode_frame, decode_header, encode_frame

CHANNEL_FD = 3
# Reads of this size empty a socket buffer of the usual 208 KiB in a few calls.
READ_BYTES = 1 << 16


class Channel:
    """Reads and writes whole frames on a descriptor."""

    def __init__(self, fd: int = CHANNEL_FD) -> None:
        self._fd = fd
        self._buffer = bytearray()

    @classmethod
    def take(cls) -> "Channel":
        """Move the socket from standard input to descriptor 3, closed on exec."""
        os.dup2(0, CHANNEL_FD, inheritable=False)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        os.dup2(null, 0)
        os.close(null)
        return cls()

    def fileno(self) -> int:
        """Return the descriptor, for select."""
        return self._fd

    def send(self, frame: Frame) -> None:
        """Send one frame, all of it."""
        view = memoryview(encode_frame(frame))
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except (BrokenPipeError, ConnectionResetError) as exc:
            raise CageError("cage-gone", "cannot write to the node: it closed the socket") from exc

    def receive(self) -> Frame:
        """Wait for the next frame; CageError("cage-gone") when the node has closed the socket."""
        json_bytes, payload_bytes = decode_header(self._take(HEADER.size))
        untrusted_json = self._take(json_bytes)
        return decode_frame(untrusted_json, self._take(payload_bytes))

    def has_pending(self) -> bool:
        """Tell whether part of a frame was already read, so that select alone would wait in vain."""
        return bool(self._buffer)

    def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            try:
                piece = os.read(self._fd, max(READ_BYTES, count - len(self._buffer)))
            except ConnectionResetError:
                piece = b""
            if not piece:
                raise CageError("cage-gone", "cannot read from the node: it closed the socket")
            self._buffer += piece
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken
