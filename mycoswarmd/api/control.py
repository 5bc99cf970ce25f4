"""The control interface under /api: what mycoswarmctl does, for local callers and operators."""

import hashlib
import json
import logging
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, replace

from aiohttp.web_response import Response, StreamResponse

from mycoswarmd.api.access import share_of
from mycoswarmd.api.call import Call, json_answer
from mycoswarmd.api.handler import abort
from mycoswarmd.api.openai import send
from mycoswarmd.core.names import NAME
from mycoswarmd.core.placement import Candidate, why_not
from mycoswarmd.core.policy.evaluate import NeedsApproval, Permit, evaluate
from mycoswarmd.core.policy.explain import explain as explain_request
from mycoswarmd.core.policy.request import check_declared, parse_request
from mycoswarmd.core.tasks import FINAL, Event, Task, TaskSpec, TaskState
from mycoswarmd.core.types import Action, Request, TaskId
from mycoswarmd.errors import BadRequest, Denied, StoreError, Unavailable
from mycoswarmd.flow.approve import parse_principal
from mycoswarmd.flow.ports import ApprovalRow, KeyRow
from mycoswarmd.flow.prompt import Absent, Speaker, Why
from mycoswarmd.wire.jsonv import get_bool, get_int, get_str
from mycoswarmd.wire.prompt import Prompt, PromptKind

log = logging.getLogger(__name__)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PAGE = 500
# The final attempt's `changes` event is just before its final state.
_LAST_EVENTS = 5
# How long a follower's connection may be silent before it is told that the task still lives.
_SILENT_S = 10.0
_TAR = "application/x-tar"
# What is in memory for each client that reads a blob: there may be hundreds.
_PIECE_BYTES = 64 << 10


async def status(call: Call) -> StreamResponse:
    """Report the node."""
    return json_answer(await call.services.machine.status())


async def doctor(call: Call) -> StreamResponse:
    """Report what is missing or weak."""
    return json_answer({"checks": await call.services.machine.doctor()})


async def security(call: Call) -> StreamResponse:
    """Report what each unit has proved about its own confinement."""
    return json_answer(await call.services.machine.security())


async def models(call: Call) -> StreamResponse:
    """Report every model with all that is known of it."""
    rows = [
        {
            "name": info.name,
            "engine": info.engine,
            "zone": info.zone.value,
            "dest": info.dest,
            "context_tokens": info.context_tokens,
            "kinds": sorted(kind.value for kind in info.kinds),
            "native_tools": info.native_tools,
            "loaded": info.loaded,
            "size_bytes": info.size_bytes,
            "node": info.node,
        }
        for info in call.services.prompts.models()
    ]
    return json_answer({"models": rows})


# --- tasks -------------------------------------------------------------------------------------


async def put_blob(call: Call) -> StreamResponse:
    """Store a workspace under its hash, for someone who may post some task."""
    claimed = call.path["sha256"]
    if not _SHA256.fullmatch(claimed):
        raise BadRequest("wrong-hash", "cannot store this: the path does not end with a sha256 in hex")
    assert call.untrusted_pieces is not None
    async with _turn(call), call.services.blobs.writing(expect_sha256=claimed) as blob:
        async for piece in call.untrusted_pieces:
            await blob.write(piece)
        return json_answer({"sha256": await blob.finish()})


async def submit(call: Call) -> StreamResponse:
    """Accept a task; it is durable when this answers."""
    body = call.json()
    policy = call.services.policy.policy
    label = get_str(body, "label", where="body", default="", max_len=64)
    deadline_s = get_int(body, "deadline_s", where="body", default=0, low=0, high=30 * 86_400)
    now_ms = call.services.clock.now_ms()
    spec = TaskSpec(
        prompt=get_str(body, "prompt", where="body", max_len=1 << 20),
        agent=get_str(body, "agent", where="body", max_len=64),
        label=label or (policy.labels.default if policy is not None else ""),
        submitter=call.principal,
        model=get_str(body, "model", where="body", default="", max_len=200) or None,
        priority=get_int(body, "priority", where="body", default=5, low=0, high=9),
        deadline_at_ms=now_ms + deadline_s * 1000 if deadline_s else None,
        workspace=_hash_or_none(get_str(body, "workspace", where="body", default="", max_len=64)),
        repeatable=get_bool(body, "repeatable", where="body", default=True),
        idempotency_key=get_str(body, "idempotency_key", where="body", default="", max_len=200) or None,
    )
    if not spec.prompt.strip():
        raise BadRequest("bad-request", "cannot take a task without a prompt", where="prompt")
    if label and policy is not None and label not in policy.labels.order:
        raise BadRequest(
            "unknown-label",
            f"cannot use label {label!r}: the policy does not have it",
            where="label",
            hint=f"labels: {', '.join(policy.labels.order)}",
        )
    task, is_new = await call.services.tasks.submit(call.principal, spec)
    # Without the prompt, which may be large: what was done is always said, and a large answer may be refused.
    return json_answer({"task": _summary_row(task)}, status=202 if is_new else 200)


