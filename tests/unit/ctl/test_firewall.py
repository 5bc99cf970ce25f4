# ruff: noqa: E501 - rules of firewalls, as people write them
"""What is said of a firewall is what the kernel does: rules are loaded into a network of their own and tried
with packets; and firewalls whose files are read are read as they are written."""

import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mycoswarmd.ctl.box import Severity
from mycoswarmd.ctl.checks_network import firewall
from mycoswarmd.ctl.firewall import MDNS, Packet, firewalld_blocks, iptables_blocks, nft_blocks, ufw_blocks
from tests.unit.ctl.boxes import Tree, debian13

SWARM = Packet(protocol="tcp", port=7437)
# Says "tcp" or "udp" when something comes in; each line it is given is a question: what came since the last?
RECEIVER = """
import select, socket, struct, sys
tcp = socket.create_server(("10.99.0.1", 7437))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("", 5353))
group = socket.inet_aton("224.0.0.251") + socket.inet_aton("10.99.0.1")
udp.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
print("ready", flush=True)
while True:
    for one in select.select([tcp, udp], [], [])[0]:
        if one is tcp:
            tcp.accept()[0].close()
            print("tcp", flush=True)
        else:
            udp.recv(100)
            print("udp", flush=True)
"""
SENDER = """
import socket, sys
kind = sys.argv[1]
if kind == "tcp":
    try:
        socket.create_connection(("10.99.0.1", 7437), timeout=float(sys.argv[2])).close()
    except OSError:
        sys.exit(1)
else:
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("10.99.0.2"))
    udp.bind(("10.99.0.2", 5353))
    udp.sendto(b"x", ("224.0.0.251", 5353))
"""
needs_kernel = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("nft", "ip", "iptables-save"))),
    reason="needs root, nftables, iptables and iproute2",
)


class Lan:
    """Two machines on a cable: the one with the firewall, and another that sends."""

    def __init__(self, stack: ExitStack) -> None:
        self.here, self.there = f"fw{os.getpid()}a", f"fw{os.getpid()}b"
        for name in (self.here, self.there):
            run("ip", "netns", "add", name)
            stack.callback(run, "ip", "netns", "del", name)
        run(
            "ip",
            "-n",
            self.here,
            "link",
            "add",
            "lan0",
            "type",
            "veth",
            "peer",
            "name",
            "lan0",
            "netns",
            self.there,
        )
        for name, address in ((self.here, "10.99.0.1/24"), (self.there, "10.99.0.2/24")):
            run("ip", "-n", name, "link", "set", "lo", "up")
            run("ip", "-n", name, "addr", "add", address, "dev", "lan0")
            run("ip", "-n", name, "link", "set", "lan0", "up")
        command = ["ip", "netns", "exec", self.here, sys.executable, "-u", "-c", RECEIVER]
        self.receiver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        stack.enter_context(self.receiver)
        stack.callback(self.receiver.kill)
        assert self.receiver.stdout
        assert self.receiver.stdout.readline() == "ready\n"

    def inside(self, *command: str, given: str = "") -> str:
        return run("ip", "netns", "exec", self.here, *command, given=given)

    def lets_in(self, packet: Packet, *, within_s: float = 0.25) -> bool:
        """Send one for real, and wait so long for it to arrive."""
        before = self._received()
        command = ["ip", "netns", "exec", self.there, sys.executable, "-c", SENDER]
        ended = subprocess.run([*command, packet.protocol, str(within_s)], capture_output=True).returncode
        if packet.protocol == "tcp":
            return ended == 0
        ends_s = time.monotonic() + within_s
        while not (is_there := self._received() > before) and time.monotonic() < ends_s:
            time.sleep(0.02)
        return is_there

    def _received(self) -> int:
        """Return how many datagrams the program has read; what is queued for it is waited for."""
        while self._is_waiting():
            time.sleep(0.01)
        rows = [
            row.split() for row in self.inside("cat", "/proc/net/snmp").splitlines() if row.startswith("Udp:")
        ]
        return int(dict(zip(*rows, strict=True))["InDatagrams"])

    def _is_waiting(self) -> bool:
        rows = self.inside("cat", "/proc/net/udp").splitlines()[1:]
        return any(int(row.split()[4].partition(":")[2], 16) for row in rows)


