"""The swarm's listener and /api/swarm: what they answer, what they refuse, and what they bear."""

import asyncio
import os
import resource
import socket
from base64 import b64decode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest

from mycoswarmd.api import peers
from mycoswarmd.api.lines import Bounds
from mycoswarmd.core.enrol import Code, Joiner, derive, parse_code
from mycoswarmd.core.roster import signed
from mycoswarmd.core.tasks import FINAL, TaskState
from mycoswarmd.core.types import TaskId
from mycoswarmd.flow.swarmports import PeerAddress, PeerState, Reach
from mycoswarmd.wire.peer import parse_word
from tests.fakes import OPENAI, Turn, chunk, ollama_scripts, serving
from tests.integration.apis import API_KEY, Answer, Connection, Running, local_user, running_api
from tests.rosters import Key, key, parse

pytestmark = pytest.mark.timeout(300)
CHAT = {"model": "small", "messages": [{"role": "user", "content": "hi"}]}


async def joined(node: Running, code_text: str, newcomer: Key, *, role: str = "node") -> Answer:
    """Do a newcomer's part by hand; return the last answer."""
    code: Code = parse_code(code_text)
    keys = await asyncio.to_thread(derive, code)
    joiner = Joiner(keys, code.invite, nonce=bytes(32), cert_der=newcomer.cert_der, role=role, name="newbie")
    async with node.connected(None) as connection:
        greeted = await connection.ask("POST", "/swarm/enroll/hello", joiner.hello())
        if greeted.status != 200:
            return greeted
        proof = joiner.confirm(greeted.json, connection.server_cert(), newcomer.sign)
        while True:
            answer = await connection.ask("POST", "/swarm/enroll/confirm", proof)
            if answer.status != 200 or not answer.json.get("pending"):
                break
            await asyncio.sleep(0.25)  # a stranger may ask five times a second, however long it takes
        if answer.status == 200:
            welcome = joiner.welcome(answer.json)
            assert len(welcome.statements) == len(node.swarm.hashes())
        return answer


# --- joining ------------------------------------------------------------------------------------


async def test_a_newcomer_joins_with_a_code_and_is_a_member_at_once() -> None:
    async with running_api() as node, local_user(node, uid=0) as owner:
        made = await owner.ask("POST", "/api/swarm/invites", {"role": "node", "name": "", "ttl_s": 60})
        assert made.status == 201, made.body
        newcomer = key("newcomer")
        with pytest.raises(OSError):  # noqa: PT011 - before: no answer to its key
            await node.ask(newcomer, "GET", "/swarm/word")
        assert (await joined(node, made.json["code"], newcomer)).status == 200
        assert (await node.ask(newcomer, "GET", "/swarm/word")).status == 200
        again = await joined(node, made.json["code"], key("second"))
        assert (again.status, again.code) == (409, "invite-used")
        node.clock.ahead_s += 61  # nobody can have lost an answer any more, and no other invitation is open
        late = await joined(node, made.json["code"], key("second"))
        assert (late.status, late.code) == (404, "no-such-route")
        listed = (await owner.ask("GET", "/api/swarm")).json
        assert [one["name"] for one in listed["nodes"]] == ["alpha", "newbie"]
        assert [one["state"] for one in listed["invites"]] == ["used"]


@pytest.mark.parametrize("decision", ["yes", "no"])
async def test_a_person_decides_on_a_newcomer(decision: str) -> None:
    async with running_api() as node, local_user(node, uid=0) as owner:
        body = {"role": "node", "name": "", "ttl_s": 60, "confirm": True}
        made = (await owner.ask("POST", "/api/swarm/invites", body)).json

        async def decide() -> None:
            while not (row := (await owner.ask("GET", "/api/swarm")).json["invites"][0])["pending"]:
                await asyncio.sleep(0.02)
            assert row["pending"]["name"] == "newbie"
            path = f"/api/swarm/invites/{made['invite']}"
            assert (await owner.ask("POST", path, {"decision": decision})).status == 200

        async with asyncio.TaskGroup() as group:
            group.create_task(decide())
            answer = await joined(node, made["code"], key("newcomer"))
        assert (answer.status == 200) == (decision == "yes"), answer.body
        assert (node.swarm.member(key("newcomer").id) is not None) == (decision == "yes")


