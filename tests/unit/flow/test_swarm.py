"""The swarm's acts: with real keys, on a real disk, where others act at the same moment and power fails."""

import asyncio
import base64
import sqlite3
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from mycoswarmd.core.roster import MAX_REKEYS, Kind, encode_statement, make_body, signed
from mycoswarmd.daemon.clock import SystemClock, SystemEntropy
from mycoswarmd.errors import BadRequest, Conflict, MycoswarmError, NotFound, StoreError, Unavailable
from mycoswarmd.flow.swarm import Swarm
from mycoswarmd.flow.swarmports import InviteRow
from mycoswarmd.store.db import Database
from mycoswarmd.store.receipts import SqliteReceiptLog
from mycoswarmd.store.roster import SqliteRosterStore
from mycoswarmd.trust import keys
from mycoswarmd.trust.certificate import read_certificate
from mycoswarmd.trust.identity import IdentityFile, NodeIdentity
from mycoswarmd.trust.signer import FileSigner
from tests.rosters import Key, Maker, key

RECOVERY = key("recovery")


class SlowStore(SqliteRosterStore):
    """A disk that a test can stop before it writes."""

    def __init__(self, db: Database) -> None:
        super().__init__(db)
        self.before: Callable[[], Awaitable[None]] | None = None
        self.is_full = False

    async def add(self, *args: Any, **kwargs: Any) -> None:
        if self.is_full:
            raise StoreError("disk-full", "cannot write: the disk is full")
        if self.before is not None:
            hook, self.before = self.before, None
            await hook()
        await super().add(*args, **kwargs)

    async def put_beacon(self, *args: Any) -> None:
        if self.is_full:
            raise StoreError("disk-full", "cannot write: the disk is full")
        await super().put_beacon(*args)


class Files(IdentityFile):
    """Key files that a test can make fail."""

    problem: MycoswarmError | None = None

    def destroy(self) -> None:
        if self.problem is not None:
            raise self.problem
        super().destroy()

    def adopt_next(self) -> NodeIdentity:
        if self.problem is not None:
            raise self.problem
        return super().adopt_next()


class Machine:
    """A node's disk with a Swarm on it."""

    def __init__(self, directory: Path, db: Database) -> None:
        clock = SystemClock()
        self.clock = clock
        self.store = SlowStore(db)
        self.files = Files(directory / "identity")
        self.signer = FileSigner(directory / "signer")
        self.receipts = SqliteReceiptLog(db, now_ms=clock.now_ms)
        self.swarm = Swarm(
            store=self.store,
            identities=self.files,
            signer=self.signer,
            receipts=self.receipts,
            clock=clock,
            entropy=SystemEntropy(),
            verify=keys.verify,
            read_cert=read_certificate,
        )

    @property
    def maker(self) -> Maker:
        """Makes statements of this swarm and epoch."""
        roster = self.swarm.roster
        assert roster is not None

        class Here(Maker):
            @property
            def swarm_id(self) -> str:
                assert roster is not None
                return roster.swarm_id

        return Here(epoch=roster.epoch)

    async def invite(self, role: str = "node") -> str:
        name = SystemEntropy().token(2).upper()
        row = InviteRow(
            invite=name, keys=bytes(96), role=role, name="", needs_confirm=False,
            expires_at_boot_ms=1 << 50, failures=0, state="open",
        )  # fmt: skip
        await self.store.put_invite(row, boot_id=self.clock.boot_id())
        return name

    async def invite_state(self, invite: str) -> str:
        rows = await self.store.invites(boot_id=self.clock.boot_id())
        return next(row.state for row in rows if row.invite == invite)

    async def begin(self) -> None:
        await self.swarm.init("home", node_name="alpha", recovery_public_hex=RECOVERY.hex)

    async def admit(self, node: Key, name: str, role: str = "node") -> str:
        invite = await self.invite(role)
        await self.swarm.admit(cert_der=node.cert_der, name=name, role=role, invite=invite)
        return invite

    async def add_signer(self, signer: Key, name: str) -> None:
        async def ask(_: str) -> str:
            return signer.hex

        self.swarm.ask_signer_key = ask
        await self.swarm.add_signer(name)

    async def on_disk(self) -> set[str]:
        """Return what a restart would read."""
        statements, _ = await self.store.load()
        return {str(one["body"]) for one in statements}

    def believed(self) -> set[str]:
        return {str(one["body"]) for one in self.swarm.missing(frozenset())}

    def names(self) -> list[str]:
        roster = self.swarm.roster
        assert roster is not None
        return sorted(one.name for one in roster.members.values())


