"""What this node says about itself to the members of its swarm, and when that has changed.

Law: only what a member may know to place a prompt well and to show a swarm's state; no prompt, task,
policy text, path or user. Only what is answered on this very node is offered.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from mycoswarmd import __version__
from mycoswarmd.core.types import Zone
from mycoswarmd.flow.ports import Clock, Engine
from mycoswarmd.flow.prompt import Prompts
from mycoswarmd.flow.swarm import Swarm
from mycoswarmd.wire.peer import MAX_MODELS, ModelWord, Word

# Engines do not say when they change; looking costs some 20 us.
_LOOK_S = 1.0


class OwnWord:
    """This node's word, kept current while `run` runs."""

    def __init__(
        self,
        *,
        swarm: Swarm,
        prompts: Prompts,
        engines: Sequence[Engine],
        state: Callable[[], str],
        port: int,
        clock: Clock,
    ) -> None:
        self._swarm = swarm
        self._prompts = prompts
        self._engines = engines
        self._state = state
        self._port = port
        self._clock = clock
        self._started_s = clock.monotonic_s()
        self._seen: tuple[object, ...] = ()
        self._changed = asyncio.Event()
        self._at_once = asyncio.Event()
        swarm.subscribe(self._at_once.set)

    def now(self) -> Word:
        """Return the word of this moment."""
        healths = [engine.health() for engine in self._engines]
        models = {
            info.name: ModelWord(
                name=info.name,
                kinds=info.kinds,
                context_tokens=info.context_tokens,
                native_tools=info.native_tools,
                loaded=info.loaded,
                size_bytes=info.size_bytes,
            )
            for engine in self._engines
            for info in engine.models()
            if info.zone is Zone.SELF
        }
        node = self._prompts.node
        roster = self._swarm.roster
        return Word(
            id=self._swarm.self_id or "",
            version=__version__,
            boot=self._swarm.boot,
            instance=self._swarm.instance,
            port=self._port,
            digest=self._swarm.digest,
            statements=len(roster.hashes) if roster is not None else 0,
            beacons=tuple(self._swarm.beacons()),
            tier=node.tier,
            sandbox=node.sandbox.value,
            state=self._state(),
            uptime_s=round(self._clock.monotonic_s() - self._started_s),
            running=sum(health.running for health in healths),
            waiting=sum(health.waiting for health in healths),
            models=tuple(models.values())[:MAX_MODELS],
        )

    async def next_change(self) -> None:
        """Wait until the word differs from what it was."""
        await self._changed.wait()

    async def run(self) -> None:
        """Look for changes until cancelled; without a swarm nobody asks, and nobody looks."""
        while True:
            self._at_once.clear()
            if not self._swarm.is_member():
                await self._at_once.wait()
                continue
            if (signs := self._signs()) != self._seen:
                self._seen = signs
                changed, self._changed = self._changed, asyncio.Event()
                changed.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._at_once.wait()

    def _signs(self) -> tuple[object, ...]:
        """Return what the word is made of, as cheaply as it can be compared."""
        return (
            self._swarm.version,
            self._prompts.node,
            self._state(),
            *((one.health().running, one.health().waiting, *one.models()) for one in self._engines),
        )
