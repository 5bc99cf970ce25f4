"""backup and restore: one private file, and nothing of it lands where it should not."""

import io
import os
import stat
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mycoswarmd.ctl import restoring
from mycoswarmd.daemon import backup as daemon_backup
from tests.unit.ctl.fakenode import FakeNode, Reply, answer, ctl, refuse

DATABASE = b"SQLite format 3\0" + bytes(range(256)) * 40
BLOB = "blobs/" + "ab" * 32
WHOLE: Mapping[str, bytes] = {
    "mycoswarm.db": DATABASE,
    "identity/node.key": b"key",
    "identity/node.crt": b"certificate",
    "signer/signer.key": b"signer",
    "policy.toml": b"version = 1\n",
    "mycoswarm.toml": b"",
    BLOB: b"workspace" * 1000,
}


def pack(files: Mapping[str, bytes], *more: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        entries = []
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.mode, entry.mtime = 0o777, 1.5
            entries.append((entry, data))
        for entry, data in [*entries, *more]:
            if entry.isreg():
                entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def without_end(whole: bytes) -> bytes:
    """Cut a tar right behind the last file in it."""
    while whole.endswith(bytes(512)):
        whole = whole[:-512]
    return whole


def special(name: str, kind: bytes, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    return entry, b""


def tree(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "backup.tar"
    path.write_bytes(pack(WHOLE))
    return path


def offer(node: FakeNode, data: bytes, *, cut: bool = False) -> FakeNode:
    pieces = tuple(data[at : at + 5000] for at in range(0, len(data), 5000))
    return node.on(
        "GET", "/api/backup", Reply(pieces=pieces, cut=cut, headers={"Content-Type": "application/x-tar"})
    )


def test_a_backup_is_one_private_file(node: FakeNode, tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        ran = ctl(offer(node, pack(WHOLE)), "backup", str(tmp_path / "b"))
    finally:
        os.umask(old)
    assert ran.code == 0, ran.err
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o600
    assert (tmp_path / "b").read_bytes() == pack(WHOLE)
    assert "keys" in ran.err
    machine = ctl(node, "backup", str(tmp_path / "c"), "--json").json
    assert machine == {"file": str(tmp_path / "c"), "bytes": len(pack(WHOLE))}


def test_a_backup_overwrites_nothing(node: FakeNode, tmp_path: Path) -> None:
    there = tmp_path / "b"
    there.write_text("precious")
    link = tmp_path / "l"
    link.symlink_to(tmp_path / "elsewhere")
    for path in (there, link, tmp_path):
        assert (
            ctl(offer(node, pack(WHOLE)), "backup", str(path), "--json").json["error"]["code"]
            == "file-exists"
        )
    assert there.read_text() == "precious" and not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("how", ["refused", "cut", "half", "garbage", "empty", "nowhere"])
def test_what_is_no_whole_backup_leaves_no_file(node: FakeNode, tmp_path: Path, how: str) -> None:
    whole = pack(WHOLE)
    target = tmp_path / ("no/such/place" if how == "nowhere" else "b")
    if how == "refused":
        node.on("GET", "/api/backup", refuse(403, "default-deny", rule="default-deny"))
    elif how == "empty":
        node.on("GET", "/api/backup", answer({}))
    else:
        data = {"half": whole[: len(whole) // 2], "garbage": b"x" * 9000}.get(how, whole)
        offer(node, data, cut=how == "cut")
    ran = ctl(node, "backup", str(target))
    assert ran.code == {"refused": 3, "cut": 4, "half": 2, "garbage": 2, "empty": 2, "nowhere": 1}[how], (
        ran.err
    )
    assert list(tmp_path.iterdir()) == []


def test_a_backup_comes_back_as_it_was(saved: Path, tmp_path: Path) -> None:
    state = tmp_path / "new" / "state"
    ran = ctl(None, "restore", str(saved), "--state", str(state))
    assert ran.code == 0, ran.err
    assert tree(state) == {**WHOLE, "restored": b""}
    for path in [state, *state.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert "must not run twice" in ran.err and "/etc/mycoswarm" in ran.err
    again = ctl(None, "restore", str(saved), "--state", str(tmp_path / "other"), "--json")
    assert sorted(again.json["files"]) == sorted(WHOLE)


def test_the_names_and_the_mark_are_the_daemons() -> None:
    assert restoring.DATABASE == daemon_backup.DATABASE
    assert restoring.MARK == daemon_backup.RESTORED


def test_what_a_daemon_packs_is_taken(tmp_path: Path) -> None:
    assert WHOLE.keys() - {BLOB} == set(restoring._SIZES)


@pytest.mark.parametrize("there", ["a file", "a directory", "a hidden file"])
def test_only_an_empty_directory_is_restored_into(saved: Path, tmp_path: Path, there: str) -> None:
    state = tmp_path / "state"
    state.mkdir()
    if there == "a directory":
        (state / "run").mkdir()
    else:
        (state / (".x" if "hidden" in there else "lock")).write_text("mine")
    before = sorted(state.iterdir())
    ran = ctl(None, "restore", str(saved), "--state", str(state), "--json")
    assert (ran.code, ran.json["error"]["code"]) == (1, "not-empty")
    assert sorted(state.iterdir()) == before


EVIL: dict[str, Callable[[Path], bytes]] = {
    "above": lambda _: pack({**WHOLE, "../evil": b"x"}),
    "absolute": lambda outside: pack({**WHOLE, str(outside): b"x"}),
    "inside and out": lambda _: pack({**WHOLE, "blobs/../../evil": b"x"}),
    "unknown": lambda _: pack({**WHOLE, "run/api.sock": b"x"}),
    "the mark": lambda _: pack({**WHOLE, "restored": b""}),
    "blob in capitals": lambda _: pack({**WHOLE, "blobs/" + "AB" * 32: b"x"}),
    "blob with a line end": lambda _: pack({**WHOLE, BLOB + "\n": b"x"}),
    "twice": lambda _: pack(WHOLE, (tarfile.TarInfo("policy.toml"), b"other")),
    "symbolic link": lambda outside: pack(
        {k: v for k, v in WHOLE.items() if k != "policy.toml"},
        special("policy.toml", tarfile.SYMTYPE, str(outside)),
    ),
    "linked directory": lambda outside: pack(WHOLE, special("blobs", tarfile.SYMTYPE, str(outside.parent))),
    "hard link": lambda outside: pack(WHOLE, special("signer/signer.key", tarfile.LNKTYPE, str(outside))),
    "device": lambda _: pack(WHOLE, special("policy.toml", tarfile.CHRTYPE)),
    "fifo": lambda _: pack(WHOLE, special("policy.toml", tarfile.FIFOTYPE)),
    "directory": lambda _: pack(WHOLE, special("identity", tarfile.DIRTYPE)),
    "large key": lambda _: pack({**WHOLE, "identity/node.key": bytes(5000)}),
    "no database": lambda _: pack({k: v for k, v in WHOLE.items() if k != "mycoswarm.db"}),
    "database that is none": lambda _: pack({**WHOLE, "mycoswarm.db": b"text"}),
    "cut between": lambda _: without_end(pack(WHOLE)),
    "cut inside": lambda _: pack(WHOLE)[:12_000],
    "compressed": lambda _: b"\x1f\x8b\x08\x00" + bytes(600),
    "text": lambda _: b"hello",
    "nothing": lambda _: b"",
}


@pytest.mark.parametrize("evil", EVIL)
def test_a_file_that_is_no_backup_writes_nothing_at_all(tmp_path: Path, evil: str) -> None:
    outside = tmp_path / "outside"
    bad = tmp_path / "evil.tar"
    bad.write_bytes(EVIL[evil](outside))
    state = tmp_path / "a" / "state"
    ran = ctl(None, "restore", str(bad), "--state", str(state), "--json")
    assert (ran.code, ran.json["error"]["code"]) == (2, "bad-backup")
    assert sorted(tmp_path.iterdir()) == [bad]


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """The control of the test above: what just unpacks the file is led out of the directory by it."""
    place = tmp_path / "x" / "y"
    place.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(EVIL["above"](tmp_path))) as tar:
        # Before 3.11.4 there was no other way.
        trusting: dict[str, Any] = (
            {"filter": "fully_trusted"} if hasattr(tarfile, "fully_trusted_filter") else {}
        )
        tar.extractall(place, **trusting)
    assert (place.parent / "evil").exists()


def test_a_restore_that_fails_in_the_middle_leaves_nothing(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    there = tmp_path / "there"
    there.mkdir()
    for state in (tmp_path / "state", there):
        calls = 0
        ran = ctl(None, "restore", str(saved), "--state", str(state), "--json")
        assert ran.json["error"]["code"] == "state-unwritable"
        assert "No space left" in ran.json["error"]["message"]
    assert not (tmp_path / "state").exists()
    assert list(there.iterdir()) == []


def test_the_database_comes_last_and_the_mark_first(saved: Path, tmp_path: Path) -> None:
    written: list[str] = []
    real = restoring._write

    def note(target: Path, *rest: object) -> None:
        written.append(target.name)
        real(target, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restoring, "_write", note)
        restoring.restore(saved, tmp_path / "state")
    assert (written[0], written[-1]) == ("restored", "mycoswarm.db")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_restores_belongs_to_whom_the_directory_belongs(saved: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, 1234, 1235)
    restoring.restore(saved, state)
    assert {(path.stat().st_uid, path.stat().st_gid) for path in state.rglob("*")} == {(1234, 1235)}


def test_a_backup_that_is_not_there_is_said(tmp_path: Path) -> None:
    ran = ctl(None, "restore", str(tmp_path / "none"), "--state", str(tmp_path / "s"), "--json")
    assert (ran.code, ran.json["error"]["code"]) == (1, "backup-unreadable")
    assert ctl(None, "restore", str(tmp_path / "none")).code == 2
