"""Holds this node's signing key and signs for it: what the signer's unit does with a connection.

PID 1 builds the confinement (systemd/README.md) and hands the node's connection over as descriptor 0;
daemon/signerunit.py is the program. The node may ask for signatures as long as it lives; it never gets the
key, so no signature is made once an intruder is out. What was signed meanwhile remains valid until another
signer removes this one: the journal of the unit, which the node cannot write, has a line for each.

Laws:

1. Only a statement of the roster or a beacon is signed, whole, in its one form, and said to be by this key.
   So the key cannot be made to speak TLS, or anything else that somebody may one day verify with it.
2. Nothing that could hold the key is ever sent (wire/signing.py), and no message is written anywhere.
3. The key's file is looked at anew for each request, and one request at a time touches it.
4. Each signature, with its kind and its sha256, is in the journal before it is given away. There are not
   more than a swarm needs, and no beacon counts far ahead (outposts/signbook.py).
"""

import base64
import fcntl
import hashlib
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mycoswarmd.core.roster.beacon import BEACON_CONTEXT, Beacon, make_beacon_message, parse_beacon
from mycoswarmd.core.roster.statement import SIGNING_CONTEXT, Kind, peek
from mycoswarmd.errors import BadRequest, ConfigError, MycoswarmError, NotFound, StoreError, Unavailable
from mycoswarmd.flow.swarmports import Signer
from mycoswarmd.outposts.selftest import prove
from mycoswarmd.outposts.signbook import Book, read_book, write_book
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
# Whose statement it is; those by members and by the recovery key are none of this key's.
_BY = {
    Kind.GENESIS: "signer",
    Kind.ADMIT: "by",
    Kind.REVOKE: "by",
    Kind.ADD_SIGNER: "by",
    Kind.DROP_SIGNER: "by",
}
_NO_SIGNATURE = "0" * 128
log = logging.getLogger("mycoswarmd.signer")


def serve(
    node: socket.socket, directory: Path, make: Callable[[], Signer], *, now_ms: Callable[[], int]
) -> None:
    """Answer requests until the node goes, is silent, or says what is none.

    `make` returns the signer of that directory as it is now.
    """
    node.settimeout(IDLE_S)
    for line in _lines(node):
        try:
            request = parse_request(line)
            with _alone(directory):
                answer: Answer | Failed = _answer(request, make(), directory, now_ms())
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


def _answer(request: Request, signer: Signer, directory: Path, now_ms: int) -> Answer:
    match request.do:
        case Do.CREATE:
            return Answer(public=signer.public_key() or _create(signer, directory, now_ms))
        case Do.PUBLIC:
            return Answer(public=signer.public_key())
        case Do.SIGN:
            return Answer(signature=_sign(request.message, signer, directory, now_ms))
        case Do.DESTROY:
            log.warning("the key is destroyed")
            signer.destroy()
            return Answer()
        case Do.PROVE:
            return Answer(proof=prove(Unit.SIGNER))


def _create(signer: Signer, directory: Path, now_ms: int) -> bytes:
    _spend(directory, now_ms)
    public = signer.create()
    log.warning("made the key %s", public.hex())
    return public


def _sign(message: bytes, signer: Signer, directory: Path, now_ms: int) -> bytes:
    """Sign what this key may say, once it is written down."""
    public = signer.public_key()
    if public is None:
        raise NotFound("not-a-signer", "cannot sign: there is no signing key")
    counter = None
    if message.startswith(SIGNING_CONTEXT):
        body = message.removeprefix(SIGNING_CONTEXT)
        what = _statement_of(body, public.hex())
    elif message.startswith(BEACON_CONTEXT):
        body = message.removeprefix(BEACON_CONTEXT)
        beacon = _beacon_of(body, public.hex())
        what, counter = f"beacon {beacon.n}", beacon.n
    else:
        raise _not_signable("it is neither a statement of a roster nor a beacon")
    book = _spend(directory, now_ms)
    if counter is not None:
        book.count(public.hex(), counter)
        write_book(directory, book)
    log.warning("signs %s %s", what, hashlib.sha256(body).hexdigest())
    return signer.sign(message)


def _spend(directory: Path, now_ms: int) -> Book:
    book = read_book(directory)
    try:
        book.spend(now_ms)
    finally:
        write_book(directory, book)
    return book


def _statement_of(untrusted_body: bytes, public: str) -> str:
    try:
        kind, _, facts = peek({"body": base64.b64encode(untrusted_body).decode("ascii"), "sigs": None})
    except BadRequest as exc:
        raise _not_signable(exc.message) from exc
    if kind not in _BY or facts[_BY[kind]] != public:
        raise _not_signable(f"such a statement ({kind.value}) is not by this key")
    return kind.value


def _beacon_of(untrusted_body: bytes, public: str) -> Beacon:
    """Return the beacon of which this is all but the signature."""
    try:
        found = json.loads(untrusted_body)
        fields = {**found, "sig": _NO_SIGNATURE} if isinstance(found, dict) and "sig" not in found else None
        beacon = parse_beacon(fields, verify=lambda _key, _signature, _message: True)
    except BadRequest as exc:
        raise _not_signable(exc.message) from exc
    except (ValueError, RecursionError) as exc:
        raise _not_signable("it is no JSON") from exc
    whole = make_beacon_message(swarm=beacon.swarm, epoch=beacon.epoch, signer=beacon.signer, n=beacon.n)
    if whole != BEACON_CONTEXT + untrusted_body:
        raise _not_signable("it is not in canonical JSON")
    if beacon.signer != public:
        raise _not_signable("the beacon is not by this key")
    return beacon


def _not_signable(why: str) -> BadRequest:
    return BadRequest("not-signable", f"cannot sign this: {why}")


def _failed(exc: MycoswarmError) -> Failed:
    kinds = {
        NotFound: Failure.NO_KEY,
        ConfigError: Failure.BAD_KEY,
        StoreError: Failure.DISK,
        Unavailable: Failure.BUSY,
    }
    return Failed(kinds.get(type(exc), Failure.REFUSED), exc.code, exc.message, exc.hint)
