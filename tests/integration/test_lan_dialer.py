"""A core without a network asks engines and members through the LAN dialer, and listens through it."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mycoswarmd.engines.peerhttp import PeerHttp
from mycoswarmd.errors import MycoswarmError, Unavailable
from mycoswarmd.flow.swarmports import PeerAddress
from mycoswarmd.outposts.dialing import LanDialer
from mycoswarmd.trust.tlsctx import Tls, knock_context
from tests.dialers import Dialer, control_group, inside, ip, lan_dialer, let_nothing_out, network
from tests.fakes import Turn, serving
from tests.integration.neighbours import address_of, hood
from tests.nodes import free_port
from tests.upstream import upstream

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="takes the network from a process"),
]
ROOT = Path(__file__).parents[2]
AROUND = hood("anna", "bert")
BERT = AROUND.keys["bert"]
MALLORY = hood("anna", "mallory").keys["mallory"]


@contextmanager
def core(what: str, dialer: Dialer, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that cannot make an AF_INET socket."""
    run = [sys.executable, "-m", "tests.integration.lan_client", what, str(dialer.path), *more]
    with subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


async def outcome(what: str, dialer: Dialer, *more: str) -> dict[str, Any]:
    with core(what, dialer, *more) as process:
        output, _ = await asyncio.to_thread(process.communicate)
        assert process.returncode == 0
        found = json.loads(output)
        assert isinstance(found, dict)
        return found


async def reached(what: str, dialer: Dialer, *more: str) -> dict[str, Any]:
    """Ask until somebody is there: a busy machine may miss the second and a half that a member has."""
    for _ in range(10):
        found = await outcome(what, dialer, *more)
        if found not in ({"code": "peer-unreachable"}, {"state": "down"}):
            return found
    raise AssertionError(f"{what}: nobody was reached")


@pytest.fixture
def dialer(tmp_path: Path) -> Iterator[Dialer]:
    with lan_dialer(tmp_path) as one:
        yield one


async def test_a_whole_prompt_goes_through_the_dialer(dialer: Dialer) -> None:
    with upstream() as book:
        # By itself it gets nowhere.
        assert (await outcome("prompt-alone", dialer, book.url))["state"] == "down"
        assert book.bodies == []
        found = await reached("prompt", dialer, book.url)
        assert found["state"] == "ready"
        assert found["answer"] == found["streamed"] != ""
        assert [body["messages"] for body in book.bodies] == [[{"role": "user", "content": "Hi"}]] * 2


async def test_only_a_declared_engine_is_found(tmp_path: Path) -> None:
    file = tmp_path / "mycoswarm.toml"
    with upstream() as book, lan_dialer(tmp_path, "--settings", str(file)) as dialer:
        assert await outcome("prompt", dialer, book.url) == {"state": "down"}
        file.write_text(f'[engines.e]\nkind = "openai"\nurl = "{book.url}"\n')
        assert (await reached("prompt", dialer, book.url))["state"] == "ready"


async def echo(turn: Turn) -> None:
    await turn.answer({"got": json.loads(turn.body or b"null")})


async def test_a_member_is_asked_through_the_dialer_and_both_prove_their_keys(dialer: Dialer) -> None:
    trusted = [AROUND.keys["anna"].cert_der]
    tls = Tls(BERT.seed, BERT.cert_der).server_context(lambda: trusted)
    async with serving({"/swarm/sync": echo}, tls=tls) as fake:
        host, port = address_of(fake).host, str(address_of(fake).port)
        assert await outcome("peer-alone", dialer, host, port) == {"code": "peer-unreachable"}
        assert fake.connections == 0
        found = await reached("peer", dialer, host, port)
        assert found == {"code": "", "got": [{"n": 0}, {"n": 1}, {"n": 2}]}
        assert len({id(turn.writer) for turn in fake.turns}) == 1
    false = Tls(MALLORY.seed, MALLORY.cert_der).server_context(lambda: trusted)
    async with serving({"/swarm/sync": echo}, tls=false) as fake:
        found = await reached("peer", dialer, host, str(address_of(fake).port))
        assert found == {"code": "peer-unproved"}
        assert fake.turns == []


