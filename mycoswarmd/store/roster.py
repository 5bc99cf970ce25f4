"""What a node knows of its swarm, on disk: statements, beacons, invitations and where peers were last seen.

Law: what is not on disk was not said. An invitation is used up in the transaction that stores the admission,
so that no crash and no race lets a second newcomer in; and one that is not open has no keys any more.
"""

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence

from mycoswarmd.errors import Conflict, LocalProtocolError, NotFound
from mycoswarmd.flow.swarmports import BeaconRow, InviteRow, PeerAddress, PeerRow
from mycoswarmd.store.db import Database

CLOSED_STATES = frozenset({"burnt", "expired", "cancelled"})
MAX_INVITES = 100
MAX_ADDRESSES = 16
# As many as there can be statements: a bound against a bug, not a wish.
MAX_PEERS = 10_000

_INVITE = "invite, keys, role, name, needs_confirm, expires_at_boot_ms, failures, state"
_PEER = "node_id, addresses, boot, instance, last_seen_at_ms, alarm"


class SqliteRosterStore:
    """The swarm in the database; implements flow.swarmports.RosterStore."""

    def __init__(self, db: Database) -> None:
        self._db = db

    # --- statements ------------------------------------------------------------------------------

    async def load(self) -> tuple[Sequence[Mapping[str, object]], Sequence[BeaconRow]]:
        """Return all statements in wire form, genesis first, and the newest beacon of each signer.

        A damaged row is an empty object.
        """

        def select(
            connection: sqlite3.Connection,
        ) -> tuple[Sequence[Mapping[str, object]], Sequence[BeaconRow]]:
            statements = [
                _decode(row["statement"])
                for row in connection.execute("SELECT statement FROM roster ORDER BY seq")
            ]
            beacons = [
                BeaconRow(signer=row["signer"], n=row["n"], beacon=_decode(row["beacon"]))
                for row in connection.execute("SELECT signer, n, beacon FROM beacons ORDER BY signer")
            ]
            return statements, beacons

        return await self._db.read(select)

    async def add(
        self,
        statements: Sequence[tuple[str, Mapping[str, object]]],
        *,
        drop: Sequence[str] = (),
        invite: str | None = None,
        settled: Callable[[BaseException | None], None] | None = None,
    ) -> None:
        """Store (hash, wire form) pairs, drop pruned hashes and use up an invitation, in one transaction.

        The genesis comes first in the first call. A statement that is known already is left as it is.
        `settled` is called with the failure, if any, in the end, also when the caller was cancelled.

        Raises:
            Conflict: invite-used: it is not open any more; nothing was stored.
        """
        rows = [(sha256, _encode(statement)) for sha256, statement in statements]

        def store(connection: sqlite3.Connection) -> None:
            if invite is not None:
                _use_up(connection, invite)
            connection.executemany("DELETE FROM roster WHERE sha256 = ?", [(sha256,) for sha256 in drop])
            connection.executemany(
                "INSERT INTO roster (sha256, statement) VALUES (?, ?) ON CONFLICT (sha256) DO NOTHING", rows
            )

        await self._db.run(store, settled=settled)

    async def clear(self, *, settled: Callable[[BaseException | None], None] | None = None) -> None:
        """Forget the swarm: statements, beacons, invitations and peers. The boot counter stays."""

        def delete(connection: sqlite3.Connection) -> None:
            for table in ("roster", "beacons", "invites", "peers"):
                connection.execute(f"DELETE FROM {table}")  # noqa: S608 - a constant

        await self._db.run(delete, settled=settled)

    async def put_beacon(self, row: BeaconRow) -> None:
        """Keep a beacon if its counter is higher than the kept one."""
        values = (row.signer, row.n, _encode(row.beacon))
        await self._db.run(
            lambda connection: connection.execute(
                "INSERT INTO beacons (signer, n, beacon) VALUES (?, ?, ?)"
                " ON CONFLICT (signer) DO UPDATE SET n = excluded.n, beacon = excluded.beacon"
                " WHERE excluded.n > n",
                values,
            )
        )

    async def next_boot(self, *, by: int = 1) -> int:
        """Count this start of the daemon and return the number, from 1; after a restore, far ahead."""

        def count(connection: sqlite3.Connection) -> int:
            row = connection.execute(
                "INSERT INTO starts (one, n) VALUES (1, :by)"
                " ON CONFLICT (one) DO UPDATE SET n = n + :by RETURNING n",
                {"by": by},
            ).fetchone()
            return int(row["n"])

        return await self._db.run(count)

    # --- invitations -----------------------------------------------------------------------------

    async def put_invite(self, row: InviteRow, *, boot_id: str) -> None:
        """Store an invitation that lives until this boot of the machine ends.

        Raises:
            Conflict: invite-exists, or too-many-invites: as many as are kept at all are open.
        """

        def store(connection: sqlite3.Connection) -> None:
            _forget_old_invites(connection, boot_id)
            kept = connection.execute("SELECT count(*) FROM invites").fetchone()[0]
            if kept >= MAX_INVITES:
                raise Conflict(
                    "too-many-invites", f"cannot invite: {MAX_INVITES} invitations are open already"
                )
            try:
                connection.execute(
                    f"INSERT INTO invites (boot_id, {_INVITE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
                    (
                        boot_id,
                        row.invite,
                        row.keys,
                        row.role,
                        row.name,
                        row.needs_confirm,
                        row.expires_at_boot_ms,
                        row.failures,
                        row.state,
                    ),
                )
            except sqlite3.IntegrityError as exc:
                raise Conflict(
                    "invite-exists", f"cannot open invitation {row.invite[:8]!r}: there is one already"
                ) from exc

        await self._db.run(store)

    async def invites(self, *, boot_id: str) -> Sequence[InviteRow]:
        """Return the invitations of this boot, newest first, at most 100, used and burnt ones too."""

        def select(connection: sqlite3.Connection) -> Sequence[InviteRow]:
            rows = connection.execute(
                f"SELECT {_INVITE} FROM invites WHERE boot_id = ? ORDER BY seq DESC LIMIT ?",  # noqa: S608
                (boot_id, MAX_INVITES),
            )
            return [InviteRow(**{**dict(row), "needs_confirm": bool(row["needs_confirm"])}) for row in rows]

        return await self._db.read(select)

    async def close_invite(self, invite: str, *, state: str) -> None:
        """Mark an open invitation burnt, expired or cancelled."""
        if state not in CLOSED_STATES:
            raise LocalProtocolError("bad-state", f"cannot close an invitation as {state!r}")
        await self._db.run(lambda connection: _close(connection, invite, state))

    async def count_failure(self, invite: str, *, at_most: int) -> int:
        """Count a failed proof, burn the invitation at `at_most`, and return the new count.

        One that is not open is not counted any further. NotFound("unknown-invite") if there is none.
        """

        def count(connection: sqlite3.Connection) -> int:
            connection.execute(
                "UPDATE invites SET failures = failures + 1 WHERE invite = ? AND state = 'open'", (invite,)
            )
            row = connection.execute("SELECT failures FROM invites WHERE invite = ?", (invite,)).fetchone()
            if row is None:
                raise NotFound("unknown-invite", f"cannot find invitation {invite[:8]!r}")
            failures = int(row["failures"])
            if failures >= at_most:
                _close(connection, invite, "burnt")
            return failures

        return await self._db.run(count)

    # --- peers -----------------------------------------------------------------------------------

    async def peers(self) -> Sequence[PeerRow]:
        """Return what is remembered of members."""

        def select(connection: sqlite3.Connection) -> Sequence[PeerRow]:
            rows = connection.execute(f"SELECT {_PEER} FROM peers ORDER BY node_id")  # noqa: S608 - a constant
            return [PeerRow(**{**dict(row), "addresses": _addresses(row["addresses"])}) for row in rows]

        return await self._db.read(select)

    async def put_peer(self, row: PeerRow) -> None:
        """Remember a member; at most 16 addresses, the newest first."""
        addresses = json.dumps([[one.host, one.port] for one in row.addresses[:MAX_ADDRESSES]])
        values = (row.node_id, addresses, row.boot, row.instance, row.last_seen_at_ms, row.alarm)

        def store(connection: sqlite3.Connection) -> None:
            connection.execute(
                f"INSERT OR REPLACE INTO peers ({_PEER}) VALUES (?, ?, ?, ?, ?, ?)",  # noqa: S608 - a constant
                values,
            )
            connection.execute(
                "DELETE FROM peers WHERE node_id IN (SELECT node_id FROM peers WHERE node_id <> ?"
                " ORDER BY last_seen_at_ms DESC LIMIT -1 OFFSET ?)",
                (row.node_id, MAX_PEERS - 1),
            )

        await self._db.run(store)


