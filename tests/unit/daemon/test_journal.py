"""The log as systemd's journal has it."""

import logging
import re
import socket
import struct
from pathlib import Path

import pytest

from mycoswarmd.daemon.journal import EVENTS, JournalFormatter, NativeHandler, encode_fields, priority

ROOT = Path(__file__).resolve().parents[3]
CATALOG = ROOT / "systemd" / "mycoswarm.catalog"
# What others match on: a line is added for a new event, and none is ever changed or taken away.
PUBLISHED = {
    "ready": "468f11ef4dbb",
    "stopping": "0d2eb5ad79d9",
    "cannot-run": "f121e5eda4e3",
    "policy-reloaded": "c38b7d21f6c3",
    "policy-broken": "5ae944fa4bd8",
    "cage-proved": "1e5dd22fa36f",
    "cage-unproved": "f1b0a7216df5",
    "cage-lingers": "fd9fc1895db1",
    "engine-lingers": "849637fe7d36",
    "unit-weak": "d6cfe2ad060d",
    "unit-gone": "15d4902d1444",
    "listener-down": "08dd33c455f3",
    "double-identity": "d9d79caa6d20",
    "revoked": "ecfab695fae1",
    "expelled": "bfcab69465ba",
    "task-cut-off": "de0efe174543",
}


def record(message: str, *, level: int = logging.ERROR, event: str | None = None) -> logging.LogRecord:
    made = logging.LogRecord("mycoswarmd.x", level, "", 0, message, (), None)
    if event is not None:
        made.event = event
    return made


class Kept(logging.Handler):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def parse(datagram: bytes) -> dict[str, bytes]:
    """Read an entry as journald does."""
    fields = {}
    while datagram:
        name, _, datagram = datagram.partition(b"\n")
        (size,) = struct.unpack_from("<Q", datagram)
        fields[name.decode()], datagram = datagram[8 : 8 + size], datagram[8 + size + 1 :]
    return fields


@pytest.mark.parametrize(
    ("level", "number"),
    [(logging.CRITICAL, 3), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.DEBUG, 7)],
)
def test_levels_are_syslogs(level: int, number: int) -> None:
    assert priority(level) == number


def test_every_line_of_a_traceback_has_its_priority() -> None:
    lines = JournalFormatter().format(record("one\ntwo")).split("\n")
    assert lines == ["<3>mycoswarmd.x: one", "<3>two"]


def test_an_event_goes_to_the_journal_with_its_id_and_nowhere_else(tmp_path: Path) -> None:
    kept = Kept()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal"))
        journal.settimeout(5)
        NativeHandler(kept, str(tmp_path / "journal")).handle(record("gone\nbad", event="revoked"))
        fields = parse(journal.recv(4096))
    assert fields == {
        "MESSAGE": b"mycoswarmd.x: gone\nbad",
        "MESSAGE_ID": EVENTS["revoked"].encode(),
        "PRIORITY": b"3",
        "SYSLOG_IDENTIFIER": b"mycoswarmd",
        "MYCOSWARM_EVENT": b"revoked",
    }
    assert not kept.records


def test_no_text_can_pretend_to_be_another_field() -> None:
    fields = parse(encode_fields({"MESSAGE": "x\nPRIORITY=0\nMESSAGE_ID=1", "PRIORITY": "6"}))
    assert fields["PRIORITY"] == b"6"


@pytest.mark.parametrize("event", [None, "unheard-of", "revoked"])
def test_what_the_journal_does_not_take_is_written_all_the_same(tmp_path: Path, event: str | None) -> None:
    kept = Kept()
    NativeHandler(kept, str(tmp_path / "nobody")).handle(record("x", event=event))
    assert len(kept.records) == 1


def test_every_event_that_is_logged_has_an_id_and_a_text() -> None:
    said = set()
    for path in (ROOT / "mycoswarmd").rglob("*.py"):
        for found in re.findall(r'extra=\{"event": ([^}]*)\}', path.read_text()):
            said |= set(re.findall(r'"([a-z-]+)"', found))
    assert said == set(EVENTS)
    assert len(set(EVENTS.values())) == len(EVENTS)
    assert all(re.fullmatch(r"[0-9a-f]{32}", one) for one in EVENTS.values())
    texts = set(re.findall(r"^-- ([0-9a-f]{32})$", CATALOG.read_text(), re.MULTILINE))
    assert texts == set(EVENTS.values())


def test_an_id_that_was_published_stays() -> None:
    assert {event: number[:12] for event, number in EVENTS.items()} == PUBLISHED
