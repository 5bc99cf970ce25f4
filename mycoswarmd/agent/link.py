"""Questions to the node over the channel, one at a time, and CANCEL between and during them."""

import select
from collections.abc import Mapping
from typing import Protocol

from mycoswarmd.errors import BadRequest
from mycoswarmd.wire.frames import Frame, FrameType


class Frames(Protocol):
    """What carries frames: agent.channel.Channel."""

    def fileno(self) -> int:
        """Return the descriptor, for select."""
        ...

    def send(self, frame: Frame) -> None:
        """Send one frame."""
        ...

    def receive(self) -> Frame:
        """Wait for the next frame; CageError("cage-gone") at the end."""
        ...

    def has_pending(self) -> bool:
        """Tell whether part of a frame was already read."""
        ...


class Cancelled(Exception):
    """The node wants the work to end now."""


class Link:
    """Asks the node and waits for its answer."""

    def __init__(self, channel: Frames) -> None:
        self._channel = channel
        self._last_id = 0

    def fileno(self) -> int:
        """Return the descriptor to watch while something else is waited for."""
        return self._channel.fileno()

    def ask(self, kind: FrameType, body: Mapping[str, object]) -> Frame:
        """Send a question with a fresh id and return its answer; Cancelled when that comes instead."""
        self._last_id += 1
        self._channel.send(Frame(kind, {"id": self._last_id, **body}))
        while True:
            answer = self._channel.receive()
            if answer.type is FrameType.CANCEL:
                raise Cancelled
            if answer.body.get("id") == self._last_id:
                return answer
            raise BadRequest("bad-frame", "cannot go on: the node answered another question")

    def tell(self, kind: FrameType, body: Mapping[str, object], payload: bytes = b"") -> None:
        """Send a frame that has no answer."""
        self._channel.send(Frame(kind, dict(body), payload))

    def check(self) -> None:
        """Take what has arrived unasked: only CANCEL may."""
        while self._channel.has_pending() or select.select([self._channel], [], [], 0)[0]:
            if self._channel.receive().type is FrameType.CANCEL:
                raise Cancelled
            raise BadRequest("bad-frame", "cannot go on: the node answered without a question")

    @property
    def last_id(self) -> int:
        """Return the id of the last question."""
        return self._last_id
