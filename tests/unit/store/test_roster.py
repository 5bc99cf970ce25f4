"""The swarm on disk: durable statements, invitations for one machine each, counters that never fall."""

import asyncio
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from mycoswarmd.core.roster import StatementSet, encode_statement
from mycoswarmd.errors import Conflict, LocalProtocolError, NotFound, StoreError
from mycoswarmd.flow.swarmports import BeaconRow, InviteRow, PeerAddress, PeerRow
from mycoswarmd.store.db import Database
from mycoswarmd.store.roster import MAX_ADDRESSES, MAX_INVITES, MAX_PEERS, SqliteRosterStore
from mycoswarmd.store.schema import MIGRATIONS
from tests.rosters import Maker, key, parse
from tests.unit.store.conftest import SmallDisk

BOOT = "boot-1"


def pairs(whole: StatementSet) -> list[tuple[str, dict[str, object]]]:
    return [(one.sha256, encode_statement(one)) for one in whole.missing(frozenset())]


def fake(n: int) -> tuple[str, dict[str, object]]:
    """Return a pair that only this store takes for a statement: it reads none."""
    return f"{n:064x}", {"body": f"{n}", "sigs": []}


def invite(name: str = "79D9", *, state: str = "open") -> InviteRow:
    return InviteRow(
        invite=name,
        keys=bytes(range(96)),
        role="node",
        name="kitchen",
        needs_confirm=True,
        expires_at_boot_ms=90_000,
        failures=0,
        state=state,
    )


def peer(n: int, *, addresses: int = 1, last_seen_at_ms: int = 7) -> PeerRow:
    return PeerRow(
        node_id=f"{n:026}",
        addresses=tuple(PeerAddress(f"fe80::{each}%eth0", 7437) for each in range(addresses)),
        boot=3,
        instance="ab" * 8,
        last_seen_at_ms=last_seen_at_ms,
        alarm="",
    )


async def hashes_of(store: SqliteRosterStore) -> list[object]:
    return [int(str(one["body"])) for one in (await store.load())[0]]


async def states(store: SqliteRosterStore) -> dict[str, str]:
    return {row.invite: row.state for row in await store.invites(boot_id=BOOT)}


async def test_a_roster_reads_the_same_after_the_database_was_opened_again(db: Database, path: Path) -> None:
    maker = Maker()
    nodes = [key("node", n) for n in range(5)]
    signer = key("signer", 2)
    whole = maker.set(
        *(maker.admit(one) for one in nodes),
        maker.add_signer(signer, nodes[1]),
        maker.rekey(nodes[2], key("next")),
        maker.revoke(nodes[3], by=signer),
        maker.leave(nodes[4]),
    )
    await SqliteRosterStore(db).add(pairs(whole))
    await db.close()
    again = Database(path)
    await again.open()
    try:
        statements, beacons = await SqliteRosterStore(again).load()
    finally:
        await again.close()
    parsed = [parse(one) for one in statements]
    read = StatementSet(parsed[0], pinned=maker.swarm_id)
    read.add(parsed[1:])
    assert read.roster == whole.roster
    assert len(read.roster.members) == 3
    assert beacons == []


async def test_the_genesis_comes_first_and_a_new_epoch_drops_what_it_replaces(db: Database) -> None:
    store = SqliteRosterStore(db)
    await store.add([fake(9), fake(5)])
    await store.add([fake(1), fake(5)])
    assert await hashes_of(store) == [9, 5, 1]
    await store.add([fake(2)], drop=[fake(5)[0], fake(1)[0], fake(77)[0]])
    assert await hashes_of(store) == [9, 2]


async def test_nothing_of_a_change_is_kept_when_the_disk_is_full(small_disk: SmallDisk) -> None:
    database = Database(small_disk.mount / "state" / "mycoswarm.db")
    await database.open()
    try:
        store = SqliteRosterStore(database)
        await store.add([fake(1), fake(2)])
        await store.put_invite(invite(), boot_id=BOOT)
        small_disk.fill()
        many = [(f"{n:064x}", {"body": str(n), "sigs": ["x" * 4_000]}) for n in range(3, 300)]
        with pytest.raises(StoreError, match="disk-full"):
            await store.add(many, drop=[fake(2)[0]], invite="79D9")
        small_disk.empty()
        assert await hashes_of(store) == [1, 2]
        assert await states(store) == {"79D9": "open"}
    finally:
        await database.close()


