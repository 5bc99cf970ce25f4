"""API keys: looked up in memory, revoked at once, never stored in the clear."""

import asyncio
import sqlite3
import threading
from collections.abc import Coroutine
from itertools import count
from typing import Any

import pytest

from mycoswarmd.errors import BadRequest, Conflict, NotFound, StoreError
from mycoswarmd.store.db import Database
from mycoswarmd.store.keys import SqliteKeyStore

ONE, TWO = "1" * 64, "2" * 64


async def make_store(db: Database) -> SqliteKeyStore:
    ticks = count(500)
    store = SqliteKeyStore(db, now_ms=lambda: next(ticks))
    await store.load()
    return store


async def test_a_key_is_found_by_its_hash_also_after_a_restart(db: Database) -> None:
    store = await make_store(db)
    row = await store.create(key_id="k-1", name="laptop", secret_sha256=ONE, now_ms=5)
    assert (row.name, row.created_at_ms, row.last_used_at_ms, row.revoked_at_ms) == ("laptop", 5, None, None)
    for each in (store, await make_store(db)):
        assert each.lookup(ONE) == row
        assert each.lookup(TWO) is None


@pytest.mark.parametrize("reference", ["laptop", "k-1"])
async def test_a_revoked_key_is_refused_at_once_and_for_ever(db: Database, reference: str) -> None:
    store = await make_store(db)
    await store.create(key_id="k-1", name="laptop", secret_sha256=ONE, now_ms=5)
    await store.create(key_id="k-2", name="phone", secret_sha256=TWO, now_ms=5)
    assert (await store.revoke(reference, now_ms=9)).revoked_at_ms == 9
    for each in (store, await make_store(db)):
        assert each.lookup(ONE) is None
        assert each.lookup(TWO) is not None
    for again in (reference, "nobody"):
        with pytest.raises(NotFound, match="unknown-key"):
            await store.revoke(again, now_ms=10)
    assert [(row.id, row.revoked_at_ms) for row in await store.list()] == [("k-1", 9), ("k-2", None)]


async def cancelled_once_submitted(db: Database, call: Coroutine[Any, Any, object]) -> None:
    """Start a call and cancel it when it waits for the database, as a client that hangs up does."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(call)
        await asyncio.sleep(0)
        assert task.cancel()
    await db.run(lambda _: None)  # comes after it


async def test_a_key_is_revoked_also_when_nobody_waits_for_the_answer(db: Database) -> None:
    store = await make_store(db)
    await store.create(key_id="k-1", name="laptop", secret_sha256=ONE, now_ms=5)
    await cancelled_once_submitted(db, store.revoke("laptop", now_ms=9))
    assert [row.revoked_at_ms for row in await store.list()] == [9]
    assert store.lookup(ONE) is None


async def test_memory_follows_the_disk_when_nobody_waits_for_the_answers(db: Database) -> None:
    store = await make_store(db)
    await cancelled_once_submitted(db, store.create(key_id="k-1", name="a", secret_sha256=ONE, now_ms=5))
    assert [row.id for row in await store.list()] == ["k-1"]
    assert store.lookup(ONE) is not None
    # Both in one transaction: the key that was revoked last must not come back to life.
    async with asyncio.TaskGroup() as group:
        group.create_task(store.create(key_id="k-2", name="b", secret_sha256=TWO, now_ms=6))
        group.create_task(store.revoke("b", now_ms=7))
    assert store.lookup(TWO) is None


async def test_a_revocation_that_could_not_be_written_is_on_the_closed_side(db: Database) -> None:
    store = await make_store(db)
    await store.create(key_id="k-1", name="laptop", secret_sha256=ONE, now_ms=5)

    entered, release = threading.Event(), threading.Event()

    def hold(_: sqlite3.Connection) -> None:
        entered.set()
        assert release.wait(60)

    def spoil(connection: sqlite3.Connection) -> None:
        """Make the commit of the whole transaction fail."""
        connection.execute("PRAGMA defer_foreign_keys = ON")
        connection.execute(
            "INSERT INTO events (task_id, seq, at_ms, attempt, kind, data) VALUES ('none', 1, 0, 1, '', '')"
        )

    failures: list[str] = []

    async def caught(call: Coroutine[Any, Any, object]) -> None:
        try:
            await call
        except StoreError as exc:
            failures.append(exc.code)

    async with asyncio.TaskGroup() as group:
        group.create_task(db.run(hold))  # so that the next three become one transaction
        while not entered.is_set():
            await asyncio.sleep(0.001)
        group.create_task(caught(store.revoke("laptop", now_ms=9)))
        group.create_task(caught(store.create(key_id="k-2", name="phone", secret_sha256=TWO, now_ms=9)))
        group.create_task(caught(db.run(spoil)))
        await asyncio.sleep(0)
        release.set()
    assert len(failures) == 3
    assert store.lookup(ONE) is store.lookup(TWO) is None
    await store.revoke("laptop", now_ms=10)  # once the disk is well again


async def test_a_name_is_used_once_at_a_time(db: Database) -> None:
    store = await make_store(db)
    await store.create(key_id="k-1", name="laptop", secret_sha256=ONE, now_ms=5)
    with pytest.raises(Conflict, match="key-exists"):
        await store.create(key_id="k-2", name="laptop", secret_sha256=TWO, now_ms=6)
    assert store.lookup(TWO) is None
    await store.revoke("laptop", now_ms=7)
    await store.create(key_id="k-2", name="laptop", secret_sha256=TWO, now_ms=8)
    assert (await store.revoke("laptop", now_ms=9)).id == "k-2"


@pytest.mark.parametrize("name", ["", "x" * 65, "two\nlines", "\x1b[31m"])
async def test_a_name_is_short_and_printable(db: Database, name: str) -> None:
    with pytest.raises(BadRequest, match="bad-key-name"):
        await (await make_store(db)).create(key_id="k", name=name, secret_sha256=ONE, now_ms=1)


async def test_keys_are_bounded(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mycoswarmd.store.keys.MAX_LIVE_KEYS", 1)
    store = await make_store(db)
    await store.create(key_id="k-1", name="a", secret_sha256=ONE, now_ms=5)
    with pytest.raises(Conflict, match="too-many-keys"):
        await store.create(key_id="k-2", name="b", secret_sha256=TWO, now_ms=5)


async def test_the_last_use_is_listed_and_kept(db: Database) -> None:
    store = await make_store(db)
    await store.create(key_id="k-1", name="laptop", secret_sha256=ONE, now_ms=5)
    for _ in range(3):
        assert store.lookup(ONE) is not None
    assert [row.last_used_at_ms for row in await store.list()] == [502]
    assert [row.last_used_at_ms for row in await (await make_store(db)).list()] == [502]


async def test_the_last_use_is_written_without_anybody_asking(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mycoswarmd.store.keys.USED_AFTER_S", 0.01)
    store = await make_store(db)
    await store.create(key_id="k-1", name="laptop", secret_sha256=ONE, now_ms=5)

    async def written() -> object:
        query = "SELECT last_used_at_ms FROM keys"
        return await db.read(lambda connection: connection.execute(query).fetchone()[0])

    async with asyncio.TaskGroup() as group:
        runner = group.create_task(store.run())
        for expected in (500, 501):
            store.lookup(ONE)
            async with asyncio.timeout(60):
                while await written() != expected:
                    await asyncio.sleep(0.005)
        runner.cancel()
