"""Stays with the connection of a cage that systemd built: when it ends, so does everything in the cage.

PID 1 does not look at a connection once it has handed it over, and an agent that hangs does not either. So
the unit's first process looks and does nothing else: its end ends the unit, and PID 1 kills what is left of
the control group. Law: nothing that comes from the connection or the agent is read here.

The agent cannot get rid of its guard: killing it ends the unit, and stopping it is refused by the filter
(sandbox/seccomp.py).
Source: systemd.kill(5), poll(2), the half about POLLRDHUP.
"""

import os
import select
import signal

from mycoswarmd.agent.confine import prctl

PR_SET_PDEATHSIG = 1
CONNECTION_FD = 0


def split() -> None:
    """Fork: the child returns and is the agent, this process stays and is its guard."""
    guard = os.getpid()
    agent = os.fork()
    if agent:
        os._exit(watch(agent))
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:  # it went before the line above
        os._exit(1)


def watch(agent: int) -> int:
    """Wait for the end of the connection or of the agent; return the exit status that says which."""
    os.closerange(1, 3)
    for stop in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
        signal.signal(stop, signal.SIG_IGN)
    ended = os.pidfd_open(agent)
    poll = select.poll()
    # A half-closed connection has ended as well; data is the agent's affair and does not wake anybody here.
    poll.register(CONNECTION_FD, select.POLLRDHUP)
    poll.register(ended, select.POLLIN)
    if ended not in {fd for fd, _ in poll.poll()}:
        return 0
    code = os.waitstatus_to_exitcode(os.waitpid(agent, 0)[1])
    return code if code >= 0 else 128 - code