async def test_a_cancelled_invitation_is_no_door() -> None:
    async with running_api() as node, local_user(node, uid=0) as owner:
        made = (await owner.ask("POST", "/api/swarm/invites", {"role": "node", "name": ""})).json
        assert (await owner.ask("DELETE", f"/api/swarm/invites/{made['invite']}")).status == 200
        refused = await joined(node, made["code"], key("newcomer"))
        assert (refused.status, refused.code) == (
            409,
            "invite-expired",
        )  # said for a minute, then it is no door
        roster = node.swarm.roster
        assert roster is not None
        assert len(roster.members) == 1


async def test_an_operators_task_does_not_begin_after_it_was_put_out() -> None:
    async with running_api() as node:
        anna = await node.admit("anna", role="operator")
        body = {"prompt": "hello", "agent": "scribe", "model": "small"}
        posted = await node.ask(anna, "POST", "/api/tasks", body)
        assert posted.status == 202, posted.body
        task_id = TaskId(posted.json["task"]["id"])
        assert posted.json["task"]["submitter"] == "operator:anna"
        await node.swarm.revoke("anna", "laptop lost")
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            working = group.create_task(node.services.tasks.run())
            while (task := await node.services.task_store.get(task_id)).state not in FINAL:
                await asyncio.sleep(0.02)
            working.cancel()
        assert (task.state, task.code) == (TaskState.FAILED, "submitter-put-out")


# --- what members ask ---------------------------------------------------------------------------


async def test_every_answer_to_a_member_names_the_roster() -> None:
    async with running_api() as node:
        await node.admit("nina")
        await node.admit("pia", role="operator")
        for name in ("nina", "pia"):
            async with node.connected(node.members[name]) as connection:
                for method, path in [
                    ("GET", "/swarm/word"),
                    ("GET", "/v1/models"),
                    ("GET", "/api/keys"),  # refused
                    ("GET", "/nothing"),
                    ("POST", "/v1/chat/completions"),  # malformed
                    ("POST", "/swarm/sync"),
                ]:
                    answer = await connection.ask(method, path)
                    assert answer.headers["x-mycoswarm-roster"] == node.swarm.digest, (name, path)
                malformed = await connection.ask("GET", "/swarm/word", None, {"Host": "elsewhere"})
                assert malformed.headers["x-mycoswarm-roster"] == node.swarm.digest
        stranger = await node.ask(None, "POST", "/swarm/pull", {"have": []})
        assert "x-mycoswarm-roster" not in stranger.headers


async def test_pull_gives_anybody_what_it_lacks_and_takes_a_port_as_a_hint() -> None:
    async with running_api() as node:
        answer = await node.ask(None, "POST", "/swarm/pull", {"have": [], "port": 7437})
        hashes = {parse(one).sha256 for one in answer.json["statements"]}
        assert hashes == set(node.swarm.hashes())
        assert answer.json["digest"] == node.swarm.digest
        assert [one.address for one in node.fleet.hints] == [PeerAddress("127.0.0.1", 7437)]
        have = sorted(hashes)[1:]
        rest = await node.ask(None, "POST", "/swarm/pull", {"have": have})
        assert [parse(one).sha256 for one in rest.json["statements"]] == sorted(hashes)[:1]
        assert len(node.fleet.hints) == 1


async def test_sync_exchanges_statements() -> None:
    async with running_api() as node, running_api(in_swarm=False) as other:
        nina = await node.admit("nina")
        before = node.swarm.hashes()
        await node.admit("omar")
        async with node.connected(nina) as connection:
            answer = (await connection.ask("POST", "/swarm/sync", {"have": before, "statements": []})).json
        assert len(answer["statements"]) == 1
        assert answer["want"] == []
        assert answer["digest"] == node.swarm.digest
        assert len(answer["beacons"]) == 1
        assert other.swarm.roster is None  # and a node in no swarm answers nothing
        refused = await other.ask(None, "POST", "/swarm/pull", {"have": []})
        assert (refused.status, refused.code) == (409, "no-swarm")


async def test_a_signer_makes_its_key_when_a_signer_asks() -> None:
    async with running_api() as node:
        await node.admit("sina")
        await node.make_signer("sina")
        answer = await node.ask(node.members["sina"], "POST", "/swarm/signer-key")
        assert answer.json == {"key": await node.swarm.make_signer_key()}


