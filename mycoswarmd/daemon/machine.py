"""The node as a whole, for `status` and `doctor`: each fact with what is weak about it and the cure."""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from mycoswarmd import __version__
from mycoswarmd.core.policy.administer import NOBODY
from mycoswarmd.core.tasks import TaskState
from mycoswarmd.core.types import SandboxLevel, Unknown
from mycoswarmd.daemon.door import ProgramDoor
from mycoswarmd.daemon.gpuwatch import CURES, LOOK
from mycoswarmd.daemon.ownfacts import OwnFacts
from mycoswarmd.daemon.policyfile import PolicyKeeper, way_back
from mycoswarmd.daemon.security import Security
from mycoswarmd.daemon.settings import Settings
from mycoswarmd.daemon.swarmparts import SwarmParts
from mycoswarmd.flow.ports import Clock, Engine, EngineHealth
from mycoswarmd.flow.swarmports import PeerAddress, PeerState
from mycoswarmd.inventory.host import own_memory_bytes, tier_of
from mycoswarmd.store.receipts import SqliteReceiptLog
from mycoswarmd.store.tasks import SqliteTaskStore

# Below this, the queue may soon be refused by a full disk.
_DISK_LOW_BYTES = 1 << 30
_DISK_FULL_BYTES = 1 << 20  # less than a few receipts and tasks take
# Signers say every six hours that they are there.
_ROSTER_OLD_S = 3 * 86_400


