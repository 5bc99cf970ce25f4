"""The other nodes of the swarm as engines: prompts go there in the OpenAI dialect, over proved connections.

Laws:

1. What a member serves is what its latest word says; a member that is not reachable now serves nothing.
2. A prompt goes to the one node that its permit names, and its label always goes with it: that node decides
   for itself, and a label that it does not know is its highest.
3. What a member answers is as untrusted as any engine's. Of a refusal only a code, a rule's id and the id of
   a receipt are repeated, never its text.

Source: docs/wire.md.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial

import aiohttp

from mycoswarmd.core.policy.evaluate import Permit
from mycoswarmd.core.types import Zone
from mycoswarmd.engines.checks import check_permit, find_model
from mycoswarmd.engines.peeranswer import Said, parse_said
from mycoswarmd.engines.peerhttp import MemberClient
from mycoswarmd.engines.peerline import leave
from mycoswarmd.engines.slots import Slots
from mycoswarmd.engines.upstream import Exchange, Patience
from mycoswarmd.errors import (
    BadRequest,
    Denied,
    EngineError,
    LocalProtocolError,
    MycoswarmError,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from mycoswarmd.flow.ports import EngineHealth, ModelInfo
from mycoswarmd.flow.swarmports import PeerClient, PeerState, Reach
from mycoswarmd.wire.peer import Word
from mycoswarmd.wire.prompt import Answer, Delta, Embeddings, Prompt, Via

LABEL_HEADER = "X-Mycoswarm-Label"
_LABEL_CHARS = 64
# Each holds a connection and a prompt; the member has its own, narrower bounds.
_AT_ONCE = 32
_RETRY_AFTER_CHARS = 4
_MAX_RETRY_AFTER_S = 600


class PeerEngine:
    """One member. Its lifetime is the fleet's business: `run` does nothing."""

    kind = "peer"

    def __init__(
        self, state: PeerState, client: Callable[[], PeerClient | None], *, patience: Patience | None = None
    ) -> None:
        self._client = client
        self._patience = patience
        self._slots = Slots(f"peer:{state.member.name}", limit=_AT_ONCE)
        self._member_name = ""
        self._word: Word | None = None
        self._models: tuple[ModelInfo, ...] = ()
        self.show(state)

    def show(self, state: PeerState) -> None:
        """Take in what is known of the member now."""
        is_news = state.member.name != self._member_name
        self._member_name = state.member.name
        self._name = f"peer:{state.member.name}"
        self._state = state
        if state.word is not None and state.word is not self._word:
            # The last word is kept: what an unreachable member served is worth telling.
            self._word, is_news = state.word, True
        if is_news:
            self._models = self._infos(self._word)

    def _infos(self, word: Word | None) -> tuple[ModelInfo, ...]:
        if word is None:
            return ()
        return tuple(
            ModelInfo(
                name=model.name,
                engine=self._name,
                zone=Zone.LAN,
                kinds=model.kinds,
                context_tokens=model.context_tokens,
                native_tools=model.native_tools,
                loaded=model.loaded,
                size_bytes=model.size_bytes,
                node=self._member_name,
                tier=word.tier,
            )
            for model in word.models
        )

    @property
    def name(self) -> str:
        """The engine's name in receipts and explanations: `peer:` and the member's."""
        return self._name

    def models(self) -> Sequence[ModelInfo]:
        """Return what the member says it serves, while it is reachable."""
        return self._models if self._state.state is Reach.READY else ()

    def health(self) -> EngineHealth:
        """Return how the member is, from here."""
        is_ready = self._state.state is Reach.READY
        running = self._slots.running
        if self._word is not None:
            running += self._word.running
        return EngineHealth(
            name=self._name,
            kind=self.kind,
            state="ready" if is_ready else "down",
            detail=self._state.detail,
            models=len(self.models()),
            running=running,
            waiting=self._slots.waiting + (self._word.waiting if self._word is not None else 0),
            node=self._member_name,
            absent=() if is_ready else tuple(info.name for info in self._models),
        )

    async def run(self) -> None:
        """Wait to be cancelled; the fleet keeps the connection."""
        await asyncio.Event().wait()

    async def stream(self, permit: Permit, prompt: Prompt) -> AsyncGenerator[Delta | Via, None]:
        """Yield Via and then the answer piece by piece; closing it stops the other node's work."""
        async with (
            self._admitted(permit, prompt) as crossing,
            aclosing(crossing.stream(prompt, native_tools=True)) as deltas,
        ):
            is_first = True
            async for delta in deltas:
                if is_first:
                    is_first = False
                    yield crossing.via
                yield delta

    async def complete(self, permit: Permit, prompt: Prompt) -> Answer:
        """Return the whole answer; cancelling stops the other node's work."""
        async with self._admitted(permit, prompt) as crossing:
            return replace(await crossing.complete(prompt, native_tools=True), via=crossing.via)

    async def embed(self, permit: Permit, prompt: Prompt) -> Embeddings:
        """Return one vector for each input."""
        async with self._admitted(permit, prompt) as crossing:
            return replace(await crossing.embed(prompt), via=crossing.via)

    @asynccontextmanager
    async def _admitted(self, permit: Permit, prompt: Prompt) -> AsyncIterator["_Crossing"]:
        """Hold a place for a prompt whose permit covers this member."""
        async with self._slots.taken():
            if self._state.state is not Reach.READY:
                raise _unreachable(self._member_name, self._state.detail)
            check_permit(permit, find_model(self.models(), prompt, engine=self._name))
            client = self._client()
            if not isinstance(client, MemberClient):
                raise _unreachable(self._member_name, "there is no connection to it")
            yield _Crossing(client, self._member_name, _label(permit), patience=self._patience)


