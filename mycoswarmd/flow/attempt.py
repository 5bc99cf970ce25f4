"""One attempt at a task: a proved cage on one side, the policy and the engines on the other.

Law: the cage is given nothing before its proof holds; a MODEL frame is answered through
`Prompts.route`, a TOOL frame by `Tools.permit`, and both have receipts before they take effect.
Everything that comes out of the cage is untrusted and bounded.
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field

from mycoswarmd.core.policy.evaluate import NeedsApproval, Permit, evaluate
from mycoswarmd.core.policy.model import AgentProfile, Policy
from mycoswarmd.core.policy.rights import compile_rights
from mycoswarmd.core.policy.tools import TOOLS
from mycoswarmd.core.tasks import Task, TaskState
from mycoswarmd.core.types import Action, Request
from mycoswarmd.errors import (
    BadRequest,
    CageError,
    CageNotUp,
    Denied,
    EngineError,
    MycoswarmError,
    Unavailable,
)
from mycoswarmd.flow.approve import ApprovalDesk
from mycoswarmd.flow.ports import (
    BlobStore,
    CageMaker,
    CageSession,
    Clock,
    NewBlob,
    ReceiptLog,
    TaskStore,
)
from mycoswarmd.flow.prompt import Prompts, Routed, Speaker
from mycoswarmd.wire.frames import MAX_PAYLOAD_BYTES, Frame, FrameType
from mycoswarmd.wire.jsonv import get_bool, get_int, get_object, get_str
from mycoswarmd.wire.openai import parse_chat
from mycoswarmd.wire.prompt import Answer, Prompt
from mycoswarmd.wire.workspace import ReadAt, list_workspace

log = logging.getLogger(__name__)

# What the transcript keeps of one text; the whole is in the changes or was in the cage.
_TEXT_BYTES = 4096
# A person who is at the machine answers within a minute; after that the cage is not worth its memory.
_HOLD_S = 60.0
# An agent of 60 steps needs a few hundred frames; one that floods would fill the disk with transcript.
_MAX_FRAMES = 10_000
# What an agent may say about how it ended; see agent/loop.py and agent/main.py.
_CODES = frozenset(
    {"", "agent-crashed", "agent-failed", "agent-looped", "agent-nonsense", "agent-silent", "bad-frame"}
    | {"bad-request", "bad-workspace", "cancelled", "step-limit", "token-limit", "workspace-too-large"}
)
# What a person is asked about is shown whole, or not asked.
_SHOWN_CHARS = 32_768
# Paths named in one event; the rest is counted.
_PATHS_BYTES = 100_000
# A prompt that no engine takes is asked again this often inside one attempt, before the task goes back.
_BUSY_TRIES = 5


@dataclass(frozen=True, slots=True)
class AttemptEnd:
    """How an attempt ended, for the store."""

    state: TaskState
    code: str
    message: str
    summary: str = ""
    changes: str | None = None
    delay_ms: int = 0


class Suspended(Exception):  # not an error: the task waits for a person
    """The cage was closed while its task waits for an approval."""


@dataclass(frozen=True, slots=True)
class Tools:
    """Decides tools. Nothing happens in the cage before `permit` has returned."""

    policy: Callable[[], Policy | None]
    desk: ApprovalDesk
    receipts: ReceiptLog
    here_and_now: Callable[[Request], Request]

    def request(self, speaker: Speaker, tool: str) -> Request:
        """Gather the facts for one tool call."""
        facts = Request(
            action=Action.TOOL,
            principal=speaker.principal,
            label=speaker.label,
            tainted=speaker.tainted,
            agent=speaker.principal.agent,
            tool=tool,
        )
        return self.here_and_now(facts)

    async def decide(
        self, speaker: Speaker, tool: str, arguments_sha256: str
    ) -> tuple[Permit | Denied | NeedsApproval, str]:
        """Decide one call and write its receipt, fsynced; return the outcome and the receipt's id."""
        policy = self.policy()
        outcome = evaluate(policy, self.request(speaker, tool))
        words = {Permit: "allow", NeedsApproval: "ask"}
        receipt = self.receipts.append(
            "decision",
            {
                "action": "tool",
                "by": speaker.principal.describe(),
                "task": speaker.task_id,
                "tool": tool,
                "arguments_sha256": arguments_sha256,
                "label": speaker.label,
                "tainted": speaker.tainted,
                "decision": words.get(type(outcome), "deny"),
                "rule": outcome.rule,
                "policy": policy.sha256 if policy is not None else "",
            },
        )
        await self.receipts.durable(receipt)
        return outcome, receipt.id


