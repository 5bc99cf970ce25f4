"""Forbids calls by their arguments, which neither Landlock nor a unit's list of calls can.

Laws:

1. Landlock is asked by connect() and bind(). sendto() with MSG_FASTOPEN connects without asking it, on every
   kernel so far: where TCP is forbidden by Landlock, that flag is forbidden here.
2. io_uring makes sockets, connects and sends without the calls that a filter sees, so it goes with them.
3. Calls of another architecture have other numbers: none is left. A filter cannot be taken back, and holds
   for what this thread starts; so it comes before the first thread.

Source: seccomp(2), tcp(7); the kernel's Documentation/userspace-api/seccomp_filter.rst.
"""

import ctypes
import errno
import os
import socket
import struct

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _AND, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16
_IO_URING_SETUP = 425
_X32 = 0x40000000
_TYPE_MASK = 0xF
# By architecture: what the kernel calls it, and its numbers of socket, sendto, sendmsg, sendmmsg.
_MACHINES = {"x86_64": (0xC000003E, 41, 44, 46, 307), "aarch64": (0xC00000B7, 198, 206, 211, 269)}

_Step = tuple[int, int, int, int]


def forbid_streams() -> bool:
    """Never let this thread, and what it starts, make a socket that is not for datagrams; tell whether so."""
    machine = _MACHINES.get(os.uname().machine)
    if machine is None:
        return False
    arch, make, *_ = machine
    kind = [
        (_LOAD, 0, 0, _ARGUMENTS + 8),
        (_AND, 0, 0, _TYPE_MASK),
        (_EQUAL, 1, 0, socket.SOCK_DGRAM),
        (_EQUAL, 0, 1, socket.SOCK_RAW),  # netlink; of the Internet's it needs a privilege
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    return _install(arch, [(make, kind)])


def forbid_fast_open() -> bool:
    """Never let this thread, and what it starts, connect by sending; tell whether that holds."""
    machine = _MACHINES.get(os.uname().machine)
    if machine is None:
        return False
    arch, _, send_to, send_message, send_messages = machine

    def flags(argument: int) -> list[_Step]:
        return [
            (_LOAD, 0, 0, _ARGUMENTS + 8 * argument),
            (_ANY_BIT, 0, 1, socket.MSG_FASTOPEN),
            (_RETURN, 0, 0, _REFUSE),
            (_RETURN, 0, 0, _ALLOW),
        ]

    return _install(arch, [(send_to, flags(3)), (send_message, flags(2)), (send_messages, flags(3))])


def _install(arch: int, calls: list[tuple[int, list[_Step]]]) -> bool:
    """Have the kernel run these steps for these calls, and allow all others."""
    steps: list[_Step] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _REFUSE),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _REFUSE),
        (_EQUAL, 0, 1, _IO_URING_SETUP),
        (_RETURN, 0, 0, _REFUSE),
    ]
    for number, what in calls:
        steps += [(_EQUAL, 0, len(what), number), *what]
    steps.append((_RETURN, 0, 0, _ALLOW))
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    # struct sock_fprog: a short, its padding, a pointer.
    head = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    done = libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, head, 0, 0)
    return bool(done == 0)
