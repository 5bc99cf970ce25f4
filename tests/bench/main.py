"""Runs the benchmarks and prints one table for each; figures are only ever compared within one run."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.bench import bench_cage, bench_http, bench_policy, bench_rest, bench_store, bench_swarm

ALL: dict[str, Callable[[Path], None]] = {
    "policy": bench_policy.run,
    "store": bench_store.run,
    "http": bench_http.run,
    "streams": bench_http.run_streams,
    "cage": bench_cage.run,
    "rest": bench_rest.run,
    "swarm": bench_swarm.run,
    "engine": bench_rest.run_engine,
}


def main() -> None:
    names = sys.argv[1:] or list(ALL)
    for name in names:
        with tempfile.TemporaryDirectory(prefix="bench-") as directory:
            print(f"\n== {name}", flush=True)
            ALL[name](Path(directory))


if __name__ == "__main__":
    main()
