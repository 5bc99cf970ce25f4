"""How often strangers may come."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycoswarmd.api.porch import Buckets, Rate, source_of


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic_s(self) -> float:
        return self.now_s


EACH, ALL = Rate(3, 1), Rate(5, 2)


def buckets(clock: Clock, *, each: Rate = EACH, all_: Rate = ALL) -> Buckets:
    return Buckets(monotonic_s=clock.monotonic_s, each=each, all_=all_)


def test_a_source_has_a_burst_and_then_its_rate() -> None:
    clock = Clock()
    some = buckets(clock, all_=Rate(100, 100))
    assert [some.take("a") for _ in range(5)] == [True, True, True, False, False]
    clock.now_s += 1
    assert [some.take("a") for _ in range(2)] == [True, False]
    clock.now_s += 1000
    assert [some.take("a") for _ in range(4)] == [True, True, True, False]


def test_one_source_does_not_use_up_anothers() -> None:
    some = buckets(Clock(), all_=Rate(100, 100))
    while some.take("a"):
        pass
    assert some.take("b")


def test_all_sources_together_are_bounded() -> None:
    clock = Clock()
    some = buckets(clock)
    assert sum(some.take(str(n)) for n in range(50)) == 5
    clock.now_s += 1
    assert sum(some.take(str(n)) for n in range(50)) == 2


def test_a_refused_source_takes_nothing_of_the_others() -> None:
    some = buckets(Clock())
    assert sum(some.take("a") for _ in range(50)) == 3
    assert sum(some.take("b") for _ in range(50)) == 2


def test_a_clock_that_stands_or_steps_back_gives_nothing_away() -> None:
    clock = Clock()
    some = buckets(clock)
    assert sum(some.take("a") for _ in range(10)) == 3
    clock.now_s -= 500
    assert not some.take("a")


def test_what_is_remembered_is_bounded() -> None:
    some = buckets(Clock(), each=Rate(1, 0), all_=Rate(1e9, 0))
    for n in range(20_000):
        some.take(str(n))
    assert len(some._levels) == 4096
    assert not some.take("19999")


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 2)), max_size=60))
def test_never_more_than_burst_and_rate(steps: list[tuple[int, float]]) -> None:
    clock = Clock()
    some, begun_s = buckets(clock), clock.now_s
    passed = [0, 0, 0, 0]
    for source, pause_s in steps:
        clock.now_s += pause_s
        passed[source] += some.take(str(source))
    lasted_s = clock.now_s - begun_s
    assert all(count <= 3 + lasted_s + 1e-6 for count in passed)
    assert sum(passed) <= 5 + 2 * lasted_s + 1e-6


@pytest.mark.parametrize(
    ("peername", "source"),
    [
        (("10.0.0.7", 5), "10.0.0.7"),
        (("::ffff:10.0.0.7", 5, 0, 0), "10.0.0.7"),
        (("fd00:1:2:3:aaaa::1", 5, 0, 0), "fd00:1:2:3::/64"),
        (("fd00:1:2:3:bbbb::2", 5, 0, 0), "fd00:1:2:3::/64"),
        (("fe80::1%eth0", 5, 0, 3), "fe80::1%eth0"),  # one prefix for every machine on the cable
        ("", ""),
        (None, ""),
        (("nonsense", 1), ""),
    ],
)
def test_a_source_is_an_address_or_a_network(peername: object, source: str) -> None:
    assert source_of(peername) == source
