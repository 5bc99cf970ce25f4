"""Engines as confined children: no network, their files read-only, one writable directory, an own uid.

Started by root, bubblewrap itself builds the mounts as root, for only root can reach files below a
private state directory; inside, setpriv becomes another uid without any capability before the engine
starts. Started by a person, it is a user namespace with that person's uid. Where bubblewrap cannot work
the engine runs plainly, and says why.

Source: bwrap(1), setpriv(1).
"""

import asyncio
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from mycoswarmd.errors import CageError
from mycoswarmd.sandbox.child import Child, ends_well, is_executable
from mycoswarmd.sandbox.host import BWRAP, ETC, ROOT_LINKS

# Beside the cages' range, see bwrap.FIRST_UID.
ENGINE_UID = 1_899_999_999
SETPRIV = "/usr/bin/setpriv"
DEVICES = ("/dev/null", "/dev/random", "/dev/urandom", "/dev/zero")
# How llama.cpp counts cores and caches.
TOPOLOGY = "/sys/devices/system/cpu"
# bubblewrap needs 5 ms; a box that swaps gets this long to show that it can.
TRIAL_S = 10.0
# A log is for finding out why an engine ended; it lies in the runtime directory, often in memory.
LOG_BYTES = 1 << 20
LOG_CHECK_S = 60.0


class Process:
    """A running engine.

    Attributes:
        confined: whether it runs in a namespace of its own, without network.
        reason: why not, or "".
        pid: the first process started for it.
    """

    def __init__(self, child: Child, log_path: Path, *, reason: str) -> None:
        self._child = child
        self._log_path = log_path
        self.pid = child.pid
        self.reason = reason
        self.confined = not reason

    async def wait(self) -> int:
        """Wait for its end, keep its log short until then, and return its code, negative for a signal."""
        async with asyncio.TaskGroup() as group:
            shortening = group.create_task(_keep_short(self._log_path), name="engine-log")
            code = await self._child.wait()
            shortening.cancel()
        await self._child.kill()  # what is left of its namespace
        return code

    async def kill(self) -> None:
        """End it with all its children, and wait until they are gone."""
        await self._child.kill()


def start_engine(
    argv: Sequence[str],
    *,
    read_paths: Sequence[Path],
    write_paths: Sequence[Path],
    env: Mapping[str, str],
    log_path: Path,
    die_with_parent: bool = True,
) -> Process:
    """Start an engine that sees the system, its read-only paths and its writable directories only.

    The directories in `write_paths` are the engine's alone: started by root, they are handed to its uid.
    Files in `read_paths` become readable for its group there.
    """
    reason = why_not_confined()
    options: list[str] = []
    if not reason:
        options = [*_options(read_paths, write_paths, die_with_parent=die_with_parent)]
        if os.geteuid() == 0:
            _share(read_paths, write_paths)
            options += _step_down()
        else:
            options += ["--unshare-user", "--"]
    elif die_with_parent and is_executable(SETPRIV) and is_executable(argv[0]):
        options = [SETPRIV, "--pdeathsig", "KILL", "--"]
    _shorten(log_path)
    # It is appended to, and so goes on at the beginning when it is emptied.
    with ExitStack() as stack, log_path.open("ab") as log:
        keep_fds, info_r = [], None
        if not reason:
            info_r, info_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            stack.callback(os.close, info_w)
            keep_fds = [info_w]
            options = [BWRAP, "--info-fd", str(info_w), *options]
        try:
            child = Child(
                [*options, *argv],
                stdout=log.fileno(),
                stderr=log.fileno(),
                keep_fds=keep_fds,
                info_fd=info_r,
                environment={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", **env},
            )
        except CageError:
            if info_r is not None:
                os.close(info_r)
            raise
    return Process(child, log_path, reason=reason)


async def _keep_short(log_path: Path) -> None:
    while True:
        await asyncio.sleep(LOG_CHECK_S)
        _shorten(log_path)


def _shorten(log_path: Path) -> None:
    """Empty a log that has grown too long."""
    with suppress(OSError):  # none yet, or none any more
        if log_path.stat().st_size > LOG_BYTES:
            os.truncate(log_path, 0)


def why_not_confined() -> str:
    """Return why an engine cannot be confined here, or "" after trying it once."""
    if not is_executable(BWRAP):
        return "bubblewrap is not installed"
    if os.geteuid() == 0 and not is_executable(SETPRIV):
        return "setpriv (util-linux) is not installed"
    inside = _step_down() if os.geteuid() == 0 else ["--unshare-user", "--"]
    trial = ends_well(
        [BWRAP, *_options((), (), die_with_parent=True), *inside, "/usr/bin/true"],
        within_s=TRIAL_S,
    )
    return f"bubblewrap cannot work here: {trial}" if trial else ""


def _options(
    read_paths: Sequence[Path], write_paths: Sequence[Path], *, die_with_parent: bool
) -> Iterator[str]:
    yield from ("--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")
    yield from ("--new-session", "--ro-bind", "/usr", "/usr")
    if die_with_parent:
        yield "--die-with-parent"
    for name in ROOT_LINKS:
        if Path(f"/{name}").is_symlink():
            yield from ("--symlink", str(Path(f"/{name}").readlink()), f"/{name}")
    yield from ("--proc", "/proc", "--dir", "/dev")
    for path in DEVICES:
        yield from ("--dev-bind", path, path)
    binds = [("--ro-bind-try", path) for path in (*ETC, TOPOLOGY)]
    binds += sorted(("--ro-bind", str(path)) for path in read_paths)
    binds += sorted(("--bind", str(path)) for path in write_paths)
    # bubblewrap makes missing parents for root alone.
    for directory in sorted({str(parent) for _, path in binds for parent in Path(path).parents} - {"/"}):
        yield from ("--dir", directory)
    for option, path in binds:
        yield from (option, path, path)
    yield from ("--remount-ro", "/", "--cap-drop", "ALL")


def _step_down() -> list[str]:
    uid = str(ENGINE_UID)
    everything = ["--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all", "--no-new-privs"]
    # What setpriv needs to give up the rest, and itself loses by the change of uid.
    kept = [word for name in ("SETUID", "SETGID", "SETPCAP") for word in ("--cap-add", f"CAP_{name}")]
    return [*kept, "--", SETPRIV, "--reuid", uid, "--regid", uid, "--clear-groups", *everything]


def _share(read_paths: Sequence[Path], write_paths: Sequence[Path]) -> None:
    """Let the engine's uid reach its paths; what lies above them stays closed to everybody."""
    for directory in write_paths:
        os.chown(directory, ENGINE_UID, ENGINE_UID, follow_symlinks=False)
    for top in read_paths:
        for path in (top, *(sorted(top.rglob("*")) if top.is_dir() and not top.is_symlink() else ())):
            found = path.lstat()
            wanted = 0o5 if stat.S_ISDIR(found.st_mode) else 0o4
            if stat.S_ISLNK(found.st_mode) or found.st_mode & wanted == wanted:
                continue
            os.chown(path, -1, ENGINE_UID, follow_symlinks=False)
            path.chmod(stat.S_IMODE(found.st_mode) | wanted << 3)
