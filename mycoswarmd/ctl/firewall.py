"""What a packet filter does with a packet from the network, read from its rules; nothing is sent or changed.

Law: a rule that is not wholly understood may let a packet through. So "blocked" is said only where no
reading of the rules lets it in, and a firewall that is too clever to be read here is not complained about.
Sources: libnftables-json(5), nft(8), iptables-extensions(8), ufw-framework(8), firewalld.zone(5).
"""

import ipaddress
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MAX_DEPTH = 32
_PROTOCOLS = {"6": "tcp", "17": "udp", "1": "icmp"}
# A verdict of a chain that came to its end, or said so.
_RETURN = "return"
_ENDS = ("accept", "drop")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """The first packet from another machine of the LAN, by IPv4."""

    protocol: str  # tcp | udp
    port: int
    to: str = ""  # a multicast group, or "" for this machine's own address


MDNS = Packet(protocol="udp", port=5353, to="224.0.0.251")

_Row = dict[str, Any]
_Value = Any  # of a JSON document that somebody else describes
_Chains = dict[tuple[str, str, str], _Row]


def nft_blocks(ruleset: str, packet: Packet) -> tuple[str, str, str] | None:
    """Return (family, table, chain) of `nft -j list ruleset` that surely drops the packet, or None."""
    try:
        rows = json.loads(ruleset)["nftables"]
        chains = _chains(rows)
        return next(_blocking(chains, packet), None)
    except (ValueError, KeyError, TypeError, AttributeError):  # not the JSON that the manual describes
        return None


def iptables_blocks(saved: str, packet: Packet) -> str | None:
    """Return the chain of `iptables-save -t filter` that surely drops the packet, or None."""
    chains: _Chains = {}
    for text in saved.splitlines():
        words = shlex.split(text) if text.startswith((":", "-A ")) else []
        if text.startswith(":"):
            base = {"hook": "input"} if words[0] == ":INPUT" else {}
            policy = {"policy": words[1].lower()} if words[1] != "-" else {}
            chains["ip", "filter", words[0][1:]] = {**base, **policy, "type": "filter", "rules": []}
        elif words and ("ip", "filter", words[1]) in chains:
            chains["ip", "filter", words[1]]["rules"].append(_translated(words[2:]))
    blocking = next(_blocking(chains, packet), None)
    return blocking[2] if blocking else None


def ufw_blocks(rules: str, before: str, default: str, packet: Packet) -> bool:
    """Tell whether ufw surely drops the packet: its user.rules, before.rules, default policy."""
    if default.upper() not in {"DROP", "REJECT"}:
        return False
    if packet.to and re.search(
        rf"^-A \S+ .*-d {re.escape(packet.to)} .*--dport {packet.port} .*-j ACCEPT", before, re.MULTILINE
    ):
        return False
    for row in re.findall(
        r"^### tuple ### (?:route:)?(\w+) (\w+) (\S+) \S+ \S+ \S+ (\w+)", rules, re.MULTILINE
    ):
        action, protocol, ports, direction = row
        if direction == "in" and protocol in {"any", packet.protocol} and _has_port(ports, packet.port):
            return action not in {"allow", "limit"}
    return True


def firewalld_blocks(zone: str, packet: Packet, services: Mapping[str, str]) -> bool:
    """Tell whether a zone of firewalld (XML) surely drops the packet; `services` are files by name."""
    if re.search(r"<zone[^>]*target=\"ACCEPT\"", zone) or "<rule" in zone:
        return False
    wholes = [zone, *(services.get(name, "") for name in re.findall(r"<service name=\"([^\"]+)\"", zone))]
    for text in wholes:
        for row in re.findall(r"<port\b([^>]*)/?>", text):
            said = dict(re.findall(r"(\w+)=\"([^\"]*)\"", row))
            if said.get("protocol") == packet.protocol and _has_port(said.get("port", ""), packet.port):
                return False
    return True


def _has_port(text: str, port: int) -> bool:
    """Tell whether a list such as 22,80:90 or 1025-65535 has a port; anything else that is no number does."""
    for part in text.split(","):
        first, _, last = part.replace("-", ":").partition(":")
        if (
            not first.isdecimal()
            or not (last or first).isdecimal()
            or int(first) <= port <= int(last or first)
        ):
            return True
    return False


def _chains(rows: Sequence[_Row]) -> _Chains:
    found: _Chains = {}
    for row in rows:
        if chain := row.get("chain"):
            found[chain["family"], chain["table"], chain["name"]] = {**chain, "rules": []}
        elif rule := row.get("rule"):
            found[rule["family"], rule["table"], rule["chain"]]["rules"].append(rule["expr"])
    return found


