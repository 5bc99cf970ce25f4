"""The HTTP interface of one node in this process: real stores, roster, TLS and sockets, a canned engine.

Callers on the unix socket are processes of their own, since a node does not answer its own calls.
"""

import asyncio
import base64
import hashlib
import json
import os
import ssl
import sys
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mycoswarmd.api.access import SWARM_LISTENER, Doorman, Listener, RosterBook
from mycoswarmd.api.app import Api
from mycoswarmd.api.bind import bind_tcp, bind_unix
from mycoswarmd.api.lines import Bounds, Lines
from mycoswarmd.api.routes import ROUTES, Route
from mycoswarmd.api.services import Services, SwarmDesk
from mycoswarmd.core.policy.check import check_policy
from mycoswarmd.core.policy.model import Policy
from mycoswarmd.core.roster import Member
from mycoswarmd.core.types import SandboxLevel
from mycoswarmd.daemon.clock import SystemClock, SystemEntropy
from mycoswarmd.daemon.wiring import ReceiptDesk
from mycoswarmd.engines.ollama import OllamaEngine
from mycoswarmd.engines.openai_http import OpenAIEngine
from mycoswarmd.errors import Unavailable
from mycoswarmd.flow.approve import ApprovalDesk, ApprovalTimes
from mycoswarmd.flow.enrol import Checks, Invitations
from mycoswarmd.flow.ports import Engine
from mycoswarmd.flow.prompt import Node, Prompts
from mycoswarmd.flow.swarm import Swarm
from mycoswarmd.flow.swarmports import Hint, PeerAddress, PeerState, Reach
from mycoswarmd.flow.task import TaskBounds, Tasks
from mycoswarmd.sandbox.bwrap import BubblewrapCages
from mycoswarmd.sandbox.zipapp import build_agent
from mycoswarmd.store.approvals import SqliteApprovalStore
from mycoswarmd.store.blobs import DirectoryBlobStore
from mycoswarmd.store.db import Database
from mycoswarmd.store.keys import SqliteKeyStore
from mycoswarmd.store.receipts import SqliteReceiptLog
from mycoswarmd.store.roster import SqliteRosterStore
from mycoswarmd.store.tasks import SqliteTaskStore
from mycoswarmd.store.usage import SqliteUsageStore
from mycoswarmd.trust import keys as trust_keys
from mycoswarmd.trust.certificate import read_certificate
from mycoswarmd.trust.identity import IdentityFile, NodeIdentity
from mycoswarmd.trust.signer import FileSigner
from mycoswarmd.trust.tlsctx import Tls, knock_context
from mycoswarmd.wire.peer import Word
from tests.rosters import Key, key

POLICY = b"""
schema = 1
name = "test"
[agents.scribe]
model = "*"
[[rule]]
id = "owner"
why = "the owner runs this node"
effect = "allow"
action = ["task", "admin"]
origin = ["owner"]
[[rule]]
id = "here"
why = "prompts are answered here"
effect = "allow"
action = "infer"
zone = ["self"]
from = ["local", "peer"]
label = { max = "private" }
"""
API_KEY = "mk-tests-0123456789abcdef"


class Desk:
    """The policy in force."""

    def __init__(self) -> None:
        self.policy: Policy | None = check_policy(
            POLICY, path="test.toml", resolve_program=lambda _: None
        ).policy

    @property
    def way_back(self) -> str:
        return "mend the file"

    def report(self) -> Mapping[str, object]:
        return {}

    async def reload(self) -> Mapping[str, object]:
        return {}


class Machine:
    """Nothing is known of this machine."""

    async def status(self) -> Mapping[str, object]:
        return {"status": "fine"}

    async def security(self) -> Mapping[str, object]:
        return {"proofs": []}

    async def doctor(self) -> Sequence[Mapping[str, object]]:
        return []


class Fleet:
    """What a test says of the other members; writes down every hint."""

    def __init__(self) -> None:
        self.known: list[PeerState] = []
        self.hints: list[Hint] = []

    def states(self) -> Sequence[PeerState]:
        return self.known

    def hint(self, hint: Hint) -> None:
        self.hints.append(hint)

    async def ping(self, node_id: str) -> float:
        if not any(one.member.id == node_id and one.state is Reach.READY for one in self.known):
            raise Unavailable("peer-unreachable", "cannot reach it")
        return 1.5


class Newcomer:
    """Writes down where it should have joined."""

    def __init__(self) -> None:
        self.tried: list[tuple[str, list[PeerAddress], str]] = []

    async def join(self, code_text: str, addresses: Sequence[PeerAddress], name: str) -> dict[str, object]:
        self.tried.append((code_text, list(addresses), name))
        return {}


