"""A core that asks its outposts too often for a moment finds them again afterwards."""

import pytest

from tests.appliance.machines import Machine

pytestmark = pytest.mark.timeout(1200)
NAMES = ("discovery", "engine", "probe", "signer", "task")
_MANY = 600  # in less than systemd's two seconds; its own limit is 200
_ASK = """
import socket, sys
for _ in range(int(sys.argv[2])):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        try:
            sock.connect(f"/run/mycoswarm-outposts/{sys.argv[1]}.sock")
        except OSError:
            break
# systemd takes them one after the other: once this one has ended, all before it were taken.
with socket.socket(socket.AF_UNIX) as last:
    last.settimeout(120)
    try:
        last.connect(f"/run/mycoswarm-outposts/{sys.argv[1]}.sock")
        last.shutdown(socket.SHUT_WR)
        while last.recv(65536):
            pass
    except OSError as error:
        print(error)
"""
# Its number, and time enough for a slow machine to come to it.
_ITS_LIMIT = "[Socket]\nTriggerLimitIntervalSec=120\nTriggerLimitBurst=200\n"


def _state(machine: Machine, name: str) -> str:
    return machine.run("systemctl", "is-active", f"mycoswarm-{name}.socket", check=False).out.strip()


def _ask(machine: Machine, name: str) -> None:
    machine.run("python3", "-c", _ASK, name, str(_MANY), user="_mycoswarm", timeout_s=300)


def test_sockets_that_are_asked_too_often_are_there_afterwards(fresh: dict[str, tuple[Machine, str]]) -> None:
    """On Debian 12, whose systemd gives such a socket up for good."""
    machine, _ = fresh["bookworm"]
    for name in NAMES:
        _ask(machine, name)
    assert {name: _state(machine, name) for name in NAMES} == dict.fromkeys(NAMES, "active")


def test_control_systemds_own_limit_would_close_them_for_good(fresh: dict[str, tuple[Machine, str]]) -> None:
    machine, _ = fresh["bookworm"]
    dropin = "/run/systemd/system/mycoswarm-probe.socket.d/limit.conf"
    machine.write(dropin, _ITS_LIMIT)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "mycoswarm-probe.socket")
    try:
        _ask(machine, "probe")
        machine.wait_until("systemctl is-failed mycoswarm-probe.socket", within_s=60)
    finally:
        machine.run("rm", dropin)
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "reset-failed", "mycoswarm-probe.socket", check=False)
        machine.run("systemctl", "restart", "mycoswarm-probe.socket")
