"""Takes from an outpost every right that it does not use, before it reads the first byte of a stranger's.

Law: each step is taken where the kernel has it and skipped where it has not; none can be undone. What is
left is what was open: the pipes to the node, and new UDP sockets.
Source: landlock(7), setrlimit(2), prctl(2).
"""

import ctypes
import os
import resource
import signal
import struct

from mycoswarmd.outposts.callfilter import forbid_streams

MEMORY_BYTES = 160 << 20
_FILES = 256
_NOBODY = 65534
_NICE = 10
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
# These have the same numbers on every architecture.
_LANDLOCK_CREATE, _LANDLOCK_RESTRICT = 444, 446
_LANDLOCK_VERSION_FLAG = 1
# How many kinds of file access each version knows; from 4 on TCP bind and connect, from 6 on abstract unix
# sockets and signals.
_LANDLOCK_FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_LANDLOCK_TCP_ABI, _LANDLOCK_SCOPE_ABI = 4, 6
_BOTH = 0b11


def confine() -> None:
    """Give up root, files, TCP, new processes, and memory beyond the bound; die with the parent."""
    libc = ctypes.CDLL(None, use_errno=True)
    os.nice(_NICE)
    os.chdir("/")
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    # After the change of user, which resets both.
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for what, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, _FILES),
        (resource.RLIMIT_DATA, MEMORY_BYTES),
    ):
        _, hard = resource.getrlimit(what)
        bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (bound, bound))
    _close_files(libc)
    forbid_streams()


def _close_files(libc: ctypes.CDLL) -> None:
    """Forbid every path and every TCP connection, where the kernel has Landlock."""
    abi = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), _LANDLOCK_VERSION_FLAG)
    if abi < 1:
        return
    rules = struct.pack("=Q", (1 << _LANDLOCK_FS_BITS[min(abi, max(_LANDLOCK_FS_BITS))]) - 1)
    if abi >= _LANDLOCK_TCP_ABI:
        rules += struct.pack("=Q", _BOTH)
    if abi >= _LANDLOCK_SCOPE_ABI:
        rules += struct.pack("=Q", _BOTH)
    fd = libc.syscall(_LANDLOCK_CREATE, rules, ctypes.c_size_t(len(rules)), 0)
    if fd < 0:
        return
    libc.syscall(_LANDLOCK_RESTRICT, fd, 0)
    os.close(fd)
