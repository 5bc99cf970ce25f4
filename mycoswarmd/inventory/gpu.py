"""NVIDIA GPUs through the driver's own library, NVML. No driver, no library, no GPU: each is a value.

Law: this runs in a process of its own, the probe's (outposts/probe.py): a library of a driver in trouble
crashes, or does not return, and neither is an exception.

The library is called directly. It is part of every driver and its calls keep their form, while the Python
package around it is missing in Debian 12 and is not free software's own in Debian 13.
Source: NVIDIA's NVML API reference; the numbers of errors are nvmlReturn_t.
"""

import ctypes
import os
from pathlib import Path

from mycoswarmd.wire.probing import Gpu, Gpus, Reading

_LIBRARY = "libnvidia-ml.so.1"
# Where a driver shows itself: on its own machine, in a container, under WSL. Without one, the library need
# not be loaded: several MB on a box that has no GPU.
_CONTROL, _WSL = Path("/dev/nvidiactl"), Path("/dev/dxg")
_TRACES = (Path("/proc/driver/nvidia/version"), _CONTROL, _WSL)
_OK, _NO_PERMISSION, _NOT_LOADED, _BLOCKED, _MISMATCH = 0, 4, 9, 17, 18
_NO_ACCESS = {_NO_PERMISSION, _NOT_LOADED, _BLOCKED}
_TEXT_BYTES = 96
_SENSOR_GPU = 0
# nvmlMemory_t is total, free, used; nvmlUtilization_t the card, its memory.
_Memory, _Use = ctypes.c_ulonglong * 3, ctypes.c_uint * 2


class _NvmlError(Exception):
    def __init__(self, code: int, said: str) -> None:
        super().__init__(said)
        self.code = code


def has_driver() -> bool:
    """Tell whether a driver for NVIDIA's cards shows itself to this process."""
    return any(trace.exists() for trace in _TRACES)


def read_gpus() -> Gpus:
    """List the machine's NVIDIA GPUs."""
    if not has_driver():
        return Gpus(reading=Reading.NO_DRIVER, detail="no NVIDIA driver")
    try:
        nvml = ctypes.CDLL(_LIBRARY)
    except OSError:
        said = f"the NVIDIA driver is loaded, but its library {_LIBRARY} is not installed"
        return Gpus(reading=Reading.NO_LIBRARY, detail=said)
    # Asked without opening it, which would wake a card that sleeps; the kernel's device filter answers, too.
    if not _WSL.exists() and not os.access(_CONTROL, os.R_OK | os.W_OK):
        why = "may not be opened" if _CONTROL.exists() else "does not exist"
        said = f"the NVIDIA driver is loaded, but {_CONTROL} {why} here"
        return Gpus(reading=Reading.REFUSED, detail=said)
    try:
        return _read_all(nvml)
    except _NvmlError as exc:
        reading = Reading.FAILED
        if exc.code == _MISMATCH:
            reading = Reading.MISMATCH
        elif exc.code in _NO_ACCESS:
            reading = Reading.REFUSED
        return Gpus(reading=reading, detail=f"the NVIDIA driver answered: {exc}")


def _read_all(nvml: ctypes.CDLL) -> Gpus:
    _call(nvml, "nvmlInit_v2")  # never undone: this process ends, and a broken driver hangs there as well
    count = ctypes.c_uint()
    _call(nvml, "nvmlDeviceGetCount_v2", ctypes.byref(count))
    version = ctypes.create_string_buffer(_TEXT_BYTES)
    _call(nvml, "nvmlSystemGetDriverVersion", version, ctypes.c_uint(_TEXT_BYTES))
    found = tuple(_read(nvml, index) for index in range(count.value))
    driver = version.value.decode("ascii", "replace")
    return Gpus(reading=Reading.READ, found=found, driver=driver, detail=f"{len(found)} found")


def _read(nvml: ctypes.CDLL, index: int) -> Gpu:
    card = ctypes.c_void_p()
    _call(nvml, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(card))
    name = ctypes.create_string_buffer(_TEXT_BYTES)
    _call(nvml, "nvmlDeviceGetName", card, name, ctypes.c_uint(_TEXT_BYTES))
    memory = _Memory()
    _call(nvml, "nvmlDeviceGetMemoryInfo", card, ctypes.byref(memory))
    heat = ctypes.c_uint()
    use = _Use()
    is_hot = _told(nvml, "nvmlDeviceGetTemperature", card, ctypes.c_uint(_SENSOR_GPU), ctypes.byref(heat))
    is_used = _told(nvml, "nvmlDeviceGetUtilizationRates", card, ctypes.byref(use))
    return Gpu(
        name=name.value.decode("ascii", "replace"),
        memory_bytes=memory[0],
        memory_used_bytes=memory[2],
        temperature_c=ctypes.c_int(heat.value).value if is_hot else None,
        busy_percent=use[0] if is_used else None,
    )


def _told(nvml: ctypes.CDLL, name: str, *arguments: object) -> bool:
    """Call what not every card answers."""
    try:
        _call(nvml, name, *arguments)
    except _NvmlError:
        return False
    return True


def _call(nvml: ctypes.CDLL, name: str, *arguments: object) -> None:
    try:
        function = getattr(nvml, name)
    except AttributeError as exc:
        raise _NvmlError(-1, f"its library has no {name}") from exc
    code = int(function(*arguments))
    if code != _OK:
        describe = nvml.nvmlErrorString
        describe.restype = ctypes.c_char_p
        said = describe(code)
        text = said.decode("ascii", "replace") if said else "no words"
        raise _NvmlError(code, f"{text} (error {code})")
