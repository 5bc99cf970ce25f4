"""Tries what must not work: what a unit proves of its own confinement before it does anything else.

Laws:

1. Only what the kernel answers counts. The failure must be the one that confinement gives: a machine
   without the socket's file proves as much as a closed door, a process without free descriptors nothing.
2. It needs no network, sends nothing anywhere, changes nothing, and never waits.
3. It is itself no defence. Whoever took over a unit can lie in its name.

Source: systemd.exec(5), systemd.resource-control(5), proc(5), cgroups(7).
"""

import errno
import os
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from mycoswarmd.wire.proof import EXPECTED, Check, CheckName, Proof, Unit

# The filters of our units let 127.0.0.1 through and no other address of that network: it needs no route, so
# it is conclusive on a machine without a cable, where an address outside would prove nothing.
_CANARY = ("127.0.0.2", 9)
_BUSES = ("/run/dbus/system_bus_socket", "/run/systemd/private")
_RESOLVERS = ("/run/systemd/resolve/io.systemd.Resolve", "/run/nscd/socket", "/run/avahi-daemon/socket")
_ENGINES = (
    "/run/docker.sock",
    "/var/run/docker.sock",
    "/run/containerd/containerd.sock",
    "/run/podman/podman.sock",
)
# What a unit was given (BindReadOnlyPaths= and BindPaths= of its file): a socket, or a directory of them.
_GIVEN: Mapping[Unit, tuple[str, ...]] = {
    Unit.CORE: (
        "/run/mycoswarm/api.sock",
        "/run/mycoswarm-outposts/",
        "/run/mycoswarm-engine/",
        "/run/systemd/notify",
        "/run/systemd/journal/",
    ),
}
# Where no socket is looked for: what the kernel makes up, what only root writes, and what is the unit's own.
_NOT_LOOKED = frozenset({"/proc", "/sys", "/usr", "/var/lib/mycoswarm", "/var/lib/mycoswarm-engine"})
# A unit sees some thousand files; whoever sees more sees the machine.
_MOST_FILES = 20_000
_STATUS = Path("/proc/self/status")
_CGROUP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")
# Addresses in a process with none of the families are refused in one of these ways.
_NO_FAMILY = frozenset({errno.EAFNOSUPPORT, errno.EPERM, errno.EACCES})
_SHUT = frozenset(
    {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR, errno.EAFNOSUPPORT}
)
_INET = ("AF_INET", "AF_INET6")
_OTHERS = ("AF_NETLINK", "AF_PACKET", "AF_VSOCK", "AF_ALG")
# Discovery hears from the kernel by netlink that a cable was plugged in.
_NEEDS_NETLINK = frozenset({Unit.DISCOVERY})
_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
# The first version of control groups says "no bound" with a number near this.
_UNBOUNDED_BYTES = 1 << 60


def prove(unit: Unit, *, given: Iterable[str] = ()) -> Proof:
    """Try everything that this unit must not be able to do; `given` are sockets that settings declare."""
    checks = {**_CHECKS, CheckName.DOORS: _doors_in_sight(tuple(given))}
    return Proof(unit, tuple(checks[name](unit) for name in EXPECTED[unit]))


def _inet_socket(_unit: Unit) -> Check:
    return _families(CheckName.INET_SOCKET, _INET)


def _address_families(unit: Unit) -> Check:
    tried = _OTHERS[1:] if unit in _NEEDS_NETLINK else _OTHERS
    return _families(CheckName.ADDRESS_FAMILIES, tried)


def _families(name: CheckName, families: Iterable[str]) -> Check:
    """Try to make a socket of each family."""
    said = []
    for family in families:
        for kind in _kinds(family):
            try:
                socket.socket(getattr(socket, family), kind).close()
            except OSError as exc:
                if exc.errno not in _NO_FAMILY:
                    return Check(name, None, f"{family}: {_said(exc)}")
                said.append(_said(exc))
            else:
                return Check(name, ok=False, detail=f"{family}: a socket was made")
    return Check(name, ok=True, detail=" ".join(dict.fromkeys(said)))


def _kinds(family: str) -> tuple[socket.SocketKind, ...]:
    if family in _INET:
        return socket.SOCK_STREAM, socket.SOCK_DGRAM
    if family == "AF_ALG":
        return (socket.SOCK_SEQPACKET,)
    return (socket.SOCK_STREAM,) if family == "AF_VSOCK" else (socket.SOCK_RAW,)


def _canary(_unit: Unit) -> Check:
    name = CheckName.CANARY
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as canary:
            canary.settimeout(0)
            try:
                canary.sendto(b"canary", _CANARY)
            except PermissionError as exc:
                return Check(name, exc.errno == errno.EPERM, f"{_CANARY[0]}: {_said(exc)}")
    except OSError as exc:
        return Check(name, None, _said(exc))
    return Check(name, ok=False, detail=f"a packet went to {_CANARY[0]}: IP filters do nothing here")


