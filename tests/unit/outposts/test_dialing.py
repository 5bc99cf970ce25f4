"""The core's side of the LAN dialer against dialers that lie: each is found out, and nothing stays open."""

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mycoswarmd.outposts.dialing import LanDialer
from mycoswarmd.wire.dial import Code, Done, Failed, encode_answer
from mycoswarmd.wire.proof import Proof, Unit, encode_proof
from tests.dialers import false_dialer

YES = encode_answer(Done())
Given = list[socket.socket | int]


class Things:
    """Descriptors that a dialer could send."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.port: int = self.server.getsockname()[1]

    def right(self) -> socket.socket:
        return self._stack.enter_context(socket.create_connection(("127.0.0.1", self.port)))

    def elsewhere(self) -> socket.socket:
        other = self._stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        return self._stack.enter_context(socket.create_connection(other.getsockname()))

    def unconnected(self) -> socket.socket:
        return self._stack.enter_context(socket.socket())

    def datagrams(self) -> socket.socket:
        one = self._stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        one.connect(("127.0.0.1", self.port))
        return one

    def unix(self) -> socket.socket:
        one, other = socket.socketpair()
        self._stack.enter_context(other)
        return self._stack.enter_context(one)

    def pipe(self) -> int:
        reading, writing = os.pipe()
        self._stack.callback(os.close, reading)
        self._stack.callback(os.close, writing)
        return writing


@pytest.fixture
def things() -> Iterator[Things]:
    with ExitStack() as stack:
        yield Things(stack)


def open_here() -> set[str]:
    return {one.name for one in Path("/proc/self/fd").iterdir()}


LIES: dict[str, tuple[bytes, Callable[[Things], Given]]] = {
    "nothing": (YES, lambda _: []),
    "two": (YES, lambda one: [one.right(), one.right()]),
    "four": (YES, lambda one: [one.right()] * 4),
    "more than there is room for": (YES, lambda one: [one.right()] * 50),
    "of another address": (YES, lambda one: [one.elsewhere()]),
    "not connected": (YES, lambda one: [one.unconnected()]),
    "the listener": (YES, lambda one: [one.server]),
    "for datagrams": (YES, lambda one: [one.datagrams()]),
    "a unix socket": (YES, lambda one: [one.unix()]),
    "a pipe": (YES, lambda one: [one.pipe()]),
    "with rubbish": (b"\xff", lambda one: [one.right()]),
    "with no known answer": (b"{}", lambda one: [one.right()]),
    "with too long an answer": (YES + b" " * 4096, lambda one: [one.right()]),
    "hung up": (b"", lambda _: []),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_false_yes_is_found_out(lie: str, things: Things, tmp_path: Path) -> None:
    packet, make = LIES[lie]
    given = make(things)
    async with false_dialer(tmp_path, packet, *given) as path:
        before = open_here()
        with pytest.raises(OSError, match="cannot be used") as caught:
            await LanDialer(path).connect("127.0.0.1", things.port, 60)
        assert caught.value.errno == errno.EPROTO
        assert open_here() == before


async def test_a_true_yes_is_taken(things: Things, tmp_path: Path) -> None:
    async with false_dialer(tmp_path, YES, things.right()) as path:
        with await LanDialer(path).connect("127.0.0.1", things.port, 60) as sock:
            assert sock.getpeername() == ("127.0.0.1", things.port)
            assert not sock.get_inheritable()


async def test_a_no_with_a_descriptor_is_a_no(things: Things, tmp_path: Path) -> None:
    packet = encode_answer(Failed(Code.REFUSED, "nobody there"))
    async with false_dialer(tmp_path, packet, things.right(), things.pipe()) as path:
        before = open_here()
        with pytest.raises(ConnectionRefusedError, match="nobody there"):
            await LanDialer(path).connect("127.0.0.1", things.port, 60)
        assert open_here() == before


@pytest.mark.parametrize(
    ("code", "kind", "number"),
    [
        (Code.REFUSED, ConnectionRefusedError, errno.ECONNREFUSED),
        (Code.TIMEOUT, TimeoutError, None),
        (Code.UNREACHABLE, OSError, errno.EHOSTUNREACH),
        (Code.DENIED, PermissionError, errno.EACCES),
        (Code.BUSY, OSError, errno.EBUSY),
        (Code.IN_USE, OSError, errno.EADDRINUSE),
    ],
)
async def test_every_no_is_an_error_that_one_knows(
    code: Code, kind: type[OSError], number: int | None, tmp_path: Path
) -> None:
    async with false_dialer(tmp_path, encode_answer(Failed(code))) as path:
        with pytest.raises(kind) as caught:
            await LanDialer(path).listen("::", 7437)
        assert (type(caught.value), caught.value.errno) == (kind, number)


async def test_who_never_answers_is_waited_for_no_longer_than_said(tmp_path: Path) -> None:
    # A machine that stops for a while does not each time.
    assert min([await _waited_s(tmp_path / f"mute{number}.sock") for number in range(3)]) < 3


async def _waited_s(path: Path) -> float:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as mute:
        mute.bind(str(path))
        mute.listen(0)
        lan = LanDialer(path)
        before = open_here()
        begun_s = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as group:
            # One is in the queue and one beside it; for the others there is no room, which asyncio's own
            # connect would take for a yes.
            ended = [group.create_task(_ends(lan)) for _ in range(5)]
        took_s = asyncio.get_running_loop().time() - begun_s
        assert all(isinstance(one.result(), TimeoutError) for one in ended)
        assert open_here() == before
    return took_s


async def _ends(lan: LanDialer) -> OSError:
    try:
        await lan.connect("10.0.0.7", 7437, 0.3)
    except OSError as exc:
        return exc
    raise AssertionError


async def test_what_cannot_be_said_is_not(tmp_path: Path) -> None:
    async with false_dialer(tmp_path, encode_answer(Failed(Code.DENIED))) as path:
        lan = LanDialer(path)
        with pytest.raises(PermissionError):
            await lan.connect("\ud800", 7437, 60)
        with pytest.raises(OSError, match="cannot write a packet of") as caught:
            await lan.connect("x" * 5000, 7437, 60)
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("unit", [None, Unit.CORE])
async def test_a_proof_of_somebody_else_is_none(unit: Unit | None, tmp_path: Path, things: Things) -> None:
    lie = encode_answer(Done(Proof(unit, ()) if unit is not None else None))
    async with false_dialer(tmp_path, lie) as path:
        with pytest.raises(OSError, match="it gave no proof"):
            await LanDialer(path).prove()
    truth = encode_answer(Done(Proof(Unit.LAN, ())))
    assert encode_proof(Proof(Unit.LAN, ())) in truth
    async with false_dialer(tmp_path, truth) as path:
        assert (await LanDialer(path).prove()).checks == ()
    async with false_dialer(tmp_path, truth, things.right()) as path:
        before = open_here()
        with pytest.raises(OSError, match="nobody asked for"):
            await LanDialer(path).prove()
        assert open_here() == before


async def test_one_who_stops_waiting_leaves_nothing_open(tmp_path: Path) -> None:
    path = tmp_path / "mute.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as mute:
        mute.bind(str(path))
        mute.listen()
        before = open_here()
        async with asyncio.TaskGroup() as group:
            one = group.create_task(LanDialer(path).connect("10.0.0.7", 7437, 60))
            while open_here() == before:
                await asyncio.sleep(0)
            one.cancel()
        assert open_here() == before
