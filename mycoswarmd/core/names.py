"""What names of agents, machines and people look like. Apart, so that to check one loads nothing else."""

import re
import unicodedata
from typing import Final

from mycoswarmd.errors import BadRequest

MAX_NAME_CHARS: Final = 64
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAME_HINT: Final = (
    f"1 to {MAX_NAME_CHARS} letters, digits, dots, dashes, underscores, a letter or digit first"
)


def check_name(name: str, what: str = "a node") -> None:
    """Refuse what no member, and no swarm, can be called; BadRequest("bad-name")."""
    if not NAME.fullmatch(name):
        raise BadRequest("bad-name", f"cannot call {what} {name[:80]!r}", hint=NAME_HINT, where="name")


def named_after(text: str) -> str:
    """Return the name that is nearest to what is none: no accents, dashes between words; or ""."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).lstrip("._-")[:MAX_NAME_CHARS].rstrip("-")


def numbered(name: str, number: int) -> str:
    """Return another name for one more of a name, still short enough."""
    end = f"-{number}"
    return name[: MAX_NAME_CHARS - len(end)] + end
