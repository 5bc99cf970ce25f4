"""What this machine can enforce around an agent, for `doctor` and `status`. Looks and tries; changes nothing.

Law: the level comes from a trial of the real thing, not from versions: a kernel that has a feature may be
told not to give it.
"""

import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mycoswarmd.core.types import SandboxLevel
from mycoswarmd.sandbox.bwrap import FIRST_UID
from mycoswarmd.sandbox.child import ends_well, is_executable
from mycoswarmd.sandbox.host import BWRAP, PYTHON, landlock_abi
from mycoswarmd.sandbox.spec import LANDLOCK_SINCE
from mycoswarmd.sandbox.syscalls import NUMBERS

SECCOMP_ACTIONS = Path("/proc/sys/kernel/seccomp/actions_avail")
APPARMOR_RESTRICTS = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
CONTROLLERS = Path("/proc/cgroups")
OLDEST_PYTHON = (3, 11)
# bubblewrap needs 5 ms; a box that swaps gets this long to show that it can.
TRIAL_S = 10.0
# Ubuntu's own profile for bubblewrap takes all capabilities from what runs inside; a cage needs two of them
# to make its writable mounts noexec and to give up the rest, before anything else happens there.
RESTRICTING_PROFILE = Path("/etc/apparmor.d/bwrap-userns-restrict")
DISABLE_HINT = (
    f"ln -s {RESTRICTING_PROFILE} /etc/apparmor.d/disable/ && apparmor_parser -R {RESTRICTING_PROFILE}"
)
APPARMOR_HINT = (
    "printf 'abi <abi/4.0>,\\nprofile mycoswarm-bwrap /usr/bin/bwrap flags=(unconfined) { userns, }\\n'"
    " > /etc/apparmor.d/mycoswarm-bwrap && apparmor_parser -r /etc/apparmor.d/mycoswarm-bwrap"
)
# The namespaces and the fresh /proc of a cage, and a capability that can be used: what a machine may refuse.
TRIAL = (
    BWRAP, "--unshare-user", "--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts",
    "--die-with-parent", "--ro-bind", "/usr", "/usr", "--ro-bind-try", "/lib", "/lib",
    "--ro-bind-try", "/lib64", "/lib64", "--proc", "/proc",
    "--cap-add", "CAP_SETPCAP", "--", "/usr/bin/setpriv", "--bounding-set=-all", "/usr/bin/true",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One thing about the machine: whether it is as a cage needs it, what was found, and the cure."""

    name: str
    ok: bool
    detail: str
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """What cages can be here. FULL needs systemd's cages, so it is never said of these."""

    level: SandboxLevel
    facts: tuple[Fact, ...]


def probe_machine() -> Capability:
    """Look at the machine and try to make namespaces, in well under 100 ms."""
    facts = {probe: probe() for probe in (*NEEDED, *WANTED)}
    is_able = all(facts[probe].ok for probe in NEEDED)
    return Capability(
        level=SandboxLevel.REDUCED if is_able else SandboxLevel.NONE, facts=tuple(facts.values())
    )


def _bubblewrap() -> Fact:
    found = is_executable(BWRAP)
    return Fact(
        name="bubblewrap",
        ok=found,
        detail=BWRAP if found else f"{BWRAP} is missing",
        hint="" if found else "apt install bubblewrap",
    )


def _namespaces() -> Fact:
    identity = (FIRST_UID, FIRST_UID) if os.geteuid() == 0 else None
    refusal = ends_well(TRIAL, identity=identity, within_s=TRIAL_S) if is_executable(BWRAP) else "not tried"
    return Fact(
        name="user namespaces",
        ok=not refusal,
        detail=refusal or "an unprivileged user may make them",
        hint=_namespace_hint() if refusal else "",
    )


def _namespace_hint() -> str:
    if _is_set(APPARMOR_RESTRICTS):
        return APPARMOR_HINT if not RESTRICTING_PROFILE.exists() else f"{DISABLE_HINT} && {APPARMOR_HINT}"
    if Path("/.dockerenv").exists() or Path("/run/.containerenv").exists():
        return (
            "run the container with --security-opt seccomp=unconfined --security-opt systempaths=unconfined"
        )
    return "sysctl user.max_user_namespaces=15000; on older Debian also kernel.unprivileged_userns_clone=1"


def _seccomp() -> Fact:
    actions = _read(SECCOMP_ACTIONS).split()
    machine = platform.machine()
    if machine not in NUMBERS:
        return Fact(
            name="seccomp", ok=False, detail=f"no filter for {machine}", hint="cages need x86-64 or arm64"
        )
    found = {"kill_process", "errno"} <= set(actions)
    return Fact(
        name="seccomp",
        ok=found,
        detail=f"filters for {machine}" if found else "the kernel has no filters",
        hint="" if found else "a kernel with CONFIG_SECCOMP_FILTER",
    )


def _python() -> Fact:
    name = Path(PYTHON).resolve().name
    version = tuple(int(part) for part in re.findall(r"\d+", name))
    found = is_executable(PYTHON) and version >= OLDEST_PYTHON
    return Fact(
        name="python",
        ok=found,
        detail=f"{PYTHON} is {name}" if is_executable(PYTHON) else f"{PYTHON} is missing",
        hint="" if found else "agents run on the system's Python 3.11 or later: apt install python3",
    )


def _landlock() -> Fact:
    abi = landlock_abi()
    missing = [name.removeprefix("landlock-") for name, since in LANDLOCK_SINCE.items() if abi < since]
    if not abi:
        return Fact(
            name="landlock",
            ok=False,
            detail="missing: agents can run no programs and need the whole workspace",
            hint="add lsm=landlock,... to the kernel's command line",
        )
    without = f", without {', '.join(missing)}" if missing else ""
    return Fact(name="landlock", ok=True, detail=f"ABI {abi}{without}")


def _memory() -> Fact:
    has_controller = any(
        line.startswith("memory") and line.endswith("1") for line in _read(CONTROLLERS).splitlines()
    )
    return Fact(
        name="memory",
        ok=False,
        detail="bounded for each process, not for a cage as a whole; cpu time likewise",
        hint="cages by systemd bound both"
        + ("" if has_controller else "; the kernel's memory controller is off here (cgroup_enable=memory)"),
    )


NEEDED: tuple[Callable[[], Fact], ...] = (_bubblewrap, _namespaces, _seccomp, _python)
WANTED: tuple[Callable[[], Fact], ...] = (_landlock, _memory)


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except OSError:
        return ""


def _is_set(path: Path) -> bool:
    return _read(path).strip() == "1"
