"""The links between members, over real TLS: found, exchanged with, lost at once, never fooled."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from mycoswarmd.engines import peerhttp
from mycoswarmd.errors import NotFound, Unavailable
from mycoswarmd.fleet import fleet
from mycoswarmd.flow.swarmports import Hint, PeerAddress, Reach
from mycoswarmd.trust.identity import IdentityFile
from tests.unit.fleet.nodes import RealNode, made_node


class Home:
    """Makes nodes that end with the test."""

    def __init__(self, path: Path, stack: AsyncExitStack) -> None:
        self.path = path
        self.stack = stack

    async def node(self, name: str, *, static: tuple[PeerAddress, ...] = ()) -> RealNode:
        return await self.stack.enter_async_context(made_node(self.path / name, name, static=static))

    async def link(self, *nodes: RealNode) -> None:
        for node in nodes:
            await self.stack.enter_async_context(node.linked())

    async def pair(self) -> tuple[RealNode, RealNode]:
        """Return two members of one swarm that listen and do not know where the other is."""
        a, b = await self.node("attic"), await self.node("bedroom")
        await a.begin()
        await a.admit(b)
        await a.listen()
        await b.listen()
        return a, b


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is told something is waited for, however slow the machine is."""
    for name in ("_SPREAD_S", "_PING_S"):
        monkeypatch.setattr(fleet, name, 60.0)
    monkeypatch.setattr(peerhttp.MemberClient.ask, "__kwdefaults__", {"within_s": 60.0})


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[Home]:
    async with AsyncExitStack() as stack:
        yield Home(tmp_path, stack)


def tell(node: RealNode, of: RealNode, address: PeerAddress | None = None) -> None:
    node.fleet.hint(Hint(address=address or of.address, node_id=of.id))


async def ready(node: RealNode, other: RealNode) -> None:
    await node.until(lambda: node.state_of(other).state is Reach.READY)


async def soon(
    node: RealNode, act: Callable[[int], Awaitable[object]], holds: Callable[[], bool], *, within_s: float
) -> None:
    """Have it hold so soon after the act in one of five tries: the machine itself may stop for a while."""
    took_s: list[float] = []
    while min(took_s, default=within_s) >= within_s:
        assert len(took_s) < 5, took_s
        began_s = asyncio.get_running_loop().time()
        await act(len(took_s))
        await node.until(holds)
        took_s.append(asyncio.get_running_loop().time() - began_s)


async def test_a_hint_leads_to_a_link(home: Home) -> None:
    a, b = await home.pair()
    await home.link(a)
    assert a.state_of(b).state is Reach.UNKNOWN
    assert a.fleet.client(b.id) is None
    tell(a, b)
    await ready(a, b)
    state = a.state_of(b)
    assert state.address == b.address
    assert state.word is not None and state.word.id == b.id
    assert a.words()[b.id].digest == b.swarm.digest
    assert min([await a.fleet.ping(b.id) for _ in range(3)]) < 1000
    assert a.state_of(b).rtt_ms is not None
    client = a.fleet.client(b.id)
    assert client is not None
    assert (await client.ask("GET", "/swarm/word"))["id"] == b.id


async def test_a_statement_made_here_is_there_within_a_second(home: Home) -> None:
    a, b = await home.pair()
    await home.link(a)
    tell(a, b)
    await ready(a, b)

    async def say(number: int) -> None:
        await a.admit_only(IdentityFile(home.path / f"cellar-{number}").create(), f"cellar-{number}")
        await a.fleet.spread()
        assert b.swarm.digest == a.swarm.digest
        assert {member.name for member in b.swarm.peers()} >= {"attic", f"cellar-{number}"}

    await soon(b, say, lambda: True, within_s=1.0)


async def test_a_statement_made_there_comes_by_itself(home: Home) -> None:
    a, b = await home.pair()
    await home.link(b)  # only b dials: it sees a's new digest in a's word
    tell(b, a)
    await ready(b, a)

    async def say(number: int) -> None:
        await a.admit_only(IdentityFile(home.path / f"cellar-{number}").create(), f"cellar-{number}")

    await soon(b, say, lambda: b.swarm.digest == a.swarm.digest, within_s=3.0)


