"""One link to one member: dial, watch, exchange rosters, and again when it breaks.

Law: a member is ready only while it speaks, over a connection on which it proved its key; the end of the
connection, or silence on it, takes it out of routing at once. A machine that dies is noticed by the kernel's
probes, a process that hangs by its silence. What a member says of itself is shown and used for placement; it
opens nothing.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import NoReturn

from mycoswarmd.core.roster import MAX_STATEMENTS, Member, portions
from mycoswarmd.core.types import Unknown
from mycoswarmd.errors import MycoswarmError, Unavailable
from mycoswarmd.fleet.hints import Hints
from mycoswarmd.flow.ports import Clock, Entropy
from mycoswarmd.flow.swarm import Swarm
from mycoswarmd.flow.swarmports import PeerAddress, PeerClient, PeerDialer, PeerState, Reach
from mycoswarmd.wire.jsonv import as_list, get_list
from mycoswarmd.wire.peer import SILENT_S, Word

log = logging.getLogger(__name__)

# Connecting to the right address among dead ones takes a while, bounded by the client too.
FIRST_WORD_S = 10.0
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.2, 5.0
# A link that stood this long begins with short delays again.
_STOOD_S = 5.0
_SYNC_WITHIN_S = 30.0
_SYNC_PAUSE_S, _LONGEST_SYNC_PAUSE_S = 0.5, 30.0
# A change reaches everybody this fast by itself.
_SETTLE_S = 0.3
# A ping long after the last one costs a handshake: 3 ms of two processors.
_PING_S = 600.0
# A signer that is asked in need signs every five seconds at most.
_ASK_AGAIN_S = 6.0


@dataclass(frozen=True, slots=True)
class Around:
    """What all links of a fleet share.

    Attributes:
        changed: something that people or placement see has changed.
        seen: a member said its word; for the clone alarm and the memory of addresses.
        failed: a member could not be reached, and why.
        peers_told: a member said where others are.
        own_port: where this node listens, for members to dial back.
    """

    swarm: Swarm
    dialer: PeerDialer
    hints: Hints
    clock: Clock
    entropy: Entropy
    changed: Callable[[], None]
    seen: Callable[["Link", Word], None]
    failed: Callable[["Link", MycoswarmError], None]
    peers_told: Callable[[Mapping[str, object]], None]
    own_port: Callable[[], int | None] = lambda: None


class Link:
    """The link to one member.

    Attributes:
        member: who it is; replaced when the roster says otherwise of it.
        client: to ask it things, only while it is ready.
        word: what it said last, only while it is ready.
        alarm: set by the fleet when two machines seem to have its key.
    """

    def __init__(self, member: Member, around: Around) -> None:
        self.member = member
        self.client: PeerClient | None = None
        self.word: Word | None = None
        self.alarm = ""
        self._around = around
        self._state = Reach.UNKNOWN
        self._detail = "nobody has said yet where it is"
        self._code = ""
        self._seen_s: float | None = None
        self._address: PeerAddress | None = None
        self._rtt_ms: float | None = None
        self._ready_s = 0.0
        self._wake = asyncio.Event()
        self._sync_wanted = asyncio.Event()
        self._hurry = asyncio.Event()
        self._synced = asyncio.Event()  # set and replaced at the end of each exchange
        self._syncs_begun = self._syncs_ended = 0
        self._became_ready = asyncio.Event()
        self._current: PeerClient | None = None

    def state(self) -> PeerState:
        """Return how the member is just now."""
        now_s = self._around.clock.monotonic_s()
        address = self._address or next(iter(self._around.hints.proved(self.member.id)), None)
        return PeerState(
            member=self.member,
            state=self._state,
            detail=self._detail,
            code=self._code,
            address=address,
            last_seen_s=None if self._seen_s is None else now_s - self._seen_s,
            rtt_ms=self._rtt_ms,
            word=self.word,
            alarm=self.alarm,
        )

    @property
    def is_ready(self) -> bool:
        """Whether the member may be used."""
        return self._state is Reach.READY

    async def ready(self) -> None:
        """Wait until the member may be used."""
        while not self.is_ready:
            await self._became_ready.wait()

    def wake(self) -> None:
        """Dial now, if it is waiting to."""
        self._wake.set()

    def poke(self) -> None:
        """Exchange rosters soon, if it is ready and its word still differs then."""
        self._sync_wanted.set()

    def cut(self) -> None:
        """Drop every connection now."""
        if self._current is not None:
            self._current.cut()

    async def synced(self) -> None:
        """Exchange rosters at once and wait for the end; nothing happens while it is not ready."""
        # One may be under way that began before: the one after it counts.
        wanted = self._syncs_begun + 1
        self._hurry.set()
        self._sync_wanted.set()
        while self.is_ready and self._syncs_ended < wanted:
            await self._synced.wait()

    async def run(self) -> None:
        """Keep the link until cancelled."""
        delay_s = _FIRST_DELAY_S
        try:
            while True:
                self._wake.clear()
                if self._around.hints.addresses(self.member.id):
                    await self._live_or_fail()
                    if self._ready_s and self._around.clock.monotonic_s() - self._ready_s > _STOOD_S:
                        delay_s = _FIRST_DELAY_S
                    self._ready_s = 0.0
                await self._pause(delay_s)
                delay_s = min(_LONGEST_DELAY_S, delay_s * 2)
        finally:
            self._set(Reach.UNREACHABLE, "it is no member any more")
            self._end_sync()

    async def _pause(self, delay_s: float) -> None:
        """Wait, but not when somebody says where it is now; a flood of such words dials 5 times a second."""
        jitter = 0.75 + int(self._around.entropy.token(1), 16) / 512
        await asyncio.sleep(_FIRST_DELAY_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, delay_s * jitter - _FIRST_DELAY_S)):
                await self._wake.wait()

    async def _live_or_fail(self) -> None:
        """Live; a bug of ours that this member has found costs the link, not the node."""
        try:
            await self._live()
        except Exception:
            log.exception("the link to node %s failed", self.member.name)
            self._set(Reach.UNREACHABLE, "an internal error, see the log", "internal-error")

    async def _live(self) -> None:
        """Dial, and stay as long as it goes well."""
        if self._state is Reach.UNKNOWN:
            self._set(Reach.CONNECTING, "")
        failure: MycoswarmError
        try:
            async with self._around.dialer.member(self.member, self._around.hints) as client:
                self._current = client
                failure = await self._follow(client)
        except MycoswarmError as exc:
            failure = exc
        finally:
            self._current = self.client = None
            self.word = None
        self._set(Reach.UNREACHABLE, failure.message, failure.code)
        self._end_sync()
        self._around.failed(self, failure)

    async def _follow(self, client: PeerClient) -> MycoswarmError:
        """Watch the member, and exchange and measure beside that; return why it ended."""
        self._became_ready.clear()
        failure: MycoswarmError | None = None
        async with asyncio.TaskGroup() as group:
            beside = [
                group.create_task(self._keep_synced(client)),
                group.create_task(self._measure(client)),
                group.create_task(self._ask_for_a_beacon()),
            ]
            try:
                await self._watch(client)
            except MycoswarmError as exc:
                failure = exc
                # Out of routing before anything else is awaited.
                self.client = self.word = None
                self._set(Reach.UNREACHABLE, exc.message, exc.code)
            finally:
                for task in beside:
                    task.cancel()
        assert failure is not None  # a watch ends in no other way
        return failure

    async def _watch(self, client: PeerClient) -> NoReturn:
        async with aclosing(client.watch()) as words:
            within_s = FIRST_WORD_S
            while True:
                word = await _next(words, within_s=within_s)
                within_s = SILENT_S
                self._seen_s = self._around.clock.monotonic_s()
                if word is not None:
                    await self._hear(client, word)

    async def _hear(self, client: PeerClient, word: Word) -> None:
        if word.id != self.member.id:
            raise Unavailable(
                "peer-unreachable", f"cannot use node {self.member.name!r}: it names another id"
            )
        before, self.word, self.client = self.word, word, client
        address = client.remote_address()
        if address is not None:
            self._address = address
            self._around.hints.prove(self.member.id, address)
        self._around.seen(self, word)
        if not self.is_ready:
            self._ready_s = self._around.clock.monotonic_s()
            self._set(Reach.READY, "")
            # Also where the rosters agree: it learns where this node listens, and we where others do.
            self._sync_wanted.set()
            self._hurry.set()
            self._became_ready.set()
        elif word != before:
            self._around.changed()
        if self._differs():
            self._sync_wanted.set()
        if word.beacons and (before is None or before.beacons != word.beacons):
            await self._quietly(self._around.swarm.merge_beacons(word.beacons))

    async def _quietly(self, work: Awaitable[object]) -> bool:
        """Do something with what the member said; a fault of its is noted and goes no further."""
        try:
            await work
        except MycoswarmError as exc:
            log.warning("node %s (%s): %s", self.member.name, self.member.id, exc.message)
            return False
        return True

    async def _keep_synced(self, client: PeerClient) -> None:
        pause_s = _SYNC_PAUSE_S
        while True:
            await self._sync_wanted.wait()
            # News that came from another are on their way to everybody: mostly nothing is left to do.
            with suppress(TimeoutError):
                async with asyncio.timeout(_SETTLE_S):
                    await self._hurry.wait()
            is_needed = self._hurry.is_set() or self._differs()
            self._sync_wanted.clear()
            self._hurry.clear()
            self._syncs_begun += 1
            is_done = not is_needed or await self._quietly(self._sync(client))
            self._end_sync()
            if is_done:
                pause_s = _SYNC_PAUSE_S
            else:
                await asyncio.sleep(pause_s)
                pause_s = min(_LONGEST_SYNC_PAUSE_S, pause_s * 2)
                self._sync_wanted.set()

    def _differs(self) -> bool:
        return self.word is not None and self.word.digest != self._around.swarm.digest

    def _end_sync(self) -> None:
        self._syncs_ended = self._syncs_begun
        self._synced.set()
        self._synced = asyncio.Event()

    async def _sync(self, client: PeerClient) -> None:
        """Give what it lacks and take what we lack; either goes on where the other fails.

        A member that missed an epoch sends statements that this node refuses, and needs ours all the more.
        """
        have, port = self._around.swarm.hashes(), self._around.own_port() or 0
        # Whoever was just started has heard the newest beacon before, perhaps, and asks for another.
        fresh = isinstance(self._around.swarm.age_s(), Unknown)
        body = {"have": have, "statements": [], "port": port, "fresh": fresh}
        answer = dict(await client.ask("POST", "/swarm/sync", body, within_s=_SYNC_WITHIN_S))
        try:
            await self._give(client, answer)
        finally:
            await self._take(answer)

    async def _give(self, client: PeerClient, answer: dict[str, object]) -> None:
        swarm = self._around.swarm
        wanted = as_list(answer.get("want", []), where="want", max_items=MAX_STATEMENTS)
        mine = frozenset(swarm.hashes())
        gifts = swarm.missing(mine - {one for one in wanted if isinstance(one, str)})
        for portion in portions(gifts):
            # Without `have`, it would answer with its whole roster.
            body = {"have": sorted(mine), "statements": portion}
            await client.ask("POST", "/swarm/sync", body, within_s=_SYNC_WITHIN_S)

    async def _take(self, answer: dict[str, object]) -> None:
        swarm = self._around.swarm
        statements = get_list(answer, "statements", where="", max_items=MAX_STATEMENTS)
        if statements:
            await swarm.merge(statements)
        await swarm.merge_beacons(as_list(answer.get("beacons", []), where="beacons", max_items=64))
        told = answer.get("peers")
        if isinstance(told, dict):
            self._around.peers_told(told)

    async def give(self, statements: Sequence[Mapping[str, object]]) -> bool:
        """Hand statements to the member, if it is ready; tell whether it has taken them."""
        if self.client is None:
            return False
        body = {"have": self._around.swarm.hashes(), "statements": list(statements)}
        return await self._quietly(self.client.ask("POST", "/swarm/sync", body))

    async def _ask_for_a_beacon(self) -> None:
        """Ask a signer again, as long as nothing says how old this node's roster is."""
        await self._became_ready.wait()
        while self.member.is_signer and isinstance(self._around.swarm.age_s(), Unknown):
            self._sync_wanted.set()
            self._hurry.set()
            await asyncio.sleep(_ASK_AGAIN_S)

    async def _measure(self, client: PeerClient) -> None:
        await self._became_ready.wait()
        while True:
            await self._quietly(self.ping(client))
            await asyncio.sleep(_PING_S)

    async def ping(self, client: PeerClient) -> float:
        """Measure how long a small answer takes, in milliseconds."""
        begun_s = self._around.clock.monotonic_s()
        await client.ask("GET", "/swarm/word")
        self._rtt_ms = (self._around.clock.monotonic_s() - begun_s) * 1000
        return self._rtt_ms

    def _set(self, state: Reach, detail: str, code: str = "") -> None:
        is_news = (state, detail) != (self._state, self._detail)
        self._state, self._detail, self._code = state, detail, code
        if state is not Reach.READY:
            self._became_ready.clear()
        if is_news:
            self._around.changed()


async def _next(words: AsyncGenerator[Word | None, None], *, within_s: float) -> Word | None:
    try:
        async with asyncio.timeout(within_s):
            return await anext(words)
    except TimeoutError as exc:
        raise Unavailable(
            "peer-unreachable", f"cannot hear the node: it was silent for {within_s:g} s"
        ) from exc
    except StopAsyncIteration as exc:
        raise Unavailable("peer-unreachable", "cannot hear the node: it closed the connection") from exc