async def test_watch_says_a_word_at_once_then_changes_then_that_it_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "HEARTBEAT_S", 2.0)  # 10 s are a long time for a test
    async with running_api() as node:
        nina = await node.admit("nina")
        async with node.connected(nina) as connection:
            await connection.send("GET", "/swarm/watch")
            status, headers = await connection.head()
            assert (status, headers["x-mycoswarm-roster"]) == (200, node.swarm.digest)
            assert parse_word(await connection.chunk()).running == 0
            loop = asyncio.get_running_loop()

            async def next_word() -> int:
                while (piece := await connection.chunk()) == b"\n":
                    pass  # this process was held up for so long
                return parse_word(piece).running

            took_s = []
            for number in range(1, 4):
                node.words.change()
                begun_s = loop.time()
                assert await next_word() == number
                took_s.append(loop.time() - begun_s)
            assert min(took_s) < 0.5, took_s
            for _ in range(50):  # however often it flickers, five words a second
                node.words.change()
                await asyncio.sleep(0)
            assert await next_word() == 53
            node.words.uptime_s += 1  # no news
            took_s = []
            for _ in range(3):
                begun_s = loop.time()
                assert await connection.chunk() == b"\n"
                took_s.append(loop.time() - begun_s)
            assert max(took_s) > 1.5 and min(took_s) < 3.5, took_s


async def test_a_node_sees_and_gets_only_what_is_answered_right_here() -> None:
    far = ollama_scripts({"name": "far", "digest": "d", "remote_host": "https://ollama.example"})
    async with (
        serving(OPENAI) as engine,
        serving(far) as ollama,
        running_api(engine_url=engine.address, ollama_url=ollama.address) as node,
    ):
        nina = await node.admit("nina")
        pia = await node.admit("pia", role="operator")
        await node.engines_ready(2)
        seen = {
            name: {one["id"] for one in (await node.ask(who, "GET", "/v1/models")).json["data"]}
            for name, who in (("nina", nina), ("pia", pia))
        }
        assert seen == {"nina": {"small"}, "pia": {"small", "far"}}
        said = await node.ask(nina, "POST", "/v1/chat/completions", CHAT)
        assert said.json["choices"][0]["message"]["content"] == "Hello there"
        assert said.headers["x-mycoswarm-zone"] == "self"
        decision = await node.services.receipts.one(said.headers["x-mycoswarm-receipt"])
        assert isinstance(decision["body"], dict)
        assert decision["body"]["by"] == "node:nina"
        refused = await node.ask(nina, "POST", "/v1/chat/completions", {**CHAT, "model": "far"})
        assert refused.status == 403
        assert ollama.prompts() == []


# --- what requests must look like ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://example.com"}, 403),
        ({"Sec-Fetch-Site": "none"}, 403),
        ({"Host": ""}, 400),
        ({"Host": "localhost"}, 400),
        ({"Host": "{own}:7437"}, 200),
        ({"Host": "{own}:7437:1"}, 400),
        ({"Host": "{own}.evil.example"}, 400),
        ({"Host": "{own}", "host": "{own}"}, 400),
        ({"Host": "{nina}"}, 400),
    ],
)
async def test_members_name_this_node_once_and_are_no_web_page(headers: dict[str, str], status: int) -> None:
    async with running_api() as node:
        nina = await node.admit("nina")
        names = {"own": node.host, "nina": f"{nina.id}.mycoswarm.internal"}
        given = {name: value.format(**names) for name, value in headers.items()}
        async with node.connected(nina) as connection:
            assert (await connection.ask("GET", "/swarm/word", None, given)).status == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://example.com"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 403),
        ({"Host": ""}, 400),
        ({"Host": "192.168.1.7:7437"}, 200),
        ({"Host": "[fe80::1]:7437"}, 200),
        ({"Host": "a b"}, 400),
        ({"Host": "x" * 300}, 400),
        ({"Host": "a", "host": "a"}, 400),
    ],
)
async def test_a_stranger_names_one_host_and_is_no_web_page(headers: dict[str, str], status: int) -> None:
    async with running_api() as node, node.connected(None) as connection:
        answer = await connection.ask("POST", "/swarm/pull", {"have": []}, headers)
        assert answer.status == status


