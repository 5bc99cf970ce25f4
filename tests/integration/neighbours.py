"""Nodes of one swarm in this process: real TLS, HTTP, policies and receipts, a scripted engine behind each.

There is no discovery and no fleet here: a test says what a node knows of the others.
"""

import asyncio
import hashlib
import json
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from mycoswarmd.api.access import SWARM_LISTENER, Doorman, Listener, RosterBook
from mycoswarmd.api.app import Api
from mycoswarmd.api.bind import bind_tcp
from mycoswarmd.api.services import Services
from mycoswarmd.core.policy.check import check_policy
from mycoswarmd.core.policy.model import Policy
from mycoswarmd.core.roster import Member
from mycoswarmd.core.types import Principal, SandboxLevel, Zone
from mycoswarmd.daemon.clock import SystemClock, SystemEntropy
from mycoswarmd.engines.openai_http import OpenAIEngine
from mycoswarmd.engines.peer import PeerEngines
from mycoswarmd.engines.peerhttp import MemberClient, PeerHttp
from mycoswarmd.engines.upstream import Patience
from mycoswarmd.flow.approve import ApprovalDesk, ApprovalTimes
from mycoswarmd.flow.prompt import Node, Prompts, Speaker
from mycoswarmd.flow.swarmports import PeerAddress, PeerState, Reach
from mycoswarmd.store.approvals import SqliteApprovalStore
from mycoswarmd.store.db import Database
from mycoswarmd.store.keys import SqliteKeyStore
from mycoswarmd.store.receipts import SqliteReceiptLog
from mycoswarmd.store.usage import SqliteUsageStore
from mycoswarmd.trust.certificate import read_certificate
from mycoswarmd.trust.tlsctx import Tls, knock_context
from mycoswarmd.wire.openai import parse_chat
from mycoswarmd.wire.peer import ModelWord, Word
from mycoswarmd.wire.prompt import Prompt, PromptKind
from tests.fakes import FakeServer, Script, serving
from tests.rosters import Key, Maker, key
from tests.upstream import Upstream, upstream

API_KEY = "mk-neighbours-0123456789"
OWNER = Speaker(principal=Principal(is_owner=True, uid=0))
HOME = """
schema = 1
name = "test"
[[rule]]
id = "swarm-inference"
why = "anything up to private may use the machines I own"
effect = "allow"
action = "infer"
zone = ["self", "lan"]
label = { max = "private" }
"""


def policy_of(text: str) -> Policy:
    return check_policy(text.encode(), path="test.toml", resolve_program=lambda _: None).policy


def chat(model: str = "ok", text: str = "Hi", **more: object) -> Prompt:
    body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
    return parse_chat(json.dumps(body).encode())


@dataclass
class Hood:
    """Who is in the swarm."""

    members: dict[str, Member]
    keys: dict[str, Key]
    gone: set[str] = field(default_factory=set)  # ids

    def __getitem__(self, name: str) -> Member:
        return next(one for one in self.members.values() if one.name == name)

    def member_of(self, node_id: str) -> Member | None:
        return None if node_id in self.gone else self.members.get(node_id)


def hood(*names: str) -> Hood:
    """Make a swarm of these members, with real keys and certificates."""
    keys = {name: key("neighbour", name) for name in names}
    maker = Maker()
    whole = maker.set(*[maker.admit(one, name) for name, one in keys.items()])
    return Hood({one.id: one for one in whole.roster.members.values()}, keys)


