"""The LAN dialer as a process: what it hands over, what it refuses, and what it survives."""

import asyncio
import errno
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from mycoswarmd.outposts.dialing import LanDialer
from mycoswarmd.wire.dial import PACKET_BYTES
from mycoswarmd.wire.proof import EXPECTED, CheckName, Unit
from tests.dialers import CONFINED, PROGRAM, UNGUARDED, Dialer, ask, deaf, inside, ip, lan_dialer, network

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces and other users")
PROVE = b'{"v":1,"do":"prove"}'
STRANGER = 65534


@pytest.fixture
def dialer(tmp_path: Path) -> Iterator[Dialer]:
    with lan_dialer(tmp_path) as one:
        yield one


def said(path: Path, packet: bytes, *fds: int) -> dict[str, object]:
    """Return an answer that brings no descriptor."""
    data, found = ask(path, packet, *fds)
    assert found == []
    answer = json.loads(data)
    assert isinstance(answer, dict)
    return answer


def connect(host: str, port: int, within_ms: int = 10_000) -> bytes:
    return json.dumps({"v": 1, "do": "connect", "host": host, "port": port, "within_ms": within_ms}).encode()


@contextmanager
def held_port() -> Iterator[int]:
    """Hold a port at which nobody listens, so that nobody else is given it; who wants it may share it."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("127.0.0.1", 0))
        yield int(one.getsockname()[1])


async def errno_of(asking: Awaitable[object]) -> int | None:
    """Return why it fails, or None where it does not."""
    try:
        await asking
    except OSError as exc:
        return exc.errno
    return None


def open_here() -> set[str]:
    return {one.name for one in Path("/proc/self/fd").iterdir()}


# --- what it does --------------------------------------------------------------------------------


async def test_a_connected_socket_comes_over(dialer: Dialer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ours = await LanDialer(dialer.path).connect("127.0.0.1", port, 60)
        theirs, _ = server.accept()
        with ours, theirs:
            assert (ours.gettimeout(), ours.get_inheritable()) == (0.0, False)
            reader, writer = await asyncio.open_connection(sock=ours)
            theirs.sendall(b"hello")
            assert await reader.readexactly(5) == b"hello"
            writer.close()
            await writer.wait_closed()
            # Nobody else holds it: its end is an end.
            theirs.settimeout(60)
            assert theirs.recv(1) == b""


async def test_a_listening_socket_comes_over(tmp_path: Path) -> None:
    file = tmp_path / "mycoswarm.toml"
    with held_port() as port, lan_dialer(tmp_path, "--settings", str(file)) as dialer:
        file.write_text(f'swarm_listen = "[::]:{port}"\n')
        lan = LanDialer(dialer.path)
        with await lan.listen("::", port) as ours:
            assert await errno_of(lan.listen("::", port)) == errno.EADDRINUSE
            dialer.kill()  # what it has handed over does not end with it
            for host in ("127.0.0.1", "::1"):
                with socket.create_connection((host, port), 60):
                    theirs, _ = await asyncio.get_running_loop().sock_accept(ours)
                    theirs.close()


async def test_it_proves_what_it_is_asked_to(dialer: Dialer) -> None:
    proof = await LanDialer(dialer.path).prove()
    assert proof.unit is Unit.LAN
    assert {check.name for check in proof.checks} == set(EXPECTED[Unit.LAN])
    # As a child without a unit it is confined by nobody, and says so.
    assert not proof.holds(CheckName.CANARY)


async def test_what_fails_fails_like_a_connection_of_ones_own(dialer: Dialer) -> None:
    lan = LanDialer(dialer.path)
    with held_port() as port, pytest.raises(ConnectionRefusedError):
        await lan.connect("127.0.0.1", port, 60)
    with deaf() as port, pytest.raises(TimeoutError):
        await lan.connect("127.0.0.1", port, 0.3)
    with pytest.raises(PermissionError):
        await lan.connect("127.0.0.2", 7437, 60)
    assert await errno_of(lan.connect("fe80::1%no-such-if", 7437, 60)) == errno.EHOSTUNREACH


# --- what it refuses -----------------------------------------------------------------------------

NEVER = {
    "public": ("203.0.113.9", 7437),
    "the clouds' keys": ("169.254.169.254", 7437),
    "the canary": ("127.0.0.2", 7437),
    "the resolver": ("127.0.0.53", 7437),
    "loopback IPv6": ("::1", 7437),
    "ssh of a home network": ("10.77.0.1", 22),
    "this machine from outside": ("10.77.0.1", 7437),
}
NOWHERE = {"multicast": "224.0.0.251", "mapped": "::ffff:10.77.0.1", "a name": "localhost"}


@needs_root
def test_what_must_not_be_dialled_is_not(tmp_path: Path) -> None:
    """Somebody listens at each of these addresses; a dialer without its rules reaches them all."""
    with ExitStack() as stack:
        there = stack.enter_context(
            network("lanattack", "203.0.113.9/32", "169.254.169.254/32", "10.77.0.1/32")
        )

        def listen() -> list[socket.socket]:
            return [stack.enter_context(_everywhere(port)) for port in (7437, 22)]

        listeners = inside(there, listen)
        with lan_dialer(tmp_path, namespace=there, program=UNGUARDED) as weak:
            for host, port in [*NEVER.values(), ("127.0.0.1", 7437)]:
                data, fds = ask(weak.path, connect(host, port))
                assert (json.loads(data), len(fds)) == ({"ok": True}, 1)
                os.close(fds[0])
                _take(listeners[port == 22])
        with lan_dialer(tmp_path, namespace=there) as dialer:
            for host, port in NEVER.values():
                assert said(dialer.path, connect(host, port))["code"] == "denied", host
            for host in NOWHERE.values():
                assert said(dialer.path, connect(host, 7437))["code"] == "denied", host
            # It still does its work there.
            data, fds = ask(dialer.path, connect("127.0.0.1", 7437))
            assert (json.loads(data), len(fds)) == ({"ok": True}, 1)
            os.close(fds[0])
        # The one that works, and no other: nothing was sent to any.
        _take(listeners[0])
        assert [_accepted(one) for one in listeners] == [False, False]


# Each address of this machine, as it may come to have them.
OWN = {
    "first": "10.77.0.1",
    "second of the same network": "10.77.0.2",
    "of another network": "192.168.9.1",
    "of another interface": "172.16.5.1",
    "IPv6": "fd77::1",
    "second IPv6": "fd77::2",
    "link-local": "fe80::1%lan0",
}
# The dialer as it was: it looks only at the two ends of what it made.
_LATER = """
import sys
from mycoswarmd.outposts import lan
lan._check_far = lambda *_: None
sys.exit(lan.main(sys.argv[1:]))
"""
LOOKS_LATER = ["-c", _LATER]


@needs_root
def test_no_address_of_this_machine_is_dialled(tmp_path: Path) -> None:
    """Its services listen on all of them, and no setting declares them."""
    with network("lanown") as here, ExitStack() as stack:
        ip("-n", here, "link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
        for name in ("lan0", "lan1"):
            ip("-n", here, "link", "set", name, "up")
        for address in ("10.77.0.1/24", "10.77.0.2/24", "192.168.9.1/24"):
            ip("-n", here, "addr", "add", address, "dev", "lan0")
        ip("-n", here, "addr", "add", "172.16.5.1/24", "dev", "lan1")
        for address in ("fd77::1/64", "fd77::2/64", "fe80::1/64"):
            ip("-n", here, "addr", "add", address, "dev", "lan0", "nodad")
        service = inside(here, lambda: stack.enter_context(_everywhere(6379)))
        with lan_dialer(tmp_path, namespace=here, program=LOOKS_LATER) as weak:
            data, fds = ask(weak.path, connect("10.77.0.2", 6379))
            assert (json.loads(data), len(fds)) == ({"ok": True}, 1)  # the attack
            os.close(fds[0])
            _take(service)
        with lan_dialer(tmp_path, namespace=here) as dialer:
            for host in OWN.values():
                answer = said(dialer.path, connect(host, 6379))
                assert (answer["code"], answer["detail"]) == (
                    "denied",
                    "that address is this machine's own",
                ), host
            assert not _accepted(service)  # not even a greeting
            # Where every address can be bound, the others are still reached, and the first still is not.
            setting = ["sysctl", "-qw", "net.ipv4.ip_nonlocal_bind=1"]
            subprocess.run(["ip", "netns", "exec", here, *setting], check=True)
            assert said(dialer.path, connect("10.77.0.9", 6379, 50))["code"] != "denied"
            assert said(dialer.path, connect("10.77.0.1", 6379))["code"] == "denied"


def _everywhere(port: int) -> socket.socket:
    sock = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    sock.settimeout(0)
    return sock


def _take(listener: socket.socket) -> None:
    """Take a connection that was made; the kernel may have it ready later than whoever made it knew."""
    listener.settimeout(60)
    listener.accept()[0].close()
    listener.settimeout(0)


def _accepted(listener: socket.socket) -> bool:
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True


@needs_root
@pytest.mark.parametrize("program", [PROGRAM, CONFINED], ids=["free", "without other sockets"])
async def test_a_home_network_is_reached_by_both_versions(program: Sequence[str], tmp_path: Path) -> None:
    with (
        network(
            "lana",
        ) as here,
        network("lanb") as there,
    ):
        ip("-n", here, "link", "add", "lan0", "type", "veth", "peer", "name", "lan0", "netns", there)
        for namespace, last in ((here, 1), (there, 2)):
            subprocess.run(
                ["ip", "netns", "exec", namespace, "sysctl", "-qw", "net.ipv6.conf.lan0.accept_dad=0"],
                check=True,
            )
            ip("-n", namespace, "addr", "add", f"10.77.0.{last}/24", "dev", "lan0")
            ip("-n", namespace, "addr", "add", f"fd77::{last}/64", "dev", "lan0", "nodad")
            ip("-n", namespace, "addr", "add", f"fe80::{last}/64", "dev", "lan0", "nodad")
            ip("-n", namespace, "link", "set", "lan0", "up")
        listener = inside(there, lambda: _everywhere(7437))
        with listener, lan_dialer(tmp_path, namespace=here, program=program) as dialer:
            proof = await LanDialer(dialer.path).prove()
            assert proof.holds(CheckName.ADDRESS_FAMILIES) == (program is CONFINED)
            for host in ("10.77.0.2", "fd77::2", "FD77:0::0:2", "fe80::2%lan0"):
                with await LanDialer(dialer.path).connect(host, 7437, 60) as sock:
                    sock.send(b"x")
                    _take(listener)
            index = inside(here, lambda: socket.if_nametoindex("lan0"))
            with await LanDialer(dialer.path).connect(f"fe80::2%{index}", 7437, 60):
                _take(listener)


@pytest.mark.parametrize(
    "packet",
    [
        b"\x00",
        b"\xff" * 100,
        b"{}",
        b"[" * 4000,
        connect("10.0.0.7", 7437) + b" " * PACKET_BYTES,
        b"x" * 100_000,
    ],
    ids=["zero", "no UTF-8", "empty", "deep", "long", "very long"],
)
def test_a_packet_that_is_none_is_refused(dialer: Dialer, packet: bytes) -> None:
    assert said(dialer.path, packet)["code"] == "denied"
    assert said(dialer.path, PROVE)["ok"] is True


def test_descriptors_are_not_taken(dialer: Dialer) -> None:
    assert said(dialer.path, PROVE)["ok"] is True
    before = dialer.idle_files()
    with socket.create_server(("127.0.0.1", 0)) as one:
        for _ in range(20):
            assert said(dialer.path, PROVE, *[one.fileno()] * 16)["ok"] is True
    dialer.settle(lambda: dialer.open_files() == before)


CLIENT = """
import os, socket, sys
os.setresuid(*[int(sys.argv[2])] * 3)
line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
line.connect(sys.argv[1])
try:
    line.send(b'{"v":1,"do":"prove"}')
