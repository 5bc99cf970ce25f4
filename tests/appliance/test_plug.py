"""Nothing acknowledged is lost: the core killed again and again, the machine's plug pulled in the middle.

And nothing stays broken: a core that could not start for a minute, while clients hammered at its socket, is
back seconds after what was wrong is mended.

Not shown here: what a disk does that loses power. Killing every process leaves what the kernel holds.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.appliance.conftest import Images
from tests.appliance.machines import SOON_S, Lab, Machine
from tests.appliance.nodes import (
    NODE_API,
    SETTINGS,
    boot_with_engine,
    ctl,
    start_engine,
    wait_all_succeeded,
    wait_ready,
)

pytestmark = pytest.mark.timeout(1800)
KILLED_FOR_S = 60
BROKEN_FOR_S = 60
# Connects, asks and goes, ten times a second.
_HAMMER = """
import socket, time
while True:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(0.5)
        try:
            sock.connect("/run/mycoswarm/api.sock")
            sock.sendall(b"GET /api/status HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
        except OSError:
            pass
        time.sleep(0.1)
"""
_POUR = ("python3", "/opt/node_api.py", "pour")
# Posts two tasks, and lets cages be built as soon as one has missed its own: it is tried five times only.
_WITHOUT_CAGES = """
import json, subprocess, sys, time
sys.path.insert(0, "/opt")
from node_api import call, insist
subprocess.run(["systemctl", "stop", "mycoswarm-task.socket"], check=True)
posted = []
for prompt, is_repeatable in (("one", True), ("two", False)):  # the first may have the cage that was ready
    body = {"prompt": prompt, "agent": "scribe", "model": "agent", "repeatable": is_repeatable}
    posted.append(call("POST", "/api/tasks", body)["task"]["id"])
while "cage-setup" not in json.dumps(insist("GET", f"/api/tasks/{posted[-1]}")):
    time.sleep(0.05)
subprocess.run(["systemctl", "start", "mycoswarm-task.socket"], check=True)
print(*posted)
"""
# Waits until no task is left that was begun again: what is cut off five times is not tried a sixth time.
_SETTLE = """
import sys, time
sys.path.insert(0, "/opt")
from node_api import insist
def is_left(task):
    return task["attempt"] > 1 and task["state"] in {"queued", "running"}
while any(map(is_left, insist("GET", "/api/tasks?limit=1000")["tasks"])):
    time.sleep(0.1)
"""
_BROKEN = "this is [[ no settings file"
# What systemd does by itself where a unit does not say otherwise, with time enough for a slow machine.
_ITS_LIMITS = {
    "mycoswarmd.service": "[Unit]\nStartLimitIntervalSec=300\nStartLimitBurst=3\n",
    "mycoswarmd.socket": "[Socket]\nTriggerLimitIntervalSec=2\nTriggerLimitBurst=20\n",
}


@pytest.fixture(scope="module")
def node(appliance_lab: Lab, images: Images) -> Iterator[Machine]:
    """A node of its own with an engine; its plug is pulled at the end."""
    machine = appliance_lab.machine("victim", *images.node_trixie)
    boot_with_engine(machine)
    machine.write("/opt/node_api.py", NODE_API)
    yield machine
    machine.pull_plug()


@dataclass(frozen=True)
class Hammered:
    """A machine whose core cannot start, and since when."""

    machine: Machine
    since_s: float


@pytest.fixture(scope="module")
def hammered(appliance_lab: Lab, images: Images) -> Iterator[Hammered]:
    """A machine whose core is broken and whose socket is hammered at, beside what else this file tests."""
    machine = appliance_lab.machine("hammered", *images.node_trixie)
    machine.wait_booted()
    wait_ready(machine)
    machine.write("/opt/hammer.py", _HAMMER)
    machine.run("cp", SETTINGS, "/root/good.toml")
    _break(machine)
    machine.run("systemd-run", "--quiet", "--unit=hammer", "python3", "/opt/hammer.py")
    yield Hammered(machine, time.monotonic())
    machine.pull_plug()


def _break(machine: Machine) -> None:
    machine.write(SETTINGS, _BROKEN)
    assert machine.run("systemctl", "restart", "mycoswarmd", check=False).code != 0


def _acknowledged(out: str) -> list[str]:
    lines = out.splitlines()
    assert not any(line.startswith("refused") for line in lines), lines[-3:]
    return [line for line in lines if line.startswith("t-")]


@pytest.mark.usefixtures("hammered")  # its minute is the same one
def test_the_core_killed_every_second_for_a_minute_loses_no_task(node: Machine) -> None:
    kills = restarts = 0
    acknowledged: list[str] = []
    with node.start("sh", "-c", f"exec {' '.join(_POUR)} >/opt/poured 2>&1") as poster:
        until_s = time.monotonic() + KILLED_FOR_S
        # A slow machine needs longer than that for so many.
        while time.monotonic() < until_s or min(kills, restarts, 2 * len(acknowledged)) < 20:
            time.sleep(1)
            if kills % 4 == 3:  # now and then it gets so far that it can promise something
                wait_ready(node)
                acknowledged = _acknowledged(node.run("cat", "/opt/poured").out)
                node.python(_SETTLE, timeout_s=600)
                time.sleep(1)
                restarts = int(node.run("systemctl", "show", "-P", "NRestarts", "mycoswarmd").out)
            ran = node.run("systemctl", "kill", "--signal=KILL", "mycoswarmd.service", check=False)
            kills += ran.code == 0
        node.run("pkill", "-f", " ".join(_POUR))
        poster.wait(60)
    wait_ready(node)
    wait_all_succeeded(node, _acknowledged(node.run("cat", "/opt/poured").out), within_s=900)


def test_a_core_that_could_not_start_for_a_minute_is_back_in_seconds(hammered: Hammered) -> None:
    machine = hammered.machine
    time.sleep(max(0.0, hammered.since_s + BROKEN_FOR_S - time.monotonic()))
    count = "systemctl show -P NRestarts mycoswarmd"
    machine.wait_until(f"test $({count}) -ge 10", within_s=300)
    assert machine.run("systemctl", "is-active", "mycoswarmd.socket").out == "active\n"
    before = int(machine.sh(f"cp /root/good.toml {SETTINGS}; {count}").out)
    wait_ready(machine, within_s=SOON_S)
    # One try may have been under way; the one after it, a second later, was good.
    assert int(machine.sh(count).out) <= before + 2

    # The control: with systemd's own limits it is out of order for ever, mended or not.
    for unit, text in _ITS_LIMITS.items():
        machine.write(f"/etc/systemd/system/{unit}.d/limits.conf", text)
    machine.run("systemctl", "daemon-reload")
    _break(machine)
    machine.wait_until("systemctl is-failed mycoswarmd.socket", within_s=300)
    machine.run("cp", "/root/good.toml", SETTINGS)
    time.sleep(3)
    assert ctl(machine, "status", check=False).code == 4
    machine.sh("rm -r /etc/systemd/system/mycoswarmd.*.d; systemctl daemon-reload; systemctl reset-failed")


def test_a_task_waits_for_its_cage(node: Machine) -> None:
    wait_all_succeeded(node, node.python(_WITHOUT_CAGES).out.split())


def test_a_pulled_plug_loses_no_task(node: Machine) -> None:
    with node.start(*_POUR) as poster:
        assert poster.stdout is not None
        time.sleep(4)
        said = [poster.stdout.readline() for _ in range(4)]
        node.pull_plug()
        said.append(poster.stdout.read())
    acknowledged = _acknowledged(b"".join(said).decode())
    assert len(acknowledged) >= 3, acknowledged
    node.plug_in()
    node.wait_booted()
    start_engine(node)
    wait_ready(node)
    wait_all_succeeded(node, acknowledged)
