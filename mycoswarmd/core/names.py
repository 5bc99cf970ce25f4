"""What names of agents, machines and people look like. Apart, so that to check one loads nothing else."""

import re
from typing import Final

from mycoswarmd.errors import BadRequest

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# What a person may choose: one character less than what a roster holds, as for a label of a host name.
MAX_CHOSEN_CHARS: Final = 63


def check_name(name: str, what: str = "a node") -> None:
    """Refuse what no member, and no swarm, can be called; BadRequest("bad-name")."""
    if len(name) > MAX_CHOSEN_CHARS or not NAME.fullmatch(name):
        raise BadRequest(
            "bad-name",
            f"cannot call {what} {name[:80]!r}",
            hint="letters, digits, dots, dashes and underscores, at most 63, starting with a letter or digit",
            where="name",
        )


def numbered(name: str, number: int) -> str:
    """Return another name for one more of a name, still short enough."""
    end = f"-{number}"
    return name[: MAX_CHOSEN_CHARS - len(end)] + end
