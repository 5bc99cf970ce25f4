"""Prompts that cross to another node: where they may go, what is shown, and how they end.

Every crossing is over real TLS between real listeners; what counts is what the engine behind a node saw.
"""

import asyncio
import json
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from mycoswarmd.api.control import explain
from mycoswarmd.core.types import Principal, Start, Zone
from mycoswarmd.engines import peerline
from mycoswarmd.engines.upstream import Patience
from mycoswarmd.errors import Denied, EngineError, LocalProtocolError, MycoswarmError, NotFound, Unavailable
from mycoswarmd.flow.prompt import Speaker
from mycoswarmd.wire.prompt import Delta, TextDelta
from tests.fakes import Turn, chunk
from tests.integration.neighbours import (
    HOME,
    OWNER,
    Neighbour,
    address_of,
    ask,
    chat,
    dead_port,
    hood,
    lying,
    neighbour,
    policy_of,
)

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

# As permissive as can be: everything, from anybody, and a way out.
OPEN = """
schema = 1
name = "open"
[destinations.bigcloud]
api = "openai"
url = "https://api.example.com/v1"
[origins]
friend = { user = "friend" }
admins = { group = "adm" }
program = { key = "program" }
anna = { node = "anna" }
[[rule]]
id = "here"
why = "all are welcome"
effect = "allow"
action = "infer"
zone = ["self", "lan"]
[[rule]]
id = "cloud"
why = "out with it"
effect = "allow"
action = "infer"
dest = ["bigcloud"]
label = { max = "secret" }
"""
# Answers no other node, but whom it knows.
CLOSED = """
schema = 1
name = "closed"
[origins]
friend = { user = "friend" }
admins = { group = "adm" }
program = { key = "program" }
carl = { node = "carl" }
[[rule]]
id = "known-only"
why = "people and programs that I know, and node carl"
effect = "allow"
action = "infer"
zone = ["self"]
origin = ["owner", "friend", "admins", "program", "carl"]
"""
# Lets everything leave for the LAN: the label is for the other node to judge.
SENDS_ALL = HOME.replace('label = { max = "private" }\n', "")


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends are in this process: what holds it up is no sign that nobody is there."""
    monkeypatch.setattr(peerline, "CONNECT_S", 30.0)


@pytest.fixture
async def stack() -> Any:
    async with AsyncExitStack() as stack:
        yield stack


async def two(
    stack: AsyncExitStack, *, ours: str = HOME, theirs: str = HOME, patience: Patience | None = None
) -> tuple[Neighbour, Neighbour]:
    """Run anna, who has no engine, and bert, who has one and is known to her."""
    around = hood("anna", "bert")
    bert = await stack.enter_async_context(neighbour("bert", around, policy=theirs))
    anna = await stack.enter_async_context(
        neighbour("anna", around, policy=ours, serves=False, patience=patience)
    )
    await anna.meet(bert)
    return anna, bert


async def collect(deltas: Any) -> list[Delta]:
    async with aclosing(deltas):
        return [delta async for delta in deltas]


def text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))


async def until_gone(node: Neighbour) -> None:
    """Wait until the node's engine has noticed that its client left."""
    assert await asyncio.to_thread(node.book.gone.wait, 60)


# --- crossing ------------------------------------------------------------------------------------


async def test_a_stream_crosses_and_says_who_answered(stack: AsyncExitStack) -> None:
    anna, bert = await two(stack)
    status, headers, body = await ask(anna, chat_body("ok", stream=True))
    assert status == 200
    assert b"Hello there" in body and b"[DONE]" in body
    assert headers["x-mycoswarm-node"] == "bert"
    assert headers["x-mycoswarm-zone"] == "lan"
    assert headers["x-mycoswarm-rule"] == "swarm-inference"
    assert headers["x-mycoswarm-model"] == "ok"
    (sent,) = bert.book.bodies
    assert sent["messages"] == [{"role": "user", "content": "Hi"}]
    assert anna.book.bodies == []

    (decided,) = await anna.records("decision")
    assert (decided["zone"], decided["node"], decided["decision"]) == ("lan", "bert", "allow")
    (there,) = await bert.records("decision")
    assert (there["by"], there["zone"], there["label"]) == ("node:anna", "self", "private")
    (ended,) = await anna.records("outcome")
    assert (ended["engine"], ended["node"], ended["code"]) == ("peer:bert", "bert", "ok")
    theirs = [row.id for row in await bert.receipts.tail(after=0, limit=10) if row.kind == "decision"]
    assert [ended["peer_receipt"]] == theirs


