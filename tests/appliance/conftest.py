"""The machines of the appliance tests: booted once, where root and systemd-nspawn are there."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.appliance.images import image
from tests.appliance.machines import Lab, Machine, lab
from tests.appliance.nodes import (
    Swarm,
    boot_with_engine,
    build_deb,
    ctl,
    enroll,
    in_parallel,
    install,
    installed_layer,
    invite,
    wait_ready,
)

_PROGRAMS = ("systemd-nspawn", "mmdebstrap", "ip", "nsenter", "tcpdump")


def _why_not() -> str | None:
    """Say why no machine can be booted here, if so."""
    if os.geteuid() != 0:
        return "the appliance tests boot machines: root is needed"
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"the appliance tests boot machines: missing {' '.join(missing)}"
    return None


_WHY_NOT = _why_not()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keep tests that share machines in one process, and skip them where no machine can be booted.

    At collection, not in pytest_collection_modifyitems: xdist's hook of that name has read them by then.
    """
    # Machines with a kernel of their own are shared with no other file, and take long.
    is_apart = item.path.name == "test_virtual.py"
    item.add_marker(pytest.mark.xdist_group("virtual" if is_apart else "appliance"))
    if _WHY_NOT is not None:
        item.add_marker(pytest.mark.skip(reason=_WHY_NOT))


class Images:
    """What machines are made of: images of both releases, the package, layers with the package installed."""

    def __init__(self, opened: Lab) -> None:
        # The first machines of a test run pay for all that: what can be done side by side is.
        self.trixie, self.bookworm, self.deb = in_parallel(
            lambda: image("trixie"), lambda: image("bookworm"), lambda: build_deb(opened.home / "deb")
        )
        with_package = in_parallel(
            *(
                lambda suite=suite, root=root: installed_layer(opened, root, self.deb, suite=suite)
                for suite, root in (("trixie", self.trixie), ("bookworm", self.bookworm))
            )
        )
        self.node_trixie: tuple[Path, ...] = (with_package[0], self.trixie)
        self.node_bookworm: tuple[Path, ...] = (with_package[1], self.bookworm)


@pytest.fixture(scope="session")
def appliance_lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A switch without machines."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        apart = [item.nodeid for item in request.session.items if "appliance/" in item.nodeid]
        assert all("@" in name for name in apart), (
            "pytest-xdist does not group: machines would be shared by nobody"
        )
    with lab() as opened:
        yield opened


@pytest.fixture(scope="session")
def images(appliance_lab: Lab) -> Images:
    """Images of both releases, without and with the package."""
    return Images(appliance_lab)


@pytest.fixture(scope="session")
def fresh(appliance_lab: Lab, images: Images) -> dict[str, tuple[Machine, str]]:
    """One machine of each release with the package just installed by apt, and what apt said."""
    made = {
        "trixie": appliance_lab.machine("fresh13", images.trixie),
        "bookworm": appliance_lab.machine("fresh12", images.bookworm),
    }

    def prepare(machine: Machine) -> tuple[Machine, str]:
        machine.wait_booted()
        return machine, install(machine, images.deb).out

    done = in_parallel(*(lambda machine=machine: prepare(machine) for machine in made.values()))
    return dict(zip(made, done, strict=True))


@pytest.fixture(scope="session")
def swarm(appliance_lab: Lab, images: Images) -> Swarm:
    """Three nodes of one swarm, enrolled over mDNS; Debian 12 and 13 mixed; `two` has an engine."""
    made = Swarm(
        appliance_lab.machine("one", *images.node_trixie),
        appliance_lab.machine("two", *images.node_bookworm),
        appliance_lab.machine("three", *images.node_trixie),
    )

    def prepare(machine: Machine) -> None:
        if machine is made.two:
            boot_with_engine(machine)
        machine.wait_booted()
        wait_ready(machine)

    in_parallel(*(lambda machine=machine: prepare(machine) for machine in made))
    ctl(made.one, "init", "--name", "home", "--yes-i-wrote-it-down")
    for newcomer in (made.two, made.three):
        enroll(newcomer, invite(made.one, newcomer.name))
    return made
