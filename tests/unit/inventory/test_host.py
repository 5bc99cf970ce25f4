"""What a machine is: tiers by the largest GPU, else by processors; no GPU is a value."""

from pathlib import Path

import pytest

from mycoswarmd.inventory import gpu
from mycoswarmd.inventory.gpu import read_gpus
from mycoswarmd.inventory.host import Host, read_host, tier_of
from mycoswarmd.wire.probing import Gpu, Gpus, Reading

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


def test_what_is_missing_of_a_driver_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With places that are not this machine's; for whole drivers see tests/appliance/test_probe.py."""
    trace, control = tmp_path / "version", tmp_path / "nvidiactl"
    monkeypatch.setattr(gpu, "_TRACES", (trace, control))
    monkeypatch.setattr(gpu, "_CONTROL", control)
    monkeypatch.setattr(gpu, "_LIBRARY", str(tmp_path / "none.so"))
    assert read_gpus() == Gpus(reading=Reading.NO_DRIVER, detail="no NVIDIA driver")
    trace.touch()
    assert read_gpus().reading is Reading.NO_LIBRARY
    monkeypatch.setattr(gpu, "_LIBRARY", "libc.so.6")
    found = read_gpus()
    assert (found.reading, found.detail) == (
        Reading.REFUSED,
        f"the NVIDIA driver is loaded, but {control} does not exist here",
    )
    control.touch()
    found = read_gpus()
    assert found.reading is Reading.FAILED
    assert "its library has no nvmlInit_v2" in found.detail
