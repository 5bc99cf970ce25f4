"""A stand-in for the agent's main module: it confines and proves itself, then does what the test's job says.

Runs inside a cage, never in the test process. The job's `prompt` is Python; its `result` goes back.
"""

import os

from mycoswarmd.agent import confine, prove
from mycoswarmd.agent.channel import Channel
from mycoswarmd.errors import MycoswarmError
from mycoswarmd.wire.frames import Frame, FrameType


def main() -> None:
    channel = Channel.take()
    frame = channel.receive()
    try:
        before = prove.survey(frame.body)
        confine.apply(frame.body, frame.payload)
        channel.send(Frame(FrameType.PROOF, prove.run(frame.body, before)))
    except MycoswarmError as exc:
        channel.send(Frame(FrameType.PROOF, {"error": exc.message}))
        return
    confine_body = frame.body
    while True:
        try:
            job = channel.receive()
        except MycoswarmError:
            return
        scope: dict[str, object] = {"os": os, "channel": channel, "body": confine_body}
        try:
            exec(str(job.body["prompt"]), scope)
            result = scope.get("result")
        except BaseException as exc:
            result = {"raised": type(exc).__name__, "errno": getattr(exc, "errno", None), "text": str(exc)}
        channel.send(Frame(FrameType.RESULT, {"result": result}))
