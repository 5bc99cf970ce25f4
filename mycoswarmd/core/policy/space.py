"""Every request there can be, as classes: one point stands for all requests that no condition tells apart.

What belongs together by nature (action, zone, destination, tool, agent, start) is enumerated as whole
requests, the shapes. Every other attribute is divided by the compiled rows (core.policy.table.classes),
and only where a row in question names it. Rule: no request is left out. A point may combine facts that
never meet; that costs a proof, never a gap.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Final

from mycoswarmd.core.policy.evaluate import WEB, refusal
from mycoswarmd.core.policy.globs import shortest_names
from mycoswarmd.core.policy.model import APPLIES, Policy
from mycoswarmd.core.policy.table import OTHER, Table, classes
from mycoswarmd.core.policy.tools import TOOLS
from mycoswarmd.core.types import Action, Principal, Request, Start, Zone

SHAPED: Final = ("zone", "dest", "tool", "agent", "start")
_MANY: Final = frozenset({"origin", "model", "node", "tag"})
# Enumerated in seconds. A file beyond this is not one that a person understands either.
MAX_POINTS: Final = 5_000_000

Part = tuple[str, dict[int, object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is looked for: a request that matches all of `every`, one of `some`, and none of `none`.

    Attributes:
        is_open: only requests that no built-in law refuses.
    """

    every: int
    some: int
    none: int
    is_open: bool = True


class Space:
    """The points of a policy under a table of rows: its rules, and what else is asked about."""

    def __init__(self, policy: Policy, table: Table) -> None:
        self._table = table
        # Those with few classes first: they leave fewer rows for the others to tell apart.
        names = sorted(table.columns, key=lambda name: name in _MANY)
        self._naming = {name: table.naming(name) for name in names}
        self._parts_of: dict[tuple[object, ...], Part] = {}
        self.shapes = list(_shapes(policy))
        self._masks = [self.shape_mask(shape) for shape in self.shapes]
        self._is_open = [refusal(policy, shape) is None for shape in self.shapes]

    def find(self, wanted: Wanted) -> Request | None:
        """Return a request as wanted, or None when there is none in the whole space."""
        for shape, rows in self._in_question(wanted):
            parts = [_best(part, wanted) for part in self.parts(shape, rows, wanted.every)]
            # Forbidding rows that no later part can exclude end the search below them.
            settled = [rows & wanted.none] * (len(parts) + 1)
            for depth in range(len(parts) - 1, -1, -1):
                settled[depth] = settled[depth + 1] & _always(parts[depth])
            if (found := _search(parts, 0, rows, shape, wanted, settled)) is not None:
                return found
        return None

    def size(self, wanted: Wanted) -> int:
        """Count the points that match all of `every`, told apart as far as the rows in question do."""
        return sum(
            prod(len(part[1]) for part in self.parts(shape, self._rows(shape, mask, wanted), wanted.every))
            for shape, mask in zip(self.shapes, self._masks, strict=True)
            if mask & wanted.every == wanted.every
        )

    def tried(self, wanted: Wanted) -> int:
        """Count the points that `find` cannot do without: the others are stricter in every way."""
        return sum(
            prod(len(_best(part, wanted)[1]) for part in self.parts(shape, rows, wanted.every))
            for shape, rows in self._in_question(wanted)
        )

    def matched(self, row: int) -> Iterator[Request]:
        """Yield the shapes of the requests that a row can match and no built-in law refuses."""
        for shape, _ in self._in_question(Wanted(every=row, some=row, none=0)):
            yield shape

    def parts(self, shape: Request, rows: int, every: int = 0) -> list[Part]:
        """Return, for each attribute that one of the rows names, its classes for requests of a shape."""
        return [
            self._part(name, shape, rows, every)
            for name, naming in self._naming.items()
            if name not in SHAPED and naming & rows and shape.action in APPLIES[name]
        ]

    def _part(self, name: str, shape: Request, rows: int, every: int) -> Part:
        key = (name, shape.start, shape.dest if name == "model" else None, rows, every)
        part = self._parts_of.get(key)
        if part is None:
            column = self._table.columns[name]
            found = classes(column, shape, rows)
            part = (column.field, {mask: value for mask, value in found.items() if mask & every == every})
            self._parts_of[key] = part
        return part

    def _in_question(self, wanted: Wanted) -> Iterator[tuple[Request, int]]:
        """Yield the shapes of which some request may be as wanted, with the rows that matter for it."""
        for shape, mask, is_open in zip(self.shapes, self._masks, self._is_open, strict=True):
            if (is_open or not wanted.is_open) and mask & wanted.every == wanted.every:
                rows = self._rows(shape, mask, wanted)
                if rows & wanted.every == wanted.every and rows & wanted.some:
                    yield shape, rows

    def _rows(self, shape: Request, mask: int, wanted: Wanted) -> int:
        """Return the rows that some request of a shape matches together with all of `every`."""
        rows = mask & (wanted.every | wanted.some | wanted.none)
        for name, naming in self._naming.items():
            if naming & rows & wanted.every and name not in SHAPED and shape.action in APPLIES[name]:
                possible = 0
                for found in self._part(name, shape, rows, wanted.every)[1]:
                    possible |= found
                rows &= possible
        return rows

    def shape_mask(self, shape: Request) -> int:
        """Return the rows that some request of a shape may match."""
        mask = self._table.by_action[shape.action]
        for name in SHAPED:
            if name in self._table.columns and shape.action in APPLIES[name]:
                mask &= self._table.columns[name].mask(shape)
        return mask


