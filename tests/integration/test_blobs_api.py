"""Blobs over the HTTP interface: they come and go in pieces, and what does not end well leaves nothing."""

import asyncio
import errno
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mycoswarmd.api import openai, services
from mycoswarmd.api.room import Size
from mycoswarmd.api.routes import ROUTES, Route
from mycoswarmd.core.tasks import TaskSpec
from mycoswarmd.core.types import Principal, TaskId
from tests.integration.apis import POLICY, Answer, Connection, Running, local_user, running_api
from tests.nodes import NodeProcess, until, write_private
from tests.nodes import node as real_node
from tests.rosters import Key

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

DATA = bytes(range(256)) * 3_600  # 900 KiB, of the 1 MiB that these nodes take
NAME = hashlib.sha256(DATA).hexdigest()
PATH = f"/api/blobs/{NAME}"


def blobs_of(node: Running) -> Path:
    return node.directory / "state" / "blobs"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def head(one: Connection, path: str, *more: str) -> bytes:
    return "\r\n".join([f"PUT {path} HTTP/1.1", f"Host: {one.host}", *more, "", ""]).encode()


# Half as long as a sender may take: who has gone is noticed, and not only missed in the end.
NOTICED_S = 30


async def until_empty(directory: Path) -> None:
    async with asyncio.timeout(NOTICED_S):
        while names(directory):
            await asyncio.sleep(0.02)


async def until_begun(directory: Path, size_bytes: int) -> None:
    """Wait until so much of an upload is in its unfinished file."""
    async with asyncio.timeout(NOTICED_S):
        while not names(directory) or (directory / names(directory)[0]).stat().st_size < size_bytes:
            await asyncio.sleep(0.02)
    assert [name[:5] for name in names(directory)] == [".new-"]


async def post(node: Running, blob: str) -> TaskId:
    """Store a task with these bytes as its workspace and its changes; nobody carries it out."""
    spec = TaskSpec(
        prompt="x", agent="scribe", label="private", submitter=Principal(user="root"), workspace=blob
    )
    task, _ = await node.services.task_store.enqueue(spec, task_id=TaskId("t-1"), now_ms=1, max_open=10)
    return task.id


async def test_a_blob_comes_and_goes_by_the_socket_and_over_the_network() -> None:
    async with running_api() as node, local_user(node, uid=0) as owner:
        anna = await node.admit("anna", role="operator")
        for n, ask in enumerate((owner.ask, lambda *what: node.ask(anna, *what))):
            data = DATA + bytes([n])
            sha256 = hashlib.sha256(data).hexdigest()
            for _ in range(2):
                put = await ask("PUT", f"/api/blobs/{sha256}", data)
                assert (put.status, put.json) == (200, {"sha256": sha256}), put.body
            body = {"prompt": "hello", "agent": "scribe", "model": "small", "workspace": sha256}
            posted = await ask("POST", "/api/tasks", body)
            assert posted.status == 202, posted.body
            task = f"/api/tasks/{posted.json['task']['id']}"
            found: Answer = await ask("GET", f"{task}/workspace")
            assert (found.status, found.headers["content-type"]) == (200, "application/x-tar")
            assert found.headers["content-length"] == str(len(data))
            assert found.body == data
            assert (await ask("GET", f"{task}/changes")).status == 204
        assert len(names(blobs_of(node))) == 2


async def test_a_chunked_blob_is_as_good_as_any_and_the_connection_goes_on() -> None:
    async with running_api() as node:
        anna = await node.admit("anna", role="operator")
        async with node.connected(anna) as one:
            one.writer.write(head(one, PATH, "Transfer-Encoding: chunked"))
            for start in range(0, len(DATA), 100_000):
                piece = DATA[start : start + 100_000]
                one.writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                await one.writer.drain()
            one.writer.write(b"0\r\n\r\n")
            assert (await one.answer()).status == 200
            other = await one.ask("PUT", f"/api/blobs/{'0' * 64}", b"not that")
            assert (other.status, other.code) == (400, "wrong-hash")
            assert (await one.ask("PUT", PATH, DATA)).status == 200
        assert names(blobs_of(node)) == [NAME]


async def test_a_sender_that_goes_away_in_the_middle_leaves_nothing() -> None:
    async with running_api() as node:
        anna = await node.admit("anna", role="operator")
        async with node.connected(anna) as one:
            one.writer.write(head(one, PATH, f"Content-Length: {len(DATA)}") + DATA[:500_000])
            await until_begun(blobs_of(node), 500_000)
        await until_empty(blobs_of(node))
        assert (await node.ask(anna, "PUT", PATH, DATA)).status == 200


