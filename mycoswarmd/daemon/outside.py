"""What the node does not do in its own process: connections, discovery, cages, engines.

Run by a person it makes sockets itself and starts children. As the appliance it has no network and starts
nothing: it connects to the sockets of units, and what systemd put behind them has made its own confinement
known (`status --security`). Nothing here decides where anything may go; that is the policy's and the units'.
"""

import errno
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from mycoswarmd.api.bind import bind_tcp
from mycoswarmd.daemon.settings import CageKind, Settings
from mycoswarmd.errors import ConfigError
from mycoswarmd.fleet.discovery import OutpostProcess
from mycoswarmd.flow.ports import CageMaker, Dial
from mycoswarmd.inventory.gpu import has_driver
from mycoswarmd.outposts.dialing import LanDialer
from mycoswarmd.sandbox.bwrap import BubblewrapCages
from mycoswarmd.sandbox.outpost import connect_outpost, start_outpost
from mycoswarmd.sandbox.systemdcage import SystemdCages
from mycoswarmd.sandbox.zipapp import build_agent
from mycoswarmd.wire import probing
from mycoswarmd.wire.hints import LINE_BYTES
from mycoswarmd.wire.proof import Unit

DISCOVERY_MODULE = "mycoswarmd.outposts.discovery"
PROBE_MODULE = "mycoswarmd.daemon.probeunit"

Listen = Callable[[str, int, str], Awaitable[socket.socket]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """How this node reaches what is not in its process.

    Attributes:
        lan: the LAN dialer of the appliance, or None: this process makes its own connections.
        dial: the same, as engines take it.
        listen: makes a listening socket for a host and a port; ConfigError with the given hint.
        start_discovery: starts the process that speaks mDNS.
        start_probe: starts the process that reads graphics cards; None where there is nothing to read.
        cages: builds the cages of tasks.
    """

    lan: LanDialer | None
    dial: Dial | None
    listen: Listen
    start_discovery: Callable[[], Awaitable[OutpostProcess]]
    start_probe: Callable[[], Awaitable[OutpostProcess]] | None
    cages: CageMaker


def make_outside(settings: Settings) -> Outside:
    """Build what the settings ask for; nothing is connected or started yet."""
    if not settings.appliance:
        return Outside(
            lan=None,
            dial=None,
            listen=_bind,
            start_discovery=partial(start_outpost, DISCOVERY_MODULE, line_bytes=LINE_BYTES),
            start_probe=_read_by_child if has_driver() else None,
            cages=make_cages(settings),
        )
    lan = LanDialer(settings.outpost(Unit.LAN))
    discovery = settings.outpost(Unit.DISCOVERY)
    return Outside(
        lan=lan,
        dial=lan.connect,
        listen=partial(_have_bound, lan),
        start_discovery=partial(connect_outpost, discovery, line_bytes=LINE_BYTES),
        # Whether there is a driver cannot be seen from here.
        start_probe=partial(connect_outpost, settings.outpost(Unit.PROBE), line_bytes=probing.LINE_BYTES),
        cages=make_cages(settings),
    )


def make_cages(settings: Settings) -> CageMaker:
    """Build who makes cages; where the wanted ones cannot be, tasks are refused: nothing weaker steps in."""
    if settings.cages is CageKind.BUBBLEWRAP:
        return BubblewrapCages(build_agent(), settings.runtime_dir)
    return SystemdCages(settings.outpost(Unit.TASK))


async def _read_by_child() -> OutpostProcess:
    return await start_outpost(PROBE_MODULE, line_bytes=probing.LINE_BYTES)


async def _bind(host: str, port: int, hint: str) -> socket.socket:
    return bind_tcp(host, port, hint=hint)


async def _have_bound(lan: LanDialer, host: str, port: int, hint: str) -> socket.socket:
    try:
        return await lan.listen(host, port)
    except OSError as exc:  # a timeout is one, too
        if exc.errno == errno.EADDRINUSE:
            raise ConfigError(
                "port-taken",
                f"cannot listen on {host}:{port}: {exc.strerror}",
                hint=f"another program has it; {hint}",
            ) from exc
        raise ConfigError(
            "no-listener",
            f"cannot listen on {host}:{port}: the LAN dialer: {exc.strerror or 'no answer'}",
            hint="systemctl status mycoswarm-lan.socket mycoswarm-lan.service",
        ) from exc
