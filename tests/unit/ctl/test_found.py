"""init and recover: the paper key is made, shown once, asked back and used here; the node never sees it."""

import base64
import json
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from mycoswarmd.core.recovery import parse_recovery
from mycoswarmd.core.roster import SIGNING_CONTEXT, Kind, make_body
from mycoswarmd.ctl import paperkey
from mycoswarmd.trust import keys
from tests.unit.ctl.fakenode import Asked, FakeNode, Ran, Reply, answer, ctl, refuse
from tests.unit.ctl.swarm_data import ALONE, GONE, HERE, LAPTOP, PC, PERSON, PI, THERE, row, swarm

BEGUN = {"swarm": "5" * 64, "id": PC, "name": "study-pc"}
SEED = bytes(range(32))


@pytest.fixture
def fresh(node: FakeNode) -> FakeNode:
    node.on("GET", "/api/swarm", answer(ALONE))
    return node.on("POST", "/api/swarm/init", answer(BEGUN))


@pytest.fixture
def known_key(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make the next key one that the test knows; the groups of it."""
    monkeypatch.setattr(keys, "make_seed", lambda: SEED)
    return paperkey.PaperKey(SEED).groups


def posts(node: FakeNode) -> list[Asked]:
    return [asked for asked in node.asked if asked.method != "GET"]


def everything_sent(node: FakeNode) -> str:
    return " ".join(f"{asked.path} {asked.headers} {asked.body!r}" for asked in node.asked)


def begin_typing(fresh: FakeNode, *typed: str) -> Ran:
    return ctl(
        fresh, "init", "--name", "home", stdin="\n" + "".join(f"{one}\n" for one in typed), terminal=True
    )


def asked_groups(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Fix which groups are asked back."""

    class Chosen:
        def sample(self, population: range, k: int) -> list[int]:
            assert len(population) == 13 and k == len(numbers)
            return [number - 1 for number in numbers]

    monkeypatch.setattr("mycoswarmd.ctl.paperkey.secrets.SystemRandom", Chosen)


def test_a_swarm_begins_with_the_public_half_alone(
    fresh: FakeNode, known_key: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_groups(monkeypatch, 11, 3)
    ran = begin_typing(fresh, known_key[2].lower(), f" {known_key[10]} ")
    assert ran.code == 0, ran.err
    assert [asked.json for asked in posts(fresh)] == [
        {"name": "home", "recovery": keys.public_key(SEED).hex()}
    ]
    shown = re.findall(r"\d+: ([0-9A-Z]{4})", ran.out)
    assert shown == known_key and len(shown) == 13
    assert parse_recovery("-".join(shown)) == SEED
    assert "group 3" in ran.err and "group 11" in ran.err
    assert PC in ran.out
    # After it was written down, the screen is wiped: what is typed comes from the paper.
    assert ran.out.index("\x1b[2J\x1b[3J") > ran.out.index(shown[-1])
    sent = everything_sent(fresh)
    assert SEED.hex() not in sent and not any(group in sent for group in known_key)


def test_two_different_groups_are_asked_back_each_time() -> None:
    session: Any = ModuleType("session")
    session.aside = print
    asked = set()

    def answer_all(question: str) -> str:
        if found := re.search(r"group (\d+)", question):
            asked.add(int(found[1]))
            return key.groups[int(found[1]) - 1]
        return "\n"

    key = paperkey.make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paperkey, "_ask", answer_all)
        paperkey.ask_back(session, key)
        assert len(asked) == 2
        for _ in range(60):
            paperkey.ask_back(session, key)
    assert len(asked) > 8  # 122 groups of 13, so fewer would not be chance


def test_three_wrong_groups_refuse_and_nothing_is_changed(
    fresh: FakeNode, known_key: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_groups(monkeypatch, 1, 13)
    ran = begin_typing(fresh, known_key[0], "0000", "nonsense", known_key[0], known_key[12])
    assert ran.code == 1
    assert "key-not-written" in ran.err and "nothing was changed" in ran.err
    assert "2 more" in ran.err and "1 more" in ran.err
    assert posts(fresh) == []
    assert begin_typing(fresh, "0000", known_key[0], "0000", known_key[12]).code == 0
    assert len(posts(fresh)) == 1


def test_a_terminal_that_ends_begins_nothing(fresh: FakeNode) -> None:
    assert begin_typing(fresh).code == 2
    assert posts(fresh) == []


def test_a_script_gets_the_key_and_is_not_asked(fresh: FakeNode) -> None:
    for stop in ([], ["--json"]):
        ran = ctl(fresh, "init", "--name", "home", *stop)
        assert ran.code == 2 and "--yes-i-wrote-it-down" in (ran.err + ran.out)
    assert posts(fresh) == []
    ran = ctl(fresh, "init", "--name", "home", "--node-name", "pc", "--yes-i-wrote-it-down", "--json")
    assert ran.code == 0
    seed = parse_recovery(ran.json["recovery_key"])
    assert ran.json["id"] == PC
    assert posts(fresh)[0].json == {
        "name": "home",
        "node_name": "pc",
        "recovery": keys.public_key(seed).hex(),
    }
    plain = ctl(fresh, "init", "--name", "home", "--yes-i-wrote-it-down")
    assert len(re.findall(r"\d+: [0-9A-Z]{4}", plain.out)) == 13


def test_every_key_is_another(fresh: FakeNode) -> None:
    for _ in range(3):
        assert ctl(fresh, "init", "--name", "home", "--yes-i-wrote-it-down").code == 0
    assert len({asked.json["recovery"] for asked in posts(fresh)}) == 3


def test_a_node_that_is_in_a_swarm_shows_no_key(node: FakeNode) -> None:
    node.on("GET", "/api/swarm", answer(swarm()))
    ran = ctl(node, "init", "--name", "new", "--yes-i-wrote-it-down")
    assert (ran.code, ran.out) == (1, "")
    assert "already-in-swarm" in ran.err
    assert posts(node) == []


@pytest.mark.parametrize("name", ["my house", "", "-x", "x" * 65, "ho/me"])
def test_a_name_is_looked_at_before_a_key_is_made(fresh: FakeNode, name: str) -> None:
    for names in (["--name", name], ["--name", "home", "--node-name", name]):
        ran = ctl(fresh, "init", *names, "--yes-i-wrote-it-down")
        assert (ran.code, ran.out) == (2, "")
        assert "bad-name" in ran.err and "throw it away" not in ran.err
    assert fresh.asked == []
    assert ctl(fresh, "init", "--name", "x" * 64, "--yes-i-wrote-it-down").code == 0


def test_who_may_not_command_the_node_is_shown_no_key(fresh: FakeNode) -> None:
    fresh.on("GET", "/api/swarm", answer({**ALONE, "may_admin": False}))
    ran = ctl(fresh, "init", "--name", "home", "--yes-i-wrote-it-down")
    assert (ran.code, ran.out) == (3, "")
    assert posts(fresh) == []


def test_a_key_without_a_swarm_is_said_to_be_useless(fresh: FakeNode) -> None:
    fresh.on("POST", "/api/swarm/init", refuse(400, "bad-request", "cannot begin a swarm with this name"))
    ran = ctl(fresh, "init", "--name", "home", "--yes-i-wrote-it-down")
    assert ran.code == 1 and "throw it away" in ran.err


def test_without_the_qr_library_nothing_is_made(fresh: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qrcode", None)
    ran = ctl(fresh, "init", "--name", "home", "--qr", "--yes-i-wrote-it-down")
    assert (ran.code, ran.out) == (1, "")
    assert "python3-qrcode" in ran.err
    assert fresh.asked == []


def test_the_qr_code_holds_the_key(fresh: FakeNode) -> None:
    qrcode = pytest.importorskip("qrcode")
    held: list[str] = []
    real: Callable[..., None] = qrcode.QRCode.add_data

    def add_data(self: object, data: str, *rest: object) -> None:
        held.append(data)
        real(self, data, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qrcode.QRCode, "add_data", add_data)
        ran = ctl(fresh, "init", "--name", "home", "--qr", "--yes-i-wrote-it-down")
    assert ran.code == 0, ran.err
    assert ran.out.count("█") > 100
    assert keys.public_key(parse_recovery(held[0])).hex() == posts(fresh)[0].json["recovery"]


# --- recover ---------------------------------------------------------------------------------


def draft(**fields: object) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "swarm": "5" * 64,
        "epoch": 1,
        "n": 1,
        "signers": [{"key": "a" * 64, "node": PC}],
        "keep": ["b" * 64],
        **fields,
    }
    body = make_body(Kind.EPOCH, **facts)
    return {"body": base64.b64encode(body).decode(), "keeps": [PC], "drops": [PI]}


@pytest.fixture
def lost(node: FakeNode) -> FakeNode:
    node.on("GET", "/api/swarm", answer(swarm()))
    node.on("POST", "/api/swarm/recovery/draft", answer(draft()))
    return node.on("POST", "/api/swarm/recovery", answer({"epoch": 1}))


PAPER = paperkey.PaperKey(SEED).text


def test_recovery_is_shown_agreed_to_and_signed_here(lost: FakeNode) -> None:
    ran = ctl(
        lost,
        "recover",
        "--without",
        "kitchen-pi",
        "--restore",
        GONE,
        "--restore",
        "x",
        stdin=f"y\n{PAPER[:30].lower()}\n{PAPER[30:]}\n",
        terminal=True,
    )
    assert ran.code == 0, ran.err
    drafted, sent = posts(lost)
    assert drafted.json == {"without": ["kitchen-pi"], "restore": [GONE, "x"]}
    assert "keeps\x1b[0m  study-pc (aaaaaaaa)" in ran.out
    assert "drops\x1b[0m  kitchen\\x1b-pi (eeeeeeee)" in ran.out
    statement = sent.json["statement"]
    body = base64.b64decode(statement["body"])
    assert statement["body"] == draft()["body"]
    ((public, signature),) = statement["sigs"]
    assert bytes.fromhex(public) == keys.public_key(SEED)
    assert keys.verify(bytes.fromhex(public), bytes.fromhex(signature), SIGNING_CONTEXT + body)
    assert SEED.hex() not in everything_sent(lost) and PAPER not in everything_sent(lost)
    assert f"signs, alone: study-pc, {PC}; statements kept: 1; recovery number 1 of this swarm" in ran.out


def test_recovery_is_not_signed_without_a_yes_or_with_a_wrong_key(lost: FakeNode) -> None:
    assert ctl(lost, "recover", stdin=f"n\n{PAPER}\n", terminal=True).code == 1
    assert ctl(lost, "recover", stdin=f"{PAPER}\n").code == 2
    wrong = ("Z" if PAPER[0] != "Z" else "Y") + PAPER[1:]
    ran = ctl(lost, "recover", "--yes", stdin=wrong)
    assert ran.code == 2 and "bad-recovery-key" in ran.err
    assert ctl(lost, "recover", "--yes", stdin="").code == 2
    assert [asked.path for asked in posts(lost)] == ["/api/swarm/recovery/draft"] * 4


def test_a_mistyped_key_may_be_typed_again_twice(lost: FakeNode) -> None:
    wrong = ("Z" if PAPER[0] != "Z" else "Y") + PAPER[1:]
    ran = ctl(lost, "recover", stdin=f"y\n{wrong}\n{wrong}\n{PAPER}\n", terminal=True)
    assert ran.code == 0, ran.err
    assert "2 more" in ran.err and "1 more" in ran.err
    ran = ctl(lost, "recover", stdin=f"y\n{wrong}\n{wrong}\n{wrong}\n{PAPER}\n", terminal=True)
    assert ran.code == 2 and "bad-recovery-key" in ran.err


def test_the_key_of_another_swarm_signs_nothing(lost: FakeNode) -> None:
    other = paperkey.PaperKey(bytes(32)).text
    ran = ctl(lost, "recover", "--yes", stdin=other)
    assert ran.code == 1
    assert "not the recovery key of swarm 'home'" in ran.err and "nothing was changed" in ran.err
    assert [asked.path for asked in posts(lost)] == ["/api/swarm/recovery/draft"]


def test_a_node_that_was_put_out_is_named_as_itself(lost: FakeNode) -> None:
    lost.on("GET", "/api/swarm", answer(swarm(THERE, self={"id": PC, "name": None, "signer": False})))
    ran = ctl(lost, "recover", "--restore", PC, stdin=f"y\n{PAPER}\n", terminal=True)
    assert ran.code == 0, ran.err
    assert "keeps\x1b[0m  this node (aaaaaaaa)" in ran.out and f"signs, alone: this node, {PC}" in ran.out


def test_a_script_gives_the_key_on_its_input(lost: FakeNode) -> None:
    ran = ctl(lost, "recover", "--yes", "--json", stdin=PAPER)
    assert ran.code == 0, ran.out
    assert ran.json == {"epoch": 1, "keeps": [PC], "drops": [PI], "statements": 1}


def encoded(facts: object) -> str:
    return base64.b64encode(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).decode()


LIES: dict[str, str] = {
    "nothing": "",
    "no base64": "!",
    "no object": encoded([]),
    "no epoch": encoded({"kind": "epoch"}),
    "another swarm": draft(swarm="6" * 64)["body"],
    "a revocation": base64.b64encode(
        make_body(Kind.REVOKE, swarm="5" * 64, epoch=0, node="a" * 26, reason="", by="c" * 64)
    ).decode(),
    "an epoch after which there is none": draft(epoch=1_000_000, n=1_000_000)["body"],
    "an epoch too far": draft(epoch=2, n=2)["body"],
    "another's key": draft(signers=[{"key": "a" * 64, "node": PI}])["body"],
    "a second key": draft(
        signers=[{"key": "a" * 64, "node": PC}, {"key": "b" * 64, "node": PC}],
    )["body"],
    "nobody's key": encoded({**json.loads(base64.b64decode(draft()["body"])), "signers": []}),
    "a field more": encoded({**json.loads(base64.b64decode(draft()["body"])), "also": 1}),
    "two numbers": encoded({**json.loads(base64.b64decode(draft()["body"])), "n": 2}),
    "no canonical form": base64.b64encode(base64.b64decode(draft()["body"]) + b" ").decode(),
    "kept what is no hash": encoded({**json.loads(base64.b64decode(draft()["body"])), "keep": ["x"]}),
}


@pytest.mark.parametrize("lie", LIES)
def test_the_paper_key_signs_only_the_next_epoch_of_this_swarm_for_this_node(
    lost: FakeNode, lie: str
) -> None:
    lost.on("POST", "/api/swarm/recovery/draft", answer({"body": LIES[lie], "keeps": [], "drops": []}))
    ran = ctl(lost, "recover", "--yes", "--json", stdin=PAPER)
    assert (ran.code, ran.json["error"]["code"]) == (1, "bad-answer")
    assert "POST /api/swarm/recovery" not in lost.paths()


def test_recovery_can_keep_only_who_is_named(lost: FakeNode) -> None:
    rows = [row(f"{i:x}".rjust(26, "x"), f"junk-{i}") for i in range(300)]
    lost.on("GET", "/api/swarm", answer(swarm(HERE, THERE, PERSON, *rows)))
    assert ctl(lost, "recover", "--only", PI[:6], "--restore", GONE, "--yes", stdin=PAPER).code == 0
    assert posts(lost)[0].json == {"without": [LAPTOP, *(str(one["id"]) for one in rows)], "restore": [GONE]}


def test_who_is_kept_is_a_member_and_nobody_is_also_dropped(lost: FakeNode) -> None:
    ran = ctl(lost, "recover", "--only", "stranger", "--yes", stdin=PAPER)
    assert ran.code == 1 and "unknown-node" in ran.err
    ran = ctl(lost, "recover", "--only", PI, "--without", LAPTOP, "--yes", stdin=PAPER)
    assert ran.code == 2 and "--only" in ran.err
    assert posts(lost) == []


def test_no_trace_of_the_key_is_left_on_disk(lost: FakeNode, tmp_path: Any) -> None:
    home = {
        "HOME": str(tmp_path),
        "XDG_DATA_HOME": str(tmp_path / "d"),
        "XDG_STATE_HOME": str(tmp_path / "s"),
    }
    assert ctl(lost, "recover", "--yes", stdin=PAPER, env=home).code == 0
    assert list(tmp_path.rglob("*")) == []


def test_the_node_that_answers_nonsense_is_no_traceback(lost: FakeNode) -> None:
    lost.on("POST", "/api/swarm/recovery/draft", Reply(body=b"[]"))
    assert ctl(lost, "recover", "--yes", "--json", stdin=PAPER).json["error"]["code"] == "bad-answer"
