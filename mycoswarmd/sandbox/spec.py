"""What a cage consists of: operations for the starter, steps for the agent, probes for the proof. Pure.

Two lists say everything. `operations` is what bubblewrap does, parents before children; each can describe
itself. `confinement` is the CONFINE frame: what the agent takes away from itself, and what it must prove.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mycoswarmd.core.types import CageSpec, SandboxLevel
from mycoswarmd.errors import CageError
from mycoswarmd.sandbox.host import Host
from mycoswarmd.sandbox.landlock import (
    DEVICES,
    TEMPORARY,
    WORKSPACE,
    Rule,
    compile_rules,
    inside,
    is_narrow,
    narrow_rules,
)
from mycoswarmd.sandbox.syscalls import NUMBERS, REFUSED

AGENT = "/run/mycoswarm/agent.pyz"
# What `python agent.pyz` does, without runpy, whose imports cost as much as the interpreter's start.
START = (
    f"import sys, zipimport; sys.path.insert(0, {AGENT!r}); "
    f"exec(zipimport.zipimporter({AGENT!r}).get_code('__main__'))"
)
ENVIRONMENT: Mapping[str, str] = {
    "HOME": WORKSPACE,
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",  # else Python sets LC_CTYPE itself
    "PATH": "/usr/bin:/bin",
    "PWD": WORKSPACE,  # bubblewrap sets it
    "TMPDIR": TEMPORARY,
    "GIT_CONFIG_NOSYSTEM": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
# What scratch space a test run or a compiler needs; it is memory, so no more.
TEMPORARY_BYTES = 64 << 20
# An empty file costs the kernel about 1 KiB, which counts as nothing in the size of a tmpfs: this keeps a
# million of them from taking the machine's memory. A workspace of 256 MiB may hold 131,072.
BYTES_PER_FILE = 2048
# Programs open a few dozen files; this is also what bounds the search for inherited ones.
OPEN_FILES = 256
# bubblewrap's init and the agent itself.
OWN_PROCESSES = 2
WRITABLE = (WORKSPACE, TEMPORARY)
NOTHING_RUNS = ("nosuid", "nodev", "noexec")
SEALED = ("ro", "nosuid", "nodev")
# Of the limits of the kernel these are not bounded by the task: no cage needs any.
NO_USE = ("CORE", "MEMLOCK", "MSGQUEUE", "RTPRIO", "NICE")
# What this cage cannot do and the systemd cage can.
NEVER = ("cpu-cgroup", "memory-cgroup")

HIDDEN = (
    "/etc/shadow", "/etc/mycoswarm", "/root", "/home", "/var", "/sys", "/boot", "/srv", "/mnt", "/run/dbus",
    "/run/systemd", "/run/user", "/dev/fuse", "/dev/kmsg", "/dev/kvm", "/dev/mem", "/dev/pts", "/dev/ptmx",
    "/dev/shm", "/dev/tty",  # noqa: S108
    "/proc/self/root/etc/shadow", "/proc/kcore",
)  # fmt: skip
# bubblewrap's init is the same user as the agent: only Landlock keeps the agent out of it.
HIDDEN_BY_LANDLOCK = (
    "/proc/1/environ", "/proc/1/mem", "/proc/1/root/etc", "/proc/cmdline", "/proc/self/maps", "/usr/bin",
    "/usr/sbin",
)  # fmt: skip
UNWRITABLE = ("/.probe", "/etc/.probe", "/usr/.probe", "/dev/.probe", AGENT, "/proc/sys/kernel/core_pattern")


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that bubblewrap does: an option, its arguments, and for a file its content."""

    option: str
    arguments: tuple[str, ...] = ()
    content: bytes | None = None

    def describe(self) -> str:
        """Say it in one line."""
        size = "" if self.content is None else f" ({len(self.content)} bytes)"
        return " ".join((self.option.removeprefix("--"), *self.arguments)) + size


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom the cage's processes are to the machine, and inside."""

    uid: int
    gid: int


