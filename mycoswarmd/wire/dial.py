"""What the core and the LAN dialer say to one another: one JSON packet each way on a connection of its own.

Laws:

1. The dialer decides by itself what may be dialled: numeric addresses of a home network, in the one spelling
   that `ipaddress` gives them, and loopback only for engines. What it cannot read, it refuses.
2. 169.254.0.0/16 is not a home network here: it is where clouds keep the keys of their machines. Their
   addresses for that in IPv6 lie in networks that are, and are refused one by one.
3. An IPv4 address in IPv6 clothes is refused, not undressed: no rule then has to be written twice.
4. A yes to `connect` and `listen` comes with exactly one descriptor; anything else comes with none.

Source: unix(7) for SCM_RIGHTS; systemd/README.md for the filter; RFC 1918, RFC 4193, RFC 4291.
"""

import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from mycoswarmd.errors import BadRequest
from mycoswarmd.wire.jsonv import bad_range, get_bool, get_choice, get_int, get_object, get_str, parse_object
from mycoswarmd.wire.proof import Proof, parse_proof_body, proof_body

VERSION = 1
PACKET_BYTES = 4096
# Whoever needs longer for a connection in the same house will not get one.
MAX_WITHIN_MS = 10_000
DETAIL_CHARS = 200
SWARM_PORT, API_PORT = 7437, 7436
# Below this, ports are of services that no node and no engine is: ssh, mail, printers, the router's pages.
LOWEST_PORT = 1024
LOOPBACK = "127.0.0.1"
_EVERYWHERE = frozenset({"::", "0.0.0.0"})  # noqa: S104 - the filter of the dialer's unit lets only the LAN in
_HOST_CHARS = 64
# An interface; the kernel allows 15 bytes.
_SCOPE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,14}\Z")
# As engines/address.py takes it, on the one loopback address that the filter of the dialer's unit has.
_ENGINE_URL = re.compile(r"http://127\.0\.0\.1:([0-9]{1,5})(?:/|/v1/?)?\Z")
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.%A-Za-z_-]{2,64})\]|([0-9.]{7,15})):([0-9]{1,5})\Z")
_LAN = tuple(
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7", "fe80::/10")
)
# Where clouds keep the keys of their machines: Amazon's, Google's, OpenStack's (on any interface).
_METADATA = frozenset(
    ipaddress.ip_address(text) for text in ("fd00:ec2::254", "fd20:ce::254", "fe80::a9fe:a9fe")
)


class Code(StrEnum):
    """Why there is no descriptor."""

    REFUSED = "refused"  # nobody listens there
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"  # no way there, or the network said another no
    DENIED = "denied"  # not an address for this product
    BUSY = "busy"  # too much at once
    IN_USE = "in-use"  # another program listens on that port


@dataclass(frozen=True, slots=True)
class Connect:
    """Connect to this address."""

    host: str
    port: int
    within_ms: int


@dataclass(frozen=True, slots=True)
class Listen:
    """Listen at this address."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Prove:
    """Say what you proved of your confinement."""


DialRequest = Connect | Listen | Prove


@dataclass(frozen=True, slots=True)
class Done:
    """Yes; the descriptor is beside it, or the proof in it."""

    proof: Proof | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """No, and why."""

    code: Code
    detail: str = ""


DialAnswer = Done | Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the machine's settings add to the rules that hold everywhere.

    Attributes:
        engine_ports: where engines listen on 127.0.0.1; None lets every port from 1024 up be one.
        listen: addresses beside the usual ones at which the node may listen.
    """

    engine_ports: frozenset[int] | None = frozenset()
    listen: frozenset[tuple[str, int]] = frozenset()


def encode_request(request: DialRequest) -> bytes:
    """Encode a request as a packet."""
    body: dict[str, object] = {"v": VERSION}
    match request:
        case Connect():
            body |= {"do": "connect", "host": request.host, "port": request.port}
            body["within_ms"] = request.within_ms
        case Listen():
            body |= {"do": "listen", "host": request.host, "port": request.port}
        case Prove():
            body["do"] = "prove"
    return _packet(body)


def parse_request(untrusted: bytes) -> DialRequest:
    """Parse a packet of the core's; addresses come out in their one spelling."""
    body = _object(untrusted)
    get_int(body, "v", where="", low=VERSION, high=VERSION)
    match get_choice(body, "do", where="", choices=("connect", "listen", "prove")):
        case "connect":
            _only(body, "v", "do", "host", "port", "within_ms")
            within_ms = get_int(body, "within_ms", where="", low=1, high=MAX_WITHIN_MS)
            return Connect(_host(body), _port(body), within_ms)
        case "listen":
            _only(body, "v", "do", "host", "port")
            return Listen(_host(body), _port(body))
        case _:
            _only(body, "v", "do")
            return Prove()


def encode_answer(answer: DialAnswer) -> bytes:
    """Encode an answer as a packet."""
    if isinstance(answer, Failed):
        return _packet({"ok": False, "code": answer.code.value, "detail": _clean(answer.detail)})
    return _packet({"ok": True} if answer.proof is None else {"ok": True, "proof": proof_body(answer.proof)})