@pytest.mark.parametrize("leaves", ["closes", "half-closes"])
def test_a_local_sender_that_goes_away_in_the_middle_leaves_nothing(tmp_path: Path, leaves: str) -> None:
    state = tmp_path / "node"
    with real_node(state) as daemon, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(daemon.socket))
        request = f"PUT {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(DATA)}\r\n\r\n"
        sock.sendall(request.encode() + DATA[:500_000])
        until(lambda: names(state / "blobs"))
        sock.shutdown(socket.SHUT_WR) if leaves == "half-closes" else sock.close()
        until(lambda: not names(state / "blobs"), within_s=NOTICED_S)
        assert "Traceback" not in daemon.log()


def table(at_most_bytes: int) -> list[Route]:
    """Return the table with another bound for blobs."""
    return [replace(row, body_bytes=at_most_bytes) if "/blobs/" in row.path else row for row in ROUTES]


@pytest.mark.parametrize("is_said", [True, False])
async def test_more_than_the_interface_takes_is_refused(is_said: bool) -> None:
    async with running_api(routes=table(600_000)) as node:
        anna = await node.admit("anna", role="operator")
        async with node.connected(anna) as one:
            if is_said:  # nothing of it is read
                one.writer.write(head(one, PATH, f"Content-Length: {len(DATA)}"))
            else:
                one.writer.write(head(one, PATH, "Transfer-Encoding: chunked") + b"%x\r\n" % len(DATA) + DATA)
            async with asyncio.timeout(NOTICED_S):
                answer = await one.answer()
            assert (answer.status, answer.code) == (413, "too-large")
        await until_empty(blobs_of(node))


async def test_more_than_the_store_takes_is_refused() -> None:
    data = bytes((1 << 20) + 1)
    async with running_api() as node:
        anna = await node.admit("anna", role="operator")
        answer = await node.ask(anna, "PUT", f"/api/blobs/{hashlib.sha256(data).hexdigest()}", data)
        assert (answer.status, answer.code) == (413, "blob-too-large")
        await until_empty(blobs_of(node))


@pytest.mark.parametrize(
    ("header", "path", "code"),
    [
        ("Content-Encoding: gzip", PATH, "compressed-body"),
        ("X: y", "/api/blobs/" + "A" * 64, "wrong-hash"),
        ("X: y", "/api/blobs/..", "wrong-hash"),
    ],
)
async def test_what_the_head_shows_to_be_wrong_is_not_read(header: str, path: str, code: str) -> None:
    async with running_api() as node:
        anna = await node.admit("anna", role="operator")
        async with node.connected(anna) as one, asyncio.timeout(NOTICED_S):
            one.writer.write(head(one, path, header, "Content-Length: 1000"))
            assert (await one.answer()).code == code
        assert not names(blobs_of(node))


async def test_nothing_is_read_from_someone_who_may_post_no_task() -> None:
    async with running_api() as node:
        anna = await node.admit("anna", role="operator")
        node.services.policy.policy = None  # type: ignore[misc]
        async with node.connected(anna) as one, asyncio.timeout(NOTICED_S):
            one.writer.write(head(one, PATH, "Content-Length: 1000"))
            answer = await one.answer()
        assert (answer.status, answer.code) == (403, "policy-denied")
        assert not blobs_of(node).exists()


async def test_a_sender_that_is_too_slow_is_told_so_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mycoswarmd.api.body.BODY_S", 0.5)
    async with running_api() as node:
        anna = await node.admit("anna", role="operator")
        async with node.connected(anna) as one, asyncio.TaskGroup() as group:
            one.writer.write(head(one, PATH, f"Content-Length: {len(DATA)}"))

            async def drip() -> None:  # each piece comes in time, all of them do not
                for n in range(900):
                    one.writer.write(DATA[n * 1000 : n * 1000 + 1000])
                    await asyncio.sleep(0.1)

            dripping = group.create_task(drip())
            async with asyncio.timeout(NOTICED_S):
                answer = await one.answer()
            dripping.cancel()
        assert (answer.status, answer.code) == (408, "slow-body")
        await until_empty(blobs_of(node))


async def test_a_slow_disk_is_not_the_senders_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.statvfs, []

    def slow(path: str) -> os.statvfs_result:
        time.sleep(0.5)
        calls.append(path)
        return real(path)

    monkeypatch.setattr("mycoswarmd.api.body.BODY_S", 2.0)
    monkeypatch.setattr("mycoswarmd.store.blobs.os.statvfs", slow)
    async with running_api() as node:
        anna = await node.admit("anna", role="operator")
        assert (await node.ask(anna, "PUT", PATH, DATA)).status == 200
    assert len(calls) * 0.5 > 2.0


