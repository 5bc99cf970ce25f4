"""The machines of the appliance tests: booted once for the session, where root and systemd-nspawn are there."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.appliance.images import image
from tests.appliance.machines import Lab, lab

HERE = Path(__file__).parent
_PROGRAMS = ("systemd-nspawn", "mmdebstrap", "ip", "nsenter", "tcpdump")


def _why_not() -> str | None:
    """Say why no machine can be booted here, if so."""
    if os.geteuid() != 0:
        return "the appliance tests boot machines: root is needed"
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"the appliance tests boot machines: missing {' '.join(missing)}"
    return None


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep all tests of this directory in one process, and skip them where no machine can be booted."""
    why = _why_not()
    for item in items:
        if item.path.parent != HERE:
            continue
        item.add_marker(pytest.mark.xdist_group("appliance"))
        if why is not None:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def appliance_lab() -> Iterator[Lab]:
    """A switch without machines."""
    with lab() as opened:
        yield opened


@pytest.fixture(scope="session")
def trixie() -> Path:
    """The root of a Debian 13 image."""
    return image("trixie")


@pytest.fixture(scope="session")
def bookworm() -> Path:
    """The root of a Debian 12 image."""
    return image("bookworm")
