"""The keeper of the discovery process: whatever that does, it is started anew and nothing else notices."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from mycoswarmd.daemon.clock import SystemClock
from mycoswarmd.errors import CageError
from mycoswarmd.fleet.discovery import Discovery
from mycoswarmd.flow.swarmports import Hint, PeerAddress
from mycoswarmd.wire.hints import Announcement, Beat, Ready, Sighting, Trouble, encode_report, parse_order

ME, PEER = "a" * 26, "b" * 26


class Process:
    """An outpost that says prepared lines and then hangs, or ends."""

    def __init__(self, lines: Sequence[bytes], *, ends: bool) -> None:
        self.pid = 4711
        self.told: list[bytes] = []
        self.is_killed = False
        self._lines = list(lines)
        self._ends = ends

    async def read_line(self) -> bytes:
        if self._lines:
            return self._lines.pop(0)
        if self._ends:
            raise CageError("outpost-gone", "cannot hear the outpost: it was killed by SIGKILL")
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    def send(self, line: bytes) -> None:
        if self._ends:
            raise CageError("outpost-gone", "cannot tell the outpost anything: Broken pipe")
        self.told.append(line)

    async def kill(self) -> None:
        self.is_killed = True


class Keeper:
    """A keeper with the processes that it started."""

    def __init__(self, make: Callable[[int], Process], *, silence_s: float) -> None:
        self.processes: list[Process] = []
        self.hints: list[Hint] = []
        self._make = make
        self.discovery = Discovery(self._start, self.hints.append, clock=SystemClock(), silence_s=silence_s)

    async def _start(self) -> Process:
        self.processes.append(self._make(len(self.processes)))
        return self.processes[-1]

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not holds():
                await asyncio.sleep(0.005)


@asynccontextmanager
async def keeping(make: Callable[[int], Process], *, silence_s: float = 600.0) -> AsyncIterator[Keeper]:
    keeper = Keeper(make, silence_s=silence_s)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(keeper.discovery.run())
        try:
            yield keeper
        finally:
            task.cancel()
    assert all(process.is_killed for process in keeper.processes)


def seen(*addresses: str) -> bytes:
    return encode_report(Sighting(node_id=PEER, addresses=addresses, port=7437, digest="0123456789abcdef"))


async def test_what_it_hears_becomes_hints() -> None:
    lines = [encode_report(Ready()), seen("10.0.0.7", "fe80::1%eth0")]
    async with keeping(lambda _: Process(lines, ends=False)) as keeper:
        await keeper.until(lambda: len(keeper.hints) == 2)
        assert keeper.hints[0] == Hint(
            address=PeerAddress("10.0.0.7", 7437), node_id=PEER, digest="0123456789abcdef"
        )
        assert keeper.hints[1].address == PeerAddress("fe80::1%eth0", 7437)
        assert (keeper.discovery.state, keeper.discovery.pid) == ("ready", 4711)


async def test_one_that_ends_is_started_anew_and_told_again() -> None:
    async with keeping(lambda n: Process([encode_report(Ready())], ends=n == 1)) as keeper:
        await keeper.until(lambda: keeper.discovery.state == "ready")
        keeper.discovery.announce(Announcement(node_id=ME, port=7437, digest="f" * 16))
        assert parse_order(keeper.processes[0].told[-1]).announce is not None
        keeper.processes[0]._ends = True
    async with keeping(lambda n: Process([encode_report(Ready())], ends=n == 0)) as keeper:
        keeper.discovery.announce(Announcement(node_id=ME, port=7437, digest="f" * 16))
        await keeper.until(lambda: len(keeper.processes) == 2 and keeper.discovery.state == "ready")
        order = parse_order(keeper.processes[1].told[0])
        assert order.announce is not None and order.announce.node_id == ME
        assert keeper.discovery.restarts == 1
        assert keeper.processes[0].is_killed


async def test_one_that_hangs_is_ended() -> None:
    async with keeping(lambda _: Process([encode_report(Beat())], ends=False), silence_s=0.2) as keeper:
        await keeper.until(lambda: len(keeper.processes) >= 2)
        assert keeper.processes[0].is_killed
        assert "said nothing" in keeper.discovery.detail


async def test_one_that_cannot_be_started_is_tried_again() -> None:
    def make(n: int) -> Process:
        if n == 0:
            raise CageError("cage-setup", "cannot start 'python3': No such file or directory")
        return Process([encode_report(Ready())], ends=False)

    keeper = Keeper(make, silence_s=600.0)
    tried = 0

    async def start() -> Process:
        nonlocal tried
        tried += 1
        return make(tried - 1)

    keeper.discovery._start = start
    async with asyncio.TaskGroup() as group:
        task = group.create_task(keeper.discovery.run())
        await keeper.until(lambda: keeper.discovery.state == "ready")
        task.cancel()
    assert tried == 2


@pytest.mark.parametrize(
    "garbage",
    [b"\xff\xfe\n", b"[]\n", b"{}\n", b'{"hint":{}}\n', b'{"hint":{"id":"../../etc","addresses":[]}}\n',
     b'{"gone":{"id":7}}\n', b"[" * 4000 + b"\n"],
)  # fmt: skip
async def test_one_that_talks_garbage_is_ended(garbage: bytes) -> None:
    async with keeping(lambda n: Process([garbage] if n == 0 else [], ends=False)) as keeper:
        await keeper.until(lambda: len(keeper.processes) == 2)
        assert keeper.processes[0].is_killed
        assert keeper.hints == []


async def test_delays_grow(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.get_running_loop()
    at_s: list[float] = []

    def make(_: int) -> Process:
        at_s.append(loop.time())
        return Process([], ends=True)

    async with keeping(make) as keeper:
        await keeper.until(lambda: len(at_s) == 5)
    gaps = [after - before for before, after in pairwise(at_s)]
    assert all(gap >= least for gap, least in zip(gaps, (0.1, 0.2, 0.4, 0.8), strict=True))
    asked = [record.args for record in caplog.records if "started anew" in record.msg]
    assert [args[0] for args in asked[:4] if isinstance(args, tuple)] == [0.1, 0.2, 0.4, 0.8]


async def test_a_process_that_was_taken_over_is_read_at_a_walking_pace() -> None:
    lines = [seen(*(f"10.0.{n}.{m}" for m in range(8))) for n in range(250)]
    async with keeping(lambda _: Process(lines, ends=False)) as keeper:
        begun_s = asyncio.get_running_loop().time()
        await keeper.until(lambda: len(keeper.hints) == 2000)
        assert asyncio.get_running_loop().time() - begun_s > 1.0


async def test_its_trouble_is_for_status() -> None:
    lines = [encode_report(Ready()), encode_report(Trouble("cannot listen: \x1b[31mno"))]
    async with keeping(lambda _: Process(lines, ends=False)) as keeper:
        await keeper.until(lambda: keeper.discovery.state == "down")
        assert keeper.discovery.detail == "cannot listen: ?[31mno"


async def test_what_is_announced_already_is_not_said_again() -> None:
    async with keeping(lambda _: Process([encode_report(Ready())], ends=False)) as keeper:
        await keeper.until(lambda: keeper.discovery.state == "ready")
        for digest in ("a" * 16, "a" * 16, "b" * 16):
            keeper.discovery.announce(Announcement(node_id=ME, port=7437, digest=digest))
        keeper.discovery.announce(None)
        assert len(keeper.processes[0].told) == 3
        assert parse_order(keeper.processes[0].told[-1]).announce is None
