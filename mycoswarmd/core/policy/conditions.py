"""Reads the conditions of a rule or an invariant: one row per key, all names checked.

Source: design, policy language, point 5. `model`, `node` and `tag` take shell globs; there is no glob
over a command line and no regular expression.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

from mycoswarmd.core.policy.lines import Path
from mycoswarmd.core.policy.model import Conditions, Span, ToolDecl
from mycoswarmd.core.policy.reader import Reader
from mycoswarmd.core.policy.request import near
from mycoswarmd.core.types import Action, SandboxLevel, Start, Zone
from mycoswarmd.core.units import parse_duration_s, parse_hours

_WEB: Final = "web:"
# A host that a tool may reach, or all below one: docs.python.org, *.python.org. No other globs, and room
# for one more label, so that a proof can name a host for each.
HOSTS: Final = re.compile(r"(?=.{1,200}\Z)(?:\*\.)?[a-z0-9-]+(?:\.[a-z0-9-]+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What a condition may name."""

    labels: tuple[str, ...]
    origins: tuple[str, ...]
    destinations: tuple[str, ...]
    tools: Mapping[str, ToolDecl]
    agents: tuple[str, ...]


def read_conditions(
    reader: Reader, table: Mapping[str, object], at: Path, names: Names, *, also: Collection[str] = ()
) -> Conditions:
    """Return the conditions in a table, whose other keys are `also`."""
    reader.table(table, at, (*_READ, *also))
    found: dict[str, object] = {}
    for key, read in _READ.items():
        if key in table:
            found["start" if key == "from" else key] = read(reader, table[key], (*at, key), names)
    return Conditions(**found)  # type: ignore[arg-type]


def _actions(reader: Reader, value: object, at: Path, _: Names) -> object:
    return tuple(Action(word) for word in reader.words(value, at, known=list(Action)))


def _zones(reader: Reader, value: object, at: Path, _: Names) -> object:
    return tuple(Zone(word) for word in reader.words(value, at, known=list(Zone)))


def _starts(reader: Reader, value: object, at: Path, _: Names) -> object:
    return tuple(Start(word) for word in reader.words(value, at, known=list(Start)))


def _dests(reader: Reader, value: object, at: Path, names: Names) -> object:
    """Read declared destinations, and web:HOST or web:*.SUFFIX that web_fetch may reach."""
    fetch = names.tools.get("web_fetch")
    found = reader.words(value, at)
    for word in found:
        host = word.removeprefix(_WEB)
        if host == word:
            if word not in names.destinations:
                reader.fault(
                    at, f"cannot use {word!r} for dest: it is not declared", near(word, names.destinations)
                )
        elif not HOSTS.fullmatch(host):
            hint = "accepted: web:docs.python.org or web:*.python.org"
            reader.fault(at, f"cannot use {word!r} for dest: it is not a host", hint)
        elif fetch is None or not (host in fetch.hosts or fetch.reaches(host.replace("*", "any", 1))):
            hosts = [f"{_WEB}{one}" for one in fetch.hosts] if fetch is not None else []
            reader.fault(at, f"cannot use {word!r} for dest: web_fetch may not reach it", near(word, hosts))
    return found


def _texts(reader: Reader, value: object, at: Path, _: Names) -> object:
    return reader.words(value, at)


def _origins(reader: Reader, value: object, at: Path, names: Names) -> object:
    return reader.words(value, at, known=names.origins)


def _agents(reader: Reader, value: object, at: Path, names: Names) -> object:
    return reader.words(value, at, known=names.agents)


def _tools(reader: Reader, value: object, at: Path, names: Names) -> object:
    return reader.words(value, at, known=names.tools)


def _label(reader: Reader, value: object, at: Path, names: Names) -> object:
    table = reader.table(value, at, ("min", "max"))
    ranks = {
        key: names.labels.index(label)
        for key in table
        if key in {"min", "max"}
        and (label := reader.choice(table[key], (*at, key), names.labels)) is not None
    }
    return _span(reader, ranks, table, at)


def _roster_age(reader: Reader, value: object, at: Path, _: Names) -> object:
    table = reader.table(value, at, ("min", "max"))
    ages = {
        key: age
        for key in table
        if key in {"min", "max"}
        and (age := reader.quantity(table[key], (*at, key), parse_duration_s)) is not None
    }
    return _span(reader, ages, table, at)


def _span(reader: Reader, ends: Mapping[str, int], table: Mapping[str, object], at: Path) -> Span:
    low, high = ends.get("min"), ends.get("max")
    if not table:
        reader.fault(at, "cannot use an empty range", "accepted: { min = … }, { max = … } or both")
    if low is not None and high is not None and low > high:
        reader.fault(at, "cannot use this range: its min is above its max")
    return Span(low=low, high=high)


def _tainted(reader: Reader, value: object, at: Path, _: Names) -> object:
    if not isinstance(value, bool):
        reader.fault(at, "cannot use this for tainted: it is true or false")
    return value is True


def _hours(reader: Reader, value: object, at: Path, _: Names) -> object:
    found = []
    for text in reader.words(value, at):
        try:
            found.append(parse_hours(text))
        except ValueError as exc:
            reader.fault(at, f"cannot use {text!r} for hours", f"accepted: {exc}")
    return tuple(found)


def _min_sandbox(reader: Reader, value: object, at: Path, _: Names) -> object:
    return SandboxLevel(reader.choice(value, at, list(SandboxLevel)) or SandboxLevel.FULL)


_READ: Final[Mapping[str, Callable[[Reader, object, Path, Names], object]]] = {
    "action": _actions,
    "zone": _zones,
    "dest": _dests,
    "from": _starts,
    "node": _texts,
    "tag": _texts,
    "tier": _texts,
    "model": _texts,
    "label": _label,
    "origin": _origins,
    "agent": _agents,
    "tool": _tools,
    "tainted": _tainted,
    "hours": _hours,
    "roster_age": _roster_age,
    "min_sandbox": _min_sandbox,
}