async def test_whole_answers_texts_and_vectors_cross(stack: AsyncExitStack) -> None:
    anna, _bert = await two(stack)
    status, headers, body = await ask(anna, chat_body("ok"))
    answer = json.loads(body)
    assert (status, headers["x-mycoswarm-node"]) == (200, "bert")
    assert answer["choices"][0]["message"]["content"] == "Hello there"
    assert answer["usage"]["total_tokens"] == 8

    status, headers, body = await ask(anna, {"model": "ok", "prompt": "Hi"}, path="/v1/completions")
    assert (status, json.loads(body)["choices"][0]["text"]) == (200, "Hello there")
    status, headers, body = await ask(anna, {"model": "ok", "input": ["a", "b"]}, path="/v1/embeddings")
    assert (status, headers["x-mycoswarm-node"]) == (200, "bert")
    assert [row["embedding"] for row in json.loads(body)["data"]] == [[0.5, -0.5], [0.5, -0.5]]


def chat_body(model: str, content: str = "Hi", **more: object) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": content}], **more}


async def test_a_prompt_of_four_megabytes_crosses_whole(stack: AsyncExitStack) -> None:
    anna, bert = await two(stack)
    large = "0123456789abcdef" * (1 << 18)
    routed = await anna.prompts.route(OWNER, chat(text=large))
    answer = await routed.complete()
    assert answer.text == "Hello there"
    assert bert.book.bodies[0]["messages"][0]["content"] == large


async def test_tools_are_sent_as_they_are(stack: AsyncExitStack) -> None:
    anna, bert = await two(stack)
    tool = {"type": "function", "function": {"name": "get", "description": "d", "parameters": {}}}
    routed = await anna.prompts.route(OWNER, chat(tools=[tool]))
    await routed.complete()
    # bert's engine has no tools of its own, so it is bert who puts them into words.
    (sent,) = bert.book.bodies
    assert "tools" not in sent
    assert '"get"' in json.dumps(sent["messages"]) or "get" in sent["messages"][0]["content"]


async def test_leaving_stops_the_engine_there(stack: AsyncExitStack) -> None:
    anna, bert = await two(stack)
    routed = await anna.prompts.route(OWNER, chat("slow", stream=True))
    async with aclosing(routed.stream()) as deltas:
        assert isinstance(await anext(deltas), TextDelta)
        assert not bert.book.gone.is_set()
    await until_gone(bert)
    (ended,) = await anna.records("outcome")
    assert (ended["code"], ended["node"]) == ("cancelled", "bert")


async def test_cancelling_before_the_first_byte_stops_the_engine_there(stack: AsyncExitStack) -> None:
    anna, bert = await two(stack)
    routed = await anna.prompts.route(OWNER, chat("silent", stream=True))
    asking = asyncio.create_task(collect(routed.stream()))
    while not bert.book.count("silent"):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert bert.book.count("silent") == 1
    await until_gone(bert)


async def test_connections_are_kept(stack: AsyncExitStack) -> None:
    anna, bert = await two(stack)
    for _ in range(5):
        await (await anna.prompts.route(OWNER, chat())).complete()
    opened = {id(line) for line in anna.clients[bert.key.id]._lines.values()}
    assert len(opened) == 1
    (line,) = anna.clients[bert.key.id]._lines.values()
    assert len(line.connector._transports) == 1


# --- fail-over -----------------------------------------------------------------------------------


