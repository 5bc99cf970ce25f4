"""What a machine is: tiers by the largest GPU, else by processors; no GPU is a value."""

import pytest

from mycoswarmd.inventory.gpu import read_gpus
from mycoswarmd.inventory.host import Host, read_host, tier_of
from mycoswarmd.wire.probing import Gpu

GIB = 1 << 30


@pytest.mark.parametrize(
    ("gpus_gib", "cpus", "tier"),
    [((24,), 8, "executive"), ((8, 24), 8, "executive"), ((8,), 8, "specialist"), ((4,), 8, "worker"),
     ((2,), 8, "light"), ((), 4, "light"), ((), 2, "edge")],
)  # fmt: skip
def test_the_tier_is_that_of_the_largest_gpu_or_of_the_processors(
    gpus_gib: tuple[int, ...], cpus: int, tier: str
) -> None:
    gpus = tuple(Gpu(name="x", memory_bytes=size * GIB) for size in gpus_gib)
    assert tier_of(Host(cpus=cpus, memory_bytes=GIB), gpus) == tier


def test_this_machine_is_read_whatever_it_has() -> None:
    host, gpus = read_host(), read_gpus()
    assert host.cpus >= 1
    assert host.memory_bytes > 100 << 20
    assert gpus.detail
    assert all(gpu.memory_bytes > 0 for gpu in gpus.found)