class _Crossing(Exchange):
    """One prompt on its way to a member.

    Attributes:
        via: which node answers, and its receipt; known once its answer has begun.
    """

    def __init__(
        self, client: MemberClient, node: str, label: str, *, patience: Patience | None = None
    ) -> None:
        super().__init__(f"peer:{node}", patience=patience)
        self._client = client
        self._node = node
        self._label = label
        self.via = Via(node, "")

    async def _send(self, path: str, body: bytes | None) -> aiohttp.ClientResponse:
        method = "GET" if body is None else "POST"
        response = await self._client.send(method, path, body, {LABEL_HEADER: self._label})
        self.via = Via(self._node, parse_said(b"", response.headers).receipt)
        return response

    def _leave(self, response: aiohttp.ClientResponse) -> None:
        leave(response)

    def _refusal(self, response: aiohttp.ClientResponse, untrusted: bytes, prompt: Prompt) -> MycoswarmError:
        said = parse_said(untrusted, response.headers)
        node, status = self._node, response.status
        cause = f" ({said.code})" if said.code else ""
        match status:
            case 401:
                return Unauthenticated(
                    "peer-refuses-us",
                    f"cannot ask node {node!r}: it does not accept this node's key",
                    hint="was this node put out of the swarm, or has that one not heard of it yet?",
                )
            case 403:
                return _denied(node, said)
            case 404:
                return NotFound(
                    "model-not-found",
                    f"cannot find model {prompt.model[:80]!r}: node {node!r} does not serve it any more",
                )
            case 429 | 503:
                retry_after = response.headers.get("Retry-After", "")[:_RETRY_AFTER_CHARS]
                return Unavailable(
                    "peer-busy",
                    f"cannot answer now: node {node!r} says not now{cause}",
                    retry_after_s=min(int(retry_after), _MAX_RETRY_AFTER_S) if retry_after.isdecimal() else 2,
                )
            case _ if said.code == "context-too-long":
                return BadRequest(
                    "context-too-long",
                    f"cannot answer: the prompt is too long for the model at node {node!r}",
                    hint="shorten the conversation, or ask a model with a longer context",
                    where="messages",
                )
            case _ if 400 <= status < 500:
                return BadRequest(
                    "bad-request",
                    f"cannot answer: node {node!r} refuses the request with status {status}{cause}",
                    hint="the model or its engine there does not support something in the request",
                )
            case _:
                return self._failed(f"it answers with status {status}{cause}")

    def _failed(self, cause: str) -> EngineError:
        return EngineError("peer-failed", f"cannot get an answer from node {self._node!r}: {cause}")


class PeerEngines:
    """The members of the swarm that compute, each as an engine."""

    def __init__(
        self,
        states: Callable[[], Sequence[PeerState]],
        client: Callable[[str], PeerClient | None],
        *,
        version: Callable[[], int] | None = None,
        patience: Patience | None = None,
    ) -> None:
        """`version` changes with every change of a state; without it, all are looked at each time."""
        self._states = states
        self._client = client
        self._version = version
        self._patience = patience
        self._by_id: dict[str, PeerEngine] = {}
        self._seen = -1

    def __call__(self) -> list[PeerEngine]:
        """Return the members of this moment, by name."""
        version = self._version() if self._version is not None else -1
        if version == self._seen != -1:
            return list(self._by_id.values())
        self._seen = version
        states = sorted(self._states(), key=lambda state: state.member.name)
        known = {}
        for state in states:
            node_id = state.member.id
            engine = self._by_id.get(node_id)
            if engine is None:
                engine = PeerEngine(state, partial(self._client, node_id), patience=self._patience)
            else:
                engine.show(state)
            known[node_id] = engine
        self._by_id = known  # one that was put out is forgotten; what it still answers ends by itself
        return list(known.values())


def _label(permit: Permit) -> str:
    """Return the label that goes with the prompt; none at all would be a bug of ours."""
    label = permit.request.label
    if label is None:
        raise LocalProtocolError("no-label", "cannot send a prompt to another node without its label")
    if not 0 < len(label) <= _LABEL_CHARS or not label.isprintable():
        raise BadRequest("bad-label", "cannot send this label to another node: it is not one short word")
    return label


def _denied(node: str, said: Said) -> Denied:
    by = f" by its rule {said.rule!r}" if said.rule else ""
    receipt = f", receipt {said.receipt} there" if said.receipt else ""
    show = f"on {node}: mycoswarmctl audit show {said.receipt}" if said.receipt else ""
    return Denied(
        "peer-denied",
        f"cannot answer: node {node!r} denies it{by}{receipt}",
        hint=show or "its owner decides what it accepts from other nodes",
        rule=f"{node}:{said.rule}" if said.rule else "",
    )


def _unreachable(node: str, cause: str) -> Unavailable:
    return Unavailable(
        "peer-unreachable",
        f"cannot reach node {node!r}{f': {cause}' if cause else ''}",
        hint="mycoswarmctl nodes says why",
        retry_after_s=2,
    )
