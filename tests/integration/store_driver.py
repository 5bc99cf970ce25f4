"""A process to be killed: works through a scenario and prints each operation once it is acknowledged."""

import argparse
import asyncio
import json
import os
from itertools import count
from pathlib import Path

from mycoswarmd.core.tasks import Task, TaskSpec, TaskState
from mycoswarmd.core.types import Principal, TaskId
from mycoswarmd.store.db import Database
from mycoswarmd.store.receipts import SqliteReceiptLog
from mycoswarmd.store.tasks import SqliteTaskStore

TASKS = 5


def say(**line: object) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")


def say_task(operation: str, task: Task, **more: object) -> None:
    say(op=operation, task=task.id, state=task.state.value, attempt=task.attempt, **more)


class Scenario:
    """Enqueues, claims, notes, moves; every third task goes through a question, every fourth a retry."""

    def __init__(self, store: SqliteTaskStore, log: SqliteReceiptLog, name: str) -> None:
        self.store = store
        self.log = log
        self.name = name

    async def one(self, n: int) -> None:
        spec = TaskSpec(
            prompt="p" * 100,
            agent="a",
            label="public",
            submitter=Principal(user="u"),
            repeatable=n % 2 == 0,
            idempotency_key=f"{self.name}-{n}",
        )
        task, is_new = await self.store.enqueue(
            spec, task_id=TaskId(f"{self.name}-{n}"), now_ms=1, max_open=10_000
        )
        assert is_new
        say_task("enqueue", task)
        claimed = await self.store.claim(now_ms=10**9)
        assert claimed is not None
        say_task("claim", claimed)
        await self.receipt(claimed)
        await self.work(claimed, n)

    async def work(self, task: Task, n: int) -> None:
        await self.store.note(
            task.id, attempt=task.attempt, now_ms=2, kind="model", data={"text": "t" * 500}, tokens=1
        )
        if n % 3 == 0:
            say_task("wait", await self.move(task, TaskState.WAITING))
            say_task("resume", await self.move(task, TaskState.RUNNING))
        if n % 4 == 0 and task.attempt == 1:
            say_task("requeue", await self.move(task, TaskState.QUEUED))
            return
        summary = f"the result of {task.id} in attempt {task.attempt}"
        done = await self.store.move(
            task.id, attempt=task.attempt, to=TaskState.SUCCEEDED, now_ms=3, summary=summary
        )
        say_task("finish", done, summary=summary)

    async def move(self, task: Task, to: TaskState) -> Task:
        return await self.store.move(task.id, attempt=task.attempt, to=to, now_ms=3)

    async def receipt(self, task: Task) -> None:
        receipt = self.log.append("decision", {"task": task.id, "decision": "allow"})
        await self.log.durable(receipt)
        say(op="receipt", seq=receipt.seq, sha256=receipt.sha256)


async def main(options: argparse.Namespace) -> None:
    db = Database(options.path)
    await db.open()
    store, log = SqliteTaskStore(db, len), SqliteReceiptLog(db, now_ms=lambda: 1)
    await log.load()
    await store.recover(now_ms=1)
    numbers = count() if options.for_ever else iter(range(TASKS))

    async def caller(name: str) -> None:
        scenario = Scenario(store, log, name)
        for n in numbers:
            await scenario.one(n)

    async with asyncio.TaskGroup() as group:
        for n in range(options.callers):
            group.create_task(caller(f"{options.name}-{n}"))
    await db.close()
    say(op="done")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--for-ever", action="store_true")
    parser.add_argument("--callers", type=int, default=1)
    parser.add_argument("--name", default="t")
    asyncio.run(main(parser.parse_args()))
