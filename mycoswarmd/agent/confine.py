"""Takes the agent's rights away, step by step, as the CONFINE frame says. ctypes only.

Rules: steps run in the frame's order, each exactly as given; the first that fails ends the agent. What
a step is worth is not believed here: prove.py tries to break out afterwards. No step can be undone.

Source: landlock(7), seccomp(2), capabilities(7), getrlimit(2), mount(2).
"""

import ctypes
import errno
import os
import resource
import struct
from collections.abc import Callable, Mapping

from mycoswarmd.errors import CageError

LIBC = ctypes.CDLL(None, use_errno=True)

PR_SET_CHILD_SUBREAPER = 36
PR_SET_SECCOMP, PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_SET_SECUREBITS = 22, 23, 24, 28
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
SECCOMP_MODE_FILTER = 2
# Version 3 and this process; what follows are three sets of 64 bits, as six halves.
CAPABILITY_HEADER = struct.pack("=Ii", 0x20080522, 0)
# NOROOT, NO_SETUID_FIXUP, NO_CAP_AMBIENT_RAISE with their locks, and KEEP_CAPS locked off.
SECUREBITS = 0b1110_1111
# Where a cage without a process namespace of its own keeps the list of the agent's children open.
CHILDREN_FD = 4
LAST_CAPABILITY = 63  # asking for more than the kernel has gives EINVAL, which ends the loop

MS_REMOUNT = 0x20
MOUNT_FLAGS = {"ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8}

# These three have the same numbers on every architecture.
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
LANDLOCK_PATH_BENEATH = 1
# Access name -> bit, and the first ABI that knows it.
LANDLOCK_FS = {
    "execute": (0, 1), "write-file": (1, 1), "read-file": (2, 1), "read-dir": (3, 1),
    "remove-dir": (4, 1), "remove-file": (5, 1), "make-char": (6, 1), "make-dir": (7, 1),
    "make-reg": (8, 1), "make-sock": (9, 1), "make-fifo": (10, 1), "make-block": (11, 1),
    "make-sym": (12, 1), "refer": (13, 2), "truncate": (14, 3), "ioctl-dev": (15, 5),
}  # fmt: skip
# What a rule on a plain file may say; the kernel refuses the others there.
LANDLOCK_FILE = {"execute", "write-file", "read-file", "truncate", "ioctl-dev"}
LANDLOCK_TCP_ABI, LANDLOCK_TCP = 4, 0b11  # bind, connect
LANDLOCK_SCOPE_ABI, LANDLOCK_SCOPE = 6, 0b11  # abstract unix sockets, signals


def apply(body: Mapping[str, object], payload: bytes) -> None:
    """Carry out the steps of a CONFINE frame; its payload is the seccomp program."""
    refuse_host_root(may_be_mapped=body.get("maps_root") is True)
    refuse_descriptors()
    steps = body["steps"]
    assert isinstance(steps, list)
    for step in steps:
        try:
            STEPS[step["do"]](step, payload)
        except (OSError, ValueError, KeyError) as exc:
            raise CageError(
                "cage-setup", f"cannot confine the agent: {step.get('do')!r} failed: {exc}"
            ) from exc


def narrow(body: Mapping[str, object]) -> None:
    """Restrict the workspace to the paths of the task; to be called once it has been unpacked.

    Landlock rules need files that exist, and unpacking needs more rights than the work. Writable paths
    that are missing become directories.
    """
    step = body.get("narrow")
    if not isinstance(step, dict):
        return
    for path in step["make"]:
        if not os.path.lexists(path):
            os.makedirs(path)
    # A path that may be read but is not there grants nothing; nor does one that leads through a link of the
    # workspace's, or its author would choose what the rule is about.
    rules = [rule for rule in step["rules"] if _is_plain(rule[0])]
    try:
        _landlock({**step, "rules": rules}, b"")
    except OSError as exc:
        raise CageError("cage-setup", f"cannot confine the agent to its paths: {exc}") from exc


def _is_plain(path: str) -> bool:
    return os.path.lexists(path) and os.path.realpath(path) == path


def refuse_host_root(*, may_be_mapped: bool = False) -> None:
    """Refuse to work where this process is root outside the cage, or, unless told otherwise, root is mapped.

    systemd's user namespaces always map root, for who has the rights to become it.
    """
    own = {*os.getresuid(), *os.getresgid(), *os.getgroups()}
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/self/{name}", encoding="ascii") as lines:
            for line in lines:
                inside, outside, count = (int(field) for field in line.split())
                is_root = any(inside <= one < inside + count and outside + one - inside == 0 for one in own)
                if is_root or (outside == 0 and count and not may_be_mapped):
                    raise CageError("cage-setup", "cannot work in a cage that maps the machine's root")


def refuse_descriptors() -> None:
    """Refuse to work with descriptors that somebody left open: 0 to 2 and the socket are all there is."""
    # The listing itself has one, which is closed when it has been read.
    open_fds = {int(name) for name in os.listdir("/proc/self/fd")}
    extra = sorted(fd for fd in open_fds - {0, 1, 2, 3} if os.path.exists(f"/proc/self/fd/{fd}"))
    if extra:
        raise CageError("cage-setup", f"cannot work with inherited descriptors {extra}")


def call(name: str, *arguments: object) -> int:
    """Call a function of libc, raising OSError when it fails."""
    result = int(getattr(LIBC, name)(*arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), name)
    return result


def system_call(number: int, *arguments: object) -> int:
    """Make a system call by number, raising OSError when it fails."""
    return call("syscall", ctypes.c_long(number), *arguments)


def prctl(option: int, *arguments: int) -> int:
    """Call prctl with full-width arguments, raising OSError when it fails."""
    wide = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    return call("prctl", option, *wide)


def _rlimit(step: Mapping[str, object], _: bytes) -> None:
    value, which = step["value"], getattr(resource, f"RLIMIT_{step['name']}")
    assert isinstance(value, int)
    hard = resource.getrlimit(which)[1]
    least = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (least, least))


