"""Reads this machine's graphics cards for the core: what the probe's program does with its connection.

PID 1 builds its confinement (systemd/README.probe.md): it is the only unit beside the engine that sees the
devices of cards. daemon/probeunit.py is the program; without systemd it is a child of the node.

Laws:

1. It is asked nothing and reads nothing that the core sends. It says what it proved, then what it found, and
   ends: a process for each reading, so that a driver that crashes or hangs takes nothing along.
2. What it found is said before anything of the driver's is given back, and nothing is given back.
3. It ends by itself, however long the driver would take: the kernel's alarm needs no help of this program.

Source: systemd.socket(5) for Accept=yes; setitimer(2).
"""

import os
import resource
import signal
from collections.abc import Callable

from mycoswarmd.outposts.selftest import prove
from mycoswarmd.wire.probing import Gpus, encode_report
from mycoswarmd.wire.proof import Unit

# A driver that keeps nothing ready for nobody needs two or three seconds for a card.
READ_S = 15


def serve(output: int, read: Callable[[], Gpus]) -> None:
    """Say what is proved and what is found to a descriptor."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process, also within a library
    signal.alarm(READ_S)
    try:
        _say(output, encode_report(prove(Unit.PROBE)))
        _say(output, encode_report(read()))
    except OSError:  # nobody listens any more
        return


def _say(output: int, line: bytes) -> None:
    while line:
        line = line[os.write(output, line) :]
