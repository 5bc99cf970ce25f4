"""The cage that systemd builds, on booted machines: it proves itself, nothing gets out, nothing is left behind.

The escape suite is that of bubblewrap's cages (tests/integration/test_escape.py): each attempt succeeds on the
machine and fails in the cage. Then the unit loses one directive after the other, and a table says who notices.
Cages are opened as the node's own unit would: its user, its namespaces, its system call filter.
"""

import json
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.appliance.images import image
from tests.appliance.machines import Lab, Machine
from tests.integration.test_escape import CLOSED, IN_A_CAGE, IS_X86, NO, UNCONTROLLED, WITH_PYTHON

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "systemd"
SERVICE = (UNITS / "mycoswarm-task@.service").read_text()
SOCKET = (UNITS / "mycoswarm-task.socket").read_text()
PLACE = "/usr/local/lib/cage"
CODE = "/usr/libexec/mycoswarm/task"
# The same unit with an agent that does what a test says.
SCRIPTED = "mycoswarm-scripted"
SCRIPTED_SOCKET = f"/run/{SCRIPTED}.sock"
Facts = dict[str, Any]

BUILD = f"""
import sys
sys.path.insert(0, "{PLACE}")
from pathlib import Path
from mycoswarmd.sandbox.zipapp import PACKAGE, PARTS, build_agent, build_zip
Path("{CODE}").write_bytes(build_agent())
modules = {{"__main__.py": "from mycoswarmd.cage_agent import main\\n\\nmain()\\n"}}
for pattern in PARTS:
    for path in sorted(PACKAGE.glob(pattern)):
        modules[f"mycoswarmd/{{path.relative_to(PACKAGE).as_posix()}}"] = path.read_text()
modules["mycoswarmd/cage_agent.py"] = Path("{PLACE}/cage_agent.py").read_text()
Path("{CODE}.scripted").write_bytes(build_zip(modules))
"""
# What a unit of the node's has that a command does not: how it starts, stops and says that it is there.
_NOT_FOR_A_COMMAND = re.compile(
    r"(Type|NotifyAccess|Exec\w+|Restart\w*|Watchdog\w+|Timeout\w+|State\w+|SupplementaryGroups|Sockets)="
)


@dataclass
class Box:
    """A machine with the units of cages."""

    machine: Machine
    suite: str

    def add_unit(self, name: str, service: str, socket: str = SOCKET) -> None:
        """Write a socket and its service."""
        self.machine.write(f"/etc/systemd/system/{name}@.service", service)
        text = socket.replace("/run/mycoswarm-task.sock", f"/run/{name}.sock")
        self.machine.write(f"/etc/systemd/system/{name}.socket", text)

    def as_node(self, request: Facts, *, check: bool = True) -> Any:
        """Have the driver do something, confined as the node's own unit is."""
        command = ["systemd-run", "--quiet", "--pipe", "--wait", "--collect"]
        for line in (UNITS / "mycoswarmd.service").read_text().partition("[Service]")[2].splitlines():
            if line.startswith("["):
                break
            if line and not line.startswith("#") and not _NOT_FOR_A_COMMAND.match(line):
                command += ["-p", line]
        ran = self.machine.run(
            *command, "/usr/bin/python3", "-B", f"{PLACE}/cage_driver.py", stdin=json.dumps(request), check=check
        )
        return json.loads(ran.out.splitlines()[-1])

    def scripted(self, **request: Any) -> Any:
        """The same, with the scripted agent."""
        return self.as_node({"socket": SCRIPTED_SOCKET, **request})

    def processes_of(self, uid: int) -> str:
        """List the processes of a user."""
        return self.machine.sh(f"ps -o pid=,args= -U {uid} || true").out

    def instances(self, name: str = SCRIPTED) -> str:
        """List the units of cages that there are, failed ones included."""
        return self.machine.run("systemctl", "list-units", "--all", "--plain", "--no-legend", f"{name}@*").out


def scripted(service: str) -> str:
    """Return a unit with the scripted agent."""
    assert f"{CODE}:" in service
    return service.replace(f"{CODE}:", f"{CODE}.scripted:")


