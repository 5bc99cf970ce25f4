"""What the probe's program says to the core about graphics cards: JSON, one object a line, and then it ends.

Laws:

1. The probe is asked nothing: to connect is the question. There is no line in the other direction.
2. The core believes nothing of it. Each number is an integer within what a card can have, each text is short
   and printable ASCII, a list has an end; one value that is out of bounds makes the whole answer none.
3. "There is no card" and "nobody could tell" are different answers, and the second says why.

Source: systemd/README.probe.md; the read values are those of NVML.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from mycoswarmd.wire.jsonv import (
    as_int,
    as_list,
    as_object,
    bad_range,
    get_choice,
    get_int,
    get_str,
    parse_object,
)
from mycoswarmd.wire.proof import Proof, parse_proof_body, proof_body

VERSION: Final = 1
# The longest is 16 cards with every field, in JSON's longest spelling.
LINE_BYTES: Final = 16 << 10
MAX_GPUS: Final = 16
NAME_CHARS: Final = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE
TEXT_CHARS: Final = 200
# Between the smallest card that ever had a driver and far more than any has.
_MEMORY_LEAST_BYTES: Final = 1 << 20
_MEMORY_MOST_BYTES: Final = 1 << 46
_COLDEST_C, _HOTTEST_C = -60, 250
_KNOWN = {"v", "reading", "gpus", "driver", "detail"}
_KNOWN_OF_GPU = {"name", "memory_bytes", "memory_used_bytes", "temperature_c", "busy_percent"}


class Reading(StrEnum):
    """How far the reading came."""

    READ = "read"  # the list is whole, also where it is empty
    NO_DRIVER = "no-driver"
    NO_LIBRARY = "no-library"  # the driver is loaded, its libnvidia-ml.so.1 is not installed
    REFUSED = "refused"  # the driver is loaded, its devices cannot be opened by whoever read
    MISMATCH = "mismatch"  # the driver is of another version than its library: an upgrade without a restart
    FAILED = "failed"  # the driver answered with an error
    UNHEARD = "unheard"  # whoever was to read did not say: the core's word, never the probe's


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One graphics card; what the card does not tell is None."""

    name: str
    memory_bytes: int
    memory_used_bytes: int | None = None
    temperature_c: int | None = None
    busy_percent: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpus:
    """What was found, and why nothing more.

    Attributes:
        driver: its version, or "".
        detail: for a person.
    """

    reading: Reading
    found: tuple[Gpu, ...] = ()
    driver: str = ""
    detail: str = ""

    @property
    def is_known(self) -> bool:
        """Whether `found` is all that there is."""
        return self.reading in {Reading.READ, Reading.NO_DRIVER}


Report = Proof | Gpus


def encode_report(report: Report) -> bytes:
    """Encode a line; texts are cut to their bounds, numbers are the reader's affair."""
    if isinstance(report, Proof):
        return _line({"proof": proof_body(report)})
    return _line(
        {
            "v": VERSION,
            "reading": report.reading.value,
            "driver": _clean(report.driver, NAME_CHARS),
            "detail": _clean(report.detail, TEXT_CHARS),
            "gpus": [_gpu_body(gpu) for gpu in report.found[:MAX_GPUS]],
        }
    )


def parse_report(untrusted: bytes) -> Report:
    """Parse a line of the probe's; BadRequest for whatever is not one."""
    if len(untrusted) > LINE_BYTES:
        raise bad_range("", f"a line of at most {LINE_BYTES} bytes, found {len(untrusted)}")
    body = parse_object(untrusted, what="a report of the probe")
    if "proof" in body:
        return parse_proof_body(body["proof"])
    _refuse_unknown(body, _KNOWN, "")
    get_int(body, "v", where="", low=VERSION, high=VERSION)
    choices = [one.value for one in Reading if one is not Reading.UNHEARD]
    reading = Reading(get_choice(body, "reading", where="", choices=choices))
    rows = as_list(body.get("gpus"), where="gpus", max_items=MAX_GPUS)
    if rows and reading is not Reading.READ:
        raise bad_range("gpus", "none where they were not read")
    return Gpus(
        reading=reading,
        found=tuple(
            _gpu(as_object(row, where=f"gpus[{number}]"), f"gpus[{number}]")
            for number, row in enumerate(rows)
        ),
        driver=_text(body, "driver", "", NAME_CHARS),
        detail=_text(body, "detail", "", TEXT_CHARS),
    )


def _gpu_body(gpu: Gpu) -> dict[str, object]:
    return {
        "name": _clean(gpu.name, NAME_CHARS),
        "memory_bytes": gpu.memory_bytes,
        "memory_used_bytes": gpu.memory_used_bytes,
        "temperature_c": gpu.temperature_c,
        "busy_percent": gpu.busy_percent,
    }


def _gpu(row: dict[str, object], where: str) -> Gpu:
    _refuse_unknown(row, _KNOWN_OF_GPU, where)
    memory_bytes = get_int(row, "memory_bytes", where=where, low=_MEMORY_LEAST_BYTES, high=_MEMORY_MOST_BYTES)
    name = _text(row, "name", where, NAME_CHARS)
    if not name:
        raise bad_range(f"{where}.name", "a name")
    return Gpu(
        name=name,
        memory_bytes=memory_bytes,
        memory_used_bytes=_maybe(row, "memory_used_bytes", where, 0, memory_bytes),
        temperature_c=_maybe(row, "temperature_c", where, _COLDEST_C, _HOTTEST_C),
        busy_percent=_maybe(row, "busy_percent", where, 0, 100),
    )


def _maybe(row: dict[str, object], key: str, where: str, low: int, high: int) -> int | None:
    value = row.get(key)
    return None if value is None else as_int(value, where=f"{where}.{key}", low=low, high=high)


def _text(body: dict[str, object], key: str, where: str, most_chars: int) -> str:
    text = get_str(body, key, where=where, max_len=most_chars)
    if not (text.isascii() and text.isprintable()):
        raise bad_range(f"{where}.{key}" if where else key, "printable ASCII")
    return text


def _refuse_unknown(body: Mapping[str, object], known: set[str], where: str) -> None:
    if unknown := body.keys() - known:
        raise bad_range(where, f"known fields only, found {len(unknown)} unknown")


def _clean(text: str, most_chars: int) -> str:
    return "".join(char if char.isascii() and char.isprintable() else "?" for char in text[:most_chars])


def _line(body: Mapping[str, object]) -> bytes:
    return json.dumps(body, separators=(",", ":"), ensure_ascii=True).encode("ascii") + b"\n"
