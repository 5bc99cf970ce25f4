"""What happens to a prompt: facts, decision, receipt, placement, engine, receipt of the outcome.

Law: this is the one choke point. Every prompt, local or not, from a person, a program or an agent,
leaves through `Prompts.route` and nowhere else; engines take the Permit that is made here.
Fail-over happens only before the first byte, and only to places that the same rule allows in the same zone
with the same limits, each under its own Permit. What came from another node is answered on this one or not
at all: there is no third hop. No text of a prompt enters facts, receipts, logs or errors.
"""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from mycoswarmd.core.placement import Candidate, order
from mycoswarmd.core.policy.evaluate import NeedsApproval, Permit, evaluate
from mycoswarmd.core.policy.model import Policy
from mycoswarmd.core.types import (
    UNKNOWN,
    Action,
    Principal,
    Request,
    SandboxLevel,
    Start,
    TaskId,
    Unknown,
    Zone,
)
from mycoswarmd.errors import BadRequest, Denied, MycoswarmError, NotFound, Unauthenticated, Unavailable
from mycoswarmd.flow.approve import ApprovalDesk
from mycoswarmd.flow.ports import Clock, Engine, EngineHealth, ModelInfo, Receipt, ReceiptLog, UsageStore
from mycoswarmd.wire.prompt import Answer, Delta, Embeddings, Prompt, Usage, Via

log = logging.getLogger(__name__)

Whole = TypeVar("Whole", Answer, Embeddings)

# Bound on what is remembered of a name that nobody serves, for messages.
_NAME_SHOWN = 80
_PEER = "peer"
_NOT_UP = frozenset({"starting", "down", "stopped"})
_DAY_S = 86_400
_MINUTE_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Speaker:
    """On whose behalf a prompt is asked, as far as it is not in the prompt."""

    principal: Principal
    start: Start = Start.LOCAL
    label: str | None = None
    tainted: bool = False
    task_id: TaskId | None = None


@dataclass(frozen=True, slots=True)
class Why:
    """What the policy said about one place where a prompt could go."""

    candidate: Candidate
    outcome: Permit | Denied | NeedsApproval


@dataclass(frozen=True, slots=True)
class Absent:
    """A place that cannot be weighed for a prompt, and why."""

    node: str | None
    engine: str
    why: str


