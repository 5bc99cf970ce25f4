"""What the signer's unit remembers beside its key: how far it has counted, and how often it has signed.

Laws:

1. A beacon's counter goes on from the highest that was signed, by a step that no honest node needs: one
   signed far ahead would make all later ones of that key worthless.
2. Signatures and new keys are limited, far above what a swarm needs. What is used up comes back with time.
3. It is on the disk before the signature is made.

Source: core/roster/beacon.py.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mycoswarmd.core.roster.beacon import MAX_COUNTER
from mycoswarmd.errors import BadRequest, Unavailable

# Every hour one, this is more than a hundred years.
MOST_AHEAD: Final = 1 << 20
# A swarm of hundreds may be admitted at once; after that, one a minute.
AT_ONCE: Final = 256
EVERY_MS: Final = 60_000
_FILE: Final = "signed.json"
_FILE_BYTES: Final = 4096


@dataclass(slots=True, kw_only=True)
class Book:
    """What was signed so far."""

    left: int = AT_ONCE
    since_ms: int = 0
    key: str = ""
    counter: int = 0

    def spend(self, now_ms: int) -> None:
        """Take one from what may be done now, or raise Unavailable("signer-busy")."""
        self.since_ms = min(self.since_ms, now_ms)  # the clock may have been set back
        back = (now_ms - self.since_ms) // EVERY_MS
        self.left = min(AT_ONCE, self.left + back)
        self.since_ms = now_ms if self.left == AT_ONCE else self.since_ms + back * EVERY_MS
        if self.left < 1:
            raise Unavailable(
                "signer-busy",
                f"cannot sign now: {AT_ONCE} things were signed, and one more may be each minute",
                hint="if nobody did this, the node may be broken into: journalctl -u 'mycoswarm-signer@*'",
                retry_after_s=EVERY_MS // 1000,
            )
        self.left -= 1

    def count(self, key: str, n: int) -> None:
        """Take note of a beacon's counter, or raise BadRequest("not-signable") where it jumps."""
        if key != self.key:
            self.key, self.counter = key, 0
        if n > self.counter + MOST_AHEAD:
            raise BadRequest(
                "not-signable", f"cannot sign the beacon: it counts {n}, and the last was {self.counter}"
            )
        self.counter = max(self.counter, n)


def read_book(directory: Path) -> Book:
    """Return what the directory remembers; one that is lost or damaged begins anew."""
    try:
        with (directory / _FILE).open("rb") as file:
            found = json.loads(file.read(_FILE_BYTES))
    except (FileNotFoundError, ValueError, RecursionError):
        return Book()
    if not isinstance(found, dict) or found.keys() != {"left", "since_ms", "key", "counter"}:
        return Book()
    numbers = (found["left"], found["since_ms"], found["counter"])
    if not all(type(one) is int and 0 <= one <= MAX_COUNTER for one in numbers):
        return Book()
    return Book(
        left=found["left"], since_ms=found["since_ms"], key=str(found["key"]), counter=found["counter"]
    )


def write_book(directory: Path, book: Book) -> None:
    """Replace what the directory remembers, durably."""
    said = {"left": book.left, "since_ms": book.since_ms, "key": book.key, "counter": book.counter}
    new = directory / f"{_FILE}.new"
    with new.open("wb") as file:
        file.write(json.dumps(said).encode("ascii"))
        file.flush()
        os.fsync(file.fileno())
    new.replace(directory / _FILE)
