"""The database: one file, one writer thread, one reader thread; acknowledged means fsynced.

1. WAL with `synchronous=FULL`: a commit that returned is on disk (NORMAL may lose the last ones with
   the power). Everything that waits for the writer becomes one transaction, each caller in a savepoint
   of its own; callers hear of it after COMMIT.
2. Reads have a connection and a thread of their own: they see every commit that was acknowledged, and
   wait for no fsync.
3. A damaged file is never written to: it is checked through a read-only connection first. A new one is
   built under another name, so an empty file under the real name is damage, not a fresh start.

Source: https://www.sqlite.org/wal.html, https://www.sqlite.org/howtocorrupt.html
"""

import asyncio
import contextlib
import os
import shlex
import sqlite3
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mycoswarmd.errors import MycoswarmError, StoreError
from mycoswarmd.store.schema import check_version, migrate
from mycoswarmd.store.sqlerrors import CORRUPT_HINT, translate
from mycoswarmd.store.statelock import StateLock
from mycoswarmd.store.worker import Attempt, Job, Worker

T = TypeVar("T")

# Only a person with another program open can hold the database; five seconds of patience, then say so.
BUSY_TIMEOUT_S = 5.0
# The -wal file is merged into the database when it has this many pages of 4 KiB (SQLite's own 1,000 is
# reached every hundred tasks), and one that grew in a burst is cut back at the next reset.
WAL_PAGES = 4_000
WAL_KEEP_BYTES = 16 << 20

_PRAGMAS = (
    "PRAGMA foreign_keys = ON",
    "PRAGMA synchronous = FULL",
    "PRAGMA trusted_schema = OFF",
    "PRAGMA cell_size_check = ON",
    f"PRAGMA wal_autocheckpoint = {WAL_PAGES}",
    f"PRAGMA journal_size_limit = {WAL_KEEP_BYTES}",
)


