"""agent/snapshot: what is put in comes back only where it changed, and special things stay behind."""

import os
import socket
from pathlib import Path

import pytest

from mycoswarmd.agent import snapshot
from mycoswarmd.agent.snapshot import Harvest, made_directories, unpack
from mycoswarmd.errors import BadRequest
from mycoswarmd.wire.workspace import Entry, EntryKind, WorkspaceLimits, read_workspace

FILE, DIRECTORY, SYMLINK = EntryKind.FILE, EntryKind.DIRECTORY, EntryKind.SYMLINK
GIVEN = (
    Entry(path="a.txt", kind=FILE, data=b"a"),
    Entry(path="d/run.sh", kind=FILE, data=b"#!", executable=True),
    Entry(path="d/two\nlines", kind=FILE, data=b"n"),
    Entry(path="empty", kind=DIRECTORY),
    Entry(path="link", kind=SYMLINK, target="a.txt"),
)


def changes(root: int, before: tuple[Entry, ...]) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    tar, deleted = Harvest(root, before).collect()
    return read_workspace(tar), deleted


def test_an_untouched_workspace_has_no_changes(root: int, tmp_path: Path) -> None:
    before = unpack(root, GIVEN)
    assert os.access(tmp_path / "w/d/run.sh", os.X_OK)
    assert Harvest(root, before).collect() == (b"", ())


def test_only_what_differs_comes_back(root: int, tmp_path: Path) -> None:
    before = unpack(root, GIVEN)
    w = tmp_path / "w"
    (w / "a.txt").write_bytes(b"A")
    (w / "new/deep").mkdir(parents=True)
    (w / "new/deep/f").write_bytes(b"f")
    (w / "d/run.sh").chmod(0o644)
    (w / "empty").rmdir()
    (w / "link").unlink()
    found, deleted = changes(root, before)
    assert {entry.path: entry.data for entry in found if entry.kind is FILE} == {
        "a.txt": b"A",
        "new/deep/f": b"f",
        "d/run.sh": b"#!",
    }
    assert {entry.path for entry in found if entry.kind is DIRECTORY} == {"new", "new/deep"}
    assert set(deleted) == {"empty", "link"}


def test_special_files_and_links_out_stay_behind_and_are_named(root: int, tmp_path: Path) -> None:
    before = unpack(root, ())
    w = tmp_path / "w"
    os.mkfifo(w / "fifo")
    (w / "out").symlink_to("/etc/passwd")
    (w / "up").symlink_to("../x")
    (w / "ok").symlink_to("fifo")
    os.link(w / "ok", w / "hard", follow_symlinks=False)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(w / "sock"))
        harvest = Harvest(root, before)
        tar, _ = harvest.collect()
    assert [(entry.path, entry.target) for entry in read_workspace(tar)] == [("hard", "fifo"), ("ok", "fifo")]
    assert sorted(note.split(":")[0] for note in harvest.left_behind) == ["fifo", "out", "sock", "up"]


def test_more_than_a_workspace_holds_is_refused(
    root: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "DEFAULT_LIMITS", WorkspaceLimits(entries=5, bytes=100))
    (tmp_path / "w/big").write_bytes(b"x" * 101)
    with pytest.raises(BadRequest, match="MiB"):
        Harvest(root, ()).collect()
    (tmp_path / "w/big").unlink()
    for number in range(6):
        (tmp_path / f"w/f{number}").touch()
    with pytest.raises(BadRequest, match="more than 5 entries"):
        Harvest(root, ()).collect()


@pytest.mark.skipif(os.geteuid() != 0 and "CI" not in os.environ, reason="needs root to become another uid")
def test_what_cannot_be_read_counts_as_unchanged(root: int, tmp_path: Path) -> None:
    before = unpack(root, GIVEN)
    (tmp_path / "w/d").chmod(0)
    (tmp_path / "w/a.txt").chmod(0)
    os.seteuid(65534)
    try:
        found, deleted = changes(root, before)
    finally:
        os.seteuid(0)
    assert (found, deleted) == ((), ())


def test_directories_that_the_cage_made_are_no_change(root: int, tmp_path: Path) -> None:
    before = unpack(root, GIVEN)
    (tmp_path / "w/src/gen").mkdir(parents=True)
    made = tuple(made_directories(["/workspace/src/gen", "/workspace"], "/workspace"))
    assert changes(root, (*made, *before)) == ((), ())


def test_unpacking_follows_no_link_that_is_already_there(root: int, tmp_path: Path) -> None:
    (tmp_path / "w/d").symlink_to("..")
    with pytest.raises(OSError, match="Errno"):
        unpack(root, [Entry(path="d/f", kind=FILE, data=b"x")])
    assert not (tmp_path / "f").exists()