def operations(spec: CageSpec, host: Host, who: Identity, agent: bytes) -> tuple[Operation, ...]:
    """Return what bubblewrap is to do, in order."""
    option = Operation
    return (
        *(option(f"--unshare-{kind}") for kind in ("user", "net", "pid", "ipc", "uts", "cgroup-try")),
        option("--hostname", ("cage",)),
        option("--die-with-parent"),
        option("--new-session"),
        option("--clearenv"),
        *(option("--setenv", pair) for pair in ENVIRONMENT.items()),
        option("--ro-bind", ("/usr", "/usr")),
        *(option("--symlink", (target, f"/{name}")) for name, target in host.root_links.items()),
        option("--dir", ("/etc",)),
        *(option("--ro-bind", (path, path)) for path in host.etc),
        _file("/etc/passwd", f"agent:x:{who.uid}:{who.gid}::{WORKSPACE}:/bin/false\n"),
        _file("/etc/group", f"agent:x:{who.gid}:\n"),
        _file("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n"),
        option("--proc", ("/proc",)),
        option("--dir", ("/dev",)),
        *(option("--dev-bind", (path, path)) for path in DEVICES),
        option("--dir", ("/run/mycoswarm",)),
        option("--file", (AGENT,), agent),
        # Nothing may be added to the root; what follows are mounts of their own.
        option("--size", (str(spec.limits.disk_bytes),)),
        option("--tmpfs", (WORKSPACE,)),
        option("--size", (str(_temporary_bytes(spec)),)),
        option("--tmpfs", (TEMPORARY,)),
        option("--remount-ro", ("/",)),
        option("--chdir", (WORKSPACE,)),
        # To make the writable mounts noexec, which bubblewrap cannot, and to give itself up.
        option("--cap-add", ("CAP_SYS_ADMIN",)),
        option("--cap-add", ("CAP_SETPCAP",)),
    )


def command(host: Host) -> tuple[str, ...]:
    """Return what runs in the cage: the system's Python, isolated, without site-packages."""
    return (host.python, "-I", "-S", "-c", START)