async def tasks(call: Call) -> StreamResponse:
    """List tasks: all for those who administer the node, their own for others."""
    state = call.request.query.get("state")
    if state is not None and state not in TaskState.__members__.values():
        raise BadRequest(
            "bad-request",
            "cannot list tasks: no such state",
            where="state",
            hint=", ".join(state.value for state in TaskState),
        )
    limit = call.number("limit", 100, low=1, high=1000)
    submitter = None if administers(call) else call.principal.describe()
    states = frozenset({TaskState(state)}) if state else None
    rows = await call.services.task_store.list(states=states, limit=limit, submitter=submitter)
    return json_answer({"tasks": [_summary_row(task) for task in rows]})


async def task(call: Call) -> StreamResponse:
    """Show one task with its open questions."""
    found = await call.services.task_store.get(TaskId(call.path["id"]))
    open_rows = await call.services.approvals.pending(task_id=found.id)
    return json_answer(
        {"task": await _task_row(call, found), "approvals": [_approval_row(row) for row in open_rows]}
    )


async def events(call: Call) -> StreamResponse:
    """Return a task's transcript as lines of JSON; with follow=1, until the task has ended."""
    task_id = TaskId(call.path["id"])
    after = call.number("after", 0, low=0, high=1 << 53)
    follow = call.number("follow", 0, low=0, high=1) == 1
    response = call.stream({"Content-Type": "application/x-ndjson", "Cache-Control": "no-cache"})
    await response.prepare(call.request)
    while True:
        # The state is read before the events, so that the last event is not missed.
        found = await call.services.task_store.get(task_id)
        rows = await call.services.task_store.events(task_id, after=after, limit=_PAGE)
        for row in rows:
            await send(response, _event_line(row))
            after = row.seq
        if len(rows) == _PAGE:
            continue
        if not follow or found.state in FINAL:
            break
        await call.services.tasks.wait_for_change(_SILENT_S)
    await response.write_eof()
    return response


async def changes(call: Call) -> StreamResponse:
    """Return what the agent changed, as a tar; 204 when nothing."""
    found = await call.services.task_store.get(TaskId(call.path["id"]))
    if found.changes is None:
        return Response(status=204)
    return await _send_blob(call, found.changes)


async def workspace(call: Call) -> StreamResponse:
    """Return the workspace that the task was given, as a tar; 204 when none."""
    found = await call.services.task_store.get(TaskId(call.path["id"]))
    if found.spec.workspace is None:
        return Response(status=204)
    return await _send_blob(call, found.spec.workspace)


@asynccontextmanager
async def _turn(call: Call) -> AsyncIterator[None]:
    """Hold a part of what blobs that come or go may take of the node; Unavailable where there is none."""
    local = "owner" if call.principal.is_owner else "account"
    room = call.services.blob_rooms["operator" if call.principal.operator_id is not None else local]
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(room.taken(share_of(call.principal), 1))
        except Unavailable as exc:
            raise Unavailable(
                "too-many-blobs",
                "cannot take or send the workspace or the changes: too many others come or go now",
                hint="send or read fewer at a time",
            ) from exc
        yield


async def _send_blob(call: Call, sha256: str) -> StreamResponse:
    async with _turn(call), call.services.blobs.reading(sha256) as blob:
        response = call.stream({"Content-Type": _TAR})
        response.content_length = blob.size_bytes
        await response.prepare(call.request)
        try:
            async for piece in blob.pieces(_PIECE_BYTES):
                await send(response, piece)
        except (StoreError, ConnectionError) as exc:
            # The head said how much would come: the end of the connection says that it did not.
            if isinstance(exc, StoreError):
                log.error("cannot send a blob: %s", exc)  # noqa: TRY400 - no traceback for a broken disk
            if call.request.transport is not None:
                abort(call.request.transport)
            raise ConnectionResetError from exc
        await response.write_eof()
        return response


async def cancel(call: Call) -> StreamResponse:
    """End a task."""
    ended = await call.services.tasks.cancel(TaskId(call.path["id"]))
    return json_answer({"task": _summary_row(ended)})


async def retry(call: Call) -> StreamResponse:
    """Put a parked or failed task back into the queue."""
    queued = await call.services.tasks.retry(call.principal, TaskId(call.path["id"]))
    return json_answer({"task": _summary_row(queued)})