@pytest.mark.parametrize("kind", ["member", "stranger", "program"])
async def test_a_target_is_a_path(kind: str) -> None:
    async with running_api() as node, AsyncExitStack() as stack:
        nina = await node.admit("nina")
        who = {"member": nina, "stranger": None}
        opened = node.connected(who[kind]) if kind in who else node.program()
        connection = await stack.enter_async_context(opened)
        answer = await connection.ask("POST", f"http://{connection.host}/swarm/pull", {"have": []})
        assert (answer.status, answer.code) == (400, "bad-target")


# --- being put out ------------------------------------------------------------------------------


async def endless(turn: Turn) -> None:
    """Answer a chat that never ends."""
    await turn.begin()
    while True:
        await turn.event(chunk("more "))
        await asyncio.sleep(0.01)


@asynccontextmanager
async def answering(node: Running, who: Key) -> AsyncIterator[Connection]:
    """Hold a chat in the middle of its answer."""
    async with node.connected(who) as connection:
        await connection.send("POST", "/v1/chat/completions", {**CHAT, "stream": True})
        status, _ = await connection.head()
        assert status == 200
        assert b"more" in await connection.chunk() + await connection.chunk()
        yield connection


async def ended(connection: Connection) -> None:
    """Read until the other side has ended the connection."""
    try:
        while await connection.reader.read(65536):
            pass
    except ConnectionError:
        return


async def test_who_is_put_out_is_cut_off_in_the_middle_of_an_answer() -> None:
    took_s = [await cut_off_s()]
    while min(took_s) >= 1 and len(took_s) < 4:  # a busy machine may hold up any one try
        took_s.append(await cut_off_s())
    assert min(took_s) < 1, took_s


async def cut_off_s() -> float:
    """Put a member out; return how long it took until nothing was left of it."""
    scripts = {**OPENAI, "/v1/chat/completions": endless}
    async with serving(scripts) as engine, running_api(engine_url=engine.address) as node:
        rosa, nina = await node.admit("rosa"), await node.admit("nina")
        await node.engines_ready()
        async with AsyncExitStack() as stack, local_user(node, uid=0) as owner:
            chat = await stack.enter_async_context(answering(node, rosa))
            idle = await stack.enter_async_context(node.connected(rosa))
            assert (await idle.ask("GET", "/swarm/word")).status == 200
            watch = await stack.enter_async_context(node.connected(rosa))
            await watch.send("GET", "/swarm/watch")
            await watch.head()
            other = await stack.enter_async_context(node.connected(nina))
            await other.send("GET", "/swarm/watch")
            await other.head()
            answer = await owner.ask("POST", "/api/swarm/revoke", {"node": "rosa", "reason": "stolen"})
            assert answer.status == 200, answer.body
            begun_s = asyncio.get_running_loop().time()
            async with asyncio.timeout(60):
                for one in (chat, idle, watch):
                    await ended(one)
                await engine.left.wait()  # what ran for it has ended, too
            took_s = asyncio.get_running_loop().time() - begun_s
            with pytest.raises(OSError):  # noqa: PT011 - its key opens nothing any more
                await node.ask(rosa, "GET", "/swarm/word")
            words = [parse_word(await other.chunk()) for _ in range(1)]
            assert words[0].id == node.swarm.self_id  # the others stay
            return took_s


async def test_without_the_cut_a_stream_would_go_on() -> None:
    """The control: the same revocation where nobody tells the connections of it."""
    scripts = {**OPENAI, "/v1/chat/completions": endless}
    async with serving(scripts) as engine, running_api(engine_url=engine.address, cuts=False) as node:
        rosa = await node.admit("rosa")
        await node.engines_ready()
        async with answering(node, rosa) as chat, node.connected(rosa) as idle:
            assert (await idle.ask("GET", "/swarm/word")).status == 200
            await node.swarm.revoke("rosa", "stolen")
            for _ in range(20):
                assert await chat.chunk()
            late = await idle.ask("GET", "/swarm/word")  # but each new request is judged
            assert (late.status, late.code) == (401, "not-a-member")
            assert await idle.is_closed()


async def test_a_copy_of_this_nodes_own_key_is_refused() -> None:
    async with running_api() as node, node.connected(node.own_key()) as connection:
        answer = await connection.ask("GET", "/swarm/word")
        assert (answer.status, answer.code) == (401, "own-call")


# --- what strangers can use up ------------------------------------------------------------------

QUICK = Bounds(patience_s=0.4)
PATIENT = Bounds(patience_s=60)  # where this process may be held up, and nobody is to be too slow


