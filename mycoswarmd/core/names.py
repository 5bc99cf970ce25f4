"""What names of agents, machines and people look like. Apart, so that to check one loads nothing else."""

import re
from typing import Final

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
