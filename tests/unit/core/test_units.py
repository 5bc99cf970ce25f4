"""Quantities with their units."""

from collections.abc import Callable

import pytest

from mycoswarmd.core.units import parse_duration_s, parse_hours, parse_percent, parse_size_bytes


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_duration_s, "90s", 90),
        (parse_duration_s, "20m", 1200),
        (parse_duration_s, "2 h", 7200),
        (parse_duration_s, "7d", 604_800),
        (parse_size_bytes, "1B", 1),
        (parse_size_bytes, "64KiB", 65_536),
        (parse_size_bytes, "1GiB", 1 << 30),
        (parse_percent, "100%", 100),
        (parse_hours, "08:00-20:30", (480, 1230)),
        (parse_hours, "22:00-06:00", (1320, 360)),
        (parse_hours, "00:00-24:00", (0, 1440)),
    ],
)
def test_a_quantity_is_read(parse: Callable[[str], object], text: str, value: object) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *(
            (parse_duration_s, text)
            for text in ("", "20", "m", "-1m", "1.5h", "0s", "20M", "1e3s", "20m ", "9999999999s")
        ),
        *((parse_size_bytes, text) for text in ("1GB", "1", "1gib", "0MiB", "\u0661GiB")),
        *((parse_percent, text) for text in ("100", "%", "0%", "1.5%", "-1%", "999999%")),
        *(
            (parse_hours, text)
            for text in ("8:00-9:00", "08:00", "24:00-08:00", "08:60-09:00", "08:00-08:00", "08:00-24:01")
        ),
    ],
)
def test_what_is_no_quantity_is_refused_with_an_example(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises(ValueError, match="such as"):
        parse(text)
