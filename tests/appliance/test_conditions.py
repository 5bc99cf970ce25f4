"""Bad conditions on booted machines: the node says what is wrong, stays closed, comes back when it is mended.

What this lab cannot show is listed by `test_what_this_lab_cannot_show`, and printed at the end of a test run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.appliance.conftest import Images
from tests.appliance.machines import Lab, Machine
from tests.appliance.nodes import (
    POLICY,
    STATE,
    boot_with_engine,
    ctl,
    ctl_json,
    enroll,
    invite,
    names,
    proved,
    start_engine,
    submit,
    wait_ready,
    wait_task,
)
from tests.appliance.virtual import why_not

SERVICES = "mycoswarmd.service"  # its socket stays
pytestmark = pytest.mark.timeout(1200)
WITHOUT_VIRTUAL_MACHINES = (
    "MemoryMax, OOMPolicy: a task that takes too much memory ends alone; a core that does loses nothing",
    "TasksMax, CPUQuota: a cage has so many processes and so much of the processors",
    "power loss below the file system: a pulled plug here kills every process, the kernel's cache stays",
    "control groups of version 1: shown by forbidding bpf(2) instead, which does the same to address filters",
    "a cage of the level `full`",
    "the clock at 1970; a root that can only be read, its /var as well",
    "kernels without Landlock, without bounds of memory, without user namespaces",
)
ALWAYS_UNPROVED = (
    "power loss in a disk: what it has acknowledged and kept in a cache of its own is never lost here",
    "MemoryMax of the engine's unit: a part of the machine's memory, all of which would have to be used",
)


@pytest.fixture(scope="module")
def node(appliance_lab: Lab, images: Images) -> Iterator[Machine]:
    """A node for what can be mended again."""
    machine = appliance_lab.machine("patient", *images.node_trixie)
    boot_with_engine(machine)
    yield machine
    machine.pull_plug()


@pytest.fixture
def odd_machine(appliance_lab: Lab, images: Images) -> Iterator[Callable[..., Machine]]:
    """Make machines that are odd in some way; their plugs are pulled at the end."""
    made: list[Machine] = []

    def make(name: str, **traits: bool | str) -> Machine:
        machine = appliance_lab.machine(name, *images.node_trixie, **traits)  # type: ignore[arg-type]
        made.append(machine)
        machine.wait_booted()
        return machine

    yield make
    for machine in made:
        machine.pull_plug()


def _proofs(machine: Machine) -> dict[str, dict[str, bool | None]]:
    rows = proved(machine, "core", "lan")["proofs"]
    return {str(row["unit"]): {str(check["name"]): check["ok"] for check in row["checks"]} for row in rows}


def test_every_unit_that_ran_has_proved_its_confinement(node: Machine) -> None:
    wait_task(node, submit(node, "so that a cage has proved itself"))
    proofs = _proofs(node)
    assert {"core", "lan"} <= set(proofs), proofs
    for unit, checks in proofs.items():
        refuted = [name for name, ok in checks.items() if ok is False]
        assert refuted == [], (unit, checks)
    assert proofs["core"]["inet-socket"] is True
    assert proofs["lan"]["canary"] is True


def test_without_address_filters_the_dialer_says_so(odd_machine: Callable[..., Machine]) -> None:
    machine = odd_machine("nobpf", can_bpf=False)
    wait_ready(machine)
    machine.wait_until("systemctl is-active mycoswarm-lan")
    assert _proofs(machine)["lan"]["canary"] is False
    machine.wait_until("journalctl -b -u mycoswarm-lan | grep -q canary")
    assert ctl_json(machine, "status")["state"] != "green"


def test_without_landlock_no_task_whose_paths_are_limited_runs(odd_machine: Callable[..., Machine]) -> None:
    machine = odd_machine("nolandlock", can_landlock=False)
    start_engine(machine)
    policy = machine.run("cat", POLICY).out
    narrower = policy.replace('write = ["."]', 'write = ["out"]')
    assert narrower != policy
    machine.write(POLICY, narrower)
    machine.run("systemctl", "restart", "mycoswarmd")
    wait_ready(machine)
    machine.wait_until("mycoswarmctl ask --model ok 'prompts go on'")
    assert "andlock" in ctl(machine, "doctor", check=False).out
    ran = ctl(machine, "submit", "--model", "agent", "a task", check=False)
    if ran.code == 0:
        done = wait_task(machine, ran.out.strip())
        assert done["state"] in {"failed", "parked"} and done["code"].startswith("cage"), done
    else:
        assert "andlock" in ran.err, ran


def test_the_core_does_not_start_with_a_network(node: Machine) -> None:
    drop_in = "/etc/systemd/system/mycoswarmd.service.d/weak.conf"
    node.write(drop_in, "[Service]\nPrivateNetwork=no\nRestrictAddressFamilies=AF_UNIX AF_INET AF_INET6\n")
    node.sh("systemctl daemon-reload; systemctl restart mycoswarmd || true")
    node.wait_until("journalctl -b -u mycoswarmd | grep -q 'cannot.*network'")
    assert node.run("systemctl", "is-active", "mycoswarmd", check=False).out != "active\n"
    node.sh(f"rm {drop_in}; systemctl daemon-reload; systemctl restart mycoswarmd")
    wait_ready(node)


def test_a_corrupted_database_is_named_and_never_replaced(node: Machine) -> None:
    database = f"{STATE}/mycoswarm.db"
    node.sh(f"systemctl stop {SERVICES}; cp -a {database} /root/good.db; rm -f {database}-wal {database}-shm")
    node.sh(f"dd if=/dev/urandom of={database} bs=4096 count=8 conv=notrunc status=none")
    node.sh(f"sha256sum {database} > /root/sum; systemctl start --no-block mycoswarmd")
    node.wait_until("journalctl -b -u mycoswarmd -n 5 | grep -q 'cannot.*database\\|cannot.*state'")
    node.sh("sha256sum --quiet -c /root/sum")
    node.sh(f"systemctl stop {SERVICES}; cp -a /root/good.db {database}; systemctl start {SERVICES}")
    wait_ready(node)
    ctl(node, "audit", "verify")


def test_a_full_disk_refuses_and_loses_nothing(node: Machine) -> None:
    with _other_state(node, "size=8m"):
        before = submit(node, "while there is room")
        wait_task(node, before)
        node.sh(f"dd if=/dev/zero of={STATE}/filler bs=64k status=none 2>/dev/null || true")
        argv = ("mycoswarmctl", "submit", "--model", "agent", "-")
        refused = node.run(*argv, stdin="x" * 200_000, check=False)
        assert refused.code == 1 and "cannot" in refused.err, refused
        assert node.run("systemctl", "is-active", "mycoswarmd").out == "active\n"
        node.wait_until("mycoswarmctl status | grep -q 'the disk is full'")
        node.run("systemctl", "kill", "--signal=KILL", "mycoswarmd")
        node.wait_until("mycoswarmctl status 2>&1 | grep 'disk is full'")
        node.sh(f"rm {STATE}/filler")
        wait_ready(node)
        node.wait_until("mycoswarmctl status > /tmp/said && ! grep 'the disk is full' /tmp/said")
        assert ctl_json(node, "task", before)["task"]["state"] == "succeeded"
        node.wait_until("mycoswarmctl submit --model agent 'there is room again' > /tmp/again")
        assert wait_task(node, node.run("cat", "/tmp/again").out.strip())["state"] == "succeeded"
        ctl(node, "audit", "verify")


@contextmanager
def _other_state(node: Machine, options: str) -> Iterator[None]:
    """Let the node have its state on a file system of its own meanwhile."""
    node.sh(f"systemctl stop {SERVICES}; rm -rf /root/state; cp -a {STATE} /root/state")
    node.sh(f"mount -t tmpfs -o {options} other {STATE}; cp -a /root/state/. {STATE}/")
    node.sh(f"chown --reference=/root/state {STATE}; chmod 700 {STATE}; systemctl start {SERVICES}")
    try:
        wait_ready(node)
        yield
    finally:
        node.sh(f"systemctl stop {SERVICES}; umount {STATE}; systemctl start {SERVICES}")
    wait_ready(node)


def test_a_read_only_root_with_a_fresh_var_is_no_hindrance(odd_machine: Callable[..., Machine]) -> None:
    machine = odd_machine("readonly", is_read_only=True)
    assert machine.run("touch", "/etc/x", check=False).code != 0
    wait_ready(machine)
    assert machine.run("systemctl", "is-active", "mycoswarmd").out == "active\n"
    assert machine.run("stat", "-c", "%U %a", STATE).out == "_mycoswarm 700\n"
    ctl(machine, "keys", "create", "x")
    assert "policy" in ctl(machine, "status").out


def test_a_machine_that_never_had_a_good_policy_denies(odd_machine: Callable[..., Machine]) -> None:
    machine = odd_machine("nopolicy")
    wait_ready(machine)
    start_engine(machine)
    machine.sh(f"systemctl stop {SERVICES}; rm -rf {STATE}/*; echo 'schema = 1 [[ru' > {POLICY}")
    machine.sh(f"systemctl start {SERVICES}")
    wait_ready(machine)
    assert ctl(machine, "ask", "--model", "ok", "hello", check=False).code == 3
    assert "cannot" in ctl(machine, "status").out


def test_a_port_that_is_taken_is_named_and_taken_up_when_free(node: Machine) -> None:
    with node.start(
        "python3", "-c", "import socket,time; s=socket.create_server(('', 7437)); time.sleep(600)"
    ):
        node.wait_until("grep -q 00000000:1D0D /proc/net/tcp")
        ran = ctl(node, "init", "--name", "late", "--yes-i-wrote-it-down", check=False)
        if "7437" not in ran.out + ran.err:
            node.wait_until("{ mycoswarmctl status; journalctl -b -u mycoswarmd; } | grep -q 7437")
        assert node.run("systemctl", "is-active", "mycoswarmd").out == "active\n"
    node.run("systemctl", "restart", "mycoswarmd")
    wait_ready(node)
    node.wait_until("grep -q 1D0D.*0A /proc/net/tcp /proc/net/tcp6")


def test_machines_of_one_name_get_two(node: Machine, odd_machine: Callable[..., Machine]) -> None:
    twin = odd_machine("twin", hostname=node.hostname)
    wait_ready(twin)
    if ctl(node, "nodes", check=False).code != 0:  # it is in no swarm yet
        ctl(node, "init", "--name", "late", "--yes-i-wrote-it-down")
    enroll(twin, str(ctl_json(node, "invite", "--no-wait")["code"]))
    assert names(twin) == names(node) == {node.hostname, f"{node.hostname}-2"}
    with pytest.raises(AssertionError):
        invite(twin, "x")  # who joined may not sign


def test_what_this_lab_cannot_show(record_property: Callable[[str, object], None]) -> None:
    found = WITHOUT_VIRTUAL_MACHINES if why_not() is not None else ()
    for text in (*found, *ALWAYS_UNPROVED):
        record_property("unproved", text)
