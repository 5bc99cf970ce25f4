"""The difference of two workspaces as people read it: git's unified format, bounded and safe to print.

Rule: time and size are bounded whatever the files hold, and nothing reaches a terminal that it might
obey. Binary and very large files are named, not shown; a file whose lines are too many to compare
is shown as replaced from its first to its last different line, which is still a true patch.
"""

import difflib
from collections.abc import Iterator, Sequence

from mycoswarmd.wire.workspace import Entry, EntryKind, escape_text, show_path

# A person reads no longer file in a terminal.
_FILE_BYTES = 256 << 10
# One file fills the screen fifty times; the rest is in the archive of changes.
_PATCH_CHARS = 1 << 20
# difflib's cost grows with the product of the lines: 2,000 x 2,000 takes a fraction of a second.
_COMPARE = 2000
_CONTEXT = 3
# git looks this far for a NUL byte too.
_BINARY_PROBE = 8000

_MODES = {EntryKind.DIRECTORY: "040000", EntryKind.SYMLINK: "120000"}


def make_patch(before: Sequence[Entry], after: Sequence[Entry]) -> str:
    """Return the difference for reading; directories are left out, as git does."""
    old = {entry.path: entry for entry in before if entry.kind is not EntryKind.DIRECTORY}
    new = {entry.path: entry for entry in after if entry.kind is not EntryKind.DIRECTORY}
    paths = sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))
    pieces: list[str] = []
    size = 0
    for shown, path in enumerate(paths):
        piece = "".join(_file_patch(path, old.get(path), new.get(path)))
        size += len(piece)
        if size > _PATCH_CHARS:
            pieces.append(f"# {len(paths) - shown} more changed files are not shown: the patch is too long\n")
            break
        pieces.append(piece)
    return "".join(pieces)


def _file_patch(path: str, old: Entry | None, new: Entry | None) -> Iterator[str]:
    name_a, name_b = _quote("a/" + path), _quote("b/" + path)
    yield f"diff --git {name_a} {name_b}\n"
    if old is None and new is not None:
        yield f"new file mode {_mode(new)}\n"
    elif new is None and old is not None:
        yield f"deleted file mode {_mode(old)}\n"
    elif old is not None and new is not None and _mode(old) != _mode(new):
        yield f"old mode {_mode(old)}\nnew mode {_mode(new)}\n"
    data_a, data_b = _content(old), _content(new)
    if data_a == data_b:
        return
    label_a, label_b = (name_a if old else "/dev/null"), (name_b if new else "/dev/null")
    if len(data_a) > _FILE_BYTES or len(data_b) > _FILE_BYTES:
        yield f"# too large to show: {len(data_a)} bytes before, {len(data_b)} bytes after\n"
        return
    if b"\0" in data_a[:_BINARY_PROBE] or b"\0" in data_b[:_BINARY_PROBE]:
        yield f"Binary files {label_a} and {label_b} differ\n"
        return
    yield f"--- {label_a}\n+++ {label_b}\n"
    yield from _hunks(_split(data_a), _split(data_b))


def _split(data: bytes) -> list[bytes]:
    # Not splitlines: a bare carriage return is no line end to git.
    *lines, rest = data.split(b"\n")
    return [line + b"\n" for line in lines] + ([rest] if rest else [])


def _content(entry: Entry | None) -> bytes:
    if entry is None:
        return b""
    if entry.kind is EntryKind.SYMLINK:
        return entry.target.encode("utf-8", "surrogateescape")
    return entry.data


def _mode(entry: Entry) -> str:
    return _MODES.get(entry.kind, "100755" if entry.executable else "100644")


def _quote(name: str) -> str:
    shown = show_path(name)
    return name if shown == name and '"' not in name else '"' + shown.replace('"', '\\"') + '"'


def _hunks(lines_a: list[bytes], lines_b: list[bytes]) -> Iterator[str]:
    for group in _groups(lines_a, lines_b):
        first, last = group[0], group[-1]
        yield f"@@ -{_span(first[1], last[2])} +{_span(first[3], last[4])} @@\n"
        for tag, a_start, a_end, b_start, b_end in group:
            if tag == "equal":
                yield from _lines(" ", lines_a[a_start:a_end])
                continue
            yield from _lines("-", lines_a[a_start:a_end])
            yield from _lines("+", lines_b[b_start:b_end])


_Group = list[tuple[str, int, int, int, int]]


def _groups(lines_a: list[bytes], lines_b: list[bytes]) -> Iterator[_Group]:
    """Return the differences with their context; beyond the bound, one for all that differs."""
    head = 0
    while head < min(len(lines_a), len(lines_b)) and lines_a[head] == lines_b[head]:
        head += 1
    tail = 0
    most = min(len(lines_a), len(lines_b)) - head
    while tail < most and lines_a[-1 - tail] == lines_b[-1 - tail]:
        tail += 1
    end_a, end_b = len(lines_a) - tail, len(lines_b) - tail
    if max(end_a, end_b) - head <= _COMPARE:
        inner = difflib.SequenceMatcher(None, lines_a[head:end_a], lines_b[head:end_b]).get_opcodes()
        codes: _Group = [(tag, a1 + head, a2 + head, b1 + head, b2 + head) for tag, a1, a2, b1, b2 in inner]
    else:
        codes = [("replace", head, end_a, head, end_b)]
    before, after = min(head, _CONTEXT), min(tail, _CONTEXT)
    codes.insert(0, ("equal", head - before, head, head - before, head))
    codes.append(("equal", end_a, end_a + after, end_b, end_b + after))
    group: _Group = []
    for tag, a_start, a_end, b_start, b_end in codes:
        if tag == "equal" and a_end - a_start > 2 * _CONTEXT:
            group.append((tag, a_start, a_start + _CONTEXT, b_start, b_start + _CONTEXT))
            yield group
            group = [(tag, a_end - _CONTEXT, a_end, b_end - _CONTEXT, b_end)]
        else:
            group.append((tag, a_start, a_end, b_start, b_end))
    yield group


def _span(start: int, end: int) -> str:
    count = end - start
    return f"{start + 1 if count else start},{count}"


def _lines(sign: str, lines: list[bytes]) -> Iterator[str]:
    for line in lines:
        text = escape_text(line.rstrip(b"\n").decode("utf-8", "backslashreplace"))
        yield f"{sign}{text}\n"
        if not line.endswith(b"\n"):
            yield "\\ No newline at end of file\n"
