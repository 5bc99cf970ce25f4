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
from collections.abc import Callable, Mapping

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
# Address families run to 45 (AF_MCTP) today; a few more for the next kernels.
FAMILIES = range(1, 50)
NOTHING = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
REFUSED = (errno.EACCES, errno.EPERM)
# The filter answers EPERM to what it knows as dangerous and ENOSYS to what it does not know.
NO_CALL = (errno.EPERM, errno.ENOSYS)
SCRATCH = "/tmp/.mycoswarm-probe"  # noqa: S108  (the cage's own)

Expect = Mapping[str, object]
Probe = Callable[[Expect], str | None]


def run(body: Mapping[str, object]) -> dict[str, object]:
    """Run the probes that a CONFINE frame demands and return the body of the PROOF frame."""
    demanded, expect = body["probes"], body["expect"]
    assert isinstance(demanded, list)
    assert isinstance(expect, dict)
    held: list[str] = []
    broken: list[str] = []
    for name in demanded:
        found = _run_one(name, expect)
        if found is None:
            held.append(name)
        else:
            broken.append(f"{name}: {found}")
    return {"held": held, "broken": broken, "absent": body["absent"], "level": body["level"]}


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
    # The kernel rounds up to pages.
    is_small = 0 < found.f_blocks * found.f_frsize <= sizes[path] + 8192
    return _is(is_small and 0 < found.f_files <= files[path], "has no bound")


def _rlimit(expect: Expect, name: str) -> str | None:
    limits = expect["rlimits"]
    assert isinstance(limits, dict)
    found = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
    return _is(found == (limits[name], limits[name]), f"is {found}")


def _call(expect: Expect, name: str) -> str | None:
    numbers = expect["calls"]
    assert isinstance(numbers, dict)
    wrong = ctypes.c_long(-1)
    return _fails(lambda: system_call(numbers[name], wrong, wrong, wrong, wrong, wrong, wrong), NO_CALL)


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


def _descriptors(_: Expect) -> str | None:
    extra = []
    for fd in range(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0]):
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


def _sockets(_: Expect) -> str | None:
    made = []
    for family in FAMILIES:
        for kind in (1, 2, 3, 5):
            fd = LIBC.socket(family, kind, 0)
            if fd >= 0 or ctypes.get_errno() != errno.EPERM:
                made.append(family)
            if fd >= 0:
                os.close(fd)
    return _is(not made, f"has families {sorted(set(made))}")


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
    "sockets": _sockets,
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
    "call": _call,
    "hidden": _path,
    "unwritable": _write,
    "maps-no-code": _maps_code,
}
