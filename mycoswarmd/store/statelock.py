"""One daemon per state directory: an flock that the kernel releases when its holder dies.

Source: flock(2). The pid in the file is for people; the lock is what counts.
"""

import fcntl
import os
from pathlib import Path

from mycoswarmd.errors import StoreError


class StateLock:
    """Holds STATE/lock while it is alive."""

    __slots__ = ("_fd",)

    def __init__(self, directory: Path) -> None:
        """Take the lock, or raise StoreError("state-locked") naming the pid that holds it."""
        path = directory / "lock"
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            holder = os.pread(self._fd, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._fd)
            raise StoreError(
                "state-locked",
                f"cannot use the state directory {str(directory)!r}: mycoswarmd with pid {holder} uses it",
                hint="stop that one first, or give this one another directory with --state",
            ) from exc
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let go; the file stays, an flock on a removed file would exclude nobody."""
        os.close(self._fd)
