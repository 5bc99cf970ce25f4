"""Whether anybody may administer the node under a policy: a proof over all requests, not a look at rules.

Law: "nobody" is said only where no request of a person on this machine, or of an operator, is allowed; what
cannot be told is not said. A rule that asks lets nobody in: who would answer needs the same right first.
"""

from dataclasses import replace

from mycoswarmd.core.policy.globs import TooManyGlobs
from mycoswarmd.core.policy.model import OWNER, Conditions, Policy
from mycoswarmd.core.policy.space import MAX_POINTS, Space, Wanted
from mycoswarmd.core.policy.table import Row, Table
from mycoswarmd.core.types import Action, Effect, Start

NOBODY = "nobody may administer this node"
CURE = 'allow action "admin" to origin "owner"'


def nobody_administers(policy: Policy) -> bool:
    """Tell whether it is proved that no person may do what the policy calls `admin`."""
    rows = [
        Row(
            rule.conditions if rule.effect is Effect.FORBID else _by_people(policy, rule.conditions),
            rule.effect,
        )
        for rule in policy.rules
    ]
    asked = Conditions(action=(Action.ADMIN,), start=(Start.LOCAL,))
    table = Table(policy, [*rows, Row(asked, Effect.FORBID)])
    this = 1 << len(rows)
    wanted = Wanted(every=this, some=table.allow, none=(table.ask | table.forbid) & ~this)
    space = Space(policy, table)
    try:
        return space.tried(wanted) <= MAX_POINTS and space.find(wanted) is None
    except TooManyGlobs:
        return False


def _by_people(policy: Policy, conditions: Conditions) -> Conditions:
    """Leave out who never gets as far as to administer: keys, nodes and agents."""
    if conditions.origin is None:
        return conditions
    kept = tuple(
        name for name in conditions.origin if name == OWNER or policy.origins[name].kind in {"user", "group"}
    )
    # Without any of them the rule matches nothing that is asked here: a list of no origins.
    return replace(conditions, origin=kept)