def confinement(spec: CageSpec, host: Host, who: Identity) -> dict[str, object]:
    """Return the body of the CONFINE frame.

    Raises:
        CageError: "cage-setup" when this kernel cannot enforce what the task's rights demand.
    """
    check_enforceable(spec, host)
    limits = rlimits(spec)
    rules = compile_rules(spec, host)
    return {
        "task": spec.task_id,
        "attempt": spec.attempt,
        "read_paths": list(spec.read_paths),
        "write_paths": list(spec.write_paths),
        "programs": list(spec.programs),
        "limits": {
            name: getattr(spec.limits, name)
            for name in (
                "wall_s",
                "memory_bytes",
                "processes",
                "disk_bytes",
                "cpu_percent",
                "steps",
                "tokens",
            )
        },
        "steps": [
            *({"do": "rlimit", "name": name, "value": value} for name, value in limits.items()),
            *(
                {
                    "do": "remount",
                    "path": path,
                    "flags": list(NOTHING_RUNS),
                    "bytes": size,
                    "files": size // BYTES_PER_FILE,
                }
                for path, size in _sizes(spec).items()
            ),
            {"do": "drop-capabilities"},
            {"do": "no-new-privileges"},
            *([_landlock(host, rules)] if host.landlock_abi else []),
            {"do": "seccomp"},
        ],
        "narrow": _narrow(spec, host),
        "probes": list(probes(spec, host)),
        "expect": {
            "uid": who.uid,
            "gid": who.gid,
            "environment": dict(ENVIRONMENT),
            "namespaces": dict(host.namespaces),
            "mounts": {"/": SEALED, "/usr": SEALED, **dict.fromkeys(WRITABLE, NOTHING_RUNS)},
            "sizes": _sizes(spec),
            "files": {path: size // BYTES_PER_FILE for path, size in _sizes(spec).items()},
            "rlimits": limits,
            "calls": {name: number for name, number in NUMBERS[host.machine].items() if name in CALLS},
            "forbidden": _forbidden(spec, host),
        },
        "absent": list(absent(host)),
        "level": SandboxLevel.REDUCED.value,
    }


def check_enforceable(spec: CageSpec, host: Host) -> None:
    """Refuse what this kernel cannot enforce: without Landlock no program and no partial workspace."""
    if host.landlock_abi:
        return
    if spec.programs:
        raise CageError(
            "cage-setup",
            "cannot limit which programs run: this kernel has no Landlock",
            hint="boot with lsm=landlock,… or take the programs from the agent's tools",
        )
    if is_narrow(spec) or "." not in spec.read_paths:
        raise CageError(
            "cage-setup",
            "cannot limit the paths of the workspace: this kernel has no Landlock",
            hint="boot with lsm=landlock,… or give the agent the whole workspace",
        )


def rlimits(spec: CageSpec) -> dict[str, int]:
    """Return the resource limits of each process of the cage, and of all for NPROC."""
    limits = spec.limits
    return {
        "AS": limits.memory_bytes,
        "DATA": limits.memory_bytes,
        "NPROC": limits.processes + OWN_PROCESSES,
        "FSIZE": limits.disk_bytes,
        "CPU": max(1, limits.wall_s * limits.cpu_percent // 100),
        "NOFILE": OPEN_FILES,
        **dict.fromkeys(NO_USE, 0),
    }


def probes(spec: CageSpec, host: Host) -> tuple[str, ...]:
    """Return the names of the probes that must hold, as agent/prove.py knows them."""
    machine = NUMBERS[host.machine]
    return (
        "identity", "environment", "descriptors", "capabilities", "securebits", "no-new-privileges",
        "seccomp", "session", "dies-with-node", "own-processes", "sockets", "clone-namespace", "clone3",
        "setuid-file",
        "terminal-input", "personality", "memory",
        *(f"namespace={kind}" for kind, own in host.namespaces.items() if own),
        *(f"mount={path}" for path in ("/", "/usr", *WRITABLE)),
        *(f"size={path}" for path in WRITABLE),
        *(f"maps-no-code={path}" for path in WRITABLE),
        *(f"rlimit={name}" for name in rlimits(spec)),
        *(f"call={name}" for name in REFUSED if name in machine),
        *(f"hidden={path}" for path in HIDDEN),
        *(f"unwritable={path}" for path in UNWRITABLE),
        *((f"hidden={path}" for path in HIDDEN_BY_LANDLOCK) if host.landlock_abi else ()),
        *(("forbidden-program",) if host.landlock_abi else ()),
        *(("signal-outside",) if host.landlock_abi >= LANDLOCK_SINCE["landlock-scopes"] else ()),
    )  # fmt: skip


# What a younger Landlock adds, and since which ABI.
LANDLOCK_SINCE = {
    "landlock": 1,
    "landlock-refer": 2,
    "landlock-truncate": 3,
    "landlock-tcp": 4,
    "landlock-ioctl": 5,
    "landlock-scopes": 6,
}
CALLS = {*REFUSED, "clone", "clone3"}


def absent(host: Host) -> tuple[str, ...]:
    """Name what this kernel, or this kind of cage, does not enforce."""
    return (*NEVER, *(name for name, since in LANDLOCK_SINCE.items() if host.landlock_abi < since))


def _narrow(spec: CageSpec, host: Host) -> dict[str, object] | None:
    if not host.landlock_abi or (not is_narrow(spec) and "." in spec.read_paths):
        return None
    make = [inside(path) for path in spec.write_paths]
    return {**_landlock(host, narrow_rules(spec, host)), "make": make}


def _landlock(host: Host, rules: tuple[Rule, ...]) -> dict[str, object]:
    return {
        "do": "landlock",
        "abi": host.landlock_abi,
        "rules": [[path, list(accesses)] for path, accesses in rules],
    }


def _forbidden(spec: CageSpec, host: Host) -> str:
    candidates = (host.python, *host.decoys)
    return next((path for path in candidates if path not in spec.programs), "/nothing")


def _temporary_bytes(spec: CageSpec) -> int:
    return min(spec.limits.disk_bytes, TEMPORARY_BYTES)


def _sizes(spec: CageSpec) -> dict[str, int]:
    return {WORKSPACE: spec.limits.disk_bytes, TEMPORARY: _temporary_bytes(spec)}


def _file(path: str, text: str) -> Operation:
    return Operation("--file", (path,), text.encode())