@pytest.fixture(scope="module", params=["trixie", "bookworm"])
def box(request: pytest.FixtureRequest, appliance_lab: Lab) -> Iterator[Box]:
    """A machine of each release with our package copied onto it."""
    machine = appliance_lab.machine(f"cage-{request.param}", image(request.param))
    machine.wait_booted()
    made = Box(machine, request.param)
    machine.push(ROOT / "mycoswarmd", "/usr/lib/python3/dist-packages/mycoswarmd")
    for path in ("appliance/cage_driver.py", "integration/escape_probes.py", "integration/cage_agent.py"):
        machine.write(f"{PLACE}/{Path(path).name}", (ROOT / "tests" / path).read_text())
    machine.write("/etc/sysusers.d/mycoswarm.conf", (UNITS / "sysusers.conf").read_text())
    machine.write("/etc/tmpfiles.d/cage.conf", (UNITS / "mycoswarm-task.tmpfiles.conf").read_text())
    machine.sh(f"systemd-sysusers; systemd-tmpfiles --create cage.conf; mkdir -p {Path(CODE).parent}")
    machine.python(BUILD)
    made.add_unit("mycoswarm-task", SERVICE)
    made.add_unit(SCRIPTED, scripted(SERVICE))
    machine.sh(f"systemctl daemon-reload; systemctl start mycoswarm-task.socket {SCRIPTED}.socket")
    yield made
    machine.pull_plug()


def test_a_cage_proves_itself_and_says_what_this_machine_lacks(box: Box, appliance_lab: Lab) -> None:
    found = box.as_node({"do": "prove"})
    assert "refused" not in found, found
    assert len(found["held"]) > 280
    assert {"own-group", "disk-quota", "unit:address-families", "unit:no-network", "sockets"} <= set(found["held"])
    bounds = {"cpu": "cpu-cgroup", "memory": "memory-cgroup", "pids": "pids-cgroup"}
    lacking = {bounds[name] for name in bounds if name not in appliance_lab.controllers}
    assert set(found["absent"]) == lacking
    assert found["level"] == found["can"] == ("reduced" if lacking else "full")
    smaller = box.as_node({"do": "prove", "limits": {"disk_bytes": 1 << 20}})
    assert set(smaller["absent"]) == lacking | {"disk-quota"}
    assert smaller["level"] == "reduced"
    # Bounds are read where PID 1 keeps them, so a unit that has lost one is found out where it is real.
    assert set(found["held"]) & set(bounds.values()) == set(bounds.values()) - lacking


def test_the_unit_is_understood_and_hardly_exposed(box: Box) -> None:
    verified = box.machine.run("systemd-analyze", "verify", "--man=no", "mycoswarm-task@1.service", check=False)
    assert verified.code == 0 and verified.err == "", verified
    said = box.machine.run("systemd-analyze", "security", "--no-pager", "mycoswarm-task@1.service").out
    level = re.search(r"exposure level for \S+: ([0-9.]+)", said)
    assert level and float(level[1]) <= 0.3, said


# --- the escape suite ----------------------------------------------------------------------------

IN_A_UNIT: dict[str, set[str]] = IN_A_CAGE | {
    "read-environ-of-others": CLOSED,
    "read-memory-of-others": CLOSED,
    "enter-namespace": CLOSED,
    "list-sysfs": CLOSED,
    "write-core-pattern": CLOSED,
    "open-terminal-maker": CLOSED,
    "open-shared-memory": CLOSED,
    # Beside the machine's processes, whose numbers can be guessed, instead of in a namespace of its own.
    "signal-outside": NO,
    # The unit keeps it from the code that would make the call.
    **({"call-as-i386": {"EPERM", "EACCES"}} if IS_X86 else {}),
}
# A little more than the unit's bounds, and than the limits of a task by default.
MANY = {"processes": 80, "half_disk": 130 << 20, "files": 131_200, "memory": 1100 << 20}

