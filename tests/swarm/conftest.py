"""Fixtures of the laboratory. Where it cannot be, a person's run skips; CI and root fail."""

import os
from collections.abc import Iterator

import pytest

from tests.swarm.lab import Lab, why_not


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Return an empty laboratory of this test's own."""
    with open_lab() as laboratory:
        yield laboratory


def open_lab() -> Lab:
    """Make a laboratory, or skip, or fail."""
    if reason := why_not():
        if "CI" in os.environ or os.geteuid() == 0:
            pytest.fail(reason)
        pytest.skip(reason)
    return Lab()
