"""ctl/workspace: a user's directory is packed without surprises and changed only as a whole and inside."""

import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mycoswarmd.ctl import workspace
from mycoswarmd.ctl.workspace import Packed, apply_changes, pack_directory
from mycoswarmd.errors import BadRequest, ConfigError, Conflict
from mycoswarmd.wire.workspace import Entry, EntryKind, WorkspaceLimits, changed, read_workspace

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 and "CI" not in os.environ, reason="needs root to make devices or become another uid"
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    place = tmp_path / "home"
    place.mkdir()
    (place / "notes.txt").write_text("buy milk\n")
    (place / "src").mkdir()
    (place / "src/run.sh").write_text("#!/bin/sh\n")
    (place / "src/run.sh").chmod(0o755)
    return place


def files(packed: Packed) -> dict[str, bytes]:
    return {entry.path: entry.data for entry in read_workspace(packed.tar) if entry.kind is EntryKind.FILE}


def file(path: str, data: bytes = b"new") -> Entry:
    return Entry(path=path, kind=EntryKind.FILE, data=data)


def given(home: Path) -> tuple[Entry, ...]:
    return read_workspace(pack_directory(home).tar)


# --- packing -----------------------------------------------------------------------------------


def test_a_directory_is_packed(home: Path) -> None:
    (home / "link").symlink_to("src/run.sh")
    (home / "empty").mkdir()
    entries = {entry.path: entry for entry in given(home)}
    assert entries.keys() == {"notes.txt", "src", "src/run.sh", "link", "empty"}
    assert entries["src/run.sh"].executable and not entries["notes.txt"].executable
    assert entries["link"].target == "src/run.sh"
    assert pack_directory(home).tar == pack_directory(home).tar


def test_links_out_fifos_and_sockets_are_skipped_with_a_reason_and_nobody_waits(home: Path) -> None:
    (home / "abs").symlink_to("/etc/passwd")
    (home / "src/up").symlink_to("../../x")
    (home / "loop").symlink_to("loop")
    os.mkfifo(home / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home / "sock"))
        packed = pack_directory(home)
    assert dict(packed.skipped) == {
        "abs": "it points to an absolute path",
        "src/up": "it points out of the workspace",
        "fifo": "it is a FIFO",
        "sock": "it is a socket",
    }
    assert "loop" in {entry.path for entry in read_workspace(packed.tar)}


@needs_root
def test_device_files_are_skipped(home: Path) -> None:
    os.mknod(home / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(home / "disk", stat.S_IFBLK | 0o600, os.makedev(7, 200))
    assert dict(pack_directory(home).skipped) == {
        "null": "it is a device file",
        "disk": "it is a device file",
    }


def test_hard_links_become_copies(home: Path) -> None:
    os.link(home / "notes.txt", home / "again")
    assert files(pack_directory(home))["again"] == b"buy milk\n"


def test_names_with_newlines_and_odd_bytes_go_in(home: Path) -> None:
    (home / "two\nlines").write_text("x")
    odd = os.fsdecode(b"caf\xe9")
    (home / odd).write_text("y")
    assert {"two\nlines", odd} <= files(pack_directory(home)).keys()
    os.mkfifo(home / "bad\x1b[2J")
    assert pack_directory(home).skipped == (("bad\\x1b[2J", "it is a FIFO"),)


def test_git_is_left_out_unless_asked_for(home: Path) -> None:
    (home / ".git").mkdir()
    (home / ".git/config").write_text("[core]")
    (home / "src/.git").write_text("gitdir: elsewhere")
    assert ".git/config" not in files(pack_directory(home))
    assert ".git/config" in files(pack_directory(home, with_git=True))


def test_nothing_in_the_directory_is_configuration(home: Path) -> None:
    for name in (".gitignore", ".mycoswarmignore", ".dockerignore"):
        (home / name).write_text("*\n")
    assert "notes.txt" in files(pack_directory(home))


def test_a_file_that_grows_while_it_is_read_goes_in_to_its_first_size_and_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "log").write_bytes(b"x" * 100_000)
    real = os.fstat

    def grow(fd: int) -> os.stat_result:
        found = real(fd)
        if found.st_size == 100_000:
            with (home / "log").open("ab") as log:
                log.write(b"more")
        return found

    monkeypatch.setattr(os, "fstat", grow)
    packed = pack_directory(home)
    assert files(packed)["log"] == b"x" * 100_000
    assert packed.skipped == (("log", "it changed while it was read: 100000 bytes went in"),)


@needs_root
def test_what_cannot_be_read_is_skipped_with_a_reason(home: Path) -> None:
    (home / "secret").write_text("s")
    (home / "secret").chmod(0)
    (home / "closed").mkdir(mode=0)
    home.chmod(0o755)
    for parent in home.parents:  # the directory of all tests is its owner's alone
        if not parent.stat().st_mode & 0o001:
            parent.chmod(0o755)
    os.seteuid(65534)
    try:
        packed = pack_directory(home)
    finally:
        os.seteuid(0)
    reason = "it cannot be read: Permission denied"
    assert dict(packed.skipped) == {"secret": reason, "closed": reason}
    assert "notes.txt" in files(packed)


