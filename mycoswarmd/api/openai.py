"""The OpenAI dialect over HTTP: models, chat completions, completions, embeddings.

Every answer says which node, zone, rule and model served it, and the receipt of the decision.
Errors before the first byte are HTTP errors; after it, an error event in the stream.
Source: the OpenAI API reference, "Chat", "Completions", "Embeddings", "Models".
"""

import asyncio
from collections.abc import Callable
from contextlib import aclosing

from aiohttp.web_response import Response, StreamResponse

from mycoswarmd.api.call import Call
from mycoswarmd.core.types import Start, Zone
from mycoswarmd.errors import BadRequest, MycoswarmError
from mycoswarmd.flow.prompt import Routed, Speaker
from mycoswarmd.wire.openai import (
    ChunkEncoder,
    encode_answer,
    encode_embeddings,
    encode_error,
    encode_models,
    parse_chat,
    parse_completion,
    parse_embedding,
)
from mycoswarmd.wire.prompt import Prompt

LABEL_HEADER = "X-Mycoswarm-Label"
# A label is a short word of the policy; anything longer is a mistake or an attack.
_LABEL_CHARS = 64
# A person who scrolls back still reads; a program that does not read for this long never will.
_UNREAD_S = 60.0


async def models(call: Call) -> StreamResponse:
    """List every model by name, as OpenAI does; to another node, those that are served on this very one."""
    infos = {
        info.name: info
        for info in call.services.prompts.models()
        if call.start is Start.LOCAL or info.zone is Zone.SELF
    }
    body = encode_models([(info.name, 0, info.engine) for info in infos.values()])
    return Response(body=body, content_type="application/json")


async def chat(call: Call) -> StreamResponse:
    """Answer a chat."""
    return await _answer(call, parse_chat)


async def completions(call: Call) -> StreamResponse:
    """Go on with a text."""
    return await _answer(call, parse_completion)


async def embeddings(call: Call) -> StreamResponse:
    """Return vectors."""
    prompt = parse_embedding(call.untrusted_body)
    routed = await call.services.prompts.route(speaker(call), prompt)
    result = await routed.embed()
    return Response(
        body=encode_embeddings(prompt, result),
        content_type="application/json",
        headers=_headers(call, routed),
    )


def speaker(call: Call) -> Speaker:
    """Gather who speaks and how sensitive it is, from the connection and the label header."""
    labels = call.request.headers.getall(LABEL_HEADER, [])
    if len(labels) > 1 or any(len(label) > _LABEL_CHARS for label in labels):
        raise BadRequest("bad-label", f"cannot use {LABEL_HEADER}: it must be one word of the policy")
    return Speaker(principal=call.principal, start=call.start, label=labels[0] if labels else None)


async def _answer(call: Call, parse: Callable[[bytes], Prompt]) -> StreamResponse:
    prompt = parse(call.untrusted_body)
    routed = await call.services.prompts.route(speaker(call), prompt)
    created_s = call.services.clock.now_ms() // 1000
    answer_id = f"chatcmpl-{routed.receipt.id}"
    if prompt.stream:
        encoder = ChunkEncoder(prompt, id=answer_id, created_s=created_s)
        return await _stream(call, routed, encoder)
    answer = await routed.complete()
    return Response(
        body=encode_answer(prompt, answer, id=answer_id, created_s=created_s),
        content_type="application/json",
        headers=_headers(call, routed),
    )


async def _stream(call: Call, routed: Routed, encoder: ChunkEncoder) -> StreamResponse:
    async with aclosing(routed.stream()) as deltas:
        first = await anext(deltas)  # an engine's refusal is still an HTTP error
        response = call.stream(
            {
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                **_headers(call, routed),
            }
        )
        await response.prepare(call.request)
        try:
            await send(response, encoder.encode(first))
            async for delta in deltas:
                if piece := encoder.encode(delta):
                    await send(response, piece)
            await send(response, encoder.done())
        except MycoswarmError as exc:
            await send(response, b"data: " + encode_error(exc) + b"\n\n")
        await response.write_eof()
        return response


async def send(response: StreamResponse, piece: bytes) -> None:
    """Write a piece; a client that does not read for a minute loses its connection."""
    try:
        async with asyncio.timeout(_UNREAD_S):
            await response.write(piece)
    except TimeoutError as exc:
        raise ConnectionResetError from exc


def _headers(call: Call, routed: Routed) -> dict[str, str]:
    return {
        "X-Mycoswarm-Node": header_text(routed.node),
        "X-Mycoswarm-Zone": routed.permit.request.zone.value,
        "X-Mycoswarm-Rule": routed.permit.rule,
        "X-Mycoswarm-Receipt": routed.receipt.id,
        "X-Mycoswarm-Model": header_text(routed.prompt.model),
    }


def header_text(text: str) -> str:
    """Keep a header a header: printable ASCII of a name, anything else replaced."""
    return "".join(char if " " < char <= "~" else "?" for char in text[:200])
