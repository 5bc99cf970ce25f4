"""What the service manager handed over: listening sockets, and whom to tell how the node is.

Law: a socket that was passed is somebody else's: it is neither unlinked nor changed, and it goes on
listening when this process ends. What is passed is taken once and hidden from children.
Source: sd_listen_fds(3), sd_notify(3), systemd.socket(5).
"""

import asyncio
import logging
import os
import socket
import stat

from mycoswarmd.daemon.settings import take_variables
from mycoswarmd.errors import ConfigError
from mycoswarmd.flow.ports import Clock

log = logging.getLogger(__name__)

# FileDescriptorName= of the socket that local callers connect to.
API = "api"
_FIRST_FD = 3
_MAX_FDS = 64
# systemd waits for the whole of WatchdogSec=; half of it leaves room (sd_watchdog_enabled(3)).
_OF_WATCHDOG = 0.5


def passed_sockets() -> dict[str, socket.socket]:
    """Take the listening sockets that the service manager passed to this process, by their names.

    Raises ConfigError where two have one name, or one is not a socket.
    """
    said = take_variables("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
    if said.get("LISTEN_PID") != str(os.getpid()):
        return {}
    count = said.get("LISTEN_FDS", "")
    if not count.isascii() or not count.isdigit() or len(count) > 2 or int(count) > _MAX_FDS:
        raise _bad(f"LISTEN_FDS is {count[:20]!r}")
    names = said.get("LISTEN_FDNAMES", "").split(":")
    found: dict[str, socket.socket] = {}
    for position in range(int(count)):
        name = names[position] if position < len(names) and names[position] else "unknown"
        fd = _FIRST_FD + position
        try:
            os.set_inheritable(fd, False)  # noqa: FBT003
            is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
        except OSError as exc:
            raise _bad(f"descriptor {fd}: {exc.strerror}") from exc
        if not is_socket or name in found:
            raise _bad(f"descriptor {fd} ({name!r}) is no socket, or a second one of that name")
        found[name] = socket.socket(fileno=fd)
    return found


def take_api_socket() -> socket.socket:
    """Return the unix socket for local callers, and close what else was passed; ConfigError without it."""
    passed = passed_sockets()
    sock = passed.pop(API, None)
    for other in passed.values():
        other.close()
    if sock is None:
        raise ConfigError(
            "no-api-socket",
            "cannot run as the appliance: systemd passed no socket with the name 'api'",
            hint="systemctl start mycoswarmd.socket; to run a node by hand, leave out --appliance",
        )
    is_right = sock.family is socket.AF_UNIX and sock.type is socket.SOCK_STREAM
    if not is_right or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.close()
        raise _bad("'api' is not a listening unix stream socket")
    sock.setblocking(False)  # noqa: FBT003
    return sock


class Manager:
    """Tells the service manager how the node is; where there is none, nobody."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        where = take_variables("NOTIFY_SOCKET").get("NOTIFY_SOCKET", "")
        self._where = "\0" + where[1:] if where.startswith("@") else where
        self._watchdog_s = _watchdog_s()

    def ready(self, status: str) -> None:
        """Say that the node answers, also after a reload."""
        self._tell(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        """Say that the policy is being read again; `ready` must follow."""
        now_us = int(self._clock.monotonic_s() * 1_000_000)
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={now_us}")

    def stopping(self) -> None:
        """Say that the node ends because it was told to."""
        self._tell("STOPPING=1\nSTATUS=stopping")

    def failed(self, why: str) -> None:
        """Say why this process ends: `systemctl status` shows it until the next start."""
        self._tell(f"STATUS={' '.join(why.split())}")

    async def watch(self) -> None:
        """Say again and again that the loop turns, as often as is asked for; until cancelled."""
        if self._watchdog_s is None:
            return
        while True:
            self._tell("WATCHDOG=1")
            await asyncio.sleep(self._watchdog_s * _OF_WATCHDOG)

    def _tell(self, what: str) -> None:
        if not self._where:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
                out.sendto(what.encode("utf-8", "replace"), self._where)
        except OSError as exc:  # nothing of the node's work depends on it
            log.warning("systemd could not be told %r: %s", what.partition("\n")[0], exc.strerror)


def _watchdog_s() -> float | None:
    said = take_variables("WATCHDOG_USEC", "WATCHDOG_PID")
    usec = said.get("WATCHDOG_USEC", "")
    if said.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()) or not usec.isdigit():
        return None
    return int(usec) / 1_000_000 or None


def _bad(what: str) -> ConfigError:
    return ConfigError(
        "bad-activation",
        f"cannot use what systemd passed: {what}",
        hint="systemctl cat mycoswarmd.socket shows what it should be",
    )