@asynccontextmanager
async def machine(directory: Path) -> AsyncGenerator[Machine]:
    """Start the daemon's part on this disk, as often as wanted."""
    directory.mkdir(mode=0o700, exist_ok=True)
    db = Database(directory / "state" / "mycoswarm.db")
    await db.open()
    try:
        one = Machine(directory, db)
        await one.receipts.load()
        await one.swarm.start()
        async with asyncio.TaskGroup() as group:
            writing = group.create_task(one.receipts.run())
            yield one
            writing.cancel()
    finally:
        await db.close()


@pytest.fixture
async def home(tmp_path: Path) -> AsyncGenerator[Machine]:
    async with machine(tmp_path / "alpha") as one:
        await one.begin()
        yield one


async def together(*acts: Awaitable[object]) -> list[object]:
    """Begin all of them at one moment and return what each gave or raised."""

    async def caught(act: Awaitable[object]) -> object:
        try:
            return await act
        except MycoswarmError as exc:
            return exc

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(caught(act)) for act in acts]
    return [task.result() for task in tasks]


def codes(outcomes: Sequence[object]) -> list[str]:
    return sorted(one.code if isinstance(one, MycoswarmError) else "ok" for one in outcomes)


# --- a stolen signer -----------------------------------------------------------------------------

THIEF, THIEF_NODE = key("thief"), key("thief's node")


def cert(node: Key) -> str:
    return base64.b64encode(node.cert_der).decode()


async def with_thief(home: Machine, *, junk: int) -> Maker:
    await home.admit(THIEF_NODE, "study")
    await home.add_signer(THIEF, "study")
    maker = home.maker
    batch = [
        maker.wire(
            Kind.ADMIT,
            THIEF,
            by=THIEF.hex,
            cert=cert(key("junk", n)),
            name=f"junk-{n}",
            role="node",
        )
        for n in range(junk)
    ]
    assert await home.swarm.merge(batch) == junk
    return maker


@pytest.mark.parametrize("act", ["revoke", "remove", "recover"])
async def test_a_thief_that_admitted_very_many_is_put_out_and_the_swarm_recovered(
    home: Machine, tmp_path: Path, act: str
) -> None:
    await with_thief(home, junk=1_500)
    swarm = home.swarm
    if act == "recover":
        await recover(home, without=["study"])
        assert home.names() != []
        assert swarm.roster is not None
        assert swarm.roster.epoch == 1
    else:
        await (swarm.revoke("study", "stolen") if act == "revoke" else swarm.remove_signer("study"))
        assert swarm.signer_names() == ["alpha"]
        assert ("study" in home.names()) == (act == "remove")
        late = home.maker.wire(Kind.REVOKE, THIEF, by=THIEF.hex, node=key("junk", 1).id, reason="")
        assert await swarm.merge([late]) == 1  # it may only take away now
    assert len(home.names()) > 1_490  # whom it admitted stays: that is for a person to say
    assert await home.on_disk() == home.believed()


async def recover(home: Machine, *, without: Sequence[str] = ()) -> None:
    draft = await home.swarm.recovery_draft(without, [])
    body = base64.b64decode(str(draft["body"]))
    await home.swarm.recover(signed(body, RECOVERY.pair))


