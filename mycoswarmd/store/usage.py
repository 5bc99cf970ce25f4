"""The counters behind the policy's limits, durable, so that a restart does not refill a budget."""

import sqlite3

from mycoswarmd.errors import LocalProtocolError
from mycoswarmd.store.db import Database

# Older windows of a counter are of no use to any limit; a month of days is kept for a person to look at.
WINDOWS_KEPT = 31


class SqliteUsageStore:
    """Counters in the database; implements flow.ports.UsageStore."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def add(self, counter: str, *, window: int, amount: int) -> int:
        """Add to a counter in a window (for example a day number) and return its total."""
        if amount < 0:
            raise LocalProtocolError("bad-amount", f"cannot take {-amount} back from counter {counter!r}")

        def count(connection: sqlite3.Connection) -> int:
            connection.execute(
                "DELETE FROM usage WHERE counter = ? AND time_window < ?", (counter, window - WINDOWS_KEPT)
            )
            (total,) = connection.execute(
                "INSERT INTO usage VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET total = total + excluded.total"
                " RETURNING total",
                (counter, window, amount),
            ).fetchone()
            return int(total)

        return await self._db.run(count)

    async def read(self, counter: str, *, window: int) -> int:
        """Return a counter's total."""

        def total(connection: sqlite3.Connection) -> int:
            row = connection.execute(
                "SELECT total FROM usage WHERE counter = ? AND time_window = ?", (counter, window)
            ).fetchone()
            return int(row[0]) if row is not None else 0

        return await self._db.read(total)
