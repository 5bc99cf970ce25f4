"""Builds the node: the only place that names the classes behind the ports.

Start is in two steps: everything that answers from disk first, then the listeners; engines come up
behind them. Stop is the reverse; nothing that must not be lost waits for it.
"""

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from mycoswarmd.api.access import Doorman, Listener
from mycoswarmd.api.app import Api
from mycoswarmd.api.bind import bind_tcp, bind_unix
from mycoswarmd.api.services import Services
from mycoswarmd.core.policy.model import Policy
from mycoswarmd.daemon.backup import backup
from mycoswarmd.daemon.clock import SystemClock, SystemEntropy
from mycoswarmd.daemon.door import ProgramDoor, program_listener
from mycoswarmd.daemon.gpuwatch import GpuWatch
from mycoswarmd.daemon.machine import NodeMachine
from mycoswarmd.daemon.outside import Outside, make_outside
from mycoswarmd.daemon.ownfacts import OwnFacts
from mycoswarmd.daemon.policyfile import PolicyKeeper, way_back
from mycoswarmd.daemon.security import ProvedCages, Security, find_capability
from mycoswarmd.daemon.settings import EngineSetting, Settings
from mycoswarmd.daemon.swarmparts import make_swarm
from mycoswarmd.engines.llamacpp import ManagedLlama
from mycoswarmd.engines.ollama import OllamaEngine
from mycoswarmd.engines.openai_http import OpenAIEngine
from mycoswarmd.errors import ConfigError
from mycoswarmd.flow.approve import ApprovalDesk, ApprovalTimes
from mycoswarmd.flow.ports import Engine
from mycoswarmd.flow.prompt import Prompts
from mycoswarmd.flow.task import TaskBounds, Tasks
from mycoswarmd.sandbox.engineunit import EngineUnits
from mycoswarmd.sandbox.process import start_engine
from mycoswarmd.store.approvals import SqliteApprovalStore
from mycoswarmd.store.blobs import DirectoryBlobStore
from mycoswarmd.store.db import Database
from mycoswarmd.store.keys import SqliteKeyStore
from mycoswarmd.store.receipts import SqliteReceiptLog
from mycoswarmd.store.tasks import SqliteTaskStore
from mycoswarmd.store.usage import SqliteUsageStore
from mycoswarmd.wire.proof import Proof, Unit

log = logging.getLogger(__name__)

# A workspace or a set of changes; the same bound as on the way in.
_BLOB_BYTES = 256 << 20


class PolicyDesk:
    """The policy keeper as the API sees it: a change of policy has its receipt before it is in force."""

    def __init__(self, keeper: PolicyKeeper, receipts: SqliteReceiptLog, *, is_service: bool) -> None:
        self._keeper = keeper
        self._receipts = receipts
        self._is_service = is_service

    @property
    def policy(self) -> Policy | None:
        """The policy in force."""
        return self._keeper.policy

    @property
    def way_back(self) -> str:
        """How the owner gets in again whom the policy locks out."""
        return way_back(self._keeper.path, is_service=self._is_service)

    def report(self) -> Mapping[str, object]:
        """Describe the file and what is in force."""
        checked, policy = self._keeper.checked, self._keeper.policy
        return {
            "name": policy.name if policy is not None else "",
            "path": str(self._keeper.path),
            "sha256": policy.sha256 if policy is not None else "",
            "text": self._keeper.text,
            "problem": self._keeper.problem or "",
            "warnings": [str(warning) for warning in checked.warnings] if checked is not None else [],
            "proofs": [
                {"invariant": proof.invariant, "holds": proof.holds, "points": proof.points}
                for proof in (checked.proofs if checked is not None else ())
            ],
            "agents": {
                name: {"model": agent.model, "tools": list(agent.tools), "limits": asdict(agent.limits)}
                for name, agent in (policy.agents.items() if policy is not None else ())
            },
        }

    async def reload(self) -> Mapping[str, object]:
        """Read the file again; on any problem the old policy stays and PolicyInvalid is raised."""
        reload = await asyncio.to_thread(self._keeper.reload)
        await self.record("reloaded", changed=len(reload.changed))
        policy = self._keeper.policy
        return {
            "changed": list(reload.changed),
            "warnings": [str(warning) for warning in reload.warnings],
            "sha256": policy.sha256 if policy is not None else "",
        }

    async def record(self, what: str, **facts: object) -> None:
        """Write the receipt of a policy that came into force, or of none."""
        policy = self._keeper.policy
        body = {
            "what": what,
            "path": str(self._keeper.path),
            "policy": policy.sha256 if policy is not None else "",
            "problem": self._keeper.problem or "",
            **facts,
        }
        await self._receipts.durable(self._receipts.append("policy", body))


