"""A signing key: in a file of this node, or with the signer's unit, which signs for it and keeps the key.

Law: whoever holds a `UnitSigner` can have statements signed as long as the connection lasts, and cannot get
the key. Calls of both are synchronous and bounded in time.
"""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mycoswarmd.errors import BadRequest, ConfigError, LocalProtocolError, NotFound, StoreError, Unavailable
from mycoswarmd.flow.ports import Clock
from mycoswarmd.trust.keyfile import read_key, remove_files, write_key
from mycoswarmd.trust.keys import make_seed, public_key, sign, verify
from mycoswarmd.wire.proof import Proof
from mycoswarmd.wire.signing import (
    ANSWER_BYTES,
    Answer,
    Do,
    Failed,
    Failure,
    Request,
    encode_request,
    parse_answer,
)

# A call takes a millisecond; the first one starts the unit, which takes a quarter of a second, or many on a
# slow machine that has just booted. Hanging up ends the unit: giving up early would begin all anew each time.
WITHIN_S = 15.0
# A unit that has failed is left alone for so long, so that nobody waits for it again and again.
RETRY_S = 10.0
_START = "systemctl enable --now mycoswarm-signer.socket"
_LOOK = "systemctl status mycoswarm-signer.socket; journalctl -u 'mycoswarm-signer@*'"


