"""wire/workspace: what is read can be written below any directory; what is hostile is refused by name."""

import io
import tarfile
import time
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mycoswarmd.errors import BadRequest
from mycoswarmd.wire.workspace import (
    Entry,
    EntryKind,
    WorkspaceLimits,
    changed,
    check_path,
    check_target,
    list_workspace,
    overlay,
    read_workspace,
    show_path,
    write_workspace,
)


def file(path: str, data: bytes = b"x", *, executable: bool = False) -> Entry:
    return Entry(path=path, kind=EntryKind.FILE, data=data, executable=executable)


def link(path: str, target: str) -> Entry:
    return Entry(path=path, kind=EntryKind.SYMLINK, target=target)


def directory(path: str) -> Entry:
    return Entry(path=path, kind=EntryKind.DIRECTORY)


def tar_of(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:  # noqa: A002
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=format, errors="surrogateescape") as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return target.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


NAMES = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=60
).filter(lambda name: name not in {".", ".."} and len(name.encode()) <= 255)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)


@given(
    st.dictionaries(
        PATHS, st.tuples(st.sampled_from(EntryKind), st.binary(max_size=1200), st.booleans()), max_size=8
    )
)
@settings(deadline=None)
def test_what_is_written_is_read_back(tree: dict[str, tuple[EntryKind, bytes, bool]]) -> None:
    entries: list[Entry] = []
    for path, (kind, data, executable) in sorted(tree.items()):
        if any(path.startswith(one.path + "/") and one.kind is not EntryKind.DIRECTORY for one in entries):
            continue
        if kind is EntryKind.FILE:
            entries.append(file(path, data, executable=executable))
        else:
            entries.append(directory(path) if kind is EntryKind.DIRECTORY else link(path, "some/where"))
    tar = write_workspace(entries)
    assert sorted(read_workspace(tar), key=lambda e: e.path) == sorted(entries, key=lambda e: e.path)
    assert write_workspace(reversed(entries)) == tar


@given(st.binary(max_size=2000))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    message = "cannot: it was read"
    try:
        read_workspace(data)
    except BadRequest as exc:
        message = exc.message
    assert message.startswith("cannot")


@given(st.data())
@settings(deadline=None)
def test_a_damaged_archive_is_read_or_refused_and_stays_inside(data: st.DataObject) -> None:
    tar = bytearray(
        write_workspace([file("a/b", b"12345"), link("a/l", "../c"), directory("d"), file("x" * 150)])
    )
    for _ in range(3):
        tar[data.draw(st.integers(0, len(tar) - 1))] = data.draw(st.integers(0, 255))
    try:
        entries = read_workspace(bytes(tar))
    except BadRequest:
        return
    for entry in entries:
        assert check_path(entry.path) == entry.path
        assert entry.kind is not EntryKind.SYMLINK or check_target(entry.path, entry.target) == ""


def test_gnu_tar_and_python_read_what_we_write() -> None:
    entries = [
        file("ü" * 90, b"long"),
        file("run.sh", b"#!", executable=True),
        link("l", "y" * 120),
        directory("d"),
    ]
    with tarfile.open(fileobj=io.BytesIO(write_workspace(entries))) as archive:
        found = {one.name: one for one in archive.getmembers()}
    assert found.keys() == {"ü" * 90, "run.sh", "l", "d"}
    assert found["run.sh"].mode == 0o755
    assert found["l"].linkname == "y" * 120


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_archives_of_other_programs_are_read(format: int) -> None:  # noqa: A002
    name = "deep/" + "n" * 120 if format != tarfile.USTAR_FORMAT else "d" * 60 + "/" + "n" * 60
    tar = tar_of((member("./"), b""), (member("./a"), b"A"), (member(name), b"B"), format=format)
    if format == tarfile.USTAR_FORMAT:
        # Python leaves the directory's own name as "."; both spellings are the workspace itself.
        assert [entry.path for entry in read_workspace(tar)] == ["a", name]
    else:
        assert {entry.path: entry.data for entry in read_workspace(tar)} == {"a": b"A", name: b"B"}


