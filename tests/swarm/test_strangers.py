"""Whoever has no key of the swarm gets nothing, wherever he stands and whatever he announces. M3."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest

from tests.swarm.attackers.kit import Key, beacon, statement
from tests.swarm.attackers.liar import Takings, liar
from tests.swarm.attackers.mdns import announcement, speak
from tests.swarm.attackers.middle import APPLICATION_DATA, listener, tamperer
from tests.swarm.attackers.talk import Talk, as_member, attempt
from tests.swarm.conftest import open_lab
from tests.swarm.lab import PORT, Host, Lab, LabNode, wait_until, weakened

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300), pytest.mark.xdist_group("swarm-strangers")]
SECRET = "the-combination-of-the-safe-is-7291"
TEXT_KEYS = ("d", "id", "v")


@dataclass
class Street:
    """Two members, one of them with a model, and mallory."""

    lab: Lab
    asker: LabNode
    helper: LabNode
    mallory: Host


@contextlib.contextmanager
def street(*defences: str, ipv6: bool = True) -> Iterator[Street]:
    with open_lab() as lab:
        wrap = weakened(*defences) if defences else ()
        asker, helper = lab.swarm_of(2, engines=[2], wrap=wrap, ipv6=ipv6)
        yield Street(lab, asker, helper, lab.host("mallory"))


@pytest.fixture
def home() -> Iterator[Street]:
    with street() as made:
        yield made


def announce(stage: Street, node_id: str, ip: str) -> None:
    """Say that a node is at an address."""
    text = {"id": node_id, "v": "1", "d": os.urandom(8).hex(), "vram": "96GB", "models": "ok,gpt-9000"}
    speak(stage.mallory, [announcement(node_id, ip, txt=text)] * 2)


def announce_until(stage: Street, node_id: str, is_heard: Callable[[], object]) -> None:
    """Say it again and again: who listens in a process of its own may not have begun to."""
    for _ in range(20):
        announce(stage, node_id, stage.mallory.ip)
        with contextlib.suppress(AssertionError):
            wait_until(is_heard, within_s=5)
            return
    raise AssertionError(stage.lab.story([stage.asker]))


def be_the_helper(stage: Street, *, from_its_address: bool, is_believed: bool) -> tuple[Takings, int]:
    """Take the helper's place and wait for a prompt; returns what came and how the asker was answered."""
    word = stage.asker.row(stage.helper)["word"]
    stage.helper.kill()
    ip = stage.helper.host.ip
    if from_its_address:
        link_local = stage.helper.host.link_local
        stage.lab.unplug(stage.helper.host)
        stage.lab.move(stage.mallory, ip)
        stage.mallory.run("ip", "addr", "add", f"{link_local}/64", "dev", "eth0")
        stage.asker.host.run("ip", "-6", "neigh", "flush", "dev", "eth0")
    with liar(stage.mallory, word=word) as takings:
        announce_until(
            stage, stage.helper.id, lambda: takings.hellos >= 2 or "GET /swarm/watch" in takings.paths
        )
        # Where the liar is believed, the asker thinks that the helper is back.
        with contextlib.suppress(AssertionError):
            wait_until(lambda: stage.asker.sees(stage.helper), within_s=60 if is_believed else 1.5)
        answer = stage.asker.answered(SECRET) if is_believed else stage.asker.ask(SECRET)
    return takings, answer.status


@pytest.mark.parametrize("from_its_address", [False, True], ids=["by-mdns", "at-its-address"])
def test_a_liar_reads_prompts_where_any_server_is_believed(*, from_its_address: bool) -> None:
    with street("believes-any-server") as stage:
        takings, status = be_the_helper(stage, from_its_address=from_its_address, is_believed=True)
        assert status == 200
        assert SECRET.encode() in takings.everything()


@pytest.mark.parametrize("from_its_address", [False, True], ids=["by-mdns", "at-its-address"])
def test_a_liar_in_a_members_place_gets_a_client_hello(home: Street, *, from_its_address: bool) -> None:
    takings, status = be_the_helper(home, from_its_address=from_its_address, is_believed=False)
    assert status in {404, 503}
    assert takings.hellos >= 1
    assert takings.paths <= {"POST /swarm/pull"}, takings.paths
    assert SECRET.encode() not in takings.everything()


def test_an_announcer_with_96_gb_gets_nothing_but_knocks(home: Street) -> None:
    rogue = Key()
    with liar(home.mallory, key=rogue) as takings:
        announce_until(home, rogue.node_id, lambda: takings.requests)
        assert home.asker.ask(SECRET, model="gpt-9000").status in {404, 503}
        assert home.asker.answered(SECRET).headers["X-Mycoswarm-Node"] == "n2"
    assert takings.paths == {"POST /swarm/pull"}
    for _, body in takings.requests:
        assert set(json.loads(body)) <= {"have", "port"}
        assert all(len(one) == 64 for one in json.loads(body)["have"])
    names = {row["name"] for row in home.asker.swarm()["nodes"]}
    assert names == {"n1", "n2"}


