"""THE TABLE of tools: what each one can do to secrets, fixed here and not in any policy.

A policy declares which of these exist on a node and which agent may ask for them; it cannot change
what a tool is. `finish` is no tool of the policy: ending a task is always allowed.
Source: design, policy language, point 7.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from mycoswarmd.core.types import Zone


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolClass:
    """What a tool is.

    Attributes:
        reads_private: it can bring private data into the conversation.
        untrusted_input: it brings in text that a stranger wrote; its use taints the task.
        way_out: bytes that the agent chose can leave the swarm through it.
        runs_programs: it executes files.
        repeatable: doing it twice does no more than doing it once.
        zone: where its effect is.
    """

    reads_private: bool = False
    untrusted_input: bool = False
    way_out: bool = False
    runs_programs: bool = False
    repeatable: bool = True
    zone: Zone = Zone.SELF


TOOLS: Final[Mapping[str, ToolClass]] = MappingProxyType(
    {
        "fs_read": ToolClass(reads_private=True),
        "fs_list": ToolClass(reads_private=True),
        "fs_search": ToolClass(reads_private=True),
        "fs_write": ToolClass(),
        "fs_edit": ToolClass(reads_private=True, repeatable=False),
        "run": ToolClass(reads_private=True, runs_programs=True, repeatable=False),
        "web_fetch": ToolClass(untrusted_input=True, way_out=True, zone=Zone.CLOUD),
    }
)

# Programs that execute what they are told: allowing one allows any code that the cage allows.
_INTERPRETERS: Final = """
sh bash dash zsh fish ksh busybox python python3 perl ruby node deno bun php lua luajit tclsh wish
awk gawk mawk sed make cmake ninja gdb java env xargs find git vim vi ed ssh tar docker podman
pytest uv pip npm npx yarn cargo go gcc cc clang R Rscript julia guile emacs sqlite3
"""
INTERPRETERS: Final = frozenset(_INTERPRETERS.split())


def is_interpreter(program: str) -> bool:
    """Tell whether a program's file name is one that executes code from its arguments or input."""
    name = program.rpartition("/")[2]
    return name in INTERPRETERS or name.rstrip("0123456789.-") in INTERPRETERS
