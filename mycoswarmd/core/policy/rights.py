"""A policy's tools as kernel rights: what an agent may ever use becomes what its cage can do at all.

A tool that is not on the agent's list, or that the rules deny in every case, leaves no right behind:
the cage then lacks the means, not only the leave. What may change while a cage runs (label, taint, the
hour) is taken at its most generous; each call is decided again anyway.
"""

from mycoswarmd.core.policy.evaluate import refusal
from mycoswarmd.core.policy.model import AgentProfile, Policy
from mycoswarmd.core.policy.space import Space
from mycoswarmd.core.policy.table import table_of
from mycoswarmd.core.policy.tools import TOOLS
from mycoswarmd.core.types import Action, CageSpec, SandboxLevel, Start

_WRITERS = frozenset({"fs_write", "fs_edit", "run"})


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
    usable = _usable(policy, profile.name, sandbox)
    return CageSpec(
        task_id=task_id,
        attempt=attempt,
        read_paths=profile.read_paths if any(TOOLS[name].reads_private for name in usable) else (),
        write_paths=profile.write_paths if usable & _WRITERS else (),
        programs=policy.tools["run"].programs if "run" in usable else (),
        limits=profile.limits,
    )


def _usable(policy: Policy, agent: str, sandbox: SandboxLevel) -> frozenset[str]:
    """Return the tools of which some call, at some label and hour, is not denied."""
    table, found = table_of(policy), set[str]()
    for mask, request in Space(policy, table).points(0, table.every):
        if request.action is not Action.TOOL or request.agent != agent or request.start is not Start.LOCAL:
            continue
        if "min_sandbox" in table.columns and request.sandbox is not sandbox:
            continue
        if mask & ~table.forbid and not mask & table.forbid and refusal(policy, request) is None:
            found.add(str(request.tool))
    return frozenset(found)
