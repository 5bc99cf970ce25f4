"""An open database in a directory of its own, and a disk that can be filled."""

import errno
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mycoswarmd.store.db import Database


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "mycoswarm.db"


@pytest.fixture
async def db(path: Path) -> AsyncIterator[Database]:
    database = Database(path)
    await database.open()
    yield database
    await database.close()


class SmallDisk:
    """A file system of one MiB."""

    def __init__(self, mount: Path) -> None:
        self.mount = mount
        self._ballast = mount / "ballast"

    def fill(self) -> None:
        with self._ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError as exc:
                if exc.errno != errno.ENOSPC:
                    raise

    def empty(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if os.geteuid() != 0 and "CI" not in os.environ:
        pytest.skip("needs root to mount a small file system")
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], check=True)
    yield SmallDisk(mount)
    subprocess.run(["umount", mount], check=True)
