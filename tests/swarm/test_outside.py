"""What outside tools see of a running node, and everything that its cable carries. M3."""

import contextlib
import json
import re
import ssl
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fcntl import LOCK_EX, flock
from pathlib import Path

import pytest

from tests.swarm.attackers.kit import Key
from tests.swarm.attackers.middle import serving
from tests.swarm.attackers.talk import Talk, client_context, server_context
from tests.swarm.conftest import open_lab
from tests.swarm.lab import PORT, ROOT, Capture, Host, Lab, LabNode, need, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900), pytest.mark.xdist_group("swarm-outside")]
# It needs an older cryptography than the node is tested with: an environment of its own.
SSLYZE = "sslyze==6.3.1"
# With a plus: run also where the first hello (of TLS 1.2) is answered with silence.
# With a plus: run also where the first hello (of TLS 1.2) is answered with silence.
NMAP = "+ssl-enum-ciphers,+ssl-cert,+sslv2"
SCANS = (
    "tls_1_3_cipher_suites,certificate_info,tls_1_3_early_data,tls_compression,elliptic_curves",
    "session_resumption,session_renegotiation,heartbleed,openssl_ccs_injection",
    "ssl_2_0_cipher_suites,ssl_3_0_cipher_suites,tls_1_0_cipher_suites",
    "tls_1_1_cipher_suites",
    "tls_1_2_cipher_suites",
)
OLD = ("ssl_2_0", "ssl_3_0", "tls_1_0", "tls_1_1", "tls_1_2")


@pytest.fixture(scope="session")
def sslyze() -> Path:
    """Return a Python that has sslyze, installed once."""
    home = ROOT / "build" / "sslyze"
    program = home / "bin" / "python"
    home.parent.mkdir(exist_ok=True)
    with (ROOT / "build" / "sslyze.lock").open("w") as lock:
        flock(lock, LOCK_EX)
        if not (home / "bin" / "sslyze").exists():
            subprocess.run([sys.executable, "-m", "venv", home], check=True, timeout=120)
            subprocess.run([home / "bin" / "pip", "install", "--quiet", SSLYZE], check=True, timeout=300)
    return program


@pytest.fixture(scope="module")
def member() -> Iterator[tuple[Lab, LabNode, Host]]:
    """A running node with an open invitation: as many doors as there ever are."""
    with open_lab() as lab:
        node = lab.node("n1")
        lab.found(node)
        node.invite()
        lab.host("ordinary")
        for index in range(len(SCANS)):
            lab.host(f"scanner{index}")
        yield lab, node, lab.host("scanner")


@contextlib.contextmanager
def ordinary_server(host: Host) -> Iterator[Key]:
    """Serve TLS as Python does it when nobody thinks: the control for every scanner."""
    key = Key()
    context = server_context(key)

    def handle(sock: object) -> None:
        with contextlib.suppress(OSError, ssl.SSLError), context.wrap_socket(sock, server_side=True) as tls:  # type: ignore[arg-type]
            while tls.recv(65_536):
                tls.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    with serving(host, handle, PORT):
        yield key


def scan(program: Path, lab: Lab, target: str) -> dict:  # type: ignore[type-arg]
    """Let sslyze look; returns its results by scan."""

    def look(index: int, commands: str) -> dict:  # type: ignore[type-arg]
        # Each from a machine of its own: a stranger has so many handshakes, and these scans need more.
        source = lab.hosts[f"scanner{index}"]
        for _ in range(5):  # of a machine that is busy, sslyze says that it does not answer
            command = (str(program), "tests/swarm/attackers/sslyze_scan.py", target, str(PORT), commands)
            result = json.loads(source.run(*command))
            scans = result["scan_result"] or {}
            found = {name: one["result"] for name, one in scans.items() if one and one["result"]}
            if result["scan_status"] == "COMPLETED" and set(commands.split(",")) <= set(found):
                return found
        raise AssertionError(f"no answer to {commands}")

    with ThreadPoolExecutor(len(SCANS)) as pool:
        parts = list(pool.map(look, range(len(SCANS)), SCANS))
    return {name: found for part in parts for name, found in part.items()}


def faults(found: dict) -> set[str]:  # type: ignore[type-arg]
    """Name what a node must not offer."""
    named = {name for name in OLD if found[f"{name}_cipher_suites"]["accepted_cipher_suites"]}
    resumed = found["session_resumption"]
    if (
        resumed["tls_ticket_successful_resumptions_count"]
        or resumed["session_id_successful_resumptions_count"]
    ):
        named.add("resumption")
    checks = {
        "compression": found["tls_compression"]["supports_compression"],
        "early-data": found["tls_1_3_early_data"]["supports_early_data"],
        "heartbleed": found["heartbleed"]["is_vulnerable_to_heartbleed"],
        "ccs": found["openssl_ccs_injection"]["is_vulnerable_to_ccs_injection"],
        "renegotiation": found["session_renegotiation"]["is_vulnerable_to_client_renegotiation_dos"],
        "no-1.3": not found["tls_1_3_cipher_suites"]["accepted_cipher_suites"],
    }
    return named | {name for name, is_there in checks.items() if is_there}