async def shortest_s(attempt: Callable[[], Awaitable[None]]) -> float:
    """Return how long something takes at best: this process may be held up, and even miss a handshake."""
    loop = asyncio.get_running_loop()
    found_s: list[float] = []
    for _ in range(10):
        begun_s = loop.time()
        with suppress(OSError):
            await attempt()
            found_s.append(loop.time() - begun_s)
            if found_s[-1] < 2:
                break
    return min(found_s)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /swarm/pu",
        b"POST /swarm/pull HTTP/1.1\r\nHost: x\r\n",
        b"POST /swarm/pull HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
        b"POST /swarm/pull HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
    ],
    ids=["nothing", "line", "headers", "body", "chunks"],
)
async def test_a_slow_stranger_loses_its_connection(sent: bytes) -> None:
    async with running_api(bounds=QUICK) as node:

        async def attempt() -> None:
            async with node.connected(None) as connection:
                connection.writer.write(sent)
                await ended(connection)

        assert 0.2 < await shortest_s(attempt) < 2


async def test_a_stranger_that_drips_loses_its_connection() -> None:
    async with running_api(bounds=QUICK) as node:
        drips = 0

        async def attempt() -> None:
            nonlocal drips
            drips = 0
            async with node.connected(None) as connection:
                with pytest.raises(OSError):  # noqa: PT011,PT012 - reset or broken pipe
                    for one in b"POST /swarm/pull HTTP/1.1\r\nHost: " + b"x" * 200:
                        connection.writer.write(bytes([one]))
                        await connection.writer.drain()
                        await asyncio.sleep(0.05)
                        drips += 1

        await shortest_s(attempt)
        assert 0 < drips < 60  # three seconds, where nobody is held up


async def test_a_handshake_that_does_not_go_on_is_ended() -> None:
    async with running_api(bounds=QUICK) as node:
        for sent in (b"", b"\x16\x03\x01"):

            async def attempt(sent: bytes = sent) -> None:
                reader, writer = await asyncio.open_connection("127.0.0.1", node.swarm_port)
                writer.write(sent)
                await ended(Connection(reader, writer, ""))
                writer.transport.abort()

            assert 0.2 < await shortest_s(attempt) < 2


async def test_a_member_has_to_ask_something_soon_but_may_then_pause() -> None:
    async with running_api(bounds=QUICK) as node:
        nina = await node.admit("nina")

        async def attempt() -> None:
            async with node.connected(nina) as silent, node.connected(nina) as speaks:
                assert (await speaks.ask("GET", "/swarm/word")).status == 200
                await ended(silent)
                assert (await speaks.ask("GET", "/swarm/word")).status == 200

        assert await shortest_s(attempt) < 2


async def test_strangers_may_not_ask_often_whatever_they_ask() -> None:
    async with running_api() as node:
        node.clock.stop()
        codes = []
        for n in range(70):
            path = "/swarm/pull" if n % 2 else "/nothing"
            answer = await node.ask(None, "POST", path, {"have": []})
            codes.append(answer.status)
        assert codes[:60] == [404, 200] * 30
        assert codes[60:] == [429] * 10
        nina = await node.admit("nina")
        assert (await node.ask(nina, "GET", "/swarm/word")).status == 200  # members are not strangers
        node.clock.ahead_s += 10
        assert (await node.ask(None, "POST", "/swarm/pull", {"have": []})).status == 200


@pytest.mark.parametrize(("path", "allowed"), [("/swarm/enroll/hello", 64 << 10), ("/swarm/pull", 512 << 10)])
async def test_a_strangers_body_is_bounded(path: str, allowed: int) -> None:
    async with running_api() as node:
        await node.desk.invitations.open(role="node", name="", ttl_s=60, needs_confirm=False)
        assert (await node.ask(None, "POST", path, b" " * allowed)).status == 400  # read, and no JSON
        async with node.connected(None) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {allowed + 1}\r\n\r\n"
            connection.writer.write(head.encode())
            assert (await connection.answer()).status == 413


