"""A laboratory of small machines: each a network namespace of its own, on cables that a test can pull.

Every machine has its own network, host name and mounts, one Ethernet port with an IPv4 and an IPv6
link-local address, and multicast. All of it hangs on processes that die with the test, so nothing is left
behind and nothing outside is touched. Law: what happens between machines happens in packets on these cables.
"""

import contextlib
import ctypes
import os
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Self, TypeVar

import pytest
from cryptography.hazmat.primitives import serialization

from tests.nodes import Answer, NodeProcess, write_private
from tests.upstream import Upstream, upstream

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
PORT: Final = 7437
NEEDED = ("unshare", "nsenter", "setpriv", "ip", "mount")
_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)
# Packets are hints until duplicate address detection has run, a second each: nobody else is on these cables.
_BRING_UP = """
echo 0 > /proc/sys/net/ipv6/conf/all/accept_dad
echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad
hostname {hostname}
ip link set lo up
"""
POLICY = """
schema = 1
name = "swarm-lab"
[[rule]]
id = "here"
why = "the owner of a machine decides on it"
effect = "allow"
action = ["infer", "admin", "tool"]
zone = ["self"]
[[rule]]
id = "swarm"
why = "our own machines"
effect = "allow"
action = "infer"
zone = ["lan"]
label = { max = "private" }
"""


