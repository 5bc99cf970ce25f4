"""Workspaces and changes: files named by the SHA-256 of what is in them.

1. A blob appears whole or not at all: written under another name, fsynced, renamed, directory fsynced.
2. What is read is hashed before: a disk's mistake is said, never handed on.
3. Blobs never take the last of a disk: receipts must still be written.
4. A blob is a file, never bytes in memory: it is written, hashed and read in pieces.
5. All of that is done by a few threads of the store's own, and few blobs are hashed at once: however much
   there is to do, nothing else in the node waits for a thread.

Source: https://github.com/etcd-io/etcd/issues/6368 (a rename without fsync of the directory can vanish).
"""

import asyncio
import errno
import hashlib
import os
import re
import tempfile
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from io import FileIO
from pathlib import Path
from typing import TypeVar

from mycoswarmd.errors import BadRequest, NotFound, StoreError
from mycoswarmd.wire.workspace import ReadAt

T = TypeVar("T")

_NAME = re.compile(r"[0-9a-f]{64}")
_UNFINISHED = ".new-"
# What is hashed in one go: long enough to be worth a thread, short enough to be waited for.
_HASHED_BYTES = 1 << 20
_THREADS = 4
# With the one that is looked at fewer than there are threads: who writes or reads waits for no whole blob.
_HASHINGS = 2
# What stays free: a million receipts, or on a small disk a twentieth of it.
RESERVE_BYTES = 512 << 20
_RESERVE_PART = 20
_FREE_SOME = "free some space, then try again"