async def test_a_thief_leaves_no_signing_key_behind(home: Machine) -> None:
    maker = await with_thief(home, junk=1)
    ghost, back_door = key("ghost"), key("back door")
    given = [
        maker.wire(Kind.ADD_SIGNER, THIEF, by=THIEF.hex, key=back_door.hex, node=ghost.id),
        maker.wire(Kind.ADD_SIGNER, THIEF, by=THIEF.hex, key=key("other").hex, node=key("junk", 0).id),
    ]
    assert await home.swarm.merge(given) == 2
    assert home.swarm.signer_names() == ["alpha", "junk-0", "study"]
    third = key("third")
    await home.admit(third, "third")
    more = [
        maker.wire(Kind.ADD_SIGNER, key("other"), by=key("other").hex, key=key("s3").hex, node=third.id),
        home.maker.wire(Kind.ADMIT, key("s3"), by=key("s3").hex, cert=cert(key("x")), name="x", role="node"),
    ]
    assert await home.swarm.merge(more) == 2
    await home.swarm.revoke("study", "stolen")
    assert home.swarm.signer_names() == ["alpha"]
    assert home.names() == ["alpha", "junk-0", "third", "x"]  # whom they admitted is for a person to judge
    await home.add_signer(key("s3 again"), "third")
    assert home.swarm.signer_names() == ["alpha", "third"]


async def test_whom_others_vouch_for_too_a_thief_does_not_take_along(home: Machine) -> None:
    maker = await with_thief(home, junk=0)
    pi, its = key("pi"), key("its")
    await home.admit(pi, "pi")
    await home.add_signer(its, "pi")
    assert await home.swarm.merge([maker.wire(Kind.ADD_SIGNER, THIEF, by=THIEF.hex, key=its.hex, node=pi.id)])
    await home.swarm.revoke("study", "stolen")
    assert home.swarm.signer_names() == ["alpha", "pi"]


async def test_a_thief_of_very_many_keys_keeps_none(home: Machine) -> None:
    maker = await with_thief(home, junk=100)
    given = [
        maker.wire(Kind.ADD_SIGNER, THIEF, by=THIEF.hex, key=key("k", n).hex, node=key("junk", n).id)
        for n in range(100)
    ]
    assert await home.swarm.merge(given) == 100
    assert len(home.swarm.signer_names()) == 102
    await home.swarm.revoke("study", "stolen")
    assert home.swarm.signer_names() == ["alpha"]


async def test_the_first_signer_is_put_out_by_whom_it_named_and_takes_nobody_along(
    home: Machine, tmp_path: Path
) -> None:
    """What two of them do at the same moment must not put them out both."""
    async with machine(tmp_path / "b") as one, machine(tmp_path / "c") as two:
        for other, name in ((one, "one"), (two, "two")):
            identity = other.files.create()
            await home.admit(Key(identity.seed), name)

            async def ask(_: str, other: Machine = other) -> str:
                return await other.swarm.make_signer_key()

            home.swarm.ask_signer_key = ask
            await home.swarm.add_signer(name)
        assert home.swarm.roster is not None
        for other in (one, two):
            loaded = other.files.load()
            assert loaded is not None
            await other.swarm.join(
                home.swarm.missing(frozenset()), genesis_sha256=home.swarm.roster.swarm_id, identity=loaded
            )
        await one.swarm.revoke("alpha", "stolen")
        await two.swarm.revoke("alpha", "stolen")
        await one.swarm.merge(two.swarm.missing(frozenset()))
        await two.swarm.merge(one.swarm.missing(frozenset()))
        assert one.swarm.digest == two.swarm.digest
        assert one.swarm.signer_names() == ["one", "two"]
        assert one.names() == ["one", "two"]


async def test_a_signing_key_is_removed_by_the_key_where_its_node_is_gone(home: Machine) -> None:
    maker = await with_thief(home, junk=0)
    await home.swarm.merge([maker.wire(Kind.LEAVE, THIEF_NODE, node=THIEF_NODE.id, key=THIEF_NODE.hex)])
    roster = home.swarm.roster
    assert roster is not None
    assert any(THIEF.hex[:16] in one for one in roster.problems)
    assert home.swarm.signer_names() == sorted(["alpha", THIEF.hex[:16]])
    with pytest.raises(NotFound):
        await home.swarm.remove_signer(THIEF.hex[:7])
    assert await home.swarm.remove_signer(THIEF.hex[:8]) is None
    assert home.swarm.signer_names() == ["alpha"]
    own = home.signer.public_key()
    assert own is not None
    with pytest.raises(Conflict, match="last-signer"):
        await home.swarm.remove_signer(own.hex())


