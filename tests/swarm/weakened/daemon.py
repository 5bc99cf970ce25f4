"""The daemon with one defence removed: `daemon.py DEFENCE [python -m mycoswarmd.daemon.main] run ...`.

A test of an attack is worth something only if the attack succeeds where the defence is missing. Each function
here takes out exactly one; the tests run the attack against it first, then against the real daemon.
"""

import sys
from collections.abc import Callable

WEAKENINGS: dict[str, Callable[[], None]] = {}


def weakening(function: Callable[[], None]) -> Callable[[], None]:
    """Register under the function's name."""
    WEAKENINGS[function.__name__.replace("_", "-")] = function
    return function


def main() -> None:
    """Weaken, then be the daemon."""
    name, arguments = sys.argv[1], sys.argv[2:]
    for one in name.split(","):
        WEAKENINGS[one]()
    from mycoswarmd.daemon.main import main as daemon  # noqa: PLC0415 - after the change

    sys.argv = ["mycoswarmd", *arguments[arguments.index("run") :]]
    daemon()


if __name__ == "__main__":
    main()