def _doors(name: CheckName, paths: Iterable[str]) -> Callable[[Unit], Check]:
    def check(_unit: Unit) -> Check:
        said = []
        for path in paths:
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
                    door.settimeout(0)
                    door.connect(path)
            except BlockingIOError:
                return Check(name, ok=False, detail=f"{path} can be reached")
            except OSError as exc:
                # Of another kind, such as a socket for datagrams: it would have taken us.
                if exc.errno not in _SHUT:
                    return Check(
                        name, False if exc.errno == errno.EPROTOTYPE else None, f"{path}: {_said(exc)}"
                    )
                said.append(_said(exc))
            else:
                return Check(name, ok=False, detail=f"{path} can be reached")
        return Check(name, ok=True, detail=" ".join(dict.fromkeys(said)))

    return check


def _doors_in_sight(given: tuple[str, ...]) -> Callable[[Unit], Check]:
    """Look for sockets: a path that is not there leads to nobody, whatever its owner allows."""

    def check(unit: Unit) -> Check:
        name, known, count = CheckName.DOORS, (*_GIVEN.get(unit, ()), *given), 0
        if not os.statvfs("/").f_flag & os.ST_RDONLY:
            return Check(name, ok=False, detail="the whole machine is in sight")
        try:
            for seen, path in enumerate(_walk("/")):
                if seen > _MOST_FILES:
                    return Check(name, None, f"more than {_MOST_FILES} files are in sight")
                # Not by what its directory says: that is of the file on which a socket was mounted.
                if not stat.S_ISSOCK(_mode(path)):
                    continue
                if not any(path.startswith(one) if one.endswith("/") else path == one for one in known):
                    return Check(name, ok=False, detail=f"{path} is in sight")
                count += 1
        except OSError as exc:
            return Check(name, None, f"{exc.filename}: {_said(exc)}")
        return Check(name, ok=True, detail=f"{count} in sight, all given" if count else "none in sight")

    return check


def _mode(path: str) -> int:
    try:
        return os.lstat(path).st_mode
    except FileNotFoundError:  # it was there a moment ago
        return 0


def _walk(top: str) -> Iterator[str]:
    """Yield the paths of all that can be seen below a directory."""

    def cannot(exc: OSError) -> None:
        # Who may not enter a directory reaches nothing there; who may, without a list of it, could.
        if exc.errno != errno.ENOENT and (exc.errno != errno.EACCES or os.access(exc.filename, os.X_OK)):
            raise exc

    for directory, below, files in os.walk(top, onerror=cannot):
        below[:] = [one for one in below if f"{directory.rstrip('/')}/{one}" not in _NOT_LOOKED]
        for one in (*below, *files):
            yield f"{directory.rstrip('/')}/{one}"


def _status() -> Mapping[str, str]:
    """Return what the kernel tells of this process, or nothing."""
    try:
        text = _STATUS.read_text("ascii", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {key: value.strip() for key, _, value in pairs}


def _stated(name: CheckName, key: str, wanted: str) -> Callable[[Unit], Check]:
    def check(_unit: Unit) -> Check:
        found = _status().get(key)
        return (
            Check(name, None, f"{key} is not told")
            if found is None
            else Check(name, found == wanted, f"{key} {found}")
        )

    return check


def _capabilities(_unit: Unit) -> Check:
    name, status = CheckName.CAPABILITIES, _status()
    if not status.keys() >= set(_SETS):
        return Check(name, None, "they are not told")
    held = [key for key in _SETS if int(status[key], 16)]
    return Check(name, not held, ", ".join(f"{key} {status[key]}" for key in held) or "none, nor to be had")


def _memory(_unit: Unit) -> Check:
    name = CheckName.MEMORY
    try:
        bound = _bound()
    except (OSError, ValueError):
        bound = None
    if bound is None:
        return Check(name, None, "absent: this kernel bounds no memory of groups")
    is_finite = bound.isdigit() and int(bound) < _UNBOUNDED_BYTES
    return Check(name, is_finite, f"{int(bound) >> 20} MiB" if is_finite else "no bound")


def _bound() -> str | None:
    """Return the memory bound of the own control group, in either version of those, where there is one."""
    for line in _CGROUP.read_text("utf-8", errors="replace").splitlines():
        number, controllers, path = line.split(":", 2)
        file = None
        if number == "0":
            file = _CGROUPS / path.lstrip("/") / "memory.max"
        elif "memory" in controllers.split(","):
            file = _CGROUPS / "memory" / path.lstrip("/") / "memory.limit_in_bytes"
        with suppress(FileNotFoundError):
            if file is not None:
                return file.read_text("ascii").strip()
    return None


def _said(exc: OSError) -> str:
    return errno.errorcode.get(exc.errno or 0, type(exc).__name__)


_CHECKS: Mapping[CheckName, Callable[[Unit], Check]] = {
    CheckName.INET_SOCKET: _inet_socket,
    CheckName.CANARY: _canary,
    CheckName.ADDRESS_FAMILIES: _address_families,
    CheckName.DBUS: _doors(CheckName.DBUS, _BUSES),
    CheckName.RESOLVER: _doors(CheckName.RESOLVER, _RESOLVERS),
    CheckName.DOCKER: _doors(CheckName.DOCKER, _ENGINES),
    CheckName.NO_NEW_PRIVILEGES: _stated(CheckName.NO_NEW_PRIVILEGES, "NoNewPrivs", "1"),
    CheckName.SECCOMP: _stated(CheckName.SECCOMP, "Seccomp", "2"),
    CheckName.CAPABILITIES: _capabilities,
    CheckName.MEMORY: _memory,
}