class NodeMachine:
    """Reports on one running node."""

    def __init__(
        self,
        *,
        settings: Settings,
        policy: PolicyKeeper,
        engines: Sequence[Engine],
        tasks: SqliteTaskStore,
        receipts: SqliteReceiptLog,
        facts: OwnFacts,
        security: Security,
        door: ProgramDoor,
        clock: Clock,
        parts: SwarmParts,
    ) -> None:
        self._swarm = parts.swarm
        self._fleet = parts.fleet
        self._membership = parts.membership
        self._settings = settings
        self._policy = policy
        self._engines = engines
        self._tasks = tasks
        self._receipts = receipts
        self._facts = facts
        self._security = security
        self._door = door
        self._clock = clock
        self._started_s = clock.monotonic_s()

    async def status(self) -> Mapping[str, object]:
        """Report everything that `mycoswarmctl status` shows."""
        self._facts.watch.want()
        problems = self._problems()
        gpus, host, cages = self._facts.gpus, self._facts.host, self._facts.capability()
        keeper = self._policy
        policy = keeper.policy
        head = await self._receipts.head()
        return {
            "node": self._settings.node_name,
            "version": __version__,
            "state": self.state(problems),
            "problems": problems,
            "uptime_s": round(self._clock.monotonic_s() - self._started_s),
            "pid": os.getpid(),
            "policy": {
                "name": policy.name if policy is not None else "",
                "sha256": policy.sha256 if policy is not None else "",
                "path": str(self._settings.policy_file),
                "loaded_at_ms": keeper.loaded_at_ms,
                "problem": keeper.problem or "",
                "rules": len(policy.rules) if policy is not None else 0,
                "invariants_proved": len(policy.invariants) if policy is not None else 0,
            },
            "engines": [asdict(engine.health()) for engine in self._engines],
            "tasks": await self._task_counts(),
            "receipts": {"count": head.seq, "head": head.id},
            "sandbox": {
                "level": cages.level.value,
                "facts": [asdict(fact) for fact in cages.facts],
            },
            "listeners": self._listeners(),
            "swarm": self._swarm_report(),
            "host": {
                "hostname": socket.gethostname(),
                "cpus": host.cpus,
                "memory_bytes": host.memory_bytes,
                "own_memory_bytes": own_memory_bytes(),
                "gpus": [asdict(gpu) for gpu in gpus.found],
                "gpu_reading": {
                    "result": gpus.reading.value,
                    "driver": gpus.driver,
                    "detail": gpus.detail,
                },
                "tier": tier_of(host, gpus.found),
            },
        }

    async def security(self) -> Mapping[str, object]:
        """Report what each unit has proved about its own confinement."""
        return await self._security.report()

    def state(self, problems: Sequence[str] | None = None) -> str:
        """Say in one colour how the node is: red answers nothing, yellow wants to be looked at."""
        if self._policy.policy is None:
            return "red"
        return "yellow" if (self._problems() if problems is None else problems) else "green"

    def _swarm_report(self) -> dict[str, object] | None:
        roster = self._swarm.roster
        if roster is None:
            return None
        states = self._fleet.states()
        age_s = self._swarm.age_s()
        return {
            "name": roster.name,
            "id": roster.swarm_id,
            "node_id": self._swarm.self_id,
            "signer": self._swarm.is_signer(),
            "nodes": 1 + len(states),
            "reachable": 1 + sum(state.word is not None for state in states),
            "roster_age_s": None if isinstance(age_s, Unknown) else age_s,
            "digest": roster.digest,
            "statements": len(roster.hashes),
        }

    def _swarm_problems(self) -> list[str]:
        roster, membership = self._swarm.roster, self._membership
        if roster is None:
            return []
        problems = [f"the roster: {problem}" for problem in roster.problems]
        if not self._swarm.is_member():
            problems.append("this node was put out of its swarm: mycoswarmctl leave, then enroll again")
        me = self._swarm.member(self._swarm.self_id or "")
        if me is not None and me.is_signer and not self._swarm.is_signer():
            problems.append("this node is a signer whose key is out of reach: nothing is signed here")
        if membership.problem:
            problems.append(f"the swarm cannot reach this node: {membership.problem}")
        if membership.discovery is not None and membership.discovery.state == "down":
            problems.append(f"other nodes are not looked for: {membership.discovery.detail}")
        states = self._fleet.states()
        problems += [f"node {one.member.name}: {one.alarm}" for one in states if one.alarm]
        if _is_refused(states):
            problems.append(
                "other nodes refuse this key: was it put out? (mycoswarmctl leave, then enroll again)"
            )
        age_s = self._swarm.age_s()
        if not isinstance(age_s, Unknown) and age_s > _ROSTER_OLD_S:
            problems.append(f"no signer was heard for {age_s // 86_400} days: revocations may not have come")
        return problems

    async def doctor(self) -> Sequence[Mapping[str, object]]:
        """Check what is missing or weak on this machine, with the command that fixes it."""
        checks = [
            _check("settings", is_ok=False, detail=warning, fix="mend that line: mycoswarmd check")
            for warning in self._settings.warnings
        ]
        checks += [self._policy_check(), self._clock_check(), self._disk_check(), *self._engine_checks()]
        checks += [
            _check(f"cage: {fact.name}", is_ok=fact.ok, detail=fact.detail, fix=fact.hint)
            for fact in self._facts.capability().facts
        ]
        checks.append(self._gpu_check())
        return checks

    def _gpu_check(self) -> dict[str, object]:
        """What was read of cards; a card without any driver is found by who sees the machine itself."""
        gpus = self._facts.gpus
        cards = "; ".join(f"{gpu.name}, {gpu.memory_bytes >> 20} MiB" for gpu in gpus.found)
        detail = f"{cards}; driver {gpus.driver}" if cards else gpus.detail
        return _check("gpu", is_ok=gpus.is_known, detail=detail, fix=CURES.get(gpus.reading, LOOK))

    def _problems(self) -> list[str]:
        problems = [self._policy.problem] if self._policy.problem else []
        if self._is_locked():
            problems.append(f"{NOBODY}: {self._way_back()}")
        if self._receipts.problem is not None:
            problems.append(
                f"receipts cannot be written, so nothing is answered: {self._receipts.problem.message}"
            )
        if self._free_bytes() < _DISK_FULL_BYTES:
            problems.append(f"the disk is full: nothing can be kept under {self._settings.state_dir}")
        if self._facts.capability().level is SandboxLevel.NONE:
            problems.append("no cage can be built here: tasks will be refused (mycoswarmctl doctor)")
        problems += [
            *self._security.problems(),
            *filter(None, [self._door.problem, self._facts.watch.problem()]),
        ]
        problems += [
            f"engine {health.name} is down: {health.detail}"
            for health in (engine.health() for engine in self._engines)
            if health.state == "down"
        ]
        problems += self._swarm_problems()
        if not any(engine.models() for engine in self._engines) and not self._fleet.states():
            problems.append(f"no model is served: {self._install()}")
        return problems

    def _is_locked(self) -> bool:
        """Tell whether the policy in force lets nobody administer this node."""
        return self._policy.checked is not None and self._policy.checked.is_locked

    def _way_back(self) -> str:
        return way_back(self._settings.policy_file, is_service=self._settings.appliance)

    async def _task_counts(self) -> dict[str, int]:
        counts = await self._tasks.counts()
        return {state.value: counts.get(state, 0) for state in TaskState}

    def _listeners(self) -> list[str]:
        listen = self._settings.listen
        is_open = listen is not None and (self._door.is_open or not self._settings.appliance)
        tcp = [f"http://{listen[0]}:{listen[1]}"] if listen is not None and is_open else []
        return [f"unix:{self._settings.socket_path}", *tcp, *self._swarm_listener()]

    def _swarm_listener(self) -> list[str]:
        listen = self._settings.swarm_listen
        if listen is None or not self._swarm.is_member() or self._membership.problem:
            return []
        return [f"swarm: {PeerAddress(*listen)}"]

    def _policy_check(self) -> dict[str, object]:
        if self._policy.problem:
            return _check(
                "policy",
                is_ok=False,
                detail=self._policy.problem,
                fix=f"mycoswarmctl policy check {self._settings.policy_file}",
                severity="fail",
            )
        name = self._policy.policy.name if self._policy.policy is not None else "none"
        if self._is_locked():
            return _check("policy", is_ok=False, detail=f"{name!r}: {NOBODY}", fix=self._way_back())
        return _check("policy", is_ok=True, detail=f"{name!r} from {self._settings.policy_file}")

    def _clock_check(self) -> dict[str, object]:
        is_ok = self._clock.minute_of_day() is not None
        detail = "plausible" if is_ok else "before 2026: rules with `hours` count against every request"
        return _check(
            "clock", is_ok=is_ok, detail=detail, fix="install a time service: apt install systemd-timesyncd"
        )

    def _disk_check(self) -> dict[str, object]:
        free_bytes = self._free_bytes()
        detail = f"{free_bytes >> 20} MiB free under {self._settings.state_dir}"
        return _check(
            "disk",
            is_ok=free_bytes >= _DISK_LOW_BYTES,
            detail=detail,
            fix="free some space, or move state_dir",
        )

    def _free_bytes(self) -> int:
        stat = os.statvfs(self._settings.state_dir)
        return stat.f_bavail * stat.f_frsize

    def _engine_checks(self) -> list[dict[str, object]]:
        checks = []
        for engine in self._engines:
            health = engine.health()
            is_ok = health.state != "down" and health.models > 0
            detail = health.detail or f"{health.state}, {health.models} models"
            is_spare = health.kind == "managed" and not is_ok and any(one.models() for one in self._engines)
            checks.append(
                _check(
                    f"engine: {health.name}",
                    is_ok=is_ok,
                    detail=detail,
                    fix=self._engine_cure(health, is_spare=is_spare),
                    severity="note" if is_spare else "warn",
                )
            )
        return checks

    def _install(self) -> str:
        return f"{'sudo ' if self._settings.appliance else ''}mycoswarmctl engine install"

    def _engine_cure(self, health: EngineHealth, *, is_spare: bool) -> str:
        """Say what helps an engine that serves nothing."""
        if is_spare:
            return f"managed_engine = false in mycoswarm.toml if it is not wanted, or {self._install()}"
        if health.kind == "managed":
            return self._install()
        if health.state != "down":
            return "ollama pull MODEL" if health.kind == "ollama" else "see which model it was started with"
        look = f"systemctl status {'ollama' if health.kind == 'ollama' else 'ENGINE'}"
        return f"does it run ({look}), and is its url in mycoswarm.toml right?"


def _is_refused(states: Sequence[PeerState]) -> bool:
    """Tell whether somebody refuses this node and nobody lets it in: a revocation may not have come here."""
    return any(one.code == "peer-refuses-us" for one in states) and not any(one.word for one in states)


def _check(
    name: str, *, is_ok: bool, detail: str, fix: str = "", severity: str = "warn"
) -> dict[str, object]:
    return {
        "name": name,
        "ok": is_ok,
        "severity": "ok" if is_ok else severity,
        "detail": detail,
        "fix": "" if is_ok else fix,
    }
