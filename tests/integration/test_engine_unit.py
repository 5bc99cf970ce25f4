"""The program of the engine's unit: on a connection as PID 1 hands it over, with a stand-in and for real."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from mycoswarmd.daemon.clock import SystemClock
from mycoswarmd.engines import llamaproc, upstream
from mycoswarmd.engines.llamacpp import ManagedLlama
from mycoswarmd.engines.modelsdir import ModelFile
from mycoswarmd.errors import CageError, ConfigError, EngineError, MycoswarmError, NotFound
from mycoswarmd.sandbox import engineunit
from mycoswarmd.sandbox.engineunit import EngineUnits
from mycoswarmd.sandbox.process import start_engine
from mycoswarmd.wire.engineunit import ORDER_BYTES, Order, Serving, encode_order
from mycoswarmd.wire.openai import parse_chat
from mycoswarmd.wire.prompt import Prompt
from mycoswarmd.wire.proof import Proof, Unit
from tests.integration.engines import MODEL, MODEL_FILE, WAIT_S, is_alive, ready, until
from tests.integration.engineunits import PROGRAM, Manager, manager
from tests.permits import permit_for

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
# Says what it was given, listens, and does what the model file says.
STAND_IN = """
import json, os, socket, sys, types
class CommonParams:
    def __init__(self):
        self.model, self.cpuparams, self.cpuparams_batch = (types.SimpleNamespace() for _ in range(3))
class Server:
    def __init__(self, params):
        text = open(params.model.path).read()
        if text.startswith("exit"):
            print("x" * 9000, flush=True)
            print("error loading model:", text, flush=True)
            os._exit(7)
        self.listening_address = params.hostnames[0]
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.listening_address)
        listener.listen()
        said = {"model": text, "context": params.n_ctx, "parallel": params.n_parallel,
                "name": params.model_alias,
                "threads": params.cpuparams.n_threads, "embedding": params.embedding, "pid": os.getpid(),
                "environment": sorted(os.environ), "fds": sorted(os.listdir("/proc/self/fd")),
                "session": os.getsid(0), "argv": sys.argv}
        while True:
            connection, _ = listener.accept()
            connection.sendall(json.dumps(said, default=list).encode())
            connection.close()
"""
SERVING = Serving(context_tokens=512, parallel=2, threads=3, is_embedding=True)
ENGINE = "xllamacpp-1"
ORDER = Order(engine=ENGINE, model="a.gguf", serving=SERVING)


@contextmanager
def places() -> Iterator[Path]:
    """Yield a directory as the machine has it, with a stand-in as the engine; short, for the sockets."""
    with tempfile.TemporaryDirectory(prefix="u-") as name:
        top = Path(name)
        (top / "models").mkdir()
        (top / "models" / "a.gguf").write_text("weights")
        (top / "sockets").mkdir()
        package = top / "engine" / ENGINE / "xllamacpp"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(STAND_IN)
        yield top


def arguments(top: Path, *, engines: Path | None = None, models: Path | None = None) -> list[str]:
    said = {"--models": models or top / "models", "--engines": engines or top / "engine"}
    return [str(word) for pair in (said | {"--sockets": top / "sockets"}).items() for word in pair]


@contextmanager
def program(top: Path) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """Start the program on one end of a pair of sockets, and yield the node's end."""
    ours, its = socket.socketpair()
    with ours, its:
        process = subprocess.Popen([*PROGRAM, *arguments(top)], stdin=its.fileno(), env={"LANG": "C.UTF-8"})
        its.close()
        ours.settimeout(WAIT_S)
        try:
            yield ours, process
        finally:
            process.kill()
            process.wait()


def lines_of(sock: socket.socket) -> Generator[dict[str, Any], None, None]:
    with sock.makefile("rb") as file:
        for line in file:
            assert len(line) <= 32 << 10
            yield json.loads(line)


def asked(path: Path) -> dict[str, Any]:
    """Ask the stand-in what it was given."""
    end = time.monotonic() + WAIT_S
    while True:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(WAIT_S)
            try:
                sock.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                assert time.monotonic() < end
                time.sleep(0.01)
                continue
            with sock.makefile("rb") as file:
                said: dict[str, Any] = json.loads(file.read())
                return said


