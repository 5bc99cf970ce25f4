"""Each directive does something: what it forbids fails, and succeeds in the same unit without it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.appliance.images import SUITES
from tests.appliance.machines import Machine

UNITS = Path(__file__).parents[2] / "systemd"
# The cage has a suite of its own (test_cage.py).
SERVICES = {
    "core": "mycoswarmd.service",
    "lan": "mycoswarm-lan.service",
    "discovery": "mycoswarm-discovery@.service",
    "engine": "mycoswarm-engine@.service",
    "probe": "mycoswarm-probe@.service",
    "signer": "mycoswarm-signer@.service",
}
# How a unit starts, where it writes and who brings it back is of no concern to a probe.
_LEFT_OUT = {
    *("Type", "NotifyAccess", "ExecStart", "ExecReload", "Restart", "RestartSec", "WatchdogSec"),
    *("StandardInput", "StandardOutput", "StandardError", "TimeoutStartSec", "TimeoutStopSec"),
    *("OOMScoreAdjust", "DynamicUser", "RuntimeDirectory", "RuntimeDirectoryMode", "RuntimeMaxSec"),
}
# Without it there is no program.
_NEEDED = "BindReadOnlyPaths="
# By the names of directives: whether what each forbids could not be done. Run inside, one process for all.
_PROBE = r"""
import ctypes, errno, json, mmap, os, resource, socket, stat, struct, sys

libc = ctypes.CDLL(None, use_errno=True)
outside = json.load(open("/usr/lib/probe/outside.json"))
held = {}


def probe(name, works):
    try:
        held[name] = not works()
    except OSError:
        held[name] = True