async def test_a_statement_that_nobody_spread_is_told_to_whoever_we_dialled(home: Home) -> None:
    a, b = await home.pair()
    await home.link(a)  # b dials nobody
    tell(a, b)
    await ready(a, b)
    a.swarm.spread = None

    async def say(number: int) -> None:
        await a.admit_only(IdentityFile(home.path / f"cellar-{number}").create(), f"cellar-{number}")

    await soon(b, say, lambda: b.swarm.digest == a.swarm.digest, within_s=3.0)


async def test_who_is_put_out_is_cut_in_the_same_step(home: Home) -> None:
    a, b = await home.pair()
    await home.link(a, b)
    tell(a, b)
    tell(b, a)
    await ready(a, b)
    client = a.fleet.client(b.id)
    assert client is not None
    seen: list[bool] = []
    a.fleet.subscribe(lambda: seen.append(a.fleet.client(b.id) is None))
    a.swarm.spread = None
    await a.swarm.revoke("bedroom", "sold")
    assert a.fleet.states() == [] and a.fleet.client(b.id) is None and a.words() == {}
    assert seen[-1]
    with pytest.raises(NotFound):
        await a.fleet.ping(b.id)
    with pytest.raises(Unavailable):
        await client.ask("GET", "/swarm/word")
    await b.until(lambda: b.state_of(a).state is Reach.UNREACHABLE)


async def test_silence_is_noticed_and_speech_at_once(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peerhttp, "SILENT_S", 3.0)  # 25 s are a long time for a test
    a, b = await home.pair()
    await home.link(a)
    tell(a, b)
    await ready(a, b)
    loop = asyncio.get_running_loop()
    took_s: list[float] = []
    while max(took_s, default=0) <= 0.5:  # up to 2 s after this node's last heartbeat
        assert len(took_s) < 5, took_s  # the machine itself may have been silent just before
        b.behaviour.is_silent = True
        began_s = loop.time()
        await a.until(lambda: a.state_of(b).state is Reach.UNREACHABLE)
        took_s.append(loop.time() - began_s)
        assert a.fleet.client(b.id) is None and a.words() == {}
        assert "silent for 3 s" in a.state_of(b).detail  # the limit of this test, and no other
        b.behaviour.is_silent = False
        await ready(a, b)


async def test_a_connection_that_ends_is_noticed_at_once_and_made_again(home: Home) -> None:
    a, b = await home.pair()
    await home.link(a)
    tell(a, b)
    await ready(a, b)
    port = b.port
    assert port is not None
    loop = asyncio.get_running_loop()
    took_s: list[float] = []
    while min(took_s, default=1.0) >= 1.0:
        assert len(took_s) < 5, took_s  # the machine itself may stop for a while
        began_s = loop.time()
        b.hang_up()
        await a.until(lambda: a.state_of(b).state is Reach.UNREACHABLE)
        took_s.append(loop.time() - began_s)
        assert a.fleet.client(b.id) is None
        await b.listen(port)
        await ready(a, b)


async def test_another_at_the_same_address_is_no_member(home: Home) -> None:
    a, b = await home.pair()
    rogue = await home.node("rogue")
    await rogue.begin()
    await rogue.listen()
    await home.link(a)
    tell(a, b, rogue.address)
    await a.until(lambda: a.state_of(b).state is Reach.UNREACHABLE)
    assert a.fleet.client(b.id) is None
    assert "does not have its key" in a.state_of(b).detail
    assert {path for path, _ in rogue.behaviour.requests} <= {"/swarm/pull"}  # nothing else was sent there


async def test_a_rogue_that_claims_a_members_id_changes_nothing(home: Home) -> None:
    a, b = await home.pair()
    rogue = await home.node("rogue")
    await rogue.begin()
    await rogue.listen()
    await home.link(a)
    tell(a, b)
    await ready(a, b)
    for port in range(2000, 2300):
        tell(a, b, PeerAddress("10.9.8.7", port))
    tell(a, b, rogue.address)
    b.hang_up()
    await a.until(lambda: a.state_of(b).state is Reach.UNREACHABLE)
    assert b.port is not None
    await b.listen(b.port)
    await ready(a, b)
    assert a.state_of(b).address == b.address
    assert {path for path, _ in rogue.behaviour.requests} <= {"/swarm/pull"}