def test_too_many_files_and_bytes_end_with_what_and_where(home: Path) -> None:
    with pytest.raises(BadRequest, match=r"more than 2 entries \(at 'src/run.sh'\)") as caught:
        pack_directory(home, limits=WorkspaceLimits(entries=2))
    assert caught.value.code == "workspace-too-large"
    assert "--workspace" in caught.value.hint
    with (home / "huge").open("wb") as huge:
        huge.truncate(1 << 40)
    with pytest.raises(BadRequest, match="more than 256 MiB"):
        pack_directory(home)


@pytest.mark.timeout(300)
def test_a_hundred_thousand_files_are_refused_in_reasonable_time(tmp_path: Path) -> None:
    original = tmp_path / "f"
    original.touch()
    many = tmp_path / "many"
    # Hard links are made faster than files; two originals, for one may have 65,000 on ext4.
    for number in range(3):
        place = many / str(number)
        place.mkdir(parents=True)
        (place / "f").touch()
        for count in range(33_400):
            os.link(place / "f", place / f"{count}")
    started = time.process_time()
    with pytest.raises(BadRequest, match="more than 100000 entries"):
        pack_directory(many)
    assert time.process_time() - started < 40


def test_deep_directories_are_skipped_and_end(home: Path) -> None:
    place = home
    for _ in range(80):
        place = place / "d"
        place.mkdir()
    ((name, reason),) = pack_directory(home).skipped
    assert name.count("/") == 64
    assert "directories deep" in reason


@pytest.mark.parametrize("name", ["none", "notes.txt"])
def test_what_is_no_directory_is_an_error_with_the_cause(home: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot open the workspace") as caught:
        pack_directory(home / name)
    assert caught.value.code == "workspace-unreadable"


def test_a_directory_swapped_for_a_link_while_it_is_packed_is_not_followed(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = home.parent / "outside"
    outside.mkdir()
    (outside / "secret").write_text("s")
    real = os.stat

    def swap(path: str, **options: Any) -> os.stat_result:
        found = real(path, **options)
        if path == "src":
            (home / "src").rename(home.parent / "moved")
            (home / "src").symlink_to(outside)
        return found

    monkeypatch.setattr(os, "stat", swap)
    packed = pack_directory(home)
    assert not any("secret" in path for path in files(packed))
    assert [path for path, _ in packed.skipped] == ["src"]


# --- applying ----------------------------------------------------------------------------------


def test_changes_are_applied(home: Path) -> None:
    before = given(home)
    changes = (
        file("notes.txt", b"done\n"),
        file("new/deep/f"),
        Entry(path="src/run.sh", kind=EntryKind.FILE, data=b"#!/bin/sh\necho\n", executable=True),
        Entry(path="link", kind=EntryKind.SYMLINK, target="notes.txt"),
        Entry(path="dir", kind=EntryKind.DIRECTORY),
    )
    shown = apply_changes(home, changes, (), before=before)
    assert set(shown) == {"notes.txt", "new/deep/f", "src/run.sh", "link", "dir"}
    assert (home / "notes.txt").read_text() == "done\n"
    assert (home / "new/deep/f").read_bytes() == b"new"
    assert os.access(home / "src/run.sh", os.X_OK)
    assert (home / "link").readlink() == Path("notes.txt")
    assert (home / "dir").is_dir()
    assert not list(home.rglob(".mycoswarm-new*"))


def test_what_was_packed_changed_and_applied_is_what_the_agent_left(home: Path, tmp_path: Path) -> None:
    before = given(home)
    after = tmp_path / "after"
    (after / "src/run.sh").mkdir(parents=True)  # a file became a directory
    (after / "src/run.sh/x").write_text("x")
    (after / "other").write_text("o")
    apply_changes(home, *changed(before, given(after)), before=before)
    assert given(home) == given(after)


def test_an_original_that_changed_meanwhile_stops_everything_and_is_named(home: Path) -> None:
    before = given(home)
    (home / "notes.txt").write_text("mine now\n")
    with pytest.raises(Conflict, match=r"'notes\.txt'") as caught:
        apply_changes(home, (file("a-first"), file("notes.txt")), ("src/run.sh",), before=before)
    assert caught.value.code == "workspace-changed"
    assert (home / "notes.txt").read_text() == "mine now\n"
    assert not (home / "a-first").exists()
    assert (home / "src/run.sh").exists()


MAKERS: dict[str, Callable[[Path], object]] = {
    "file": Path.touch,
    "directory": Path.mkdir,
    "link": lambda place: place.symlink_to("/etc/passwd"),
    "fifo": os.mkfifo,
}


@pytest.mark.parametrize("made", MAKERS)
def test_a_new_file_never_replaces_what_the_user_made_meanwhile(home: Path, made: str) -> None:
    before = given(home)
    MAKERS[made](home / "new")
    with pytest.raises(Conflict, match="'new'"):
        apply_changes(home, (file("new"),), (), before=before)


def test_an_original_that_became_a_link_with_the_same_text_is_a_conflict(home: Path, tmp_path: Path) -> None:
    before = given(home)
    (home / "notes.txt").rename(tmp_path / "elsewhere")
    (home / "notes.txt").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Conflict):
        apply_changes(home, (file("notes.txt"),), (), before=before)
    assert (tmp_path / "elsewhere").read_text() == "buy milk\n"


def test_a_directory_that_became_a_link_is_not_written_through(home: Path, tmp_path: Path) -> None:
    before = given(home)
    outside = tmp_path / "outside"
    outside.mkdir()
    (home / "src").rename(tmp_path / "moved")
    (home / "src").symlink_to(outside)
    for change, gone in (((file("src/new"),), ()), ((), ("src/run.sh",))):
        with pytest.raises(Conflict):
            apply_changes(home, change, gone, before=before)
    assert list(outside.iterdir()) == []


def test_a_link_put_in_the_way_after_the_check_is_not_followed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = given(home)
    outside = tmp_path / "outside"
    outside.mkdir()
    real = workspace._write_all

    def race(root: int, changes: tuple[Entry, ...], deleted: tuple[str, ...]) -> tuple[str, ...]:
        (home / "src").rename(tmp_path / "moved")
        (home / "src").symlink_to(outside)
        return real(root, changes, deleted)

    monkeypatch.setattr(workspace, "_write_all", race)
    with pytest.raises(ConfigError, match="written before that: nothing"):
        apply_changes(home, (file("src/run.sh"),), (), before=before)
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "", ".", "a\0b", "./x", "a//b"])
def test_no_path_leaves_the_directory(home: Path, path: str) -> None:
    with pytest.raises(BadRequest):
        apply_changes(home, (), (path,), before=())
    with pytest.raises(BadRequest):
        apply_changes(home, (file(path),), (), before=())
    assert not (home.parent / "x").exists()


