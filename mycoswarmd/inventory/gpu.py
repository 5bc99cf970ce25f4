"""NVIDIA GPUs through NVML. No driver, no library, no GPU: each is a value, never an error."""

import warnings
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpus:
    """What was found, and why nothing more."""

    found: tuple[Gpu, ...]
    detail: str


# Where a driver shows itself: on its own machine, in a container, under WSL. Without one, the library
# need not be loaded: several MB on a box that has no GPU.
_TRACES = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"), Path("/dev/dxg"))


def read_gpus() -> Gpus:
    """List the machine's NVIDIA GPUs."""
    if not any(trace.exists() for trace in _TRACES):
        return Gpus(found=(), detail="no NVIDIA driver")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the pynvml package announces its own renaming
        try:
            import pynvml
        except ImportError:
            return Gpus(found=(), detail="pynvml is not installed")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as exc:
        return Gpus(found=(), detail=f"no NVIDIA driver: {exc}")
    try:
        found = tuple(_read(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError as exc:
        return Gpus(found=(), detail=f"the NVIDIA driver answered: {exc}")
    finally:
        pynvml.nvmlShutdown()
    return Gpus(found=found, detail=f"{len(found)} found")


def _read(nvml: object, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)  # type: ignore[attr-defined]
    name = nvml.nvmlDeviceGetName(handle)  # type: ignore[attr-defined]
    text = name.decode() if isinstance(name, bytes) else str(name)  # bytes before nvidia-ml-py 11.5
    return Gpu(name=text, memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total))  # type: ignore[attr-defined]