async def three(stack: AsyncExitStack, **policies: str) -> tuple[Neighbour, Neighbour, Neighbour]:
    """Run anna, bert and carl; anna prefers bert, for carl has more to do."""
    around = hood("anna", "bert", "carl")
    bert, carl = [
        await stack.enter_async_context(neighbour(name, around, policy=policies.get(name, HOME)))
        for name in ("bert", "carl")
    ]
    anna = await stack.enter_async_context(
        neighbour("anna", around, policy=policies.get("anna", HOME), serves=False)
    )
    await anna.meet(bert)
    await anna.meet(carl, running=3)
    return anna, bert, carl


async def test_before_the_first_byte_the_next_node_is_asked(stack: AsyncExitStack) -> None:
    anna, bert, carl = await three(stack)
    async with dead_port() as nobody:
        anna.where[bert.key.id] = [nobody]
        status, headers, body = await ask(anna, chat_body("ok", stream=True))
    assert (status, headers["x-mycoswarm-node"]) == (200, "carl")
    assert b"Hello there" in body
    (decided,) = await anna.records("decision")
    assert (decided["node"], decided["alternates"]) == ("bert", ["peer:carl"])
    (ended,) = await anna.records("outcome")
    assert (ended["node"], ended["engine"], ended["code"]) == ("carl", "peer:carl", "ok")
    assert bert.book.bodies == [] and carl.book.count("ok") == 1


async def test_a_node_that_dies_before_its_first_byte_is_replaced(stack: AsyncExitStack) -> None:
    anna, bert, carl = await three(stack)
    routed = await anna.prompts.route(OWNER, chat("silent", stream=True))
    carl.book.rename["silent"] = "ok"

    async def cut_when_asked() -> None:
        while not bert.book.count("silent"):
            await asyncio.sleep(0.01)
        anna.clients[bert.key.id].cut()

    async with asyncio.TaskGroup() as group:
        group.create_task(cut_when_asked())
        deltas = await collect(routed.stream())
    assert text(deltas) == "Hello there"
    assert (routed.node, routed.engine) == ("carl", "peer:carl")


async def test_after_the_first_byte_nobody_else_is_asked(stack: AsyncExitStack) -> None:
    anna, bert, carl = await three(stack)
    status, headers, body = await ask(anna, chat_body("dies", stream=True))
    assert (status, headers["x-mycoswarm-node"]) == (200, "bert")
    assert b"begin" in body
    error = json.loads(body.strip().split(b"\n\n")[-1].removeprefix(b"data: "))["error"]
    assert error["code"] in {"engine-failed", "peer-failed"}
    assert bert.book.count("dies") == 1
    assert carl.book.bodies == []


async def test_a_cut_in_the_middle_is_a_clear_end(stack: AsyncExitStack) -> None:
    anna, bert, carl = await three(stack)
    routed = await anna.prompts.route(OWNER, chat("slow", stream=True))
    async with aclosing(routed.stream()) as deltas:
        await anext(deltas)
        anna.clients[bert.key.id].cut()
        with pytest.raises(EngineError) as caught:
            async for _ in deltas:
                pass
    assert caught.value.code == "peer-failed"
    assert "node 'bert'" in caught.value.message
    assert carl.book.bodies == []
    await until_gone(bert)


async def test_what_one_node_denies_the_next_is_asked(stack: AsyncExitStack) -> None:
    anna, bert, _carl = await three(stack, bert=CLOSED)
    status, headers, _ = await ask(anna, chat_body("ok"))
    assert (status, headers["x-mycoswarm-node"]) == (200, "carl")
    assert bert.book.bodies == []
    assert [row["decision"] for row in await bert.records("decision")] == ["deny"]


