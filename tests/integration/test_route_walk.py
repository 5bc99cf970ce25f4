"""Every route, asked by every kind of caller at every door: who may enter stands here once more, by hand.

The handlers are replaced by one that writes down who entered, so that "entered" is a fact and nothing is
changed by the walk; everything before them is the real thing: sockets, TLS, roster, policy.
"""

import dataclasses
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest
from aiohttp.web_response import StreamResponse

from mycoswarmd.api.access import Who
from mycoswarmd.api.call import Call, json_answer
from mycoswarmd.api.routes import ROUTES, Gate, Route
from mycoswarmd.core.tasks import TaskSpec
from mycoswarmd.core.types import Principal, Start
from tests.integration.apis import API_KEY, Answer, Running, local_user, running_api
from tests.rosters import Key, key

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="acts as other users"),
]

# One letter for each kind of caller that enters: o the owner at the unix socket, u another user there,
# k a program with an API key, n a node, s a node that signs, p a person at another machine, x nobody.
TABLE = {
    "GET /v1/models": "o u k n s p",
    "POST /v1/chat/completions": "o u k n s p",
    "POST /v1/completions": "o u k n s p",
    "POST /v1/embeddings": "o u k n s p",
    "GET /v1/security": "o u p",
    "GET /api/status": "o u p",
    "GET /api/models": "o u p",
    "GET /api/doctor": "o p",
    "PUT /api/blobs/{sha256}": "o p",
    "POST /api/tasks": "o u p",
    "GET /api/tasks": "o u p",
    "GET /api/tasks/{id}": "o p",
    "GET /api/tasks/{id}/events": "o p",
    "GET /api/tasks/{id}/changes": "o p",
    "GET /api/tasks/{id}/workspace": "o p",
    "POST /api/tasks/{id}/cancel": "o p",
    "POST /api/tasks/{id}/retry": "o p",
    "GET /api/approvals": "o p",
    "POST /api/approvals/{id}": "o u p",
    "GET /api/keys": "o",
    "POST /api/keys": "o",
    "DELETE /api/keys/{name}": "o",
    "GET /api/policy": "o p",
    "POST /api/policy/explain": "o p",
    "POST /api/policy/reload": "o p",
    "GET /api/receipts": "o p",
    "GET /api/receipts/head": "o p",
    "POST /api/receipts/verify": "o p",
    "GET /api/receipts/{id}": "o p",
    "GET /api/backup": "o",
    "GET /api/swarm": "o u p",
    "GET /api/swarm/nodes/{node}/ping": "o p",
    "POST /api/swarm/init": "o",
    "POST /api/swarm/invites": "o",
    "POST /api/swarm/invites/{invite}": "o",
    "DELETE /api/swarm/invites/{invite}": "o",
    "POST /api/swarm/enroll": "o",
    "POST /api/swarm/revoke": "o",
    "POST /api/swarm/signers": "o",
    "DELETE /api/swarm/signers/{node}": "o",
    "POST /api/swarm/leave": "o",
    "POST /api/swarm/rekey": "o",
    "POST /api/swarm/recovery/draft": "o",
    "POST /api/swarm/recovery": "o",
    "POST /swarm/enroll/hello": "x",  # while an invitation is open
    "POST /swarm/enroll/confirm": "x",
    "POST /swarm/pull": "n s p x",
    "POST /swarm/sync": "n s p",
    "GET /swarm/watch": "n s",
    "GET /swarm/word": "n s p",
    "POST /swarm/signer-key": "s",
}
NAMES = {
    "o": "the owner",
    "u": "another user",
    "k": "a program",
    "n": "a node",
    "s": "a signer",
    "p": "an operator",
    "x": "a stranger",
    "w": "a wrong API key",
    "b": "no API key",
    "r": "a revoked node",
}
# Who the handler is told that it serves, and from where.
SERVED = {
    "o": ("user:root", Start.LOCAL, True),
    "u": ("user:nobody", Start.LOCAL, False),
    "k": ("key:tests", Start.LOCAL, False),
    "n": ("node:nina", Start.PEER, False),
    "s": ("node:sina", Start.PEER, False),
    "p": ("operator:pia", Start.LOCAL, True),
    "x": ("nobody", Start.LOCAL, False),
}
# How each is refused: at the API-key listener and to strangers nothing else exists; members and local
# users are told which role, or that the policy says no.
REFUSED = {
    "o": {(403, "role-needed")},
    "u": {(403, "role-needed"), (403, "policy-denied"), (403, "not-approver")},
    "k": {(404, "no-such-route")},
    "n": {(403, "role-needed")},
    "s": {(403, "role-needed")},
    "p": {(403, "role-needed")},
    "x": {(404, "no-such-route")},
    "w": {(401, "bad-key")},
    "b": {(401, "no-credentials")},
    "r": {(401, "not-a-member")},
}
# Whatever a request says of its sender changes nothing.
CLAIMS = {
    "X-Role": "operator",
    "X-Mycoswarm-Role": "local",
    "X-Mycoswarm-Node": "alpha",
    "X-Forwarded-For": "127.0.0.1",
    "X-Forwarded-User": "root",
    "X-Forwarded-Host": "localhost",
    "Forwarded": "for=127.0.0.1;by=unix",
    "X-Real-IP": "127.0.0.1",
    "X-SSL-Client-Verify": "SUCCESS",
    "X-SSL-Client-S-DN": "CN=alpha",
    "Cookie": "role=owner",
}
CLAIMED_BODY = {
    "role": "operator",
    "roles": ["local", "operator", "signer"],
    "is_owner": True,
    "uid": 0,
    "operator": "pia",
    "node": "alpha",
    "principal": {"is_owner": True, "uid": 0},
    "start": "local",
}