@dataclass(kw_only=True)
class Attempt:
    """Carries one claimed task out, once."""

    task: Task
    profile: AgentProfile
    model: str
    policy: Callable[[], Policy | None]
    prompts: Prompts
    speaker: Speaker
    tools: Tools
    store: TaskStore
    blobs: BlobStore
    receipts: ReceiptLog
    clock: Clock
    tell: Callable[[], Awaitable[None]]
    cage_is_up: Callable[[], None]
    tokens: int = 0
    steps: int = 0
    codes: set[str] = field(default_factory=lambda: set(_CODES))

    async def carry_out(self, cages: CageMaker) -> AttemptEnd:
        """Open a cage, hand the task in, serve the agent, return how it ended.

        Raises CageError, EngineError, Unavailable, Denied, StoreError; Suspended when a person is asked for.
        """
        policy = self.policy()
        if policy is None:
            raise Denied("policy-denied", "cannot run a task: there is no valid policy", rule="no-policy")
        spec = compile_rights(
            policy,
            self.profile,
            task_id=self.task.id,
            attempt=self.task.attempt,
            sandbox=self.prompts.node.sandbox,
        )
        try:
            cage = await cages.open(spec)
        except OSError as exc:  # no descriptor, no memory: both come back
            raise CageNotUp("cage-setup", f"cannot build a cage: {exc.strerror}") from exc
        try:
            self.cage_is_up()
            await self._note(
                "proof",
                {
                    "level": cage.proof.level.value,
                    "held": len(cage.proof.held),
                    "absent": list(cage.proof.absent),
                },
            )
            await self._hand_in(cage)
            async with self.blobs.writing() as changes:
                return await self._serve(cage, changes)
        finally:
            await cage.close()

    async def _hand_in(self, cage: CageSession) -> None:
        if self.task.spec.workspace is not None:
            async with self.blobs.reading(self.task.spec.workspace) as blob:
                async for piece in blob.pieces(MAX_PAYLOAD_BYTES):
                    await cage.send(Frame(FrameType.WORKSPACE, {"last": False}, piece))
        await cage.send(Frame(FrameType.WORKSPACE, {"last": True}))
        info = next((info for info in self.prompts.models() if info.name == self.model), None)
        job: dict[str, object] = {
            "task": self.task.id,
            "prompt": self.task.spec.prompt,
            "model": self.model,
            "tools": list(self.profile.tools),
            "native_tools": info is not None and info.native_tools,
            "limits": {
                "steps": self.profile.limits.steps,
                "tokens": self.profile.limits.tokens,
                "context_tokens": info.context_tokens if info is not None else None,
            },
        }
        await cage.send(Frame(FrameType.JOB, job))

    async def _serve(self, cage: CageSession, changes: NewBlob) -> AttemptEnd:
        for _ in range(_MAX_FRAMES):
            frame = await cage.receive()
            match frame.type:
                case FrameType.MODEL:
                    await self._reply(cage, await self._model(frame))
                case FrameType.TOOL:
                    await self._reply(cage, await self._tool(frame))
                case FrameType.TOOL_DONE:
                    await self._tool_done(frame)
                case FrameType.NOTE:
                    await self._note("note", {"text": _clip(get_str(frame.body, "text", where="note"))})
                case FrameType.CHANGES:
                    if changes.size_bytes + len(frame.payload) > self.profile.limits.disk_bytes:
                        raise CageError(
                            "too-many-changes", "cannot take the changes: larger than the disk limit"
                        )
                    await changes.write(frame.payload)
                case FrameType.RESULT:
                    return await self._result(frame, changes)
                case _:
                    raise CageError("bad-frame", f"cannot go on: the cage sent {frame.type.value!r}")
        raise CageError("agent-flood", f"cannot go on: the agent sent more than {_MAX_FRAMES} frames")

    async def _reply(self, cage: CageSession, answer: Frame) -> None:
        if answer.type is FrameType.REFUSED:  # a code of ours may come back as the reason of the end
            self.codes.add(str(answer.body["code"]))
        await cage.send(answer)

    # --- model calls ---------------------------------------------------------------------------

    async def _model(self, frame: Frame) -> Frame:
        number = get_int(frame.body, "id", where="model")
        self.steps += 1
        limits = self.profile.limits
        if self.steps > limits.steps:
            return _refused(
                number, "step-limit", f"the task has used its {limits.steps} steps", is_fatal=True
            )
        if self.tokens >= limits.tokens:
            return _refused(
                number, "token-limit", f"the task has used its {limits.tokens} tokens", is_fatal=True
            )
        keys = ("messages", "tools", "tool_choice", "max_tokens", "temperature", "frequency_penalty")
        body = {key: frame.body[key] for key in keys if key in frame.body}
        prompt = parse_chat(json.dumps({**body, "model": self.model}).encode("utf-8", "surrogatepass"))
        started_s = self.clock.monotonic_s()
        try:
            routed, answer = await self._ask(prompt)
        except EngineError as exc:
            if exc.code != "no-tool-call":
                raise
            # The engine is well, the model talks nonsense: the agent counts that and gives up in time.
            await self._note("model", {"step": self.steps, "text": exc.message, "tool_calls": []}, steps=1)
            usage = {"prompt_tokens": 0, "completion_tokens": 0}
            said = {"id": number, "text": exc.message, "tool_calls": [], "finish": "stop", "usage": usage}
            return Frame(FrameType.MODEL_OK, said)
        except (Denied, BadRequest) as exc:
            await self._note("decision", {"action": "infer", **_no(exc)})
            return _refused(number, exc.code, exc.message, rule=getattr(exc, "rule", ""), is_fatal=True)
        used = answer.usage.prompt_tokens + answer.usage.completion_tokens
        self.tokens += used
        calls = [{"name": call.name, "arguments": _clip(call.arguments)} for call in answer.tool_calls]
        await self._note(
            "model",
            {
                "step": self.steps,
                "text": _clip(answer.text),
                "tool_calls": calls,
                "usage": asdict(answer.usage),
                "model": self.model,
                "node": self.prompts.node.name,
                "zone": routed.permit.request.zone.value,
                "rule": routed.permit.rule,
                "receipt": routed.receipt.id,
                "duration_ms": round((self.clock.monotonic_s() - started_s) * 1000),
            },
            steps=1,
            tokens=used,
        )
        return Frame(
            FrameType.MODEL_OK,
            {
                "id": number,
                "text": answer.text,
                "tool_calls": [asdict(call) for call in answer.tool_calls],
                "finish": answer.finish,
                "usage": asdict(answer.usage),
            },
        )

    async def _ask(self, prompt: Prompt) -> tuple[Routed, Answer]:
        """Route one prompt; a busy engine is waited for a little before the whole task is put back."""
        for tries_left in reversed(range(_BUSY_TRIES)):
            routed = await self.prompts.route(self.speaker, prompt)
            try:
                return routed, await routed.complete()
            except Unavailable as exc:
                if not tries_left:
                    raise
                await asyncio.sleep(exc.retry_after_s)
        raise AssertionError

    # --- tools ---------------------------------------------------------------------------------

    async def _tool(self, frame: Frame) -> Frame:
        number = get_int(frame.body, "id", where="tool")
        tool = _clip(get_str(frame.body, "tool", where="tool"))
        arguments = json.dumps(get_object(frame.body, "arguments", where="tool"), sort_keys=True)
        await self._note("tool", {"id": number, "tool": tool, "arguments": _clip(arguments)})
        if tool not in TOOLS:
            return _refused(number, "unknown-tool", f"there is no tool {tool[:80]!r}")
        sha256 = hashlib.sha256(arguments.encode("utf-8", "surrogatepass")).hexdigest()
        outcome, receipt = await self.tools.decide(self.speaker, tool, sha256)
        said = {"action": "tool", "tool": tool, "receipt": receipt}
        if isinstance(outcome, NeedsApproval):
            try:
                outcome = await self._approved(outcome, tool, arguments)
            except Denied as exc:
                outcome = exc
        if isinstance(outcome, Denied):
            await self._note("decision", {**said, **_no(outcome)})
            return _refused(number, outcome.code, outcome.message, rule=outcome.rule)
        if outcome.limits.log:
            log.info("rule %s allows %s to %s, receipt %s", outcome.rule, tool, self.task.id, receipt)
        await self._note("decision", {**said, "decision": "allow", "rule": outcome.rule, "why": ""})
        if TOOLS[tool].untrusted_input and not self.speaker.tainted:
            await self._taint(tool)
        return Frame(FrameType.PERMIT, {"id": number, "rule": outcome.rule})

    async def _approved(self, needs: NeedsApproval, tool: str, arguments: str) -> Permit:
        if len(arguments) > _SHOWN_CHARS:
            raise Denied(
                "too-large-to-approve",
                f"cannot ask a person about {len(arguments)} characters of arguments: at most {_SHOWN_CHARS}",
                rule=needs.rule,
                where=needs.where,
            )
        shown = arguments.encode("utf-8", "replace").decode()
        facts = {"action": "tool", "tool": tool, "arguments": shown}
        row = await self.tools.desk.ask(needs, task_id=self.task.id, facts=facts, exact=arguments)
        if row.state == "pending":
            await self._note("approval", {"id": row.id, "state": "pending", "facts": dict(row.facts)})
            await self._change_state(TaskState.WAITING, "approval-needed")
            row = await self.tools.desk.wait(row, at_most_s=_HOLD_S)
            if row.state == "pending":
                raise Suspended
            await self._change_state(TaskState.RUNNING, row.state)
        await self._note("approval", {"id": row.id, "state": row.state, "facts": dict(row.facts)})
        return self.tools.desk.permit(needs, row, exact=arguments)

    async def _change_state(self, state: TaskState, code: str) -> None:
        await self.store.move(
            self.task.id, attempt=self.task.attempt, to=state, now_ms=self.clock.now_ms(), code=code
        )
        await self.tell()

    async def _taint(self, tool: str) -> None:
        self.speaker = Speaker(
            principal=self.speaker.principal,
            label=self.speaker.label,
            task_id=self.speaker.task_id,
            tainted=True,
        )
        await self._note("note", {"text": f"{tool} takes untrusted input: the task is tainted"}, tainted=True)

    async def _tool_done(self, frame: Frame) -> None:
        tool = get_str(frame.body, "tool", where="tool-done")
        if tool not in TOOLS:
            raise CageError("bad-frame", "cannot go on: the cage reports a tool that does not exist")
        facts: dict[str, object] = {
            "id": get_int(frame.body, "id", where="tool-done"),
            "tool": tool,
            "ok": get_bool(frame.body, "ok", where="tool-done"),
            "bytes": get_int(frame.body, "bytes", where="tool-done"),
            "duration_ms": get_int(frame.body, "duration_ms", where="tool-done"),
        }
        self.receipts.append("tool", {"task": self.task.id, "attempt": self.task.attempt, **facts})
        text = _clip(get_str(frame.body, "text", where="tool-done"))
        await self._note("tool-result", {**facts, "text": text})

    # --- the end -------------------------------------------------------------------------------

    async def _result(self, frame: Frame, untrusted: NewBlob) -> AttemptEnd:
        ok = get_str(frame.body, "state", where="result") == TaskState.SUCCEEDED.value
        code = get_str(frame.body, "code", where="result")
        if code not in self.codes:  # the code goes into a receipt: no words of the agent's own
            code = "" if ok else "agent-failed"
        summary = _clip(get_str(frame.body, "summary", where="result"))
        deleted = frame.body.get("deleted")
        paths = [path for path in deleted if isinstance(path, str)] if isinstance(deleted, list) else []
        changes = None
        seen = _Seen()
        if untrusted.size_bytes:
            await untrusted.inspect(lambda read_at: seen.read(read_at, untrusted.size_bytes))
            changes = await untrusted.finish()
        for path in paths:
            seen.add(_clip(path), "deleted", 0)
        if seen.count:
            await self._note("changes", {"files": seen.files, "count": seen.count})
        state = TaskState.SUCCEEDED if ok else TaskState.FAILED
        message = "" if ok else "the agent gave up; its last words are the summary"
        return AttemptEnd(state, code, message, summary=summary, changes=changes)

    async def _note(
        self,
        kind: str,
        data: dict[str, object],
        *,
        steps: int = 0,
        tokens: int = 0,
        tainted: bool | None = None,
    ) -> None:
        await self.store.note(
            self.task.id,
            attempt=self.task.attempt,
            now_ms=self.clock.now_ms(),
            kind=kind,
            data=data,
            steps=steps,
            tokens=tokens,
            tainted=tainted,
        )
        await self.tell()


