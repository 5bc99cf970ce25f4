"""What `doctor` looks at in the machine itself: clock, kernel, GPU, sleep.

Each check is a function of the machine; what it cannot tell, it does not say.
Sources: cgroups(7), landlock(7), systemd.unit(5), logind.conf(5); pi-gen#917 for the Pi's memory controller.
"""

import re
from collections.abc import Iterator
from datetime import UTC, datetime

from mycoswarmd.ctl.box import Box, Finding, Severity

# No release of this is older than this day; a clock that says so was never set.
_BUILT_S = 1_767_225_600  # 2026-01-01
_DAY_S = 86_400
_NVIDIA, _AMD = "0x10de", "0x1002"
# SMBIOS 3.6, table 17: portable, laptop, notebook, sub notebook, tablet, convertible, detachable.
_PORTABLE = {"8", "9", "10", "14", "30", "31", "32"}
# What may ask systemd for the old control groups; the last is needed since systemd 256.
_OLD_GROUPS = re.compile(
    r"(systemd\.unified_cgroup_hierarchy|systemd\.legacy_systemd_cgroup_controller"
    r"|SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE)(=\w*)?"
)
_APPARMOR_RULE = "abi <abi/4.0>,\\nprofile mycoswarm-bwrap /usr/bin/bwrap flags=(unconfined) { userns, }\\n"
_APPARMOR_FIX = (
    f"printf '{_APPARMOR_RULE}' | sudo tee /etc/apparmor.d/mycoswarm-bwrap"
    " && sudo apparmor_parser -r /etc/apparmor.d/mycoswarm-bwrap"
)


def machine(box: Box, *, has_units: bool) -> Iterator[Finding]:
    """Look at the machine; `has_units`: systemd builds the cages here."""
    yield from clock(box)
    yield from cgroups(box)
    yield from landlock(box)
    yield from namespaces(box, has_units=has_units)
    yield from gpus(box)
    yield from sleep(box)


def clock(box: Box) -> Iterator[Finding]:
    """The time of day: only rules with `hours` need it."""
    if box.now_s is None:
        return
    said = (
        datetime.fromtimestamp(box.now_s, tz=UTC).strftime("%Y-%m-%d") if _is_date(box.now_s) else "no date"
    )
    try:
        kept_s = box.at("/var/lib/systemd/timesync/clock").stat().st_mtime
    except OSError:
        kept_s = 0.0
    fix = "sudo timedatectl set-ntp true"
    rest = (
        "nothing about keys or invitations depends on it, but rules with `hours` count against every request."
    )
    if box.now_s < _BUILT_S:
        yield _note("clock", f"The clock says {said}, which is long ago; {rest}", fix)
    elif kept_s > box.now_s + _DAY_S:
        yield _note("clock", f"The clock says {said}, earlier than the last time it was right; {rest}", fix)
    else:
        yield _ok("clock", f"The clock says {said}.")


def _is_date(now_s: float) -> bool:
    return 0 <= now_s < 253_402_300_800  # the year 10000


def cgroups(box: Box) -> Iterator[Finding]:
    """Control groups: version 2 alone, with the memory controller."""
    place = box.pi_cmdline()
    asked = place is not None and "cgroup_enable=memory" in (box.read(place) or "").split()
    memory_fix = box.kernel_argument("cgroup_enable=memory")
    if not box.is_running:
        if place is not None and not asked:
            yield _weak(
                "memory", "A Pi starts without memory limits unless its kernel is told otherwise.", memory_fix
            )
        return
    controllers = box.read("/sys/fs/cgroup/cgroup.controllers")
    if controllers is None:
        yield from _old_groups(box)
        return
    yield _ok("cgroups", "Control groups are version 2.")
    for name, what in (("pids", "the number of processes"), ("cpu", "processor time")):
        if name not in controllers.split():
            said = f"The kernel cannot limit {what} of a group: a task may take more than its share."
            yield _weak(name, said, "start the distribution's own kernel, which can")
    if "memory" in controllers.split():
        yield _ok("memory", "The kernel can limit memory.")
    elif asked:
        yield _weak(
            "memory",
            "The kernel cannot limit memory yet: it was told to, and waits for a restart.",
            "sudo reboot",
        )
    else:
        yield _weak(
            "memory", "The kernel cannot limit memory: a task or an engine may take all of it.", memory_fix
        )