Ask = Callable[[str, str, object, Mapping[str, str]], Awaitable[Answer]]


@dataclass(frozen=True)
class Entered:
    """Who got into a handler."""

    by: str
    start: Start
    is_owner: bool


class Walk:
    """A node whose handlers only write down who entered."""

    def __init__(self, routes: Sequence[Route] = ROUTES) -> None:
        self.entered: list[Entered] = []
        self.routes = [dataclasses.replace(route, handler=self._note) for route in routes]
        self.callers: dict[str, Ask] = {}
        self.task_id = ""

    async def _note(self, call: Call) -> StreamResponse:
        who = call.principal
        self.entered.append(Entered(who.describe(), call.start, who.is_owner))
        return json_answer({"entered": True})

    async def differences(self, kinds: str, *, with_claims: bool) -> list[str]:
        """Ask every route as these kinds of callers; return how what happened differs from the table."""
        found = []
        for one in self.routes:
            name = f"{one.method} {one.path}"
            for kind in kinds:
                what = await self._ask(kind, one, with_claims=with_claims)
                wanted = "enters" if kind in TABLE.get(name, "").split() else "is refused"
                if what != wanted:
                    found.append(f"{NAMES[kind]} {what} at {name}, and {wanted} by the table")
        return found

    async def _ask(self, kind: str, route: Route, *, with_claims: bool) -> str:
        path = (
            route.path.replace("{sha256}", "00" * 32).replace("{id}", self.task_id).replace("{node}", "nina")
        )
        path = path.replace("{name}", "tests").replace("{invite}", "AAAA")
        body = CLAIMED_BODY if with_claims and route.body_bytes else None
        self.entered.clear()
        answer = await self.callers[kind](route.method, path, body, CLAIMS if with_claims else {})
        if self.entered:
            assert answer.status == 200, (answer.status, answer.body)
            assert self.entered == [Entered(*SERVED[kind])], (kind, route.path)
            return "enters"
        refusal = (answer.status, answer.code)
        return "is refused" if refusal in REFUSED[kind] else f"is refused with {refusal}"

    async def begin(self, stack: AsyncExitStack) -> Running:
        """Run the node and bring every kind of caller to its doors."""
        node = await stack.enter_async_context(running_api(routes=self.routes))
        await node.admit("nina")
        await node.admit("sina")
        await node.make_signer("sina")
        rosa = await node.admit("rosa")
        await node.admit("pia", role="operator")
        await node.desk.invitations.open(role="node", name="", ttl_s=86_400, needs_confirm=False)
        self.task_id = await _task_of_root(node)
        owner = await stack.enter_async_context(local_user(node, uid=0))
        other = await stack.enter_async_context(local_user(node, uid=65534))
        self.callers = {
            "o": owner.ask,
            "u": other.ask,
            "k": _program(node, f"Bearer {API_KEY}"),
            "w": _program(node, "Bearer mk-wrong"),
            "b": _program(node, ""),
            "x": _stranger(node),
            "r": _revoked(node, rosa),
        }
        for kind, name in (("n", "nina"), ("s", "sina"), ("p", "pia")):
            connection = await stack.enter_async_context(node.connected(node.members[name]))
            self.callers[kind] = connection.ask
        return node


async def _task_of_root(node: Running) -> str:
    """Post a task as root; the handler that would is replaced."""
    root = Principal(is_owner=True, uid=0, user="root")
    spec = TaskSpec(prompt="x", agent="scribe", label="private", submitter=root)
    task, _ = await node.services.tasks.submit(root, spec)
    return str(task.id)


def _program(node: Running, authorization: str) -> Ask:
    async def ask(method: str, path: str, body: object, headers: Mapping[str, str]) -> Answer:
        async with node.program() as connection:
            return await connection.ask(method, path, body, {**headers, "Authorization": authorization})

    return ask


