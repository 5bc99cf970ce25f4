"""Real Debian machines for tests: each with a kernel of its own, in qemu.

The machines of machines.py share the kernel that the tests run on. What belongs to the kernel is shown here:
limits of memory, processes and processor time, command lines that switch things off, a clock without a
battery, and the loss of power below the file system.

A machine is one of the images of images.py with Debian's own kernel (the one for virtual machines: it needs
no initial file system), on an ext4 disk, with no network card unless it is asked for. There is no udev.
Its root shell is a program on a serial port (virtual_agent.py).

It is emulated where the processor does not help (/dev/kvm) or MYCOSWARM_TEST_ACCEL=tcg says so: about ten
times slower, and every patience here is that much longer (`patience`).

Laws: as of machines.py. A machine is in its session's control group, so that the session's janitor ends it;
its disk has no name, so that it goes with whoever has it open.
"""

import base64
import fcntl
import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.appliance import machines
from tests.appliance.images import BUILD_S, CACHE, image, mirror
from tests.appliance.machines import CommandFailed, Lab, Ran, Shell

PROGRAMS = ("qemu-system-x86_64", "mke2fs")
MACHINE = "x86_64"
BOOT_S = 60.0
DISK_BYTES = 4 << 30
MEMORY_MIB = 2048
EMULATED = 8.0  # how much longer things may take on a machine that is emulated
_ACCELERATOR = os.environ.get("MYCOSWARM_TEST_ACCEL", "kvm")
# Not passed on by every KVM; emulated wrongly (qemu 7.2), which Linux 6.12 is the first to notice.
_PROCESSOR = "max,arch-capabilities=off,cx16=off"
_PORT = "/dev/vport0p1"
_AGENT = "usr/lib/lab/agent.py"
# It is there before anything that tests break, is killed last, and what it starts is not bounded by it.
_UNIT = f"""[Unit]
Description=root shell of the tests
DefaultDependencies=no

[Service]
ExecStartPre=/sbin/modprobe -a virtio_pci virtio_console virtio_net
ExecStart=/usr/bin/python3 -I /{_AGENT} {_PORT}
OOMScoreAdjust=-1000
TasksMax=infinity
KillMode=process
IgnoreSIGPIPE=no
"""
_LAYOUT = 1  # raise when `_arrange` changes what is in a layer


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel of Debian: the file that boots, and a layer with its modules and the root shell."""

    file: Path
    layer: Path


def kernel(suite: str, *, cache: Path = CACHE) -> Kernel:
    """Return the kernel of a release; fetch it when there is none yet."""
    agent = Path(__file__).with_name("virtual_agent.py").read_bytes()
    recipe = repr((_LAYOUT, suite, _UNIT, agent))
    home = cache / f"kernel-{suite}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (cache / f"kernel-{suite}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not home.exists():
            _fetch(suite, home, cache, agent)
    return Kernel(home / "vmlinuz", home / "layer")


def _fetch(suite: str, home: Path, cache: Path, agent: bytes) -> None:
    building = cache / f"kernel-{suite}.building"
    shutil.rmtree(building, ignore_errors=True)
    for old in cache.glob(f"kernel-{suite}-*"):
        shutil.rmtree(old)
    building.mkdir()
    command = ["mmdebstrap", "--mode=root", "--variant=extract", "--include=linux-image-cloud-amd64,kmod"]
    done = subprocess.run(
        [*command, suite, str(building / "packages"), mirror()],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=BUILD_S,
    )
    assert done.returncode == 0, f"cannot fetch the kernel of {suite}:\n{done.stderr[-3000:]}"
    _arrange(building, agent, image(suite))
    building.rename(home)


def _arrange(building: Path, agent: bytes, root: Path) -> None:
    """Make a kernel's packages a file to boot and a layer for an image."""
    packages, layer = building / "packages", building / "layer"
    shutil.copy(next(packages.glob("boot/vmlinuz-*")), building / "vmlinuz")
    modules = next(
        path for path in packages.glob("**/modules") if path.is_dir() and path.parent.name == "lib"
    )
    shutil.copytree(modules, layer / "usr/lib/modules", symlinks=True)
    for name in ("bin", "sbin"):
        (layer / "usr" / name).mkdir()
    shutil.copy(next(packages.glob("**/bin/kmod")), layer / "usr/bin/kmod")
    for name in ("modprobe", "depmod", "insmod", "lsmod"):
        (layer / "usr/sbin" / name).symlink_to("../bin/kmod")
    version = next((layer / "usr/lib/modules").iterdir()).name
    # The image's own programs read the layer's modules: neither needs anything of this machine.
    script = f"""
        mkdir {building}/root
        mount -t overlay -o lowerdir={layer}:{root} overlay {building}/root
        mount --bind {layer}/usr/lib/modules {building}/root/usr/lib/modules
        chroot {building}/root depmod {version}
    """
    subprocess.run(["unshare", "--mount", "sh", "-euc", script], check=True)
    target = layer / _AGENT
    target.parent.mkdir(parents=True)
    target.write_bytes(agent)
    units = layer / "etc/systemd/system"
    (units / "sysinit.target.wants").mkdir(parents=True)
    (units / "lab-agent.service").write_text(_UNIT)
    (units / "sysinit.target.wants/lab-agent.service").symlink_to("../lab-agent.service")
    shutil.rmtree(packages)


