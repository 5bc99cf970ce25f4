"""Keys on disk: durable, private, replaced at once or not at all."""

import os
import stat
from pathlib import Path

import pytest

from mycoswarmd.errors import ConfigError, NotFound, StoreError
from mycoswarmd.trust import keyfile, keys
from mycoswarmd.trust.identity import IdentityFile
from mycoswarmd.trust.signer import FileSigner


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "state" / "identity"


def test_an_identity_is_made_once_and_found_again(place: Path) -> None:
    store = IdentityFile(place)
    assert store.load() is None
    made = store.create()
    assert store.create() == made == IdentityFile(place).load()
    assert keys.verify(made.public_key, made.sign(b"message"), b"message")
    assert stat.S_IMODE((place / "node.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert sorted(path.name for path in place.iterdir()) == ["node.crt", "node.key"]


def test_an_identity_does_not_show_its_key(place: Path) -> None:
    made = IdentityFile(place).create()
    assert made.seed.hex() not in repr(made)
    assert repr(made.seed) not in repr(made)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_key_that_others_may_read_or_change_is_not_used(place: Path, mode: int) -> None:
    IdentityFile(place).create()
    (place / "node.key").chmod(mode)
    with pytest.raises(ConfigError) as caught:
        IdentityFile(place).load()
    assert caught.value.code == "key-exposed"
    assert f"chmod 600 {place / 'node.key'}" in caught.value.hint
    (place / "node.key").chmod(0o600)
    assert IdentityFile(place).load() is not None


def test_a_directory_in_which_others_may_replace_the_key_is_not_used(place: Path) -> None:
    IdentityFile(place).create()
    place.chmod(0o770)
    with pytest.raises(ConfigError, match="others may replace them") as caught:
        IdentityFile(place).load()
    assert f"chmod 700 {place}" in caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_users_key_is_not_used(place: Path) -> None:
    IdentityFile(place).create()
    os.chown(place / "node.key", 65534, -1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        IdentityFile(place).load()


def test_a_link_or_a_directory_in_the_place_of_a_key_is_not_used(place: Path, tmp_path: Path) -> None:
    IdentityFile(place).create()
    (place / "node.key").rename(tmp_path / "elsewhere")
    (place / "node.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="key-unreadable"):
        IdentityFile(place).load()
    (place / "node.key").unlink()
    os.mkfifo(place / "node.key", 0o600)  # and it does not wait for somebody to write
    with pytest.raises(ConfigError, match="no plain file"):
        IdentityFile(place).load()


@pytest.mark.parametrize("contents", [b"", b"not a key", b"A" * 10_000, b"\xff\xfe"])
def test_a_damaged_key_is_said_and_kept(place: Path, contents: bytes) -> None:
    IdentityFile(place).create()
    (place / "node.key").write_bytes(contents)
    with pytest.raises(ConfigError) as caught:
        IdentityFile(place).create()
    assert caught.value.code == "key-damaged"
    assert "backup" in caught.value.hint
    assert (place / "node.key").read_bytes() == contents  # never overwritten by a new one


@pytest.mark.parametrize("contents", [None, b"", b"no certificate", "another"], ids=str)
def test_a_missing_or_foreign_certificate_is_made_again(
    place: Path, tmp_path: Path, contents: bytes | str | None
) -> None:
    made = IdentityFile(place).create()
    whole = (place / "node.crt").read_bytes()
    if contents is None:
        (place / "node.crt").unlink()
    elif isinstance(contents, str):
        IdentityFile(tmp_path / "other").create()
        (place / "node.crt").write_bytes((tmp_path / "other" / "node.crt").read_bytes())
    else:
        (place / "node.crt").write_bytes(contents)
    assert IdentityFile(place).load() == made
    assert (place / "node.crt").read_bytes() == whole


def test_the_next_key_is_the_same_until_it_is_adopted(place: Path) -> None:
    store = IdentityFile(place)
    old = store.create()
    following = store.prepare_next()
    assert following.node_id != old.node_id
    assert IdentityFile(place).prepare_next() == following  # also after a crash
    assert store.load() == old
    assert store.adopt_next() == following == IdentityFile(place).load()
    assert sorted(path.name for path in place.iterdir()) == ["node.crt", "node.key"]
    with pytest.raises(NotFound, match="no-next-key"):
        store.adopt_next()


def test_a_crash_in_the_middle_of_adopting_leaves_one_whole_identity(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = IdentityFile(place)
    old = store.create()
    following = store.prepare_next()

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)  # before the rename
        with pytest.raises(KeyboardInterrupt):
            store.adopt_next()
    assert IdentityFile(place).load() == old
    assert IdentityFile(place).prepare_next() == following
    with monkeypatch.context() as patch:
        patch.setattr("mycoswarmd.trust.identity.write_file", crash)  # after it, before the certificate
        with pytest.raises(KeyboardInterrupt):
            store.adopt_next()
    assert IdentityFile(place).load() == following


def test_what_was_left_of_an_interrupted_write_does_no_harm(place: Path) -> None:
    place.mkdir(parents=True, mode=0o700)
    (place / "node.key.new").write_bytes(b"half a")
    made = IdentityFile(place).create()
    assert IdentityFile(place).load() == made


def test_file_and_directory_are_on_disk_before_a_key_counts(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.mkdir(parents=True, mode=0o700)
    done: list[str] = []
    sync, replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        done.append("sync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    def rename(path: Path, target: Path) -> Path:
        done.append(f"rename {path.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    keyfile.write_key(place / "node.key", keys.make_seed())
    assert done == ["sync node.key.new", "rename node.key.new", "sync identity"]


def test_a_full_disk_is_said(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device"):
        IdentityFile(place).create()
    monkeypatch.undo()
    assert IdentityFile(place).load() is None


def test_forgetting_is_whole_and_can_be_repeated(place: Path) -> None:
    store = IdentityFile(place)
    store.destroy()
    store.create()
    store.prepare_next()
    (place / "node.key.new").write_bytes(b"the power went off here")
    store.destroy()
    store.destroy()
    assert list(place.iterdir()) == []
    assert store.load() is None


def test_a_signer_signs_only_once_it_has_a_key(tmp_path: Path) -> None:
    signer = FileSigner(tmp_path / "signer")
    assert signer.public_key() is None
    with pytest.raises(NotFound) as caught:
        signer.sign(b"message")
    assert caught.value.code == "not-a-signer"
    public = signer.create()
    assert signer.create() == public == signer.public_key() == FileSigner(tmp_path / "signer").public_key()
    assert keys.verify(public, signer.sign(b"message"), b"message")
    assert stat.S_IMODE((tmp_path / "signer" / "signer.key").stat().st_mode) == 0o600
    signer.destroy()
    signer.destroy()
    assert signer.public_key() is None
    assert FileSigner(tmp_path / "signer").public_key() is None
    assert signer.create() != public
