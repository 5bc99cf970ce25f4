"""Real Debian machines for tests: systemd as PID 1, own kernel namespaces, one switch, no way out.

A machine is a systemd-nspawn container on an overlay over an image, in a cgroup2 subtree and a network
namespace of its own. Real there: units and their confinement, eBPF address filters, seccomp, namespaces,
DynamicUser, socket activation, Landlock, multicast, apt. Not real there: limits of controllers that the outer
machine keeps on cgroup v1 (`Lab.controllers` says which are there), a kernel of its own, power loss below the
file system.

Laws: every name carries the session's, so that sessions never meet; a janitor process takes everything down
when the session ends in whatever way; pulling a plug kills a machine at once and keeps its disk.
"""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.appliance.images import CACHE

PREFIX = "mycoapp-"
BOOT_S = 120.0
RUN_S = 120.0  # for a command; what hangs is found by it, and nothing else
SOON_S = 60.0  # for what happens at once on a machine that is not busy
# A default route leads here, to a host that keeps silent: the switch sees what a machine does not refuse.
GATEWAY = "10.77.0.254"
GATEWAY6 = "fd77::254"
OUTSIDE = "192.0.2.1"
_MARKER = "192.0.2.99"
_MARKER_PACKET = f"""
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"marker", ("{_MARKER}", 9))
"""
ENVIRONMENT = (
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG=C.UTF-8",
    "TERM=dumb",
    "SYSTEMD_PAGER=",
    "DEBIAN_FRONTEND=noninteractive",
)
# What systemd-nspawn's own filter forbids and a real machine's PID 1 may do.
_KERNEL_FILTER = ("bpf", "perf_event_open", "keyctl", "add_key", "request_key")
_LANDLOCK = ("landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self")


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command on a machine ended."""

    argv: tuple[str, ...]
    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"{' '.join(self.argv)} -> {self.code}\n{self.out}\n{self.err}"


class CommandFailed(AssertionError):
    """A command that had to succeed on a machine did not."""


@dataclass
class Captured:
    """The packets to the outside that left a machine."""

    lines: list[str] = field(default_factory=list)

    def to(self, address: str) -> list[str]:
        """Return the packets to this address."""
        return [line for line in self.lines if f"> {address}." in line or f"> {address}:" in line]


class Shell(ABC):
    """A root shell on a machine, whatever kind of machine it is."""

    name: str

    @abstractmethod
    def run(
        self,
        *argv: str,
        check: bool = True,
        stdin: str | bytes | None = None,
        timeout_s: float = RUN_S,
        user: str | None = None,
    ) -> Ran:
        """Run a command in the machine, as root or as this user."""

    def sh(
        self, script: str, *, check: bool = True, timeout_s: float = RUN_S, user: str | None = None
    ) -> Ran:
        """Run a shell script in the machine."""
        return self.run("sh", "-euc", script, check=check, timeout_s=timeout_s, user=user)

    def python(
        self, source: str, *, check: bool = True, timeout_s: float = RUN_S, user: str | None = None
    ) -> Ran:
        """Run Python source with the machine's own interpreter."""
        return self.run("python3", "-", stdin=source, check=check, timeout_s=timeout_s, user=user)

    def write(self, inside: str, text: str | bytes, *, mode: int = 0o644) -> None:
        """Write a file on the machine as root does; its directory is made."""
        data = text.encode() if isinstance(text, str) else text
        script = 'mkdir -p "$(dirname "$1")"; cat > "$1"; chmod "$2" "$1"'
        self.run("sh", "-euc", script, "sh", inside, f"{mode:o}", stdin=data)

    def push(self, source: Path, into: str) -> None:
        """Copy a file or a directory into a directory of the machine, owned by root there."""
        pack = [
            "tar",
            "-C",
            str(source.parent),
            "--owner=0",
            "--group=0",
            "--exclude=__pycache__",
            "-c",
            source.name,
        ]
        packed = subprocess.run(pack, check=True, capture_output=True).stdout
        self.run("sh", "-euc", 'mkdir -p "$1"; tar -C "$1" -x', "sh", into, stdin=packed)

    def listening(self) -> set[int]:
        """Return the TCP and UDP ports that anything listens on (ss may lack the kernel's help here)."""
        ports = set()
        for table, listens in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
            for line in self.run("cat", f"/proc/net/{table}").out.splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                if state == listens:
                    ports.add(int(local.rpartition(":")[2], 16))
        return ports

    def journal(self, *filters: str) -> str:
        """Return what the journal says, newest boot only, with all that was sent to it until now."""
        self.run("journalctl", "--sync", check=False)
        return self.run("journalctl", "--no-pager", "-b", "-o", "short-monotonic", *filters, check=False).out

    def wait_until(self, script: str, *, within_s: float = SOON_S) -> None:
        """Wait until a shell condition holds on the machine."""
        waiting = f"while ! {{ {script}; }} >/dev/null 2>&1; do sleep 0.1; done"
        try:
            self.run("sh", "-c", waiting, timeout_s=within_s)
        except subprocess.TimeoutExpired:
            why = self.run("sh", "-c", script, check=False)
            raise CommandFailed(f"on {self.name}: not within {within_s} s: {why}") from None


