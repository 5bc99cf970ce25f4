"""Real LAN dialers and false ones, and network namespaces for them to be in."""

import array
import asyncio
import ctypes
import os
import platform
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")
LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNET = 0x40000000
PROGRAM = ("-I", "-m", "mycoswarmd.outposts.lan")
# The defence removed: it dials whatever it is told.
UNGUARDED = (
    "-I",
    "-c",
    (
        "import sys; from mycoswarmd.outposts import lan; "
        "lan.objection = lan._look_at = lan._check_far = lambda *_: None; sys.exit(lan.main(sys.argv[1:]))"
    ),
)
# As RestrictAddressFamilies= of its unit: sockets of the internet families and no other, not even unix ones.
CONFINED = (
    "-I",
    "-c",
    """
import ctypes, platform, struct, sys
from mycoswarmd.outposts import lan
libc = ctypes.CDLL(None, use_errno=True)
number = 41 if platform.machine() == "x86_64" else 198
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *row) for row in [
    (0x20, 0, 0, 0), (0x15, 0, 4, number), (0x20, 0, 0, 16), (0x15, 2, 0, 2), (0x15, 1, 0, 10),
    (0x06, 0, 0, 0x00050000 | 97), (0x06, 0, 0, 0x7FFF0000)]))
program = ctypes.create_string_buffer(struct.pack("@HP", 7, ctypes.addressof(code)))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
sys.exit(lan.main(sys.argv[1:]))
""",
)


@dataclass(kw_only=True)
class Dialer:
    """A dialer's process, and the socket that outlives it, as it does under systemd."""

    path: Path
    listener: socket.socket
    options: tuple[str, ...]
    prefix: tuple[str, ...]
    program: tuple[str, ...]
    process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        fd = self.listener.fileno()
        self.process = subprocess.Popen(
            [*self.prefix, sys.executable, *self.program, "--fd", str(fd), *self.options],
            pass_fds=[fd],
            stderr=subprocess.DEVNULL,
        )

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def idle_files(self) -> int:
        """Return what is open between two requests: it has closed all of the last when it closes the next."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
            line.settimeout(60)
            line.connect(str(self.path))
            line.send(b'{"v":1,"do":"prove"}')
            while line.recv(8192):
                pass
        return self.open_files()

    def settle(self, condition: Callable[[], bool]) -> None:
        """Wait for what the dialer does after its answer."""
        ends = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < ends
            time.sleep(0.002)


@contextmanager
def lan_dialer(
    directory: Path, *options: str, namespace: str = "", program: Sequence[str] = PROGRAM
) -> Iterator[Dialer]:
    """Run a dialer until the end of the context."""
    path = directory / "lan.sock"
    prefix = ("ip", "netns", "exec", namespace) if namespace else ()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen(200)
        dialer = Dialer(path=path, listener=listener, options=options, prefix=prefix, program=tuple(program))
        dialer.start()
        try:
            yield dialer
        finally:
            dialer.kill()
            path.unlink()


def ask(path: Path, packet: bytes, *fds: int) -> tuple[bytes, list[int]]:
    """Say anything to a dialer and return what comes back."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
        line.settimeout(60)
        line.connect(str(path))
        if fds:
            socket.send_fds(line, [packet], list(fds))
        else:
            line.send(packet)
        data, found, _, _ = socket.recv_fds(line, 8192, 8)
        return data, found


@asynccontextmanager
async def false_dialer(directory: Path, packet: bytes, *socks: socket.socket | int) -> AsyncIterator[Path]:
    """Answer whatever is asked with this packet and these descriptors; b"" hangs up."""
    path = directory / "false.sock"
    loop = asyncio.get_running_loop()

    async def serve(listener: socket.socket) -> None:
        while True:
            line, _ = await loop.sock_accept(listener)
            with line:
                await loop.sock_recv(line, 8192)
                fds = array.array("i", [one if isinstance(one, int) else one.fileno() for one in socks])
                if packet:
                    line.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else [])

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)
        async with asyncio.TaskGroup() as group:
            server = group.create_task(serve(listener))
            try:
                yield path
            finally:
                server.cancel()
                path.unlink()