# --- approvals ---------------------------------------------------------------------------------


async def approvals(call: Call) -> StreamResponse:
    """List what waits for a person."""
    return json_answer({"approvals": [_approval_row(row) for row in await call.services.approvals.pending()]})


async def approve(call: Call) -> StreamResponse:
    """Answer a question."""
    is_yes = get_bool(call.json(), "approve", where="body")
    row = await call.services.tasks.answer(call.path["id"], approve=is_yes, by=call.principal)
    return json_answer({"approval": _approval_row(row)})


# --- keys --------------------------------------------------------------------------------------


async def keys(call: Call) -> StreamResponse:
    """List API keys."""
    return json_answer({"keys": [_key_row(row) for row in await call.services.keys.list()]})


async def create_key(call: Call) -> StreamResponse:
    """Make an API key; the secret is in this answer and nowhere else."""
    name = get_str(call.json(), "name", where="body", max_len=64)
    if not NAME.fullmatch(name):
        raise BadRequest(
            "bad-name", f"cannot name a key {name!r}: letters, digits, dot, dash, underscore", where="name"
        )
    secret = f"mk-{call.services.entropy.token(24)}"
    row = await call.services.keys.create(
        key_id=f"k-{call.services.entropy.token(4)}",
        name=name,
        secret_sha256=hashlib.sha256(secret.encode()).hexdigest(),
        now_ms=call.services.clock.now_ms(),
    )
    await _admin_receipt(call, "key-created", key=row.name)
    return json_answer({"key": _key_row(row), "secret": secret}, status=201)


async def revoke_key(call: Call) -> StreamResponse:
    """Revoke an API key; it is refused from now on."""
    row = await call.services.keys.revoke(call.path["name"], now_ms=call.services.clock.now_ms())
    await _admin_receipt(call, "key-revoked", key=row.name)
    return json_answer({"key": _key_row(row)})


# --- policy ------------------------------------------------------------------------------------


async def policy(call: Call) -> StreamResponse:
    """Show the policy in force."""
    return json_answer(call.services.policy.report())


async def reload(call: Call) -> StreamResponse:
    """Read the policy file again; refuse it and keep the old one if anything is wrong."""
    return json_answer(await call.services.policy.reload())


async def explain(call: Call) -> StreamResponse:
    """Say what would be decided, what each rule lacked, and whether anybody serves the model."""
    body = call.json()
    in_force = call.services.policy.policy
    request = parse_request(body, in_force, speaker=call.principal)
    if in_force is not None:
        check_declared(request, in_force)
    if request.action is not Action.INFER or request.model is None:
        return json_answer(explain_request(in_force, request).as_json())
    prompt = Prompt(kind=PromptKind.CHAT, model=request.model, params={})
    weighed = sorted(_weigh(call, request, prompt), key=lambda why: _RANK[_decision(why.outcome)])
    if "zone" in body:
        answer = explain_request(in_force, request).as_json()
        return json_answer({**answer, "served": any(_is_there(why.candidate, request) for why in weighed)})
    # Without a zone, the question is what would become of a real prompt.
    if weighed:
        best = weighed[0].candidate
        request = replace(request, zone=best.zone, dest=best.dest, node=best.node, tier=best.tier)
    answer = explain_request(in_force, request).as_json()
    prefer = in_force.prefer if in_force is not None else ()
    answer["served"] = bool(weighed)
    answer["candidates"] = [
        *[_candidate_row(why, weighed[0], prefer) for why in weighed],
        *[_absent_row(prompt.model, one) for one in call.services.prompts.absent(prompt)],
    ]
    return json_answer(answer)


def _is_there(candidate: Candidate, request: Request) -> bool:
    return candidate.zone is request.zone and request.dest in {None, candidate.dest}


_RANK = {"allow": 0, "ask": 1, "deny": 2}


def _weigh(call: Call, request: Request, prompt: Prompt) -> list[Why]:
    speaker = Speaker(
        principal=request.principal, start=request.start, label=request.label, tainted=request.tainted
    )
    return call.services.prompts.weigh(speaker, prompt)


def _decision(outcome: Permit | Denied | NeedsApproval) -> str:
    if isinstance(outcome, Permit):
        return "allow"
    return "deny" if isinstance(outcome, Denied) else "ask"


def _candidate_row(why: Why, winner: Why, prefer: Sequence[str]) -> dict[str, object]:
    reason = ""
    if isinstance(why.outcome, Denied):
        reason = why.outcome.message
    elif why is not winner and _decision(why.outcome) == _decision(winner.outcome):
        reason = why_not(why.candidate, winner.candidate, prefer=prefer)
    elif why is not winner:
        reason = "a person would have to approve it"
    return {
        "node": why.candidate.node,
        "engine": why.candidate.engine,
        "model": why.candidate.model,
        "zone": why.candidate.zone.value,
        "dest": why.candidate.dest,
        "decision": _decision(why.outcome),
        "rule": why.outcome.rule,
        "why": reason,
    }


