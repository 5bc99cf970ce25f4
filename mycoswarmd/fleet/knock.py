"""Knocks at strangers for roster statements: whoever has them may be anybody, for they prove themselves.

This is how a node that was off, or that everybody has forgotten to tell, learns of newcomers, and how a
newcomer makes itself known to one that refuses it.

Law: few at a time, each short, each rarer when it brings nothing; what comes is verified by the roster before
it is believed, and only ever adds to it.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mycoswarmd.core.roster import MAX_PULL_HASHES, MAX_STATEMENTS
from mycoswarmd.errors import BadRequest, MycoswarmError
from mycoswarmd.flow.ports import Clock
from mycoswarmd.flow.swarm import Swarm
from mycoswarmd.flow.swarmports import PeerAddress, PeerDialer
from mycoswarmd.wire.jsonv import get_list

log = logging.getLogger(__name__)

AT_ONCE = 4
WITHIN_S = 5.0
# Of one stranger at a time, so many addresses.
_ADDRESSES = 3
_FIRST_DELAY_S, _LONGEST_DELAY_S, _LONGEST_OURS_S = 5.0, 300.0, 60.0
_WAITING, _REMEMBERED = 64, 512

# An id, whose addresses the book has, or one address itself.
Target = str | PeerAddress


@dataclass(slots=True)
class _Patience:
    delay_s: float
    not_before_s: float


class Knocker:
    """Asks strangers for statements."""

    def __init__(
        self,
        swarm: Swarm,
        dialer: PeerDialer,
        *,
        clock: Clock,
        addresses: Callable[[str], Sequence[PeerAddress]],
        own_port: Callable[[], int | None],
        met: Callable[[PeerAddress, bytes], None],
    ) -> None:
        self._swarm = swarm
        self._dialer = dialer
        self._clock = clock
        self._addresses = addresses
        self._own_port = own_port
        self._met = met
        self._of_ours: asyncio.Queue[Target] = asyncio.Queue(maxsize=_WAITING)
        self._of_strangers: asyncio.Queue[Target] = asyncio.Queue(maxsize=_WAITING)
        self._waiting: set[Target] = set()
        self._patience: dict[Target, _Patience] = {}

    def want(self, target: Target, *, is_ours: bool = False) -> bool:
        """Knock there soon, unless it brought nothing lately; tell whether it will be done.

        `is_ours`: a member, or an address that a person wrote down; no flood of others delays it.
        """
        patience = self._patience.get(target)
        if target in self._waiting or self._swarm.roster is None:
            return False
        if patience is not None and self._clock.monotonic_s() < patience.not_before_s:
            return False
        try:
            (self._of_ours if is_ours else self._of_strangers).put_nowait(target)
        except asyncio.QueueFull:
            return False
        self._waiting.add(target)
        return True

    async def run(self) -> None:
        """Knock until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE // 2):
                group.create_task(self._work(self._of_ours, longest_s=_LONGEST_OURS_S))
                group.create_task(self._work(self._of_strangers, longest_s=_LONGEST_DELAY_S))

    async def _work(self, targets: asyncio.Queue[Target], *, longest_s: float) -> None:
        while True:
            target = await targets.get()
            brought = 0
            try:
                addresses = [target] if isinstance(target, PeerAddress) else self._addresses(target)
                for address in list(addresses)[:_ADDRESSES]:
                    brought += await self._knock(address)
            finally:
                self._waiting.discard(target)
                self._remember(target, brought, longest_s=longest_s)

    def _remember(self, target: Target, brought: int, *, longest_s: float) -> None:
        before = self._patience.pop(target, None)
        delay_s = _FIRST_DELAY_S
        if before is not None and not brought:
            delay_s = min(longest_s, before.delay_s * 2)
        while len(self._patience) >= _REMEMBERED:
            del self._patience[next(iter(self._patience))]
        self._patience[target] = _Patience(delay_s, self._clock.monotonic_s() + delay_s)

    async def _knock(self, address: PeerAddress) -> int:
        """Ask whoever is there, and return how many statements were new."""
        body: dict[str, object] = {"have": self._swarm.hashes()[:MAX_PULL_HASHES]}
        port = self._own_port()
        if port is not None:
            body["port"] = port
        try:
            async with asyncio.timeout(WITHIN_S), self._dialer.stranger(address) as stranger:
                answer = await stranger.post("/swarm/pull", body)
                cert_der = stranger.server_cert_der
            statements = get_list(dict(answer), "statements", where="", max_items=MAX_STATEMENTS)
            brought = await self._swarm.merge(statements) if statements else 0
        except TimeoutError:
            log.debug("nothing was pulled from %s: no answer within %g s", address, WITHIN_S)
            return 0
        except BadRequest as exc:
            # A neighbour's swarm announces itself as often as ours does.
            level = logging.DEBUG if exc.code == "other-swarm" else logging.INFO
            log.log(level, "nothing was pulled from %s: %s", address, exc.message)
            return 0
        except MycoswarmError as exc:
            log.debug("nothing was pulled from %s: %s", address, exc.message)
            return 0
        except Exception:  # a bug of ours that a stranger has found costs this knock, not the node
            log.exception("nothing was pulled from %s", address)
            return 0
        self._met(address, cert_der)
        return brought
