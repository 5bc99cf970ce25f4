"""Facts about this machine that a cage is built from. Reads; changes nothing.

Everything that depends on the machine is here, so that spec.py stays a function of its arguments.
"""

import ctypes
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mycoswarmd.errors import CageError

PYTHON = "/usr/bin/python3"
BWRAP = "/usr/bin/bwrap"  # this path and no other: Ubuntu's AppArmor profile is bound to it
NAMESPACES = ("user", "net", "pid", "ipc", "uts", "mnt", "cgroup")
ROOT_LINKS = ("bin", "lib", "lib32", "lib64", "libx32", "sbin")
# What programs look for in /etc and what tells nothing about the machine's people or network.
ETC = ("/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime")
LANDLOCK_CREATE, LANDLOCK_VERSION = 444, 1
# What the C library and runtimes ask of the kernel; the rest of /proc stays closed.
KERNEL_FACTS = (
    "/proc/cpuinfo", "/proc/filesystems", "/proc/meminfo", "/proc/stat", "/proc/sys/kernel/osrelease",
    "/proc/sys/vm/overcommit_memory",
)  # fmt: skip
TRIPLETS = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}
LOADERS = {"x86_64": "/lib64/ld-linux-x86-64.so.2", "aarch64": "/lib/ld-linux-aarch64.so.1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What spec.py needs to know of the machine."""

    machine: str
    landlock_abi: int  # 0: the kernel has none
    namespaces: Mapping[str, str]
    root_links: Mapping[str, str]
    etc: tuple[str, ...]
    python: str  # resolved
    loader: str  # resolved
    readable: tuple[str, ...]  # libraries and data that every program may read
    python_paths: tuple[str, ...]  # the standard library
    package_paths: tuple[str, ...]  # what an allowed Python may import besides
    helpers: Mapping[str, str]  # resolved program -> directory of its helpers
    decoys: tuple[str, ...]  # programs that exist, for the probe that none but the allowed ones runs
    # Where a cage has the agent's code, and what it sees of the kernel: these two depend on its maker.
    code: str = "/run/mycoswarm"
    kernel_facts: tuple[str, ...] = KERNEL_FACTS


def read_host() -> Host:
    """Look at the machine."""
    machine = platform.machine()
    python = str(Path(PYTHON).resolve())
    triplet = TRIPLETS.get(machine, f"{machine}-linux-gnu")
    version = Path(python).name
    return Host(
        machine=machine,
        landlock_abi=landlock_abi(),
        namespaces={kind: _read_link(f"/proc/self/ns/{kind}") for kind in NAMESPACES},
        root_links={
            name: str(Path(f"/{name}").readlink()) for name in ROOT_LINKS if Path(f"/{name}").is_symlink()
        },
        etc=_existing(ETC),
        python=python,
        loader=str(Path(LOADERS.get(machine, "/lib/ld.so")).resolve()),
        readable=_existing(
            (
                f"/usr/lib/{triplet}",
                "/usr/lib/locale",
                "/usr/lib/ssl",
                "/usr/lib/terminfo",
                "/usr/share",
                "/usr/local/share",
            )
        ),
        python_paths=_existing((f"/usr/lib/{version}",)),
        package_paths=_existing(("/usr/lib/python3", f"/usr/local/lib/{version}")),
        helpers={
            str(Path(program).resolve()): directory
            for program, directory in (("/usr/bin/git", "/usr/lib/git-core"),)
            if Path(directory).is_dir()
        },
        decoys=_existing(
            tuple(str(Path(f"/usr/bin/{name}").resolve()) for name in ("env", "id", "perl", "dash", "cat"))
        ),
    )


def landlock_abi() -> int:
    """Ask the kernel for its Landlock ABI; 0 where it is missing or switched off."""
    found = ctypes.CDLL(None).syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), LANDLOCK_VERSION)
    return max(0, int(found))


def check_programs(programs: Sequence[str]) -> None:
    """Refuse programs that could not run in a cage: outside /usr, missing, or without their interpreter."""
    for program in programs:
        path = Path(program)
        if not program.startswith("/usr/") or not path.is_file() or path.is_symlink():
            raise CageError(
                "cage-setup",
                f"cannot allow the program {program!r} in a cage: it is no plain file below /usr",
                hint="a cage sees the system's own programs only",
            )
        interpreter = _interpreter(path)
        if interpreter and interpreter not in programs:
            raise CageError(
                "cage-setup",
                f"cannot allow the script {program!r} in a cage without its interpreter {interpreter!r}",
                hint=f"add {Path(interpreter).name!r} to the programs of the tool",
            )


def _interpreter(path: Path) -> str | None:
    with path.open("rb") as file:
        first = file.readline(256)
    words = first[2:].split() if first.startswith(b"#!") else []
    return str(Path(os.fsdecode(words[0])).resolve()) if words else None


def _existing(paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(path for path in paths if Path(path).exists())


def _read_link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""
