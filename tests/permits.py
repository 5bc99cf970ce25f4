"""Real permits for tests of engines: made by `evaluate` under a policy that allows inference everywhere."""

from mycoswarmd.core.policy.evaluate import Permit, evaluate
from mycoswarmd.core.policy.model import Conditions, Destination, Labels, Obligations, Policy, Rule
from mycoswarmd.core.types import Action, Effect, Principal, Request, RuleId, Zone

POLICY = Policy(
    name="test",
    sha256="0" * 64,
    path="test.toml",
    labels=Labels(),
    origins={},
    destinations={
        "bigcloud": Destination(
            name="bigcloud", api="openai", url="https://api.example.com/v1", credential=None, models=None
        )
    },
    prefer=(),
    tools={},
    agents={},
    rules=(
        Rule(
            id=RuleId("all"),
            why="tests",
            effect=Effect.ALLOW,
            conditions=Conditions(action=(Action.INFER,)),
            limits=Obligations(),
            approve_by=(),
            path="test.toml",
            line=1,
        ),
    ),
    invariants=(),
    tests=(),
)


def permit_for(model: str, *, zone: Zone = Zone.SELF, dest: str | None = None) -> Permit:
    """Return a permit to ask a model in a zone."""
    request = Request(
        action=Action.INFER,
        principal=Principal(is_owner=True, uid=0),
        zone=zone,
        dest=dest,
        model=model,
        label="public",
    )
    outcome = evaluate(POLICY, request)
    assert isinstance(outcome, Permit), outcome
    return outcome
