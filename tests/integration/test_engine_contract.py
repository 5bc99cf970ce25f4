"""What every engine keeps, whichever it is; and M2: a model's name never opens a way out."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mycoswarmd.core.types import Zone
from mycoswarmd.engines.ollama import OllamaEngine
from mycoswarmd.engines.openai_http import OpenAIEngine
from mycoswarmd.errors import LocalProtocolError, NotFound
from mycoswarmd.flow.ports import Engine
from mycoswarmd.wire.openai import parse_chat, parse_embedding
from mycoswarmd.wire.prompt import Finish, PromptKind, TextDelta, Usage
from tests.fakes import OPENAI, FakeServer, listing, ollama_scripts, serving
from tests.integration.engines import MODEL, managed, ready, until
from tests.permits import permit_for

Made = Callable[[Path], AbstractAsyncContextManager[Engine]]
pytestmark = [
    pytest.mark.engine,
    pytest.mark.integration,
    pytest.mark.xdist_group("engine"),
    pytest.mark.timeout(300),
]


@asynccontextmanager
async def beside(engine: Engine) -> AsyncIterator[Engine]:
    async with asyncio.TaskGroup() as group:
        runner = group.create_task(engine.run(), name="engine")
        try:
            await until(engine.models, "it lists its model")
            yield engine
        finally:
            runner.cancel()


@asynccontextmanager
async def openai(_state: Path) -> AsyncIterator[Engine]:
    async with (
        serving({**OPENAI, "/v1/models": listing(MODEL)}) as fake,
        beside(OpenAIEngine("e", fake.address)) as one,
    ):
        yield one


@asynccontextmanager
async def ollama(_state: Path) -> AsyncIterator[Engine]:
    scripts = ollama_scripts({"name": MODEL, "digest": "d"})
    async with serving(scripts) as fake, beside(OllamaEngine("e", fake.address, dict)) as one:
        yield one


@asynccontextmanager
async def embedded(state: Path) -> AsyncIterator[Engine]:
    async with managed(state) as engine:
        await ready(engine)
        yield engine


ENGINES: dict[str, Made] = {"openai": openai, "ollama": ollama, "embedded": embedded}


def chat(model: str = MODEL, **more: Any) -> Any:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, **more}
    return parse_chat(json.dumps({**body, "temperature": 0}).encode())


@pytest.mark.parametrize("name", ENGINES)
async def test_every_engine_keeps_the_contract(name: str, embedded_engine: Path) -> None:
    async with ENGINES[name](embedded_engine) as engine:
        (info,) = engine.models()
        assert (info.name, info.engine, info.zone) == (MODEL, engine.name, Zone.SELF)
        assert PromptKind.CHAT in info.kinds
        assert engine.health().state == "ready"
        assert engine.health().name == engine.name

        answer = await engine.complete(permit_for(MODEL), chat())
        assert answer.text
        assert answer.usage.completion_tokens > 0

        async with aclosing(engine.stream(permit_for(MODEL), chat(stream=True))) as stream:
            deltas = [delta async for delta in stream]
        assert any(isinstance(one, TextDelta) for one in deltas)
        assert [type(one) for one in deltas[-2:]] == [Finish, Usage]
        assert sum(isinstance(one, (Finish, Usage)) for one in deltas) == 2

        for permit in (permit_for("other"), permit_for(MODEL, zone=Zone.LAN)):
            with pytest.raises(LocalProtocolError):
                await engine.complete(permit, chat())
            with pytest.raises(LocalProtocolError):
                await anext(engine.stream(permit, chat(stream=True)))
        with pytest.raises(NotFound) as caught:
            await engine.complete(permit_for("nobody"), chat("nobody"))
        assert caught.value.code == "model-not-found"
        assert engine.health().running == engine.health().waiting == 0


NAMES = (
    "gpt-4o", "gpt-5", "o3-mini", "chatgpt-4o-latest", "claude-sonnet-4-5", "claude-3-opus", "gemini-2.5-pro",
    "gemini/gemini-pro", "qwen-max", "qwen3:480b-cloud", "glm-4.6", "deepseek-chat", "deepseek-reasoner",
    "mistral-large-latest", "grok-4", "command-r-plus", "kimi-k2", "llama-3.3-70b-versatile",
    "openrouter/auto", "https://api.example.com/v1/gpt-4o",
)  # fmt: skip


class Connections:
    """Every address that anything in this process connects to or looks up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[object] = []
        loop = asyncio.get_running_loop()
        real = loop.sock_connect

        async def sock_connect(sock: socket.socket, address: Any) -> None:
            self.found.append(address)
            await real(sock, address)

        async def getaddrinfo(host: Any, port: Any, **_: Any) -> Any:
            self.found.append((host, port))
            raise OSError("no names here")

        monkeypatch.setattr(loop, "sock_connect", sock_connect)
        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)


def declared(engine: Any) -> object:
    """Return where an engine was told to connect to."""
    upstream = engine._upstream if isinstance(engine, OpenAIEngine) else engine._child.upstream
    if upstream._address.socket_path is not None:
        return upstream._address.socket_path
    host, _, port = upstream._address.base_url.removeprefix("http://").rpartition(":")
    return host, int(port)


@pytest.mark.parametrize("name", ENGINES)
async def test_a_vendors_name_opens_no_way_out(
    name: str, embedded_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connections = Connections(monkeypatch)
    async with ENGINES[name](embedded_engine) as engine:
        address = declared(engine)
        for model in NAMES:
            for zone in (Zone.SELF, Zone.LAN, Zone.CLOUD):
                permit = permit_for(model, zone=zone, dest="bigcloud" if zone is Zone.CLOUD else None)
                with pytest.raises(NotFound):
                    await engine.complete(permit, chat(model))
                with pytest.raises(NotFound):
                    await anext(engine.stream(permit, chat(model, stream=True)))
                with pytest.raises(NotFound):
                    await engine.embed(
                        permit, parse_embedding(json.dumps({"model": model, "input": "x"}).encode())
                    )
        assert (await engine.complete(permit_for(MODEL), chat())).text
    assert connections.found  # the guard sees connections at all
    assert set(connections.found) == {address}


async def test_a_listed_vendors_name_is_asked_at_the_declared_address_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connections = Connections(monkeypatch)

    async def check(fake: FakeServer, engine: Engine) -> None:
        async with beside(engine):
            for model in NAMES:
                assert (await engine.complete(permit_for(model), chat(model))).text == "Hello there"
                assert fake.prompts()[-1]["model"] == model

    async with serving({**OPENAI, "/v1/models": listing(*NAMES)}) as fake:
        await check(fake, OpenAIEngine("e", fake.address))
        host, port = fake.address.removeprefix("http://").split(":")
        assert set(connections.found) == {(host, int(port))}
