"""What an agent does first: take its socket, give up its rights, prove that they are gone.

Rule: this imports no more than that needs. A cage opens when the proof is sent, and every module costs
time; the rest of the agent is loaded afterwards, confined already, while the node sends the workspace.
"""

import sys
from collections.abc import Mapping

from mycoswarmd.agent import confine, prove
from mycoswarmd.agent.channel import Channel
from mycoswarmd.errors import CageError
from mycoswarmd.wire.frames import Frame, FrameType


def cross() -> tuple[Channel, Mapping[str, object]]:
    """Return the socket and what CONFINE said, once the proof is sent; leave where that cannot be."""
    channel = Channel.take()
    try:
        return channel, prove_confinement(channel)
    except CageError as exc:
        sys.exit(exc.message)


def prove_confinement(channel: Channel) -> Mapping[str, object]:
    """Take CONFINE, give up all rights it names, and send PROOF; return what CONFINE said."""
    frame = channel.receive()
    if frame.type is not FrameType.CONFINE:
        raise CageError("cage-setup", "cannot start: the first frame is not CONFINE")
    try:
        # What the cage's maker holds by itself can only be asked before the agent adds its own.
        before = prove.survey(frame.body)
        confine.apply(frame.body, frame.payload)
        proof = prove.run(frame.body, before)
    except CageError as exc:
        # What cannot be confined gets no task: the node sees `error` and closes.
        channel.send(
            Frame(
                FrameType.PROOF,
                {"held": [], "broken": [], "absent": [], "level": "none", "error": exc.message},
            )
        )
        raise
    channel.send(Frame(FrameType.PROOF, proof))
    return frame.body