async def test_whoever_lost_its_signing_key_gets_another(home: Machine) -> None:
    node, first, second = key("pi"), key("first"), key("second")
    await home.admit(node, "pi")
    await home.add_signer(first, "pi")
    later = home.maker.admit(key("later"), "later", by=first)
    await home.swarm.merge([encode_statement(later)])
    await home.add_signer(second, "pi")
    roster = home.swarm.roster
    assert roster is not None
    assert second.hex in roster.signers
    assert first.hex not in roster.signers
    assert home.names() == ["alpha", "later", "pi"]
    await home.swarm.remove_signer("pi")
    with pytest.raises(Conflict, match="not-a-signer"):
        await home.add_signer(second, "pi")


async def test_a_node_makes_a_new_signing_key_when_its_own_was_removed(home: Machine) -> None:
    own = await home.swarm.make_signer_key()
    assert await home.swarm.make_signer_key() == own
    other, node = key("other"), key("node")
    await home.admit(node, "pi")
    await home.add_signer(other, "pi")
    await home.swarm.merge([home.maker.wire(Kind.DROP_SIGNER, other, by=other.hex, key=own, keep=[])])
    assert not home.swarm.is_signer()
    assert await home.swarm.make_signer_key() != own


async def test_a_full_roster_still_hears_who_is_out(home: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = await with_thief(home, junk=5)
    monkeypatch.setattr("mycoswarmd.core.roster.statements.MAX_STATEMENTS", 12)
    monkeypatch.setattr("mycoswarmd.core.roster.statements.RESERVED_STATEMENTS", 3)
    own = home.signer.public_key()
    assert own is not None

    def by_thief(n: int) -> dict[str, object]:
        return maker.wire(Kind.REVOKE, THIEF, by=THIEF.hex, node=key("nobody", n).id, reason="")

    with pytest.raises(Unavailable, match="roster-full"):
        await home.swarm.merge([by_thief(1)])
    urgent = maker.wire(Kind.REVOKE, THIEF, by=THIEF.hex, node=key("junk", 1).id, reason="")
    with pytest.raises(Unavailable, match="roster-full"):
        await home.swarm.merge([by_thief(1), urgent])
    assert "junk-1" not in home.names()
    await home.swarm.revoke("study", "stolen")
    assert "study" not in home.names()
    assert home.swarm.signer_names() == ["alpha"]
    assert await home.on_disk() == home.believed()


# --- acts at the same moment ---------------------------------------------------------------------


async def test_of_two_swarms_begun_at_once_there_is_one(tmp_path: Path) -> None:
    async with machine(tmp_path / "a") as one:
        outcomes = await together(one.begin(), one.begin())
        assert codes(outcomes) == ["already-in-swarm", "ok"]
        assert one.swarm.is_signer()
    async with machine(tmp_path / "a") as one:
        assert one.swarm.is_signer()
        assert one.swarm.is_member()


async def test_two_changes_of_key_at_once_are_two_changes_after_one_another(home: Machine) -> None:
    outcomes = await together(home.swarm.rekey(), home.swarm.rekey())
    assert codes(outcomes) == ["ok", "ok"]
    assert home.swarm.is_member()
    loaded = home.files.load()
    assert loaded is not None
    assert loaded.node_id == home.swarm.self_id


async def test_a_merge_while_a_node_leaves_brings_nothing_back(tmp_path: Path) -> None:
    async with machine(tmp_path / "a") as one:
        await one.begin()
        await one.admit(key("pi"), "pi")
        await one.add_signer(key("s"), "pi")
        wire = one.maker.wire(Kind.REVOKE, key("s"), by=key("s").hex, node=key("x").id, reason="")
        many = [
            one.maker.wire(Kind.REVOKE, key("s"), by=key("s").hex, node=key("x", n).id, reason="")
            for n in range(30)
        ]

        async def pulled_back(_: Sequence[object]) -> None:
            merging.append(group.create_task(together(one.swarm.merge(many), one.swarm.merge([wire]))))

        merging: list[asyncio.Task[list[object]]] = []
        one.swarm.give = pulled_back
        real = one.files.destroy

        def slow() -> None:  # a slow disk: others act while the key goes
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0.05), loop).result()
            real()

        loop = asyncio.get_running_loop()
        one.files.destroy = slow  # type: ignore[method-assign]
        async with asyncio.TaskGroup() as group:
            await one.swarm.leave()
        outcomes = merging[0].result()
        assert one.swarm.roster is None
        assert set(codes(outcomes)) <= {"ok", "no-swarm"}
        assert await one.on_disk() == set()
        with pytest.raises(Conflict, match="no-swarm"):
            await one.swarm.merge([wire])
    async with machine(tmp_path / "a") as one:
        assert (one.swarm.roster, one.swarm.identity, one.signer.public_key()) == (None, None, None)
        await one.begin()


