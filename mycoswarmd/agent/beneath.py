"""Opens paths below one directory and nowhere else, whatever links lie on the way.

The kernel resolves (openat2 with RESOLVE_BENEATH); where it has no such call, or a filter hides it, each
component is opened without following links, so that links do not work at all then.
Source: openat2(2).
"""

import ctypes
import errno
import os
import stat
import struct
from typing import Final

_OPENAT2: Final = 437  # the same on every architecture
_NO_MAGICLINKS, _BENEATH = 0x02, 0x08
# Never waits for the other end of a FIFO, never becomes a terminal's owner, never reaches a child.
_ALWAYS: Final = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


_LIBC = ctypes.CDLL(None, use_errno=True)


def open_beneath(root: int, path: str, flags: int, mode: int = 0o666) -> int:
    """Open a path below the directory `root`; OSError with EXDEV when it would leave."""
    raw = os.fsencode(path)
    if b"\0" in raw:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
    # struct open_how: flags, mode, resolve.
    how = struct.pack("=QQQ", flags | _ALWAYS, mode if flags & os.O_CREAT else 0, _BENEATH | _NO_MAGICLINKS)
    fd: int = _LIBC.syscall(_OPENAT2, root, raw, how, len(how))
    if fd >= 0:
        return fd
    number = ctypes.get_errno()
    # ENOSYS: an old kernel or a filter; EPERM: a filter (the call itself never gives it for files).
    if number in {errno.ENOSYS, errno.EPERM}:
        return open_by_walking(root, path, flags, mode)
    raise OSError(number, os.strerror(number), path)


def open_by_walking(root: int, path: str, flags: int, mode: int = 0o666) -> int:
    """Do the same component by component, following no link."""
    parts = [part for part in path.split("/") if part not in {"", "."}]
    if path.startswith("/") or ".." in parts:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    fd = os.dup(root)
    try:
        for part in parts[:-1]:
            deeper = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | _ALWAYS, dir_fd=fd)
            os.close(fd)
            fd = deeper
        return os.open(parts[-1] if parts else ".", flags | os.O_NOFOLLOW | _ALWAYS, mode, dir_fd=fd)
    finally:
        os.close(fd)


def open_file(root: int, path: str, flags: int) -> int:
    """Open a regular file; OSError with EISDIR or ENXIO for anything else."""
    fd = open_beneath(root, path, flags)
    kind = os.fstat(fd).st_mode
    if stat.S_ISREG(kind):
        return fd
    os.close(fd)
    number = errno.EISDIR if stat.S_ISDIR(kind) else errno.ENXIO
    raise OSError(number, os.strerror(number), path)


def open_directory(root: int, path: str) -> int:
    """Open a directory for reading."""
    return open_beneath(root, path, os.O_RDONLY | os.O_DIRECTORY)


def make_directories(root: int, path: str) -> None:
    """Make the directory and those above it, where they are missing."""
    made = ""
    for part in [part for part in path.split("/") if part not in {"", "."}]:
        above = open_directory(root, made or ".")
        try:
            os.mkdir(part, 0o755, dir_fd=above)
        except FileExistsError:
            pass  # a directory, or the next step says that it is none
        finally:
            os.close(above)
        made = f"{made}/{part}" if made else part
    os.close(open_directory(root, made or "."))