async def test_fail_over_goes_nowhere_that_another_rule_allows(stack: AsyncExitStack) -> None:
    """Carl is allowed by a rule of his own, so he is no stand-in for bert."""
    rules = """
schema = 1
name = "test"
[[rule]]
id = "only-bert"
why = "bert"
effect = "allow"
action = "infer"
zone = ["lan"]
node = ["bert"]
[[rule]]
id = "carl-too"
why = "carl"
effect = "allow"
action = "infer"
zone = ["lan"]
node = ["carl"]
"""
    anna, bert, carl = await three(stack, anna=rules)
    async with dead_port() as nobody:
        anna.where[bert.key.id] = [nobody]
        with pytest.raises(Unavailable) as caught:
            await (await anna.prompts.route(OWNER, chat())).complete()
        assert caught.value.code == "peer-unreachable"
        assert carl.book.bodies == []
        # the same two under one rule: now carl is one
        anna.policy = policy_of(HOME)
        await (await anna.prompts.route(OWNER, chat())).complete()
    assert carl.book.count("ok") == 1


async def test_a_node_that_the_policy_forbids_is_never_asked(stack: AsyncExitStack) -> None:
    no_bert = HOME + NO_BERT
    anna, bert, carl = await three(stack, anna=no_bert)
    for _ in range(3):
        _, headers, _ = await ask(anna, chat_body("ok"))
        assert headers["x-mycoswarm-node"] == "carl"
    assert bert.book.bodies == []
    assert carl.book.count("ok") == 3


NO_BERT = """
[[rule]]
id = "not-bert"
why = "not that one"
effect = "forbid"
node = ["bert"]
"""


async def test_the_size_of_a_node_is_a_fact(stack: AsyncExitStack) -> None:
    anna, bert, carl = await three(stack, anna=HOME.replace("label =", 'tier = ["large"]\nlabel ='))
    await anna.meet(bert, tier="tiny")
    await anna.meet(carl, tier="large", running=3)
    _, headers, _ = await ask(anna, chat_body("ok"))
    assert headers["x-mycoswarm-node"] == "carl"
    assert bert.book.bodies == []


# --- denials -------------------------------------------------------------------------------------


async def test_a_denial_there_is_told_here_with_its_rule_and_receipt(stack: AsyncExitStack) -> None:
    anna, bert = await two(stack, theirs=CLOSED)
    status, headers, body = await ask(anna, chat_body("ok", stream=True))
    error = json.loads(body)["error"]
    assert (status, error["code"]) == (403, "peer-denied")
    theirs = next(row for row in await bert.receipts.tail(after=0, limit=10) if row.kind == "decision")
    assert "'bert'" in error["message"] and "default-deny" in error["message"]
    assert theirs.id in error["message"] and theirs.id in error["hint"]
    assert error["rule"] == "bert:default-deny"
    ours = next(row for row in await anna.receipts.tail(after=0, limit=10) if row.kind == "decision")
    assert headers["x-mycoswarm-receipt"] == ours.id
    assert bert.book.bodies == []

    routed = await anna.prompts.route(OWNER, chat())
    with pytest.raises(Denied) as caught:
        await routed.complete()
    assert caught.value.exit_code == 3
    ended = (await anna.records("outcome"))[-1]
    assert (ended["code"], ended["node"]) == ("peer-denied", "bert")


async def test_a_denied_prompt_never_leaves(stack: AsyncExitStack) -> None:
    anna, bert = await two(stack, theirs=OPEN)
    speaker = replace(OWNER, label="secret")
    with pytest.raises(Denied):
        await anna.prompts.route(speaker, chat())
    assert bert.book.bodies == []
    assert await bert.records("decision") == []
    # the same prompt, less sensitive
    await (await anna.prompts.route(replace(OWNER, label="private"), chat())).complete()
    assert bert.book.count("ok") == 1


