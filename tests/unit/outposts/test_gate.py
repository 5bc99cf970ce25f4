"""What the discovery process lets in, and which addresses it thinks anybody around can have."""

import asyncio
import ipaddress

import pytest

from mycoswarmd.outposts.discovery import Gate, Meter
from mycoswarmd.outposts.interfaces import Place, Surroundings


def place(interface: str, index: int, address: str, network: str) -> Place:
    return Place(interface, index, address, ipaddress.ip_network(network, strict=False))


ETH4 = place("eth0", 2, "192.168.1.5", "192.168.1.5/24")
ETH6 = place("eth0", 2, "fe80::5%eth0", "fe80::/64")
ULA = place("eth0", 2, "fd00::5", "fd00::/64")
WLAN6 = place("wlan0", 3, "fe80::6%wlan0", "fe80::/64")
LOOP = place("lo", 1, "127.0.0.1", "127.0.0.0/8")


def test_it_listens_on_each_interface_once() -> None:
    assert Surroundings((ETH4, ETH6, ULA, WLAN6)).listening() == ["192.168.1.5", 2, 3]


def test_it_announces_addresses_without_our_names_for_interfaces() -> None:
    assert Surroundings((ETH6, ULA, ETH4)).announced() == ["192.168.1.5", "fd00::5", "fe80::5"]


@pytest.mark.parametrize(
    ("heard", "usable"),
    [
        (["10.9.9.9", "192.168.1.7"], ("192.168.1.7", "10.9.9.9")),  # the nearest first
        (["fe80::7%2"], ("fe80::7%eth0",)),  # zeroconf names interfaces by number
        (["fe80::7%eth0"], ("fe80::7%eth0",)),
        (["fe80::7"], ("fe80::7%eth0", "fe80::7%wlan0")),  # heard over IPv4: it may be on either
        (["fe80::7%0"], ("fe80::7%eth0", "fe80::7%wlan0")),
        (["127.0.0.1", "::1"], ()),  # that is this machine
        (["8.8.8.8", "224.0.0.251", "x", ""], ()),
        (["192.168.1.7", "192.168.1.7"], ("192.168.1.7",)),
        ([f"192.168.1.{n}" for n in range(30, 60)], tuple(f"192.168.1.{n}" for n in range(30, 38))),
    ],
)
def test_usable_addresses(heard: list[str], usable: tuple[str, ...]) -> None:
    assert Surroundings((ETH4, ETH6, WLAN6)).usable(heard) == usable


def test_loopback_counts_where_there_is_nothing_else() -> None:
    assert Surroundings((LOOP,)).usable(["127.0.0.1"]) == ("127.0.0.1",)


def test_a_meter_bounds_each_source_all_of_them_and_their_number() -> None:
    meter = Meter()
    assert sum(meter.admits("10.0.0.1", 100, now_s=5.0) for _ in range(1000)) == 60
    assert sum(meter.admits(f"10.0.1.{n}", 100, now_s=5.5) for n in range(255)) == 240
    assert not meter.admits("10.0.2.1", 100, now_s=5.9)
    assert meter.admits("10.0.2.1", 100, now_s=6.0)
    assert sum(meter.admits(f"10.1.{n}.1", 1500, now_s=7.0) for n in range(255)) == 133  # 200 kB


class Inner(asyncio.DatagramProtocol):
    """Writes down what gets to zeroconf."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        del addr
        self.heard.append(data)


def test_a_gate_lets_small_packets_about_nodes_in() -> None:
    inner = Inner()
    gate = Gate(inner, Meter(), lambda: 1.0)
    good = [b"\0" * 12 + b"\x0b_mycoswarm\x04_tcp", b"\x0b_MycoSwarm" + bytes(12), b"mycoswarm" + bytes(1491)]
    bad = [b"", b"\0" * 12, b"\x04_ipp\x04_tcp", b"mycoswarm" + bytes(1492), b"myco\x05swarm"]
    for packet in (*bad, *good, *bad):
        gate.datagram_received(packet, ("10.0.0.1", 5353))
    assert inner.heard == good
