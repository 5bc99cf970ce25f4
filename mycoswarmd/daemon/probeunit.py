"""The program of the probe's unit, `python3 -I -m mycoswarmd.daemon.probeunit`: what cards are here, once.

It is here since it puts together what do not know each other: outposts/probe.py says it, inventory/gpu.py
reads it. What it says goes to descriptor 1; a library's own words go to the log instead.
"""

import os
import sys
from collections.abc import Iterable

from mycoswarmd.inventory.gpu import read_gpus
from mycoswarmd.outposts.probe import serve


def main(argv: Iterable[str]) -> None:
    """Say what is found to whoever is at descriptor 1."""
    del argv
    output = os.dup(1)
    os.dup2(2, 1)
    serve(output, read_gpus)
    os._exit(0)  # what a driver's library does at the end of a process is nothing that anybody waits for


if __name__ == "__main__":
    main(sys.argv[1:])