def why_not() -> str:
    """Return why there can be no laboratory here, or an empty string."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in NEEDED if shutil.which(name) is None]
    return f"missing programs: {', '.join(missing)}" if missing else ""


def need(*programs: str) -> None:
    """Skip for a person who lacks the right to install; fail where everything must be there."""
    missing = [name for name in programs if shutil.which(name) is None]
    if missing and ("CI" in os.environ or os.geteuid() == 0):
        pytest.fail(f"missing programs: {', '.join(missing)}; packaging/install-packages installs them")
    if missing:
        pytest.skip(f"missing programs: {', '.join(missing)}")


def wait_until(
    what: Callable[[], T],
    *,
    within_s: float = 60.0,
    every_s: float = 0.02,
    why: Callable[[], object] = lambda: "",
) -> T:
    """Ask until the answer is true; a refused connection is "not yet"."""
    give_up_s = time.monotonic() + within_s
    last: object = None
    while True:
        try:
            if value := what():
                return value
            last = value
        except (OSError, KeyError, IndexError) as error:
            last = error
        if time.monotonic() > give_up_s:
            raise AssertionError(f"not within {within_s} s; last: {last!r} {why()}")
        time.sleep(every_s)


class Host:
    """One small machine: a held set of namespaces with one cable."""

    def __init__(self, name: str, hostname: str, number: int) -> None:
        self.name = name
        self.hostname = hostname
        self.number = number
        self.ip = f"10.77.{number >> 8}.{number & 255}"
        self.switch_port = f"p{number}"
        script = _BRING_UP.format(hostname=hostname) + "echo ready; exec sleep infinity"
        self._holder = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts", "--mount", "sh", "-ec", script],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self._holder.stdout is not None and self._holder.stderr is not None
        if self._holder.stdout.readline() != b"ready\n":
            raise AssertionError(f"no machine: {self._holder.stderr.read()!r}")

    @property
    def pid(self) -> int:
        """The process that holds the namespaces."""
        return self._holder.pid

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command so that it runs on this machine, and dies with the test."""
        kinds = ("--net", "--uts", "--mount")
        namespaces = [f"{kind}=/proc/{self.pid}/ns/{kind.strip('-')[:3]}" for kind in kinds[:2]]
        return (
            "setpriv", "--pdeathsig", "KILL",
            "nsenter", *namespaces, f"--mount=/proc/{self.pid}/ns/mnt", f"--wd={ROOT}", "--",
        )  # fmt: skip

    @property
    def link_local(self) -> str:
        """The IPv6 address that every Ethernet port has."""
        line = self.run("ip", "-6", "-o", "addr", "show", "dev", "eth0", "scope", "link").split()
        return line[line.index("inet6") + 1].partition("/")[0]

    def run(self, *command: str, stdin: str = "", check: bool = True, timeout_s: float = 300) -> str:
        """Run a program on this machine and return what it printed."""
        ran = subprocess.run(
            [*self.prefix, *command], input=stdin, capture_output=True, text=True, timeout=timeout_s
        )
        assert not check or ran.returncode == 0, (command, ran.stdout, ran.stderr)
        return ran.stdout

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Let this thread make its sockets on this machine; they stay there."""
        here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY)
        try:
            _setns(there)
            yield
        finally:
            _setns(here)
            os.close(here)
            os.close(there)

    def connect(
        self, address: str, port: int = PORT, *, timeout_s: float = 30.0, source: str = ""
    ) -> socket.socket:
        """Open a TCP connection from this machine."""
        with self.inside():
            return socket.create_connection((address, port), timeout_s, (source, 0) if source else None)

    def listen(self, port: int, host: str = "") -> socket.socket:
        """Listen on this machine."""
        with self.inside():
            sock = socket.create_server((host, port), backlog=128)
        sock.settimeout(60)
        return sock

    def end(self) -> None:
        """Let go of the namespaces: whatever is not running on it any more is gone."""
        self._holder.kill()
        self._holder.wait()
        for pipe in (self._holder.stdout, self._holder.stderr):
            if pipe is not None:
                pipe.close()


def _setns(fd: int) -> None:
    if _LIBC.setns(fd, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


class Network:
    """Machines on one Ethernet that can fall into parts."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="swarm-"))
        self._switch = Host("switch", "switch", 0xFFFE)
        self._bridges = 1
        self.hosts: dict[str, Host] = {}
        self._ip(self._new_bridge("br0"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Throw everything away."""
        for host in self.hosts.values():
            host.end()
        self._switch.end()
        shutil.rmtree(self.directory, ignore_errors=True)

    def host(
        self,
        name: str,
        *,
        hostname: str | None = None,
        ipv4: bool = True,
        ipv6: bool = True,
        multicast: bool = True,
    ) -> Host:
        """Plug in a machine."""
        host = Host(name, hostname or name, len(self.hosts) + 1)
        self.hosts[name] = host
        port = host.switch_port
        self._ip(
            f"link add {port} type veth peer name eth0 netns {host.pid}\nlink set {port} master br0 up\n"
        )
        if not ipv6:
            host.run("sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6")
        lines = ["link set eth0 up"]
        lines += [f"addr add {host.ip}/16 dev eth0"] if ipv4 else []
        lines += ["route add 224.0.0.0/4 dev eth0"] if ipv4 and multicast else []
        host.run("ip", "-batch", "-", stdin="\n".join(lines) + "\n")
        if not multicast:  # as on a network whose access points swallow it
            host.run("ip", "link", "set", "eth0", "multicast", "off", "allmulticast", "off")
        if ipv6:
            wait_until(lambda: host.link_local)
        return host

    def partition(self, *groups: Iterable[Host]) -> None:
        """Let each group talk only among itself; machines that are not named stay where they are."""
        lines = ""
        for index, group in enumerate(groups):
            bridge = f"br{index}"
            if index >= self._bridges:
                lines += self._new_bridge(bridge)
                self._bridges += 1
            lines += "".join(f"link set {host.switch_port} master {bridge}\n" for host in group)
        self._ip(lines)

    def heal(self) -> None:
        """Put all cables back into one switch."""
        self.partition(self.hosts.values())

    def unplug(self, host: Host) -> None:
        """Pull the cable: the machine sees its link go."""
        self._ip(f"link set {host.switch_port} down\n")

    def plug(self, host: Host) -> None:
        """Put the cable back."""
        self._ip(f"link set {host.switch_port} up\n")

    def move(self, host: Host, ip: str) -> None:
        """Give a machine another address, as a router's lease does."""
        host.run("ip", "-batch", "-", stdin=(
            f"addr flush dev eth0 scope global\naddr add {ip}/16 dev eth0\nroute add 224.0.0.0/4 dev eth0\n"
        ))  # fmt: skip
        host.ip = ip
        for other in self.hosts.values():  # as its gratuitous ARP would
            other.run("ip", "neigh", "flush", "to", ip, check=False)

    @contextlib.contextmanager
    def capture(self, host: Host | None = None, *, outgoing_only: bool = False) -> Iterator["Capture"]:
        """Record the packets on one machine's cable, or on all; `outgoing_only` is what the machine sends."""
        ports = {host.switch_port} if host else {each.switch_port for each in self.hosts.values()}
        with self._capture(self._switch, ports, outgoing_only=outgoing_only or host is None) as taken:
            yield taken

    @contextlib.contextmanager
    def capture_loopback(self, host: Host) -> Iterator["Capture"]:
        """Record what a machine says to itself."""
        with self._capture(host, {"lo"}, outgoing_only=True) as taken:
            yield taken

    @contextlib.contextmanager
    def _capture(self, where: Host, ports: set[str], *, outgoing_only: bool) -> Iterator["Capture"]:
        taken = Capture(self.directory / f"capture{time.monotonic_ns()}.pcap")
        with where.inside():
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
        with sock:
            sock.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
            stop = threading.Event()
            thread = threading.Thread(target=taken.record, args=(sock, ports, outgoing_only, stop))
            thread.start()
            try:
                yield taken
            finally:
                stop.set()
                thread.join()
                taken.close(sock)

    def _ip(self, lines: str) -> None:
        self._switch.run("ip", "-batch", "-", stdin=lines)

    def _new_bridge(self, name: str) -> str:
        return (
            f"link add {name} type bridge stp_state 0 forward_delay 0 mcast_snooping 0\nlink set {name} up\n"
        )


class Capture:
    """Packets of a cable, in memory and as a pcap file for tshark."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.frames: list[bytes] = []
        self.dropped = 0

    def record(
        self, sock: socket.socket, ports: set[str], outgoing_only: bool, stop: threading.Event
    ) -> None:
        """Take packets until told to stop. What a machine sends comes into its port of the switch."""
        sock.settimeout(0.05)
        while True:
            try:
                frame, (port, _, kind, *_) = sock.recvfrom(65_536)
            except TimeoutError:
                if stop.is_set():
                    return
                continue
            if port not in ports:
                continue
            is_sent_by_the_machine = kind != socket.PACKET_OUTGOING
            if is_sent_by_the_machine or not outgoing_only:
                self.frames.append(frame)

    def close(self, sock: socket.socket) -> None:
        """Write the file; what the kernel dropped is counted."""
        self.dropped = struct.unpack("II", sock.getsockopt(263, 6, 8))[1]  # SOL_PACKET, PACKET_STATISTICS
        with self.path.open("wb") as out:
            out.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 1 << 18, 1))
            for index, frame in enumerate(self.frames):
                out.write(struct.pack("<IIII", 1, index, len(frame), len(frame)) + frame)

    def search(self, *needles: bytes) -> set[bytes]:
        """Return those of the texts that can be read in some packet."""
        everything = b"\n".join(self.frames)
        return {needle for needle in needles if needle in everything}

    def tshark(self, *arguments: str) -> list[str]:
        """Return the lines that tshark prints about the packets."""
        need("tshark")
        command = ["tshark", "-n", "-r", str(self.path), *arguments]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.splitlines()


class LabNode(NodeProcess):
    """A real daemon on a small machine."""

    def __init__(self, host: Host, state: Path, book: Upstream | None = None) -> None:
        super().__init__(state)
        self._book = book
        self.host = host
        self.name = host.name
        self.id = ""
        self.wrap: tuple[str, ...] = ()  # between the machine and the daemon: a weakened one, a false clock

    def start(self, *, prefix: tuple[str, ...] = (), wait: bool = True) -> None:
        """Start on its machine."""
        super().start(prefix=(*self.host.prefix, *self.wrap, *prefix), wait=wait)

    @property
    def book(self) -> Upstream:
        """What this machine's own model server was asked."""
        assert self._book is not None
        return self._book

    def restart(self) -> None:
        """Pull the plug and start again."""
        self.kill()
        self.start()

    def ok(self, method: str, path: str, body: object = None, *, timeout_s: float = 60) -> dict:  # type: ignore[type-arg]
        """Call the node's socket and insist on success."""
        answer = self.call(method, path, body, timeout_s=timeout_s)
        assert answer.status in {200, 201, 202}, (self.name, method, path, answer.status, answer.body)
        return answer.json if answer.body else {}

    @property
    def seed(self) -> bytes:
        """The node's key, as a thief finds it on the disk."""
        found = list(self.state.rglob("node.key"))
        assert len(found) == 1, found
        return read_seed(found[0])

    @property
    def certificate_der(self) -> bytes:
        """The node's certificate."""
        (found,) = self.state.rglob("node.crt")
        return ssl.PEM_cert_to_DER_cert(found.read_text())

    def swarm(self) -> dict:  # type: ignore[type-arg]
        """Return what the node knows of its swarm."""
        return self.ok("GET", "/api/swarm")

    @property
    def digest(self) -> str:
        """Digest of the node's roster."""
        swarm = self.swarm()["swarm"]
        return str(swarm["digest"]) if swarm else ""

    def row(self, other: "LabNode | str") -> dict:  # type: ignore[type-arg]
        """Return what the node says of another, or an empty table."""
        node_id = other if isinstance(other, str) else other.id
        rows = [row for row in self.swarm()["nodes"] if node_id in {row["id"], row["name"]}]
        return rows[0] if rows else {}

    def sees(self, other: "LabNode | str") -> bool:
        """Tell whether another is reachable for this node."""
        return self.row(other).get("state") == "ready"

    def invite(self, *, role: str = "node", name: str = "", ttl_s: int = 900, confirm: bool = False) -> str:
        """Open an invitation and return its code."""
        body = {"role": role, "name": name, "ttl_s": ttl_s, "confirm": confirm}
        return str(self.ok("POST", "/api/swarm/invites", body)["code"])

    def enroll(self, code: str, *addresses: str) -> dict:  # type: ignore[type-arg]
        """Join by a code."""
        joined = self.ok("POST", "/api/swarm/enroll", {"code": code, "addresses": list(addresses)})
        self.id = str(joined["id"])
        return joined

    def enroll_nearby(self, code: str) -> None:
        """Join whoever is found by multicast; what was not heard at once is heard the next time."""
        body = {"code": code, "addresses": []}
        wait_until(lambda: self.call("POST", "/api/swarm/enroll", body).status == 201, why=self.log)
        self.id = str(self.swarm()["self"]["id"])

    def ask(
        self,
        prompt: str,
        *,
        model: str = "ok",
        headers: Mapping[str, str] | None = None,
        stream: bool = False,
        timeout_s: float = 60,
    ) -> Answer:
        """Send a prompt as a local program does."""
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "stream": stream}
        return self.call("POST", "/v1/chat/completions", body, headers, timeout_s)

    def answered(self, prompt: str) -> Answer:
        """Ask until there is an answer: a machine that is busy may miss the time for one connection."""

        def answer() -> Answer | None:
            found = self.ask(prompt)
            return found if found.status == 200 else None

        return wait_until(answer, every_s=0.1, why=self.log)  # type: ignore[return-value]


class Lab(Network):
    """Machines with daemons."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[LabNode] = []
        self._more = contextlib.ExitStack()

    def close(self) -> None:
        """End the daemons, then the machines."""
        for node in self.nodes:
            node.kill()
        self._more.close()
        super().close()

    def engine(self, host: Host) -> Upstream:
        """Run a scripted model server on a machine's loopback."""
        with host.inside():
            return self._more.enter_context(upstream())

    def node(
        self,
        name: str,
        *,
        settings: str = "",
        engine: bool = False,
        policy: str = POLICY,
        start: bool = True,
        host: Host | None = None,
        wrap: Sequence[str] = (),
        **machine: object,
    ) -> LabNode:
        """Plug in a machine and start its daemon."""
        host = host or self.host(name, **machine)  # type: ignore[arg-type]
        state = self.directory / name
        write_private(state / "policy.toml", policy)
        book = self.engine(host) if engine else None
        engines = f'[engines.lab]\nkind = "openai"\nurl = "{book.url}"\n' if book else ""
        write_private(state / "mycoswarm.toml", f"managed_engine = false\n{settings}\n{engines}")
        node = LabNode(host, state, book)
        node.wrap = tuple(wrap)
        self.nodes.append(node)
        if start:
            node.start()
        return node

    def found(self, node: LabNode, *, swarm: str = "home", recovery_public: str = "") -> None:
        """Make a swarm whose first node this is."""
        recovery = recovery_public or os.urandom(32).hex()
        node.id = str(node.ok("POST", "/api/swarm/init", {"name": swarm, "recovery": recovery})["id"])

    def admit(self, by: LabNode, newcomer: LabNode, **invitation: object) -> None:
        """Invite and enrol, as two people at two keyboards do."""
        code = by.invite(**invitation)  # type: ignore[arg-type]
        newcomer.enroll(code, f"{by.host.ip}:{PORT}")

    def swarm_of(self, count: int, *, engines: Sequence[int] = (), **more: object) -> list[LabNode]:
        """Return nodes n1.. of one swarm that all see one another; those numbered have a model server."""
        nodes = [
            self.node(f"n{index + 1}", start=False, engine=index + 1 in engines, **more)  # type: ignore[arg-type]
            for index in range(count)
        ]
        for node in nodes:
            node.start(wait=False)
        for node in nodes:
            node.wait_ready()
        self.found(nodes[0])
        for node in nodes[1:]:
            self.admit(nodes[0], node)
        self.wait_agreed(nodes)
        return nodes

    def wait_agreed(self, nodes: Sequence[LabNode], *, within_s: float = 60) -> None:
        """Wait until these have one roster and see one another."""

        def agreed() -> bool:
            states = [node.swarm() for node in nodes]
            digests = {state["swarm"] and state["swarm"]["digest"] for state in states}
            here = {state["self"] and state["self"]["id"] for state in states}
            ready = [{row["id"] for row in state["nodes"] if row["state"] == "ready"} for state in states]
            return len(digests) == 1 and all(here <= each for each in ready)

        wait_until(agreed, within_s=within_s, every_s=0.1, why=lambda: self.story(nodes))

    def story(self, nodes: Sequence[LabNode]) -> str:
        """Tell what each node thinks, for a failed test."""
        lines = []
        for node in nodes:
            try:
                state = node.swarm()
                rows = [(row["name"], row["state"], row.get("detail")) for row in state["nodes"]]
                lines.append(f"{node.name}: {state['swarm'] and state['swarm']['digest'][:8]} {rows}")
            except (OSError, AssertionError) as error:
                lines.append(f"{node.name}: {error!r}")
            lines.append(node.log()[-1500:])
        return "\n".join(lines)


def python_on(host: Host, *arguments: str) -> list[str]:
    """Return the command that runs this project's Python on a machine."""
    return [*host.prefix, sys.executable, *arguments]


def read_seed(path: Path) -> bytes:
    """Return the seed of a key file."""
    data = path.read_bytes()
    if b"BEGIN" in data:
        key = serialization.load_pem_private_key(data, None)
        raw = serialization.Encoding.Raw, serialization.PrivateFormat.Raw
        return key.private_bytes(*raw, serialization.NoEncryption())
    return data if len(data) == 32 else bytes.fromhex(data.decode().split()[-1])


def weakened(*defences: str) -> tuple[str, ...]:
    """Return what to put before a daemon so that it runs without these defences."""
    return (sys.executable, "-m", "tests.swarm.weakened.daemon", ",".join(defences))