def gone(pid: int) -> bool:
    end = time.monotonic() + WAIT_S
    while is_alive(pid):
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def test_it_proves_starts_and_ends_with_the_connection() -> None:
    with places() as top, program(top) as (node, process):
        said = lines_of(node)
        proof = next(said)["proof"]  # before any order
        assert proof["unit"] == "engine"
        assert {"inet-socket", "seccomp"} <= {check["name"] for check in proof["checks"]}
        node.sendall(encode_order(ORDER))
        started = next(said)["started"]
        assert list(started) == ["pid", "socket"]
        given = asked(top / started["socket"])
        assert given["model"] == "weights"
        assert (given["context"], given["parallel"], given["threads"], given["embedding"]) == (
            512,
            2,
            3,
            True,
        )
        assert given["name"] == ["a"]
        assert given["pid"] == started["pid"] == given["session"]
        assert set(given["environment"]) <= {"PATH", "LANG", "GOMP_SPINCOUNT", "LC_CTYPE"}
        assert len(given["fds"]) == 5  # the three, its listener and the directory: not the node's connection
        node.shutdown(socket.SHUT_WR)
        assert list(said) == []  # it closes as soon as the engine is gone
        assert not is_alive(started["pid"])
        assert process.wait(WAIT_S) == 0
        assert list((top / "sockets").iterdir()) == []


def test_the_engine_is_gone_when_the_node_is_killed() -> None:
    with places() as top, program(top) as (node, process):
        said = lines_of(node)
        next(said)
        node.sendall(encode_order(ORDER))
        pid = next(said)["started"]["pid"]
        said.close()
        node.close()
        assert gone(pid)
        assert process.wait(WAIT_S) == 0


def test_a_word_too_much_ends_the_engine() -> None:
    with places() as top, program(top) as (node, _):
        said = lines_of(node)
        next(said)
        node.sendall(encode_order(ORDER))
        pid = next(said)["started"]["pid"]
        node.sendall(encode_order(ORDER))
        assert gone(pid)
        with pytest.raises(ConnectionResetError):  # the word was not read
            next(said)


def test_an_engine_that_ends_is_told_with_its_last_words() -> None:
    with places() as top, program(top) as (node, process):
        (top / "models" / "a.gguf").write_text("exit: no such tensor")
        said = lines_of(node)
        next(said)
        node.sendall(encode_order(ORDER))
        next(said)
        (end,) = said
        assert end["ended"]["code"] == 7
        assert end["ended"]["log"].endswith("error loading model: exit: no such tensor\n")
        assert len(end["ended"]["log"]) == 4096
        assert process.wait(WAIT_S) == 0


def test_an_engine_that_is_killed_is_told_by_its_signal() -> None:
    with places() as top, program(top) as (node, _):
        said = lines_of(node)
        next(said)
        node.sendall(encode_order(ORDER))
        os.kill(next(said)["started"]["pid"], signal.SIGKILL)
        (end,) = said
        assert end["ended"]["code"] == -9


def link_out(top: Path) -> None:
    (top / "secret").write_text("key")
    (top / "models" / "a.gguf").unlink()
    (top / "models" / "a.gguf").symlink_to(top / "secret")


def link_out_of_directory(top: Path) -> None:
    shutil.copytree(top / "models", top / "elsewhere")
    (top / "models" / "a.gguf").unlink()
    (top / "models" / "d").symlink_to(top / "elsewhere")
    (top / "models" / "a.gguf").symlink_to("d/a.gguf")


def circle(top: Path) -> None:
    (top / "models" / "a.gguf").unlink()
    (top / "models" / "a.gguf").symlink_to("a.gguf")


def pipe(top: Path) -> None:
    (top / "models" / "a.gguf").unlink()
    os.mkfifo(top / "models" / "a.gguf")


def directory(top: Path) -> None:
    (top / "models" / "a.gguf").unlink()
    (top / "models" / "a.gguf").mkdir()


