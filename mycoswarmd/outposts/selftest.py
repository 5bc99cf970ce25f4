"""Tries what must not work: what a unit proves of its own confinement before it does anything else.

Laws:

1. Only what the kernel answers counts. The failure must be the one that confinement gives: a machine
   without the socket's file proves as much as a closed door, a process without free descriptors nothing.
2. It needs no network, changes nothing, never waits, and sends nothing that a filter of ours lets through;
   what another one lets through goes to addresses that nobody has.
3. It is itself no defence. Whoever took over a unit can lie in its name.

Source: systemd.exec(5), systemd.resource-control(5), proc(5), cgroups(7), user_namespaces(7); RFC 5737,
RFC 3849, RFC 3927 (2.1) and RFC 1122 (3.2.1.3) for addresses that nobody has; for what a call says before it
asks who calls, the kernel's fs/namespace.c, kernel/ptrace.c, kernel/fork.c, kernel/sched, fs/open.c.
"""

import ctypes
import errno
import mmap
import os
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from functools import partial
from pathlib import Path

from mycoswarmd.wire.proof import EXPECTED, Check, CheckName, Proof, Unit

# The filters of our units let 127.0.0.1 through and no other address of that network: it needs no route, so
# it is conclusive on a machine without a cable, where an address outside would prove nothing.
_CANARY = "127.0.0.2"
# With that, one in each quarter of all addresses: bound to the loopback interface they need no route, and
# reach nobody where no filter stops them.
_OUTSIDE = ("0.0.0.1", "169.254.0.1", "192.0.2.1", "198.51.100.1", "203.0.113.1")
_OUTSIDE6 = "2001:db8::1"
_DISCARD = 9
_BUSES = ("/run/dbus/system_bus_socket", "/run/systemd/private")
_RESOLVERS = ("/run/systemd/resolve/io.systemd.Resolve", "/run/nscd/socket", "/run/avahi-daemon/socket")
_ENGINES = (
    "/run/docker.sock",
    "/var/run/docker.sock",
    "/run/containerd/containerd.sock",
    "/run/podman/podman.sock",
)
# What mycoswarm-security(7) says how to give the core: names of users that are in no file.
_SSSD = "/var/lib/sss/pipes/"
# What a unit was given (BindReadOnlyPaths= and BindPaths= of its file): a socket, or a directory of them.
_GIVEN: Mapping[Unit, tuple[str, ...]] = {
    Unit.CORE: (
        "/run/mycoswarm/api.sock",
        "/run/mycoswarm-outposts/",
        "/run/mycoswarm-engine/",
        "/run/systemd/notify",
        "/run/systemd/journal/",
        _SSSD,
    ),
}
# Where no socket is looked for: what the kernel makes up, what only root writes, and what is the unit's own.
_NOT_LOOKED = frozenset({"/proc", "/sys", "/usr", "/var/lib/mycoswarm", "/var/lib/mycoswarm-engine"})
# Every unit sees it whole, and what people keep there is theirs: trees of any size, closed directories.
_ETC = "/etc/"
# Beside that a unit sees some thousand files; whoever sees more sees the machine.
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


