"""OpenAIEngine against real local servers that behave in every way a server can."""

import asyncio
import gc
import json
import tempfile
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from mycoswarmd.core.types import Zone
from mycoswarmd.engines.openai_http import OpenAIEngine
from mycoswarmd.engines.upstream import Patience
from mycoswarmd.errors import (
    BadRequest,
    EngineError,
    LocalProtocolError,
    MycoswarmError,
    NotFound,
    Unavailable,
)
from mycoswarmd.wire.openai import parse_completion, parse_embedding
from mycoswarmd.wire.prompt import Finish, PromptKind, TextDelta, ToolCallDelta, Usage
from tests.fakes import (
    OPENAI,
    FakeServer,
    Script,
    Turn,
    chat_ok,
    chunk,
    listing,
    ollama_scripts,
    serving,
)
from tests.integration.neighbours import dead_port
from tests.permits import permit_for
from tests.unit.engines.running import PATIENT, QUICK, chat, deltas_of, running, until

CHAT = "/v1/chat/completions"
WHOLE = [TextDelta("Hello"), TextDelta(" there"), Finish("stop"), Usage(3, 2, 1)]


def engine_for(fake: FakeServer, *, patience: Patience = PATIENT, concurrency: int = 4) -> OpenAIEngine:
    return OpenAIEngine("e", fake.address, patience=patience, concurrency=concurrency, refresh_s=30)


async def test_prompts_of_every_kind_are_answered() -> None:
    async with serving(OPENAI) as fake, running(engine_for(fake)) as engine:
        (info,) = engine.models()
        assert (info.name, info.engine, info.zone, info.dest) == ("small", "e", Zone.SELF, None)
        permit = permit_for("small")
        answer = await engine.complete(permit, chat())
        assert (answer.text, answer.usage) == ("Hello there", Usage(3, 2, 1))
        assert await deltas_of(engine, chat(stream=True)) == WHOLE
        text = parse_completion(b'{"model": "small", "prompt": "x"}')
        assert (await engine.complete(permit, text)).text == "Hello there"
        assert (await deltas_of(engine, text))[0] == TextDelta("Hello there")
        vectors = await engine.embed(permit, parse_embedding(b'{"model": "small", "input": ["a", "b"]}'))
        assert vectors.vectors == ((0.0, 0.5), (1.0, 0.5))
        assert fake.connections == 1  # one connection, used again and again
        assert engine.health().state == "ready"
        assert engine.health().running == 0
        sent = fake.turns[-1].headers
        assert sent["accept-encoding"] == "identity"
        assert "cookie" not in sent


async def test_a_unix_socket_serves_too() -> None:
    with tempfile.TemporaryDirectory() as directory:
        async with serving(OPENAI, socket=Path(directory) / "s") as fake, running(engine_for(fake)) as engine:
            assert await deltas_of(engine, chat(stream=True)) == WHOLE


async def test_a_big_prompt_is_sent() -> None:
    async with serving(OPENAI) as fake, running(engine_for(fake)) as engine:
        big = chat(messages=[{"role": "user", "content": "x" * 3_000_000}])
        assert (await engine.complete(permit_for("small"), big)).text == "Hello there"
        assert len(fake.turns[-1].body) > 3_000_000


async def test_a_server_that_cannot_stream_is_answered_in_one_piece() -> None:
    async def no_stream(turn: Turn) -> None:
        await turn.answer({"choices": [{"message": {"content": "all"}, "finish_reason": "stop"}]})

    async with serving({**OPENAI, CHAT: no_stream}) as fake, running(engine_for(fake)) as engine:
        assert await deltas_of(engine, chat(stream=True)) == [TextDelta("all"), Finish("stop"), Usage(0, 0)]


async def test_a_stream_without_a_reason_still_ends_with_one() -> None:
    async def bare(turn: Turn) -> None:
        await turn.begin()
        await turn.event(chunk("a"))
        await turn.event(b"[DONE]")
        await turn.end()

    async with serving({**OPENAI, CHAT: bare}) as fake, running(engine_for(fake)) as engine:
        assert await deltas_of(engine, chat(stream=True)) == [TextDelta("a"), Finish("stop"), Usage(0, 0)]


