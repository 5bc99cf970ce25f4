"""What people see: escaped text, columns, colours, sizes and times.

Law: whatever comes from a model, a file or the node passes through `clean` before it is printed, so that
nothing said by a model can move the cursor, change a title, hide text or press keys.
"""

import os
import re
import shutil
from collections.abc import Sequence
from typing import IO

# C0 and C1 controls but tab and line feed, DEL, what reorders or hides text, and half surrogates.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)
_BREAKS = re.compile(r"[\t\n]")
_COLOURS = {"red": 31, "green": 32, "yellow": 33, "blue": 34, "cyan": 36, "bold": 1, "dim": 2}
_PATCH_COLOURS = (
    ("diff ", "bold"),
    ("+++", "bold"),
    ("---", "bold"),
    ("@@", "cyan"),
    ("+", "green"),
    ("-", "red"),
)


def clean(value: object) -> str:
    """Return text with everything escaped that a terminal might obey; tabs and line ends stay."""
    return _UNSAFE.sub(_escape, str(value))


def line(value: object) -> str:
    """Return text fit for one line: `clean`, and tabs and line ends escaped too."""
    return _BREAKS.sub(_escape, clean(value))


def clip(value: object, at_most: int) -> str:
    """Return one line of at most so many characters, an ellipsis where it was cut."""
    text = line(value)
    return text if len(text) <= at_most else text[: max(0, at_most - 1)] + "…"


def _escape(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape").decode("ascii")


def wants_colour(stream: IO[str]) -> bool:
    """Tell whether to colour: a terminal that is not dumb, and NO_COLOR (no-color.org) unset."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Paint:
    """Colours text, or leaves it."""

    def __init__(self, *, is_on: bool) -> None:
        self.is_on = is_on

    def __call__(self, colour: str, text: str) -> str:
        """Return the (already clean) text in a colour."""
        return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if self.is_on and text else text

    def patch(self, text: str) -> str:
        """Return a patch, cleaned, its lines coloured as diffs are."""
        return "\n".join(self._patch_line(part) for part in clean(text).split("\n"))

    def _patch_line(self, text: str) -> str:
        for start, colour in _PATCH_COLOURS:
            if text.startswith(start):
                return self(colour, text)
        return text


def columns(headers: Sequence[str], rows: Sequence[Sequence[object]], *, width: int | None = None) -> str:
    """Lay out a table; the last column is cut where a terminal of `width` columns ends."""
    cells = [[line("-" if cell is None else cell) for cell in row] for row in rows]
    table = [list(headers), *cells]
    widths = [max(len(row[i]) for row in table) for i in range(len(headers))]
    lines = []
    for row in table:
        text = "  ".join(cell.ljust(widths[i]) for i, cell in enumerate(row)).rstrip()
        lines.append(clip(text, width) if width is not None else text)
    return "\n".join(lines)


def terminal_width(stream: IO[str]) -> int | None:
    """Return the width of the terminal, or None when this is none."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def size(value: object) -> str:
    """Return bytes in binary units, such as 1.5 GiB."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "-"
    amount = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def count(number: int, noun: str) -> str:
    """Return a number with its noun, such as 1 rule or 2 rules."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def span(seconds: object) -> str:
    """Return a duration in its two largest units, such as 2h 5m."""
    if not isinstance(seconds, int | float) or isinstance(seconds, bool):
        return "-"
    left = max(0, int(seconds))
    if left < 1 <= seconds * 1000:
        return f"{seconds * 1000:.0f}ms"
    parts = []
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)):
        if left >= length:
            parts.append(f"{left // length}{unit}")
            left %= length
    return " ".join(parts[:2]) or "0s"
