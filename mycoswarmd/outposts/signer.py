"""Holds this node's signing key and signs for it: what the signer's unit does with a connection.

PID 1 builds the confinement (systemd/README.md) and hands the node's connection over as descriptor 0;
daemon/signerunit.py is the program. The node may ask for signatures as long as it lives; it never gets the
key, so that who breaks into the node has nothing to take away, and no signature is made once it is out.

Laws:

1. Only a statement of the roster or a beacon is signed: what does not begin as one of them is refused. So
   the key cannot be made to speak TLS, or anything else that somebody may one day verify with it.
2. Nothing that could hold the key is ever sent (wire/signing.py), and no message is written anywhere.
3. The key's file is looked at anew for each request, and one request at a time touches it.
"""

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mycoswarmd.core.roster.beacon import BEACON_CONTEXT
from mycoswarmd.core.roster.statement import SIGNING_CONTEXT
from mycoswarmd.errors import BadRequest, ConfigError, MycoswarmError, NotFound, StoreError
from mycoswarmd.flow.swarmports import Signer
from mycoswarmd.outposts.selftest import prove
from mycoswarmd.wire.proof import Unit
from mycoswarmd.wire.signing import (
    REQUEST_BYTES,
    Answer,
    Do,
    Failed,
    Failure,
    Request,
    encode_answer,
    parse_request,
)

# A signer signs every few hours; what is not used is not kept in memory.
IDLE_S = 60.0
_PIECE_BYTES = 1 << 18
_SIGNED = (SIGNING_CONTEXT, BEACON_CONTEXT)


def serve(node: socket.socket, directory: Path, make: Callable[[], Signer]) -> None:
    """Answer requests until the node goes, is silent, or says what is none.

    `make` returns the signer of that directory as it is now.
    """
    node.settimeout(IDLE_S)
    for line in _lines(node):
        try:
            request = parse_request(line)
            with _alone(directory):
                answer: Answer | Failed = _answer(request, make())
        except MycoswarmError as exc:
            answer = _failed(exc)
        except OSError as exc:
            answer = Failed(Failure.DISK, "key-unwritable", f"cannot use {str(directory)!r}: {exc.strerror}")
        try:
            node.sendall(encode_answer(answer))
        except OSError:
            return


def _lines(node: socket.socket) -> Iterator[bytes]:
    held = b""
    while True:
        line, end, rest = held.partition(b"\n")
        if end:
            held = rest
            yield line
            continue
        if len(held) > REQUEST_BYTES:
            return
        try:
            piece = node.recv(_PIECE_BYTES)
        except OSError:  # also for a silent node
            return
        if not piece:
            return
        held += piece


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keep the program of another connection from touching the key meanwhile."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _answer(request: Request, signer: Signer) -> Answer:
    match request.do:
        case Do.CREATE:
            return Answer(public=signer.create())
        case Do.PUBLIC:
            return Answer(public=signer.public_key())
        case Do.SIGN:
            if not request.message.startswith(_SIGNED):
                raise BadRequest(
                    "not-signable", "cannot sign this: it is neither a statement of a roster nor a beacon"
                )
            return Answer(signature=signer.sign(request.message))
        case Do.DESTROY:
            signer.destroy()
            return Answer()
        case Do.PROVE:
            return Answer(proof=prove(Unit.SIGNER))


def _failed(exc: MycoswarmError) -> Failed:
    kinds = {NotFound: Failure.NO_KEY, ConfigError: Failure.BAD_KEY, StoreError: Failure.DISK}
    return Failed(kinds.get(type(exc), Failure.REFUSED), exc.code, exc.message, exc.hint)