def parse_answer(untrusted: bytes) -> DialAnswer:
    """Parse a packet of the dialer's, which reads strangers' packets and is believed accordingly."""
    body = _object(untrusted)
    if get_bool(body, "ok", where=""):
        return Done(parse_proof_body(get_object(body, "proof", where="")) if "proof" in body else None)
    code = Code(get_choice(body, "code", where="", choices=[one.value for one in Code]))
    return Failed(code, _clean(get_str(body, "detail", where="", max_len=DETAIL_CHARS, default="")))


def clean_host(untrusted: str) -> str | None:
    """Return an IP address in numbers in its one spelling, or None.

    Link-local IPv6 addresses need their interface, and no other address may have one.
    """
    text, has_scope, scope = untrusted.partition("%")
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv4Address):
        return None if has_scope else str(address)
    if address.ipv4_mapped is not None or address.is_link_local != bool(has_scope):
        return None
    if not has_scope:
        return str(address)
    return f"{address}%{scope}" if _SCOPE.match(scope) else None


def is_lan(host: str) -> bool:
    """Tell whether a clean address is of a home network: private, unique local or IPv6 link-local."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if address in _METADATA:
        return False
    return any(address in network for network in _LAN if network.version == address.version)


def objection(request: DialRequest, rules: Rules) -> str | None:
    """Say why a request is refused, for a person; None where it is not."""
    match request:
        case Connect():
            return _connect_objection(request, rules)
        case Listen():
            return _listen_objection(request, rules)
        case Prove():
            return None


def parse_rules(untrusted: Mapping[str, object]) -> Rules:
    """Find in the node's settings where engines are and where it listens.

    What cannot be understood adds nothing; the node itself tells the operator what is wrong with it.
    """
    engines = untrusted.get("engines")
    ports = set()
    for entry in engines.values() if isinstance(engines, dict) else ():
        url = entry.get("url") if isinstance(entry, dict) else None
        found = _ENGINE_URL.match(url) if isinstance(url, str) else None
        if found is not None:
            ports.add(int(found[1]))
    found_listen = {_address(untrusted.get(key)) for key in ("listen", "swarm_listen")}
    return Rules(
        engine_ports=frozenset(ports), listen=frozenset(one for one in found_listen if one is not None)
    )


def _address(untrusted: object) -> tuple[str, int] | None:
    """Return HOST:PORT or [HOST]:PORT as its parts, where one may listen at such an address."""
    found = _ADDRESS.match(untrusted) if isinstance(untrusted, str) else None
    host = clean_host(found[1] or found[2]) if found is not None else None
    if found is None or host is None or not (host == LOOPBACK or host in _EVERYWHERE or is_lan(host)):
        return None
    return host, int(found[3])


def _connect_objection(request: Connect, rules: Rules) -> str | None:
    host, port = request.host, request.port
    if clean_host(host) != host:
        return "the address is not in its one spelling"
    if port < LOWEST_PORT:
        return f"port {port} is below {LOWEST_PORT}: no node and no engine listens there"
    if host == LOOPBACK:
        if rules.engine_ports is None or port in rules.engine_ports:
            return None
        return f"no engine at {host}:{port} is declared in the settings"
    return None if is_lan(host) else f"{host} is not an address of a home network"


def _listen_objection(request: Listen, rules: Rules) -> str | None:
    host, port = request.host, request.port
    if clean_host(host) != host:
        return "the address is not in its one spelling"
    if (host, port) in rules.listen or (host, port) == (LOOPBACK, API_PORT):
        return None
    if port == SWARM_PORT and (host in _EVERYWHERE or is_lan(host)):
        return None
    return f"{host} port {port} is not declared in the settings"


def _host(body: dict[str, object]) -> str:
    host = clean_host(get_str(body, "host", where="", max_len=_HOST_CHARS))
    if host is None:
        raise bad_range("host", "an IP address in numbers, with its interface only where it is fe80::/10")
    return host


def _port(body: dict[str, object]) -> int:
    return get_int(body, "port", where="", low=1, high=65535)


def _only(body: Mapping[str, object], *known: str) -> None:
    if not body.keys() <= set(known):
        raise BadRequest("bad-request", "cannot accept a packet with parts that are not known")


def _object(untrusted: bytes) -> dict[str, object]:
    if len(untrusted) > PACKET_BYTES:
        raise BadRequest("bad-request", f"cannot read a packet: it is larger than {PACKET_BYTES} bytes")
    return parse_object(untrusted, what="the packet")


def _packet(body: Mapping[str, object]) -> bytes:
    packet = json.dumps(body, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    if len(packet) > PACKET_BYTES:
        raise BadRequest("bad-request", f"cannot write a packet of {len(packet)} bytes")
    return packet


def _clean(text: str) -> str:
    return "".join(char if char.isascii() and char.isprintable() else "?" for char in text[:DETAIL_CHARS])