async def test_merges_and_a_revocation_at_once_lose_nothing(home: Machine) -> None:
    await home.admit(key("pi"), "pi")
    await home.add_signer(key("s"), "pi")
    maker = home.maker
    wires = [
        maker.wire(Kind.REVOKE, key("s"), by=key("s").hex, node=key("x", n).id, reason="") for n in range(6)
    ]
    await together(*(home.swarm.merge([one]) for one in wires), home.swarm.revoke("pi", "lost"))
    assert home.names() == ["alpha"]
    assert home.swarm.signer_names() == ["alpha"]
    assert await home.on_disk() == home.believed()
    assert len(home.believed()) == 12


async def test_a_recovery_while_a_person_revokes_leaves_the_revocation_done(home: Machine) -> None:
    """The epoch of the paper key comes in from elsewhere while the receipt of the revocation is written."""
    await home.admit(key("pi"), "pi")
    draft = await home.swarm.recovery_draft([], [])
    epoch = signed(base64.b64decode(str(draft["body"])), RECOVERY.pair)
    outcomes = await together(home.swarm.revoke("pi", "lost"), home.swarm.merge([epoch]))
    assert codes(outcomes) == ["ok", "ok"]
    assert home.swarm.roster is not None
    assert home.swarm.roster.epoch == 1
    # One after the other: the paper key was used by somebody who knew of no revocation.
    assert home.names() == ["alpha", "pi"]


async def test_a_change_of_key_that_a_recovery_overtakes_says_so(home: Machine) -> None:
    before = home.swarm.self_id
    draft = await home.swarm.recovery_draft([], [])
    epoch = signed(base64.b64decode(str(draft["body"])), RECOVERY.pair)

    async def meanwhile(_: Sequence[object]) -> None:
        await home.swarm.merge([epoch])

    home.swarm.give = meanwhile
    with pytest.raises(Conflict, match="overtaken"):
        await home.swarm.rekey()
    assert home.swarm.self_id == before
    home.swarm.give = None
    assert (await home.swarm.rekey())["old"] == before
    assert home.swarm.is_member()


async def test_the_last_change_of_key_is_refused_before_anybody_hears_of_it(home: Machine) -> None:
    for _ in range(MAX_REKEYS):
        await home.swarm.rekey()
    told: list[object] = []

    async def give(statements: Sequence[object]) -> None:
        told.extend(statements)

    home.swarm.give = give
    with pytest.raises(Conflict, match="too-many-keys"):
        await home.swarm.rekey()
    assert told == []
    assert home.swarm.is_member()


# --- newcomers -----------------------------------------------------------------------------------


async def test_a_caller_that_hangs_up_leaves_disk_and_belief_alike(home: Machine) -> None:
    invite = await home.invite()
    pi = key("pi")

    async def hang_up() -> None:
        asyncio.get_running_loop().call_soon(admitting.cancel)

    home.store.before = hang_up
    async with asyncio.TaskGroup() as group:
        admitting = group.create_task(
            home.swarm.admit(cert_der=pi.cert_der, name="pi", role="node", invite=invite)
        )
    assert admitting.cancelled()
    assert (home.swarm.member(pi.id) is not None) == (await home.invite_state(invite) == "used")
    assert await home.on_disk() == home.believed()
    await home.admit(key("other"), "other")
    assert await home.on_disk() == home.believed()


