"""The node under systemd: what it proved, what it says to the service manager and to the journal."""

import json
from typing import Any

import pytest

from tests.appliance.images import SUITES
from tests.appliance.machines import Machine
from tests.appliance.nodes import ctl, proved, wait_ready

pytestmark = [pytest.mark.timeout(1200), pytest.mark.parametrize("suite", SUITES)]
Fresh = dict[str, tuple[Machine, str]]
READY = "468f11ef4dbb436c82b5a5261acb99d9"
RELOADED = "c38b7d21f6c34f6abb4c8aba5cb73df7"
BROKEN = "5ae944fa4bd84c45858ba7869ccf1078"


def logged(machine: Machine, message_id: str) -> list[dict[str, Any]]:
    said = machine.run("journalctl", "-o", "json", "--no-pager", f"MESSAGE_ID={message_id}", check=False).out
    return [json.loads(line) for line in said.splitlines()]


def test_every_unit_that_ran_has_proved_all_that_this_machine_can_show(fresh: Fresh, suite: str) -> None:
    machine, _ = fresh[suite]
    wait_ready(machine)
    said = proved(machine, "core", "lan", "signer")
    assert said["appliance"] is True
    units = {proof["unit"]: proof["checks"] for proof in said["proofs"]}
    for unit, checks in units.items():
        weak = [one for one in checks if one["ok"] is not True and one["name"] != "memory"]
        assert not weak, (unit, weak)
    assert (said["cages"]["by"], said["cages"]["problem"]) == ("systemd", "")
    shown = ctl(machine, "status", "--security").out
    assert "inet-socket" in shown and "canary" in shown


def test_the_journal_has_events_with_their_ids_and_what_they_mean(fresh: Fresh, suite: str) -> None:
    machine, _ = fresh[suite]
    wait_ready(machine)
    machine.wait_until(f"journalctl -o cat MESSAGE_ID={READY} | grep -q .")
    ready = logged(machine, READY)[-1]
    assert (ready["_SYSTEMD_UNIT"], ready["PRIORITY"]) == ("mycoswarmd.service", "6")
    assert "next: sudo mycoswarmctl init, or enroll" in ready["MESSAGE"]
    assert "The node answers" in machine.run("journalctl", "-x", "--no-pager", f"MESSAGE_ID={READY}").out


def test_a_reload_is_told_to_systemd_and_a_broken_policy_stops_nothing(fresh: Fresh, suite: str) -> None:
    machine, _ = fresh[suite]
    wait_ready(machine)
    pid = machine.run("systemctl", "show", "-P", "MainPID", "mycoswarmd").out
    before = len(logged(machine, RELOADED)), len(logged(machine, BROKEN))
    machine.run("systemctl", "reload", "mycoswarmd")
    machine.wait_until(f"[ $(journalctl -o cat MESSAGE_ID={RELOADED} | wc -l) -gt {before[0]} ]")
    policy = machine.run("cat", "/etc/mycoswarm/policy.toml").out
    machine.write("/etc/mycoswarm/policy.toml", "schema = nonsense")
    try:
        assert machine.run("systemctl", "reload", "mycoswarmd", check=False).code == 1
        machine.wait_until(f"[ $(journalctl -o cat MESSAGE_ID={BROKEN} | wc -l) -gt {before[1]} ]")
    finally:
        machine.write("/etc/mycoswarm/policy.toml", policy)
    machine.run("systemctl", "reload", "mycoswarmd")
    machine.wait_until('[ "$(systemctl is-active mycoswarmd)" = active ]')
    assert machine.run("systemctl", "show", "-P", "MainPID", "mycoswarmd").out == pid


def test_a_hung_node_is_started_anew(fresh: Fresh, suite: str) -> None:
    machine, _ = fresh[suite]
    wait_ready(machine)
    pid = machine.run("systemctl", "show", "-P", "MainPID", "mycoswarmd").out.strip()
    machine.run("kill", "-STOP", pid)
    machine.wait_until(
        f'[ "$(systemctl show -P MainPID mycoswarmd)" != {pid} ] && mycoswarmctl status', within_s=300
    )


def test_a_socket_of_an_outpost_that_is_made_anew_is_found(fresh: Fresh, suite: str) -> None:
    """The node sees the directory, not the sockets of the moment in which it started."""
    machine, _ = fresh[suite]
    wait_ready(machine)
    look = "systemctl show -P MainPID mycoswarmd; cd /run/mycoswarm-outposts; stat -c %i lan.sock signer.sock"
    before = machine.sh(look).out.split()
    machine.sh("cd /; systemctl restart mycoswarm-lan.socket mycoswarm-signer.socket mycoswarm-task.socket")
    after = machine.sh(look).out.split()
    assert after[0] == before[0]
    assert {*before[1:]}.isdisjoint(after[1:])
    machine.run("sleep", "2.1")  # so long a proof is fresh
    proved(machine, "core", "lan", "signer")


def test_with_a_network_of_its_own_it_does_not_start_and_says_why(fresh: Fresh, suite: str) -> None:
    machine, _ = fresh[suite]
    drop_in = "/run/systemd/system/mycoswarmd.service.d/open.conf"
    machine.sh(f"mkdir -p $(dirname {drop_in})")
    machine.write(drop_in, "[Service]\nRestrictAddressFamilies=AF_UNIX AF_INET\n")
    try:
        machine.sh("systemctl daemon-reload; systemctl restart mycoswarmd", check=False)
        assert machine.run("systemctl", "is-active", "mycoswarmd", check=False).out != "active\n"
        machine.wait_until("journalctl -b -u mycoswarmd -n 20 | grep -qF '(has-network)'")
    finally:
        machine.sh(f"rm {drop_in}; systemctl daemon-reload; systemctl restart mycoswarmd")
    wait_ready(machine)