def _stranger(node: Running) -> Ask:
    async def ask(method: str, path: str, body: object, headers: Mapping[str, str]) -> Answer:
        node.clock.ahead_s += 60  # or it would have asked too often
        async with node.connected(None) as connection:
            # A key for programs here proves nothing there.
            return await connection.ask(method, path, body, {**headers, "Authorization": f"Bearer {API_KEY}"})

    return ask


def _revoked(node: Running, who: Key) -> Ask:
    """Ask as a key that was put out between its handshake and its request."""

    async def ask(method: str, path: str, body: object, headers: Mapping[str, str]) -> Answer:
        node.ghosts.discard(who.id)
        async with node.connected(who) as connection:
            node.ghosts.add(who.id)
            answer = await connection.ask(method, path, body, headers)
            assert await connection.is_closed()
            return answer

    return ask


async def test_everybody_enters_where_the_table_says_and_nowhere_else() -> None:
    assert set(TABLE) == {f"{one.method} {one.path}" for one in ROUTES}
    async with AsyncExitStack() as stack:
        walk = Walk()
        await walk.begin(stack)
        assert await walk.differences("".join(NAMES), with_claims=False) == []


async def test_claims_change_nothing() -> None:
    async with AsyncExitStack() as stack:
        walk = Walk()
        await walk.begin(stack)
        assert await walk.differences("".join(NAMES), with_claims=True) == []


@pytest.mark.parametrize(
    ("path", "change", "found"),
    [
        ("/api/keys", {"who": frozenset({Who.LOCAL, Who.NODE})}, {"a node", "a signer"}),
        ("/swarm/signer-key", {"who": frozenset({Who.NODE})}, {"a node"}),
        ("/api/swarm/leave", {"who": frozenset({Who.LOCAL, Who.OPERATOR})}, {"an operator"}),
        ("/api/receipts", {"gate": Gate.OPEN}, {"another user"}),
        ("/swarm/sync", {"who": frozenset({Who.NODE})}, {"an operator"}),
        ("/swarm/word", {"who": frozenset(Who)}, {"the owner", "another user", "a program", "a stranger"}),
        ("/swarm/pull", {"who": frozenset({Who.NODE})}, {"an operator", "a stranger"}),
    ],
    ids=["wider", "role-dropped", "operator-too", "gate-open", "narrower", "to-all", "no-stranger"],
)
async def test_a_changed_row_is_noticed(path: str, change: dict[str, object], found: set[str]) -> None:
    changed = [
        dataclasses.replace(one, **change)  # type: ignore[arg-type]
        for one in ROUTES
        if one.path == path
    ]
    async with AsyncExitStack() as stack:
        walk = Walk(changed)
        await walk.begin(stack)
        differences = await walk.differences("oukwbnspxr", with_claims=False)
        assert {line.partition(" enters ")[0].partition(" is refused ")[0] for line in differences} == found


async def test_a_key_that_nobody_admitted_gets_no_answer_at_all() -> None:
    async with AsyncExitStack() as stack:
        walk = Walk()
        node = await walk.begin(stack)
        for one in ROUTES:
            with pytest.raises(OSError):  # noqa: PT011 - TLS alert, reset or end, as the kernel has it
                await node.ask(key("somebody"), one.method, one.path)
        assert walk.entered == []
        await node.admit("late")
        late = await node.ask(node.members["late"], "GET", "/swarm/word")  # the way itself was open
        assert (late.status, walk.entered) == (200, [Entered("node:late", Start.PEER, False)])


async def test_a_closed_door_looks_like_no_door_to_a_stranger() -> None:
    async with AsyncExitStack() as stack:
        walk = Walk()
        node = await walk.begin(stack)
        opened = await walk.callers["x"]("POST", "/swarm/enroll/hello", {}, {})
        assert opened.status == 200
        for row in node.desk.invitations.listed():
            if row["state"] == "open":
                await node.desk.invitations.cancel(str(row["invite"]))
        seen = set()
        for method, path in [
            ("POST", "/swarm/enroll/hello"),
            ("POST", "/swarm/enroll/confirm"),
            ("POST", "/nothing/of/this/name"),
            ("GET", "/swarm/enroll/hello"),
            ("DELETE", "/swarm/pull"),
            ("GET", "/v1/models"),
            ("POST", "/api/swarm/init"),
        ]:
            answer = await walk.callers["x"](method, path, {"x": "y" * 100}, {})
            headers = {name: value for name, value in answer.headers.items() if name != "date"}
            seen.add((answer.status, tuple(sorted(headers.items())), answer.body))
        assert len(seen) == 1, seen
        assert next(iter(seen))[0] == 404