def readonly(path):
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def calls(number, *words):
    # In a child: what the filter may do to the caller is death.
    pid = os.fork()
    if pid == 0:
        ctypes.set_errno(0)
        value = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(word) for word in words])
        os._exit(0 if value != -1 else ctypes.get_errno() or 1)
    status = os.waitpid(pid, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def suid():
    # A file in memory: most units have no place for another.
    os.fchmod(os.memfd_create("suid"), 0o4755)
    return True


same = lambda kind: os.readlink(f"/proc/self/ns/{kind}") == outside[kind]
status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\t" in line)
probe("PrivateNetwork", lambda: "host0" in open("/proc/self/net/dev").read())
probe("RestrictAddressFamilies", lambda: bool(socket.socket(socket.AF_VSOCK)))
probe("InaccessiblePaths", lambda: os.access("/dev/shm", os.W_OK))
probe("RootDirectory", lambda: bool(os.listdir("/var/lib/dpkg")))
probe("TemporaryFileSystem", lambda: not readonly("/run"))
probe("ProtectSystem", lambda: not readonly("/"))
probe("PrivateDevices", lambda: not os.statvfs("/dev").f_flag & os.ST_NOEXEC)
probe("PrivateUsers", lambda: same("user"))
probe("PrivateIPC", lambda: same("ipc"))
probe("ProtectHostname", lambda: same("uts"))
probe("CapabilityBoundingSet", lambda: int(status["CapBnd"], 16) != 0)
probe("RestrictNamespaces", lambda: calls(outside["unshare"], 0x10000000) == 0)
probe("RestrictSUIDSGID", suid)
probe("LockPersonality", lambda: calls(outside["personality"], 0x0040000) == 0)
everything = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
probe("MemoryDenyWriteExecute", lambda: bool(mmap.mmap(-1, 4096, prot=everything)))
probe("ProtectProc", lambda: os.path.exists("/proc/1"))
probe("ProcSubset", lambda: os.path.exists("/proc/cpuinfo"))
probe("ProtectKernelModules", lambda: bool(os.listdir("/usr/lib/modules")))
probe("ProtectControlGroups", lambda: not readonly("/sys/fs/cgroup"))
# An x32 call; a kernel without them says so, and the filter kills before the kernel is asked.
probe("SystemCallArchitectures", lambda: calls(0x40000000 + 39) >= 0)
# ioprio_set(IOPRIO_WHO_PROCESS, 0, best effort 4): harmless, and everybody may. io_uring_setup(1, NULL).
probe("SystemCallFilter", lambda: calls(251, 1, 0, 2 << 13 | 4) == 0 or calls(425, 1, 0) != errno.EPERM)
probe("SystemCallErrorNumber", lambda: calls(251, 1, 0, 2 << 13 | 4) < 0)
mask = os.umask(0o022)
probe("UMask", lambda: mask & 0o007 != 0o007)
probe("StateDirectory", lambda: not any(os.access(path, os.W_OK) for path in outside["states"]))
probe("User", lambda: os.getuid() == 0)
probe("LimitNOFILE", lambda: list(resource.getrlimit(resource.RLIMIT_NOFILE)) == outside["files"])
probe("LimitCORE", lambda: resource.getrlimit(resource.RLIMIT_CORE)[1] != 0)
probe("LimitFSIZE", lambda: resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY)
print("<3>a priority of its choice")
print("SAID " + json.dumps(held))
"""
# What the machine is like without confinement; the numbers are x86-64's.
_OUTSIDE = r"""
import json, os

facts = {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in ("user", "ipc", "uts")}
facts |= {"unshare": 272, "personality": 135, "states": ["/var/lib/mycoswarm", "/var/lib/mycoswarm-signer"]}
print(json.dumps(facts))
"""

pytestmark = pytest.mark.timeout(1200)


def directives(unit: str) -> list[str]:
    section, found = "", []
    file = SERVICES.get(unit, f"mycoswarm-{unit}@.service")
    for line in (UNITS / file).read_text().splitlines():
        if line.startswith("["):
            section = line
        elif section == "[Service]" and "=" in line and not line.startswith("#"):
            found.append(line)
    found = [line for line in found if line.partition("=")[0] not in _LEFT_OUT]
    # A user that ends with its unit brings half of the other directives along: none of them would be missed.
    return ["User=daemon" if line.startswith("User=") and "%i" in line else line for line in found]


def names(lines: list[str]) -> Iterator[str]:
    yield from dict.fromkeys(line.partition("=")[0] for line in lines if not line.startswith(_NEEDED))


@pytest.fixture(scope="module")
def machine(fresh: dict[str, tuple[Machine, str]]) -> Machine:
    machine, _ = fresh[SUITES[0]]
    machine.write("/usr/lib/probe/probe.py", _PROBE)
    machine.sh("mkdir -p /usr/lib/modules/some")
    machine.write("/usr/lib/probe/outside.json", "{}")
    facts = json.loads(machine.python(_OUTSIDE).out)
    command = ["systemd-run", "--quiet", "--pipe", "--wait", "python3", "-c"]
    files = machine.run(*command, "import resource; print(*resource.getrlimit(resource.RLIMIT_NOFILE))").out
    facts["files"] = [int(word) for word in files.split()]
    machine.write("/usr/lib/probe/outside.json", json.dumps(facts))
    return machine


def run_all(machine: Machine, unit: str, lines: list[str]) -> dict[str, dict[str, bool]]:
    """Run the probe in the unit as it is, by the name "", and without each directive in turn."""
    names_by_number = ["", *names(lines)]
    for number, without in enumerate(names_by_number):
        # As root it would take the directory of the others.
        gone = {without, "StateDirectory"} if without == "User" else {without}
        kept = [line for line in lines if line.partition("=")[0] not in gone]
        text = "\n".join(
            [
                "[Service]",
                *kept,
                "Type=oneshot",
                "ExecStart=/usr/bin/python3 -I /usr/lib/probe/probe.py",
                "StandardOutput=journal",
            ]
        )
        machine.write(f"/run/systemd/system/probe-{unit}-{number}.service", text + "\n")
    machine.run("systemctl", "daemon-reload")
    units = [f"probe-{unit}-{number}.service" for number in range(len(names_by_number))]
    machine.run("systemctl", "start", *units, check=False, timeout_s=600)
    machine.run("journalctl", "--sync")
    found = {}
    for number, without in enumerate(names_by_number):
        said = machine.run("journalctl", "-b", "-o", "cat", "-u", f"probe-{unit}-{number}").out
        assert "SAID " in said, (without, said[-2000:])
        found[without] = json.loads(said.rsplit("SAID ", 1)[1].splitlines()[0])
        # One that was obeyed is no longer in the line.
        found[without]["SyslogLevelPrefix"] = "<3>a priority" in said
    return found


@pytest.mark.parametrize("unit", SERVICES)
def test_without_a_directive_what_it_forbids_succeeds(machine: Machine, unit: str) -> None:
    lines = directives(unit)
    found = run_all(machine, unit, lines)
    probed = set(found[""]) & set(names(lines))
    assert {name for name in probed if not found[""][name]} == set()
    assert {name for name in probed if found[name][name]} == set()
    assert cited() & set(names(lines)) <= probed


def cited() -> set[str]:
    """Return the directives of which systemd/README.md says that they are probed here."""
    table = (UNITS / "README.md").read_text().split("### Services\n")[1].split("### ")[0]
    rows = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    found = {row[0].strip(" `").partition("=")[0] for row in rows if "directives" in row[3]}
    assert len(found) >= 25
    return found


_DISCOVERY = """
import json, socket, sys
if "confined" in sys.argv:
    from mycoswarmd.outposts.confine import confine
    confine()
said = {}
for name, kind, address in (
    ("loopback", socket.SOCK_STREAM, ("127.0.0.1", 2525)),
    ("lan", socket.SOCK_STREAM, (sys.argv[1], 2525)),
    ("resolver", socket.SOCK_DGRAM, ("127.0.0.1", 53)),
    ("mdns", socket.SOCK_DGRAM, ("224.0.0.251", 5353)),
):
    try:
        with socket.socket(type=kind) as sock:
            sock.settimeout(1)
            sock.connect(address)
            sock.send(b"x")
        said[name] = True
    except OSError:
        said[name] = False
print("SAID " + json.dumps(said))
"""


@pytest.mark.parametrize(
    ("extra", "argument", "reached"),
    [
        ("IPAddressAllow=127.0.0.1/32", "as it starts", {"loopback", "lan", "resolver", "mdns"}),
        ("", "as it starts", {"lan", "mdns"}),
        ("", "confined", {"mdns"}),
    ],
)
def test_discovery_speaks_multicast_and_nothing_else(
    machine: Machine, extra: str, argument: str, reached: set[str]
) -> None:
    lines = [*directives("discovery"), extra, "Type=oneshot", "StandardOutput=journal"]
    program = f"ExecStart=/usr/bin/python3 -I /usr/lib/probe/discovery.py {machine.address} {argument}"
    name = f"discovers-{len(reached)}.service"
    machine.write("/usr/lib/probe/discovery.py", _DISCOVERY)
    machine.write(f"/run/systemd/system/{name}", "\n".join(["[Service]", *lines, program, ""]))
    listener = "import socket, time; s = socket.create_server(('', 2525)); time.sleep(600)"
    with machine.start("python3", "-c", listener):
        machine.wait_until("grep -q 00000000:09DD /proc/net/tcp")
        machine.sh(f"systemctl daemon-reload; systemctl start {name}; journalctl --sync")
    said = machine.run("journalctl", "-b", "-o", "cat", "-u", name).out
    found = json.loads(said.rsplit("SAID ", 1)[1].splitlines()[0])
    assert {where for where, was_reached in found.items() if was_reached} == reached


# Where programs of a machine put sockets; each is open for everybody, and so is the way there.
_PLACES = (
    *(
        "/run",
        "/run/lock",
        "/tmp",
        "/var/tmp",
        "/dev/shm",
        "/home",
        "/root",
        "/srv",
        "/opt",
        "/mnt",
        "/media",
    ),
    *("/boot", "/var/lib", "/var/spool", "/var/cache", "/somewhere"),
)
_SERVERS = """
import os, socket, sys, time
held = []
for place in sys.argv[1:]:
    os.makedirs(f"{place}/of-others", exist_ok=True)
    os.chmod(f"{place}/of-others", 0o777)
    if place in {"/root", "/home"}:
        os.chmod(place, 0o755)
    for kind, name in ((socket.SOCK_STREAM, "stream"), (socket.SOCK_DGRAM, "packets")):
        for path in (f"{place}/of-others/{name}", f"\\0{place}/{name}"):
            door = socket.socket(socket.AF_UNIX, kind)
            door.bind(path)
            if kind == socket.SOCK_STREAM:
                door.listen(64)
            if path[0] == "/":
                os.chmod(path, 0o777)
            held.append(door)
print("all open", flush=True)
time.sleep(3600)
"""
_VISITOR = """
import json, os, socket, stat, sys
reached = []
def stream(path):
    with socket.socket(socket.AF_UNIX) as door:
        door.connect(path)
def packets(path):
    # Where AF_UNIX is forbidden a pair can still be had, and each half of it sends to whom it likes.
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other:
        one.sendto(b"MESSAGE=from one who was not given this door", path)
for place in sys.argv[1:]:
    for name, way in (("stream", stream), ("packets", packets)):
        for path in (f"{place}/of-others/{name}", "@" + f"{place}/{name}"):
            try:
                way(path.replace("@", "\\0"))
            except OSError:
                continue
            reached.append(path)
seen = []
for top, directories, files in os.walk("/"):
    directories[:] = [one for one in directories if os.path.join(top, one) not in {"/proc", "/sys", "/usr"}]
    for one in files:
        path = os.path.join(top, one)
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            seen.append(path)
print("SAID " + json.dumps([reached, seen]))
"""
_PROVER = """
import json, sys
from mycoswarmd.outposts.selftest import prove
from mycoswarmd.wire.proof import Unit
(found,) = [check for check in prove(Unit.CORE, given=sys.argv[1:]).checks if check.name == "doors"]
print("SAID " + json.dumps([found.ok, found.detail]))
"""
_GIVEN = {
    "core": {
        "/run/mycoswarm/api.sock",
        *(f"/run/mycoswarm-outposts/{name}.sock" for name in (*SERVICES, "task") if name != "core"),
        "/run/systemd/notify",
        "/run/systemd/journal/socket",
        # By systemd itself, from 257 on.
        "/run/systemd/journal/dev-log",
        "/run/systemd/journal/stdout",
    },
}
_WALLS = (
    "RootDirectory",
    "TemporaryFileSystem",
    "InaccessiblePaths",
    "PrivateTmp",
    "ProtectHome",
    "PrivateNetwork",
)


@pytest.fixture(scope="module", params=SUITES)
def crowded(fresh: dict[str, tuple[Machine, str]], request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A machine on which somebody listens everywhere, for everybody."""
    machine, _ = fresh[request.param]
    machine.write("/usr/lib/probe/servers.py", _SERVERS)
    machine.write("/usr/lib/probe/visitor.py", _VISITOR)
    machine.write("/usr/lib/probe/prover.py", _PROVER)
    with machine.start("python3", "/usr/lib/probe/servers.py", *_PLACES) as servers:
        assert servers.stdout is not None
        assert (said := servers.stdout.readline()) == b"all open\n", said
        yield machine
        machine.sh(f"rm -rf {' '.join(f'{place}/of-others' for place in _PLACES)}")


def say(machine: Machine, name: str, lines: list[str], program: str, *arguments: str) -> Any:
    """Run a program in such a unit and return what it says."""
    command = f"ExecStart=/usr/bin/python3 -I /usr/lib/probe/{program} {' '.join(arguments)}"
    text = ["[Service]", *lines, "Type=oneshot", "StandardOutput=journal", command, ""]
    machine.write(f"/run/systemd/system/visits-{name}.service", "\n".join(text))
    machine.sh(f"systemctl daemon-reload; systemctl start visits-{name}; journalctl --sync")
    said = machine.run("journalctl", "-b", "-o", "cat", "-u", f"visits-{name}").out
    return json.loads(said.rsplit("SAID ", 1)[1].splitlines()[0])


def visit(machine: Machine, name: str, lines: list[str]) -> tuple[set[str], set[str]]:
    """Have a program in such a unit knock everywhere; return what opened, and the sockets that it saw."""
    reached, seen = say(machine, name, lines, "visitor.py", *_PLACES)
    return set(reached), set(seen)


@pytest.mark.parametrize("unit", [*SERVICES, "task"])
def test_no_unit_reaches_a_socket_that_it_was_not_given(crowded: Machine, unit: str) -> None:
    lines = directives(unit)
    reached, seen = visit(crowded, unit, lines)
    # Where a unit has the machine's network, abstract sockets come with it; its program forbids what is left.
    reached -= {f"@{place}/packets" for place in _PLACES if unit in {"lan", "discovery"}}
    assert reached == set()
    assert seen <= _GIVEN.get(unit, set())
    assert unit != "core" or len(seen) >= 8


@pytest.mark.parametrize("unit", SERVICES)
def test_without_its_walls_a_unit_reaches_them_all(crowded: Machine, unit: str) -> None:
    lines = [line for line in directives(unit) if not line.startswith((*_WALLS, "BindReadOnlyPaths"))]
    reached, _ = visit(crowded, f"{unit}-open", lines)
    names = {"packets"} | ({"stream"} if "RestrictAddressFamilies=AF_UNIX" in lines else set())
    assert {f"{place}/of-others/{name}" for place in _PLACES for name in names} <= reached
    assert {f"@{place}/{name}" for place in _PLACES for name in names} <= reached


def test_the_self_test_tells_of_a_door_unless_the_settings_name_it(crowded: Machine) -> None:
    lines = directives("core")
    ok, detail = say(crowded, "proves", lines, "prover.py")
    assert (ok, detail.partition(" ")[2]) == (True, "in sight, all given")
    lines.append("BindReadOnlyPaths=/srv/of-others/stream")
    ok, detail = say(crowded, "proves-open", lines, "prover.py")
    assert (ok, detail) == (False, "/srv/of-others/stream is in sight")
    ok, _ = say(crowded, "proves-given", lines, "prover.py", "/srv/of-others/stream")
    assert ok is True