def run(*command: str, given: str = "") -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def lan() -> Iterator[Lan]:
    with ExitStack() as stack:
        yield Lan(stack)


def let_in(lan: Lan, *, swarm: bool, mdns: bool) -> tuple[bool, bool]:
    """Send both; what should come is waited for, however slow the machine is."""
    return (
        lan.lets_in(SWARM, within_s=60 if swarm else 0.25),
        lan.lets_in(MDNS, within_s=60 if mdns else 0.25),
    )


def table(*rules: str, policy: str = "drop", more: str = "") -> str:
    body = "\n".join(rules)
    return f"table inet filter {{\n{more}\nchain input {{ type filter hook input priority 0; policy {policy};\n{body}\n}}\n}}"


# Rules as people have them, and whether the swarm's packet and an announcement come in.
RULESETS: dict[str, tuple[str, bool, bool]] = {
    "none": ("", True, True),
    "all is dropped": (table(), False, False),
    "debians example": (
        table("iif lo accept", "ct state established,related accept", "tcp dport 22 accept"), False, False
    ),
    "accepting at the end": (table("accept"), True, True),
    "one port": (table("tcp dport 7437 accept"), True, False),
    "a set of ports": (table("tcp dport { 22, 7000-7999 } accept", "udp dport { 53, 5353 } accept"), True, True),
    "by source": (table("ip saddr 10.0.0.0/8 tcp dport 7437 accept", "ip saddr 1.2.3.4 drop"), True, False),
    "the group": (table("ip daddr 224.0.0.0/4 accept"), False, True),
    "by kind of packet": (table("meta pkttype multicast accept"), False, True),
    "protocol": (table("meta l4proto udp accept"), False, True),
    "a verdict map": (
        table("ct state vmap { established : accept, invalid : drop, new : jump fresh }",
              more="chain fresh { tcp dport 7437 accept\n return\n }"), True, False,
    ),
    "a map of ports": (table("tcp dport vmap { 22 : accept, 7437 : accept }"), True, False),
    "not the loopback": (table('iifname != "lo" drop', policy="accept"), False, False),
    "rejected": (table("tcp dport 7437 reject", policy="accept"), False, True),
    "rejected in a chain": (
        table("jump deny", policy="accept", more="chain deny { udp dport 5353 drop\n tcp dport 7437 counter reject\n}"),
        False, False,
    ),
    "gone to a chain that says nothing": (table("goto deny", more="chain deny { tcp dport 22 accept\n}"), False, False),
    "refused by IPv6": (table("meta nfproto ipv6 reject", policy="accept"), True, True),
    "reset": (table("meta l4proto tcp reject with tcp reset", policy="accept"), False, True),
    "rate": (table("tcp dport 7437 limit rate 100/second accept"), True, False),
    "before all others": (
        table("accept") + "\ntable inet raw { chain pre { type filter hook prerouting priority -300; policy accept;"
        "tcp dport 7437 drop\n }\n}", False, True,
    ),
    "only outwards": (
        "table inet f { chain output { type filter hook output priority 0; policy accept;\n }\n}", True, True
    ),
    "only ipv6": ("table ip6 f { chain input { type filter hook input priority 0; policy drop;\n }\n}", True, True),
}  # fmt: skip


@needs_kernel
@pytest.mark.parametrize("name", RULESETS)
def test_what_is_said_is_what_the_kernel_does(lan: Lan, name: str) -> None:
    rules, swarm, mdns = RULESETS[name]
    lan.inside("nft", "flush", "ruleset")
    lan.inside("nft", "-f", "-", given=rules)
    assert let_in(lan, swarm=swarm, mdns=mdns) == (swarm, mdns)
    said = lan.inside("nft", "-j", "list", "ruleset")
    assert (nft_blocks(said, SWARM) is None, nft_blocks(said, MDNS) is None) == (swarm, mdns)


PARTS = (
    "tcp dport 7437", "udp dport 5353", "tcp dport 22", "th dport 7000-8000", "ip saddr 10.99.0.0/24",
    "ip saddr 192.168.0.0/16", "ip daddr 224.0.0.251", "ct state new", "ct state established", "iifname lan0",
    "iifname lo", "meta l4proto tcp", "meta nfproto ipv6", "ip ttl 1", "meta mark 7", "tcp sport 5353", "ip protocol udp",
    "tcp dport != 7437", "meta pkttype unicast",
)  # fmt: skip
ENDS = ("accept", "accept", "drop", "drop", "reject", "return", "jump other", "counter")


