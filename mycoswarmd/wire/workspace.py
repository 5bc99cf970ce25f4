"""A workspace as bytes: a strict reader and a deterministic writer of tar archives.

Law: what `read_workspace` returns can be written below any directory without leaving it. Every path is
relative and normal, no entry lies beneath a file or a symbolic link, and no link, alone or through others,
points outside. Whatever tar has beyond plain files, directories and symbolic links is refused by name.

Why that holds for links: a target is relative and has `..` only at its start, no more of them than
the link lies deep. The directories above a link are real ones (nothing lies beneath a link), so those
`..` stay inside; what follows goes down, perhaps through further links of the same kind.

Source: POSIX.1-2017 pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format" (types L and K).
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from mycoswarmd.errors import BadRequest

_BLOCK = 512
_ZERO = bytes(_BLOCK)
# PATH_MAX and NAME_MAX of Linux: a longer name could not be written anyway.
_PATH_BYTES = 4095
_NAME_BYTES = 255
# A link's target or a long name, with its padding.
_LONG_BYTES = 8 << 10
# Of one pax header: times, a name, what is known of the file, and some attributes, each of them twice.
_RECORDS = 32
# Deeper trees are accidents or attacks; node_modules at its worst is about 30.
_DEPTH = 64


class EntryKind(StrEnum):
    """What an entry is. There is nothing else in a workspace."""

    FILE = "file"
    DIRECTORY = "dir"
    SYMLINK = "symlink"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file, directory or symbolic link. Bytes of a name that are not UTF-8 are lone surrogates."""

    path: str
    kind: EntryKind
    executable: bool = False  # the only permission that travels
    data: bytes = b""
    target: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """An entry without its data, and where in the archive that is."""

    path: str
    kind: EntryKind
    executable: bool = False
    target: str = ""
    offset: int = 0
    size_bytes: int = 0


# Returns so many bytes from an offset, or fewer at the end.
ReadAt = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkspaceLimits:
    """How much a workspace may hold."""

    # A checkout of the Linux kernel has 90,000 files; more is a disk, not a task's material. Directories
    # count, also those that are there only because something lies in them.
    entries: int = 100_000
    # The bound of the interface that takes the tar (256 MiB), less its headers.
    bytes: int = 256 << 20


DEFAULT_LIMITS = WorkspaceLimits()


def show_path(path: str) -> str:
    """Return a path fit for a terminal and one line: control characters and odd bytes escaped."""
    if path.isprintable():
        return path
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").translate(_Escapes())