def test_sslyze_finds_tls_1_3_and_nothing_else(sslyze: Path, member: tuple[Lab, LabNode, Host]) -> None:
    lab, node, _ = member
    ordinary = lab.hosts["ordinary"]
    with ordinary_server(ordinary):
        assert faults(scan(sslyze, lab, ordinary.ip)) >= {"tls_1_2", "resumption"}
    found = scan(sslyze, lab, node.host.ip)
    assert faults(found) == set()
    (deployed,) = found["certificate_info"]["certificate_deployments"]
    (pem,) = [one["as_pem"] for one in deployed["received_certificate_chain"]]
    assert ssl.PEM_cert_to_DER_cert(pem) == node.certificate_der
    suites = {one["cipher_suite"]["name"] for one in found["tls_1_3_cipher_suites"]["accepted_cipher_suites"]}
    assert suites and all("GCM" in suite or "CHACHA20" in suite for suite in suites)
    assert node.swarm()["swarm"] is not None  # and it is still there


def nmap(source: Host, target: str) -> dict[str, str]:
    """Return what nmap's scripts say, by script; nothing where it was not answered in time."""
    need("nmap")
    out = source.run("nmap", "-Pn", "-n", f"-p{PORT}", "--script", NMAP, "-oX", "-", target)
    said = {one.attrib["id"]: one.attrib["output"] for one in ET.fromstring(out).iter("script")}
    return said if "ssl-cert" in said else {}


def test_nmap_finds_the_same(member: tuple[Lab, LabNode, Host]) -> None:
    lab, node, scanner = member
    said = wait_until(lambda: nmap(scanner, node.host.ip), within_s=300)
    assert f"commonName={node.id}" in said["ssl-cert"] and "ED25519" in said["ssl-cert"]
    assert "9999-12-31" in said["ssl-cert"]
    versions = set(re.findall(r"(TLSv1\.\d|SSLv\d)", said.get("ssl-enum-ciphers", "TLSv1.3")))
    assert versions == {"TLSv1.3"}
    assert not any("VULNERABLE" in output for output in said.values()) and "sslv2" not in said
    ordinary = lab.hosts["ordinary"]
    with ordinary_server(ordinary) as key:
        said = wait_until(lambda: nmap(scanner, ordinary.ip), within_s=300)
        assert f"commonName={key.node_id}" in said["ssl-cert"]


def has_ticket(source: Host, target: str) -> bool:
    """Tell whether a server hands out what a session can be resumed with."""
    with Talk(source.connect(target), client_context()) as talk:
        talk.call("GET", "/")
        assert talk.sock.version() == "TLSv1.3" and talk.sock.compression() is None
        assert talk.sock.session is not None
        return talk.sock.session.has_ticket


def test_no_ticket_is_given(member: tuple[Lab, LabNode, Host]) -> None:
    lab, node, scanner = member
    ordinary = lab.hosts["ordinary"]
    with ordinary_server(ordinary):
        assert has_ticket(scanner, ordinary.ip)
    assert not has_ticket(scanner, node.host.ip)


# --- a day in miniature ------------------------------------------------------------------------------

PROMPT, KITCHEN = "the-neighbours-cat-is-called-Zephyrine", "kitchen-of-Marguerite"
VERSIONS = {0x0301, 0x0303}  # what TLS 1.3 writes into its records
# What may leave a node: TLS 1.3 from and to the swarm's port, mDNS, and what Ethernet and IP need.
ALLOWED = (
    "arp || icmpv6.type == 133 || icmpv6.type == 134 || icmpv6.type == 135 || icmpv6.type == 136 || "
    "icmpv6.type == 143 || igmp || (mdns && udp.port == 5353) || (tcp.port == 7437)"
)
# A port that is closed answers so, of TCP and of UDP.
UNREACHABLE = "icmp.type == 3 || icmpv6.type == 1"


def a_day(lab: Lab, during: Callable[[list[LabNode]], None]) -> tuple[list[LabNode], str]:
    """Enrol, prompt, revoke, change a key, restart; returns the nodes and the code that was used."""
    one = lab.node("n1", settings=f'node_name = "{KITCHEN}"')
    two = lab.node("n2", engine=True)
    three = lab.node("n3")
    during([one, two, three])
    lab.found(one, swarm="Marguerites-house")
    code = one.invite()
    two.enroll(code)
    lab.admit(one, three)
    lab.wait_agreed([one, two, three])
    for _ in range(3):
        one.answered(PROMPT)
    assert one.ask(PROMPT, stream=True).status == 200
    one.ok("POST", "/api/swarm/revoke", {"node": three.id, "reason": "sold-to-Balthazar"})
    wait_until(lambda: not two.row(three.id))
    two.id = two.ok("POST", "/api/swarm/rekey", {})["id"]
    wait_until(lambda: one.sees(two.id))
    two.restart()
    wait_until(lambda: one.sees(two.id))
    one.answered(PROMPT)
    return [one, two, three], code