@dataclass(frozen=True, slots=True)
class Place:
    """An engine that may get the prompt, and the permit for exactly that."""

    engine: Engine
    permit: Permit


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What this node says about itself."""

    name: str
    tier: str | None = None
    tags: frozenset[str] = frozenset()
    sandbox: SandboxLevel = SandboxLevel.NONE


class Prompts:
    """Routes prompts. One per daemon."""

    def __init__(
        self,
        *,
        policy: Callable[[], Policy | None],
        engines: Callable[[], Sequence[Engine]],
        receipts: ReceiptLog,
        usage: UsageStore,
        desk: ApprovalDesk,
        clock: Clock,
        node: Node,
        roster_age: Callable[[], int | Unknown] = lambda: UNKNOWN,
    ) -> None:
        self._policy = policy
        self._engines = engines
        self._roster_age = roster_age
        self._receipts = receipts
        self._usage = usage
        self._desk = desk
        self._clock = clock
        self.node = node

    def models(self) -> list[ModelInfo]:
        """Return everything that some engine says it serves."""
        return [info for engine in self._engines() for info in engine.models()]

    def request(self, speaker: Speaker, candidate: Candidate) -> Request:
        """Gather the facts that a decision about this prompt, there, rests on."""
        label, policy = speaker.label, self._policy()
        if candidate.zone is Zone.LAN and policy is not None:
            # What is sent along: the other node must not read a lower label out of a word unknown here.
            label = policy.highest(label)
        facts = Request(
            action=Action.INFER,
            principal=speaker.principal,
            start=speaker.start,
            zone=candidate.zone,
            label=label,
            model=candidate.model,
            dest=candidate.dest,
            node=candidate.node,
            tier=candidate.tier,
            agent=speaker.principal.agent,
            tainted=speaker.tainted,
        )
        return self.here_and_now(facts)

    def here_and_now(self, request: Request) -> Request:
        """Add what this node knows of itself and of the time; the one place for every action."""
        minute = self._clock.minute_of_day()
        is_here = request.zone is Zone.SELF
        return replace(
            request,
            node=self.node.name if is_here else request.node,
            tags=self.node.tags if is_here else request.tags,
            tier=self.node.tier if is_here else request.tier,
            minute_of_day=UNKNOWN if minute is None else minute,
            roster_age_s=self._roster_age(),
            sandbox=self.node.sandbox,
        )

    def candidates(self, prompt: Prompt) -> list[Candidate]:
        """List every place that serves this model by name: engines, then declared destinations."""
        found = [
            Candidate(
                engine=engine.name,
                model=info.name,
                zone=info.zone,
                dest=info.dest,
                loaded=info.loaded,
                running=engine.health().running,
                node=self.node.name if info.zone is Zone.SELF else info.node,
                tier=info.tier,
            )
            for engine in self._engines()
            for info in engine.models()
            if info.name == prompt.model and prompt.kind in info.kinds
        ]
        policy = self._policy()
        if policy is not None:
            found += [
                Candidate(engine=None, model=prompt.model, zone=Zone.CLOUD, dest=dest.name)
                for dest in policy.destinations.values()
                if dest.serves(prompt.model)
            ]
        return found

    def weigh(self, speaker: Speaker, prompt: Prompt) -> list[Why]:
        """Decide each candidate by the policy, best first among what is allowed. Changes nothing."""
        policy = self._policy()
        prefer = policy.prefer if policy is not None else ()
        return [
            Why(candidate, evaluate(policy, self.request(speaker, candidate)))
            for candidate in order(self.candidates(prompt), prefer=prefer)
        ]

    def absent(self, prompt: Prompt) -> list[Absent]:
        """List the members and engines that do not serve this model now, and why. For explanations."""
        serving = {candidate.engine for candidate in self.candidates(prompt)}
        healths = [engine.health() for engine in self._engines() if engine.name not in serving]
        return [
            Absent(health.node if health.kind == _PEER else self.node.name, health.name, _why_absent(health))
            for health in healths
            if health.kind == _PEER or health.state in _NOT_UP
        ]

    async def route(self, speaker: Speaker, prompt: Prompt) -> "Routed":
        """Decide, record, and place a prompt; nothing has been sent yet when this returns.

        Raises Denied, NotFound("model-not-found"), Unavailable, StoreError. Every outcome has its receipt.
        """
        weighed = self.weigh(speaker, prompt)
        permit = next((why.outcome for why in weighed if isinstance(why.outcome, Permit)), None)
        if permit is None:
            permit = await self._without_permit(speaker, prompt, weighed)
        prompt = await self._within_limits(speaker, permit, prompt)
        places = self._places(permit, weighed)
        alternates = [place.engine.name for place in places[1:]]
        receipt = self._record(
            speaker, prompt, permit.request, "allow", permit.rule, permit.policy_sha256, alternates=alternates
        )
        if permit.request.zone is not Zone.SELF:
            await self._receipts.durable(receipt)
        if permit.limits.log:
            who = speaker.principal.describe()
            log.info("rule %s allows %s a prompt, receipt %s", permit.rule, who, receipt.id)
        if not places:
            self.outcome(receipt, code="no-egress")
            raise Unavailable(
                "no-egress",
                f"cannot reach destination {permit.request.dest!r}: this node has no way out",
                hint="the cloud egress is a package of its own and is not installed",
                retry_after_s=3600,
            )
        return Routed(self, speaker, receipt, prompt, places, self._clock)

    def _places(self, permit: Permit, weighed: Sequence[Why]) -> list[Place]:
        """Return where a prompt may go, best first: what the permit says, and what is allowed just so."""
        engines = {engine.name: engine for engine in self._engines()}
        places = []
        for why in weighed:
            engine = engines.get(why.candidate.engine or "")
            own = why.outcome
            if isinstance(own, NeedsApproval) and own.request == permit.request:
                own = permit  # the person said yes to exactly this
            if engine is not None and isinstance(own, Permit) and _is_alike(own, permit):
                places.append(Place(engine, own))
        return places

    async def _without_permit(self, speaker: Speaker, prompt: Prompt, weighed: Sequence[Why]) -> Permit:
        """Ask a person where the policy says so; otherwise record the denial and raise it."""
        needs = next((why.outcome for why in weighed if isinstance(why.outcome, NeedsApproval)), None)
        if needs is not None:
            sha = self._policy_sha256()
            receipt = self._record(speaker, prompt, needs.request, "ask", needs.rule, sha)
            await self._receipts.durable(receipt)
            facts = {"action": "infer", "model": prompt.model, **_where(needs.request)}
            row = await self._desk.ask(needs, task_id=None, facts=facts, exact=receipt.id)
            row = await self._desk.wait(row, at_most_s=row.expires_at_ms / 1000)
            return self._desk.permit(needs, row, exact=receipt.id)
        # Of a prompt from another node, what this node itself says about it counts first.
        denials = sorted(weighed, key=lambda why: speaker.start is Start.PEER and not _is_here(why))
        denied = next((why.outcome for why in denials if isinstance(why.outcome, Denied)), None)
        nowhere = Candidate(engine=None, model=prompt.model, zone=Zone.SELF)
        request = self.request(speaker, nowhere)
        if denied is None:
            # Nobody serves this name, and a name opens no door: whatever the policy says, there is
            # nowhere to go. With no policy at all, that is the reason to give.
            outcome = evaluate(self._policy(), request)
            if isinstance(outcome, Denied):
                denied = outcome
        if denied is not None:
            at = next((why.candidate for why in weighed if why.outcome is denied), None)
            if at is not None:
                request = self.request(speaker, at)
            receipt = self._record(
                speaker, prompt, request, "deny", denied.rule, self._policy_sha256(), code=denied.code
            )
            denied.receipt = receipt.id
            raise denied
        receipt = self._record(
            speaker, prompt, request, "deny", "no-such-model", self._policy_sha256(), code="model-not-found"
        )
        self.check_engines_up(prompt.model, start=speaker.start)
        raise self._model_not_found(prompt, receipt)

    def check_engines_up(self, model: str, *, start: Start = Start.LOCAL) -> None:
        """Raise Unavailable while something is not up that may be what serves this name.

        An engine here says so only once it is up; of another node it is known what it served last.
        """
        healths = [health for engine in self._engines() if (health := engine.health()).state in _NOT_UP]
        away = [health.name for health in healths if health.kind != _PEER]
        if away:
            raise Unavailable(
                "engine-down",
                f"cannot find model {model[:_NAME_SHOWN]!r} now: engine {', '.join(away)} is not up",
                hint="mycoswarmctl status says why; the model may be there when it is",
                retry_after_s=5,
            )
        nodes = [str(health.node) for health in healths if model in health.absent]
        if nodes and start is Start.LOCAL:
            raise Unavailable(
                "peer-unreachable",
                f"cannot find model {model[:_NAME_SHOWN]!r} now: node {', '.join(nodes)} serves it and is "
                "not reachable",
                hint="mycoswarmctl nodes says why; the model is there when it is",
                retry_after_s=5,
            )

    def _model_not_found(self, prompt: Prompt, receipt: Receipt) -> NotFound:
        known = sorted({info.name for info in self.models() if prompt.kind in info.kinds})
        shown = ", ".join(known[:5]) or "none yet, and mycoswarmctl doctor says what helps"
        error = NotFound(
            "model-not-found",
            f"cannot find model {prompt.model[:_NAME_SHOWN]!r} for {prompt.kind.value}: no engine here "
            "serves it and the policy declares no destination for it; a name alone opens no way out",
            hint=f"models here: {shown}",
        )
        error.receipt = receipt.id
        return error

    async def _within_limits(self, speaker: Speaker, permit: Permit, prompt: Prompt) -> Prompt:
        """Hold a prompt to the obligations of its permit, or raise Denied("over-limit")."""
        limits = permit.limits
        who = f"{permit.rule}:{speaker.principal.describe()}"
        now_s = self._clock.now_ms() // 1000
        if limits.requests_per_minute is not None:
            count = await self._usage.add(f"requests:{who}", window=now_s // _MINUTE_S, amount=1)
            if count > limits.requests_per_minute:
                raise _over_limit(permit, f"{limits.requests_per_minute} requests a minute")
        if limits.tokens_per_day is not None:
            used = await self._usage.read(f"tokens:{who}", window=now_s // _DAY_S)
            if used >= limits.tokens_per_day:
                raise _over_limit(permit, f"{limits.tokens_per_day} tokens a day")
        if limits.max_tokens is not None:
            asked = prompt.params.get("max_tokens")
            if isinstance(asked, int) and asked > limits.max_tokens:
                raise BadRequest(
                    "over-limit",
                    f"cannot answer with {asked} tokens: rule {permit.rule!r} allows {limits.max_tokens}",
                    where="max_tokens",
                )
            params = {**prompt.params, "max_tokens": asked or limits.max_tokens}
            prompt = replace(prompt, params=params)
        return prompt

    async def spent(self, routed: "Routed", usage: Usage) -> None:
        """Count tokens against the rule's daily limit, where it has one."""
        permit = routed.permit
        if permit.limits.tokens_per_day is not None:
            who = f"{permit.rule}:{routed.speaker.principal.describe()}"
            await self._usage.add(
                f"tokens:{who}",
                window=self._clock.now_ms() // 1000 // _DAY_S,
                amount=usage.prompt_tokens + usage.completion_tokens,
            )

    def _record(
        self,
        speaker: Speaker,
        prompt: Prompt,
        request: Request,
        decision: str,
        rule: str,
        policy_sha256: str,
        *,
        code: str = "",
        alternates: Sequence[str] = (),
    ) -> Receipt:
        return self._receipts.append(
            "decision",
            {
                "action": "infer",
                "by": speaker.principal.describe(),
                "task": speaker.task_id,
                "kind": prompt.kind.value,
                "model": prompt.model,
                "label": self._label(speaker),
                "tainted": speaker.tainted,
                "decision": decision,
                "rule": rule,
                "policy": policy_sha256,
                "code": code,
                **_where(request),
                **({"alternates": list(alternates)} if alternates else {}),
            },
        )

    def outcome(self, decision: Receipt, *, code: str, **facts: object) -> None:
        """Record how a permitted prompt ended."""
        self._receipts.append("outcome", {"decision": decision.id, "code": code, **facts})

    def _label(self, speaker: Speaker) -> str | None:
        policy = self._policy()
        return policy.highest(speaker.label) if policy is not None else speaker.label

    def _policy_sha256(self) -> str:
        policy = self._policy()
        return policy.sha256 if policy is not None else ""