@dataclass(kw_only=True)
class Neighbour:
    """One node, what it knows of the others, and how to talk to it."""

    name: str
    key: Key
    hood: Hood
    book: Upstream
    prompts: Prompts
    receipts: SqliteReceiptLog
    swarm_port: int
    tcp_port: int
    http: PeerHttp
    stack: AsyncExitStack
    approvals: SqliteApprovalStore
    desk: ApprovalDesk
    policy: Policy | None
    states: dict[str, PeerState] = field(default_factory=dict)
    clients: dict[str, MemberClient] = field(default_factory=dict)
    where: dict[str, list[PeerAddress]] = field(default_factory=dict)

    @property
    def address(self) -> PeerAddress:
        return PeerAddress("127.0.0.1", self.swarm_port)

    def addresses(self, node_id: str) -> Sequence[PeerAddress]:
        return self.where[node_id]

    async def meet(self, other: "Neighbour", **more: Any) -> None:
        """Know another node as reachable, with what it serves."""
        await self.know(other.name, other.address, [info.name for info in other.own_models()], **more)

    async def know(self, name: str, address: PeerAddress, models: Sequence[str], **more: Any) -> None:
        member = self.hood[name]
        self.where[member.id] = [address]
        if member.id not in self.clients:
            made = self.http.member(member, self)
            self.clients[member.id] = await self.stack.enter_async_context(made)
        word = Word(
            id=member.id,
            version="1",
            boot=1,
            instance="0" * 16,
            port=address.port,
            digest="0" * 64,
            statements=4,
            tier=more.pop("tier", "small"),
            models=tuple(
                ModelWord(name=model, kinds=frozenset(PromptKind), loaded=True, context_tokens=4096)
                for model in models
            ),
            **more,
        )
        self.states[member.id] = PeerState(member=member, state=Reach.READY, word=word)

    def lose(self, name: str, detail: str = "silent for 4.5 s") -> None:
        """Know that a node cannot be reached any more."""
        member = self.hood[name]
        self.states[member.id] = replace(
            self.states[member.id], state=Reach.UNREACHABLE, detail=detail, word=None
        )

    def own_models(self) -> list[Any]:
        return [info for info in self.prompts.models() if info.zone is Zone.SELF]

    async def records(self, kind: str) -> list[Mapping[str, Any]]:
        """Return the bodies of the receipts of one kind, oldest first."""
        await self.receipts.head()
        return [row.body for row in await self.receipts.tail(after=0, limit=100) if row.kind == kind]


