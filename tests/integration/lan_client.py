"""A core without a network, for tests: it is in an empty network namespace and may make no AF_INET socket.

It is told what to do on its command line, does it through the LAN dialer, and prints what came of it.
"""

import asyncio
import contextlib
import ctypes
import errno
import json
import platform
import socket
import ssl
import struct
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from mycoswarmd.engines.openai_http import OpenAIEngine
from mycoswarmd.engines.peerhttp import PeerHttp
from mycoswarmd.errors import MycoswarmError
from mycoswarmd.flow.ports import Dial
from mycoswarmd.flow.swarmports import PeerAddress
from mycoswarmd.outposts.dialing import LanDialer
from mycoswarmd.outposts.selftest import prove
from mycoswarmd.trust.tlsctx import Tls, knock_context
from mycoswarmd.wire.openai import parse_chat
from mycoswarmd.wire.prompt import TextDelta
from mycoswarmd.wire.proof import CheckName, Unit
from tests.integration.neighbours import hood
from tests.permits import permit_for

CLONE_NEWNET = 0x40000000
AROUND = hood("anna", "bert")
ANNA = AROUND.keys["anna"]


def lose_network() -> None:
    """Never make an AF_INET or AF_INET6 socket again, and have no interface for one."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWNET) == 0
    number = 41 if platform.machine() == "x86_64" else 198  # socket
    rows = [
        (0x20, 0, 0, 0),
        (0x15, 0, 4, number),
        (0x20, 0, 0, 16),
        (0x15, 1, 0, socket.AF_INET),
        (0x15, 0, 1, socket.AF_INET6),
        (0x06, 0, 0, 0x00050000 | errno.EAFNOSUPPORT),
        (0x06, 0, 0, 0x7FFF0000),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *row) for row in rows))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(rows), ctypes.addressof(code)))
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, program, 0, 0) == 0
    (check,) = [one for one in prove(Unit.CORE).checks if one.name is CheckName.INET_SOCKET]
    assert check.ok is True


class Book:
    """Where bert is said to be."""

    def __init__(self, *addresses: PeerAddress) -> None:
        self._addresses = addresses

    def addresses(self, node_id: str) -> Sequence[PeerAddress]:
        assert node_id == AROUND.keys["bert"].id
        return self._addresses


@contextlib.asynccontextmanager
async def engine(url: str, dial: Dial | None) -> AsyncIterator[OpenAIEngine]:
    one = OpenAIEngine("e", url, dial=dial)
    async with asyncio.TaskGroup() as group:
        runner = group.create_task(one.run())
        while one.health().state == "starting":
            await asyncio.sleep(0.005)
        yield one
        runner.cancel()


async def prompt(lan: Dial | None, url: str) -> dict[str, Any]:
    """Ask an engine a whole prompt, at once and as a stream."""
    asked = parse_chat(json.dumps({"model": "ok", "messages": [{"role": "user", "content": "Hi"}]}).encode())
    async with engine(url, lan) as one:
        if one.health().state != "ready":
            return {"state": one.health().state}
        answer = await one.complete(permit_for("ok"), asked)
        streamed = [delta async for delta in one.stream(permit_for("ok"), asked)]
        text = "".join(delta.text for delta in streamed if isinstance(delta, TextDelta))
        return {"state": "ready", "answer": answer.text, "streamed": text}


async def peer(lan: Dial | None, host: str, port: str) -> dict[str, Any]:
    """Exchange words with a member who proves its key and asks for ours."""
    http = PeerHttp(
        client_context=Tls(ANNA.seed, ANNA.cert_der).client_context, knock_context=knock_context, dial=lan
    )
    async with http.member(AROUND["bert"], Book(PeerAddress(host, int(port)))) as one:
        try:
            answers = [await one.ask("POST", "/swarm/sync", {"n": number}) for number in range(3)]
        except MycoswarmError as exc:
            return {"code": exc.code}
    return {"code": "", "got": [answer["got"] for answer in answers]}


async def serve(lan: LanDialer, host: str, port: str) -> dict[str, Any]:
    """Listen for one member, answer it, and tell who it was and whether somebody else got anywhere."""
    asked: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        tls = writer.get_extra_info("ssl_object")
        body = b'{"here":"anna"}'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()
        cert = tls.getpeercert(binary_form=True)
        asked.put_nowait({"line": head.split(b"\r\n")[0].decode(), "cert": cert.hex()})

    sock = await lan.listen(host, int(port))
    members = [AROUND.keys["bert"].cert_der]
    context: ssl.SSLContext = Tls(ANNA.seed, ANNA.cert_der).server_context(lambda: members)
    server = await asyncio.start_server(answer, sock=sock, ssl=context)
    print("listening", flush=True)
    async with server:
        return await asked.get()


async def main(what: str, path: str, *more: str) -> None:
    lan = LanDialer(Path(path))
    match what:
        case "prompt":
            found = await prompt(lan.connect, *more)
        case "prompt-alone":
            found = await prompt(None, *more)
        case "peer":
            found = await peer(lan.connect, *more)
        case "peer-alone":
            found = await peer(None, *more)
        case _:
            found = await serve(lan, *more)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    lose_network()
    asyncio.run(main(*sys.argv[1:]))