def _absent_row(model: str, absent: Absent) -> dict[str, object]:
    return {
        "node": absent.node,
        "engine": absent.engine,
        "model": model,
        "zone": None,
        "dest": None,
        "decision": "absent",
        "rule": "",
        "why": absent.why,
    }


# --- receipts ----------------------------------------------------------------------------------


async def receipts(call: Call) -> StreamResponse:
    """Return a page of the chain."""
    last = call.number("last", 0, low=0, high=1000)
    rows = await call.services.receipts.page(
        after=call.number("after", 0, low=0, high=1 << 53),
        limit=call.number("limit", 100, low=1, high=1000),
        last=last or None,
    )
    return json_answer({"receipts": list(rows)})


async def receipt(call: Call) -> StreamResponse:
    """Return one record."""
    return json_answer(await call.services.receipts.one(call.path["id"]))


async def receipts_head(call: Call) -> StreamResponse:
    """Return the head, to be kept elsewhere."""
    return json_answer(await call.services.receipts.top())


async def receipts_verify(call: Call) -> StreamResponse:
    """Walk the whole chain."""
    head = get_str(call.json(), "head", where="body", default="", max_len=100)
    return json_answer(await call.services.receipts.check(head or None))


# --- rows --------------------------------------------------------------------------------------


def administers(call: Call) -> bool:
    """Tell whether the policy lets the caller administer this node."""
    return isinstance(_admin_decision(call), Permit)


def may_administer(call: Call) -> bool:
    """Tell whether the caller could administer this node, be it after a person's yes."""
    return not isinstance(_admin_decision(call), Denied)


def _admin_decision(call: Call) -> Permit | NeedsApproval | Denied:
    asked = Request(action=Action.ADMIN, principal=call.principal, start=call.start)
    return evaluate(call.services.policy.policy, call.services.prompts.here_and_now(asked))


async def _admin_receipt(call: Call, what: str, **facts: object) -> None:
    body = {"action": "admin", "what": what, "by": call.principal.describe(), **facts}
    await call.services.receipts.durable(call.services.receipts.append("admin", body))


def _summary_row(task: Task) -> dict[str, object]:
    return {
        "id": task.id,
        "state": task.state.value,
        "agent": task.spec.agent,
        "label": task.label,
        "tainted": task.tainted,
        "model": task.spec.model,
        "submitter": task.spec.submitter.describe(),
        "priority": task.spec.priority,
        "attempt": task.attempt,
        "created_at_ms": task.created_at_ms,
        "updated_at_ms": task.updated_at_ms,
        "deadline_at_ms": task.spec.deadline_at_ms,
        "code": task.code,
        "message": task.message,
        "steps": task.steps,
        "tokens": task.tokens,
        "repeatable": task.spec.repeatable,
    }


async def _task_row(call: Call, task: Task) -> dict[str, object]:
    return {
        **_summary_row(task),
        "prompt": task.spec.prompt,
        "summary": task.summary,
        "workspace": task.spec.workspace,
        "changes": task.changes,
        "deleted": await _deleted(call, task) if task.state in FINAL else [],
    }


async def _deleted(call: Call, task: Task) -> list[str]:
    """Find which files the final attempt deleted; its `changes` event is among the last ones."""
    last = await call.services.task_store.events(task.id, after=0, limit=_PAGE, last=_LAST_EVENTS)
    found: list[str] = []
    for row in last:
        files = row.data.get("files")
        if row.kind == "changes" and row.attempt == task.attempt and isinstance(files, list):
            found = [file["path"] for file in files if file["kind"] == "deleted"]
    return found


def _event_line(event: Event) -> bytes:
    return json.dumps(asdict(event), ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _approval_row(row: ApprovalRow) -> dict[str, object]:
    by = parse_principal(row.decided_by).describe() if row.decided_by else ""
    return {
        "id": row.id,
        "task_id": row.task_id,
        "facts": dict(row.facts),
        "state": row.state,
        "asked_at_ms": row.asked_at_ms,
        "expires_at_ms": row.expires_at_ms,
        "decided_by": by,
    }


def _key_row(row: KeyRow) -> dict[str, object]:
    return asdict(row)


def _hash_or_none(text: str) -> str | None:
    if not text:
        return None
    if not _SHA256.fullmatch(text):
        raise BadRequest(
            "bad-request", "cannot use this workspace: it must be a sha256 in hex", where="workspace"
        )
    return text
