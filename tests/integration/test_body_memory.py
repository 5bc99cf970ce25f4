"""The memory that callers can make a node take, as the kernel counts it, with and without its bounds."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

import pytest

from mycoswarmd.api import app
from tests.integration.test_tasks import prepare
from tests.nodes import NodeProcess
from tests.upstream import Upstream, upstream

pytestmark = pytest.mark.timeout(300)

# The same program with room for everything.
_WITHOUT = """
import sys
from mycoswarmd.api import app, lines, room
from mycoswarmd.daemon import main
for name in app._ROOMS:
    app._ROOMS[name] = room.Size(1 << 40, 1 << 40)
room._OBJECTS_BYTES = 1 << 40
lines._READ_BYTES = 256 << 10
del sys.argv[1:4]  # the program as it is
sys.exit(main.main())
"""
_PROPERTIES = ",".join(f'"k{number}":{{}}' for number in range(50_000))
_PARAMETERS = '{"type": "object", "properties": {' + _PROPERTIES + "}}"
BODIES = {
    "one wide character": json.dumps(
        {"model": "silent", "messages": [{"role": "user", "content": "x" * (2 << 20) + "\U0001f344"}]},
        ensure_ascii=False,
    ).encode(),
    "objects": (
        '{"model": "silent", "messages": [{"role": "user", "content": "x"}],'
        ' "tools": [{"type": "function", "function": {"name": "f", "parameters": ' + _PARAMETERS + "}}]}"
    ).encode(),
}
COUNT = 50
ROOM_BYTES = app._ROOMS["owner"].all_bytes
# What the connections hold that wait, and what is in use for a moment.
BESIDE_BYTES = 48 << 20


@pytest.fixture(scope="module")
def engine() -> Iterator[Upstream]:
    with upstream() as running:
        yield running


@contextmanager
def node(state: Path, *, is_bounded: bool) -> Iterator[NodeProcess]:
    running = NodeProcess(state)
    running.start(prefix=() if is_bounded else (sys.executable, "-c", _WITHOUT))
    try:
        running.wait_for_models()
        yield running
    finally:
        running.kill()


def anonymous_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


def most_taken_bytes(daemon: NodeProcess, body: bytes, *, enough_bytes: int, within_s: float) -> int:
    """Have many callers send this at once and stay; return how much more memory the node takes then.

    It is looked until that is enough, or until it has taken nothing more for so long.
    """

    def ask() -> None:
        with suppress(OSError, HTTPException):  # it is ended while they wait
            daemon.call("POST", "/v1/chat/completions", body)

    before_bytes = anonymous_bytes(daemon.pid)
    for _ in range(COUNT):
        threading.Thread(target=ask, daemon=True).start()
    found_bytes, since_s = 0, time.monotonic()
    while time.monotonic() < since_s + within_s and found_bytes - before_bytes <= enough_bytes:
        time.sleep(0.05)
        now_bytes = anonymous_bytes(daemon.pid)
        if now_bytes > found_bytes:
            found_bytes, since_s = now_bytes, time.monotonic()
    return found_bytes - before_bytes


@pytest.mark.parametrize("kind", BODIES)
def test_prompts_take_so_much_memory_and_no_more(kind: str, tmp_path: Path, engine: Upstream) -> None:
    bound_bytes = ROOM_BYTES + BESIDE_BYTES
    with node(prepare(tmp_path / "bounded", engine), is_bounded=True) as daemon:
        taken_bytes = most_taken_bytes(daemon, BODIES[kind], enough_bytes=bound_bytes, within_s=3)
    assert taken_bytes < bound_bytes, taken_bytes >> 20
    with node(prepare(tmp_path / "control", engine), is_bounded=False) as daemon:
        taken_bytes = most_taken_bytes(daemon, BODIES[kind], enough_bytes=2 * bound_bytes, within_s=60)
    assert taken_bytes > 2 * bound_bytes, taken_bytes >> 20
