"""The desk where a person answers `ask`: durable questions, live waiters, time-outs that deny.

Law: a question's answer counts only for exactly what was asked (`what`), only for as long as it says,
and only from someone whom core.policy.evaluate accepts as approver. Silence is a denial.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mycoswarmd.core.policy.evaluate import Approval, NeedsApproval, Permit, evaluate
from mycoswarmd.core.policy.model import Policy, is_person, origins_of
from mycoswarmd.core.types import Principal, TaskId
from mycoswarmd.errors import Conflict, Denied, NotFound
from mycoswarmd.flow.ports import ApprovalRow, ApprovalStore, Clock, Entropy, ReceiptLog


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovalTimes:
    """How long a question stands, and how long somebody waits for it on an open connection."""

    # A person who is away for the night still finds the question in the morning.
    task_s: int = 24 * 3600
    # An HTTP client gives up after a few minutes anyway (the openai client: 600 s).
    prompt_s: int = 300


def principal_text(principal: Principal) -> str:
    """Encode an approver so that a later attempt can be judged by who really answered."""
    return json.dumps(
        {
            "is_owner": principal.is_owner,
            "uid": principal.uid,
            "user": principal.user,
            "groups": sorted(principal.groups),
            "key": principal.key,
            "node": principal.node,
            "node_id": principal.node_id,
            "operator": principal.operator,
            "operator_id": principal.operator_id,
            "agent": principal.agent,
        },
        sort_keys=True,
    )


def parse_principal(text: str) -> Principal:
    """Decode what principal_text wrote."""
    data = json.loads(text)
    return Principal(**{**data, "groups": frozenset(data["groups"])})


class ApprovalDesk:
    """Asks, waits, answers. One per daemon."""

    def __init__(
        self,
        *,
        policy: Callable[[], Policy | None],
        store: ApprovalStore,
        receipts: ReceiptLog,
        clock: Clock,
        entropy: Entropy,
        times: ApprovalTimes,
    ) -> None:
        self._policy = policy
        self._store = store
        self._receipts = receipts
        self._clock = clock
        self._entropy = entropy
        self._times = times
        self._waiters: dict[str, asyncio.Event] = {}

    async def ask(
        self,
        needs: NeedsApproval,
        *,
        task_id: TaskId | None,
        facts: Mapping[str, object],
        exact: str = "",
    ) -> ApprovalRow:
        """Store the question, or find the same task's earlier one.

        Args:
            needs: what the policy wants a person for.
            task_id: the task that asks, or None for a prompt on an open connection.
            facts: what the person is shown.
            exact: text (for example a tool's arguments) that the answer is bound to.
        """
        now_ms = self._clock.now_ms()
        lasts_s = self._times.task_s if task_id else self._times.prompt_s
        row = ApprovalRow(
            id=f"a-{self._entropy.token(5)}",
            task_id=task_id,
            what=_bind(needs.what, exact),
            facts={**facts, "rule": needs.rule, "why": needs.why, "approve_by": list(needs.approve_by)},
            state="pending",
            asked_at_ms=now_ms,
            expires_at_ms=now_ms + lasts_s * 1000,
        )
        return await self._store.ask(row)

    async def wait(self, row: ApprovalRow, *, at_most_s: float) -> ApprovalRow:
        """Wait until the question is answered or expires; return it as it is after at_most_s anyway."""
        answered = self._waiters.setdefault(row.id, asyncio.Event())
        left_s = max(0.0, (row.expires_at_ms - self._clock.now_ms()) / 1000)
        try:
            async with asyncio.timeout(min(at_most_s, left_s)):
                while (row := await self._store.get(row.id)).state == "pending":
                    await answered.wait()
        except TimeoutError:
            row = await self._store.get(row.id)
        finally:
            self._waiters.pop(row.id, None)
        if row.state == "pending" and self._clock.now_ms() >= row.expires_at_ms:
            return await self._expire(row)
        return row

    def permit(self, needs: NeedsApproval, row: ApprovalRow, *, exact: str = "") -> Permit:
        """Turn an answered question into a Permit, or raise Denied("not-approved")."""
        if row.state == "approved" and row.what == _bind(needs.what, exact):
            approval = Approval(what=needs.what, by=parse_principal(row.decided_by))
            outcome = evaluate(self._policy(), needs.request, approval=approval)
            if isinstance(outcome, Permit):
                return outcome
            if isinstance(outcome, Denied):
                raise outcome
        said = {"expired": "nobody answered in time", "denied": "a person said no"}
        raise Denied(
            "not-approved",
            f"cannot do this without approval: {said.get(row.state, 'the answer does not cover it')}",
            rule=needs.rule,
            where=needs.where,
            hint="mycoswarmctl approvals lists what waits",
        )

    async def decide(self, reference: str, *, approve: bool, by: Principal) -> ApprovalRow:
        """Answer a question by its id, or by the id of a task that has exactly one open.

        Raises Denied when `by` may not answer, NotFound, Conflict("already-decided").
        """
        row = await self._find(reference)
        if not self._may_answer(row, by):
            # A stranger learns nothing, not even that there is such a question.
            raise NotFound("unknown-approval", f"cannot find question {reference[:80]!r}")
        now_ms = self._clock.now_ms()
        if row.state == "pending" and now_ms >= row.expires_at_ms:
            row = await self._expire(row)
        if row.state != "pending":
            raise Conflict("already-decided", f"cannot answer question {row.id!r}: it is {row.state}")
        receipt = self._receipts.append(
            "approval",
            {
                "approval": row.id,
                "task": row.task_id,
                "what": row.what,
                "by": by.describe(),
                "decision": "approved" if approve else "denied",
            },
        )
        await self._receipts.durable(receipt)
        row = await self._store.decide(
            row.id,
            state="approved" if approve else "denied",
            by=principal_text(by),
            now_ms=now_ms,
        )
        self._wake(row.id)
        return row

    def _may_answer(self, row: ApprovalRow, by: Principal) -> bool:
        """Tell whether the policy accepts this person's answer; never an agent, a key or a node."""
        policy, elements = self._policy(), row.facts.get("approve_by")
        if policy is None or not is_person(by) or not isinstance(elements, list | tuple):
            return False
        names = origins_of(policy, by)
        return all(not names.isdisjoint(str(element).split(" or ")) for element in elements)

    async def is_open(self, task_id: TaskId) -> bool:
        """Tell whether a task has a question that nobody has answered yet."""
        return bool(await self._store.pending(task_id=task_id))

    async def expire_due(self) -> list[ApprovalRow]:
        """Deny every question whose time is over; return them."""
        now_ms = self._clock.now_ms()
        rows = [row for row in await self._store.pending() if now_ms >= row.expires_at_ms]
        return [await self._expire(row) for row in rows]

    async def _expire(self, row: ApprovalRow) -> ApprovalRow:
        try:
            row = await self._store.decide(row.id, state="expired", by="", now_ms=self._clock.now_ms())
        except Conflict:  # answered in this very moment: that answer stands
            row = await self._store.get(row.id)
        self._wake(row.id)
        return row

    async def _find(self, reference: str) -> ApprovalRow:
        try:
            return await self._store.get(reference)
        except NotFound:
            rows = await self._store.pending(task_id=TaskId(reference))
            if len(rows) == 1:
                return rows[0]
            if rows:
                raise Conflict(
                    "several-approvals",
                    f"cannot tell which of {len(rows)} questions of task {reference!r} is meant",
                    hint="mycoswarmctl approvals lists them",
                ) from None
            raise

    def _wake(self, approval_id: str) -> None:
        if (waiter := self._waiters.get(approval_id)) is not None:
            waiter.set()


def _bind(what: str, exact: str) -> str:
    return hashlib.sha256(f"{what}\0{exact}".encode()).hexdigest() if exact else what