def _old_groups(box: Box) -> Iterator[Finding]:
    if box.has("/sys/fs/cgroup/unified"):
        said = (
            "The old control groups are in use beside the new ones: the bounds of a cage cannot be seen, and "
            "address filters of units may do nothing (mycoswarmctl status --security shows whether)."
        )
    elif box.has("/sys/fs/cgroup/memory") or box.has("/sys/fs/cgroup/systemd"):
        said = "The old control groups are in use: address filters of units silently do nothing here."
    else:
        return
    # What asks for them has to go: the boot loader's own words may stand behind what is added.
    words = (box.read("/proc/cmdline") or "").split()
    asking = [word for word in words if _OLD_GROUPS.fullmatch(word)]
    fix = box.kernel_argument("systemd.unified_cgroup_hierarchy=1")
    yield _weak("cgroups", said, box.without_kernel_arguments(*asking) if asking else fix)


def landlock(box: Box) -> Iterator[Finding]:
    """Landlock, the second wall around files."""
    active = [
        name.strip() for name in (box.read("/sys/kernel/security/lsm") or "").split(",") if name.strip()
    ]
    abi = box.landlock_abi
    if abi is None and not active:
        return
    if abi or (abi is None and "landlock" in active):
        yield _ok("landlock", f"Landlock is on{f', ABI {abi}' if abi else ''}.")
        return
    others = ",".join(name for name in active if name not in {"capability", "landlock"})
    yield _weak(
        "landlock",
        "Landlock is off: agents can run no programs, and a cage has one wall less.",
        box.kernel_argument(f"lsm=landlock{',' + others if others else ''}"),
    )


def namespaces(box: Box, *, has_units: bool) -> Iterator[Finding]:
    """User namespaces: systemd's cages need that there are any, bubblewrap's that anybody may make them."""
    most = (box.read("/proc/sys/user/max_user_namespaces") or "").strip()
    if most == "0":
        yield Finding(
            name="user namespaces",
            severity=Severity.BROKEN if has_units else Severity.WEAK,
            detail="User namespaces are turned off, so no cage can be built: tasks will be refused.",
            fix=_sysctl("user.max_user_namespaces", "15000"),
        )
        return
    if (box.read("/proc/sys/kernel/unprivileged_userns_clone") or "").strip() == "0":
        refusal, fix = "User namespaces are for root only", _sysctl("kernel.unprivileged_userns_clone", "1")
    elif (
        box.read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") or ""
    ).strip() == "1" and not box.has("/etc/apparmor.d/mycoswarm-bwrap"):
        refusal, fix = "AppArmor keeps user namespaces from ordinary programs", _APPARMOR_FIX
        if box.has("/etc/apparmor.d/bwrap-userns-restrict"):
            profile = "/etc/apparmor.d/bwrap-userns-restrict"
            off = f"sudo ln -sf {profile} /etc/apparmor.d/disable/ && sudo apparmor_parser -R {profile}"
            fix = f"{off} && {fix}"
    else:
        if most:
            yield _ok("user namespaces", "Anybody may make user namespaces.")
        return
    if has_units:
        yield _ok("user namespaces", f"{refusal}; systemd builds the cages here and needs no more.")
    else:
        yield _weak(
            "user namespaces", f"{refusal}: bubblewrap cannot build a cage, and tasks will be refused.", fix
        )


