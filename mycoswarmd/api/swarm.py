"""The swarm as people administer it, under /api/swarm: what mycoswarmctl does.

Law: thin; every act is `Swarm`'s or `Invitations`'. What changes who may do what is for somebody at
this machine (routes.py): an operator's key, once put out, leaves nothing behind.
"""

import ipaddress
import json
from contextlib import aclosing

from aiohttp.web_response import StreamResponse

from mycoswarmd.api.call import Call, json_answer
from mycoswarmd.api.control import administers, may_administer
from mycoswarmd.api.openai import send
from mycoswarmd.api.peers import desk_of
from mycoswarmd.api.services import SwarmDesk
from mycoswarmd.core.names import MAX_NAME_CHARS
from mycoswarmd.core.roster import Member
from mycoswarmd.core.types import Role, Unknown
from mycoswarmd.errors import BadRequest, Conflict, Unavailable
from mycoswarmd.flow.swarmports import PeerAddress, PeerState
from mycoswarmd.wire.jsonv import as_str, get_bool, get_choice, get_int, get_list, get_object, get_str
from mycoswarmd.wire.peer import Word, encode_word

SWARM_PORT = 7437
_TTL_S = 15 * 60
_DAY_S = 86_400
_NAME_CHARS = MAX_NAME_CHARS
_NODE_CHARS = 80
_CODE_CHARS = 80
_REASON_CHARS = 200
_MANY = 64


async def show(call: Call) -> StreamResponse:
    """Show the swarm as this node knows it: who is in it, how each one is, and why that is believed."""
    desk = desk_of(call)
    roster, self_id = desk.swarm.roster, desk.swarm.self_id
    if roster is None:
        # A newcomer that waits for a person's yes shows its id there and here: they must be the same.
        waiting = None if self_id is None else {"id": self_id, "name": None, "signer": False}
        body: dict[str, object] = {
            "swarm": None,
            "self": waiting,
            "roster_age_s": None,
            "nodes": [],
            "revoked": [],
        }
    else:
        me = roster.members.get(self_id or "")
        age_s = desk.swarm.age_s()
        body = {
            "swarm": {
                "id": roster.swarm_id,
                "name": roster.name,
                "epoch": roster.epoch,
                "recovery": roster.recovery.hex(),
                "statements": len(roster.hashes),
                "digest": roster.digest,
                "problems": list(roster.problems),
            },
            # A node that was put out is still itself, and may be where the swarm is taken back.
            "self": {
                "id": self_id,
                "name": me and me.name,
                "signer": me is not None and desk.swarm.is_signer(),
            },
            "roster_age_s": None if isinstance(age_s, Unknown) else age_s,
            "nodes": _nodes(desk),
            "revoked": [{"id": one, "reason": reason} for one, reason in sorted(roster.revoked.items())],
        }
    body["may_admin"] = may_administer(call)
    body["invites"] = desk.invitations.listed() if administers(call) else []
    return json_answer(body)


async def ping(call: Call) -> StreamResponse:
    """Reach a node now and say how long that took."""
    desk = desk_of(call)
    member = desk.swarm.find(call.path["node"])
    if member.id == desk.swarm.self_id or member.role is not Role.NODE:
        raise Conflict("not-a-peer", f"cannot ping {member.name!r}: it is no other node")
    ms = await desk.fleet.ping(member.id)
    address = next((one.address for one in desk.fleet.states() if one.member.id == member.id), None)
    return json_answer({"ms": round(ms, 2), "address": None if address is None else str(address)})


async def init(call: Call) -> StreamResponse:
    """Begin a swarm of this one node."""
    body = call.json()
    node_name = get_str(body, "node_name", where="body", default="", max_len=_NAME_CHARS)
    begun = await desk_of(call).swarm.init(
        get_str(body, "name", where="body", min_len=1, max_len=_NAME_CHARS),
        node_name=node_name or call.services.prompts.node.name,
        recovery_public_hex=get_str(body, "recovery", where="body", max_len=64),
    )
    return json_answer(begun, status=201)


async def invite(call: Call) -> StreamResponse:
    """Make an invitation; its code is in this answer and nowhere else."""
    body = call.json()
    made = await desk_of(call).invitations.open(
        role=get_choice({"role": "node", **body}, "role", where="body", choices=("node", "operator")),
        name=get_str(body, "name", where="body", default="", max_len=_NAME_CHARS),
        ttl_s=get_int(body, "ttl_s", where="body", default=_TTL_S, low=1, high=_DAY_S),
        needs_confirm=get_bool(body, "confirm", where="body", default=False),
    )
    return json_answer(made, status=201)


async def decide(call: Call) -> StreamResponse:
    """Say yes or no to the newcomer that waits at an invitation."""
    says = get_choice(call.json(), "decision", where="body", choices=("yes", "no"))
    desk_of(call).invitations.decide(call.path["invite"], yes=says == "yes")
    return json_answer({"invite": call.path["invite"], "decision": says})


async def cancel_invite(call: Call) -> StreamResponse:
    """Close an invitation."""
    await desk_of(call).invitations.cancel(call.path["invite"])
    return json_answer({"invite": call.path["invite"]})


async def enroll(call: Call) -> StreamResponse:
    """Join a swarm with a code from one of its signers."""
    desk, body = desk_of(call), call.json()
    code = get_str(body, "code", where="body", max_len=_CODE_CHARS)
    name = get_str(body, "name", where="body", default="", max_len=_NAME_CHARS)
    given = get_list(body, "addresses", where="body", max_items=_MANY) if "addresses" in body else []
    addresses = [_address(one, where=f"addresses[{i}]") for i, one in enumerate(given)]
    joined = await desk.newcomer.join(
        code, addresses or await desk.nearby(), name or call.services.prompts.node.name
    )
    return json_answer(joined, status=201)