@asynccontextmanager
async def neighbour(
    name: str,
    around: Hood,
    *,
    policy: str = HOME,
    patience: Patience | None = None,
    serves: bool = True,
) -> AsyncIterator[Neighbour]:
    """Run a node with its listeners while the context lasts."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="myco-")))
        book = stack.enter_context(upstream())
        clock, entropy = SystemClock(), SystemEntropy()
        db = Database(directory / "mycoswarm.db")
        await db.open()
        stack.push_async_callback(db.close)
        receipts = SqliteReceiptLog(db, now_ms=clock.now_ms)
        await receipts.load()
        keys = SqliteKeyStore(db, now_ms=clock.now_ms)
        await keys.load()
        sha256 = hashlib.sha256(API_KEY.encode()).hexdigest()
        await keys.create(key_id="k-1", name="tests", secret_sha256=sha256, now_ms=1)
        own = around.keys[name]
        tls = Tls(own.seed, own.cert_der)
        http = PeerHttp(client_context=tls.client_context, knock_context=knock_context)
        engine = OpenAIEngine("engine", book.url)
        made: list[Neighbour] = []
        clients: dict[str, MemberClient] = {}
        approvals = SqliteApprovalStore(db)
        desk = ApprovalDesk(
            policy=lambda: made[0].policy,
            store=approvals,
            receipts=receipts,
            clock=clock,
            entropy=entropy,
            times=ApprovalTimes(task_s=5),
        )
        peers = PeerEngines(lambda: list(made[0].states.values()), clients.get, patience=patience)
        prompts = Prompts(
            policy=lambda: made[0].policy,
            engines=lambda: [*([engine] if serves else []), *peers()],
            receipts=receipts,
            usage=SqliteUsageStore(db),
            desk=desk,
            clock=clock,
            node=Node(name=name, sandbox=SandboxLevel.NONE),
            roster_age=lambda: 60,
        )
        services = Services(
            prompts=prompts,
            policy=cast("Any", made),
            clock=clock,
            entropy=entropy,
            **dict.fromkeys(
                ("tasks", "task_store", "approvals", "desk", "blobs", "keys", "receipts", "machine"),
                cast("Any", None),
            ),
        )
        roster = RosterBook(
            read_id=lambda der: read_certificate(der).node_id,
            member_of=around.member_of,
            self_id=lambda: own.id,
        )
        api = Api(services, Doorman(key_of=keys.lookup, clock=clock, own_uid=os.geteuid(), book=roster))
        swarm_sock, tcp_sock = bind_tcp("127.0.0.1", 0), bind_tcp("127.0.0.1", 0)
        one = Neighbour(
            name=name,
            key=own,
            hood=around,
            book=book,
            prompts=prompts,
            receipts=receipts,
            swarm_port=swarm_sock.getsockname()[1],
            tcp_port=tcp_sock.getsockname()[1],
            http=http,
            stack=stack,
            clients=clients,
            approvals=approvals,
            desk=desk,
            policy=policy_of(policy),
        )
        made.append(one)
        context = tls.server_context(lambda: [member.cert_der for member in around.members.values()])
        await stack.enter_async_context(_beside(engine, receipts))
        await stack.enter_async_context(api.begun())
        hosts = frozenset({f"127.0.0.1:{one.tcp_port}"})
        await stack.enter_async_context(api.listening(tcp_sock, Listener(hosts=hosts)))
        await stack.enter_async_context(api.listening(swarm_sock, SWARM_LISTENER, context))
        while not engine.models():
            await asyncio.sleep(0.01)
        yield one


@asynccontextmanager
async def _beside(engine: OpenAIEngine, receipts: SqliteReceiptLog) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(engine.run()), group.create_task(receipts.run())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


@asynccontextmanager
async def lying(around: Hood, name: str, script: Script) -> AsyncIterator[FakeServer]:
    """Run a member with its real key that answers everything as the script says."""
    own = around.keys[name]
    context = Tls(own.seed, own.cert_der).server_context(
        lambda: [member.cert_der for member in around.members.values()]
    )
    paths = ("/v1/chat/completions", "/swarm/word", "/swarm/watch", "/swarm/sync")
    async with serving(dict.fromkeys(paths, script), tls=context) as fake:
        yield fake


def address_of(fake: FakeServer) -> PeerAddress:
    return PeerAddress("127.0.0.1", int(fake.address.rpartition(":")[2]))


@asynccontextmanager
async def dead_port() -> AsyncIterator[PeerAddress]:
    """Hold an address where nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield PeerAddress("127.0.0.1", int(sock.getsockname()[1]))


async def ask(
    node: Neighbour,
    body: Mapping[str, Any],
    *,
    path: str = "/v1/chat/completions",
    headers: Mapping[str, str] | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """Ask a node over its API-key listener, as any program does."""
    reader, writer = await asyncio.open_connection("127.0.0.1", node.tcp_port)
    try:
        data = json.dumps(body).encode()
        given = {
            "Host": f"127.0.0.1:{node.tcp_port}",
            "Authorization": f"Bearer {API_KEY}",
            "Content-Length": str(len(data)),
            "Connection": "close",
            **(headers or {}),
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
        writer.write(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + data)
        raw = await reader.readuntil(b"\r\n\r\n")
        first, *rest = raw.decode("latin-1").strip().split("\r\n")
        pairs = (line.partition(":") for line in rest)
        got = {key.lower(): value.strip() for key, _, value in pairs}
        answer = await reader.read()
        if got.get("transfer-encoding") == "chunked":
            answer = _unchunked(answer)
        return int(first.split()[1]), got, answer
    finally:
        writer.transport.abort()


def _unchunked(data: bytes) -> bytes:
    body = b""
    while data:
        size, _, rest = data.partition(b"\r\n")
        length = int(size, 16)
        body, data = body + rest[:length], rest[length + 2 :]
    return body
