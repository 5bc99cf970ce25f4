"""The one reader of clocks, and the one source of randomness."""

import secrets
import time
from pathlib import Path

# A box without a battery-backed clock starts at 1970 or at its image's build date; before this
# moment (2026-01-01) the hour is not to be trusted.
_SANE_AT_S = 1_767_225_600
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class SystemClock:
    """Time from the kernel."""

    def now_ms(self) -> int:
        """Return Unix time in milliseconds."""
        return time.time_ns() // 1_000_000

    def monotonic_s(self) -> float:
        """Return seconds on a clock that only goes forward."""
        return time.monotonic()

    def boot_s(self) -> float:
        """Return seconds since the machine booted, sleep included."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def boot_id(self) -> str:
        """Return the kernel's random name for this boot."""
        return _BOOT_ID.read_text(encoding="ascii").strip()

    def minute_of_day(self) -> int | None:
        """Return the local time of day in minutes, or None while the clock is plainly wrong."""
        now_s = time.time()
        if now_s < _SANE_AT_S:
            return None
        local = time.localtime(now_s)
        return local.tm_hour * 60 + local.tm_min


class SystemEntropy:
    """Randomness from the kernel."""

    def token(self, bytes_count: int) -> str:
        """Return that many random bytes as lower-case hex."""
        return secrets.token_hex(bytes_count)
