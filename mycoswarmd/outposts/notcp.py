"""Keeps the core from pointing a socket that the LAN dialer made for it at somewhere else.

A connected TCP socket can be disconnected and connected anew. The dialer's filter holds for it wherever it
is used, so it stays on the LAN; but the dialer's own rules, such as which port of 127.0.0.1 is an engine's,
would not be asked again. Landlock judges who calls connect(), whoever made the socket; what connects by
sending is forbidden by a filter (callfilter.py).

Law: once taken, this cannot be given back, and holds for every thread and child that is started afterwards;
so it is called before the first. Where the kernel is too old for it, it says so and changes nothing.
Source: landlock(7); it knows TCP from its fourth version on, Linux 6.7.
"""

import ctypes
import os
import struct

from mycoswarmd.outposts.callfilter import forbid_fast_open

# These have the same numbers on every architecture.
_LANDLOCK_CREATE, _LANDLOCK_RESTRICT = 444, 446
_LANDLOCK_VERSION_FLAG = 1
_LANDLOCK_TCP_ABI = 4
_PR_SET_NO_NEW_PRIVS = 38
_NO_FILES = 0
_BIND_AND_CONNECT = 0b11


def forbid_tcp() -> bool:
    """Never let this thread, and what it starts, bind or connect a TCP socket; tell whether that holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    abi = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), _LANDLOCK_VERSION_FLAG)
    if abi < _LANDLOCK_TCP_ABI:
        return False
    rules = struct.pack("=QQ", _NO_FILES, _BIND_AND_CONNECT)
    fd = libc.syscall(_LANDLOCK_CREATE, rules, ctypes.c_size_t(len(rules)), 0)
    if fd < 0:
        return False
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    done = libc.syscall(_LANDLOCK_RESTRICT, fd, 0)
    os.close(fd)
    return bool(done == 0) and forbid_fast_open()
