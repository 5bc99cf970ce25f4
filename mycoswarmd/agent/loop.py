"""The loop of model calls and tool calls. Every way it can end has a code.

    agent-nonsense   three answers in a row that are no valid call
    agent-silent     three answers in a row that are empty
    agent-looped     the same call for the third time, with nothing changed in between
    step-limit, token-limit
    a code of the node's: it refused a model call for good

Rule: nothing is done before the node has answered PERMIT; a refusal is told to the model and it may
try something else.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from mycoswarmd.agent.context import Context, clean
from mycoswarmd.agent.demonstration import demonstration
from mycoswarmd.agent.files import Outcome
from mycoswarmd.agent.link import Link
from mycoswarmd.agent.offer import Progress, find_names, offer_tools
from mycoswarmd.agent.tools import Workbench
from mycoswarmd.errors import BadRequest
from mycoswarmd.wire.agent_tools import FINISH, TOOL_SCHEMAS, parse_arguments
from mycoswarmd.wire.frames import Frame, FrameType
from mycoswarmd.wire.jsonv import as_int, as_list, as_object, as_str
from mycoswarmd.wire.prompt import ToolCall

# Once is an accident, twice a habit, three times a state.
_PATIENCE = 3
# A model that calls more tools in one breath has not waited for their results.
_CALLS = 8
# What the transcript gets of a result (the node clips too).
_DONE_CHARS = 4096
_LISTED_FILES = 40
_DEFAULT_CONTEXT = 4096
_ANSWER_TOKENS = 1024
# At temperature 0 a small model repeats its sentences until the bound. Measured with one of 135 million
# parameters: with 0 always, with 0.4 and 0.6 often, with 0.8 seldom; with 1.0 it invents words instead.
_GUIDED_PARAMS = {"frequency_penalty": 0.8}
_MAX_TEXT_CHARS = 16 << 20

_SYSTEM = (
    "You do one task with tools, in a directory of files. Call one tool at a time and wait for its result. "
    "Read files before you write about them. Use what you read, and invent nothing. "
    "When the task is done, call finish."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the agent is to do."""

    prompt: str
    tools: tuple[str, ...]
    steps: int
    tokens: int
    context_tokens: int
    is_guided: bool  # the model has no tool support of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How the work ended; `summary` is the model's own words, or ours when it failed."""

    is_ok: bool
    code: str
    summary: str
    steps: int