class ReceiptDesk:
    """The receipts as the API sees them."""

    def __init__(self, log_: SqliteReceiptLog) -> None:
        self._log = log_
        self.append = log_.append
        self.durable = log_.durable

    async def page(self, *, after: int, limit: int, last: int | None) -> Sequence[Mapping[str, object]]:
        """Return receipts with seq > after, or the newest."""
        if last is not None:
            after, limit = max(0, (await self._log.head()).seq - last), last
        return [asdict(row) for row in await self._log.tail(after=after, limit=limit)]

    async def one(self, reference: str) -> Mapping[str, object]:
        """Return one receipt."""
        return asdict(await self._log.get(reference))

    async def top(self) -> Mapping[str, object]:
        """Return the head."""
        head = await self._log.head()
        return {**asdict(head), "count": head.seq}

    async def check(self, head: str | None) -> Mapping[str, object]:
        """Walk the chain."""
        return asdict(await self._log.verify(head))


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A node that answers.

    Attributes:
        is_alone: whether it is in no swarm.
    """

    policy: PolicyDesk
    is_alone: Callable[[], bool]


@asynccontextmanager
async def running_node(settings: Settings, api_socket: socket.socket | None = None) -> AsyncIterator[Running]:
    """Run a node while the context lasts; it is ready when the context is entered.

    `api_socket` is where local callers come in, where somebody else has made that.
    """
    clock, entropy = SystemClock(), SystemEntropy()
    outside = make_outside(settings)
    cages = ProvedCages(outside.cages)
    security = Security(settings, lan=outside.lan, cages=cages, clock=clock)
    await security.begin()  # before a key is read
    async with AsyncExitStack() as stack:
        db = Database(settings.state_dir / "mycoswarm.db")
        await db.open()  # makes the state directory, or refuses it; nothing is put into one that is refused
        stack.push_async_callback(db.close)
        _make_directories(settings)
        receipts = SqliteReceiptLog(db, now_ms=clock.now_ms)
        await receipts.load()
        stack.push_async_callback(receipts.head)  # at the end, write what nobody waited for
        keeper = await asyncio.to_thread(_open_policy, settings, clock)
        keys = SqliteKeyStore(db, now_ms=clock.now_ms)
        await keys.load()

        def rank(label: str) -> int:
            policy = keeper.policy
            return policy.label_rank(label) if policy is not None else 0

        task_store, approvals = SqliteTaskStore(db, rank=rank), SqliteApprovalStore(db)
        blobs = DirectoryBlobStore(settings.state_dir / "blobs", max_bytes=_BLOB_BYTES)
        await blobs.sweep(await task_store.blobs())
        watch = GpuWatch(outside.start_probe, clock=clock, proved=security.note)
        facts = OwnFacts(settings, await find_capability(settings, cages), watch)
        engines = make_engines(settings, outside, keeper, clock, proved=security.note)
        desk = ApprovalDesk(
            policy=lambda: keeper.policy,
            store=approvals,
            receipts=receipts,
            clock=clock,
            entropy=entropy,
            times=ApprovalTimes(task_s=settings.approval_s),
        )
        parts = await make_swarm(db, settings, outside, receipts, clock, entropy, proved=security.note)
        security.signer = parts.signer
        swarm = parts.swarm
        prompts = Prompts(
            policy=lambda: keeper.policy,
            engines=lambda: [*engines, *parts.members()],
            receipts=receipts,
            usage=SqliteUsageStore(db),
            desk=desk,
            clock=clock,
            node=facts.node(),
            roster_age=swarm.age_s,
        )
        tasks = Tasks(
            policy=lambda: keeper.policy,
            prompts=prompts,
            store=task_store,
            blobs=blobs,
            cages=cages,
            desk=desk,
            receipts=receipts,
            clock=clock,
            entropy=entropy,
            bounds=TaskBounds(slots=settings.task_slots, max_open=settings.max_open_tasks),
            is_member=lambda node_id: swarm.member(node_id) is not None,
        )
        door = ProgramDoor(outside, settings.listen if settings.appliance else None)
        machine = NodeMachine(
            settings=settings,
            policy=keeper,
            engines=engines,
            tasks=task_store,
            receipts=receipts,
            facts=facts,
            security=security,
            door=door,
            clock=clock,
            parts=parts,
        )
        word = parts.word(prompts, engines, state=machine.state, settings=settings)
        policy_desk = PolicyDesk(keeper, receipts, is_service=settings.appliance)
        services = Services(
            prompts=prompts,
            tasks=tasks,
            task_store=task_store,
            approvals=approvals,
            desk=desk,
            blobs=blobs,
            keys=keys,
            receipts=ReceiptDesk(receipts),
            policy=policy_desk,
            machine=machine,
            clock=clock,
            entropy=entropy,
            swarm=parts.desk(word),
            backup=lambda: backup(db, settings),
        )

        stack.callback(facts.follow(prompts, swarm))
        cages.on_change = facts.take_sandbox
        api = Api(services, Doorman(key_of=keys.lookup, clock=clock, own_uid=os.geteuid(), book=parts.book()))
        background: dict[str, Callable[[], Coroutine[None, None, None]]] = {
            "receipts": receipts.run,
            "keys": keys.run,
            "tasks": tasks.run,
            "gpus": watch.run,
            "beacons": swarm.run,
            "membership": partial(parts.membership.run, api),
            "word": word.run,
            "security": security.run,
            "door": partial(door.run, api),
        }
        background |= {f"engine:{engine.name}": engine.run for engine in engines}
        # What cannot be bound is said before anything runs.
        listeners = _listeners(settings, stack, api_socket)
        await stack.enter_async_context(_in_background(background))
        await policy_desk.record("started")
        await stack.enter_async_context(api.begun())
        for sock, listener in listeners:
            await stack.enter_async_context(api.listening(sock, listener))
        yield Running(policy=policy_desk, is_alone=lambda: swarm.roster is None)


def _make_directories(settings: Settings) -> None:
    """Make what a person would not; the appliance's are made by systemd, or of no use without."""
    own = (settings.runtime_dir, settings.models_dir, settings.engine_dir)
    for path in (_last_words_dir(settings),) if settings.appliance else own:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigError("bad-directory", f"cannot use directory {str(path)!r}: {exc.strerror}") from exc


