"""What happens to a task: accepted, claimed, caged, decided step by step, ended exactly once.

Law: a task that was acknowledged is in the store; every change of its state goes through the store
under its fence; every model call and every tool is decided here, outside the cage, with a durable
receipt before the effect; an attempt that lost its fence changes nothing.
"""

import asyncio
import fnmatch
import logging
from collections.abc import Callable
from dataclasses import dataclass

from mycoswarmd.core.policy.evaluate import NeedsApproval, Permit, evaluate
from mycoswarmd.core.policy.model import Policy
from mycoswarmd.core.tasks import FINAL, MAX_ATTEMPTS, Task, TaskSpec, TaskState, retry_delay_ms, tries
from mycoswarmd.core.types import Action, Principal, Request, TaskId
from mycoswarmd.errors import (
    BadRequest,
    CageNotUp,
    Conflict,
    Denied,
    MycoswarmError,
    NotFound,
    StoreError,
    Unavailable,
)
from mycoswarmd.flow.approve import ApprovalDesk
from mycoswarmd.flow.attempt import Attempt, AttemptEnd, Suspended, Tools
from mycoswarmd.flow.ports import (
    ApprovalRow,
    BlobStore,
    CageMaker,
    Clock,
    Entropy,
    ReceiptLog,
    TaskStore,
)
from mycoswarmd.flow.prompt import Prompts, Speaker
from mycoswarmd.wire.prompt import PromptKind

log = logging.getLogger(__name__)

# How soon the worker looks for back-offs, deadlines and answers that came due; work that arrives wakes it at
# once. A node without open tasks is left to sleep: each look costs a few reads of the database.
_LOOK_S, _IDLE_LOOK_S = 1.0, 15.0
# A cage that comes up takes less, and its maker gives up sooner.
_CAGE_UP_S = 120.0
# How soon a final state is written again when the disk refused it.
_AGAIN_S = 1.0
# Waiting tasks that are looked at in one go; the rest in the next.
_WAITING_SEEN = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskBounds:
    """How much is accepted and how much runs at a time."""

    slots: int = 2
    max_open: int = 1000


@dataclass(slots=True)
class _Running:
    attempt: int
    scope: asyncio.Timeout | None = None
    interruption: AttemptEnd | None = None
    is_ending: bool = False  # its end is being written: too late to interrupt

    def ended_by(self) -> AttemptEnd | None:
        """Return why somebody ended this attempt, if anybody did."""
        return self.interruption