@pytest.mark.parametrize("label", ["secret", "private"])
async def test_no_node_forwards_to_a_cloud(stack: AsyncExitStack, label: str) -> None:
    anna, bert = await two(stack, ours=SENDS_ALL, theirs=OPEN)
    # bert has no model of this name, but a rule and a destination that would take it from his own people
    with pytest.raises(Unavailable, match="way out"):  # the positive control: bert himself would send it
        await bert.prompts.route(replace(OWNER, label=label), chat("gpt-9"))
    await anna.know("bert", bert.address, ["gpt-9", "ok"])
    with pytest.raises(Denied) as caught:
        await (await anna.prompts.route(replace(OWNER, label=label), chat("gpt-9"))).complete()
    assert caught.value.rule == "bert:peer-stays-here"
    there = (await bert.records("decision"))[-1]
    assert (there["rule"], there["by"], there["zone"]) == ("peer-stays-here", "node:anna", "cloud")
    assert bert.book.bodies == []
    # what bert serves himself, he may answer
    await (await anna.prompts.route(replace(OWNER, label=label), chat("ok"))).complete()
    there = (await bert.records("decision"))[-1]
    assert (there["zone"], there["label"], there["dest"]) == ("self", label, None)


async def test_there_is_no_third_hop(stack: AsyncExitStack) -> None:
    around = hood("anna", "bert", "carl")
    carl = await stack.enter_async_context(neighbour("carl", around, policy=OPEN))
    bert = await stack.enter_async_context(neighbour("bert", around, policy=OPEN, serves=False))
    anna = await stack.enter_async_context(neighbour("anna", around, policy=OPEN, serves=False))
    await bert.meet(carl)
    await anna.know("bert", bert.address, ["ok"])
    await (await bert.prompts.route(OWNER, chat())).complete()  # bert himself may
    assert carl.book.count("ok") == 1
    with pytest.raises(Denied) as caught:
        await (await anna.prompts.route(OWNER, chat())).complete()
    assert caught.value.rule == "bert:peer-stays-here"
    assert carl.book.count("ok") == 1


async def test_routing_itself_refuses_to_forward(stack: AsyncExitStack) -> None:
    """Also a Prompts that is told of a peer's prompt directly, with every rule open, keeps it here."""
    anna, bert = await two(stack, ours=OPEN, theirs=OPEN)
    peer = Speaker(principal=Principal(node="bert", node_id=bert.key.id), start=Start.PEER)
    weighed = anna.prompts.weigh(peer, chat())
    assert [why.candidate.zone for why in weighed] == [Zone.LAN, Zone.CLOUD]
    assert all(isinstance(why.outcome, Denied) for why in weighed)
    with pytest.raises(Denied, match="answered on this node"):
        await anna.prompts.route(peer, chat())
    (decided,) = await anna.records("decision")
    assert (decided["rule"], decided["decision"]) == ("peer-stays-here", "deny")


# --- what somebody claims ------------------------------------------------------------------------


CLAIMS: list[dict[str, str]] = [
    {"X-Mycoswarm-Origin": "user:friend"},
    {"X-Mycoswarm-User": "friend", "X-Mycoswarm-Groups": "adm"},
    {"Authorization": "Bearer mk-neighbours-0123456789"},
    {"X-Mycoswarm-Node": "carl", "X-Forwarded-For": "127.0.0.1", "Forwarded": "for=127.0.0.1"},
    {"X-Mycoswarm-From": "local", "X-Mycoswarm-Zone": "self"},
]


@pytest.mark.parametrize("claim", CLAIMS, ids=min)
async def test_what_a_node_claims_opens_nothing(stack: AsyncExitStack, claim: dict[str, str]) -> None:
    anna, bert = await two(stack, theirs=CLOSED)
    body = chat_body("ok", user="friend", metadata={"origin": "owner", "node": "carl"})
    response = await anna.clients[bert.key.id].send(
        "POST", "/v1/chat/completions", json.dumps(body).encode(), claim
    )
    try:
        said = json.loads(await response.read())
    finally:
        response.close()
    assert (response.status, said["error"]["rule"]) == (403, "default-deny")
    assert bert.book.bodies == []
    # the positive control: the key that the policy names is answered, whatever it claims
    bert.policy = policy_of(CLOSED.replace('node = "carl"', f'node = "{anna.key.id}"'))
    response = await anna.clients[bert.key.id].send(
        "POST", "/v1/chat/completions", json.dumps(body).encode(), claim
    )
    response.close()
    assert response.status == 200


