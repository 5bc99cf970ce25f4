"""What a cage that systemd built consists of: its CONFINE frame. Pure.

The unit (systemd/mycoswarm-task@.service) is the same for every task and holds by itself; what it holds is
probed before the agent adds anything of its own (`before`). Then the agent narrows it to the task's rights
with the steps and probes of every cage (spec.py).

Law: nothing is taken from the unit's file. A bound that the unit has for all tasks and that cannot be
narrowed for this one without rights is `wanted`: it is absent where it is wider than the task's.
"""

from dataclasses import replace

from mycoswarmd.core.types import CageSpec, SandboxLevel
from mycoswarmd.sandbox.host import Host
from mycoswarmd.sandbox.landlock import DEVICES, TEMPORARY, WORKSPACE
from mycoswarmd.sandbox.spec import (
    AGENT,
    BYTES_PER_FILE,
    CALLS,
    NEVER,
    SEALED,
    TEMPORARY_BYTES,
    Identity,
)
from mycoswarmd.sandbox.spec import absent as absent_everywhere
from mycoswarmd.sandbox.spec import confinement as confinement_everywhere
from mycoswarmd.sandbox.syscalls import NUMBERS

# Where the unit puts the agent's code, and what it bounds for all tasks; see the unit.
CODE = "/agent"
UNIT_BYTES = {WORKSPACE: 256 << 20, TEMPORARY: TEMPORARY_BYTES}
UNIT_RLIMITS = {"CORE": 0, "NOFILE": 256, "FSIZE": 256 << 20, "MEMLOCK": 0, "MSGQUEUE": 0, "RTPRIO": 0}
UNIT_UMASK = 0o077
# systemd's range for users that exist as long as a unit.
DYNAMIC_UIDS = (61184, 65519)
# 0 to 2, the socket, and the list of the agent's children.
DESCRIPTORS = 5

# Bounds of all processes of a cage together; the node reads them from outside.
GROUP_BOUNDS = {"memory-cgroup": "memory.max", "pids-cgroup": "pids.max", "cpu-cgroup": "cpu.max"}
# What a younger Landlock adds and this cage has by other means, each proved: no socket of any family, five
# devices without calls of their own, and no process of another that could be signalled.
HELD_OTHERWISE = ("landlock-tcp", "landlock-ioctl", "landlock-scopes")
# Steps and probes of bubblewrap's cages whose part the unit has: mounts, capabilities, another uid.
UNITS_STEPS = ("remount", "drop-capabilities")
UNITS_PROBES = ("identity", "securebits", "own-processes")

UNIT_DEVICES = (
    *(path.rpartition("/")[2] for path in DEVICES), "tty", "ptmx", "pts", "shm", "mqueue", "hugepages",
    "core", "fd", "stdin", "stdout", "stderr", "log", "char", "block",
)  # fmt: skip
UNIT_HIDDEN = (
    "/etc/shadow", "/etc/passwd", "/etc/mycoswarm", "/root", "/home", "/var/lib", "/var/log",
    "/var/tmp", "/boot", "/srv", "/mnt", "/media", "/opt", "/sys", "/sys/fs/cgroup",  # noqa: S108
    "/run/user", "/run/mycoswarm", "/run/systemd/journal/socket", "/dev/fuse", "/dev/kmsg", "/dev/kvm",
    "/dev/mem",
    "/dev/console", "/dev/net/tun", "/dev/pts", "/dev/shm", "/dev/mqueue", "/dev/hugepages",  # noqa: S108
    "/proc/1/environ", "/proc/1/cmdline", "/proc/cmdline", "/proc/kcore", "/proc/sys",
    "/proc/keys",
)  # fmt: skip
UNIT_UNREACHABLE = (
    "/run/dbus/system_bus_socket", "/run/systemd/private", "/run/systemd/notify",
    "/run/systemd/resolve/io.systemd.Resolve", "/run/nscd/socket", "/run/docker.sock",
    "/run/containerd/containerd.sock", "/run/mycoswarm/api.sock", "/run/mycoswarm-outposts/lan.sock",
)  # fmt: skip
UNIT_UNWRITABLE = ("/.probe", "/etc/.probe", "/usr/.probe", "/dev/.probe", "/run/.probe", f"{CODE}/task")
# One or more of each group that the unit's system call filter leaves out.
UNIT_REFUSED = (
    "mount", "umount2", "pivot_root", "chroot", "fsopen", "open_tree", "move_mount", "mount_setattr",
    "ptrace", "bpf", "perf_event_open", "keyctl", "add_key", "request_key", "io_uring_setup",
    "io_uring_enter", "io_uring_register", "userfaultfd", "kexec_load", "init_module", "finit_module",
    "reboot", "swapon", "acct", "settimeofday", "clock_settime", "adjtimex", "mbind", "set_mempolicy",
    "open_by_handle_at", "syslog",
)  # fmt: skip
UNIT_NAMESPACES = ("user", "net", "ipc", "uts", "mnt")


