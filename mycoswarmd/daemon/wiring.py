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
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from mycoswarmd.api.access import Doorman, Listener
from mycoswarmd.api.app import Api, bind_tcp, bind_unix
from mycoswarmd.api.services import Services
from mycoswarmd.core.policy.model import Policy
from mycoswarmd.daemon.backup import backup
from mycoswarmd.daemon.clock import SystemClock, SystemEntropy
from mycoswarmd.daemon.machine import NodeMachine
from mycoswarmd.daemon.policyfile import PolicyKeeper
from mycoswarmd.daemon.settings import EngineSetting, Settings
from mycoswarmd.daemon.swarmparts import make_swarm
from mycoswarmd.engines.llamacpp import ManagedLlama
from mycoswarmd.engines.ollama import OllamaEngine
from mycoswarmd.engines.openai_http import OpenAIEngine
from mycoswarmd.errors import ConfigError
from mycoswarmd.flow.approve import ApprovalDesk, ApprovalTimes
from mycoswarmd.flow.ports import Engine
from mycoswarmd.flow.prompt import Node, Prompts
from mycoswarmd.flow.task import TaskBounds, Tasks
from mycoswarmd.inventory.gpu import Gpus, read_gpus
from mycoswarmd.inventory.host import read_host, tier_of
from mycoswarmd.sandbox.bwrap import BubblewrapCages
from mycoswarmd.sandbox.capability import probe_machine
from mycoswarmd.sandbox.process import start_engine
from mycoswarmd.sandbox.zipapp import build_agent
from mycoswarmd.store.approvals import SqliteApprovalStore
from mycoswarmd.store.blobs import DirectoryBlobStore
from mycoswarmd.store.db import Database
from mycoswarmd.store.keys import SqliteKeyStore
from mycoswarmd.store.receipts import SqliteReceiptLog
from mycoswarmd.store.tasks import SqliteTaskStore
from mycoswarmd.store.usage import SqliteUsageStore

log = logging.getLogger(__name__)

# A workspace or a set of changes; the same bound as on the way in.
_BLOB_BYTES = 256 << 20


class PolicyDesk:
    """The policy keeper as the API sees it: a change of policy has its receipt before it is in force."""

    def __init__(self, keeper: PolicyKeeper, receipts: SqliteReceiptLog) -> None:
        self._keeper = keeper
        self._receipts = receipts

    @property
    def policy(self) -> Policy | None:
        """The policy in force."""
        return self._keeper.policy

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


