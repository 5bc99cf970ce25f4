"""The book of addresses: bounded, forgetful of hearsay, faithful to what was proved."""

import pytest

from mycoswarmd.fleet.hints import (
    HINT_S,
    MAX_HINTS,
    MAX_PROVED,
    MAX_UNKNOWN_IDS,
    MAX_UNPROVED,
    Hints,
    read_addresses,
)
from mycoswarmd.flow.swarmports import PeerAddress

MEMBER, OTHER = "m" * 26, "o" * 26


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.at_s = 1000.0

    def now_ms(self) -> int:
        return 0

    def monotonic_s(self) -> float:
        return self.at_s

    def minute_of_day(self) -> int | None:
        return None


class Dice:
    """Randomness that goes through all numbers."""

    def __init__(self) -> None:
        self._n = 0

    def token(self, bytes_count: int) -> str:
        self._n += 7
        return f"{self._n:0{2 * bytes_count}x}"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def hints(clock: Clock) -> Hints:
    return Hints(clock=clock, entropy=Dice(), is_member=lambda node_id: node_id[0] == "m")


def at(n: int, port: int = 7437) -> PeerAddress:
    return PeerAddress(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", port)


def member(n: int) -> str:
    return f"m{n:025}".replace("0", "a").replace("1", "b").replace("8", "c").replace("9", "d")


def test_the_newest_hint_is_tried_first(hints: Hints, clock: Clock) -> None:
    assert hints.add(MEMBER, at(1))
    clock.at_s += 1
    assert hints.add(MEMBER, at(2))
    assert hints.addresses(MEMBER) == [at(2), at(1)]
    clock.at_s += 1
    assert not hints.add(MEMBER, at(1))  # no news, but newer
    assert hints.addresses(MEMBER) == [at(1), at(2)]


def test_what_was_proved_comes_before_what_a_person_wrote_and_that_before_hearsay(
    hints: Hints, clock: Clock
) -> None:
    hints.prove(MEMBER, at(1))
    clock.at_s += 5
    hints.add(MEMBER, at(2), is_static=True)
    clock.at_s += 5
    hints.add(MEMBER, at(3))
    assert hints.addresses(MEMBER) == [at(1), at(2), at(3)]
    clock.at_s += 5
    hints.prove(MEMBER, at(3))
    assert hints.addresses(MEMBER) == [at(3), at(1), at(2)]


def test_hearsay_is_forgotten_and_the_rest_is_not(hints: Hints, clock: Clock) -> None:
    hints.add(MEMBER, at(1))
    hints.prove(MEMBER, at(2))
    hints.add(MEMBER, at(3), is_static=True)
    clock.at_s += HINT_S - 2
    assert len(hints.addresses(MEMBER)) == 3
    clock.at_s += 4
    assert hints.addresses(MEMBER) == [at(2), at(3)]


def test_a_digest_that_changes_is_news(hints: Hints) -> None:
    assert hints.add(MEMBER, at(1), digest="a" * 16)
    assert not hints.add(MEMBER, at(1), digest="a" * 16)
    assert not hints.add(MEMBER, at(1))
    assert hints.add(MEMBER, at(1), digest="b" * 16)
    assert hints.digest(MEMBER) == "b" * 16


def test_a_flood_for_one_id_leaves_its_proved_addresses(hints: Hints, clock: Clock) -> None:
    hints.prove(MEMBER, at(1))
    hints.add(MEMBER, at(2), is_static=True)
    for n in range(100, 5100):
        clock.at_s += 0.001
        hints.add(MEMBER, at(n))
    assert hints.addresses(MEMBER)[:2] == [at(1), at(2)]
    assert len(hints.addresses(MEMBER)) == 2 + MAX_UNPROVED
    assert hints.count() == MAX_UNPROVED


def test_a_flood_of_ids_is_bounded_and_does_not_reach_the_members(hints: Hints, clock: Clock) -> None:
    for n in range(20):
        hints.add(member(n), at(n))
        hints.prove(member(n), at(1000 + n))
    for n in range(5000):
        clock.at_s += 0.001
        hints.add(f"x{n:025}", at(2000 + n))
    assert len(hints.unknown()) == MAX_UNKNOWN_IDS
    for n in range(20):
        assert hints.addresses(member(n)) == [at(1000 + n), at(n)]


def test_all_hints_together_are_bounded_at_the_cost_of_strangers_first(hints: Hints, clock: Clock) -> None:
    for n in range(20):
        hints.add(member(n), at(n))
    for stranger in range(MAX_UNKNOWN_IDS):
        for n in range(MAX_UNPROVED):
            clock.at_s += 0.001
            hints.add(f"x{stranger:025}", at(10_000 + 100 * stranger + n))
    assert hints.count() == MAX_HINTS
    assert all(hints.addresses(member(n)) == [at(n)] for n in range(20))


def test_among_members_whoever_has_most_hints_pays(hints: Hints, clock: Clock) -> None:
    quiet = member(0)
    hints.add(quiet, at(1))
    for n in range(1, 40):
        for port in range(MAX_UNPROVED):
            clock.at_s += 0.001
            hints.add(member(n), at(n, 2000 + port))
    assert hints.count() == MAX_HINTS
    assert hints.addresses(quiet) == [at(1)]


def test_proved_addresses_are_bounded_and_the_oldest_becomes_hearsay(hints: Hints, clock: Clock) -> None:
    for n in range(MAX_PROVED + 3):
        clock.at_s += 1
        hints.prove(MEMBER, at(n))
    assert hints.proved(MEMBER) == [at(n) for n in (6, 5, 4, 3)]
    clock.at_s += HINT_S + 2
    assert hints.addresses(MEMBER) == hints.proved(MEMBER)


def test_whoever_is_out_is_forgotten_but_for_what_a_person_wrote(hints: Hints) -> None:
    hints.prove(MEMBER, at(1))
    hints.add(MEMBER, at(2), is_static=True)
    hints.prove(MEMBER, at(2))
    hints.forget(MEMBER)
    assert hints.addresses(MEMBER) == [at(2)]
    assert hints.proved(MEMBER) == []
    hints.forget(OTHER)
    assert hints.addresses(OTHER) == ()


@pytest.mark.parametrize(
    "untrusted",
    [
        "", ":1", "10.0.0.1", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:٣", "example.org:1",
        "224.0.0.251:5353", "0.0.0.0:1", "[::]:1", "[ff02::fb]:1", "127.0.0.1:1", "[::1]:1", "[fe80::1]:1",
        "[fe80::1%eth0]:1", "10.0.0.1:-1", "1" * 100 + ":1", 7, None, ["10.0.0.1:1"], "240.0.0.1:1",
        "[::ffff:127.0.0.1]:1", "[fd00::1%a..b]:1", "[fe80::1%a..b]:1", "[fd00::1%\ud800]:1",
        "8.8.8.8:443", "169.254.169.254:80", "[2001:db8::7]:1",
    ],
)  # fmt: skip
def test_what_a_member_says_about_others_has_to_be_an_address(untrusted: object) -> None:
    assert read_addresses([untrusted]) == []


def test_addresses_of_home_networks_and_overlays_are_fine_when_a_member_says_them() -> None:
    assert read_addresses(["100.64.0.9:7437", "[fd00::7]:1", "192.168.7.7:7437"]) == [
        PeerAddress("100.64.0.9", 7437),
        PeerAddress("fd00::7", 1),
        PeerAddress("192.168.7.7", 7437),
    ]
