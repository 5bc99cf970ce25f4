"""Machines with kernels of their own: real limits, wrong clocks, power that goes, kernels that lack much.

What is shown here is what containers cannot show (machines.py); how such a machine is made is said in
virtual.py. Boots are dear where they are emulated, so each machine is asked much.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.appliance.conftest import Images
from tests.appliance.machines import Lab
from tests.appliance.nodes import (
    ENGINE_PORT,
    ENGINE_TABLE,
    POLICY,
    ROOT,
    SETTINGS,
    ctl,
    ctl_json,
    wait_ready,
    wait_task,
)
from tests.appliance.virtual import Disk, VirtualMachine, kernel, why_not

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(why_not() is not None, reason=f"no virtual machine: {why_not()}"),
]
# More than a cage may have, by processes each of which may have that much.
HOG = """
import os, time
for _ in range(4):
    if os.fork() == 0:
        held = bytearray(400 << 20)
        held[::4096] = b"x" * len(held[::4096])
        time.sleep(600)
time.sleep(600)
"""
FINISH = ("finish", {"summary": "done"})
# A word of the prompt, and what an agent does then; see virtual_engine.py.
CALLS = {
    "hog": [("run", {"program": "python3", "args": ["-c", HOG]}), FINISH],
    "steady": [FINISH],
    "task": [FINISH],
}
ENGINE_UNIT = f"""[Service]
WorkingDirectory=/opt/fake
ExecStart=/usr/bin/python3 -m tests.appliance.virtual_engine {ENGINE_PORT}
[Install]
WantedBy=multi-user.target
"""


def engine_files(settings: str) -> dict[str, str]:
    """Return what makes a node one with an engine, whose agents may run programs."""
    files = {
        f"/opt/fake/{path}": (ROOT / path).read_text()
        for path in ("tests/upstream.py", "tests/appliance/virtual_engine.py")
    }
    return files | {
        "/opt/fake/calls.json": json.dumps(CALLS),
        "/etc/systemd/system/fake-engine.service": ENGINE_UNIT,
        SETTINGS: settings + ENGINE_TABLE,
        POLICY: (ROOT / "policy/profiles/lab.toml").read_text(),
    }


def engine_layer(home: Path, package: Path) -> Path:
    """Return a layer above the package's with an engine that starts with the machine."""
    layer = home / "layer-engine"
    for name, text in engine_files((package / SETTINGS.lstrip("/")).read_text()).items():
        path = layer / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    wants = layer / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir()
    (wants / "fake-engine.service").symlink_to("../fake-engine.service")
    return layer


def post(machine: VirtualMachine, kind: str, *, agent: str = "coder") -> str:
    """Post a task of a kind that CALLS knows; return its id. One that is steady waits for `go_on`."""
    machine.run("rm", "-f", "/opt/fake/go")
    return ctl(machine, "submit", "--model", "agent", "--agent", agent, f"a {kind} task").out.strip()


def go_on(machine: VirtualMachine) -> None:
    """Let steady tasks end."""
    machine.run("touch", "/opt/fake/go")


@contextmanager
def virtual(lab: Lab, suite: str, name: str, *layers: Path) -> Iterator[VirtualMachine]:
    """Make a machine with a kernel of its own, the package and an engine; it is off in the end."""
    booted = kernel(suite)
    disk = Disk.of(lab.home, engine_layer(lab.home / f"engine-{name}", layers[0]), booted.layer, *layers)
    machine = VirtualMachine(lab, name, booted, disk)
    try:
        yield machine
    finally:
        machine.pull_plug()
        disk.close()


@pytest.fixture(scope="module")
def debian12(appliance_lab: Lab, images: Images) -> Iterator[VirtualMachine]:
    """Debian 12 without a clock that goes on while it is off."""
    with virtual(appliance_lab, "bookworm", "real12", *images.node_bookworm) as machine:
        machine.plug_in(rtc="1970-01-01T00:00:10")
        machine.wait_booted()
        wait_ready(machine)
        yield machine


@pytest.fixture(scope="module")
def bare(appliance_lab: Lab, images: Images) -> Iterator[VirtualMachine]:
    """Debian 13 with a command line that leaves it little."""
    with virtual(appliance_lab, "trixie", "bare13", *images.node_trixie) as machine:
        machine.plug_in("ro", "lsm=capability,yama", "cgroup_disable=memory")
        machine.wait_shell()
        yield machine


def test_a_clock_of_1970_is_no_hindrance(debian12: VirtualMachine) -> None:
    # systemd sets a clock that is plainly wrong to the day on which systemd was built. This is before that.
    debian12.sh("systemctl stop mycoswarmd; date -s @600; systemctl start mycoswarmd")
    wait_ready(debian12)
    assert "1970" in ctl(debian12, "doctor", check=False).out
    ctl(debian12, "init", "--name", "early", "--yes-i-wrote-it-down")
    assert ctl(debian12, "ask", "--model", "ok", "hello").out == "Hello there\n"
    assert wait_task(debian12, post(debian12, "plain"))["state"] == "succeeded"
    assert debian12.run("date", "+%Y").out == "1970\n"
    # The time comes, as it does when the network is there; nothing has to be begun anew.
    debian12.run("date", "-s", f"@{int(time.time())}")
    assert wait_task(debian12, post(debian12, "plain"))["state"] == "succeeded"
    ctl(debian12, "audit", "verify")