@contextmanager
def deaf(host: str = "127.0.0.1") -> Iterator[int]:
    """Be a port where a connection never comes about: its queue is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((host, 0), backlog=0))
        for _ in range(3):
            one = stack.enter_context(socket.socket())
            one.settimeout(0.05)
            one.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def network(name: str, *addresses: str) -> Iterator[str]:
    """Be a network namespace whose loopback has these addresses, too."""
    whole = f"{name}-{os.getpid()}"
    ip("netns", "add", whole)
    try:
        ip("-n", whole, "link", "set", "lo", "up")
        for address in addresses:
            ip("-n", whole, "addr", "add", address, "dev", "lo")
        yield whole
    finally:
        ip("netns", "del", whole)


def inside(namespace: str, make: Callable[[], T]) -> T:
    """Do something in a network namespace: sockets stay where they were made."""
    found: list[T] = []

    def run() -> None:
        with Path(f"/run/netns/{namespace}").open("rb") as there:
            assert LIBC.setns(there.fileno(), CLONE_NEWNET) == 0
        found.append(make())

    thread = threading.Thread(target=run)  # which is never somewhere else again
    thread.start()
    thread.join()
    return found[0]


BPF_PROG_LOAD, BPF_PROG_ATTACH, BPF_PROG_TYPE_CGROUP_SKB, BPF_CGROUP_INET_EGRESS = 5, 8, 8, 1
BPF_CALL = 321 if platform.machine() == "x86_64" else 280


@contextmanager
def control_group(directory: Path) -> Iterator[Path]:
    """Make a control group of the second version, where filters are; skip where there are none."""
    mount = directory / "cgroup2"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "cgroup2", "none", str(mount)], capture_output=True).returncode:
        pytest.skip("no second version of control groups here")
    group = mount / f"dialers-{os.getpid()}"
    try:
        group.mkdir()
        yield group
    finally:
        with suppress(OSError):
            group.rmdir()
        subprocess.run(["umount", str(mount)], check=True)


def let_nothing_out(group: Path, *, but: str = "") -> None:
    """Filter a control group as IPAddressDeny=any does, with one exception; skip where nobody can."""
    # skb_load_bytes(skb, 16, stack, 4), where IPv4 has its destination; r1 = that; if r1 == but: r0 = 1, exit
    exempt = "b702000010000000 bfa3000000000000 07030000f8ffffff b704000004000000 850000001a000000"
    exempt += f" 61a1f8ff00000000 56010200{socket.inet_aton(but or '0.0.0.0').hex()}"
    exempt += " b700000001000000 9500000000000000"
    # r0 = 0; exit: no packet passes
    text = bytes.fromhex(f"{exempt if but else ''} b700000000000000 9500000000000000")
    code = ctypes.create_string_buffer(text)
    licence = ctypes.create_string_buffer(b"GPL")
    program = _bpf(
        BPF_PROG_LOAD,
        struct.pack(
            "=IIQQ",
            BPF_PROG_TYPE_CGROUP_SKB,
            len(text) // 8,
            ctypes.addressof(code),
            ctypes.addressof(licence),
        ),
    )
    if program < 0:
        pytest.skip("no filters for control groups here")
    there = os.open(group, os.O_RDONLY)
    attached = _bpf(BPF_PROG_ATTACH, struct.pack("=IIII", there, program, BPF_CGROUP_INET_EGRESS, 0))
    os.close(there)
    os.close(program)
    if attached < 0:
        pytest.skip("no filters for control groups here")


def _bpf(command: int, attribute: bytes) -> int:
    return int(LIBC.syscall(BPF_CALL, command, ctypes.create_string_buffer(attribute, 128), 128))
