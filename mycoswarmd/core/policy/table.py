"""Conditions compiled to bit masks: the one matcher behind evaluate, explain and prove.

Each row (a rule, or an invariant) is one bit. For each attribute that some row names there is a
column, which turns a fact into the mask of rows whose condition on that attribute holds; a request
matches the rows in the AND of its columns. A row that does not name an attribute has its bit set
everywhere in that column.

Two laws are kept here and nowhere else:
* UNKNOWN fails the conditions of `allow` and `ask` rows and satisfies those of `forbid` rows.
  Invariants count as `forbid`, so that "never" holds for what cannot be told, too.
* Of a request that came from a peer, only the node that its key proved satisfies an origin of an
  `allow` or `ask`; a user, a group, a key or an agent that it claims satisfies a `forbid`.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import translate
from functools import lru_cache
from itertools import product
from operator import attrgetter
from re import compile as compile_regex
from typing import Final, Protocol

from mycoswarmd.core.policy.globs import TooManyGlobs, shortest_names
from mycoswarmd.core.policy.model import (
    APPLIES,
    OWNER,
    Conditions,
    Policy,
    Span,
    node_principal,
    origins_of,
)
from mycoswarmd.core.types import (
    UNKNOWN,
    Action,
    Effect,
    Principal,
    Request,
    SandboxLevel,
    Start,
    Zone,
)
from mycoswarmd.core.units import DAY_MINUTES

# Facts that callers choose (model names) fill a cache; past this many it starts anew.
_CACHE: Final = 4096
_LEVELS: Final = list(SandboxLevel)
# Groups and tags come in sets: twelve that all matter are 4,096 classes in 0.3 s, and each more doubles it.
_MAX_UNIONS: Final = 1 << 14
# A witness for "somebody or something that the file does not name".
OTHER: Final = "undeclared"


@dataclass(frozen=True, slots=True)
class Row:
    """What one bit stands for."""

    conditions: Conditions
    effect: Effect


class Column(Protocol):
    """One attribute of all rows."""

    field: str  # of Request, for trying other values

    def mask(self, request: Request) -> int:
        """Return the rows whose condition on this attribute holds."""
        ...

    def values(self, shape: Request, keep: int) -> Iterable[object]:
        """Return values of the field that stand for all that the rows in `keep` can tell apart."""
        ...


class _Exact:
    """An attribute with finitely many values, and one mask for all others."""

    def __init__(self, field: str, table: Mapping[object, int], other: int, domain: Sequence[object]) -> None:
        self.field = field
        self._get: Callable[[Request], object] = attrgetter(field)
        self._table = table
        self._other = other
        self._domain = domain

    def mask(self, request: Request) -> int:
        return self._table.get(self._get(request), self._other)

    def values(self, shape: Request, keep: int) -> Iterable[object]:
        return self._domain


class _Globs:
    """An attribute matched by shell globs; `also` are globs that a witness must be told apart by."""

    def __init__(self, field: str, by_glob: Mapping[str, int], free: int, policy: Policy) -> None:
        self.field = field
        self._get: Callable[[Request], str | None] = attrgetter(field)
        self._free = free
        self._globs = [(compile_regex(translate(glob)).match, bits) for glob, bits in by_glob.items()]
        self._cache: dict[str | None, int] = {None: free}
        served = [] if field != "model" else [d.models or () for d in policy.destinations.values()]
        self._told_apart = sorted({*by_glob, *(glob for globs in served for glob in globs)})
        self._destinations = policy.destinations

    def mask(self, request: Request) -> int:
        value = self._get(request)
        found = self._cache.get(value)
        return self.mask_of(value) if found is None else found

    def mask_of(self, value: str | None) -> int:
        found = self._free
        if value is not None:
            for match, bits in self._globs:
                if match(value):
                    found |= bits
        if len(self._cache) >= _CACHE:
            self._cache.clear()
        self._cache[value] = found
        return found

    def values(self, shape: Request, keep: int) -> Iterable[object]:
        names: list[str | None] = [None, *_names(tuple(self._told_apart))]
        dest = self._destinations.get(shape.dest or "") if self.field == "model" else None
        return names if dest is None else [name for name in names if dest.serves(name)]


class _Tags:
    """The tags of a node: a set, of which any may match."""

    field = "tags"

    def __init__(self, by_glob: Mapping[str, int], free: int, policy: Policy) -> None:
        self._one = _Globs("node", by_glob, free, policy)
        self._free = free
        self._globs = tuple(by_glob)

    def mask(self, request: Request) -> int:
        found = self._free
        for tag in request.tags:
            found |= self._one.mask_of(tag)
        return found

    def values(self, shape: Request, keep: int) -> Iterable[object]:
        return unions([(tag, self._one.mask_of(tag)) for tag in _names(self._globs)], self._free, keep)


class _Steps:
    """A number, divided where some condition begins or ends; it may be UNKNOWN."""

    def __init__(self, field: str, bounds: Sequence[int], masks: Sequence[int], unknown: int) -> None:
        self.field = field
        self._get: Callable[[Request], int | object] = attrgetter(field)
        self._bounds = bounds
        self._masks = masks
        self._unknown = unknown

    def mask(self, request: Request) -> int:
        value = self._get(request)
        if not isinstance(value, int):
            return self._unknown
        return self._masks[max(0, bisect_right(self._bounds, value) - 1)]

    def values(self, shape: Request, keep: int) -> Iterable[object]:
        return [UNKNOWN, *self._bounds]


class _Origins:
    """Who speaks: one principal may be several origins at once."""

    field = "principal"

    def __init__(self, by_name: Mapping[str, int], free: int, forbidding: int, policy: Policy) -> None:
        self._by_name = by_name
        self._free = free
        self._forbidding = forbidding
        self._policy = policy
        self._cache: dict[tuple[Principal, Start], int] = {}

    def mask(self, request: Request) -> int:
        who = (request.principal, request.start)
        found = self._cache.get(who)
        if found is None:
            found = self._free
            for name in origins_of(self._policy, request.principal):
                found |= self._bits_from(name, request.start)
            if len(self._cache) >= _CACHE:
                self._cache.clear()
            self._cache[who] = found
        return found

    def _bits_from(self, name: str, start: Start) -> int:
        bits = self._by_name.get(name, 0)
        is_proved = start is Start.LOCAL or (name != OWNER and self._policy.origins[name].kind == "node")
        return bits if is_proved else bits & self._forbidding

    def values(self, shape: Request, keep: int) -> Iterable[object]:
        named = {
            kind: [one.value for one in self._policy.origins.values() if one.kind == kind]
            for kind in ("user", "key", "node", "agent")
        }
        groups: dict[str, int] = {}  # two origins may be the same group
        for one in self._policy.origins.values():
            if one.kind == "group":
                groups[one.value] = groups.get(one.value, 0) | self._bits_from(one.name, shape.start)
        for is_owner, user in product((False, True), (None, *named["user"])):
            for some in unions(groups.items(), 0, keep):
                yield Principal(is_owner=is_owner, user=user, groups=some)
        yield from (Principal(key=value) for value in named["key"])
        yield from (node_principal(value) for value in named["node"])
        yield from (Principal(agent=value) for value in named["agent"])


class Table:
    """Rows compiled; see the module."""

    def __init__(self, policy: Policy, rows: Sequence[Row]) -> None:
        self._rows = rows
        self.every = (1 << len(rows)) - 1
        self.allow, self.ask, self.forbid = (_bits(row.effect is e for row in rows) for e in Effect)
        self.columns: dict[str, Column] = {}
        for name in Conditions.__dataclass_fields__:
            if name != "action" and self.naming(name):
                self.columns[name] = self._column(name, policy)
        self.by_action: dict[Action, int] = {}
        self._masks: dict[Action, tuple[Callable[[Request], int], ...]] = {}
        for action in Action:
            applying = [name for name in self.columns if action in APPLIES[name]]
            self._masks[action] = tuple(self.columns[name].mask for name in applying)
            self.by_action[action] = _bits(
                (row.conditions.action is None or action in row.conditions.action)
                and all(action in APPLIES[name] for name in row.conditions.named())
                for row in rows
            )

    def match(self, request: Request) -> int:
        """Return the rows that a request matches."""
        found = self.by_action[request.action]
        for mask in self._masks[request.action]:
            if not found:
                return 0
            found &= mask(request)
        return found

    def failing(self, request: Request, row: int) -> tuple[str, ...]:
        """Return the attributes that keep a request from matching a row."""
        action, conditions = request.action, self._rows[row].conditions
        if conditions.action is not None and action not in conditions.action:
            return ("action",)
        return tuple(
            name
            for name in conditions.named()
            if action not in APPLIES[name]
            or (name != "action" and not self.columns[name].mask(request) >> row & 1)
        )

    def naming(self, attribute: str) -> int:
        """Return the rows that have a condition on an attribute."""
        return _bits(getattr(row.conditions, attribute) is not None for row in self._rows)

    def _by_word(self, attribute: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for i, row in enumerate(self._rows):
            for word in getattr(row.conditions, attribute) or ():
                found[word] = found.get(word, 0) | 1 << i
        return found

    def _column(self, name: str, policy: Policy) -> Column:
        free = self.every & ~self.naming(name)
        unknown = free | self.forbid
        match name:
            case "dest" | "node" | "model":
                return _Globs(name, self._by_word(name), free, policy)
            case "tag":
                return _Tags(self._by_word(name), free, policy)
            case "origin":
                return _Origins(self._by_word(name), free, self.forbid, policy)
            case "hours":
                spans = [span for row in self._rows for span in row.conditions.hours or ()]
                bounds = sorted({0, *(minute % DAY_MINUTES for span in spans for minute in span)})
                masks = [
                    free | _bits(_in_hours(row.conditions.hours, at) for row in self._rows) for at in bounds
                ]
                return _Steps("minute_of_day", bounds, masks, unknown)
            case "roster_age":
                ages = [row.conditions.roster_age or Span() for row in self._rows]
                lows = {age.low for age in ages if age.low is not None}
                bounds = sorted({0, *lows, *(age.high + 1 for age in ages if age.high is not None)})
                masks = [
                    free | _bits((row.conditions.roster_age or Span(high=-1)).holds(at) for row in self._rows)
                    for at in bounds
                ]
                return _Steps("roster_age_s", bounds, masks, unknown)
            case _:
                return self._exact(name, policy, free, unknown)

    def _exact(self, name: str, policy: Policy, free: int, unknown: int) -> _Exact:
        if name == "label":
            order = policy.labels.order
            by_label: dict[object, int] = {
                label: free | _bits((row.conditions.label or Span(high=-1)).holds(rank) for row in self._rows)
                for rank, label in enumerate(order)
            }
            by_label[None] = by_label[policy.labels.default]
            return _Exact("label", by_label, by_label[order[-1]], order)
        if name == "tainted":
            table: dict[object, int] = {
                fact: free | _bits(row.conditions.tainted is fact for row in self._rows)
                for fact in (False, True)
            }
            return _Exact("tainted", table, free, (False, True))
        if name == "min_sandbox":
            table = {level: free | _bits(_is_at_least(row, level) for row in self._rows) for level in _LEVELS}
            return _Exact("sandbox", {**table, UNKNOWN: unknown}, free, (UNKNOWN, *_LEVELS))
        exact: dict[object, int] = {word: free | bits for word, bits in self._by_word(name).items()}
        domain: tuple[object, ...] = (None, *exact, OTHER)
        if name in {"zone", "start"}:
            domain = tuple(Zone if name == "zone" else Start)
        return _Exact(name, exact, free, domain)


@lru_cache(maxsize=16)
def table_of(policy: Policy) -> Table:
    """Return the compiled rules of a policy."""
    return Table(policy, [Row(rule.conditions, rule.effect) for rule in policy.rules])


def classes(column: Column, shape: Request, keep: int) -> dict[int, object]:
    """Return each mask that a column can have over the rows in `keep`, with a value that has it."""
    found: dict[int, object] = {}
    for value in column.values(shape, keep):
        found.setdefault(column.mask(replace(shape, **{column.field: value})) & keep, value)  # type: ignore[arg-type]
    return found


def unions(parts: Iterable[tuple[str, int]], base: int, keep: int) -> list[frozenset[str]]:
    """Return sets of words that stand for all sets: one for each union of their masks within `keep`.

    Raises TooManyGlobs when there are more than can be tried.
    """
    found: dict[int, frozenset[str]] = {base & keep: frozenset()}
    for word, mask in parts:
        if len(found) > _MAX_UNIONS:
            raise TooManyGlobs(f"more than {_MAX_UNIONS:,} combinations of groups, or of tags")
        for union, words in list(found.items()):
            found.setdefault(union | (mask & keep), words | {word})
    return list(found.values())


def _bits(flags: Iterable[bool]) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


@lru_cache(maxsize=64)
def _names(globs: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(shortest_names(globs))


def _in_hours(hours: tuple[tuple[int, int], ...] | None, minute: int) -> bool:
    return any(
        start <= minute < end if start < end else minute >= start or minute < end
        for start, end in hours or ()
    )


def _is_at_least(row: Row, level: SandboxLevel) -> bool:
    wanted = row.conditions.min_sandbox
    return wanted is not None and _LEVELS.index(level) >= _LEVELS.index(wanted)
