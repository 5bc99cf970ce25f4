import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.ctl.fakenode import FakeNode


@pytest.fixture
def node() -> Iterator[FakeNode]:
    # Not tmp_path: a socket's path has at most 107 bytes.
    with (
        tempfile.TemporaryDirectory(prefix="ctl-") as directory,
        FakeNode(Path(directory) / "s").serving() as running,
    ):
        yield running
