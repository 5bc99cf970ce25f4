"""The swarm's door and its links: open while this node is a member, closed while it is none.

Law: nothing listens for others and nothing is announced before this node is in a swarm, and both end with
its membership. Whoever was put out still looks for news of the roster. A door that cannot be opened is a
problem that `status` shows; the rest of the node works on.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable, Sequence

from mycoswarmd.api.access import SWARM_LISTENER
from mycoswarmd.api.app import Api
from mycoswarmd.daemon.outside import Outside
from mycoswarmd.daemon.settings import Settings
from mycoswarmd.errors import ConfigError, Unavailable
from mycoswarmd.fleet.discovery import Discovery
from mycoswarmd.fleet.fleet import Fleet
from mycoswarmd.flow.ports import Clock
from mycoswarmd.flow.swarm import Swarm
from mycoswarmd.flow.swarmports import Hint, PeerAddress
from mycoswarmd.trust.identity import NodeIdentity
from mycoswarmd.trust.tlsctx import Tls
from mycoswarmd.wire.hints import Announcement
from mycoswarmd.wire.proof import Proof

log = logging.getLogger(__name__)

_DIGEST_CHARS = 16
# How long an unenrolled node looks for a swarm, and waits for a second one when it has found the first.
_LOOK_S, _AND_OTHERS_S = 5.0, 0.3
_BIND_AGAIN_S = 5.0
_BIND_HINT = "choose another with swarm_listen in the settings"


class NodeTls:
    """The TLS contexts of this node's key of the moment."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._tls: Tls | None = None
        self._id = ""
        swarm.subscribe(self._on_change)

    def client_context(self, cert_der: bytes) -> ssl.SSLContext:
        """Return the context to reach the member with this certificate."""
        return self._current().client_context(cert_der)

    def server_context(self) -> ssl.SSLContext:
        """Return the context to listen with; it trusts the live members of each moment."""
        return self._current().server_context(self._anchors)

    def _on_change(self) -> None:
        if self._tls is not None:
            self._tls.refresh()

    def _current(self) -> Tls:
        identity = self._swarm.identity
        assert isinstance(identity, NodeIdentity)
        if self._tls is None:
            self._tls = Tls(identity.seed, identity.cert_der)
        elif self._id != identity.node_id:
            self._tls.replace(identity.seed, identity.cert_der)
        self._id = identity.node_id
        return self._tls

    def _anchors(self) -> Sequence[bytes]:
        roster = self._swarm.roster
        return [member.cert_der for member in roster.members.values()] if roster is not None else []


class Membership:
    """Opens and closes what membership needs. One per daemon."""

    def __init__(
        self,
        *,
        settings: Settings,
        outside: Outside,
        proved: Callable[[Proof], None],
        swarm: Swarm,
        fleet: Fleet,
        tls: NodeTls,
        clock: Clock,
    ) -> None:
        self._outside = outside
        self._proved = proved
        self._settings = settings
        self._swarm = swarm
        self._fleet = fleet
        self._tls = tls
        self._clock = clock
        self._changed = asyncio.Event()
        self._out: frozenset[str] | None = None  # who was out when this was looked at last
        self.discovery: Discovery | None = None
        self.problem = ""
        self._report_revoked()
        swarm.subscribe(self._on_change)

    async def nearby(self) -> Sequence[PeerAddress]:
        """Look for swarms on the networks of this machine; a few seconds at most."""
        if not self._settings.discovery:
            raise Unavailable(
                "discovery-off",
                "cannot look for a swarm: discovery is off in the settings",
                hint="say where one is: mycoswarmctl enroll --address HOST",
            )
        found: dict[PeerAddress, None] = {}
        first = asyncio.Event()

        def note(hint: Hint) -> None:
            if len(found) < 64:
                found[hint.address] = None
            first.set()

        looking = Discovery(self._outside.start_discovery, note, clock=self._clock, on_proof=self._proved)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(looking.run())
            try:
                async with asyncio.timeout(_LOOK_S):
                    await first.wait()
                await asyncio.sleep(_AND_OTHERS_S)
            except TimeoutError:
                log.info("no swarm was seen on this network")
            finally:
                task.cancel()
        return list(found)

    async def run(self, api: Api) -> None:
        """Keep the links while there is a roster, and the door open while it has this node; until cancelled.

        A node that was put out goes on asking: the paper key may have brought it back.
        """
        while True:
            self._changed.clear()
            begun = self._standing()
            if begun is None:
                await self._changed.wait()
                continue
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._fleet.run(), name="swarm:fleet"),
                    group.create_task(self._discover(), name="swarm:discovery"),
                ]
                if self._swarm.is_member():
                    tasks.append(group.create_task(self._listen(api), name="swarm:listen"))
                while self._standing() == begun:
                    await self._changed.wait()
                    self._changed.clear()
                for task in tasks:
                    task.cancel()

    def _standing(self) -> tuple[str, bool] | None:
        """Return this node's id and whether it is a member, or None without a swarm."""
        node_id = self._swarm.self_id
        if self._swarm.roster is None or node_id is None:
            return None
        return node_id, self._swarm.is_member()

    def _on_change(self) -> None:
        self._report_revoked()
        self._announce()
        self._changed.set()

    def _report_revoked(self) -> None:
        """Write into the log who was put out since the last look; nobody at the first."""
        roster = self._swarm.roster
        now = frozenset(roster.revoked) if roster is not None else None
        if roster is not None and now is not None and self._out is not None:
            for node_id in sorted(now - self._out):
                is_self = node_id == self._swarm.self_id
                log.warning(
                    "%s was put out of the swarm: %s",
                    "this node" if is_self else f"node {node_id}",
                    roster.revoked[node_id],
                    extra={"event": "expelled" if is_self else "revoked"},
                )
        self._out = now

    async def _listen(self, api: Api) -> None:
        where = self._settings.swarm_listen
        if where is None:
            return
        while True:
            try:
                sock = await self._outside.listen(*where, _BIND_HINT)
            except ConfigError as exc:
                if self.problem != exc.message:
                    log.error("%s", exc, extra={"event": "listener-down"})  # noqa: TRY400 - in its own words
                self.problem = exc.message
                await asyncio.sleep(_BIND_AGAIN_S)
                continue
            self.problem = ""
            async with api.listening(sock, SWARM_LISTENER, self._tls.server_context()):
                log.info("listening for the swarm at %s", PeerAddress(*where))
                await asyncio.get_running_loop().create_future()  # until cancelled

    async def _discover(self) -> None:
        if not self._settings.discovery:
            return
        self.discovery = Discovery(
            self._outside.start_discovery, self._fleet.hint, clock=self._clock, on_proof=self._proved
        )
        self._announce()
        try:
            await self.discovery.run()
        finally:
            self.discovery = None

    def _announce(self) -> None:
        discovery, node_id, port = self.discovery, self._swarm.self_id, own_port(self._settings)
        if discovery is None or node_id is None or not self._swarm.is_member() or not port:
            return
        digest = self._swarm.digest[:_DIGEST_CHARS]
        discovery.announce(Announcement(node_id=node_id, port=port, digest=digest))


def own_port(settings: Settings) -> int:
    """Return the port at which others find this node; 0 where it does not listen."""
    return settings.swarm_listen[1] if settings.swarm_listen is not None else 0