async def test_a_label_that_the_other_node_does_not_know_is_its_highest(stack: AsyncExitStack) -> None:
    labels = '[labels]\norder = ["open", "sealed"]\ndefault = "open"\n'
    theirs = HOME.replace('name = "test"', f'name = "test"\n{labels}').replace('"private"', '"open"')
    anna, bert = await two(stack, theirs=theirs)
    with pytest.raises(Denied) as caught:
        await (await anna.prompts.route(replace(OWNER, label="public"), chat())).complete()
    assert caught.value.code == "peer-denied"
    (there,) = await bert.records("decision")
    assert there["label"] == "sealed"
    assert bert.book.bodies == []
    # with words that both know it goes
    anna.policy = policy_of(theirs)
    await (await anna.prompts.route(replace(OWNER, label="open"), chat())).complete()
    assert bert.book.count("ok") == 1


async def test_the_label_always_goes_along(stack: AsyncExitStack) -> None:
    anna, bert = await two(stack, ours=SENDS_ALL, theirs=OPEN)
    for label in (None, "public", "secret", "no-such-label"):
        await (await anna.prompts.route(replace(OWNER, label=label), chat())).complete()
    labels = [row["label"] for row in await bert.records("decision")]
    assert labels == ["private", "public", "secret", "secret"]


async def test_a_revoked_node_is_refused_by_name(stack: AsyncExitStack) -> None:
    anna, bert = await two(stack)
    bert.hood.gone.add(anna.key.id)
    with pytest.raises(MycoswarmError) as caught:
        await (await anna.prompts.route(OWNER, chat())).complete()
    assert (caught.value.code, caught.value.exit_code) == ("peer-refuses-us", 3)
    assert bert.book.bodies == []


async def test_a_permit_for_one_node_does_not_cover_another(stack: AsyncExitStack) -> None:
    anna, bert, carl = await three(stack)
    permits = {why.candidate.node: why.outcome for why in anna.prompts.weigh(OWNER, chat())}
    engines = {engine.name: engine for engine in anna.prompts._engines()}
    with pytest.raises(LocalProtocolError):
        await engines["peer:carl"].complete(permits["bert"], chat())  # type: ignore[arg-type]
    assert carl.book.bodies == [] and bert.book.bodies == []
    await engines["peer:carl"].complete(permits["carl"], chat())  # type: ignore[arg-type]
    assert carl.book.count("ok") == 1


async def test_a_yes_is_for_the_node_that_was_asked_about(stack: AsyncExitStack) -> None:
    asks = HOME.replace('effect = "allow"', 'effect = "ask"')
    anna, bert, carl = await three(stack, anna=asks)

    async def say_yes() -> None:
        while not (rows := await anna.approvals.pending()):
            await asyncio.sleep(0.01)
        (row,) = rows
        assert (row.facts["zone"], row.facts["node"]) == ("lan", "bert")
        await anna.desk.decide(row.id, approve=True, by=OWNER.principal)

    async with dead_port() as nobody:
        for where, code in ((bert.address, ""), (nobody, "peer-unreachable")):
            anna.where[bert.key.id] = [where]
            async with asyncio.TaskGroup() as group:
                group.create_task(say_yes())
                routed = await anna.prompts.route(OWNER, chat())
            assert (routed.node, routed.engine) == ("bert", "peer:bert")
            if not code:
                await routed.complete()
                continue
            with pytest.raises(Unavailable) as caught:
                await routed.complete()
            assert caught.value.code == code
    assert bert.book.count("ok") == 1
    assert carl.book.bodies == []  # nobody was asked about carl


# --- placement and explanations ------------------------------------------------------------------


async def test_this_node_comes_first_then_the_idle_one(stack: AsyncExitStack) -> None:
    around = hood("anna", "bert", "carl")
    anna, bert, carl = [
        await stack.enter_async_context(neighbour(name, around)) for name in ("anna", "bert", "carl")
    ]
    await anna.meet(bert, running=2)
    await anna.meet(carl, running=1)
    weighed = anna.prompts.weigh(OWNER, chat())
    assert [why.candidate.node for why in weighed] == ["anna", "carl", "bert"]
    away = replace(anna.policy, prefer=("lan", "self"))  # type: ignore[type-var]
    anna.policy = away
    assert [why.candidate.node for why in anna.prompts.weigh(OWNER, chat())] == ["carl", "bert", "anna"]