def _blocking(chains: _Chains, packet: Packet) -> Iterator[tuple[str, str, str]]:
    for key, chain in chains.items():
        is_way_in = chain.get("hook") in {"prerouting", "input"} and chain.get("type") == "filter"
        if is_way_in and key[0] in {"ip", "inet"}:
            outcomes = _walk(chains, key, packet, 0)
            policy = chain.get("policy") or "accept"
            ends = {policy if one == _RETURN else one for one in outcomes}
            if ends == {"drop"}:
                yield key


def _walk(chains: _Chains, key: tuple[str, str, str], packet: Packet, depth: int) -> set[str]:
    """Return the ways in which a chain may end for a packet."""
    chain = chains.get(key)
    if chain is None or depth > _MAX_DEPTH:
        return {"accept", "drop", _RETURN}
    outcomes: set[str] = set()
    for rule in chain["rules"]:
        verdicts, is_sure = _rule(chains, key, rule, packet, depth)
        outcomes |= verdicts - {_NEXT}
        if is_sure and _NEXT not in verdicts:
            return outcomes
    return outcomes | {_RETURN}


# A rule that does not end the walk.
_NEXT = "next"


def _rule(
    chains: _Chains, key: tuple[str, str, str], rule: Sequence[_Row], packet: Packet, depth: int
) -> tuple[set[str], bool]:
    """Return the verdicts that a rule may have, and whether it surely has one of them."""
    is_sure = True
    for part in rule:
        name, value = next(iter(part.items()))
        if name == "match":
            fits = _fits(value, packet)
            if fits is False:
                return {_NEXT}, True
            is_sure = is_sure and fits is True
        elif name == "vmap":
            verdict, known = _mapped(value, packet)
            if verdict is None:
                return ({_NEXT}, True) if known else ({"accept", "drop", _NEXT}, False)
            name, value = next(iter(verdict.items()))
        elif name == "xt":
            is_sure = False
            # With its target unknown, what an extension does is unknown, too.
            if value is None or value.get("type") == "target":
                return {"accept", "drop", _NEXT}, False
        verdicts = _verdicts(chains, key, name, value, packet, depth)
        if verdicts:
            return (verdicts, True) if is_sure else (verdicts | {_NEXT}, False)
    return {_NEXT}, True


def _verdicts(
    chains: _Chains, key: tuple[str, str, str], name: str, value: _Value, packet: Packet, depth: int
) -> set[str]:
    if name in _ENDS:
        return {name}
    if name == "reject":
        return {"drop"} if _is_refused(value, packet) else set()
    if name == _RETURN:
        return {_RETURN}
    if name in {"jump", "goto"}:
        ends = _walk(chains, (key[0], key[1], value["target"]), packet, depth + 1)
        return ends if name == "goto" else {_NEXT if one == _RETURN else one for one in ends}
    return {"accept", "drop", _NEXT} if name in {"queue", "tproxy"} else set()


def _is_refused(value: _Value, packet: Packet) -> bool:
    """Tell whether a `reject` is for such packets: nft leaves out what the kind of answer implies."""
    kind = value.get("type") if isinstance(value, dict) else None
    return kind != "icmpv6" and (kind != "tcp reset" or packet.protocol == "tcp")


def _mapped(value: _Row, packet: Packet) -> tuple[_Row | None, bool]:
    """Return what a verdict map says, or None; and whether that is sure."""
    rows = value["data"]["set"] if isinstance(value["data"], dict) else None
    if rows is None:
        return None, False
    known = True
    for element, verdict in rows:
        fits = _fits({"op": "==", "left": value["key"], "right": element}, packet)
        if fits:
            return verdict, True
        known = known and fits is False
    return None, known


def _fits(match: _Row, packet: Packet) -> bool | None:
    """Tell whether a packet fits; None when that cannot be told."""
    left = match["left"]
    payload = left.get("payload") if isinstance(left, dict) else None
    if isinstance(payload, dict) and not _is_of(str(payload.get("protocol")), packet):
        return False  # a packet without such a field fits neither a value nor its opposite
    fits = _compared(left, match["right"], packet)
    return fits if fits is None or match["op"] in {"==", "in"} else not fits


