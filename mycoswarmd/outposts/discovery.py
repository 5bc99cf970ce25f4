"""Finds the other nodes on the local networks by multicast DNS.

A process of its own, `python3 -I -m mycoswarmd.outposts.discovery`, the only importer of zeroconf: a
packet that kills it, hangs it or fills its memory costs nothing else. It talks to the node in lines on its
standard input and output and ends with them; with `--once SECONDS` it prints what it hears for that long,
for a person.

Law: everything heard is a hint. What is announced is the node's id, its port and the beginning of its
roster's digest: no host name, no model, no person.
Source: RFC 6762, RFC 6763; wire/hints.py for the lines.
"""

import argparse
import asyncio
import logging
import os
import re
import resource
import secrets
import signal
import socket
import stat
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

import zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from mycoswarmd.errors import BadRequest
from mycoswarmd.outposts.confine import confine
from mycoswarmd.outposts.interfaces import Surroundings, read_surroundings, watch_changes
from mycoswarmd.outposts.selftest import prove
from mycoswarmd.wire.hints import (
    LINE_BYTES,
    Announcement,
    Beat,
    Gone,
    Proved,
    Ready,
    Report,
    Trouble,
    encode_report,
    parse_order,
    sighting,
)
from mycoswarmd.wire.proof import Proof, Unit

TYPE = "_mycoswarm._tcp.local."
BEAT_S = 5.0
# The kernel ends it when it has not beaten for so long: a node cannot kill what is systemd's.
_HUNG_S = 20
EXIT_BROKEN = 3
EXIT_FULL = 4
# Every packet about a node has this in a name: other devices' traffic is not even parsed.
_MARK = b"mycoswarm"
# Ours are 1460 bytes at most; whoever sends more in one packet is no node.
_PACKET_BYTES = 1500
# In a second: a swarm of 200 whose power comes back stays below this, and zeroconf can parse it on a Pi.
_PACKETS, _PACKETS_OF_ONE, _BYTES = 300, 60, 200_000
_SOURCES = 256
_NODES = 256
_RESOLVERS = 4
_RESOLVE_MS = 1500
# A hint is said again before the node forgets it, and an announcement before others do.
_REFRESH_S = 30.0
_ANNOUNCE_S = 60.0
_LINES, _LINES_S = 80, 40.0
_CACHE_RECORDS = 20_000
# Above this it ends by itself and is started anew, long before its memory runs out.
_RSS_KIB = 110 << 10
_SETTLE_S = 0.3
_RETRY_S = 5.0
_CLOSE_S = 2.0
_LOOK_S = 30.0
_INSTANCE = re.compile(rf"([a-z2-7]{{26}})\.{re.escape(TYPE)}\Z")


class Meter:
    """Counts what arrived in the current second."""

    def __init__(self) -> None:
        self._second = -1
        self._bytes = 0
        self._packets = 0
        self._of: dict[str, int] = {}

    def admits(self, source: str, size_bytes: int, *, now_s: float) -> bool:
        """Count a packet and tell whether there is still time for it."""
        if int(now_s) != self._second:
            self._second, self._bytes, self._packets, self._of = int(now_s), 0, 0, {}
        if source not in self._of and len(self._of) >= _SOURCES:
            return False
        self._of[source] = self._of.get(source, 0) + 1
        if self._of[source] > _PACKETS_OF_ONE:
            return False
        self._packets += 1
        self._bytes += size_bytes
        return self._packets <= _PACKETS and self._bytes <= _BYTES


class Gate(asyncio.DatagramProtocol):
    """Stands before zeroconf's own reader: only small packets about nodes pass, and not too many."""

    def __init__(self, inner: asyncio.DatagramProtocol, meter: Meter, now_s: Callable[[], float]) -> None:
        self._inner = inner
        self._meter = meter
        self._now_s = now_s
        self.transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Pass on."""
        self.transport = transport
        # asyncio's own transports for datagrams are none by type in Python 3.11.
        self._inner.connection_made(cast("asyncio.DatagramTransport", transport))

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Pass on what may be about a node."""
        if len(data) > _PACKET_BYTES or _MARK not in data.lower():
            return
        if self._meter.admits(addr[0], len(data), now_s=self._now_s()):
            self._inner.datagram_received(data, addr)

    def error_received(self, exc: Exception) -> None:
        """Ignore: a network that is gone shows itself by netlink."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass on."""
        self._inner.connection_lost(exc)


