"""The signer's unit: it signs statements and beacons for the node, and nobody gets its key."""

import asyncio
import base64
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest

from mycoswarmd.core.roster import (
    BEACON_CONTEXT,
    SIGNING_CONTEXT,
    Kind,
    canonical,
    make_beacon_message,
    make_body,
    sign_beacon,
    signed,
)
from mycoswarmd.core.roster.beacon import MAX_COUNTER
from mycoswarmd.daemon.clock import SystemClock
from mycoswarmd.daemon.signing import PatientSigner
from mycoswarmd.errors import BadRequest, ConfigError, LocalProtocolError, NotFound, Unavailable
from mycoswarmd.flow.swarmports import Signer
from mycoswarmd.outposts import signbook
from mycoswarmd.outposts import signer as signer_module
from mycoswarmd.trust.keyfile import read_key
from mycoswarmd.trust.keys import make_seed, public_key, sign, verify
from mycoswarmd.trust.signer import FileSigner, UnitSigner
from mycoswarmd.wire.signing import (
    ANSWER_BYTES,
    MESSAGE_BYTES,
    Answer,
    Do,
    Failed,
    Failure,
    Request,
    encode_answer,
    encode_request,
    parse_answer,
    parse_request,
)
from tests.rosters import key
from tests.unit.flow.test_swarm import machine

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
PROGRAM = [sys.executable, "-I", "-m", "mycoswarmd.daemon.signerunit"]
STATEMENT = SIGNING_CONTEXT + b'{"kind":"admit"}'
# What the signer of a TLS 1.3 server signs (RFC 8446, 4.4.3): with the key one could be a server in its name.
TLS = b" " * 64 + b"TLS 1.3, server CertificateVerify\0" + b"h" * 32
OTHERS = [
    b"",
    b"\0",
    TLS,
    SIGNING_CONTEXT[:-1],
    SIGNING_CONTEXT[:-1] + b"{}",
    b" " + STATEMENT,
    STATEMENT[1:],
    STATEMENT.upper(),
    b"mycoswarm-roster-v2\0{}",
    b"mycoswarm-recovery-v1\0{}",
    b"mycoswarm-pop" + b"x" * 32,
    b"mycoswarm-enrol-v1",
    BEACON_CONTEXT[:10],
    BEACON_CONTEXT[:-1] + b"\n",
    os.urandom(64),
]


SWARM = "0" * 64


def statement(public: bytes, *, node: str = "a" * 26) -> bytes:
    """Return what a signer with this key may sign."""
    by = public.hex()
    return SIGNING_CONTEXT + make_body(Kind.REVOKE, swarm=SWARM, epoch=0, node=node, reason="", by=by)


def beacon(public: bytes, n: int = 1) -> bytes:
    return make_beacon_message(swarm=SWARM, epoch=0, signer=public.hex(), n=n)


def long_statement(public: bytes) -> bytes:
    """Return one that lists nearly all that an epoch can keep."""
    keep = [hashlib.sha256(b"%d" % n).hexdigest() for n in range(15_000)]
    facts = {"swarm": SWARM, "epoch": 0, "key": "1" * 64, "keep": keep, "by": public.hex()}
    return SIGNING_CONTEXT + make_body(Kind.DROP_SIGNER, **facts)