@pytest.mark.parametrize("path", [".git/hooks/post-checkout", ".git", "sub/.git/config", ".GIT/config"])
def test_git_is_never_touched_when_it_was_not_packed(home: Path, path: str) -> None:
    (home / ".git").mkdir()
    with pytest.raises(BadRequest, match="agent was given no"):
        apply_changes(home, (file(path),), (), before=given(home))
    assert list((home / ".git").iterdir()) == []


def test_a_packed_git_may_change(home: Path) -> None:
    (home / ".git").mkdir()
    before = read_workspace(pack_directory(home, with_git=True).tar)
    apply_changes(home, (file(".git/HEAD"),), (), before=before)
    assert (home / ".git/HEAD").exists()


def test_deleting_takes_files_first_and_keeps_what_was_not_packed(home: Path) -> None:
    os.mkfifo(home / "src/fifo")
    before = given(home)
    shown = apply_changes(home, (), ("src", "src/run.sh", "notes.txt"), before=before)
    assert set(shown) == {"src", "src/run.sh", "notes.txt"}
    assert [path.name for path in home.iterdir()] == ["src"]
    assert [path.name for path in (home / "src").iterdir()] == ["fifo"]


def test_a_replaced_file_keeps_its_mode_and_does_not_write_through_a_hard_link(
    home: Path, tmp_path: Path
) -> None:
    (home / "notes.txt").chmod(0o600)
    os.link(home / "notes.txt", tmp_path / "backup")
    before = given(home)
    apply_changes(home, (file("notes.txt"),), (), before=before)
    assert stat.S_IMODE((home / "notes.txt").stat().st_mode) == 0o600
    assert (tmp_path / "backup").read_text() == "buy milk\n"


def test_a_file_that_replaces_a_link_is_not_writable_by_all(home: Path) -> None:
    (home / "link").symlink_to("notes.txt")
    before = given(home)
    mask = os.umask(0o022)
    try:
        apply_changes(home, (file("link"),), (), before=before)
    finally:
        os.umask(mask)
    assert stat.S_IMODE((home / "link").lstat().st_mode) == 0o644


def test_a_full_disk_says_what_was_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = given(home)
    real = workspace._write_file

    def full(above: int, name: str, entry: Entry, mode: int) -> None:
        if entry.path == "b":
            raise OSError(28, "No space left on device")
        real(above, name, entry, mode)

    monkeypatch.setattr(workspace, "_write_file", full)
    with pytest.raises(ConfigError, match="No space left on device; written before that: a"):
        apply_changes(home, (file("a"), file("b")), (), before=before)
    assert not list(home.rglob(".mycoswarm-new*"))