def test_a_task_that_takes_too_much_memory_ends_alone(debian12: VirtualMachine) -> None:
    core = debian12.run("systemctl", "show", "-P", "MainPID", "mycoswarmd").out
    steady, hog = post(debian12, "steady"), post(debian12, "hog")
    ended = wait_task(debian12, hog)
    assert (ended["state"], ended["code"]) == ("failed", "cage-gone"), ended
    # It was the bound of the cage that ended it, and all of it, and nothing beside it.
    assert "Failed with result 'oom-kill'" in debian12.journal("-u", "mycoswarm-task@*")
    assert "constraint=CONSTRAINT_MEMCG" in debian12.journal("-k")
    assert ctl_json(debian12, "task", steady)["task"]["state"] == "running"
    assert debian12.run("systemctl", "show", "-P", "MainPID", "mycoswarmd").out == core
    go_on(debian12)
    assert wait_task(debian12, steady)["state"] == "succeeded"
    ctl(debian12, "audit", "verify")


def test_a_root_that_can_only_be_read_is_named(bare: VirtualMachine) -> None:
    assert bare.run("touch", "/root/x", check=False).code != 0
    bare.wait_until("systemctl show -P Result mycoswarmd | grep -v success")
    refused = ctl(bare, "status", check=False)
    assert refused.code != 0 and "Read-only file system" in refused.err, refused
    assert "can only be read" in ctl(bare, "doctor", check=False).out
    bare.run("mount", "-o", "remount,rw", "/")
    # It tries again by itself.
    wait_ready(bare, within_s=60)


def test_without_landlock_and_bounds_of_memory_tasks_run_that_need_neither(bare: VirtualMachine) -> None:
    bare.sh(
        "mount -o remount,rw /; sysctl -q kernel.unprivileged_userns_clone=0; systemctl restart mycoswarmd"
    )
    wait_ready(bare, within_s=60)
    body = ctl_json(bare, "status", "--security")
    bounds = {
        row["unit"]: check["ok"]
        for row in body["security"]["proofs"]
        for check in row["checks"]
        if check["name"] == "memory"
    }
    assert {"core", "lan"} <= set(bounds) and set(bounds.values()) == {None}, bounds
    assert body["sandbox"]["level"] == "reduced"
    assert {"landlock", "memory-cgroup"} <= set(body["security"]["cages"]["absent"])
    assert (
        "cannot limit memory" in (said := ctl(bare, "doctor", check=False).out) and "Landlock is off" in said
    )
    assert wait_task(bare, post(bare, "plain", agent="scribe"))["state"] == "succeeded"
    # Its paths are a part of the workspace, and it may run programs: only Landlock could see to that.
    ended = wait_task(bare, post(bare, "plain"))
    assert (ended["state"], ended["code"]) == ("failed", "cage-setup") and "Landlock" in ended["message"], (
        ended
    )


def test_without_any_user_namespace_no_cage_is_built_and_prompts_go_on(bare: VirtualMachine) -> None:
    bare.sh("mount -o remount,rw /; sysctl -q user.max_user_namespaces=0; systemctl restart mycoswarmd")
    try:
        wait_ready(bare, within_s=60)
        assert "no cage can be built here" in ctl(bare, "status").out
        assert "User namespaces are turned off" in ctl(bare, "doctor", check=False).out
        assert ctl(bare, "ask", "--model", "ok", "hello").out == "Hello there\n"
    finally:
        bare.run("sysctl", "-q", "user.max_user_namespaces=15000")
    # No restart: cages are tried again.
    bare.wait_until("mycoswarmctl status | grep -q 'sandbox *reduced'", within_s=90)


def test_a_cage_on_the_newest_kernel_of_debian_lacks_nothing(bare: VirtualMachine) -> None:
    bare.sh("mount -o remount,rw /; sync")
    bare.reboot()
    wait_ready(bare)
    body = ctl_json(bare, "status", "--security")
    assert (body["sandbox"]["level"], body["security"]["cages"]["absent"]) == ("full", [])
    checks = {
        (row["unit"], check["name"]): check["ok"]
        for row in body["security"]["proofs"]
        for check in row["checks"]
    }
    assert {name for name, ok in checks.items() if not ok} == set()
    assert wait_task(bare, post(bare, "plain"))["state"] == "succeeded"
    # Landlock knows TCP there: the core's last word on it is gone.
    assert "does not know TCP" not in bare.journal("-u", "mycoswarmd")
