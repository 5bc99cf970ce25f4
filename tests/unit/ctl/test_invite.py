"""invite and enroll, towards the node: codes shown and read, people asked, waiting that ends."""

from pathlib import Path

import pytest

from mycoswarmd.core.enrol import format_code, make_code
from mycoswarmd.core.words import six_words
from tests.unit.ctl.fakenode import Asked, FakeNode, Reply, answer, ctl, refuse
from tests.unit.ctl.swarm_data import ALONE, HERE, PI, THERE, invited, swarm

CODE = format_code(make_code(bytes(range(13))))
MADE = {"code": CODE, "invite": "79D9", "expires_in_s": 900}
PENDING = {"name": "kitchen\x1b-pi", "id": PI, "words": six_words(PI)}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mycoswarmd.ctl.invite._EVERY_S", 0.001)


@pytest.fixture
def inviting(node: FakeNode) -> FakeNode:
    node.on("GET", "/api/swarm", answer(swarm(invites=[invited()])))
    node.on("POST", "/api/swarm/invites/79D9", answer({"ok": True}))
    return node.on("POST", "/api/swarm/invites", answer(MADE))


def later(*states: dict[str, object]) -> list[Reply]:
    """Answer with an invitation that changes from one question to the next."""
    return [answer(swarm(invites=[state])) for state in states]


def changes(node: FakeNode) -> list[str]:
    return [path for path in node.paths() if not path.startswith("GET ")]


def test_a_code_is_shown_alone_on_its_line_with_what_to_type_where(inviting: FakeNode) -> None:
    ran = ctl(inviting, "invite", "--name", "kitchen-pi", "--ttl", "5m")
    assert ran.code == 0
    assert f"    {CODE}" in ran.out.splitlines()
    assert "sudo mycoswarmctl enroll" in ran.out and "15m" in ran.out
    assert inviting.asked[0].json == {"role": "node", "name": "kitchen-pi", "ttl_s": 300, "confirm": False}
    ran = ctl(inviting, "invite", "--operator", "--json")
    assert ran.json == MADE
    assert inviting.asked[-1].json == {"role": "operator", "name": "", "ttl_s": 900, "confirm": False}
    assert "enroll --operator" in ctl(inviting, "invite", "--operator").out


@pytest.mark.parametrize("ttl", ["9s", "25h", "0", "soon", "-5m", "1.5h"])
def test_a_code_for_a_silly_time_is_not_made(inviting: FakeNode, ttl: str) -> None:
    assert ctl(inviting, "invite", "--ttl", ttl).code == 2
    assert inviting.asked == []


def test_waiting_ends_when_somebody_has_joined(inviting: FakeNode) -> None:
    before = answer(swarm(HERE, invites=[invited(expires_in_s=5)]))
    after = answer(swarm(HERE, THERE, invites=[invited("used")]))
    inviting.on("GET", "/api/swarm", [before, before, after])
    ran = ctl(inviting, "invite", "--wait", terminal=True)
    assert ran.code == 0
    assert "waiting" in ran.err and "5s left" in ran.err
    assert f"joined: kitchen\\x1b-pi, {PI}" in ran.err
    assert len([path for path in inviting.paths() if path == "GET /api/swarm"]) == 3
    inviting.on("GET", "/api/swarm", [before, after])
    lines = ctl(inviting, "invite", "--wait", "--json").lines
    assert lines == [MADE, {"invite": "79D9", "state": "used", "joined": [THERE]}]


def test_it_waits_at_a_terminal_and_not_in_a_script(inviting: FakeNode) -> None:
    inviting.on("GET", "/api/swarm", later(invited("used")))
    ctl(inviting, "invite")
    ctl(inviting, "invite", "--no-wait", terminal=True)
    ctl(inviting, "invite", "--json", terminal=True)
    assert "GET /api/swarm" not in inviting.paths()
    ctl(inviting, "invite", terminal=True)
    assert "GET /api/swarm" in inviting.paths()


@pytest.mark.parametrize(
    ("state", "code"),
    [("expired", "invite-expired"), ("burnt", "invite-burnt"), ("cancelled", "invite-cancelled")],
)
def test_waiting_ends_when_nobody_can_join_any_more(inviting: FakeNode, state: str, code: str) -> None:
    inviting.on("GET", "/api/swarm", later(invited(), invited(state)))
    ran = ctl(inviting, "invite", "--wait", "--json")
    assert (ran.code, ran.lines[1]["error"]["code"]) == (1, code)