class Routed:
    """A permitted prompt on its way; made only by Prompts.route.

    Attributes:
        permit: what allows it, at the place that answers.
        receipt: the decision's receipt.
        engine: the name of the engine that answers; known once the first byte is there.
        node: the name of the node that computes the answer; as above.
    """

    def __init__(
        self,
        prompts: Prompts,
        speaker: Speaker,
        receipt: Receipt,
        prompt: Prompt,
        places: Sequence[Place],
        clock: Clock,
    ) -> None:
        self._prompts = prompts
        self.speaker = speaker
        self.receipt = receipt
        self.prompt = prompt
        self._places = places
        self._clock = clock
        self._started_s = clock.monotonic_s()
        self.permit = places[0].permit
        self.engine = places[0].engine.name
        self.usage = Usage(0, 0)
        self._via: Via | None = None

    @property
    def node(self) -> str:
        """The name of the node that computes the answer."""
        request = self.permit.request
        return request.node if request.node is not None else self._prompts.node.name

    async def complete(self) -> Answer:
        """Return the whole answer."""
        return await self._first_answer(lambda place: place.engine.complete(place.permit, self.prompt))

    async def embed(self) -> Embeddings:
        """Return one vector for each input."""
        return await self._first_answer(lambda place: place.engine.embed(place.permit, self.prompt))

    async def _first_answer(self, ask: Callable[[Place], Awaitable[Whole]]) -> Whole:
        with self._ending():
            for place in self._in_turn():
                try:
                    answer = await ask(place)
                except MycoswarmError as exc:
                    self._try_next_or_raise(place, exc)
                else:
                    self._via = answer.via
                    await self._spend(answer.usage)
                    return answer
        raise AssertionError

    async def stream(self) -> AsyncGenerator[Delta, None]:
        """Yield the answer piece by piece; close it to stop the engine's work."""
        with self._ending():
            for place in self._in_turn():
                async with aclosing(self._deltas(place)) as deltas:
                    try:
                        delta = await anext(deltas)
                    except MycoswarmError as exc:
                        self._try_next_or_raise(place, exc)
                        continue
                    pieces, is_counted = 1, False
                    try:
                        yield delta
                        async for delta in deltas:  # from here on there is no going back
                            pieces += 1
                            if isinstance(delta, Usage):
                                is_counted = True
                                await self._spend(delta)
                            yield delta
                    finally:
                        if not is_counted:  # left early: a piece is about a token, and it was spent
                            await self._spend(Usage(0, pieces))
                    return

    async def _deltas(self, place: Place) -> AsyncGenerator[Delta, None]:
        """Yield what a place answers, keeping apart which other node it comes through."""
        async with aclosing(place.engine.stream(place.permit, self.prompt)) as deltas:
            async for delta in deltas:
                if isinstance(delta, Via):
                    self._via = delta
                else:
                    yield delta

    def _in_turn(self) -> Iterator[Place]:
        for place in self._places:
            self.engine, self.permit, self._via = place.engine.name, place.permit, None
            yield place

    def _try_next_or_raise(self, place: Place, exc: MycoswarmError) -> None:
        # What one member refuses, has lost or cannot prove says nothing about the next.
        is_about_member = place.permit.request.zone is Zone.LAN and isinstance(exc, _ABOUT_MEMBER)
        if place is self._places[-1] or not (exc.retryable or is_about_member):
            raise exc
        log.info("%s does not answer (%s): trying the next place", place.engine.name, exc.code)

    async def _spend(self, usage: Usage) -> None:
        self.usage = usage
        await self._prompts.spent(self, usage)

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """Write the outcome's receipt, whichever way this ends."""
        code = "cancelled"
        try:
            yield
            code = "ok"
        except MycoswarmError as exc:
            code = exc.code
            exc.receipt = self.receipt.id
            raise
        finally:
            self._prompts.outcome(
                self.receipt,
                code=code,
                engine=self.engine,
                node=self.node,
                **({"peer_receipt": self._via.receipt} if self._via is not None else {}),
                prompt_tokens=self.usage.prompt_tokens,
                completion_tokens=self.usage.completion_tokens,
                duration_ms=round((self._clock.monotonic_s() - self._started_s) * 1000),
            )


_ABOUT_MEMBER = (Denied, Unauthenticated, NotFound)


def _is_alike(one: Permit, other: Permit) -> bool:
    """Tell whether a prompt may go by one permit instead of the other: nothing but the node differs."""
    request, also = one.request, other.request
    return (request.zone, request.dest, one.rule, one.limits, one.policy_sha256) == (
        also.zone,
        also.dest,
        other.rule,
        other.limits,
        other.policy_sha256,
    )


def _is_here(why: Why) -> bool:
    return why.candidate.zone is Zone.SELF


def _why_absent(health: EngineHealth) -> str:
    if health.state == "ready":
        return "the model is not there"
    state = "not reachable" if health.kind == _PEER else health.state
    return f"{state}: {health.detail}" if health.detail else state


def _where(request: Request) -> dict[str, object]:
    return {"zone": request.zone.value, "dest": request.dest, "node": request.node}


def _over_limit(permit: Permit, limit: str) -> Denied:
    return Denied(
        "over-limit",
        f"cannot answer: rule {permit.rule!r} allows {limit} and they are used up",
        rule=permit.rule,
        where=permit.where,
    )
