"""nodes, revoke, signers, leave, rekey: what is sent, what is shown, and that nothing is done unasked."""

import json
import threading

import pytest

from tests.unit.ctl.fakenode import Asked, FakeNode, Reply, answer, ctl, refuse
from tests.unit.ctl.swarm_data import ALONE, AWAY, GONE, HERE, LAPTOP, PC, PERSON, PI, THERE, WORD, row, swarm


@pytest.fixture
def home(node: FakeNode) -> FakeNode:
    return node.on("GET", "/api/swarm", answer(swarm()))


def sent(node: FakeNode) -> list[str]:
    """Return what was asked of the node that changes something."""
    return [path for path in node.paths() if not path.startswith("GET ")]


def test_nodes_are_listed_with_what_is_known_of_each(home: FakeNode) -> None:
    ran = ctl(home, "nodes")
    assert ran.code == 0
    head, titles, here, there, person = ran.out.splitlines()
    assert "swarm home" in head and "d1d1d1d1d1d1" in head and "confirmed 1m ago" in head
    assert titles.split() == ["ID", "NAME", "ROLE", "TIER", "ADDRESS", "LAST", "SEEN", "ROSTER", "STATE"]
    assert here.split()[:3] == [PC[:8], "study-pc", "*"] and "node, signer" in here and "this node" in here
    assert there.split() == [
        PI[:8],
        "kitchen\\x1b-pi",
        "node",
        "light",
        "10.0.0.7",
        "1s",
        "ago",
        "same",
        "ready",
    ]
    assert person.split() == [LAPTOP[:8], "anna", "operator", "-", "-", "-", "-", "a", "person"]
    assert f"revoked: {GONE}: stolen" in ran.err
    assert ctl(home, "nodes", "--json").json == swarm()


def test_a_node_that_is_away_says_why_and_a_copied_one_is_an_alarm(node: FakeNode) -> None:
    copied = row(LAPTOP, "den-pc", alarm="cloned")
    node.on("GET", "/api/swarm", answer(swarm(HERE, {**AWAY, "word": WORD}, copied, roster_age_s=None)))
    ran = ctl(node, "nodes")
    away, den = ran.out.splitlines()[-2:]
    assert "unreachable: connection refused" in away and "2h ago" in away and "differs" in away
    assert "ALARM: cloned" in den
    assert "same" not in den and "differs" not in den  # it has not said which roster it has
    assert "not confirmed since the start" in ran.out


def test_what_is_wrong_with_the_roster_is_shown(node: FakeNode) -> None:
    troubled = swarm()
    troubled["swarm"]["problems"] = ["two nodes are called pi"]
    node.on("GET", "/api/swarm", answer(troubled))
    assert "! two nodes are called pi" in ctl(node, "nodes").out


def test_without_a_swarm_the_way_into_one_is_said(node: FakeNode) -> None:
    node.on("GET", "/api/swarm", answer(ALONE))
    for command in (["nodes"], ["signers"], ["revoke", "x", "--yes"], ["nodes", "ping"]):
        ran = ctl(node, *command)
        assert ran.code == 1, command
        assert "(no-swarm)" in ran.err and "mycoswarmctl init" in ran.err and "mycoswarmctl enroll" in ran.err
    assert sent(node) == []


def test_ping_asks_every_other_node_and_no_person(home: FakeNode) -> None:
    home.on("GET", f"/api/swarm/nodes/{PI}/ping", answer({"ms": 1.25, "address": "10.0.0.7:7437"}))
    ran = ctl(home, "nodes", "ping")
    assert ran.code == 0
    assert ran.out.splitlines()[1].split() == ["kitchen\\x1b-pi", "1.2", "ms", "10.0.0.7:7437", "alive"]
    assert [path for path in home.paths() if path.endswith("/ping")] == [f"GET /api/swarm/nodes/{PI}/ping"]


def test_nodes_are_pinged_at_the_same_time(node: FakeNode) -> None:
    """Each answers only while the other is asked, too."""
    both = threading.Barrier(2, timeout=30)

    def slow(asked: Asked) -> Reply:
        both.wait()
        return answer({"ms": 1.0, "address": asked.path})

    rows = [row(one * 26, one) for one in "ab"]
    node.on("GET", "/api/swarm", answer(swarm(HERE, *rows)))
    for one in rows:
        node.on("GET", f"/api/swarm/nodes/{one['id']}/ping", slow)
    ran = ctl(node, "nodes", "ping", "--json")
    assert ran.code == 0, ran.err
    assert [one["node"] for one in ran.json["pings"]] == ["a", "b"]


