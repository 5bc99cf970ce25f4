"""Keeps the discovery process alive, and turns what it says into hints.

Law: the process may be killed, hung or taken over by what it hears; then it is ended and started anew, and
nothing else notices. Its lines are bounded in number and size, and only hints come of them.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from mycoswarmd.errors import BadRequest, CageError
from mycoswarmd.flow.ports import Clock
from mycoswarmd.flow.swarmports import Hint, PeerAddress
from mycoswarmd.wire.hints import (
    Announcement,
    Beat,
    Gone,
    Order,
    Proved,
    Ready,
    Sighting,
    Trouble,
    encode_order,
    parse_report,
)
from mycoswarmd.wire.proof import Proof

log = logging.getLogger(__name__)

# It beats every 5 s; a box that swaps gets some more.
SILENCE_S = 16.0
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.1, 10.0
_HEALTHY_S = 60.0
# In a second; the process itself says less than half of this.
_LINES = 100


class OutpostProcess(Protocol):
    """A running outpost, as whoever started it holds it."""

    @property
    def pid(self) -> int:
        """Its process."""
        ...

    async def read_line(self) -> bytes:
        """Return its next line; CageError when there is none any more."""
        ...

    def send(self, line: bytes) -> None:
        """Hand it a line; CageError when it does not take any."""
        ...

    async def kill(self) -> None:
        """End it and wait. Idempotent."""
        ...


class Discovery:
    """The discovery process of this node, always one, with what it is to announce.

    Attributes:
        state: starting | ready | down, for status.
        detail: why it is not ready, for a person.
        restarts: how often it had to be started anew.
        pid: of the process, or None.
    """

    def __init__(
        self,
        start: Callable[[], Awaitable[OutpostProcess]],
        on_hint: Callable[[Hint], None],
        *,
        clock: Clock,
        silence_s: float = SILENCE_S,
        on_proof: Callable[[Proof], None] = lambda _: None,
    ) -> None:
        self._start = start
        self._on_hint = on_hint
        self._on_proof = on_proof
        self._clock = clock
        self._silence_s = silence_s
        self._process: OutpostProcess | None = None
        self._wanted: Announcement | None = None
        self._second, self._lines = -1, 0
        self.state = "starting"
        self.detail = ""
        self.restarts = 0
        self.pid: int | None = None

    def announce(self, announcement: Announcement | None) -> None:
        """Have the networks know this, or nothing, from now on and after every restart."""
        if announcement == self._wanted:
            return
        self._wanted = announcement
        if self._process is not None:
            self._tell(self._process)

    async def run(self) -> None:
        """Run the process until cancelled."""
        delay_s = _FIRST_DELAY_S
        while True:
            begun_s = self._clock.monotonic_s()
            try:
                await self._live()
            except (CageError, BadRequest) as exc:
                self.detail = exc.message
            except TimeoutError:
                self.detail = f"cannot hear the outpost: it said nothing for {self._silence_s:g} s"
            self.state = "down"
            self.restarts += 1
            if self._clock.monotonic_s() - begun_s > _HEALTHY_S:
                delay_s = _FIRST_DELAY_S
            log.warning(
                "discovery is started anew in %g s: %s", delay_s, self.detail, extra={"event": "unit-gone"}
            )
            await asyncio.sleep(delay_s)
            delay_s = min(_LONGEST_DELAY_S, delay_s * 2)

    async def _live(self) -> None:
        process = await self._start()
        try:
            self._process, self.pid = process, process.pid
            if self._wanted is not None:
                process.send(encode_order(Order(announce=self._wanted)))
            while True:
                async with asyncio.timeout(self._silence_s):
                    line = await process.read_line()
                await self._pace()
                self._take(line)
        finally:
            self._process = self.pid = None
            await process.kill()

    def _tell(self, process: OutpostProcess) -> None:
        try:
            process.send(encode_order(Order(announce=self._wanted)))
        except CageError as exc:  # it is about to be started anew, and told then
            log.debug("discovery was not told: %s", exc.message)

    async def _pace(self) -> None:
        """Take so many lines in a second and no more: the rest waits in the pipe, and its writer too."""
        now_s = self._clock.monotonic_s()
        if int(now_s) != self._second:
            self._second, self._lines = int(now_s), 0
        self._lines += 1
        if self._lines > _LINES:
            await asyncio.sleep(1.0 - now_s % 1.0)

    def _take(self, untrusted_line: bytes) -> None:
        match parse_report(untrusted_line):
            case Ready():
                self.state, self.detail = "ready", ""
            case Trouble(text):
                self.state, self.detail = "down", text
            case Sighting() as seen:
                for host in seen.addresses:
                    self._on_hint(
                        Hint(
                            address=PeerAddress(host, seen.port),
                            node_id=seen.node_id,
                            digest=seen.digest or None,
                        )
                    )
            case Proved(proof):
                self._on_proof(proof)
            case Gone() | Beat():
                # Hints are forgotten by themselves, and who is reached is reached whatever is said of it.
                pass