async def test_an_old_node_learns_of_a_newcomer_from_the_newcomer(home: Home) -> None:
    """b was off when c joined, and the signer is off now: c's hint is all that b has."""
    a, b = await home.pair()
    c = await home.node("cellar")
    await a.admit(c)
    await c.listen()
    a.hang_up()
    await home.link(b)
    assert b.swarm.member(c.id) is None
    tell(b, c)
    await b.until(lambda: b.swarm.member(c.id) is not None)
    await ready(b, c)


async def test_a_newcomer_that_is_refused_makes_itself_known(home: Home) -> None:
    """c dials b, which has not heard of it; the pull has b ask back."""
    a, b = await home.pair()
    c = await home.node("cellar")
    await a.admit(c)
    await c.listen()
    await home.link(b, c)
    tell(c, b)
    await b.until(lambda: b.swarm.member(c.id) is not None)
    await ready(c, b)


async def test_an_address_that_a_person_wrote_down_is_enough(home: Home) -> None:
    b = await home.node("bedroom")
    a = await home.node("attic")
    await a.begin()
    await a.admit(b)
    await b.listen()
    c = await home.node("cellar", static=(b.address,))
    await a.admit(c)
    await c.listen()
    await home.link(b, c)
    await ready(c, b)
    assert c.state_of(b).address == b.address


async def test_members_say_where_others_are(home: Home) -> None:
    a, b = await home.pair()
    c = await home.node("cellar")
    await a.admit(c)
    await c.listen()
    await home.link(a)
    tell(a, c)
    await ready(a, c)
    # Not over loopback addresses: they mean another machine elsewhere.
    assert a.fleet.reached() == {c.id: [str(c.address)]}
    from mycoswarmd.fleet.hints import read_addresses  # noqa: PLC0415

    told = ["10.0.0.7:7437", "[fd00::1]:7437", "127.0.0.1:1", "[fe80::1]:7437", "x:1", "10.0.0.7:70000", 3]
    assert [str(one) for one in read_addresses(told)] == ["10.0.0.7:7437", "[fd00::1]:7437"]
    _ = b


async def test_two_with_one_key_raise_an_alarm_that_stays(home: Home) -> None:
    a, b = await home.pair()
    await home.link(a)
    tell(a, b)
    await ready(a, b)
    assert a.state_of(b).alarm == ""
    b.behaviour.word = lambda word: replace(word, instance="00000000deadbeef")  # same start, another daemon
    b.say_again()
    await a.until(lambda: a.state_of(b).alarm != "")
    assert a.state_of(b).alarm.startswith("cloned")

    async def kept() -> str:
        return "".join(row.alarm for row in await a.store.peers() if row.node_id == b.id)

    async with asyncio.timeout(60):
        while not await kept():
            await asyncio.sleep(0.05)
    b.behaviour.word = lambda word: replace(word, boot=word.boot + 5)
    b.say_again()
    await a.until(lambda: a.words()[b.id].instance == b.swarm.instance)
    assert a.state_of(b).alarm.startswith("cloned")


async def test_a_copy_beside_the_original_is_found_by_where_it_says_it_is(home: Home) -> None:
    """The link stays with the original; the copy dials, and so says where it listens."""
    a, b = await home.pair()
    async with made_node(home.path / "gone", "gone") as first:
        await a.admit(first)
        assert first.swarm.boot == 1
    shutil.copytree(home.path / "gone", home.path / "copy")
    original, copy = await home.node("gone"), await home.node("copy")
    assert original.id == copy.id
    await original.listen()
    await copy.listen()
    await home.link(a)
    tell(a, original)
    await ready(a, original)
    alone = a.state_of(original)
    tell(a, original)  # where it is already
    tell(a, original, b.address)  # somebody else is there
    await home.link(copy)
    tell(copy, a)
    await a.until(lambda: a.state_of(original).alarm.startswith("cloned"))
    assert alone.alarm == "" and a.state_of(original).address == original.address
    assert str(copy.address) in a.state_of(original).alarm