def test_names_with_newlines_and_odd_bytes_are_legal_and_shown_escaped() -> None:
    entries = (file("a\nb"), file(b"caf\xe9".decode("utf-8", "surrogateescape")))
    assert sorted(read_workspace(write_workspace(entries)), key=lambda e: e.path) == sorted(
        entries, key=lambda e: e.path
    )
    assert show_path("a\nb\x1b[31m") == "a\\nb\\x1b[31m"
    assert show_path(entries[1].path) == "caf\\xe9"


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "absolute": (lambda: tar_of((member("/etc/passwd"), b"")), "absolute"),
    "climbing": (lambda: tar_of((member("a/../../b"), b"")), "'..'"),
    "only-climbing": (lambda: tar_of((member("..", tarfile.DIRTYPE), b"")), "'..'"),
    "hard-link": (lambda: tar_of((member("a"), b""), (member("b", tarfile.LNKTYPE, "a"), b"")), "hard link"),
    "character-device": (lambda: tar_of((member("d", tarfile.CHRTYPE), b"")), "character device"),
    "block-device": (lambda: tar_of((member("d", tarfile.BLKTYPE), b"")), "block device"),
    "fifo": (lambda: tar_of((member("f", tarfile.FIFOTYPE), b"")), "FIFO"),
    "sparse": (lambda: tar_of((member("s", tarfile.GNUTYPE_SPARSE), b"")), "sparse"),
    "unknown-type": (lambda: tar_of((member("z", b"Z"), b"")), "unknown type"),
    "link-out": (lambda: tar_of((member("l", tarfile.SYMTYPE, "../x"), b"")), "out of the workspace"),
    "link-absolute": (lambda: tar_of((member("l", tarfile.SYMTYPE, "/etc"), b"")), "absolute"),
    "link-out-later": (
        lambda: tar_of((member("d/l", tarfile.SYMTYPE, "x/../../.."), b"")),
        "'..' after a name",
    ),
    "link-empty": (lambda: tar_of((member("l", tarfile.SYMTYPE, ""), b"")), "not a path"),
    "twice": (lambda: tar_of((member("a"), b"1"), (member("./a"), b"2")), "two entries"),
    "beneath-a-link": (
        lambda: tar_of((member("l", tarfile.SYMTYPE, "d"), b""), (member("l/x"), b"")),
        "no directory",
    ),
    "beneath-a-file": (lambda: tar_of((member("f"), b""), (member("f/a/b"), b"")), "no directory"),
    "above-a-file": (lambda: tar_of((member("f/a/b"), b""), (member("f"), b"")), "beneath it"),
    "above-its-directory": (
        lambda: tar_of((member("f/a", tarfile.DIRTYPE), b""), (member("f/a", tarfile.SYMTYPE, "b"), b"")),
        "two entries",
    ),
    "a-link-above": (
        lambda: tar_of((member("d/e/f"), b""), (member("d", tarfile.SYMTYPE, "e"), b"")),
        "beneath it",
    ),
    "too-deep": (lambda: tar_of((member("/".join("d" * 80)), b"")), "deep"),
    "long-component": (lambda: tar_of((member("n" * 300), b"")), "too long"),
    "not-a-tar": (lambda: b"PK\x03\x04" + bytes(2000), "not one of a tar"),
    "cut-short": (lambda: tar_of((member("a"), b"x" * 5000))[:3000], "ends within"),
    "half-a-header": (lambda: tar_of((member("a"), b""))[:200], "cut short"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_are_refused_by_name(case: str) -> None:
    make, reason = HOSTILE[case]
    with pytest.raises(BadRequest, match=reason) as caught:
        read_workspace(make())
    assert caught.value.code == "bad-workspace"


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"GNU.sparse.major": "1", "GNU.sparse.name": "x"}, "GNU.sparse"),
        ({"size": "1"}, "'size'"),
        ({"path": "/etc/passwd"}, "absolute"),
        ({"path": "../x"}, "'..'"),
        ({"path": "a\0b"}, "NUL"),
        ({"comment": "c" * 9000}, "at most|has 90"),
    ],
)
def test_pax_tricks_are_refused(header: dict[str, str], reason: str) -> None:
    info = member("a")
    info.pax_headers = header
    with pytest.raises(BadRequest, match=reason):
        read_workspace(tar_of((info, b"x"), format=tarfile.PAX_FORMAT))


def test_a_pax_header_for_all_entries_sets_no_name() -> None:
    target = io.BytesIO()
    with tarfile.open(
        fileobj=target, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"path": "evil"}
    ) as archive:
        archive.addfile(member("a"), io.BytesIO())
    with pytest.raises(BadRequest, match="'path'"):
        read_workspace(target.getvalue())


def test_too_many_entries_and_bytes_are_refused_before_the_rest_is_read() -> None:
    tar = write_workspace([file(f"f{number}", b"12345") for number in range(5)])
    with pytest.raises(BadRequest, match="entries") as caught:
        read_workspace(tar, limits=WorkspaceLimits(entries=4))
    assert (caught.value.code, caught.value.http_status) == ("workspace-too-large", 413)
    with pytest.raises(BadRequest) as caught:
        read_workspace(tar, limits=WorkspaceLimits(bytes=24))
    assert caught.value.code == "workspace-too-large"


def pax(kind: bytes, *records: str) -> bytes:
    """Return a pax header of ours, which says anything as often as it likes."""
    body = b"".join(b"%02d %s\n" % (len(one) + 4, one.encode()) for one in records)
    return header_of("h", kind, len(body)) + body + bytes(-len(body) % 512)


