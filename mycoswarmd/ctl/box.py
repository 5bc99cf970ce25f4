"""A machine as `doctor` looks at it: files under a root, and the few things that only a running kernel says.

Law: nothing here changes anything. What cannot be read is None, never an error and never a finding: most
of it is root's to read, and a finding that is a guess sends people to mend what is whole.
Programs are asked by fixed paths, with a time limit, and only for lists.
"""

import ctypes
import enum
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_MAX_BYTES = 1 << 20
_PROGRAM_S = 10.0
# landlock_create_ruleset has this number on every architecture; with flag 1 it only says its ABI.
_LANDLOCK_CREATE_RULESET = 444


class Severity(enum.Enum):
    """How much a finding matters, in rising order."""

    OK = "ok"
    NOTE = "note"
    WEAK = "weak"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at: a sentence about it, and the command that mends it."""

    name: str
    severity: Severity
    detail: str
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Room on the disk under a directory."""

    free_bytes: int
    total_bytes: int
    free_inodes: int | None
    is_read_only: bool


def _space(path: Path) -> Space | None:
    try:
        stat = os.statvfs(path)
    except OSError:
        return None
    return Space(
        free_bytes=stat.f_bavail * stat.f_frsize,
        total_bytes=stat.f_blocks * stat.f_frsize,
        free_inodes=stat.f_favail if stat.f_files else None,  # btrfs counts none
        is_read_only=bool(stat.f_flag & os.ST_RDONLY),
    )


def _nobody(_: Sequence[str]) -> str | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A machine.

    Attributes:
        root: where its files are: `/`, or where its disk is mounted.
        is_running: it is this very machine; otherwise only what is on its disk is looked at.
        now_s: what its clock says, in seconds since 1970; None on a disk.
        landlock_abi: the kernel's answer, 0 where it has none; None where it cannot be asked.
        ask: runs a program and returns what it prints, None when there is no such answer.
        space: measures the disk under a directory.
    """

    root: Path
    is_running: bool
    now_s: float | None = None
    landlock_abi: int | None = None
    ask: Callable[[Sequence[str]], str | None] = _nobody
    space: Callable[[Path], Space | None] = _space

    def at(self, path: str | Path) -> Path:
        """Return where an absolute path of the machine is."""
        return self.root / str(path).lstrip("/")

    def read(self, path: str | Path) -> str | None:
        """Return a file's text, at most 1 MiB; None when it is not there or not to be read."""
        try:
            fd = os.open(self.at(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            with os.fdopen(fd, "rb") as file:
                return file.read(_MAX_BYTES).decode("utf-8", "replace")
        except OSError:
            return None

    def has(self, path: str | Path) -> bool:
        """Tell whether a path is there, without following a link at its end."""
        try:
            return self.at(path).is_symlink() or self.at(path).exists()
        except OSError:  # a directory on the way is forbidden
            return False

    def names(self, path: str | Path) -> list[str]:
        """Return the names in a directory, sorted; none when it is not to be read."""
        try:
            return sorted(one.name for one in self.at(path).iterdir())
        except OSError:
            return []

    def link(self, path: str | Path) -> str | None:
        """Return what a symbolic link says."""
        try:
            return str(self.at(path).readlink())
        except OSError:
            return None

    def settings(self, *paths: str) -> dict[str, str]:
        """Return KEY=VALUE lines of files, the last one winning; sections and comments do not count."""
        found: dict[str, str] = {}
        for path in paths:
            for row in re.findall(
                r"^[ \t]*([A-Za-z_]+)[ \t]*=[ \t]*(.*?)[ \t]*$", self.read(path) or "", re.MULTILINE
            ):
                found[row[0]] = row[1].strip("\"'")
        return found

    def is_pi(self) -> bool:
        """Tell whether this is a Raspberry Pi, by its model or its boot files."""
        return "Raspberry Pi" in (self.read("/proc/device-tree/model") or "") or bool(self.pi_cmdline())

    def pi_cmdline(self) -> str | None:
        """Return the file with a Pi's kernel arguments."""
        places = ("/boot/firmware/cmdline.txt", "/boot/cmdline.txt")
        # Raspberry Pi OS leaves a file at the old place that only says where the new one is.
        return next((place for place in places if "root=" in (self.read(place) or "")), None)

    def is_ubuntu(self) -> bool:
        """Tell whether the distribution is Ubuntu."""
        return self.settings("/etc/os-release").get("ID") == "ubuntu"

    def kernel_argument(self, argument: str) -> str:
        """Return the command that adds an argument to the kernel's command line for the next start."""
        if place := self.pi_cmdline():
            edit = f"sudo sed -i '1s/$/ {argument}/' {self.at(place) if not self.is_running else place}"
            return f"{edit} && sudo reboot" if self.is_running else edit
        if self.has("/etc/default/grub"):
            file = f"/etc/default/grub.d/mycoswarm-{re.split('[=.]', argument)[0]}.cfg"
            line = f'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX {argument}"'
            return (
                f"sudo mkdir -p /etc/default/grub.d && echo '{line}' | sudo tee {file} && sudo update-grub "
                "&& sudo reboot"
            )
        return f"add {argument} to the kernel's command line in the boot loader, and restart"

    def without_kernel_arguments(self, *arguments: str) -> str:
        """Return the command that takes arguments out of the kernel's command line for the next start."""
        directory = "/etc/default/grub.d"
        files = [*(f"{directory}/{name}" for name in self.names(directory) if name.endswith(".cfg"))]
        grub = [path for path in ("/etc/default/grub", *files) if self._names_any(path, arguments)]
        place = self.pi_cmdline()
        edited = [place] if place and self._names_any(place, arguments) else grub
        if not edited:
            return (
                f"take {' '.join(arguments)} out of the kernel's command line in the boot loader, and restart"
            )
        words = "|".join(re.escape(argument) for argument in arguments)
        edit = f"sudo sed -i -E 's/ ?({words})//g' {' '.join(edited)}"
        return f"{edit} && {'' if place in edited else 'sudo update-grub && '}sudo reboot"

    def _names_any(self, path: str, arguments: Iterable[str]) -> bool:
        text = self.read(path) or ""
        return any(argument in text for argument in arguments)


def this_box() -> Box:
    """Return the machine that this runs on."""
    return Box(root=Path("/"), is_running=True, now_s=time.time(), landlock_abi=_landlock(), ask=_ask)


def disk_box(root: Path) -> Box:
    """Return a machine of which only the disk is here, mounted at `root`."""
    return Box(root=root, is_running=False)


def _landlock() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    return max(0, int(libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))))


def _ask(command: Sequence[str]) -> str | None:
    if not Path(command[0]).exists():
        return None
    try:
        done = subprocess.run(  # noqa: S603 - a fixed path, see the callers
            [*command],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROGRAM_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
