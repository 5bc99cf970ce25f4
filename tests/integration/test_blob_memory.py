"""A node's memory does not grow with workspaces and changes, whoever sends, reads or makes them.

Measured at a real daemon: the most that it ever held, as the kernel saw it.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPResponse
from pathlib import Path

import pytest

from tests.nodes import NodeProcess, UnixConnection, node, write_private
from tests.upstream import upstream

pytestmark = pytest.mark.timeout(300)

POLICY = """
schema = 1
name = "test"
[tools.run]
programs = ["cp"]

[agents.copier]
model = "*"
tools = ["run"]
paths = { read = ["."], write = ["."] }
limit = { wall = "5m", memory = "2GiB", processes = 16, disk = "1GiB", steps = 8, tokens = 100_000 }

[agents.nobody]
model = "none-*"

[[rule]]
id = "owner"
why = "the owner runs this node"
effect = "allow"
action = ["task", "admin"]
origin = ["owner"]
[[rule]]
id = "here"
why = "prompts are answered here"
effect = "allow"
action = "infer"
zone = ["self"]
[[rule]]
id = "tools"
why = "agents may use their tools"
effect = "allow"
action = "tool"
tool = ["run"]
"""
BLOB_BYTES = 200 << 20
COPIED_BYTES = 64 << 20  # twice
AT_ONCE = 5
# Any of them in memory once would be more.
GROWTH_BYTES = 48 << 20


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[NodeProcess]:
    with upstream() as engine:
        copies = [("run", {"program": "cp", "args": ["big", f"copy{n}"]}) for n in range(2)]
        engine.play(*copies, ("finish", {"summary": "done"}))
        state = tmp_path / "node"
        write_private(state / "policy.toml", POLICY)
        text = f'managed_engine = false\n[engines.up]\nkind = "openai"\nurl = "{engine.url}"\n'
        write_private(state / "mycoswarm.toml", text)
        with node(state) as running:
            running.wait_for_models()
            yield running


def most_bytes(daemon: NodeProcess) -> int:
    """Return the most that the node ever had in memory."""
    for line in Path(f"/proc/{daemon.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the kernel does not say")


def put(daemon: NodeProcess, path: Path) -> str:
    """Send a file without holding it here either."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        connection = UnixConnection(daemon.socket)
        connection.blocksize = 1 << 20
        headers = {"Content-Length": str(path.stat().st_size)}
        connection.request("PUT", f"/api/blobs/{sha256}", file, headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        connection.close()
    return sha256


def begin_to_read(daemon: NodeProcess, stack: ExitStack, task_id: str, what: str) -> HTTPResponse:
    connection = UnixConnection(daemon.socket)
    stack.callback(connection.close)
    connection.request("GET", f"/api/tasks/{task_id}/{what}")
    answer = connection.getresponse()
    assert answer.status == 200
    assert len(answer.read(1)) == 1
    return answer


def test_senders_posters_and_slow_readers_of_a_large_workspace_take_no_memory(
    daemon: NodeProcess, tmp_path: Path
) -> None:
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(BLOB_BYTES)
    before = most_bytes(daemon)
    sha256 = put(daemon, big)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert list(pool.map(lambda _: put(daemon, big), range(2))) == [sha256] * 2

        def post(n: int) -> str:
            return daemon.submit(f"task {n}", agent="nobody", workspace=sha256)

        tasks = list(pool.map(post, range(AT_ONCE)))
    with ExitStack() as stack:
        answers = [begin_to_read(daemon, stack, one, "workspace") for one in tasks]
        assert [int(one.headers["Content-Length"]) for one in answers] == [BLOB_BYTES] * AT_ONCE
        digest, size = hashlib.sha256(b"\0"), 1
        while piece := answers[0].read(1 << 20):
            digest.update(piece)
            size += len(piece)
        assert (digest.hexdigest(), size) == (sha256, BLOB_BYTES)
    most = most_bytes(daemon)
    assert most < before + GROWTH_BYTES, f"{before >> 20} MiB before, then {most >> 20} MiB"


def test_an_agents_large_changes_take_no_memory(daemon: NodeProcess, tmp_path: Path) -> None:
    tar, data = tmp_path / "tar", bytes(COPIED_BYTES)
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
        info = tarfile.TarInfo("big")
        info.size, info.mode = len(data), 0o644
        archive.addfile(info, io.BytesIO(data))
    before = most_bytes(daemon)
    task_id = daemon.submit("Copy it", agent="copier", model="agent", workspace=put(daemon, tar))
    task = daemon.wait_task(task_id, "succeeded", "failed", within_s=200)
    assert task["state"] == "succeeded", daemon.events(task_id)
    (changes,) = [event["data"] for event in daemon.events(task_id) if event["kind"] == "changes"]
    expected = [{"path": f"copy{n}", "kind": "written", "bytes": COPIED_BYTES} for n in range(2)]
    assert changes == {"files": expected, "count": 2}
    with ExitStack() as stack:
        answer = begin_to_read(daemon, stack, task_id, "changes")
        assert int(answer.headers["Content-Length"]) > 2 * COPIED_BYTES
    most = most_bytes(daemon)
    assert most < before + GROWTH_BYTES, f"{before >> 20} MiB before, then {most >> 20} MiB"