class GatedLoop(asyncio.SelectorEventLoop):
    """An event loop on which nobody reads datagrams but through a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.meter = Meter()
        self.gates: list[Gate] = []

    async def create_datagram_endpoint(  # type: ignore[override]
        self,
        protocol_factory: Callable[[], asyncio.DatagramProtocol],
        *,
        sock: socket.socket,
    ) -> tuple[asyncio.DatagramTransport, asyncio.DatagramProtocol]:
        """Open an endpoint on a socket, as zeroconf does."""
        inner = protocol_factory()
        gate = Gate(inner, self.meter, self.time)
        transport, _ = await super().create_datagram_endpoint(lambda: gate, sock=sock)
        self.gates.append(gate)
        return transport, inner


class Outlet:
    """Writes lines to the node, a bounded number; what does not fit is dropped, for it is said again."""

    def __init__(self, fd: int, now_s: Callable[[], float], *, metered: bool) -> None:
        self._fd = fd
        self._now_s = now_s
        self._metered = metered
        self._tokens = float(_LINES)
        self._at_s = now_s()

    def say(self, report: Report) -> bool:
        """Write a line, and tell whether it went out."""
        now_s = self._now_s()
        self._tokens = min(float(_LINES), self._tokens + (now_s - self._at_s) * _LINES_S)
        self._at_s = now_s
        is_vital = isinstance(report, (Beat, Ready))
        if self._metered and self._tokens < 1 and not is_vital:
            return False
        self._tokens -= 1
        try:
            os.write(self._fd, encode_report(report))
        except BlockingIOError:  # nobody reads just now
            return False
        except BrokenPipeError:
            os._exit(0)
        return True


@dataclass(slots=True)
class Node:
    """What was said of one node."""

    said: Report | None = None
    said_at_s: float = 0.0


class Session:
    """zeroconf on the interfaces of one moment."""

    def __init__(
        self, surroundings: Surroundings, changed: Callable[[str, zeroconf.ServiceStateChange], None]
    ) -> None:
        """Open the sockets; OSError when that cannot be done."""
        self.surroundings = surroundings
        self._changed = changed
        self._mdns = AsyncZeroconf(interfaces=surroundings.listening())
        self._announced: tuple[Announcement, float] | None = None
        self._info: AsyncServiceInfo | None = None

    async def start(self) -> None:
        """Ask who is there."""
        await self._mdns.zeroconf.async_wait_for_start()
        AsyncServiceBrowser(self._mdns.zeroconf, TYPE, handlers=[self._on_change])

    def _on_change(
        self, *, zeroconf: object, service_type: str, name: str, state_change: zeroconf.ServiceStateChange
    ) -> None:
        del zeroconf, service_type
        self._changed(name, state_change)

    async def announce(self, wanted: Announcement | None, *, now_s: float) -> None:
        """Have the network know this, and nothing else; say it again when it is time to."""
        if wanted is None:
            if self._info is not None:
                await (await self._mdns.async_unregister_service(self._info))
            self._info = self._announced = None
            return
        if self._announced is not None:
            announced, at_s = self._announced
            if announced == wanted and now_s - at_s < _ANNOUNCE_S:
                return
            if announced.node_id != wanted.node_id:
                await self.announce(None, now_s=now_s)
        info = AsyncServiceInfo(
            TYPE,
            f"{wanted.node_id}.{TYPE}",
            port=wanted.port,
            properties={"id": wanted.node_id, "v": str(wanted.version), "d": wanted.digest},
            server=f"mycoswarm-{wanted.node_id}.local.",
            parsed_addresses=self.surroundings.announced(),
        )
        if self._info is None:
            # Two machines with copies of one key are for the nodes to notice: both go on here.
            said = await self._mdns.async_register_service(info, cooperating_responders=True)
        else:
            said = await self._mdns.async_update_service(info)
        await said
        self._info, self._announced = info, (wanted, now_s)

    async def look_up(self, name: str, *, ask: bool) -> AsyncServiceInfo | None:
        """Return what is known of an instance; when that is not enough, ask the network if told so."""
        info = AsyncServiceInfo(TYPE, name)
        if info.load_from_cache(self._mdns.zeroconf):
            return info
        if ask and await info.async_request(self._mdns.zeroconf, _RESOLVE_MS):
            return info
        return None

    def records(self) -> int:
        """Return how much it remembers of what it heard."""
        return sum(len(records) for records in self._mdns.zeroconf.cache.cache.values())

    async def close(self) -> None:
        """Say goodbye and close the sockets."""
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(_CLOSE_S):
                await self._mdns.async_close()


class Discovery:
    """Keeps a session on the networks that there are, and tells the node what it hears."""

    def __init__(self, loop: GatedLoop, outlet: Outlet, memory: "Memory") -> None:
        self._memory = memory
        self._loop = loop
        self._outlet = outlet
        self._wanted: Announcement | None = None
        self._session: Session | None = None
        self._nodes: dict[str, Node] = {}
        self._asked: asyncio.Queue[str] = asyncio.Queue(maxsize=_NODES)
        self._poked = asyncio.Event()
        self._stopped = asyncio.Event()
        self._is_stale = False

    async def run(self, orders: asyncio.StreamReader | None, *, for_s: float | None = None) -> None:
        """Work until told to stop, until the node is gone, or for a number of seconds."""
        async with asyncio.TaskGroup() as group:
            works = [self._keep(), self._notice_changes(), self._beat(), self._refresh(), self._bound()]
            works += [self._resolve() for _ in range(_RESOLVERS)]
            works += [self._obey(orders)] if orders is not None else []
            tasks = [group.create_task(work) for work in works]
            with suppress(TimeoutError):
                async with asyncio.timeout(for_s):
                    await self._stopped.wait()
            for task in tasks:
                task.cancel()
        if self._session is not None:
            await self._session.close()

    async def _obey(self, orders: asyncio.StreamReader) -> None:
        while line := await orders.readline():
            order = parse_order(line)
            if order.stop:
                break
            self._wanted = order.announce
            self._poked.set()
        self._stopped.set()

    async def _beat(self) -> None:
        while True:
            if self._is_broken():
                os._exit(EXIT_BROKEN)
            self._outlet.say(Beat())
            signal.alarm(_HUNG_S)
            await asyncio.sleep(BEAT_S)

    async def _notice_changes(self) -> None:
        """Look at the interfaces again whenever the kernel says so, and now and then."""
        watcher = watch_changes()
        changed = asyncio.Event()
        if watcher is not None:
            self._loop.add_reader(watcher, _drain, watcher, changed)
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await changed.wait()
            await asyncio.sleep(_SETTLE_S)  # such news come in bursts
            changed.clear()
            self._poked.set()

    async def _bound(self) -> None:
        """Forget everything heard when it is too much; end when memory does not come back."""
        while True:
            await asyncio.sleep(1.0)
            if self._memory.resident_kib() > _RSS_KIB:
                os._exit(EXIT_FULL)
            if self._session is not None and self._session.records() > _CACHE_RECORDS:
                self._is_stale = True
                self._poked.set()

    async def _keep(self) -> None:
        """Have a session that fits the interfaces, and announce on it what is wanted."""
        trouble = ""
        while True:
            self._poked.clear()
            wait_s = _ANNOUNCE_S
            try:
                await self._renew()
                if self._session is not None:
                    await self._session.announce(self._wanted, now_s=self._loop.time())
                    trouble = ""
            except OSError as exc:
                said = f"cannot listen for other nodes: {exc.strerror or 'no network'}"
                if said != trouble:
                    trouble = said
                    self._outlet.say(Trouble(said))
                self._is_stale, wait_s = True, _RETRY_S
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._poked.wait()

    async def _renew(self) -> None:
        surroundings = read_surroundings()
        session = self._session
        if session is not None and session.surroundings == surroundings and not self._is_stale:
            return
        if session is not None:
            self._session = None
            self._loop.gates.clear()
            await session.close()
        self._is_stale = False
        if not surroundings.places:
            raise OSError(0, "this machine has no address on a private network")
        session = Session(surroundings, self._on_change)
        self._session = session
        await session.start()
        self._outlet.say(Ready())

    def _on_change(self, untrusted_name: str, change: zeroconf.ServiceStateChange) -> None:
        found = _INSTANCE.match(untrusted_name)
        if found is None or (self._wanted is not None and found[1] == self._wanted.node_id):
            return
        if change is zeroconf.ServiceStateChange.Removed:
            self._forget(found[1])
            return
        if found[1] not in self._nodes:
            if len(self._nodes) >= _NODES:
                # Of a flood, none stays for long, and whoever is real says it again.
                del self._nodes[secrets.choice(list(self._nodes))]
            self._nodes[found[1]] = Node()
        self._ask(found[1])

    def _ask(self, node_id: str) -> None:
        with suppress(asyncio.QueueFull):
            self._asked.put_nowait(node_id)

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_S)
            for node_id in list(self._nodes):
                self._ask(node_id)

    async def _resolve(self) -> None:
        while True:
            node_id = await self._asked.get()
            session, node = self._session, self._nodes.get(node_id)
            if session is None or node is None:
                continue
            info = None
            with suppress(zeroconf.NotRunningException, OSError):
                info = await session.look_up(f"{node_id}.{TYPE}", ask=True)
            if session is not self._session or self._nodes.get(node_id) is not node:
                continue
            report = _read(node_id, info, session.surroundings) if info is not None else None
            if report is None:
                self._forget(node_id)
            else:
                self._say(node, report)

    def _say(self, node: Node, report: Report) -> None:
        now_s = self._loop.time()
        if (report != node.said or now_s - node.said_at_s > _REFRESH_S / 2) and self._outlet.say(report):
            node.said, node.said_at_s = report, now_s

    def _forget(self, node_id: str) -> None:
        node = self._nodes.pop(node_id, None)
        if node is not None and node.said is not None:
            self._outlet.say(Gone(node_id))

    def _is_broken(self) -> bool:
        """Tell whether a socket was closed under the session's hands."""
        return any(gate.transport is None or gate.transport.is_closing() for gate in self._loop.gates)