def _remount(step: Mapping[str, object], _: bytes) -> None:
    names = step["flags"]
    assert isinstance(names, list)
    # Not a bind remount: it is the file system that counts its files, and its only mount is ours.
    flags = MS_REMOUNT | sum(MOUNT_FLAGS[name] for name in names)
    bounds = f"size={step['bytes']},nr_inodes={step['files']}".encode()
    call("mount", None, str(step["path"]).encode(), None, ctypes.c_ulong(flags), bounds)


def _adopt(_step: Mapping[str, object], _: bytes) -> None:
    """Become the parent of every descendant that loses its own, so that `program.sweep` finds all of them."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    fd = os.open(f"/proc/self/task/{os.getpid()}/children", os.O_RDONLY | os.O_CLOEXEC)
    if fd != CHILDREN_FD:  # the lowest that is free, after refuse_descriptors
        raise OSError(errno.EBADF, f"descriptor {fd} was free")


def _quiet(_step: Mapping[str, object], _: bytes) -> None:
    """Part with standard error: what an agent says of its task is nothing for the machine's journal."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 2)
    os.close(null)


def _drop_capabilities(_step: Mapping[str, object], _: bytes) -> None:
    prctl(PR_SET_SECUREBITS, SECUREBITS)
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    for capability in range(LAST_CAPABILITY + 1):
        try:
            held = prctl(PR_CAPBSET_READ, capability)
        except OSError:
            break
        if held:
            prctl(PR_CAPBSET_DROP, capability)
    call("capset", CAPABILITY_HEADER, bytes(24))


def _no_new_privileges(_step: Mapping[str, object], _: bytes) -> None:
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def _landlock(step: Mapping[str, object], _: bytes) -> None:
    abi, rules = step["abi"], step["rules"]
    assert isinstance(abi, int)
    assert isinstance(rules, list)
    handled = {name: bit for name, (bit, since) in LANDLOCK_FS.items() if since <= abi}
    ruleset = struct.pack(
        "=QQQ",
        sum(1 << bit for bit in handled.values()),
        LANDLOCK_TCP if abi >= LANDLOCK_TCP_ABI else 0,
        LANDLOCK_SCOPE if abi >= LANDLOCK_SCOPE_ABI else 0,
    )
    # The kernel takes a shorter structure from older callers, and refuses non-zero bytes it does not know.
    size = 24 if abi >= LANDLOCK_SCOPE_ABI else 16 if abi >= LANDLOCK_TCP_ABI else 8
    ruleset_fd = system_call(LANDLOCK_CREATE, ruleset, ctypes.c_size_t(size), 0)
    try:
        for path, accesses in rules:
            _add_rule(ruleset_fd, path, {name: handled[name] for name in accesses if name in handled})
        system_call(LANDLOCK_RESTRICT, ruleset_fd, 0)
    finally:
        os.close(ruleset_fd)


def _add_rule(ruleset_fd: int, path: str, bits: Mapping[str, int]) -> None:
    # A symbolic link in the workspace must not widen the rule: the link itself is opened, and refused.
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        is_directory = (os.fstat(fd).st_mode & 0o170000) == 0o040000
        mask = sum(1 << bit for name, bit in bits.items() if is_directory or name in LANDLOCK_FILE)
        rule = struct.pack("=Qi", mask, fd)
        system_call(LANDLOCK_ADD, ruleset_fd, LANDLOCK_PATH_BENEATH, rule, 0)
    finally:
        os.close(fd)


def _seccomp(_step: Mapping[str, object], program: bytes) -> None:
    code = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: a length, padding, and a pointer, each as this machine has them.
    pointer = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(pointer))


STEPS: dict[str, Callable[[Mapping[str, object], bytes], None]] = {
    "rlimit": _rlimit,
    "remount": _remount,
    "adopt": _adopt,
    "quiet": _quiet,
    "drop-capabilities": _drop_capabilities,
    "no-new-privileges": _no_new_privileges,
    "landlock": _landlock,
    "seccomp": _seccomp,
}
