"""Nodes in one process: real rosters on disk, real keys, real TLS on loopback, the real dialer and fleet.

Only the listener is a small one of the tests' own, so that it can misbehave as told.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mycoswarmd.daemon.clock import SystemClock, SystemEntropy
from mycoswarmd.engines.peerhttp import PeerHttp
from mycoswarmd.fleet.fleet import Fleet
from mycoswarmd.flow.swarm import Swarm
from mycoswarmd.flow.swarmports import Hint, InviteRow, PeerAddress, PeerState
from mycoswarmd.store.db import Database
from mycoswarmd.store.receipts import SqliteReceiptLog
from mycoswarmd.store.roster import SqliteRosterStore
from mycoswarmd.trust.certificate import read_certificate
from mycoswarmd.trust.identity import IdentityFile, NodeIdentity
from mycoswarmd.trust.keys import make_seed, public_key, verify
from mycoswarmd.trust.signer import FileSigner
from mycoswarmd.trust.tlsctx import Tls, knock_context
from mycoswarmd.wire.peer import Word, encode_word

HOST = "127.0.0.1"


@dataclass(slots=True, kw_only=True)
class Behaviour:
    """How a node's listener treats its callers.

    Attributes:
        is_silent: it answers, says its word once, and then nothing more.
        word: changes what it says of itself.
        requests: what was asked of it, in order.
        beat_s: how often its watchers hear something; more often than the daemon's, for tests to end sooner.
    """

    is_silent: bool = False
    beat_s: float = 2.0
    word: Callable[[Word], Word] = lambda word: word
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # path, id of a member or None
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def asked(self, path: str) -> int:
        return sum(1 for one, _ in self.requests if one == path)


class RealNode:
    """One node. `listen` and `link` say which of its parts run."""

    def __init__(self, name: str, directory: Path, db: Database, *, static: tuple[PeerAddress, ...]) -> None:
        self.name = name
        self.directory = directory
        self.clock = SystemClock()
        self.store = SqliteRosterStore(db)
        self.signer = FileSigner(directory)
        self.identities = IdentityFile(directory)
        self.receipts = SqliteReceiptLog(db, now_ms=self.clock.now_ms)
        self.swarm = Swarm(
            store=self.store,
            identities=self.identities,
            signer=self.signer,
            receipts=self.receipts,
            clock=self.clock,
            entropy=SystemEntropy(),
            verify=verify,
            read_cert=read_certificate,
        )
        self.fleet = Fleet(
            swarm=self.swarm,
            store=self.store,
            dialer=PeerHttp(client_context=self._client_context, knock_context=knock_context),
            clock=self.clock,
            entropy=SystemEntropy(),
            static=static,
            own_port=lambda: self.port,
        )
        self.swarm.spread, self.swarm.give = self.fleet.spread, self.fleet.give
        self.swarm.reached = self.fleet.reached
        self.behaviour = Behaviour()
        self.port: int | None = None
        self._tls: Tls | None = None
        self._server: asyncio.Server | None = None
        self._second: asyncio.Server | None = None
        self._callers: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._changed = asyncio.Event()
        self.swarm.subscribe(self._on_change)

    @property
    def id(self) -> str:
        assert self.swarm.self_id is not None
        return self.swarm.self_id

    @property
    def address(self) -> PeerAddress:
        assert self.port is not None
        return PeerAddress(HOST, self.port)

    def state_of(self, other: "RealNode") -> PeerState:
        return next(state for state in self.fleet.states() if state.member.id == other.id)

    def words(self) -> dict[str, Word]:
        return {one.member.id: one.word for one in self.fleet.states() if one.word is not None}

    async def until(self, holds: Callable[[], bool], *, within_s: float = 60.0) -> None:
        """Wait until something holds, looking again at each change of fleet or roster."""
        news = asyncio.Event()
        ends = [self.fleet.subscribe(news.set), self.swarm.subscribe(news.set)]
        try:
            async with asyncio.timeout(within_s):
                while not holds():
                    news.clear()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(0.1):  # what is no event: a request that arrived
                            await news.wait()
        except TimeoutError:
            raise AssertionError(f"it never held; states: {self.fleet.states()}") from None
        finally:
            for end in ends:
                end()

    async def begin(self) -> None:
        """Begin a swarm."""
        recovery = public_key(make_seed()).hex()
        await self.swarm.init("home", node_name=self.name, recovery_public_hex=recovery)

    async def admit(self, newcomer: "RealNode", *, role: str = "node") -> None:
        """Sign a newcomer in, and have it join."""
        identity = newcomer.identities.create()
        await self.admit_only(identity, newcomer.name, role=role)
        roster = self.swarm.roster
        assert roster is not None
        await newcomer.swarm.join(
            self.swarm.missing(frozenset()), genesis_sha256=roster.swarm_id, identity=identity
        )

    async def admit_only(self, identity: NodeIdentity, name: str, *, role: str = "node") -> None:
        invite = SystemEntropy().token(2).upper()
        row = InviteRow(
            invite=invite, keys=bytes(96), role=role, name=name, needs_confirm=False,
            expires_at_boot_ms=1 << 50, failures=0, state="open",
        )  # fmt: skip
        await self.store.put_invite(row, boot_id=self.clock.boot_id())
        await self.swarm.admit(cert_der=identity.cert_der, name=name, role=role, invite=invite)

    def _client_context(self, cert_der: bytes) -> ssl.SSLContext:
        return self._own_tls().client_context(cert_der)

    def _own_tls(self) -> Tls:
        if self._tls is None:
            identity = self.swarm.identity
            assert isinstance(identity, NodeIdentity)
            self._tls = Tls(identity.seed, identity.cert_der)
        return self._tls

    def _anchors(self) -> list[bytes]:
        roster = self.swarm.roster
        return [member.cert_der for member in roster.members.values()] if roster is not None else []

    def _on_change(self) -> None:
        if self._tls is not None:
            self._tls.refresh()
        self._changed.set()
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def linked(self) -> AsyncIterator[None]:
        """Run the fleet."""
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.fleet.run())
            while self.fleet._group is None:
                await asyncio.sleep(0.001)
            try:
                yield
            finally:
                task.cancel()

    async def listen(self, port: int = 0) -> None:
        context = self._own_tls().server_context(self._anchors)
        self._server = await asyncio.start_server(self._serve, HOST, port, ssl=context)
        self.port = self._server.sockets[0].getsockname()[1]

    async def listen_also(self, address: PeerAddress) -> None:
        """Listen at a second address too."""
        context = self._own_tls().server_context(self._anchors)
        self._second = await asyncio.start_server(self._serve, address.host, address.port, ssl=context)

    def hang_up(self) -> None:
        """Stop listening, and drop everybody."""
        if self._server is not None:
            self._server.close()
        if self._second is not None:
            self._second.close()
        for task, writer in self._callers.items():
            writer.transport.abort()
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._callers[task] = writer
        try:
            while line := await reader.readline():
                await self._answer(line, reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._callers.pop(task)
            writer.transport.abort()

    async def _answer(self, line: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path, length = line.split()[1].decode(), 0
        while (head := await reader.readline()) not in {b"\r\n", b""}:
            key, _, value = head.decode().partition(":")
            length = int(value) if key.lower() == "content-length" else length
        body = json.loads(await reader.readexactly(length) or b"{}")
        cert = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        caller = read_certificate(cert).node_id if cert else None
        self.behaviour.requests.append((path, caller))
        self.behaviour.bodies.append(body)
        if path == "/swarm/pull":
            if "port" in body:
                self.fleet.hint(Hint(address=PeerAddress(HOST, body["port"]), node_id=caller))
            return await self._send(writer, await self.swarm.pull(body))
        if caller is None or self.swarm.member(caller) is None:
            return await self._send(writer, {"error": {"code": "unauthenticated"}}, status=401)
        match path:
            case "/swarm/sync":
                if body.get("port"):
                    self.fleet.hint(Hint(address=PeerAddress(HOST, body["port"]), node_id=caller))
                return await self._send(writer, await self.swarm.sync(body))
            case "/swarm/word":
                return await self._send(writer, json.loads(encode_word(self.word())))
            case "/swarm/watch":
                return await self._watch(writer, caller)
            case _:
                raise AssertionError(path)

    def word(self) -> Word:
        assert self.port is not None
        return self.behaviour.word(
            Word(
                id=self.id,
                version="0.3.0",
                boot=self.swarm.boot,
                instance=self.swarm.instance,
                port=self.port,
                digest=self.swarm.digest,
                statements=len(self.swarm.hashes()),
                beacons=tuple(self.swarm.beacons()),
            )
        )

    def say_again(self) -> None:
        """Have watchers hear the word again."""
        self._on_change()

    async def _watch(self, writer: asyncio.StreamWriter, caller: str) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        said = b""
        while self.swarm.member(caller) is not None:
            changed = self._changed
            now = encode_word(self.word())
            await self._chunk(writer, (now if now != said else b"") + b"\n")
            said = now
            while self.behaviour.is_silent:
                await asyncio.sleep(0.05)
            with suppress(TimeoutError):
                async with asyncio.timeout(self.behaviour.beat_s):
                    await changed.wait()
        writer.transport.abort()

    @staticmethod
    async def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        await writer.drain()

    @staticmethod
    async def _send(writer: asyncio.StreamWriter, answer: object, *, status: int = 200) -> None:
        data = json.dumps(answer).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()


@asynccontextmanager
async def made_node(
    directory: Path, name: str, *, static: tuple[PeerAddress, ...] = ()
) -> AsyncIterator[RealNode]:
    """Make a node that is in no swarm yet."""
    directory.mkdir(parents=True, exist_ok=True)
    db = Database(directory / "mycoswarm.db")
    await db.open()
    try:
        node = RealNode(name, directory, db, static=static)
        await node.receipts.load()
        async with asyncio.TaskGroup() as group:
            receipts = group.create_task(node.receipts.run())
            await node.swarm.start()
            try:
                yield node
            finally:
                node.hang_up()
                receipts.cancel()
    finally:
        await db.close()
