"""A link keeps its law with any client, also one that keeps none."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mycoswarmd.core.roster import Member
from mycoswarmd.fleet import link
from mycoswarmd.fleet.fleet import Fleet
from mycoswarmd.flow.swarmports import AddressBook, Hint, PeerAddress, Reach, StrangerClient
from mycoswarmd.wire.peer import Word
from tests.unit.fleet.nodes import made_node


class Client:
    """Yields the word that it is given and then waits for ever, or ends."""

    def __init__(self, word: Word, *, ends: bool = False) -> None:
        self._word = word
        self._ends = ends
        self.is_closed = False

    async def ask(
        self, method: str, path: str, body: Mapping[str, object] | None = None, *, within_s: float = 5.0
    ) -> Mapping[str, object]:
        del method, path, body, within_s
        return {"statements": [], "want": [], "beacons": []}

    async def watch(self) -> AsyncGenerator[Word | None, None]:
        try:
            yield self._word
            if not self._ends:
                await asyncio.get_running_loop().create_future()
        finally:
            self.is_closed = True

    def remote_address(self) -> PeerAddress | None:
        return PeerAddress("10.0.0.7", 7437)

    def cut(self) -> None:
        """Nothing is open."""


class Dialer:
    def __init__(self, client: Client) -> None:
        self.client = client

    @asynccontextmanager
    async def member(self, member: Member, addresses: AddressBook) -> AsyncIterator[Client]:
        del member, addresses
        yield self.client

    @asynccontextmanager
    async def stranger(self, address: PeerAddress) -> AsyncIterator[StrangerClient]:
        del address
        async with asyncio.timeout(0):
            await asyncio.sleep(1)
        yield NotImplemented


WORD = Word(id="", version="0.3.0", boot=1, instance="0" * 16, port=7437, digest="", statements=0)


async def _seen(
    path: Path, *, word_id: str | None = None, ends: bool = False
) -> tuple[list[Reach], str, bool]:
    """Return a link's states until it was unreachable, why it was, and whether the watch was closed."""
    async with made_node(path / "a", "a") as a, made_node(path / "b", "b") as b:
        await a.begin()
        await a.admit(b)
        word = replace(WORD, id=b.id if word_id is None else word_id, digest=a.swarm.digest)
        client = Client(word, ends=ends)
        a.fleet = Fleet(
            swarm=a.swarm, store=a.store, dialer=Dialer(client), clock=a.clock, entropy=a.swarm._entropy
        )
        states: list[Reach] = []
        a.fleet.subscribe(lambda: states.extend(one.state for one in a.fleet.states()))
        async with a.linked():
            a.fleet.hint(Hint(address=PeerAddress("10.0.0.7", 7437), node_id=b.id))
            await a.until(lambda: a.state_of(b).state is Reach.UNREACHABLE)
            return list(dict.fromkeys(states)), a.state_of(b).detail, client.is_closed


async def test_silence_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "SILENT_S", 0.5)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    states, why, is_closed = await _seen(tmp_path)
    assert states == [Reach.UNKNOWN, Reach.CONNECTING, Reach.READY, Reach.UNREACHABLE]
    assert "silent for 0.5 s" in why and loop.time() - began_s >= 0.5
    assert is_closed


async def test_the_end_of_the_watch_ends_it(tmp_path: Path) -> None:
    states, why, is_closed = await _seen(tmp_path, ends=True)
    assert Reach.READY in states and "closed" in why and is_closed


async def test_who_names_another_id_is_never_ready(tmp_path: Path) -> None:
    states, why, is_closed = await _seen(tmp_path, word_id="a" * 26)
    assert Reach.READY not in states and "another id" in why and is_closed