def _use_up(connection: sqlite3.Connection, invite: str) -> None:
    if not _close(connection, invite, "used"):
        raise Conflict(
            "invite-used",
            f"cannot use invitation {invite[:8]!r}: it is not open",
            hint="an invitation is for one machine; mycoswarmctl invite makes another",
        )


def _close(connection: sqlite3.Connection, invite: str, state: str) -> bool:
    """Close an open invitation and forget its keys; tell whether it was open."""
    done = connection.execute(
        "UPDATE invites SET state = ?, keys = zeroblob(length(keys)) WHERE invite = ? AND state = 'open'",
        (state, invite),
    )
    return done.rowcount == 1


def _forget_old_invites(connection: sqlite3.Connection, boot_id: str) -> None:
    """Forget those of earlier boots, and the oldest closed ones where a new one needs the place."""
    connection.execute("DELETE FROM invites WHERE boot_id <> ?", (boot_id,))
    connection.execute(
        "DELETE FROM invites WHERE seq IN (SELECT seq FROM invites WHERE state <> 'open' ORDER BY seq"
        " LIMIT max(0, (SELECT count(*) FROM invites) - ?))",
        (MAX_INVITES - 1,),
    )


def _decode(text: str) -> Mapping[str, object]:
    """Return what was written; an empty object, which nobody accepts, for what is damaged."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _encode(value: Mapping[str, object]) -> str:
    return json.dumps(dict(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _addresses(text: str) -> tuple[PeerAddress, ...]:
    return tuple(PeerAddress(host=host, port=port) for host, port in json.loads(text))
