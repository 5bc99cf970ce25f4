"""The blob store is killed at each step that matters: what is there is whole, and what was said is there.

A kill leaves the page cache, a power cut does not: the last test reads a trace of the system calls.
"""

import asyncio
import hashlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mycoswarmd.store.blobs import DirectoryBlobStore
from tests.blobs import get
from tests.integration.blob_driver import BLOBS, PIECES

pytestmark = pytest.mark.integration

DRIVER = Path(__file__).with_name("blob_driver.py")
CALLS = ("write", "fsync", "rename")


def drive(directory: Path, *strace: str) -> list[str]:
    """Run the driver under strace; return the lines that it could still say."""
    command = ("strace", "-f", "-qq", *strace, sys.executable, str(DRIVER), str(directory))
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.splitlines()


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the driver does when nobody kills it."""
    directory = tmp_path_factory.mktemp("traced")
    calls = f"trace={','.join(CALLS)}"
    said = drive(directory / "blobs", "-y", "-s", "8", "-e", calls, "-o", str(directory / "trace"))
    assert said[-1] == "done"
    return (directory / "trace").read_text()


@pytest.mark.timeout(600)  # some fifteen processes under strace
def test_killed_at_every_step_what_is_there_is_whole_and_what_was_said_is_there(
    trace: str, tmp_path: Path
) -> None:
    of_threads = Counter(re.findall(r"^(\d+) +(\w+)\(", trace, re.MULTILINE))  # as strace counts
    counts = {call: max(n for (_, name), n in of_threads.items() if name == call) for call in CALLS}
    assert counts == {"write": BLOBS * PIECES, "fsync": 2 * BLOBS, "rename": BLOBS}
    unfinished = 0
    for call, count in counts.items():
        for n in range(1, count + 1):
            directory = tmp_path / f"{call}-{n}"
            inject = ("-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={n}")
            said = drive(directory, *inject, "-o", "/dev/null")
            assert "done" not in said, f"{call} {n} was never reached"
            left = {path.name for path in directory.iterdir() if path.name.startswith(".new-")}
            unfinished += len(left)
            for path in directory.iterdir():
                if path.name not in left:
                    assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
            store = DirectoryBlobStore(directory, max_bytes=1 << 20)
            asyncio.run(store.sweep(set(said)))
            assert {path.name for path in directory.iterdir()} == set(said)
            for name in said:
                assert len(asyncio.run(get(store, name))) == 20_000 * PIECES
    assert unfinished >= BLOBS * PIECES


def test_nothing_is_acknowledged_before_it_and_its_name_are_synced(trace: str) -> None:
    unsynced: set[str] = set()
    acknowledged = 0
    # -y names the file behind every descriptor.
    for line in trace.splitlines():
        if match := re.search(r'rename\("([^"]*)", "([^"]*)"', line):
            assert match[1] not in unsynced, line
            unsynced.add(str(Path(match[2]).parent))
        elif match := re.search(r"(write|fsync)\((\d+)<([^>]*)>", line):
            call, fd, name = match.groups()
            if fd == "1":
                acknowledged += 1
                assert not unsynced, line
            elif call == "fsync":
                unsynced.discard(name)
            elif "/.new-" in name:
                unsynced.add(name)
    assert acknowledged == BLOBS + 1
