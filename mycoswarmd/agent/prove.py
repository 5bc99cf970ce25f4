"""Tries to break out of the cage, before there is anything to steal: a table of probes.

A probe returns None when it held, otherwise what it got instead. Facts (flags of mounts, identities of
namespaces) are asked of the kernel where an attempt would be slow or would prove less. The node names the
probes it demands; one that is not in the table counts as broken.

Source: the project's threat model, and the failures listed there by CVE.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import signal
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mycoswarmd.agent.confine import (
    CAPABILITY_HEADER,
    LIBC,
    SECUREBITS,
    call,
    prctl,
    system_call,
)
from mycoswarmd.errors import CageError

PR_GET_PDEATHSIG, PR_GET_SECCOMP, PR_CAPBSET_READ, PR_GET_SECUREBITS, PR_GET_NO_NEW_PRIVS = 2, 21, 23, 27, 39
CLONE_NEWUSER = 0x10000000
TIOCSTI = 0x5412
X32_GETPID = 0x40000000 + 39
# Address families run to 45 (AF_MCTP) today; a few more for the next kernels.
FAMILIES = range(1, 50)
NOTHING = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
REFUSED = (errno.EACCES, errno.EPERM)
# The filter answers EPERM to what it knows as dangerous and ENOSYS to what it does not know.
NO_CALL = (errno.EPERM, errno.ENOSYS)
SCRATCH = "/tmp/.mycoswarm-probe"  # noqa: S108  (the cage's own)

Expect = Mapping[str, object]
Probe = Callable[[Expect], str | None]


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found before the agent confined itself."""

    held: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    group: str = ""


def survey(body: Mapping[str, object]) -> Survey:
    """Run the probes that a CONFINE frame demands of the cage's maker alone, as `unit:NAME`."""
    demanded = body.get("before")
    if demanded is None:
        return Survey()
    expect = body["expect"]
    assert isinstance(demanded, list)
    assert isinstance(expect, dict)
    held: list[str] = []
    broken: list[str] = []
    for name in demanded:
        found = _run_one(name, expect)
        if found is None:
            held.append(f"unit:{name}")
        else:
            broken.append(f"unit:{name}: {found}")
    return Survey(tuple(held), tuple(broken), _own_group())


def run(body: Mapping[str, object], before: Survey | None = None) -> dict[str, object]:
    """Run the probes that a CONFINE frame demands and return the body of the PROOF frame.

    A probe that is only wanted is not broken when it does not hold: the node counts it as absent.
    """
    before = before or Survey()
    demanded, wanted, expect = body["probes"], body.get("wanted", []), body["expect"]
    assert isinstance(demanded, list)
    assert isinstance(wanted, list)
    assert isinstance(expect, dict)
    held, broken = [*before.held], [*before.broken]
    for name in demanded:
        found = _run_one(name, expect)
        if found is None:
            held.append(name)
        else:
            broken.append(f"{name}: {found}")
    held += [name for name in wanted if _run_one(name, expect) is None]
    proof = {"held": held, "broken": broken, "absent": body["absent"], "level": body["level"]}
    return {**proof, "group": before.group} if before.group else proof


def _own_group() -> str:
    """Return the own control group as cgroup2 names it, or "" on a machine that has none."""
    with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as lines:
        return next((line[3:].rstrip("\n") for line in lines if line.startswith("0::")), "")


def _run_one(name: str, expect: Expect) -> str | None:
    kind, _, argument = name.partition("=")
    if kind not in PROBES and (kind, argument) == (name, ""):
        return "there is no such probe"
    try:
        if argument:
            return FAMILIES_OF_PROBES[kind](expect, argument)
        return PROBES[kind](expect)
    except (OSError, ValueError, KeyError, CageError) as exc:
        return f"could not be tried: {exc}"


def _fails(attempt: Callable[[], object], errnos: tuple[int, ...]) -> str | None:
    """Hold when the attempt fails with one of these errors."""
    try:
        attempt()
    except OSError as exc:
        if exc.errno in errnos:
            return None
        return f"failed with {errno.errorcode.get(exc.errno or 0, exc.errno)}"
    return "succeeded"


def _opens(path: str, flags: int = os.O_RDONLY) -> Callable[[], None]:
    return lambda: os.close(os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600))


def _is(condition: object, otherwise: str) -> str | None:
    return None if condition else otherwise