class Disk:
    """A disk without a name: what has it open keeps it."""

    def __init__(self, home: Path) -> None:
        path = home / "disk"
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        path.unlink()
        os.ftruncate(self._fd, DISK_BYTES)
        self._home = home

    @property
    def path(self) -> str:
        """Where other programs find it."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    @classmethod
    def of(cls, home: Path, *layers: Path) -> "Disk":
        """Make a disk with what is in these directories, the topmost first."""
        made = cls(home)
        mount = f"mount -t overlay -o lowerdir={':'.join(map(str, layers))} overlay /mnt"
        script = f"{mount}; mke2fs -q -t ext4 -L root -d /mnt {made.path}"
        ran = subprocess.run(["unshare", "--mount", "sh", "-euc", script], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return made

    def copy(self) -> "Disk":
        """Return another with the same on it."""
        made = Disk(self._home)
        command = ["cp", "--sparse=always", "--reflink=auto", self.path, made.path]
        subprocess.run(command, check=True, capture_output=True)
        return made

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)


class Beside:
    """A command that runs on a machine beside the test, and what it has said so far."""

    def __init__(self) -> None:
        self._said = {"out": b"", "err": b""}
        self._code: int | None = None
        self._changed = threading.Condition()

    def take(self, message: Mapping[str, Any]) -> None:
        """Take what the machine says of the command."""
        with self._changed:
            if "to" in message:
                self._said[message["to"]] += base64.b64decode(message["data"])
            elif self._code is None:
                self._code = message["code"]
            self._changed.notify_all()

    @property
    def out(self) -> str:
        """What it has written to standard output, as far as it has arrived."""
        with self._changed:
            return self._said["out"].decode("utf-8", "replace")

    @property
    def is_over(self) -> bool:
        """Whether it has ended, as far as is known here."""
        with self._changed:
            return self._code is not None

    @property
    def err(self) -> str:
        """What it has written to standard error, as far as it has arrived."""
        with self._changed:
            return self._said["err"].decode("utf-8", "replace")

    def wait(self, within_s: float) -> int:
        """Wait for its end; return its exit code. -1: the machine is off."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._code is not None, within_s):
                raise TimeoutError
            assert self._code is not None
            return self._code

    def wait_said(self, text: str, within_s: float, *, times: int = 1) -> None:
        """Wait until it has written this to standard output, so often."""
        with self._changed:
            ok = self._changed.wait_for(lambda: self._said["out"].count(text.encode()) >= times, within_s)
        assert ok, self.out + self.err


