"""Blobs: whole or absent, checked when read, bounded, swept, never in memory."""

import asyncio
import hashlib
import os
import shutil
import stat
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mycoswarmd.errors import BadRequest, NotFound, StoreError
from mycoswarmd.store import blobs
from mycoswarmd.store.blobs import DirectoryBlobStore, NewBlob, OpenBlob
from mycoswarmd.wire.workspace import Entry, EntryKind, ReadAt, list_workspace, write_workspace
from tests.blobs import get, put


@pytest.fixture
def store(tmp_path: Path) -> DirectoryBlobStore:
    return DirectoryBlobStore(tmp_path / "blobs", max_bytes=1_000)


async def test_a_blob_is_named_by_its_hash_and_private(store: DirectoryBlobStore, tmp_path: Path) -> None:
    sha256 = await put(store, b"data")
    assert sha256 == hashlib.sha256(b"data").hexdigest()
    assert await get(store, sha256) == b"data"
    assert await put(store, b"data") == sha256
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == [sha256]
    assert stat.S_IMODE((tmp_path / "blobs").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "blobs" / sha256).stat().st_mode) == 0o600


async def test_a_blob_is_bounded(store: DirectoryBlobStore) -> None:
    assert len(await get(store, await put(store, b"x" * 1_000))) == 1_000
    with pytest.raises(BadRequest) as caught:
        await put(store, b"x" * 1_001)
    assert (caught.value.code, caught.value.http_status) == ("blob-too-large", 413)
    async with store.writing() as blob:
        for _ in range(10):
            await blob.write(b"x" * 100)
        with pytest.raises(BadRequest, match="blob-too-large"):
            await blob.write(b"x")


