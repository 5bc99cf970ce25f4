"""A directory of the user's as a workspace: packed for an agent, and changed when the user says so.

Packing follows no link and waits for nothing; what a workspace cannot hold is skipped and named with its
reason. Nothing in the directory is configuration. One name is left out unless asked for: `.git` at the
top, whose hooks and config an agent could otherwise write and the user's own git would run.

Applying checks everything before it writes anything: when an original is not what the agent was given,
nothing is written. Writes go through descriptors, follow no link, and are a new file renamed into place.
"""

import errno
import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from mycoswarmd.errors import BadRequest, ConfigError, Conflict
from mycoswarmd.wire.workspace import (
    DEFAULT_LIMITS,
    Entry,
    EntryKind,
    WorkspaceLimits,
    check_path,
    check_target,
    check_tree,
    show_path,
    write_workspace,
)

GIT = ".git"
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
# Names in a message; more would hide the sentence.
_NAMED = 10
_TEMPORARY = ".mycoswarm-new"

_SPECIAL = {
    stat.S_IFIFO: "it is a FIFO",
    stat.S_IFSOCK: "it is a socket",
    stat.S_IFBLK: "it is a device file",
    stat.S_IFCHR: "it is a device file",
}


@dataclass(frozen=True, slots=True)
class Packed:
    """A directory as a tar, and what was left out: pairs of path and reason, fit for a terminal."""

    tar: bytes
    skipped: tuple[tuple[str, str], ...]


def pack_directory(
    directory: Path, *, with_git: bool = False, limits: WorkspaceLimits = DEFAULT_LIMITS
) -> Packed:
    """Pack a directory; BadRequest("workspace-too-large") beyond the limits, ConfigError when unreadable."""
    walk = _Walk(limits=limits, with_git=with_git)
    root = open_root(directory)
    try:
        entries = list(walk.entries(root, "", 0))
    finally:
        os.close(root)
    return Packed(write_workspace(entries), tuple(walk.skipped))


def open_root(directory: Path) -> int:
    """Open the user's directory; ConfigError says why it cannot be."""
    try:
        return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise ConfigError(
            "workspace-unreadable", f"cannot open the workspace {str(directory)!r}: {exc.strerror}"
        ) from exc


@dataclass(kw_only=True)
class _Walk:
    limits: WorkspaceLimits
    with_git: bool
    skipped: list[tuple[str, str]] = field(default_factory=list)
    count: int = 0
    total: int = 0

    def entries(self, fd: int, here: str, depth: int) -> Iterator[Entry]:
        """Yield what lies in an open directory, depth first, in the order of names."""
        with os.scandir(fd) as found:
            names = sorted(entry.name for entry in found)
        for name in names:
            if not here and name == GIT and not self.with_git:
                continue
            path = f"{here}/{name}" if here else name
            self._count(path)
            try:
                yield from self._look(fd, name, path, depth)
            except OSError as exc:
                self._skip(path, f"it cannot be read: {exc.strerror}")
            except BadRequest as exc:
                if exc.code == "workspace-too-large":
                    raise
                self._skip(path, exc.message)

    def _look(self, above: int, name: str, path: str, depth: int) -> Iterator[Entry]:
        check_path(path)
        kind = stat.S_IFMT(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode)
        if kind == stat.S_IFLNK:
            target = os.readlink(name, dir_fd=above)
            problem = check_target(path, target)
            if problem:
                self._skip(path, problem)
            else:
                yield Entry(path=path, kind=EntryKind.SYMLINK, target=target)
        elif kind == stat.S_IFDIR:
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | _FLAGS, dir_fd=above)
            try:
                yield Entry(path=path, kind=EntryKind.DIRECTORY)
                yield from self.entries(fd, path, depth + 1)
            finally:
                os.close(fd)
        elif kind == stat.S_IFREG:
            yield self._file(above, name, path)
        else:
            self._skip(path, _SPECIAL.get(kind, "it is a special file"))

    def _file(self, above: int, name: str, path: str) -> Entry:
        fd = os.open(name, os.O_RDONLY | _FLAGS, dir_fd=above)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):  # it was swapped after the look
                raise OSError(errno.ENXIO, "it changed while it was read")
            self.total += status.st_size
            if self.total > self.limits.bytes:
                raise _too_large(f"it has more than {self.limits.bytes >> 20} MiB (at {show_path(path)!r})")
            data = file.read(status.st_size)
            if len(data) < status.st_size or file.read(1):
                self.skipped.append(
                    (show_path(path), f"it changed while it was read: {len(data)} bytes went in")
                )
        return Entry(
            path=path, kind=EntryKind.FILE, executable=bool(status.st_mode & stat.S_IXUSR), data=data
        )

    def _count(self, path: str) -> None:
        self.count += 1
        if self.count > self.limits.entries:
            raise _too_large(f"it has more than {self.limits.entries} entries (at {show_path(path)!r})")

    def _skip(self, path: str, reason: str) -> None:
        self.skipped.append((show_path(path), reason))


