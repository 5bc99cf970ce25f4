"""Puts a workspace into the cage's directory and finds what was changed there.

Rule: writing goes through beneath, and what comes back is only what a workspace may hold: special files and
links that leave it stay behind, each named. What the agent may not read counts as unchanged.
"""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from mycoswarmd.agent.beneath import make_directories, open_beneath, open_directory, open_file
from mycoswarmd.errors import BadRequest
from mycoswarmd.wire.workspace import (
    DEFAULT_LIMITS,
    Entry,
    EntryKind,
    changed,
    check_path,
    check_target,
    show_path,
    write_workspace,
)

_READ_BYTES = 1 << 20


def unpack(root: int, entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Write entries below the directory; return them with digests for their data, to compare later."""
    digests: dict[str, Entry] = {}
    for entry in sorted(entries, key=lambda entry: entry.path):
        parent = entry.path.rpartition("/")[0]
        if entry.kind is EntryKind.DIRECTORY:
            make_directories(root, entry.path)
        else:
            make_directories(root, parent)
            _write(root, entry)
        while parent and parent not in digests:
            digests[parent] = Entry(path=parent, kind=EntryKind.DIRECTORY)
            parent = parent.rpartition("/")[0]
        is_file = entry.kind is EntryKind.FILE
        digests[entry.path] = replace(entry, data=_digest([entry.data]) if is_file else b"")
    return tuple(digests.values())


def _write(root: int, entry: Entry) -> None:
    if entry.kind is EntryKind.SYMLINK:
        parent, _, name = entry.path.rpartition("/")
        fd = open_directory(root, parent or ".")
        try:
            os.symlink(entry.target, name, dir_fd=fd)
        finally:
            os.close(fd)
        return
    mode = 0o755 if entry.executable else 0o644
    fd = open_beneath(root, entry.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(entry.data)


def _digest(pieces: Iterable[bytes]) -> bytes:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


class Harvest:
    """What is in the directory now, compared with what was put in."""

    def __init__(self, root: int, before: Sequence[Entry]) -> None:
        self._root = root
        self._before = before
        self.left_behind: list[str] = []

    def collect(self) -> tuple[bytes, tuple[str, ...]]:
        """Return a tar of what is new or different, and the paths that are gone.

        Raises BadRequest("workspace-too-large") when it is more than a workspace may hold.
        """
        differing, deleted = changed(self._before, tuple(self._scan()))
        total = 0
        filled: list[Entry] = []
        for entry in differing:
            whole = entry if entry.kind is not EntryKind.FILE else self._fill(entry)
            total += len(whole.data)
            if total > DEFAULT_LIMITS.bytes:
                raise BadRequest(
                    "workspace-too-large", f"cannot hand back the changes: more than {total >> 20} MiB"
                )
            filled.append(whole)
        return (write_workspace(filled) if filled else b""), deleted

    def _fill(self, entry: Entry) -> Entry:
        fd = open_file(self._root, entry.path, os.O_RDONLY)
        with os.fdopen(fd, "rb") as file:
            return replace(entry, data=file.read(DEFAULT_LIMITS.bytes + 1))

    def _scan(self) -> Iterator[Entry]:
        pending = [""]
        count = 0
        while pending:
            here = pending.pop()
            try:
                fd = open_directory(self._root, here or ".")
            except PermissionError:
                yield from self._unchanged(here)
                continue
            try:
                names = sorted(entry.name for entry in os.scandir(fd))
                count += len(names)
                _check_count(count)
                for name in names:
                    path = f"{here}/{name}" if here else name
                    for entry in self._look(fd, name, path):
                        if entry.kind is EntryKind.DIRECTORY and entry.path == path:
                            pending.append(path)
                        yield entry
            finally:
                os.close(fd)

    def _look(self, above: int, name: str, path: str) -> Iterator[Entry]:
        try:
            check_path(path)
            found = os.stat(name, dir_fd=above, follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                yield Entry(path=path, kind=EntryKind.DIRECTORY)
            elif stat.S_ISREG(found.st_mode):
                digest = self._digest_file(path)
                is_executable = bool(found.st_mode & stat.S_IXUSR)
                yield Entry(path=path, kind=EntryKind.FILE, executable=is_executable, data=digest)
            elif stat.S_ISLNK(found.st_mode):
                target = os.readlink(name, dir_fd=above)
                problem = check_target(path, target)
                if not problem:
                    yield Entry(path=path, kind=EntryKind.SYMLINK, target=target)
                else:
                    self.left_behind.append(f"{show_path(path)}: {problem}")
            else:
                self.left_behind.append(f"{show_path(path)}: it is a special file")
        except PermissionError:
            yield from self._unchanged(path)
        except FileNotFoundError:
            return  # it went away meanwhile: gone
        except BadRequest as exc:
            self.left_behind.append(exc.message)

    def _digest_file(self, path: str) -> bytes:
        fd = open_file(self._root, path, os.O_RDONLY)
        with os.fdopen(fd, "rb") as file:
            return _digest(iter(lambda: file.read(_READ_BYTES), b""))

    def _unchanged(self, path: str) -> Iterator[Entry]:
        """Yield what was put in at or below a path that cannot be read."""
        for entry in self._before:
            if not path or entry.path == path or entry.path.startswith(path + "/"):
                yield entry


def _check_count(count: int) -> None:
    most = DEFAULT_LIMITS.entries
    if count > most:
        raise BadRequest("workspace-too-large", f"cannot hand back the changes: more than {most} entries")


def made_directories(paths: Iterable[object], directory: str) -> Iterator[Entry]:
    """Return the directories that the cage itself made for writable paths: they are no change."""
    for path in paths:
        relative = str(path).removeprefix(directory).strip("/")
        while relative:
            with suppress(BadRequest):
                yield Entry(path=check_path(relative), kind=EntryKind.DIRECTORY)
            relative = relative.rpartition("/")[0]
