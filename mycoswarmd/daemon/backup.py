"""A backup of this node: database, keys, policy, settings and the workspaces of tasks, as one tar.

Law: the copy is of one moment, also while the node works; it holds the node's keys, so only its owner may
read it. `mycoswarmctl restore` accepts exactly these names.
"""

import asyncio
import contextlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path

from mycoswarmd.daemon.settings import CONFIG_DIR, Settings
from mycoswarmd.errors import StoreError
from mycoswarmd.store.db import Database

DATABASE = "mycoswarm.db"
# Left by `restore`: the next start counts far ahead, so that nobody takes this node for a copy of itself.
RESTORED = "restored"
RESTORED_BOOTS = 1 << 20
_PIECE_BYTES = 256 << 10
_PREFIX = "backup-"


async def backup(db: Database, settings: Settings) -> AsyncGenerator[bytes, None]:
    """Yield the tar piece by piece; StoreError where there is no room for the database's copy."""
    with tempfile.TemporaryDirectory(dir=settings.state_dir, prefix=_PREFIX) as directory:
        copy = Path(directory) / DATABASE
        await db.snapshot(copy)
        archive = Path(directory) / "tar"
        await asyncio.to_thread(_pack, archive, copy, settings)
        with archive.open("rb") as file:
            while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
                yield piece


def starts_to_count(settings: Settings) -> int:
    """Return how many starts this one counts for: many, right after a restore."""
    return RESTORED_BOOTS if (settings.state_dir / RESTORED).exists() else 1


def tidy(settings: Settings) -> None:
    """Remove the mark of a restore that was counted, and what a backup left that was cut off: it has keys."""
    (settings.state_dir / RESTORED).unlink(missing_ok=True)
    for leftover in settings.state_dir.glob(f"{_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _pack(archive: Path, database: Path, settings: Settings) -> None:
    state = settings.state_dir
    found = {
        DATABASE: database,
        "identity/node.key": state / "identity" / "node.key",
        "identity/node.crt": state / "identity" / "node.crt",
        "signer/signer.key": state / "signer" / "signer.key",
        "policy.toml": settings.policy_file,
        "mycoswarm.toml": _settings_file(settings),
    }
    blobs = state / "blobs"
    if blobs.is_dir():
        found |= {f"blobs/{one.name}": one for one in sorted(blobs.iterdir()) if len(one.name) == 64}
    try:
        descriptor = os.open(archive, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
            for name, path in found.items():
                with contextlib.suppress(FileNotFoundError):
                    tar.add(path, arcname=name, recursive=False, filter=_plain)
    except OSError as exc:
        raise StoreError("store-io", f"cannot make a backup in {str(state)!r}: {exc.strerror}") from exc


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Keep what is a file, without telling whose it was."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o600
    return entry if entry.isfile() else None


def _settings_file(settings: Settings) -> Path:
    own = settings.state_dir / "mycoswarm.toml"
    return own if own.exists() else CONFIG_DIR / "mycoswarm.toml"