async def revoke(call: Call) -> StreamResponse:
    """Put a member out for ever."""
    body = call.json()
    reason = get_str(body, "reason", where="body", default="", max_len=_REASON_CHARS)
    swarm = desk_of(call).swarm
    member = await swarm.revoke(_node(body), reason)
    return json_answer({**_member(member), "signers": swarm.signer_names()})


async def add_signer(call: Call) -> StreamResponse:
    """Let another node sign, too."""
    return json_answer(_member(await desk_of(call).swarm.add_signer(_node(call.json()))))


async def remove_signer(call: Call) -> StreamResponse:
    """Void a signer's key."""
    swarm, text = desk_of(call).swarm, call.path["node"]
    member = await swarm.remove_signer(text)
    gone = _member(member) if member is not None else {"id": text, "name": text, "signer": False}
    return json_answer({**gone, "signers": swarm.signer_names()})


async def leave(call: Call) -> StreamResponse:
    """Leave the swarm and forget its keys."""
    desk = desk_of(call)
    roster = desk.swarm.roster
    told = await desk.swarm.leave()
    return json_answer({"left": roster.name if roster is not None else "", "told": told})


async def rekey(call: Call) -> StreamResponse:
    """Put a new key in the place of this node's."""
    return json_answer(await desk_of(call).swarm.rekey())


async def recovery_draft(call: Call) -> StreamResponse:
    """Write what the recovery key has to sign to begin the roster anew."""
    body = call.json()
    draft = await desk_of(call).swarm.recovery_draft(_names(body, "without"), _names(body, "restore"))
    return json_answer(draft)


async def recover(call: Call) -> StreamResponse:
    """Begin the roster anew, as the recovery key signed it."""
    return json_answer(await desk_of(call).swarm.recover(get_object(call.json(), "statement", where="body")))


async def backup(call: Call) -> StreamResponse:
    """Return database, keys, policy and settings of this moment, as a tar."""
    make = call.services.backup
    if make is None:
        raise Unavailable("no-backup", "cannot make a backup here", retry_after_s=3600)
    async with aclosing(make()) as pieces:
        first = await anext(pieces, b"")  # what goes wrong at once is still an HTTP error
        response = call.stream({"Content-Type": "application/x-tar", "Cache-Control": "no-store"})
        await response.prepare(call.request)
        await send(response, first)
        async for piece in pieces:
            await send(response, piece)
        await response.write_eof()
        return response


# --- rows --------------------------------------------------------------------------------------


def _nodes(desk: SwarmDesk) -> list[dict[str, object]]:
    roster = desk.swarm.roster
    assert roster is not None
    states = {state.member.id: state for state in desk.fleet.states()}
    return [
        _me(desk, member) if member.id == desk.swarm.self_id else _peer(desk, member, states.get(member.id))
        for member in sorted(roster.members.values(), key=lambda one: one.name)
    ]


def _me(desk: SwarmDesk, member: Member) -> dict[str, object]:
    word = desk.word.now()
    return {
        **_member(member),
        "self": True,
        "state": "ready",
        "detail": "",
        "address": None,
        "last_seen_s": 0,
        "rtt_ms": 0,
        "verified": {"key": True, "digest_same": True, "models": len(word.models)},
        "word": _said(word),
        "alarm": "",
    }


def _peer(desk: SwarmDesk, member: Member, state: PeerState | None) -> dict[str, object]:
    word = state.word if state is not None else None
    is_person = member.role is Role.OPERATOR
    return {
        **_member(member),
        "self": False,
        "state": state.state if state is not None else "unknown",
        "detail": state.detail if state is not None else "a person's key" if is_person else "",
        "address": str(state.address) if state is not None and state.address is not None else None,
        "last_seen_s": state.last_seen_s if state is not None else None,
        "rtt_ms": state.rtt_ms if state is not None else None,
        "verified": {
            "key": state is not None and state.state == "ready",
            "digest_same": word is not None and word.digest == desk.swarm.digest,
            "models": len(word.models) if word is not None else 0,
        },
        "word": None if word is None else _said(word),
        "alarm": state.alarm if state is not None else "",
    }


def _said(word: Word) -> object:
    return json.loads(encode_word(word))


def _member(member: Member) -> dict[str, object]:
    return {"id": member.id, "name": member.name, "role": member.role.value, "signer": member.is_signer}


# --- what is given -----------------------------------------------------------------------------


def _node(body: dict[str, object]) -> str:
    return get_str(body, "node", where="body", min_len=1, max_len=_NODE_CHARS)


def _names(body: dict[str, object], key: str) -> list[str]:
    given = get_list(body, key, where="body", max_items=10_000) if key in body else []
    return [as_str(one, where=f"{key}[{i}]", max_len=_NODE_CHARS) for i, one in enumerate(given)]


def _address(untrusted: object, *, where: str) -> PeerAddress:
    """Parse `10.0.0.7`, `10.0.0.7:7437`, `fe80::1%eth0` or `[fe80::1%eth0]:7437`."""
    text = as_str(untrusted, where=where, max_len=_NODE_CHARS)
    host, port = text, str(SWARM_PORT)
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        port = rest.removeprefix(":") if rest else port if bracket else ""
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        port = ""
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 1 << 16):
        raise BadRequest(
            "bad-address",
            f"cannot look for a swarm at {text!r}: not an address in numbers",
            hint="such as 10.0.0.7:7437",
            where=where,
        )
    return PeerAddress(host=host, port=int(port))
