"""A node on the other end of a real socket pair: it answers an agent by a script and keeps what it saw."""

import json
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from mycoswarmd.agent.channel import Channel
from mycoswarmd.errors import CageError
from mycoswarmd.wire.frames import Frame, FrameType

# What the model says in one step: tool calls as (name, arguments), or plain words.
Calls = list[tuple[str, object]]
Say = Calls | str
Model = Callable[[dict[str, object]], Say | Frame]


class Node:
    """Answers MODEL with `model`, and TOOL with PERMIT unless the tool is in `refuse`."""

    def __init__(self, model: Model, *, refuse: Iterable[str] = (), usage: int = 10) -> None:
        self.near, self.far = socket.socketpair()
        self.channel = Channel(self.far.fileno())
        self.model = model
        self.refuse = set(refuse)
        self.usage = usage
        self.seen: list[Frame] = []
        self.on_tool: Callable[[Frame], Frame | None] = lambda _: None

    def bodies(self, kind: FrameType) -> list[dict[str, object]]:
        """Return the bodies of the frames of one type, in order."""
        return [frame.body for frame in self.seen if frame.type is kind]

    def serve(self) -> None:
        """Answer until the agent has closed its end, or has sent RESULT."""
        while True:
            try:
                frame = self.channel.receive()
            except CageError:
                return
            self.seen.append(frame)
            if frame.type is FrameType.MODEL:
                self.channel.send(self._say(frame))
            elif frame.type is FrameType.TOOL:
                answer = self.on_tool(frame) or self._permit(frame)
                self.channel.send(answer)
            elif frame.type is FrameType.RESULT:
                return

    def _say(self, frame: Frame) -> Frame:
        said = self.model(frame.body)
        if isinstance(said, Frame):
            return Frame(said.type, {"id": frame.body["id"], **said.body})
        calls = [] if isinstance(said, str) else said
        return Frame(
            FrameType.MODEL_OK,
            {
                "id": frame.body["id"],
                "text": said if isinstance(said, str) else "",
                "tool_calls": [
                    {
                        "id": f"c{number}",
                        "name": name,
                        "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
                    }
                    for number, (name, arguments) in enumerate(calls)
                ],
                "finish": "tool_calls" if calls else "stop",
                "usage": {"prompt_tokens": self.usage, "completion_tokens": 0, "cached_tokens": 0},
            },
        )

    def _permit(self, frame: Frame) -> Frame:
        number, tool = frame.body["id"], frame.body["tool"]
        if tool in self.refuse:
            refusal = {"code": "policy-denied", "message": "cannot use it: no rule", "rule": "default-deny"}
            return Frame(FrameType.REFUSED, {"id": number, **refusal})
        return Frame(FrameType.PERMIT, {"id": number, "rule": "test"})

    @contextmanager
    def serving(self) -> Iterator["Node"]:
        """Serve in a thread until the block ends."""
        thread = threading.Thread(target=self.serve, name="scripted-node")
        thread.start()
        try:
            yield self
        finally:
            self.near.close()
            thread.join(60)
            self.far.close()
            assert not thread.is_alive()


def script(*steps: Say | Frame) -> Model:
    """Say one thing after another, and the last for ever."""
    pending = list(steps)
    return lambda _: pending.pop(0) if len(pending) > 1 else pending[0]


def result_of(messages: object) -> Mapping[str, object]:
    """Return the newest message."""
    assert isinstance(messages, list)
    last = messages[-1]
    assert isinstance(last, dict)
    return last
