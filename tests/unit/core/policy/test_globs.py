"""Globs combine exactly as names show: what is missed here would be missed by every proof."""

from fnmatch import fnmatchcase

import pytest

from mycoswarmd.core.policy.globs import TooManyGlobs, shortest_names


@pytest.mark.parametrize(
    ("globs", "name"),
    [
        (["gpt-[1-5]*", "gpt-1*", "gpt-2*", "gpt-4*", "gpt-5*"], "gpt-3"),  # only 3 tells the set apart
        (["[!a-c]", "d", "`"], "x"),
        (["[à-â]", "[æ-é]", "[à-é]"], "ã"),  # between two sets, beyond ASCII
        (["[!]"], "[!]"),  # no set: the bracket never ends
        (["[]"], "[]"),
        (["[]a]"], "]"),
        (["*", "?*"], ""),
        (["gpt-*", "*-mini"], "gpt-mini"),
        (["gpt-*", "*-mini"], "gpt--mini"),
    ],
)
def test_a_combination_that_some_name_has_is_found(globs: list[str], name: str) -> None:
    def signature(one: str) -> list[bool]:
        return [fnmatchcase(one, glob) for glob in globs]

    assert signature(name) in [signature(one) for one in shortest_names(globs)]


def test_a_combination_that_no_name_has_is_not_found() -> None:
    both = [name for name in shortest_names(["gpt-*", "q*"]) if name.startswith("gpt-") and name[0] == "q"]
    assert both == []


def test_names_look_like_names_and_the_empty_one_comes_last() -> None:
    assert shortest_names(["*"])[0].isalnum()
    assert shortest_names(["*", "?*"])[-1] == ""


def test_a_glob_of_every_letter_leaves_a_name_that_it_does_not_match() -> None:
    everything = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    assert any(not fnmatchcase(name, everything) for name in shortest_names([everything]))


def test_too_many_combinations_are_refused_not_waited_for() -> None:
    globs = [f"*{a}*{b}*{c}*" for a, b, c in ("abc", "def", "ghi", "jkl", "mno", "pqr", "stu", "vwx")]
    with pytest.raises(TooManyGlobs, match="20000 combinations of 8 globs"):
        shortest_names(globs)
