"""A socket that the dialer made stays on home networks wherever it goes, also when the dialer has ended."""

import json

import pytest

from tests.appliance.conftest import Images
from tests.appliance.images import SUITES
from tests.appliance.machines import Machine
from tests.appliance.nodes import install, wait_ready

pytestmark = [pytest.mark.timeout(1200), pytest.mark.parametrize("suite", SUITES)]
Fresh = dict[str, tuple[Machine, str]]
# Two neighbours on a cable of their own: one of a home network, one of the world outside.
_NEIGHBOURS = """
ip netns add beyond
ip link add near type veth peer name far netns beyond
ip addr add 192.0.2.1/24 dev near; ip addr add 10.99.0.1/24 dev near; ip link set near up
ip -n beyond addr add 192.0.2.2/24 dev far; ip -n beyond addr add 10.99.0.2/24 dev far
ip -n beyond link set far up; ip -n beyond link set lo up
"""
# As the node's user: have sockets made, say so, keep them, and try on demand to send with one of them.
_HOLDER = """
import json, os, pwd, signal, socket

signal.alarm(1000)
free = socket.create_server(("", 7999))
user = pwd.getpwnam("_mycoswarm")
os.setgroups([])
os.setgid(user.pw_gid)
os.setuid(user.pw_uid)


def ask(**request):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
        line.settimeout(60)
        line.connect("/run/mycoswarm-outposts/lan.sock")
        line.send(json.dumps({"v": 1, **request}).encode())
        answer, fds, _, _ = socket.recv_fds(line, 8192, 1)
    return json.loads(answer), fds


answer, kept = ask(do="listen", host="::", port=7437)
assert answer["ok"], answer
print(os.getpid(), flush=True)
signal.pause()
"""
_CONNECT = """
import json, socket, sys

said = {}
# Who is to be heard has time enough; then the way is known, and who is let through would be so at once.
for name, address, within_s in (
    ("neighbour", ("10.99.0.1", 7437), 60), ("control", ("192.0.2.1", 7999), 60),
    ("stranger", ("192.0.2.1", 7437), 1.5),
):
    try:
        socket.create_connection(address, timeout=within_s).close()
        said[name] = "connected"
    except OSError as exc:
        said[name] = type(exc).__name__
print(json.dumps(said))
"""
_WITHIN_HOME = {"stranger": "TimeoutError", "neighbour": "connected", "control": "connected"}


def tried(machine: Machine) -> dict[str, str]:
    said: dict[str, str] = json.loads(
        machine.run("ip", "netns", "exec", "beyond", "python3", "-c", _CONNECT).out
    )
    return said


def test_a_listener_keeps_the_filter_of_the_dialer_that_made_it(
    fresh: Fresh, images: Images, suite: str
) -> None:
    machine, _ = fresh[suite]
    install(machine, images.deb)  # another test may have purged it
    wait_ready(machine)
    machine.run("systemctl", "stop", "mycoswarmd.service", "mycoswarmd.socket")
    try:
        machine.sh(_NEIGHBOURS)
        machine.write("/root/holder.py", _HOLDER)
        with machine.start("python3", "/root/holder.py") as holder:
            assert holder.stdout is not None
            pid = holder.stdout.readline().decode().strip()
            assert pid.isdigit(), pid + holder.stdout.read().decode()
            assert tried(machine) == _WITHIN_HOME
            machine.run("systemctl", "kill", "--signal=KILL", "mycoswarm-lan.service")
            machine.wait_until("systemctl is-active mycoswarm-lan")
            assert tried(machine) == _WITHIN_HOME
            machine.run("systemctl", "stop", "mycoswarm-lan.service")
            machine.wait_until("! test -e /sys/fs/cgroup/system.slice/mycoswarm-lan.service")
            assert tried(machine) == _WITHIN_HOME
            machine.run("systemctl", "daemon-reload")
            assert tried(machine) == _WITHIN_HOME
            machine.run("kill", pid)
    finally:
        machine.sh("ip netns del beyond || true")
        machine.run("systemctl", "start", "mycoswarmd.socket", "mycoswarmd.service")
