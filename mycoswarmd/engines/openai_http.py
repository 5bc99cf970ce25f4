"""Any OpenAI-compatible server on this machine: llama.cpp's, vLLM, LM Studio and others.

Rule (M1, M2): it is asked at its one declared local address and nowhere else; whether it serves a
model is what its own list says, never what the name looks like. An Ollama server is refused here:
some of its models are elsewhere, which only OllamaEngine finds out.
Source: the OpenAI API reference; llama.cpp tools/server/README.md for /props.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

from mycoswarmd.core.policy.evaluate import Permit
from mycoswarmd.core.types import Zone
from mycoswarmd.engines.address import parse_address
from mycoswarmd.engines.checks import check_permit, find_model
from mycoswarmd.engines.slots import Slots
from mycoswarmd.engines.upstream import Patience, Upstream
from mycoswarmd.errors import ConfigError, MycoswarmError
from mycoswarmd.flow.ports import Dial, EngineHealth, ModelInfo
from mycoswarmd.wire.ollama import is_version
from mycoswarmd.wire.prompt import Answer, Delta, Embeddings, Prompt, PromptKind
from mycoswarmd.wire.upstream import Props, parse_error, parse_models, parse_props

# A model that was just pulled appears this soon; the question costs an engine nothing.
REFRESH_S = 10.0
_ALL_KINDS = frozenset(PromptKind)


class OpenAIEngine:
    """An engine that speaks the OpenAI dialect. `run` is its lifetime: before and after, it is down."""

    kind = "openai"

    def __init__(
        self,
        name: str,
        url: str,
        *,
        native_tools: bool | None = None,
        concurrency: int = 4,
        patience: Patience | None = None,
        refresh_s: float = REFRESH_S,
        dial: Dial | None = None,
    ) -> None:
        self._name = name
        self._upstream = Upstream(name, parse_address(url, engine=name), patience=patience, dial=dial)
        self._slots = Slots(name, limit=concurrency)
        self._native_tools = native_tools
        self._refresh_s = refresh_s
        self._models: tuple[ModelInfo, ...] = ()
        self._state = "starting"
        self._detail = ""

    @property
    def name(self) -> str:
        """The engine's name in settings and status."""
        return self._name

    def models(self) -> Sequence[ModelInfo]:
        """Return what its list said last."""
        return self._models

    def health(self) -> EngineHealth:
        """Return the engine's state."""
        return EngineHealth(
            name=self._name,
            kind=self.kind,
            state=self._state,
            detail=self._detail,
            models=len(self._models),
            running=self._slots.running,
            waiting=self._slots.waiting,
        )

    async def run(self) -> None:
        """Ask for its list of models again and again until cancelled."""
        async with self._upstream.opened():
            try:
                while True:
                    await self.refresh()
                    await asyncio.sleep(self._refresh_s)
            finally:
                self._models = ()
                self._state = "stopped"

    async def refresh(self) -> None:
        """Ask once for its list of models; an engine that is down serves none."""
        try:
            self._models = await self._fetch_models()
        except MycoswarmError as exc:
            self._models = ()
            self._state, self._detail = "down", exc.message
        else:
            self._state, self._detail = "ready", "" if self._models else "it lists no model"

    async def _fetch_models(self) -> tuple[ModelInfo, ...]:
        if await self._is_ollama():
            raise ConfigError(
                "engine-kind", f'cannot use engine {self._name!r}: this is Ollama: set kind = "ollama"'
            )
        status, untrusted = await self._upstream.fetch("/v1/models")
        if status != 200:
            raise parse_error(status, untrusted, engine=self._name)
        listed = parse_models(untrusted)
        props = await self._fetch_props() if len(listed) == 1 else None
        native = self._native_tools
        if native is None:
            native = props is not None and props.supports_tools
        return tuple(
            ModelInfo(
                name=one.name,
                engine=self._name,
                zone=Zone.SELF,
                kinds=_ALL_KINDS,
                context_tokens=props.context_tokens if props and props.context_tokens else one.context_tokens,
                native_tools=native,
                loaded=True,
                size_bytes=one.size_bytes,
            )
            for one in listed
        )

    async def _is_ollama(self) -> bool:
        """Tell an Ollama server, which passes prompts for some of its models on to a cloud.

        Its own list says for which; the one at /v1/models does not.
        """
        status, untrusted = await self._upstream.fetch("/api/version")
        if status != 200 or not is_version(untrusted):
            return False
        status, _ = await self._upstream.fetch("/api/tags")
        return status != 404

    async def _fetch_props(self) -> Props | None:
        """Ask what only llama.cpp's server tells, of the one model it serves."""
        status, untrusted = await self._upstream.fetch("/props")
        return parse_props(untrusted) if status == 200 else None

    @asynccontextmanager
    async def _admitted(self, permit: Permit, prompt: Prompt) -> AsyncIterator[ModelInfo]:
        """Hold a place for a prompt whose permit covers where this engine would send it."""
        async with self._slots.taken():
            if self._state != "ready":  # since the prompt was placed: the model may be back with the engine
                raise self._upstream.down(f"it is {self._state}")
            info = await self._locate(prompt)
            check_permit(permit, info)
            yield info

    async def _locate(self, prompt: Prompt) -> ModelInfo:
        return find_model(self._models, prompt, engine=self._name)

    async def stream(self, permit: Permit, prompt: Prompt) -> AsyncGenerator[Delta, None]:
        """Yield the answer piece by piece; closing it stops the engine's work."""
        async with (
            self._admitted(permit, prompt) as info,
            aclosing(self._upstream.stream(prompt, native_tools=info.native_tools)) as deltas,
        ):
            async for delta in deltas:
                yield delta

    async def complete(self, permit: Permit, prompt: Prompt) -> Answer:
        """Return the whole answer; cancelling stops the engine's work."""
        async with self._admitted(permit, prompt) as info:
            return await self._upstream.complete(prompt, native_tools=info.native_tools)

    async def embed(self, permit: Permit, prompt: Prompt) -> Embeddings:
        """Return one vector for each input."""
        async with self._admitted(permit, prompt):
            return await self._upstream.embed(prompt)