def engine_of_all(top: Path) -> None:
    (top / "engine" / ENGINE / "xllamacpp" / "__init__.py").chmod(0o666)


def engine_of_another(top: Path) -> None:
    os.chown(top / "engine" / ENGINE, 4711, 4711)


def engine_by_link(top: Path) -> None:
    (top / "engine" / ENGINE).rename(top / ENGINE)
    (top / "engine" / ENGINE).symlink_to(top / ENGINE)


@pytest.mark.parametrize(
    ("spoil", "is_models", "words"),
    [
        (link_out, True, "it is a link out of"),
        (link_out_of_directory, True, "it is a link out of"),
        (circle, True, "cannot load the model 'a.gguf': "),
        (pipe, True, "it is no file"),
        (directory, True, "it is no file"),
        (lambda top: (top / "models" / "a.gguf").unlink(), True, "No such file or directory"),
        (engine_of_all, False, "others than root may change '__init__.py'"),
        (engine_of_another, False, f"others than root may change '{ENGINE}'"),
        (engine_by_link, False, "it is a link out of"),
        (lambda top: shutil.rmtree(top / "engine"), False, "No such file or directory"),
        (lambda top: (top / "sockets").rmdir(), False, ""),
    ],
)
def test_what_is_not_where_it_belongs_is_refused(
    spoil: Callable[[Path], object], is_models: bool, words: str
) -> None:
    if spoil is engine_of_another and os.geteuid() != 0:
        pytest.skip("only root gives files away")
    with places() as top, program(top) as (node, process):
        spoil(top)
        said = lines_of(node)
        next(said)
        node.sendall(encode_order(ORDER))
        rest = list(said)
        if words:
            (refused,) = rest
            assert refused["refused"]["model"] is is_models
            assert words in refused["refused"]["text"]
            assert process.wait(WAIT_S) == 1
        else:
            assert "ended" in rest[-1]


def test_links_within_the_models_are_followed() -> None:
    with places() as top, program(top) as (node, _):
        (top / "models" / "b.gguf").symlink_to("a.gguf")
        said = lines_of(node)
        next(said)
        node.sendall(encode_order(Order(engine=ENGINE, model="b.gguf", serving=SERVING)))
        given = asked(top / next(said)["started"]["socket"])
        assert (given["model"], given["name"]) == ("weights", ["b"])


@pytest.mark.parametrize(
    "untrusted",
    [
        b"\n",
        b"{}\n",
        b"null\n",
        encode_order(ORDER) * 2,
        encode_order(ORDER).replace(b'"a.gguf"', b'"../a.gguf"'),
        encode_order(ORDER).replace(b'{"v"', b'{"argv":["--rpc"],"v"'),
        b"x" * ORDER_BYTES,
        b"[" * (ORDER_BYTES - 1) + b"\n",
    ],
)
def test_what_is_no_order_is_refused(untrusted: bytes) -> None:
    with places() as top, program(top) as (node, process):
        said = lines_of(node)
        next(said)
        node.sendall(untrusted)
        (refused,) = said
        assert refused["refused"]["text"].startswith("cannot ")
        assert process.wait(WAIT_S) == 1


# An engine in somebody's hand: it does not want to end with its parent, and tries all ways to stop that.
TAKEN_OVER = """
import ctypes, fcntl, os, signal, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(1, 0)
parent, said = os.getppid(), []
def attempt(name, function):
    try:
        function()
        said.append(name)
    except OSError:
        pass
def call(number, *words):
    if libc.syscall(number, *words) < 0:
        raise OSError(ctypes.get_errno(), "")
attempt("memory", lambda: open(f"/proc/{parent}/mem", "r+b").close() if os.geteuid() else call(-1))
one, other = socket.socketpair()
attempt("setsig", lambda: fcntl.fcntl(one, 10, signal.SIGSTOP))
attempt("pidfd", lambda: signal.pidfd_send_signal(os.pidfd_open(parent), signal.SIGSTOP))
attempt("kill", lambda: os.kill(parent, signal.SIGSTOP))
attempt("group", lambda: os.killpg(os.getpgid(parent), 0) or os.kill(parent, signal.SIGTSTP))
attempt("alive", lambda: os.kill(parent, 0))
print("said", said, file=open(sys.argv[sys.argv.index("--model") + 1], "w"))
time.sleep(3600)
"""
# The program as it was.
STOPPABLE = """
import sys
from mycoswarmd.outposts import engine
engine.forbid_stopping = lambda: True
engine.main(sys.argv[1:])
"""


