"""What the discovery process gives up: each thing is tried with and without, in processes of their own."""

import ctypes
import os
import subprocess
import sys

import pytest

ATTEMPTS = {
    "read a file": "open('/etc/passwd').read()",
    "list a directory": "import os; os.listdir('/')",
    "start a program": "import os; os.posix_spawn('/bin/true', ['true'], {})",
    "fork": "import os; os.fork() or os._exit(0)",
    "connect by TCP": (
        "import socket; s = socket.socket(); s.settimeout(2)\n"
        "try: s.connect(('127.0.0.1', 9))\n"
        "except ConnectionRefusedError: pass"
    ),
    "listen by TCP": "import socket; socket.create_server(('127.0.0.1', 0))",
    # Landlock is not asked on this way.
    "connect by TCP by sending": (
        "import socket; s = socket.socket(); s.settimeout(2)\n"
        "try: s.sendto(b'x', socket.MSG_FASTOPEN, ('127.0.0.1', 9))\n"
        "except (ConnectionRefusedError, BlockingIOError): pass"
    ),
    "make a socket for streams": "import socket; socket.socket(socket.AF_INET6)",
    "make a socket for streams of parts": "import socket; socket.socket(type=socket.SOCK_STREAM, proto=262)",
    "have calls made by a ring": (
        "import ctypes; raise SystemExit("
        "ctypes.CDLL(None).syscall(425, 1, ctypes.create_string_buffer(120)) < 0)"
    ),
    "fill the memory": "b'x' * (300 << 20)",
    "signal its parent": "import os; os.kill(os.getppid(), 0)",
}
# What it lives on.
STILL = (
    "import socket; s = socket.socket(type=socket.SOCK_DGRAM)\n"
    "s.bind(('', 0)); s.sendto(b'x', ('127.0.0.1', 9))\n"
    "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0); socket.socketpair()"
)
# What older kernels have no means against.
NEEDS_LANDLOCK = {"signal its parent": 6}


def ran(code: str, *, confined: bool) -> int:
    first = "from mycoswarmd.outposts.confine import confine; confine()\n" if confined else ""
    imports = "import encodings.idna, socket, os\n"
    argv = [sys.executable, "-I", "-c", imports + first + code]
    return subprocess.run(argv, capture_output=True, timeout=30).returncode


@pytest.mark.parametrize("name", ATTEMPTS)
def test_it_can_do_nothing_but_its_work(name: str) -> None:
    abi = ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1)
    if abi < NEEDS_LANDLOCK.get(name, 1):
        pytest.skip(f"needs a kernel with Landlock {NEEDS_LANDLOCK.get(name, 1)}, this one has {abi}")
    assert ran(ATTEMPTS[name], confined=False) == 0
    assert ran(ATTEMPTS[name], confined=True) == 1


def test_it_can_do_its_work() -> None:
    assert ran(STILL, confined=True) == 0


def test_root_becomes_nobody() -> None:
    if os.geteuid() != 0 and "CI" not in os.environ:
        pytest.skip("needs root")
    code = "import os; raise SystemExit(os.getresuid() != (65534,) * 3 or os.getgroups() != [])"
    assert ran(code, confined=False) == 1
    assert ran(code, confined=True) == 0