async def test_what_takes_long_to_parse_is_refused_before_it_is() -> None:
    async with running_api() as node:
        nina = await node.admit("nina")
        for who, path, parts in ((None, "/swarm/pull", 5_000), (nina, "/swarm/sync", 140_000)):
            body = b'{"have":[' + b",".join([b"[]"] * parts) + b"]}"
            answer = await node.ask(who, "POST", path, body)
            assert (answer.status, answer.code) == (413, "too-intricate")
        hashes = {"have": [f"{n:064x}" for n in range(7_000)]}  # as many as a knocker says that it has
        assert (await node.ask(None, "POST", "/swarm/pull", hashes)).status == 200


async def test_who_hoards_connections_makes_room_for_a_newcomer() -> None:
    async with running_api() as node, AsyncExitStack() as stack:
        for source in ("127.0.0.2", "127.0.0.3"):
            for _ in range(8):
                await stack.enter_async_context(node.connected(None, source=source))
        newcomer = await stack.enter_async_context(node.connected(None, source="127.0.0.9"))
        assert (await newcomer.ask("POST", "/swarm/pull", {"have": []})).status == 200


async def test_nobody_is_told_what_this_is_made_of() -> None:
    async with running_api() as node:
        nina = await node.admit("nina")
        for who, method, path in [
            (None, "GET", "/"),
            (None, "POST", "/swarm/pull"),
            (nina, "GET", "/swarm/word"),
        ]:
            assert (await node.ask(who, method, path)).headers["server"] == "mycoswarmd"
        async with node.connected(nina) as connection:
            await connection.send("GET", "/swarm/watch")
            assert (await connection.head())[1]["server"] == "mycoswarmd"


async def test_few_strangers_at_a_time_and_they_are_told() -> None:
    async with running_api(bounds=PATIENT) as node, AsyncExitStack() as stack:
        nina = await node.admit("nina")

        async def stranger(source: str) -> Connection:
            return await stack.enter_async_context(node.connected(None, source=source))

        one_source = [await stranger("127.0.0.2") for _ in range(9)]
        refused = await one_source[8].ask("POST", "/swarm/pull", {"have": []})
        assert (refused.status, refused.code) == (503, "too-many-connections")
        assert await one_source[8].is_closed()
        one_source[0].writer.transport.abort()
        for n in range(15):
            await stranger(f"127.0.1.{n + 1}")  # the first ones take the places of who had most
        last = await stranger("127.0.2.1")
        assert (await last.ask("POST", "/swarm/pull", {"have": []})).code == "too-many-connections"
        assert (await node.ask(nina, "GET", "/swarm/word")).status == 200
        one_source[7].writer.transport.abort()  # a place is free again
        async with asyncio.timeout(60):
            while (await node.ask(None, "POST", "/swarm/pull", {"have": []})).status != 200:
                await asyncio.sleep(0.02)


async def test_the_connections_of_one_member_are_bounded() -> None:
    async with (
        running_api(bounds=Bounds(member=3, refused=2, patience_s=60)) as node,
        AsyncExitStack() as stack,
    ):
        rosa, nina = await node.admit("rosa"), await node.admit("nina")
        held = [await stack.enter_async_context(node.connected(rosa)) for _ in range(6)]
        answers = [await one.ask("GET", "/swarm/word") for one in held[:5]]
        assert [one.status for one in answers] == [200, 200, 200, 503, 503]
        assert answers[3].code == "too-many-connections"
        with pytest.raises(OSError):  # noqa: PT011 - so many that nobody is told any more
            await held[5].ask("GET", "/swarm/word")
        assert (await node.ask(nina, "GET", "/swarm/word")).status == 200
        await node.swarm.revoke("rosa", "stolen")
        async with asyncio.timeout(30):
            for one in held:
                await ended(one)


async def test_all_connections_of_members_are_bounded() -> None:
    async with running_api(bounds=Bounds(swarm=2, patience_s=60)) as node, AsyncExitStack() as stack:
        members = [await node.admit(name) for name in ("nina", "omar", "rosa")]
        held = [await stack.enter_async_context(node.connected(one)) for one in members]
        answers = [await one.ask("GET", "/swarm/word") for one in held]
        assert [one.status for one in answers] == [200, 200, 503]
        held[0].writer.transport.abort()
        async with asyncio.timeout(60):
            while (await node.ask(members[2], "GET", "/swarm/word")).status != 200:
                await asyncio.sleep(0.02)


