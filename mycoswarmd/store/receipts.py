"""The hash-chained log: chained in memory at once, on disk with the next group commit.

1. `append` costs a hash and waits for nothing; `durable` flushes now and waits. Whoever flushes takes
   everything that is pending with it.
2. A flush may be repeated (its caller was cancelled, the disk was full): the database's own head says
   which records it has already. A record that does not follow that head is never written.
3. While records cannot be written none are accepted: no receipt, no effect.
"""

import asyncio
import contextlib
import json
import re
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mycoswarmd.core.receipts import (
    GENESIS,
    ChainWalk,
    Record,
    VerifyResult,
    canonical,
    chain_bytes,
    check_kind,
    receipt_id,
)
from mycoswarmd.errors import MycoswarmError, NotFound, StoreError
from mycoswarmd.flow.ports import Receipt
from mycoswarmd.store.db import Database

# Half of what M4 allows (50 ms): the other half is for a slow disk's fsync.
FLUSH_AFTER_S = 0.025
RETRY_AFTER_S = 1.0
# A disk that stalls for seconds under full load; beyond it callers are refused.
MAX_PENDING = 10_000
MAX_LIST = 1_000

_REFERENCE = re.compile(r"([0-9]{1,18})(?:-([0-9a-f]{8,64}))?")
_COLUMNS = "seq, at_ms, kind, body, prev_sha256, sha256"
_INSERT = f"""
INSERT INTO receipts ({_COLUMNS})
SELECT value ->> 0, value ->> 1, value ->> 2, CAST(value ->> 3 AS BLOB), value ->> 4, value ->> 5
FROM json_each(?) ORDER BY key
"""  # noqa: S608 - constants


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiptRow:
    """One receipt as people and programs are shown it."""

    seq: int
    id: str
    at_ms: int
    kind: str
    body: Mapping[str, object]
    prev_sha256: str
    sha256: str