def header_of(name: str, kind: bytes, size: int = 0) -> bytes:
    info = member(name, kind)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(
    ("unit", "reason", "at_most"),
    [
        (pax(b"x", "a=b"), "two headers", 4),
        (pax(b"g", "a=b"), "two headers", 4),
        (pax(b"x", "a=b") + pax(b"g", "a=b"), "two headers", 6),
        (header_of("h", b"L"), "two headers", 4),
        (header_of("h", b"K"), "two headers", 4),
        (header_of(".", b"5"), "101 entries", 101),
        (pax(b"x", *["a=b"] * 33), "more than 32 records", 2),
    ],
    ids=["x", "g", "x and g", "L", "K", "the directory itself", "records"],
)
def test_headers_without_end_are_refused_early(unit: bytes, reason: str, at_most: int) -> None:
    """An archive of them alone would keep a thread for a minute."""
    reads = 0

    def read_at(offset: int, size_bytes: int) -> bytes:
        nonlocal reads
        reads += 1
        start = offset % len(unit)
        return unit[start : start + size_bytes]

    with pytest.raises(BadRequest, match=reason):
        assert not list(list_workspace(read_at, len(unit) * 10_000, limits=WorkspaceLimits(entries=100)))
    assert reads <= at_most


def test_one_header_of_each_kind_may_come_before_an_entry() -> None:
    before = pax(b"g", *["a=b"] * 32) + header_of("h", b"L", 512) + b"long".ljust(512, b"\0")
    before += header_of("h", b"K", 512) + bytes(512) + pax(b"x", "path=pax", *["a=b"] * 31)
    tar = before + header_of("n", b"0") + before + header_of("m", b"5")
    with pytest.raises(BadRequest, match="two entries"):
        read_workspace(tar)
    (entry,) = read_workspace(tar[: len(tar) // 2])
    assert (entry.path, entry.kind) == ("pax", EntryKind.FILE)


@pytest.mark.parametrize(
    "body", [b"5 a=b\n", b"6 a=b", b"99999 a=b\n", b"x a=b\n", b"0 a=b\n", b" a=b\n", b"6a=b\n"]
)
def test_malformed_pax_records_are_refused(body: bytes) -> None:
    tar = header_of("h", b"x", len(body)) + body.ljust(512, b"\0") + header_of("n", b"0")
    with pytest.raises(BadRequest, match="malformed"):
        read_workspace(tar)


@pytest.mark.timeout(300)
def test_a_hundred_thousand_files_pass_and_one_more_does_not() -> None:
    one = write_workspace([file("f", b"")])[:512]
    blocks = []
    for number in range(100_001):
        name = b"%07d" % number
        block = bytearray(one)
        block[:7] = name
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        blocks.append(bytes(block))
    started = time.process_time()
    assert len(read_workspace(b"".join(blocks[:-1]))) == 100_000
    assert time.process_time() - started < 30  # about 2 s; a quadratic reader takes minutes
    with pytest.raises(BadRequest, match="100001 entries"):
        read_workspace(b"".join(blocks))


def test_directories_count_also_those_that_only_hold_something() -> None:
    tar = write_workspace([file(f"{n}/d/f") for n in range(3)])
    assert len(read_workspace(tar, limits=WorkspaceLimits(entries=9))) == 3
    with pytest.raises(BadRequest, match="workspace-too-large"):
        read_workspace(tar, limits=WorkspaceLimits(entries=8))
    told = [directory(f"{n}/d") for n in range(3)] + [directory(str(n)) for n in range(3)]
    tar = write_workspace([*told, *(file(f"{n}/d/f") for n in range(3))])
    assert len(read_workspace(tar, limits=WorkspaceLimits(entries=9))) == 9


def test_an_archive_is_listed_without_being_held() -> None:
    """Entries whose names alone would be 75 MiB, as a list."""
    name = "\U0001f344" + "/".join(["d" * 250] * 15)  # one such sign makes four bytes of each character
    long = write_workspace([file(f"{name}/{0:06}", b"12345")])[:-1024]
    at, each = long.index(b"/000000"), len(long)
    count = 5_000

    def read_at(offset: int, size_bytes: int) -> bytes:
        number, start = divmod(offset, each)
        block = bytearray(long[start : start + size_bytes])
        if start <= at < start + size_bytes:
            block[at - start : at - start + 7] = b"/%06d" % number
        return bytes(block)

    tracemalloc.start()
    try:
        found = sum(one.size_bytes for one in list_workspace(read_at, each * count))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == 5 * count
    assert peak_bytes < 4 << 20


def test_nothing_is_an_empty_workspace() -> None:
    assert read_workspace(b"") == read_workspace(write_workspace([])) == ()


def test_changed_and_overlay_are_each_others_reverse() -> None:
    before = (
        file("same"),
        file("edited", b"1"),
        file("gone"),
        directory("d"),
        file("d/x"),
        link("l", "same"),
    )
    after = (
        file("same"),
        file("edited", b"2"),
        link("l", "edited"),
        file("new"),
        file("d/x", executable=True),
    )
    changes, deleted = changed(before, after)
    assert {entry.path for entry in changes} == {"edited", "l", "new", "d/x"}
    assert set(deleted) == {"gone", "d"}
    assert set(overlay(before, changes, deleted)) == set(after)


def test_the_writer_refuses_what_the_reader_would() -> None:
    for entry in (file("../x"), link("l", "/etc"), file("/abs")):
        with pytest.raises(BadRequest):
            write_workspace([entry])
    with pytest.raises(BadRequest, match="two entries"):
        write_workspace([file("a"), file("a")])
