"""How long a cage takes from nothing to its proof, beside bubblewrap and Python started bare."""

import asyncio
import statistics
import subprocess
import time
from pathlib import Path

from mycoswarmd.core.types import CageSpec, Limits
from mycoswarmd.sandbox.bwrap import BubblewrapCages
from mycoswarmd.sandbox.zipapp import build_agent

RUNS = 30
BARE = [
    "bwrap",
    "--ro-bind",
    "/",
    "/",
    "--unshare-all",
    "--dev",
    "/dev",
    "--",
    "/usr/bin/python3",
    "-I",
    "-S",
    "-c",
    "",
]


def run(directory: Path) -> None:
    """Print medians in milliseconds."""
    bare = [_bare_ms() for _ in range(RUNS)]
    cage = asyncio.run(_cages_ms(directory))
    print(f"{'what':<28} {'p50 ms':>8} {'p90 ms':>8} {'ratio':>6}")
    for name, times_ms in (("bwrap + python, unconfined", bare), ("cage, opened and proved", cage)):
        cuts = statistics.quantiles(times_ms, n=10)
        ratio = statistics.median(times_ms) / statistics.median(bare)
        print(f"{name:<28} {statistics.median(times_ms):>8.1f} {cuts[8]:>8.1f} {ratio:>6.2f}")


def _bare_ms() -> float:
    started_s = time.perf_counter()
    subprocess.run(BARE, check=True)
    return (time.perf_counter() - started_s) * 1000


async def _cages_ms(directory: Path) -> list[float]:
    cages = BubblewrapCages(build_agent(), directory)
    spec = CageSpec(
        task_id="t-bench", attempt=1, read_paths=(".",), write_paths=(".",), programs=(), limits=Limits()
    )
    times_ms = []
    for _ in range(RUNS + 1):
        started_s = time.perf_counter()
        session = await cages.open(spec)
        times_ms.append((time.perf_counter() - started_s) * 1000)
        await session.close()
    return times_ms[1:]
