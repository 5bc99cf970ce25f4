"""The embedded engine for real: llama.cpp in its own process with the small model."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import aclosing
from pathlib import Path

import pytest

from mycoswarmd.engines.llamacpp import ManagedLlama
from mycoswarmd.errors import BadRequest, EngineError, LocalProtocolError, MycoswarmError, NotFound
from mycoswarmd.wire.openai import parse_chat, parse_completion, parse_embedding
from mycoswarmd.wire.prompt import Finish, Prompt, PromptKind, TextDelta, Usage
from tests.integration.engines import MODEL, MODEL_FILE, is_alive, managed, ready, until
from tests.permits import permit_for

pytestmark = [
    pytest.mark.engine,
    pytest.mark.integration,
    pytest.mark.xdist_group("engine"),
    pytest.mark.timeout(300),
]


def chat(text: str, *, model: str = MODEL, **more: object) -> Prompt:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, **more}
    return parse_chat(json.dumps(body).encode())


def pids_of(engine: ManagedLlama) -> list[int]:
    """Return the engine's llama.cpp processes, found by the socket that only they name."""
    wanted = str(engine._runtime_dir).encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if wanted in line and b"llama_child" in line and b"bwrap" not in line.split(b"\0")[0]:
            found.append(int(path.parent.name))
    return found


async def test_it_serves_the_model_that_is_there(embedded_engine: Path) -> None:
    async with managed(embedded_engine) as engine:
        assert engine.models() == []
        await ready(engine)
        (info,) = engine.models()
        assert info.name == MODEL
        assert info.kinds == {PromptKind.CHAT, PromptKind.TEXT}
        assert info.context_tokens == 4096
        assert info.loaded
        assert not info.native_tools
        health = engine.health()
        assert (health.state, health.restarts) == ("ready", 0)
        assert health.pid is not None

        answer = await engine.complete(
            permit_for(MODEL),
            chat("What is the capital of France? Answer in one short sentence.", max_tokens=24),
        )
        assert "Paris" in answer.text
        assert answer.usage.prompt_tokens > 5
        assert answer.usage.completion_tokens > 0

        prompt = chat("Count to five.", stream=True, max_tokens=30)
        async with aclosing(engine.stream(permit_for(MODEL), prompt)) as stream:
            deltas = [delta async for delta in stream]
        assert len([one for one in deltas if isinstance(one, TextDelta)]) > 3
        assert isinstance(deltas[-2], Finish)
        assert isinstance(deltas[-1], Usage)
        assert deltas[-1].completion_tokens > 3

        body = {"model": MODEL, "prompt": "One, two,", "max_tokens": 6, "temperature": 0}
        text = parse_completion(json.dumps(body).encode())
        assert (await engine.complete(permit_for(MODEL), text)).text

        with pytest.raises(BadRequest) as too_long:
            await engine.complete(permit_for(MODEL), chat("word " * 6000))
        assert too_long.value.code == "context-too-long"
        assert "4096" in too_long.value.message
        assert "word word" not in str(too_long.value)

        with pytest.raises(NotFound) as no_embeddings:
            await engine.embed(
                permit_for(MODEL), parse_embedding(json.dumps({"model": MODEL, "input": "x"}).encode())
            )
        assert no_embeddings.value.code == "model-not-found"
        with pytest.raises(NotFound):
            await engine.complete(permit_for("gpt-4o"), chat("hi", model="gpt-4o"))
        with pytest.raises(LocalProtocolError):
            await engine.complete(permit_for("other"), chat("hi"))
        pids = pids_of(engine)
        assert pids
    assert not any(is_alive(pid) for pid in pids)


async def test_closing_a_stream_stops_the_engines_work(embedded_engine: Path) -> None:
    async with managed(embedded_engine) as engine:
        await ready(engine)
        prompt = chat("Write a very long story.", stream=True, max_tokens=3000)
        async with aclosing(engine.stream(permit_for(MODEL), prompt)) as stream:
            await anext(stream)
        assert engine.health().running == 0
        assert await falls_quiet(engine)

        task = asyncio.ensure_future(
            engine.complete(permit_for(MODEL), chat("Write a very long story.", max_tokens=3000))
        )
        await until(lambda: engine.health().running == 1, "it works")
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.health().running == 0
        assert await falls_quiet(engine)


async def falls_quiet(engine: ManagedLlama) -> bool:
    """Tell whether the engine stops long before 3,000 tokens could be done, which take half a minute."""
    for _ in range(12):
        if await cpu_s(engine) < 0.5:
            return True
    return False