_PASSWD, _GROUP = Path("/etc/passwd"), Path("/etc/group")
# A user that exists as long as its unit, of systemd's range for those.
_DYNAMIC = range(61184, 65520)
# A group that is not in the unit's user namespace has no other number there.
_HIDDEN = 65534
_VIDEO = frozenset({"video", "render"})
# Each unit's user, its group, and the groups that it may be in beside that; "" is one of its own.
_WHO: Mapping[Unit, tuple[str, str, frozenset[str]]] = {
    Unit.CORE: ("_mycoswarm", "_mycoswarm", frozenset({"_mycoswarm-engine"})),
    Unit.LAN: ("_mycoswarm-lan", "_mycoswarm-lan", frozenset()),
    Unit.DISCOVERY: ("_mycoswarm-mdns", "_mycoswarm-mdns", frozenset()),
    Unit.SIGNER: ("_mycoswarm-signer", "_mycoswarm-signer", frozenset()),
    # Beside video one group of the machine's choice: cards may belong to another, which has no name there.
    Unit.PROBE: ("_mycoswarm-probe", "_mycoswarm-probe", _VIDEO),
    Unit.ENGINE: ("", "_mycoswarm-engine", _VIDEO),
    Unit.TASK: ("", "", frozenset()),
}
_NEWUSER, _PTRACE_CONT, _SETUID_BIT = 0x10000000, 7, 0o4000
_IO_URING = {"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427}


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
    said = _packet(_CANARY)
    if said != "EPERM":
        known = said in {"", "EACCES"}  # that is what a route says
        said = said or "a packet was sent: IP filters do nothing here"
        return Check(name, False if known else None, f"{_CANARY}: {said}")
    tried = {one: _packet(one) for one in (*_OUTSIDE, _OUTSIDE6)}
    sent = [one for one, found in tried.items() if not found]
    refused = [one for one, found in tried.items() if found == "EPERM"]
    if sent:
        return Check(name, ok=False, detail=f"a packet was sent to {sent[0]}: the IP filter is too wide")
    unknown = "".join(f"; {one}: {found}" for one, found in tried.items() if found != "EPERM")
    return Check(name, ok=True, detail=f"EPERM: {' '.join([_CANARY, *refused])}{unknown}")


def _packet(address: str) -> str:
    """Send a packet and return what the kernel says; "" when it was sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as canary:
            canary.settimeout(0)
            if address in _OUTSIDE:
                with suppress(OSError):  # since Linux 5.7 it needs no privilege
                    canary.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
            canary.sendto(b"canary", (address, _DISCARD))
    except OSError as exc:
        return _said(exc)
    return ""


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
        name, known = CheckName.DOORS, (*_GIVEN.get(unit, ()), *given)
        # What is in there is others' to say, and however much that is.
        whole = _NOT_LOOKED | {one.rstrip("/") for one in known if one.endswith("/")}
        count, beside, unlisted = 0, 0, list[str]()
        if not os.statvfs("/").f_flag & os.ST_RDONLY:
            return Check(name, ok=False, detail="the whole machine is in sight")
        try:
            for path in _walk("/", but=whole, unlisted=unlisted):
                beside += not path.startswith(_ETC)
                if beside > _MOST_FILES:
                    return Check(name, None, f"more than {_MOST_FILES} files are in sight")
                # Not by what its directory says: that is of the file on which a socket was mounted.
                if not stat.S_ISSOCK(_mode(path)):
                    continue
                if path not in known:
                    return Check(name, ok=False, detail=f"{path} is in sight")
                count += 1
        except OSError as exc:
            return Check(name, None, f"{exc.filename}: {_said(exc)}")
        said = [f"{count} in sight, all given" if count else "none in sight"]
        if _SSSD in known and _holds_something(_SSSD):
            said.append("sssd's beside")
        if unlisted:
            said.append(f"not looked into, of {_ETC}: {len(unlisted)}, such as {unlisted[0]}")
        return Check(name, ok=True, detail="; ".join(said))

    return check


def _holds_something(directory: str) -> bool:
    """Tell whether a directory is more than the place for a mount that was there before."""
    try:
        return any(Path(directory).iterdir())
    except PermissionError:
        return True
    except OSError:
        return False


def _mode(path: str) -> int:
    try:
        return os.lstat(path).st_mode
    except (FileNotFoundError, PermissionError):  # gone since, or in a directory that can only be listed
        return 0


def _walk(top: str, *, but: AbstractSet[str], unlisted: list[str]) -> Iterator[str]:
    """Yield the paths of all that can be seen below a directory, but for what is in these.

    `unlisted` gets the directories of /etc that can be entered without a list of what is there.
    """

    def cannot(exc: OSError) -> None:
        # Who may not enter a directory reaches nothing there; who may, without a list of it, could.
        if exc.errno == errno.ENOENT or (exc.errno == errno.EACCES and not os.access(exc.filename, os.X_OK)):
            return
        if exc.errno != errno.EACCES or not exc.filename.startswith(_ETC):
            raise exc
        unlisted.append(exc.filename)

    for directory, below, files in os.walk(top, onerror=cannot):
        below[:] = [one for one in below if f"{directory.rstrip('/')}/{one}" not in but]
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


def _user(unit: Unit) -> Check:
    """Say who this is, by numbers that the kernel gives and the machine's own lists of names."""
    name = CheckName.USER
    try:
        users, groups = _numbered(_PASSWD), _numbered(_GROUP)
    except OSError as exc:
        return Check(name, None, f"{exc.filename}: {_said(exc)}")
    (uid, *other_uids), (gid, *other_gids) = os.getresuid(), os.getresgid()
    user, group = users.get(uid, ""), groups.get(gid, "")
    wanted_user, wanted_group, may = _WHO[unit]
    others = sorted(set(os.getgroups()) - {gid, _HIDDEN})
    hidden = os.getgroups().count(_HIDDEN)
    foreign = [groups.get(one, str(one)) for one in others if groups.get(one) not in may]
    is_user = user == wanted_user and (uid in _DYNAMIC if not wanted_user else uid != 0)
    is_group = group == wanted_group and (gid == uid if not wanted_group else gid != 0)
    if {*other_uids} != {uid} or {*other_gids} != {gid}:
        return Check(name, ok=False, detail="can become another user or group")
    if not (is_user and is_group):
        return Check(name, ok=False, detail=f"{user or uid}:{group or gid}")
    if foreign or hidden > len(may):
        said = " ".join(foreign) or f"{hidden} that are not in sight"
        return Check(name, ok=False, detail=f"{user or uid}, in other groups: {said}")
    beside = f", other groups, not in sight: {hidden}" if hidden else ""
    return Check(name, ok=True, detail=f"{user or uid}:{group or gid}{beside}")


def _numbered(path: Path) -> Mapping[int, str]:
    """Return the names in a list of users or groups, by number; without asking any service for them."""
    rows = (line.split(":") for line in path.read_text("utf-8", errors="replace").splitlines())
    return {int(row[2]): row[0] for row in rows if len(row) > 2 and row[2].isdecimal()}


def _calls(unit: Unit) -> Check:
    """Make calls that ask who calls only after they have found fault with what they were given."""
    name = CheckName.CALLS
    libc = ctypes.CDLL(None, use_errno=True)
    tried: dict[str, Callable[[], int]] = {
        "mount": lambda: libc.mount(None, None, None, ctypes.c_ulong(0), None),
        "umount2": lambda: libc.umount2(None, 0),
        "chroot": lambda: libc.chroot(None),
        "ptrace": lambda: libc.ptrace(_PTRACE_CONT, 0, None, None),
        "sched_setparam": lambda: libc.sched_setparam(0, None),
        "unshare": lambda: libc.unshare(_NEWUSER | 1),
        "fchmod": lambda: libc.fchmod(-1, _SETUID_BIT),
        **{one: partial(_io_uring, libc, number) for one, number in _IO_URING.items()},
    }
    for call, make in tried.items():
        ctypes.set_errno(0)
        made, found = make(), ctypes.get_errno()
        # A kernel without rings has nothing to refuse.
        is_refused = made == -1 and (found == errno.EPERM or (call in _IO_URING and found == errno.ENOSYS))
        if not is_refused:
            detail = f"{call} is not refused: {errno.errorcode.get(found, str(made))}"
            return Check(name, ok=False, detail=detail)
    # A driver of cards compiles code into memory that was written.
    if unit is not Unit.ENGINE:
        try:
            mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()
        except OSError as exc:
            if exc.errno not in {errno.EPERM, errno.EACCES}:
                return Check(name, None, f"mmap: {_said(exc)}")
        else:
            return Check(name, ok=False, detail="mmap of memory to write and to execute is not refused")
    return Check(name, ok=True, detail=f"{len(tried)} refused")


def _io_uring(libc: ctypes.CDLL, number: int) -> int:
    # A descriptor that nobody has, or for the first a size; and no memory.
    first = 1 if number == _IO_URING["io_uring_setup"] else -1
    return int(libc.syscall(ctypes.c_long(number), ctypes.c_long(first), *[ctypes.c_long(0)] * 5))


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
    CheckName.USER: _user,
    CheckName.CALLS: _calls,
    CheckName.MEMORY: _memory,
}
