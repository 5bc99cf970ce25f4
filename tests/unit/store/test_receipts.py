"""The receipt log: chained at once, durable when asked, refused while the disk refuses, and verified."""

import asyncio
import sqlite3
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mycoswarmd.core.receipts import GENESIS
from mycoswarmd.errors import BadRequest, NotFound, StoreError
from mycoswarmd.flow.ports import Receipt
from mycoswarmd.store.db import Database
from mycoswarmd.store.receipts import SqliteReceiptLog


def make_log(db: Database) -> SqliteReceiptLog:
    ticks = count(1_000)
    return SqliteReceiptLog(db, now_ms=lambda: next(ticks))


@pytest.fixture
async def log(db: Database) -> SqliteReceiptLog:
    made = make_log(db)
    await made.load()
    return made


async def on_disk(db: Database) -> int:
    return await db.read(lambda c: int(c.execute("SELECT count(*) FROM receipts").fetchone()[0]))


async def test_a_record_is_chained_at_once_and_on_disk_when_durable(
    log: SqliteReceiptLog, db: Database
) -> None:
    first = log.append("decision", {"decision": "allow"})
    second = log.append("outcome", {"of": first.id})
    assert (first.seq, second.seq) == (1, 2)
    assert first.id == f"1-{first.sha256[:8]}"
    assert await on_disk(db) == 0
    await log.durable(first)
    assert await on_disk(db) == 2  # the flush takes all along
    await log.durable(second)
    rows = await log.tail(after=0, limit=10)
    assert [(row.id, row.kind, row.body, row.at_ms) for row in rows] == [
        (first.id, "decision", {"decision": "allow"}, 1_000),
        (second.id, "outcome", {"of": first.id}, 1_001),
    ]
    assert (rows[0].prev_sha256, rows[1].prev_sha256) == (GENESIS, first.sha256)


async def test_the_chain_goes_on_after_a_restart(log: SqliteReceiptLog, db: Database) -> None:
    await log.durable(log.append("decision", {"n": 1}))
    again = make_log(db)
    await again.load()
    assert await again.head() == await log.head()
    await again.durable(again.append("decision", {"n": 2}))
    assert (await again.verify()).count == 2


async def test_records_are_on_disk_soon_without_anybody_waiting(log: SqliteReceiptLog, db: Database) -> None:
    async with asyncio.TaskGroup() as group:
        runner = group.create_task(log.run())
        log.append("outcome", {"n": 1})
        async with asyncio.timeout(60):
            while await on_disk(db) < 1:
                await asyncio.sleep(0.005)
        log.append("outcome", {"n": 2})
        async with asyncio.timeout(60):
            while await on_disk(db) < 2:
                await asyncio.sleep(0.005)
        runner.cancel()


async def test_many_waiters_share_a_flush(log: SqliteReceiptLog, db: Database, path: Path) -> None:
    receipts = [log.append("decision", {"n": n}) for n in range(100)]
    async with asyncio.TaskGroup() as group:
        for receipt in receipts:
            group.create_task(log.durable(receipt))
    assert await on_disk(db) == 100
    # One commit is a few pages, a hundred would be at least a hundred.
    assert path.with_name(f"{path.name}-wal").stat().st_size < 50 * 4096


async def test_a_cancelled_waiter_loses_and_repeats_nothing(log: SqliteReceiptLog, db: Database) -> None:
    for n in range(30):
        receipt = log.append("decision", {"n": n})
        async with asyncio.TaskGroup() as group:
            waiter = group.create_task(log.durable(receipt))
            for _ in range(n % 4):
                await asyncio.sleep(0)
            waiter.cancel()
    last = log.append("decision", {"last": True})
    await log.durable(last)
    assert await on_disk(db) == 31
    assert (await log.verify(last.sha256)).ok


async def test_a_record_is_found_by_number_and_by_id(log: SqliteReceiptLog) -> None:
    receipts = [log.append("decision", {"n": n}) for n in range(3)]
    assert (await log.get("2")).body == {"n": 1}
    assert (await log.get(receipts[1].id)).sha256 == receipts[1].sha256
    for reference in ("0", "4", "2-00000000", "x", "", "-1", "2-", "9" * 30):
        with pytest.raises(NotFound, match="unknown-receipt"):
            await log.get(reference)


async def test_a_page_is_bounded_and_an_empty_log_has_a_head(log: SqliteReceiptLog) -> None:
    assert await log.head() == Receipt(0, "0-00000000", GENESIS)
    assert (await log.verify()).ok
    for n in range(5):
        log.append("decision", {"n": n})
    assert [row.seq for row in await log.tail(after=1, limit=2)] == [2, 3]
    assert await log.tail(after=0, limit=-1) == []


# -- tampering ------------------------------------------------------------------------------------


def change(c: sqlite3.Connection, seq: int) -> None:
    c.execute("UPDATE receipts SET body = ? WHERE seq = ?", (b'{"n":"forged"}', seq))


def redate(c: sqlite3.Connection, seq: int) -> None:
    c.execute("UPDATE receipts SET at_ms = at_ms + 1 WHERE seq = ?", (seq,))


def remove(c: sqlite3.Connection, seq: int) -> None:
    c.execute("DELETE FROM receipts WHERE seq = ?", (seq,))


def swap(c: sqlite3.Connection, seq: int) -> None:
    other = 1 if seq != 1 else 2
    for old, new in ((seq, -1), (other, seq), (-1, other)):
        c.execute("UPDATE receipts SET seq = ? WHERE seq = ?", (new, old))


