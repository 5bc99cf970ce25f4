"""Every request there can be, as classes: one point stands for all requests that no condition tells apart.

What belongs together by nature (action, zone, destination, tool, agent, start) is enumerated as whole
requests; the other attributes are divided by the compiled rules (core.policy.table.classes). Rule: no
request is left out. A point may combine facts that never meet; that costs a proof, never a gap.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from mycoswarmd.core.policy.evaluate import WEB
from mycoswarmd.core.policy.globs import shortest_names
from mycoswarmd.core.policy.model import APPLIES, Policy
from mycoswarmd.core.policy.table import OTHER, Table, classes
from mycoswarmd.core.policy.tools import TOOLS
from mycoswarmd.core.types import Action, Principal, Request, Start, Zone

_SHAPED = frozenset({"zone", "dest", "tool", "agent", "start"})
# Enumerated in seconds. A file beyond this is not one that a person understands either.
MAX_POINTS = 5_000_000


class Space:
    """The points of a policy under a table of rows: its rules, and what else is asked about."""

    def __init__(self, policy: Policy, table: Table) -> None:
        self.policy = policy
        self._table = table

    def size(self, rows: int) -> int:
        """Count the points, told apart only as far as these rows do."""
        return sum(prod(len(part) for _, part in self._parts(shape, rows)) for shape in self._shapes())

    def points(self, required: int, rows: int) -> Iterator[tuple[int, Request]]:
        """Yield (mask, request) for each point that matches all rows in `required`."""
        for shape in self._shapes():
            mask = self._shape_mask(shape)
            if mask & required == required:
                yield from _walk(self._parts(shape, rows), 0, mask, shape, required)

    def _shape_mask(self, shape: Request) -> int:
        mask = self._table.by_action[shape.action]
        for name in _SHAPED & self._table.columns.keys():
            if shape.action in APPLIES[name]:
                mask &= self._table.columns[name].mask(shape)
        return mask

    def _parts(self, shape: Request, rows: int) -> list[tuple[str, dict[int, object]]]:
        return [
            (column.field, classes(column, shape, rows))
            for name, column in self._table.columns.items()
            if name not in _SHAPED and shape.action in APPLIES[name]
        ]

    def _shapes(self) -> Iterator[Request]:
        nobody = Principal()
        for start in Start:
            for agent in (None, *self.policy.agents, OTHER):
                for zone, dest, model in self._ways():
                    yield Request(
                        action=Action.INFER,
                        principal=nobody,
                        zone=zone,
                        dest=dest,
                        model=model,
                        start=start,
                        agent=agent,
                    )
                yield from self._tool_shapes(agent, start)
                for zone in (Zone.SELF, Zone.LAN):
                    yield Request(action=Action.TASK, principal=nobody, zone=zone, start=start, agent=agent)
            yield Request(action=Action.ADMIN, principal=nobody, start=start)

    def _ways(self) -> Iterator[tuple[Zone, str | None, str | None]]:
        """Where prompts go; to a destination that narrows its models, with a name that it serves."""
        yield Zone.SELF, None, None
        yield Zone.LAN, None, None
        yield Zone.CLOUD, OTHER, None
        for dest in self.policy.destinations.values():
            names = shortest_names(sorted(dest.models or ()))
            yield Zone.CLOUD, dest.name, next((name for name in names if dest.serves(name)), None)

    def _tool_shapes(self, agent: str | None, start: Start) -> Iterator[Request]:
        for name, tool in self.policy.tools.items():
            zone = TOOLS[name].zone
            hosts = {host.replace("*", "any", 1) for host in tool.hosts} | self._named_hosts()
            for dest in (f"{WEB}{host}" for host in sorted(hosts)) if zone is Zone.CLOUD else (None,):
                yield Request(
                    action=Action.TOOL,
                    principal=Principal(),
                    zone=zone,
                    dest=dest,
                    start=start,
                    agent=agent,
                    tool=name,
                )

    def _named_hosts(self) -> set[str]:
        """Hosts that some rule or invariant tells apart from the other hosts of the same tool."""
        rows = [rule.conditions for rule in self.policy.rules] + [one.never for one in self.policy.invariants]
        dests = {dest for row in rows for dest in row.dest or () if dest.startswith(WEB)}
        return {dest.removeprefix(WEB).replace("*", "any", 1) for dest in dests}


def _walk(
    parts: list[tuple[str, dict[int, object]]], depth: int, mask: int, request: Request, required: int
) -> Iterator[tuple[int, Request]]:
    if depth == len(parts):
        yield mask, request
        return
    field, found = parts[depth]
    for bits, value in found.items():
        left = mask & bits
        if left & required == required:
            yield from _walk(parts, depth + 1, left, replace(request, **{field: value}), required)  # type: ignore[arg-type]
