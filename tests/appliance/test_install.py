"""A fresh installation, on both releases: it runs, it is closed, it says what to do next."""

import pytest

from tests.appliance.images import SUITES
from tests.appliance.machines import Machine
from tests.appliance.nodes import ctl, ctl_json, wait_ready

pytestmark = [pytest.mark.timeout(1200), pytest.mark.parametrize("suite", SUITES)]
Fresh = dict[str, tuple[Machine, str]]


def test_it_runs_after_apt_install_and_apt_says_the_next_step(fresh: Fresh, suite: str) -> None:
    machine, said = fresh[suite]
    wait_ready(machine)
    assert machine.run("systemctl", "is-active", "mycoswarmd", check=False).out == "active\n"
    assert "mycoswarmctl init" in said and "mycoswarmctl enroll" in said, said
    assert "rror" not in said and "ould not" not in said, said
    assert machine.run("systemctl", "--failed", "--no-legend", check=False).out == ""


def test_it_listens_on_unix_sockets_only(fresh: Fresh, suite: str) -> None:
    machine, _ = fresh[suite]
    wait_ready(machine)
    assert machine.listening() == set()
    rows = machine.run("cat", "/proc/net/unix").out.splitlines()
    ours = {row.split()[-1] for row in rows if row.split()[-1].startswith("/run/mycoswarm")}
    assert "/run/mycoswarm/api.sock" in ours
    mode = machine.run("stat", "-c", "%a %U", *sorted(ours - {"/run/mycoswarm/api.sock"})).out
    assert set(mode.splitlines()) == {"600 _mycoswarm"}, (ours, mode)
    with machine.start(
        "python3", "-c", "import socket,time; s=socket.create_server(('', 7437)); time.sleep(600)"
    ):
        machine.wait_until("grep -q 00000000:1D0D /proc/net/tcp")
        assert machine.listening() == {7437}  # the same question can be answered otherwise


def test_status_answers_root_and_a_user_and_tells_them_apart(fresh: Fresh, suite: str) -> None:
    machine, _ = fresh[suite]
    wait_ready(machine)
    assert ctl_json(machine, "status")["state"] in {"green", "yellow"}
    assert ctl_json(machine, "status", user="alice")["state"] in {"green", "yellow"}
    refused = ctl(machine, "keys", "create", "x", user="alice", check=False)
    assert refused.code == 3, refused
    assert ctl(machine, "keys", "create", "x").code == 0


def test_each_part_runs_as_a_user_of_its_own_without_capabilities(fresh: Fresh, suite: str) -> None:
    machine, _ = fresh[suite]
    wait_ready(machine)
    machine.wait_until("systemctl is-active mycoswarm-lan")
    # An outpost that another test has asked for stays for a minute.
    running = (
        "systemctl list-units --plain --no-legend --state=active,activating,deactivating 'mycoswarm-*@*'"
    )
    machine.wait_until(f"! {running} | grep -v ^mycoswarm-task@ | grep -q .", within_s=180)
    rows = machine.run("ps", "-eo", "user:32,pid,args", "--no-headers").out.splitlines()
    users = {}
    for row in rows:
        user, pid, args = row.split(None, 2)
        if (
            "mycoswarm" in args and "python3" in args and "zipimport" not in args
        ):  # a warm cage has its own tests
            users[args] = user
            status = machine.run("cat", f"/proc/{pid}/status").out
            for line in (
                "CapBnd:\t0000000000000000",
                "CapEff:\t0000000000000000",
                "NoNewPrivs:\t1",
                "Seccomp:\t2",
            ):
                assert line in status, (args, status)
    assert sorted(users.values()) == ["_mycoswarm", "_mycoswarm-lan"], rows


def test_a_node_that_is_switched_off_stays_off(fresh: Fresh, suite: str) -> None:
    machine, _ = fresh[suite]
    machine.run("systemctl", "stop", "mycoswarmd.service")
    assert ctl(machine, "status").code == 0  # control: its socket alone starts it again
    machine.run("systemctl", "disable", "mycoswarmd")
    sockets = "systemctl list-unit-files --no-legend 'mycoswarm*.socket'"
    assert {row.split()[1] for row in machine.sh(sockets).out.splitlines()} == {"disabled"}
    machine.run("systemctl", "stop", "mycoswarm*")
    ran = ctl(machine, "status", check=False)
    assert ran.code == 4 and "sudo systemctl start mycoswarmd" in ran.err, ran
    active = "systemctl list-units --plain --no-legend --state=active,activating 'mycoswarm*.s*'"
    machine.wait_until(f'test -z "$({active})"')
    machine.run("systemctl", "enable", "--now", "mycoswarmd")
    wait_ready(machine)
    states = machine.sh(sockets).out.splitlines()
    assert len(states) == 7 and all(row.split()[1] == "enabled" for row in states), states