class Machine(Shell):
    """One machine: `run` is a root shell on it, `pull_plug` and `plug_in` are what they say."""

    def __init__(
        self,
        lab: "Lab",
        name: str,
        number: int,
        layers: tuple[Path, ...],
        *,
        hostname: str,
        can_bpf: bool,
        can_landlock: bool,
        is_read_only: bool,
    ) -> None:
        self.name = name
        self.hostname = hostname
        self.address = f"10.77.0.{number}"
        self._number = number
        self._lab = lab
        self._layers = layers
        self._is_read_only = is_read_only
        self._home = lab.home / name
        self._netns = f"{lab.prefix}-{name}"
        self._boots = 0
        self._leader = 0
        self._calls = [*(_KERNEL_FILTER if can_bpf else ()), *(_LANDLOCK if can_landlock else ())]

    def create(self) -> None:
        """Make the disk and the network card; the machine is off."""
        for part in ("disk", "work", "root"):
            (self._home / part).mkdir(parents=True)
        ns, switch, port = self._netns, self._lab.switch, f"port{self._number}"
        _ip("netns", "add", ns)
        _ip("-n", ns, "link", "add", "host0", "type", "veth", "peer", "name", port, "netns", switch)
        _ip("-n", switch, "link", "set", port, "master", "br0", "up")
        _ip("-n", ns, "link", "set", "lo", "up")
        self._configure_card()

    def _configure_card(self) -> None:
        ns = self._netns
        _ip("-n", ns, "link", "set", "host0", "up")
        _ip("-n", ns, "addr", "replace", f"{self.address}/24", "dev", "host0")
        _ip("-n", ns, "addr", "replace", f"fd77::{self._number}/64", "dev", "host0", "nodad")
        _ip("-n", ns, "route", "replace", "default", "via", GATEWAY)
        _ip("-n", ns, "-6", "route", "replace", "default", "via", GATEWAY6)

    def plug_in(self) -> None:
        """Start to boot; `wait_booted` waits."""
        assert not _is_populated(self._group), "is on already"
        self._boots += (
            1  # a cgroup that was killed once kills again (cgroup.kill counts): each boot has its own
        )
        groups = [root / self._lab.prefix / self._slot for root in self._lab.cgroup_roots]
        for group in groups:
            group.mkdir(parents=True, exist_ok=True)
        home = self._home
        overlay = f"lowerdir={':'.join(map(str, self._layers))},upperdir={home}/disk,workdir={home}/work"
        # In the background of a shell that ends: a machine belongs to its cgroup, not to who plugged it in.
        script = f"""
            set -e
            for group in {" ".join(map(str, groups))}; do echo $$ >$group/cgroup.procs; done
            mount -t overlay -o {overlay} overlay {home}/root
            systemd-nspawn "$@" </dev/null >>{home}/console.log 2>&1 &
        """
        nspawn = [
            "--quiet",
            "--register=no",
            "--keep-unit",
            "--settings=no",
            f"--directory={home}/root",
            f"--machine={self.name}",
            f"--hostname={self.hostname}",
            f"--network-namespace-path=/run/netns/{self._netns}",
            "--resolv-conf=off",
            "--link-journal=no",
            "--capability=all",
            *([f"--system-call-filter={' '.join(self._calls)}"] if self._calls else ()),
            "--console=read-only",
            *(["--volatile=state"] if self._is_read_only else ()),
            "--boot",
        ]
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script, "sh", *nspawn],
            capture_output=True,
            env={"PATH": os.defpath + ":/usr/sbin:/sbin", "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            start_new_session=True,
        )
        assert done.returncode == 0, done.stderr

    @property
    def _slot(self) -> str:
        return f"{self.name}.{self._boots}"

    @property
    def _group(self) -> Path:
        return self._lab.cgroup2 / self._lab.prefix / self._slot

    def wait_booted(self) -> str:
        """Wait until systemd has started everything; return `running` or `degraded`."""
        give_up_s = time.monotonic() + BOOT_S
        while not self._find_leader():
            assert time.monotonic() < give_up_s, f"{self.name} does not boot:\n{self.console()}"
            time.sleep(0.02)
        while True:
            state = self.run("systemctl", "is-system-running", "--wait", check=False, timeout_s=BOOT_S)
            if state.out.strip() in {"running", "degraded"}:
                return state.out.strip()
            assert time.monotonic() < give_up_s, f"{self.name} does not boot: {state}\n{self.console()}"
            time.sleep(0.05)

    def _find_leader(self) -> bool:
        """Find the machine's PID 1 (its number out here), once it listens."""
        try:
            pids = (self._group / "payload" / "init.scope" / "cgroup.procs").read_text().split()
        except OSError:
            return False
        if not pids or not Path(f"/proc/{pids[0]}/root/run/systemd/private").exists():
            return False
        self._leader = int(pids[0])
        return True

    def pull_plug(self) -> None:
        """Kill everything on the machine at once; its disk stays as it is."""
        kill_group(self._group)
        self._leader = 0

    def reboot(self) -> None:
        """Pull the plug, plug in again, wait."""
        self.pull_plug()
        self.plug_in()
        self.wait_booted()

    def cut(self) -> None:
        """Pull the network cable."""
        _ip("-n", self._lab.switch, "link", "set", f"port{self._number}", "down")

    def heal(self) -> None:
        """Put the network cable back."""
        _ip("-n", self._lab.switch, "link", "set", f"port{self._number}", "up")

    def run(
        self,
        *argv: str,
        check: bool = True,
        stdin: str | bytes | None = None,
        timeout_s: float = RUN_S,
        user: str | None = None,
    ) -> Ran:
        """Run a command in the machine, as root or as this user."""
        whole = [*self._enter(), *(("runuser", "-u", user, "--") if user else ()), *argv]
        data = stdin.encode() if isinstance(stdin, str) else stdin or b""
        with _process(
            whole, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            out, err = process.communicate(data, timeout=timeout_s)
        ran = Ran(argv, process.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))
        if check and ran.code != 0:
            raise CommandFailed(f"on {self.name}: {ran}")
        return ran

    @contextmanager
    def start(self, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a command beside the test; it is killed when the context ends."""
        with _process(
            [*self._enter(), *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:
            yield process

    def _enter(self) -> list[str]:
        assert self._leader, f"{self.name} is off"
        return ["nsenter", "--target", str(self._leader), "--all", "--", "env", "-i", *ENVIRONMENT]

    def path(self, inside: str) -> Path:
        """Return where a path of the running machine lies out here."""
        assert self._leader, f"{self.name} is off"
        return Path(f"/proc/{self._leader}/root/{inside.lstrip('/')}")

    def disk(self, inside: str) -> Path:
        """Return where the machine's own layer keeps a path, also while it is off."""
        return self._home / "disk" / inside.lstrip("/")

    def console(self) -> str:
        """Return the end of what the machine wrote to its console."""
        return (self._home / "console.log").read_text("utf-8", "replace")[-4000:]

    @contextmanager
    def captured(self) -> Iterator[Captured]:
        """Collect what the machine sends to the outside meanwhile, as the switch sees it.

        It ends with a packet that root sends unhindered: when the switch has seen that one, it has seen all
        before it, and it was able to see at all.
        """
        found = Captured()
        command = ["tcpdump", "-i", f"port{self._number}", "-n", "-l", "-t", "--immediate-mode"]
        command = ["ip", "netns", "exec", self._lab.switch, *command, "net 192.0.2.0/24 or net 2001:db8::/32"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as dump:
            assert dump.stdout is not None and dump.stderr is not None
            try:
                while "listening on" not in (line := dump.stderr.readline()):
                    assert line or dump.poll() is None, "tcpdump does not start"
                yield found
                self.python(_MARKER_PACKET)
                while f"> {_MARKER}." not in (line := dump.stdout.readline()):
                    assert line, "tcpdump has gone"
                    found.lines.append(line.strip())
            finally:
                dump.terminate()


class Lab:
    """The machines of one test session and the switch between them."""

    def __init__(self, session: str) -> None:
        self.prefix = PREFIX + session
        self.home = CACHE / "sessions" / session
        self.switch = f"{self.prefix}-sw"
        self.cgroup_roots = _cgroup_roots()
        self.cgroup2 = self.cgroup_roots[0]
        self.controllers = frozenset((self.cgroup2 / "cgroup.controllers").read_text().split()) & {
            "cpu",
            "memory",
            "pids",
        }
        self.machines: dict[str, Machine] = {}

    def open(self) -> None:
        """Make the switch."""
        self.home.mkdir(parents=True)
        if _is_overlay(self.home):  # an overlay cannot be the upper layer of another
            subprocess.run(["mount", "-t", "tmpfs", self.prefix, str(self.home)], check=True)
        for group in (self.cgroup2, self.cgroup2 / self.prefix):
            group.mkdir(exist_ok=True)
            for controller in self.controllers:
                (group / "cgroup.subtree_control").write_text(f"+{controller}")
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "set", "lo", "up")
        _ip("-n", self.switch, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        _ip("-n", self.switch, "addr", "add", f"{GATEWAY}/24", "dev", "br0")
        _ip("-n", self.switch, "addr", "add", f"{GATEWAY6}/64", "dev", "br0", "nodad")
        _ip("-n", self.switch, "link", "set", "br0", "up")

    def machine(
        self,
        name: str,
        *layers: Path,
        hostname: str | None = None,
        can_bpf: bool = True,
        can_landlock: bool = True,
        is_read_only: bool = False,
    ) -> Machine:
        """Make a machine with these directories below its disk, the topmost first, and start to boot it."""
        assert name not in self.machines, name
        number = len(self.machines) + 1
        made = Machine(
            self,
            name,
            number,
            layers,
            hostname=hostname or name,
            can_bpf=can_bpf,
            can_landlock=can_landlock,
            is_read_only=is_read_only,
        )
        made.create()
        made.plug_in()
        self.machines[name] = made
        return made


@contextmanager
def lab() -> Iterator[Lab]:
    """Give a lab while the context lasts; a janitor takes it down afterwards, whatever happens."""
    (CACHE / "sessions").mkdir(mode=0o700, parents=True, exist_ok=True)
    _sweep_orphans()
    session = f"{os.getpid():x}"
    held = (CACHE / "sessions" / f"{session}.lock").open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    read_fd, write_fd = os.pipe()
    janitor = subprocess.Popen(
        [sys.executable, "-c", "import sys; from tests.appliance.machines import main; main()", session],
        stdin=read_fd,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )
    os.close(read_fd)
    opened = Lab(session)
    try:
        opened.open()
        yield opened
    finally:
        os.close(write_fd)
        for machine in opened.machines.values():
            machine.pull_plug()
        janitor.wait(300)
        Path(held.name).unlink(missing_ok=True)  # another session may have seen it before it was held
        held.close()


def main() -> None:
    """Be the janitor: wait until whoever started this has gone, then sweep."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.buffer.read()
    sweep(sys.argv[1])


def sweep(session: str) -> None:
    """Take down everything that carries this session's name."""
    prefix = PREFIX + session
    roots = _cgroup_roots()
    kill_group(roots[0] / prefix)
    for root in roots:
        _remove_group(root / prefix)
    for name in sorted(path.name for path in Path("/run/netns").glob(f"{prefix}-*")):
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    home = CACHE / "sessions" / session
    if home.is_mount():
        subprocess.run(["umount", "--lazy", str(home)], capture_output=True)
    shutil.rmtree(home, ignore_errors=True)


def _sweep_orphans() -> None:
    """Take down sessions whose process has gone, should a janitor have been killed too."""
    for lock in CACHE.glob("sessions/*.lock"):
        with suppress(OSError), lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # whoever is alive holds it
            sweep(lock.stem)
            lock.unlink()


def _cgroup_roots() -> list[Path]:
    """Return where cgroup2 is, then systemd's named hierarchy where the outer machine is a hybrid one."""
    unified: list[Path] = []
    named: list[Path] = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = line.split(" - ", 1)
        kind, _, options = after.split(" ")[:3]
        if kind == "cgroup2":
            unified.append(Path(before.split(" ")[4]))
        elif kind == "cgroup" and "name=systemd" in options.split(","):
            named.append(Path(before.split(" ")[4]))
    assert unified, "no cgroup2 is mounted"
    return [*unified[:1], *named[:1]]


def kill_group(group: Path) -> None:
    """Kill every process of a cgroup2 subtree and wait until they are gone."""
    give_up_s = time.monotonic() + SOON_S
    while _is_populated(group):
        with suppress(FileNotFoundError):
            (group / "cgroup.kill").write_text("1")
        assert time.monotonic() < give_up_s, f"{group} does not die"
        time.sleep(0.02)


def _is_populated(group: Path) -> bool:
    try:
        return "populated 1" in (group / "cgroup.events").read_text()
    except OSError as exc:
        if exc.errno in {errno.ENOENT, errno.ENODEV}:  # not there, or removed meanwhile
            return False
        raise


def _remove_group(group: Path) -> None:
    for path, _, _ in os.walk(group, topdown=False):
        try:
            Path(path).rmdir()
        except OSError:  # a process of it is still being reaped
            time.sleep(0.2)
            subprocess.run(["rmdir", path], capture_output=True)


@contextmanager
def _process(argv: list[str], **pipes: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command with all that it starts; what is left is killed (nsenter alone would leave its child)."""
    with subprocess.Popen(argv, start_new_session=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def _is_overlay(path: Path) -> bool:
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=True)
    return kind.stdout.strip() == "overlayfs"


def _ip(*argv: str) -> None:
    done = subprocess.run(["ip", *argv], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(argv)}: {done.stderr}"