def _namespace(expect: Expect, kind: str) -> str | None:
    hosts = expect["namespaces"]
    assert isinstance(hosts, dict)
    return _is(os.readlink(f"/proc/self/ns/{kind}") != hosts[kind], "is the machine's")


def _mount(expect: Expect, path: str) -> str | None:
    flags = expect["mounts"]
    assert isinstance(flags, dict)
    found = os.statvfs(path).f_flag
    missing = [name for name in flags[path] if not found & MOUNT_FACTS[name]]
    return _is(not missing, f"lacks {' '.join(missing)}")


MOUNT_FACTS = {"ro": os.ST_RDONLY, "nosuid": os.ST_NOSUID, "nodev": os.ST_NODEV, "noexec": os.ST_NOEXEC}


def _size(expect: Expect, path: str) -> str | None:
    sizes, files = expect["sizes"], expect["files"]
    assert isinstance(sizes, dict)
    assert isinstance(files, dict)
    found = os.statvfs(path)
    # The kernel rounds up to pages, of which a block is one: 4 KiB here, 16 KiB on a Pi 5, 64 KiB elsewhere.
    is_small = 0 < found.f_blocks * found.f_frsize < sizes[path] + found.f_frsize
    return _is(is_small and 0 < found.f_files <= files[path], "has no bound")


def _disk_quota(expect: Expect) -> str | None:
    quotas = expect["quotas"]
    assert isinstance(quotas, dict)
    large = []
    for path, size in quotas.items():
        found = os.statvfs(path)
        if found.f_blocks * found.f_frsize >= size + found.f_frsize:
            large.append(path)
    return _is(not large, f"is larger in {large}")


def _rlimit(expect: Expect, name: str) -> str | None:
    limits = expect["rlimits"]
    assert isinstance(limits, dict)
    soft, hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
    return _is(soft == hard and 0 <= hard <= limits[name], f"is {soft, hard}")


def _unit_rlimit(expect: Expect, name: str) -> str | None:
    limits = expect["unit_rlimits"]
    assert isinstance(limits, dict)
    hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1]
    return _is(0 <= hard <= limits[name], f"is {hard}")


def _call(expect: Expect, name: str) -> str | None:
    numbers = expect["calls"]
    assert isinstance(numbers, dict)
    wrong = ctypes.c_long(-1)
    return _fails(lambda: system_call(numbers[name], wrong, wrong, wrong, wrong, wrong, wrong), NO_CALL)


def _reach(_: Expect, path: str) -> str | None:
    """Hold where a server's socket can neither be seen nor connected to."""
    if os.path.lexists(path):
        return "is in sight"
    return _fails(lambda: _connect(path), (errno.EAFNOSUPPORT, errno.EPERM))


def _connect(path: str) -> None:
    fd = call("socket", 1, 1, 0)
    os.close(fd)
    raise OSError(errno.EISCONN, f"a socket could be made for {path}")


def _path(_: Expect, path: str) -> str | None:
    return _fails(_opens(path), NOTHING)


def _write(_: Expect, path: str) -> str | None:
    return _fails(_opens(path, os.O_WRONLY | os.O_CREAT), NOTHING)


def _maps_code(_: Expect, directory: str) -> str | None:
    """Map a file of ours as code: what `ld.so ./file` does, and what an execute rule alone lets pass."""
    path = f"{directory}/.mycoswarm-probe"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o700)
    try:
        os.write(fd, b"\x7fELF" + bytes(4092))
        protection = mmap.PROT_READ | mmap.PROT_EXEC
        return _fails(lambda: mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, protection).close(), (errno.EPERM,))
    finally:
        os.close(fd)
        os.unlink(path)


def _identity(expect: Expect) -> str | None:
    ids = {*os.getresuid(), *os.getresgid()}
    return _is(ids == {expect["uid"], expect["gid"]} - {0}, f"is {sorted(ids)}")


def _environment(expect: Expect) -> str | None:
    allowed = expect["environment"]
    assert isinstance(allowed, dict)
    extra = [name for name, value in os.environ.items() if allowed.get(name) != value]
    return _is(not extra, f"holds {' '.join(sorted(extra))}")


def _descriptors(expect: Expect) -> str | None:
    extra = []
    allowed = expect.get("descriptors", 4)
    assert isinstance(allowed, int)
    for fd in range(allowed, resource.getrlimit(resource.RLIMIT_NOFILE)[0]):
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_GETFD)
            extra.append(fd)
    return _is(not extra, f"finds {extra}")


