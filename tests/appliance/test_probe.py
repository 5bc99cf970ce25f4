"""Graphics cards on booted machines: who can open their devices, and what becomes of a driver in trouble.

No machine here has a card. In its place are nodes with the names of NVIDIA's devices, the driver's name in
/proc/devices, and a library that answers as the driver's does (nvml.c). The devices are real ones: what opens
them has got past the unit's /dev, its group and the kernel's device filter.
"""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.appliance.machines import SOON_S, Machine
from tests.appliance.nodes import ctl, ctl_json, in_parallel, wait_ready

pytestmark = pytest.mark.timeout(1200)
SOURCE = Path(__file__).with_name("nvml.c")
SHIPPED = Path(__file__).parents[2] / "systemd"
LIBRARY = "/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1"
UNITS = "/etc/systemd/system"
# /dev/kmsg's number is one that no unit of ours may open. No driver has 509: past the filter that is ENXIO.
PLUG_IN = """
mkdir -p /run/stand-in
sed 's/^  1 mem$/  1 mem\\n  1 nvidia\\n509 nvidia-uvm/' /proc/devices >/run/stand-in/devices
mount --bind /run/stand-in/devices /proc/devices
for node in nvidiactl nvidia0; do mknod -m 0660 /dev/$node c 1 11; done
mknod -m 0660 /dev/nvidia-uvm c 509 0
chgrp video /dev/nvidia*
ldconfig
"""
PULL_OUT = f"""
umount /proc/devices || true
rm -rf /dev/nvidia* /run/stand-in {LIBRARY} /etc/nvml-stand-in {UNITS}/mycoswarm-probe@.service.d
rm -rf {UNITS}/mycoswarm-engine@.service.d
ldconfig; systemctl daemon-reload; systemctl restart mycoswarmd
"""
# Run in the place of a unit's program: which devices are let through, and what else could have become wider.
INSIDE = """#!/usr/bin/python3 -I
import errno, json, mmap, os, socket, sys
from mycoswarmd.outposts.selftest import prove
from mycoswarmd.wire.proof import Unit
said = {}
def attempt(name, function):
    try:
        function()
        said[name] = "done"
    except OSError as exc:
        said[name] = errno.errorcode[exc.errno]
def opened(path):
    os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
def written(path):
    with open(path, "wb") as file:
        file.write(b"x")
for name in ("nvidiactl", "nvidia0", "nvidia-uvm", "kmsg", "full"):
    attempt(name, lambda: opened("/dev/" + name))
attempt("node", lambda: os.mknod("/dev/new", 0o20600, os.makedev(1, 11)))
for path in ("/dev/shm/x", "/dev/x", "/var/x", "/run/x", "/tmp/x", "/usr/x"):
    attempt(path, lambda: written(path))
attempt("jit", lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC))
said["dev"] = sorted(os.listdir("/dev"))
said["weak"] = {check.name.value: check.detail for check in prove(Unit(sys.argv[1])).weak()}
with socket.socket(fileno=0) as node:
    node.sendall(json.dumps(said).encode())
"""
ASK = """
import socket
with socket.socket(socket.AF_UNIX) as node:
    node.connect("/run/mycoswarm-outposts/{}.sock")
    with node.makefile("rb") as lines:
        print(lines.read().decode())
"""
# What the core's own process may open, tried in its unit.
CORE = """
import errno, os, sys
for name in ("nvidiactl", "nvidia0", "nvidia-uvm"):
    try:
        os.close(os.open("/dev/" + name, os.O_WRONLY)); print(name)
    except OSError as exc:
        print(errno.errorcode[exc.errno])
"""
OUTSIDE = """
from mycoswarmd.inventory.gpu import read_gpus
from mycoswarmd.inventory.host import read_host, tier_of
host, gpus = read_host(), read_gpus()
print(host.cpus, host.memory_bytes, gpus.found[0].name, tier_of(host, gpus.found), sep="|")
"""
# The core's own way of asking the unit, with one trouble after the other.
ASK_IN_TROUBLE = """
import asyncio, json, os
from pathlib import Path
from mycoswarmd.daemon.clock import SystemClock
from mycoswarmd.daemon.gpuwatch import CURES, GpuWatch
from mycoswarmd.sandbox.outpost import connect_outpost
from mycoswarmd.wire.probing import LINE_BYTES
socket, library, control = Path("/run/mycoswarm-outposts/probe.sock"), Path("LIBRARY"), Path("/dev/nvidiactl")
start = lambda: connect_outpost(socket, line_bytes=LINE_BYTES)
said = {}
def ask(name, what="card"):
    Path("/etc/nvml-stand-in").write_text(what)
    watch = GpuWatch(start, clock=SystemClock(), proved=lambda proof: None)
    found = asyncio.run(watch.look())
    names = [gpu.name for gpu in found.found]
    said[name] = [found.reading, found.detail, CURES.get(found.reading, ""), names]
for what in ("card", "crash", "flood", "absurd", "negative", "control", "chatter", "mismatch"):
    ask(what, what)
control.chmod(0o600)
ask("not for us")
control.chmod(0o660)
library.rename("/root/library")
ask("no library")
Path("/root/library").rename(library)
ask("again")
print(json.dumps(said))
""".replace("LIBRARY", LIBRARY)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    made = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
    command = ["gcc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", str(made), str(SOURCE)]
    subprocess.run(command, check=True)
    return made.read_bytes()


