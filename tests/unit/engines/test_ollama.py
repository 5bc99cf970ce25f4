"""OllamaEngine: what the server says of a model decides its zone, again before each prompt. M1, M2."""

from typing import Any

import pytest

from mycoswarmd.core.types import Zone
from mycoswarmd.engines.ollama import OllamaEngine, host_of
from mycoswarmd.errors import EngineError, LocalProtocolError, NotFound
from mycoswarmd.wire.prompt import PromptKind
from tests.fakes import FakeServer, Turn, ollama_scripts, serving
from tests.permits import permit_for
from tests.unit.engines.running import PATIENT, chat, deltas_of, running

CHAT = "/v1/chat/completions"
LOCAL = {"name": "llama3:8b", "digest": "d1", "size": 5}


def engine_for(fake: FakeServer, *, refresh_s: float = 30) -> OllamaEngine:
    return OllamaEngine(
        "o", fake.address, lambda: {"ollama.example": "bigcloud"}, patience=PATIENT, refresh_s=refresh_s
    )


async def test_local_models_are_listed_and_asked() -> None:
    async with serving(ollama_scripts(LOCAL)) as fake, running(engine_for(fake)) as engine:
        (info,) = engine.models()
        assert (info.name, info.zone, info.dest) == ("llama3:8b", Zone.SELF, None)
        assert info.kinds == frozenset(PromptKind)
        assert (info.context_tokens, info.loaded, info.native_tools, info.size_bytes) == (2048, True, True, 5)
        answer = await engine.complete(permit_for("llama3:8b"), chat("llama3:8b"))
        assert answer.text == "Hello there"
        assert (await deltas_of(engine, chat("llama3:8b", stream=True)))[0:1]
        assert fake.paths().count("/api/show") == 1  # the digest is known
        assert engine.health().kind == "ollama"


REMOTE: list[tuple[dict[str, Any], dict[str, dict[str, Any]], str | None]] = [
    ({"name": "q", "digest": "d", "remote_host": "https://ollama.example:443"}, {}, "bigcloud"),
    ({"name": "q", "digest": "d"}, {"q": {"remote_host": "https://ollama.example"}}, "bigcloud"),
    ({"name": "q", "digest": "d"}, {"q": {"remote_host": "ollama.example:443"}}, "bigcloud"),
    ({"name": "q", "digest": "d"}, {"q": {"remote_host": "https://other.example"}}, None),
    ({"name": "q", "digest": "d"}, {"q": {"remote_model": "qwen3:480b"}}, None),
    ({"name": "q", "digest": "d", "remote_model": "x"}, {}, None),
    ({"name": "q-cloud", "digest": "d"}, {}, None),
    ({"name": "q:480b-cloud", "digest": "d"}, {}, None),
    ({"name": "q:cloud", "digest": "d"}, {}, None),
    ({"name": "q", "digest": "d"}, {"q": {"error": "broken"}}, None),
    ({"name": "q", "digest": "d"}, {"q": {"remote_host": ["odd"]}}, None),
]


@pytest.mark.parametrize(("row", "shows", "dest"), REMOTE)
async def test_a_remote_model_is_cloud(
    row: dict[str, Any], shows: dict[str, dict[str, Any]], dest: str | None
) -> None:
    name = row["name"]
    async with serving(ollama_scripts(row, shows=shows)) as fake, running(engine_for(fake)) as engine:
        (info,) = engine.models()
        assert (info.zone, info.dest) == (Zone.CLOUD, dest)
        for permit in (permit_for(name), permit_for(name, zone=Zone.LAN)):
            with pytest.raises(LocalProtocolError):
                await engine.complete(permit, chat(name))
        assert fake.prompts() == []
        if dest is not None:
            permit = permit_for(name, zone=Zone.CLOUD, dest=dest)
            assert (await engine.complete(permit, chat(name))).text == "Hello there"


async def test_a_name_that_is_given_to_a_remote_model_later_is_noticed() -> None:
    shows: dict[str, dict[str, Any]] = {}
    row: dict[str, Any] = dict(LOCAL)
    async with serving(ollama_scripts(row, shows=shows)) as fake, running(engine_for(fake)) as engine:
        await engine.complete(permit_for("llama3:8b"), chat("llama3:8b"))
        row["digest"] = "d2"
        shows["llama3:8b"] = {"remote_host": "https://ollama.example"}
        assert engine.models()[0].zone is Zone.SELF  # the list is old
        with pytest.raises(LocalProtocolError):
            await engine.complete(permit_for("llama3:8b"), chat("llama3:8b"))
        assert len(fake.prompts()) == 1


async def test_without_a_digest_every_prompt_asks_again() -> None:
    row = {"name": "q"}
    async with serving(ollama_scripts(row)) as fake, running(engine_for(fake)) as engine:
        for _ in range(2):
            await engine.complete(permit_for("q"), chat("q"))
        assert fake.paths().count("/api/show") == 3


async def test_when_it_cannot_be_told_nothing_is_sent() -> None:
    async def broken(turn: Turn) -> None:
        await turn.answer({"error": "x"}, status=500)

    async with serving(ollama_scripts(LOCAL)) as fake, running(engine_for(fake)) as engine:
        fake.scripts["/api/tags"] = broken
        with pytest.raises(EngineError):
            await engine.complete(permit_for("llama3:8b"), chat("llama3:8b"))
        fake.scripts.update(ollama_scripts())
        with pytest.raises(EngineError, match="just gone"):
            await engine.complete(permit_for("llama3:8b"), chat("llama3:8b"))
        assert fake.prompts() == []


async def test_a_model_that_is_not_listed_is_not_found() -> None:
    async with serving(ollama_scripts(LOCAL)) as fake, running(engine_for(fake)) as engine:
        with pytest.raises(NotFound):
            await engine.complete(permit_for("gpt-4o"), chat("gpt-4o"))
        assert fake.prompts() == []


async def test_an_older_server_says_little() -> None:
    scripts = ollama_scripts(LOCAL, shows={"llama3:8b": {}})
    del scripts["/api/ps"]
    async with serving(scripts) as fake, running(engine_for(fake)) as engine:
        (info,) = engine.models()
        assert (info.kinds, info.native_tools, info.loaded) == (frozenset(PromptKind), False, False)
        assert info.zone is Zone.SELF
        assert (await engine.complete(permit_for("llama3:8b"), chat("llama3:8b"))).text


@pytest.mark.parametrize(
    ("remote", "host"),
    [
        ("https://a.b:443/x", "a.b"),
        ("a.b", "a.b"),
        ("A.B:8", "a.b"),
        ("", ""),
        ("http://[bad", ""),
        ("https://", ""),
    ],
)
def test_hosts(remote: str, host: str) -> None:
    assert host_of(remote) == host