@asynccontextmanager
async def running_node(settings: Settings) -> AsyncIterator[PolicyDesk]:
    """Run a node while the context lasts; it is ready when the context is entered."""
    clock, entropy = SystemClock(), SystemEntropy()
    async with AsyncExitStack() as stack:
        db = Database(settings.state_dir / "mycoswarm.db")
        await db.open()  # makes the state directory, or refuses it; nothing is put into one that is refused
        stack.push_async_callback(db.close)
        for directory in (settings.runtime_dir, settings.models_dir, settings.engine_dir):
            _make_directory(directory)
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
        capability = await asyncio.to_thread(probe_machine)
        host = read_host()
        gpus = Gpus(found=(), detail="not read yet")
        engines = make_engines(settings, keeper, clock)
        desk = ApprovalDesk(
            policy=lambda: keeper.policy,
            store=approvals,
            receipts=receipts,
            clock=clock,
            entropy=entropy,
            times=ApprovalTimes(task_s=settings.approval_s),
        )
        parts = await make_swarm(db, settings, receipts, clock, entropy)
        swarm = parts.swarm
        prompts = Prompts(
            policy=lambda: keeper.policy,
            engines=lambda: [*engines, *parts.members()],
            receipts=receipts,
            usage=SqliteUsageStore(db),
            desk=desk,
            clock=clock,
            node=Node(name=settings.node_name, tier=tier_of(host, gpus.found), sandbox=capability.level),
            roster_age=swarm.age_s,
        )
        tasks = Tasks(
            policy=lambda: keeper.policy,
            prompts=prompts,
            store=task_store,
            blobs=blobs,
            cages=BubblewrapCages(build_agent(), settings.runtime_dir),
            desk=desk,
            receipts=receipts,
            clock=clock,
            entropy=entropy,
            bounds=TaskBounds(slots=settings.task_slots, max_open=settings.max_open_tasks),
            is_member=lambda node_id: swarm.member(node_id) is not None,
        )
        machine = NodeMachine(
            settings=settings,
            policy=keeper,
            engines=engines,
            tasks=task_store,
            receipts=receipts,
            capability=capability,
            host=host,
            gpus=lambda: gpus,
            clock=clock,
            parts=parts,
        )
        word = parts.word(prompts, engines, state=machine.state, settings=settings)
        policy_desk = PolicyDesk(keeper, receipts)
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

        def take_name() -> None:
            """Be called what the roster says."""
            me = swarm.member(swarm.self_id or "")
            prompts.node = replace(prompts.node, name=me.name if me is not None else settings.node_name)

        take_name()
        stack.callback(swarm.subscribe(take_name))

        async def look_at_gpus() -> None:
            nonlocal gpus
            gpus = await asyncio.to_thread(read_gpus)
            prompts.node = replace(prompts.node, tier=tier_of(host, gpus.found))

        api = Api(services, Doorman(key_of=keys.lookup, clock=clock, own_uid=os.geteuid(), book=parts.book()))
        background: dict[str, Callable[[], Coroutine[None, None, None]]] = {
            "receipts": receipts.run,
            "keys": keys.run,
            "tasks": tasks.run,
            "gpus": look_at_gpus,
            "beacons": swarm.run,
            "membership": partial(parts.membership.run, api),
            "word": word.run,
        }
        background |= {f"engine:{engine.name}": engine.run for engine in engines}
        listeners = _listeners(settings, stack)  # what cannot be bound is said before anything runs
        await stack.enter_async_context(_in_background(background))
        await policy_desk.record("started")
        await stack.enter_async_context(api.begun())
        for sock, listener in listeners:
            await stack.enter_async_context(api.listening(sock, listener))
        yield policy_desk


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError("bad-directory", f"cannot use directory {str(path)!r}: {exc.strerror}") from exc


def make_engines(settings: Settings, keeper: PolicyKeeper, clock: SystemClock) -> list[Engine]:
    """Build the embedded engine and those that the settings declare."""
    engines: list[Engine] = []
    if settings.managed_engine:
        engines.append(
            ManagedLlama(
                name="embedded",
                models_dir=settings.models_dir,
                engine_dir=settings.engine_dir,
                runtime_dir=settings.runtime_dir,
                starter=start_engine,
                clock=clock,
                idle_s=settings.engine_idle_s,
                context_tokens=settings.engine_context_tokens,
            )
        )
    engines += [_declared(entry, keeper) for entry in settings.engines]
    return engines


def _declared(entry: EngineSetting, keeper: PolicyKeeper) -> Engine:
    if entry.kind == "ollama":
        return OllamaEngine(
            name=entry.name,
            url=entry.url,
            destinations=lambda: _hosts(keeper.policy),
            concurrency=entry.concurrency,
        )
    return OpenAIEngine(
        name=entry.name, url=entry.url, native_tools=entry.native_tools, concurrency=entry.concurrency
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
        log.error("%s", keeper.problem)
    return keeper


def _listeners(settings: Settings, stack: AsyncExitStack) -> list[tuple[socket.socket, Listener]]:
    # The policy decides what each local user may do, so every account may knock; the directory's
    # own mode keeps them out where the node is one person's.
    found: list[tuple[socket.socket, Listener]] = [
        (bind_unix(settings.socket_path, mode=0o666), Listener(hosts=None))
    ]
    # A socket that nobody listens at any more looks like a node that is down.
    stack.callback(settings.socket_path.unlink, missing_ok=True)
    if settings.listen is not None:
        host, port = settings.listen
        names = {f"{name}:{port}" for name in (host if ":" not in host else f"[{host}]", "localhost")}
        found.append((bind_tcp(host, port), Listener(hosts=frozenset(names))))
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