async def test_too_many_open_files_are_waited_for() -> None:
    async with running_api() as node:
        nina = await node.admit("nina")
        with socket.create_connection(("127.0.0.1", node.swarm_port)):
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            highest = max(int(one) for one in os.listdir("/proc/self/fd"))  # noqa: PTH208
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
            try:
                await asyncio.sleep(0.1)  # accepting fails meanwhile
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            async with asyncio.timeout(60):
                assert (await node.ask(nina, "GET", "/swarm/word")).status == 200


async def test_local_connections_are_bounded() -> None:
    async with running_api(bounds=Bounds(local=2, patience_s=60)) as node, AsyncExitStack() as stack:
        held = [await stack.enter_async_context(node.program()) for _ in range(3)]
        known = {"Authorization": f"Bearer {API_KEY}"}
        answers = [await one.ask("GET", "/v1/models", headers=known) for one in held]
        assert [one.status for one in answers] == [200, 200, 503]
        assert await held[2].is_closed()


@pytest.mark.parametrize("makes_room", [True, False], ids=["room", "control"])
async def test_hoarded_handshakes_make_room_for_others(makes_room: bool) -> None:
    """Without making room, two addresses that never finish a handshake would keep everybody out."""
    async with running_api(makes_room=makes_room, bounds=PATIENT) as node, AsyncExitStack() as stack:
        nina = await node.admit("nina")
        hoard = []
        for n in range(80):
            source = f"127.0.0.{2 + n % 2}"
            _, writer = await asyncio.open_connection("127.0.0.1", node.swarm_port, local_addr=(source, 0))
            stack.callback(writer.transport.abort)
            hoard.append(writer)
        await asyncio.sleep(0.05)
        if makes_room:
            assert (await node.ask(nina, "GET", "/swarm/word")).status == 200
        else:
            with pytest.raises(OSError):  # noqa: PT011
                await node.ask(nina, "GET", "/swarm/word")


# --- what people ask ----------------------------------------------------------------------------


async def test_the_swarm_is_shown_with_why_each_member_is_believed() -> None:
    async with running_api() as node, local_user(node, uid=0) as owner, local_user(node, uid=65534) as other:
        await node.admit("nina")
        await node.admit("pia", role="operator")
        state = PeerState(
            member=node.member("nina"),
            state=Reach.READY,
            address=PeerAddress("10.0.0.7", 7437),
            last_seen_s=0.5,
            rtt_ms=1.25,
            word=node.words.now(),
        )
        node.fleet.known = [state]
        shown = (await owner.ask("GET", "/api/swarm")).json
        assert shown["swarm"]["name"] == "home"
        assert shown["swarm"]["digest"] == node.swarm.digest
        assert shown["self"] == {"id": node.swarm.self_id, "name": "alpha", "signer": True}
        alpha, nina, pia = shown["nodes"]
        assert (alpha["self"], alpha["signer"], alpha["verified"]["key"]) == (True, True, True)
        assert (nina["state"], nina["address"], nina["rtt_ms"]) == ("ready", "10.0.0.7:7437", 1.25)
        assert nina["verified"] == {"key": True, "digest_same": True, "models": 0}
        assert (pia["role"], pia["state"], pia["verified"]["key"]) == ("operator", "unknown", False)
        assert len(shown["invites"]) == 2
        assert (await other.ask("GET", "/api/swarm")).json["invites"] == []
        ping = (await owner.ask("GET", "/api/swarm/nodes/nina/ping")).json
        assert ping == {"ms": 1.5, "address": "10.0.0.7:7437"}
        assert (await owner.ask("GET", "/api/swarm/nodes/alpha/ping")).code == "not-a-peer"
        assert (await owner.ask("GET", "/api/swarm/nodes/pia/ping")).code == "not-a-peer"
        assert (await owner.ask("GET", "/api/swarm/nodes/nobody/ping")).code == "unknown-node"


