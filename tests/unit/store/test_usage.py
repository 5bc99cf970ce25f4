"""Counters: exact under concurrency, kept over a restart, old windows forgotten."""

import asyncio
from pathlib import Path

import pytest

from mycoswarmd.errors import LocalProtocolError
from mycoswarmd.store.db import Database
from mycoswarmd.store.usage import WINDOWS_KEPT, SqliteUsageStore


async def test_a_counter_adds_up_within_its_window_also_after_a_restart(db: Database, path: Path) -> None:
    store = SqliteUsageStore(db)
    assert await store.read("tokens", window=1) == 0
    assert await store.add("tokens", window=1, amount=5) == 5
    assert await store.add("tokens", window=1, amount=0) == 5
    assert await store.add("tokens", window=2, amount=7) == 7
    assert await store.add("requests", window=1, amount=1) == 1
    await db.close()
    again = Database(path)
    await again.open()
    assert await SqliteUsageStore(again).add("tokens", window=1, amount=2) == 7
    assert await SqliteUsageStore(again).read("tokens", window=2) == 7
    await again.close()


async def test_no_addition_is_lost(db: Database) -> None:
    store, totals = SqliteUsageStore(db), []

    async def add() -> None:
        totals.append(await store.add("tokens", window=1, amount=3))

    async with asyncio.TaskGroup() as group:
        for _ in range(50):
            group.create_task(add())
    assert sorted(totals) == [3 * n for n in range(1, 51)]


async def test_old_windows_are_forgotten(db: Database) -> None:
    store = SqliteUsageStore(db)
    await store.add("tokens", window=1, amount=5)
    await store.add("tokens", window=1 + WINDOWS_KEPT, amount=5)
    assert await store.read("tokens", window=1) == 5
    await store.add("tokens", window=2 + WINDOWS_KEPT, amount=5)
    assert await store.read("tokens", window=1) == 0


async def test_nothing_is_given_back(db: Database) -> None:
    with pytest.raises(LocalProtocolError, match="bad-amount"):
        await SqliteUsageStore(db).add("tokens", window=1, amount=-1)