def _too_large(why: str) -> BadRequest:
    return BadRequest(
        "workspace-too-large",
        f"cannot send the workspace: {why}",
        hint="name a smaller directory with --workspace",
        http_status=413,
    )


def apply_changes(
    directory: Path, changes: Sequence[Entry], deleted: Sequence[str], *, before: Sequence[Entry]
) -> tuple[str, ...]:
    """Write an agent's changes into the user's directory and return the changed paths, shown safely.

    Raises:
        Conflict: "workspace-changed": an original is not what the agent was given; nothing was written.
        BadRequest: "bad-workspace": a change that no workspace can hold, or to a `.git` that was not packed.
        ConfigError: "workspace-unwritable": the directory refuses; what was written is named.
    """
    originals = {entry.path: entry for entry in before}
    check_tree(changes)
    check_tree(Entry(path=path, kind=EntryKind.DIRECTORY) for path in deleted)
    _check_git([entry.path for entry in changes] + list(deleted), originals)
    root = open_root(directory)
    try:
        touched = {entry.path for entry in changes} | set(deleted)
        conflicts = sorted(path for path in touched if not _is_as_given(root, path, originals, touched))
        if conflicts:
            names = ", ".join(repr(show_path(path)) for path in conflicts[:_NAMED])
            more = f" and {len(conflicts) - _NAMED} more" if len(conflicts) > _NAMED else ""
            raise Conflict(
                "workspace-changed",
                f"cannot apply the changes: changed here since the task was given: {names}{more}",
                hint="nothing was written; apply to another copy, or run the task again",
            )
        return _write_all(root, changes, deleted)
    finally:
        os.close(root)


def _check_git(paths: Sequence[str], originals: dict[str, Entry]) -> None:
    """Refuse what would become git's configuration or hooks, unless .git was packed."""
    if GIT in originals:
        return
    for path in paths:
        # Case-insensitive file systems take .GIT for it, and git itself once fell for that.
        if GIT in path.lower().split("/"):
            raise BadRequest(
                "bad-workspace",
                f"cannot apply {show_path(path)!r}: the agent was given no {GIT} and may not make one",
                where=show_path(path),
            )


def _is_as_given(root: int, path: str, originals: Mapping[str, Entry], touched: Collection[str]) -> bool:
    """Tell whether what is there is what the agent was given: same kind, same bytes."""
    original = originals.get(path)
    try:
        with _Parent(root, path) as (above, name):
            status = os.stat(name, dir_fd=above, follow_symlinks=False)
            if original is None:
                return False
            if stat.S_ISDIR(status.st_mode):
                return original.kind is EntryKind.DIRECTORY
            if stat.S_ISLNK(status.st_mode):
                return (
                    original.kind is EntryKind.SYMLINK and os.readlink(name, dir_fd=above) == original.target
                )
            if not stat.S_ISREG(status.st_mode) or original.kind is not EntryKind.FILE:
                return False
            fd = os.open(name, os.O_RDONLY | _FLAGS, dir_fd=above)
            with os.fdopen(fd, "rb") as file:
                return file.read(len(original.data) + 1) == original.data
    except FileNotFoundError:
        return original is None
    except NotADirectoryError:
        # A file or link lies above it. That is right where the agent made a directory of one it was given.
        ends = (end for end, char in enumerate(path) if char == "/")
        blocking = [originals.get(path[:end]) for end in ends if path[:end] in touched]
        return original is None and any(one and one.kind is not EntryKind.DIRECTORY for one in blocking)
    except OSError:
        return False


