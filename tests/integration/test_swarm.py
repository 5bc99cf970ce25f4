"""Real nodes on loopback become a swarm: they join, answer one another, change keys, part and come back."""

import base64
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from mycoswarmd.core.roster import Kind, make_body, signed
from mycoswarmd.trust.keys import make_seed, public_key, sign
from tests.nodes import NodeProcess, UnixConnection, free_port, until, write_private
from tests.upstream import Upstream, upstream

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PAPER = make_seed()
LAN = """
schema = 1
name = "test"
[labels]
order = ["public", "internal", "private", "secret"]
default = "internal"
[[rule]]
id = "owner"
why = "the owner does what it likes here"
effect = "allow"
action = ["task", "admin"]
origin = ["owner"]
[[rule]]
id = "swarm"
why = "up to private may use the machines of the swarm"
effect = "allow"
action = "infer"
zone = ["self", "lan"]
label = { max = "private" }
"""


class Member:
    """One node of a test's swarm."""

    def __init__(
        self, base: Path, name: str, *, engine: str = "", policy: str = LAN, peers: tuple[int, ...] = ()
    ) -> None:
        self.name = name
        self.state = base / name
        self.state.mkdir(mode=0o700, exist_ok=True)
        self.port = free_port()
        settings = f'node_name = "{name}"\nmanaged_engine = false\ndiscovery = false\n'
        settings += f"peers = {[f'127.0.0.1:{port}' for port in peers]}\n"
        if engine:
            settings += f'[engines.scripted]\nkind = "openai"\nurl = "{engine}"\n'
        write_private(self.state / "mycoswarm.toml", settings)
        write_private(self.state / "policy.toml", policy)
        arguments = ("--no-listen", "--swarm-listen", f"127.0.0.1:{self.port}")
        self.node = NodeProcess(self.state, arguments=arguments)
        self.id = ""

    def get(self, path: str) -> dict:  # type: ignore[type-arg]
        answer = self.node.call("GET", path)
        assert answer.status == 200, answer.body
        return answer.json

    def post(self, path: str, body: object = None, *, status: int = 0) -> dict:  # type: ignore[type-arg]
        answer = self.node.call("POST", path, {} if body is None else body)
        assert answer.status == status if status else answer.status < 300, answer.body
        return answer.json

    def swarm(self) -> dict:  # type: ignore[type-arg]
        return self.get("/api/swarm")

    def sees(self, name: str) -> dict | None:  # type: ignore[type-arg]
        return next((one for one in self.swarm()["nodes"] if one["name"] == name), None)

    def reaches(self, *names: str) -> bool:
        rows = {one["name"]: one for one in self.swarm()["nodes"]}
        return all(name in rows and rows[name]["state"] == "ready" for name in names)

    def join(self, inviter: "Member", **invitation: object) -> dict:  # type: ignore[type-arg]
        code = inviter.post("/api/swarm/invites", {"name": self.name, **invitation})["code"]
        joined = self.post("/api/swarm/enroll", {"code": code, "addresses": [f"127.0.0.1:{inviter.port}"]})
        self.id = joined["id"]
        return joined


@contextmanager
def swarm_of(base: Path, *members: Member) -> Iterator[None]:
    """Run these nodes, the first as founder and signer, until everybody reaches everybody."""
    del base
    with ExitStack() as stack:
        for member in members:
            member.node.start()
            stack.callback(stop_quietly, member.node)
        founder = members[0]
        begun = founder.post(
            "/api/swarm/init",
            {"name": "home", "node_name": founder.name, "recovery": public_key(PAPER).hex()},
        )
        founder.id = begun["id"]
        for member in members[1:]:
            member.join(founder)
        for member in members:
            until(lambda me=member: me.reaches(*(one.name for one in members)))  # type: ignore[misc]
        yield


def stop_quietly(process: NodeProcess) -> None:
    if process.is_running():
        process.stop()


