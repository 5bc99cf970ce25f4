"""Reading a backup: which names it may have, how large each may be, and putting it into an empty directory.

Law: nothing in the file chooses where it is written: each name is compared with a list, whatever is not a
plain file is refused, and nothing is written before all of it was looked at. While root writes, the
directory is root's: the user whose it is cannot swap a part of it for a link. The names are those of
daemon/backup.py.
"""

import os
import re
import shutil
import stat
import tarfile
from pathlib import Path
from typing import IO

from mycoswarmd.ctl.ground import firm
from mycoswarmd.errors import BadRequest, ConfigError, Conflict, StoreError

DATABASE = "mycoswarm.db"
# What the daemon looks for at its next start, to count far ahead: others must not take it for a copy.
MARK = "restored"
_BLOB = re.compile(r"blobs/[0-9a-f]{64}")
_BLOB_BYTES = 300 << 20
_SIZES = {
    DATABASE: 64 << 30,
    "identity/node.key": 4096,
    "identity/node.crt": 16_384,
    "signer/signer.key": 4096,
    "policy.toml": 4 << 20,
    "mycoswarm.toml": 64 << 10,
}
_MAX_FILES = 100_000
_SQLITE = b"SQLite format 3\0"


def check(path: Path) -> list[str]:
    """Look a backup through and return the names in it; BadRequest("bad-backup") for anything else."""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            return [entry.name for entry in _entries(tar)]
    except (tarfile.TarError, EOFError, ValueError) as exc:
        raise _bad(path, "it is no whole tar file") from exc
    except OSError as exc:
        raise ConfigError("backup-unreadable", f"cannot read {str(path)!r}: {exc.strerror}") from exc


def restore(path: Path, directory: Path) -> list[str]:
    """Put a backup into an empty directory; all of it, or nothing. Return the names."""
    names = check(path)
    directory = directory.absolute()
    try:
        firm(directory.parent)
        is_new = not directory.exists()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = _take_over(directory)
    except OSError as exc:
        raise ConfigError(
            "state-unwritable", f"cannot restore into {str(directory)!r}: {exc.strerror}"
        ) from exc
    is_whole = False
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            _put(tar, directory)
        _give_back(directory, owner)
        is_whole = True
    except (tarfile.TarError, EOFError, ValueError) as exc:
        raise _bad(path, "it changed while it was read") from exc
    except OSError as exc:
        raise StoreError(
            "state-unwritable", f"cannot restore into {str(directory)!r}: {exc.strerror}"
        ) from exc
    finally:
        if not is_whole:
            _empty(directory, is_new=is_new)
            if not is_new:
                _give_back(directory, owner)
    return names


def _take_over(directory: Path) -> os.stat_result:
    """Make an empty directory root's alone while root writes to it; return whose it was.

    Whoever had it cannot enter, even where they stand in it: each name is looked up with the rights of now.
    """
    owner = directory.stat()
    if os.geteuid() == 0:
        firm(directory, whose_last=owner.st_uid)
        os.chown(directory, 0, 0)
    directory.chmod(0o700)
    if any(directory.iterdir()):
        directory.chmod(stat.S_IMODE(owner.st_mode))
        _own(directory, owner)
        raise Conflict(
            "not-empty",
            f"cannot restore into {str(directory)!r}: it is not empty",
            hint="stop the node, move the directory away, and restore into a new one",
        )
    return owner


def _give_back(directory: Path, owner: os.stat_result) -> None:
    """Give what root restored to whose directory it is: a node may run as a user of its own."""
    for place in (*directory.rglob("*"), directory):  # it is the last: nobody gets in before
        _own(place, owner)


def _put(tar: tarfile.TarFile, directory: Path) -> None:
    entries = sorted(
        _entries(tar), key=lambda entry: entry.name == DATABASE
    )  # without it, it is no state yet
    _write(directory / MARK, None)
    for entry in entries:
        target = directory / entry.name
        if not target.parent.exists():
            target.parent.mkdir(mode=0o700)
        _write(target, tar.extractfile(entry))
    for place in {directory, *(directory / entry.name for entry in entries)}:
        _sync(place if place == directory else place.parent)


def _entries(tar: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """Return all entries, each one a plain file with a name and a size that a backup may have."""
    found: dict[str, tarfile.TarInfo] = {}
    where = Path(str(tar.name or "backup"))
    for entry in tar:
        at_most = _BLOB_BYTES if _BLOB.fullmatch(entry.name) else _SIZES.get(entry.name)
        if at_most is None:
            raise _bad(where, f"it has an entry {entry.name[:80]!r}, which no backup has")
        if entry.type not in {tarfile.REGTYPE, tarfile.AREGTYPE} or entry.sparse is not None:
            raise _bad(where, f"its entry {entry.name!r} is no plain file")
        if entry.size > at_most:
            raise _bad(where, f"its entry {entry.name!r} is larger than {at_most:,} bytes")
        if entry.name in found or len(found) >= _MAX_FILES:
            raise _bad(where, f"it has {entry.name!r} twice, or too many entries")
        found[entry.name] = entry
    _check_database(tar, found.get(DATABASE), where)
    _check_end(tar, where)
    return list(found.values())


def _check_database(tar: tarfile.TarFile, entry: tarfile.TarInfo | None, where: Path) -> None:
    source = tar.extractfile(entry) if entry is not None else None
    if source is None:
        raise _bad(where, f"it has no {DATABASE}")
    if source.read(len(_SQLITE)) != _SQLITE:
        raise _bad(where, f"its {DATABASE} is no database")


def _check_end(tar: tarfile.TarFile, where: Path) -> None:
    """A tar that was cut reads like one that ends there; a whole one ends in a block of zeros."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(512) != bytes(512):
        raise _bad(where, "its end is missing")


def _write(target: Path, source: IO[bytes] | None) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(target, flags, 0o600)
    with os.fdopen(descriptor, "wb") as out:
        if source is not None:
            shutil.copyfileobj(source, out, 1 << 20)
        out.flush()
        os.fsync(descriptor)


def _own(path: Path, owner: os.stat_result) -> None:
    if os.geteuid() == 0:
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _empty(directory: Path, *, is_new: bool) -> None:
    """Remove what a restore that failed has written."""
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    if is_new:
        directory.rmdir()


def _bad(path: Path, why: str) -> BadRequest:
    return BadRequest("bad-backup", f"cannot use {str(path)!r} as a backup: {why}")