class Words:
    """A word that a test changes."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._changed = asyncio.Event()
        self.running = 0
        self.uptime_s = 0

    def now(self) -> Word:
        return Word(
            id=self._swarm.self_id or "",
            version="1",
            boot=1,
            instance="00" * 8,
            port=7437,
            digest=self._swarm.digest,
            statements=len(self._swarm.hashes()),
            running=self.running,
            uptime_s=self.uptime_s,
        )

    def change(self) -> None:
        self.running += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def next_change(self) -> None:
        await self._changed.wait()


class Clock(SystemClock):
    """The kernel's time, moved on or stopped by a test."""

    ahead_s = 0.0
    stopped_at_s: float | None = None

    def stop(self) -> None:
        self.stopped_at_s = super().monotonic_s()

    def monotonic_s(self) -> float:
        now_s = super().monotonic_s() if self.stopped_at_s is None else self.stopped_at_s
        return now_s + self.ahead_s

    def boot_s(self) -> float:
        return super().boot_s() + self.ahead_s


@dataclass(kw_only=True)
class Running:
    """A node, and how to talk to it."""

    api: Api
    directory: Path
    services: Services
    desk: SwarmDesk
    fleet: Fleet
    words: Words
    clock: Clock
    tls: Tls
    swarm_port: int
    tcp_port: int
    ghosts: set[str]
    newcomer: "Newcomer"
    members: dict[str, Key] = field(default_factory=dict)

    @property
    def unix(self) -> Path:
        return self.directory / "api.sock"

    @property
    def swarm(self) -> Swarm:
        return self.desk.swarm

    @property
    def host(self) -> str:
        return f"{self.swarm.self_id}.mycoswarm.internal"

    async def admit(self, name: str, role: str = "node") -> Key:
        """Sign a key in."""
        newcomer = key("apis", name)
        made = await self.desk.invitations.open(role=role, name="", ttl_s=60, needs_confirm=False)
        await self.swarm.admit(cert_der=newcomer.cert_der, name=name, role=role, invite=str(made["invite"]))
        await self.desk.invitations.load()
        self.members[name] = newcomer
        return newcomer

    def own_key(self) -> Key:
        """Return this node's own key."""
        identity = self.swarm.identity
        assert isinstance(identity, NodeIdentity)
        return Key(identity.seed)

    async def engines_ready(self, count: int = 1) -> None:
        """Wait until so many engines serve something."""
        async with asyncio.timeout(60):
            while len({info.engine for info in self.services.prompts.models()}) < count:
                await asyncio.sleep(0.01)

    async def make_signer(self, name: str) -> None:
        """Let a member sign, with a key of its own."""

        async def ask(node_id: str) -> str:
            del node_id
            return key("signing", name).hex

        self.swarm.ask_signer_key = ask
        await self.swarm.add_signer(name)

    def member(self, name: str) -> Member:
        return self.swarm.find(name)

    def tls_of(self, who: Key | None) -> ssl.SSLContext:
        """Return the context with which a key, or nobody, reaches this node."""
        if who is None:
            return knock_context()
        identity = self.swarm.identity
        assert identity is not None
        return Tls(who.seed, who.cert_der).client_context(identity.cert_der)

    @asynccontextmanager
    async def connected(self, who: Key | None, *, source: str = "127.0.0.1") -> AsyncIterator["Connection"]:
        """Hold a connection to the swarm's listener as a key, or as nobody."""
        reader, writer = await asyncio.open_connection(
            "127.0.0.1",
            self.swarm_port,
            ssl=self.tls_of(who),
            server_hostname=self.host,
            local_addr=(source, 0),
        )
        try:
            yield Connection(reader, writer, self.host)
        finally:
            writer.transport.abort()

    @asynccontextmanager
    async def program(self) -> AsyncIterator["Connection"]:
        """Hold a connection to the API-key listener."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.tcp_port)
        try:
            yield Connection(reader, writer, f"127.0.0.1:{self.tcp_port}")
        finally:
            writer.transport.abort()

    async def ask(self, who: Key | None, method: str, path: str, body: object = None) -> "Answer":
        """Send one request as a key, or as nobody, on a connection of its own."""
        async with self.connected(who) as connection:
            return await connection.ask(method, path, body)


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        value = json.loads(self.body)
        assert isinstance(value, dict)
        return value

    @property
    def code(self) -> str:
        """The code of a refusal, or ""."""
        return str(self.json["error"]["code"]) if self.status >= 400 else ""


class Connection:
    """HTTP/1.1 by hand, so that a test may say anything."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> None:
        self.reader = reader
        self.writer = writer
        self.host = host

    async def send(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> None:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1"]
        given = {"Host": self.host, **(headers or {})}
        lines += [f"{name}: {value}" for name, value in given.items() if value]
        if data or method != "GET":
            lines.append(f"Content-Length: {len(data)}")
        self.writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        """Read up to the body; ConnectionError when the connection ends before."""
        try:
            raw = await self.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as exc:
            raise ConnectionResetError(repr(exc.partial[:40])) from None
        first, *rest = raw.decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in rest if line)
        return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}

    async def answer(self) -> Answer:
        status, headers = await self.head()
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while piece := await self.chunk():
                body += piece
            return Answer(status, headers, body)
        return Answer(status, headers, await self.reader.readexactly(int(headers.get("content-length", "0"))))

    async def chunk(self) -> bytes:
        """Read one piece of an answer that is sent piece by piece; b"" at its end."""
        line = await self.reader.readline()
        if not line:
            raise ConnectionResetError
        data = await self.reader.readexactly(int(line, 16))
        await self.reader.readexactly(2)
        return data

    async def ask(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        await self.send(method, path, body, headers)
        return await self.answer()

    def server_cert(self) -> bytes:
        """Return the certificate that this connection's other side showed."""
        der = self.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        assert isinstance(der, bytes)
        return der

    async def is_closed(self) -> bool:
        """Wait until the other side has ended the connection."""
        try:
            async with asyncio.timeout(25):  # less than the patience with a silent one
                return await self.reader.read(1) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False


@asynccontextmanager
async def running_api(
    *,
    routes: Sequence[Route] = ROUTES,
    bounds: Bounds | None = None,
    engine_url: str = "",
    ollama_url: str = "",
    in_swarm: bool = True,
    cuts: bool = True,
    makes_room: bool = True,
    agent: bytes | None = None,
) -> AsyncIterator[Running]:
    """Run a node with its three listeners; it has begun a swarm of which it is the first signer."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="myco-api-")))
        directory.chmod(0o755)  # other users knock, too
        clock, entropy = Clock(), SystemEntropy()
        db = Database(directory / "state" / "mycoswarm.db")
        await db.open()
        stack.push_async_callback(db.close)
        receipts = SqliteReceiptLog(db, now_ms=clock.now_ms)
        await receipts.load()
        stack.push_async_callback(receipts.head)
        keys = SqliteKeyStore(db, now_ms=clock.now_ms)
        await keys.load()
        await _make_key(keys)
        identities, store = IdentityFile(directory / "identity"), SqliteRosterStore(db)
        swarm = Swarm(
            store=store,
            identities=identities,
            signer=FileSigner(directory / "signer"),
            receipts=receipts,
            clock=clock,
            entropy=entropy,
            verify=trust_keys.verify,
            read_cert=read_certificate,
        )
        await swarm.start()
        if in_swarm:
            await swarm.init("home", node_name="alpha", recovery_public_hex=key("recovery").hex)
        engines: list[Engine] = []
        if engine_url:
            engines.append(OpenAIEngine(name="canned", url=engine_url, native_tools=True, concurrency=4))
        if ollama_url:
            engines.append(OllamaEngine(name="ollama", url=ollama_url, destinations=dict))
        newcomer = Newcomer()
        services, desk, fleet, words = _services(
            directory, db, receipts, keys, clock, swarm, engines, newcomer, agent or build_agent()
        )
        tls = _tls(swarm)
        context = tls.server_context(
            lambda: [one.cert_der for one in (swarm.roster.members.values() if swarm.roster else ())]
        )
        swarm.subscribe(tls.refresh)
        ghosts: set[str] = set()  # put out of the roster at a moment that only a test can find
        book = RosterBook(
            read_id=lambda der: read_certificate(der).node_id,
            member_of=lambda one: None if one in ghosts else swarm.member(one),
            self_id=lambda: swarm.self_id,
        )
        doorman = Doorman(key_of=keys.lookup, clock=clock, own_uid=os.geteuid(), book=book)
        api = Api(services, doorman, bounds=bounds, routes=routes)
        if not cuts:
            api.cut = lambda node_ids: None  # type: ignore[method-assign]
        if not makes_room:
            api._lines = _Hoarded(bounds or Bounds(), read_id=book.read_id)
        await stack.enter_async_context(_running(engines))
        listener, tcp = bind_tcp("::", 0), bind_tcp("127.0.0.1", 0)
        swarm_port, tcp_port = listener.getsockname()[1], tcp.getsockname()[1]
        unix = bind_unix(directory / "api.sock", mode=0o666)
        await stack.enter_async_context(api.begun())
        await stack.enter_async_context(api.listening(unix, Listener()))
        hosts = frozenset({f"127.0.0.1:{tcp_port}"})
        await stack.enter_async_context(api.listening(tcp, Listener(hosts=hosts)))
        await stack.enter_async_context(api.listening(listener, SWARM_LISTENER, context))
        yield Running(
            api=api,
            directory=directory,
            services=services,
            desk=desk,
            fleet=fleet,
            words=words,
            clock=clock,
            tls=tls,
            swarm_port=swarm_port,
            tcp_port=tcp_port,
            ghosts=ghosts,
            newcomer=newcomer,
        )


class _Hoarded(Lines):
    """The bound on handshakes without what keeps it fair."""

    def has_room(self, source: str) -> bool:
        del source
        return len(self._handshakes) < self.bounds.handshakes


@asynccontextmanager
async def _running(engines: Sequence[Engine]) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(engine.run()) for engine in engines]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


async def _make_key(keys: SqliteKeyStore) -> None:
    sha256 = hashlib.sha256(API_KEY.encode()).hexdigest()
    await keys.create(key_id="k-1", name="tests", secret_sha256=sha256, now_ms=1)


def _tls(swarm: Swarm) -> Tls:
    identity = swarm.identity
    if isinstance(identity, NodeIdentity):
        return Tls(identity.seed, identity.cert_der)
    nobody = key("nobody")
    return Tls(nobody.seed, nobody.cert_der)


def _services(
    directory: Path,
    db: Database,
    receipts: SqliteReceiptLog,
    keys: SqliteKeyStore,
    clock: Clock,
    swarm: Swarm,
    engines: Sequence[Engine],
    newcomer: Newcomer,
    agent: bytes,
) -> tuple[Services, SwarmDesk, Fleet, Words]:
    policy, entropy = Desk(), SystemEntropy()
    approvals = SqliteApprovalStore(db)
    desk = ApprovalDesk(
        policy=lambda: policy.policy,
        store=approvals,
        receipts=receipts,
        clock=clock,
        entropy=entropy,
        times=ApprovalTimes(task_s=60),
    )
    prompts = Prompts(
        policy=lambda: policy.policy,
        engines=lambda: engines,
        receipts=receipts,
        usage=SqliteUsageStore(db),
        desk=desk,
        clock=clock,
        node=Node(name="alpha", sandbox=SandboxLevel.NONE),
    )
    task_store = SqliteTaskStore(db, rank=lambda label: 0)
    blobs = DirectoryBlobStore(directory / "state" / "blobs", max_bytes=1 << 20)
    tasks = Tasks(
        policy=lambda: policy.policy,
        prompts=prompts,
        store=task_store,
        blobs=blobs,
        cages=BubblewrapCages(agent, directory),
        desk=desk,
        receipts=receipts,
        clock=clock,
        entropy=entropy,
        bounds=TaskBounds(slots=1, max_open=10),
        is_member=lambda node_id: swarm.member(node_id) is not None,
    )
    fleet, words = Fleet(), Words(swarm)
    store = SqliteRosterStore(db)
    checks = Checks(verify=trust_keys.verify, read_cert=read_certificate)
    swarm_desk = SwarmDesk(
        swarm=swarm,
        invitations=Invitations(swarm=swarm, store=store, clock=clock, entropy=entropy, check=checks),
        newcomer=newcomer,
        fleet=fleet,
        word=words,
        nearby=nobody_near,
    )

    async def backup() -> AsyncGenerator[bytes, None]:
        yield b"one"
        yield b"two"

    services = Services(
        prompts=prompts,
        tasks=tasks,
        task_store=task_store,
        approvals=approvals,
        desk=desk,
        blobs=blobs,
        keys=keys,
        receipts=ReceiptDesk(receipts),
        policy=policy,
        machine=Machine(),
        clock=clock,
        entropy=entropy,
        swarm=swarm_desk,
        backup=backup,
    )
    return services, swarm_desk, fleet, words


async def nobody_near() -> Sequence[PeerAddress]:
    return []


# --- callers on the unix socket -------------------------------------------------------------------

_CALLER = """
import base64, http.client, json, os, socket, sys
path, uid = sys.argv[1], int(sys.argv[2])
if uid:
    os.setgroups([]); os.setgid(uid); os.setuid(uid)
for line in sys.stdin:
    method, target, body, headers = json.loads(line)
    connection = http.client.HTTPConnection("mycoswarm", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(path)
    connection.request(method, target, base64.b64decode(body), headers)
    answer = connection.getresponse()
    data = base64.b64encode(answer.read()).decode()
    print(json.dumps([answer.status, dict(answer.headers), data]), flush=True)
    connection.close()
"""


class LocalCaller:
    """A process of some user that asks for us."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        line = json.dumps([method, path, base64.b64encode(data).decode(), dict(headers or {})])
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line.encode() + b"\n")
        status, given, raw = json.loads(await self._process.stdout.readline())
        return Answer(status, {name.lower(): value for name, value in given.items()}, base64.b64decode(raw))


@asynccontextmanager
async def local_user(node: Running, *, uid: int) -> AsyncIterator[LocalCaller]:
    """Hold a process of a user; 0 keeps ours."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-c", _CALLER, str(node.unix), str(uid),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 24,
    )  # fmt: skip
    try:
        yield LocalCaller(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()
