import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    """The workspace `tmp_path/w`, open."""
    (tmp_path / "w").mkdir()
    fd = os.open(tmp_path / "w", os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)