class VirtualMachine(Shell):
    """One machine with a kernel of its own."""

    def __init__(self, lab: Lab, name: str, booted: Kernel, disk: Disk) -> None:
        self.name = name
        self.patience = 1.0
        self._lab = lab
        self._kernel = booted
        self._disk = disk
        self._home = lab.home / f"vm-{name}"
        self._home.mkdir(parents=True)
        self._boots = 0
        self._number = 0
        self._beside: dict[int, Beside] = {}
        self._asks = threading.Lock()
        self._socket: socket.socket | None = None
        self._listener: threading.Thread | None = None

    @property
    def _group(self) -> Path:
        return self._lab.cgroup2 / self._lab.prefix / f"vm-{self.name}.{self._boots}"

    @property
    def disk(self) -> Disk:
        """Its disk."""
        return self._disk

    def plug_in(self, *words: str, rtc: str = "utc", cable: tuple[str, ...] = ()) -> None:
        """Start to boot with these words on the kernel's command line; `wait_booted` waits.

        `rtc` is what the clock says that goes on while a machine is off; `cable` are qemu's words for a card.
        """
        assert self._socket is None, "is on already"
        self._boots += 1
        self._group.mkdir(parents=True)
        port = self._home / f"shell.{self._boots}"
        line = [
            "root=/dev/nvme0n1",
            "rootfstype=ext4",
            "console=ttyS0",
            "panic=-1",
            "mitigations=off",  # of a processor that is emulated: they cost, and there is nobody to spy
            "systemd.show_status=error",  # its animations are dear
            f"systemd.hostname={self.name}",
            *([] if "ro" in words else ["rw"]),
            *words,
        ]
        command = [
            *("qemu-system-x86_64", "-no-user-config", "-nodefaults", "-display", "none"),
            *("-machine", "q35", *_accelerators(), "-cpu", _PROCESSOR),
            *("-smp", "2", "-m", str(MEMORY_MIB), "-rtc", f"base={rtc}", "-no-reboot"),
            *("-kernel", str(self._kernel.file), "-append", " ".join(line)),
            # Nothing is acknowledged to the machine that this machine's own kernel has not taken.
            *("-drive", f"file={self._disk.path},if=none,id=disk,format=raw,cache=writeback"),
            *("-device", "nvme,serial=lab,drive=disk"),
            *("-chardev", f"socket,id=shell,path={port},server=on,wait=off"),
            *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=shell,name=shell"),
            *("-serial", f"file:{self._home}/console.{self._boots}"),
            *(cable or ("-nic", "none")),
            "-daemonize",
        ]
        # It belongs to its control group, not to who plugged it in.
        script = f'echo $$ >{self._group}/cgroup.procs; exec "$@"'
        done = subprocess.run(["sh", "-euc", script, "sh", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self._beside = {0: Beside()}
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(port))
        self._listener = threading.Thread(target=self._listen, args=(self._socket, self._beside), daemon=True)
        self._listener.start()

    def wait_shell(self) -> None:
        """Wait until it answers, whatever has started by then, and learn how fast it is."""
        try:
            assert self._beside[0].wait(BOOT_S * EMULATED) == 0
        except (TimeoutError, AssertionError):
            raise CommandFailed(f"{self.name} does not boot:\n{self.console()}") from None
        is_emulated = self.run("systemd-detect-virt", check=False).out.strip() == "qemu"
        self.patience = EMULATED if is_emulated else 1.0

    def wait_booted(self) -> str:
        """Wait until systemd has started everything; return `running` or `degraded`."""
        self.wait_shell()
        give_up_s = time.monotonic() + BOOT_S * self.patience
        while True:
            state = self.run("systemctl", "is-system-running", "--wait", check=False, timeout_s=BOOT_S)
            if state.out.strip() in {"running", "degraded"}:
                return state.out.strip()
            assert time.monotonic() < give_up_s, f"{self.name} does not boot: {state}\n{self.console()}"
            time.sleep(0.05)

    def pull_plug(self) -> None:
        """Take away the power: what its kernel had not yet written is lost."""
        machines.kill_group(self._group)
        if self._socket is not None:
            assert self._listener is not None
            self._listener.join()
            self._socket.close()
            self._socket = None

    def reboot(self, *words: str, rtc: str = "utc", cable: tuple[str, ...] = ()) -> None:
        """Have all written, pull the plug, boot with another command line, wait."""
        self.run("sync")
        self.pull_plug()
        self.plug_in(*words, rtc=rtc, cable=cable)
        self.wait_booted()

    def run(
        self,
        *argv: str,
        check: bool = True,
        stdin: str | bytes | None = None,
        timeout_s: float = machines.RUN_S,
        user: str | None = None,
    ) -> Ran:
        """Run a command in the machine, as root or as this user."""
        whole = (*(("runuser", "-u", user, "--") if user else ()), *argv)
        with self._started(whole, stdin) as beside:
            try:
                code = beside.wait(timeout_s * self.patience)
            except TimeoutError:
                raise subprocess.TimeoutExpired(argv, timeout_s * self.patience) from None
        ran = Ran(argv, code, beside.out, beside.err)
        if code == -1:
            raise CommandFailed(f"{self.name} is off: {ran}\n{self.console()}")
        if check and ran.code != 0:
            raise CommandFailed(f"on {self.name}: {ran}")
        return ran

    @contextmanager
    def start(self, *argv: str) -> Iterator[Beside]:
        """Run a command beside the test; it is killed when the context ends."""
        with self._started(argv, None) as beside:
            yield beside

    @contextmanager
    def _started(self, argv: tuple[str, ...], stdin: str | bytes | None) -> Iterator[Beside]:
        data = stdin.encode() if isinstance(stdin, str) else stdin or b""
        environment = dict(pair.split("=", 1) for pair in machines.ENVIRONMENT)
        beside = Beside()
        with self._asks:
            self._number += 1
            number = self._number
            self._beside[number] = beside
        request = {"id": number, "argv": argv, "stdin": base64.b64encode(data).decode()}
        self._ask({**request, "environment": environment})
        try:
            yield beside
        finally:
            if self._socket is not None and not beside.is_over:
                self._ask({"id": number, "kill": True})
            self._beside.pop(number, None)

    def _ask(self, request: Mapping[str, Any]) -> None:
        assert self._socket is not None, f"{self.name} is off"
        with self._asks:
            try:
                self._socket.sendall(json.dumps(request).encode() + b"\n")
            except BrokenPipeError:
                raise CommandFailed(f"{self.name} is off:\n{self.console()}") from None

    def _listen(self, near: socket.socket, beside: Mapping[int, Beside]) -> None:
        """Pass on what the machine says, until it is off."""
        with near.makefile("rb") as lines:
            try:
                for line in lines:
                    if line.endswith(b"\n"):
                        message = json.loads(line)
                        if (one := beside.get(message["id"])) is not None:
                            one.take(message)
            except ConnectionResetError:
                pass
        for one in list(beside.values()):
            one.take({"code": -1})

    def console(self) -> str:
        """Return the end of what the machine wrote to its console in this boot."""
        return (self._home / f"console.{self._boots}").read_text("utf-8", "replace")[-6000:]


def _accelerators() -> list[str]:
    """Return what may run it, in order; a KVM without the processor's help boots no kernel of Debian."""
    has_help = not {"vmx", "svm"}.isdisjoint(Path("/proc/cpuinfo").read_text().split())
    is_hard = _ACCELERATOR == "kvm" and has_help and os.access("/dev/kvm", os.R_OK | os.W_OK)
    # Not a thread for each processor: a kernel that changes its own code meanwhile may meet what it has just
    # changed (qemu 7.2: "Oops: int3", or it stands still), as it does for the first bound of processor time.
    return [*(("-accel", "kvm") if is_hard else ()), "-accel", "tcg,thread=single"]


def why_not() -> str | None:
    """Say why there can be no virtual machine here, if so."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"missing {' '.join(missing)}"
    return None if platform.machine() == MACHINE else f"there is no {MACHINE} here"
