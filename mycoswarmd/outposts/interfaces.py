"""This machine's addresses on home networks, as the discovery process needs them.

Law: only private, link-local, unique local and loopback addresses are listened on and announced; what
belongs to containers and virtual machines of this host is not, since every host has the same there.
Source: netlink(7), rtnetlink(7).
"""

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import ifaddr

from mycoswarmd.wire.hints import MAX_ADDRESSES, clean_address

# One socket or two are opened for each.
MAX_INTERFACES = 16
# More scopes than this for one link-local address that came without any are guesses.
_MAX_GUESSES = 3
_CONTAINERS = re.compile(r"(docker|podman|virbr|lxcbr|lxdbr|cni|flannel|cali|vnet)|br-[0-9a-f]{12}\Z")
# RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_CHANGES = 0x1 | 0x10 | 0x100


@dataclass(frozen=True, slots=True)
class Place:
    """One address of this machine."""

    interface: str
    index: int
    address: str
    network: ipaddress.IPv4Network | ipaddress.IPv6Network

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine is there."""
        return ipaddress.ip_address(self.address.partition("%")[0]).is_loopback

    @property
    def is_link_local_v6(self) -> bool:
        """Whether the address needs its interface."""
        return "%" in self.address


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The networks that this machine is on: a value, equal as long as nothing has changed."""

    places: tuple[Place, ...]

    def listening(self) -> list[str | int]:
        """Return IPv4 addresses and indexes of interfaces with IPv6, as zeroconf takes them."""
        found: list[str | int] = [one.address for one in self.places if one.network.version == 4]
        found += sorted({one.index for one in self.places if one.is_link_local_v6})
        return found[: 2 * MAX_INTERFACES]

    def announced(self) -> list[str]:
        """Return the addresses to announce, without scopes, which have no meaning elsewhere."""
        ordered = sorted(self.places, key=lambda one: (one.network.version, one.is_link_local_v6))
        return [one.address.partition("%")[0] for one in ordered][:MAX_ADDRESSES]

    def usable(self, untrusted_addresses: Iterable[str]) -> tuple[str, ...]:
        """Return those that somebody on these networks can have, the nearest first."""
        found: dict[str, None] = {}
        for text in untrusted_addresses:
            for address in self._scoped(text):
                found.setdefault(address)
        return tuple(sorted(found, key=self._distance))[:MAX_ADDRESSES]

    def _scoped(self, untrusted: str) -> list[str]:
        """Return the address with its interface by name; without any, with each that it could be on."""
        text, _, scope = untrusted.partition("%")
        # 0 is what older versions say of an announcement that came over IPv4: they do not know.
        names = {"0": ""} | {str(one.index): one.interface for one in self.places}
        scope = names.get(scope, scope)
        whole = clean_address(f"{text}%{scope}" if scope else text)
        if whole is not None:
            # Loopback is this machine: it leads to another node only where there is no network at all.
            is_loopback = ipaddress.ip_address(whole.partition("%")[0]).is_loopback
            return [whole] if not is_loopback or all(one.is_loopback for one in self.places) else []
        interfaces = sorted({one.interface for one in self.places if one.is_link_local_v6})
        guesses = [clean_address(f"{text}%{name}") for name in interfaces[:_MAX_GUESSES]] if not scope else []
        return [one for one in guesses if one is not None]

    def _distance(self, address: str) -> tuple[int, int]:
        parsed = ipaddress.ip_address(address.partition("%")[0])
        near = "%" not in address and any(
            parsed in one.network for one in self.places if one.network.version == parsed.version
        )
        return (0 if near else 1 if "%" in address else 2, parsed.version)


def read_surroundings() -> Surroundings:
    """Ask the kernel."""
    found: dict[Place, None] = {}
    interfaces: set[str] = set()
    for adapter in ifaddr.get_adapters():
        name = adapter.name.partition(":")[0]  # an alias is another name of the same
        if _CONTAINERS.match(name) or len(interfaces | {name}) > MAX_INTERFACES:
            continue
        for ip in adapter.ips:
            place = _place(name, ip.ip, ip.network_prefix)
            if place is not None:
                interfaces.add(name)
                found.setdefault(place)
    outside = [one for one in found if not one.is_loopback]
    return Surroundings(tuple(sorted(outside or found, key=lambda one: (one.index, one.address))))


def _place(name: str, ip: str | Sequence[str | int], prefix: int) -> Place | None:
    text = ip if isinstance(ip, str) else str(ip[0]).partition("%")[0]
    try:
        index = socket.if_nametoindex(name)
        network = ipaddress.ip_network(f"{text}/{prefix}", strict=False)
    except (OSError, ValueError):
        return None
    address = clean_address(text) or clean_address(f"{text}%{name}")
    return None if address is None else Place(name, index, address, network)


def watch_changes() -> socket.socket | None:
    """Return a socket that can be read whenever an address or an interface changes; None if there is none."""
    try:
        watcher = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
        )
    except OSError:
        return None
    try:
        watcher.bind((0, _CHANGES))
    except OSError:
        watcher.close()
        return None
    return watcher