class FileSigner:
    """Keeps the key in `signer.key` of a directory; implements flow.swarmports.Signer."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "signer.key"
        self._seed: bytes | None = None

    def public_key(self) -> bytes | None:
        """Return the public half, or None: this node signs nothing; ConfigError for a key of no use."""
        seed = self._load()
        return public_key(seed) if seed is not None else None

    def create(self) -> bytes:
        """Make the key if there is none, durably, and return its public half."""
        seed = self._load()
        if seed is None:
            seed = make_seed()
            write_key(self._path, seed)
            self._seed = seed
        return public_key(seed)

    def wake(self) -> None:
        """Read the key."""
        self._load()

    def sign(self, message: bytes) -> bytes:
        """Sign; raise NotFound("not-a-signer") where there is no key."""
        seed = self._load()
        if seed is None:
            raise NotFound("not-a-signer", "cannot sign: this node holds no signing key")
        return sign(seed, message)

    def destroy(self) -> None:
        """Forget the key. Idempotent."""
        self._seed = None
        remove_files(self._path)

    def _load(self) -> bytes | None:
        if self._seed is None:
            self._seed = read_key(self._path)
        return self._seed


class UnitSigner:
    """Has the signer's unit sign; implements flow.swarmports.Signer.

    What is known of the public half is kept, for it is asked for all the time. Where nothing listens at the
    unit's socket that is an error, not a node without a key: the unit is part of every appliance.
    """

    def __init__(
        self, path: Path, *, clock: Clock, within_s: float = WITHIN_S, retry_s: float = RETRY_S
    ) -> None:
        self._path = path
        self._clock = clock
        self._within_s = within_s
        self._retry_s = retry_s
        self._lock = threading.Lock()  # the daemon creates and destroys in threads
        self._sock: socket.socket | None = None
        self._down_until_s = 0.0
        self._is_known = False
        self._public: bytes | None = None

    @property
    def known_key(self) -> bytes | None:
        """The public half, where the unit has said it."""
        return self._public if self._is_known else None

    def public_key(self) -> bytes | None:
        """Return the public half, or None: this node signs nothing; ConfigError for a key of no use."""
        if not self._is_known:
            self._learn(self._ask(Request(Do.PUBLIC)).public)
        return self._public

    def create(self) -> bytes:
        """Make the key if there is none, durably, and return its public half."""
        public = self._ask(Request(Do.CREATE)).public
        if public is None:
            raise _garbage()
        self._learn(public)
        return public

    def wake(self) -> None:
        """Have the unit started, where it has ended, and learn the public half anew."""
        self._learn(self._ask(Request(Do.PUBLIC)).public)

    def sign(self, message: bytes) -> bytes:
        """Sign; raise NotFound("not-a-signer") where there is no key."""
        public = self.public_key()
        if public is None:
            raise NotFound("not-a-signer", "cannot sign: this node holds no signing key")
        signature = self._ask(Request(Do.SIGN, message)).signature
        if signature is None or not verify(public, signature, message):
            self._is_known = False  # perhaps it has another key by now
            raise _garbage()
        return signature

    def destroy(self) -> None:
        """Forget the key. Idempotent."""
        try:
            self._ask(Request(Do.DESTROY))
        except _Absent:
            if self._public is not None:
                raise
            return  # a node that never signed may leave its swarm without the unit
        self._learn(None)

    def prove(self) -> Proof:
        """Return what the unit finds out about its own confinement."""
        proof = self._ask(Request(Do.PROVE)).proof
        if proof is None:
            raise _garbage()
        return proof

    def close(self) -> None:
        """End the connection, and with it the unit; another call makes another."""
        with self._lock:
            self._hang_up()

    def _learn(self, public: bytes | None) -> None:
        self._public, self._is_known = public, True
        if public is None:
            self.close()  # there is nothing to be held

    def _ask(self, request: Request) -> Answer:
        """Return the answer; raise what the unit says, or Unavailable when it says nothing in time."""
        with self._lock:
            now_s = self._clock.monotonic_s()
            if now_s < self._down_until_s:
                raise _silent("it failed a moment ago")
            try:
                line = self._exchange(encode_request(request), until_s=now_s + self._within_s)
            except OSError as exc:
                self._hang_up()
                if isinstance(exc, (FileNotFoundError, ConnectionRefusedError)):
                    raise _Absent(
                        "signer-absent",
                        f"cannot sign: nothing listens at {str(self._path)!r}",
                        hint=_START,
                    ) from exc
                self._down_until_s = self._clock.monotonic_s() + self._retry_s
                raise _silent(exc.strerror or str(exc)) from exc
        try:
            answer = parse_answer(line)
        except BadRequest as exc:
            self.close()
            raise _garbage() from exc
        if isinstance(answer, Failed):
            raise _ERRORS[answer.kind](answer.code, answer.text, hint=answer.hint)
        return answer

    def _exchange(self, line: bytes, *, until_s: float) -> bytes:
        """Send a line and return the next; on a new connection where the old one has ended meanwhile."""
        if self._sock is not None:
            with suppress(BrokenPipeError, ConnectionResetError, _Ended):
                return self._converse(self._sock, line, until_s)
            self._hang_up()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(self._left_s(until_s))
        self._sock.connect(str(self._path))
        return self._converse(self._sock, line, until_s)

    def _converse(self, sock: socket.socket, line: bytes, until_s: float) -> bytes:
        sock.settimeout(self._left_s(until_s))
        sock.sendall(line)
        held = b""
        while not held.endswith(b"\n"):
            sock.settimeout(self._left_s(until_s))
            piece = sock.recv(ANSWER_BYTES + 1 - len(held))
            if not piece:
                raise _Ended("its unit ended without a word")
            held += piece
            if len(held) > ANSWER_BYTES:
                raise OSError("its unit does not stop talking")
        return held

    def _left_s(self, until_s: float) -> float:
        left_s = until_s - self._clock.monotonic_s()
        if left_s <= 0:
            raise TimeoutError(f"its unit did not answer within {self._within_s:g} s")
        return left_s

    def _hang_up(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


class _Absent(Unavailable):
    """The signer's unit is not there."""


class _Ended(OSError):
    """The other end has closed the connection."""


_ERRORS: dict[Failure, Callable[..., Exception]] = {
    Failure.NO_KEY: NotFound,
    Failure.BAD_KEY: ConfigError,
    Failure.DISK: StoreError,
    Failure.BUSY: Unavailable,
    Failure.REFUSED: LocalProtocolError,
}


def _silent(cause: str) -> Unavailable:
    return Unavailable(
        "signer-unreachable", f"cannot reach the signer: {cause}", hint=_LOOK, retry_after_s=10
    )


def _garbage() -> Unavailable:
    return Unavailable(
        "signer-failed", "cannot use the signer's answer: it is not what was asked for", hint=_LOOK
    )