async def test_a_key_that_was_here_is_not_admitted_and_its_invitation_stays_open(home: Machine) -> None:
    pi = key("pi")
    await home.admit(pi, "pi")
    await home.swarm.revoke("pi", "lost")
    invite = await home.invite()
    with pytest.raises(Conflict, match="id-used"):
        await home.swarm.admit(cert_der=pi.cert_der, name="pi", role="node", invite=invite)
    assert await home.invite_state(invite) == "open"
    assert home.names() == ["alpha"]


async def test_a_member_that_asks_again_is_what_it_was(home: Machine) -> None:
    pi = key("pi")
    await home.admit(pi, "pi")
    second = await home.admit(pi, "another name")
    assert await home.invite_state(second) == "used"
    again = await home.swarm.admit(cert_der=pi.cert_der, name="pi", role="node", invite=second)
    assert (again.id, home.names()) == (pi.id, ["alpha", "pi"])
    invite = await home.invite("operator")
    with pytest.raises(Conflict, match="id-used"):
        await home.swarm.admit(cert_der=pi.cert_der, name="pi", role="operator", invite=invite)
    assert await home.invite_state(invite) == "open"


async def test_a_key_that_changed_meanwhile_joins_nothing(home: Machine, tmp_path: Path) -> None:
    async with machine(tmp_path / "b") as other:
        identity = other.files.create()
        await home.admit(Key(identity.seed), "b")
        other.files.destroy()
        other.files.create()
        assert home.swarm.roster is not None
        with pytest.raises(Conflict, match="key-changed"):
            await other.swarm.join(
                home.swarm.missing(frozenset()), genesis_sha256=home.swarm.roster.swarm_id, identity=identity
            )
        assert other.swarm.roster is None


# --- where the disk fails ------------------------------------------------------------------------


async def test_what_cannot_be_written_is_not_believed(home: Machine) -> None:
    before = home.swarm.digest
    home.store.is_full = True
    with pytest.raises(StoreError):
        await home.admit(key("pi"), "pi")
    with pytest.raises(StoreError):
        await home.swarm.rekey()
    assert home.swarm.digest == before
    home.store.is_full = False
    await home.swarm.rekey()
    await home.admit(key("pi"), "pi")
    assert await home.on_disk() == home.believed()


async def test_a_beacon_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    async with machine(tmp_path / "a") as one:
        real = one.store.put_beacon

        async def full(*_: Any) -> None:
            raise StoreError("disk-full", "cannot write: the disk is full")

        one.store.put_beacon = full  # type: ignore[method-assign]
        heard: list[int] = []
        one.swarm.subscribe(lambda: heard.append(1))
        await one.begin()
        assert one.swarm.is_signer()
        assert heard
        assert (await one.swarm.sync({"have": []}))["beacons"] == []
        async with asyncio.TaskGroup() as group:
            running = group.create_task(one.swarm.run())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not running.done()
            running.cancel()
        one.store.put_beacon = real  # type: ignore[method-assign]
        assert len((await one.swarm.sync({"have": []}))["beacons"]) == 1  # type: ignore[arg-type]


