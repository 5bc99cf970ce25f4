"""What happens to a prompt: facts, decision, receipt, placement, engine, receipt of the outcome.

Law: this is the one choke point. Every prompt, local or not, from a person, a program or an agent,
leaves through `Prompts.route` and nowhere else; engines take the Permit that is made here.
Fail-over happens only before the first byte and only inside the same Permit. No text of a prompt
enters facts, receipts, logs or errors.
"""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from mycoswarmd.core.placement import Candidate, order
from mycoswarmd.core.policy.evaluate import NeedsApproval, Permit, evaluate
from mycoswarmd.core.policy.model import Policy
from mycoswarmd.core.types import UNKNOWN, Action, Principal, Request, SandboxLevel, Start, TaskId, Zone
from mycoswarmd.errors import BadRequest, Denied, MycoswarmError, NotFound, Unavailable
from mycoswarmd.flow.approve import ApprovalDesk
from mycoswarmd.flow.ports import Clock, Engine, ModelInfo, Receipt, ReceiptLog, UsageStore
from mycoswarmd.wire.prompt import Answer, Delta, Embeddings, Prompt, Usage

log = logging.getLogger(__name__)

Whole = TypeVar("Whole", Answer, Embeddings)

# Bound on what is remembered of a name that nobody serves, for messages.
_NAME_SHOWN = 80
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
        engines: Sequence[Engine],
        receipts: ReceiptLog,
        usage: UsageStore,
        desk: ApprovalDesk,
        clock: Clock,
        node: Node,
    ) -> None:
        self._policy = policy
        self._engines = {engine.name: engine for engine in engines}
        self._receipts = receipts
        self._usage = usage
        self._desk = desk
        self._clock = clock
        self.node = node

    def models(self) -> list[ModelInfo]:
        """Return everything that some engine says it serves."""
        return [info for engine in self._engines.values() for info in engine.models()]

    def request(self, speaker: Speaker, *, model: str, zone: Zone, dest: str | None) -> Request:
        """Gather the facts that a decision about this prompt rests on."""
        facts = Request(
            action=Action.INFER,
            principal=speaker.principal,
            zone=zone,
            start=speaker.start,
            label=speaker.label,
            model=model,
            dest=dest,
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
            node=self.node.name if is_here else None,
            tags=self.node.tags if is_here else frozenset(),
            tier=self.node.tier if is_here else None,
            minute_of_day=UNKNOWN if minute is None else minute,
            roster_age_s=UNKNOWN,  # this node is in no swarm yet
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
            )
            for engine in self._engines.values()
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
            Why(
                candidate,
                evaluate(
                    policy,
                    self.request(speaker, model=candidate.model, zone=candidate.zone, dest=candidate.dest),
                ),
            )
            for candidate in order(self.candidates(prompt), prefer=prefer)
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
        receipt = self._record(speaker, prompt, permit.request, "allow", permit.rule, permit.policy_sha256)
        if permit.request.zone is not Zone.SELF:
            await self._receipts.durable(receipt)
        if permit.limits.log:
            who = speaker.principal.describe()
            log.info("rule %s allows %s a prompt, receipt %s", permit.rule, who, receipt.id)
        engines = [
            self._engines[why.candidate.engine]
            for why in weighed
            if why.candidate.engine is not None
            and (why.candidate.zone, why.candidate.dest) == (permit.request.zone, permit.request.dest)
        ]
        if not engines:
            self.outcome(receipt, code="no-egress")
            raise Unavailable(
                "no-egress",
                f"cannot reach destination {permit.request.dest!r}: this node has no way out",
                hint="the cloud egress is a package of its own and is not installed",
                retry_after_s=3600,
            )
        return Routed(self, speaker, permit, receipt, prompt, engines, self._clock)

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
        denied = next((why.outcome for why in weighed if isinstance(why.outcome, Denied)), None)
        request = self.request(speaker, model=prompt.model, zone=Zone.SELF, dest=None)
        if denied is None:
            # Nobody serves this name, and a name opens no door: whatever the policy says, there is
            # nowhere to go. With no policy at all, that is the reason to give.
            outcome = evaluate(self._policy(), request)
            if isinstance(outcome, Denied):
                denied = outcome
        if denied is not None:
            at = next((why.candidate for why in weighed if why.outcome is denied), None)
            if at is not None:
                request = self.request(speaker, model=at.model, zone=at.zone, dest=at.dest)
            receipt = self._record(
                speaker, prompt, request, "deny", denied.rule, self._policy_sha256(), code=denied.code
            )
            denied.receipt = receipt.id
            raise denied
        receipt = self._record(
            speaker, prompt, request, "deny", "no-such-model", self._policy_sha256(), code="model-not-found"
        )
        self.check_engines_up(prompt.model)
        raise self._model_not_found(prompt, receipt)

    def check_engines_up(self, model: str) -> None:
        """Raise Unavailable while some engine is not up: it may be the one that serves this name."""
        away = [e.name for e in self._engines.values() if e.health().state in {"starting", "down"}]
        if away:
            raise Unavailable(
                "engine-down",
                f"cannot find model {model[:_NAME_SHOWN]!r} now: engine {', '.join(away)} is not up",
                hint="mycoswarmctl status says why; the model may be there when it is",
                retry_after_s=5,
            )

    def _model_not_found(self, prompt: Prompt, receipt: Receipt) -> NotFound:
        known = sorted({info.name for info in self.models() if prompt.kind in info.kinds})
        shown = ", ".join(known[:5]) or "none yet: mycoswarmctl engine install"
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
        permit: what allows it.
        receipt: the decision's receipt.
        engine: the name of the engine that answers; known once the first byte is there.
    """

    def __init__(
        self,
        prompts: Prompts,
        speaker: Speaker,
        permit: Permit,
        receipt: Receipt,
        prompt: Prompt,
        engines: Sequence[Engine],
        clock: Clock,
    ) -> None:
        self._prompts = prompts
        self.speaker = speaker
        self.permit = permit
        self.receipt = receipt
        self.prompt = prompt
        self._engines = engines
        self._clock = clock
        self._started_s = clock.monotonic_s()
        self.engine = engines[0].name
        self.usage = Usage(0, 0)

    async def complete(self) -> Answer:
        """Return the whole answer."""
        return await self._first_answer(lambda engine: engine.complete(self.permit, self.prompt))

    async def embed(self) -> Embeddings:
        """Return one vector for each input."""
        return await self._first_answer(lambda engine: engine.embed(self.permit, self.prompt))

    async def _first_answer(self, ask: Callable[[Engine], Awaitable[Whole]]) -> Whole:
        with self._ending():
            for engine in self._engines_in_turn():
                try:
                    answer = await ask(engine)
                except MycoswarmError as exc:
                    self._try_next_or_raise(engine, exc)
                else:
                    await self._spend(answer.usage)
                    return answer
        raise AssertionError

    async def stream(self) -> AsyncGenerator[Delta, None]:
        """Yield the answer piece by piece; close it to stop the engine's work."""
        with self._ending():
            for engine in self._engines_in_turn():
                async with aclosing(engine.stream(self.permit, self.prompt)) as deltas:
                    try:
                        delta = await anext(deltas)
                    except MycoswarmError as exc:
                        self._try_next_or_raise(engine, exc)
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

    def _engines_in_turn(self) -> Iterator[Engine]:
        for engine in self._engines:
            self.engine = engine.name
            yield engine

    def _try_next_or_raise(self, engine: Engine, exc: MycoswarmError) -> None:
        if engine is self._engines[-1] or not exc.retryable:
            raise exc

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
                prompt_tokens=self.usage.prompt_tokens,
                completion_tokens=self.usage.completion_tokens,
                duration_ms=round((self._clock.monotonic_s() - self._started_s) * 1000),
            )


def _where(request: Request) -> dict[str, object]:
    return {"zone": request.zone.value, "dest": request.dest, "node": request.node}


def _over_limit(permit: Permit, limit: str) -> Denied:
    return Denied(
        "over-limit",
        f"cannot answer: rule {permit.rule!r} allows {limit} and they are used up",
        rule=permit.rule,
        where=permit.where,
    )