def test_waiting_ends_when_the_node_forgot(inviting: FakeNode) -> None:
    inviting.on("GET", "/api/swarm", [*later(invited()), answer(swarm(invites=[]))])
    assert ctl(inviting, "invite", "--wait", "--json").lines[1]["error"]["code"] == "unknown-invite"


def test_the_person_sees_name_id_and_words_and_decides(inviting: FakeNode) -> None:
    waits = invited(pending=PENDING)
    inviting.on("GET", "/api/swarm", later(invited(), waits, waits, invited("used")))
    ran = ctl(inviting, "invite", "--confirm", stdin="y\n", terminal=True)
    assert ran.code == 0, ran.err
    assert "kitchen\\x1b-pi" in ran.out and PI in ran.out and six_words(PI) in ran.out
    (decided,) = [asked for asked in inviting.asked if asked.path == "/api/swarm/invites/79D9"]
    assert decided.json == {"decision": "yes"}
    assert inviting.asked[0].json["confirm"] is True


@pytest.mark.parametrize("typed", ["n\n", "\n", ""])
def test_without_a_yes_the_newcomer_stays_out(inviting: FakeNode, typed: str) -> None:
    inviting.on("GET", "/api/swarm", later(invited(pending=PENDING)))
    ran = ctl(inviting, "invite", "--confirm", stdin=typed, terminal=True)
    assert ran.code == 3 and "not-confirmed" in ran.err
    assert inviting.asked[-2].json == {"decision": "no"}
    assert changes(inviting)[-1] == "DELETE /api/swarm/invites/79D9"  # the code is known to somebody else


def test_another_newcomer_is_another_question(inviting: FakeNode) -> None:
    other = {**PENDING, "id": "z" * 26, "name": "den"}
    inviting.on("GET", "/api/swarm", later(invited(pending=PENDING), invited(pending=other), invited("used")))
    ran = ctl(inviting, "invite", "--confirm", stdin="y\nn\n", terminal=True)
    assert ran.code == 3
    decided = [asked.json["decision"] for asked in inviting.asked if asked.body and "79D9" in asked.path]
    assert decided == ["yes", "no"]


def test_nothing_is_confirmed_where_nobody_can_be_asked(inviting: FakeNode) -> None:
    for options in (["--confirm"], ["--confirm", "--json"]):
        assert ctl(inviting, "invite", *options, stdin="y\n").code == 2
    assert ctl(inviting, "invite", "--confirm", "--no-wait", terminal=True).code == 2
    assert inviting.asked == []


def test_invitations_are_listed_and_cancelled(inviting: FakeNode) -> None:
    rows = [invited(), invited("used", invite="AAAA"), invited(invite="BBBB", pending=PENDING)]
    inviting.on("GET", "/api/swarm", answer(swarm(invites=rows)))
    inviting.on("DELETE", "/api/swarm/invites/79D9", answer({"ok": True}))
    listed = ctl(inviting, "invite", "--list")
    assert listed.code == 0
    assert "14m 40s" in listed.out and "used" in listed.out and "your yes or no" in listed.out
    assert ctl(inviting, "invite", "--list", "--json").json == {"invites": rows}
    assert ctl(inviting, "invite", "--cancel", "79d9").code == 0
    assert ctl(inviting, "invite", "--cancel", "79D96-8QGKT-TQ75Z-9H5C1-5").code == 0
    assert changes(inviting) == ["DELETE /api/swarm/invites/79D9"] * 2
    assert ctl(inviting, "invite", "--list", "--cancel", "79D9").code == 2
    assert "POST /api/swarm/invites" not in inviting.paths()


def test_who_may_not_invite_hears_who_may(inviting: FakeNode) -> None:
    inviting.on("POST", "/api/swarm/invites", refuse(409, "not-a-signer", hint="do it on study-pc"))
    ran = ctl(inviting, "invite")
    assert (ran.code, ran.out) == (1, "") and "study-pc" in ran.err


# --- enroll ----------------------------------------------------------------------------------

JOINED = {
    "swarm": "home",
    "id": PI,
    "name": "kitchen-pi",
    "nodes": [{"id": PI, "name": "kitchen-pi", "role": "node", "signer": False}, THERE],
}


