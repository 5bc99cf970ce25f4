"""What an edit changes, as requests: the review that a person wants of a policy.

Both policies' rows divide the requests into classes together; classes that change alike are shown in
one line, such as `now allowed: infer zone=lan label=public,internal (was denied)`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import product
from math import prod
from typing import Final

from mycoswarmd.core.policy.evaluate import refusal
from mycoswarmd.core.policy.globs import TooManyGlobs
from mycoswarmd.core.policy.model import APPLIES, Policy
from mycoswarmd.core.policy.request import describe
from mycoswarmd.core.policy.space import SHAPED, Space
from mycoswarmd.core.policy.table import table_of
from mycoswarmd.core.types import UNKNOWN, Principal, Request, Start

# A person reads a screen or two; beyond it, the count says enough.
MAX_SHOWN: Final = 50
# About a second on a small board.
_MAX_TRIED: Final = 100_000

# Cells along the attributes that are told apart: for each, the values that changed alike, or all.
_Cell = tuple[frozenset[object] | None, ...]


def changed_requests(old: Policy | None, new: Policy) -> tuple[str, ...]:
    """List the classes of request that two policies decide differently, a line each."""
    sides = (_Side(old, new), _Side(new, old))
    shapes = dict.fromkeys(shape for side in sides for shape in side.shapes)
    lines: dict[str, dict[tuple[str | None, Start], None]] = {}
    tried, is_complete = 0, True
    for shape in shapes:
        if not any(side.may_differ(shape) for side in sides):
            continue
        try:
            fields = _fields(sides, shape)
        except TooManyGlobs:
            is_complete = False
            break
        tried += prod(len(values) for values in fields.values())
        if tried > _MAX_TRIED:
            is_complete = False
            break
        for change, cells in _changes(sides, shape, fields).items():
            for cell in _merged(cells, list(fields.values())):
                said = _said(change, shape, dict(zip(fields, cell, strict=True)))
                lines.setdefault(said, {})[shape.agent, shape.start] = None
    shown = _with_speakers(lines, list(shapes))
    rest = [f"and {len(shown) - MAX_SHOWN} more"] if len(shown) > MAX_SHOWN else []
    if not is_complete:
        rest.append("and perhaps more: there are too many classes of request to compare them all")
    return (*shown[:MAX_SHOWN], *rest)


class _Side:
    """One of the two policies; no policy denies everything."""

    def __init__(self, policy: Policy | None, other: Policy | None) -> None:
        self.policy = policy
        self.table = table_of(policy) if policy is not None else None
        self.space = Space(policy, self.table) if policy is not None and self.table is not None else None
        self.shapes = self.space.shapes if self.space is not None else []
        # Only a request that matches a rule of this policy alone can be decided differently there,
        # as long as everything around the rules is the same.
        self._own = -1
        if policy is not None and other is not None and _frame(policy) == _frame(other):
            theirs = {(rule.conditions, rule.effect) for rule in other.rules}
            own = [(rule.conditions, rule.effect) not in theirs for rule in policy.rules]
            self._own = sum(1 << i for i, is_own in enumerate(own) if is_own)

    def may_differ(self, shape: Request) -> bool:
        return self.space is not None and bool(self.space.shape_mask(shape) & self._own)

    def outcome(self, request: Request) -> str:
        if self.policy is None or self.table is None or refusal(self.policy, request) is not None:
            return "denied"
        mask = self.table.match(request)
        if not mask or mask & self.table.forbid:
            return "denied"
        return "asked" if mask & self.table.ask else "allowed"


def _frame(policy: Policy) -> tuple[object, ...]:
    return (policy.labels, policy.origins, policy.destinations, policy.tools, policy.agents)


def _fields(sides: Iterable[_Side], shape: Request) -> dict[str, list[object]]:
    """Return, for each field that either policy tells apart, one value for each class."""
    found: dict[str, dict[tuple[object, ...], object]] = {}
    known = [(side.table, side.space.shape_mask(shape)) for side in sides if side.table and side.space]
    for table, rows in known:
        for name, column in table.columns.items():
            if name in SHAPED or not table.naming(name) & rows or shape.action not in APPLIES[name]:
                continue
            for value in column.values(shape, table.every):
                request = replace(shape, **{column.field: value})  # type: ignore[arg-type]
                # Labels are few and people think in them, so each is named; others stand for their class.
                masks = [one.columns[name].mask(request) & kept for one, kept in known if name in one.columns]
                key: tuple[object, ...] = (value,) if name == "label" else tuple(masks)
                found.setdefault(column.field, {}).setdefault(key, value)
    return {field: list(by_mask.values()) for field, by_mask in found.items()}


def _changes(
    sides: Iterable[_Side], shape: Request, fields: Mapping[str, list[object]]
) -> dict[tuple[str, str], set[_Cell]]:
    found: dict[tuple[str, str], set[_Cell]] = {}
    for values in product(*fields.values()):
        request = replace(shape, **dict(zip(fields, values, strict=True)))  # type: ignore[arg-type]
        before, after = (side.outcome(request) for side in sides)
        if before != after:
            found.setdefault((before, after), set()).add(tuple(frozenset({value}) for value in values))
    return found


def _merged(cells: set[_Cell], domains: list[list[object]]) -> list[_Cell]:
    """Join cells that differ in one attribute only; all its values are no condition."""
    for i, domain in enumerate(domains):
        joined: dict[_Cell, frozenset[object]] = {}
        for cell in cells:
            rest = (*cell[:i], None, *cell[i + 1 :])
            joined[rest] = joined.get(rest, frozenset()) | (cell[i] or frozenset())
        cells = {
            (*rest[:i], None if len(values) == len(domain) else values, *rest[i + 1 :])
            for rest, values in joined.items()
        }
    return sorted(cells, key=repr)


def _said(change: tuple[str, str], shape: Request, cell: Mapping[str, frozenset[object] | None]) -> str:
    words = [describe(replace(shape, agent=None, start=Start.LOCAL))]
    for field, values in cell.items():
        if values is not None:
            named = [_value(shape, field, value) for value in values]
            keys = sorted({key for key, _, _ in named})
            words += [f"{key}={','.join(sorted(text for k, _, text in named if k == key))}" for key in keys]
    return f"now {change[1]}: {' '.join(words)} (was {change[0]})"


def _value(shape: Request, field: str, value: object) -> tuple[str, str, str]:
    """Return a value as key, "=", text, as core.policy.request prints it."""
    key = {"principal": "origin", "minute_of_day": "hour", "roster_age_s": "roster_age"}.get(field, field)
    if value is UNKNOWN or value is None or value in (frozenset(), Principal()):
        return key, "=", "unknown" if value is UNKNOWN else "other"
    if value is False:
        return key, "=", "false"
    plain = replace(shape, agent=None, start=Start.LOCAL, model=None)
    with_value = describe(replace(plain, **{field: value}))  # type: ignore[arg-type]
    known = describe(plain).split(" ")
    word = next((word for word in with_value.split(" ") if word not in known), f"{key}={value}")
    return word.partition("=")


def _with_speakers(
    lines: Mapping[str, Mapping[tuple[str | None, Start], None]], shapes: list[Request]
) -> list[str]:
    """Add agents and starts to the lines that are not about all of them."""
    agents = {shape.agent for shape in shapes}
    found = []
    for line, speakers in lines.items():
        for start in Start:
            some = {agent for agent, one in speakers if one is start}
            if not some or (start is Start.PEER and some == {a for a, one in speakers if one is Start.LOCAL}):
                continue
            words = [] if start is Start.LOCAL else ["from=peer"]
            if some != agents:
                words += (
                    [f"agent={','.join(sorted(agent or 'none' for agent in some))}"] if some != {None} else []
                )
            head, _, tail = line.partition(" (was ")
            found.append(" ".join([head, *words]) + f" (was {tail}")
    return found