def _last_words_dir(settings: Settings) -> Path:
    """Return where the sockets and logs of engines go; of units, whose sockets are elsewhere, only logs."""
    return settings.state_dir / "engines" if settings.appliance else settings.runtime_dir


def make_engines(
    settings: Settings,
    outside: Outside,
    keeper: PolicyKeeper,
    clock: SystemClock,
    *,
    proved: Callable[[Proof], None],
) -> list[Engine]:
    """Build the embedded engine and those that the settings declare."""
    engines: list[Engine] = []
    units = None
    if settings.appliance:
        units = EngineUnits(settings.outpost(Unit.ENGINE), sockets=settings.engine_runtime_dir, proved=proved)
    if settings.managed_engine:
        engines.append(
            ManagedLlama(
                name="embedded",
                models_dir=settings.models_dir,
                engine_dir=settings.engine_dir,
                runtime_dir=_last_words_dir(settings),
                starter=start_engine,
                units=units,
                clock=clock,
                idle_s=settings.engine_idle_s,
                context_tokens=settings.engine_context_tokens,
            )
        )
    engines += [_declared(entry, outside, keeper) for entry in settings.engines]
    return engines


def _declared(entry: EngineSetting, outside: Outside, keeper: PolicyKeeper) -> Engine:
    if entry.kind == "ollama":
        return OllamaEngine(
            name=entry.name,
            url=entry.url,
            destinations=lambda: _hosts(keeper.policy),
            concurrency=entry.concurrency,
            dial=outside.dial,
        )
    return OpenAIEngine(
        name=entry.name,
        url=entry.url,
        native_tools=entry.native_tools,
        concurrency=entry.concurrency,
        dial=outside.dial,
    )


def _hosts(policy: Policy | None) -> dict[str, str]:
    """Map each declared destination's host to its name."""
    destinations = policy.destinations.values() if policy is not None else ()
    return {urlsplit(dest.url).hostname or "": dest.name for dest in destinations}


def _open_policy(settings: Settings, clock: SystemClock) -> PolicyKeeper:
    keeper = PolicyKeeper(
        settings.policy_file,
        settings.state_dir,
        now_ms=clock.now_ms,
        is_required=settings.policy_is_given,
    )
    if keeper.problem:
        log.error("%s", keeper.problem, extra={"event": "policy-broken"})
    return keeper


def _listeners(
    settings: Settings, stack: AsyncExitStack, api_socket: socket.socket | None
) -> list[tuple[socket.socket, Listener]]:
    if api_socket is not None:  # it is systemd's, with its path and its mode
        return [(api_socket, Listener(hosts=None))]
    # The policy decides what each local user may do, so every account may knock; the directory's
    # own mode keeps them out where the node is one person's.
    found: list[tuple[socket.socket, Listener]] = [
        (bind_unix(settings.socket_path, mode=0o666), Listener(hosts=None))
    ]
    # A socket that nobody listens at any more looks like a node that is down.
    stack.callback(settings.socket_path.unlink, missing_ok=True)
    if settings.listen is not None:
        found.append((bind_tcp(*settings.listen), program_listener(*settings.listen)))
    return found


@asynccontextmanager
async def _in_background(
    runs: Mapping[str, Callable[[], Coroutine[None, None, None]]],
) -> AsyncIterator[None]:
    """Run these while the context lasts; one that fails ends the node, and systemd starts it again."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run(), name=name) for name, run in runs.items()]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