class Book:
    """Where anna is."""

    def __init__(self, port: int) -> None:
        self._addresses = [PeerAddress("127.0.0.1", port)]

    def addresses(self, _node_id: str) -> list[PeerAddress]:
        return self._addresses


async def ask(port: int, key: Any) -> object:
    http = PeerHttp(client_context=Tls(key.seed, key.cert_der).client_context, knock_context=knock_context)
    async with http.member(AROUND["anna"], Book(port)) as one:
        return await one.ask("GET", "/swarm/word")


async def answer_of(port: int, key: Any) -> object:
    """Return what anna says, or None where there was no time to reach her."""
    try:
        return await ask(port, key)
    except Unavailable:
        return None


async def test_members_come_in_through_a_socket_of_the_dialer(tmp_path: Path) -> None:
    port = free_port()
    file = tmp_path / "mycoswarm.toml"
    file.write_text(f'swarm_listen = "[::]:{port}"\n')
    with (
        lan_dialer(tmp_path, "--settings", str(file)) as dialer,
        core("serve", dialer, "::", str(port)) as anna,
    ):
        assert anna.stdout is not None
        assert await asyncio.to_thread(anna.stdout.readline) == b"listening\n"
        dialer.kill()  # who listens needs it no more
        with pytest.raises(MycoswarmError):
            await ask(port, MALLORY)
        async with asyncio.timeout(60):
            while (said := await answer_of(port, BERT)) is None:
                await asyncio.sleep(0.1)
        assert said == {"here": "anna"}
        said = json.loads(await asyncio.to_thread(anna.stdout.readline))
        assert said == {"line": "GET /swarm/word HTTP/1.1", "cert": BERT.cert_der.hex()}


async def test_two_machines_meet_over_a_link_local_address(tmp_path: Path) -> None:
    """The core has not even the interface whose name is in the address."""
    trusted = [AROUND.keys["anna"].cert_der]
    tls = Tls(BERT.seed, BERT.cert_der).server_context(lambda: trusted)
    with network("lanhome") as here, network("lanpeer") as there:
        ip("-n", here, "link", "add", "lan0", "type", "veth", "peer", "name", "lan0", "netns", there)
        for namespace, last in ((here, 1), (there, 2)):
            ip("-n", namespace, "addr", "add", f"fe80::{last}/64", "dev", "lan0", "nodad")
            ip("-n", namespace, "link", "set", "lan0", "up")
        listener = inside(there, lambda: socket.create_server(("::", 7437), family=socket.AF_INET6))

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for _ in range(3):
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(one for one in head.split(b"\r\n") if one.lower().startswith(b"content-length"))
                body = b'{"got":' + await reader.readexactly(int(length.split(b":")[1])) + b"}"
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            writer.close()

        server = await asyncio.start_server(answer, sock=listener, ssl=tls)
        with lan_dialer(tmp_path, namespace=here) as dialer:
            async with server:
                found = await reached("peer", dialer, "fe80::2%lan0", "7437")
        assert found == {"code": "", "got": [{"n": 0}, {"n": 1}, {"n": 2}]}


async def test_what_is_handed_over_is_judged_by_the_dialers_filter(dialer: Dialer, tmp_path: Path) -> None:
    """A filter on the dialer's control group holds for sockets that this process, which has none, uses."""
    lan = LanDialer(dialer.path)
    with control_group(tmp_path) as group, socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        before = await lan.connect(host, port, 60)
        (group / "cgroup.procs").write_text(str(dialer.pid))
        dialled = await lan.connect(host, port, 60)
        far = [server.accept()[0] for _ in range(2)]
        with before, dialled, far[0], far[1]:
            assert [passes(*pair) for pair in zip((before, dialled), far, strict=True)] == [True, True]
            let_nothing_out(group)
            # The other one was made before the dialer was in the group.
            assert [passes(*pair) for pair in zip((before, dialled), far, strict=True)] == [True, False]
            # Nor has it to do with the dialer being alive.
            dialer.kill()
            assert not passes(dialled, far[1])


def passes(near: socket.socket, far: socket.socket) -> bool:
    """Tell whether a byte arrives."""
    near.send(b"x")
    far.settimeout(2)
    try:
        return far.recv(1) == b"x"
    except TimeoutError:
        return False
