"""Quantities as people write them in a policy: "20m", "1GiB", "100%", "22:00-06:00".

Rule: a quantity without a unit is an error; nothing is guessed. All parsers raise ValueError with a
message that says what would be accepted.
"""

import re
from typing import Final

_DURATION_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_SIZE_BYTES: Final = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
# Nine digits hold every sane amount and keep a product far below 2^63.
_QUANTITY: Final = re.compile(r"([0-9]{1,9})\s*([A-Za-z]+)")
_HOURS: Final = re.compile(r"([0-9]{2}):([0-9]{2})-([0-9]{2}):([0-9]{2})")
DAY_MINUTES: Final = 1440


def parse_duration_s(text: str) -> int:
    """Read "90s", "20m", "12h" or "7d" as seconds."""
    return _scaled(text, _DURATION_S, 'a duration such as "90s", "20m", "12h" or "7d"')


def parse_size_bytes(text: str) -> int:
    """Read "512MiB" or "1GiB" as bytes."""
    return _scaled(text, _SIZE_BYTES, 'a size such as "512MiB" or "1GiB"')


def parse_percent(text: str) -> int:
    """Read "50%" as 50; "200%" is two processors."""
    number = text.removesuffix("%")
    if number == text or not re.fullmatch(r"[0-9]{1,5}", number) or int(number) == 0:
        raise ValueError('a share of processors such as "50%" or "200%"')
    return int(number)


def parse_hours(text: str) -> tuple[int, int]:
    """Read "22:00-06:00" as minutes of the day; the end is exclusive and may lie past midnight."""
    match = _HOURS.fullmatch(text)
    if match is not None:
        hour, minute, end_hour, end_minute = map(int, match.groups())
        start, end = hour * 60 + minute, end_hour * 60 + end_minute
        if minute < 60 and end_minute < 60 and start < DAY_MINUTES and end <= DAY_MINUTES and start != end:
            return start, end
    raise ValueError('hours such as "08:00-20:00" or "22:00-06:00"')


def _scaled(text: str, units: dict[str, int], expected: str) -> int:
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2] not in units or int(match[1]) == 0:
        raise ValueError(expected)
    return int(match[1]) * units[match[2]]