@pytest.mark.parametrize("is_guarded", [False, True])
def test_an_engine_cannot_stop_who_ends_it(monkeypatch: pytest.MonkeyPatch, is_guarded: bool) -> None:
    if not is_guarded:
        monkeypatch.setitem(globals(), "PROGRAM", [PROGRAM[0], "-c", STOPPABLE])
    with places() as top, program(top) as (node, process):
        (top / "engine" / ENGINE / "xllamacpp" / "__init__.py").write_text(TAKEN_OVER)
        said = lines_of(node)
        next(said)
        node.sendall(encode_order(ORDER))
        pid = next(said)["started"]["pid"]
        try:
            end = time.monotonic() + WAIT_S
            while not (word := (top / "models" / "a.gguf").read_text()).endswith("]\n"):
                assert time.monotonic() < end
                time.sleep(0.01)
            said.close()
            node.close()
            if is_guarded:
                assert word == "said ['alive']\n"
                assert process.wait(WAIT_S) == 0
                assert not is_alive(pid)
            else:  # the attack: it goes on without its node
                assert {"setsig", "pidfd", "kill"} <= set(word.split("'"))
                while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                    assert time.monotonic() < end
                    time.sleep(0.01)
                assert is_alive(pid)
        finally:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)


# --- the node's side -------------------------------------------------------------------------------


def units(top: Path, *, proofs: list[Proof] | None = None) -> EngineUnits:
    return EngineUnits(
        top / "m", sockets=top / "sockets", proved=proofs.append if proofs is not None else None
    )


async def test_the_node_holds_a_unit_and_lets_go_of_it() -> None:
    proofs: list[Proof] = []
    with places() as top:
        async with manager(top / "m", *arguments(top)) as one:
            unit = await units(top, proofs=proofs)(
                engine=ENGINE, model="a.gguf", serving=SERVING, log_path=top / "log"
            )
            given = await asyncio.to_thread(asked, unit.socket_path)
            assert given["pid"] == unit.pid
            assert [proof.unit for proof in proofs] == [Unit.ENGINE]
            assert not unit.confined  # nobody has confined it here, and it says so
            await unit.kill()
            assert not is_alive(unit.pid)
            await unit.kill()
            assert one.programs[0].wait(WAIT_S) == 0


async def test_the_node_hears_how_an_engine_ended() -> None:
    with places() as top:
        (top / "models" / "a.gguf").write_text("exit")
        async with manager(top / "m", *arguments(top)):
            unit = await units(top)(engine=ENGINE, model="a.gguf", serving=SERVING, log_path=top / "log")
            assert await unit.wait() == 7
            assert await unit.wait() == 7
            assert "error loading model: exit" in (top / "log").read_text()
            await unit.kill()


async def test_the_node_tells_a_bad_model_from_a_bad_engine() -> None:
    with places() as top:
        async with manager(top / "m", *arguments(top)):
            with pytest.raises(EngineError, match="No such file"):
                await units(top)(engine=ENGINE, model="b.gguf", serving=SERVING, log_path=top / "log")
            with pytest.raises(ConfigError, match="No such file"):
                await units(top)(engine="xllamacpp-2", model="a.gguf", serving=SERVING, log_path=top / "log")


async def test_a_unit_that_is_not_there_or_ends_is_an_error_that_says_what_to_do() -> None:
    with places() as top:
        with pytest.raises(CageError) as missing:
            await units(top)(engine=ENGINE, model="a.gguf", serving=SERVING, log_path=top / "log")
        assert missing.value.code == "engine-unit"
        assert missing.value.hint == "systemctl enable --now mycoswarm-engine.socket"
        async with manager(top / "m", program=["/bin/true"]):
            with pytest.raises(CageError, match="ended without a word"):
                await units(top)(engine=ENGINE, model="a.gguf", serving=SERVING, log_path=top / "log")


