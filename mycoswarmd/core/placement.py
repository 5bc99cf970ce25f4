"""Where, among the places that serve a model: the owner's preference first, then warmth, then load.

Rule: placement never widens what the policy allows; it only orders. Every place that was not chosen
gets its reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mycoswarmd.core.types import Zone

# What `[routing] prefer` means where the policy has none: stay as near as possible.
_NEAREST_FIRST = (Zone.SELF.value, Zone.LAN.value, Zone.CLOUD.value)

_BY_SETTINGS = "equal; the order of the settings decides"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One place that serves the model. `engine` is None where nothing here can reach the place.

    Attributes:
        node: which node computes the answer; None where that is not known, as in a cloud.
        tier: the size of that node, for a place in the LAN.
    """

    engine: str | None
    model: str
    zone: Zone
    dest: str | None = None
    loaded: bool = False
    running: int = 0
    node: str | None = None
    tier: str | None = None


def order(candidates: Sequence[Candidate], *, prefer: Sequence[str]) -> list[Candidate]:
    """Sort candidates, best first: preferred zone or destination, model in memory, fewest running."""
    return sorted(candidates, key=lambda one: (_rank(one, prefer), not one.loaded, one.running))


def why_not(loser: Candidate, winner: Candidate, *, prefer: Sequence[str]) -> str:
    """Say in a few words why an allowed candidate came after the winner."""
    if _rank(loser, prefer) > _rank(winner, prefer):
        return f"{loser.dest or loser.zone.value} comes after {winner.dest or winner.zone.value}"
    if winner.loaded and not loser.loaded:
        return "the model is not in memory there"
    if loser.running > winner.running:
        return f"{loser.running} prompts are running there, {winner.running} on the chosen one"
    return "equal; the order of names decides" if loser.zone is Zone.LAN else _BY_SETTINGS


def _rank(candidate: Candidate, prefer: Sequence[str]) -> tuple[int, int]:
    names = [name for name in (candidate.dest, candidate.zone.value) if name is not None]
    named = [prefer.index(name) for name in names if name in prefer]
    return (min(named, default=len(prefer)), _NEAREST_FIRST.index(candidate.zone.value))