except BrokenPipeError:
    pass  # it has said no already
try:
    answer = line.recv(8192)
except ConnectionResetError:
    answer = line.recv(8192)
print(answer.decode())
"""


@needs_root
def test_only_its_user_may_ask() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)

        def answer(user: int) -> dict[str, object]:
            # As a unit, the socket's own mode stands before this; here everybody gets to the dialer itself.
            (directory / "lan.sock").chmod(0o666)
            run = subprocess.run(
                [sys.executable, "-I", "-S", "-c", CLIENT, str(directory / "lan.sock"), str(user)],
                check=True,
                capture_output=True,
            )
            found = json.loads(run.stdout)
            assert isinstance(found, dict)
            return found

        with lan_dialer(directory):
            assert answer(0)["ok"] is True
            assert answer(STRANGER)["code"] == "denied"
        with lan_dialer(directory, "--user", str(STRANGER)):
            assert answer(STRANGER)["ok"] is True
            assert answer(0)["code"] == "denied"


# --- the node's settings -------------------------------------------------------------------------


async def test_only_declared_engines_are_reached_and_changes_count(tmp_path: Path) -> None:
    file = tmp_path / "mycoswarm.toml"
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        lan_dialer(tmp_path, "--settings", str(file)) as dialer,
    ):
        port = server.getsockname()[1]
        lan = LanDialer(dialer.path)

        async def is_reached() -> bool:
            try:
                (await lan.connect("127.0.0.1", port, 60)).close()
            except PermissionError:
                return False
            return True

        assert not await is_reached()  # no file, no engine
        for text, expected in (
            (f'[engines.a]\nkind = "ollama"\nurl = "http://127.0.0.1:{port}"\n', True),
            ("engines = broken\n", False),
            (f'[engines.a]\nurl = "http://127.0.0.1:{port}/v1"\n', True),
            (f'[engines.a]\nurl = "http://127.0.0.1:{port - 1}"\n', False),
            (f'[engines.a]\nurl = "http://127.0.0.1:{port}"\n#' + "x" * (64 << 10), False),
        ):
            file.write_text(text)
            assert await is_reached() == expected, text[:60]


# --- bad days ------------------------------------------------------------------------------------


# So patient that nothing ends of itself while a test looks on.
_PATIENCE = (
    "import resource, sys; from mycoswarmd.outposts import lan; from mycoswarmd.wire import dial; "
    "lan._PACKET_S, dial.MAX_WITHIN_MS = 600, 600_000; "
)
PATIENT = ("-I", "-c", _PATIENCE + "sys.exit(lan.main(sys.argv[1:]))")


async def test_nobody_can_take_all_its_places(tmp_path: Path) -> None:
    with lan_dialer(tmp_path, program=PATIENT) as dialer, ExitStack() as stack:
        lan = LanDialer(dialer.path)
        await lan.prove()
        for _ in range(64):  # they connect and say nothing
            line = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            line.connect(str(dialer.path))
        assert await errno_of(lan.prove()) == errno.EBUSY
        stack.close()
        async with asyncio.timeout(60):
            while await errno_of(lan.prove()) == errno.EBUSY:  # until it has seen that they left
                pass
        await lan.prove()


POOR = (
    "-I",
    "-c",
    (
        _PATIENCE
        # 16 in all; what it was given may have a number that the limit would not give out.
        + "limit = 15 if int(sys.argv[sys.argv.index('--fd') + 1]) > 15 else 16; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)); sys.exit(lan.main(sys.argv[1:]))"
    ),
)


async def test_it_outlives_a_want_of_descriptors(tmp_path: Path) -> None:
    with lan_dialer(tmp_path, program=POOR) as dialer, ExitStack() as stack:
        lan = LanDialer(dialer.path)
        await lan.prove()
        for _ in range(30):
            line = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            line.connect(str(dialer.path))
        dialer.settle(lambda: dialer.open_files() == 16)
        stack.close()
        await lan.prove()
        assert dialer.process is not None
        assert dialer.process.poll() is None
        # With room for a request and not for its socket, it says so.
        with deaf() as port:
            free = 16 - dialer.idle_files()
            assert free % 2 == 1
            for _ in range(free // 2):
                line = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                line.connect(str(dialer.path))
                line.send(connect("127.0.0.1", port, 600_000))
            dialer.settle(lambda: dialer.open_files() == 15)
            assert said(dialer.path, connect("127.0.0.1", port, 600_000))["code"] == "busy"


async def test_who_says_nothing_is_put_out(dialer: Dialer) -> None:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
        line.connect(str(dialer.path))
        line.setblocking(False)
        async with asyncio.timeout(60):
            assert json.loads(await loop.sock_recv(line, 8192))["ok"] is False
            assert await loop.sock_recv(line, 8192) == b""


async def test_who_hangs_up_costs_nothing(tmp_path: Path) -> None:
    """A place and a descriptor are free again long before the time for the connection is up."""
    with lan_dialer(tmp_path, program=PATIENT) as dialer, deaf() as port:
        await LanDialer(dialer.path).prove()
        before = dialer.idle_files()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
            line.connect(str(dialer.path))
            line.send(connect("127.0.0.1", port, 600_000))
            dialer.settle(lambda: dialer.open_files() == before + 2)
        dialer.settle(lambda: dialer.open_files() == before)


@needs_root
async def test_dead_addresses_do_not_keep_engines_from_being_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred connections that never come about are more than the dialer serves at once."""
    monkeypatch.setattr("mycoswarmd.outposts.dialing.MAX_WITHIN_MS", 600_000)
    with network("landead") as there, ExitStack() as stack:
        ip("-n", there, "link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
        ip("-n", there, "addr", "add", "10.77.0.2/24", "dev", "lan0")
        for name in ("lan0", "lan1"):
            ip("-n", there, "link", "set", name, "up")
        # A machine that was here and is off: nobody says that it is away.
        ip("-n", there, "neigh", "add", "10.77.0.1", "lladdr", "02:00:00:00:00:01", "dev", "lan0")
        server = inside(there, lambda: stack.enter_context(socket.create_server(("127.0.0.1", 0))))
        lan = LanDialer(stack.enter_context(lan_dialer(tmp_path, namespace=there, program=PATIENT)).path)
        await lan.prove()
        async with asyncio.TaskGroup() as group:
            stuck = [group.create_task(lan.connect("10.77.0.1", 7437, 600)) for _ in range(100)]
            await asyncio.sleep(0.2)
            for _ in range(8):
                (await lan.connect("127.0.0.1", server.getsockname()[1], 60)).close()
            assert not any(one.done() for one in stuck)
            for one in stuck:
                one.cancel()


async def test_killed_in_the_middle_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mycoswarmd.outposts.dialing.MAX_WITHIN_MS", 600_000)
    with (
        lan_dialer(tmp_path, program=PATIENT) as dialer,
        deaf() as port,
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        lan = LanDialer(dialer.path)
        await lan.prove()
        before = dialer.idle_files()
        own = open_here()
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(errno_of(lan.connect("127.0.0.1", port, 600)))
            while dialer.open_files() != before + 2:
                await asyncio.sleep(0.002)
            dialer.kill()
        assert waiting.result() == errno.EPROTO
        assert open_here() == own
        # Its socket is still there, as systemd keeps it: who asks meanwhile waits for the next one.
        async with asyncio.TaskGroup() as group:
            meanwhile = group.create_task(lan.connect("127.0.0.1", server.getsockname()[1], 60))
            await asyncio.sleep(0)
            dialer.start()
            (await meanwhile).close()


async def test_without_a_socket_there_is_no_network(tmp_path: Path) -> None:
    lan = LanDialer(tmp_path / "none.sock")
    assert await errno_of(lan.connect("127.0.0.1", 7437, 60)) == errno.ENETDOWN


# --- as a unit -----------------------------------------------------------------------------------


def test_systemd_passes_its_socket_and_hears_that_it_is_ready(tmp_path: Path) -> None:
    path, notify = tmp_path / "lan.sock", tmp_path / "notify.sock"
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        listener.bind(str(path))
        listener.listen()
        manager.bind(str(notify))
        manager.settimeout(60)
        script = 'export LISTEN_PID=$$; exec "$0" "$@" 3<&0'
        run = [sys.executable, "-I", "-m", "mycoswarmd.outposts.lan", "--user", str(os.getuid())]
        with subprocess.Popen(
            ["sh", "-c", script, *run],
            stdin=listener.fileno(),
            env={"LISTEN_FDS": "1", "NOTIFY_SOCKET": str(notify), "WATCHDOG_USEC": "100000"},
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                assert manager.recv(4096).startswith(b"READY=1\nSTATUS=serving; ")
                assert said(path, PROVE)["ok"] is True
                # In a unit, the node's settings count, and there are none here.
                assert said(path, connect("127.0.0.1", 11434))["code"] == "denied"
                assert manager.recv(4096) == manager.recv(4096) == b"WATCHDOG=1"
            finally:
                process.kill()


def test_without_a_listening_socket_it_does_not_start(tmp_path: Path) -> None:
    run = [sys.executable, "-I", "-m", "mycoswarmd.outposts.lan"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as wrong:
        wrong.bind(str(tmp_path / "x"))
        wrong.listen()
        for options in ([], ["--fd", "0"], ["--fd", "999"], ["--fd", str(wrong.fileno())]):
            ended = subprocess.run(
                [*run, *options], pass_fds=[wrong.fileno()], capture_output=True, stdin=subprocess.DEVNULL
            )
            assert (ended.returncode, b"no listening socket" in ended.stderr) == (2, True)