async def test_prompts_spread_over_equal_nodes(stack: AsyncExitStack) -> None:
    anna, bert, carl = await three(stack)
    await anna.meet(bert)
    await anna.meet(carl)
    first = await anna.prompts.route(OWNER, chat("slow", stream=True))
    async with aclosing(first.stream()) as deltas:
        await anext(deltas)
        second = await anna.prompts.route(OWNER, chat())
        await second.complete()
        assert {first.node, second.node} == {"bert", "carl"}


async def test_a_node_that_is_not_reachable_serves_nothing_and_says_so(stack: AsyncExitStack) -> None:
    anna, bert = await two(stack)
    assert len(anna.prompts.models()) == len(bert.own_models())
    anna.lose("bert", "silent for 4.5 s")
    assert anna.prompts.models() == []
    (absent,) = anna.prompts.absent(chat())
    assert (absent.node, absent.engine) == ("bert", "peer:bert")
    assert absent.why == "not reachable: silent for 4.5 s"
    with pytest.raises(Unavailable) as caught:
        await anna.prompts.route(OWNER, chat())
    assert (caught.value.code, "bert" in caught.value.message) == ("peer-unreachable", True)
    with pytest.raises(NotFound):
        await anna.prompts.route(OWNER, chat("unheard-of"))
    await anna.meet(bert)
    await (await anna.prompts.route(OWNER, chat())).complete()


async def test_an_explanation_lists_the_nodes_and_why_not(stack: AsyncExitStack) -> None:
    around = hood("anna", "bert", "carl", "dora", "emil")
    anna, bert, carl = [
        await stack.enter_async_context(neighbour(name, around, policy=HOME + NO_BERT))
        for name in ("anna", "bert", "carl")
    ]
    await anna.meet(bert)
    await anna.meet(carl)
    await anna.know("dora", bert.address, ["another"])
    await anna.know("emil", bert.address, ["ok"])
    anna.lose("emil")
    rows = {str(row["node"]): row for row in await explained(anna, "ok")}
    assert list(rows) == ["anna", "carl", "bert", "dora", "emil"]
    assert (rows["anna"]["decision"], rows["anna"]["why"]) == ("allow", "")
    assert rows["carl"]["why"] == "lan comes after self"
    assert (rows["bert"]["decision"], rows["bert"]["rule"]) == ("deny", "not-bert")
    assert "not that one" in rows["bert"]["why"]
    assert (rows["dora"]["decision"], rows["dora"]["why"]) == ("absent", "the model is not there")
    assert rows["emil"]["why"] == "not reachable: silent for 4.5 s"


async def explained(node: Neighbour, model: str) -> list[dict[str, Any]]:
    """Ask the control interface, as its route does."""
    services = SimpleNamespace(prompts=node.prompts, policy=SimpleNamespace(policy=node.policy))
    call = SimpleNamespace(
        services=services, principal=OWNER.principal, json=lambda: {"action": "infer", "model": model}
    )
    response = await explain(call)  # type: ignore[arg-type]
    found = json.loads(response.body)["candidates"]  # type: ignore[attr-defined]
    assert isinstance(found, list)
    return found


# --- members that lie ----------------------------------------------------------------------------


async def test_a_member_that_lies_is_bounded() -> None:
    around = hood("anna", "mallory")
    for script, code in LIES.items():
        patience = Patience(first_byte_s=2, idle_s=1, answer_s=3) if script is hangs else None
        async with (
            neighbour("anna", around, serves=False, patience=patience) as anna,
            lying(around, "mallory", script) as fake,
        ):
            await anna.know("mallory", address_of(fake), ["ok"])
            for prompt in (chat(stream=True), chat()):
                routed = await anna.prompts.route(OWNER, prompt)
                answer = collect(routed.stream()) if prompt.stream else routed.complete()
                with pytest.raises(MycoswarmError) as caught:
                    await answer
                assert caught.value.code == code, (script.__name__, caught.value)
                assert "mallory" in caught.value.message
                assert "SECRET" not in str(caught.value)


