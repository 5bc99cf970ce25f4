"""What each unit of the node has proved about its own confinement, for `status --security`.

Law: only proofs count, never what a unit's file says; what could not be asked is said to be unknown. The core
does not start with a network of its own; the rest degrades loudly: a problem in `status`, a line in the log.
Source: wire/proof.py; outposts/selftest.py.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress

from mycoswarmd.core.types import CageSpec, Limits, SandboxLevel
from mycoswarmd.core.types import Proof as CageProof
from mycoswarmd.daemon.settings import Settings
from mycoswarmd.daemon.signing import PatientSigner
from mycoswarmd.errors import CageError, ConfigError, MycoswarmError
from mycoswarmd.flow.ports import CageMaker, CageSession, Clock
from mycoswarmd.outposts.dialing import LanDialer
from mycoswarmd.outposts.selftest import prove
from mycoswarmd.sandbox.capability import Capability, Fact, probe_machine
from mycoswarmd.wire.proof import CheckName, Proof, Unit, proof_body

log = logging.getLogger(__name__)

# A dialer that was started anew has proved itself anew; asking takes a millisecond.
_AGAIN_S = 60.0
# Whoever asks for `status --security` again and again makes no more work than this.
_FRESH_S = 2.0
_LAN_S = 5.0
_TRY_S, _LONGEST_TRY_S = 1.0, 60.0
# A cage starts in 0.2 s; on a Pi that has just booted and swaps it gets this long before the node goes on.
_FIRST_TRIAL_S = 15.0
# The whole workspace and no program: what a kernel without Landlock can hold a task to.
_TRIAL = CageSpec(
    task_id="trial", attempt=0, read_paths=(".",), write_paths=(".",), programs=(), limits=Limits(wall_s=30)
)
_UNITS = (Unit.CORE, Unit.LAN, Unit.DISCOVERY, Unit.ENGINE, Unit.PROBE, Unit.SIGNER)
_CAGE_HINT = "systemctl status mycoswarm-task.socket; journalctl -u 'mycoswarm-task@*'"


class ProvedCages:
    """Cages, and what the last one proved. Implements flow.ports.CageMaker.

    Attributes:
        proof: of the last cage that proved itself; None when the last one did not.
        problem: why the last one could not be built, or "".
        on_change: called when what cages prove has changed.
    """

    def __init__(self, inner: CageMaker) -> None:
        self._inner = inner
        self.proof: CageProof | None = None
        self.problem = ""
        self.failed = asyncio.Event()
        self.on_change: Callable[[], None] = lambda: None

    @property
    def level(self) -> str:
        """What the last cage proved: a SandboxLevel."""
        if self.proof is not None:
            return self.proof.level.value
        return SandboxLevel.NONE.value if self.problem else self._inner.level

    async def open(self, spec: CageSpec) -> CageSession:
        """Start a cage and have it prove itself; CageError otherwise."""
        try:
            session = await self._inner.open(spec)
        except CageError as exc:
            if exc.code in {"cage-setup", "cage-unproved"}:
                self._note(None, exc.message)
                self.failed.set()
            raise
        self._note(session.proof, "")
        return session

    def _note(self, proof: CageProof | None, problem: str) -> None:
        was = self.level
        self.proof, self.problem = proof, problem
        if self.level != was:
            self.on_change()

    async def is_proved(self) -> bool:
        """Build a cage for nothing but its proof."""
        was = self.problem
        try:
            session = await self.open(_TRIAL)
        except CageError as exc:
            self._note(None, exc.message)
            if exc.message != was:
                log.error("no task can run: %s", exc, extra={"event": "cage-unproved"})  # noqa: TRY400
            return False
        await session.close()
        log.info(
            "cages are %s: %d probes held", session.proof.level.value, len(session.proof.held),
            extra={"event": "cage-proved"},
        )  # fmt: skip
        return True

    def capability(self) -> Capability:
        """Say what cages can be here, as `status` has it."""
        proof = self.proof
        if proof is None:
            said = self.problem or "no cage has been tried yet"
            fact = Fact(name="cage by systemd", ok=False, detail=said, hint=_CAGE_HINT)
            return Capability(level=SandboxLevel.NONE, facts=(fact,))
        fact = Fact(name="cage by systemd", ok=True, detail=f"{len(proof.held)} probes held")
        absent = [
            Fact(name=name, ok=False, detail="this kernel does not have it", hint="mycoswarmctl doctor")
            for name in proof.absent
        ]
        return Capability(level=proof.level, facts=(fact, *absent))


class Security:
    """Gathers the proofs of one node.

    Attributes:
        signer: the unit that holds the signing key, where one does.
    """

    def __init__(
        self, settings: Settings, *, lan: LanDialer | None, cages: ProvedCages, clock: Clock
    ) -> None:
        self._settings = settings
        self._lan = lan
        self._cages = cages
        self._clock = clock
        self.signer: PatientSigner | None = None
        self._asked_at_s = self._asked_signer_at_s = float("-inf")
        self._proofs: dict[Unit, Proof] = {}
        self._unheard: dict[Unit, str] = {}
        self._said: dict[Unit, tuple[str, ...]] = {}

    def note(self, proof: Proof) -> None:
        """Take what a unit has just proved."""
        self._proofs[proof.unit] = proof
        self._unheard.pop(proof.unit, None)
        if not self._settings.appliance:
            return
        broken = _broken(proof)
        if broken != self._said.get(proof.unit, ()):
            for line in broken:
                log.warning("unit %s is weak: %s", proof.unit.value, line, extra={"event": "unit-weak"})
            self._said[proof.unit] = broken

    async def begin(self) -> None:
        """Test this process; as the appliance, ConfigError("has-network") where it can reach a network."""
        given = [one.url.removeprefix("unix:") for one in self._settings.engines]
        proof = await asyncio.to_thread(prove, Unit.CORE, given=given)
        if self._settings.appliance and not proof.holds(CheckName.INET_SOCKET):
            found = next(one.detail for one in proof.weak() if one.name is CheckName.INET_SOCKET)
            raise ConfigError(
                "has-network",
                f"cannot run as the appliance: this process can open network connections itself ({found})",
                hint="start it as mycoswarmd.service, whose RestrictAddressFamilies=AF_UNIX and "
                "PrivateNetwork=yes must stand, or leave out --appliance",
            )
        self.note(proof)

    async def run(self) -> None:
        """Ask the units now and then, until cancelled; where there are none, nobody is asked."""
        if not self._settings.appliance:
            return
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_asking(), name="security:units")
            group.create_task(self._keep_cages(), name="security:cages")

    async def _keep_asking(self) -> None:
        while True:
            await self._ask()
            if self.signer is not None and self.signer.problem:
                # A unit that was too slow when the machine started may answer by now.
                await asyncio.to_thread(self.signer.wake)
            await asyncio.sleep(_AGAIN_S if Unit.LAN not in self._unheard else _LAN_S)

    async def _keep_cages(self) -> None:
        """Try cages again after one failed, until one proves itself."""
        wait_s = _TRY_S
        while True:
            if self._cages.proof is not None:
                await self._cages.failed.wait()
                wait_s = _TRY_S
            self._cages.failed.clear()
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, _LONGEST_TRY_S)
            if self._cages.proof is None:
                await self._cages.is_proved()

    async def _ask(self) -> None:
        """Ask whom one can ask without starting anything."""
        if self._lan is None:
            return
        self._asked_at_s = self._clock.monotonic_s()
        try:
            self.note(await self._lan.prove())
        except OSError as exc:  # a timeout is one, too
            said = exc.strerror or "no answer"
            if Unit.LAN not in self._unheard:
                log.warning("unit lan cannot be asked: %s", said, extra={"event": "unit-gone"})
            self._unheard[Unit.LAN] = said

    async def _ask_signer(self) -> None:
        """Ask the signer's unit, which that starts: only when a person wants to know."""
        now_s = self._clock.monotonic_s()
        if self.signer is None or now_s - self._asked_signer_at_s < _FRESH_S:
            return
        self._asked_signer_at_s = now_s
        try:
            self.note(await asyncio.to_thread(self.signer.prove))
        except MycoswarmError as exc:
            self._unheard[Unit.SIGNER] = exc.message

    def problems(self) -> list[str]:
        """Return what is weaker than it should be, each as one line."""
        if not self._settings.appliance:
            return []
        lines = [self.signer.problem] if self.signer is not None and self.signer.problem else []
        if said := self._unheard.get(Unit.LAN):
            lines.append(f"unit lan cannot be asked: {said}")
        lines += [
            f"unit {unit.value} is weak: {line}"
            for unit, proof in self._proofs.items()
            for line in _broken(proof)
        ]
        return lines

    async def report(self) -> Mapping[str, object]:
        """Return every proof, those of units that can be asked anew; a node without units has none."""
        if self._clock.monotonic_s() - self._asked_at_s > _FRESH_S:
            await self._ask()
        await self._ask_signer()
        units = _UNITS if self._settings.appliance else ()
        return {
            "appliance": self._settings.appliance,
            "proofs": [proof_body(self._proofs[unit]) for unit in units if unit in self._proofs],
            "unheard": [
                {"unit": unit.value, "problem": self._unheard.get(unit, "has not run yet")}
                for unit in units
                if unit not in self._proofs or unit in self._unheard
            ],
            "cages": self._cage_row(),
        }

    def _cage_row(self) -> dict[str, object]:
        proof = self._cages.proof
        return {
            "by": self._settings.cages.value,
            "level": self._cages.level if proof is not None else "",
            "held": list(proof.held) if proof is not None else [],
            "absent": list(proof.absent) if proof is not None else [],
            "problem": self._cages.problem or ("" if proof is not None else "has not run yet"),
        }


async def find_capability(settings: Settings, cages: ProvedCages) -> Callable[[], Capability]:
    """Find out what cages can be here, before the node is ready: no task is refused for being early."""
    if not settings.appliance:
        found = await asyncio.to_thread(probe_machine)
        return lambda: found
    with suppress(TimeoutError):
        async with asyncio.timeout(_FIRST_TRIAL_S):
            await cages.is_proved()
    return cages.capability


def _broken(proof: Proof) -> tuple[str, ...]:
    """Return what did not hold, but for a bound on memory that this machine's kernel does not know."""
    return tuple(
        f"{check.name.value}: {check.detail}"
        for check in proof.weak()
        if check.ok is False or check.name is not CheckName.MEMORY
    )
