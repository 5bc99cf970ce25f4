"""Which line of a TOML file each key stands on; `tomllib` does not say.

The scanner knows only where strings, comments and brackets begin and end. It is never trusted alone:
`scan_lines` compares the keys that it found with the parsed document and raises ValueError if one
differs, so a file that would get wrong line numbers is refused. Source: TOML 1.0.0.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Mapping
from typing import Final

Path = tuple[str | int, ...]

_BLANK: Final = re.compile(r"[ \t\r\n]*(?:#[^\n]*)?")
_NOT_VALUE_END: Final = re.compile(r"[^\"'#\[\]{}\n]+")
# One string, whichever of the four kinds; the multi-line ones may end in up to two more quotes.
_STRING: Final = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}(?!")|' r"'''.*?'{3,5}(?!')|" r'"(?:[^"\\\n]|\\.)*"|' r"'[^'\n]*'", re.DOTALL
)
_KEY_PART: Final = re.compile(r"[ \t]*(\"(?:[^\"\\\n]|\\.)*\"|'[^'\n]*'|[A-Za-z0-9_-]+)[ \t]*")


class Lines:
    """Line numbers by path, such as ("rule", 2, "zone")."""

    def __init__(self, known: Mapping[Path, int]) -> None:
        self._known = known

    def at(self, path: Path) -> int:
        """Return the line of a key, or of the nearest thing around it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self._known:
                return self._known[path[:end]]
        return 1


def scan_lines(text: str, document: Mapping[str, object]) -> Lines:
    """Find each header's and key's line in a text that parsed to this document."""
    found = _Scanner(text).scan()
    if not all(_exists(path, document) for path in found) or not _covers(found, document):
        raise ValueError("its lines cannot be told apart")
    return Lines(found)


class _Scanner:
    """One pass over a text that tomllib has accepted; ValueError where it makes no sense to us."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.line = 1
        self.table: Path = ()
        self.found: dict[Path, int] = {}
        self.counts: dict[Path, int] = {}  # elements so far of each array of tables

    def scan(self) -> dict[Path, int]:
        while self._skip_blank():
            if self.text.startswith("[[", self.at):
                self._header(2)
            elif self.text.startswith("[", self.at):
                self._header(1)
            else:
                self._pair()
        return self.found

    def _skip_blank(self) -> bool:
        while match := _BLANK.match(self.text, self.at):
            if match.end() == self.at:
                break
            self._go(match.end())
        return self.at < len(self.text)

    def _go(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def _header(self, brackets: int) -> None:
        self._go(self.at + brackets)
        line, names = self.line, self._key()
        if not self.text.startswith("]" * brackets, self.at):
            raise ValueError("a header does not end")
        self._go(self.at + brackets)
        path: Path = ()
        for name in names[:-1]:
            path = self._inside((*path, name))
        path = (*path, names[-1])
        if brackets == 2:
            self.found.setdefault(path, line)
            self.counts[path] = self.counts.get(path, -1) + 1
        self.table = self._inside(path) if brackets == 2 else path
        self.found[self.table] = line

    def _inside(self, path: Path) -> Path:
        return (*path, self.counts[path]) if path in self.counts else path

    def _key(self) -> list[str]:
        names: list[str] = []
        while match := _KEY_PART.match(self.text, self.at):
            raw = match[1]
            names.append(next(iter(tomllib.loads(f"{raw}=0"))) if raw[0] in "\"'" else raw)
            self._go(match.end())
            if not self.text.startswith(".", self.at):
                return names
            self._go(self.at + 1)
        raise ValueError("a key has no name")

    def _pair(self) -> None:
        line, names = self.line, self._key()
        if not self.text.startswith("=", self.at):
            raise ValueError("a key has no value")
        for end in range(1, len(names) + 1):
            self.found.setdefault((*self.table, *names[:end]), line)
        self._go(self.at + 1)
        self._value()

    def _value(self) -> None:
        """Go to the end of a value: a newline outside of every string and bracket."""
        depth = 0
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == "\n" and depth == 0:
                return
            if char in "\"'":
                match = _STRING.match(self.text, self.at)
                if match is None:
                    raise ValueError("a string does not end")
                self._go(match.end())
            elif char == "#":
                end = self.text.find("\n", self.at)
                self._go(len(self.text) if end < 0 else end)
            elif match := _NOT_VALUE_END.match(self.text, self.at):
                self._go(match.end())
            else:
                depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(char, 0)
                self._go(self.at + 1)


def _exists(path: Path, value: object) -> bool:
    for part in path:
        is_key = isinstance(value, dict) and part in value
        is_element = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if not (is_key or is_element):
            return False
        value = value[part]  # type: ignore[index]
    return True


def _covers(found: Mapping[Path, int], document: Mapping[str, object]) -> bool:
    """Tell whether each top-level name and each element of an array of tables was found.

    What lies deeper may be inside of an inline table; its line is that of the key around it.
    """
    elements = Counter(path[0] for path in found if len(path) == 2 and isinstance(path[1], int))
    return document.keys() == {path[0] for path in found} and all(
        isinstance(value := document[str(name)], list) and len(value) == count
        for name, count in elements.items()
    )