def _read(node_id: str, info: AsyncServiceInfo, surroundings: Surroundings) -> Report | None:
    """Return what an instance says of itself, or None when it says nothing that makes sense."""
    said = {
        key.decode("ascii", "replace"): value.decode("ascii", "replace")
        for key, value in info.properties.items()
        if isinstance(value, bytes)
    }
    addresses = surroundings.usable(info.parsed_scoped_addresses())
    version = said.get("v", "")
    if said.get("id") != node_id or not addresses or not re.fullmatch(r"[0-9]{1,5}", version):
        return None
    try:
        return sighting(
            node_id=node_id,
            addresses=addresses,
            port=info.port,
            version=int(version),
            digest=said.get("d", ""),
        )
    except BadRequest:
        return None


def _drain(watcher: socket.socket, changed: asyncio.Event) -> None:
    # ENOBUFS: there were more changes than fit, so there were changes.
    with suppress(OSError):
        while watcher.recv(65536):
            pass
    changed.set()


class Memory:
    """How much memory this process has; opened before files are closed to it.

    Not `ru_maxrss`: a new process has that of whoever started it.
    """

    def __init__(self) -> None:
        self._fd = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self._page_kib = resource.getpagesize() >> 10

    def resident_kib(self) -> int:
        """Return what is resident now, in KiB."""
        return int(os.pread(self._fd, 128, 0).split()[1]) * self._page_kib