class _Escapes(dict[int, str]):
    """A translation table that escapes all that a terminal might obey."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        shown = char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        self[code] = shown
        return shown


def escape_text(text: str) -> str:
    """Escape what a terminal might obey; tabs and line ends stay."""
    table = _Escapes()
    table[ord("\t")], table[ord("\n")] = "\t", "\n"
    return text.translate(table)


def check_path(path: str) -> str:
    """Return a path in its one normal form, or raise BadRequest("bad-workspace")."""
    while path.startswith("./"):
        path = path[2:].lstrip("/")
    path = path.rstrip("/") if path != "/" else path
    if path in {"", "."}:
        raise _bad(path, "its name is empty")
    if path.startswith("/"):
        raise _bad(path, "its path is absolute", "paths are relative to the workspace")
    if "\0" in path:
        raise _bad(path, "its name has a NUL byte")
    parts = path.split("/")
    if ".." in parts or "." in parts or "" in parts:
        raise _bad(path, "its path has a component that is empty, '.' or '..'")
    if len(parts) > _DEPTH:
        raise _bad(path, f"it lies {len(parts)} directories deep", f"at most {_DEPTH}")
    raw = path.encode("utf-8", "surrogateescape")
    if len(raw) > _PATH_BYTES or (len(raw) > _NAME_BYTES and max(map(len, raw.split(b"/"))) > _NAME_BYTES):
        raise _bad(path, "its name is too long", f"at most {_NAME_BYTES} bytes a name, {_PATH_BYTES} a path")
    return path


def check_target(path: str, target: str) -> str:
    """Return why a link with this target would leave the workspace, or ""."""
    if not target or "\0" in target or len(target) > _PATH_BYTES:
        return "its target is not a path"
    if target.startswith("/"):
        return "it points to an absolute path"
    parts = [part for part in target.split("/") if part not in {"", "."}]
    climbs = 0
    while climbs < len(parts) and parts[climbs] == "..":
        climbs += 1
    if climbs > path.count("/"):
        return "it points out of the workspace"
    if ".." in parts[climbs:]:
        return "its target has '..' after a name, which may point out of the workspace"
    return ""


class _Tree:
    """What is in a workspace, by digests: a hundred thousand long paths would be a gigabyte.

    Two paths with one digest would be refused, not let through.
    """

    def __init__(self) -> None:
        self._kinds: dict[bytes, EntryKind | None] = {}  # None: a directory because something lies in it

    def __len__(self) -> int:
        return len(self._kinds)

    def add(self, entry: Entry | Listed) -> None:
        """Take one more entry, in any order, or raise BadRequest("bad-workspace")."""
        path, is_directory = entry.path, entry.kind is EntryKind.DIRECTORY
        problem = check_target(path, entry.target) if entry.kind is EntryKind.SYMLINK else ""
        if check_path(path) != path:
            problem = "its path is not in its normal form"
        mark = _digest(path)
        if self._kinds.get(mark) is not None:
            problem = problem or "there are two entries of that name"
        elif mark in self._kinds and not is_directory:
            problem = problem or "other entries lie beneath it, and it is no directory"
        if problem:
            raise _bad(path, problem)
        self._kinds[mark] = entry.kind
        while path := path.rpartition("/")[0]:
            mark = _digest(path)
            if mark not in self._kinds:
                self._kinds[mark] = None
            elif self._kinds[mark] in {None, EntryKind.DIRECTORY}:
                return  # what is above it was looked at when that came
            else:
                raise _bad(entry.path, f"it lies beneath {show_path(path)!r}, which is no directory")


def check_tree(entries: Iterable[Entry]) -> None:
    """Refuse what is not a workspace: odd paths, links out, duplicates, entries beneath a file or a link."""
    tree = _Tree()
    for entry in entries:
        tree.add(entry)


def _digest(path: str) -> bytes:
    return hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def read_workspace(untrusted: bytes, *, limits: WorkspaceLimits = DEFAULT_LIMITS) -> tuple[Entry, ...]:
    """Parse a tar archive, or raise BadRequest("bad-workspace" or "workspace-too-large")."""

    def read_at(offset: int, size_bytes: int) -> bytes:
        return untrusted[offset : offset + size_bytes]

    return tuple(
        Entry(
            path=one.path,
            kind=one.kind,
            executable=one.executable,
            data=read_at(one.offset, one.size_bytes),
            target=one.target,
        )
        for one in list_workspace(read_at, len(untrusted), limits=limits)
    )


def list_workspace(
    untrusted: ReadAt, size_bytes: int, *, limits: WorkspaceLimits = DEFAULT_LIMITS
) -> Iterator[Listed]:
    """Yield what is in a tar archive without holding it; nothing counts before the end was reached.

    Raises:
        BadRequest: bad-workspace, workspace-too-large.
    """
    if size_bytes > limits.bytes + limits.entries * 4 * _BLOCK:
        raise _too_large(f"the archive has {size_bytes} bytes", limits)
    tree = _Tree()
    longs: dict[bytes, str] = {}  # what L and K headers, or pax records, say about the next entry
    before = b""  # the types of headers that came for it: one of each, so that the bound of entries is theirs
    count = total = offset = 0
    while offset < size_bytes:
        header = untrusted(offset, _BLOCK)
        if header == _ZERO:
            break
        size, kind = _read_header(header, offset)
        offset += _BLOCK
        if offset + size > size_bytes:
            raise _bad(_text(header[:100]), f"the archive ends within it (byte {size_bytes})")
        start, offset = offset, offset + (size + _BLOCK - 1) // _BLOCK * _BLOCK
        if kind in b"LKxg":
            longs |= _read_long(kind, before, untrusted, start, size)
            before += kind
            continue
        entry = _read_entry(header, kind, start, size, longs)
        longs, before = {}, b""
        count += 1
        if entry is not None:
            tree.add(entry)
            total += entry.size_bytes
        if max(count, len(tree)) > limits.entries or total > limits.bytes:
            raise _too_large(f"it has {count} entries, {total} bytes or more", limits)
        if entry is not None:
            yield entry
    if longs:
        raise _bad("", "the archive ends after a long name, without its entry")


def _read_header(header: bytes, offset: int) -> tuple[int, bytes]:
    """Return the size and type of one header, whose checksum must hold."""
    where = f"the header at byte {offset}"
    if len(header) < _BLOCK:
        raise BadRequest("bad-workspace", f"cannot read the workspace: {where} is cut short")
    if _octal(header[148:156]) != sum(header[:148]) + 8 * 32 + sum(header[156:]):
        raise BadRequest(
            "bad-workspace",
            f"cannot read the workspace: {where} is not one of a tar archive",
            hint="send an uncompressed tar",
        )
    size, kind = _octal(header[124:136]), header[156:157]
    if size is None:
        raise BadRequest("bad-workspace", f"cannot read the workspace: {where} has no valid size")
    return (0 if kind in b"12" and kind else size), kind


def _octal(field: bytes) -> int | None:
    text = field.split(b"\0")[0].strip()
    # 11 digits are 8 GiB; GNU's binary form for more starts with a byte above 127 and is refused here.
    return int(text, 8) if text.isdigit() and not text.strip(b"01234567") else None


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _read_long(kind: bytes, before: bytes, untrusted: ReadAt, start: int, size: int) -> dict[bytes, str]:
    """Read a GNU long name or a pax header: names only, everything else that matters is refused."""
    if kind in before:
        raise _bad("", f"two headers of type {kind!r} come before one entry")
    if size > _LONG_BYTES:
        raise _bad("", f"a long name or pax header has {size} bytes", f"at most {_LONG_BYTES}")
    body = untrusted(start, size)
    if kind in b"LK":
        return {b"path" if kind == b"L" else b"linkpath": _text(body)}
    found: dict[bytes, str] = {}
    for key, value in _pax_records(body):
        if key in {b"path", b"linkpath"} and kind == b"x":
            found[key] = value.decode("utf-8", "surrogateescape")
        elif key in {b"path", b"linkpath", b"size"} or key.startswith((b"GNU.sparse", b"hdrcharset")):
            raise _bad("", f"its pax header sets {key.decode('utf-8', 'replace')!r}", "send a plain tar")
    return found


def _pax_records(body: bytes) -> Iterable[tuple[bytes, bytes]]:
    start = count = 0
    last = len(body.rstrip(b"\0"))
    while start < last:
        length, space, _ = body[start : start + 6].partition(b" ")
        end = start + int(length) if space and length.isdigit() else 0
        key, equals, value = body[start + len(length) + 1 : end].partition(b"=")
        if end > len(body) or not value.endswith(b"\n") or not equals:
            raise _bad("", "its pax header is malformed")
        if (count := count + 1) > _RECORDS:
            raise _bad("", f"its pax header has more than {_RECORDS} records")
        yield key, value[:-1]
        start = end


_REFUSED_TYPES: Mapping[bytes, str] = {
    b"1": "a hard link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"7": "a contiguous file",
    b"S": "a sparse file",
    b"M": "a part of a multi-volume archive",
    b"D": "an incremental dump",
}


def _read_entry(
    header: bytes, kind: bytes, start: int, size: int, longs: Mapping[bytes, str]
) -> Listed | None:
    """Make the entry of one header; None for the workspace's own directory."""
    name = longs.get(b"path")
    if name is None:
        name = _text(header[:100])
        # GNU's own format uses the prefix field for other things, and marks itself with a space.
        if header[257:263] == b"ustar\0" and header[345]:
            name = _text(header[345:500]) + "/" + name
    is_old_directory = kind in b"0\0" and name.endswith("/")
    if (kind == b"5" or is_old_directory) and name.rstrip("/") == ".":
        return None
    path = check_path(name)
    if kind == b"5" or is_old_directory:
        return Listed(path=path, kind=EntryKind.DIRECTORY)
    if kind == b"2":
        target = longs.get(b"linkpath") or _text(header[157:257])
        return Listed(path=path, kind=EntryKind.SYMLINK, target=target)
    if kind in {b"0", b"\0"}:
        is_executable = bool((_octal(header[100:108]) or 0) & 0o100)
        return Listed(path=path, kind=EntryKind.FILE, executable=is_executable, offset=start, size_bytes=size)
    what = _REFUSED_TYPES.get(kind, f"of the unknown type {kind!r}")
    raise _bad(path, f"it is {what}", "a workspace holds files, directories and symbolic links")


