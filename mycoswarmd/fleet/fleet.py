"""All other members: a link to each, where they may be, and how they are just now.

Law: who is a member is the roster's to say, and a change of it takes effect before anything else is done:
the links of those who are out are cut in the same step. Where somebody is may be said by anybody.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from mycoswarmd.errors import MycoswarmError, NotFound, Unavailable
from mycoswarmd.fleet.doubles import Doubles
from mycoswarmd.fleet.hints import Hints, read_addresses
from mycoswarmd.fleet.knock import Knocker
from mycoswarmd.fleet.link import Around, Link
from mycoswarmd.fleet.memory import CLONED, Memory
from mycoswarmd.flow.ports import Clock, Entropy
from mycoswarmd.flow.swarm import Swarm
from mycoswarmd.flow.swarmports import Hint, PeerAddress, PeerClient, PeerDialer, PeerState, RosterStore
from mycoswarmd.wire.peer import Word

log = logging.getLogger(__name__)

_STATIC_S = 5.0
_SPREAD_S = 3.0
# Who leaves waits so long for one member to have heard of it.
_TELL_S, _LOOK_AGAIN_S = 5.0, 0.2
_REFUSED = "peer-refuses-us"
_PING_S = 4.0
# Of what one member says about others.
_TOLD_IDS, _TOLD_ADDRESSES = 64, 4


class Fleet:
    """The links to all members that compute, but for this node itself."""

    def __init__(
        self,
        *,
        swarm: Swarm,
        store: RosterStore,
        dialer: PeerDialer,
        clock: Clock,
        entropy: Entropy,
        static: Sequence[PeerAddress] = (),
        own_port: Callable[[], int | None] = lambda: None,
    ) -> None:
        """`static` are the addresses that a person wrote down; `own_port` is where this node listens."""
        self._swarm = swarm
        self._static = tuple(static)
        self._clock = clock
        self._hints = Hints(clock=clock, entropy=entropy, is_member=self._is_member)
        self._memory = Memory(store, clock)
        self._knocker = Knocker(
            swarm,
            dialer,
            clock=clock,
            addresses=self._hints.addresses,
            own_port=own_port,
            met=self._on_met,
        )
        self._doubles = Doubles(
            dialer,
            clock=clock,
            link_of=self._link,
            # Whoever relays to it looks like it: worth a hint, and no more.
            is_same=self._on_same,
            is_another=self._on_double,
        )
        self._around = Around(
            swarm=swarm,
            dialer=dialer,
            hints=self._hints,
            clock=clock,
            entropy=entropy,
            changed=self._tell,
            seen=self._on_seen,
            failed=self._on_failed,
            peers_told=self._on_told,
            own_port=own_port,
        )
        self._links: dict[str, tuple[Link, asyncio.Task[None]]] = {}
        self._group: asyncio.TaskGroup | None = None
        self._own: set[PeerAddress] = set()
        self._listeners: list[Callable[[], None]] = []
        self.version = 0  # of what `states` says, but for how long ago somebody was heard

    # --- what is known ---------------------------------------------------------------------------

    def states(self) -> Sequence[PeerState]:
        """Return how each member is, by name."""
        return sorted((link.state() for link, _ in self._links.values()), key=lambda one: one.member.name)

    def client(self, node_id: str) -> PeerClient | None:
        """Return a client of a member that is ready, or None."""
        link = self._link(node_id)
        return link.client if link is not None and link.is_ready else None

    def reached(self) -> Mapping[str, list[str]]:
        """Return where the ready members were reached, as far as it means the same on other machines."""
        found = {
            node_id: [str(one) for one in self._hints.proved(node_id) if "%" not in one.host]
            for node_id, (link, _) in self._links.items()
            if link.is_ready
        }
        return {node_id: addresses for node_id, addresses in found.items() if addresses}

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call a function after each change of a state or a word; returns what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    # --- what is done ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep all links until cancelled; may be run again afterwards."""
        for row in await self._memory.load():
            now_s = self._clock.monotonic_s()
            for i, address in enumerate(row.addresses if self._is_member(row.node_id) else ()):
                self._hints.prove(row.node_id, address, at_s=now_s - 1 - i)
        unsubscribe = self._swarm.subscribe(self._on_roster)
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                self._on_roster()
                group.create_task(self._knocker.run(), name="fleet:knock")
                group.create_task(self._doubles.run(), name="fleet:doubles")
                group.create_task(self._memory.run(), name="fleet:memory")
                group.create_task(self._tick(), name="fleet:tick")
        finally:
            self._group = None
            self._links.clear()
            unsubscribe()
            self._tell()

    def hint(self, hint: Hint) -> None:
        """Hear that somebody may listen somewhere."""
        if hint.node_id is None:
            if hint.address not in self._reached_addresses():
                self._knocker.want(hint.address)
            return
        if hint.node_id == self._swarm.self_id:
            return
        is_news = self._hints.add(hint.node_id, hint.address, digest=hint.digest)
        if hint.node_id not in self._links:
            self._knocker.want(hint.node_id)
            return
        link, _ = self._links[hint.node_id]
        if is_news:
            link.wake()
        if link.is_ready and hint.address not in self._hints.proved(hint.node_id):
            self._doubles.want(hint.node_id, hint.address)

    async def spread(self) -> None:
        """Tell everybody who is ready of a change here, and wait for them a few seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_SPREAD_S), asyncio.TaskGroup() as group:
                for link, _ in list(self._links.values()):
                    group.create_task(link.synced())

    async def give(self, statements: Sequence[Mapping[str, object]]) -> None:
        """Hand statements to everybody who is ready, and wait for them a few seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_SPREAD_S), asyncio.TaskGroup() as group:
                for link, _ in list(self._links.values()):
                    group.create_task(link.give(statements))

    async def tell(self, statements: Sequence[Mapping[str, object]]) -> list[str]:
        """Hand statements to everybody who is ready, and wait longer for the first; return who has them.

        Whoever refuses a node that was put out has heard of it; another one may not know this node yet.
        """
        told: set[str] = set()
        is_out = not self._is_member(self._swarm.self_id or "")

        async def give(link: Link) -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_SPREAD_S):
                    is_refused = is_out and link.state().code == _REFUSED
                    if is_refused or await link.give(statements):
                        told.add(link.member.name)
            link.wake()

        with suppress(TimeoutError):
            async with asyncio.timeout(_TELL_S):
                # The links are made anew when this node's own standing changes: so looked at again.
                while not told and self._swarm.peers():
                    async with asyncio.TaskGroup() as group:
                        for link, _ in list(self._links.values()):
                            group.create_task(give(link))
                    if not told:
                        await asyncio.sleep(_LOOK_AGAIN_S)
        return sorted(told)

    async def ping(self, node_id: str) -> float:
        """Ask a member something small and return the milliseconds until its answer.

        One that is away is dialled now, and waited for a few seconds.
        """
        if node_id not in self._links:
            raise NotFound("unknown-node", f"cannot ping {node_id[:80]!r}: it is no other node of this swarm")
        link, _ = self._links[node_id]
        link.wake()
        with suppress(TimeoutError):
            async with asyncio.timeout(_PING_S):
                await link.ready()
        if link.client is None:
            raise Unavailable(
                "peer-unreachable", f"cannot ping {link.member.name!r}: {link.state().detail or 'no answer'}"
            )
        return await link.ping(link.client)

    # --- changes ---------------------------------------------------------------------------------

    def _is_member(self, node_id: str) -> bool:
        return self._swarm.member(node_id) is not None

    def _link(self, node_id: str) -> Link | None:
        return self._links[node_id][0] if node_id in self._links else None

    def _on_roster(self) -> None:
        """Have links to exactly those who are members now."""
        if self._group is None:
            return
        members = {member.id: member for member in self._swarm.peers()}
        for node_id, (link, task) in list(self._links.items()):
            if node_id not in members:
                link.cut()
                task.cancel()
                del self._links[node_id]
                self._hints.forget(node_id)
                self._memory.forget(node_id)
        for node_id, member in members.items():
            if node_id in self._links:
                self._links[node_id][0].member = member
                self._links[node_id][0].poke()
                continue
            link = Link(member, self._around)
            link.alarm = self._memory.alarm(node_id)
            self._links[node_id] = (link, self._group.create_task(link.run(), name=f"link:{node_id}"))
        self._tell()

    def _on_seen(self, link: Link, word: Word) -> None:
        node_id, known = link.member.id, link.alarm
        link.alarm = self._memory.note(
            node_id, boot=word.boot, instance=word.instance, addresses=self._hints.proved(node_id)
        )
        if link.alarm and not known:
            self._report_double(link)

    def _on_double(self, link: Link, address: PeerAddress) -> None:
        if link.alarm:
            return
        said = f"{CLONED}: two machines have its key, one of them at {address}"
        link.alarm = self._memory.raise_alarm(link.member.id, said)
        self._report_double(link)
        self._tell()

    def _report_double(self, link: Link) -> None:
        log.error(
            "node %s (%s) is %s",
            link.member.name,
            link.member.id,
            link.alarm,
            extra={"event": "double-identity"},
        )

    def _on_failed(self, link: Link, failure: MycoswarmError) -> None:
        """Knock where a member does not let us in: one of the two has not heard of the other."""
        del failure  # a refusal often looks like a connection that ends
        if self._hints.addresses(link.member.id):
            self._knocker.want(link.member.id, is_ours=True)

    def _on_same(self, link: Link, address: PeerAddress) -> None:
        self._hints.add(link.member.id, address)

    def _on_told(self, untrusted_peers: Mapping[str, object]) -> None:
        """Take what a member says about where others are, as hints."""
        for node_id, untrusted in list(untrusted_peers.items())[:_TOLD_IDS]:
            if not isinstance(untrusted, list) or not self._is_member(node_id):
                continue
            for address in read_addresses(untrusted[:_TOLD_ADDRESSES]):
                self.hint(Hint(address=address, node_id=node_id))

    def _on_met(self, address: PeerAddress, cert_der: bytes) -> None:
        """Learn who is behind an address; its key will be proved when it is dialled."""
        identity = self._swarm.identity
        if identity is not None and identity.cert_der == cert_der:
            self._own.add(address)  # the same list of addresses may be on all nodes
        for node_id, (link, _) in self._links.items():
            if link.member.cert_der == cert_der:
                is_static = address in self._static
                if self._hints.add(node_id, address, is_static=is_static):
                    link.wake()

    async def _tick(self) -> None:
        """Find out who is at the addresses that a person wrote down, as long as that is not known."""
        while self._static:
            known = self._reached_addresses() | self._own
            for address in self._static:
                if address not in known:
                    self._knocker.want(address, is_ours=True)
            await asyncio.sleep(_STATIC_S)

    def _reached_addresses(self) -> set[PeerAddress]:
        """Return where members that are ready proved their keys."""
        ready = (node_id for node_id, (link, _) in self._links.items() if link.is_ready)
        return {address for node_id in ready for address in self._hints.proved(node_id)}

    def _tell(self) -> None:
        self.version += 1
        for listener in list(self._listeners):
            listener()
