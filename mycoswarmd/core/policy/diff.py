"""What an edit changes, as requests: the review that a person wants of a policy."""

from collections.abc import Iterator

from mycoswarmd.core.policy.evaluate import NeedsApproval, Permit, evaluate
from mycoswarmd.core.policy.model import Policy
from mycoswarmd.core.policy.request import describe
from mycoswarmd.core.policy.space import Space
from mycoswarmd.core.policy.table import table_of
from mycoswarmd.core.types import Request

# A person reads a screen or two; beyond it, the count says enough.
_SHOWN = 50
_TRIED = 50_000


def changed_requests(old: Policy | None, new: Policy) -> tuple[str, ...]:
    """List the classes of request that two policies decide differently, a line each."""
    found: dict[str, None] = {}
    for number, request in enumerate(_requests(old, new)):
        if number >= _TRIED or len(found) >= _SHOWN:
            break
        before, after = _word(old, request), _word(new, request)
        if before != after:
            found[f"now {after}, was {before}: {describe(request)}"] = None
    return tuple(found)


def _requests(old: Policy | None, new: Policy) -> Iterator[Request]:
    for policy in (new, old):
        if policy is not None:
            table = table_of(policy)
            for _, request in Space(policy, table).points(0, table.every):
                yield request


def _word(policy: Policy | None, request: Request) -> str:
    outcome = evaluate(policy, request)
    if isinstance(outcome, Permit):
        return "allowed"
    return "asked" if isinstance(outcome, NeedsApproval) else "denied"