class GaveUp(Exception):
    """The work cannot go on."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def parse_job(body: dict[str, object]) -> Job:
    """Parse a JOB frame."""
    limits = as_object(body.get("limits"), where="limits")
    tools = as_list(body.get("tools"), where="tools", max_items=64)
    context = limits.get("context_tokens")
    return Job(
        prompt=as_str(body.get("prompt"), where="prompt", max_len=_MAX_TEXT_CHARS),
        tools=tuple(as_str(tool, where="tools", max_len=64) for tool in tools),
        steps=as_int(limits.get("steps"), where="steps", low=1, high=1 << 31),
        tokens=as_int(limits.get("tokens"), where="tokens", low=1, high=1 << 62),
        context_tokens=_DEFAULT_CONTEXT
        if context is None
        else as_int(context, where="context_tokens", low=256, high=1 << 31),
        is_guided=body.get("native_tools") is not True,
    )


@dataclass(kw_only=True)
class Loop:
    """One task, from its first model call to its end."""

    job: Job
    link: Link
    bench: Workbench
    files: Sequence[str]
    steps: int = 0
    tokens: int = 0
    _empty: int = 0
    _nonsense: int = 0
    _seen: dict[tuple[str, str], int] = field(default_factory=dict)

    def run(self) -> Ending:
        """Work until the end. Cancelled and the channel's errors go through."""
        names = find_names(self.job.prompt, self.files)
        self._progress = Progress(files=list(self.files), named=names)
        answer_tokens = min(_ANSWER_TOKENS, self.job.context_tokens // 3)
        # The tools themselves are part of what the model reads.
        budget = max(128, self.job.context_tokens - answer_tokens - min(800, self.job.context_tokens // 4))
        self._context = Context(self._opening(), budget_tokens=budget)
        try:
            while True:
                summary = self._step(answer_tokens)
                if summary is not None:
                    return Ending(is_ok=True, code="", summary=summary, steps=self.steps)
        except GaveUp as exc:
            return Ending(is_ok=False, code=exc.code, summary=exc.message, steps=self.steps)

    def _opening(self) -> list[dict[str, object]]:
        shown = list(self.files[:_LISTED_FILES])
        more = [f"... and {len(self.files) - len(shown)} more"] if len(self.files) > len(shown) else []
        listing = "\n".join([*shown, *more]) or "(none)"
        return [
            {"role": "system", "content": _SYSTEM},
            *(demonstration(self.job.tools) if self.job.is_guided else ()),
            {"role": "user", "content": clean(f"Files:\n{listing}\n\nTask: {self.job.prompt}")},
        ]

    def _step(self, answer_tokens: int) -> str | None:
        """Ask the model once and do what it says; return the summary when it has finished."""
        self.link.check()
        if self.steps >= self.job.steps:
            raise GaveUp("step-limit", f"cannot go on: the task has used its {self.job.steps} steps")
        if self.tokens >= self.job.tokens:
            raise GaveUp("token-limit", f"cannot go on: the task has used its {self.job.tokens} tokens")
        self.steps += 1
        answer = self.link.ask(
            FrameType.MODEL,
            {
                "messages": self._context.messages(),
                "tools": offer_tools(self.job.tools, self._progress, is_guided=self.job.is_guided),
                "tool_choice": "required",
                "max_tokens": answer_tokens,
                "temperature": 0,
                **(_GUIDED_PARAMS if self.job.is_guided else {}),
            },
        )
        text, calls = self._read_answer(answer)
        if not calls:
            self._complain(is_empty=not text.strip())
            return None
        self._context.add_calls(text, calls)
        for call in calls:
            summary = self._call(call)
            if summary is not None:
                return summary
        return None

    def _read_answer(self, frame: Frame) -> tuple[str, list[ToolCall]]:
        if frame.type is FrameType.REFUSED:
            code = as_str(frame.body.get("code"), where="code", max_len=80)
            raise GaveUp(code, as_str(frame.body.get("message"), where="message", max_len=4096))
        if frame.type is not FrameType.MODEL_OK:
            raise BadRequest("bad-frame", f"cannot take {frame.type.value!r} for an answer of the model")
        usage = as_object(frame.body.get("usage"), where="usage")
        for key in ("prompt_tokens", "completion_tokens"):
            self.tokens += as_int(usage.get(key), where=key, low=0, high=1 << 62)
        calls = as_list(frame.body.get("tool_calls"), where="tool_calls", max_items=1 << 16)[:_CALLS]
        return as_text(frame.body.get("text")), [self._read_call(call) for call in calls]

    def _read_call(self, untrusted: object) -> ToolCall:
        obj = as_object(untrusted, where="tool_calls")
        name = as_text(obj.get("name"))[:64]
        return ToolCall(
            id=as_text(obj.get("id"))[:64] or f"call-{self.steps}",
            name=name,
            arguments=as_text(obj.get("arguments")),
        )

    def _complain(self, *, is_empty: bool) -> None:
        """Count an answer without a call and tell the model, until patience ends."""
        self._empty = self._empty + 1 if is_empty else 0
        self._nonsense += 1
        if self._empty >= _PATIENCE:
            raise GaveUp("agent-silent", f"cannot go on: the model gave {_PATIENCE} empty answers in a row")
        if self._nonsense >= _PATIENCE:
            raise GaveUp(
                "agent-nonsense", f"cannot go on: {_PATIENCE} answers in a row were no valid tool call"
            )
        self._context.add_hint("Answer with one tool call, and call finish when the task is done.")

    def _call(self, call: ToolCall) -> str | None:
        """Carry one call out and note its result; return the summary when it is `finish`."""
        try:
            arguments = self._check(call)
        except BadRequest as exc:
            self._nonsense += 1
            if self._nonsense >= _PATIENCE:
                raise GaveUp(
                    "agent-nonsense", f"cannot go on: {_PATIENCE} answers in a row were no valid tool call"
                ) from exc
            self._context.add_result(call.id, f"Error: {exc.message}. {exc.hint}")
            return None
        self._nonsense = self._empty = 0
        if call.name == FINISH:
            return str(arguments["summary"])
        times = self._seen[call.name, call.arguments] = self._seen.get((call.name, call.arguments), 0) + 1
        if times >= _PATIENCE:
            raise GaveUp(
                "agent-looped", f"cannot go on: the model made the same {call.name} call {times} times"
            )
        if times > 1:
            self._context.add_result(
                call.id, "You did this already and nothing has changed. Do the next thing."
            )
            return None
        outcome = self._permitted(call.name, arguments)
        self._context.add_result(call.id, outcome.text if outcome.ok else f"Error: {outcome.text}")
        return None

    def _check(self, call: ToolCall) -> dict[str, object]:
        if call.name in TOOL_SCHEMAS and call.name not in {*self.job.tools, FINISH}:
            raise BadRequest("unknown-tool", f"cannot call {call.name}: it is not among your tools")
        return parse_arguments(call.name, call.arguments)

    def _permitted(self, tool: str, arguments: dict[str, object]) -> Outcome:
        answer = self.link.ask(FrameType.TOOL, {"tool": tool, "arguments": arguments})
        if answer.type is FrameType.REFUSED:
            message = as_str(answer.body.get("message"), where="message", max_len=4096)
            if answer.body.get("fatal") is True:
                raise GaveUp(as_str(answer.body.get("code"), where="code", max_len=80), message)
            return Outcome(ok=False, text=f"not allowed: {message}")
        if answer.type is not FrameType.PERMIT:
            raise BadRequest("bad-frame", f"cannot take {answer.type.value!r} for a permit")
        number = self.link.last_id
        started_s = time.monotonic()
        outcome = self.bench.perform(tool, arguments)
        self.link.tell(
            FrameType.TOOL_DONE,
            {
                "id": number,
                "tool": tool,
                "ok": outcome.ok,
                "bytes": len(outcome.text.encode("utf-8", "replace")),
                "duration_ms": round((time.monotonic() - started_s) * 1000),
                "text": clean(outcome.text[:_DONE_CHARS]),
            },
        )
        if outcome.ok:
            self._progress.note(tool, str(arguments.get("path", ".")), has_changed=outcome.changed)
        if outcome.changed and tool != "run":
            self._seen.clear()  # the same question may have another answer now
        return outcome


def as_text(untrusted: object) -> str:
    """Return a string as it is, and nothing for anything else."""
    return untrusted if isinstance(untrusted, str) else ""