async def test_a_second_address_of_one_machine_is_no_copy(home: Home) -> None:
    a, b = await home.pair()
    await home.link(a)
    tell(a, b)
    await ready(a, b)
    assert b.port is not None
    second = PeerAddress("127.0.0.2", b.port)
    await b.listen_also(second)
    asked = b.behaviour.asked("/swarm/word")
    tell(a, b, second)
    await a.until(lambda: b.behaviour.asked("/swarm/word") > asked)  # it was looked at there
    # Whoever relays to a node looks like it: its address is a hint, and what was proved stays so.
    assert second in a.fleet._hints.addresses(b.id)
    assert a.fleet._hints.proved(b.id) == [b.address]
    assert a.state_of(b).alarm == "" and a.state_of(b).address == b.address


async def test_two_that_agree_already_still_learn_where_the_other_listens(home: Home) -> None:
    a, b = await home.pair()
    await home.link(a, b)
    assert a.swarm.digest == b.swarm.digest
    tell(a, b)
    await ready(a, b)
    await ready(b, a)


@pytest.mark.parametrize(("boot", "is_alarm"), [(-1, True), (0, False), (1, False)])
async def test_only_a_count_that_falls_back_is_an_alarm(home: Home, boot: int, *, is_alarm: bool) -> None:
    a, b = await home.pair()
    await home.link(a)
    b.behaviour.word = lambda word: replace(word, boot=10)
    tell(a, b)
    await ready(a, b)
    instance = b.swarm.instance if boot == 0 else "00000000deadbeef"
    b.behaviour.word = lambda word: replace(word, boot=10 + boot, instance=instance, uptime_s=7)
    b.say_again()
    await a.until(lambda: a.words()[b.id].uptime_s == 7)
    assert bool(a.state_of(b).alarm) is is_alarm


async def test_where_a_member_was_is_remembered_over_a_restart(home: Home) -> None:
    b = await home.node("bedroom")
    async with made_node(home.path / "attic", "attic") as a:
        await a.begin()
        await a.admit(b)
        await b.listen()
        async with a.linked(), asyncio.timeout(60):
            tell(a, b)
            await ready(a, b)
            while not any(row.addresses for row in await a.store.peers()):
                await asyncio.sleep(0.05)
    again = await home.stack.enter_async_context(made_node(home.path / "attic", "attic"))
    await home.link(again)
    await ready(again, b)


async def test_a_word_for_another_id_is_no_word(home: Home) -> None:
    a, b = await home.pair()
    await home.link(a)
    b.behaviour.word = lambda word: replace(word, id=a.id)
    tell(a, b)
    await a.until(lambda: a.state_of(b).state is Reach.UNREACHABLE)
    assert a.words() == {}


async def test_a_new_key_of_ours_is_used_from_the_next_connection(home: Home) -> None:
    a, b = await home.pair()
    await home.link(a, b)
    tell(a, b)
    await ready(a, b)
    old = a.id
    await a.swarm.rekey()
    a._tls = None
    assert a.id != old
    await b.until(lambda: b.swarm.member(a.id) is not None and b.swarm.member(old) is None)
    await ready(a, b)


async def test_leaving_reaches_the_others_before_everything_is_forgotten(home: Home) -> None:
    a, b = await home.pair()
    await home.link(b)
    tell(b, a)
    await ready(b, a)
    left = b.id
    await b.swarm.leave()
    assert a.swarm.member(left) is None
    assert b.fleet.states() == []


async def test_who_does_not_know_a_leaver_yet_is_not_counted_among_those_that_were_told(home: Home) -> None:
    """Its refusal is that of one that has not heard of the newcomer; nobody else will ever put that out."""
    a, b = await home.pair()
    c = await home.node("cellar")
    await a.admit(c)
    await c.listen()
    a.hang_up()
    await home.link(c)
    tell(c, b)
    await c.until(lambda: c.state_of(b).code == "peer-refuses-us")
    c.swarm.tell = c.fleet.tell
    assert await c.swarm.leave() == []
