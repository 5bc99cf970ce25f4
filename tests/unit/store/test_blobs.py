"""Blobs: whole or absent, checked when read, bounded, swept."""

import asyncio
import hashlib
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from mycoswarmd.errors import BadRequest, NotFound, StoreError
from mycoswarmd.store.blobs import DirectoryBlobStore


@pytest.fixture
def store(tmp_path: Path) -> DirectoryBlobStore:
    return DirectoryBlobStore(tmp_path / "blobs", max_bytes=1_000)


async def test_a_blob_is_named_by_its_hash_and_private(store: DirectoryBlobStore, tmp_path: Path) -> None:
    sha256 = await store.put(b"data")
    assert sha256 == hashlib.sha256(b"data").hexdigest()
    assert await store.get(sha256) == b"data"
    assert await store.put(b"data") == sha256
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == [sha256]
    assert stat.S_IMODE((tmp_path / "blobs").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "blobs" / sha256).stat().st_mode) == 0o600


async def test_a_blob_is_bounded(store: DirectoryBlobStore) -> None:
    assert len(await store.get(await store.put(b"x" * 1_000))) == 1_000
    with pytest.raises(BadRequest) as caught:
        await store.put(b"x" * 1_001)
    assert (caught.value.code, caught.value.http_status) == ("blob-too-large", 413)


@pytest.mark.parametrize(
    "name", ["a" * 64, "", "..", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n"]
)
async def test_an_unknown_name_is_unknown_and_no_path(store: DirectoryBlobStore, name: str) -> None:
    with pytest.raises(NotFound, match="unknown-blob"):
        await store.get(name)


@pytest.mark.parametrize("damaged", [b"", b"dat", b"Data", b"data" * 1_000])
async def test_a_damaged_blob_is_said_and_replaced_by_a_good_copy(
    store: DirectoryBlobStore, tmp_path: Path, damaged: bytes
) -> None:
    sha256 = await store.put(b"data")
    (tmp_path / "blobs" / sha256).write_bytes(damaged)
    with pytest.raises(StoreError, match="blob-damaged"):
        await store.get(sha256)
    assert await store.put(b"data") == sha256
    assert await store.get(sha256) == b"data"


async def test_what_nothing_refers_to_is_swept(store: DirectoryBlobStore, tmp_path: Path) -> None:
    assert await store.sweep(set()) == 0
    kept, gone = await store.put(b"kept"), await store.put(b"gone")
    (tmp_path / "blobs" / ".new-half").write_bytes(b"half")
    (tmp_path / "blobs" / "README").write_bytes(b"somebody else's")
    assert await store.sweep({kept, "f" * 64}) == 1
    assert {path.name for path in (tmp_path / "blobs").iterdir()} == {kept, "README"}
    with pytest.raises(NotFound):
        await store.get(gone)


async def test_a_directory_that_cannot_be_one_is_said(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_text("a file")
    with pytest.raises(StoreError, match="store-io"):
        await DirectoryBlobStore(tmp_path / "blobs", max_bytes=10).put(b"x")


async def test_a_full_disk_leaves_no_half_blob(small_disk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mycoswarmd.store.blobs.RESERVE_BYTES", -(64 << 20))  # no refusal before the write
    store = DirectoryBlobStore(small_disk.mount / "blobs", max_bytes=4 << 20)
    sha256 = await store.put(b"small")
    with pytest.raises(StoreError, match="disk-full") as caught:
        await store.put(b"x" * (2 << 20))
    assert isinstance(caught.value.__cause__, OSError)
    assert [path.name for path in (small_disk.mount / "blobs").iterdir()] == [sha256]
    assert await store.get(sha256) == b"small"


async def test_the_last_of_a_disk_is_left_for_receipts(small_disk: Any) -> None:
    store = DirectoryBlobStore(small_disk.mount / "blobs", max_bytes=4 << 20)
    fits = b"x" * (900 << 10)
    sha256 = await store.put(fits)
    with pytest.raises(StoreError) as caught:
        await store.put(b"y" * (90 << 10))  # there would be room, but no twentieth left
    assert caught.value.code == "disk-full"
    assert caught.value.hint
    assert [path.name for path in (small_disk.mount / "blobs").iterdir()] == [sha256]
    assert await store.put(fits) == sha256  # it is there: nothing is written
    assert len(await store.put(b"z")) == 64


async def test_blobs_that_come_together_are_counted_together(small_disk: Any) -> None:
    store = DirectoryBlobStore(small_disk.mount / "blobs", max_bytes=4 << 20)
    refused: list[str] = []

    async def put(data: bytes) -> None:
        try:
            await store.put(data)
        except StoreError as exc:
            refused.append(exc.code)

    async with asyncio.TaskGroup() as group:
        for n in range(4):
            group.create_task(put(bytes([n]) * (400 << 10)))
    assert refused == ["disk-full"] * 2
    assert shutil.disk_usage(small_disk.mount).free >= (1 << 20) // 20


async def test_a_blob_with_another_hash_than_expected_is_not_stored(
    store: DirectoryBlobStore, tmp_path: Path
) -> None:
    for wrong in ("0" * 64, "", hashlib.sha256(b"data").hexdigest().upper()):
        with pytest.raises(BadRequest, match="wrong-hash"):
            await store.put(b"data", expect_sha256=wrong)
    assert not (tmp_path / "blobs").exists()
    sha256 = hashlib.sha256(b"data").hexdigest()
    assert await store.put(b"data", expect_sha256=sha256) == sha256