async def test_a_swarm_begins_and_ends() -> None:
    async with running_api(in_swarm=False) as node, local_user(node, uid=0) as owner:
        assert (await owner.ask("GET", "/api/swarm")).json["swarm"] is None
        body = {"name": "home", "recovery": key("recovery").hex}
        begun = await owner.ask("POST", "/api/swarm/init", body)
        assert (begun.status, begun.json["name"]) == (201, "alpha")
        assert (await owner.ask("POST", "/api/swarm/init", body)).code == "already-in-swarm"
        code = (await owner.ask("POST", "/api/swarm/invites", {})).json["code"]
        assert len((await owner.ask("GET", "/api/swarm")).json["invites"]) == 1
        assert (await owner.ask("POST", "/api/swarm/leave")).json == {"left": "home", "told": None}
        assert (await owner.ask("GET", "/api/swarm")).json["swarm"] is None
        # Its invitations went with it, also where another swarm begins.
        desk = node.services.swarm
        assert desk is not None and not desk.invitations.is_open()
        assert (await owner.ask("POST", "/api/swarm/init", body)).status == 201
        assert (await owner.ask("GET", "/api/swarm")).json["invites"] == []
        assert (await owner.ask("DELETE", f"/api/swarm/invites/{code[:4]}")).code == "invite-unknown"


async def test_a_swarm_does_not_begin_with_what_is_no_name() -> None:
    """The keys are made after that."""
    body = {"name": "home", "recovery": key("recovery").hex}
    async with running_api(in_swarm=False) as node, local_user(node, uid=0) as owner:
        for bad in ({"name": "my home"}, {"node_name": "my pi"}, {"node_name": "-"}):
            assert (await owner.ask("POST", "/api/swarm/init", {**body, **bad})).code == "bad-name"
        desk = node.services.swarm
        assert desk is not None and desk.swarm.identity is None
        longest = {"name": "x" * 64, "node_name": "y" * 64}
        assert (await owner.ask("POST", "/api/swarm/init", {**body, **longest})).status == 201


async def test_signers_come_and_go() -> None:
    async with running_api() as node, local_user(node, uid=0) as owner:
        await node.admit("sina")

        async def ask(node_id: str) -> str:
            assert node_id == node.members["sina"].id
            return key("signing").hex

        node.swarm.ask_signer_key = ask
        added = await owner.ask("POST", "/api/swarm/signers", {"node": "sina"})
        assert (added.json["name"], added.json["signer"]) == ("sina", True)
        removed = await owner.ask("DELETE", "/api/swarm/signers/sina")
        assert (removed.json["name"], removed.json["signer"]) == ("sina", False)
        last = await owner.ask("DELETE", "/api/swarm/signers/alpha")
        assert last.code == "last-signer"


async def test_the_paper_key_begins_the_roster_anew() -> None:
    async with running_api() as node, local_user(node, uid=0) as owner:
        await node.admit("nina")
        await node.admit("omar")
        drafted = (await owner.ask("POST", "/api/swarm/recovery/draft", {"without": ["omar"]})).json
        assert node.members["omar"].id in drafted["drops"] or "omar" in drafted["drops"]
        recovery = key("recovery")
        statement = signed(b64decode(drafted["body"]), recovery.pair)
        done = await owner.ask("POST", "/api/swarm/recovery", {"statement": statement})
        assert (done.status, done.json["epoch"]) == (200, 1), done.body
        names = [one["name"] for one in (await owner.ask("GET", "/api/swarm")).json["nodes"]]
        assert names == ["alpha", "nina"]


async def test_a_backup_comes_piece_by_piece() -> None:
    async with running_api() as node, local_user(node, uid=0) as owner:
        answer = await owner.ask("GET", "/api/backup")
        assert (answer.status, answer.headers["content-type"], answer.body) == (
            200,
            "application/x-tar",
            b"onetwo",
        )


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.7", PeerAddress("10.0.0.7", 7437)),
        ("10.0.0.7:99", PeerAddress("10.0.0.7", 99)),
        ("fe80::1%eth0", PeerAddress("fe80::1%eth0", 7437)),
        ("[fe80::1%eth0]:99", PeerAddress("fe80::1%eth0", 99)),
        ("[::1]", PeerAddress("::1", 7437)),
        ("kitchen.local", None),
        ("10.0.0.7:0", None),
        ("10.0.0.7:65536", None),
        ("10.0.0.7:", None),
        ("[::1]x:5", None),
        ("[::1", None),
        ("", None),
        (7, None),
    ],
)
async def test_addresses_are_given_in_numbers(text: object, address: PeerAddress | None) -> None:
    async with running_api(in_swarm=False) as node, local_user(node, uid=0) as owner:
        answer = await owner.ask("POST", "/api/swarm/enroll", {"code": "x", "addresses": [text]})
        if address is None:
            assert answer.status == 400
            assert node.newcomer.tried == []
        else:
            assert node.newcomer.tried == [("x", [address], "alpha")]
