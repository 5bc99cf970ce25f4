"""Firm ground for root: a path of which every part is root's, so that nobody else can lead it elsewhere.

Laws:

1. What root makes, opens, runs or removes below such a path is where the name says, until root changes it.
2. A link counts as a part: one that is not root's is refused, and on another system's disk (`within`) so is
   every link that leads out of that disk.
3. Nobody but root is bound: who writes in a place of their own harms only themselves.

Source: path_resolution(7); CWE-59.
"""

import os
import stat
from pathlib import Path

from mycoswarmd.errors import ConfigError

_HERE = Path("/")
_MAX_LINKS = 40  # as the kernel


def firm(path: Path, *, within: Path = _HERE, make: bool = False, whose_last: int | None = None) -> Path:
    """Return `path` without links, when all of it is root's; make the missing directories if told to.

    Args:
        path: an absolute path, `within` or below it.
        within: the root directory of the system that is worked on.
        make: whether what is missing is made, for all to read.
        whose_last: a user who may own the last part instead of root.

    Raises ConfigError("not-only-roots") or ConfigError("leads-out").
    """
    if os.geteuid() != 0:
        return path
    at = within
    _check(at, at.stat(), whose_last if path == within else None)
    todo = list(reversed(path.relative_to(within).parts))
    links = 0
    while todo:
        part = todo.pop()
        if part == "..":
            if at == within and within != _HERE:
                raise _leads_out(path, within)
            at = at.parent
            continue
        at = at / part
        found = _look(at, make=make)
        if found is None:
            return at.joinpath(*reversed(todo))
        is_link = stat.S_ISLNK(found.st_mode)
        _check(at, found, None if todo or is_link else whose_last)
        if is_link:
            links += 1
            target = at.readlink()
            if links > _MAX_LINKS or (target.is_absolute() and within != _HERE):
                raise _leads_out(path, within)
            todo.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))
            at = within if target.is_absolute() else at.parent
    return at


def _look(path: Path, *, make: bool) -> os.stat_result | None:
    try:
        return path.lstat()
    except FileNotFoundError:
        if not make:
            return None
    try:
        path.mkdir(0o755)
    except FileExistsError:
        pass  # somebody was faster, and is looked at like everybody
    else:
        path.chmod(0o755)  # whatever the umask is: other users run what is in it
    return path.lstat()


def _check(path: Path, found: os.stat_result, also: int | None) -> None:
    # In a directory with the sticky bit (/tmp) others make names of their own, but change none of root's.
    is_open = bool(found.st_mode & 0o022) and not found.st_mode & stat.S_ISVTX
    if found.st_uid not in {0, also} or (is_open and not stat.S_ISLNK(found.st_mode)):
        raise ConfigError(
            "not-only-roots",
            f"cannot do this as root in {str(path)!r}: user {found.st_uid} with mode "
            f"{stat.S_IMODE(found.st_mode):o} could lead root elsewhere",
            hint="a directory of root's that only root can write to, or do it as the user whose it is: "
            "sudo -u USER",
        )


def _leads_out(path: Path, within: Path) -> ConfigError:
    return ConfigError(
        "leads-out",
        f"cannot use {str(path)!r}: a link in it leads out of {str(within)!r}",
        hint="mount the system whole and look at its links",
    )
