"""What a backup holds, and what is left of one that was cut off."""

import io
import tarfile
from pathlib import Path

import pytest

from mycoswarmd.daemon.backup import RESTORED_BOOTS, backup, starts_to_count, tidy
from mycoswarmd.daemon.settings import Options, Settings, load_settings
from mycoswarmd.store.db import Database


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    state = tmp_path / "state"
    (state / "identity").mkdir(parents=True, mode=0o700)
    state.chmod(0o700)
    (state / "identity" / "node.key").write_text("key")
    (state / "mycoswarm.toml").write_text("")
    (state / "mycoswarm.toml").chmod(0o600)
    return load_settings(Options(state=state))


async def test_a_backup_is_one_tar_that_only_its_owner_reads_and_leaves_nothing(settings: Settings) -> None:
    db = Database(settings.state_dir / "mycoswarm.db")
    await db.open()
    try:
        data = b"".join([piece async for piece in backup(db, settings)])
    finally:
        await db.close()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert {one.name for one in tar} == {"mycoswarm.db", "identity/node.key", "mycoswarm.toml"}
        assert {(one.mode, one.uid) for one in tar} == {(0o600, 0)}
        copy = tar.extractfile("mycoswarm.db")
        assert copy is not None
        assert copy.read(15) == b"SQLite format 3"
    assert not list(settings.state_dir.glob("backup-*"))


def test_a_restore_counts_until_its_count_is_on_disk(settings: Settings) -> None:
    assert starts_to_count(settings) == 1
    (settings.state_dir / "restored").touch()
    assert starts_to_count(settings) == RESTORED_BOOTS
    assert starts_to_count(settings) == RESTORED_BOOTS  # killed in between: it still counts
    tidy(settings)
    assert starts_to_count(settings) == 1


def test_a_backup_that_was_cut_off_leaves_no_keys_behind(settings: Settings) -> None:
    leftover = settings.state_dir / "backup-x1"
    leftover.mkdir()
    (leftover / "tar").write_text("keys")
    tidy(settings)
    assert not leftover.exists()
    assert (settings.state_dir / "identity" / "node.key").exists()