@pytest.fixture
def newcomer(node: FakeNode) -> FakeNode:
    node.on("GET", "/api/swarm", answer(ALONE))
    return node.on("POST", "/api/swarm/enroll", answer(JOINED))


def test_a_node_joins_and_sees_the_others(newcomer: FakeNode) -> None:
    ran = ctl(newcomer, "enroll", CODE, "--address", "127.0.0.1", "--address", "[::1]:99", "--name", "pi")
    assert ran.code == 0, ran.err
    assert newcomer.asked[-1].json == {
        "code": CODE,
        "addresses": ["127.0.0.1:7437", "[::1]:99"],
        "name": "pi",
    }
    assert "swarm home" in ran.out and PI in ran.out and "kitchen\\x1b-pi" in ran.out
    assert ctl(newcomer, "enroll", CODE, "--json").json == JOINED
    assert newcomer.asked[-1].json == {"code": CODE, "addresses": []}


@pytest.mark.parametrize(
    "typed",
    [
        CODE.lower(),
        CODE.replace("-", " "),
        CODE.replace("-", ""),
        f"  {CODE}\n",
        CODE.replace("0", "O").replace("1", "l"),
        CODE.replace("0", "o").replace("1", "I"),
    ],
)
def test_a_code_is_read_however_it_was_typed(newcomer: FakeNode, typed: str) -> None:
    assert ctl(newcomer, "enroll", typed).code == 0
    assert newcomer.asked[-1].json["code"] == CODE


def swapped(code: str) -> str:
    at = next(i for i in range(len(code) - 1) if code[i] != code[i + 1] and "-" not in code[i : i + 2])
    return code[:at] + code[at + 1] + code[at] + code[at + 2 :]


@pytest.mark.parametrize("wrong", ["", "x", CODE[:-1], CODE + "0", swapped(CODE), "U" + CODE[1:], "0" * 300])
def test_a_typing_error_is_found_here_and_nothing_is_sent(newcomer: FakeNode, wrong: str) -> None:
    ran = ctl(newcomer, "enroll", wrong)
    assert ran.code == 2
    assert newcomer.asked == []
    message = ran.err.splitlines()[0]
    assert message.startswith("error: cannot use the code: ") and "bad-code" in message
    assert wrong[:20] not in ran.err or len(wrong) < 5  # a code is a secret until it was used


def test_the_code_is_asked_for_and_errors_may_be_mended(newcomer: FakeNode) -> None:
    ran = ctl(newcomer, "enroll", stdin=f"{swapped(CODE)}\n{CODE.lower()}\n", terminal=True)
    assert ran.code == 0 and "two are swapped" in ran.err
    assert newcomer.asked[-1].json["code"] == CODE
    assert ctl(newcomer, "enroll", stdin=f"{CODE}\n").code == 0
    before = len(newcomer.asked)
    assert ctl(newcomer, "enroll", stdin="a\nb\nc\n" + CODE, terminal=True).code == 2
    assert ctl(newcomer, "enroll", stdin="\n", terminal=True).code == 2
    assert ctl(newcomer, "enroll", stdin="").code == 2
    assert len(newcomer.asked) == before