def confinement(spec: CageSpec, host: Host) -> dict[str, object]:
    """Return the body of the CONFINE frame; CageError("cage-setup") as for every cage."""
    inside = replace(host, code=CODE, kernel_facts=())
    body = confinement_everywhere(spec, inside, Identity(0, 0))
    steps, probes, expect = body["steps"], body["probes"], body["expect"]
    assert isinstance(steps, list)
    assert isinstance(probes, list)
    assert isinstance(expect, dict)
    sizes = {path: max(size, expect["sizes"][path]) for path, size in UNIT_BYTES.items()}
    return {
        **body,
        "maps_root": True,
        "steps": [
            {"do": "adopt"},
            {"do": "quiet"},
            *(step for step in steps if step["do"] not in UNITS_STEPS),
        ],
        "before": list(_before(host)),
        "probes": [
            *(name for name in probes if _is_ours(name, host)),
            "dynamic-identity",
            "streams",
            "stop-guard",
            f"unwritable={CODE}/task",
        ],
        "wanted": ["disk-quota"],
        "expect": {
            **expect,
            "uids": list(DYNAMIC_UIDS),
            "umask": UNIT_UMASK,
            "descriptors": DESCRIPTORS,
            "devices": list(UNIT_DEVICES),
            "unit_rlimits": UNIT_RLIMITS,
            "mounts": {**expect["mounts"], "/usr": ("ro", "nosuid"), "/": SEALED},
            "quotas": expect["sizes"],
            "sizes": sizes,
            "files": {path: size // BYTES_PER_FILE for path, size in sizes.items()},
            "calls": {**expect["calls"], **_numbers(host)},
        },
        "absent": list(absent(host)),
        # Lowered to REDUCED by whatever turns out to be absent.
        "level": SandboxLevel.FULL.value,
    }


def absent(host: Host) -> tuple[str, ...]:
    """Name what this kernel does not enforce and this cage has by no other means."""
    return tuple(name for name in absent_everywhere(host) if name not in {*NEVER, *HELD_OTHERWISE})


def _is_ours(name: str, host: Host) -> bool:
    kind, _, argument = name.partition("=")
    if kind == "namespace" or name in UNITS_PROBES or argument == AGENT:
        return False
    # Of what is in sight in the unit's own tree, Landlock alone closes the rest.
    return kind != "hidden" or bool(host.landlock_abi)


def _numbers(host: Host) -> dict[str, int]:
    return {name: number for name, number in NUMBERS[host.machine].items() if name in {*UNIT_REFUSED, *CALLS}}


def _before(host: Host) -> tuple[str, ...]:
    machine = _numbers(host)
    return (
        "dynamic-identity", "capabilities", "no-new-privileges", "seccomp", "address-families", "no-network",
        "no-shared-ipc", "processes", "devices", "umask", "session", "clone-namespace", "setuid-file",
        "personality", "code-from-data", "dies-with-node",
        *(("foreign-calls",) if host.machine == "x86_64" else ()),
        *(f"namespace={kind}" for kind in UNIT_NAMESPACES if host.namespaces.get(kind)),
        *(f"mount={path}" for path in ("/", "/usr", WORKSPACE, TEMPORARY)),
        *(f"size={path}" for path in UNIT_BYTES),
        *(f"maps-no-code={path}" for path in UNIT_BYTES),
        *(f"unit-rlimit={name}" for name in UNIT_RLIMITS),
        *(f"call={name}" for name in UNIT_REFUSED if name in machine),
        *(f"hidden={path}" for path in UNIT_HIDDEN),
        *(f"unwritable={path}" for path in UNIT_UNWRITABLE),
        *(f"reach={path}" for path in UNIT_UNREACHABLE),
    )  # fmt: skip
