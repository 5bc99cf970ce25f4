"""What callers send that is no body does not fill the core's memory, with the distribution's own libraries.

A head without an end, trailers without an end, a body in pieces of one byte, requests ahead of answers.
"""

import json
from collections.abc import Iterator

import pytest

from tests.appliance.images import SUITES
from tests.appliance.machines import Machine
from tests.appliance.nodes import wait_ready

pytestmark = pytest.mark.timeout(1200)
DROP_IN = "/run/systemd/system/mycoswarmd.service.d/unbounded.conf"
# The core as it is, but for the one bound.
UNBOUNDED = """
import runpy
from mycoswarmd.api import lines
lines.BOUNDS_ITSELF = True
runpy.run_path("/usr/sbin/mycoswarmd", run_name="__main__")
"""
DROP_IN_TEXT = """[Service]
ExecStart=
ExecStart=/usr/bin/python3 -I /usr/local/lib/unbounded.py run --appliance
"""
# Sends one kind of it on four connections for so many seconds, or until they are all cut; says by how much
# the core has grown meanwhile. Who says nothing whole is waited for 30 seconds: these are fewer.
FLOOD = r"""
import json, os, socket, subprocess, sys, time
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
PIECE = b"1\r\nx\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
first, more = {
    "head": (POST, b"a: b\r\n"),
    "trailers": (POST + CHUNKED + PIECE + b"0\r\n", b"a: b\r\n"),
    "pieces": (POST + CHUNKED, PIECE),
    "requests": (b"", b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"),
}[sys.argv[1]]
core = subprocess.check_output(["systemctl", "show", "-P", "MainPID", "mycoswarmd"], text=True).strip()
def held():
    text = open(f"/proc/{core}/status").read()
    return int(text.partition("RssAnon:")[2].split()[0]) >> 10
before = most = held()
whole = more * (65536 // len(more))
begun, socks = time.monotonic(), {}
for _ in range(4):
    one = socket.socket(socket.AF_UNIX)
    one.connect("/run/mycoswarm/api.sock")
    one.sendall(first)
    one.setblocking(False)
    socks[one] = 0
while socks and time.monotonic() < begun + float(sys.argv[2]) and most < before + 400:
    for one, at in list(socks.items()):
        try:
            socks[one] = (at + one.send(whole[at:])) % len(whole)
        except BlockingIOError:
            time.sleep(0.001)
        except OSError:
            del socks[one]
    most = max(most, held())
print(json.dumps({"grew_mib": most - before, "left": len(socks)}))
"""
# What must go on: a long body in small pieces, and requests a little ahead of their answers. Says what came.
SANE = r"""
import json, socket
one = socket.socket(socket.AF_UNIX)
one.connect("/run/mycoswarm/api.sock")
one.settimeout(60)
body = json.dumps({"model": "none", "messages": [{"role": "user", "content": "x" * 400_000}]}).encode()
one.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
for at in range(0, len(body), 16):
    one.sendall(b"%x\r\n%s\r\n" % (len(body[at : at + 16]), body[at : at + 16]))
one.sendall(b"0\r\n\r\n" + b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n" * 7)
said = b""
while said.count(b"HTTP/1.1 ") < 8:
    said += one.recv(65536)
print(json.dumps([int(part[:3]) for part in said.split(b"HTTP/1.1 ")[1:]]))
"""


@pytest.fixture(scope="module", params=SUITES)
def machine(fresh: dict[str, tuple[Machine, str]], request: pytest.FixtureRequest) -> Iterator[Machine]:
    machine, _ = fresh[request.param]
    machine.write("/usr/local/lib/unbounded.py", UNBOUNDED)
    yield machine
    machine.sh(f"rm -f {DROP_IN}; systemctl daemon-reload; systemctl restart mycoswarmd")
    wait_ready(machine)


def flood(machine: Machine, kind: str, most_s: int) -> dict[str, int]:
    found = json.loads(machine.run("python3", "-c", FLOOD, kind, str(most_s)).out)
    assert isinstance(found, dict)
    return found


def test_what_is_no_body_ends_its_connection(machine: Machine) -> None:
    machine.run("systemctl", "restart", "mycoswarmd")
    wait_ready(machine)
    found = {kind: flood(machine, kind, 25) for kind in ("head", "trailers", "pieces", "requests")}
    assert {kind: one for kind, one in found.items() if one["grew_mib"] > 24 or one["left"]} == {}
    assert json.loads(machine.run("python3", "-c", SANE).out) == [404, *[200] * 7]
    # The control: the same program without that.
    machine.write(DROP_IN, DROP_IN_TEXT)
    machine.sh("systemctl daemon-reload; systemctl restart mycoswarmd")
    wait_ready(machine)
    found = {kind: flood(machine, kind, 25) for kind in ("head", "trailers")}
    assert min(one["grew_mib"] for one in found.values()) > 100, found
    found["requests"] = flood(machine, "requests", 5)
    assert found["requests"]["left"] == 4, found
