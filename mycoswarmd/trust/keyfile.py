"""Private keys on disk: PKCS #8, one file each, readable by nobody else, replaced atomically.

Law: a key that others could read or replace is not used, and a key is durable before anybody hears of it.
"""

import os
import stat
from pathlib import Path

from mycoswarmd.errors import ConfigError, StoreError
from mycoswarmd.trust.keys import from_pem, to_pem

_MAX_BYTES = 4_096  # a PKCS #8 file of such a key has 119


def read_key(path: Path) -> bytes | None:
    """Return the seed in the file, or None where there is none; ConfigError where it cannot be used."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise ConfigError("key-unreadable", f"cannot read the key {str(path)!r}: {exc.strerror}") from exc
    with os.fdopen(descriptor, "rb") as file:
        _check_access(path, os.fstat(descriptor))
        data = file.read(_MAX_BYTES)
    _check_directory(path.parent)
    try:
        return from_pem(data)
    except ValueError as exc:
        raise ConfigError(
            "key-damaged",
            f"cannot use the key {str(path)!r}: it holds no Ed25519 key in PKCS #8",
            hint="restore it from a backup, or move it away and enroll this node again",
        ) from exc


def write_key(path: Path, seed: bytes) -> None:
    """Put a key there, durably; whatever stood there is replaced at once or not at all."""
    write_file(path, to_pem(seed))


def write_file(path: Path, data: bytes) -> None:
    """Replace a private file atomically and durably; StoreError where the disk refuses."""
    new = _new(path)
    try:
        _make_directory(path.parent)
        new.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        with os.fdopen(os.open(new, flags, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        sync_directory(path.parent)
    except OSError as exc:
        raise _unwritable(path, exc) from exc


def move_file(path: Path, to: Path) -> None:
    """Rename within a directory, durably."""
    try:
        path.replace(to)
        sync_directory(to.parent)
    except OSError as exc:
        raise _unwritable(to, exc) from exc


def remove_files(*paths: Path) -> None:
    """Remove files that may not exist, and what an interrupted write left of them, durably."""
    try:
        for path in paths:
            path.unlink(missing_ok=True)
            _new(path).unlink(missing_ok=True)
        if paths[0].parent.is_dir():
            sync_directory(paths[0].parent)
    except OSError as exc:
        raise _unwritable(paths[0], exc) from exc


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _new(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        sync_directory(path.parent)


def _unwritable(path: Path, exc: OSError) -> StoreError:
    return StoreError(
        "key-unwritable",
        f"cannot write {str(path)!r}: {exc.strerror}",
        hint="free some space, or see who owns the directory",
    )


def _check_access(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError("key-unreadable", f"cannot use the key {str(path)!r}: it is no plain file")
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        raise ConfigError(
            "key-exposed",
            f"cannot use the key {str(path)!r}: others may read or change it (its mode is {mode:04o})",
            hint=f"chmod 600 {path}; if others had the chance to read it, run mycoswarmctl rekey afterwards",
        )
    if found.st_uid not in {0, os.geteuid()}:
        raise ConfigError(
            "key-exposed",
            f"cannot use the key {str(path)!r}: it belongs to another user (uid {found.st_uid})",
            hint=f"chown {os.geteuid()} {path}",
        )


def _check_directory(path: Path) -> None:
    found = path.stat()
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o022 or found.st_uid not in {0, os.geteuid()}:
        raise ConfigError(
            "key-exposed",
            f"cannot use the keys in {str(path)!r}: others may replace them (its mode is {mode:04o}, its "
            f"owner uid {found.st_uid})",
            hint=f"chown {os.geteuid()} {path}; chmod 700 {path}",
        )
