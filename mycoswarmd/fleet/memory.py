"""What is remembered of members across restarts: where they were, and whether a key was copied.

Law: a copied key shows itself by two daemons that count their starts apart. The highest count is kept on
disk; whoever falls behind it, or has it with another instance, raises an alarm that stays until the key goes.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace

from mycoswarmd.errors import StoreError
from mycoswarmd.flow.ports import Clock
from mycoswarmd.flow.swarmports import PeerAddress, PeerRow, RosterStore

log = logging.getLogger(__name__)

# A peer's row is written this often at most, or at once when its meaning changes, but not in a stream.
_EACH_S = 60.0
_NEWS_EACH_S = 2.0
_MOST_ADDRESSES = 4
CLONED = "cloned"


class Memory:
    """The rows of all members, in memory first."""

    def __init__(self, store: RosterStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._rows: dict[str, PeerRow] = {}
        self._written: dict[str, tuple[PeerRow, float]] = {}
        self._news = asyncio.Event()

    async def load(self) -> Sequence[PeerRow]:
        """Read what was remembered."""
        rows = await self._store.peers()
        self._rows = {row.node_id: row for row in rows}
        self._written = {row.node_id: (row, self._clock.monotonic_s()) for row in rows}
        return rows

    def alarm(self, node_id: str) -> str:
        """Return the alarm about a member, or ""."""
        row = self._rows.get(node_id)
        return row.alarm if row is not None else ""

    def note(self, node_id: str, *, boot: int, instance: str, addresses: Sequence[PeerAddress]) -> str:
        """Note what a member just said, and return the alarm about it, or ""."""
        row = self._rows.get(node_id)
        if row is None:
            row = PeerRow(
                node_id=node_id, addresses=(), boot=boot, instance=instance, last_seen_at_ms=0, alarm=""
            )
        alarm = row.alarm
        if boot < row.boot or (boot == row.boot and row.instance and instance != row.instance):
            alarm = f"{CLONED}: two machines have its key (start {boot}, and start {row.boot} of another)"
        if boot >= row.boot:
            row = replace(row, boot=boot, instance=instance)
        row = replace(
            row,
            addresses=tuple(addresses[:_MOST_ADDRESSES]),
            last_seen_at_ms=self._clock.now_ms(),
            alarm=row.alarm or alarm,
        )
        self._rows[node_id] = row
        self._news.set()
        return row.alarm

    def raise_alarm(self, node_id: str, alarm: str) -> str:
        """Remember an alarm about a member, unless there is one, and return the one that counts."""
        row = self._rows.get(node_id)
        if row is not None and not row.alarm:
            self._rows[node_id] = replace(row, alarm=alarm)
            self._news.set()
        return self.alarm(node_id)

    def forget(self, node_id: str) -> None:
        """Forget somebody who is no member any more."""
        self._rows.pop(node_id, None)
        self._written.pop(node_id, None)

    async def run(self) -> None:
        """Write what has changed until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            for row in list(self._rows.values()):
                if self._is_due(row):
                    self._written[row.node_id] = (row, self._clock.monotonic_s())
                    await self._write(row)
            await asyncio.sleep(_NEWS_EACH_S)

    async def _write(self, row: PeerRow) -> None:
        try:
            await self._store.put_peer(row)
        except StoreError as exc:  # what is not remembered is found again
            log.warning("node %s is not remembered: %s", row.node_id, exc.message)

    def _is_due(self, row: PeerRow) -> bool:
        if row.node_id not in self._written:
            return True
        written, at_s = self._written[row.node_id]
        is_news = replace(row, last_seen_at_ms=0) != replace(written, last_seen_at_ms=0)
        return is_news or (row != written and self._clock.monotonic_s() - at_s >= _EACH_S)