def write_workspace(entries: Iterable[Entry]) -> bytes:
    """Encode entries as a tar archive, the same bytes for the same entries in any order."""
    ordered = sorted(entries, key=lambda entry: entry.path.encode("utf-8", "surrogateescape"))
    check_tree(ordered)
    pieces: list[bytes] = []
    for entry in ordered:
        pieces.extend(_encode_entry(entry))
    pieces.append(_ZERO * 2)
    return b"".join(pieces)


def _encode_entry(entry: Entry) -> Iterable[bytes]:
    name = entry.path.encode("utf-8", "surrogateescape")
    target = entry.target.encode("utf-8", "surrogateescape")
    kind = {EntryKind.FILE: b"0", EntryKind.DIRECTORY: b"5", EntryKind.SYMLINK: b"2"}[entry.kind]
    if entry.kind is EntryKind.DIRECTORY:
        name += b"/"
    for long, letter in ((name, b"L"), (target, b"K")):
        if len(long) > 100:
            yield _header(b"././@LongLink", 0o644, len(long) + 1, letter, b"")
            yield from _padded(long + b"\0")
    mode = 0o755 if entry.executable or entry.kind is not EntryKind.FILE else 0o644
    yield _header(name[:100], mode, len(entry.data), kind, target[:100])
    yield from _padded(entry.data)


