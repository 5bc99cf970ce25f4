"""The tests that Debian's own machinery would run (packaging/debian/tests), on a machine of ours."""

from pathlib import Path

import pytest

from tests.appliance.conftest import Images
from tests.appliance.machines import Lab
from tests.appliance.nodes import install, wait_ready

TESTS = Path(__file__).parents[2] / "packaging/debian/tests"

pytestmark = pytest.mark.timeout(1200)


def test_every_one_passes_after_an_installation(appliance_lab: Lab, images: Images) -> None:
    stanzas = (TESTS / "control").read_text().split("\n\n")
    order = [line.split()[1] for part in stanzas for line in part.splitlines() if line.startswith("Tests:")]
    assert sorted(order) == sorted(path.name for path in TESTS.iterdir() if path.name != "control")
    machine = appliance_lab.machine("autopkg", images.trixie)
    machine.wait_booted()
    install(machine, images.deb)
    wait_ready(machine)
    for name in order:
        machine.write(f"/root/{name}", (TESTS / name).read_bytes(), mode=0o755)
        ran = machine.run(f"/root/{name}", check=False, timeout_s=600)
        assert ran.code == 0, ran
    machine.pull_plug()