@pytest.mark.parametrize(
    "name", ["a" * 64, "", "..", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n"]
)
async def test_an_unknown_name_is_unknown_and_no_path(store: DirectoryBlobStore, name: str) -> None:
    with pytest.raises(NotFound, match="unknown-blob"):
        await get(store, name)


@pytest.mark.parametrize("damaged", [b"", b"dat", b"Data", b"data" * 1_000])
async def test_a_damaged_blob_is_said_and_replaced_by_a_good_copy(
    store: DirectoryBlobStore, tmp_path: Path, damaged: bytes
) -> None:
    sha256 = await put(store, b"data")
    (tmp_path / "blobs" / sha256).write_bytes(damaged)
    with pytest.raises(StoreError, match="blob-damaged"):
        await get(store, sha256)
    assert await put(store, b"data") == sha256
    assert await get(store, sha256) == b"data"


async def test_what_nothing_refers_to_is_swept(store: DirectoryBlobStore, tmp_path: Path) -> None:
    assert await store.sweep(set()) == 0
    kept, gone = await put(store, b"kept"), await put(store, b"gone")
    (tmp_path / "blobs" / ".new-half").write_bytes(b"half")
    (tmp_path / "blobs" / "README").write_bytes(b"somebody else's")
    assert await store.sweep({kept, "f" * 64}) == 1
    assert {path.name for path in (tmp_path / "blobs").iterdir()} == {kept, "README"}
    with pytest.raises(NotFound):
        await get(store, gone)


async def test_a_directory_that_cannot_be_one_is_said(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_text("a file")
    with pytest.raises(StoreError, match="store-io"):
        await put(DirectoryBlobStore(tmp_path / "blobs", max_bytes=10), b"x")


async def test_a_full_disk_leaves_no_half_blob(small_disk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mycoswarmd.store.blobs.RESERVE_BYTES", -(64 << 20))  # no refusal before the write
    store = DirectoryBlobStore(small_disk.mount / "blobs", max_bytes=4 << 20)
    sha256 = await put(store, b"small")
    with pytest.raises(StoreError, match="disk-full") as caught:
        await put(store, b"x" * (2 << 20))
    assert isinstance(caught.value.__cause__, OSError)
    assert [path.name for path in (small_disk.mount / "blobs").iterdir()] == [sha256]
    assert await get(store, sha256) == b"small"


async def test_the_last_of_a_disk_is_left_for_receipts(small_disk: Any) -> None:
    store = DirectoryBlobStore(small_disk.mount / "blobs", max_bytes=4 << 20)
    fits = b"x" * (900 << 10)
    sha256 = await put(store, fits)
    with pytest.raises(StoreError) as caught:
        await put(store, b"y" * (90 << 10))  # there would be room, but no twentieth left
    assert caught.value.code == "disk-full"
    assert caught.value.hint
    assert [path.name for path in (small_disk.mount / "blobs").iterdir()] == [sha256]
    assert len(await put(store, b"z")) == 64


async def test_blobs_that_come_together_are_counted_together(
    small_disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs

    def seen_early(path: Path) -> os.statvfs_result:
        disk = real(path)
        time.sleep(0.05)
        return disk

    monkeypatch.setattr("mycoswarmd.store.blobs.os.statvfs", seen_early)
    store = DirectoryBlobStore(small_disk.mount / "blobs", max_bytes=4 << 20)
    refused: list[str] = []

    async def try_to_put(data: bytes) -> None:
        try:
            await put(store, data, each=len(data))
        except StoreError as exc:
            refused.append(exc.code)

    async with asyncio.TaskGroup() as group:
        for n in range(2):  # there would be room for both, but no twentieth left
            group.create_task(try_to_put(bytes([n]) * (490 << 10)))
    assert refused == ["disk-full"]
    assert shutil.disk_usage(small_disk.mount).free >= (1 << 20) // 20


async def test_a_blob_is_refused_as_it_grows_and_its_room_is_free_again(small_disk: Any) -> None:
    store = DirectoryBlobStore(small_disk.mount / "blobs", max_bytes=4 << 20)

    async def write_on(blob: NewBlob) -> None:
        while True:
            await blob.write(b"x" * 4096)

    async with store.writing() as blob:
        with pytest.raises(StoreError, match="disk-full"):
            await write_on(blob)
        assert blob.size_bytes > 900 << 10
        assert shutil.disk_usage(small_disk.mount).free >= (1 << 20) // 20
    assert len(await put(store, b"y" * (900 << 10))) == 64


async def test_a_blob_with_another_hash_than_expected_is_not_stored(
    store: DirectoryBlobStore, tmp_path: Path
) -> None:
    for wrong in ("0" * 64, "", hashlib.sha256(b"data").hexdigest().upper()):
        with pytest.raises(BadRequest, match="wrong-hash"):
            await put(store, b"data", expect_sha256=wrong)
    assert not list((tmp_path / "blobs").iterdir())
    sha256 = hashlib.sha256(b"data").hexdigest()
    assert await put(store, b"data", expect_sha256=sha256) == sha256


async def test_the_empty_blob_is_one(store: DirectoryBlobStore) -> None:
    sha256 = await put(store, b"")
    assert sha256 == hashlib.sha256(b"").hexdigest()
    assert await get(store, sha256) == b""


async def test_a_blob_is_not_there_before_it_is_finished(store: DirectoryBlobStore, tmp_path: Path) -> None:
    sha256 = hashlib.sha256(b"data").hexdigest()
    async with store.writing() as blob:
        await blob.write(b"da")
        await blob.write(b"ta")
        assert blob.size_bytes == 4
        (unfinished,) = (tmp_path / "blobs").iterdir()
        assert stat.S_IMODE(unfinished.stat().st_mode) == 0o600
        with pytest.raises(NotFound):
            await get(store, sha256)
        assert await blob.finish() == sha256
        assert await get(store, sha256) == b"data"
    assert await get(store, sha256) == b"data"


class Gone(Exception):
    """The sender went away."""


@pytest.mark.parametrize("why", [Gone, asyncio.CancelledError])
async def test_what_was_not_finished_is_removed_at_once(
    store: DirectoryBlobStore, tmp_path: Path, why: type[BaseException]
) -> None:
    async def send_half() -> None:
        async with store.writing() as blob:
            await blob.write(b"half")
            assert len(list((tmp_path / "blobs").iterdir())) == 1
            raise why

    with pytest.raises(why):
        await send_half()
    assert not list((tmp_path / "blobs").iterdir())
    async with store.writing() as blob:
        await blob.write(b"left alone")
    assert not list((tmp_path / "blobs").iterdir())


async def test_who_is_cancelled_in_the_middle_of_a_write_leaves_nothing(
    store: DirectoryBlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is still at it: the file is not taken away from it, and is gone when the task is."""
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()
    real = os.statvfs

    def slow(path: object) -> os.statvfs_result:
        begun.set()
        assert may_end.wait(60)
        ended.set()
        return real(path)  # type: ignore[arg-type]

    monkeypatch.setattr("mycoswarmd.store.blobs.os.statvfs", slow)
    writing = asyncio.create_task(put(store, b"data"))
    assert await asyncio.to_thread(begun.wait, 60)
    writing.cancel()
    await asyncio.sleep(0.05)
    writing.cancel()  # by somebody who is even more impatient
    await asyncio.sleep(0.05)
    assert not writing.done()
    assert len(list((tmp_path / "blobs").iterdir())) == 1
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert ended.is_set()
    assert not list((tmp_path / "blobs").iterdir())


async def test_what_was_written_so_far_can_be_looked_at(store: DirectoryBlobStore) -> None:
    def look(read_at: ReadAt) -> list[bytes]:
        assert threading.current_thread() is not threading.main_thread()
        return [read_at(0, 4), read_at(4, 100), read_at(8, 1)]

    async with store.writing() as blob:
        assert await blob.inspect(lambda read_at: read_at(0, 10)) == b""
        await blob.write(b"data")
        await blob.write(b"more")
        assert await blob.inspect(look) == [b"data", b"more", b""]
        await blob.write(b"!")
        assert await get(store, await blob.finish()) == b"datamore!"


async def test_a_blob_that_is_sent_again_takes_the_place_of_the_one_there(
    store: DirectoryBlobStore, tmp_path: Path
) -> None:
    sha256 = await put(store, b"data")
    async with store.reading(sha256) as blob:
        pieces = blob.pieces(2)
        assert await anext(pieces) == b"da"
        assert await put(store, b"data", expect_sha256=sha256) == sha256
        assert await anext(pieces) == b"ta"
    with pytest.raises(BadRequest, match="wrong-hash"):
        await put(store, b"other", expect_sha256=sha256)
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == [sha256]
    assert await get(store, sha256) == b"data"


async def test_what_is_there_is_not_read_for_who_claims_to_send_it(
    store: DirectoryBlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256, other = await put(store, b"data"), hashlib.sha256(b"other").hexdigest()
    monkeypatch.setattr("mycoswarmd.store.blobs.FileIO", None)
    with pytest.raises(BadRequest, match="wrong-hash"):
        async with store.writing(expect_sha256=sha256) as blob:
            await blob.finish()
    await store.check_there(sha256)
    for unknown in (other, "", "..", sha256.upper()):
        with pytest.raises(NotFound, match="unknown-blob"):
            await store.check_there(unknown)


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 100), lambda path: os.truncate(path, 0)])
async def test_a_blob_that_shrinks_while_it_is_read_is_said(
    store: DirectoryBlobStore, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    sha256 = await put(store, b"x" * 1_000)
    async with store.reading(sha256) as blob:
        pieces = blob.pieces(100)
        assert len(await anext(pieces)) == 100
        damage(tmp_path / "blobs" / sha256)
        with pytest.raises(StoreError, match="blob-damaged"):
            async for _ in pieces:
                pass


async def test_a_blob_is_read_although_another_takes_its_place(
    store: DirectoryBlobStore, tmp_path: Path
) -> None:
    sha256 = await put(store, b"x" * 1_000)
    async with store.reading(sha256) as blob:
        (tmp_path / "blobs" / sha256).unlink()
        assert b"".join([piece async for piece in blob.pieces(300)]) == b"x" * 1_000


async def test_a_blob_is_never_in_memory(tmp_path: Path) -> None:
    store = DirectoryBlobStore(tmp_path / "blobs", max_bytes=64 << 20)
    piece, size_bytes = b"x" * (256 << 10), 0
    tracemalloc.start()
    try:
        async with store.writing() as new:
            for _ in range(128):
                await new.write(piece)
            sha256 = await new.finish()
        async with store.reading(sha256) as blob:
            async for piece in blob.pieces(64 << 10):
                size_bytes += len(piece)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size_bytes == 32 << 20
    assert peak_bytes < 4 << 20


async def test_the_loop_goes_on_while_a_disk_is_slow(
    store: DirectoryBlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Event(), threading.Event()
    real = os.fsync

    def slow(fd: int) -> None:
        begun.set()
        assert may_end.wait(60)
        real(fd)

    monkeypatch.setattr("mycoswarmd.store.blobs.os.fsync", slow)
    writing = asyncio.create_task(put(store, b"data"))
    while not begun.is_set():
        await asyncio.sleep(0.01)
    for _ in range(16):
        await asyncio.sleep(0.01)
    assert not writing.done()
    may_end.set()
    assert await get(store, await writing) == b"data"


async def test_nothing_else_in_the_node_waits_for_a_thread(
    store: DirectoryBlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on, begun = threading.Event(), threading.Event()
    real = os.statvfs

    def stuck(path: Path) -> os.statvfs_result:
        begun.set()
        assert may_go_on.wait(60)
        return real(path)

    monkeypatch.setattr("mycoswarmd.store.blobs.os.statvfs", stuck)
    async with asyncio.TaskGroup() as group:
        for n in range(64):  # more than there are threads anywhere
            group.create_task(put(store, bytes([n])))
        await asyncio.sleep(0.1)
        try:
            async with asyncio.timeout(30):
                assert await asyncio.to_thread(begun.wait, 30)
        finally:
            may_go_on.set()


async def test_few_blobs_are_hashed_at_once_and_who_writes_waits_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DirectoryBlobStore(tmp_path / "blobs", max_bytes=4 << 20)
    names = [await put(store, bytes([n]) * (4 << 20), each=1 << 20) for n in range(6)]
    real, hashed, most, may_end = OpenBlob._hash, Counter[OpenBlob](), 0, threading.Event()

    def seen(blob: OpenBlob, digest: Any, offset: int) -> int:
        nonlocal most
        hashed[blob] += (size := real(blob, digest, offset))
        most = max(most, sum(size < 4 << 20 for size in list(hashed.values())))
        assert may_end.wait(60)
        return size

    monkeypatch.setattr(OpenBlob, "_hash", seen)
    async with asyncio.TaskGroup() as group:
        reading = [group.create_task(get(store, name)) for name in names]
        try:
            async with asyncio.timeout(30):
                while most < blobs._HASHINGS:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.1)  # in which no more begin
                assert len(await put(store, b"somebody else's")) == 64
        finally:
            may_end.set()
    assert [len(one.result()) for one in reading] == [4 << 20] * 6
    assert most == blobs._HASHINGS


async def test_one_blob_is_looked_at_at_a_time_and_who_writes_waits_for_none(
    store: DirectoryBlobStore,
) -> None:
    may_end, looks = threading.Event(), 0

    def look(read_at: ReadAt) -> bytes:
        nonlocal looks
        looks += 1
        assert may_end.wait(60)
        return read_at(0, 4)

    async def look_at_it() -> bytes:
        async with store.writing() as blob:
            await blob.write(b"data")
            return await blob.inspect(look)

    async with asyncio.TaskGroup() as group:
        looking = [group.create_task(look_at_it()) for _ in range(8)]
        try:
            async with asyncio.timeout(30):
                while not looks:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.1)  # in which no other begins
                assert len(await put(store, b"somebody else's")) == 64
            assert looks == 1
        finally:
            may_end.set()
    assert [one.result() for one in looking] == [b"data"] * 8


async def test_who_is_cancelled_does_not_wait_for_a_long_look(tmp_path: Path) -> None:
    store = DirectoryBlobStore(tmp_path / "blobs", max_bytes=64 << 20)
    count, listed, begun, may_go_on = 20_000, 0, threading.Event(), threading.Event()
    tar = write_workspace([Entry(path=f"f{n}", kind=EntryKind.FILE) for n in range(count)])

    def look(read_at: ReadAt) -> None:
        nonlocal listed
        for _ in list_workspace(read_at, len(tar)):
            listed += 1
            begun.set()
            assert may_go_on.wait(60)

    async def look_at_it() -> None:
        async with store.writing() as blob:
            await blob.write(tar)
            await blob.inspect(look)

    looking = asyncio.create_task(look_at_it())
    assert await asyncio.to_thread(begun.wait, 60)
    looking.cancel()
    await asyncio.sleep(0.05)  # in which it hears of that
    may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await looking
    assert listed <= 100  # the look ends at its next header
    assert not list((tmp_path / "blobs").iterdir())


def test_hashing_is_done_in_pieces_that_can_be_waited_for() -> None:
    assert blobs._HASHED_BYTES <= 4 << 20