class SqliteReceiptLog:
    """The log in the database; implements flow.ports.ReceiptLog.

    Args:
        db: open; `load` comes before anything else, and `run` belongs in the daemon's TaskGroup.
        now_ms: the time to write into each record.
    """

    def __init__(self, db: Database, *, now_ms: Callable[[], int]) -> None:
        self._db = db
        self._now_ms = now_ms
        self._head = Receipt(0, receipt_id(0, GENESIS), GENESIS)
        self._written_seq = 0
        self._pending: list[Record] = []
        self._failure: MycoswarmError | None = None
        self._failures = 0
        self._appended = asyncio.Event()
        self._flushing = asyncio.Lock()

    async def load(self) -> None:
        """Continue where the log on disk ends."""
        seq, sha256 = await self._db.read(_stored_head)
        self._head = Receipt(seq, receipt_id(seq, sha256), sha256)
        self._written_seq = seq

    def append(self, kind: str, body: Mapping[str, object]) -> Receipt:
        """Chain a record and hand it to the writer; durable within 50 ms while `run` runs.

        Raises:
            StoreError: receipts-unwritable, until an earlier record that could not be written is.
        """
        if self._failure is not None or len(self._pending) >= MAX_PENDING:
            raise self._unwritable()
        check_kind(kind)
        data, prev, seq = canonical(body), self._head.sha256, self._head.seq + 1
        at_ms = self._now_ms()
        sha256 = chain_bytes(prev, seq, at_ms, kind, data)
        self._pending.append(
            Record(seq=seq, at_ms=at_ms, kind=kind, body=data, prev_sha256=prev, sha256=sha256)
        )
        self._head = Receipt(seq, receipt_id(seq, sha256), sha256)
        self._appended.set()
        return self._head

    async def durable(self, receipt: Receipt) -> None:
        """Flush now and return when the record is fsynced; StoreError("receipts-unwritable") otherwise."""
        failures = self._failures
        async with self._flushing:
            if receipt.seq <= self._written_seq:
                return  # somebody's flush took it along while we waited
            if self._failures != failures:
                raise self._unwritable()
            await self._flush()

    async def run(self) -> None:
        """Write what nobody waits for, every few milliseconds while there is any; retry what failed."""
        while True:
            await self._appended.wait()
            await asyncio.sleep(RETRY_AFTER_S if self._failure is not None else FLUSH_AFTER_S)
            await self._settle()

    async def head(self) -> Receipt:
        """Return the place of the newest record; seq 0 and a hash of zeros when there is none."""
        await self._settle()
        return self._head

    @property
    def problem(self) -> MycoswarmError | None:
        """Why records cannot be written now, for status."""
        return self._failure

    async def tail(self, *, after: int, limit: int) -> Sequence[ReceiptRow]:
        """Return records with seq > after, oldest first."""
        await self._settle()

        def select(connection: sqlite3.Connection) -> Sequence[ReceiptRow]:
            return [_show(row) for row in _select(connection, after, max(0, min(limit, MAX_LIST)))]

        return await self._db.read(select)

    async def get(self, reference: str) -> ReceiptRow:
        """Return a record by SEQ or SEQ-HASH; NotFound("unknown-receipt")."""
        match = _REFERENCE.fullmatch(reference)
        if match is not None:
            rows = await self.tail(after=int(match[1]) - 1, limit=1)
            if rows and rows[0].seq == int(match[1]) and rows[0].sha256.startswith(match[2] or ""):
                return rows[0]
        raise NotFound(
            "unknown-receipt",
            f"cannot find receipt {reference[:80]!r}",
            hint="a receipt is named by SEQ or SEQ-HASH, as in the header X-Mycoswarm-Receipt",
        )

    async def verify(self, head: str | None = None) -> VerifyResult:
        """Walk the whole log on disk and compare its end with the head in memory, and with a copied one."""
        await self._settle()
        end, walk = self._head, ChainWalk(head)
        seq, sha256 = 0, GENESIS
        # In pieces, so that other readers get their turn.
        while seq < end.seq and (rows := await self._piece(seq, end.seq)):
            for row in rows:
                if not walk.step(row):
                    return walk.finish()
                seq, sha256 = row.seq, row.sha256
        result = walk.finish()
        stored_seq, _ = await self._db.read(_stored_head)
        if result.ok and stored_seq > self._head.seq:
            reason = f"displaced: record {stored_seq} was not written by this node"
            return VerifyResult(count=seq, ok=False, bad_seq=stored_seq, reason=reason)
        if result.ok and sha256 != end.sha256 and self._failure is None:
            reason = f"cut-off: the log on disk ends at record {seq}, this node wrote {end.seq}"
            return VerifyResult(count=seq, ok=False, bad_seq=seq + 1, reason=reason)
        return result

    async def _piece(self, after: int, last: int) -> Sequence[Record]:
        limit = min(MAX_LIST, last - after)
        return await self._db.read(lambda connection: _select(connection, after, limit))

    # -- flushing ---------------------------------------------------------------------------------

    async def _settle(self) -> None:
        """Write what is pending; a failure is remembered, and said by `append` and `durable`."""
        async with self._flushing:
            with contextlib.suppress(StoreError):
                await self._flush()

    async def _flush(self) -> None:
        batch = tuple(self._pending)
        if not batch:
            self._appended.clear()
            return
        try:
            await self._db.run(lambda connection: _write(connection, batch))
        except MycoswarmError as exc:
            self._failure, self._failures = exc, self._failures + 1
            raise self._unwritable() from exc
        self._failure = None
        self._written_seq = batch[-1].seq
        del self._pending[: len(batch)]
        if not self._pending:
            self._appended.clear()

    def _unwritable(self) -> StoreError:
        cause = self._failure.message if self._failure else f"{MAX_PENDING:,} records wait for the disk"
        return StoreError(
            "receipts-unwritable",
            f"cannot write receipts, so nothing is done that needs one: {cause}",
            hint=self._failure.hint if self._failure else "the disk is too slow for this load",
        )


def _stored_head(connection: sqlite3.Connection) -> tuple[int, str]:
    row = connection.execute("SELECT seq, sha256 FROM receipts ORDER BY seq DESC LIMIT 1").fetchone()
    return (row["seq"], row["sha256"]) if row is not None else (0, GENESIS)


def _write(connection: sqlite3.Connection, batch: Sequence[Record]) -> None:
    seq, sha256 = _stored_head(connection)
    rows = [row for row in batch if row.seq > seq]
    if rows and (rows[0].seq, rows[0].prev_sha256) != (seq + 1, sha256):
        raise StoreError(
            "receipts-forked",
            f"cannot write receipt {rows[0].seq}: the log on disk ends with another record, {seq}",
            hint="something else wrote to the database; `mycoswarmctl audit verify` shows where",
        )
    # One statement for the whole batch: sqlite3 gives up the interpreter's lock at each statement, and
    # getting it back from a busy event loop takes up to 5 ms every time.
    fields = [(row.seq, row.at_ms, row.kind, row.body.decode(), row.prev_sha256, row.sha256) for row in rows]
    connection.execute(_INSERT, (json.dumps(fields),))


def _select(connection: sqlite3.Connection, after: int, limit: int) -> Sequence[Record]:
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM receipts WHERE seq > ? ORDER BY seq LIMIT ?",  # noqa: S608 - a constant
        (after, limit),
    )
    return [Record(**dict(row)) for row in rows]


def _show(row: Record) -> ReceiptRow:
    return ReceiptRow(
        seq=row.seq,
        id=row.id,
        at_ms=row.at_ms,
        kind=row.kind,
        body=json.loads(row.body),
        prev_sha256=row.prev_sha256,
        sha256=row.sha256,
    )