class UnitManager:
    """Does in a thread what PID 1 does for the unit, for the signer's calls are synchronous."""

    def __init__(self, top: Path, argv: list[str]) -> None:
        self.path = top / "s"
        self.programs: list[subprocess.Popen[bytes]] = []
        self._argv = argv
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                argv, env = self._argv, {"LANG": "C.UTF-8"}
                self.programs.append(subprocess.Popen(argv, stdin=connection.fileno(), env=env))

    def end(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        self.path.unlink(missing_ok=True)  # as RemoveOnStop= has it
        for program in self.programs:
            program.kill()
            program.wait()


@contextmanager
def place() -> Iterator[Path]:
    """Yield a directory with the unit's state directory in it; short, for the socket."""
    with tempfile.TemporaryDirectory(prefix="g-") as name:
        (Path(name) / "state").mkdir(mode=0o700)
        yield Path(name)


@contextmanager
def unit(
    top: Path, argv: list[str] | None = None, *, within_s: float = 60.0, retry_s: float = 0.0
) -> Iterator[tuple[UnitSigner, UnitManager]]:
    """Hold the node's side of a unit."""
    manager = UnitManager(top, argv or [*PROGRAM, "--state", str(top / "state")])
    node = UnitSigner(manager.path, clock=SystemClock(), within_s=within_s, retry_s=retry_s)
    try:
        yield node, manager
    finally:
        node.close()
        manager.end()


class Recorder:
    """The node's end of a connection to the program, which keeps all that came."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.heard = b""

    def ask(self, line: bytes) -> dict[str, Any]:
        self._sock.sendall(line)
        before = len(self.heard)
        while not self.heard.endswith(b"\n") or len(self.heard) == before:
            piece = self._sock.recv(65536)
            assert piece, "the program ended"
            self.heard += piece
        answer: dict[str, Any] = json.loads(self.heard[before:])
        return answer

    def is_over(self) -> bool:
        return self._sock.recv(1) == b""


@contextmanager
def program(state: Path) -> Iterator[tuple[Recorder, subprocess.Popen[bytes]]]:
    ours, its = socket.socketpair()
    argv = [*PROGRAM, "--state", str(state)]
    with ours, subprocess.Popen(argv, stdin=its.fileno(), env={"LANG": "C.UTF-8"}) as process:
        its.close()
        ours.settimeout(60)
        try:
            yield Recorder(ours), process
        finally:
            process.kill()


def test_it_makes_keeps_signs_and_destroys_and_never_tells_the_key() -> None:
    with place() as top, program(top / "state") as (node, process):
        assert node.ask(encode_request(Request(Do.PUBLIC))) == {"done": {}}
        said = node.ask(encode_request(Request(Do.SIGN, STATEMENT)))
        assert said["failed"]["kind"] == "no-key"
        public = bytes.fromhex(node.ask(encode_request(Request(Do.CREATE)))["done"]["public"])
        assert node.ask(encode_request(Request(Do.CREATE)))["done"] == {"public": public.hex()}
        for message in (statement(public), beacon(public), long_statement(public)):
            answer = node.ask(encode_request(Request(Do.SIGN, message)))["done"]
            assert list(answer) == ["signature"]
            assert verify(public, bytes.fromhex(answer["signature"]), message)
        assert node.ask(encode_request(Request(Do.PROVE)))["done"]["proof"]["unit"] == "signer"
        key = top / "state" / "signer.key"
        assert key.stat().st_mode & 0o777 == 0o600
        seed, pem = read_key(key), key.read_bytes()
        assert seed is not None
        assert public_key(seed) == public
        spellings = (seed, seed.hex().encode(), base64.b64encode(seed)[:40], pem.splitlines()[1])
        assert public.hex().encode() in node.heard  # so would be what is looked for
        assert not any(spelling in node.heard for spelling in spellings)
        assert node.ask(encode_request(Request(Do.DESTROY))) == {"done": {}}
        assert [one.name for one in (top / "state").iterdir()] == ["signed.json"]  # no key
        assert node.ask(encode_request(Request(Do.SIGN, STATEMENT)))["failed"]["kind"] == "no-key"
        assert process.poll() is None


def test_it_signs_nothing_but_statements_and_beacons() -> None:
    with place() as top, program(top / "state") as (node, _):
        public = bytes.fromhex(node.ask(encode_request(Request(Do.CREATE)))["done"]["public"])
        # Whoever has the key in a file can be a TLS server in its name.
        assert verify(public, FileSigner(top / "state").sign(TLS), TLS)
        for message in OTHERS:
            said = node.ask(encode_request(Request(Do.SIGN, message)))
            assert list(said) == ["failed"]
            assert (said["failed"]["kind"], said["failed"]["code"]) == ("refused", "not-signable")
        assert "done" in node.ask(encode_request(Request(Do.SIGN, statement(public))))  # and goes on


def foreign(public: bytes) -> dict[str, bytes]:
    """Return what begins as something that is signed, and is not."""
    by, other = public.hex(), "1" * 64
    good = json.loads(statement(public).removeprefix(SIGNING_CONTEXT))
    count = json.loads(beacon(public).removeprefix(BEACON_CONTEXT))
    leave = {"v": 1, "kind": "leave", "swarm": SWARM, "epoch": 0, "node": "a" * 26, "key": by}
    bodies = {
        "nothing": b"",
        "garbage": b"this is no statement \xff\x00",
        "other spelling": json.dumps(good).encode(),
        "by another": canonical({**good, "by": other}),
        "a field too much": canonical({**good, "until": 1}),
        "unknown kind": canonical({**good, "kind": "grant"}),
        "a member's": canonical(leave),
    }
    beacons = {
        "no beacon": b"",
        "beacon of garbage": b"garbage",
        "beacon in part": b'{"n":9007199254740991}',
        "beacon that is a list": b"[]",
        "beacon with a signature": canonical({**count, "sig": "0" * 128}),
        "beacon in another spelling": json.dumps(count).encode(),
        "beacon by another": canonical({**count, "signer": other}),
        "beacon far ahead": canonical({**count, "n": signbook.MOST_AHEAD + 1}),
        "last beacon": canonical({**count, "n": MAX_COUNTER}),
        "deep beacon": b"[" * 100_000,
    }
    return {name: SIGNING_CONTEXT + body for name, body in bodies.items()} | {
        name: BEACON_CONTEXT + body for name, body in beacons.items()
    }


def test_what_only_begins_like_a_statement_is_not_signed() -> None:
    with place() as top, program(top / "state") as (node, _):
        public = bytes.fromhex(node.ask(encode_request(Request(Do.CREATE)))["done"]["public"])
        before = FileSigner(top / "state")  # signs all that it is given, as the unit did
        for name, message in foreign(public).items():
            assert verify(public, before.sign(message), message)
            said = node.ask(encode_request(Request(Do.SIGN, message)))
            assert said.get("failed", {}).get("code") == "not-signable", name
        assert "done" in node.ask(encode_request(Request(Do.SIGN, statement(public))))


def test_beacons_count_on_and_never_far_ahead_also_for_the_next_program() -> None:
    with place() as top:
        with program(top / "state") as (node, _):
            public = bytes.fromhex(node.ask(encode_request(Request(Do.CREATE)))["done"]["public"])
            for n in (1, 2, 2, 1, signbook.MOST_AHEAD):  # a node that forgot may count again
                assert "done" in node.ask(encode_request(Request(Do.SIGN, beacon(public, n))))
        with program(top / "state") as (node, _):
            far = beacon(public, 2 * signbook.MOST_AHEAD + 1)
            assert node.ask(encode_request(Request(Do.SIGN, far)))["failed"]["code"] == "not-signable"
            near = beacon(public, 2 * signbook.MOST_AHEAD)
            assert "done" in node.ask(encode_request(Request(Do.SIGN, near)))


def test_the_journal_has_each_signature_before_the_node() -> None:
    with place() as top:
        ours, its = socket.socketpair()
        argv = [*PROGRAM, "--state", str(top / "state")]
        with ours, its, subprocess.Popen(argv, stdin=its.fileno(), stderr=subprocess.PIPE) as process:
            its.close()
            ours.settimeout(60)
            node = Recorder(ours)
            public = bytes.fromhex(node.ask(encode_request(Request(Do.CREATE)))["done"]["public"])
            node.ask(encode_request(Request(Do.SIGN, statement(public))))
            node.ask(encode_request(Request(Do.SIGN, beacon(public, 7))))
            node.ask(encode_request(Request(Do.DESTROY)))
            process.kill()
            assert process.stderr is not None
            said = process.stderr.read().decode().splitlines()
    body, count = statement(public)[len(SIGNING_CONTEXT) :], beacon(public, 7)[len(BEACON_CONTEXT) :]
    assert said == [
        f"made the key {public.hex()}",
        f"signs revoke {hashlib.sha256(body).hexdigest()}",
        f"signs beacon 7 {hashlib.sha256(count).hexdigest()}",
        "the key is destroyed",
    ]


def test_nobody_takes_signatures_for_years(monkeypatch: pytest.MonkeyPatch) -> None:
    now_ms = [1_000_000_000]
    with place() as top:
        state = top / "state"
        public = FileSigner(state).create()

        def ask(do: Do, message: bytes = b"") -> Answer | Failed:
            """Ask on a connection of its own, as whoever wants to be forgotten does."""
            ours, its = socket.socketpair()
            with ours, its:
                ours.sendall(encode_request(Request(do, message)))
                ours.shutdown(socket.SHUT_WR)
                signer_module.serve(its, state, lambda: FileSigner(state), now_ms=lambda: now_ms[0])
                return parse_answer(ours.recv(ANSWER_BYTES))

        def signed_now(most: int) -> int:
            for done in range(most):
                answer = ask(Do.SIGN, statement(public))
                if isinstance(answer, Failed):
                    assert (answer.kind, answer.code) == (Failure.BUSY, "signer-busy")
                    return done
            return most

        monkeypatch.setattr(signbook.Book, "spend", lambda _self, _now_ms: None)
        assert signed_now(300) == 300  # the attack
        monkeypatch.undo()
        (state / "signed.json").unlink()
        assert signed_now(300) == signbook.AT_ONCE
        now_ms[0] += 3 * signbook.EVERY_MS + 1
        assert signed_now(10) == 3
        now_ms[0] -= 10**8  # a clock that is set back gives nothing, and takes nothing for ever
        assert signed_now(10) == 0
        now_ms[0] += signbook.EVERY_MS
        assert signed_now(10) == 1
        # Nor is it forgotten with the key.
        assert ask(Do.DESTROY) == Answer()
        assert isinstance(ask(Do.CREATE), Failed)
        now_ms[0] += 10**9
        assert isinstance(ask(Do.CREATE), Answer)


@pytest.mark.parametrize(
    "untrusted",
    [
        b"\n",
        b"{}\n",
        b'{"v":1,"do":"read"}\n',
        b'{"v":1,"do":"export"}\n',
        b'{"v":2,"do":"public"}\n',
        b'{"v":1,"do":"public","path":"/etc/shadow"}\n',
        b'{"v":1,"do":"create","seed":"' + b"0" * 64 + b'"}\n',
        b'{"v":1,"do":"sign"}\n',
        b'{"v":1,"do":"sign","message":"%%%"}\n',
        b'{"v":1,"do":"sign","message":["bXljb3N3YXJtLXJvc3Rlci12MQA="]}\n',
    ],
)
def test_what_is_no_request_is_refused(untrusted: bytes) -> None:
    with place() as top, program(top / "state") as (node, _):
        assert node.ask(untrusted)["failed"]["kind"] == "refused"
        assert list((top / "state").iterdir()) == []


def test_a_line_without_an_end_is_not_read_for_ever() -> None:
    with place() as top, program(top / "state") as (node, process):
        with suppress(OSError):
            node._sock.sendall(b"x" * (4 << 20))
        assert process.wait(60) == 0


def test_a_message_that_is_too_long_is_not_sent() -> None:
    with place() as top, unit(top) as (node, _):
        public = node.create()
        with pytest.raises(BadRequest):
            node.sign(SIGNING_CONTEXT + b"x" * MESSAGE_BYTES)
        assert node.sign(statement(public))


@pytest.mark.parametrize("kind", ["file", "unit"])
def test_both_kinds_of_signer_do_the_same(kind: str) -> None:
    with place() as top, unit(top) as (node, _):
        one: Signer = node if kind == "unit" else FileSigner(top / "state")
        assert one.public_key() is None
        with pytest.raises(NotFound, match="not-a-signer"):
            one.sign(STATEMENT)
        one.destroy()
        public = one.create()
        assert one.create() == public == one.public_key()
        assert verify(public, one.sign(statement(public)), statement(public))
        body = make_body(
            Kind.GENESIS, name="home", recovery="0" * 64, signer=public.hex(), nonce="0" * 32, node="a" * 26
        )
        assert signed(body, (public, one.sign))
        assert sign_beacon(swarm="0" * 64, epoch=0, signer=public, n=1, sign=one.sign)["n"] == 1
        one.destroy()
        one.destroy()
        assert one.public_key() is None
        assert one.create() != public


@pytest.mark.parametrize("kind", ["file", "unit"])
@pytest.mark.parametrize(("spoil", "code"), [("mode", "key-exposed"), ("contents", "key-damaged")])
def test_both_kinds_say_what_is_wrong_with_a_key(kind: str, spoil: str, code: str) -> None:
    with place() as top, unit(top) as (node, _):
        FileSigner(top / "state").create()
        key = top / "state" / "signer.key"
        if spoil == "mode":
            key.chmod(0o644)
        else:
            key.write_bytes(b"no key")
        one: Signer = node if kind == "unit" else FileSigner(top / "state")
        with pytest.raises(ConfigError) as caught:
            one.public_key()
        assert caught.value.code == code
        assert caught.value.hint


def test_a_signer_that_was_killed_or_is_idle_is_started_again() -> None:
    with place() as top, unit(top) as (node, manager):
        public = node.create()
        assert len(manager.programs) == 1
        assert node.public_key() == public
        assert verify(public, node.sign(statement(public)), statement(public))
        assert len(manager.programs) == 1  # one program for all of it
        for count in (2, 3):
            os.kill(manager.programs[-1].pid, signal.SIGKILL)
            manager.programs[-1].wait()
            assert verify(public, node.sign(statement(public)), statement(public))
            assert len(manager.programs) == count
        node.close()
        assert manager.programs[-1].wait(60) == 0  # the connection is its life


def test_a_program_that_is_not_asked_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signer_module, "IDLE_S", 0.05)
    ours, its = socket.socketpair()
    with place() as top, ours, its:
        began_s = time.monotonic()
        signer_module.serve(its, top / "state", lambda: FileSigner(top / "state"), now_ms=lambda: 0)
        assert time.monotonic() - began_s < 30  # of the minute that it would wait otherwise


def test_a_node_without_a_key_holds_no_program() -> None:
    with place() as top, unit(top) as (node, manager):
        assert node.public_key() is None
        assert manager.programs[0].wait(60) == 0
        for _ in range(100):
            assert node.public_key() is None
        assert len(manager.programs) == 1


def test_where_no_unit_is_it_is_said_how_to_have_one(tmp_path: Path) -> None:
    node = UnitSigner(tmp_path / "s", clock=SystemClock())
    node.destroy()  # of a node that never had a key
    for attempt in (node.public_key, node.create, lambda: node.sign(STATEMENT)):
        with pytest.raises(Unavailable) as caught:
            attempt()
        assert caught.value.code == "signer-absent"
        assert caught.value.hint == "systemctl enable --now mycoswarm-signer.socket"


def test_a_signer_that_goes_away_is_an_error_and_not_a_node_without_key() -> None:
    with place() as top:
        with unit(top) as (node, _):
            public = node.create()
        assert node.public_key() == public
        with pytest.raises(Unavailable, match="signer-absent"):
            node.sign(STATEMENT)
        with pytest.raises(Unavailable, match="signer-absent"):
            node.destroy()  # it may still be there


def test_a_silent_signer_holds_the_node_up_once_and_shortly() -> None:
    took_s = [silent_signer_s() for _ in range(3)]  # a busy machine may hold up any of them
    assert min(first_s for first_s, _ in took_s) < 2, took_s
    assert min(more_s for _, more_s in took_s) < 0.2, took_s


def silent_signer_s() -> tuple[float, float]:
    """Return how long a silent signer is waited for at first, and then in fifty more calls."""
    with place() as top, unit(top, ["/bin/sleep", "60"], within_s=0.3, retry_s=600) as (node, manager):
        began_s = time.monotonic()
        with pytest.raises(Unavailable, match=r"did not answer within 0\.3 s|timed out") as caught:
            node.public_key()
        first_s = time.monotonic() - began_s
        assert first_s > 0.25
        assert caught.value.code == "signer-unreachable"
        began_s = time.monotonic()
        for _ in range(50):
            with pytest.raises(Unavailable, match="failed a moment ago"):
                node.public_key()
        more_s = time.monotonic() - began_s
        assert len(manager.programs) == 1
        return first_s, more_s


SAYS = "exec 1>&0; read line; "


@pytest.mark.parametrize(
    "answer",
    [
        "hello",
        "{}",
        '{"done":{}}',
        '{"done":{"public":"00"}}',
        '{"done":{"public":"' + "zz" * 32 + '"}}',
        '{"failed":{"kind":"other","code":"x","text":""}}',
        '{"failed":{"kind":"disk","code":"X Y","text":""}}',
        "x" * (ANSWER_BYTES + 10),
    ],
)
def test_a_signer_that_says_something_else_is_not_believed(answer: str) -> None:
    argv = ["/bin/sh", "-c", SAYS + 'echo "$0"; sleep 60', answer]
    with place() as top, unit(top, argv) as (node, _), pytest.raises(Unavailable):
        node.create()


def test_a_signature_that_is_none_is_not_passed_on() -> None:
    """A signer with another key, or one that signs something else, does not make this node say so."""
    seed = make_seed()
    public = encode_answer(Answer(public=public_key(seed))).decode().strip()
    wrong = encode_answer(Answer(signature=sign(seed, STATEMENT + b" "))).decode().strip()
    right = encode_answer(Answer(signature=sign(seed, STATEMENT))).decode().strip()
    for said, is_right in ((right, True), (wrong, False)):
        script = SAYS + 'echo "$0"; read line; echo "$1"; sleep 60'
        with place() as top, unit(top, ["/bin/sh", "-c", script, public, said]) as (node, _):
            node.create()
            if is_right:
                assert node.sign(STATEMENT)
            else:
                with pytest.raises(Unavailable, match="signer-failed"):
                    node.sign(STATEMENT)


def test_a_signer_that_ends_as_it_is_asked_is_asked_again() -> None:
    """It was idle for too long at that very moment: the request was taken, and there is no answer."""
    seed = make_seed()
    public = encode_answer(Answer(public=public_key(seed))).decode().strip()
    signature = encode_answer(Answer(signature=sign(seed, STATEMENT))).decode().strip()
    script = SAYS + 'if [ -e "$2" ]; then echo "$1"; sleep 60; fi; touch "$2"; echo "$0"; read line'
    with place() as top:
        argv = ["/bin/sh", "-c", script, public, signature, str(top / "second")]
        with unit(top, argv) as (node, manager):
            node.create()
            assert verify(public_key(seed), node.sign(STATEMENT), STATEMENT)
            assert len(manager.programs) == 2


def test_the_lines_arrive_as_they_were() -> None:
    for request in (Request(Do.PUBLIC), Request(Do.SIGN, bytes(range(256)))):
        assert parse_request(encode_request(request)) == request
    answers = (Answer(), Answer(public=b"p" * 32), Answer(signature=b"s" * 64))
    for answer in answers:
        assert parse_answer(encode_answer(answer)) == answer
    failed = Failed(Failure.DISK, "key-unwritable", "cannot write", "free some space")
    assert parse_answer(encode_answer(failed)) == failed


def test_a_refusal_is_said_as_a_bug_of_the_node() -> None:
    with place() as top, unit(top) as (node, _):
        node.create()
        with pytest.raises(LocalProtocolError) as caught:
            node.sign(TLS)
        assert caught.value.code == "not-signable"


async def test_a_swarm_lives_with_a_signer_that_comes_and_goes(tmp_path: Path) -> None:
    with place() as top:
        argv = [*PROGRAM, "--state", str(top / "state")]
        manager = UnitManager(top, argv)
        node = UnitSigner(manager.path, clock=SystemClock(), within_s=60, retry_s=0)
        try:
            async with machine(tmp_path / "alpha") as one:
                one.swarm._signer = node
                await one.begin()
                public = node.public_key()
                assert public is not None
                assert one.swarm.is_signer()
                assert len((await one.swarm.sync({"have": []}))["beacons"]) == 1  # type: ignore[arg-type]
                await one.admit(key("pi"), "pi")
                manager.programs[-1].kill()
                manager.programs[-1].wait()
                await one.admit(key("pc"), "pc")
                assert one.names() == ["alpha", "pc", "pi"]
                roster = one.swarm.roster
                assert roster is not None
                assert list(roster.signers) == [public.hex()]
                assert not (tmp_path / "alpha" / "signer").exists()
                # Its unit is stopped: the node goes on, and says why it cannot sign.
                manager.end()
                await one.swarm._try_beacon()
                assert one.swarm.is_signer()
                with pytest.raises(Unavailable, match="signer-absent"):
                    await one.admit(key("tv"), "tv")
                assert one.names() == ["alpha", "pc", "pi"]
                manager = UnitManager(top, argv)
                await one.admit(key("tv"), "tv")
                await one.swarm.revoke("pi", "sold")
                assert one.names() == ["alpha", "pc", "tv"]
        finally:
            node.close()
            manager.end()


@contextmanager
def gated_unit() -> Iterator[tuple[UnitSigner, UnitManager, Path]]:
    """Hold a unit that starts when a file is there; who waits for it in the loop makes none."""
    with place() as top:
        go = top / "go"
        wait = f'until [ -e {go} ]; do sleep 0.02; done; exec "$@"'
        argv = ["/bin/sh", "-c", wait, "-", *PROGRAM, "--state", str(top / "state")]
        with unit(top, argv) as (node, manager):
            yield node, manager, go


@pytest.mark.parametrize(
    "what", ["admit", "revoke", "add_signer", "remove_signer", "beacon", "make", "draft"]
)
async def test_a_signer_that_starts_slowly_holds_nothing_else_up(tmp_path: Path, what: str) -> None:
    """Its unit starts only when the rest of the node has gone on."""
    with gated_unit() as (node, manager, go):
        go.touch()
        async with machine(tmp_path / "alpha") as one:
            one.swarm._signer = PatientSigner(node)
            await one.begin()
            await one.admit(key("pi"), "pi")
            signing_key = public_key(make_seed()).hex()
            one.swarm.ask_signer_key = AsyncMock(return_value=signing_key)
            await one.swarm.add_signer("pi")
            acts: dict[str, Callable[[], Awaitable[object]]] = {
                "admit": lambda: one.admit(key("pc"), "pc"),
                "revoke": lambda: one.swarm.revoke("pi", ""),
                "add_signer": lambda: one.swarm.add_signer("pi"),
                "remove_signer": lambda: one.swarm.remove_signer("pi"),
                "beacon": one.swarm._try_beacon,
                "make": one.swarm.make_signer_key,
                "draft": lambda: one.swarm.recovery_draft([], []),
            }
            node.close()
            go.unlink()
            act = asyncio.ensure_future(acts[what]())
            await asyncio.sleep(0.1)
            assert not act.done()
            assert one.swarm.is_signer()
            go.touch()
            await act
            assert len(manager.programs) == 2


async def test_a_node_whose_signer_has_not_answered_yet_goes_on_and_says_what_it_cannot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with gated_unit() as (node, manager, go):
        go.touch()
        async with machine(tmp_path / "alpha") as one:
            one.swarm._signer = node
            await one.begin()
            node.close()
            go.unlink()
            late = UnitSigner(manager.path, clock=SystemClock(), within_s=0.3, retry_s=0)
            patient = PatientSigner(late)
            one.swarm._signer = patient
            assert not one.swarm.is_signer()  # and at once: nobody asks the unit here
            assert len(manager.programs) == 1
            for _ in range(3):
                with pytest.raises(Unavailable, match="out of reach"):
                    await one.admit(key("pi"), "pi")
            assert "within 0.3 s" in patient.problem or "timed out" in patient.problem
            assert len([row for row in caplog.records if "nothing is signed" in row.message]) == 1
            late._within_s = 60
            go.touch()
            await one.admit(key("pi"), "pi")
            assert patient.problem == ""
            assert one.swarm.is_signer()
            late.close()


# The program as the unit's user, and the node as its own; both load all they need as root.
AS_UNIT = """
import os, socket, sys
from pathlib import Path
from mycoswarmd.outposts.signer import serve
from mycoswarmd.trust import keys
from mycoswarmd.trust.signer import FileSigner
keys.from_pem(keys.to_pem(keys.make_seed()))
os.setgroups([]); os.setresgid(40001, 40001, 40001); os.setresuid(40001, 40001, 40001)
state = Path(sys.argv[1])
serve(socket.socket(fileno=0), state, lambda: FileSigner(state), now_ms=lambda: 0)
"""
AS_NODE = """
import json, os, sys
from pathlib import Path
from mycoswarmd.core.roster import make_beacon_message
from mycoswarmd.daemon.clock import SystemClock
from mycoswarmd.trust.keys import make_seed, public_key, sign, verify
from mycoswarmd.trust.signer import UnitSigner
verify(public_key(make_seed()), sign(make_seed(), b""), b"")
if sys.argv[3] != "0":
    os.setgroups([]); os.setresgid(40002, 40002, 40002); os.setresuid(40002, 40002, 40002)
node = UnitSigner(Path(sys.argv[1]), clock=SystemClock(), within_s=60)
public = node.create()
message = make_beacon_message(swarm="0" * 64, epoch=0, signer=public.hex(), n=1)
said = {"signs": verify(public, node.sign(message), message)}
state = Path(sys.argv[2])
pid = next(int(one.parent.name) for one in Path("/proc").glob("[0-9]*/cmdline")
           if one.read_bytes().split(b"\\0")[-2:-1] == [str(state).encode()])
def attempt(name, function):
    try:
        said[name] = function() and "done"
    except OSError as exc:
        said[name] = exc.errno
attempt("read", lambda: (state / "signer.key").read_bytes())
attempt("list", lambda: os.listdir(state))
attempt("replace", lambda: (state / "signer.key").rename(state / "signer.key"))
attempt("memory", lambda: open(f"/proc/{pid}/mem", "rb").fileno() or True)
attempt("root", lambda: os.listdir(f"/proc/{pid}/root/"))
attempt("fds", lambda: os.listdir(f"/proc/{pid}/fd"))
print(json.dumps(said))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_the_nodes_user_gets_signatures_and_never_the_key() -> None:
    with place() as top:
        top.chmod(0o711)
        os.chown(top / "state", 40001, 40001)
        script = ["-c", AS_UNIT, str(top / "state")]
        with unit(top, [sys.executable, *script]) as (_, manager):
            os.chown(manager.path, 40002, 40002)  # as SocketUser= and SocketMode= have it
            manager.path.chmod(0o600)

            def run_as(uid: int) -> dict[str, Any]:
                argv = [sys.executable, "-c", AS_NODE, str(manager.path), str(top / "state"), str(uid)]
                ran = subprocess.run(argv, capture_output=True, text=True, timeout=120)
                assert ran.returncode == 0, ran.stderr
                said: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
                return said

            root = run_as(0)
            assert root["signs"] is True
            assert (root["read"], root["list"], root["memory"]) == ("done", "done", "done")  # one could
            node = run_as(40002)
            assert node["signs"] is True
            assert {
                name: node[name] for name in ("read", "list", "replace", "memory", "root", "fds")
            } == dict.fromkeys(("read", "list", "replace", "memory", "root", "fds"), 13)
            assert (top / "state" / "signer.key").stat().st_uid == 40001