def test_a_node_that_does_not_answer_a_ping_is_exit_1(home: FakeNode) -> None:
    home.on("GET", "/api/swarm/nodes/pi%2F..", refuse(404, "unknown-node"))
    home.on("GET", "/api/swarm/nodes/kitchen-pi/ping", refuse(503, "peer-unreachable", "cannot reach it"))
    ran = ctl(home, "nodes", "ping", "kitchen-pi", "--json")
    assert ran.code == 1
    assert ran.json == {
        "pings": [{"node": "kitchen-pi", "error": {"code": "peer-unreachable", "message": "cannot reach it"}}]
    }
    assert "cannot reach it" in ctl(home, "nodes", "ping", "kitchen-pi").out


def test_revoking_shows_whom_and_asks(home: FakeNode) -> None:
    home.on("POST", "/api/swarm/revoke", answer({"ok": True}))
    ran = ctl(home, "revoke", PI[:5], "--reason", "stolen", stdin="y\n", terminal=True)
    assert ran.code == 0
    assert PI in ran.out and "kitchen\\x1b-pi" in ran.out and "for good?" in ran.err
    assert home.asked[-1].json == {"node": PI, "reason": "stolen"}


@pytest.mark.parametrize("typed", ["n\n", "\n", ""])
def test_without_a_yes_nobody_is_revoked(home: FakeNode, typed: str) -> None:
    home.on("POST", "/api/swarm/revoke", answer({"ok": True}))
    ran = ctl(home, "revoke", PI, stdin=typed, terminal=True)
    assert ran.code == 1 and "nothing was changed" in ran.err
    assert ctl(home, "revoke", PI, stdin="y\n").code == 2  # nobody is at a terminal
    assert ctl(home, "revoke", PI, "--json", stdin="y\n", terminal=True).code == 2
    assert sent(home) == []


def test_yes_revokes_without_a_question(home: FakeNode) -> None:
    home.on("POST", "/api/swarm/revoke", answer({"ok": True}))
    ran = ctl(home, "revoke", "anna", "--yes", "--json")
    assert (ran.code, ran.json) == (0, {"ok": True})
    assert home.asked[-1].json == {"node": LAPTOP, "reason": ""}


@pytest.mark.parametrize(
    ("text", "code"),
    [("nobody", "unknown-node"), ("eee", "unknown-node"), ("", "unknown-node"), (GONE[:6], "unknown-node")],
)
def test_who_is_no_member_cannot_be_revoked(home: FakeNode, text: str, code: str) -> None:
    ran = ctl(home, "revoke", text, "--yes", "--json")
    assert (ran.code, ran.json["error"]["code"]) == (1, code)
    assert sent(home) == []


def test_a_beginning_that_fits_two_is_refused(node: FakeNode) -> None:
    node.on("GET", "/api/swarm", answer(swarm(HERE, THERE, row(PI[:9] + "x" * 17, "other"))))
    ran = ctl(node, "revoke", PI[:8], "--yes", "--json")
    assert ran.json["error"]["code"] == "ambiguous-node"
    assert sent(node) == []
    assert "revoked already" in ctl(node, "revoke", GONE, "--yes").err


def test_signers_are_listed_made_and_taken_back(home: FakeNode) -> None:
    home.on("POST", "/api/swarm/signers", answer({"node": PI}))
    home.on("DELETE", f"/api/swarm/signers/{PI[:6]}", answer({"node": PI}))
    home.on("DELETE", f"/api/swarm/signers/{'ab' * 32}", answer({"node": ""}))
    listed = ctl(home, "signers")
    assert len(listed.out.splitlines()) == 2 and "study-pc" in listed.out
    assert [one["id"] for one in ctl(home, "signers", "--json").json["signers"]] == [PC]
    assert ctl(home, "signers", "add", "kitchen-pi", stdin="n\n", terminal=True).code == 1
    assert ctl(home, "signers", "add", "study-pc").code == 1  # it is one
    assert sent(home) == []
    assert ctl(home, "signers", "add", "kitchen-pi").code == 0
    assert home.asked[-1].json == {"node": "kitchen-pi"}
    assert ctl(home, "signers", "remove", PI[:6]).code == 2
    nobody = ctl(home, "signers", "remove", "nobody", stdin="y\n", terminal=True)
    assert nobody.code == 1 and "unknown-node" in nobody.err and "[y/N]" not in nobody.err
    assert ctl(home, "signers", "remove", PI[:6], "--yes").code == 0
    assert ctl(home, "signers", "remove", "ab" * 32, "--yes").code == 0  # a key that belongs to no member
    assert sent(home) == [
        "POST /api/swarm/signers",
        f"DELETE /api/swarm/signers/{PI[:6]}",
        f"DELETE /api/swarm/signers/{'ab' * 32}",
    ]


