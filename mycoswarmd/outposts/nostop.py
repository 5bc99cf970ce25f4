"""Keeps whoever a process starts from stopping it: a child of the same user that a stranger's file took over.

Law: from here on, neither this process nor any that it starts can stop another, or change this one's memory.
A child may still end its parent; in a unit, that is the child's end as well.

Source: seccomp(2), linux/bpf_common.h; numbers from asm/unistd_64.h and asm-generic/unistd.h; proc(5) for
what is not dumpable.
"""

import ctypes
import os
import signal
import struct

_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER = 4, 22, 38, 2
_LD, _JEQ, _JGE, _RET = 0x20, 0x15, 0x35, 0x06
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16
_ALLOW, _EPERM = 0x7FFF0000, 0x00050001
_X32_BIT = 0x40000000
_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_STOPS = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
# The signal that tells of a ready descriptor, to whom its owner likes.
_SETSIG = (10,)
# By machine and number: which argument must not have which values.
_CALLS = {
    "x86_64": {62: (1, _STOPS), 200: (1, _STOPS), 234: (2, _STOPS), 129: (1, _STOPS), 297: (2, _STOPS)},
    "aarch64": {129: (1, _STOPS), 130: (1, _STOPS), 131: (2, _STOPS), 138: (1, _STOPS), 240: (2, _STOPS)},
}
_PIDFD_SEND_SIGNAL = 424
_FCNTL = {"x86_64": 72, "aarch64": 25}


def forbid_stopping() -> bool:
    """Take the power to stop from this process and all that it starts; tell whether it is gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    machine = os.uname().machine
    if machine not in _ARCH or libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        return False
    code = _filter(machine)
    held = ctypes.create_string_buffer(code)
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(held))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    return bool(libc.prctl(_PR_SET_SECCOMP, _FILTER, program, 0, 0) == 0)


def _filter(machine: str) -> bytes:
    tests: dict[int, tuple[int, tuple[int, ...]]] = {
        **_CALLS[machine],
        _PIDFD_SEND_SIGNAL: (1, _STOPS),
        _FCNTL[machine]: (1, _SETSIG),
    }
    code = [
        (_LD, 0, 0, _ARCH_AT),
        (_JEQ, 1, 0, _ARCH[machine]),
        (_RET, 0, 0, _EPERM),
        (_LD, 0, 0, _NUMBER_AT),
    ]
    if machine == "x86_64":
        code += [(_JGE, 0, 1, _X32_BIT), (_RET, 0, 0, _EPERM)]
    for number, (argument, values) in tests.items():
        found = [(_LD, 0, 0, _ARGUMENTS_AT + 8 * argument)]
        found += [(_JEQ, len(values) - at, 0, value) for at, value in enumerate(values)]
        found += [(_RET, 0, 0, _ALLOW), (_RET, 0, 0, _EPERM)]
        code += [(_JEQ, 0, len(found), number), *found]
    code.append((_RET, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *one) for one in code)