def test_before_a_key_is_proved_only_a_client_hello_is_sent(home: Street) -> None:
    with listener(home.mallory) as book:
        announce(home, home.helper.id, home.mallory.ip)
        home.helper.kill()
        announce_until(home, home.helper.id, lambda: book.up)
        home.asker.ask(SECRET)
    kinds = record_kinds(book.up)
    assert kinds and set(kinds) == {22}, kinds  # handshake, no alert even: nobody spoke to it
    assert book.up[5] == 1  # ClientHello
    assert SECRET.encode() not in book.up and home.asker.id.encode() not in book.up


def record_kinds(data: bytes) -> list[int]:
    """Return the content types of TLS records in a row."""
    kinds = []
    while len(data) >= 5:
        kinds.append(data[0])
        data = data[5 + int.from_bytes(data[3:5], "big") :]
    return kinds


def test_a_strangers_roster_is_not_believed(home: Street) -> None:
    rogue, digest = Key(), home.asker.digest
    swarm = home.asker.swarm()["swarm"]["id"]
    base = {"v": 1, "swarm": swarm, "epoch": 0, "by": rogue.public.hex()}
    forged: list[Sequence[object]] = [
        [statement({**base, "kind": "admit", "cert": "x", "name": "evil", "role": "node"}, rogue)],
        [statement({**base, "kind": "revoke", "node": home.helper.id, "reason": "gone"}, rogue)],
        [statement({**base, "kind": "signer+", "key": rogue.public.hex(), "node": rogue.node_id}, rogue)],
        [beacon(swarm, 0, 1 << 40, rogue), "noise", None, {}, [[[]]]],
        ["x" * 60_000] * 20,
    ]
    for lies in forged:
        key = Key()
        with liar(home.mallory, key=key, statements=list(lies)) as takings:
            announce_until(home, key.node_id, lambda takings=takings: takings.requests)  # type: ignore[misc]
    assert home.asker.digest == home.helper.digest == digest
    home.asker.answered("still there?")


def test_a_key_that_was_never_admitted_opens_nothing(home: Street) -> None:
    stranger = Key()
    for certificate in (stranger.certificate(), stranger.certificate(claims_id=home.helper.id)):
        for path in ("/swarm/word", "/v1/models", "/swarm/pull", "/"):
            name = f"{home.asker.id}.mycoswarm.internal"
            reply = attempt(home.mallory, home.asker.host.ip, "GET", path, key=stranger,
                            certificate_der=certificate, server_name=name)  # fmt: skip
            assert reply is None, reply
    helper = Key.from_seed(home.helper.seed)
    with as_member(home.mallory, home.asker, helper) as talk:  # the control: a key that was
        assert talk.call("GET", "/swarm/word").status == 200


def test_a_stranger_sees_a_few_routes_and_no_more(home: Street) -> None:
    for method, path in (("GET", "/api/status"), ("GET", "/v1/models"), ("POST", "/v1/chat/completions"),
                         ("GET", "/swarm/word"), ("POST", "/swarm/sync"), ("POST", "/api/swarm/revoke"),
                         ("GET", "/api/swarm"), ("GET", "/swarm/watch")):  # fmt: skip
        with Talk.to(home.mallory, home.asker.host.ip) as talk:
            assert talk.call(method, path, {} if method == "POST" else None).status == 404, path


def test_a_man_in_the_middle_of_two_members_sees_nothing_and_changes_nothing() -> None:
    with street(ipv6=False) as stage:
        lab, asker, helper = stage.lab, stage.asker, stage.helper
        left, right = lab.host("left"), lab.host("right")
        lab.partition([asker.host, left, stage.mallory], [helper.host, right])
        lab.move(left, helper.host.ip)
        lab.move(right, asker.host.ip)
        damaged: list[int] = []

        def damage(direction: str, index: int, record: bytes) -> Sequence[bytes]:
            if direction == "down" and record[0] == APPLICATION_DATA and len(record) > 400 and armed:
                damaged.append(index)
                return [record[:-20] + bytes([record[-20] ^ 1]) + record[-19:]]
            return [record]

        armed: list[bool] = []
        there, back = (helper.host.ip, PORT), (asker.host.ip, PORT)
        with tamperer(left, there, damage, via=right) as relay, tamperer(right, back, via=left):
            wait_until(lambda: asker.sees(helper) and relay.seen)
            with lab.capture() as cable:
                asker.answered(SECRET)
            assert cable.frames and not cable.search(SECRET.encode(), b"chat/completions", b"Hello there")
            armed.append(True)
            while True:
                answer = asker.ask(SECRET)
                assert answer.status >= 500 or answer.status == 404, answer.body
                if damaged:  # or the connection had just been lost
                    break
            armed.clear()
            asker.answered(SECRET)


def test_nobody_gets_a_byte_out_of_a_node_that_is_in_no_swarm() -> None:
    with open_lab() as lab:
        node, mallory = lab.node("alone"), lab.host("mallory")
        with lab.capture(node.host, outgoing_only=True) as sent, pytest.raises(OSError, match="refused"):
            mallory.connect(node.host.ip)
        assert not sent.tshark("-Y", "mdns || tls || (tcp.len > 0)")
