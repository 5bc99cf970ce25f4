"""Where the members may be: addresses that somebody named, and those where a key was proved.

Law: hints come from anybody and are bounded and forgotten; an address where a member proved its key, and one
that a person wrote down, is neither pushed out nor outranked by any number of hints. Nothing here is
trusted: the dialer proves the key at each address anew.
"""

import ipaddress
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from mycoswarmd.flow.ports import Clock, Entropy
from mycoswarmd.flow.swarmports import PeerAddress
from mycoswarmd.wire.hints import clean_address

MAX_HINTS = 256
MAX_UNKNOWN_IDS = 64
# For one id; together what a dialer tries.
MAX_PROVED, MAX_UNPROVED = 4, 12
HINT_S = 120.0
_SWEEP_S = 1.0
_SHARED = ipaddress.ip_network("100.64.0.0/10")


@dataclass(slots=True)
class _Place:
    heard_s: float
    proved_s: float | None = None
    is_static: bool = False

    @property
    def is_hint(self) -> bool:
        return self.proved_s is None and not self.is_static


@dataclass(slots=True)
class _Entry:
    digest: str = ""
    places: dict[PeerAddress, _Place] = field(default_factory=dict)

    def hints(self) -> list[PeerAddress]:
        """Return the addresses that are no more than hints, the longest unheard first."""
        found = [address for address, place in self.places.items() if place.is_hint]
        return sorted(found, key=lambda address: self.places[address].heard_s)


class Hints:
    """Implements flow.swarmports.AddressBook."""

    def __init__(self, *, clock: Clock, entropy: Entropy, is_member: Callable[[str], bool]) -> None:
        self._clock = clock
        self._entropy = entropy
        self._is_member = is_member
        self._entries: dict[str, _Entry] = {}
        self._swept_s = 0.0

    def addresses(self, node_id: str) -> Sequence[PeerAddress]:
        """Return at most 16 addresses to try: proved ones, then a person's, then the newest hints."""
        self.sweep()
        entry = self._entries.get(node_id)
        if entry is None:
            return ()

        def rank(address: PeerAddress) -> tuple[int, float]:
            place = entry.places[address]
            if place.proved_s is not None:
                return 0, -place.proved_s
            return (1 if place.is_static else 2), -place.heard_s

        return sorted(entry.places, key=rank)[: MAX_PROVED + MAX_UNPROVED]

    def digest(self, node_id: str) -> str:
        """Return the beginning of the roster's digest that a node announced last, or ""."""
        entry = self._entries.get(node_id)
        return entry.digest if entry is not None else ""

    def add(
        self, node_id: str, address: PeerAddress, *, digest: str | None = None, is_static: bool = False
    ) -> bool:
        """Note a hint and tell whether it was news."""
        self.sweep()
        entry = self._entries.get(node_id)
        if entry is None:
            if not self._is_member(node_id):
                self._make_room_for_unknown()
            entry = self._entries[node_id] = _Entry()
        is_news = bool(digest) and digest != entry.digest
        entry.digest = digest or entry.digest
        place = entry.places.get(address)
        if place is None:
            if not is_static:
                self._make_room(entry)
            place = entry.places[address] = _Place(heard_s=0.0)
            is_news = True
        place.heard_s = self._clock.monotonic_s()
        place.is_static = place.is_static or is_static
        return is_news

    def prove(self, node_id: str, address: PeerAddress, *, at_s: float | None = None) -> None:
        """Note that a member proved its key there; `at_s` is for memories from before the start."""
        entry = self._entries.setdefault(node_id, _Entry())
        now_s = self._clock.monotonic_s()
        place = entry.places.setdefault(address, _Place(heard_s=now_s))
        place.heard_s, place.proved_s = now_s, now_s if at_s is None else at_s
        proved = [(one.proved_s, where) for where, one in entry.places.items() if one.proved_s is not None]
        for _, where in sorted(proved, key=lambda pair: pair[0])[:-MAX_PROVED]:
            entry.places[where].proved_s = None  # a hint from now on, or a person's

    def proved(self, node_id: str) -> list[PeerAddress]:
        """Return where a member proved its key, the newest first."""
        entry = self._entries.get(node_id)
        places = entry.places.items() if entry is not None else ()
        found = [(place.proved_s, address) for address, place in places if place.proved_s is not None]
        return [address for _, address in sorted(found, key=lambda pair: pair[0], reverse=True)]

    def forget(self, node_id: str) -> None:
        """Drop all addresses of somebody who is no member any more, but for what a person wrote down."""
        entry = self._entries.pop(node_id, None)
        static = {a: p for a, p in entry.places.items() if p.is_static} if entry is not None else {}
        if static:
            for place in static.values():
                place.proved_s = None
            self._entries[node_id] = _Entry(places=static)

    def unknown(self) -> list[str]:
        """Return the ids that somebody named and that are no members."""
        self.sweep()
        return [node_id for node_id in self._entries if not self._is_member(node_id)]

    def count(self) -> int:
        """Return how many hints are held; at most MAX_HINTS."""
        return sum(len(entry.hints()) for entry in self._entries.values())

    def sweep(self) -> None:
        """Forget the hints that nobody repeated."""
        now_s = self._clock.monotonic_s()
        if now_s - self._swept_s < _SWEEP_S:
            return
        self._swept_s, oldest_s = now_s, now_s - HINT_S
        for node_id, entry in list(self._entries.items()):
            entry.places = {a: p for a, p in entry.places.items() if not p.is_hint or p.heard_s > oldest_s}
            if not entry.places:
                del self._entries[node_id]

    def _make_room_for_unknown(self) -> None:
        unknown = [one for one in self._entries if not self._is_member(one)]
        if len(unknown) >= MAX_UNKNOWN_IDS:
            # At random: under a flood, whoever is real and says it again gets in for a while.
            del self._entries[unknown[int(self._entropy.token(4), 16) % len(unknown)]]

    def _make_room(self, entry: _Entry) -> None:
        """Keep one more hint of this entry within the bounds, at the cost of whoever has most."""
        mine = entry.hints()
        if len(mine) >= MAX_UNPROVED:
            del entry.places[mine[0]]
        if self.count() < MAX_HINTS:
            return
        victim = max(self._entries.items(), key=self._cost)[1]
        del victim.places[victim.hints()[0]]

    def _cost(self, item: tuple[str, _Entry]) -> tuple[bool, int]:
        node_id, entry = item
        held = len(entry.hints())
        return held > 0 and not self._is_member(node_id), held


def read_addresses(untrusted: Iterable[object]) -> list[PeerAddress]:
    """Return those of a member's words about others that are addresses and mean the same here as there."""
    found = [_read_address(one) for one in untrusted]
    return [address for address in found if address is not None]


def _read_address(untrusted: object) -> PeerAddress | None:
    if not isinstance(untrusted, str) or len(untrusted) > 64:
        return None
    host, _, port = untrusted.rpartition(":")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) <= 0xFFFF):
        return None
    text = host.removeprefix("[").removesuffix("]")
    # One of an interface, or of this machine, means something else here than where it was said.
    address = clean_address(text) if "%" not in text else None
    if address is None:
        return PeerAddress(text, int(port)) if _is_shared(text) else None
    known = ipaddress.ip_address(address)
    if known.is_loopback or known.is_link_local:
        return None
    return PeerAddress(address, int(port))


def _is_shared(text: str) -> bool:
    """Tell whether this is an address of the range that private overlays use (RFC 6598)."""
    try:
        return ipaddress.ip_address(text) in _SHARED
    except ValueError:
        return False