@needs_kernel
@pytest.mark.parametrize("seed", range(12))
def test_blocked_is_said_only_where_it_is_so(lan: Lan, seed: int) -> None:
    dice = random.Random(seed)

    def rule(ends: tuple[str, ...]) -> str:
        return " ".join([*dice.sample(PARTS, dice.randint(0, 2)), dice.choice(ends)])

    for _ in range(4):
        other = "chain other {\n" + "\n".join(rule(ENDS[:-2]) for _ in range(3)) + "\n}"
        rules = table(*(rule(ENDS) for _ in range(5)), policy=dice.choice(("accept", "drop")), more=other)
        lan.inside("nft", "flush", "ruleset")
        ran = subprocess.run(
            ["ip", "netns", "exec", lan.here, "nft", "-f", "-"], input=rules, text=True, capture_output=True
        )
        if ran.returncode:  # parts that exclude one another
            continue
        said = lan.inside("nft", "-j", "list", "ruleset")
        for packet in (SWARM, MDNS):
            assert not (nft_blocks(said, packet) and lan.lets_in(packet)), rules


IPTABLES: dict[str, tuple[str, bool, bool]] = {
    "all is dropped": ("-P INPUT DROP", False, False),
    "a port": ("-P INPUT DROP\n-A INPUT -p tcp -m tcp --dport 7437 -j ACCEPT", True, False),
    "ports": ("-P INPUT DROP\n-A INPUT -p udp -m multiport --dports 53,5353 -j ACCEPT", False, True),
    "states": (
        "-P INPUT DROP\n-A INPUT -i lo -j ACCEPT\n-A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT", False, False
    ),
    "not": ("-A INPUT ! -i lo -p tcp -m tcp ! --dport 22 -j DROP", False, True),
    "a chain": ("-N IN\n-A INPUT -j IN\n-A IN -d 224.0.0.251/32 -j RETURN\n-A IN -j REJECT", False, True),
}  # fmt: skip


@needs_kernel
@pytest.mark.parametrize("name", IPTABLES)
def test_iptables_is_read_as_the_kernel_reads_it(lan: Lan, name: str) -> None:
    rules, swarm, mdns = IPTABLES[name]
    lan.inside("nft", "flush", "ruleset")
    for row in rules.splitlines():
        lan.inside("iptables", *row.split())
    assert let_in(lan, swarm=swarm, mdns=mdns) == (swarm, mdns)
    saved = lan.inside("iptables-save", "-t", "filter")
    assert (iptables_blocks(saved, SWARM) is None, iptables_blocks(saved, MDNS) is None) == (swarm, mdns)
    # nft shows the same rules, with extensions that it cannot explain: never "blocked" where it is not so.
    said = lan.inside("nft", "-j", "list", "ruleset")
    assert not (swarm and nft_blocks(said, SWARM)) and not (mdns and nft_blocks(said, MDNS))


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"nftables": [{"rule": {}}]}', '{"nftables": 3}', "nonsense"]
)
def test_what_is_no_ruleset_blocks_nothing(text: str) -> None:
    assert nft_blocks(text, SWARM) is None
    assert iptables_blocks(text, SWARM) is None


# --- firewalls whose files are read --------------------------------------------------------------

UFW_BEFORE = textwrap.dedent("""
    # allow MULTICAST mDNS for service discovery (be sure the MULTICAST line above is uncommented)
    -A ufw-before-input -p udp -d 224.0.0.251 --dport 5353 -j ACCEPT
    """)
UFW_SSH = (
    "### RULES ###\n\n### tuple ### allow tcp 22 0.0.0.0/0 any 0.0.0.0/0 in\n"
    "-A ufw-user-input -p tcp --dport 22 -j ACCEPT\n"
)
UFW_SWARM = "### tuple ### allow tcp 7437 0.0.0.0/0 any 192.168.1.0/24 in\n"