def _on_fault(loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    """End for every fault but that of one packet: a process that is half dead would not be started anew."""
    del loop
    fault = context.get("exception")
    if isinstance(fault, MemoryError):
        os._exit(EXIT_FULL)
    if "handle" not in context:
        os._exit(EXIT_BROKEN)


async def _serve(loop: GatedLoop, memory: Memory, *, proof: Proof | None, once_s: float | None) -> None:
    outlet = Outlet(sys.stdout.fileno(), loop.time, metered=once_s is None)
    discovery = Discovery(loop, outlet, memory)
    if once_s is not None:
        await discovery.run(None, for_s=once_s)
        return
    if proof is not None:
        outlet.say(Proved(proof))
    os.set_blocking(sys.stdout.fileno(), False)
    orders = asyncio.StreamReader(limit=LINE_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    await discovery.run(orders)


def main(argv: Iterable[str]) -> None:
    """Run until told to stop."""
    parser = argparse.ArgumentParser(prog="mycoswarmd.outposts.discovery")
    parser.add_argument("--once", type=float, metavar="SECONDS")
    options = parser.parse_args(list(argv))
    logging.getLogger("zeroconf").setLevel(logging.CRITICAL)
    memory = Memory()
    # A unit's standard input is its connection. Tried before this process closes its own doors.
    is_unit = options.once is None and stat.S_ISSOCK(os.fstat(0).st_mode)
    proof = prove(Unit.DISCOVERY) if is_unit else None
    confine()
    loop = GatedLoop()
    loop.set_exception_handler(_on_fault)
    try:
        loop.run_until_complete(_serve(loop, memory, proof=proof, once_s=options.once))
    finally:
        loop.close()


if __name__ == "__main__":
    main(sys.argv[1:])
