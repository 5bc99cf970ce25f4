"""Frames between a node and the agent in its cage, over one inherited stream socket.

A frame is: JSON length (4 bytes, big endian), payload length (4 bytes), JSON object, payload.
The JSON object's `type` is a `FrameType`; the payload is raw bytes (pieces of a tar, or a program
for the kernel). Both lengths are bounded before anything is read.

Node to cage, in order: CONFINE, WORKSPACE pieces, JOB; then answers and CANCEL at any time.
Cage to node: PROOF (answers CONFINE), then MODEL, TOOL, TOOL_DONE, NOTE as it works, CHANGES pieces, RESULT.

    CONFINE   {"task", "attempt", "read_paths", "write_paths", "programs", "limits",
               "steps", "narrow", "probes", "expect"}
              payload: the seccomp program
    PROOF     {"held": [...], "broken": [...], "absent": [...], "level", "error"?}
    WORKSPACE {"last": bool}                      payload: a piece of the tar
    JOB       {"task", "prompt", "model", "native_tools", "tools": [names],
               "limits": {"steps", "tokens", "context_tokens"}}
    MODEL     {"id", "messages": [...], "tools": [...], "tool_choice", "max_tokens", "temperature",
               "frequency_penalty"?}
    MODEL_OK  {"id", "text", "tool_calls": [{"id","name","arguments"}], "finish", "usage": {...}}
    TOOL      {"id", "tool", "arguments": {...}}  asks for a permit; nothing is done before PERMIT
    PERMIT    {"id", "rule"}
    REFUSED   {"id", "code", "message", "rule"}   answers MODEL or TOOL; `fatal` ends the task
    TOOL_DONE {"id", "tool", "ok", "bytes", "duration_ms", "text"}  `text` is bounded, for the transcript
    NOTE      {"text"}
    CHANGES   {"last": bool}                      payload: a piece of the tar of changed files
    RESULT    {"state": "succeeded"|"failed", "code", "summary", "steps", "deleted": [paths]}
    CANCEL    {}
"""

import json
import struct
from dataclasses import dataclass
from enum import StrEnum

from mycoswarmd.errors import BadRequest

HEADER = struct.Struct(">II")
# A model's answer or a directory listing fits many times over; an attacker gets no more than this.
MAX_JSON_BYTES = 4 << 20
# One piece of a workspace: small enough to interleave, large enough not to cost time.
MAX_PAYLOAD_BYTES = 1 << 20


class FrameType(StrEnum):
    """What a frame says; see the module's table."""

    CONFINE = "confine"
    PROOF = "proof"
    WORKSPACE = "workspace"
    JOB = "job"
    MODEL = "model"
    MODEL_OK = "model-ok"
    TOOL = "tool"
    PERMIT = "permit"
    REFUSED = "refused"
    TOOL_DONE = "tool-done"
    NOTE = "note"
    CHANGES = "changes"
    RESULT = "result"
    CANCEL = "cancel"


@dataclass(frozen=True, slots=True)
class Frame:
    """One message; `body` does not repeat the type."""

    type: FrameType
    body: dict[str, object]
    payload: bytes = b""


def encode_frame(frame: Frame) -> bytes:
    """Encode a frame; an oversized one is a bug of the sender's and raises BadRequest too."""
    text = json.dumps({"type": frame.type.value, **frame.body}, ensure_ascii=False).encode(
        "utf-8", "surrogatepass"
    )
    check_lengths(len(text), len(frame.payload))
    return HEADER.pack(len(text), len(frame.payload)) + text + frame.payload


def decode_header(untrusted: bytes) -> tuple[int, int]:
    """Read the two lengths from the first eight bytes, bounded."""
    json_bytes, payload_bytes = HEADER.unpack(untrusted)
    check_lengths(json_bytes, payload_bytes)
    return json_bytes, payload_bytes


def decode_frame(untrusted_json: bytes, payload: bytes) -> Frame:
    """Parse a frame's two parts, whose lengths were checked."""
    try:
        untrusted = json.loads(untrusted_json.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as exc:
        raise BadRequest("bad-frame", "cannot read a frame: it is not JSON") from exc
    if not isinstance(untrusted, dict):
        raise BadRequest("bad-frame", "cannot read a frame: it is not an object")
    kind = untrusted.pop("type", None)
    if not isinstance(kind, str) or kind not in FrameType.__members__.values():
        raise BadRequest("bad-frame", "cannot read a frame: its type is unknown")
    return Frame(FrameType(kind), untrusted, payload)


def check_lengths(json_bytes: int, payload_bytes: int) -> None:
    """Refuse a frame that is too large, before reading it."""
    if not 2 <= json_bytes <= MAX_JSON_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
        raise BadRequest(
            "bad-frame",
            f"cannot take a frame of {json_bytes} + {payload_bytes} bytes",
            hint=f"at most {MAX_JSON_BYTES} + {MAX_PAYLOAD_BYTES}",
        )
