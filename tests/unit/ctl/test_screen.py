"""Nothing that a model, a file or the node says can reach the terminal as a command to it."""

import io
import unicodedata

import pytest

from mycoswarmd.ctl.screen import Paint, clean, clip, columns, line, size, span, wants_colour

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\x08\x7f\u202egnp.exe\u2066\ufeff\U000e0041"


def test_everything_a_terminal_might_obey_is_escaped() -> None:
    shown = clean("a" + EVIL + "b")
    assert shown.startswith("a\\x1b]0;owned\\x07") and shown.endswith("b")
    assert not [char for char in shown if unicodedata.category(char).startswith("C")]


@pytest.mark.parametrize("code", [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), 0xD800, 0xDFFF])
def test_each_control_character_is_escaped_but_tab_and_line_feed(code: int) -> None:
    kept = {"\t", "\n"}
    assert (chr(code) in clean(chr(code))) == (chr(code) in kept)
    assert chr(code) not in line(chr(code))


def test_text_of_people_stays_as_it_is() -> None:
    text = "Grüße, 世界! 🍄\n\ttab\n"
    assert clean(text) == text


def test_a_line_is_cut_to_its_length() -> None:
    assert clip("abcdef", 4) == "abc…"
    assert clip("abcd", 4) == "abcd"
    assert clip("a\nb", 10) == "a\\nb"


def test_a_table_is_cut_where_the_terminal_ends_and_a_cell_cannot_break_it() -> None:
    text = columns(("ID", "WHAT"), [("1", "x\ny" * 100), (None, "short")], width=30)
    rows = text.split("\n")
    assert len(rows) == 3
    assert all(len(row) <= 30 for row in rows)
    assert rows[2].startswith("-")
    assert "x\\ny" * 100 in columns(("ID", "WHAT"), [("1", "x\ny" * 100)])


def test_colours_only_on_a_terminal_and_not_against_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert wants_colour(Terminal())
    assert not wants_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not wants_colour(Terminal())


def test_a_patch_is_coloured_and_cannot_colour_itself() -> None:
    patch = "--- a/f\n+++ b/f\n@@ -1 +1 @@\n-old\n+new \x1b[31m\n"
    shown = Paint(is_on=True).patch(patch)
    assert "\x1b[32m+new \\x1b[31m\x1b[0m" in shown
    assert "\x1b[31m-old\x1b[0m" in shown
    assert Paint(is_on=False).patch(patch) == patch.replace("\x1b", "\\x1b")


def test_sizes_and_times_are_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1536, 5 << 30, None, "x")] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 GiB",
        "-",
        "-",
    ]
    assert [span(n) for n in (0, 0.25, 59, 7_500, 90_061, None)] == [
        "0s",
        "250ms",
        "59s",
        "2h 5m",
        "1d 1h",
        "-",
    ]