SERVERS = f"""
import json, os, socket, subprocess, sys
place = "/run/escape"
os.makedirs(place + "/workspace", exist_ok=True)
os.chmod(place, 0o755)
with open(place + "/secret", "w") as file:
    file.write("a secret")
os.chmod(place + "/secret", 0o644)
unix = {{kind: socket.socket(socket.AF_UNIX, getattr(socket, kind)) for kind in ("SOCK_STREAM", "SOCK_DGRAM")}}
for kind, server in unix.items():
    server.bind(f"{{place}}/{{kind}}")
    os.chmod(f"{{place}}/{{kind}}", 0o777)
abstract, tcp = socket.socket(socket.AF_UNIX), socket.socket()
abstract.bind("\\0mycoswarm-escape")
tcp.bind(("127.0.0.1", 0))
for server in (unix["SOCK_STREAM"], abstract, tcp):
    server.listen(64)
victim = subprocess.Popen(["/usr/bin/sleep", "600"])
from mycoswarmd.sandbox.host import read_host
host = read_host()
print(json.dumps({{
    "secret": place + "/secret", "unix_path": place + "/SOCK_STREAM", "datagram_path": place + "/SOCK_DGRAM",
    "unix_abstract": "\\0mycoswarm-escape", "tcp": list(tcp.getsockname()), "pid": victim.pid, "other": 1,
    "python": host.python, "loader": host.loader, "agent": "/agent/task", "workspace": "/workspace",
    "own_fds": [], "many": {MANY!r},
}}), flush=True)
victim.wait()
"""
CONTROL = f"""
import json, os, sys
sys.path.insert(0, "{PLACE}")
from escape_probes import run
leaked = os.pipe()
os.environ["ESCAPE_SECRET"] = "1"
names, facts = json.loads({{request!r}})
facts["workspace"], facts["agent"], facts["other"] = "/run/escape/workspace", "/run/escape/agent", facts["pid"]
open(facts["agent"], "w").close()
print(json.dumps(run(names, facts)))
"""


@pytest.fixture(scope="module")
def facts(box: Box) -> Iterator[Facts]:
    """What there is to escape to on the machine."""
    box.machine.write(f"{PLACE}/servers.py", SERVERS)
    with box.machine.start("python3", f"{PLACE}/servers.py") as servers:
        assert servers.stdout is not None
        line = servers.stdout.readline()
        assert line.startswith(b"{"), line + servers.stdout.read()
        yield json.loads(line)


def compare(found: dict[str, str], expected: dict[str, set[str]]) -> dict[str, str]:
    """Return the attempts that did not end as expected."""
    return {name: found[name] for name in expected if found[name] not in expected[name]}


# What a container of this kind does not give even to its root, so that there is nothing to take away.
NOT_ON_THESE_MACHINES = {"open-kernel-log"}


def test_each_attempt_succeeds_on_the_machine(box: Box, facts: Facts) -> None:
    names = [name for name in (*IN_A_UNIT, *WITH_PYTHON) if name not in NOT_ON_THESE_MACHINES]
    source = CONTROL.replace("{request!r}", repr(json.dumps([names, facts])))
    box.machine.write(f"{PLACE}/control.py", source)
    # What is mounted, named or made in the control is gone with its namespaces.
    ran = box.machine.sh(
        "unshare --mount --uts --ipc sh -euc 'mount -t tmpfs none /usr/local/share;"
        f" mount -t tmpfs none /usr/local/bin; exec python3 -B {PLACE}/control.py'"
    )
    assert compare(json.loads(ran.out.splitlines()[-1]), {name: {"OK"} for name in names}) == {}


def test_no_attempt_succeeds_in_the_cage(box: Box, facts: Facts) -> None:
    expected = IN_A_UNIT | UNCONTROLLED
    run = [list(expected), {**facts, "own_fds": [3, 4]}]
    found = box.scripted(do="probe", programs=[], through=[], run=run)
    assert compare(found, expected) == {}


@pytest.mark.parametrize("through", ["the agent", "the program"])
def test_no_attempt_succeeds_in_a_cage_with_an_interpreter(box: Box, facts: Facts, through: str) -> None:
    expected = IN_A_UNIT | UNCONTROLLED | WITH_PYTHON
    python = facts["python"]
    argv = [] if through == "the agent" else [python, "-I", "-S", "-c"]
    run = [list(expected), {**facts, "own_fds": [3, 4]}]
    found = box.scripted(do="probe", programs=[python], through=argv, run=run)
    assert compare(found, expected) == {}
