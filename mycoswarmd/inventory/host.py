"""What this machine is: processors, memory, tier."""

from dataclasses import dataclass

import psutil

from mycoswarmd.wire.probing import Gpu

# Thresholds in bytes of the largest GPU's memory; below the last, processors decide.
_TIERS = ((20_000 << 20, "executive"), (7_000 << 20, "specialist"), (3_500 << 20, "worker"))
_LIGHT_CPUS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Facts that do not change while the node runs."""

    cpus: int
    memory_bytes: int


def read_host() -> Host:
    """Read processors and memory."""
    return Host(cpus=psutil.cpu_count() or 1, memory_bytes=psutil.virtual_memory().total)


def own_memory_bytes() -> int:
    """Return the resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def tier_of(host: Host, gpus: tuple[Gpu, ...]) -> str:
    """Name the class of machine, from its largest GPU, else its processors."""
    largest_bytes = max((gpu.memory_bytes for gpu in gpus), default=0)
    for at_least_bytes, tier in _TIERS:
        if largest_bytes >= at_least_bytes:
            return tier
    return "light" if host.cpus >= _LIGHT_CPUS else "edge"