@pytest.mark.parametrize("says", ["hello", '{"started":{"pid":1,"socket":"1/e.sock"}}', "x" * 40_000])
async def test_a_unit_that_says_something_else_is_not_believed(says: str) -> None:
    with places() as top:
        async with manager(top / "m", program=["/bin/sh", "-c", 'echo "$0" >&0; cat >/dev/null', says]):
            with pytest.raises(CageError, match="says something else"):
                await units(top)(engine=ENGINE, model="a.gguf", serving=SERVING, log_path=top / "log")


async def test_a_unit_that_says_nothing_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engineunit, "START_S", 0.2)
    monkeypatch.setattr(engineunit, "END_S", 0.2)
    with places() as top:
        async with manager(top / "m", program=["/bin/sleep", "60"]):
            with pytest.raises(CageError, match="said nothing for"):
                await units(top)(engine=ENGINE, model="a.gguf", serving=SERVING, log_path=top / "log")
            assert "did not end within 0.2 s" in caplog.text  # and somebody may look after it


# Listens in a process that is not the one of which the unit speaks, and answers all that is asked first.
USURPER = """
import http.server, os, socketserver, types
class CommonParams:
    def __init__(self):
        self.model, self.cpuparams, self.cpuparams_batch = (types.SimpleNamespace() for _ in range(3))
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        open(self.server.server_address + ".heard", "a").close()
    def log_message(self, *words): pass
class Server:
    def __init__(self, params):
        if os.fork():
            os.wait()
        socketserver.UnixStreamServer(params.hostnames[0], Healthy).serve_forever()
"""


@pytest.mark.parametrize("is_looked_at", [False, True])
async def test_who_listens_instead_of_the_units_engine_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, is_looked_at: bool
) -> None:
    if not is_looked_at:
        monkeypatch.setattr(upstream._Doorstep, "_look", lambda _self, _sock: None)
    with places() as top:
        (top / "engine" / ENGINE / "xllamacpp" / "__init__.py").write_text(USURPER)
        file = ModelFile(name="a", path=top / "models" / "a.gguf", size_bytes=7, changed_at_ns=0, facts=None)
        options = llamaproc.LlamaOptions(
            engine_dir=top / "engine" / ENGINE,
            runtime_dir=top / "run",
            starter=start_engine,
            units=units(top),
            context_tokens=512,
            parallel=1,
            threads=1,
            patience=upstream.Patience(),
        )
        async with manager(top / "m", *arguments(top)), asyncio.TaskGroup() as group:
            with pytest.raises(MycoswarmError) as caught:
                async with llamaproc.running("e", file, options, group=group, poke=asyncio.Event()):
                    pass
        # Without the look, it is healthy, and fails only where it has no answer to a prompt.
        assert caught.value.code == (upstream.USURPED if is_looked_at else "engine-failed")
        assert bool(list((top / "sockets").glob("*/*.heard"))) is not is_looked_at


# --- for real --------------------------------------------------------------------------------------


@asynccontextmanager
async def served(
    state: Path, *, models: Path | None = None, idle_s: float = 900.0, listening: bool = True
) -> AsyncIterator[tuple[ManagedLlama, Manager | None, Path]]:
    """Run the embedded engine through units, as the appliance does."""
    with places() as top:
        said = arguments(top, engines=state / "engine", models=models or state / "models")
        engine = ManagedLlama(
            name="embedded",
            models_dir=models or state / "models",
            engine_dir=state / "engine",
            runtime_dir=top / "run",
            starter=start_engine,
            units=EngineUnits(top / "m", sockets=top / "sockets"),
            clock=SystemClock(),
            idle_s=idle_s,
        )
        async with asyncio.TaskGroup() as group:
            runner = group.create_task(engine.run(), name="engine")
            try:
                if listening:
                    async with manager(top / "m", *said) as one:
                        try:
                            yield engine, one, top
                        finally:
                            runner.cancel()
                            await asyncio.wait([runner])
                else:
                    yield engine, None, top
            finally:
                runner.cancel()


