"""Knocks: few at a time, each rarer when it brings nothing, none for members held up by strangers."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mycoswarmd.core.roster import Member
from mycoswarmd.errors import Unavailable
from mycoswarmd.fleet.knock import Knocker
from mycoswarmd.flow.swarmports import AddressBook, PeerAddress, PeerClient
from tests.unit.fleet.nodes import RealNode, made_node
from tests.unit.fleet.test_hints import Clock


class Door:
    """Whoever is knocked at: it answers when it is let, with what it is given."""

    def __init__(self) -> None:
        self.statements: list[object] = []
        self.opened = asyncio.Event()
        self.waiting: list[PeerAddress] = []
        self.asked: list[PeerAddress] = []
        self.most_at_once = 0
        self.server_cert_der = b"somebody"

    async def post(self, path: str, body: Mapping[str, object]) -> Mapping[str, object]:
        assert path == "/swarm/pull" and set(body) == {"have", "port"}
        await self.opened.wait()
        if not self.statements:
            raise Unavailable("peer-unreachable", "cannot reach it")
        return {"statements": self.statements, "digest": ""}

    def member(self, member: Member, addresses: AddressBook) -> PeerClient:
        raise AssertionError((member, addresses))

    @asynccontextmanager
    async def stranger(self, address: PeerAddress) -> AsyncIterator["Door"]:
        self.asked.append(address)
        self.waiting.append(address)
        self.most_at_once = max(self.most_at_once, len(self.waiting))
        try:
            yield self
        finally:
            self.waiting.remove(address)


class Hall:
    """A node with a knocker, before a door."""

    def __init__(self, node: RealNode) -> None:
        self.node = node
        self.clock = Clock()
        self.door = Door()
        self.met: list[PeerAddress] = []
        self.knocker = Knocker(
            node.swarm,
            self.door,  # type: ignore[arg-type]
            clock=self.clock,
            addresses=self.addresses,
            own_port=lambda: 7437,
            met=lambda address, cert: self.met.append(address),
        )

    def addresses(self, node_id: str) -> Sequence[PeerAddress]:
        return [PeerAddress("10.0.0.1", ord(node_id[0])), PeerAddress("10.0.0.2", ord(node_id[0]))]

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not holds():
                await asyncio.sleep(0.002)

    async def until_asked(self, count: int) -> None:
        await self.until(
            lambda: len(self.door.asked) == count and not self.door.waiting and not self.knocker._waiting
        )


@pytest.fixture
async def hall(tmp_path: Path) -> AsyncIterator[Hall]:
    async with made_node(tmp_path / "a", "a") as node, asyncio.TaskGroup() as group:
        await node.begin()
        hall = Hall(node)
        task = group.create_task(hall.knocker.run())
        yield hall
        task.cancel()


async def test_a_flood_of_strangers_is_bounded_and_members_do_not_wait_for_it(hall: Hall) -> None:
    for n in range(1000):
        hall.knocker.want(PeerAddress("10.1.0.1", 1000 + n))
    await hall.until(lambda: len(hall.door.waiting) == 2)
    assert hall.knocker.want("m" * 26, is_ours=True)
    await hall.until(lambda: PeerAddress("10.0.0.1", ord("m")) in hall.door.asked)
    assert hall.door.most_at_once == 3
    assert hall.door.most_at_once <= 4
    hall.door.opened.set()
    await hall.until_asked(66)
    assert len(hall.door.asked) == 64 + 2  # what did not fit was not kept; of the id, both addresses
    assert hall.door.most_at_once <= 4


async def test_what_brings_nothing_is_asked_less_and_less(hall: Hall) -> None:
    hall.door.opened.set()
    target = PeerAddress("10.1.0.1", 7437)
    waits: list[float] = []
    for n in range(8):
        assert hall.knocker.want(target)
        assert not hall.knocker.want(target)  # it waits already
        await hall.until_asked(n + 1)
        began_s = hall.clock.at_s
        while not hall.knocker._patience[target].not_before_s <= hall.clock.at_s:
            assert not hall.knocker.want(target)
            hall.clock.at_s += 1
        waits.append(hall.clock.at_s - began_s)
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300]


async def test_what_brings_something_is_asked_soon_again(hall: Hall, tmp_path: Path) -> None:
    node = hall.node
    async with made_node(tmp_path / "b", "b") as newcomer:
        await node.admit(newcomer)
        async with made_node(tmp_path / "c", "c") as other:
            identity = other.identities.create()
            await node.admit_only(identity, "c")
            before = node.swarm.hashes()
            await other.swarm.join(
                node.swarm.missing(frozenset()),
                genesis_sha256=node.swarm.roster.swarm_id if node.swarm.roster else "",
                identity=identity,
            )
            theirs = Hall(other)
            await node.admit_only((await _identity(tmp_path / "d")).identities.create(), "d")
            theirs.door.statements = list(node.swarm.missing(frozenset(before)))
            theirs.door.opened.set()
            async with asyncio.TaskGroup() as group:
                task = group.create_task(theirs.knocker.run())
                assert theirs.knocker.want("x" * 26)
                await theirs.until_asked(2)
                task.cancel()
            assert other.swarm.digest == node.swarm.digest
            assert theirs.met == list(theirs.addresses("x"))
            assert theirs.knocker._patience["x" * 26].delay_s == 5


async def _identity(path: Path) -> RealNode:
    async with made_node(path, path.name) as node:
        return node


async def test_garbage_is_as_good_as_nothing(hall: Hall) -> None:
    hall.door.statements = [{"body": "AAAA", "sigs": []}]
    hall.door.opened.set()
    digest = hall.node.swarm.digest
    assert hall.knocker.want(PeerAddress("10.1.0.1", 7437))
    await hall.until_asked(1)
    assert hall.met == [] and hall.node.swarm.digest == digest


async def test_nobody_is_asked_without_a_swarm(tmp_path: Path) -> None:
    async with made_node(tmp_path / "a", "a") as node:
        assert not Hall(node).knocker.want(PeerAddress("10.1.0.1", 7437))
