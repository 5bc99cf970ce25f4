"""`backup` and `restore`: a node's state in one file, and back out of it."""

import importlib
import os
import shlex
from pathlib import Path

from mycoswarmd.ctl.plain import examples, typer
from mycoswarmd.ctl.screen import count, size
from mycoswarmd.ctl.session import JSON, Session, begin, guarded
from mycoswarmd.errors import ConfigError, Conflict, StoreError

# It reads tar files, which --help does without.
_RESTORING = "mycoswarmd.ctl.restoring"
_SERVICE_STATE = Path("/var/lib/mycoswarm")
_WARNING = "it holds the keys of this node: whoever reads it can be this node"

BACKUP_EXAMPLES = examples("mycoswarmctl backup /mnt/usb/study-pc.tar")
RESTORE_EXAMPLES = examples("mycoswarmctl restore /mnt/usb/study-pc.tar --state /var/lib/mycoswarm")


@guarded
def backup(
    ctx: typer.Context,
    file: Path = typer.Argument(..., metavar="FILE", help="Where to write it; must not exist."),
    as_json: bool = JSON,
) -> None:
    """Write the state of the node to a file.

    Database, keys, policy, settings and the workspaces of tasks, as they are at one moment, while the node
    works on. Models are not in it. Keep it where only you can read it.
    """
    session = begin(ctx, as_json=as_json)
    written = _write(session, file)
    if as_json:
        session.document({"file": str(file), "bytes": written})
    else:
        session.text(f"{file}: {size(written)}")
        session.aside(_WARNING)


@guarded
def restore(
    ctx: typer.Context,
    file: Path = typer.Argument(..., metavar="FILE", help="What `backup` wrote."),
    state: Path = typer.Option(
        ..., "--state", metavar="DIR", help="The state directory; empty or not there."
    ),
    as_json: bool = JSON,
) -> None:
    """Put a node's state back from a file.

    Into an empty directory, for a node that does not run. The node comes back as itself: the one that the
    backup was made of must not run any more.
    """
    session = begin(ctx, as_json=as_json)
    session.stay_here()
    names: list[str] = importlib.import_module(_RESTORING).restore(file, state)
    if as_json:
        session.document({"state": str(state), "files": names})
        return
    session.text(f"{state}: {count(len(names), 'file')}")
    session.aside(
        "start it: sudo systemctl start mycoswarmd"
        if state.absolute() == _SERVICE_STATE
        else f"start it: mycoswarmd run --state {shlex.quote(str(state))}"
    )
    if {"policy.toml", "mycoswarm.toml"} & set(names):
        session.aside(
            "policy.toml and mycoswarm.toml are in that directory too; a node started without --state reads "
            "those in /etc/mycoswarm"
        )
    session.aside("the node must not run twice: if the old machine still has its state, remove it there")


def _write(session: Session, path: Path) -> int:
    pieces = session.local.stream("/api/backup")
    first = next(pieces, b"")  # what the node refuses leaves no file behind
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileExistsError as exc:
        raise Conflict(
            "file-exists", f"cannot write the backup: {str(path)!r} exists", hint="choose another name"
        ) from exc
    except OSError as exc:
        raise ConfigError("backup-unwritable", f"cannot write {str(path)!r}: {exc.strerror}") from exc
    written = 0
    is_whole = False
    try:
        with os.fdopen(descriptor, "wb") as out:
            written += out.write(first)
            for piece in pieces:
                written += out.write(piece)
            out.flush()
            os.fsync(descriptor)
        importlib.import_module(_RESTORING).check(path)
        is_whole = True
    except OSError as exc:
        raise StoreError("backup-unwritable", f"cannot write {str(path)!r}: {exc.strerror}") from exc
    finally:
        if not is_whole:
            path.unlink(missing_ok=True)
    return written
