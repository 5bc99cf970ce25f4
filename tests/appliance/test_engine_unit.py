"""The engine as a unit on booted machines: PID 1 confines it, and it still answers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.appliance.conftest import Images
from tests.appliance.machines import Lab, Machine
from tests.appliance.nodes import ctl, ctl_json, wait_ready
from tests.integration.engines import MODEL, MODEL_FILE

HOME = "/var/lib/mycoswarm-engine"
pytestmark = [pytest.mark.integration, pytest.mark.engine, pytest.mark.timeout(1200)]
# What the unit says of itself, asked as the core may ask.
PROOF = """
import socket
with socket.socket(socket.AF_UNIX) as node:
    node.connect("/run/mycoswarm-outposts/engine.sock")
    with node.makefile("rb") as lines:
        print(lines.readline().decode())
"""
# What the engine's user may open, tried by a program in the place of the engine, in the engine's own unit.
PROBE = r"""#!/usr/bin/python3 -I
import errno, json, os, socket, sys
said = {}
def attempt(name, function):
    try:
        function()
        said[name] = "done"
    except OSError as exc:
        said[name] = errno.errorcode[exc.errno]
def udp(address):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", (address, 9))
def unix(path, kind=socket.SOCK_STREAM):
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.connect(path)
attempt("udp", lambda: udp("192.0.2.1"))
attempt("model", lambda: open("/var/lib/mycoswarm-engine/models/MODEL", "rb").close())
attempt("write-model", lambda: open("/var/lib/mycoswarm-engine/models/new.gguf", "wb").close())
attempt("write-engine", lambda: open("/var/lib/mycoswarm-engine/engine/new", "wb").close())
attempt("socket", lambda: socket.socket(socket.AF_UNIX).bind(sys.argv[1] + "/probe"))
attempt("state", lambda: open("/var/lib/mycoswarm/mycoswarm.db", "rb").close())
attempt("api", lambda: unix("/run/mycoswarm/api.sock"))
attempt("lan", lambda: unix("/run/mycoswarm-outposts/lan.sock", socket.SOCK_SEQPACKET))
attempt("task", lambda: unix("/run/mycoswarm-outposts/task.sock"))
attempt("bus", lambda: unix("/run/dbus/system_bus_socket"))
attempt("gpu", lambda: open("/dev/nvidiactl", "rb").close())
with socket.socket(fileno=0) as node:
    node.sendall(json.dumps(said).encode())
""".replace("MODEL", MODEL_FILE)

LOOSE = """
DynamicUser=no
User=root
RootDirectory=
RestrictSUIDSGID=no
PrivateNetwork=no
PrivateDevices=no
PrivateUsers=no
ProtectSystem=no
TemporaryFileSystem=
BindReadOnlyPaths=
InaccessiblePaths=
LimitFSIZE=infinity
RestrictAddressFamilies=
IPAddressDeny=
CapabilityBoundingSet=~
SystemCallFilter=
"""


def give_engine(machine: Machine, state: Path) -> None:
    """Put the embedded engine and a model where root's `engine install` puts them."""
    engine = next((state / "engine").glob("xllamacpp-*"))
    model = f"{HOME}/models/{MODEL_FILE}"
    machine.push(engine, f"{HOME}/engine")
    machine.push(state / "models" / MODEL_FILE, f"{HOME}/models")
    machine.sh(f"chmod -R go+rX,go-w {HOME}/engine; chmod 0640 {model}; chgrp _mycoswarm-engine {model}")


@pytest.fixture(scope="module", params=["trixie", "bookworm"])
def node(
    request: pytest.FixtureRequest, appliance_lab: Lab, images: Images, embedded_engine: Path
) -> Iterator[Machine]:
    """A machine with the package, the embedded engine and a model."""
    layers = images.node_trixie if request.param == "trixie" else images.node_bookworm
    machine = appliance_lab.machine(f"engine-{request.param}", *layers)
    machine.wait_booted()
    wait_ready(machine)
    give_engine(machine, embedded_engine)
    yield machine
    machine.pull_plug()


def engine_of(machine: Machine) -> dict[str, Any]:
    rows = ctl_json(machine, "status")["engines"]
    found: dict[str, Any] = next(row for row in rows if row["name"] == "embedded")
    return found


def wait_served(machine: Machine) -> None:
    machine.wait_until(f"mycoswarmctl models | grep -q {MODEL}", within_s=300)


def test_it_answers_and_is_started_again_and_has_proved_that_it_is_confined(node: Machine) -> None:
    wait_served(node)
    question = "What is the capital of France? Answer in one short sentence."
    answer = ctl(node, "ask", "--model", MODEL, "--max-tokens", "24", "--temperature", "0", question)
    assert "Paris" in answer.out
    engine = engine_of(node)
    assert "not confined" not in engine["detail"], engine
    pid = engine["pid"]
    status = node.run("cat", f"/proc/{pid}/status").out
    (uid,) = {*status.partition("Uid:\t")[2].splitlines()[0].split()}
    assert 61184 <= int(uid) <= 65519  # systemd's range for users that exist as long as a unit
    assert "mycoswarm-engine@" in node.run("cat", f"/proc/{pid}/cgroup").out
    node.run("kill", "-9", str(pid))
    node.wait_until("mycoswarmctl status --json | grep -Eq '\"restarts\": ?1'", within_s=120)
    assert ctl(node, "ask", "--model", MODEL, "--max-tokens", "4", "Hi").out
    second = engine_of(node)["pid"]
    assert second != pid
    # The node is killed, with whatever it was about to do: its engine is gone, and there is one again.
    node.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "mycoswarmd.service")
    node.wait_until(f"! test -e /proc/{second}")
    wait_ready(node)
    wait_served(node)
    units = "systemctl list-units --no-legend --state=running 'mycoswarm-engine@*'"
    node.wait_until(f"test $({units} | wc -l) = 1")


