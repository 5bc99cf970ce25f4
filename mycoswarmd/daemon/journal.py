"""The log: to a terminal with times, to systemd's journal with priorities and, for what matters, with ids.

Law: an id never changes its meaning and is never used again; catalog texts (systemd/mycoswarm.catalog) and
other programs match it. An event is logged with `extra={"event": NAME}` from anywhere. What the journal's own
socket does not take goes to standard error: nothing is lost for being important.
Source: sd-daemon(3) for <N>; systemd.journal-fields(7); "Native Journal Protocol" of systemd's documentation.
"""

import logging
import os
import socket
import struct
import sys
from collections.abc import Mapping
from typing import Final

from mycoswarmd.daemon.settings import take_variables

NATIVE: Final = "/run/systemd/journal/socket"
IDENTIFIER: Final = "mycoswarmd"

# fmt: off
EVENTS: Final[Mapping[str, str]] = {
    "ready":           "468f11ef4dbb436c82b5a5261acb99d9",  # answers on its socket
    "stopping":        "0d2eb5ad79d948bd8d15a4aa6b5e96ca",  # was told to
    "cannot-run":      "f121e5eda4e34a21a61162dce77eb6a7",  # what it needs is missing or broken
    "policy-reloaded": "c38b7d21f6c34f6abb4c8aba5cb73df7",  # another policy is in force
    "policy-broken":   "5ae944fa4bd84c45858ba7869ccf1078",  # its file cannot be used; the old one stays
    "cage-proved":     "1e5dd22fa36f4854b8a04136095e4139",  # the cages of tasks proved themselves
    "cage-unproved":   "f1b0a7216df54577ad2f0325605ee24d",  # they did not: tasks are refused
    "cage-lingers":    "fd9fc1895db146eea756b9b1e8ebddb1",  # one did not end when it was told to
    "engine-lingers":  "849637fe7d3647d6a4780b9bac90be1e",  # an engine did not end when it was told to
    "unit-weak":       "d6cfe2ad060d402d944ead78a3341ff9",  # a unit is less confined than it should be
    "unit-gone":       "15d4902d14444e57bdb4f4486d62682b",  # a unit cannot be reached, or ended
    "listener-down":   "08dd33c455f340c085f7a1a4268e8a65",  # an address cannot be listened at
    "double-identity": "d9d79caa6d2041de80b215272888d07e",  # two machines have one node's key
    "revoked":         "ecfab695fae1498d93fa0af84f803ca8",  # a member was put out of the swarm
    "expelled":        "bfcab69465ba45289d0831c1247ddfb8",  # this node was
    "task-cut-off":    "de0efe1745434970b5751bab12ef6817",  # after a crash, a task goes on or is parked
}
# fmt: on

# syslog(3): err, warning, info, debug.
_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG = 7


def set_up(level: int) -> None:
    """Log to standard error from now on; as the journal has it where that is what standard error is."""
    handler = logging.StreamHandler(sys.stderr)
    handlers: list[logging.Handler] = [handler]
    if _is_journal(take_variables("JOURNAL_STREAM").get("JOURNAL_STREAM", "")):
        handler.setFormatter(JournalFormatter())
        handlers = [NativeHandler(handler)]
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=handlers)


def _is_journal(stream: str) -> bool:
    """Tell whether standard error is what JOURNAL_STREAM says; a redirected one is not."""
    try:
        facts = os.fstat(2)
    except OSError:
        return False
    return stream == f"{facts.st_dev}:{facts.st_ino}"


def priority(level: int) -> int:
    """Return syslog's number for a level of logging."""
    return next((number for least, number in _PRIORITIES if level >= least), _DEBUG)


class JournalFormatter(logging.Formatter):
    """Each line with its priority and without a time: the journal has its own."""

    def __init__(self) -> None:
        super().__init__("%(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's lines."""
        mark = f"<{priority(record.levelno)}>"
        return "\n".join(f"{mark}{line}" for line in super().format(record).splitlines())


class NativeHandler(logging.Handler):
    """Sends events to the journal's own socket; all else, and what that does not take, to another handler."""

    def __init__(self, otherwise: logging.Handler, path: str = NATIVE) -> None:
        super().__init__()
        self._otherwise = otherwise
        self._path = path
        self._plain = logging.Formatter("%(name)s: %(message)s")

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        event = str(getattr(record, "event", ""))
        if event not in EVENTS or not self._is_sent(record, event):
            self._otherwise.handle(record)

    def _is_sent(self, record: logging.LogRecord, event: str) -> bool:
        fields = {
            "MESSAGE": self._plain.format(record),
            "MESSAGE_ID": EVENTS[event],
            "PRIORITY": str(priority(record.levelno)),
            "SYSLOG_IDENTIFIER": IDENTIFIER,
            "MYCOSWARM_EVENT": event,
        }
        try:
            # Events are rare; a socket that was kept would be that of a journal before its restart.
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
                sock.sendto(encode_fields(fields), self._path)
        except OSError:
            return False
        return True


def encode_fields(fields: Mapping[str, str]) -> bytes:
    """Encode an entry; each value with its length, so that none can pretend to be another field."""
    parts = []
    for name, text in fields.items():
        value = text.encode("utf-8", "replace")
        parts.append(name.encode("ascii") + b"\n" + struct.pack("<Q", len(value)) + value + b"\n")
    return b"".join(parts)
