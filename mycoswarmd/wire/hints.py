"""What the node and its discovery process say to one another: JSON, one object a line.

Law: whatever the process heard came from a hostile network, and the process itself is believed no more
than that: each line is bounded, each field checked, and an address that does not belong to a home network
is dropped. What is left is a hint, never a reason to trust.
Source: docs/wire.md.
"""

import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mycoswarmd.errors import BadRequest
from mycoswarmd.wire.jsonv import as_list, bad_range, get_bool, get_int, get_object, get_str, parse_object
from mycoswarmd.wire.proof import Proof, Unit, parse_proof_body, proof_body

VERSION = 1
# Within PIPE_BUF, so that a line is written whole or not at all.
LINE_BYTES = 4096
MAX_ADDRESSES = 8
_ID = re.compile(r"[a-z2-7]{26}\Z")
_DIGEST = re.compile(r"(?:[0-9a-f]{16})?\Z")
# An interface; two dots in a row are no name that a resolver takes.
_SCOPE = re.compile(r"(?!.*\.\.)[A-Za-z0-9_-][A-Za-z0-9_.-]{0,14}\Z")
_LONGEST_ADDRESS = 64
_PROBLEM_CHARS = 200
# Where homes and offices are: private, link-local, unique local, this machine (RFC 1918, 3927, 4193, 4291).
_HOME = tuple(
    ipaddress.ip_network(text)
    for text in (
        "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "127.0.0.0/8",
        "fc00::/7", "fe80::/10", "::1/128",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What a node tells everybody around: who it is, where it listens, and which roster it has."""

    node_id: str
    port: int
    digest: str = ""  # the first 16 hex digits of its roster's digest
    version: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """An announcement that was heard, and the addresses that it named."""

    node_id: str
    addresses: tuple[str, ...]
    port: int
    digest: str = ""
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Gone:
    """A node said that it stops listening."""

    node_id: str


@dataclass(frozen=True, slots=True)
class Ready:
    """The process listens on the network."""


@dataclass(frozen=True, slots=True)
class Beat:
    """The process is alive."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """The process cannot do its work just now; why, for a person."""

    text: str


@dataclass(frozen=True, slots=True)
class Proved:
    """What the process found out about its own confinement, where it is a unit."""

    proof: Proof


@dataclass(frozen=True, slots=True)
class Order:
    """What the node wants of the process: to announce this, or nothing, or to stop."""

    announce: Announcement | None = None
    stop: bool = False


Report = Sighting | Gone | Ready | Beat | Trouble | Proved


def encode_order(order: Order) -> bytes:
    """Encode an order as a line."""
    if order.stop:
        return _line({"stop": True})
    if order.announce is None:
        return _line({"announce": None})
    one = order.announce
    return _line({"announce": {"id": one.node_id, "port": one.port, "v": one.version, "d": one.digest}})


def parse_order(line: bytes) -> Order:
    """Parse a line of the node's."""
    body = parse_object(line, what="an order")
    if "stop" in body:
        return Order(stop=get_bool(body, "stop", where=""))
    if "announce" not in body:
        raise bad_range("", "an order: announce or stop")
    if body["announce"] is None:
        return Order()
    one = get_object(body, "announce", where="")
    return Order(
        announce=Announcement(
            node_id=_shaped(one, "id", _ID),
            port=get_int(one, "port", where="announce", low=1, high=65535),
            version=get_int(one, "v", where="announce", low=1, high=65535),
            digest=_shaped(one, "d", _DIGEST),
        )
    )


def encode_report(report: Report) -> bytes:
    """Encode a report as a line."""
    match report:
        case Sighting():
            return _line(
                {
                    "hint": {
                        "id": report.node_id,
                        "addresses": list(report.addresses),
                        "port": report.port,
                        "v": report.version,
                        "d": report.digest,
                    }
                }
            )
        case Gone():
            return _line({"gone": {"id": report.node_id}})
        case Ready():
            return _line({"ready": True})
        case Beat():
            return _line({"beat": True})
        case Trouble():
            return _line({"trouble": report.text[:_PROBLEM_CHARS]})
        case Proved():
            return _line({"proof": proof_body(report.proof)})


def parse_report(untrusted: bytes) -> Report:
    """Parse a line of the process's; addresses that no home network has are left out."""
    body = parse_object(untrusted, what="a report")
    if "hint" in body:
        return _sighting(get_object(body, "hint", where=""))
    if "gone" in body:
        return Gone(_shaped(get_object(body, "gone", where=""), "id", _ID))
    if "ready" in body:
        return Ready()
    if "beat" in body:
        return Beat()
    if "proof" in body:
        proof = parse_proof_body(body["proof"])
        if proof.unit is not Unit.DISCOVERY:
            raise bad_range("proof.unit", "discovery")
        return Proved(proof)
    text = get_str(body, "trouble", where="", max_len=_PROBLEM_CHARS)
    return Trouble("".join(one if one.isprintable() and one.isascii() else "?" for one in text))


def _sighting(one: dict[str, object]) -> Sighting:
    addresses = as_list(one.get("addresses"), where="hint.addresses", max_items=MAX_ADDRESSES)
    found = [clean_address(text) for text in addresses]
    return sighting(
        node_id=one.get("id"),
        addresses=tuple(text for text in found if text is not None),
        port=one.get("port"),
        version=one.get("v"),
        digest=one.get("d"),
    )


def sighting(
    *, node_id: object, addresses: tuple[str, ...], port: object, version: object, digest: object
) -> Sighting:
    """Make a sighting of untrusted parts and addresses that were cleaned."""
    one = {"id": node_id, "port": port, "v": version, "d": digest}
    return Sighting(
        node_id=_shaped(one, "id", _ID),
        addresses=addresses[:MAX_ADDRESSES],
        port=get_int(one, "port", where="hint", low=1, high=65535),
        version=get_int(one, "v", where="hint", low=1, high=65535),
        digest=_shaped(one, "d", _DIGEST),
    )


def clean_address(untrusted: object) -> str | None:
    """Return an address of a home network in its one spelling, or None.

    A link-local IPv6 address needs its interface: without one, it leads nowhere.
    """
    if not isinstance(untrusted, str) or len(untrusted) > _LONGEST_ADDRESS:
        return None
    text, has_scope, scope = untrusted.partition("%")
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if not any(address in network for network in _HOME if network.version == address.version):
        return None
    needs_scope = address.version == 6 and address.is_link_local
    if needs_scope != bool(has_scope) or (needs_scope and not _SCOPE.match(scope)):
        return None
    return f"{address}%{scope}" if needs_scope else str(address)


def _shaped(obj: Mapping[str, object], key: str, shape: re.Pattern[str]) -> str:
    value = get_str(dict(obj), key, where="", max_len=64)
    if not shape.match(value):
        raise BadRequest("bad-hint", f"cannot accept a hint: {key!r} has another form", where=key)
    return value


def _line(body: Mapping[str, object]) -> bytes:
    line = json.dumps(body, separators=(",", ":"), ensure_ascii=True).encode("ascii") + b"\n"
    if len(line) > LINE_BYTES:
        raise BadRequest("bad-hint", f"cannot write a line of {len(line)} bytes")
    return line