def test_each_check_of_its_proof_holds(node: Machine) -> None:
    proof = json.loads(node.python(PROOF).out)["proof"]
    assert proof["unit"] == "engine"
    weak = {check["name"]: check["detail"] for check in proof["checks"] if check["ok"] is not True}
    weak.pop("memory", None)  # the outer machine may keep that controller
    assert weak == {}
    assert len(proof["checks"]) > 7


def test_only_the_node_may_start_engines(node: Machine) -> None:
    denied = node.python(PROOF, user="daemon", check=False)
    assert "PermissionError" in denied.err
    assert "proof" in node.python(PROOF, user="_mycoswarm").out


def test_the_unit_reads_models_and_reaches_nothing_else(node: Machine) -> None:
    """The unit's own text, with a probe in the place of the program; then the same without confinement."""
    node.write("/usr/local/bin/probe", PROBE, mode=0o755)
    ask = PROOF.replace("lines.readline()", "lines.read()")
    drop_in = "[Service]\nExecStart=\nExecStart=/usr/local/bin/probe /run/mycoswarm-engine/%i\n"
    node.write("/etc/systemd/system/mycoswarm-engine@.service.d/probe.conf", drop_in)
    try:
        node.run("systemctl", "daemon-reload")
        confined = json.loads(node.python(ask).out)
        node.write("/etc/systemd/system/mycoswarm-engine@.service.d/probe.conf", drop_in + LOOSE)
        node.run("systemctl", "daemon-reload")
        control = json.loads(node.python(ask).out)
    finally:
        node.run("rm", "-r", "/etc/systemd/system/mycoswarm-engine@.service.d")
        node.run("systemctl", "daemon-reload")
    assert {name for name, said in control.items() if said != "done"} <= {"gpu"}, control  # one could
    assert {name for name, said in confined.items() if said == "done"} == {"model", "socket"}, confined
    assert confined["udp"] == "EAFNOSUPPORT"


# An engine in a bad model's hand, and one beside it: the first says what it can do to the second.
NEIGHBOUR = r"""#!/usr/bin/python3 -I
import ctypes, errno, json, os, signal, socket, struct, sys
own = sys.argv[1]
above, name = os.path.split(own)
server = socket.socket(socket.AF_UNIX)
server.bind(own + "/engine.sock")
server.listen()
node = socket.socket(fileno=0)
node.sendall(f"{os.getpid()} {name}\n".encode())
order = json.loads(node.makefile().readline())
other, its = order["pid"], f"{above}/{order['name']}"
said = {}
def attempt(name, function):
    try:
        function()
        said[name] = "done"
    except OSError as exc:
        said[name] = errno.errorcode[exc.errno]
def connect(path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
def usurp():
    os.rename(its + "/engine.sock", its + "/was.sock")
    socket.socket(socket.AF_UNIX).bind(its + "/engine.sock")
def peek():
    libc = ctypes.CDLL(None, use_errno=True)
    held = ctypes.create_string_buffer(8)
    local = struct.pack("@PN", ctypes.addressof(held), 8)
    remote = struct.pack("@PN", order["at"], 8)
    if libc.process_vm_readv(other, local, 1, remote, 1, 0) < 0:
        raise OSError(ctypes.get_errno(), "")
attempt("connect", lambda: connect(its + "/engine.sock"))
attempt("by-proc", lambda: connect(f"/proc/{other}/root{its}/engine.sock"))
attempt("usurp", usurp)
attempt("list", lambda: os.listdir(its))
attempt("memory", peek)
attempt("signal", lambda: os.kill(other, 0))
node.sendall(json.dumps(said).encode() + b"\n")
node.recv(1)
"""
BESIDE = """
import json, socket
def engine():
    node = socket.socket(socket.AF_UNIX)
    node.connect("/run/mycoswarm-outposts/engine.sock")
    lines = node.makefile()
    pid, name = lines.readline().split()
    with open(f"/proc/{pid}/maps") as maps:
        at = int(maps.readline().partition("-")[0], 16)
    return node, lines, {"pid": int(pid), "name": name, "at": at}
one, lines, _ = engine()
other, _, about = engine()
one.sendall(json.dumps(about).encode() + b"\\n")
print(lines.readline())
"""
# What kept them apart, taken away: one user and one directory for all, no namespaces of their own.
TOGETHER = """
User=_mce-all
RootDirectory=
PrivateUsers=no
BindPaths=/run/mycoswarm-engine
"""


def test_an_engine_can_do_nothing_to_the_one_beside_it(node: Machine) -> None:
    node.write("/usr/local/bin/neighbour", NEIGHBOUR, mode=0o755)
    place = "/etc/systemd/system/mycoswarm-engine@.service.d/neighbour.conf"
    drop_in = "[Service]\nExecStart=\nExecStart=/usr/local/bin/neighbour /run/mycoswarm-engine/%i\n"
    found = []
    try:
        for extra in (TOGETHER, ""):
            node.write(place, drop_in + extra)
            node.run("systemctl", "daemon-reload")
            found.append(json.loads(node.python(BESIDE).out))
    finally:
        node.run("rm", "-r", str(Path(place).parent))
        node.run("systemctl", "daemon-reload")
    together, apart = found
    assert set(together.values()) == {"done"}, together
    assert len(apart) == 6
    assert "done" not in apart.values(), apart
