"""A policy's tools as kernel rights: what an agent may ever use becomes what its cage can do at all.

A tool that is not on the agent's list, or that the rules deny in every case, leaves no right behind:
the cage then lacks the means, not only the leave. What may change while a cage runs (label, taint, the
hour) is taken at its most generous; each call is decided again anyway.
"""

from dataclasses import replace

from mycoswarmd.core.policy.globs import TooManyGlobs
from mycoswarmd.core.policy.model import AgentProfile, Conditions, Policy
from mycoswarmd.core.policy.space import Space, Wanted
from mycoswarmd.core.policy.table import Row, Table
from mycoswarmd.core.policy.tools import TOOLS
from mycoswarmd.core.types import Action, CageSpec, Effect, SandboxLevel, Start

_WRITERS = frozenset({"fs_write", "fs_edit", "run"})
_LEVELS = tuple(SandboxLevel)


def compile_rights(
    policy: Policy, profile: AgentProfile, *, task_id: str, attempt: int, sandbox: SandboxLevel
) -> CageSpec:
    """Compile the rights of a task's cage.

    Args:
        policy: the policy in force.
        profile: the agent's.
        task_id: the task.
        attempt: its fencing number.
        sandbox: what this machine can enforce; a rule may ask for more than it has.
    """
    usable = {name for name in profile.tools if _is_usable(policy, profile.name, name, sandbox)}
    return CageSpec(
        task_id=task_id,
        attempt=attempt,
        read_paths=profile.read_paths if any(TOOLS[name].reads_private for name in usable) else (),
        write_paths=profile.write_paths if usable & _WRITERS else (),
        programs=policy.tools["run"].programs if "run" in usable else (),
        limits=profile.limits,
    )


def _is_usable(policy: Policy, agent: str, tool: str, sandbox: SandboxLevel) -> bool:
    """Tell whether some call of this tool by this agent, here, is allowed or asked about."""
    call = Conditions(action=(Action.TOOL,), agent=(agent,), tool=(tool,), start=(Start.LOCAL,))
    rows = [Row(_on_this_machine(rule.conditions, sandbox), rule.effect) for rule in policy.rules]
    table = Table(policy, [*rows, Row(call, Effect.FORBID)])
    this = 1 << len(rows)
    wanted = Wanted(every=this, some=table.allow | table.ask, none=table.forbid & ~this)
    try:
        return Space(policy, table).find(wanted) is not None
    except TooManyGlobs:  # what cannot be told leaves no right
        return False


def _on_this_machine(conditions: Conditions, sandbox: SandboxLevel) -> Conditions:
    """Decide a condition on the sandbox now, since this machine's does not change."""
    if conditions.min_sandbox is None:
        return conditions
    is_met = _LEVELS.index(sandbox) >= _LEVELS.index(conditions.min_sandbox)
    # A rule that is not met here matches nothing: a list of no agents.
    return replace(conditions, min_sandbox=None, agent=conditions.agent if is_met else ())