def ufw(tree: Tree, rules: str, default: str = "DROP") -> Tree:
    return tree.put(
        {
            "/etc/ufw/ufw.conf": "ENABLED=yes\nLOGLEVEL=low\n",
            "/etc/default/ufw": f'IPV6=yes\nDEFAULT_INPUT_POLICY="{default}"\nDEFAULT_OUTPUT_POLICY="ACCEPT"\n',
            "/etc/ufw/before.rules": UFW_BEFORE,
            "/etc/ufw/user.rules": rules,
            "/proc/net/route": "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
            "eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
            "eth0\t0001A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0\n",
        }
    )


def said(tree: Tree) -> dict[str, Severity]:
    return {one.name: one.severity for one in firewall(tree.box(), swarm_port=7437, discovery=True)}


def test_ufw_lets_announcements_in_and_the_swarm_only_when_told(tmp_path: Path) -> None:
    tree = ufw(debian13(tmp_path), UFW_SSH)
    assert said(tree) == {"mdns": Severity.OK, "swarm port": Severity.WEAK}
    (found,) = (one for one in firewall(tree.box(), swarm_port=7437, discovery=False))
    assert found.fix == "sudo ufw allow proto tcp from 192.168.1.0/24 to any port 7437"
    assert set(said(ufw(tree, UFW_SSH + UFW_SWARM)).values()) == {Severity.OK}
    assert set(said(ufw(tree, UFW_SSH, default="ACCEPT")).values()) == {Severity.OK}
    assert ufw_blocks(UFW_SWARM.replace("allow", "deny"), UFW_BEFORE, "DROP", SWARM)
    assert not ufw_blocks("### tuple ### allow any 7000:7999 0.0.0.0/0 any 0.0.0.0/0 in\n", "", "DROP", SWARM)
    assert ufw_blocks("", "", "DROP", MDNS)


def test_a_firewall_that_only_root_can_read_is_no_finding_but_a_note(tmp_path: Path) -> None:
    tree = ufw(debian13(tmp_path), UFW_SSH)
    (tree.root / "etc/ufw/user.rules").unlink()
    assert set(said(tree).values()) == {Severity.NOTE}


ZONE = '<?xml version="1.0" encoding="utf-8"?>\n<zone>\n  <short>Public</short>\n{}\n  <forward/>\n</zone>\n'
MDNS_SERVICE = (
    '<service>\n  <port protocol="udp" port="5353"/>\n  <destination ipv4="224.0.0.251"/>\n</service>\n'
)


def test_firewalld_is_read_by_its_zone_and_services(tmp_path: Path) -> None:
    tree = debian13(tmp_path).put(
        {
            "/run/firewalld.pid": "700\n",
            "/etc/firewalld/firewalld.conf": "# comment\nDefaultZone=public\n",
            "/usr/lib/firewalld/zones/public.xml": ZONE.format('  <service name="ssh"/>'),
            "/usr/lib/firewalld/services/ssh.xml": '<service><port protocol="tcp" port="22"/></service>',
            "/usr/lib/firewalld/services/mdns.xml": MDNS_SERVICE,
        }
    )
    assert set(said(tree).values()) == {Severity.WEAK}
    fixes = [one.fix for one in firewall(tree.box(), swarm_port=7437, discovery=True)]
    assert "--zone=public --add-port=7437/tcp" in fixes[1] and "--add-port=5353/udp" in fixes[0]
    own = '  <service name="mdns"/>\n  <port port="7000-7999" protocol="tcp"/>'
    tree.put({"/etc/firewalld/zones/public.xml": ZONE.format(own)})
    assert set(said(tree).values()) == {Severity.OK}
    assert not firewalld_blocks(ZONE.replace("<zone>", '<zone target="ACCEPT">'), SWARM, {})


def test_the_cure_for_nftables_names_the_chain(tmp_path: Path) -> None:
    rows = [
        {"chain": {"family": "inet", "table": "filter", "name": "input", "hook": "input", "type": "filter",
                   "prio": 0, "policy": "drop"}},
    ]  # fmt: skip
    tree = debian13(tmp_path)
    tree.answers["/usr/sbin/nft -j list ruleset"] = json.dumps({"nftables": rows})
    found = list(firewall(tree.box(), swarm_port=7437, discovery=False))
    assert found[0].severity is Severity.WEAK
    assert (
        found[0].fix == "sudo nft insert rule inet filter input ip saddr 192.168.0.0/16 tcp dport 7437 accept"
    )