async def test_a_damaged_workspace_is_said_when_it_is_read_and_an_unknown_one_when_it_is_posted() -> None:
    async with running_api() as node, local_user(node, uid=0) as owner:
        assert (await owner.ask("PUT", PATH, DATA)).status == 200
        task = await post(node, NAME)
        (blobs_of(node) / NAME).write_bytes(DATA[:-1] + b"?")
        answer = await owner.ask("GET", f"/api/tasks/{task}/workspace")
        assert (answer.status, answer.code) == (503, "blob-damaged"), answer.body
        assert (await owner.ask("PUT", PATH, DATA)).status == 200  # the good copy takes its place
        assert (await owner.ask("GET", f"/api/tasks/{task}/workspace")).body == DATA
        body = {"prompt": "hello", "agent": "scribe", "workspace": "0" * 64}
        answer = await owner.ask("POST", "/api/tasks", body)
        assert (answer.status, answer.code) == (404, "unknown-blob")


async def test_who_posts_a_task_has_nothing_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_api() as node, local_user(node, uid=0) as owner:
        assert (await owner.ask("PUT", PATH, DATA)).status == 200
        monkeypatch.setattr("mycoswarmd.store.blobs.FileIO", None)
        body = {"prompt": "hello", "agent": "scribe", "model": "small", "workspace": NAME}
        assert (await owner.ask("POST", "/api/tasks", body)).status == 202


@asynccontextmanager
async def readers(node: Running, who: Key, count: int) -> AsyncIterator[list[Connection]]:
    """Hold connections that read the head of a large blob, and no more."""
    async with AsyncExitStack() as stack:
        found = []
        for _ in range(count):
            found.append(one := await stack.enter_async_context(node.connected(who)))
            await one.send("GET", "/api/tasks/t-1/workspace")
            assert (await one.head())[0] == 200
        yield found


async def test_slow_readers_and_senders_keep_nobody_else_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_BLOB_PATIENCE_S", 1.0)
    monkeypatch.setattr(services, "_BLOBS", {"owner": Size(1, 1), "operator": Size(2, 5)})
    data = bytes(32 << 20)  # more than the kernel keeps for anybody
    name = hashlib.sha256(data).hexdigest()
    async with running_api() as node, local_user(node, uid=0) as owner, AsyncExitStack() as stack:
        monkeypatch.setattr(node.services.blobs, "_max_bytes", len(data))
        assert (await owner.ask("PUT", f"/api/blobs/{name}", data)).status == 200
        operators = [await node.admit(who, role="operator") for who in ("anna", "ben", "carl", "dora")]
        anna, ben, carl, dora = operators
        await post(node, name)
        (slow,) = await stack.enter_async_context(readers(node, anna, 1))
        sender = await stack.enter_async_context(node.connected(anna))
        sender.writer.write(head(sender, PATH, f"Content-Length: {len(DATA)}") + DATA[:500_000])
        async with asyncio.timeout(NOTICED_S):
            while len(names(blobs_of(node))) < 2:
                await asyncio.sleep(0.02)
        for what in (("PUT", PATH, DATA), ("GET", "/api/tasks/t-1/workspace", None)):
            full = await node.ask(anna, *what)
            assert (full.status, full.code) == (503, "too-many-blobs")
            assert full.json["error"]["message"].startswith("cannot ")
        assert (await node.ask(ben, "PUT", PATH, DATA)).status == 200
        await stack.enter_async_context(readers(node, ben, 2))
        await stack.enter_async_context(readers(node, carl, 1))
        assert (await node.ask(dora, "PUT", PATH, DATA)).code == "too-many-blobs"  # all of them together
        assert (await owner.ask("PUT", PATH, DATA)).status == 200
        slow.writer.transport.abort()
        async with asyncio.timeout(NOTICED_S):
            while (await node.ask(dora, "PUT", PATH, DATA)).status == 503:
                await asyncio.sleep(0.02)
        sender.writer.write(DATA[500_000:])
        assert (await sender.answer()).status == 200


async def test_an_upload_does_not_go_on_without_its_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_BLOBS", {"operator": Size(1, 1)})
    monkeypatch.setattr(services, "_BLOB_PATIENCE_S", 600)  # as long would they wait
    async with running_api() as node:
        anna = await node.admit("anna", role="operator")
        async with node.connected(anna) as one:
            one.writer.write(head(one, PATH, f"Content-Length: {len(DATA)}") + DATA[:500_000])
            await until_begun(blobs_of(node), 500_000)
            before = len(asyncio.all_tasks())
            for _ in range(20):
                async with node.connected(anna) as other:  # all of it comes, and waits for its turn
                    await other.send("PUT", f"/api/blobs/{hashlib.sha256(b'x').hexdigest()}", b"x")
                    await asyncio.sleep(0.02)
            async with asyncio.timeout(NOTICED_S):
                while len(asyncio.all_tasks()) > before:
                    await asyncio.sleep(0.02)
            one.writer.write(DATA[500_000:])
            assert (await one.answer()).status == 200
        assert names(blobs_of(node)) == [NAME]


