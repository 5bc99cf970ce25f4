"""The lab itself: what later tests rely on is real on these machines."""

import pytest

from tests.appliance.conftest import Images
from tests.appliance.machines import OUTSIDE, Lab

pytestmark = pytest.mark.timeout(1200)


def test_a_machine_boots_runs_commands_and_keeps_its_disk_when_the_plug_is_pulled(
    appliance_lab: Lab, images: Images
) -> None:
    machine = appliance_lab.machine("bare", images.trixie)
    assert machine.wait_booted() == "running", machine.run("systemctl", "--failed", check=False)
    assert machine.run("cat", "/proc/1/comm").out == "systemd\n"
    assert machine.run("hostname").out == "bare\n"
    assert machine.run("id", "-un", user="alice").out == "alice\n"
    machine.write("/var/lib/kept", "here\n")
    machine.reboot()
    assert machine.run("cat", "/var/lib/kept").out == "here\n"
    assert not (images.trixie / "var/lib/kept").exists()


def test_address_filters_are_real_on_a_machine_and_the_switch_sees_what_leaves(
    appliance_lab: Lab, images: Images
) -> None:
    machine = appliance_lab.machine("filtered", images.trixie)
    machine.wait_booted()
    send = f"import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('{OUTSIDE}', 9))"
    with machine.captured() as free:
        machine.run("systemd-run", "--quiet", "--wait", "--pipe", "python3", "-c", send)
    assert len(free.to(OUTSIDE)) == 1, free
    with machine.captured() as filtered:
        ran = machine.run(
            "systemd-run",
            "--quiet",
            "--wait",
            "--pipe",
            "-pIPAddressDeny=any",
            "python3",
            "-c",
            send,
            check=False,
        )
    assert "PermissionError" in ran.err, ran
    assert filtered.to(OUTSIDE) == []
