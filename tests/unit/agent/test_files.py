"""agent/files and agent/beneath: useful on a workspace, harmless on a hostile one."""

import errno
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mycoswarmd.agent.beneath import make_directories, open_beneath, open_by_walking
from mycoswarmd.agent.files import OUTPUT_BYTES, fs_edit, fs_list, fs_read, fs_search, fs_write

Open = Callable[[int, str, int], int]


@pytest.fixture
def w(tmp_path: Path) -> Path:
    return tmp_path / "w"


def test_read_gives_the_text(root: int, w: Path) -> None:
    (w / "a.txt").write_text("grüße\n", "utf-8")
    assert fs_read(root, "a.txt").text == "grüße\n"
    assert fs_read(root, "./a.txt").ok


def test_read_goes_on_at_an_offset_and_says_so(root: int, w: Path) -> None:
    (w / "long").write_bytes(b"x" * (OUTPUT_BYTES + 10))
    first = fs_read(root, "long")
    assert first.text.endswith(f"[10 more bytes; go on with offset {OUTPUT_BYTES}]")
    assert fs_read(root, "long", offset=OUTPUT_BYTES).text == "x" * 10
    assert fs_read(root, "long", offset=5, limit=3).text.startswith("xxx\n[")
    assert fs_read(root, "long", offset=10**9).text == f"[the file has {OUTPUT_BYTES + 10} bytes]"


def test_a_huge_file_costs_no_memory(root: int, w: Path) -> None:
    with (w / "huge").open("wb") as file:
        file.truncate(1 << 40)
    assert len(fs_read(root, "huge").text) < OUTPUT_BYTES + 100


def test_bytes_that_are_not_text_are_shown_and_never_edited(root: int, w: Path) -> None:
    (w / "b").write_bytes(b"ab\xff\xfecd")
    assert fs_read(root, "b").text == "ab\ufffd\ufffdcd"
    outcome = fs_edit(root, "b", "ab", "xy")
    assert not outcome.ok and "not UTF-8" in outcome.text
    assert (w / "b").read_bytes() == b"ab\xff\xfecd"


def test_a_file_that_grows_while_it_is_read_ends(root: int, w: Path) -> None:
    (w / "log").write_bytes(b"start\n")
    stop = threading.Event()

    def grow() -> None:
        with (w / "log").open("ab") as file:
            while not stop.is_set():
                file.write(b"more\n")

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        assert fs_read(root, "log").text.startswith("start\n")
        assert len(fs_search(root, "more").text) < 100_000
    finally:
        stop.set()
        thread.join()


def test_write_makes_directories_and_tells_whether_it_changed_anything(root: int, w: Path) -> None:
    assert fs_write(root, "new/dir/f.txt", "hello").changed
    assert (w / "new/dir/f.txt").read_text() == "hello"
    assert not fs_write(root, "new/dir/f.txt", "hello").changed
    assert fs_write(root, "new/dir/f.txt", "bye").changed
    assert (w / "new/dir/f.txt").read_text() == "bye"


def test_edit_needs_exactly_one_occurrence(root: int, w: Path) -> None:
    (w / "f").write_text("one two two")
    assert "occurs 2 times" in fs_edit(root, "f", "two", "2").text
    assert "occurs 0 times" in fs_edit(root, "f", "three", "3").text
    assert (w / "f").read_text() == "one two two"
    assert fs_edit(root, "f", "one", "1").changed
    assert (w / "f").read_text() == "1 two two"
    with pytest.raises(FileNotFoundError):
        fs_edit(root, "none", "a", "b")


def test_list_marks_what_is_no_file(root: int, w: Path) -> None:
    (w / "d").mkdir()
    (w / "f").write_text("12345")
    (w / "l").symlink_to("f")
    os.mkfifo(w / "p")
    (w / "new\nline").touch()
    assert fs_list(root, ".").text.splitlines() == [
        "d/",
        "f (5 bytes)",
        "l (link)",
        "new\\nline (0 bytes)",
        "p (special file)",
    ]
    assert fs_list(root, "d").text == "[the directory is empty]"


def test_list_of_many_entries_is_bounded(root: int, w: Path) -> None:
    for number in range(600):
        (w / f"f{number:03}").touch()
    assert fs_list(root, ".").text.endswith("\n[100 more]")


def test_search_finds_literal_text_and_names(root: int, w: Path) -> None:
    (w / "src").mkdir()
    (w / "src/a.py").write_text("import os\nx = a.*b\n")
    (w / "b.txt").write_text("nothing\n")
    assert fs_search(root, "a.*b").text == "src/a.py:2: x = a.*b"
    assert fs_search(root, "*.py", kind="name").text == "src/a.py"
    assert fs_search(root, "import", path="b.txt").text == "[nothing found]"
    assert fs_search(root, "import", path="src/a.py").text == "src/a.py:1: import os"


def test_search_is_bounded_and_no_pattern_is_slow(root: int, w: Path) -> None:
    (w / "many").write_text("hit\n" * 1000)
    (w / ("a" * 200)).touch()
    assert len(fs_search(root, "hit").text.splitlines()) <= 101
    assert fs_search(root, "*a*a*a*a*a*a*a*a*a*a*a*a*a*ab", kind="name").text == "[nothing found]"


@pytest.mark.parametrize("opener", [open_beneath, open_by_walking])
@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "out", "up/secret", "d/../../secret", "abs"])
def test_no_path_leaves_the_workspace(root: int, w: Path, path: str, opener: Open) -> None:
    (w.parent / "secret").write_text("s")
    (w / "d").mkdir()
    (w / "out").symlink_to("../secret")
    (w / "up").symlink_to("..")
    (w / "abs").symlink_to(w.parent / "secret")
    with pytest.raises(OSError, match="Errno") as caught:
        opener(root, path, os.O_RDONLY)
    assert caught.value.errno in {errno.EXDEV, errno.ELOOP, errno.ENOTDIR}
    with pytest.raises(OSError, match="Errno"):
        fs_write(root, path, "overwritten")
    assert (w.parent / "secret").read_text() == "s"


def test_links_inside_are_followed_by_the_kernel(root: int, w: Path) -> None:
    (w / "f").write_text("inside")
    (w / "l").symlink_to("f")
    assert fs_read(root, "l").text == "inside"


def test_the_walk_follows_no_link_at_all(root: int, w: Path) -> None:
    (w / "d").mkdir()
    (w / "d/f").write_text("x")
    (w / "l").symlink_to("d")
    os.close(open_by_walking(root, "d/f", os.O_RDONLY))
    with pytest.raises(OSError, match="Errno"):
        open_by_walking(root, "l/f", os.O_RDONLY)


def test_special_files_are_not_opened_and_nobody_waits(root: int, w: Path) -> None:
    os.mkfifo(w / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(w / "sock"))
        (w / "d").mkdir()
        for name in ("fifo", "sock", "d"):
            with pytest.raises(OSError, match="Errno"):
                fs_read(root, name)
            with pytest.raises(OSError, match="Errno"):
                fs_write(root, name, "x")
    assert fs_search(root, "x").text == "[nothing found]"


def test_names_with_newlines_work(root: int, w: Path) -> None:
    assert fs_write(root, "two\nlines/a\tb", "x").changed
    assert fs_read(root, "two\nlines/a\tb").text == "x"


def test_a_directory_cannot_be_made_through_a_link(root: int, w: Path) -> None:
    (w / "l").symlink_to("..")
    with pytest.raises(OSError, match="Errno"):
        make_directories(root, "l/new")
    assert not (w.parent / "new").exists()
