"""The file tools. Rule: every path goes through beneath, every output is bounded, special files stay shut."""

import fnmatch
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

from mycoswarmd.agent.beneath import (
    make_directories,
    open_directory,
    open_file,
)
from mycoswarmd.wire.workspace import show_path

# What one call gives a model at most; a context of 128,000 tokens takes twelve of these.
OUTPUT_BYTES = 32 << 10
# A file that is edited is held in memory twice.
_EDIT_BYTES = 8 << 20
_SEARCH_FILE_BYTES = 4 << 20
_SEARCH_HITS = 100
_SEARCH_FILES = 100_000
_SEARCH_S = 10.0
_LINE_CHARS = 200
_LIST_ENTRIES = 500


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a tool did, for the model: `changed` says that the workspace is another now."""

    ok: bool
    text: str
    changed: bool = False


def fs_read(root: int, path: str, offset: int = 0, limit: int = OUTPUT_BYTES) -> Outcome:
    """Read a piece of a file; bytes that are not UTF-8 are shown as replacement characters."""
    fd = open_file(root, path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size  # what is appended after this moment is not read
        data = os.pread(fd, min(limit, OUTPUT_BYTES, max(0, size - offset)), offset)
    finally:
        os.close(fd)
    text = data.decode("utf-8", "replace")
    end = offset + len(data)
    if end < size:
        text += f"\n[{size - end} more bytes; go on with offset {end}]"
    return Outcome(ok=True, text=text or (f"[the file has {size} bytes]" if size else "[the file is empty]"))


def fs_write(root: int, path: str, content: str) -> Outcome:
    """Write a whole file, making the directories above it."""
    data = content.encode()
    parent = path.rstrip("/").rpartition("/")[0]
    if parent:
        make_directories(root, parent)
    old = _read_all(root, path, len(data) + 1)
    fd = open_file(root, path, os.O_WRONLY | os.O_CREAT)
    try:
        os.ftruncate(fd, 0)
        _write_all(fd, data)
    finally:
        os.close(fd)
    return Outcome(ok=True, text=f"Wrote {len(data)} bytes to {show_path(path)}.", changed=old != data)


def fs_edit(root: int, path: str, old: str, new: str) -> Outcome:
    """Replace the only occurrence of a text."""
    data = _read_all(root, path, _EDIT_BYTES + 1)
    if data is None:
        raise FileNotFoundError(path)
    if len(data) > _EDIT_BYTES:
        return Outcome(
            ok=False, text=f"The file is larger than {_EDIT_BYTES >> 20} MiB and cannot be edited."
        )
    try:
        text = data.decode()
    except UnicodeDecodeError as exc:
        return Outcome(
            ok=False, text=f"The file is not UTF-8 text (byte {exc.start}); an edit would damage it."
        )
    count = text.count(old)
    if count != 1:
        return Outcome(ok=False, text=f"`old` occurs {count} times in the file; it must occur exactly once.")
    fd = open_file(root, path, os.O_WRONLY)
    try:
        os.ftruncate(fd, 0)
        _write_all(fd, text.replace(old, new).encode())
    finally:
        os.close(fd)
    return Outcome(ok=True, text=f"Replaced the text in {show_path(path)}.", changed=old != new)


def fs_list(root: int, path: str) -> Outcome:
    """List a directory, sorted; what is no file is marked."""
    fd = open_directory(root, path)
    try:
        lines = sorted(_list_line(entry) for entry in os.scandir(fd))
    finally:
        os.close(fd)
    more = len(lines) - _LIST_ENTRIES
    shown = lines[:_LIST_ENTRIES] + ([f"[{more} more]"] if more > 0 else [])
    return Outcome(ok=True, text="\n".join(shown) or "[the directory is empty]")


def _list_line(entry: os.DirEntry[str]) -> str:
    name = show_path(entry.name)
    if entry.is_symlink():
        return f"{name} (link)"
    if entry.is_dir(follow_symlinks=False):
        return f"{name}/"
    if entry.is_file(follow_symlinks=False):
        return f"{name} ({entry.stat(follow_symlinks=False).st_size} bytes)"
    return f"{name} (special file)"


def fs_search(root: int, pattern: str, path: str = ".", kind: str = "text") -> Outcome:
    """Find lines that contain a literal text, or files whose name fits a shell pattern."""
    until_s = time.monotonic() + _SEARCH_S
    hits: list[str] = []
    for seen, found in enumerate(_walk(root, path), 1):
        if len(hits) >= _SEARCH_HITS or seen > _SEARCH_FILES or time.monotonic() > until_s:
            hits.append("[the search was cut short here]")
            break
        if kind == "text":
            hits.extend(_matching_lines(root, found, pattern, _SEARCH_HITS - len(hits)))
        elif fnmatch.fnmatchcase(found, pattern) or fnmatch.fnmatchcase(found.rpartition("/")[2], pattern):
            hits.append(show_path(found))
    return Outcome(ok=True, text="\n".join(hits) or "[nothing found]")


def _matching_lines(root: int, path: str, text: str, most: int) -> Iterator[str]:
    try:
        data = _read_all(root, path, _SEARCH_FILE_BYTES)
    except OSError:
        return  # unreadable or gone: not found in it
    if data is None or text.encode() not in data:
        return
    for number, line in enumerate(data.decode("utf-8", "replace").split("\n"), 1):
        if text in line and most > 0:
            most -= 1
            yield f"{show_path(path)}:{number}: {line[:_LINE_CHARS].strip()}"


def _walk(root: int, path: str) -> Iterator[str]:
    """Yield the regular files below a path, without following links."""
    pending = [path.rstrip("/") or "."]
    while pending:
        here = pending.pop()
        try:
            fd = open_directory(root, here)
        except NotADirectoryError:
            yield here
            continue
        except OSError:
            continue
        try:
            entries = sorted(os.scandir(fd), key=lambda entry: entry.name)
        finally:
            os.close(fd)
        prefix = "" if here == "." else f"{here}/"
        pending.extend(prefix + e.name for e in reversed(entries) if e.is_dir(follow_symlinks=False))
        yield from (prefix + entry.name for entry in entries if entry.is_file(follow_symlinks=False))


def _read_all(root: int, path: str, most: int) -> bytes | None:
    """Return a regular file's first bytes, or None where there is none."""
    try:
        fd = open_file(root, path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb") as file:
        return file.read(most)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