# The same program; who waits for room in it waits for longer than the test does.
_PATIENT = """
import sys
from mycoswarmd.api import services
from mycoswarmd.daemon import main
services._BLOB_PATIENCE_S = 600
del sys.argv[1:4]  # the program as it is
sys.exit(main.main())
"""


@pytest.mark.parametrize("what", ["PUT", "POST", "GET"])
def test_who_hangs_up_at_once_again_and_again_leaves_no_work_and_no_descriptor(
    tmp_path: Path, what: str
) -> None:
    data = bytes(128 << 20)
    name = hashlib.sha256(data).hexdigest()
    task = {"prompt": "x", "agent": "scribe", "workspace": name, "idempotency_key": "one"}
    state = tmp_path / "node"
    write_private(state / "policy.toml", POLICY.decode())
    daemon = NodeProcess(state)
    daemon.start(prefix=("prlimit", "--nofile=256", sys.executable, "-c", _PATIENT))
    try:
        assert daemon.call("PUT", f"/api/blobs/{name}", data).status == 200
        task_id = daemon.submit(**task)
        body = json.dumps(task)
        request = {
            "PUT": f"PUT /api/blobs/{name} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
            "POST": f"POST /api/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}",
            "GET": f"GET /api/tasks/{task_id}/workspace HTTP/1.1\r\nHost: x\r\n\r\n",
        }[what]
        before_s, quiet = cpu_s(daemon), descriptors(daemon)
        for n in range(600):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(60)
                sock.connect(str(daemon.socket))
                sock.sendall(request.encode())
                time.sleep(0.001)
            if n % 50 == 49:  # it has accepted them: more than it has descriptors for are never in its queue
                assert daemon.call("GET", "/api/status").status == 200
        until(lambda: descriptors(daemon) < quiet + 60, within_s=NOTICED_S)
        small = hashlib.sha256(b"x").hexdigest()
        assert daemon.call("PUT", f"/api/blobs/{small}", b"x").status == 200
        assert daemon.call("POST", "/api/policy/reload", {}).status == 200
        assert daemon.call("POST", "/api/tasks", task).status == 200
        assert cpu_s(daemon) < before_s + 10
        assert "out of system resource" not in daemon.log()
    finally:
        daemon.kill()


def descriptors(daemon: NodeProcess) -> int:
    return len(list(Path(f"/proc/{daemon.pid}/fd").iterdir()))


def cpu_s(daemon: NodeProcess) -> float:
    """Return how much work the node has done."""
    fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


async def test_a_disk_that_fails_while_a_blob_is_sent_ends_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = os.pread

    def failing(fd: int, size_bytes: int, offset: int) -> bytes:
        if offset > 300_000 and size_bytes < 1 << 20:  # it was hashed in larger pieces
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, size_bytes, offset)

    async with running_api() as node:
        anna = await node.admit("anna", role="operator")
        assert (await node.ask(anna, "PUT", PATH, DATA)).status == 200
        task = await post(node, NAME)
        monkeypatch.setattr("mycoswarmd.store.blobs.os.pread", failing)
        async with node.connected(anna) as one, asyncio.timeout(NOTICED_S):
            await one.send("GET", f"/api/tasks/{task}/workspace")
            status, headers = await one.head()
            assert (status, headers["content-length"]) == (200, str(len(DATA)))
            came = b""
            try:
                while piece := await one.reader.read(1 << 16):
                    came += piece
            except ConnectionError:
                pass
        assert 200_000 < len(came) < len(DATA)
        assert DATA.startswith(came)


async def test_who_does_not_read_on_loses_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "_UNREAD_S", 3.0)
    data = bytes(32 << 20)  # more than the kernel keeps for anybody
    name = hashlib.sha256(data).hexdigest()
    async with running_api() as node:
        monkeypatch.setattr(node.services.blobs, "_max_bytes", len(data))
        anna = await node.admit("anna", role="operator")
        assert (await node.ask(anna, "PUT", f"/api/blobs/{name}", data)).status == 200
        task = await post(node, name)

        def is_open() -> bool:
            files = [fd.readlink().name for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
            return name in files

        async with node.connected(anna) as one:
            await one.send("GET", f"/api/tasks/{task}/workspace")
            assert (await one.head())[0] == 200
            assert is_open()
            async with asyncio.timeout(NOTICED_S):
                while is_open():
                    await asyncio.sleep(0.05)
            came = 0
            try:
                while piece := await one.reader.read(1 << 20):
                    came += len(piece)
            except ConnectionError:
                pass
        assert came < len(data)
