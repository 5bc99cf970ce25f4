"""A core that was taken over points a socket of the dialer's elsewhere: it can, and then it cannot."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dialers import lan_dialer

CODE = """
import asyncio, ctypes, errno, json, os, socket, sys, threading
from pathlib import Path
from mycoswarmd.outposts import dialing
from mycoswarmd.outposts.dialing import LanDialer
from mycoswarmd.outposts.notcp import forbid_tcp

dialing._LISTEN_S = 60
allowed, forbidden = int(sys.argv[2]), int(sys.argv[3])
found = {"holds": forbid_tcp()} if sys.argv[4] == "forbid" else {}

def point_elsewhere(sock, by_sending=False):
    sock.settimeout(60)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.connect(sock.fileno(), (ctypes.c_char * 16)(), 16) == 0  # AF_UNSPEC: disconnect
    try:
        if by_sending:
            sock.setblocking(True)
            sock.sendto(b"x", socket.MSG_FASTOPEN, ("127.0.0.1", forbidden))
        else:
            sock.connect(("127.0.0.1", forbidden))
    except OSError as exc:
        return errno.errorcode[exc.errno]
    return "connected"

async def main():
    lan = LanDialer(Path(sys.argv[1]))
    with await lan.connect("127.0.0.1", allowed, 60) as sock:
        sock.send(b"x")
        found["here"] = point_elsewhere(sock)
    with await lan.connect("127.0.0.1", allowed, 60) as sock:
        found["thread"] = await asyncio.to_thread(point_elsewhere, sock)
    with await lan.connect("127.0.0.1", allowed, 60) as sock:
        found["sent"] = point_elsewhere(sock, by_sending=True)
    # What the node does goes on: it listens on what it was given, and connects to unix sockets.
    with await lan.listen("127.0.0.1", int(sys.argv[5])) as sock:
        server = await asyncio.start_server(lambda r, w: w.close(), sock=sock)
        server.close()
    print(json.dumps(found))

asyncio.run(main())
"""


def tried(directory: Path, what: str) -> dict[str, object]:
    with (
        socket.create_server(("127.0.0.1", 0)) as engine,
        socket.create_server(("127.0.0.1", 0)) as other,
        socket.socket() as shared,
    ):
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        shared.bind(("127.0.0.1", 0))  # held, so that nobody else is given the port meanwhile
        ports = [one.getsockname()[1] for one in (engine, other, shared)]
        file = directory / "mycoswarm.toml"
        file.write_text(
            f'listen = "127.0.0.1:{ports[2]}"\n[engines.e]\nkind = "openai"\nurl = "http://127.0.0.1:{ports[0]}"\n'
        )
        with lan_dialer(directory, "--settings", str(file)) as dialer:
            run = subprocess.run(
                [
                    *(sys.executable, "-I", "-c", CODE, str(dialer.path)),
                    *(str(ports[0]), str(ports[1]), what, str(ports[2])),
                ],
                check=True,
                capture_output=True,
            )
    found = json.loads(run.stdout)
    assert isinstance(found, dict)
    return found


def test_a_dialled_socket_cannot_be_pointed_elsewhere(tmp_path: Path) -> None:
    assert tried(tmp_path, "nothing") == dict.fromkeys(("here", "thread", "sent"), "connected")
    found = tried(tmp_path, "forbid")
    if not found["holds"]:
        pytest.skip("this kernel's Landlock knows no TCP")
    assert found == {"holds": True, "here": "EACCES", "thread": "EACCES", "sent": "EPERM"}
