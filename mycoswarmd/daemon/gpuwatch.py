"""What graphics cards are here, as far as anybody could tell: asks the probe, and keeps what it said.

Laws:

1. The driver's library is never in this process: the probe is a unit of the appliance, or a child. One that
   crashes, hangs or lies costs an answer, and the answer is then "unknown", with the reason.
2. A reading costs a process, and may wake a card that sleeps. So cards are read when the node starts, then
   once an hour, and sooner only while something is wrong or when a person looks; never more than once a
   minute for those who look.
3. One answer that is missing takes back nothing that was known; the second does.

Source: wire/probing.py, outposts/probe.py.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from mycoswarmd.errors import BadRequest, CageError
from mycoswarmd.fleet.discovery import OutpostProcess
from mycoswarmd.flow.ports import Clock
from mycoswarmd.wire.probing import Gpus, Reading, parse_report
from mycoswarmd.wire.proof import Proof, Unit

log = logging.getLogger(__name__)

# The probe gives up by itself a little earlier, where its driver lets it.
WITHIN_S = 20.0
# A child whose driver holds it in the kernel cannot be ended by anybody; it is not waited for.
_END_S = 3.0
_FRESH_S = 60.0
_AGAIN_S = {Reading.READ: 3600.0, Reading.NO_DRIVER: 600.0}
_FIRST_RETRY_S, _LONGEST_RETRY_S = 5.0, 600.0

LOOK = "systemctl status mycoswarm-probe.socket; journalctl -u 'mycoswarm-probe@*'"
# What mends what, for `doctor`; it goes to machines of every distribution.
CURES = {
    Reading.NO_LIBRARY: "sudo apt install libnvidia-ml1 (Ubuntu: nvidia-utils of the driver's version)",
    Reading.REFUSED: "sudo nvidia-modprobe -c 0 -u, so that it stays: sudo apt install nvidia-persistenced; "
    "where ls -l /dev/nvidiactl names a group other than video: docs/howto/gpu-workstation.md",
    Reading.MISMATCH: "sudo reboot",
    Reading.FAILED: "nvidia-smi; sudo dmesg | grep -i nvrm",
    Reading.UNHEARD: LOOK,
}


class GpuWatch:
    """One per daemon.

    Attributes:
        gpus: what was found last.
        is_absent: whether there is nobody to ask: the probe's socket is not installed, or stopped.
    """

    def __init__(
        self,
        start: Callable[[], Awaitable[OutpostProcess]] | None,
        *,
        clock: Clock,
        proved: Callable[[Proof], None],
        within_s: float = WITHIN_S,
    ) -> None:
        """Take how a probe is started, or None where no driver is, so that there is nothing to ask."""
        self._start = start
        self._clock = clock
        self._proved = proved
        self._within_s = within_s
        self._wanted = asyncio.Event()
        self._read_at_s = float("-inf")
        self._misses = 0
        self.is_absent = False
        self.on_change: Callable[[], None] = lambda: None
        self.gpus = Gpus(reading=Reading.NO_DRIVER, detail="not read yet")

    def want(self) -> None:
        """Have the cards read soon, unless they were just now."""
        if self._clock.monotonic_s() - self._read_at_s >= _FRESH_S:
            self._wanted.set()

    def problem(self) -> str:
        """Return what is wrong as one line, or ""; that nobody reads cards here is none."""
        if self.gpus.is_known or self.is_absent:
            return ""
        return f"graphics cards are unknown: {self.gpus.detail} (mycoswarmctl doctor)"

    async def run(self) -> None:
        """Read the cards now and then, until cancelled."""
        wait_s = _FIRST_RETRY_S
        while True:
            found = await self.look()
            self._read_at_s = self._clock.monotonic_s()
            self._wanted.clear()  # whoever looked meanwhile has it now
            if found.reading in _AGAIN_S:
                next_s, wait_s = _AGAIN_S[found.reading], _FIRST_RETRY_S
            else:
                next_s, wait_s = wait_s, min(wait_s * 2, _LONGEST_RETRY_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(next_s):
                    await self._wanted.wait()

    async def look(self) -> Gpus:
        """Read the cards once; whatever comes of it is taken as far as it is to be believed."""
        if self._start is None:
            found = Gpus(reading=Reading.NO_DRIVER, detail="no NVIDIA driver")
        else:
            found = await self._ask(self._start)
        self._misses = self._misses + 1 if found.reading is Reading.UNHEARD else 0
        if self._misses == 1 and self.gpus.reading is Reading.READ:
            return found
        was, self.gpus = self.gpus, found
        if (found.reading, found.found, found.driver) != (was.reading, was.found, was.driver):
            self._tell()
        return found

    def _tell(self) -> None:
        gpus = self.gpus
        if problem := self.problem():
            event = {"event": "unit-gone"} if gpus.reading is Reading.UNHEARD else {}
            log.warning("%s", problem, extra=event)
        for gpu in gpus.found:
            log.info("graphics card: %s, %d MiB, driver %s", gpu.name, gpu.memory_bytes >> 20, gpus.driver)
        self.on_change()

    async def _ask(self, start: Callable[[], Awaitable[OutpostProcess]]) -> Gpus:
        self.is_absent = False
        try:
            async with asyncio.timeout(self._within_s):
                probe = await start()
        except TimeoutError:
            return _unheard(f"the probe did not start within {self._within_s:g} s")
        except CageError as exc:
            self.is_absent = isinstance(exc.__cause__, FileNotFoundError)
            return _unheard(exc.message)
        try:
            return await self._hear(probe)
        except TimeoutError:
            return _unheard(f"the probe said nothing for {self._within_s:g} s: the driver may hang")
        except CageError as exc:
            return _unheard(f"the probe ended without an answer: {exc.message}")
        except BadRequest as exc:
            return _unheard(f"the probe says what cannot be: {exc.message}")
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(_END_S):
                    await probe.kill()

    async def _hear(self, probe: OutpostProcess) -> Gpus:
        # It proves itself before it touches the driver: what is late by then is not the driver's doing.
        try:
            report = parse_report(await self._line(probe))
        except TimeoutError:
            return _unheard(
                f"the probe did not start within {self._within_s:g} s: this machine is slow or busy"
            )
        if isinstance(report, Proof):
            if report.unit is Unit.PROBE:  # nobody proves anything about others
                self._proved(report)
            report = parse_report(await self._line(probe))
        if isinstance(report, Proof):
            raise BadRequest("bad-request", "cannot accept a second proof")
        return report

    async def _line(self, probe: OutpostProcess) -> bytes:
        async with asyncio.timeout(self._within_s):
            return await probe.read_line()


def _unheard(why: str) -> Gpus:
    return Gpus(reading=Reading.UNHEARD, detail=why)