async def test_an_invitation_goes_with_the_admission_or_neither(db: Database) -> None:
    store = SqliteRosterStore(db)
    await store.put_invite(invite(), boot_id=BOOT)
    await store.add([fake(1)], invite="79D9")
    assert await states(store) == {"79D9": "used"}
    for name in ("79D9", "NONE"):
        with pytest.raises(Conflict, match="invite-used"):
            await store.add([fake(2)], drop=[fake(1)[0]], invite=name)
    assert await hashes_of(store) == [1]


async def test_of_many_newcomers_with_one_code_one_is_admitted(db: Database) -> None:
    store = SqliteRosterStore(db)
    await store.put_invite(invite(), boot_id=BOOT)

    async def newcomer(n: int) -> str:
        try:
            await store.add([fake(n)], invite="79D9")
        except Conflict as exc:
            return exc.code
        return f"admitted {n}"

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(newcomer(n)) for n in range(40)]
    outcomes = Counter(task.result() for task in tasks)
    admitted = [each for each in outcomes if each.startswith("admitted")]
    assert len(admitted) == 1
    assert outcomes["invite-used"] == 39
    assert [f"admitted {n}" for n in await hashes_of(store)] == admitted


async def test_an_invitation_is_burnt_at_the_last_failure_also_when_they_come_at_once(db: Database) -> None:
    store = SqliteRosterStore(db)
    await store.put_invite(invite(), boot_id=BOOT)
    assert [await store.count_failure("79D9", at_most=5) for _ in range(4)] == [1, 2, 3, 4]
    assert await states(store) == {"79D9": "open"}
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(store.count_failure("79D9", at_most=5)) for _ in range(20)]
    assert {task.result() for task in tasks} == {5}
    assert await states(store) == {"79D9": "burnt"}
    with pytest.raises(Conflict, match="invite-used"):
        await store.add([fake(1)], invite="79D9")
    with pytest.raises(NotFound, match="unknown-invite"):
        await store.count_failure("NONE", at_most=5)


async def test_failures_do_not_touch_an_invitation_that_was_used(db: Database) -> None:
    store = SqliteRosterStore(db)
    await store.put_invite(invite(), boot_id=BOOT)
    await store.add([fake(1)], invite="79D9")
    assert [await store.count_failure("79D9", at_most=1) for _ in range(2)] == [0, 0]
    assert await states(store) == {"79D9": "used"}


@pytest.mark.parametrize("state", ["burnt", "expired", "cancelled"])
async def test_a_closed_invitation_is_closed_for_ever_and_has_no_keys(db: Database, state: str) -> None:
    store = SqliteRosterStore(db)
    await store.put_invite(invite(), boot_id=BOOT)
    assert (await store.invites(boot_id=BOOT))[0] == invite()
    await store.close_invite("79D9", state=state)
    await store.close_invite("79D9", state="burnt")  # too late: the first word stands
    (row,) = await store.invites(boot_id=BOOT)
    assert (row.state, row.keys) == (state, bytes(96))
    with pytest.raises(Conflict, match="invite-used"):
        await store.add([fake(1)], invite="79D9")
    for wrong in ("open", "used", "x"):
        with pytest.raises(LocalProtocolError, match="bad-state"):
            await store.close_invite("79D9", state=wrong)


async def test_an_invitation_dies_with_the_boot_of_the_machine(db: Database) -> None:
    store = SqliteRosterStore(db)
    await store.put_invite(invite("OLD1"), boot_id="boot-0")
    assert await states(store) == {}
    await store.put_invite(invite("NEW1"), boot_id=BOOT)
    assert await store.invites(boot_id="boot-0") == []  # forgotten, with its keys
    with pytest.raises(Conflict, match="invite-used"):
        await store.add([fake(1)], invite="OLD1")
    with pytest.raises(Conflict, match="invite-exists"):
        await store.put_invite(invite("NEW1"), boot_id=BOOT)
    assert (await store.invites(boot_id=BOOT))[0].needs_confirm is True