def _capabilities(_: Expect) -> str | None:
    sets = (ctypes.c_uint32 * 6)()
    call("capget", CAPABILITY_HEADER, ctypes.byref(sets))
    bounding = []
    for capability in range(64):
        try:
            bounding.append(prctl(PR_CAPBSET_READ, capability))
        except OSError:
            break
    return _is(not any(sets) and not any(bounding), "some are left")


def _sockets_fail(with_errno: int) -> str | None:
    made = []
    for family in FAMILIES:
        for kind in (1, 2, 3, 5):
            fd = LIBC.socket(family, kind, 0)
            if fd >= 0 or ctypes.get_errno() != with_errno:
                made.append(family)
            if fd >= 0:
                os.close(fd)
    return _is(not made, f"has families {sorted(set(made))}")


def _child_dies_of(signal_number: int, attempt: Callable[[], object]) -> str | None:
    """Hold when the kernel kills a child for the attempt."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(OSError):
            attempt()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return _is(status == -signal_number, f"ends with {status}")


def _dynamic_identity(expect: Expect) -> str | None:
    allowed = expect["uids"]
    assert isinstance(allowed, list)
    ids = {*os.getresuid(), *os.getresgid(), *os.getgroups()}
    return _is(len(ids) == 1 and allowed[0] <= min(ids) <= allowed[1], f"is {sorted(ids)}")


def _streams(_: Expect) -> str | None:
    null = os.stat("/dev/null").st_rdev
    others = [
        fd for fd in (0, 1, 2) if not stat.S_ISCHR(os.fstat(fd).st_mode) or os.fstat(fd).st_rdev != null
    ]
    return _is(not others, f"leads elsewhere on {others}")


def _devices(expect: Expect) -> str | None:
    allowed = expect["devices"]
    assert isinstance(allowed, list)
    extra = sorted({*os.listdir("/dev")} - {*allowed})
    return _is(not extra, f"has {extra}")


def _processes(_: Expect) -> str | None:
    """Hold when nobody is seen but this process and its guard: a neighbour of the same user would be."""
    known = {str(os.getpid()), str(os.getppid())}
    others = {name for name in os.listdir("/proc") if name.isdigit()} - known
    return _is(not others, f"sees {len(others)} others")


def _no_network(_: Expect) -> str | None:
    """Hold when there is no way out even for one who had a socket: one interface, which leads back."""
    with open("/proc/self/net/dev", encoding="ascii") as lines:
        names = [line.partition(":")[0].strip() for line in lines if ":" in line]
    return _is(names == ["lo"], f"has {names}")


def _no_shared_ipc(_: Expect) -> str | None:
    """Hold when nobody's System V objects are in sight."""
    found = []
    for name, command in (("shmctl", 14), ("semctl", 19), ("msgctl", 12)):
        info = (ctypes.c_int * 64)()
        arguments = (0, 0, command, info) if name == "semctl" else (0, command, info)
        call(name, *arguments)
        # How many there are: the first field of shm_info, and of seminfo and msginfo the one reused for it.
        if info[{"shmctl": 0, "semctl": 7, "msgctl": 0}[name]]:
            found.append(name[:3])
    return _is(not found, f"sees {found}")


def _umask(expect: Expect) -> str | None:
    found = os.umask(0o077)
    os.umask(found)
    return _is(found == expect["umask"], f"is {found:03o}")


def _code_from_data(_: Expect) -> str | None:
    protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    return _fails(lambda: mmap.mmap(-1, 4096, mmap.MAP_PRIVATE, protection).close(), REFUSED)


def _stop_guard(_: Expect) -> str | None:
    # Nobody has this number: the filter must refuse before the kernel has looked.
    return _fails(lambda: os.kill(0x3FFFFFFF, signal.SIGSTOP), (errno.EPERM,))


def _clone_namespace(expect: Expect) -> str | None:
    numbers = expect["calls"]
    assert isinstance(numbers, dict)

    def attempt() -> None:
        zero = ctypes.c_long(0)
        child = system_call(
            numbers["clone"], ctypes.c_ulong(CLONE_NEWUSER | signal.SIGCHLD), zero, zero, zero, zero
        )
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)

    return _fails(attempt, (errno.EPERM,))


