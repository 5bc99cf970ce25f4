"""What a swarm of 10, 25 and 50 costs each node at rest: real daemons and TLS on cables of their own.

Needs root. python -m tests.bench.scale_swarm [COUNT ...]
"""

import os
import sys
import time

from tests.bench.bench_swarm import cost_at_rest
from tests.swarm.lab import Lab, LabNode, wait_until, why_not

COUNTS = (10, 25, 50)
# Where all of them together would need more than the machine has, nobody is at rest.
LARGEST_FOR_CORES = 12
REST_S = 30
AT_ONCE = 5  # machines that start at a time: this one has to carry all of them


def main() -> None:
    """Grow one swarm and measure it at each size."""
    counts = [int(word) for word in sys.argv[1:]] or list(COUNTS)
    if reason := why_not():
        raise SystemExit(f"cannot measure: {reason}")
    head = ("nodes", "CPU % of each", "bytes/s of each", "MB of each", "to agree, s")
    print(" ".join(f"{name:>15}" for name in head), flush=True)
    with Lab() as lab:
        nodes: list[LabNode] = []
        for count in counts:
            if count > LARGEST_FOR_CORES * (os.cpu_count() or 1) + 1:
                print(f"{count:>15}  left out: too many for the {os.cpu_count()} processors of this machine")
                continue
            took_s = grow(lab, nodes, count)
            percent, sent_bytes = cost_at_rest(nodes, REST_S)
            resident = sum(map(resident_bytes, nodes)) / len(nodes) / 1e6
            figures = (f"{percent:.2f}", f"{sent_bytes:.0f}", f"{resident:.0f}", f"{took_s:.1f}")
            print(" ".join(f"{figure:>15}" for figure in (str(count), *figures)), flush=True)


def grow(lab: Lab, nodes: list[LabNode], count: int) -> float:
    """Admit machines until there are so many; returns how long the last one took to know all."""
    while len(nodes) < count:
        fresh = [
            lab.node(f"n{len(nodes) + index + 1}", start=False)
            for index in range(min(AT_ONCE, count - len(nodes)))
        ]
        for node in fresh:
            node.start(wait=False)
        for node in fresh:
            node.wait_ready()
        if not nodes:
            lab.found(fresh[0])
        for node in fresh[0 if nodes else 1 :]:
            lab.admit((nodes or fresh)[0], node)
        nodes.extend(fresh)
    begun_s = time.monotonic()
    wait_until(lambda: agree(nodes), within_s=180, every_s=0.5, why=lambda: lab.story(nodes[:2]))
    return time.monotonic() - begun_s


def agree(nodes: list[LabNode]) -> bool:
    """Tell whether each has everybody's roster and everybody's word."""
    for node in nodes:
        state = node.swarm()
        ready = [row for row in state["nodes"] if row["state"] == "ready" and row["verified"]["digest_same"]]
        if len(ready) != len(nodes):
            return False
    return True


def resident_bytes(node: LabNode) -> int:
    """Return the daemon's resident memory."""
    with open(f"/proc/{node.pid}/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * 4096


if __name__ == "__main__":
    main()