class Tasks:
    """The queue's front and its workers. One per daemon."""

    def __init__(
        self,
        *,
        policy: Callable[[], Policy | None],
        prompts: Prompts,
        store: TaskStore,
        blobs: BlobStore,
        cages: CageMaker,
        desk: ApprovalDesk,
        receipts: ReceiptLog,
        clock: Clock,
        entropy: Entropy,
        bounds: TaskBounds,
        is_member: Callable[[str], bool] = lambda node_id: False,
    ) -> None:
        self._is_member = is_member
        self._policy = policy
        self._prompts = prompts
        self._store = store
        self._blobs = blobs
        self._cages = cages
        self._desk = desk
        self._receipts = receipts
        self._clock = clock
        self._entropy = entropy
        self._bounds = bounds
        self._work = asyncio.Event()
        self._changed = asyncio.Condition()
        self._running: dict[TaskId, _Running] = {}

    # --- the front -----------------------------------------------------------------------------

    async def submit(self, principal: Principal, spec: TaskSpec) -> tuple[Task, bool]:
        """Decide, then store a task; it is durable when this returns.

        Returns the task, and False when its idempotency key was known and the earlier task is returned.
        """
        policy = self._policy()
        profile = policy.agents.get(spec.agent) if policy is not None else None
        if policy is not None and profile is None:
            known = ", ".join(sorted(policy.agents)) or "none"
            raise BadRequest(
                "unknown-agent",
                f"cannot take a task for agent {spec.agent!r}: the policy declares no such agent",
                where="agent",
                hint=f"agents: {known}",
            )
        if profile is not None and spec.model and not _may_use(profile.model, spec.model):
            raise BadRequest(
                "model-not-for-agent",
                f"cannot use model {spec.model!r}: agent {spec.agent!r} uses {profile.model!r}",
                where="model",
            )
        await self._permit(principal, spec)
        if spec.workspace is not None:
            await self._blobs.check_there(spec.workspace)  # unknown is said now, not when the task runs
        task, is_new = await self._store.enqueue(
            spec,
            task_id=TaskId(f"t-{self._entropy.token(6)}"),
            now_ms=self._clock.now_ms(),
            max_open=self._bounds.max_open,
        )
        self._work.set()
        return task, is_new

    async def _permit(self, principal: Principal, spec: TaskSpec) -> None:
        """Decide whether this task may be posted, with a durable receipt; raise Denied if not."""
        policy = self._policy()
        request = Request(
            action=Action.TASK,
            principal=principal,
            label=spec.label,
            agent=spec.agent,
            model=spec.model,
        )
        outcome = evaluate(policy, self._prompts.here_and_now(request))
        decision = "allow" if isinstance(outcome, Permit) else "deny"
        if isinstance(outcome, NeedsApproval):
            decision = "ask"
        receipt = self._receipts.append(
            "decision",
            {
                "action": "task",
                "by": principal.describe(),
                "agent": spec.agent,
                "label": spec.label,
                "decision": decision,
                "rule": outcome.rule,
                "policy": policy.sha256 if policy is not None else "",
            },
        )
        await self._receipts.durable(receipt)
        if isinstance(outcome, Denied):
            outcome.receipt = receipt.id
            raise outcome
        if isinstance(outcome, NeedsApproval):
            row = await self._desk.ask(
                outcome,
                task_id=None,
                facts={"action": "task", "agent": spec.agent, "label": spec.label},
                exact=receipt.id,
            )
            row = await self._desk.wait(row, at_most_s=row.expires_at_ms / 1000)
            self._desk.permit(outcome, row, exact=receipt.id)

    async def cancel(self, task_id: TaskId) -> Task:
        """End a task that has not ended; its cage and all in it are killed."""
        while True:
            try:
                return await self._cancel(task_id)
            except Conflict as exc:
                if exc.code != "stale-attempt":  # a worker took it meanwhile: look again
                    raise

    async def _cancel(self, task_id: TaskId) -> Task:
        task = await self._store.get(task_id)
        if task.state in FINAL:
            raise Conflict("already-ended", f"cannot cancel task {task_id!r}: it is {task.state.value}")
        end = AttemptEnd(TaskState.CANCELLED, "cancelled", "cancelled by a person")
        if (running := self._running.get(task_id)) is not None:
            self._interrupt(running, end)
            await self._until_gone(task_id)
            task = await self._store.get(task_id)
            if task.state is TaskState.CANCELLED:
                return task
            if task.state in FINAL:
                raise Conflict("already-ended", f"cannot cancel task {task_id!r}: it is {task.state.value}")
        return await self._move(task, end)

    async def retry(self, principal: Principal, task_id: TaskId) -> Task:
        """Put a parked or failed task back into the queue: a person's decision, and the policy's."""
        task = await self._store.get(task_id)
        await self._permit(principal, task.spec)
        moved = await self._store.move(
            task_id, attempt=task.attempt, to=TaskState.QUEUED, now_ms=self._clock.now_ms(), code="retried"
        )
        self._work.set()
        await self.tell()
        return moved

    async def answer(self, reference: str, *, approve: bool, by: Principal) -> ApprovalRow:
        """Answer a question; a task whose cage is gone goes back into the queue, or fails."""
        row = await self._desk.decide(reference, approve=approve, by=by)
        await self._follow_up(row)
        return row

    async def wait_for_change(self, at_most_s: float) -> None:
        """Return when some task's transcript may have grown, or after at_most_s."""
        try:
            async with asyncio.timeout(at_most_s), self._changed:
                await self._changed.wait()
        except TimeoutError:
            return

    async def tell(self) -> None:
        """Wake everybody who follows a task."""
        async with self._changed:
            self._changed.notify_all()

    # --- the workers ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Recover what a dead daemon left, then claim and carry out tasks until cancelled."""
        for task in await self._store.recover(now_ms=self._clock.now_ms()):
            log.warning(
                "task %s was cut off and is now %s",
                task.id,
                task.state.value,
                extra={"event": "task-cut-off"},
            )
        async with asyncio.TaskGroup() as group:
            while True:
                self._work.clear()
                look_s = _LOOK_S
                try:
                    await self._end_overdue()
                    while len(self._running) < self._bounds.slots:
                        claimed = await self._store.claim(now_ms=self._clock.now_ms())
                        if claimed is None:
                            break
                        running = self._running[claimed.id] = _Running(claimed.attempt)
                        group.create_task(self._attempt(claimed, running), name=f"task:{claimed.id}")
                        await self.tell()
                    if not self._running and not await self._is_any_open():
                        look_s = _IDLE_LOOK_S
                except (StoreError, Unavailable) as exc:
                    log.error("cannot look for work: %s", exc)  # noqa: TRY400 - no traceback for a full disk
                try:
                    async with asyncio.timeout(look_s):
                        await self._work.wait()
                except TimeoutError:
                    continue

    async def _attempt(self, task: Task, running: _Running) -> None:
        try:
            end = await self._carry_out(task, running)
            running.is_ending = True
            await self._write_end(task, end)
        except Suspended:
            log.info("task %s waits for approval; its cage is closed", task.id)
        except Exception:  # a bug of ours costs this task, not the node
            log.exception("task %s", task.id)
            end = AttemptEnd(TaskState.FAILED, "internal-error", "an internal error, see the log")
            await self._write_end(task, end)
        finally:
            if self._running.get(task.id) is running:
                del self._running[task.id]
            self._work.set()
        await self.tell()

    async def _carry_out(self, task: Task, running: _Running) -> AttemptEnd:
        policy = self._policy()
        profile = policy.agents.get(task.spec.agent) if policy is not None else None
        if policy is None or profile is None:
            return AttemptEnd(TaskState.FAILED, "unknown-agent", "the policy no longer has this agent")
        if (end := running.ended_by()) is not None:  # cancelled before it began
            return end
        operator_id = task.spec.submitter.operator_id
        if operator_id is not None and not self._is_member(operator_id):
            return AttemptEnd(
                TaskState.FAILED, "submitter-put-out", "the operator who posted it was put out of the swarm"
            )
        speaker = Speaker(
            principal=Principal(agent=profile.name), label=task.label, tainted=task.tainted, task_id=task.id
        )
        has_begun = False
        try:
            async with asyncio.timeout(self._time_left_s(task, _CAGE_UP_S)) as running.scope:
                attempt = Attempt(
                    task=task,
                    profile=profile,
                    model=self._model_for(task, profile.model),
                    policy=self._policy,
                    prompts=self._prompts,
                    speaker=speaker,
                    tools=Tools(self._policy, self._desk, self._receipts, self._prompts.here_and_now),
                    store=self._store,
                    blobs=self._blobs,
                    receipts=self._receipts,
                    clock=self._clock,
                    tell=self.tell,
                    cage_is_up=lambda: self._begin_wall(task, running, profile.limits.wall_s),
                )
                has_begun = True
                return await attempt.carry_out(self._cages)
        except TimeoutError:
            if (end := running.ended_by()) is not None:
                return end
            if self._is_overdue(task):
                return AttemptEnd(TaskState.EXPIRED, "deadline", "the task's deadline passed")
            return AttemptEnd(
                TaskState.FAILED, "agent-timeout", f"the task took more than {profile.limits.wall_s} s"
            )
        except MycoswarmError as exc:
            if (end := running.ended_by()) is not None:  # a killed cage says so in its own words
                return end
            has_begun = has_begun and not isinstance(exc, CageNotUp)
            return self._after_error(task, exc, may_repeat=task.spec.repeatable or not has_begun)

    def _after_error(self, task: Task, exc: MycoswarmError, *, may_repeat: bool) -> AttemptEnd:
        """Repeat what may be repeated while attempts are left, park what may not."""
        if not exc.retryable:
            return AttemptEnd(TaskState.FAILED, exc.code, exc.message)
        if not may_repeat:
            return AttemptEnd(TaskState.PARKED, exc.code, exc.message)
        # An engine that is not up, or a full disk, is not the task's fault: time cures it, however long.
        is_ours = isinstance(exc, StoreError | Unavailable)
        if tries(task) >= MAX_ATTEMPTS and not is_ours:
            message = f"{exc.message}; given up after {tries(task)} attempts"
            return AttemptEnd(TaskState.FAILED, exc.code, message)
        jitter = int(self._entropy.token(2), 16) / 0xFFFF
        delay_ms = retry_delay_ms(min(tries(task), MAX_ATTEMPTS), jitter)
        return AttemptEnd(TaskState.QUEUED, exc.code, exc.message, delay_ms=delay_ms)

    async def _write_end(self, task: Task, end: AttemptEnd) -> None:
        while True:
            try:
                await self._move(task, end)
            except (StoreError, Unavailable) as exc:
                log.error("cannot write how task %s ended: %s; trying again", task.id, exc)  # noqa: TRY400
                await asyncio.sleep(_AGAIN_S)
            except Conflict as exc:
                log.warning("task %s: a stale attempt's end was refused: %s", task.id, exc)
                return
            else:
                return

    async def _move(self, task: Task, end: AttemptEnd) -> Task:
        now_ms = self._clock.now_ms()
        moved = await self._store.move(
            task.id,
            attempt=task.attempt,
            to=end.state,
            now_ms=now_ms,
            code=end.code,
            message=end.message,
            summary=end.summary,
            changes=end.changes,
            not_before_ms=now_ms + end.delay_ms if end.delay_ms else 0,
        )
        body = {"task": task.id, "attempt": task.attempt, "state": end.state.value, "code": end.code}
        try:
            self._receipts.append("task", body)
        except StoreError as exc:  # the move is done and must not be done again
            log.error("cannot write the receipt of task %s: %s", task.id, exc)  # noqa: TRY400
        await self.tell()
        return moved

    # --- time and answers ----------------------------------------------------------------------

    async def _end_overdue(self) -> None:
        for task in await self._store.due(now_ms=self._clock.now_ms()):
            if task.id not in self._running:
                end = AttemptEnd(TaskState.EXPIRED, "deadline", "the task's deadline passed")
                await self._write_end(task, end)
        for row in await self._desk.expire_due():
            await self._follow_up(row)
        # An answer may have come while its cage was closing, or just before a crash: nothing waits
        # for a question that is no longer open. The new attempt finds the stored answer.
        for task in await self._store.list(states=frozenset({TaskState.WAITING}), limit=_WAITING_SEEN):
            if task.id not in self._running and not await self._desk.is_open(task.id):
                end = AttemptEnd(TaskState.QUEUED, "answered", "the question was answered")
                await self._write_end(task, end)

    async def _is_any_open(self) -> bool:
        counts = await self._store.counts()
        return any(counts[state] for state in (TaskState.QUEUED, TaskState.RUNNING, TaskState.WAITING))

    async def _follow_up(self, row: ApprovalRow) -> None:
        """Move a task on whose question was answered after its cage was closed."""
        if row.task_id is None or row.task_id in self._running:
            return
        task = await self._store.get(row.task_id)
        if task.state is not TaskState.WAITING:
            return
        if row.state == "approved":
            end = AttemptEnd(TaskState.QUEUED, "approved", "a person approved; the task starts again")
        else:
            end = AttemptEnd(TaskState.FAILED, "not-approved", f"the question was {row.state}")
        await self._write_end(task, end)
        self._work.set()

    def _interrupt(self, running: _Running, end: AttemptEnd) -> None:
        if running.interruption is not None or running.is_ending:
            return  # somebody was first
        running.interruption = end
        if running.scope is not None:
            running.scope.reschedule(asyncio.get_running_loop().time())

    async def _until_gone(self, task_id: TaskId) -> None:
        while task_id in self._running:
            await self.wait_for_change(_LOOK_S)

    def _begin_wall(self, task: Task, running: _Running, wall_s: int) -> None:
        """Count the agent's wall time from now on; that its cage took long is not its doing."""
        if running.scope is not None and running.interruption is None:
            left_s = self._time_left_s(task, wall_s)
            running.scope.reschedule(asyncio.get_running_loop().time() + left_s)

    def _time_left_s(self, task: Task, wall_s: float) -> float:
        if task.spec.deadline_at_ms is None:
            return wall_s
        return min(wall_s, max(0.0, (task.spec.deadline_at_ms - self._clock.now_ms()) / 1000))

    def _is_overdue(self, task: Task) -> bool:
        deadline_at_ms = task.spec.deadline_at_ms
        return deadline_at_ms is not None and self._clock.now_ms() >= deadline_at_ms

    def _model_for(self, task: Task, wanted: str | None) -> str:
        """Name one served model: the task's own, else the first that the agent's pattern matches."""
        if task.spec.model:
            return task.spec.model
        served = [info.name for info in self._prompts.models() if PromptKind.CHAT in info.kinds]
        for name in served:
            if _may_use(wanted, name):
                return name
        self._prompts.check_engines_up(wanted or "any")
        raise NotFound(
            "model-not-found",
            f"cannot find a model for agent {task.spec.agent!r}: nothing here matches {wanted!r}",
            hint="mycoswarmctl models lists what is served",
        )


def _may_use(pattern: str | None, model: str) -> bool:
    return pattern is None or fnmatch.fnmatchcase(model, pattern)