def close_the_hole(c: sqlite3.Connection, seq: int) -> None:
    c.execute("DELETE FROM receipts WHERE seq = ?", (seq,))
    c.execute("UPDATE receipts SET seq = -seq WHERE seq > ?", (seq,))
    c.execute("UPDATE receipts SET seq = -seq - 1 WHERE seq < 0")


def insert(c: sqlite3.Connection, seq: int) -> None:
    c.execute("UPDATE receipts SET seq = -seq WHERE seq > ?", (seq,))
    c.execute("UPDATE receipts SET seq = -seq + 1 WHERE seq < 0")
    c.execute(
        "INSERT INTO receipts SELECT ?, at_ms, kind, body, prev_sha256, sha256 FROM receipts WHERE seq = ?",
        (seq + 1, seq),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([change, redate, remove, swap, close_the_hole, insert]),
    st.integers(2, 12),
    st.data(),
)
def test_tampering_with_the_file_is_found_and_placed(
    tmp_path_factory: pytest.TempPathFactory,
    tamper: Callable[[sqlite3.Connection, int], None],
    records: int,
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.mktemp("log") / "state" / "mycoswarm.db"
    seq = data.draw(st.integers(1, records))

    async def fill() -> str:
        db = Database(path)
        await db.open()
        log = make_log(db)
        await log.load()
        for n in range(records):
            log.append("decision", {"n": n})
        assert (await log.verify()).ok
        head = (await log.head()).sha256
        await db.close()
        return head

    async def check(head: str | None) -> tuple[bool, int | None]:
        db = Database(path)
        await db.open()
        log = make_log(db)
        await log.load()
        result = await log.verify(head)
        await db.close()
        return result.ok, result.bad_seq

    head = asyncio.run(fill())
    with sqlite3.connect(path) as connection:
        for trigger in ("receipts_no_update", "receipts_no_delete"):
            connection.execute(f"DROP TRIGGER {trigger}")
        tamper(connection, seq)
    connection.close()
    ok, bad_seq = asyncio.run(check(None))
    end_is_gone = tamper in {remove, close_the_hole} and seq == records
    assert ok == end_is_gone  # nothing but a copied head shows that
    if not ok:
        first = min(seq, 1 if seq != 1 else 2) if tamper is swap else seq
        assert bad_seq in {first, first + 1}
    assert asyncio.run(check(head))[0] is False


async def test_the_running_node_notices_an_end_that_was_cut_off(log: SqliteReceiptLog, db: Database) -> None:
    for n in range(5):
        log.append("decision", {"n": n})
    await log.head()

    def cut(connection: sqlite3.Connection) -> None:
        connection.execute("DROP TRIGGER receipts_no_delete")
        remove(connection, 5)

    await db.run(cut)
    result = await log.verify()
    assert (result.ok, result.bad_seq, result.reason[:7]) == (False, 5, "cut-off")
    receipt = log.append("decision", {"n": "next"})
    with pytest.raises(StoreError, match="ends with another record"):
        await log.durable(receipt)
    with pytest.raises(StoreError, match="receipts-unwritable"):
        log.append("decision", {})


async def test_the_running_node_notices_a_record_it_did_not_write(
    log: SqliteReceiptLog, db: Database
) -> None:
    await log.durable(log.append("decision", {}))
    foreign = "INSERT INTO receipts SELECT 2, at_ms, kind, body, prev_sha256, sha256 FROM receipts"
    await db.run(executing(foreign))
    result = await log.verify()
    assert (result.ok, result.bad_seq, result.reason[:9]) == (False, 2, "displaced")


async def test_the_program_itself_cannot_change_a_record(log: SqliteReceiptLog, db: Database) -> None:
    await log.durable(log.append("decision", {}))
    for statement in ("UPDATE receipts SET at_ms = 1", "DELETE FROM receipts"):
        with pytest.raises(StoreError, match="append only"):
            await db.run(executing(statement))


async def test_a_head_that_is_none_is_refused(log: SqliteReceiptLog) -> None:
    with pytest.raises(BadRequest, match="bad-head"):
        await log.verify("not a head")


def executing(statement: str) -> Callable[[sqlite3.Connection], None]:
    def fn(connection: sqlite3.Connection) -> None:
        connection.execute(statement)

    return fn


async def healed(log: SqliteReceiptLog) -> None:
    async with asyncio.timeout(60):
        while log.problem is not None:
            await asyncio.sleep(0.05)


async def append_many(log: SqliteReceiptLog) -> None:
    for n in range(1_000):
        await log.durable(log.append("decision", {"n": n, "fill": "x" * 4_000}))


# -- a full disk ----------------------------------------------------------------------------------


async def test_without_room_there_is_no_receipt_and_with_room_none_is_missing(small_disk: Any) -> None:
    db = Database(small_disk.mount / "state" / "mycoswarm.db")
    await db.open()
    log = make_log(db)
    await log.load()
    await log.durable(log.append("decision", {"n": "first"}))
    small_disk.fill()
    async with asyncio.TaskGroup() as group:
        runner = group.create_task(log.run())
        with pytest.raises(StoreError) as caught:
            await append_many(log)
        assert caught.value.code == "receipts-unwritable"
        assert "full" in caught.value.message
        with pytest.raises(StoreError, match="receipts-unwritable"):
            log.append("decision", {})
        assert log.problem is not None
        small_disk.empty()
        await healed(log)
        await log.durable(log.append("decision", {"n": "last"}))
        runner.cancel()
    head = await log.head()
    assert (await log.verify(head.sha256)).count == head.seq
    assert (await log.tail(after=head.seq - 1, limit=1))[0].body == {"n": "last"}
    await db.close()
