"""Forbids calls by their arguments, which neither Landlock nor a unit's list of calls can.

Laws:

1. Landlock is asked by connect() and bind(). sendto() with MSG_FASTOPEN connects without asking it, on every
   kernel so far: where TCP is forbidden by Landlock, that flag is forbidden here.
2. Each half of a pair of sockets for packets sends to whom it likes, by a name that no file has as well: who
   has the machine's network and may make no such socket gets pairs of streams only.
3. io_uring makes sockets, connects and sends without the calls that a filter sees, so it goes with them.
4. Calls of another architecture have other numbers: none is left. A filter cannot be taken back, and holds
   for what this thread starts; so it comes before the first thread.

Source: seccomp(2), tcp(7); the kernel's Documentation/userspace-api/seccomp_filter.rst; numbers from
asm/unistd_64.h and asm-generic/unistd.h; proc(5) for what is not dumpable.
"""

import ctypes
import errno
import os
import signal
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 4, 22, 38, 2
_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16
_X32 = 0x40000000
_ALL_BITS, _KIND = 0xFFFFFFFF, 0xF
_STOPS = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
# The signal that tells of a ready descriptor, to whom its owner likes.
_F_SETSIG = 10
_ARCHITECTURES: Mapping[str, int] = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_EVERYWHERE = {"pidfd_send_signal": 424, "io_uring_setup": 425}
_NUMBERS: Mapping[str, Mapping[str, int]] = {
    "x86_64": _EVERYWHERE
    | {"socket": 41, "sendto": 44, "sendmsg": 46, "socketpair": 53, "kill": 62, "fcntl": 72, "sendmmsg": 307}
    | {"rt_sigqueueinfo": 129, "tkill": 200, "tgkill": 234, "rt_tgsigqueueinfo": 297},
    "aarch64": _EVERYWHERE
    | {"fcntl": 25, "socket": 198, "socketpair": 199, "sendto": 206, "sendmsg": 211, "sendmmsg": 269}
    | {"kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240},
}


@dataclass(frozen=True, slots=True)
class _Rule:
    """What an argument of a call, as far as `bits` go, must not be; or with `only`, must be."""

    call: str
    argument: int
    values: tuple[int, ...]
    bits: int = _ALL_BITS
    only: bool = False

    def steps(self) -> list[tuple[int, int, int, int]]:
        count = len(self.values)
        met, unmet = (_ALLOW, _REFUSE) if self.only else (_REFUSE, _ALLOW)
        return [
            (_LOAD, 0, 0, _ARGUMENTS + 8 * self.argument),
            (_AND, 0, 0, self.bits),
            *((_EQUAL, count - at, 0, value) for at, value in enumerate(self.values)),
            (_RETURN, 0, 0, unmet),
            (_RETURN, 0, 0, met),
        ]


_PAIRS = _Rule("socketpair", 1, (socket.SOCK_STREAM,), _KIND, only=True)
# Raw ones are netlink's; of the Internet's they need a privilege.
_PACKETS = _Rule("socket", 1, (socket.SOCK_DGRAM, socket.SOCK_RAW), _KIND, only=True)
_FAST_OPEN = tuple(
    _Rule(call, argument, (socket.MSG_FASTOPEN,), socket.MSG_FASTOPEN)
    for call, argument in (("sendto", 3), ("sendmsg", 2), ("sendmmsg", 3))
)
_STOPPING = (
    *(_Rule(call, 1, _STOPS) for call in ("kill", "tkill", "rt_sigqueueinfo", "pidfd_send_signal")),
    *(_Rule(call, 2, _STOPS) for call in ("tgkill", "rt_tgsigqueueinfo")),
    _Rule("fcntl", 1, (_F_SETSIG,)),
)


def forbid_streams() -> bool:
    """Never let this thread, and what it starts, make a socket that is not for datagrams; tell whether so."""
    return _install((_PACKETS, _PAIRS))


def forbid_packet_pairs() -> bool:
    """Never let this thread, and what it starts, make a pair of sockets for packets; tell whether so."""
    return _install((_PAIRS,))


def forbid_fast_open() -> bool:
    """Never let this thread, and what it starts, connect by sending; tell whether that holds."""
    return _install(_FAST_OPEN)


def forbid_stopping() -> bool:
    """Take the power to stop another from this process and all that it starts; tell whether it is gone.

    Nor can what it starts change this process's memory. A child may still end its parent; in a unit, that is
    the child's end as well.
    """
    return not ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) and _install(_STOPPING)


def _install(rules: Iterable[_Rule]) -> bool:
    """Have the kernel follow these rules, and allow all other calls; tell whether it does."""
    machine = os.uname().machine
    if machine not in _ARCHITECTURES:
        return False
    numbers = _NUMBERS[machine]
    steps = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _REFUSE),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _REFUSE),
        (_EQUAL, 0, 1, numbers["io_uring_setup"]),
        (_RETURN, 0, 0, _REFUSE),
    ]
    for rule in rules:
        what = rule.steps()
        steps += [(_EQUAL, 0, len(what), numbers[rule.call]), *what]
    steps.append((_RETURN, 0, 0, _ALLOW))
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    # struct sock_fprog: a short, its padding, a pointer.
    head = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    done = libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, head, 0, 0)
    return bool(done == 0)