class DirectoryBlobStore:
    """Blobs in a private directory; implements flow.ports.BlobStore.

    Args:
        path: the directory; made with mode 0700.
        max_bytes: of one blob.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._shop = _Shop(path)

    @asynccontextmanager
    async def writing(self, *, expect_sha256: str | None = None) -> AsyncIterator["NewBlob"]:
        """Hold a blob that is being written; one that was not finished is gone at the end.

        Raises:
            BadRequest: blob-too-large from `write`; wrong-hash from `finish` when it is not the expected one.
            StoreError: disk-full, store-io.
        """
        new = NewBlob(self._shop, self._max_bytes, expect_sha256)
        try:
            yield new
        finally:
            await self._shop.do(new.close)

    @asynccontextmanager
    async def reading(self, sha256: str) -> AsyncIterator["OpenBlob"]:
        """Hold a blob open that was checked against its hash.

        Raises:
            NotFound: unknown-blob.
            StoreError: blob-damaged, store-io; also from `pieces`.
        """
        blob = OpenBlob(self._shop, sha256)
        try:
            await blob.open(self._max_bytes)
            yield blob
        finally:
            blob.close()

    async def check_there(self, sha256: str) -> None:
        """Raise NotFound("unknown-blob") where there is none, or StoreError; it may be damaged."""
        await self._shop.do(_find, self._path, sha256)

    async def sweep(self, keep: set[str]) -> int:
        """Delete every blob that is not to be kept, and unfinished ones; return how many blobs went.

        Only at start, before anything can be put: a blob comes before the task that refers to it.
        """
        return await asyncio.to_thread(self._sweep, keep)

    def _sweep(self, keep: set[str]) -> int:
        removed = 0
        try:
            if not self._path.exists():
                return 0
            for path in self._path.iterdir():
                if _NAME.fullmatch(path.name) is not None and path.name not in keep:
                    path.unlink()
                    removed += 1
                elif path.name.startswith(_UNFINISHED):
                    path.unlink()
        except OSError as exc:
            raise _translate(exc, self._path) from exc
        return removed


class NewBlob:
    """A blob that is being written; implements flow.ports.NewBlob.

    Attributes:
        size_bytes: how much was written.
    """

    def __init__(self, shop: "_Shop", max_bytes: int, expect_sha256: str | None) -> None:
        self.size_bytes = 0
        self._shop = shop
        self._directory = shop.directory
        self._max_bytes = max_bytes
        self._expect_sha256 = expect_sha256
        self._digest = hashlib.sha256()
        self._file: FileIO | None = None  # from the first piece on
        self._path: Path | None = None  # until it has its name

    async def write(self, piece: bytes) -> None:
        """Append a piece; BadRequest("blob-too-large") or StoreError where it may not grow so far."""
        if self.size_bytes + len(piece) > self._max_bytes:
            raise BadRequest(
                "blob-too-large",
                f"cannot store more than {self._max_bytes:,} bytes",
                hint="leave build outputs and data sets out of the workspace",
                http_status=413,
            )
        await self._shop.do(self._write, piece)
        self.size_bytes += len(piece)

    async def inspect(self, look: Callable[[ReadAt], T]) -> T:
        """Call something, in a thread, that reads at offsets what was written so far.

        When the caller is cancelled, the next read ends it.
        """
        is_over = threading.Event()

        def read_at(offset: int, size_bytes: int) -> bytes:
            if is_over.is_set():
                raise _Over
            return os.pread(self._opened().fileno(), size_bytes, offset)

        async with self._shop.looking:
            return await self._shop.do(look, read_at, on_cancel=is_over.set)

    async def finish(self) -> str:
        """Make it durable, and return its sha256 in hex."""
        return await self._shop.do(self._finish)

    def close(self) -> None:
        """Remove what was not finished."""
        with suppress(OSError):  # the next start sweeps
            if self._path is not None:
                self._path.unlink(missing_ok=True)
        with suppress(OSError):
            if self._file is not None:
                self._file.close()

    def _write(self, piece: bytes) -> None:
        self._digest.update(piece)
        file = self._opened()
        with self._shop.growing:
            self._leave_reserve(len(piece))
            rest = memoryview(piece)
            while rest:
                rest = rest[file.write(rest) :]

    def _opened(self) -> FileIO:
        if self._file is None:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd, name = tempfile.mkstemp(prefix=_UNFINISHED, dir=self._directory)  # mode 0600
            self._path, self._file = Path(name), FileIO(fd, "r+")
        return self._file

    def _finish(self) -> str:
        sha256 = self._digest.hexdigest()
        if self._expect_sha256 not in {None, sha256}:
            raise BadRequest(
                "wrong-hash",
                "cannot store this: it does not have the hash that it should have",
                hint="the upload was damaged or the name is wrong: the SHA-256 in lower-case hex is accepted",
            )
        os.fsync(self._opened().fileno())
        assert self._path is not None
        self._path.replace(self._directory / sha256)  # also where it is already: that may be damaged
        self._path = None
        _fsync_directory(self._directory)
        return sha256

    def _leave_reserve(self, more_bytes: int) -> None:
        """Refuse to grow so far that too little of the disk would be free."""
        disk = os.statvfs(self._directory)
        if disk.f_blocks == 0:
            return  # a file system that does not say
        reserve_bytes = min(RESERVE_BYTES, disk.f_blocks * disk.f_frsize // _RESERVE_PART)
        if disk.f_bavail * disk.f_frsize - more_bytes < reserve_bytes:
            raise StoreError(
                "disk-full",
                f"cannot store more than {self.size_bytes:,} bytes in {str(self._directory)!r}: less than"
                f" {reserve_bytes >> 20:,} MiB of the disk would stay free, which receipts need",
                hint=_FREE_SOME,
            )


class OpenBlob:
    """A blob that is being read; implements flow.ports.OpenBlob.

    Attributes:
        size_bytes: how much there is.
    """

    def __init__(self, shop: "_Shop", sha256: str) -> None:
        self.size_bytes = 0
        self._shop = shop
        self._sha256 = sha256
        self._file: FileIO | None = None

    async def open(self, max_bytes: int) -> None:
        """Open it, and check it against its hash."""
        await self._shop.do(self._open)
        if self.size_bytes > max_bytes:
            raise self._damaged()
        digest, offset = hashlib.sha256(), 0
        async with self._shop.hashing:
            while offset < self.size_bytes:
                offset += await self._shop.do(self._hash, digest, offset)
        if digest.hexdigest() != self._sha256:
            raise self._damaged()

    async def pieces(self, at_most_bytes: int) -> AsyncGenerator[bytes, None]:
        """Yield all of it."""
        offset = 0
        while offset < self.size_bytes:
            size_bytes = min(at_most_bytes, self.size_bytes - offset)
            piece = await self._shop.do(self._read, offset, size_bytes)
            offset += len(piece)
            yield piece

    def close(self) -> None:
        """Close it."""
        if self._file is not None:
            self._file.close()

    def _open(self) -> None:
        self._file = FileIO(_find(self._shop.directory, self._sha256))
        self.size_bytes = os.fstat(self._file.fileno()).st_size

    def _read(self, offset: int, size_bytes: int) -> bytes:
        assert self._file is not None
        piece = os.pread(self._file.fileno(), size_bytes, offset)
        if not piece:
            raise self._damaged()
        return piece

    def _hash(self, digest: "hashlib._Hash", offset: int) -> int:
        piece = self._read(offset, _HASHED_BYTES)
        digest.update(piece)
        return len(piece)

    def _damaged(self) -> StoreError:
        damaged = StoreError(
            "blob-damaged",
            f"cannot use blob {self._sha256!r}: its contents changed on the disk",
            hint="submit the task with its workspace again; check the disk (`dmesg`)",
        )
        damaged.retryable = False  # time does not cure it
        return damaged


class _Shop:
    """Where the work on blobs is done, a little at a time.

    Attributes:
        directory: of the blobs.
        growing: held by the one blob that grows, so that all of them together leave the reserve.
        hashing: held by those that are hashed from their beginning to their end.
        looking: held by the one that is looked at.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.growing = threading.Lock()
        self.hashing = asyncio.Semaphore(_HASHINGS)
        self.looking = asyncio.Semaphore(1)  # it is Python that works: two would be no faster
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="blobs")

    async def do(
        self, call: Callable[..., T], *args: object, on_cancel: Callable[[], None] = lambda: None
    ) -> T:
        """Call in a thread; who is cancelled waits for it, so that no file is closed while it is used."""
        work = asyncio.get_running_loop().run_in_executor(self._threads, partial(call, *args))
        try:
            return await asyncio.shield(work)
        except OSError as exc:
            raise _translate(exc, self.directory) from exc
        except asyncio.CancelledError:
            on_cancel()
            while not work.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([work])
            if not work.cancelled():
                work.exception()  # nobody else asks
            raise


class _Over(Exception):
    """Nobody wants to know any more what is looked at."""


def _find(directory: Path, sha256: str) -> Path:
    path = directory / sha256
    if _NAME.fullmatch(sha256) is None or not path.is_file():
        raise _unknown(sha256)
    return path


def _fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unknown(sha256: str) -> NotFound:
    return NotFound(
        "unknown-blob",
        f"cannot find blob {sha256[:80]!r}",
        hint="upload the workspace first, with PUT /api/blobs/SHA256",
    )


def _translate(exc: OSError, path: Path) -> StoreError:
    if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
        return StoreError(
            "disk-full",
            f"cannot write to {str(path)!r}: the disk is full",
            hint=_FREE_SOME,
        )
    return StoreError(
        "store-io", f"cannot use {str(path)!r}: {exc.strerror}", hint="check the disk (`dmesg`)"
    )
