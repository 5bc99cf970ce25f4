"""Builds what belongs to the swarm: roster, keys, links, invitations. The other part of wiring.py."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from mycoswarmd.api.access import RosterBook
from mycoswarmd.api.services import SwarmDesk
from mycoswarmd.daemon.backup import starts_to_count, tidy
from mycoswarmd.daemon.clock import SystemClock, SystemEntropy
from mycoswarmd.daemon.membership import Membership, NodeTls, own_port
from mycoswarmd.daemon.outside import Outside
from mycoswarmd.daemon.ownword import OwnWord
from mycoswarmd.daemon.settings import Settings
from mycoswarmd.daemon.signing import PatientSigner, make_signer
from mycoswarmd.engines.peer import PeerEngines
from mycoswarmd.engines.peerhttp import PeerHttp
from mycoswarmd.errors import Unavailable
from mycoswarmd.fleet.fleet import Fleet
from mycoswarmd.flow.enrol import Checks, Invitations, Newcomer
from mycoswarmd.flow.ports import Engine
from mycoswarmd.flow.prompt import Prompts
from mycoswarmd.flow.swarm import Swarm
from mycoswarmd.flow.swarmports import Hint, PeerAddress
from mycoswarmd.store.db import Database
from mycoswarmd.store.receipts import SqliteReceiptLog
from mycoswarmd.store.roster import SqliteRosterStore
from mycoswarmd.trust.certificate import read_certificate
from mycoswarmd.trust.identity import IdentityFile
from mycoswarmd.trust.keys import verify
from mycoswarmd.trust.tlsctx import knock_context
from mycoswarmd.wire.jsonv import get_str
from mycoswarmd.wire.proof import Proof


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmParts:
    """What the rest of the node is wired to.

    Attributes:
        signer: the unit that holds the signing key, where one does.
    """

    swarm: Swarm
    fleet: Fleet
    members: PeerEngines
    membership: Membership
    invitations: Invitations
    newcomer: Newcomer
    signer: PatientSigner | None

    def book(self) -> RosterBook:
        """Return how the door looks keys up."""
        return RosterBook(
            read_id=_id_of,
            member_of=self.swarm.member,
            self_id=lambda: self.swarm.self_id,
        )

    def word(
        self, prompts: Prompts, engines: Sequence[Engine], *, state: Callable[[], str], settings: Settings
    ) -> OwnWord:
        """Return what this node says about itself."""
        return OwnWord(
            swarm=self.swarm,
            prompts=prompts,
            engines=engines,
            state=state,
            port=own_port(settings),
            clock=SystemClock(),
        )

    def desk(self, word: OwnWord) -> SwarmDesk:
        """Return everything that handlers of the swarm may use."""
        return SwarmDesk(
            swarm=self.swarm,
            invitations=self.invitations,
            newcomer=self.newcomer,
            fleet=self.fleet,
            word=word,
            nearby=self.membership.nearby,
        )


async def make_swarm(
    db: Database,
    settings: Settings,
    outside: Outside,
    receipts: SqliteReceiptLog,
    clock: SystemClock,
    entropy: SystemEntropy,
    *,
    proved: Callable[[Proof], None],
) -> SwarmParts:
    """Read the roster and the keys, and build what works with them; nothing is dialled or opened yet."""
    store = SqliteRosterStore(db)
    identities = IdentityFile(settings.state_dir / "identity")
    signer = make_signer(settings, clock)
    await asyncio.to_thread(signer.wake)  # what starts a unit does not hold up the loop
    swarm = Swarm(
        store=store,
        identities=identities,
        signer=signer,
        receipts=receipts,
        clock=clock,
        entropy=entropy,
        verify=verify,
        read_cert=read_certificate,
    )
    await swarm.start(boots=starts_to_count(settings))
    tidy(settings)  # only now: the count is on disk
    tls = NodeTls(swarm)
    dialer = PeerHttp(client_context=tls.client_context, knock_context=knock_context, dial=outside.dial)
    fleet = Fleet(
        swarm=swarm,
        store=store,
        dialer=dialer,
        clock=clock,
        entropy=entropy,
        static=[PeerAddress(*peer) for peer in settings.peers],
        own_port=lambda: own_port(settings) or None,
    )
    swarm.ask_signer_key = partial(_ask_signer_key, fleet)
    swarm.spread, swarm.give, swarm.reached = fleet.spread, fleet.give, fleet.reached
    swarm.tell = fleet.tell
    invitations = Invitations(
        swarm=swarm,
        store=store,
        clock=clock,
        entropy=entropy,
        check=Checks(verify=verify, read_cert=read_certificate),
    )
    await invitations.load()
    newcomer = Newcomer(
        swarm=swarm,
        identities=identities,
        dialer=dialer,
        entropy=entropy,
        found_at=lambda node_id, address: fleet.hint(Hint(address=address, node_id=node_id)),
    )
    return SwarmParts(
        swarm=swarm,
        fleet=fleet,
        members=PeerEngines(fleet.states, fleet.client, version=lambda: fleet.version),
        membership=Membership(
            settings=settings,
            outside=outside,
            proved=proved,
            swarm=swarm,
            fleet=fleet,
            tls=tls,
            clock=clock,
        ),
        invitations=invitations,
        newcomer=newcomer,
        signer=signer if isinstance(signer, PatientSigner) else None,
    )


def _id_of(cert_der: bytes) -> str:
    return read_certificate(cert_der).node_id


async def _ask_signer_key(fleet: Fleet, node_id: str) -> str:
    """Have another node make its signing key, and return the public half."""
    client = fleet.client(node_id)
    if client is None:
        raise Unavailable(
            "peer-unreachable",
            "cannot make this node a signer: it cannot be reached now, and it makes its key itself",
            hint="mycoswarmctl nodes says why",
        )
    answer = await client.ask("POST", "/swarm/signer-key", {})
    return get_str(dict(answer), "key", where="signer-key", max_len=64)