class Database:
    """The file, its lock and its two threads.

    Args:
        path: the database file; its directory is the state directory, which is made with mode 0700.
        busy_timeout_s: how long to wait for another program's lock.
    """

    def __init__(self, path: Path, *, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        self._path = path
        self._busy_timeout_s = busy_timeout_s
        self._lock: StateLock | None = None
        self._writer: Worker | None = None
        self._reader: Worker | None = None

    @property
    def path(self) -> Path:
        """The database file."""
        return self._path

    async def open(self) -> None:
        """Lock the state directory, check, create or migrate the file, and start the threads.

        Raises:
            StoreError: state-not-private, state-locked, store-corrupt, store-newer, store-io or disk-full.
        """
        await asyncio.to_thread(self._open)

    async def close(self) -> None:
        """Work off what waits and let go of everything. Idempotent."""
        await asyncio.to_thread(self._close)

    async def run(
        self,
        fn: Callable[[sqlite3.Connection], T],
        *,
        settled: Callable[[BaseException | None], None] | None = None,
    ) -> T:
        """Call a function in the writer's thread, in a transaction, and return after its fsync.

        The function runs to its end even when the caller is cancelled. What it raises is raised here,
        and only its own changes are undone. `settled` is called in the caller's loop with the failure,
        if any, before this returns and also when the caller is gone.

        Raises:
            StoreError: disk-full, store-io, store-corrupt: nothing of the transaction was kept.
            Unavailable: store-busy.
        """
        return await self._hand(self._writer, fn, settled)

    async def read(self, fn: Callable[[sqlite3.Connection], T]) -> T:
        """Call a function in the reader's thread, on one consistent snapshot; it cannot write."""
        return await self._hand(self._reader, fn, None)

    async def snapshot(self, path: Path) -> None:
        """Write a consistent copy of the database to a new file that only this user may read."""

        def copy(connection: sqlite3.Connection) -> None:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            target = sqlite3.connect(path, isolation_level=None)
            try:
                connection.backup(target)
                target.execute("PRAGMA journal_mode = DELETE")  # one file, without a log beside it
            finally:
                target.close()

        await self.read(copy)

    async def _hand(
        self,
        worker: Worker | None,
        fn: Callable[[sqlite3.Connection], T],
        settled: Callable[[BaseException | None], None] | None,
    ) -> T:
        if worker is None:
            raise StoreError("store-closed", "cannot use the database: it is not open")
        job = Job(fn, settled=settled)
        worker.submit(job)
        return await job.future

    # -- in a thread: opening and closing ---------------------------------------------------------

    def _open(self) -> None:
        directory = self._path.parent
        try:
            _own_directory(directory)
            self._lock = StateLock(directory)
            self._open_locked()
        except OSError as exc:
            self._close()
            raise StoreError(
                "store-io",
                f"cannot use the state directory {str(directory)!r}: {exc.strerror}",
                hint="it must be a directory of the user that runs mycoswarmd, on a disk with free space",
            ) from exc
        except sqlite3.Error as exc:
            self._close()
            raise translate(exc, str(self._path)) from exc
        except MycoswarmError:
            self._close()
            raise

    def _open_locked(self) -> None:
        if self._path.exists():
            self._check()
        else:
            self._create()
        connection = self._connect()
        try:
            migrate(connection, str(self._path))
        except (sqlite3.Error, MycoswarmError):
            connection.close()
            raise
        reader = self._connect()
        reader.execute("PRAGMA query_only = ON")
        self._writer = Worker("store-writer", connection, self._write)
        self._reader = Worker("store-reader", reader, self._read)

    def _check(self) -> None:
        """Refuse a damaged or newer file before anything can write to it."""
        problem = ""
        if self._path.stat().st_size == 0:
            problem = "it is empty"  # SQLite would take it for a new one
        else:
            connection = sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=ro", uri=True)
            try:
                check_version(connection, str(self._path))
                found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
                problem = "" if found == "ok" else str(found)
            finally:
                connection.close()
        if problem:
            raise StoreError(
                "store-corrupt", f"cannot use the database {str(self._path)!r}: {problem}", hint=CORRUPT_HINT
            )

    def _create(self) -> None:
        """Build a whole database under another name, then rename it: there is never half of one."""
        wal = self._path.with_name(self._path.name + "-wal")
        if wal.exists() and wal.stat().st_size:
            raise StoreError(
                "store-corrupt",
                f"cannot find the database {str(self._path)!r} although its log {wal.name!r} is there",
                hint="put the database back beside it, or move the log away to start without one",
            )
        new = self._path.with_name(self._path.name + ".new")
        for leftover in (new, *(new.with_name(new.name + end) for end in ("-wal", "-shm", "-journal"))):
            leftover.unlink(missing_ok=True)
        os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        connection = sqlite3.connect(new, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            for pragma in _PRAGMAS:
                connection.execute(pragma)
            migrate(connection, str(self._path))
        finally:
            connection.close()  # moves the log into the file and removes it
        _fsync(new)
        new.rename(self._path)
        _fsync(self._path.parent)
        # One that may only be passed through, such as a home's parent, cannot be opened and was not ours.
        with contextlib.suppress(PermissionError):
            _fsync(self._path.parent.parent)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path,
            isolation_level=None,  # we say BEGIN ourselves
            check_same_thread=False,  # made here, then used by one thread only
            timeout=self._busy_timeout_s,
        )
        connection.row_factory = sqlite3.Row
        for pragma in _PRAGMAS:
            connection.execute(pragma)
        return connection

    def _close(self) -> None:
        for worker in (self._reader, self._writer):
            if worker is not None:
                worker.close()
        self._reader = self._writer = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # -- in the workers' threads ------------------------------------------------------------------

    def _write(self, connection: sqlite3.Connection, batch: Sequence[Job[Any]]) -> None:
        try:
            connection.execute("BEGIN IMMEDIATE")
            for job in batch:
                self._in_savepoint(connection, job)
            connection.execute("COMMIT")
        except sqlite3.Error as exc:
            self._roll_back(connection)
            for job in batch:
                job.failure = translate(exc, str(self._path))
        for job in batch:
            job.deliver()

    def _in_savepoint(self, connection: sqlite3.Connection, job: Job[Any]) -> None:
        connection.execute("SAVEPOINT caller")
        with Attempt() as attempt:
            job.perform(connection)
        job.failure = attempt.failure
        if isinstance(attempt.failure, sqlite3.Error):
            job.failure = translate(attempt.failure, str(self._path))
            if not connection.in_transaction:
                raise attempt.failure  # full disk, I/O: SQLite has undone everybody's work
        if job.failure is not None:
            connection.execute("ROLLBACK TO caller")
        connection.execute("RELEASE caller")

    def _read(self, connection: sqlite3.Connection, batch: Sequence[Job[Any]]) -> None:
        for job in batch:
            with Attempt() as attempt:
                connection.execute("BEGIN")
                job.perform(connection)
            job.failure = attempt.failure
            if isinstance(attempt.failure, sqlite3.Error):
                job.failure = translate(attempt.failure, str(self._path))
            self._roll_back(connection)
            job.deliver()

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        if connection.in_transaction:
            with Attempt():  # a disk that refused the commit may refuse this too; BEGIN will tell
                connection.execute("ROLLBACK")


def _own_directory(directory: Path) -> None:
    """Make the state directory; refuse one that somebody else could put files into.

    Its mode is left as it was found: the directory may be `/tmp`, given by mistake.
    """
    try:
        directory.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        if not directory.is_dir():
            raise
    found = directory.stat()
    if found.st_uid != os.geteuid():
        cause = f"it belongs to uid {found.st_uid}, not to uid {os.geteuid()}, which runs this"
        hint = "choose a directory of its own; if the node is a service: sudo systemctl start mycoswarmd"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        cause = f"others can write to it (mode {stat.S_IMODE(found.st_mode):o})"
        hint = f"choose a directory of its own; if it is one: chmod 700 {shlex.quote(str(directory))}"
    else:
        return
    raise StoreError(
        "state-not-private",
        f"cannot use the state directory {str(directory)!r}: {cause}",
        hint=hint,
    )


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
