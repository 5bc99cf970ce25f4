"""What Landlock is not asked about: connecting by sending, and calls that no filter sees."""

import json
import socket
import subprocess
import sys

import pytest

PAIRS = """
import errno, json, os, socket, sys
from mycoswarmd.outposts import callfilter
found = {"holds": getattr(callfilter, sys.argv[1])()} if len(sys.argv) > 1 else {}
heard = socket.socket(fileno=os.dup(0))  # of somebody else, at a name that is no file
for name, kind in (("packets", socket.SOCK_DGRAM), ("sequence", socket.SOCK_SEQPACKET)):
    try:
        one, other = socket.socketpair(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
        with one, other:
            found[name] = one.sendto(b"x", heard.getsockname()) if name == "packets" else "made"
    except OSError as exc:
        found[name] = errno.errorcode[exc.errno]
one, other = socket.socketpair()
with one, other:
    one.send(b"y")
    found["stream"] = other.recv(1).decode()
try:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()
    found["tcp"] = "made"
except OSError as exc:
    found["tcp"] = errno.errorcode[exc.errno]
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("means", "said", "tcp"),
    [
        ("", {"packets": 1, "sequence": "made"}, "made"),
        ("forbid_packet_pairs", {"packets": "EPERM", "sequence": "EPERM", "holds": True}, "made"),
        ("forbid_streams", {"packets": "EPERM", "sequence": "EPERM", "holds": True}, "EPERM"),
    ],
)
def test_a_pair_is_for_streams_and_for_nobody_else(means: str, said: dict[str, object], tcp: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind("")  # the kernel finds a name that is no file
        argv = [sys.executable, "-I", "-c", PAIRS, *([means] if means else [])]
        ran = subprocess.run(argv, capture_output=True, check=True, timeout=30, stdin=heard.fileno())
    assert json.loads(ran.stdout) == {**said, "stream": "y", "tcp": tcp}


CODE = """
import ctypes, errno, json, socket, sys
from mycoswarmd.outposts.callfilter import forbid_fast_open
from mycoswarmd.outposts.notcp import forbid_tcp

listener = socket.create_server(("127.0.0.1", 0))
found = {"landlock": forbid_tcp()} if "landlock" in sys.argv else {}
found |= {"filter": forbid_fast_open()} if "filter" in sys.argv else {}

def attempt(name, send):
    with socket.socket() as sock:
        try:
            send(sock)
            found[name] = "sent"
        except OSError as exc:
            found[name] = errno.errorcode[exc.errno]

where = listener.getsockname()
attempt("connect", lambda sock: sock.connect(where))
attempt("sendto", lambda sock: sock.sendto(b"x", socket.MSG_FASTOPEN, where))
attempt("sendmsg", lambda sock: sock.sendmsg([b"x"], [], socket.MSG_FASTOPEN, where))
libc = ctypes.CDLL(None, use_errno=True)
found["ring"] = "made" if libc.syscall(425, 1, ctypes.create_string_buffer(120)) >= 0 else "refused"
# What the node does all day.
one, other = socket.socketpair()
one.sendmsg([b"x"])
one.send(b"y")
assert other.recv(1)
print(json.dumps(found))
"""


def tried(*means: str) -> dict[str, object]:
    argv = [sys.executable, "-I", "-c", CODE, *means]
    found = json.loads(subprocess.run(argv, capture_output=True, check=True, timeout=30).stdout)
    assert isinstance(found, dict)
    return found


def test_who_may_not_connect_may_not_connect_by_sending() -> None:
    control = tried()
    if control["sendto"] != "sent":
        pytest.skip("this machine has TCP Fast Open turned off")
    assert control["connect"] == control["sendmsg"] == "sent"
    by_landlock = tried("landlock")
    if by_landlock["landlock"]:
        assert by_landlock["connect"] == "EACCES"
    found = tried("landlock", "filter")
    assert found["filter"] is True
    assert found["sendto"] == found["sendmsg"] == "EPERM"
    assert found["ring"] == "refused"
