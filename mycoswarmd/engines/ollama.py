"""Ollama on this machine: its OpenAI endpoints for prompts, its own for the list of models.

Rule (M1, M2): an Ollama server forwards the prompts of some of its models to a cloud. Whether a model is
one of them is what the server's /api/tags and /api/show say (`remote_host`, `remote_model`), asked again
before a prompt unless the answer is known for the very digest; what cannot be told counts as an
undeclared cloud, which no permit covers. A name is never evidence that a model is local.
Source: Ollama docs/api.md; its api.ShowResponse and api.ListModelResponse.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from mycoswarmd.core.types import Zone
from mycoswarmd.engines.checks import find_model
from mycoswarmd.engines.openai_http import REFRESH_S, OpenAIEngine
from mycoswarmd.engines.upstream import Patience
from mycoswarmd.errors import EngineError, MycoswarmError
from mycoswarmd.flow.ports import Dial, ModelInfo
from mycoswarmd.wire.ollama import Shown, Tagged, encode_show, parse_ps, parse_show, parse_tags
from mycoswarmd.wire.prompt import Prompt, PromptKind
from mycoswarmd.wire.upstream import parse_error

# Ollama's own suffix for models that run elsewhere. It can only make us more careful.
CLOUD_SUFFIXES = ("-cloud", ":cloud")
# What a host is called that cannot be told; no declared destination has this name.
UNKNOWN_HOST = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What was learned of one digest."""

    remote_host: str | None  # None: local
    shown: Shown


class OllamaEngine(OpenAIEngine):
    """An Ollama server. `destinations` gives the policy's declared destinations by host."""

    kind = "ollama"

    def __init__(
        self,
        name: str,
        url: str,
        destinations: Callable[[], Mapping[str, str]],
        *,
        concurrency: int = 4,
        patience: Patience | None = None,
        refresh_s: float = REFRESH_S,
        dial: Dial | None = None,
    ) -> None:
        super().__init__(
            name, url, concurrency=concurrency, patience=patience, refresh_s=refresh_s, dial=dial
        )
        self._destinations = destinations
        self._known: dict[tuple[str, str], _Known] = {}  # by name and digest

    async def _fetch_models(self) -> tuple[ModelInfo, ...]:
        tagged = await self._fetch_tags()
        loaded = await self._fetch_loaded()
        known: dict[tuple[str, str], _Known] = {}
        infos = []
        for one in tagged:
            key = (one.name, one.digest)
            fact = self._known.get(key) or await self._learn(one)
            if fact is not None and one.digest:
                known[key] = fact
            infos.append(
                self._info(one, fact, loaded=one.name in loaded, context_tokens=loaded.get(one.name))
            )
        self._known = known
        return tuple(infos)

    async def _fetch_tags(self) -> tuple[Tagged, ...]:
        status, untrusted = await self._upstream.fetch("/api/tags")
        if status != 200:
            raise parse_error(status, untrusted, engine=self._name)
        return parse_tags(untrusted)

    async def _fetch_loaded(self) -> Mapping[str, int | None]:
        """Return the models in memory with the context that each was loaded with."""
        status, untrusted = await self._upstream.fetch("/api/ps")
        return parse_ps(untrusted) if status == 200 else {}

    async def _learn(self, one: Tagged) -> _Known | None:
        """Ask what a model is; None when the answer cannot be had or read."""
        try:
            status, untrusted = await self._upstream.fetch("/api/show", body=encode_show(one.name))
            if status != 200:
                return None
            shown = parse_show(untrusted)
        except MycoswarmError:
            return None
        remote = shown.remote_host if shown.is_remote else one.remote_host if one.is_remote else None
        if remote is None and one.name.endswith(CLOUD_SUFFIXES):
            remote = UNKNOWN_HOST
        return _Known(remote_host=remote, shown=shown)

    def _info(
        self, one: Tagged, fact: _Known | None, *, loaded: bool, context_tokens: int | None
    ) -> ModelInfo:
        remote_host = fact.remote_host if fact is not None else UNKNOWN_HOST
        shown = fact.shown if fact is not None else Shown()
        return ModelInfo(
            name=one.name,
            engine=self._name,
            zone=Zone.SELF if remote_host is None else Zone.CLOUD,
            dest=None if remote_host is None else self._destinations().get(host_of(remote_host)),
            kinds=_kinds(shown),
            context_tokens=context_tokens or shown.context_tokens,
            native_tools="tools" in shown.capabilities,
            loaded=loaded,
            size_bytes=one.size_bytes,
        )

    async def _locate(self, prompt: Prompt) -> ModelInfo:
        """Find a prompt's model and say where it goes *now*: a name can be given to another model."""
        found = find_model(self._models, prompt, engine=self._name)
        current = next((one for one in await self._fetch_tags() if one.name == prompt.model), None)
        if current is None:
            raise EngineError(
                "engine-failed",
                f"cannot ask engine {self._name!r}: model {prompt.model[:80]!r} has just gone",
            )
        key = (current.name, current.digest)
        fact = self._known.get(key) or await self._learn(current)
        if fact is not None and current.digest:
            self._known[key] = fact
        return self._info(current, fact, loaded=found.loaded, context_tokens=found.context_tokens)


def host_of(remote: str) -> str:
    """Return the host of what Ollama calls a remote host: a URL, or a host with or without a port."""
    try:
        return urlsplit(remote if "//" in remote else f"//{remote}").hostname or UNKNOWN_HOST
    except ValueError:
        return UNKNOWN_HOST


def _kinds(shown: Shown) -> frozenset[PromptKind]:
    if not shown.capabilities:
        return frozenset(PromptKind)  # an older server: it says nothing
    kinds = set()
    if "completion" in shown.capabilities:
        kinds |= {PromptKind.CHAT, PromptKind.TEXT}
    if "embedding" in shown.capabilities:
        kinds.add(PromptKind.EMBEDDING)
    return frozenset(kinds)