def gpus(box: Box) -> Iterator[Finding]:
    """Graphics cards that compute, and their drivers."""
    base = "/sys/bus/pci/devices"
    for name in box.names(base):
        kind = (box.read(f"{base}/{name}/class") or "").strip()
        vendor = (box.read(f"{base}/{name}/vendor") or "").strip()
        if not kind.startswith(("0x0300", "0x0302", "0x0380", "0x1200")) or vendor not in {_NVIDIA, _AMD}:
            continue
        driver = (box.link(f"{base}/{name}/driver") or "").rpartition("/")[2]
        if vendor == _NVIDIA:
            yield _nvidia(box, name, driver)
        elif driver != "amdgpu":
            yield _note(
                f"gpu {name}", "An AMD graphics card has no driver that computes.", "sudo modprobe amdgpu"
            )
        else:
            yield _ok(f"gpu {name}", "An AMD graphics card has its driver.")


def _nvidia(box: Box, name: str, driver: str) -> Finding:
    if driver == "nvidia":
        return _ok(f"gpu {name}", "An NVIDIA graphics card has its driver.")
    if driver == "vfio-pci":
        return _ok(f"gpu {name}", "An NVIDIA graphics card is lent to a virtual machine.")
    install = "sudo ubuntu-drivers install" if box.is_ubuntu() else "sudo apt install nvidia-driver"
    release = (box.read("/proc/sys/kernel/osrelease") or "").strip()
    built = f"/lib/modules/{release}/updates/dkms"
    if release and any(file.startswith("nvidia.ko") for file in box.names(built)):
        return _weak(
            f"gpu {name}",
            "An NVIDIA graphics card has a driver that is not loaded; Secure Boot may refuse it.",
            "sudo modprobe nvidia",
        )
    used = f"only {driver}" if driver else "no driver"
    return _weak(f"gpu {name}", f"An NVIDIA graphics card has {used}: no engine can use it.", install)


def sleep(box: Box) -> Iterator[Finding]:
    """A machine that sleeps answers nobody."""
    supplies = [name for name in box.names("/sys/class/power_supply") if name.startswith("BAT")]
    kind = (box.read("/sys/class/dmi/id/chassis_type") or "").strip()
    if not supplies and kind not in _PORTABLE:
        return
    if all(box.link(f"/etc/systemd/system/{name}.target") == "/dev/null" for name in ("sleep", "suspend")):
        yield _ok("sleep", "This laptop never sleeps.")
        return
    files = [
        f"{place}/logind.conf.d/{name}"
        for place in ("/usr/lib/systemd", "/etc/systemd")
        for name in box.names(f"{place}/logind.conf.d")
        if name.endswith(".conf")
    ]
    said = box.settings("/etc/systemd/logind.conf", *files)
    lid = said.get("HandleLidSwitchExternalPower") or said.get("HandleLidSwitch") or "suspend"
    if lid in {"ignore", "lock"}:
        yield _ok("sleep", "This laptop stays awake with its lid closed while it is plugged in.")
        return
    text = "[Login]\\nHandleLidSwitchExternalPower=ignore\\n"
    yield _note(
        "sleep",
        f"This laptop goes to {lid} when its lid is closed: asleep, it answers nobody and its tasks wait.",
        "sudo mkdir -p /etc/systemd/logind.conf.d "
        f"&& printf '{text}' | sudo tee /etc/systemd/logind.conf.d/mycoswarm.conf "
        "&& sudo systemctl kill -s HUP systemd-logind",
    )


def _sysctl(key: str, value: str) -> str:
    file = f"/etc/sysctl.d/60-mycoswarm-{key.partition('.')[0]}.conf"
    return f"echo '{key}={value}' | sudo tee {file} && sudo sysctl --system"


def _ok(name: str, detail: str) -> Finding:
    return Finding(name=name, severity=Severity.OK, detail=detail)


def _note(name: str, detail: str, fix: str) -> Finding:
    return Finding(name=name, severity=Severity.NOTE, detail=detail, fix=fix)


def _weak(name: str, detail: str, fix: str) -> Finding:
    return Finding(name=name, severity=Severity.WEAK, detail=detail, fix=fix)
