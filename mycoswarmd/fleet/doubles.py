"""Looks whether a member is somewhere else too: then two machines have its key.

A link stays with the machine that it found first, so a copy would go unseen beside it. Whoever is said to be
somewhere else is therefore asked there, once in a while.

Law: only what proves the member's key is listened to, and the first one is asked before and after it: a
daemon that was started anew is no copy.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mycoswarmd.errors import MycoswarmError
from mycoswarmd.fleet.link import Link
from mycoswarmd.flow.ports import Clock
from mycoswarmd.flow.swarmports import PeerAddress, PeerDialer
from mycoswarmd.wire.peer import parse_word

log = logging.getLogger(__name__)

_AT_ONCE = 2
_WITHIN_S = 5.0
_EACH_S = 60.0
# Where it could not be told.
_AGAIN_S = 5.0
_WAITING, _REMEMBERED = 64, 512


@dataclass(frozen=True, slots=True)
class _Only:
    """An address book with one address."""

    address: PeerAddress

    def addresses(self, node_id: str) -> Sequence[PeerAddress]:
        """Return it, whoever is asked for."""
        del node_id
        return (self.address,)


class Doubles:
    """Asks members at second addresses.

    `is_same` is called where it is the same daemon, `is_another` where the key is there and here at once.
    """

    def __init__(
        self,
        dialer: PeerDialer,
        *,
        clock: Clock,
        link_of: Callable[[str], Link | None],
        is_same: Callable[[Link, PeerAddress], None],
        is_another: Callable[[Link, PeerAddress], None],
    ) -> None:
        self._dialer = dialer
        self._clock = clock
        self._link_of = link_of
        self._is_same = is_same
        self._is_another = is_another
        self._targets: asyncio.Queue[tuple[str, PeerAddress]] = asyncio.Queue(maxsize=_WAITING)
        self._looked_s: dict[tuple[str, PeerAddress], float] = {}

    def want(self, node_id: str, address: PeerAddress) -> None:
        """Look there soon, unless somebody looked lately."""
        target, now_s = (node_id, address), self._clock.monotonic_s()
        if now_s - self._looked_s.get(target, -_EACH_S) < _EACH_S or self._targets.full():
            return
        self._looked_s.pop(target, None)
        while len(self._looked_s) >= _REMEMBERED:
            del self._looked_s[next(iter(self._looked_s))]
        self._looked_s[target] = now_s
        self._targets.put_nowait(target)

    async def run(self) -> None:
        """Look until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(_AT_ONCE):
                group.create_task(self._work())

    async def _work(self) -> None:
        while True:
            node_id, address = await self._targets.get()
            link = self._link_of(node_id)
            if link is None or link.word is None:
                continue
            try:
                async with asyncio.timeout(3 * _WITHIN_S):
                    is_clear = await self._look(link, address)
                if not is_clear:
                    self._look_again_soon(node_id, address)
            except TimeoutError:
                log.debug("node %s was not looked for at %s: no answer", node_id, address)
            except MycoswarmError as exc:
                self._look_again_soon(node_id, address)  # it may be announced before it listens
                log.debug("node %s is not at %s: %s", node_id, address, exc.message)
            except Exception:  # a bug of ours costs this look, not the node
                log.exception("node %s was not looked for at %s", node_id, address)

    def _look_again_soon(self, node_id: str, address: PeerAddress) -> None:
        target = (node_id, address)
        if target in self._looked_s:
            self._looked_s[target] = self._clock.monotonic_s() - _EACH_S + _AGAIN_S

    async def _look(self, link: Link, address: PeerAddress) -> bool:
        """Compare the daemon there with the one that the link speaks to; False where that cannot be told."""
        before = await self._instance(link)
        async with self._dialer.member(link.member, _Only(address)) as client:
            word = parse_word(await client.ask("GET", "/swarm/word", within_s=_WITHIN_S))
        if word.id != link.member.id:
            return True
        # A daemon that was started anew in between is one and the same.
        if before is None or before != await self._instance(link):
            return False
        if word.instance == before:
            self._is_same(link, address)
        else:
            self._is_another(link, address)
        return True

    @staticmethod
    async def _instance(link: Link) -> str | None:
        """Ask the daemon that the link speaks to which start of it this is; None where there is no link."""
        if link.client is None:
            return None
        return parse_word(await link.client.ask("GET", "/swarm/word", within_s=_WITHIN_S)).instance
