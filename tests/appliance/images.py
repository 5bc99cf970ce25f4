"""Debian images for the appliance's machines: built once, kept by a hash of what is in them.

An image is a plain directory that machines only read (each has its own layer above it). It holds what the
package depends on, so that `apt install ./mycoswarmd_*.deb` needs no network on the machine. Law: an image
that was not finished is never used, and two builds of the same image never meet.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path

CACHE = Path("/var/tmp/mycoswarm-appliance")
SUITES = ("trixie", "bookworm")
BUILD_S = 420
IDLE_S = 3 * 3600  # an image that no session took for so long is below no machine
# The system, then the package's own dependencies, then what the tests themselves run on a machine.
PACKAGES = (
    "systemd",
    "systemd-sysv",
    "dbus",
    "iproute2",
    "procps",
    "python3",
    "bubblewrap",
    "git",
    "libgomp1",
    "python3-aiohttp",
    "python3-cryptography",
    "python3-psutil",
    "python3-rich",
    "python3-sdnotify",
    "python3-tomlkit",
    "python3-typer",
    "python3-zeroconf",
    "python3-venv",  # for a node without the package: pipx and `mycoswarmctl service install`
)
USERS = ("alice", "bob")
# No unit may wait for a network or a module that a machine here does not have; nothing looks for updates.
MASKED = (
    "systemd-networkd.service",
    "systemd-networkd.socket",
    "systemd-networkd-wait-online.service",
    "systemd-modules-load.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
    "getty.target",
    "console-getty.service",
)
# Manual pages and translations are a third of the time and are read by no test.
EXCLUDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
_LAYOUT = 4  # raise when _finish changes what is in an image


def image(suite: str, *, cache: Path = CACHE) -> Path:
    """Return the root directory of this suite's image; build it when there is none yet."""
    assert suite in SUITES, suite
    recipe = repr((_LAYOUT, suite, PACKAGES, USERS, MASKED, EXCLUDED))
    home = cache / f"{suite}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (cache / f"{suite}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not home.exists():
            _build(suite, home, cache)
        os.utime(home)
    return home / "root"


def _build(suite: str, home: Path, cache: Path) -> None:
    building = cache / f"{suite}.building"
    shutil.rmtree(building, ignore_errors=True)
    for old in cache.glob(f"{suite}-*"):
        if time.time() - old.stat().st_mtime > IDLE_S:
            shutil.rmtree(old)
    building.mkdir()
    options = [f"--dpkgopt=path-exclude={pattern}" for pattern in EXCLUDED]
    command = [
        "mmdebstrap",
        "--mode=root",
        "--variant=minbase",
        "--dpkgopt=force-unsafe-io",
        *options,
        f"--include={','.join(PACKAGES)}",
        suite,
        str(building / "root"),
        mirror(),
    ]
    log = cache / f"{suite}.log"
    with log.open("wb") as out:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, timeout=BUILD_S
        )
    assert done.returncode == 0, f"cannot build the {suite} image:\n" + log.read_text()[-3000:]
    _finish(building / "root")
    building.rename(home)


def _finish(root: Path) -> None:
    """Make the image a machine of this lab: masked units, users, a journal that survives."""
    units = root / "etc/systemd/system"
    for name in MASKED:
        (units / name).unlink(missing_ok=True)
        (units / name).symlink_to("/dev/null")
    for user in USERS:
        subprocess.run(["chroot", str(root), "useradd", "--create-home", user], check=True)
    (root / "var/log/journal").mkdir(exist_ok=True)
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    (root / "usr/sbin/policy-rc.d").unlink(missing_ok=True)
    (root / "etc/hostname").unlink(missing_ok=True)  # each machine is told its own
    (root / "etc/machine-id").write_text("")  # own id, but not a "first boot" that presets every unit
    (root / "etc/apt/sources.list").write_text("")  # whatever apt installs here comes as a file


def mirror() -> str:
    """Return the mirror that this machine itself uses."""
    for path in (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list")):
        if not path.exists():
            continue
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["URIs:"], ["deb"]):
                for word in words[1:]:
                    if word.startswith("http"):
                        return word
    return "http://deb.debian.org/debian"