def chat(text: str, **more: object) -> Prompt:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, **more}
    return parse_chat(json.dumps(body).encode())


@pytest.mark.engine
@pytest.mark.xdist_group("engine")
async def test_the_real_engine_answers_through_its_unit_and_is_started_again(embedded_engine: Path) -> None:
    async with served(embedded_engine) as (engine, one, _):
        assert one is not None
        await ready(engine)
        question = chat("What is the capital of France? Answer in one short sentence.", max_tokens=24)
        answer = await engine.complete(permit_for(MODEL), question)
        assert "Paris" in answer.text
        first = engine.health().pid
        assert first is not None
        assert "not confined" in engine.health().detail
        # The engine is killed, then its unit: each time another one answers.
        os.kill(first, signal.SIGKILL)
        await until(lambda: engine.health().restarts == 1 and engine.health().pid, "it is started again")
        assert (await engine.complete(permit_for(MODEL), chat("Hi", max_tokens=2))).text
        second = engine.health().pid
        assert second not in {None, first}
        one.programs[-1].kill()
        one.programs[-1].wait()
        await until(lambda: engine.health().restarts == 2 and engine.health().pid, "its unit as well")
        assert (await engine.complete(permit_for(MODEL), chat("Hi", max_tokens=2))).text
        third = engine.health().pid
        assert third not in {None, first, second}
        assert second is not None
        assert gone(second)
    assert third is not None
    assert gone(third)


@pytest.mark.engine
@pytest.mark.xdist_group("engine")
async def test_an_idle_unit_ends_and_comes_back(embedded_engine: Path) -> None:
    async with served(embedded_engine, idle_s=0.3) as (engine, one, _):
        assert one is not None
        await ready(engine)
        await until(lambda: one.programs[0].poll() is not None, "the unit ends")
        assert one.programs[0].returncode == 0
        assert (await engine.complete(permit_for(MODEL), chat("Hi", max_tokens=2))).text
        assert len(one.programs) == 2


@pytest.mark.engine
@pytest.mark.xdist_group("engine")
async def test_a_model_elsewhere_is_reported_and_the_others_are_served(
    embedded_engine: Path, tmp_path: Path
) -> None:
    shutil.copyfile(embedded_engine / "models" / MODEL_FILE, tmp_path / MODEL_FILE)
    (tmp_path / "a.gguf").symlink_to(embedded_engine / "models" / MODEL_FILE)  # comes first
    async with served(embedded_engine, models=tmp_path) as (engine, _, _):
        await ready(engine)
        assert [model.name for model in engine.models()] == [MODEL]
        await until(
            lambda: "a.gguf: cannot load the model 'a.gguf': it is a link" in engine.health().detail, ""
        )


@pytest.mark.engine
@pytest.mark.xdist_group("engine")
async def test_without_the_unit_it_says_so_and_goes_on_as_soon_as_it_can(embedded_engine: Path) -> None:
    async with served(embedded_engine, listening=False) as (engine, _, top):
        await until(lambda: engine.health().state == "down", "it is down")
        assert "cannot start the engine: " in engine.health().detail
        with pytest.raises(NotFound):  # it is no model of this node before it has answered
            await engine.complete(permit_for(MODEL), chat("Hi"))
        async with manager(top / "m", program=["/bin/true"]) as broken:
            began_s = time.monotonic()
            await until(lambda: len(broken.programs) >= 3, "it tries again")
            assert time.monotonic() - began_s > 0.7  # and waits longer each time
            await until(lambda: "ended without a word" in engine.health().detail, "it says why")
        (top / "m").unlink()
        said = arguments(top, engines=embedded_engine / "engine", models=embedded_engine / "models")
        async with manager(top / "m", *said) as one:
            await ready(engine)
            assert len(one.programs) == 1
            one.programs[0].kill()