async def silent(turn: Turn) -> None:
    await asyncio.sleep(30)


async def half_silent(turn: Turn) -> None:
    await turn.begin()
    await turn.event(chunk("Hello"))
    await asyncio.sleep(30)


async def dies(turn: Turn) -> None:
    turn.cut()


async def dies_in_the_middle(turn: Turn) -> None:
    await turn.begin()
    await turn.event(chunk("Hello"))
    turn.cut()


async def ends_early(turn: Turn) -> None:
    await turn.begin()
    await turn.event(chunk("Hello"))
    await turn.end()


async def no_http(turn: Turn) -> None:
    await turn.write(b"\x00\xff SSH-2.0 hello\r\n\r\n")
    turn.writer.close()


async def long_headers(turn: Turn) -> None:
    await turn.write(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n")


async def redirect(turn: Turn) -> None:
    await turn.write(b"HTTP/1.1 307 X\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n")


def body(data: bytes, *, status: int = 200, kind: str = "application/json") -> Script:
    async def script(turn: Turn) -> None:
        await turn.answer(data, status=status, kind=kind)

    return script


def events(*data: bytes) -> Script:
    async def script(turn: Turn) -> None:
        await turn.begin()
        for one in data:
            await turn.piece(one)
        await asyncio.sleep(30)

    return script


async def bad_chunking(turn: Turn) -> None:
    await turn.begin()
    await turn.event(chunk("Hello"))
    await turn.write(b"zzz\r\nnonsense")
    await asyncio.sleep(30)


FAILING: dict[str, tuple[Script, type[MycoswarmError], str]] = {
    "silent": (silent, EngineError, "engine-failed"),
    "half-silent": (half_silent, EngineError, "engine-failed"),
    "dies": (dies, EngineError, "engine-failed"),
    "dies-in-the-middle": (dies_in_the_middle, EngineError, "engine-failed"),
    "ends-early": (ends_early, EngineError, "engine-failed"),
    "no-http": (no_http, EngineError, "engine-failed"),
    "long-headers": (long_headers, EngineError, "engine-failed"),
    "redirect": (redirect, EngineError, "engine-failed"),
    "html": (body(b"<html>SECRET-MARKER</html>", kind="text/html"), EngineError, "engine-failed"),
    "bad-json": (body(b"{"), EngineError, "engine-failed"),
    "not-utf-8": (body(b'{"choices": "\xff"}'), EngineError, "engine-failed"),
    "bad-event": (events(b"data: {\n\n"), EngineError, "engine-failed"),
    "bad-utf-8-event": (events(b'data: {"a": "\xff"}\n\n'), EngineError, "engine-failed"),
    "huge-line": (events(b"data: " + b"x" * (2 << 20)), EngineError, "engine-failed"),
    "bad-chunking": (bad_chunking, EngineError, "engine-failed"),
    "error-event": (
        events(b'data: {"error": {"message": "SECRET-MARKER"}}\n\n'),
        EngineError,
        "engine-failed",
    ),
    "500": (body(b'{"error": {"message": "SECRET-MARKER"}}', status=500), EngineError, "engine-failed"),
    "503": (body(b'{"error": {"type": "unavailable_error"}}', status=503), Unavailable, "engine-busy"),
    "404": (body(b'{"error": {"message": "no SECRET-MARKER"}}', status=404), NotFound, "model-not-found"),
    "400": (body(b'{"error": {"message": "SECRET-MARKER"}}', status=400), BadRequest, "bad-request"),
    "too-long": (
        body(
            b'{"error": {"type": "exceed_context_size_error", "n_prompt_tokens": 9, "n_ctx": 4}}', status=400
        ),
        BadRequest,
        "context-too-long",
    ),
}


@pytest.mark.parametrize("name", FAILING)
async def test_every_failure_is_one_clear_error(name: str) -> None:
    script, kind, code = FAILING[name]
    # Some never end; of the others each has a code that no time-out has.
    patience = QUICK if code == "engine-failed" else PATIENT
    async with (
        serving({**OPENAI, CHAT: script}) as fake,
        running(engine_for(fake, patience=patience)) as engine,
    ):
        for ask in (
            lambda: engine.complete(permit_for("small"), chat()),
            lambda: deltas_of(engine, chat(stream=True)),
        ):
            with pytest.raises(kind) as caught:
                await ask()
            assert caught.value.code == code
            assert caught.value.message.startswith("cannot")
            assert "SECRET-MARKER" not in str(caught.value)
        assert engine.health().running == 0
        assert engine.health().state == "ready"


async def test_what_came_before_a_death_was_delivered() -> None:
    async with (
        serving({**OPENAI, CHAT: dies_in_the_middle}) as fake,
        running(engine_for(fake)) as engine,
        aclosing(engine.stream(permit_for("small"), chat(stream=True))) as stream,
    ):
        assert await anext(stream) == TextDelta("Hello")
        with pytest.raises(EngineError, match="broke off"):
            await anext(stream)


ANSWER_BYTES = 16 << 20
PARTS = 400_000
TOO_MUCH = {
    "bytes": (CHAT, b" " * (ANSWER_BYTES + 1), f"larger than {ANSWER_BYTES} bytes"),
    "lists": (CHAT, b'{"choices": [' + b"[]," * PARTS + b"{}]}", "too many parts"),
    "objects": (CHAT, b'{"choices": [' + b"{}," * PARTS + b"{}]}", "too many parts"),
    "keys": (CHAT, b"{" + b",".join(b'"%d":0' % n for n in range(PARTS)) + b"}", "too many parts"),
    "depth": (CHAT, b"[" * PARTS, "too many parts"),
    "models": ("/v1/models", b'{"data": [' + b"[]," * PARTS + b"{}]}", "too many parts"),
    "error": (CHAT, b'{"error": [' + b"[]," * PARTS + b"{}]}", "too many parts"),
    "embeddings": ("/v1/embeddings", b" " * ((48 << 20) + 1), f"larger than {48 << 20} bytes"),
}


@pytest.mark.parametrize("name", TOO_MUCH)
async def test_an_answer_that_is_too_much_is_cut_off_and_nothing_stalls(name: str) -> None:
    path, data, message = TOO_MUCH[name]
    script = body(data, status=500 if name == "error" else 200)
    async with serving({**OPENAI, path: script}) as fake, running(engine_for(fake)) as engine:
        if path == "/v1/models":
            assert engine.health().state == "down"
            assert message in engine.health().detail
            return
        permit = permit_for("small")
        vectors = parse_embedding(b'{"model": "small", "input": "x"}')
        asks: list[Callable[[], Awaitable[object]]] = [lambda: engine.embed(permit, vectors)]
        if path == CHAT:
            asks = [
                lambda: engine.complete(permit, chat()),
                lambda: deltas_of(engine, chat(stream=True)),
            ]
        for ask in asks:
            with pytest.raises(EngineError, match=message) as caught:
                await ask()
            assert caught.value.code == "engine-failed"


class CountingThreads(ThreadPoolExecutor):
    """What asyncio.to_thread uses, with a count."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.calls += 1
        return super().submit(fn, *args, **kwargs)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_long_answer_is_read_beside_the_loop(stream: bool) -> None:
    threads = CountingThreads()
    asyncio.get_running_loop().set_default_executor(threads)
    # A long program has many brackets.
    text = "if (a[i]) { b[i] = {}; }\n" * 20_000
    for content, calls in (("short", 0), (text + "x" * (1 << 20), 1)):
        data = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        async with (
            serving({**OPENAI, CHAT: body(data)}) as fake,
            running(engine_for(fake)) as engine,
        ):
            if stream:
                assert TextDelta(content) in await deltas_of(engine, chat(stream=True))
            else:
                assert (await engine.complete(permit_for("small"), chat())).text == content
        assert threads.calls == calls


async def forever(turn: Turn) -> None:
    await turn.begin()
    while not turn.server.left.is_set():
        await turn.event(chunk("more"))
        await asyncio.sleep(0.01)


async def test_closing_a_stream_reaches_the_server() -> None:
    async with serving({**OPENAI, CHAT: forever}) as fake, running(engine_for(fake)) as engine:
        async with aclosing(engine.stream(permit_for("small"), chat(stream=True))) as stream:
            await anext(stream)
            assert engine.health().running == 1
            assert not fake.left.is_set()
        async with asyncio.timeout(60):
            await fake.left.wait()
        assert engine.health().running == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_cancelling_reaches_the_server(stream: bool) -> None:
    async with serving({**OPENAI, CHAT: silent}) as fake:
        engine = engine_for(fake)

        async def ask() -> None:
            if stream:
                await deltas_of(engine, chat(stream=True))
            else:
                await engine.complete(permit_for("small"), chat())

        async with running(engine), asyncio.TaskGroup() as group:
            task = group.create_task(ask())
            await until(lambda: CHAT in fake.paths())
            assert not fake.left.is_set()
            task.cancel()
            async with asyncio.timeout(60):
                await fake.left.wait()
        assert engine.health().running == 0


async def test_stopping_the_engine_ends_its_prompts() -> None:
    async with serving({**OPENAI, CHAT: forever}) as fake, asyncio.TaskGroup() as group:
        engine = engine_for(fake, patience=QUICK)

        async def ask() -> str:
            try:
                await deltas_of(engine, chat(stream=True))
            except (EngineError, Unavailable) as exc:
                return exc.code
            return "ended"

        async with running(engine):
            task = group.create_task(ask())
            await until(lambda: CHAT in fake.paths())
        # In the middle of its answer, or before the first byte on a kept connection.
        assert await task in {"engine-failed", "engine-down"}


async def test_more_prompts_than_places_wait_and_too_many_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = asyncio.Event()

    async def gated(turn: Turn) -> None:
        await gate.wait()
        await chat_ok(turn)

    async with serving({**OPENAI, CHAT: gated}) as fake:
        engine = engine_for(fake, concurrency=1)
        monkeypatch.setattr(engine._slots, "_max_waiting", 1)
        async with running(engine), asyncio.TaskGroup() as group:
            first = group.create_task(engine.complete(permit_for("small"), chat()))
            await until(lambda: engine.health().running == 1)
            second = group.create_task(engine.complete(permit_for("small"), chat()))
            await until(lambda: engine.health().waiting == 1)
            with pytest.raises(Unavailable) as caught:
                await engine.complete(permit_for("small"), chat())
            assert caught.value.code == "engine-busy"
            assert caught.value.retry_after_s > 0
            assert fake.paths().count(CHAT) == 1
            gate.set()
            assert (await first).text == (await second).text == "Hello there"
        assert (engine.health().running, engine.health().waiting) == (0, 0)


async def test_a_prompt_whose_engine_fell_away_while_it_waited_may_come_again() -> None:
    # Not "no such model", which would end a task for good.
    scripts = {**OPENAI, CHAT: forever}
    async with serving(scripts) as fake, running(engine_for(fake, concurrency=1)) as engine:
        async with aclosing(engine.stream(permit_for("small"), chat(stream=True))) as stream:
            await anext(stream)
            waits = asyncio.create_task(engine.complete(permit_for("small"), chat()))
            await until(lambda: engine.health().waiting == 1)
            fake.scripts.clear()
            await engine.refresh()
            assert engine.health().state == "down"
        with pytest.raises(Unavailable) as caught:
            await waits
        assert caught.value.code == "engine-down"


async def test_waiting_for_a_place_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving({**OPENAI, CHAT: forever}) as fake, running(engine_for(fake, concurrency=1)) as engine:
        monkeypatch.setattr(engine._slots, "_wait_s", 0.05)
        async with aclosing(engine.stream(permit_for("small"), chat(stream=True))) as stream:
            await anext(stream)
            with pytest.raises(Unavailable, match="no place became free"):
                await engine.complete(permit_for("small"), chat())


async def test_a_server_that_is_down_serves_nothing_and_comes_back() -> None:
    async with dead_port() as nobody:
        engine = OpenAIEngine("e", f"http://127.0.0.1:{nobody.port}", patience=PATIENT, refresh_s=0.02)
        async with running(engine):
            assert engine.health().state == "down"
            assert "nothing answers" in engine.health().detail
            assert engine.models() == ()
            with pytest.raises(Unavailable, match="it is down"):
                await engine.complete(permit_for("small"), chat())
    with tempfile.TemporaryDirectory() as directory:
        socket = Path(directory) / "s"
        engine = OpenAIEngine("e", f"unix:{socket}", patience=PATIENT, refresh_s=0.02)
        async with running(engine):
            assert engine.health().state == "down"
            async with serving(OPENAI, socket=socket):
                await until(lambda: engine.health().state == "ready")
                assert await deltas_of(engine, chat(stream=True)) == WHOLE
            with pytest.raises(MycoswarmError):
                await engine.complete(permit_for("small"), chat())
            await until(lambda: engine.health().state == "down")


async def test_an_engine_that_does_not_run_refuses() -> None:
    async with serving(OPENAI) as fake:
        engine = engine_for(fake)
        with pytest.raises(MycoswarmError):
            await engine.complete(permit_for("small"), chat())
        async with running(engine):
            pass
        assert engine.health().state == "stopped"
        with pytest.raises(MycoswarmError):
            await engine.complete(permit_for("small"), chat())
        assert CHAT not in fake.paths()


@pytest.mark.parametrize("data", [b"<html>", b"{}", b'{"data": 3}', b'{"data": [{"id": 3}]}'])
async def test_a_garbled_list_of_models_means_down(data: bytes) -> None:
    async with serving({"/v1/models": body(data)}) as fake, running(engine_for(fake)) as engine:
        assert engine.models() == ()
        assert engine.health().state == "down"


async def props(turn: Turn) -> None:
    caps = {"supports_tools": True}
    await turn.answer({"default_generation_settings": {"n_ctx": 777}, "chat_template_caps": caps})


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


async def test_native_tools_are_passed_on_and_others_are_compiled() -> None:
    async def constrained(turn: Turn) -> None:
        assert "tools" not in turn.json
        assert turn.json["response_format"]["type"] == "json_schema"
        text = json.dumps({"tool": "weather", "arguments": {}})
        if not turn.json.get("stream"):
            await turn.answer({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})
            return
        await turn.begin()
        for char in text:
            await turn.event(chunk(char))
        await turn.event(chunk(None, "stop"))
        await turn.event(b"[DONE]")
        await turn.end()

    async with serving({**OPENAI, CHAT: constrained}) as fake, running(engine_for(fake)) as engine:
        answer = await engine.complete(permit_for("small"), chat(tools=TOOLS))
        assert [call.name for call in answer.tool_calls] == ["weather"]
        deltas = await deltas_of(engine, chat(tools=TOOLS, stream=True))
        assert isinstance(deltas[0], ToolCallDelta)
        assert deltas[1:] == [Finish("tool_calls"), Usage(0, 0)]

    async with serving({**OPENAI, "/props": props}) as fake, running(engine_for(fake)) as engine:
        (info,) = engine.models()
        assert (info.native_tools, info.context_tokens) == (True, 777)
        await engine.complete(permit_for("small"), chat(tools=TOOLS))
        assert fake.prompts()[-1]["tools"][0]["function"]["name"] == "weather"


async def test_a_permit_must_cover_the_prompt() -> None:
    async with serving(OPENAI) as fake, running(engine_for(fake)) as engine:
        asks: list[Callable[[], Awaitable[object]]] = []
        for permit in (permit_for("other"), permit_for("small", zone=Zone.LAN)):
            asks += [
                lambda permit=permit: engine.complete(permit, chat()),  # type: ignore[misc]
                lambda permit=permit: engine.embed(
                    permit, parse_embedding(b'{"model": "small", "input": "x"}')
                ),  # type: ignore[misc]
                lambda permit=permit: anext(engine.stream(permit, chat(stream=True))),  # type: ignore[misc]
            ]
        for ask in asks:
            with pytest.raises(LocalProtocolError):
                await ask()
        assert fake.prompts() == []


async def test_a_proxy_in_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(OPENAI) as proxy, serving(OPENAI) as fake:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.address)
        async with running(engine_for(fake)) as engine:
            await engine.complete(permit_for("small"), chat())
        assert proxy.connections == 0


async def test_a_connection_that_ended_in_between_is_not_noticed() -> None:
    async def once(turn: Turn) -> None:
        await chat_ok(turn)
        turn.writer.close()

    async with serving({**OPENAI, CHAT: once}) as fake, running(engine_for(fake)) as engine:
        for _ in range(20):
            assert (await engine.complete(permit_for("small"), chat())).text == "Hello there"
        gc.collect()  # what was left open would warn now
        assert engine.health().state == "ready"


async def test_the_list_is_kept_up_to_date() -> None:
    scripts = dict(OPENAI)
    async with serving(scripts) as fake:
        engine = OpenAIEngine("e", fake.address, patience=PATIENT, refresh_s=0.01)
        async with running(engine):
            assert [one.name for one in engine.models()] == ["small"]
            fake.scripts["/v1/models"] = listing("a", "b")
            await until(lambda: [one.name for one in engine.models()] == ["a", "b"])
            assert engine.models()[0].kinds == frozenset(PromptKind)


CLOUD = {"name": "qwen3:480b-cloud", "digest": "d", "remote_host": "https://ollama.example"}
LOCAL = {"name": "llama3:8b", "digest": "d"}
IS_OLLAMA = 'this is Ollama: set kind = "ollama"'


async def test_an_ollama_server_serves_nothing_here_for_it_may_pass_prompts_on() -> None:
    scripts = {**ollama_scripts(CLOUD, LOCAL), "/v1/models": listing("qwen3:480b-cloud", "llama3:8b")}
    async with serving(scripts) as fake:
        engine = OpenAIEngine("e", fake.address, patience=PATIENT, refresh_s=0.01)
        async with running(engine):
            assert engine.health().state == "down"
            assert IS_OLLAMA in engine.health().detail
            for model in ("qwen3:480b-cloud", "llama3:8b"):
                with pytest.raises(Unavailable):
                    await engine.complete(permit_for(model), chat(model))
                with pytest.raises(Unavailable):
                    await deltas_of(engine, chat(model, stream=True))
            await until(lambda: fake.paths().count("/api/version") >= 2)
            assert engine.models() == ()
        assert fake.prompts() == []


async def test_an_ollama_server_that_takes_the_place_of_another_is_noticed() -> None:
    async with serving(dict(OPENAI)) as fake:
        engine = OpenAIEngine("e", fake.address, patience=PATIENT, refresh_s=0.01)
        async with running(engine):
            assert [one.name for one in engine.models()] == ["small"]
            fake.scripts.update(ollama_scripts(LOCAL))
            await until(lambda: engine.health().state == "down")
            assert engine.models() == ()


@pytest.mark.parametrize(
    "scripts",
    [
        {"/api/version": body(b'{"version": "0.9.0"}')},  # but no list of Ollama's
        {"/api/tags": body(b'{"models": []}')},  # llama.cpp has it for others' sake
        {"/api/version": body(b'{"error": "unexpected"}'), "/api/tags": body(b'{"error": "unexpected"}')},
        {"/api/version": body(b"<html>"), "/api/tags": body(b"<html>")},
    ],
)
async def test_what_is_not_ollama_serves(scripts: dict[str, Script]) -> None:
    async with serving({**OPENAI, **scripts}) as fake, running(engine_for(fake)) as engine:
        assert engine.health().state == "ready"
        assert (await engine.complete(permit_for("small"), chat())).text == "Hello there"