async def test_invitations_are_bounded_and_an_open_one_is_never_pushed_out(db: Database) -> None:
    store = SqliteRosterStore(db)
    for n in range(MAX_INVITES + 5):
        await store.put_invite(invite(f"{n:04}"), boot_id=BOOT)
        if n >= 1:
            await store.close_invite(f"{n:04}", state="expired")
    kept = await store.invites(boot_id=BOOT)
    assert len(kept) == MAX_INVITES
    assert [kept[0].invite, kept[-1].invite, kept[-1].state] == [f"{MAX_INVITES + 4:04}", "0000", "open"]

    await store.clear()
    for n in range(MAX_INVITES):
        await store.put_invite(invite(f"{n:04}"), boot_id=BOOT)
    with pytest.raises(Conflict, match="too-many-invites"):
        await store.put_invite(invite("MORE"), boot_id=BOOT)
    await store.close_invite("0050", state="cancelled")
    await store.put_invite(invite("MORE"), boot_id=BOOT)
    assert "0050" not in await states(store)


async def test_a_beacon_is_replaced_by_a_higher_one_only(db: Database) -> None:
    store = SqliteRosterStore(db)
    for n in (5, 4, 5, 9, 2):
        await store.put_beacon(BeaconRow(signer="aa", n=n, beacon={"n": n}))
    await store.put_beacon(BeaconRow(signer="bb", n=1, beacon={"n": 1}))
    assert [(row.signer, row.n, row.beacon) for row in (await store.load())[1]] == [
        ("aa", 9, {"n": 9}),
        ("bb", 1, {"n": 1}),
    ]


async def test_the_count_of_starts_outlives_the_membership(db: Database, path: Path) -> None:
    store = SqliteRosterStore(db)
    assert [await store.next_boot() for _ in range(3)] == [1, 2, 3]
    await store.add([fake(1)])
    await store.put_beacon(BeaconRow(signer="aa", n=1, beacon={}))
    await store.put_invite(invite(), boot_id=BOOT)
    await store.put_peer(peer(1))
    await store.clear()
    assert await store.load() == ([], [])
    assert await store.invites(boot_id=BOOT) == []
    assert await store.peers() == []
    await db.close()
    again = Database(path)
    await again.open()
    try:
        assert await SqliteRosterStore(again).next_boot() == 4
    finally:
        await again.close()


async def test_peers_are_remembered_with_their_newest_addresses(db: Database) -> None:
    store = SqliteRosterStore(db)
    await store.put_peer(peer(1))
    await store.put_peer(peer(2, addresses=40, last_seen_at_ms=9))
    await store.put_peer(peer(1, addresses=2, last_seen_at_ms=11))
    one, two = await store.peers()
    assert one == peer(1, addresses=2, last_seen_at_ms=11)
    assert len(two.addresses) == MAX_ADDRESSES
    assert two.addresses == peer(2, addresses=40).addresses[:MAX_ADDRESSES]


async def test_peers_are_bounded_and_the_one_seen_longest_ago_goes(db: Database) -> None:
    store = SqliteRosterStore(db)

    def fill(connection: sqlite3.Connection) -> None:
        connection.executemany(
            "INSERT INTO peers VALUES (?, '[]', 1, '', ?, '')",
            [(f"{n:026}", 100 + n) for n in range(MAX_PEERS)],
        )

    await db.run(fill)
    await store.put_peer(peer(MAX_PEERS, last_seen_at_ms=0))  # the wall clock fell back to 1970
    kept = [row.node_id for row in await store.peers()]
    assert len(kept) == MAX_PEERS
    assert kept[0] == peer(1).node_id
    assert kept[-1] == peer(MAX_PEERS).node_id


async def test_a_database_from_before_there_were_swarms_gets_the_tables(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(f"BEGIN; {MIGRATIONS[0]} PRAGMA user_version = 1; COMMIT;")
    connection.execute("INSERT INTO keys VALUES ('k-1', 'laptop', 'ff', 5, NULL, NULL)")
    connection.commit()
    connection.close()
    database = Database(path)
    await database.open()
    try:
        await SqliteRosterStore(database).add([fake(1)])
        assert await hashes_of(SqliteRosterStore(database)) == [1]
        names = await database.read(lambda one: [row["name"] for row in one.execute("SELECT name FROM keys")])
        assert names == ["laptop"]
    finally:
        await database.close()
