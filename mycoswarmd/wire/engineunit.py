"""What the core and the engine's unit say to one another: JSON, one object a line, on their connection.

Laws:

1. An order names things, it never says where they are: a model file and an engine by their bare names, and
   numbers within bounds. There is no field for a path, an argument, a variable or a command.
2. One order for each connection. The connection is the engine's life: whoever closes it ends the engine.
3. The unit's lines are believed no more than an engine is: each is bounded, each field is checked.

The command line of the engine's own process is made here as well, so that a child and a unit are the same.
Source: systemd/README.md; mycoswarmd/engines/llama_child.py for the command line.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from mycoswarmd.wire.jsonv import (
    bad_range,
    get_bool,
    get_int,
    get_object,
    get_str,
    parse_object,
)
from mycoswarmd.wire.proof import Proof, parse_proof_body, proof_body

VERSION: Final = 1
ORDER_BYTES: Final = 4096
# The longest holds the last words of an engine, in JSON's longest spelling.
REPORT_BYTES: Final = 32 << 10
LOG_CHARS: Final = 4096
TEXT_CHARS: Final = 500
MAX_CONTEXT_TOKENS: Final = 1 << 20
MAX_PARALLEL: Final = 64
MAX_THREADS: Final = 1024
MODEL_SUFFIX: Final = ".gguf"
# Of a file of Linux, in bytes.
_NAME_BYTES: Final = 255
_ENGINE: Final = re.compile(r"xllamacpp-[A-Za-z0-9][A-Za-z0-9._+-]{0,99}\Z")
# In a directory of its own, which has the name of the unit's instance.
_SOCKET: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}/[a-z0-9][a-z0-9-]{0,31}\.sock\Z")
# Debian's and Ubuntu's; inside the engine's confinement there is no other, and any 3.10 or newer will do.
PYTHON: Final = "/usr/bin/python3"
# How long llama.cpp's threads wait for one another by spinning. The library's default is for machines that
# do nothing else: with two other busy processes on two cores it made 4 to 28 tokens a second, this 56 to 124;
# on an idle machine 115 and 140.
ENVIRONMENT: Final[Mapping[str, str]] = {"GOMP_SPINCOUNT": "20000"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How a model is to be served."""

    context_tokens: int
    parallel: int
    threads: int
    is_embedding: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Serve this model file with this engine, both by their names in the directories of the unit."""

    engine: str
    model: str
    serving: Serving


@dataclass(frozen=True, slots=True)
class Proved:
    """What the unit found out about its own confinement, said before it takes an order."""

    proof: Proof


@dataclass(frozen=True, slots=True)
class Started:
    """The engine's process runs and will listen on this socket: its directory, and its name there."""

    pid: int
    socket: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The order is not carried out; why, for a person.

    Attributes:
        is_models: whether it is about this model only, so that another may do.
    """

    text: str
    is_models: bool


@dataclass(frozen=True, slots=True)
class Ended:
    """The engine ended by itself: its code, negative for a signal, and the end of what it wrote."""

    code: int
    log: str


Report = Proved | Started | Refused | Ended


def child_argv(
    serving: Serving, *, program: str, engine: str, model: str, name: str, socket: str
) -> list[str]:
    """Return the command that serves a model; all but `serving` are paths that the caller has checked."""
    return [
        PYTHON, "-I", "-S", program,
        "--engine", engine,
        "--model", model,
        "--name", name,
        "--socket", socket,
        "--context", str(serving.context_tokens),
        "--parallel", str(serving.parallel),
        "--threads", str(serving.threads),
        *(["--embedding"] if serving.is_embedding else []),
    ]  # fmt: skip


def encode_order(order: Order) -> bytes:
    """Encode an order as a line."""
    return _line(
        {
            "v": VERSION,
            "engine": order.engine,
            "model": order.model,
            "context": order.serving.context_tokens,
            "parallel": order.serving.parallel,
            "threads": order.serving.threads,
            "embedding": order.serving.is_embedding,
        },
        ORDER_BYTES,
    )


def parse_order(untrusted: bytes) -> Order:
    """Parse the one line that the core sends; whatever is not expected in it is refused."""
    body = parse_object(untrusted, what="an order")
    known = {"v", "engine", "model", "context", "parallel", "threads", "embedding"}
    if unknown := sorted(body.keys() - known):
        raise bad_range("", f"an order of known fields, found {len(unknown)} unknown")
    get_int(body, "v", where="", low=VERSION, high=VERSION)
    engine = get_str(body, "engine", where="", max_len=_NAME_BYTES)
    if not _ENGINE.match(engine):
        raise bad_range("engine", "the name of an installed engine")
    return Order(
        engine=engine,
        model=_model(body),
        serving=Serving(
            context_tokens=get_int(body, "context", where="", low=1, high=MAX_CONTEXT_TOKENS),
            parallel=get_int(body, "parallel", where="", low=1, high=MAX_PARALLEL),
            threads=get_int(body, "threads", where="", low=1, high=MAX_THREADS),
            is_embedding=get_bool(body, "embedding", where=""),
        ),
    )


def _model(body: dict[str, object]) -> str:
    name = get_str(body, "model", where="", max_len=_NAME_BYTES)
    is_bare = "/" not in name and name.isprintable() and not name.startswith((".", "-"))
    if not is_bare or not name.endswith(MODEL_SUFFIX) or len(name.encode()) > _NAME_BYTES:
        raise bad_range("model", f"the bare name of a {MODEL_SUFFIX} file")
    return name


def encode_report(report: Report) -> bytes:
    """Encode a report as a line, its texts cut to their bounds."""
    match report:
        case Proved():
            return _line({"proof": proof_body(report.proof)}, REPORT_BYTES)
        case Started():
            return _line({"started": {"pid": report.pid, "socket": report.socket}}, REPORT_BYTES)
        case Refused():
            refused = {"text": _clean(report.text[:TEXT_CHARS]), "model": report.is_models}
            return _line({"refused": refused}, REPORT_BYTES)
        case Ended():
            ended = {"code": report.code, "log": _clean(report.log[-LOG_CHARS:])}
            return _line({"ended": ended}, REPORT_BYTES)


def parse_report(untrusted: bytes) -> Report:
    """Parse a line of the unit's."""
    body = parse_object(untrusted, what="a report of the engine's unit")
    if "proof" in body:
        return Proved(parse_proof_body(body["proof"]))
    if "started" in body:
        started = get_object(body, "started", where="")
        socket = get_str(started, "socket", where="started", max_len=_NAME_BYTES)
        if not _SOCKET.match(socket):
            raise bad_range("started.socket", "a socket in a directory of its own")
        return Started(get_int(started, "pid", where="started", low=1, high=1 << 22), socket)
    if "refused" in body:
        refused = get_object(body, "refused", where="")
        text = _clean(get_str(refused, "text", where="refused", max_len=TEXT_CHARS))
        return Refused(text, get_bool(refused, "model", where="refused"))
    ended = get_object(body, "ended", where="")
    return Ended(
        get_int(ended, "code", where="ended", low=-64, high=255),
        _clean(get_str(ended, "log", where="ended", max_len=LOG_CHARS)),
    )


def _clean(text: str) -> str:
    """Make an engine's words harmless on a terminal."""
    return "".join(char if char == "\n" or (char.isascii() and char.isprintable()) else "?" for char in text)


def _line(body: Mapping[str, object], most_bytes: int) -> bytes:
    line = json.dumps(body, separators=(",", ":"), ensure_ascii=True).encode("ascii") + b"\n"
    if len(line) > most_bytes:
        raise bad_range("", f"a line of at most {most_bytes} bytes, found {len(line)}")
    return line
