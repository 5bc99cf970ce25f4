"""A named thread that owns one SQLite connection and works off what callers hand it.

Everything that waits is taken at once: the writer turns it into one transaction, and so one fsync
serves many callers. A caller that is cancelled loses its answer, never the thread, and its function
runs all the same.
"""

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar

from mycoswarmd.errors import StoreError, Unavailable

T = TypeVar("T")

# A thousand waiting callers at 2,000 commits a second (one each, the worst case) wait half a second.
MAX_WAITING = 1_000


class Job(Generic[T]):
    """One caller's function and where its outcome goes.

    Args:
        fn: called in the thread.
        settled: called in the caller's loop with the failure, if any, even if the caller is gone; jobs
            of one loop settle in the order in which they were submitted.
    """

    __slots__ = ("_fn", "_loop", "_result", "_settled", "failure", "future")

    def __init__(
        self,
        fn: Callable[[sqlite3.Connection], T],
        *,
        settled: Callable[[BaseException | None], None] | None = None,
    ) -> None:
        self._fn = fn
        self._settled = settled
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[T] = self._loop.create_future()
        self._result: T
        self.failure: BaseException | None = None

    def perform(self, connection: sqlite3.Connection) -> None:
        """Call the function (in the thread)."""
        self._result = self._fn(connection)

    def deliver(self) -> None:
        """Hand the outcome to the waiting caller (from the thread)."""
        try:
            self._loop.call_soon_threadsafe(self._settle)
        except RuntimeError:
            return  # the caller's loop is closed: nobody waits

    def _settle(self) -> None:
        if self._settled is not None:
            self._settled(self.failure)
        if self.future.done():
            return  # cancelled meanwhile
        if self.failure is not None:
            self.future.set_exception(self.failure)
        else:
            self.future.set_result(self._result)


class Attempt:
    """Catches whatever one caller's function raises, so that it concerns that caller alone."""

    __slots__ = ("failure",)

    def __init__(self) -> None:
        self.failure: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> Literal[True]:
        self.failure = exc
        return True


class Worker:
    """The thread and its bounded queue.

    Args:
        name: of the thread, seen in `ps -T` and in py-spy.
        connection: used by the thread alone, and closed by it at the end.
        work: performs and settles a batch; must not raise.
    """

    def __init__(
        self,
        name: str,
        connection: sqlite3.Connection,
        work: Callable[[sqlite3.Connection, Sequence[Job[Any]]], None],
    ) -> None:
        self._connection = connection
        self._work = work
        self._waiting: list[Job[Any]] = []
        self._closing = False
        self._changed = threading.Condition()
        # A daemon thread: a stop is a kill, correctness needs no shut-down.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Job[Any]) -> None:
        """Queue a job; Unavailable("store-busy") when too many wait."""
        with self._changed:
            if self._closing:
                raise StoreError("store-closed", "cannot use the database: it is closed")
            if len(self._waiting) >= MAX_WAITING:
                raise Unavailable(
                    "store-busy",
                    f"cannot reach the database: {MAX_WAITING:,} callers wait already",
                    hint="the disk is slow or the node is overloaded; try again",
                )
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Work off what waits, close the connection and end the thread; blocks until then."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while batch := self._take():
                self._work(self._connection, batch)
        finally:
            with self._changed:
                self._closing = True
                left, self._waiting = self._waiting, []
            for job in left:
                job.failure = StoreError("store-closed", "cannot use the database: its thread has ended")
                job.deliver()
            self._connection.close()

    def _take(self) -> list[Job[Any]]:
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            batch, self._waiting = self._waiting, []
            return batch
