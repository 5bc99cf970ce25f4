"""An open database in a directory of its own."""

from collections.abc import AsyncIterator
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