async def garbage(turn: Turn) -> None:
    await turn.write(b"SECRET this is no HTTP\r\n\r\n")
    turn.cut()


async def not_json(turn: Turn) -> None:
    await turn.answer(b"<html>SECRET</html>", kind="text/html")


async def truncated(turn: Turn) -> None:
    await turn.begin("application/json" if not turn.json.get("stream") else "text/event-stream")
    await turn.piece(b'data: {"choices": [{"index": 0, "delta"')
    turn.cut()


async def endless(turn: Turn) -> None:
    if turn.json.get("stream"):
        await turn.begin()
        await turn.event(b"x" * 100)  # an event that is not JSON
        return
    await turn.begin("application/json")
    while True:
        await turn.piece(b" " * (1 << 20))


async def hangs(turn: Turn) -> None:
    await turn.server.left.wait()


async def says_500(turn: Turn) -> None:
    await turn.answer({"error": {"message": "SECRET", "code": "internal-error"}}, status=500)


async def redirects(turn: Turn) -> None:
    await turn.write(b"HTTP/1.1 307 X\r\nLocation: http://127.0.0.1:1/SECRET\r\nContent-Length: 0\r\n\r\n")


async def compressed(turn: Turn) -> None:
    await turn.write(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n"
        b"Content-Length: 4\r\n\r\n\x1f\x8b\x08\x00"
    )


async def denies_with_a_novel(turn: Turn) -> None:
    error = {"message": "SECRET" * 1000, "code": "SECRET", "rule": "SECRET\x1b[2J" * 9}
    await turn.answer({"error": error}, status=403)


LIES = {
    garbage: "peer-failed",
    not_json: "peer-failed",
    truncated: "peer-failed",
    endless: "peer-failed",
    hangs: "peer-failed",
    says_500: "peer-failed",
    redirects: "peer-failed",
    compressed: "peer-failed",
    denies_with_a_novel: "peer-denied",
}


async def test_an_endless_stream_of_words_is_let_through_bounded(stack: AsyncExitStack) -> None:
    """Pieces are passed on as they come; what is never passed on is never kept either."""
    around = hood("anna", "mallory")
    anna = await stack.enter_async_context(neighbour("anna", around, serves=False))

    async def flood(turn: Turn) -> None:
        await turn.begin()
        try:
            while True:
                await turn.event(chunk("x" * 60_000))
        except ConnectionError:
            turn.server.left.set()

    async with lying(around, "mallory", flood) as fake:
        await anna.know("mallory", address_of(fake), ["ok"])
        routed = await anna.prompts.route(OWNER, chat(stream=True))
        received = 0
        async with aclosing(routed.stream()) as deltas:
            async for delta in deltas:
                assert isinstance(delta, TextDelta)
                received += len(delta.text)
                if received > 4 << 20:
                    break
        async with asyncio.timeout(60):
            await fake.left.wait()


async def test_who_answers_without_the_key_gets_no_prompt(stack: AsyncExitStack) -> None:
    around = hood("anna", "bert", "mallory")
    anna = await stack.enter_async_context(neighbour("anna", around, serves=False))

    async def answer(turn: Turn) -> None:
        await turn.answer({"choices": [{"message": {"content": "trust me"}, "finish_reason": "stop"}]})

    async with lying(around, "mallory", answer) as fake:
        await anna.know("bert", address_of(fake), ["ok"])
        with pytest.raises(MycoswarmError) as caught:
            await (await anna.prompts.route(OWNER, chat())).complete()
        assert caught.value.code == "peer-unproved"
        assert fake.turns == []
        # the positive control: as mallory, it is asked
        await anna.know("mallory", address_of(fake), ["ok"])
        anna.lose("bert")
        assert (await (await anna.prompts.route(OWNER, chat())).complete()).text == "trust me"