async def test_who_does_not_know_the_age_of_its_roster_hears_a_new_beacon(
    home: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def newest(**asked: object) -> int:
        answer: Any = await home.swarm.sync({"have": [], **asked})
        return int(answer["beacons"][0]["n"])

    now_s = home.clock.boot_s()
    monkeypatch.setattr(home.clock, "boot_s", lambda: now_s)
    first = await newest()
    now_s += 4
    assert await newest(fresh=True) == first
    now_s += 3
    assert await newest() == await newest(fresh="yes") == first
    assert await newest(fresh=True) == first + 1
    now_s += 61
    assert await newest() == first + 2


async def test_a_change_of_key_that_ends_half_way_is_finished_by_a_restart(tmp_path: Path) -> None:
    async with machine(tmp_path / "a") as one:
        await one.begin()
        one.files.problem = StoreError("key-unwritable", "cannot write: the power goes off here")
        heard: list[int] = []
        one.swarm.subscribe(lambda: heard.append(1))
        changed = await one.swarm.rekey()
        assert heard  # links and anchors follow
        assert one.swarm.self_id == changed["id"]
        assert one.swarm.is_member()
        loaded = one.files.load()
        assert loaded is not None
        assert loaded.node_id == changed["old"]
    async with machine(tmp_path / "a") as one:
        assert one.swarm.self_id == changed["id"]
        assert one.swarm.is_member()
        assert one.swarm.is_signer()


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM roster WHERE seq = (SELECT min(seq) FROM roster)",
        "UPDATE roster SET statement = substr(statement, 1, 40) WHERE seq = (SELECT max(seq) FROM roster)",
        "UPDATE roster SET statement = '[]' WHERE seq = (SELECT max(seq) FROM roster)",
        "UPDATE roster SET statement = replace(statement, 'sigs\":[[\"', 'sigs\":[[\"00') WHERE seq = 2",
        # A signer is gone, and with it what vouches for whom it admitted.
        "DELETE FROM roster WHERE seq = 4",
    ],
    ids=["no-genesis", "cut-off", "no-object", "forged", "unvouched"],
)
async def test_a_damaged_roster_says_what_it_is_and_what_to_do(tmp_path: Path, damage: str) -> None:
    pi, pi_signer = key("pi"), key("pi's signer")
    async with machine(tmp_path / "a") as one:
        await one.begin()
        await one.admit(pi, "pi")
        await one.add_signer(pi_signer, "pi")
        den = one.maker.wire(
            Kind.ADMIT, pi_signer, by=pi_signer.hex, cert=cert(key("den")), name="den", role="node"
        )
        assert await one.swarm.merge([den]) == 1
        assert one.names() == ["alpha", "den", "pi"]
    db = tmp_path / "a" / "state" / "mycoswarm.db"
    whole = db.read_bytes()
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        assert connection.execute(damage).rowcount == 1
    with pytest.raises(StoreError, match="cannot use the roster in the database") as caught:
        async with machine(tmp_path / "a"):
            pass
    assert caught.value.code == "roster-damaged"
    assert "restore a backup" in caught.value.hint and "leave" in caught.value.hint
    for left in db.parent.glob("mycoswarm.db-*"):
        left.unlink()
    db.write_bytes(whole)  # the control: it was the damage
    async with machine(tmp_path / "a") as one:
        assert one.names() == ["alpha", "den", "pi"]


