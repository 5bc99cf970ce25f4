"""What `doctor` looks at around the network: who listens to the world, what a firewall drops.

Everything is read: /proc/net, the firewall's own files and lists. Nothing is sent.
Sources: proc(5), Documentation/networking/proc_net_tcp.rst, and the manuals in firewall.py.
"""

import ipaddress
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mycoswarmd.ctl.box import Box, Finding, Severity
from mycoswarmd.ctl.firewall import MDNS, Packet, firewalld_blocks, iptables_blocks, nft_blocks, ufw_blocks

API_PORT, SWARM_PORT = 7436, 7437
# Ports that engines listen on by default and little else does.
_ENGINES: Mapping[int, str] = {
    1234: "LM Studio",
    1337: "Jan",
    4891: "GPT4All",
    5001: "KoboldCpp",
    11434: "Ollama",
    30000: "SGLang",
    50052: "llama.cpp's rpc-server",
    52415: "exo",
}
# Ports that engines share with half the world.
_PERHAPS = {
    4000: "LiteLLM",
    5000: "a web interface",
    7860: "a web interface",
    8000: "vLLM",
    8080: "llama.cpp",
}
_PROGRAMS: Mapping[str, str] = {
    "ollama": "Ollama",
    "llama-server": "llama.cpp",
    "rpc-server": "llama.cpp's rpc-server",
    "koboldcpp": "KoboldCpp",
    "vllm": "vLLM",
    "lms": "LM Studio",
    "local-ai": "LocalAI",
}
OLLAMA_DROP_IN = "/etc/systemd/system/ollama.service.d/at-home.conf"
OLLAMA_AT_HOME = "\\n".join(
    (
        "[Service]",
        "Environment=OLLAMA_HOST=127.0.0.1:11434",
        "IPAddressDeny=any",
        "IPAddressAllow=127.0.0.1 ::1",
        "",
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A TCP socket that waits for connections.

    Attributes:
        program: its name, or "" where only root may know.
        command: its command line, or "".
    """

    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int
    program: str = ""
    command: str = ""

    @property
    def is_open(self) -> bool:
        """Whether other machines can reach it."""
        mapped = self.address.ipv4_mapped if isinstance(self.address, ipaddress.IPv6Address) else None
        return not (mapped or self.address).is_loopback


def network(box: Box, *, swarm_port: int | None, api_port: int | None, discovery: bool) -> Iterator[Finding]:
    """Look at the network's side of the machine; a port that is None is not used."""
    found = listeners(box)
    yield from exposed(box, found)
    yield from taken(found, {"swarm": swarm_port, "API": api_port})
    if box.is_running:
        yield from firewall(box, swarm_port=swarm_port, discovery=discovery)


def listeners(box: Box) -> list[Listener]:
    """Return who listens, once for each port and kind of address."""
    rows: dict[tuple[str, int], str] = {}
    for file in ("/proc/net/tcp", "/proc/net/tcp6"):
        for text in (box.read(file) or "").splitlines()[1:]:
            words = text.split()
            if len(words) > 9 and words[3] == "0A":
                address, _, port = words[1].partition(":")
                rows.setdefault((address, int(port, 16)), words[9])
    owners = _owners(box, {inode for inode in rows.values() if inode != "0"})
    return [
        Listener(address=_address(address), port=port, **owners.get(inode, {}))
        for (address, port), inode in rows.items()
    ]


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Read an address of /proc/net/tcp: words of 32 bits, each in the machine's order."""
    data = b"".join(bytes.fromhex(text[at : at + 8])[::-1] for at in range(0, len(text), 8))
    return ipaddress.IPv4Address(data) if len(data) == 4 else ipaddress.IPv6Address(data)


def _owners(box: Box, inodes: set[str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for pid in box.names("/proc") if inodes else []:
        if not pid.isdecimal():
            continue
        for fd in box.names(f"/proc/{pid}/fd"):
            held = re.fullmatch(r"socket:\[(\d+)\]", box.link(f"/proc/{pid}/fd/{fd}") or "")
            # systemd holds the sockets of its units, too: the unit's own program says more.
            if held and held[1] in inodes and (held[1] not in found or pid != "1"):
                command = (box.read(f"/proc/{pid}/cmdline") or "").replace("\0", " ").strip()
                found[held[1]] = {
                    "program": (box.read(f"/proc/{pid}/comm") or "").strip(),
                    "command": command,
                }
    return found


def exposed(box: Box, found: list[Listener]) -> Iterator[Finding]:
    """Engines that anybody on the network can use, past every policy."""
    seen: set[int] = set()
    for one in sorted(found, key=lambda one: one.port):
        if not one.is_open or one.port in seen or _is_ours(one):
            continue
        engine = _PROGRAMS.get(one.program) or ("vLLM" if "vllm" in one.command.split() else None)
        known = engine or _ENGINES.get(one.port)
        if known:
            seen.add(one.port)
            yield Finding(
                name=f"exposed: {known}",
                severity=Severity.BROKEN,
                detail=f"Port {one.port} is open to the network: anybody can use {known}, past the policy.",
                fix=_closed(box, known, one.port),
            )
        elif one.port in _PERHAPS:
            seen.add(one.port)
            who = f" by {one.program}" if one.program else ""
            yield Finding(
                name=f"open port {one.port}",
                severity=Severity.NOTE,
                detail=f"Port {one.port} is open to the network{who}: an engine belongs at 127.0.0.1.",
                fix=f"sudo ss -ltnp 'sport = :{one.port}'",
            )
    if box.is_running and not seen:
        yield Finding(
            name="exposed engines", severity=Severity.OK, detail="No engine listens to the network."
        )


def _closed(box: Box, engine: str, port: int) -> str:
    units = ("/etc/systemd/system/ollama.service", "/usr/lib/systemd/system/ollama.service")
    if engine == "Ollama" and any(box.has(unit) for unit in units):
        return (
            f"sudo mkdir -p {OLLAMA_DROP_IN.rpartition('/')[0]} "
            f"&& printf '{OLLAMA_AT_HOME}' | sudo tee {OLLAMA_DROP_IN} "
            "&& sudo systemctl daemon-reload && sudo systemctl restart ollama"
        )
    if engine == "Ollama":
        return "start it with OLLAMA_HOST=127.0.0.1"
    return f"bind it to 127.0.0.1; sudo ss -ltnp 'sport = :{port}' says who it is"


def _is_ours(one: Listener) -> bool:
    return "mycoswarm" in one.command or "mycoswarm" in one.program


def taken(found: list[Listener], ports: Mapping[str, int | None]) -> Iterator[Finding]:
    """Ports of the node that another program has."""
    for what, port in ports.items():
        for one in found:
            if one.port == port and one.program and one.program != "systemd" and not _is_ours(one):
                yield Finding(
                    name=f"port {port}",
                    severity=Severity.BROKEN,
                    detail=f"The node's {what} port {port} is taken by {one.program}.",
                    fix=f"sudo ss -ltnp 'sport = :{port}'",
                )
                break


def firewall(box: Box, *, swarm_port: int | None, discovery: bool) -> Iterator[Finding]:
    """Firewalls of this machine that keep the swarm out."""
    wanted = [("mdns", MDNS, "announcements of other nodes (UDP 5353)")] if discovery else []
    if swarm_port is not None:
        swarm = Packet(protocol="tcp", port=swarm_port)
        wanted.append(("swarm port", swarm, f"other nodes (TCP {swarm_port})"))
    for name, packet, what in wanted:
        yield _firewall(box, name, packet, what)


def _firewall(box: Box, name: str, packet: Packet, what: str) -> Finding:
    who, fix, is_unread = _blocker(box, packet)
    if who:
        detail = f"{who} keeps out {what}."
        return Finding(name=name, severity=Severity.WEAK, detail=detail, fix=fix)
    if is_unread:
        detail = f"Whether the firewall lets in {what}, only root can see."
        return Finding(name=name, severity=Severity.NOTE, detail=detail, fix="sudo mycoswarmctl doctor")
    detail = f"No firewall rule was found that keeps out {what}."
    return Finding(name=name, severity=Severity.OK, detail=detail)


def _blocker(box: Box, packet: Packet) -> tuple[str, str, bool]:
    """Return who surely drops the packet ("": nobody), the cure, and whether root would see more."""
    service = f"{packet.port}/{packet.protocol}"
    if box.settings("/etc/ufw/ufw.conf").get("ENABLED", "").lower() == "yes":
        rules, before = box.read("/etc/ufw/user.rules"), box.read("/etc/ufw/before.rules")
        default = box.settings("/etc/default/ufw").get("DEFAULT_INPUT_POLICY", "DROP")
        if rules is None or before is None:
            return "", "", True
        fix = f"sudo ufw allow proto {packet.protocol} from {_lan(box)} to any port {packet.port}"
        return (
            ("The firewall ufw", fix, False)
            if ufw_blocks(rules, before, default, packet)
            else ("", "", False)
        )
    if box.has("/run/firewalld.pid") or box.has("/run/firewalld"):
        return _firewalld(box, packet, service)
    ruleset = box.ask(("/usr/sbin/nft", "-j", "list", "ruleset"))
    if ruleset and (where := nft_blocks(ruleset, packet)):
        family, table, chain = where
        rule = f"ip saddr {_lan(box)} {packet.protocol} dport {packet.port} accept"
        fix = f"sudo nft insert rule {family} {table} {chain} {rule}"
        return f"The nftables chain {family} {table} {chain}", fix, False
    saved = box.ask(("/usr/sbin/iptables-save", "-t", "filter"))
    if saved and iptables_blocks(saved, packet):
        rule = f"-s {_lan(box)} -p {packet.protocol} --dport {packet.port} -j ACCEPT"
        return "The iptables chain INPUT", f"sudo iptables -I INPUT {rule}", False
    has_tool = box.has("/usr/sbin/nft") or box.has("/usr/sbin/iptables-save")
    return "", "", has_tool and ruleset is None and saved is None


def _firewalld(box: Box, packet: Packet, service: str) -> tuple[str, str, bool]:
    name = box.settings("/etc/firewalld/firewalld.conf").get("DefaultZone", "public")
    zone = box.read(f"/etc/firewalld/zones/{name}.xml")
    if zone is None and not box.names("/etc/firewalld"):
        return "", "", True
    zone = zone if zone is not None else box.read(f"/usr/lib/firewalld/zones/{name}.xml")
    if zone is None:
        return "", "", False
    services = {
        one: text
        for one in re.findall(r"<service name=\"([A-Za-z0-9_.-]+)\"", zone)
        for place in ("/usr/lib/firewalld/services", "/etc/firewalld/services")
        if (text := box.read(f"{place}/{one}.xml")) is not None
    }
    if not firewalld_blocks(zone, packet, services):
        return "", "", False
    fix = f"sudo firewall-cmd --permanent --zone={name} --add-port={service} && sudo firewall-cmd --reload"
    return f"The zone {name} of firewalld", fix, False


def _lan(box: Box) -> str:
    """Return the network of the machine's default route's interface, or all of the largest private one."""
    rows = [text.split() for text in (box.read("/proc/net/route") or "").splitlines()[1:]]
    rows = [row for row in rows if len(row) > 7]
    outward = {row[0] for row in rows if row[1] == "00000000"}
    for row in rows:
        if row[0] in outward and row[1] != "00000000":
            network = ipaddress.ip_network(f"{_address(row[1])}/{_address(row[7])}", strict=False)
            if network.is_private:
                return str(network)
    return "192.168.0.0/16"