def _always(part: Part) -> int:
    """Return the rows that are in every class."""
    found = -1
    for mask in part[1]:
        found &= mask
    return found


def _best(part: Part, wanted: Wanted) -> Part:
    """Leave out each class of which another is as good: matches all that it does, and no more of `none`."""
    field, found = part
    good = wanted.every | wanted.some
    if len(found) > 1000:  # comparing each with each would cost more than it saves
        return part
    kept: dict[int, object] = {}
    # Most of what is wanted first, then least of what is not: what comes later is never better.
    for mask in sorted(found, key=lambda one: (-(one & good).bit_count(), (one & wanted.none).bit_count())):
        if not any(mask & good & ~one == 0 and one & wanted.none & ~mask == 0 for one in kept):
            kept[mask] = found[mask]
    return field, kept


def _search(
    parts: list[Part], depth: int, mask: int, request: Request, wanted: Wanted, settled: list[int]
) -> Request | None:
    if not mask & wanted.some or mask & settled[depth]:
        return None
    if depth == len(parts):
        return request
    field, found = parts[depth]
    for bits, value in found.items():
        chosen = _search(parts, depth + 1, mask & bits, request, wanted, settled)
        if chosen is not None:
            return replace(chosen, **{field: value})  # type: ignore[arg-type]
    return None


def _shapes(policy: Policy) -> Iterator[Request]:
    """Yield every combination of what belongs together, also those that built-in laws refuse."""
    nobody = Principal()
    ways = list(_ways(policy))
    for start in Start:
        for agent in (None, *policy.agents, OTHER):
            for zone, dest, model in ways:
                yield Request(
                    action=Action.INFER,
                    principal=nobody,
                    zone=zone,
                    dest=dest,
                    model=model,
                    start=start,
                    agent=agent,
                )
            for tool in policy.tools:
                for dest in _reached(policy, tool):
                    yield Request(
                        action=Action.TOOL,
                        principal=nobody,
                        zone=TOOLS[tool].zone,
                        dest=dest,
                        start=start,
                        agent=agent,
                        tool=tool,
                    )
            for zone in (Zone.SELF, Zone.LAN):
                yield Request(action=Action.TASK, principal=nobody, zone=zone, start=start, agent=agent)
        yield Request(action=Action.ADMIN, principal=nobody, start=start)


def _ways(policy: Policy) -> Iterator[tuple[Zone, str | None, str | None]]:
    """Where prompts go; to a destination that narrows its models, with a name that it serves."""
    yield Zone.SELF, None, None
    yield Zone.LAN, None, None
    yield Zone.CLOUD, OTHER, None
    for dest in policy.destinations.values():
        names = shortest_names(sorted(dest.models or ()))
        yield Zone.CLOUD, dest.name, next((name for name in names if dest.serves(name)), None)


def _reached(policy: Policy, tool: str) -> Iterator[str | None]:
    """Where a tool goes: each host that is named, and one more for each *.suffix; None for no way out."""
    if TOOLS[tool].zone is not Zone.CLOUD:
        yield None
        return
    rows = [rule.conditions for rule in policy.rules] + [one.never for one in policy.invariants]
    hosts = {dest.removeprefix(WEB) for row in rows for dest in row.dest or () if dest.startswith(WEB)}
    hosts |= set(policy.tools[tool].hosts)
    for host in sorted(hosts):
        name, any_name = host, "any"
        while name.startswith("*.") or (name != host and name in hosts):
            name, any_name = host.replace("*", any_name, 1), f"{any_name}-other"
        yield f"{WEB}{name}"