def _padded(data: bytes) -> Iterable[bytes]:
    yield data
    yield bytes(-len(data) % _BLOCK)


def _header(name: bytes, mode: int, size: int, kind: bytes, target: bytes) -> bytes:
    fields = [
        name.ljust(100, b"\0"),
        b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (mode, 0, 0, size, 0),
        b" " * 8,
        kind,
        target.ljust(100, b"\0"),
        b"ustar  \0",
    ]
    header = b"".join(fields).ljust(_BLOCK, b"\0")
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def changed(before: Sequence[Entry], after: Sequence[Entry]) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """Return the entries of `after` that are new or different, and the paths that are gone."""
    old = {entry.path: entry for entry in before}
    new = {entry.path for entry in after}
    return (
        tuple(entry for entry in after if old.get(entry.path) != entry),
        tuple(path for path in old if path not in new),
    )


def overlay(before: Sequence[Entry], changes: Sequence[Entry], deleted: Iterable[str]) -> tuple[Entry, ...]:
    """Return the tree that results from changes: the reverse of `changed`."""
    gone = set(deleted)
    tree = {entry.path: entry for entry in before if entry.path not in gone}
    tree |= {entry.path: entry for entry in changes}
    return tuple(tree.values())


def _bad(path: str, why: str, hint: str = "") -> BadRequest:
    shown = show_path(path)[:200]
    return BadRequest(
        "bad-workspace", f"cannot accept {shown!r} in the workspace: {why}", hint=hint, where=shown
    )


def _too_large(what: str, limits: WorkspaceLimits) -> BadRequest:
    return BadRequest(
        "workspace-too-large",
        f"cannot accept the workspace: {what}",
        hint=f"at most {limits.entries} entries and {limits.bytes >> 20} MiB",
        http_status=413,
    )