def _refused(number: int, code: str, message: str, *, rule: str = "", is_fatal: bool = False) -> Frame:
    body = {"id": number, "code": code, "message": message, "rule": rule, "fatal": is_fatal}
    return Frame(FrameType.REFUSED, body)


def _no(exc: MycoswarmError) -> dict[str, object]:
    rule = exc.rule if isinstance(exc, Denied) else ""
    return {"decision": "deny", "rule": rule, "why": exc.message, "code": exc.code}


@dataclass(slots=True)
class _Seen:
    """The changes of an attempt: how many, and as many of them as one event holds."""

    files: list[dict[str, object]] = field(default_factory=list)
    count: int = 0
    _left_bytes: int = _PATHS_BYTES

    def add(self, path: str, kind: str, size_bytes: int) -> None:
        self.count += 1
        self._left_bytes -= len(path.encode("utf-8", "replace")) + 60
        if self._left_bytes >= 0:
            self.files.append({"path": path, "kind": kind, "bytes": size_bytes})

    def read(self, untrusted: ReadAt, size_bytes: int) -> None:
        """Add what an archive holds, or raise BadRequest."""
        for entry in list_workspace(untrusted, size_bytes):
            self.add(entry.path, "written", entry.size_bytes)


def _clip(untrusted: str) -> str:
    """Bound a text and make it storable: a lone surrogate is legal in JSON and in nothing else."""
    data = untrusted.encode("utf-8", "replace")
    more = "" if len(data) <= _TEXT_BYTES else " […]"
    return data[:_TEXT_BYTES].decode("utf-8", "ignore") + more
