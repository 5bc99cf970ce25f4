"""The laboratory itself: cables carry and do not carry, captures see, and nothing is left behind."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.swarm.lab import ROOT, Host, Lab, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
ORPHAN = """
import sys, time
from tests.swarm.lab import Network
network = Network()
hosts = [network.host(name) for name in "ab"]
print(*(host.pid for host in hosts), network.directory, flush=True)
time.sleep(60)
"""


def reaches(one: Host, other: Host, *, within_s: float = 0.3) -> bool:
    with other.listen(7437):
        try:
            one.connect(other.ip, timeout_s=within_s).close()
        except OSError:  # in time, or because nobody said where it is
            return False
        return True


def is_reached(one: Host, other: Host) -> bool:
    return wait_until(lambda: reaches(one, other, within_s=3))


def test_a_network_that_fell_apart_carries_nothing_between_its_parts(lab: Lab) -> None:
    a, b, c = (lab.host(name) for name in "abc")
    assert is_reached(a, b) and is_reached(a, c) and is_reached(c, b)
    lab.partition([a, b], [c])
    assert is_reached(a, b)
    assert not reaches(a, c) and not reaches(c, b)
    lab.heal()
    assert is_reached(a, c)
    lab.unplug(b)
    assert not reaches(a, b) and is_reached(a, c)
    lab.plug(b)
    assert is_reached(a, b)


def test_machines_have_their_own_names_and_addresses_and_hear_multicast(lab: Lab) -> None:
    a, b, deaf = lab.host("a", hostname="raspberrypi"), lab.host("b"), lab.host("c", ipv4=False)
    assert a.run("hostname").strip() == "raspberrypi" != os.uname().nodename
    assert a.link_local.startswith("fe80:") and a.link_local != b.link_local
    with b.inside():
        ear = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        ear.bind(("", 5353))
        group = socket.inet_aton("224.0.0.251") + socket.inet_aton(b.ip)
        ear.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
        ear.settimeout(60)
    with a.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mouth, ear:
        mouth.sendto(b"anybody?", ("224.0.0.251", 5353))
        assert ear.recvfrom(100)[0] == b"anybody?"
    with pytest.raises(OSError, match="unreachable"):
        deaf.connect(a.ip)
    lab.move(b, "10.77.4.4")
    assert is_reached(a, b)


def test_a_capture_sees_what_is_on_the_cable(lab: Lab) -> None:
    a, b = lab.host("a"), lab.host("b")
    listener = b.listen(7437)
    with listener, lab.capture(a, outgoing_only=True) as sent, lab.capture() as everything:
        left = a.connect(b.ip)
        right, _ = listener.accept()
        with left, right:
            left.sendall(b"from a to b")
            right.sendall(b"from b to a")
            assert left.recv(100) and right.recv(100)
    assert sent.search(b"from a to b", b"from b to a") == {b"from a to b"}
    assert everything.search(b"from a to b", b"from b to a", b"nothing") == {b"from a to b", b"from b to a"}
    assert sent.dropped == everything.dropped == 0
    assert any("SYN" in line for line in sent.tshark())


def test_nothing_is_left_even_of_a_test_that_was_killed() -> None:
    links = {path.name for path in Path("/sys/class/net").iterdir()}
    with subprocess.Popen([sys.executable, "-c", ORPHAN], cwd=ROOT, stdout=subprocess.PIPE) as orphan:
        assert orphan.stdout is not None
        *pids, directory = orphan.stdout.readline().split()
        assert all(Path(f"/proc/{int(pid)}/ns/net").exists() for pid in pids)
        orphan.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(is_alive(int(pid)) for pid in pids))
    new = {path.name for path in Path("/sys/class/net").iterdir()} - links
    # Other programs have links of their own.
    assert not [name for name in new if re.fullmatch(r"(p|br|eth|veth)\d+", name)]
    Path(directory.decode()).rmdir()


def is_alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
