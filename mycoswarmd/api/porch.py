"""How often strangers may come: token buckets on the injected clock, one for each source and one for all.

Law: what somebody unproved can use up is bounded, for one source and for all of them together, before
anything is computed for them. A source is an address; of IPv6 the first 64 bits, which is what one
machine gets to choose from.
"""

import ipaddress
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

# Of how many sources the fill is remembered; the longest unused one is forgotten, which fills it.
_SOURCES = 4096
_PREFIX = 64


@dataclass(frozen=True, slots=True)
class Rate:
    """So many at once, and so many a second in the long run."""

    burst: float
    per_s: float


class Buckets:
    """One bucket for each source and one for all."""

    def __init__(self, *, monotonic_s: Callable[[], float], each: Rate, all_: Rate) -> None:
        self._monotonic_s = monotonic_s
        self._each = each
        self._all = all_
        self._whole = (all_.burst, monotonic_s())
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, source: str) -> bool:
        """Take a token of the source's and one of all; False when either has none: then none is taken."""
        now_s = self._monotonic_s()
        mine = _filled(self._levels.pop(source, (self._each.burst, now_s)), self._each, now_s)
        whole = _filled(self._whole, self._all, now_s)
        may_pass = mine >= 1 and whole >= 1
        self._levels[source] = (mine - may_pass, now_s)
        self._whole = (whole - may_pass, now_s)
        if len(self._levels) > _SOURCES:
            self._levels.popitem(last=False)
        return may_pass


def _filled(level: tuple[float, float], rate: Rate, now_s: float) -> float:
    tokens, at_s = level
    return min(rate.burst, tokens + max(0.0, now_s - at_s) * rate.per_s)


def source_of(peername: object) -> str:
    """Return what counts as one source of a connection: its IPv4 address or its /64."""
    host = peername[0] if isinstance(peername, tuple) and peername else ""
    try:
        address = ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        if address.is_link_local:
            return str(host)  # every machine on the cable has this prefix, and one address for each interface
        return str(ipaddress.ip_network((int(address), _PREFIX), strict=False))
    return str(address)
