"""API keys: the hash of each secret on disk, all live ones in memory, when each was used now and then.

What is in memory follows the disk whether or not the caller still waits; where it cannot, because a commit
failed, it errs on the closed side.
"""

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import replace

from mycoswarmd.errors import BadRequest, Conflict, NotFound, StoreError, Unavailable
from mycoswarmd.flow.ports import KeyRow
from mycoswarmd.store.db import Database

# A household or a lab has a dozen; the bound keeps a runaway script from filling memory.
MAX_LIVE_KEYS = 1_000
MAX_NAME_CHARS = 64
# "Last used" is for a person who wonders whether a key can go; half a minute is exact enough.
USED_AFTER_S = 30.0

_COLUMNS = "id, name, created_at_ms, last_used_at_ms, revoked_at_ms"


class SqliteKeyStore:
    """Keys in the database; implements flow.ports.KeyStore.

    Args:
        db: open; `load` comes before the first lookup, and `run` belongs in the daemon's TaskGroup.
        now_ms: the time, for when a key was last used.
    """

    def __init__(self, db: Database, *, now_ms: Callable[[], int]) -> None:
        self._db = db
        self._now_ms = now_ms
        self._live: dict[str, KeyRow] = {}  # by the secret's sha256
        self._used_at_ms: dict[str, int] = {}  # by id, not yet written
        self._used = asyncio.Event()

    async def load(self) -> None:
        """Read the live keys into memory."""

        def select(connection: sqlite3.Connection) -> dict[str, KeyRow]:
            rows = connection.execute(
                f"SELECT secret_sha256, {_COLUMNS} FROM keys WHERE revoked_at_ms IS NULL"  # noqa: S608 - a constant
            )
            return {row["secret_sha256"]: _decode(row) for row in rows}

        self._live = await self._db.read(select)

    async def create(self, *, key_id: str, name: str, secret_sha256: str, now_ms: int) -> KeyRow:
        """Store a key; Conflict("key-exists") when a live key has the name."""
        if not (0 < len(name) <= MAX_NAME_CHARS and name.isprintable()):
            raise BadRequest(
                "bad-key-name",
                f"cannot create a key named {name[:40]!r}",
                hint=f"1 to {MAX_NAME_CHARS} printable characters are accepted",
                where="name",
            )

        def store(connection: sqlite3.Connection) -> KeyRow:
            (live,) = connection.execute("SELECT count(*) FROM keys WHERE revoked_at_ms IS NULL").fetchone()
            if live >= MAX_LIVE_KEYS:
                raise Conflict("too-many-keys", f"cannot create a key: {MAX_LIVE_KEYS:,} are live already")
            try:
                connection.execute(
                    "INSERT INTO keys (id, name, secret_sha256, created_at_ms) VALUES (?, ?, ?, ?)",
                    (key_id, name, secret_sha256, now_ms),
                )
            except sqlite3.IntegrityError as exc:
                raise Conflict(
                    "key-exists",
                    f"cannot create the key {name!r}: there is one already",
                    hint="choose another name, or revoke that one first",
                ) from exc
            stored.append(_get(connection, key_id))
            return stored[0]

        def remember(failure: BaseException | None) -> None:
            if failure is None:
                self._live[secret_sha256] = stored[0]

        stored: list[KeyRow] = []
        return await self._db.run(store, settled=remember)

    async def list(self) -> Sequence[KeyRow]:
        """Return all keys, also revoked ones, oldest first."""
        with contextlib.suppress(StoreError, Unavailable):
            await self._write_used()

        def select(connection: sqlite3.Connection) -> Sequence[KeyRow]:
            return [_decode(row) for row in connection.execute(f"SELECT {_COLUMNS} FROM keys ORDER BY rowid")]  # noqa: S608

        return await self._db.read(select)

    async def revoke(self, name_or_id: str, *, now_ms: int) -> KeyRow:
        """Revoke a live key; it is refused from now on. NotFound("unknown-key") otherwise."""

        def mark(connection: sqlite3.Connection) -> KeyRow:
            row = connection.execute(
                "UPDATE keys SET revoked_at_ms = :now WHERE revoked_at_ms IS NULL AND id = coalesce("
                " (SELECT id FROM keys WHERE id = :ref), (SELECT id FROM keys WHERE name = :ref"
                " AND revoked_at_ms IS NULL)) RETURNING id",
                {"now": now_ms, "ref": name_or_id},
            ).fetchone()
            if row is None:
                raise NotFound(
                    "unknown-key",
                    f"cannot find a live key {name_or_id[:80]!r}",
                    hint="`mycoswarmctl keys list` names them",
                )
            revoked.append(row["id"])
            return _get(connection, row["id"])

        def forget(_: BaseException | None) -> None:
            """Refuse the key, also when its revocation could not be written: somebody wanted it gone."""
            self._live = {sha256: row for sha256, row in self._live.items() if row.id not in revoked}

        revoked: list[str] = []
        return await self._db.run(mark, settled=forget)

    def lookup(self, secret_sha256: str) -> KeyRow | None:
        """Return the live key of this secret, from memory, and remember that it was used."""
        row = self._live.get(secret_sha256)
        if row is not None:
            self._used_at_ms[row.id] = self._now_ms()
            self._used.set()
        return row

    async def run(self) -> None:
        """Write when keys were last used, now and then while they are."""
        while True:
            await self._used.wait()
            await asyncio.sleep(USED_AFTER_S)
            with contextlib.suppress(StoreError, Unavailable):  # for a person only: the next one tries again
                await self._write_used()

    async def _write_used(self) -> None:
        used = self._used_at_ms.copy()
        self._used.clear()
        if not used:
            return
        await self._db.run(
            lambda connection: connection.executemany(
                "UPDATE keys SET last_used_at_ms = ? WHERE id = ?", [(at, key) for key, at in used.items()]
            )
        )
        self._used_at_ms = {key: at for key, at in self._used_at_ms.items() if used.get(key) != at}
        self._live = {
            sha256: replace(row, last_used_at_ms=used.get(row.id, row.last_used_at_ms))
            for sha256, row in self._live.items()
        }


def _get(connection: sqlite3.Connection, key_id: str) -> KeyRow:
    return _decode(connection.execute(f"SELECT {_COLUMNS} FROM keys WHERE id = ?", (key_id,)).fetchone())  # noqa: S608


def _decode(row: sqlite3.Row) -> KeyRow:
    return KeyRow(
        id=row["id"],
        name=row["name"],
        created_at_ms=row["created_at_ms"],
        last_used_at_ms=row["last_used_at_ms"],
        revoked_at_ms=row["revoked_at_ms"],
    )
