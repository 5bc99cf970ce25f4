"""What SQLite reports, as our errors: the only place that knows its result codes.

Source: https://www.sqlite.org/rescode.html
"""

import sqlite3

from mycoswarmd.errors import StoreError

_CORRUPT = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
CORRUPT_HINT = (
    "the file was left as it is: move the database and its -wal file aside, keep them, and restore a copy or"
    " start without one; `sqlite3 FILE .recover` may save what is in it"
)


def translate(exc: sqlite3.Error, path: str) -> StoreError:
    """Return the error that tells a person what to do about this one."""
    # The low byte is the primary code, the rest says which system call.
    code = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return StoreError(
            "disk-full",
            f"cannot write to {path!r}: the disk is full",
            hint="free some space; what was acknowledged is safe, and the node tries again by itself",
        )
    if code in _CORRUPT:
        return StoreError("store-corrupt", f"cannot use the database {path!r}: {exc}", hint=CORRUPT_HINT)
    if code in _BUSY:
        return StoreError(
            "store-locked",
            f"cannot use the database {path!r}: another program holds it locked",
            hint="close the program that has the database open; `fuser` names it",
        )
    return StoreError(
        "store-io",
        f"cannot use the database {path!r}: {exc}",
        hint="check the disk (`dmesg`, free space, permissions of the state directory)",
    )
