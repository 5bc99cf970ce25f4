"""Workspaces and changes: files named by the SHA-256 of what is in them.

1. A blob appears whole or not at all: written under another name, fsynced, renamed, directory fsynced.
2. What is read is hashed again: a disk's mistake is said, never handed on.
3. Blobs never take the last of a disk: receipts must still be written.

Source: https://github.com/etcd-io/etcd/issues/6368 (a rename without fsync of the directory can vanish).
"""

import asyncio
import errno
import hashlib
import os
import re
import tempfile
import threading
from pathlib import Path

from mycoswarmd.errors import BadRequest, NotFound, StoreError

_NAME = re.compile(r"[0-9a-f]{64}")
_UNFINISHED = ".new-"
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
        self._writing = threading.Lock()  # one at a time, so that all of them together leave the reserve

    async def put(self, data: bytes, *, expect_sha256: str | None = None) -> str:
        """Store bytes durably and return their sha256 in hex.

        Raises:
            BadRequest: blob-too-large; wrong-hash when it is not the expected one.
            StoreError: disk-full, store-io.
        """
        if len(data) > self._max_bytes:
            raise BadRequest(
                "blob-too-large",
                f"cannot store {len(data):,} bytes: at most {self._max_bytes:,} are accepted",
                hint="leave build outputs and data sets out of the workspace",
                http_status=413,
            )
        return await asyncio.to_thread(self._put, data, expect_sha256)

    async def get(self, sha256: str) -> bytes:
        """Return the bytes, checked against the hash, or raise NotFound("unknown-blob")."""
        if _NAME.fullmatch(sha256) is None:
            raise _unknown(sha256)
        return await asyncio.to_thread(self._get, sha256)

    async def sweep(self, keep: set[str]) -> int:
        """Delete every blob that is not to be kept, and unfinished ones; return how many blobs went.

        Only at start, before anything can be put: a blob comes before the task that refers to it.
        """
        return await asyncio.to_thread(self._sweep, keep)

    def _put(self, data: bytes, expect_sha256: str | None) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        if expect_sha256 not in {None, sha256}:
            raise BadRequest(
                "wrong-hash",
                "cannot store this: it does not have the hash that it should have",
                hint="the upload was damaged or the name is wrong: the SHA-256 in lower-case hex is accepted",
            )
        with self._writing:
            self._write(data, sha256)
        return sha256

    def _write(self, data: bytes, sha256: str) -> None:
        path = self._path / sha256
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._holds(path, sha256):
                return
            self._leave_reserve(len(data))
            fd, new = tempfile.mkstemp(prefix=_UNFINISHED, dir=self._path)  # mode 0600
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                Path(new).replace(path)
            except OSError:
                Path(new).unlink(missing_ok=True)
                raise
            self._fsync_directory()
        except OSError as exc:
            raise _translate(exc, self._path) from exc

    def _leave_reserve(self, size_bytes: int) -> None:
        """Refuse a blob after which too little of the disk would be free."""
        disk = os.statvfs(self._path)
        if disk.f_blocks == 0:
            return  # a file system that does not say
        reserve_bytes = min(RESERVE_BYTES, disk.f_blocks * disk.f_frsize // _RESERVE_PART)
        if disk.f_bavail * disk.f_frsize - size_bytes < reserve_bytes:
            raise StoreError(
                "disk-full",
                f"cannot store {size_bytes:,} bytes in {str(self._path)!r}: less than"
                f" {reserve_bytes >> 20:,} MiB of the disk would stay free, which receipts need",
                hint=_FREE_SOME,
            )

    def _holds(self, path: Path, sha256: str) -> bool:
        """Whether the blob is there and whole; a damaged one is replaced by the good copy at hand."""
        if not path.exists():
            return False
        with path.open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest() == sha256
        if whole:
            self._fsync_directory()  # who renamed it may not have come so far
        return whole

    def _get(self, sha256: str) -> bytes:
        try:
            with (self._path / sha256).open("rb") as file:
                data = file.read(self._max_bytes + 1)
        except FileNotFoundError as exc:
            raise _unknown(sha256) from exc
        except OSError as exc:
            raise _translate(exc, self._path) from exc
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StoreError(
                "blob-damaged",
                f"cannot use blob {sha256!r}: its contents changed on the disk",
                hint="submit the task with its workspace again; check the disk (`dmesg`)",
            )
        return data

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

    def _fsync_directory(self) -> None:
        fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
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
