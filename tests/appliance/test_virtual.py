"""Machines with kernels of their own: real limits, wrong clocks, power that goes, kernels that lack much.

What is shown here is what containers cannot show (machines.py); how such a machine is made is said in
virtual.py. Boots are dear where they are emulated, so each machine is asked much, and in this order.
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
    NODE_API,
    POLICY,
    ROOT,
    SETTINGS,
    STATE,
    ctl,
    ctl_json,
    node_api,
    wait_all_succeeded,
    wait_ready,
    wait_task,
)
from tests.appliance.virtual import Disk, VirtualMachine, kernel, why_not

pytestmark = [
    pytest.mark.timeout(1800),
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
# More of itself than there may be, for ever, and each of them takes as much of a processor as it gets.
BOMB = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
FINISH = ("finish", {"summary": "done"})
# A word of the prompt, and what an agent does then; see virtual_engine.py.
CALLS = {
    # A tool may take two minutes: on a slow machine there is another after that, which is not the same call.
    "bomb": [
        *(("run", {"program": "python3", "args": ["-c", f"{BOMB}# {number}"]}) for number in range(9)),
        FINISH,
    ],
    "hog": [("run", {"program": "python3", "args": ["-c", HOG]}), FINISH],
    "number": [FINISH],
    "steady": [FINISH],
    "task": [FINISH],
}
TASKS_MAX = 72  # of a cage; an agent has no more than 66 for itself and what it starts
# Gives the cage with a bomb in it other bounds, if so told; says how far it comes within those it has.
MEASURE = """
import glob, json, resource, subprocess, sys, time
def value(name, key=None):
    text = open(f"{group}/{name}").read()
    return int(text if key is None else dict(row.split() for row in text.splitlines())[key])
give_up = time.monotonic() + 600
group = None
while group is None:
    assert time.monotonic() < give_up
    time.sleep(0.1)
    for group in glob.glob("/sys/fs/cgroup/system.slice/system-mycoswarm*task.slice/*@*.service"):
        if value("pids.current") > 20:
            break
    else:
        group = None
if sys.argv[1:]:
    # Not those that the agent has set for itself and what it starts.
    for pid in open(f"{group}/cgroup.procs").read().split():
        try:
            resource.prlimit(int(pid), resource.RLIMIT_NPROC, (4096, 4096))
        except ProcessLookupError:
            pass
if sys.argv[2:]:
    unit = group.rpartition("/")[2]
    subprocess.run(["systemctl", "set-property", "--runtime", unit, *sys.argv[2:]], check=True)
    while f"TasksMax={value('pids.max')}" not in sys.argv:
        time.sleep(0.1)
refused = value("pids.events", "max")
most, since = 0, time.monotonic()
# Until the unit's bound is met; where the agent's own comes first, until there are no more for a while.
while value("pids.events", "max") == refused and time.monotonic() < (give_up if sys.argv[1:] else since + 5):
    if value("pids.current") > most:
        most, since = value("pids.current"), time.monotonic()
    time.sleep(0.1)
refused = value("pids.events", "max")
processors = []
for _ in range(3):  # a machine that stands still for a moment takes all that time for processor time
    began, used = time.monotonic(), value("cpu.stat", "usage_usec")
    time.sleep(2)
    processors.append((value("cpu.stat", "usage_usec") - used) / 1e6 / (time.monotonic() - began))
    most = max(most, value("pids.current"))
refused = value("pids.events", "max") - refused
print(json.dumps({"processes": most, "refused": refused > 0, "processors": processors}))
"""
# The core, which takes more memory than it may have while /etc/balloon has its process's number in it.
BALLOON = """
import os, runpy, threading, time
def breathe():
    held = []
    while True:
        time.sleep(0.1)
        with open("/etc/balloon") as file:
            is_wanted = file.read().strip() == str(os.getpid())
        if not is_wanted:
            held.clear()
        elif not held:
            for _ in range(136):
                held.append(bytearray(b"x") * (8 << 20))
                time.sleep(0.02)
threading.Thread(target=breathe, daemon=True).start()
runpy.run_path("/usr/sbin/mycoswarmd", run_name="__main__")
"""
BALLOON_UNIT = """[Service]
ExecStart=
ExecStart=/usr/bin/python3 -I /usr/local/lib/balloon.py run --appliance
"""
CORE_BYTES_MAX = 1 << 30
# What runs beside the core and has to go on, whatever becomes of it.
BESIDE = ("mycoswarm-lan", "fake-engine", "dbus", "systemd-journald", "systemd-logind")
# Says each number that it has written into a file, but not made sure. Its place is there before: what other
# programs make sure, the node above all, takes new places along, and not what is in old ones.
UNSURE = """
import itertools, os, time
file = os.open("/var/lib/unsure", os.O_RDWR | os.O_CREAT)
os.write(file, bytes(8))
os.fsync(file)
for number in itertools.count(1):
    os.pwrite(file, number.to_bytes(8, "big"), 0)
    print(number, flush=True)
    time.sleep(0.05)