@pytest.fixture(scope="module")
def nodes(fresh: dict[str, tuple[Machine, str]], library: bytes) -> Iterator[list[Machine]]:
    """A machine of each release with what looks like a card."""
    machines = [machine for machine, _ in fresh.values()]

    def plug_in(machine: Machine) -> None:
        machine.write(LIBRARY, library)
        machine.write("/usr/local/bin/inside", INSIDE, mode=0o755)
        machine.sh(PLUG_IN)

    in_parallel(*(lambda machine=machine: plug_in(machine) for machine in machines))
    yield machines
    in_parallel(*(lambda machine=machine: machine.sh(PULL_OUT) for machine in machines))


def on_each(nodes: list[Machine], work: Callable[[Machine], None]) -> None:
    in_parallel(*(lambda machine=machine: work(machine) for machine in nodes))


def restart(machine: Machine, what: str) -> None:
    """Start the node anew with a driver that does this."""
    machine.write("/etc/nvml-stand-in", what + "\n")
    machine.sh("systemctl reset-failed mycoswarmd; systemctl restart mycoswarmd")
    wait_ready(machine)


def host(machine: Machine, reading: str, *, within_s: float = SOON_S) -> dict[str, Any]:
    """Wait until the node has read its cards with this result, and return what it says of its machine."""
    pattern = f'"result": ?"{reading}"'
    machine.wait_until(f"mycoswarmctl status --json | grep -Eq '{pattern}'", within_s=within_s)
    found: dict[str, Any] = ctl_json(machine, "status")["host"]
    return found


def doctor(machine: Machine) -> dict[str, Any]:
    rows = json.loads(ctl(machine, "doctor", "--json", check=False).out)["checks"]
    found: dict[str, Any] = next(row for row in rows if row["name"] == "gpu")
    return found


def pid_of(machine: Machine) -> str:
    return machine.run("systemctl", "show", "-p", "MainPID", "--value", "mycoswarmd").out.strip()


def test_the_node_knows_its_card_and_has_its_tier_and_its_own_process_opens_no_device(
    nodes: list[Machine],
) -> None:
    def check(machine: Machine) -> None:
        restart(machine, "card")
        found = host(machine, "read")
        assert [(gpu["name"], gpu["memory_bytes"] >> 30) for gpu in found["gpus"]] == [
            ("NVIDIA GeForce RTX 3090", 24)
        ]
        assert found["gpu_reading"]["driver"] == "550.163.01"
        assert found["gpus"][0]["temperature_c"] == 41
        # The same, of the same machine, by a program that nothing confines: one way of reading, one tier.
        outside = machine.python(OUTSIDE).out.strip()
        facts = (found["cpus"], found["memory_bytes"], found["gpus"][0]["name"], found["tier"])
        assert outside == "|".join(map(str, facts))
        assert found["tier"] == "executive"
        row = doctor(machine)
        assert row["severity"] == "ok" and "24576 MiB" in row["detail"]
        shown = ctl(machine, "status").out
        assert "RTX 3090" in shown
        # Its process sees none of them, and root in its place would not either.
        pid = pid_of(machine)
        mine = ["nsenter", "--target", pid, "--mount", "python3", "-c", CORE]
        assert machine.run(*mine).out.split() == ["ENOENT"] * 3
        assert machine.python(CORE).out.split() == ["nvidiactl", "nvidia0", "ENXIO"]  # the control
        proofs = {one["unit"]: one for one in ctl_json(machine, "status", "--security")["security"]["proofs"]}
        weak = {one["name"] for one in proofs["probe"]["checks"] if one["ok"] is not True}
        assert weak <= {"memory"}  # the outer machine may keep that controller

    on_each(nodes, check)


def test_a_driver_in_trouble_ends_a_process_and_the_node_says_so_and_goes_on(nodes: list[Machine]) -> None:
    trixie, bookworm = nodes
    in_parallel(lambda: crashes_and_lies(trixie), lambda: hangs(bookworm))


