"""Who is on the other side of a connection, as the kernel says: the parts that need no systemd."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mycoswarmd.core.types import CageSpec, Limits
from mycoswarmd.errors import CageError
from mycoswarmd.sandbox.seccomp import build_filter
from mycoswarmd.sandbox.systemdcage import (
    Peer,
    SystemdCages,
    group_root,
    is_bounded,
    is_populated,
    own_group,
    read_sender,
)

SPEC = CageSpec(
    task_id="t", attempt=1, read_paths=(".",), write_paths=(".",), programs=(), limits=Limits(wall_s=5)
)
UNIT = "mycoswarm-task"
NAME = "/system.slice/system-mycoswarm\\x2dtask.slice/mycoswarm-task@3-1234-0.service"


@pytest.fixture
def groups(tmp_path: Path) -> Path:
    """A cgroup2 tree in which process 42 is in a cage."""
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    group = tmp_path / NAME.lstrip("/")
    group.mkdir(parents=True)
    (group / "cgroup.procs").write_text("41\n42\n")
    return tmp_path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[socket.socket]:
    """A socket that this process listens on, and not PID 1."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "task.sock"))
        listening.listen()
        yield listening


def test_a_process_is_in_the_unit_that_it_names(groups: Path) -> None:
    assert own_group(groups, NAME, unit=UNIT, pid=42) == groups / NAME.lstrip("/")


@pytest.mark.parametrize(
    ("name", "pid"),
    [
        (NAME, 4),
        (NAME, 421),
        (None, 42),
        (["x"], 42),
        ("/", 42),
        ("/system.slice/ssh.service", 42),
        (f"{NAME}/..", 42),
        (f"/system.slice/../{NAME.lstrip('/')}", 43),
        (NAME.replace("task@", "other@"), 42),
        (f"{NAME}/deeper", 42),
        ("/mycoswarm-task@1.service", 42),
    ],
)
def test_a_process_elsewhere_is_no_cage(groups: Path, name: object, pid: int) -> None:
    with pytest.raises(CageError) as refusal:
        own_group(groups, name, unit=UNIT, pid=pid)
    assert refusal.value.code == "cage-unproved"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1073741824\n", True),
        ("100000 100000\n", True),
        ("0\n", True),
        ("max\n", False),
        ("max 100000\n", False),
        ("", False),
    ],
)
def test_a_bound_is_a_number(tmp_path: Path, text: str, expected: bool) -> None:
    (tmp_path / "limit").write_text(text)
    assert is_bounded(tmp_path / "limit") is expected
    assert not is_bounded(tmp_path / "missing")


def test_a_group_that_is_gone_is_empty(tmp_path: Path) -> None:
    (tmp_path / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    assert is_populated(tmp_path)
    (tmp_path / "cgroup.events").write_text("populated 0\nfrozen 0\n")
    assert not is_populated(tmp_path)
    assert not is_populated(tmp_path / "missing")


def test_cgroup2_is_found_beside_the_older_ones(tmp_path: Path) -> None:
    alone, beside = tmp_path, tmp_path / "unified"
    beside.mkdir()
    assert group_root((alone, beside)) is None
    (beside / "cgroup.controllers").write_text("")
    assert group_root((alone, beside)) == beside
    (alone / "cgroup.controllers").write_text("")
    assert group_root((alone, beside)) == alone


def test_the_kernel_says_who_has_sent_something_and_leaves_it_there() -> None:
    near, far = socket.socketpair()
    with near, far:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        far.send(b"hello")
        assert read_sender(near) == Peer(os.getpid(), os.geteuid(), os.getegid())
        assert near.recv(16) == b"hello"
        far.close()
        with pytest.raises(CageError, match="ended before it said anything"):
            read_sender(near)


async def test_whoever_is_not_systemd_is_told_nothing(server: socket.socket) -> None:
    with pytest.raises(CageError, match="systemd does not listen there") as refusal:
        await SystemdCages(Path(server.getsockname())).open(SPEC)
    assert refusal.value.code == "cage-setup"
    with server.accept()[0] as connection:
        assert connection.recv(1) == b""


async def test_a_unit_that_ends_at_once_is_no_cage(server: socket.socket) -> None:
    me = Peer(os.getpid(), os.geteuid(), os.getegid())
    cages = SystemdCages(Path(server.getsockname()), listener=me)
    server.listen()
    near = await cages._connect()
    near.close()
    server.accept()[0].close()
    server.close()
    with pytest.raises(CageError, match="cannot reach systemd") as refusal:
        await cages.open(SPEC)
    assert refusal.value.code == "cage-setup"
    assert refusal.value.hint


@pytest.mark.parametrize(
    ("says", "until_s", "is_used"),
    [(b"", float("inf"), True), (b"x", float("inf"), False), (b"", 0.0, False)],
    ids=["silent", "speaks", "old"],
)
async def test_a_spare_that_speaks_unasked_or_is_old_is_not_used(
    server: socket.socket, says: bytes, until_s: float, is_used: bool
) -> None:
    me = Peer(os.getpid(), os.geteuid(), os.getegid())
    cages = SystemdCages(Path(server.getsockname()), listener=me)
    cages._spare, cages._spare_until_s = await cages._connect(), until_s
    with server.accept()[0] as unit:
        unit.send(says)
        taken = cages._take_spare()
        assert (taken is not None) is is_used
        assert cages._take_spare() is None
        if taken is not None:
            taken.close()
        with pytest.raises(OSError, match="Broken pipe"):
            unit.send(b"x")  # whoever is on the other side, nobody talks to it any more


def test_without_a_socket_there_are_no_cages(tmp_path: Path) -> None:
    assert SystemdCages(tmp_path / "none.sock").level == "none"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_filter_may_keep_its_watcher_from_being_stopped(machine: str) -> None:
    assert build_filter(machine, may_stop=False) != build_filter(machine)
