"""The policy file on disk: read safely, keep the last good one, swap only what passed every check.

Law: a file that others could have written is not read; a file that does not check never replaces a
policy in force; with nothing valid at all, everything is denied (`policy` is None).
"""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mycoswarmd.core.policy.administer import CURE
from mycoswarmd.core.policy.check import Checked, check_policy
from mycoswarmd.core.policy.diff import changed_requests
from mycoswarmd.core.policy.model import Policy
from mycoswarmd.core.policy.parse import MAX_BYTES
from mycoswarmd.errors import PolicyInvalid, Problem, StoreError

# Where the programs of a policy are looked for: the distribution's places, not the caller's PATH.
PROGRAM_PATH = "/usr/bin:/bin"
# How the shipped policy is called in messages; it stands in no file of the operator's.
SHIPPED = "shipped default"
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Reload:
    """What a reload changed."""

    changed: tuple[str, ...]
    warnings: tuple[Problem, ...]


def way_back(path: Path, *, is_service: bool) -> str:
    """Say how the owner gets in again where the policy itself lets nobody administer the node."""
    reload = "sudo systemctl reload mycoswarmd" if is_service else f"kill -HUP {os.getpid()}"
    return f"edit {path}: {CURE}; then: {reload}"


def load_policy(path: Path) -> Checked:
    """Read and check a policy file; raise PolicyInvalid with what is wrong with the file or in it."""
    return check_policy(read_safely(path), path=str(path), resolve_program=resolve_program)


def resolve_program(name: str) -> str | None:
    """Return the file that a program's name or absolute path stands for, links resolved, or None."""
    if "/" in name and not name.startswith("/"):
        return None  # it would depend on where the node was started
    found = shutil.which(name, path=PROGRAM_PATH)
    return os.path.realpath(found) if found is not None else None


def read_safely(path: Path) -> bytes:
    """Read a file that only its owner, root or this user, may write."""
    try:
        real = path.resolve(strict=True)
        if real.parent != path.parent.resolve():
            raise _refused(path, "it is a link to another directory", "put the file itself here")
        fd = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            facts = os.fstat(fd)
            if (reason := _unsafe(path, facts)) is not None:
                raise reason
            data = os.read(fd, MAX_BYTES + 1)
            after = os.fstat(fd)
        finally:
            os.close(fd)
    except (OSError, RuntimeError) as exc:
        # For a loop of links pathlib raises RuntimeError, and from Python 3.13 on an OSError.
        why = "its links go in a circle"
        if isinstance(exc, OSError) and exc.errno != errno.ELOOP:
            why = (exc.strerror or "it cannot be read").lower()
        raise _refused(path, why, f"check it with: mycoswarmctl policy check {path}") from exc
    if (after.st_size, after.st_mtime_ns) != (facts.st_size, facts.st_mtime_ns) or len(data) != facts.st_size:
        raise _refused(path, "it changed while it was read", "write a new file and rename it over this one")
    return data


def _unsafe(path: Path, facts: os.stat_result) -> PolicyInvalid | None:
    if not stat.S_ISREG(facts.st_mode):
        return _refused(path, "it is not a regular file", "write a plain file")
    if facts.st_uid not in {0, os.geteuid()}:
        return _refused(path, f"it belongs to uid {facts.st_uid}", "chown it to root or to the node's user")
    if facts.st_mode & _OTHERS_MAY_WRITE:
        return _refused(path, "others than its owner may write it", f"chmod go-w {path}")
    if facts.st_size > MAX_BYTES:
        return _refused(path, f"it has {facts.st_size:,} bytes", f"at most {MAX_BYTES:,}")
    return None