def tcp_streams(cable: Capture) -> list[bytes]:
    """Return the bytes of each direction of each connection, put together by their numbers."""
    pieces: dict[tuple[bytes, bytes], dict[int, bytes]] = {}
    starts: dict[tuple[bytes, bytes], int] = {}
    for frame in cable.frames:
        is_v6 = frame[12:14] == b"\x86\xdd"
        if frame[14 + (6 if is_v6 else 9)] != 6 or frame[12:14] not in {b"\x86\xdd", b"\x08\x00"}:
            continue
        at = 14 + (40 if is_v6 else (frame[14] & 15) * 4)
        size = 40 + int.from_bytes(frame[18:20], "big") if is_v6 else int.from_bytes(frame[16:18], "big")
        ends = (frame[22:54] if is_v6 else frame[26:34], frame[at : at + 4])
        number = int.from_bytes(frame[at + 4 : at + 8], "big")
        if frame[at + 13] & 2:  # SYN
            starts[ends] = number + 1
            pieces[ends] = {}
        elif ends in starts:
            payload = frame[at + (frame[at + 12] >> 4) * 4 : 14 + size]
            offset = (number - starts[ends]) % (1 << 32)
            if payload and len(payload) > len(pieces[ends].get(offset, b"")):
                pieces[ends][offset] = payload
    found = []
    for parts in pieces.values():
        data = b""
        for offset, payload in sorted(parts.items()):
            data += payload[len(data) - offset :] if offset <= len(data) else b""
        found.append(data)
    return found


def record_kinds(data: bytes) -> Iterator[int]:
    """Yield the content types of the TLS records that a stream is made of; -1 for what is none."""
    while len(data) >= 5:
        yield data[0] if int.from_bytes(data[1:3], "big") in VERSIONS else -1
        data = data[5 + int.from_bytes(data[3:5], "big") :]


def test_a_days_traffic_is_tls_1_3_and_says_nothing(lab: Lab) -> None:
    need("tshark")
    with contextlib.ExitStack() as stack:
        wires: list[Capture] = []
        loopback: list[Capture] = []

        def during(nodes: list[LabNode]) -> None:
            wires.append(stack.enter_context(lab.capture()))
            loopback.append(stack.enter_context(lab.capture_loopback(nodes[1].host)))

        nodes, code = a_day(lab, during)
    cable, inside = wires[0], loopback[0]
    assert len(cable.frames) > 200 and not cable.dropped
    strange = cable.tshark("-Y", f"!({ALLOWED}) && !({UNREACHABLE})")
    assert not strange, strange[:10]
    # Every TLS handshake that was finished speaks 1.3, and application data is in its records only.
    hello = "tls.handshake.type == 2"
    field = ("-T", "fields", "-e", "tls.handshake.extensions.supported_version")
    versions = set(cable.tshark("-d", "tcp.port==7437,tls", "-Y", hello, *field))
    assert versions == {"0x0304"}, versions
    streams = tcp_streams(cable)
    assert len(streams) > 10
    assert {22, 23} <= {kind for data in streams for kind in record_kinds(data)} <= {20, 21, 22, 23}
    secret = code.replace("-", "")[4:20]
    needles = [PROMPT, KITCHEN, "Marguerites-house", "Balthazar", "Hello there", "chat/completions",
               "swarm/enroll", "statements", code, secret, secret[:8]]  # fmt: skip
    words = [needle.encode() for needle in needles]
    assert cable.search(*words) == set()
    # The control: the same search finds them where HTTP is plain.
    assert inside.search(*words) >= {PROMPT.encode(), b"Hello there", b"chat/completions"}
    # Multicast says who is there, where, and how old its roster is; no name and no model.
    said = b"".join(frame for frame in cable.frames if b"_mycoswarm" in frame)
    assert said and not any(name in said for name in (b"kitchen", b"n2\x05local", b"qwen"))
    assert nodes


def test_a_node_at_rest_says_little(lab: Lab) -> None:
    one, two = lab.swarm_of(2)
    rates = []
    for _ in range(5):  # the beginning, with its announcements, is longer on a slow machine
        time.sleep(3)
        with lab.capture() as cable:
            time.sleep(6)
        rates.append(sum(len(frame) for frame in cable.frames) / 6 / 2)  # bytes a second of each
        if 0 < rates[-1] < 3000:
            break
    assert 0 < rates[-1] < 3000, rates
    wait_until(lambda: one.sees(two))
