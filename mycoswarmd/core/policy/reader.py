"""Takes values out of a parsed TOML document and collects every problem on the way, each with its line.

A getter that finds something wrong notes it and returns a harmless value, so that the next problem is
found too; a document with any problem never becomes a policy.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Final

from mycoswarmd.core.names import NAME
from mycoswarmd.core.policy.lines import Lines, Path
from mycoswarmd.core.policy.model import MAX_NAME
from mycoswarmd.core.policy.request import near
from mycoswarmd.errors import Problem

_KINDS: Final = {str: "text", int: "a whole number", bool: "true or false", dict: "a table", list: "a list"}
# More than this is a broken generator, not a policy; the rest of its problems would not be read anyway.
MAX_PROBLEMS: Final = 100


class Reader:
    """A document and what is wrong with it."""

    def __init__(self, path: str, lines: Lines) -> None:
        self.path = path
        self.lines = lines
        self.problems: list[Problem] = []

    def fault(self, at: Path, message: str, hint: str = "") -> None:
        """Note a problem at the line of a key."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(path=self.path, line=self.lines.at(at), message=message, hint=hint))

    def table(self, value: object, at: Path, known: Collection[str]) -> Mapping[str, object]:
        """Return a table that has no other keys than these."""
        if not isinstance(value, dict):
            self._wrong(value, at, "a table")
            return {}
        for key in value:
            if key not in known:
                self.fault((*at, key), f"cannot use key {key!r} in {_name(at)}", near(key, known))
        return value

    def named_tables(self, value: object, at: Path) -> dict[str, object]:
        """Return a table of tables, such as [agents], whose keys are names."""
        if not isinstance(value, dict):
            self._wrong(value, at, f"tables such as [{at[-1]}.NAME]")
            return {}
        for name in value:
            self.name(name, (*at, name))
        return value

    def elements(self, value: object, at: Path) -> list[object]:
        """Return an array of tables, such as [[rule]]."""
        if isinstance(value, list):
            return value
        self._wrong(value, at, f"[[{at[-1]}]] tables")
        return []

    def text(self, table: Mapping[str, object], key: str, at: Path, *, default: str | None = None) -> str:
        """Return a text of one line; without a default it must be there."""
        value = table.get(key, default)
        if value is None:
            self.fault(at, f"cannot use {_name(at)}: it has no {key!r}")
        elif not isinstance(value, str):
            self._wrong(value, (*at, key), "text")
        elif not 0 < len(value) <= 10 * MAX_NAME and default is None:
            self.fault((*at, key), f"cannot use an empty or endless {key!r}")
        else:
            return value
        return ""

    def name(self, value: object, at: Path) -> str:
        """Return a name: letters, digits, dot, dash and underscore."""
        if isinstance(value, str) and NAME.fullmatch(value):
            return value
        self.fault(
            at, f"cannot use {_cut(value)} as a name", "accepted: letters, digits, '.', '-', '_'; at most 64"
        )
        return ""

    def choice(self, value: object, at: Path, known: Collection[str]) -> str | None:
        """Return one of some words."""
        if isinstance(value, str) and value in known:
            return value
        if isinstance(value, str):
            self.fault(at, f"cannot use {_cut(value)} for {_name(at)}", near(value, known))
        else:
            self._wrong(value, at, "text")
        return None

    def words(self, value: object, at: Path, *, known: Collection[str] | None = None) -> tuple[str, ...]:
        """Return a text or a list of texts as a tuple; an empty list is a problem."""
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list):
            self._wrong(value, at, "text or a list of texts")
            return ()
        if not listed:
            self.fault(
                at, f"cannot use an empty list for {_name(at)}: it would match nothing", "leave the key out"
            )
        found: list[str] = []
        for one in listed:
            if known is not None:
                word = self.choice(one, at, known)
            else:
                word = (
                    one if isinstance(one, str) and 0 < len(one) <= MAX_NAME and one.isprintable() else None
                )
                if word is None:
                    self.fault(at, f"cannot use {_cut(one)} in {_name(at)}: it is not a short text")
            if word is not None and word in found:
                self.fault(at, f"cannot use {word!r} twice in {_name(at)}")
            elif word is not None:
                found.append(word)
        return tuple(found)

    def flag(self, table: Mapping[str, object], key: str, at: Path) -> bool:
        """Return true or false; false when it is not there."""
        value = table.get(key, False)
        if not isinstance(value, bool):
            self._wrong(value, (*at, key), "true or false")
        return value is True

    def count(self, table: Mapping[str, object], key: str, at: Path) -> int | None:
        """Return a whole number above 0, or None when it is not there."""
        value = table.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            self._wrong(value, (*at, key), "a whole number")
        elif not 0 < value < 1 << 40:
            self.fault((*at, key), f"cannot use {value} for {key!r}: it is not above 0 and below 2^40")
        else:
            return value
        return None

    def quantity(self, value: object, at: Path, parse: Callable[[str], int]) -> int | None:
        """Return a quantity that is written with its unit."""
        if not isinstance(value, str):
            self._wrong(value, at, "text with a unit")
            return None
        try:
            return parse(value)
        except ValueError as exc:
            self.fault(at, f"cannot use {_cut(value)} for {_name(at)}", f"accepted: {exc}")
            return None

    def _wrong(self, value: object, at: Path, expected: str) -> None:
        kind = _KINDS.get(type(value), "something else")
        self.fault(at, f"cannot use {kind} for {_name(at)}: it is {expected}")


def _name(at: Path) -> str:
    """Name a place as the file writes it: agents.coder.tools, or rule 3's zone."""
    text = ""
    for part in at:
        text += f" {part + 1}" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text or "the file"


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
