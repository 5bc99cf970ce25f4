"""One file, one lock, two threads: what is acknowledged, what is refused, what is never touched."""

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mycoswarmd.errors import MycoswarmError, NotFound, StoreError, Unavailable
from mycoswarmd.store.db import Database
from mycoswarmd.store.schema import VERSION
from mycoswarmd.store.worker import MAX_WAITING

NOBODY = 65_534


def writing(name: str) -> Callable[[sqlite3.Connection], str]:
    def fn(connection: sqlite3.Connection) -> str:
        connection.execute("INSERT INTO usage VALUES (?, 0, 1)", (name,))
        return name

    return fn


def names(connection: sqlite3.Connection) -> list[str]:
    return [row[0] for row in connection.execute("SELECT counter FROM usage ORDER BY counter")]


async def code_of_open(path: Path) -> str:
    with pytest.raises(StoreError, match="cannot") as caught:
        await Database(path).open()
    return caught.value.code


def contents(directory: Path) -> dict[str, bytes]:
    """Everything that holds data: not the lock, not the shared index, not a log that is empty."""
    files = [path for path in directory.iterdir() if path.name != "lock" and not path.name.endswith("-shm")]
    return {path.name: data for path in files if (data := path.read_bytes()) or path.name.endswith(".db")}


class Held:
    """Keeps the writer busy until released, so that callers pile up behind it."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.release = threading.Event()

    def __call__(self, _: sqlite3.Connection) -> None:
        self.entered.set()
        assert self.release.wait(60)


# -- the file -------------------------------------------------------------------------------------


async def test_the_directory_and_all_files_are_private(db: Database, path: Path) -> None:
    await db.run(writing("a"))
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    files = list(path.parent.iterdir())
    assert {"lock", path.name, f"{path.name}-wal"} <= {file.name for file in files}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


async def test_a_directory_that_was_there_keeps_its_mode_and_ours_is_private_in_it(path: Path) -> None:
    path.parent.mkdir()
    path.parent.chmod(0o755)
    database = Database(path)
    await database.open()
    await database.run(writing("a"))
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}
    await database.close()


@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o770, 0o702])
async def test_a_directory_that_others_can_write_is_refused_and_left_alone(path: Path, mode: int) -> None:
    path.parent.mkdir()
    path.parent.chmod(mode)
    with pytest.raises(StoreError) as caught:
        await Database(path).open()
    assert caught.value.code == "state-not-private"
    assert str(path.parent) in caught.value.message
    assert "chmod 700" in caught.value.hint
    assert stat.S_IMODE(path.parent.stat().st_mode) == mode
    assert list(path.parent.iterdir()) == []


@contextmanager
def as_a_person() -> Iterator[Path]:
    """Be an ordinary user, below a directory that may be passed through and not be listed."""
    is_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        outer = Path(name)
        own = outer / "home"
        own.mkdir(mode=0o700)
        if is_root:
            os.chown(own, NOBODY, NOBODY)
        outer.chmod(0o311)
        try:
            if is_root:
                os.seteuid(NOBODY)
            yield own
        finally:
            if is_root:
                os.seteuid(0)
            outer.chmod(0o700)


async def test_somebody_elses_directory_is_refused(path: Path) -> None:
    if os.geteuid() != 0:
        path = Path("/etc/mycoswarm.db")
    else:
        path.parent.mkdir(mode=0o700)
        os.chown(path.parent, NOBODY, NOBODY)
    with pytest.raises(StoreError) as caught:
        await Database(path).open()
    assert caught.value.code == "state-not-private"
    assert "systemctl start mycoswarmd" in caught.value.hint and "chmod" not in caught.value.hint


async def test_a_state_directory_below_one_that_cannot_be_listed_works() -> None:
    with as_a_person() as own:
        database = Database(own / "mycoswarm.db")
        await database.open()
        await database.run(writing("a"))
        assert await database.read(names) == ["a"]
        await database.close()


async def test_the_settings_are_those_that_durability_needs(db: Database) -> None:
    def settings(connection: sqlite3.Connection) -> list[object]:
        pragmas = ("journal_mode", "synchronous", "foreign_keys", "user_version", "busy_timeout")
        return [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas]

    assert await db.run(settings) == ["wal", 2, 1, VERSION, 5000]


async def test_what_was_written_is_there_after_reopening(db: Database, path: Path) -> None:
    assert await db.run(writing("a")) == "a"
    await db.close()
    again = Database(path)
    await again.open()
    assert await again.read(names) == ["a"]
    await again.close()


async def test_closing_twice_is_fine_and_a_closed_database_says_so(db: Database) -> None:
    await db.close()
    await db.close()
    with pytest.raises(StoreError, match="store-closed"):
        await db.run(names)


async def test_two_daemons_do_not_share_a_state_directory(db: Database, path: Path) -> None:
    await db.run(writing("a"))
    with pytest.raises(StoreError) as caught:
        await Database(path).open()
    assert caught.value.code == "state-locked"
    assert f"pid {os.getpid()} " in caught.value.message


def test_the_lock_holds_between_processes_and_dies_with_its_holder(path: Path) -> None:
    script = (
        "import asyncio, pathlib, sys\n"
        "from mycoswarmd.store.db import Database\n"
        "async def main():\n"
        "    await Database(pathlib.Path(sys.argv[1])).open()\n"
        "    print('open', flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"open\n"
            with pytest.raises(StoreError, match=f"pid {process.pid} "):
                asyncio.run(Database(path).open())
        finally:
            process.kill()

    async def reopen() -> None:
        database = Database(path)
        await database.open()
        await database.close()

    asyncio.run(reopen())


async def test_a_database_of_a_newer_program_is_left_alone(db: Database, path: Path) -> None:
    await db.close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    connection.close()
    before = contents(path.parent)
    assert await code_of_open(path) == "store-newer"
    assert contents(path.parent) == before


async def test_a_directory_that_cannot_be_one_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert await code_of_open(tmp_path / "file" / "mycoswarm.db") == "store-io"


# -- damage ---------------------------------------------------------------------------------------


def flip_header(data: bytearray) -> None:
    data[0:16] = b"\xff" * 16


def flip_pages(data: bytearray) -> None:
    for page in range(4096, len(data), 4096):
        data[page : page + 64] = b"\xa5" * 64


def cut_to_a_page(data: bytearray) -> None:
    del data[4096:]


def cut_in_a_page(data: bytearray) -> None:
    del data[
        data.rindex(b"counter-") :
    ]  # the last pages may be of empty tables, and cutting those loses nothing


def cut_to_nothing(data: bytearray) -> None:
    data.clear()


def text_instead(data: bytearray) -> None:
    data[:] = b"not a database\n" * 1000


@pytest.mark.parametrize(
    "damage", [flip_header, flip_pages, cut_to_a_page, cut_in_a_page, cut_to_nothing, text_instead]
)
async def test_a_damaged_file_is_refused_and_never_written(
    db: Database, path: Path, damage: Callable[[bytearray], None]
) -> None:
    for n in range(50):
        await db.run(writing(f"counter-{n}"))
    await db.close()
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    before = contents(path.parent)
    with pytest.raises(StoreError) as caught:
        await Database(path).open()
    assert caught.value.code == "store-corrupt"
    assert str(path) in caught.value.message
    assert "restore" in caught.value.hint
    assert contents(path.parent) == before


async def test_damage_beside_a_log_that_was_not_merged_writes_neither(db: Database, path: Path) -> None:
    await db.run(writing("a"))
    other = path.parent.parent / "copy" / path.name  # what a kill leaves: the file and its -wal
    other.parent.mkdir(mode=0o700)
    for end in ("", "-wal"):
        data = bytearray(path.with_name(path.name + end).read_bytes())
        if not end:
            flip_header(data)
        other.with_name(path.name + end).write_bytes(data)
    before = contents(other.parent)
    assert len(before[f"{path.name}-wal"]) > 0
    assert await code_of_open(other) == "store-corrupt"
    assert contents(other.parent) == before


async def test_a_log_without_its_database_is_not_a_fresh_start(db: Database, path: Path) -> None:
    await db.run(writing("a"))
    other = path.parent.parent / "copy" / path.name
    other.parent.mkdir(mode=0o700)
    wal = other.with_name(f"{path.name}-wal")
    wal.write_bytes(path.with_name(wal.name).read_bytes())
    assert await code_of_open(other) == "store-corrupt"
    assert not other.exists()


async def test_a_half_made_new_database_is_made_again(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.with_name(f"{path.name}.new").write_bytes(b"half")
    database = Database(path)
    await database.open()
    assert await database.read(names) == []
    await database.close()
    assert {file.name for file in path.parent.iterdir()} == {"lock", path.name}


# -- the writer -----------------------------------------------------------------------------------


async def test_a_failing_function_undoes_only_its_own_changes(db: Database) -> None:
    def failing(connection: sqlite3.Connection) -> None:
        writing("lost")(connection)
        raise NotFound("unknown-task", "cannot find it")

    def broken(connection: sqlite3.Connection) -> None:
        writing("lost")(connection)
        raise ZeroDivisionError

    held = Held()
    outcomes: list[object] = []

    async def call(fn: Callable[[sqlite3.Connection], object]) -> None:
        try:
            outcomes.append(await db.run(fn))
        except (MycoswarmError, ZeroDivisionError) as exc:
            outcomes.append(type(exc))

    async with asyncio.TaskGroup() as group:
        group.create_task(call(held))
        while not held.entered.is_set():
            await asyncio.sleep(0.001)
        for fn in (writing("a"), failing, writing("b"), broken, writing("c")):
            group.create_task(call(fn))
            await asyncio.sleep(0)
        held.release.set()
    assert outcomes == [None, "a", NotFound, "b", ZeroDivisionError, "c"]
    assert await db.read(names) == ["a", "b", "c"]


async def test_one_fsync_serves_many_callers(db: Database, path: Path) -> None:
    held = Held()
    wal = path.with_name(f"{path.name}-wal")
    async with asyncio.TaskGroup() as group:
        group.create_task(db.run(held))
        while not held.entered.is_set():
            await asyncio.sleep(0.001)
        before = wal.stat().st_size
        for n in range(200):
            group.create_task(db.run(writing(f"{n:03}")))
        await asyncio.sleep(0.01)
        held.release.set()
    assert len(await db.read(names)) == 200
    # 200 transactions would be at least 200 frames of 4 KiB; one transaction is a few pages.
    assert wal.stat().st_size - before < 20 * 4096


async def test_too_many_waiting_callers_are_refused_not_stored(db: Database) -> None:
    held = Held()
    refused: list[Unavailable] = []

    async def call(n: int) -> None:
        try:
            await db.run(writing(f"{n:05}"))
        except Unavailable as exc:
            refused.append(exc)

    async with asyncio.TaskGroup() as group:
        group.create_task(db.run(held))
        while not held.entered.is_set():
            await asyncio.sleep(0.001)
        for n in range(MAX_WAITING + 7):
            group.create_task(call(n))
        await asyncio.sleep(0.1)
        held.release.set()
    assert [exc.code for exc in refused] == ["store-busy"] * 7
    assert len(await db.read(names)) == MAX_WAITING


async def test_a_cancelled_caller_leaves_the_thread_alone(db: Database) -> None:
    held = Held()
    async with asyncio.TaskGroup() as group:
        group.create_task(db.run(held))
        while not held.entered.is_set():
            await asyncio.sleep(0.001)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await db.run(writing("cancelled"))
        held.release.set()
    await db.run(writing("next"))
    assert await db.read(names) == ["cancelled", "next"]


async def test_a_read_does_not_wait_for_the_writer_and_cannot_write(db: Database) -> None:
    await db.run(writing("a"))
    held = Held()
    async with asyncio.TaskGroup() as group:
        group.create_task(db.run(held))
        while not held.entered.is_set():
            await asyncio.sleep(0.001)
        assert await db.read(names) == ["a"]
        held.release.set()
    with pytest.raises(StoreError, match="readonly"):
        await db.read(writing("b"))
    assert await db.read(names) == ["a"]


async def test_a_failing_read_concerns_its_caller_alone(db: Database) -> None:
    with pytest.raises(ZeroDivisionError):
        await db.read(lambda _: 1 // 0)
    assert await db.read(names) == []


async def test_another_programs_lock_is_said_and_waited_for(db: Database, path: Path) -> None:
    await db.close()
    patient = Database(path, busy_timeout_s=0.05)
    await patient.open()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError) as caught:
        await patient.run(writing("a"))
    assert caught.value.code == "store-locked"
    other.execute("COMMIT")
    other.close()
    await patient.run(writing("b"))
    assert await patient.read(names) == ["b"]
    await patient.close()


async def test_closing_settles_what_waits(db: Database, path: Path) -> None:
    async with asyncio.TaskGroup() as group:
        for n in range(20):
            group.create_task(db.run(writing(f"{n:02}")))
        await asyncio.sleep(0)
        await db.close()
    again = Database(path)
    await again.open()
    assert len(await again.read(names)) == 20
    await again.close()


# -- a full disk ----------------------------------------------------------------------------------


async def test_a_full_disk_fails_the_commit_and_heals(small_disk: Any) -> None:
    database = Database(small_disk.mount / "state" / "mycoswarm.db")
    await database.open()
    await database.run(writing("kept"))
    small_disk.fill()
    failures: list[StoreError] = []
    for n in range(40):
        try:
            await database.run(writing(f"n-{n:02}"))
        except StoreError as exc:
            failures.append(exc)
    assert {(exc.code, exc.hint.split(" ")[0]) for exc in failures} == {("disk-full", "free")}
    together: list[str] = []

    async def call(n: int) -> None:
        try:
            await database.run(writing(f"together-{n}" + "x" * 5000))
        except StoreError as exc:
            together.append(exc.code)

    async with asyncio.TaskGroup() as group:
        for n in range(10):
            group.create_task(call(n))
    assert together == ["disk-full"] * 10
    kept = await database.read(names)
    assert "kept" in kept
    assert len(kept) == 41 - len(failures)
    small_disk.empty()
    await database.run(writing("after"))
    await database.close()
    again = Database(database.path)
    await again.open()
    assert await again.read(names) == sorted([*kept, "after"])
    await again.close()


async def test_a_function_that_needs_too_much_room_keeps_nothing(db: Database) -> None:
    def limit(connection: sqlite3.Connection) -> None:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")

    def huge(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO usage VALUES (?, 0, 1)", ("x" * 100_000,))

    await db.run(limit)
    held, codes = Held(), []

    async def call(fn: Callable[[sqlite3.Connection], object]) -> None:
        try:
            await db.run(fn)
        except StoreError as exc:
            codes.append(exc.code)

    async with asyncio.TaskGroup() as group:
        group.create_task(call(held))
        while not held.entered.is_set():
            await asyncio.sleep(0.001)
        for fn in (huge, huge):
            group.create_task(call(fn))
        await asyncio.sleep(0.01)
        held.release.set()
    assert codes == ["disk-full"] * 2
    assert await db.read(names) == []
    await db.run(writing("small"))
    assert await db.read(names) == ["small"]