@pytest.mark.parametrize(
    "damage", ["'{'", "replace(beacon, 'n\":', 'n\":9')"], ids=["cut-off", "another-count"]
)
async def test_a_damaged_beacon_is_left_out_and_told_to_nobody(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with machine(tmp_path / "a") as one:
        await one.begin()
        (beacon,) = one.swarm.beacons()
    with closing(
        sqlite3.connect(tmp_path / "a" / "state" / "mycoswarm.db", isolation_level=None)
    ) as connection:
        connection.execute(f"UPDATE beacons SET beacon = {damage}")
    async with machine(tmp_path / "a") as one:
        assert one.swarm.beacons() == []
        assert "damaged beacon" in caplog.text
        await one.swarm.merge_beacons([beacon])  # another node has it still
        assert one.swarm.beacons() == [beacon]


async def test_leaving_that_ends_half_way_can_be_done_again(tmp_path: Path) -> None:
    async with machine(tmp_path / "a") as one:
        await one.begin()
        one.files.problem = StoreError("key-unwritable", "cannot write: the power goes off here")
        with pytest.raises(StoreError):
            await one.swarm.leave()
        assert one.swarm.roster is None
    async with machine(tmp_path / "a") as one:
        assert one.swarm.roster is None
        await one.swarm.leave()
        assert (one.files.load(), one.signer.public_key()) == (None, None)
        with pytest.raises(Conflict, match="no-swarm"):
            await one.swarm.leave()
        await one.begin()


async def test_a_member_that_a_recovery_brings_back_is_told_of(
    home: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    await home.admit(key("pi"), "pi")
    draft = await home.swarm.recovery_draft([], [])
    await home.swarm.revoke("pi", "stolen")
    await home.swarm.recover(signed(base64.b64decode(str(draft["body"])), RECOVERY.pair))
    assert home.names() == ["alpha", "pi"]
    assert "pi" in caplog.text
    assert "'stolen'" in caplog.text


async def test_an_older_recovery_is_not_said_to_be_done(home: Machine) -> None:
    old = await home.swarm.recovery_draft([], [])
    await recover(home)
    await recover(home)
    with pytest.raises(Conflict, match="overtaken"):
        await home.swarm.recover(signed(base64.b64decode(str(old["body"])), RECOVERY.pair))


# --- what strangers send costs little --------------------------------------------------------------


async def counted(home: Machine, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    seen: list[bytes] = []

    def verify(public: bytes, signature: bytes, message: bytes) -> bool:
        seen.append(message)
        return keys.verify(public, signature, message)

    monkeypatch.setattr(home.swarm, "_verify", verify)
    return seen


async def test_signatures_are_checked_only_of_what_is_new_and_once(
    home: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = await counted(home, monkeypatch)
    own = home.swarm.missing(frozenset())
    assert await home.swarm.merge(own * 50) == 0
    assert seen == []
    pi = key("pi")
    await home.admit(pi, "pi")
    seen.clear()
    leave = home.maker.wire(Kind.LEAVE, pi, node=pi.id, key=pi.hex)
    assert await home.swarm.merge([leave] * 100) == 1
    assert len(seen) == 1


async def test_what_a_stranger_signed_costs_no_signatures(
    home: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = await counted(home, monkeypatch)
    stranger, maker = key("stranger"), home.maker
    for one in (
        maker.wire(Kind.REVOKE, stranger, by=stranger.hex, node=key("x").id, reason=""),
        Maker(name="other").wire(Kind.LEAVE, stranger, node=stranger.id, key=stranger.hex),
    ):
        with pytest.raises(BadRequest):
            await home.swarm.merge([one])
    assert await home.swarm.merge([maker.wire(Kind.LEAVE, stranger, node=stranger.id, key=stranger.hex)]) == 0
    assert seen == []
    # An epoch of its own, or a signer that a forgery names, opens no door to the rest.
    more = [
        maker.wire(Kind.REVOKE, stranger, by=stranger.hex, node=key("x", n).id, reason="") for n in range(30)
    ]
    signers = [{"key": stranger.hex, "node": stranger.id}]
    epoch = maker.wire(Kind.EPOCH, stranger, epoch=1, n=1, signers=signers, keep=[])
    own = home.signer.public_key()
    assert own is not None
    body = make_body(
        Kind.ADD_SIGNER, swarm=maker.swarm_id, epoch=0, by=own.hex(), key=stranger.hex, node=stranger.id
    )
    forged = {**signed(body, (own, stranger.sign))}
    for door in (epoch, forged):
        seen.clear()
        with pytest.raises(BadRequest):
            await home.swarm.merge([*more, door])
        assert len(seen) == 1


async def test_what_an_epoch_overtook_costs_no_signatures(
    home: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await home.admit(key("pi"), "pi")
    await home.swarm.revoke("pi", "lost")
    before = home.swarm.missing(frozenset())
    await recover(home)
    seen = await counted(home, monkeypatch)
    assert await home.swarm.merge(before) == 0
    assert seen == []
    assert home.names() == ["alpha"]


async def test_a_large_merge_does_not_stop_the_loop(home: Machine) -> None:
    maker = home.maker
    await home.admit(key("pi"), "pi")
    await home.add_signer(key("s"), "pi")
    wires = [
        maker.wire(Kind.REVOKE, key("s"), by=key("s").hex, node=key("x", n).id, reason="")
        for n in range(2_000)
    ]
    longest_s = 0.0

    async def watch() -> None:
        """Measure what this process works from turn to turn; it may stand still for what others do."""
        nonlocal longest_s
        while True:
            before_s = time.process_time()
            await asyncio.sleep(0.005)
            longest_s = max(longest_s, time.process_time() - before_s)

    async with asyncio.TaskGroup() as group:
        watching = group.create_task(watch())
        assert await home.swarm.merge(wires) == 2_000
        watching.cancel()
    assert longest_s < 0.5
    assert await home.on_disk() == home.believed()