async def cpu_s(engine: ManagedLlama) -> float:
    """Measure what the engine uses within a second, after a moment to notice."""
    await asyncio.sleep(0.5)

    def used() -> int:
        ticks = 0
        for pid in pids_of(engine):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks

    before = used()
    await asyncio.sleep(1)
    return (used() - before) / os.sysconf("SC_CLK_TCK")


async def answer_while_killing(engine: ManagedLlama, pids: list[int]) -> None:
    async with aclosing(engine.stream(permit_for(MODEL), chat("Tell a story.", max_tokens=3000))) as stream:
        await anext(stream)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        async for _ in stream:
            pass


async def test_a_killed_child_is_started_again(embedded_engine: Path) -> None:
    async with managed(embedded_engine) as engine:
        await ready(engine)
        first = pids_of(engine)
        with pytest.raises(EngineError):
            await answer_while_killing(engine, first)
        await until(lambda: engine.health().restarts == 1, "restart")
        answer = await engine.complete(permit_for(MODEL), chat("Hi", max_tokens=4))
        assert answer.text
        assert not set(first) & set(pids_of(engine))
        assert engine.health().state == "ready"


async def test_a_dropped_file_is_served_and_a_bad_one_is_reported(
    embedded_engine: Path, tmp_path: Path
) -> None:
    good = embedded_engine / "models" / MODEL_FILE
    async with managed(embedded_engine, models=tmp_path) as engine:
        await until(lambda: "no model" in engine.health().detail, "it says that there is none")
        (tmp_path / "text.gguf").write_text("not a model")
        (tmp_path / "half.gguf").write_bytes(good.read_bytes()[:40_000_000])
        (tmp_path / "first.gguf").symlink_to(good)
        await ready(engine, "first")
        await until(lambda: "half.gguf" in engine.health().detail, "the half file is reported")
        detail = engine.health().detail
        assert "text.gguf: cannot use the model file: it is not a GGUF file" in detail
        assert "not within the file bounds" in detail
        assert [one.name for one in engine.models()] == ["first"]

        shutil.copyfile(good, tmp_path / "half.gguf")  # the copy is now complete
        await ready(engine, "half")
        # Both are served in turn, by one child.
        for name in ("first", "half", "first"):
            answer = await engine.complete(permit_for(name), chat("Hi", model=name, max_tokens=4))
            assert answer.text
            assert [one.name for one in engine.models() if one.loaded] == [name]
            assert len(pids_of(engine)) == 1
        together = await asyncio.gather(
            *(
                engine.complete(permit_for(name), chat("Hi", model=name, max_tokens=4))
                for name in ("first", "half") * 3
            )
        )
        assert all(one.text for one in together)

        (tmp_path / "half.gguf").unlink()
        await until(lambda: [one.name for one in engine.models()] == ["first"], "it is gone")


async def test_an_idle_engine_is_stopped_and_comes_back(embedded_engine: Path) -> None:
    async with managed(embedded_engine, idle_s=0.3) as engine:
        await ready(engine)
        await until(lambda: not pids_of(engine), "it stops")
        (info,) = engine.models()
        assert not info.loaded
        assert (await engine.complete(permit_for(MODEL), chat("Hi", max_tokens=4))).text


async def test_without_an_installed_engine_it_says_so(tmp_path: Path, embedded_engine: Path) -> None:
    (tmp_path / "models").symlink_to(embedded_engine / "models")
    async with managed(tmp_path) as engine:
        await until(lambda: engine.health().state == "down", "it is down")
        assert "mycoswarmctl engine install" in engine.health().detail
        with pytest.raises(MycoswarmError):
            await engine.complete(permit_for(MODEL), chat("Hi"))
        (tmp_path / "engine").symlink_to(embedded_engine / "engine")
        await ready(engine)


PARENT = """
import asyncio, sys, tempfile
from pathlib import Path
from tests.integration.engines import managed, ready
async def main():
    async with managed(Path(sys.argv[1])) as engine:
        await ready(engine)
        print(engine._runtime_dir, flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


def test_a_killed_parent_takes_its_engine_with_it(embedded_engine: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(embedded_engine)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": tempfile.gettempdir()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as parent:
        assert parent.stdout is not None
        runtime = parent.stdout.readline().strip()
        try:
            pids = [
                int(path.parent.name)
                for path in Path("/proc").glob("[0-9]*/cmdline")
                if runtime.encode() in _cmdline(path) and path.parent.name != str(parent.pid)
            ]
            assert pids
        finally:
            parent.kill()
    end = time.monotonic() + 60
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < end, "the engine has outlived its node"
        time.sleep(0.02)
    shutil.rmtree(runtime, ignore_errors=True)


def _cmdline(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
