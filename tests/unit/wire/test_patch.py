"""wire/patch: what people read is true, bounded and harmless to a terminal."""

import subprocess
import time
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mycoswarmd.wire.patch import make_patch
from mycoswarmd.wire.workspace import Entry, EntryKind


def file(path: str, data: bytes, *, executable: bool = False) -> Entry:
    return Entry(path=path, kind=EntryKind.FILE, data=data, executable=executable)


def test_a_change_reads_like_gits() -> None:
    before = [file("notes.txt", b"one\ntwo\nthree\nfour\nfive\nsix\nseven\neight\nnine\n")]
    after = [file("notes.txt", b"one\ntwo\nthree\nfour\nFIVE\nsix\nseven\neight\nnine\n")]
    assert make_patch(before, after) == (
        "diff --git a/notes.txt b/notes.txt\n--- a/notes.txt\n+++ b/notes.txt\n"
        "@@ -2,7 +2,7 @@\n two\n three\n four\n-five\n+FIVE\n six\n seven\n eight\n"
    )


def test_new_deleted_and_changed_modes_are_said() -> None:
    patch = make_patch(
        [file("old", b"x\n"), file("run", b"")], [file("new", b"y\n"), file("run", b"", executable=True)]
    )
    assert (
        "diff --git a/new b/new\nnew file mode 100644\n--- /dev/null\n+++ b/new\n@@ -0,0 +1,1 @@\n+y\n"
        in patch
    )
    assert (
        "diff --git a/old b/old\ndeleted file mode 100644\n--- a/old\n+++ /dev/null\n@@ -1,1 +0,0 @@\n-x\n"
        in patch
    )
    assert "old mode 100644\nnew mode 100755\n" in patch


def test_nothing_changed_is_no_patch() -> None:
    assert make_patch([file("a", b"x")], [file("a", b"x")]) == ""


LINES = st.lists(st.sampled_from([b"a\n", b"b\n", b"c\n", b"dd\n", b"\n"]), max_size=40)


@given(LINES, LINES, st.booleans())
@settings(max_examples=40, deadline=None)
def test_git_applies_what_we_print(
    tmp_path_factory: pytest.TempPathFactory, a: list[bytes], b: list[bytes], end: bool
) -> None:
    before, after = b"".join(a), b"".join(b) + (b"no end" if end else b"")
    place: Path = tmp_path_factory.mktemp("git")
    (place / "f").write_bytes(before)
    patch = make_patch([file("f", before)], [file("f", after)])
    if patch:
        subprocess.run(["git", "apply", "--unidiff-zero", "-"], input=patch.encode(), cwd=place, check=True)
    assert (place / "f").read_bytes() == after


def test_a_patch_cannot_drive_a_terminal() -> None:
    patch = make_patch([], [file("x\x1b]0;t\x07\ny", "\x1b[2J\r\u202ehidden\x9b\tok\n".encode() + b"\xff\n")])
    assert "\x1b" not in patch
    assert not set(patch) & {"\x07", "\r", "\u202e", "\x9b"}
    assert '"a/x\\x1b]0;t\\x07\\ny"' in patch
    assert "+\\x1b[2J\\r\\u202ehidden\\x9b\tok\n" in patch
    assert "+\\xff\n" in patch


def test_binary_and_large_files_are_named_and_not_shown() -> None:
    patch = make_patch([], [file("b.bin", b"\0\1\2"), file("large", b"line\n" * 100_000)])
    assert "Binary files /dev/null and b/b.bin differ" in patch
    assert "# too large to show: 0 bytes before, 500000 bytes after" in patch
    assert "line" not in patch


@pytest.mark.parametrize("shape", ["unique", "two words", "few words", "few words, shorter"])
def test_time_is_bounded_for_files_made_to_be_slow(shape: str) -> None:
    if shape == "unique":
        a, b = (b"".join(b"%d %d\n" % (seed, n) for n in range(20_000)) for seed in (1, 2))
    elif shape == "two words":
        a, b = b"x\ny\n" * 990, b"y\ny\nx\n" * 660
    else:
        # Each word is just too rare for difflib to skip it as popular: the longer files would take hours.
        count = 80_000 if shape == "few words" else 1990
        words = (b"".join(b"%02x\n" % (crc32(b"%d %d" % (s, n)) % 128) for n in range(count)) for s in (1, 2))
        a, b = words
    started = time.process_time()
    patch = make_patch([file("f", a)], [file("f", b)])
    assert patch.count("\n") > 100
    assert time.process_time() - started < 5  # 0.2 s; without the bound 12 s and more


def test_a_long_patch_ends_with_how_much_is_missing() -> None:
    files = [file(f"f{number:03}", b"some text on a line\n" * 5000) for number in range(30)]
    patch = make_patch([], files)
    assert len(patch) < 1_100_000
    assert patch.splitlines()[-1].endswith("more changed files are not shown: the patch is too long")


def test_ten_thousand_files_take_little_time() -> None:
    before = [file(f"d{number % 50}/f{number}", b"text %d\n" % number) for number in range(10_000)]
    after = [*before[:-1], file("d49/f9999", b"changed\n")]
    started = time.process_time()
    assert make_patch(before, after).count("diff --git") == 1
    assert time.process_time() - started < 5