def _setuid_file(_: Expect) -> str | None:
    fd = os.open(SCRATCH, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        return _fails(lambda: os.fchmod(fd, 0o4755), (errno.EPERM,))
    finally:
        os.close(fd)
        os.unlink(SCRATCH)


def _terminal_input(_: Expect) -> str | None:
    # Without the filter a descriptor that is no terminal gives ENOTTY. The high half of the request must not
    # get past a filter that compares 64 bits where the kernel uses 32.
    for request in (TIOCSTI, TIOCSTI | 1 << 32):
        found = _fails(lambda: call("ioctl", 0, ctypes.c_ulong(request), b"x"), (errno.EPERM,))  # noqa: B023
        if found:
            return found
    return None


def _memory(expect: Expect) -> str | None:
    limits = expect["rlimits"]
    assert isinstance(limits, dict)
    return _fails(lambda: mmap.mmap(-1, limits["AS"] + 4096).close(), (errno.ENOMEM,))


def _forbidden_program(expect: Expect) -> str | None:
    path = expect["forbidden"]
    assert isinstance(path, str)
    # Were it permitted, this process would be gone, and with it the proof: that refuses the cage too.
    runs = _fails(lambda: os.execve(path, [path, "--version"], {}), REFUSED)  # noqa: S606
    return runs or _fails(_opens(path), REFUSED)


def _parent_death_signal() -> int:
    number = ctypes.c_int(0)
    call("prctl", PR_GET_PDEATHSIG, ctypes.byref(number), *[ctypes.c_ulong(0)] * 3)
    return number.value


def _clone3(expect: Expect) -> str | None:
    numbers = expect["calls"]
    assert isinstance(numbers, dict)
    return _fails(lambda: system_call(numbers["clone3"], None, ctypes.c_long(0)), (errno.ENOSYS,))


PROBES: dict[str, Probe] = {
    "identity": _identity,
    "environment": _environment,
    "descriptors": _descriptors,
    "capabilities": _capabilities,
    "securebits": lambda _: _is(prctl(PR_GET_SECUREBITS) == SECUREBITS, "are not locked"),
    "no-new-privileges": lambda _: _is(prctl(PR_GET_NO_NEW_PRIVS) == 1, "is not set"),
    "seccomp": lambda _: _is(prctl(PR_GET_SECCOMP) == 2, "is not in force"),
    "session": lambda _: _is(os.getsid(0) > 0, "is the starter's"),
    "dies-with-node": lambda _: _is(_parent_death_signal() == signal.SIGKILL, "would outlive it"),
    # The link is made by the file system's own pid namespace: the machine's /proc would give another number.
    "own-processes": lambda _: _is(os.readlink("/proc/self") == str(os.getpid()), "sees the machine's"),
    "sockets": lambda _: _sockets_fail(errno.EPERM),
    "address-families": lambda _: _sockets_fail(errno.EAFNOSUPPORT),
    "foreign-calls": lambda _: _child_dies_of(signal.SIGSYS, lambda: system_call(X32_GETPID)),
    "dynamic-identity": _dynamic_identity,
    "streams": _streams,
    "devices": _devices,
    "processes": _processes,
    "no-network": _no_network,
    "no-shared-ipc": _no_shared_ipc,
    "umask": _umask,
    "code-from-data": _code_from_data,
    "stop-guard": _stop_guard,
    "disk-quota": _disk_quota,
    "clone-namespace": _clone_namespace,
    "setuid-file": _setuid_file,
    "terminal-input": _terminal_input,
    "personality": lambda _: _fails(lambda: call("personality", ctypes.c_ulong(0x40000)), (errno.EPERM,)),
    "memory": _memory,
    "forbidden-program": _forbidden_program,
    "clone3": _clone3,
    "signal-outside": lambda _: _fails(lambda: os.kill(1, 0), (errno.EPERM,)),
}

# `kind=argument`, one probe for each argument.
FAMILIES_OF_PROBES: dict[str, Callable[[Expect, str], str | None]] = {
    "namespace": _namespace,
    "mount": _mount,
    "size": _size,
    "rlimit": _rlimit,
    "unit-rlimit": _unit_rlimit,
    "reach": _reach,
    "call": _call,
    "hidden": _path,
    "unwritable": _write,
    "maps-no-code": _maps_code,
}
