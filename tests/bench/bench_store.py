"""Durable enqueues a second against bare SQLite commits in the same run, and what one receipt costs.

Bare means: one connection, one thread, WAL, `synchronous=FULL`, one row and one commit each.
"""

import asyncio
import sqlite3
import statistics
import tempfile
import time
from itertools import count
from pathlib import Path

from mycoswarmd.core.tasks import TaskSpec
from mycoswarmd.core.types import Principal, TaskId
from mycoswarmd.store.db import Database
from mycoswarmd.store.receipts import SqliteReceiptLog
from mycoswarmd.store.tasks import SqliteTaskStore

ROUNDS = 5
COMMITS = 500
CALLERS = 64
APPENDS = 5_000
PROMPT = "Summarise the files in this workspace. " * 10
_SPEC = TaskSpec(prompt=PROMPT, agent="scribe", label="public", submitter=Principal(user="bench"))
_BODY = {
    "action": "infer",
    "by": "user:alice",
    "model": "smollm2-135m-instruct",
    "zone": "self",
    "label": "public",
    "decision": "allow",
    "rule": "local-models",
    "policy": "a" * 64,
    "tainted": False,
}


def bare_commits_per_s(directory: Path) -> float:
    """Commit rows one by one and return how many a second."""
    connection = sqlite3.connect(directory / "bare.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE tasks (id TEXT PRIMARY KEY, prompt TEXT)")
    started = time.perf_counter()
    for n in range(COMMITS):
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO tasks VALUES (?, ?)", (f"t-{n}", PROMPT))
        connection.execute("COMMIT")
    took = time.perf_counter() - started
    connection.close()
    return COMMITS / took


async def enqueues_per_s(directory: Path, callers: int) -> float:
    """Enqueue durably from that many callers at once and return how many a second."""
    db = Database(directory / f"state-{callers}" / "mycoswarm.db")
    await db.open()
    store, numbers = SqliteTaskStore(db, len), iter(range(COMMITS))

    async def caller() -> None:
        for n in numbers:
            await store.enqueue(_SPEC, task_id=TaskId(f"t-{n}"), now_ms=1, max_open=COMMITS)

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())
    took = time.perf_counter() - started
    await db.close()
    return COMMITS / took


async def receipt_costs_us(directory: Path) -> tuple[float, float]:
    """Return the microseconds of one append, and of one append that is waited for."""
    db = Database(directory / "receipts" / "mycoswarm.db")
    await db.open()
    ticks = count()
    log = SqliteReceiptLog(db, now_ms=lambda: next(ticks))
    await log.load()
    started = time.perf_counter()
    for _ in range(APPENDS):
        log.append("decision", _BODY)
    append_us = (time.perf_counter() - started) / APPENDS * 1e6
    await log.head()  # flushes
    started = time.perf_counter()
    for _ in range(500):
        await log.durable(log.append("decision", _BODY))
    durable_us = (time.perf_counter() - started) / 500 * 1e6
    await db.close()
    return append_us, durable_us


def bench_store() -> list[tuple[str, float, str, float]]:
    """Measure and return rows of (what, figure, unit, ratio to bare SQLite)."""
    # In the working directory, not in /tmp: a tmpfs has no fsync to wait for.
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
        directory = Path(scratch)
        # In turns, and the median: a disk that others use, too, changes its speed from second to second.
        rounds = []
        for n in range(ROUNDS):
            place = directory / str(n)
            place.mkdir()
            rounds.append(
                (
                    bare_commits_per_s(place),
                    asyncio.run(enqueues_per_s(place, 1)),
                    asyncio.run(enqueues_per_s(place, CALLERS)),
                )
            )
        bare, single, many = (statistics.median(column) for column in zip(*rounds, strict=True))
        append_us, durable_us = asyncio.run(receipt_costs_us(directory))
    return [
        ("bare SQLite commit", bare, "/s", 1.0),
        ("durable enqueue, 1 caller", single, "/s", single / bare),
        (f"durable enqueue, {CALLERS} callers", many, "/s", many / bare),
        ("receipt, append", append_us, "us", append_us * bare / 1e6),
        ("receipt, append and fsync", durable_us, "us", durable_us * bare / 1e6),
    ]


def run(directory: Path) -> None:
    """Print the table."""
    del directory  # a disk is wanted, and the benchmark's own directory may be in memory
    for what, figure, unit, ratio in bench_store():
        print(f"{what:32} {figure:10,.1f} {unit:3} {ratio:8.2f} x bare commit")