def crashes_and_lies(trixie: Machine) -> None:
    said = json.loads(trixie.python(ASK_IN_TROUBLE, timeout_s=600).out)
    readings = {name: row[0] for name, row in said.items()}
    assert readings == {
        **dict.fromkeys(("card", "again", "control", "chatter"), "read"),
        **dict.fromkeys(("crash", "flood", "absurd", "negative"), "unheard"),
        "mismatch": "mismatch",
        "not for us": "refused",
        "no library": "no-library",
    }
    assert "ended without an answer" in said["crash"][1]
    assert "memory_bytes" in said["absurd"][1] and "memory_used_bytes" in said["negative"][1]
    assert said["control"][3] == ["?[2JRTX?3090"]
    assert said["chatter"][3] == ["NVIDIA GeForce RTX 3090"]  # what a library prints is not the answer
    assert "may not be opened" in said["not for us"][1] and "video" in said["not for us"][2]
    assert "libnvidia-ml1" in said["no library"][2] and said["mismatch"][2] == "sudo reboot"
    trixie.wait_until("journalctl -b -u 'mycoswarm-probe@*' | grep -qF status=11/SEGV")
    restart(trixie, "crash")
    # What the core would be, did it ask by itself.
    control = trixie.run(
        "python3", "-c", "from mycoswarmd.inventory.gpu import read_gpus as r; r()", check=False
    )
    assert control.code == -11, control
    found = host(trixie, "unheard")
    assert (found["gpus"], found["tier"] in {"light", "edge"}) == ([], True)
    status = ctl_json(trixie, "status")
    assert any("graphics cards are unknown: the probe ended" in one for one in status["problems"])
    row = doctor(trixie)
    assert row["severity"] == "weak" and "mycoswarm-probe.socket" in row["fix"]


def hangs(bookworm: Machine) -> None:
    restart(bookworm, "hang")  # and it answers all the same
    pid = pid_of(bookworm)
    assert host(bookworm, "unheard", within_s=120)["gpus"] == []
    # The program was ended by its own alarm, and the node asks again by itself.
    bookworm.write("/etc/nvml-stand-in", "card\n")
    assert host(bookworm, "read", within_s=300)["tier"] == "executive"
    assert pid_of(bookworm) == pid
    bookworm.wait_until("journalctl -b -u 'mycoswarm-probe@*' | grep -qF status=14/ALRM")


def inside(machine: Machine, unit: str, *lines: str) -> dict[str, Any]:
    """Run the attempts as this unit, with these lines beside what else its drop-ins say."""
    drop_in = f"{UNITS}/mycoswarm-{unit}@.service.d/zz-inside.conf"
    program = f"ExecStart=\nExecStart=/usr/local/bin/inside {unit}"
    machine.write(drop_in, "\n".join(["[Service]", program, *lines, ""]))
    machine.run("systemctl", "daemon-reload")
    try:
        found: dict[str, Any] = json.loads(machine.python(ASK.format(unit)).out)
    finally:
        machine.run("rm", drop_in)
    found["weak"].pop("memory", None)  # the outer machine may keep that controller
    return found


_OF_NVIDIA = ("nvidiactl", "nvidia0", "nvidia-uvm")


def devices(found: dict[str, Any]) -> list[str]:
    return [found[name] for name in _OF_NVIDIA]


def test_the_probe_opens_what_tells_of_cards_and_nothing_else(nodes: list[Machine]) -> None:
    def check(machine: Machine) -> None:
        found = inside(machine, "probe")
        assert devices(found) == ["done", "done", "ENOENT"]
        assert (found["full"], found["kmsg"]) == ("done", "ENOENT")
        assert {name for name, said in found.items() if said == "done"} == {"nvidiactl", "nvidia0", "full"}
        assert found["weak"] == {}
        # Without each of the three it cannot.
        assert devices(inside(machine, "probe", "DeviceAllow=")) == ["EPERM", "EPERM", "ENOENT"]
        bare = ("BindReadOnlyPaths=", "BindReadOnlyPaths=/usr /etc")
        assert devices(inside(machine, "probe", *bare)) == ["ENOENT"] * 3
        assert devices(inside(machine, "probe", "SupplementaryGroups=")) == ["EACCES", "EACCES", "ENOENT"]

    on_each(nodes, check)


def test_the_engine_has_cards_only_with_the_drop_in_and_nothing_else_is_wider(nodes: list[Machine]) -> None:
    page = (SHIPPED.parent / "docs/howto/gpu-workstation.md").read_text()
    (command,) = (line for line in page.splitlines() if "engine-gpu.conf '" in line)

    def check(machine: Machine) -> None:
        without = inside(machine, "engine")
        assert devices(without) == ["ENOENT"] * 3
        machine.sh(command.removeprefix("sudo "))
        given = inside(machine, "engine")
        assert devices(given) == ["done", "done", "ENXIO"]  # the last has no driver: it was let through
        changed = {name for name in without if given[name] != without[name]}
        assert changed == {*_OF_NVIDIA, "dev", "jit"}
        assert (without["jit"] in {"EACCES", "EPERM"}, given["jit"]) == (True, "done")
        assert set(given["dev"]) - set(without["dev"]) == set(_OF_NVIDIA)
        assert (without["weak"], given["weak"]) == ({}, {})
        # The device filter stands: that a device is in its /dev is not enough.
        assert devices(inside(machine, "engine", "DeviceAllow=")) == ["EPERM"] * 3
        machine.sh(f"rm {UNITS}/mycoswarm-engine@.service.d/gpu.conf; systemctl daemon-reload")
        assert devices(inside(machine, "engine")) == ["ENOENT"] * 3

    on_each(nodes, check)