class PolicyKeeper:
    """Holds the policy in force. One per daemon.

    Attributes:
        path: the file that the operator edits.
        checked: what is in force, with warnings and proofs; None denies everything.
        text: the text in force.
        problem: why the file is not what is in force, or "".
        loaded_at_ms: when what is in force was loaded.
    """

    def __init__(
        self, path: Path, state_dir: Path, *, now_ms: Callable[[], int], is_required: bool = False
    ) -> None:
        self.path = path
        self.checked: Checked | None = None
        self.text = ""
        self.problem = ""
        self.loaded_at_ms = 0
        self._copies = state_dir / "policy"
        self._current = self._copies / "current"
        self._now_ms = now_ms
        self._is_required = is_required
        self._start()

    @property
    def policy(self) -> Policy | None:
        """The policy in force, or None: everything is denied."""
        return self.checked.policy if self.checked is not None else None

    def reload(self) -> Reload:
        """Read the file again; raise PolicyInvalid and keep the old policy if anything is wrong."""
        old = self.policy
        try:
            data, checked = self._read()
        except PolicyInvalid as exc:
            kept = f"{old.name!r} of {old.sha256[:12]} stays in force" if old is not None else "all is denied"
            self.problem = f"{exc.message}; {kept}"
            raise
        changed = changed_requests(old, checked.policy)
        self._put_in_force(data, checked)
        return Reload(changed=changed, warnings=checked.warnings)

    def _start(self) -> None:
        try:
            self._put_in_force(*self._read())
        except PolicyInvalid as exc:
            self._fall_back(exc)

    def _read(self) -> tuple[bytes, Checked]:
        """Read the file, or the shipped default where there never was one."""
        if not self._is_required and _is_absent(self._current) and _is_absent(self.path):
            data, name = shipped_default(), SHIPPED
        else:
            data, name = read_safely(self.path), str(self.path)
        return data, check_policy(data, path=name, resolve_program=resolve_program)

    def _fall_back(self, exc: PolicyInvalid) -> None:
        """Use the copy of the last good file, if it is what its name says."""
        try:
            name = self._current.readlink().name
            data = read_safely(self._copies / name)
            if name != _copy_name(data):
                raise _refused(self._copies / name, "it is not what was stored", "")
            checked = check_policy(data, path=str(self.path), resolve_program=resolve_program)
        except (OSError, PolicyInvalid):
            self.problem = f"{exc.message}; there is no earlier policy: everything is denied"
            return
        self._hold(data, checked)
        self.problem = (
            f"{exc.message}; the last good policy, {checked.policy.sha256[:12]}, stays in force"
            f" (to go back to the shipped one, remove {self._current} and restart)"
        )

    def _put_in_force(self, data: bytes, checked: Checked) -> None:
        """Copy durably first: what is in force can always be found again."""
        if checked.policy.path != SHIPPED:
            try:
                self._keep(data)
            except OSError as exc:
                raise StoreError(
                    "policy-copy", f"cannot keep a copy of the policy in {self._copies}: {exc.strerror}"
                ) from exc
        self._hold(data, checked)
        self.problem = ""

    def _keep(self, data: bytes) -> None:
        if self._is_kept(data):
            return  # a full disk is no reason not to start again
        self._copies.mkdir(mode=0o700, parents=True, exist_ok=True)
        copy = self._copies / _copy_name(data)
        _write_durably(copy, data)
        link = self._copies / ".current"
        link.unlink(missing_ok=True)
        link.symlink_to(copy.name)
        link.replace(self._current)
        _sync_directory(self._copies)

    def _is_kept(self, data: bytes) -> bool:
        name = _copy_name(data)
        try:
            return self._current.readlink().name == name and read_safely(self._copies / name) == data
        except (OSError, PolicyInvalid):
            return False

    def _hold(self, data: bytes, checked: Checked) -> None:
        self.text = data.decode()
        self.loaded_at_ms = self._now_ms()
        self.checked = checked


def shipped_default() -> bytes:
    """Return the policy that holds where there is no file."""
    package = Path(__file__).resolve().parent.parent
    for place in (package / "share" / "policy", package.parent / "policy"):
        if (place / "default.toml").exists():
            return (place / "default.toml").read_bytes()
    raise _refused(
        package / "share" / "policy" / "default.toml", "it is missing", "install the package again"
    )


def _is_absent(path: Path) -> bool:
    """Tell whether there is nothing; what may not be looked at is not nothing."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _copy_name(data: bytes) -> str:
    return f"{hashlib.sha256(data).hexdigest()}.toml"


def _write_durably(path: Path, data: bytes) -> None:
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _refused(path: Path, why: str, hint: str) -> PolicyInvalid:
    return PolicyInvalid(
        (Problem(path=str(path), line=1, message=f"cannot use this file: {why}", hint=hint),)
    )
