"""Start a program as mycoswarmd.service does: with a listening socket, and with no socket family but AF_UNIX.

    python tests/onlyunix.py [--open] FD NAME PROGRAM ARGUMENT...

FD becomes descriptor 3, called NAME; -1 is none. With --open the kernel is not asked to refuse anything: the
defence removed. Source: sd_listen_fds(3); seccomp(2); systemd's own filter for RestrictAddressFamilies=.
"""

import ctypes
import errno
import os
import platform
import socket
import struct
import sys

_SECCOMP_MODE_FILTER, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 2, 22, 38
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
# The architecture's number, and that of the system call socket.
_MACHINES = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}


def only_unix() -> None:
    """Have the kernel refuse every other family, as RestrictAddressFamilies=AF_UNIX does."""
    arch, number = _MACHINES[platform.machine()]
    steps = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_EQUAL, 0, 3, number),
        (_LOAD, 0, 0, 16),
        (_EQUAL, 1, 0, socket.AF_UNIX),
        (_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    libc = ctypes.CDLL(None, use_errno=True)
    program = struct.pack("@HP", len(steps), ctypes.addressof(code))  # struct sock_fprog
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0
    ):
        raise OSError(ctypes.get_errno(), "no filter")


def main(arguments: list[str]) -> None:
    """Become the program."""
    is_open = arguments[0] == "--open"
    fd, name, *command = arguments[is_open:]
    if int(fd) >= 0:
        os.dup2(int(fd), 3)
        given = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": name}
        os.environ.update(given)
    if not is_open:
        only_unix()
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