def ask(member: Member, model: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    body = {"model": model, "messages": [{"role": "user", "content": "xyzzy-prompt"}]}
    answer = member.node.call("POST", "/v1/chat/completions", body, headers)
    return answer.status, {key.lower(): value for key, value in answer.headers.items()}, answer.body


@pytest.fixture
def engine() -> Iterator[Upstream]:
    with upstream() as book:
        yield book


@pytest.fixture
def pair(tmp_path: Path, engine: Upstream) -> Iterator[tuple[Member, Member]]:
    """A workstation with an engine, which founded the swarm, and a Pi without one."""
    workstation, pi = Member(tmp_path, "ws", engine=engine.url), Member(tmp_path, "pi")
    with swarm_of(tmp_path, workstation, pi):
        until(lambda: pi.get("/api/models")["models"])
        yield workstation, pi


def test_a_prompt_crosses_the_swarm_and_says_so(pair: tuple[Member, Member], engine: Upstream) -> None:
    workstation, pi = pair
    status, headers, body = ask(pi, "ok", **{"X-Mycoswarm-Label": "private"})
    assert status == 200, body
    assert headers["x-mycoswarm-node"] == "ws"
    assert headers["x-mycoswarm-zone"] == "lan"
    assert headers["x-mycoswarm-rule"] == "swarm"
    there = workstation.get("/api/receipts?last=10")["receipts"]
    decided = [one for one in there if one["kind"] == "decision"]
    assert decided[-1]["body"]["by"] == "node:pi"
    assert decided[-1]["body"]["label"] == "private"
    assert engine.count("ok") == 1
    assert b"xyzzy" not in json.dumps(there).encode()


def test_what_is_too_sensitive_for_the_swarm_does_not_leave(
    pair: tuple[Member, Member], engine: Upstream
) -> None:
    _, pi = pair
    status, _, body = ask(pi, "ok", **{"X-Mycoswarm-Label": "secret"})
    assert status == 403, body
    assert engine.count("ok") == 0


def revocation_s(workstation: Member, pi: Member) -> float:
    """Put a node out in the middle of an answer; return how long it took to be cut."""
    connection = UnixConnection(pi.node.socket)
    body = {"model": "slow", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    response = connection.getresponse()
    assert response.status == 200
    assert response.read1(100)
    begun_s = time.monotonic()
    workstation.post("/api/swarm/revoke", {"node": "pi", "reason": "stolen"})
    rest = b""
    while piece := response.read1(4096):
        rest += piece
    took_s = time.monotonic() - begun_s
    connection.close()
    assert b'"error"' in rest
    return took_s


def test_a_revocation_cuts_a_stream_within_a_second(pair: tuple[Member, Member], engine: Upstream) -> None:
    workstation, pi = pair
    took_s = [revocation_s(workstation, pi)]
    while min(took_s) >= 1.0 and len(took_s) < 4:  # a busy machine may hold up any one try
        pi.post("/api/swarm/leave")
        pi.join(workstation)
        until(lambda: pi.reaches("ws") and pi.get("/api/models")["models"])
        took_s.append(revocation_s(workstation, pi))
    assert min(took_s) < 1.0, took_s
    assert engine.gone.wait(60)  # and the engine has stopped working for it
    assert ask(pi, "ok")[0] in {401, 403, 404, 503}
    assert engine.count("ok") == 0
    assert pi.id in {one["id"] for one in workstation.swarm()["revoked"]}
    # It cannot come back with the key that was put out, also when somebody invites it again.
    code = workstation.post("/api/swarm/invites", {})["code"]
    refused = pi.node.call(
        "POST", "/api/swarm/enroll", {"code": code, "addresses": [f"127.0.0.1:{workstation.port}"]}
    )
    assert refused.status >= 400


def test_a_new_key_takes_the_place_of_the_old_one(pair: tuple[Member, Member]) -> None:
    workstation, pi = pair
    changed = pi.post("/api/swarm/rekey")
    assert changed["old"] == pi.id
    assert changed["id"] != pi.id
    until(lambda: (workstation.sees("pi") or {}).get("id") == changed["id"] and workstation.reaches("pi"))
    until(lambda: pi.reaches("ws"))
    until(lambda: ask(pi, "ok")[0] == 200)
    pi.node.kill()
    pi.node.start()
    until(lambda: pi.reaches("ws"))
    assert pi.swarm()["self"]["id"] == changed["id"]


def test_leaving_forgets_and_lets_one_join_again_under_another_id(pair: tuple[Member, Member]) -> None:
    workstation, pi = pair
    first = pi.id
    pi.post("/api/swarm/leave")
    assert pi.swarm()["swarm"] is None
    until(lambda: workstation.sees("pi") is None)
    pi.join(workstation)
    assert pi.id != first
    until(lambda: pi.reaches("ws") and workstation.reaches("pi"))
    until(lambda: ask(pi, "ok")[0] == 200)


def test_who_puts_itself_out_and_leaves_is_out_for_the_others(tmp_path: Path) -> None:
    """Also when it does both in one breath; where nobody is there to hear of it, that is said."""
    first, second = (Member(tmp_path, name) for name in ("first", "second"))
    with swarm_of(tmp_path, first, second):
        first.post("/api/swarm/signers", {"node": "second"})
        until(lambda: (second.swarm()["self"] or {}).get("signer"))
        first.post("/api/swarm/revoke", {"node": "first", "reason": "sold"})
        assert first.post("/api/swarm/leave") == {"left": "home", "told": ["second"]}
        assert first.swarm()["swarm"] is None
        assert [one["name"] for one in second.swarm()["nodes"]] == ["second"]
        assert [one["id"] for one in second.swarm()["revoked"]] == [first.id]

        first.join(second)
        until(lambda: first.reaches("second"))
        second.node.kill()
        assert first.post("/api/swarm/leave") == {"left": "home", "told": []}


def test_a_second_signer_invites_and_revokes(tmp_path: Path) -> None:
    first, second = (Member(tmp_path, name) for name in ("first", "second"))
    third = Member(tmp_path, "third", peers=(first.port,))
    with swarm_of(tmp_path, first, second):
        refused = second.node.call("POST", "/api/swarm/invites", {})
        assert refused.status == 409
        assert refused.json["error"]["code"] == "not-a-signer"
        # Nobody else is asked for a key before this node knows that it may not use it.
        refused = second.node.call("POST", "/api/swarm/signers", {"node": "first"})
        assert (refused.status, refused.json["error"]["hint"]) == (409, "do it on first")
        first.post("/api/swarm/signers", {"node": "second"})
        until(lambda: (second.swarm()["self"] or {}).get("signer"))
        third.node.start()
        try:
            third.join(second)
            until(lambda: first.reaches("third") and third.reaches("first", "second"))
            second.post("/api/swarm/revoke", {"node": "first", "reason": "sold"})
            until(lambda: third.sees("first") is None)
            # It hears of it itself, as soon as nobody lets it in any more.
            until(lambda: not [one for one in first.swarm()["nodes"] if one["self"]])
        finally:
            third.node.stop()


def test_the_paper_key_begins_anew_without_a_stolen_signer(tmp_path: Path) -> None:
    thief, honest = Member(tmp_path, "thief"), Member(tmp_path, "honest")
    with swarm_of(tmp_path, thief, honest):
        thief.post("/api/swarm/revoke", {"node": "honest", "reason": "mischief"})
        until(lambda: not [one for one in honest.swarm()["nodes"] if one["self"]])
        draft = honest.post("/api/swarm/recovery/draft", {"without": ["thief"], "restore": [honest.id]})
        body = base64.b64decode(draft["body"])
        forged = signed(body, (public_key(other := make_seed()), lambda message: sign(other, message)))
        assert honest.node.call("POST", "/api/swarm/recovery", {"statement": forged}).status == 400
        statement = signed(body, (public_key(PAPER), lambda message: sign(PAPER, message)))
        honest.post("/api/swarm/recovery", {"statement": statement})
        shown = honest.swarm()
        assert shown["swarm"]["epoch"] == 1
        assert [one["name"] for one in shown["nodes"]] == ["honest"]
        assert shown["self"]["signer"]
        # The thief's signatures count for nothing any more: whom it invites, the others do not know.
        assert thief.name not in json.dumps(shown["nodes"])


def test_a_killed_node_is_marked_and_comes_back_by_itself(pair: tuple[Member, Member]) -> None:
    workstation, pi = pair
    took_s: list[float] = []
    while not took_s or (took_s[-1] >= 5 and len(took_s) < 4):  # a busy machine may hold up any one try
        workstation.node.kill()
        begun_s = time.monotonic()
        until(lambda: not pi.reaches("ws"))
        took_s.append(time.monotonic() - begun_s)
        assert ask(pi, "ok")[0] in {404, 503}
        workstation.node.start()
        until(lambda: pi.reaches("ws"))
        until(lambda: ask(pi, "ok")[0] == 200)
    assert min(took_s) < 5, took_s


@pytest.mark.parametrize("leaves", [True, False], ids=["as-the-hint-says", "with-the-old-key"])
def test_a_node_with_a_damaged_roster_says_so_and_comes_back(
    pair: tuple[Member, Member], leaves: bool
) -> None:
    workstation, pi = pair
    pi.node.stop()
    db = pi.state / "mycoswarm.db"
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        connection.execute("DELETE FROM roster WHERE seq = (SELECT min(seq) FROM roster)")
    before = len(pi.node.log())
    pi.node.start(wait=False)
    assert pi.node.wait_exit() == 1
    said = pi.node.log()[before:]
    assert "roster-damaged" in said and "restore a backup; or move the database" in said, said
    assert "Traceback" not in said

    kept = pi.state / "kept"
    kept.mkdir()
    for one in pi.state.glob("mycoswarm.db*"):
        one.rename(kept / one.name)
    pi.node.start()
    old = pi.id
    if leaves:
        pi.post("/api/swarm/leave")
    pi.join(workstation)
    assert (pi.id != old) is leaves

    def row() -> dict:  # type: ignore[type-arg]
        return next((one for one in workstation.swarm()["nodes"] if one["id"] == pi.id), {})

    if leaves:
        until(lambda: pi.reaches("ws") and row().get("state") == "ready")
        assert row()["alarm"] == ""
    else:  # the control: it counts its starts anew, so the old key looks like a copy
        until(lambda: row().get("alarm"))


def test_a_ping_tries_now(pair: tuple[Member, Member]) -> None:
    workstation, pi = pair
    workstation.node.kill()
    until(lambda: not pi.reaches("ws"))
    refused = pi.node.call("GET", "/api/swarm/nodes/ws/ping")
    assert refused.status == 503
    assert "127.0.0.1" in refused.json["error"]["message"]  # where it was tried, not only that it was
    time.sleep(3)  # by now it is dialled less often than a person waits
    workstation.node.start()

    def is_there() -> bool:
        begun_s = time.monotonic()
        answer = pi.node.call("GET", "/api/swarm/nodes/ws/ping")
        if answer.status == 200:
            assert answer.json["ms"] > 0
            return True
        assert time.monotonic() - begun_s > 1, answer.body  # it was tried: the machine was too slow
        return False

    until(is_there)


def test_a_person_has_to_say_yes_where_the_invitation_says_so(tmp_path: Path) -> None:
    founder, newcomer = Member(tmp_path, "founder"), Member(tmp_path, "newcomer")
    with swarm_of(tmp_path, founder):
        newcomer.node.start()
        try:
            for decision in ("no", "yes"):
                made = founder.post("/api/swarm/invites", {"confirm": True})
                answers: list[int] = []
                joining = threading.Thread(
                    target=lambda code=made["code"], into=answers: into.append(
                        newcomer.node.call(
                            "POST",
                            "/api/swarm/enroll",
                            {"code": code, "addresses": [f"127.0.0.1:{founder.port}"]},
                        ).status
                    )
                )
                joining.start()
                until(lambda: any(one["pending"] for one in founder.swarm()["invites"]))
                pending = next(one["pending"] for one in founder.swarm()["invites"] if one["pending"])
                assert len(pending["words"].split()) == 6
                assert founder.sees("newcomer") is None
                founder.post(f"/api/swarm/invites/{made['invite']}", {"decision": decision})
                joining.join(60)
                assert answers == [201] if decision == "yes" else answers[0] >= 400
            until(lambda: founder.reaches("newcomer"))
        finally:
            newcomer.node.stop()


def test_a_statement_of_nobody_is_not_taken(pair: tuple[Member, Member]) -> None:
    workstation, _ = pair
    before = workstation.swarm()["swarm"]["digest"]
    seed = make_seed()
    body = make_body(
        Kind.REVOKE,
        swarm=workstation.swarm()["swarm"]["id"],
        epoch=0,
        by=public_key(seed).hex(),
        node=workstation.id,
        reason="x",
    )
    statement = signed(body, (public_key(seed), lambda message: sign(seed, message)))
    answer = workstation.node.call("POST", "/api/swarm/recovery", {"statement": statement})
    assert answer.status == 400
    assert workstation.swarm()["swarm"]["digest"] == before