"""
COUNT = """
with open("/var/lib/unsure", "rb") as file:
    print(int.from_bytes(file.read(), "big"))
"""
INTEGRITY = f"""
import sqlite3
print(*sqlite3.connect("{STATE}/mycoswarm.db").execute("pragma integrity_check"))
"""
BOUNDS_OF_CAGES = ("memory-cgroup", "pids-cgroup", "cpu-cgroup")
OLD_GROUPS = ("systemd.legacy_systemd_cgroup_controller=yes", "systemd.unified_cgroup_hierarchy=0")
# Old ones and a new one beside them; a newer systemd has to be told that this is meant.
HYBRID_GROUPS = (
    "systemd.legacy_systemd_cgroup_controller=no",
    "systemd.unified_cgroup_hierarchy=0",
    "SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1",
)
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
        "/opt/node_api.py": NODE_API,
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
    return str(node_api(machine, "post", f"a {kind} task", agent, "agent"))


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


def checks_of(machine: VirtualMachine, unit: str) -> dict[str, bool | None]:
    """Return what a unit has proved of itself."""
    proofs = node_api(machine, "get", "/v1/security")["proofs"]
    row = next(row for row in proofs if row["unit"] == unit)
    return {str(check["name"]): check["ok"] for check in row["checks"]}


def property_of(machine: VirtualMachine, name: str, *units: str) -> list[str]:
    """Return a property of units, as systemd says it."""
    return machine.run("systemctl", "show", "-P", name, *units).out.split()


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
    assert wait_task(debian12, steady, "running")
    assert debian12.run("systemctl", "show", "-P", "MainPID", "mycoswarmd").out == core
    go_on(debian12)
    assert wait_task(debian12, steady)["state"] == "succeeded"
    ctl(debian12, "audit", "verify")


def test_a_core_that_takes_too_much_memory_loses_nothing(debian12: VirtualMachine) -> None:
    debian12.write("/usr/local/lib/balloon.py", BALLOON)
    debian12.write("/etc/balloon", "")
    blow = "systemctl show -P MainPID mycoswarmd > /etc/balloon"
    debian12.write("/run/systemd/system/mycoswarmd.service.d/balloon.conf", BALLOON_UNIT)
    debian12.sh("systemctl daemon-reload; systemctl restart mycoswarmd")
    wait_ready(debian12)
    assert checks_of(debian12, "core")["memory"] and checks_of(debian12, "lan")["memory"]
    tasks = [post(debian12, "steady") for _ in range(2)]
    wait_task(debian12, tasks[0], "running")
    beside, core = (property_of(debian12, "MainPID", *units) for units in (BESIDE, ["mycoswarmd"]))
    current = 'test "$(systemctl show -P MemoryCurrent mycoswarmd)"'

    # The control: without the bound it is not a matter of life and death.
    debian12.run("systemctl", "set-property", "--runtime", "mycoswarmd", "MemoryMax=infinity")
    debian12.sh(blow)
    debian12.wait_until(f"{current} -gt {CORE_BYTES_MAX + (32 << 20)}", within_s=60)
    wait_ready(debian12)
    debian12.write("/etc/balloon", "")
    debian12.wait_until(f"{current} -lt {CORE_BYTES_MAX // 2}", within_s=60)
    assert property_of(debian12, "MainPID", "mycoswarmd") == core

    debian12.sh(
        "rm /run/systemd/system.control/mycoswarmd.service.d/50-MemoryMax.conf; systemctl daemon-reload"
    )
    bound = debian12.run("cat", "/sys/fs/cgroup/system.slice/mycoswarmd.service/memory.max").out
    assert int(bound) == CORE_BYTES_MAX, bound
    debian12.sh(blow)
    debian12.wait_until("test $(systemctl show -P NRestarts mycoswarmd) = 1", within_s=60)
    wait_ready(debian12)
    assert "Failed with result 'oom-kill'" in debian12.journal("-u", "mycoswarmd")
    kernel_said = debian12.journal("-k")
    assert "oom_memcg=/system.slice/mycoswarmd.service" in kernel_said
    assert "constraint=CONSTRAINT_NONE" not in kernel_said
    assert property_of(debian12, "MainPID", *BESIDE) == beside and len(beside) == len(BESIDE)
    go_on(debian12)
    wait_all_succeeded(debian12, tasks)


def test_a_fork_bomb_in_a_cage_is_bounded_and_the_node_goes_on(debian12: VirtualMachine) -> None:
    debian12.write("/root/measure.py", MEASURE)
    bomb = post(debian12, "bomb")
    bounded = json.loads(debian12.run("python3", "/root/measure.py").out)
    assert 60 < bounded["processes"] <= TASKS_MAX and min(bounded["processors"]) < 1.1, bounded
    assert ctl(debian12, "ask", "--model", "ok", "hello").out == "Hello there\n"
    # What stopped it is the agent's own bound; behind that is the unit's.
    bounded = json.loads(debian12.run("python3", "/root/measure.py", "free").out)
    assert bounded["processes"] == TASKS_MAX and bounded["refused"], bounded
    assert min(bounded["processors"]) < 1.1, bounded
    # The control: the same bomb, the unit's bounds wider.
    more = ("TasksMax=100", "CPUQuota=200%")
    wider = json.loads(debian12.run("python3", "/root/measure.py", "free", *more).out)
    assert wider["processes"] == 100 and max(wider["processors"]) > 1.15, wider
    ctl(debian12, "cancel", bomb)
    assert wait_task(debian12, bomb)["state"] == "cancelled"
    debian12.wait_until("! pgrep -f '[o]s.fork()'")
    ctl(debian12, "audit", "verify")


def test_no_task_is_lost_with_the_power(debian12: VirtualMachine) -> None:
    # What has always to be there: as much on this disk as the node may need.
    wait_task(debian12, post(debian12, "plain"))
    before = node_api(debian12, "get", "/api/tasks?limit=1000")["tasks"]
    steady = post(debian12, "steady", agent="scribe")
    wait_task(debian12, steady, "running")
    with (
        debian12.start("python3", "-c", UNSURE) as unsure,
        debian12.start("sh", "-c", "while mycoswarmctl ask --model slow hello; do :; done") as prompts,
    ):
        prompts.wait_said("w1 ", 60 * debian12.patience)
        unsure.wait_said("1\n", 60 * debian12.patience)
        with debian12.start("python3", "/opt/node_api.py", "pour") as poster:
            poster.wait_said("\n", 60 * debian12.patience, times=4)
            assert not prompts.is_over, prompts.err
            debian12.pull_plug()
    # The last line may be half of one.
    acknowledged = [line for line in poster.out.split("\n")[:-1] if line.startswith("t-")]
    assert len(acknowledged) >= 4, poster.out
    debian12.plug_in(*OLD_GROUPS)
    debian12.wait_booted()
    # The control: it was the power that went, and not only the processes.
    assert int(debian12.python(COUNT).out) < int(unsure.out.split("\n")[-2])
    wait_ready(debian12)
    assert debian12.python(INTEGRITY).out == "('ok',)\n"
    go_on(debian12)
    wait_all_succeeded(debian12, [steady, *acknowledged])
    after = node_api(debian12, "get", "/api/tasks?limit=1000")["tasks"]
    assert [row for row in before if row not in after] == []


def test_with_the_old_control_groups_the_node_says_what_does_not_hold(debian12: VirtualMachine) -> None:
    if OLD_GROUPS[0] not in debian12.run("cat", "/proc/cmdline").out:
        debian12.reboot(*OLD_GROUPS)
        wait_ready(debian12)
    assert checks_of(debian12, "lan")["canary"] is False
    # The core has no network of its own by other means, and so it starts.
    assert checks_of(debian12, "core")["inet-socket"] is True
    body = ctl_json(debian12, "status", "--security")
    assert body["state"] != "green", body
    assert any("IP filters do nothing" in line for line in body["problems"]), body
    assert "unit lan is weak: canary" in debian12.journal("-u", "mycoswarmd")
    # Bounds of whole cages cannot be seen there, so a cage does not count as having any.
    assert {"own-group", *BOUNDS_OF_CAGES} <= set(body["security"]["cages"]["absent"])
    assert body["sandbox"]["level"] == "reduced"
    said = ctl(debian12, "doctor", check=False).out
    assert "address filters of units silently do nothing here" in said, said
    assert f"take {' '.join(OLD_GROUPS)} out of" in said, said


def test_a_root_that_can_only_be_read_is_named(bare: VirtualMachine) -> None:
    assert bare.run("touch", "/root/x", check=False).code != 0
    bare.wait_until("systemctl show -P Result mycoswarmd | grep -v success")
    # What systemd knows of it is not said where systemd needs more than a few seconds to say it.
    bare.wait_until("! mycoswarmctl status 2>/run/said && grep 'Read-only file system' /run/said")
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


def test_with_old_control_groups_beside_new_ones_filters_hold_and_bounds_are_not_seen(
    bare: VirtualMachine,
) -> None:
    bare.sh("mount -o remount,rw /")
    bare.reboot(*HYBRID_GROUPS)
    wait_ready(bare)
    assert bare.run("test", "-e", "/sys/fs/cgroup/unified/cgroup.procs", check=False).code == 0
    assert checks_of(bare, "lan")["canary"] is True
    body = ctl_json(bare, "status", "--security")
    assert set(BOUNDS_OF_CAGES) <= set(body["security"]["cages"]["absent"]), body["security"]["cages"]
    assert body["sandbox"]["level"] == "reduced"
    said = ctl(bare, "doctor", check=False).out
    assert "in use beside the new ones" in said and "silently do nothing" not in said, said
    assert f"take {' '.join(HYBRID_GROUPS)} out of" in said, said


def test_a_cage_on_the_newest_kernel_of_debian_lacks_nothing(bare: VirtualMachine) -> None:
    bare.sh("mount -o remount,rw /")
    # Without what asked for the old control groups, as doctor says.
    bare.reboot()
    wait_ready(bare)
    assert "The old control groups" not in ctl(bare, "doctor", check=False).out
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
