"""What root writes stays where the name says, whatever links others leave for it."""

import hashlib
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mycoswarmd.ctl import engine_install, ground, restoring
from mycoswarmd.ctl.download import Indexes, Pinned, fetch
from mycoswarmd.ctl.engine_install import Installer
from mycoswarmd.ctl.ground import firm
from mycoswarmd.ctl.session import Session
from mycoswarmd.ctl.unpack import unpack_file
from mycoswarmd.errors import ConfigError, StoreError
from tests.unit.ctl.test_engine_install import serving, wheel

SERVICE = 1234

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be led where others may not go")


def undefended(path: Path, **_: object) -> Path:
    return path


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


def owned(path: Path, user: int = SERVICE) -> Path:
    path.mkdir()
    os.chown(path, user, user)
    return path


def refused(path: Path, **how: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        firm(path, **how)  # type: ignore[arg-type]
    return caught.value.code


def test_every_part_is_roots_or_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    assert firm(tmp_path / "a/b/new/er") == tmp_path / "a/b/new/er"
    (tmp_path / "link").symlink_to("a/b")
    assert firm(tmp_path / "link/../x") == tmp_path / "a/x"
    os.chown(tmp_path / "link", SERVICE, SERVICE, follow_symlinks=False)
    assert refused(tmp_path / "link") == "not-only-roots"
    for mode in (0o775, 0o777):
        (tmp_path / "a").chmod(mode)
        assert refused(tmp_path / "a/b") == "not-only-roots"
    (tmp_path / "a").chmod(0o1777)  # as /tmp: what is root's in it stays
    assert firm(tmp_path / "a/b") == tmp_path / "a/b"
    os.chown(tmp_path / "a/b", SERVICE, SERVICE)
    assert refused(tmp_path / "a/b/new") == "not-only-roots"
    assert firm(tmp_path / "a/b", whose_last=SERVICE) == tmp_path / "a/b"
    with pytest.raises(ConfigError):
        firm(tmp_path / "a/b/c", whose_last=SERVICE)


def test_a_disk_is_not_left(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    (disk / "usr/lib").mkdir(parents=True)
    (disk / "lib").symlink_to("usr/lib")
    assert firm(disk / "lib/x", within=disk, make=True) == disk / "usr/lib/x"
    assert (disk / "usr/lib/x").is_dir()
    (disk / "etc").symlink_to(tmp_path)
    (disk / "opt").symlink_to("../..")
    (disk / "round").symlink_to("round")
    for name in ("etc", "opt", "round"):
        assert refused(disk / name / "x", within=disk) == "leads-out"
    os.chown(disk, SERVICE, SERVICE)
    assert refused(disk / "usr", within=disk) == "not-only-roots"


def test_what_is_made_is_for_all_to_read(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        made = firm(tmp_path / "opt/x", make=True)
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in (made, made.parent)} == {0o755}


def install(state: Path) -> None:
    session = Session(None, None)
    session.as_json = True
    Installer(session, state, "file:///nowhere").run(model=False)


@pytest.mark.parametrize("whose", ["state", "downloads"])
def test_an_installer_of_root_writes_nothing_where_a_service_can(
    tmp_path: Path, victim: Path, whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_install, "check_machine", lambda: None)
    state = tmp_path / "state"
    if whose == "state":
        owned(state)
    else:
        state.mkdir()
    downloads = owned(state / "downloads")
    (downloads / ".lock").symlink_to(victim)
    before = {path.name for path in state.iterdir()}
    with pytest.raises(ConfigError) as caught:
        install(state)
    assert caught.value.code == "not-only-roots" and "sudo -u" in (caught.value.hint or "")
    assert victim.read_text() == "precious"
    if whose == "state":
        assert {path.name for path in state.iterdir()} == before

    # The second lock alone: a link is not followed, and nothing is emptied.
    monkeypatch.setattr(engine_install, "firm", undefended)
    with pytest.raises(StoreError):
        install(state)
    assert victim.read_text() == "precious"
    # The control: what opens the lock as it was opened before empties the file.
    with (downloads / ".lock").open("w"):
        assert victim.read_text() == ""


def test_a_download_is_not_written_through_a_link(tmp_path: Path, victim: Path) -> None:
    data = b"downloaded"
    pinned = Pinned(
        project="x",
        version="1",
        filename="x.whl",
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
    )
    part = tmp_path / "part"
    part.symlink_to(victim)
    with serving() as index:
        index.files["x.whl"] = data
        fetch(pinned, Indexes(urls=(index.url,)), part, progress=lambda _: None)
    assert victim.read_text() == "precious"
    assert part.read_bytes() == data and not part.is_symlink()


def test_a_model_is_not_unpacked_through_a_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "w").write_bytes(wheel(m=b"model"))
    (tmp_path / ".new-model.part").symlink_to(victim)
    unpack_file(tmp_path / "w", "m", tmp_path / "model")
    assert victim.read_text() == "precious" and (tmp_path / "model").read_bytes() == b"model"


def backup(path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in {
            "identity/node.key": b"key",
            "mycoswarm.db": b"SQLite format 3\0",
        }.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def as_user(user: int, do: Callable[[], None]) -> str | None:
    """Do something with the rights of a user, who stands where we stand; return why it failed."""
    os.seteuid(user)
    try:
        do()
    except OSError as exc:
        return type(exc).__name__
    finally:
        os.seteuid(0)
    return None


@pytest.mark.parametrize("is_defended", [True, False])
def test_a_service_cannot_swap_what_root_restores(
    tmp_path: Path, is_defended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    state = owned(tmp_path / "state")
    state.chmod(0o700)
    saved = backup(tmp_path / "backup.tar")
    if not is_defended:
        monkeypatch.setattr(restoring, "_take_over", lambda directory: directory.stat())
    entered = os.open(state, os.O_RDONLY | os.O_DIRECTORY)  # as the node that still runs
    outcome: list[str | None] = []
    real = restoring._write

    def meanwhile(target: Path, *rest: object) -> None:
        if target.name == restoring.MARK:
            outcome.append(as_user(SERVICE, lambda: os.symlink(outside, "identity", dir_fd=entered)))
        real(target, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(restoring, "_write", meanwhile)
    try:
        restoring.restore(saved, state)
    finally:
        os.close(entered)
    if is_defended:
        assert outcome == ["PermissionError"] and list(outside.iterdir()) == []
        owners = {(path.stat().st_uid, path.stat().st_gid) for path in [state, *state.rglob("*")]}
        assert owners == {(SERVICE, SERVICE)}
    else:
        assert outcome == [None] and [path.name for path in outside.iterdir()] == ["node.key"]


def test_a_restore_goes_not_where_somebody_else_leads(tmp_path: Path) -> None:
    saved = backup(tmp_path / "backup.tar")
    home = owned(tmp_path / "home")
    for state in (home / "state", home / "not/yet"):
        with pytest.raises(ConfigError) as caught:
            restoring.restore(saved, state)
        assert caught.value.code == "not-only-roots"
    assert list(home.iterdir()) == []
    state = owned(tmp_path / "full")
    (state / "mine").touch()
    state.chmod(0o750)
    with pytest.raises(Exception, match="not empty"):
        restoring.restore(saved, state)
    found = state.stat()
    assert (found.st_uid, found.st_mode & 0o777) == (SERVICE, 0o750)


def test_others_than_root_are_not_bound(tmp_path: Path) -> None:
    place = owned(tmp_path / "any")
    os.seteuid(SERVICE)
    try:
        assert ground.firm(place / "x") == place / "x"
    finally:
        os.seteuid(0)