class _Parent(ExitStack):
    """The directory above a path, opened without following links, and the last name."""

    def __init__(self, root: int, path: str, *, may_make: bool = False) -> None:
        super().__init__()
        self._start = (root, path, may_make)

    def __enter__(self) -> tuple[int, str]:  # type: ignore[override]
        root, path, may_make = self._start
        *above, name = path.split("/")
        fd = root
        try:
            for part in above:
                if may_make:
                    _make_directory(fd, part)
                fd = os.open(part, os.O_RDONLY | os.O_DIRECTORY | _FLAGS, dir_fd=fd)
                self.callback(os.close, fd)
        except OSError:
            self.close()
            raise
        return fd, name


def _make_directory(above: int, name: str) -> None:
    try:
        os.mkdir(name, 0o755, dir_fd=above)
    except FileExistsError:
        if not stat.S_ISDIR(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode):
            raise


def _write_all(root: int, changes: Sequence[Entry], deleted: Sequence[str]) -> tuple[str, ...]:
    """Delete, deepest first, then write, parents first."""
    done: list[str] = []
    try:
        for path in sorted(deleted, key=lambda path: path.count("/"), reverse=True):
            _delete(root, path)
            done.append(show_path(path))
        for entry in sorted(changes, key=lambda entry: entry.path.count("/")):
            _write(root, entry)
            done.append(show_path(entry.path))
    except OSError as exc:
        names = ", ".join(done[:_NAMED]) or "nothing"
        raise ConfigError(
            "workspace-unwritable",
            f"cannot apply the changes: {exc.strerror}; written before that: {names}",
            hint="make the directory writable and apply again to a fresh copy",
        ) from exc
    return tuple(done)


def _delete(root: int, path: str) -> None:
    with _Parent(root, path) as (above, name):
        if not stat.S_ISDIR(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=above)
            return
        try:
            os.rmdir(name, dir_fd=above)
        except OSError as exc:
            # It holds what was not packed, such as a socket: that is the user's and stays.
            if exc.errno != errno.ENOTEMPTY:
                raise


def _write(root: int, entry: Entry) -> None:
    with _Parent(root, entry.path, may_make=True) as (above, name):
        _clear_way(above, name, entry.kind)
        if entry.kind is EntryKind.DIRECTORY:
            _make_directory(above, name)
            return
        temporary = f"{_TEMPORARY}-{os.getpid()}"
        try:
            if entry.kind is EntryKind.SYMLINK:
                os.symlink(entry.target, temporary, dir_fd=above)
            else:
                _write_file(above, temporary, entry, _mode(above, name, is_executable=entry.executable))
            os.rename(temporary, name, src_dir_fd=above, dst_dir_fd=above)
        except OSError:
            _unlink_if_there(above, temporary)
            raise


def _clear_way(above: int, name: str, kind: EntryKind) -> None:
    """Remove a directory where a file comes, or a file where a directory comes."""
    try:
        is_directory = stat.S_ISDIR(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return
    if is_directory and kind is not EntryKind.DIRECTORY:
        os.rmdir(name, dir_fd=above)
    elif not is_directory and kind is EntryKind.DIRECTORY:
        os.unlink(name, dir_fd=above)


def _mode(above: int, name: str, *, is_executable: bool) -> int:
    """Return the mode of the file that is replaced with the executable bit as it is to be."""
    mode: int | None = None
    with suppress(FileNotFoundError):
        replaced = os.stat(name, dir_fd=above, follow_symlinks=False).st_mode
        mode = replaced & 0o777 if stat.S_ISREG(replaced) else None  # a link's says that all may write
    if mode is None:
        mask = os.umask(0o077)
        os.umask(mask)
        mode = 0o666 & ~mask
    return mode | (mode & 0o444) >> 2 if is_executable else mode & ~0o111


def _write_file(above: int, name: str, entry: Entry, mode: int) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600, dir_fd=above)
    with os.fdopen(fd, "wb") as file:
        file.write(entry.data)
        file.flush()
        os.fchmod(fd, mode)
        os.fsync(fd)


def _unlink_if_there(above: int, name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=above)
