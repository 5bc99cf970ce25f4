"""How the cost of a swarm at rest grows: many nodes in one process, real rosters, stores, links and TLS.

Only the listener is the tests' own, and there is no discovery; scale_swarm.py has whole daemons, and fewer.
python -m tests.bench.scale_inprocess [COUNT ...]
"""

import asyncio
import resource
import sys
import tempfile
import time
from asyncio import sslproto
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from mycoswarmd.core.roster import Member
from mycoswarmd.flow.swarmports import Hint
from mycoswarmd.wire.peer import HEARTBEAT_S
from tests.unit.fleet.nodes import RealNode, made_node

COUNTS = (10, 25, 50)
REST_S = 20.0
AGREE_S = 120.0


def main() -> None:
    """Measure each size and print it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(65_536, hard), hard))
    sslproto.SSLProtocol.max_size = 32 << 10  # as the daemon has it
    head = ("nodes", "CPU % of each", "bytes/s of each", "MB of each", "to agree, s")
    print("{:>6} {:>14} {:>16} {:>11} {:>12}".format(*head), flush=True)
    for count in [int(word) for word in sys.argv[1:]] or COUNTS:
        with tempfile.TemporaryDirectory() as directory:
            asyncio.run(measure(Path(directory), count))


async def measure(directory: Path, count: int) -> None:
    """Make a swarm, let it settle, and look at what it costs."""
    before_mb = resident_mb()
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(made_node(directory / str(n), f"n{n}")) for n in range(count)
        ]
        for node in nodes:
            node.behaviour.beat_s = HEARTBEAT_S
        await nodes[0].begin()
        for node in nodes[1:]:
            await nodes[0].admit(node)
        begun_s = time.monotonic()
        for node in nodes:
            await node.listen()
        for node in nodes:
            await stack.enter_async_context(node.linked())
            for other in nodes:
                if other is not node:
                    node.fleet.hint(Hint(address=other.address, node_id=other.id))
            # One after the other: a processor that shakes hands for all at once keeps none in time.
            await node.until(partial(settled, node, count), within_s=AGREE_S)
        async with asyncio.timeout(AGREE_S):
            while not all(settled(node, count) for node in nodes):
                await asyncio.sleep(0.2)
        took_s = time.monotonic() - begun_s
        await asyncio.sleep(5)
        cpu_s, sent = time.process_time(), loopback_bytes()
        await asyncio.sleep(REST_S)
        cpu = (time.process_time() - cpu_s) / REST_S / count * 100
        rate = (loopback_bytes() - sent) / REST_S / count
        stood = all(settled(node, count) for node in nodes)
        each_mb = (resident_mb() - before_mb) / count
        note = "" if stood else "  (not all links stood)"
        print(f"{count:>6} {cpu:>14.2f} {rate:>16.0f} {each_mb:>11.1f} {took_s:>12.1f}{note}", flush=True)


def settled(node: RealNode, count: int) -> bool:
    """Tell whether a node reaches all others, under one roster."""
    members: list[Member] = node.swarm.peers()
    states = node.fleet.states()
    return len(members) == count - 1 and all(
        state.word is not None and state.word.digest == node.swarm.digest for state in states
    )


def resident_mb() -> float:
    """Return this process's resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def loopback_bytes() -> int:
    """Return what was sent over loopback so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()  # of this network namespace, unlike /sys
    row = next(line for line in lines if line.strip().startswith("lo:"))
    return int(row.partition(":")[2].split()[8])


if __name__ == "__main__":
    main()