def test_the_code_comes_from_a_file(newcomer: FakeNode, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(f"{CODE}\n")
    assert ctl(newcomer, "enroll", "--token-file", str(token)).code == 0
    assert newcomer.asked[-1].json["code"] == CODE
    assert ctl(newcomer, "enroll", CODE, "--token-file", str(token)).code == 2
    before = len(newcomer.asked)
    assert ctl(newcomer, "enroll", "--token-file", str(tmp_path / "none")).code == 1
    assert ctl(newcomer, "enroll", "--token-file", str(tmp_path)).code == 1
    assert ctl(newcomer, "enroll", "--token-file", "/dev/null").code == 1
    token.write_bytes(b"\xff" * 5000)
    assert ctl(newcomer, "enroll", "--token-file", str(token)).code == 2
    assert len(newcomer.asked) == before


@pytest.mark.parametrize(
    "address", ["", ":7437", "host:", "host:0", "host:65536", "a b", "x@y", "[::1", "http://x"]
)
def test_what_is_no_address_is_refused_here(newcomer: FakeNode, address: str) -> None:
    ran = ctl(newcomer, "enroll", CODE, "--address", address)
    assert ran.code == 2 and "bad-address" in ran.err
    assert newcomer.asked == []


def test_a_host_that_nobody_knows_is_said(newcomer: FakeNode) -> None:
    ran = ctl(newcomer, "enroll", CODE, "--address", "no-such-host.invalid")
    assert ran.code == 1 and "unknown-host" in ran.err
    assert newcomer.asked == []


@pytest.mark.parametrize(
    ("status", "code"),
    [(409, "invite-used"), (409, "invite-expired"), (404, "invite-unknown"), (401, "inviter-unproved")],
)
def test_what_the_inviter_says_of_the_code_is_one_sentence(
    newcomer: FakeNode, status: int, code: str
) -> None:
    newcomer.on("POST", "/api/swarm/enroll", refuse(status, code, "cannot join with this code: it is old"))
    ran = ctl(newcomer, "enroll", CODE)
    assert ran.code == (3 if status == 401 else 1)
    assert ran.err == f"error: cannot join with this code: it is old ({code})\n"


@pytest.mark.parametrize(("rows", "said"), [([THERE], "was put out of"), ([HERE, THERE], "is in")])
def test_who_is_or_was_in_a_swarm_is_told_before_anybody_waits(
    newcomer: FakeNode, rows: list[dict[str, object]], said: str
) -> None:
    newcomer.on("GET", "/api/swarm", answer(swarm(*rows)))
    ran = ctl(newcomer, "enroll", CODE)
    assert ran.code == 1
    assert f"this node {said} swarm 'home' (already-in-swarm)" in ran.err and "leave first" in ran.err
    assert "six words" not in ran.err and "POST /api/swarm/enroll" not in newcomer.paths()


def test_a_name_is_looked_at_before_anything_is_sent(newcomer: FakeNode) -> None:
    for command in (["enroll", CODE], ["enroll", "--operator", CODE], ["invite"]):
        ran = ctl(newcomer, *command, "--name", "my pi")
        assert ran.code == 2 and "bad-name" in ran.err
    assert newcomer.asked == []


def test_who_interrupts_is_told_that_the_node_goes_on(
    newcomer: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mycoswarmd.ctl.client.Client.post", interrupted)
    ran = ctl(newcomer, "enroll", CODE)
    assert ran.code == 130
    assert "goes on" in ran.err and "mycoswarmctl leave" in ran.err


def test_a_name_that_is_taken_is_said(inviting: FakeNode) -> None:
    inviting.on("POST", "/api/swarm/invites", answer({**MADE, "is_taken": True}))
    ran = ctl(inviting, "invite", "--name", "study", "--no-wait")
    assert ran.code == 0 and "study-2" in ran.err
    inviting.on("POST", "/api/swarm/invites", answer({**MADE, "is_taken": False}))
    assert "taken" not in ctl(inviting, "invite", "--name", "study", "--no-wait").err


def test_who_joins_is_told_that_others_may_answer_prompts(newcomer: FakeNode) -> None:
    newcomer.on("POST", "/api/swarm/enroll", answer(JOINED))
    ran = ctl(newcomer, "enroll", CODE)
    assert ran.code == 0 and "mycoswarmctl policy show" in ran.err


def test_what_is_no_id_of_an_invitation_is_not_sent(inviting: FakeNode) -> None:
    for text in ("", "79D", " "):
        assert ctl(inviting, "invite", "--cancel", text).code == 2
    assert inviting.asked == []


def test_while_a_person_decides_the_six_words_are_shown(
    newcomer: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mycoswarmd.ctl.unixhttp._NATURAL_S", 0.02)

    def slow(asked: Asked) -> Reply:
        del asked
        with newcomer.changed:
            assert newcomer.changed.wait_for(lambda: newcomer.paths().count("GET /api/swarm") == 2, 60)
        return answer(JOINED)

    def told(asked: Asked) -> Reply:
        del asked
        return answer({**ALONE, "self": {"id": PI, "name": "pi", "signer": False}})

    newcomer.on("GET", "/api/swarm", told)
    newcomer.on("POST", "/api/swarm/enroll", slow)
    ran = ctl(newcomer, "enroll", CODE)
    assert ran.code == 0
    assert six_words(PI) in ran.err and "say yes there" in ran.err