@pytest.mark.parametrize("command", ["leave", "rekey"])
def test_leaving_and_a_new_key_are_asked_about(home: FakeNode, command: str) -> None:
    home.on("POST", f"/api/swarm/{command}", answer({"id": "n" * 26, "old": PC}))
    assert ctl(home, command).code == 2
    assert ctl(home, command, stdin="no\n", terminal=True).code == 1
    assert sent(home) == []
    ran = ctl(home, command, stdin="yes\n", terminal=True)
    assert ran.code == 0
    assert sent(home) == [f"POST /api/swarm/{command}"]
    if command == "rekey":
        assert "n" * 26 in ran.err and PC in ran.err


def test_leaving_no_swarm_is_no_question(node: FakeNode) -> None:
    node.on("GET", "/api/swarm", answer(ALONE))
    node.on("POST", "/api/swarm/leave", refuse(409, "no-swarm"))
    ran = ctl(node, "leave")
    assert ran.code == 1 and "(no-swarm)" in ran.err


@pytest.mark.parametrize(("told", "said"), [([], True), (["pi"], False), (None, False)])
def test_who_leaves_unheard_is_told_what_to_do(home: FakeNode, told: list[str] | None, said: bool) -> None:
    home.on("POST", "/api/swarm/leave", answer({"left": "home", "told": told}))
    ran = ctl(home, "leave", "--yes")
    assert ran.code == 0
    assert ("nobody could be told: on another node, mycoswarmctl revoke study-pc" in ran.err) is said, ran.err


def test_what_the_node_refuses_is_said_with_its_reason(home: FakeNode) -> None:
    home.on("POST", "/api/swarm/revoke", refuse(409, "not-a-signer", hint="do it on study-pc"))
    ran = ctl(home, "revoke", "anna", "--yes")
    assert ran.code == 1 and "not-a-signer" in ran.err and "study-pc" in ran.err


def test_a_node_that_is_no_signer_does_not_ask_whom_to_revoke(node: FakeNode) -> None:
    node.on("GET", "/api/swarm", answer(swarm(self={"id": PI, "name": "kitchen-pi", "signer": False})))
    ran = ctl(node, "revoke", "anna", stdin="y\n", terminal=True)
    assert ran.code == 1 and "not-a-signer" in ran.err and "do it on study-pc" in ran.err
    assert "for good" not in ran.err and sent(node) == []


def test_people_and_what_says_nothing_are_no_traceback(node: FakeNode) -> None:
    node.on("GET", "/api/swarm", answer({"swarm": {"name": "x"}, "nodes": [{"id": PI}, dict(PERSON)]}))
    ran = ctl(node, "nodes")
    assert ran.code == 0 and PI[:8] in ran.out
    assert json.loads(ctl(node, "nodes", "--json").out)["nodes"][0] == {"id": PI}


@pytest.mark.parametrize(
    "command",
    [
        ["revoke", "anna", "--yes"],
        ["invite"],
        ["rekey", "--yes"],
        ["leave", "--yes"],
        ["keys", "list"],
        ["engine", "install"],
        ["restore", "/nonexistent", "--state", "/nonexistent/too"],
    ],
)
def test_what_is_done_on_the_node_itself_is_not_done_from_afar(
    home: FakeNode, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = ctl(None, "--node", "kitchen-pi", *command, "--json")
    assert (ran.code, ran.json["error"]["code"]) == (2, "not-from-afar")
    assert ctl(home, "--node", "kitchen-pi", *command).code == 2
    assert sent(home) == []
