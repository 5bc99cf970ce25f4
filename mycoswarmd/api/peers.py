"""What members and newcomers ask one another, under /swarm on the swarm's listener.

Law: thin; who may ask what is in routes.py, what the answers rest on in flow. An address is taken from
the connection, never from what a caller says of itself; only the port is the caller's word, and a hint.
Source: docs/wire.md.
"""

import asyncio
from dataclasses import replace

from aiohttp.web_response import Response, StreamResponse

from mycoswarmd.api.call import Call, json_answer
from mycoswarmd.api.openai import send
from mycoswarmd.api.services import OwnWord, SwarmDesk
from mycoswarmd.errors import Unavailable
from mycoswarmd.flow.swarmports import Hint, PeerAddress
from mycoswarmd.wire.jsonv import get_int
from mycoswarmd.wire.peer import HEARTBEAT_S, encode_word

# A node whose state flickers does not flood the others.
_PACE_S = 0.2
_NDJSON = "application/x-ndjson"


def desk_of(call: Call) -> SwarmDesk:
    """Return everything about the swarm; Unavailable where this daemon was started without."""
    desk = call.services.swarm
    if desk is None:
        raise Unavailable("swarm-off", "cannot do this: this node runs without the swarm", retry_after_s=3600)
    return desk


async def hello(call: Call) -> StreamResponse:
    """Answer a newcomer's greeting with this node's proof."""
    return json_answer(await desk_of(call).invitations.hello(call.json()))


async def confirm(call: Call) -> StreamResponse:
    """Check a newcomer's proof and sign it in."""
    return json_answer(await desk_of(call).invitations.confirm(call.json()))


async def pull(call: Call) -> StreamResponse:
    """Answer anybody with the statements that it lacks; they prove themselves."""
    desk, body = desk_of(call), call.json()
    port = get_int(body, "port", where="body", default=0, low=0, high=65535)
    answer = await desk.swarm.pull(body)
    address = _caller_at(call, port)
    if address is not None:
        desk.fleet.hint(Hint(address=address, node_id=call.principal.node_id))
    return json_answer(answer)


async def sync(call: Call) -> StreamResponse:
    """Exchange statements with a member, and learn where it listens."""
    desk, body = desk_of(call), call.json()
    port = get_int(body, "port", where="body", default=0, low=0, high=65535)
    answer = await desk.swarm.sync(body)
    address = _caller_at(call, port)
    if address is not None and call.principal.node_id is not None:
        desk.fleet.hint(Hint(address=address, node_id=call.principal.node_id))
    return json_answer(answer)


async def word(call: Call) -> StreamResponse:
    """Say once what this node says about itself."""
    return Response(body=encode_word(desk_of(call).word.now()), content_type="application/json")


async def watch(call: Call) -> StreamResponse:
    """Say what this node says about itself, now and whenever it changes, until the caller leaves."""
    source = desk_of(call).word
    response = call.stream({"Content-Type": _NDJSON, "Cache-Control": "no-cache"})
    await response.prepare(call.request)
    said = None
    while True:
        now = source.now()
        if (news := replace(now, uptime_s=0)) != said:
            said = news
            await send(response, encode_word(now) + b"\n")
            await asyncio.sleep(_PACE_S)
            continue
        while not await _changes(source):
            await send(response, b"\n")


async def _changes(source: OwnWord) -> bool:
    """Tell whether the word changes before the next heartbeat is due."""
    try:
        async with asyncio.timeout(HEARTBEAT_S):
            await source.next_change()
    except TimeoutError:
        return False
    return True


async def signer_key(call: Call) -> StreamResponse:
    """Make this node's signing key, once, and say its public half to a signer that will vouch for it."""
    return json_answer({"key": await desk_of(call).swarm.make_signer_key()})


def _caller_at(call: Call, port: int) -> PeerAddress | None:
    """Return where the caller says that it listens, at the address that the connection comes from."""
    transport = call.request.transport
    peername = transport.get_extra_info("peername") if transport is not None else None
    if not port or not isinstance(peername, tuple):
        return None
    return PeerAddress(host=str(peername[0]).removeprefix("::ffff:"), port=port)
