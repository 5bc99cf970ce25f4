"""What the service manager does with the node: stops it, starts it anew, ends what hangs, explains a log."""

import time
from collections.abc import Iterator

import pytest

from mycoswarmd.daemon.journal import EVENTS
from tests.appliance.conftest import Images
from tests.appliance.machines import Lab, Machine
from tests.appliance.nodes import (
    boot_with_engine,
    ctl,
    restart_engine,
    submit,
    wait_ready,
    wait_served,
    wait_task,
)

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def node(appliance_lab: Lab, images: Images) -> Iterator[Machine]:
    """A node with an engine."""
    machine = appliance_lab.machine("managed", *images.node_trixie)
    boot_with_engine(machine)
    yield machine
    machine.pull_plug()


def test_what_is_in_hand_when_the_node_is_told_to_stop_is_not_lost(node: Machine) -> None:
    restart_engine(node, pause_s=3600)  # nothing ends by itself
    wait_served(node)
    once = submit(node, "in hand, never twice", "--once")
    tasks = [submit(node, f"in hand or in the queue {number}") for number in range(3)]
    wait_task(node, once, "running")
    with node.start("mycoswarmctl", "ask", "--model", "slow", "an answer of twenty seconds") as asking:
        assert asking.stdout is not None and asking.stdout.read(3) == b"w0 "
        node.run("systemctl", "stop", "mycoswarmd.service")
        out, _ = asking.communicate(timeout=60)
        assert asking.returncode == 4 and b"went away" in out, (asking.returncode, out[-500:])
    node.run("systemctl", "start", "mycoswarmd")
    node.run("systemctl", "restart", "mycoswarmd.service")
    said = node.journal("-u", "mycoswarmd")
    # Past TimeoutStopSec= it would have been killed.
    assert said.count("Deactivated successfully") >= 2 and "SIGKILL" not in said, said
    restart_engine(node)
    wait_ready(node)
    ends = {task: wait_task(node, task)["state"] for task in (once, *tasks)}
    assert ends.pop(once) == "parked" and set(ends.values()) == {"succeeded"}, (once, ends)
    ctl(node, "audit", "verify")


def test_the_journal_explains_what_it_has(node: Machine) -> None:
    node.run("systemctl", "restart", "mycoswarmd")
    node.run("journalctl", "--sync")
    for event, text in (("stopping", "was told to stop"), ("ready", "has read its policy and its state")):
        wanted = ("-u", "mycoswarmd", f"MESSAGE_ID={EVENTS[event]}")
        said = node.run("journalctl", "-b", "-x", "-n", "1", *wanted)
        assert text in said.out and "man:mycoswarmd(8)" in said.out, said


def test_a_core_that_hangs_is_ended_and_comes_back(node: Machine) -> None:
    drop_in = "/etc/systemd/system/mycoswarmd.service.d/watchdog.conf"

    def hang(watchdog_s: int) -> str:
        node.write(drop_in, f"[Service]\nWatchdogSec={watchdog_s}\n")  # 30 s are too long for a test
        node.sh("systemctl daemon-reload; systemctl restart mycoswarmd")
        wait_ready(node)
        pid = node.run("systemctl", "show", "-P", "MainPID", "mycoswarmd").out.strip()
        node.run("kill", "-STOP", pid)
        return pid

    shipped = node.run("systemctl", "show", "-P", "WatchdogUSec", "mycoswarmd").out.strip()
    assert shipped == "30s"
    pid = hang(10)
    node.wait_until(f"test $(systemctl show -P MainPID mycoswarmd) != {pid}", within_s=120)
    wait_ready(node)
    assert "Watchdog timeout" in node.journal("-u", "mycoswarmd")
    ctl(node, "audit", "verify")
    pid = hang(0)  # the control: nobody minds
    time.sleep(15)
    assert node.run("systemctl", "show", "-P", "MainPID", "mycoswarmd").out.strip() == pid
    node.sh(f"kill -CONT {pid}; rm {drop_in}; systemctl daemon-reload; systemctl restart mycoswarmd")
    wait_ready(node)