def _compared(left: _Value, right: _Value, packet: Packet) -> bool | None:
    kind, what = next(iter(left.items())) if isinstance(left, dict) and left else ("", {})
    if kind == "payload" and isinstance(what, dict):
        return _payload(str(what.get("protocol")), str(what.get("field")), right, packet)
    if kind == "ct" and what.get("key") == "state":
        return _among("new", right)
    if kind == "meta":
        facts = {"l4proto": packet.protocol, "nfproto": "ipv4", "protocol": "ip"}
        if (name := what.get("key")) in facts:
            return _among(facts[name], right)
        if name in {"iifname", "iif"}:
            return False if right == "lo" else None
        if name == "pkttype":
            return _among("multicast" if packet.to else "host", right)
    return None


def _is_of(protocol: str, packet: Packet) -> bool:
    """Tell whether a packet has a header of this kind."""
    return protocol in {"ip", "ether", "th", packet.protocol}


def _payload(protocol: str, name: str, right: _Value, packet: Packet) -> bool | None:
    if name == "dport":
        return _among(packet.port, right)
    if protocol == "ip" and name == "protocol":
        return _among(packet.protocol, right)
    return _within(packet.to, right) if protocol == "ip" and name == "daddr" else None


def _among(value: str | int, right: _Value) -> bool | None:
    if isinstance(right, str) and right.startswith("@"):
        return None  # a named set
    if isinstance(right, dict) and "range" in right:
        low, high = right["range"]
        return low <= value <= high if isinstance(low, int) and isinstance(value, int) else None
    rows = right["set"] if isinstance(right, dict) and "set" in right else right
    if isinstance(rows, list):
        each = [_among(value, row) for row in rows]
        return True if True in each else None if None in each else False
    return _PROTOCOLS.get(str(rows), rows) == value if isinstance(rows, str | int) else None


def _within(address: str, right: _Value) -> bool | None:
    if isinstance(right, dict) and "set" in right:
        each = [_within(address, row) for row in right["set"]]
        return True if True in each else None if None in each else False
    if isinstance(right, dict) and "prefix" in right:
        right = f"{right['prefix']['addr']}/{right['prefix']['len']}"
    try:
        network = ipaddress.ip_network(str(right), strict=False)
        if not address:  # of this machine, whatever it is
            return False if network.is_multicast else None
        return ipaddress.ip_address(address) in network
    except ValueError:
        return None


def _translated(words: Sequence[str]) -> list[_Row]:
    """Return a rule of iptables-save as one of nft; what is not known becomes a match that may fit."""
    found: list[_Row] = []
    left = list(words)
    protocol = "th"
    while left:
        word, op = left.pop(0), "=="
        if word == "!":
            op, word = "!=", left.pop(0)
        value = ""
        while left and not left[0].startswith("-") and left[0] != "!":
            value = f"{value} {left.pop(0)}".strip()
        if word == "-p":
            protocol = value
        if word in {"-j", "-g"}:
            found.append(_target(value, is_goto=word == "-g"))
        elif word not in _SILENT and (word, value) not in _EXTENSIONS:
            found.append(_match(*_condition(word, value, protocol), op))
    # A target stands last in a rule, but its own options follow it.
    return sorted(found, key=lambda part: "match" not in part)


# Options that say nothing about a packet, and extensions whose options are known here.
_SILENT = {"--comment", "--reject-with", "--log-prefix", "--log-level"}
_EXTENSIONS = {("-m", name) for name in ("tcp", "udp", "state", "conntrack", "multiport", "comment")}


def _condition(word: str, value: str, protocol: str) -> tuple[_Row, _Value]:
    """Return an option of iptables as the two sides of a match; one that is not known has no left side."""
    if word == "-p":
        return {"meta": {"key": "l4proto"}}, value
    if word in {"--dport", "--dports"}:
        ports = [_range(part) for part in value.split(",")]
        return {"payload": {"protocol": protocol, "field": "dport"}}, {"set": ports}
    if word == "-i":
        return {"meta": {"key": "iifname"}}, value
    if word == "-d":
        return {"payload": {"protocol": "ip", "field": "daddr"}}, value
    if word in {"--state", "--ctstate"}:
        return {"ct": {"key": "state"}}, value.lower().split(",")
    return {}, None


def _target(value: str, *, is_goto: bool) -> _Row:
    plain = {"ACCEPT": "accept", "DROP": "drop", "REJECT": "reject", "RETURN": "return"}
    if value in plain:
        return {plain[value]: None}
    if value in {"LOG", "NFLOG"}:
        return {"log": None}
    return {"goto" if is_goto else "jump": {"target": value}}


def _match(left: _Row, right: _Value, op: str) -> _Row:
    return {"match": {"op": op, "left": left, "right": right}}


def _range(text: str) -> _Value:
    first, _, last = text.partition(":")
    if not first.isdecimal() or not (last or first).isdecimal():
        return "@" + text
    return {"range": [int(first), int(last)]} if last else int(first)
