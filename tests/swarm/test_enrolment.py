"""Attacks on enrolment. Each first succeeds against a pair with one defence removed, then fails. M3."""

import contextlib
import itertools
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from tests.nodes import Answer
from tests.swarm.attackers.enrol import CONFIRM, HELLO, Newcomer
from tests.swarm.attackers.kit import Key, id_of
from tests.swarm.attackers.middle import APPLICATION_DATA, Notebook, impostor, tamperer
from tests.swarm.attackers.talk import Talk
from tests.swarm.conftest import open_lab
from tests.swarm.lab import PORT, ROOT, Host, Lab, LabNode, wait_until, weakened

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300), pytest.mark.xdist_group("swarm-enrolment")]


@dataclass
class Scene:
    """Somebody who invites, somebody who wants in, and somebody who should stay out."""

    lab: Lab
    inviter: LabNode
    joiner: LabNode
    mallory: Host

    @property
    def there(self) -> str:
        return f"{self.inviter.host.ip}:{PORT}"

    @property
    def between(self) -> str:
        return f"{self.mallory.ip}:{PORT}"

    def names(self) -> set[str]:
        return {row["name"] for row in self.inviter.swarm()["nodes"]}

    def invite_row(self, code: str) -> dict:  # type: ignore[type-arg]
        return next(row for row in self.inviter.swarm()["invites"] if row["invite"] == code[:4])

    def try_to_join(self, code: str, address: str) -> Answer:
        return self.joiner.call("POST", "/api/swarm/enroll", {"code": code, "addresses": [address]})

    def try_and_leave(self, code: str, address: str) -> Answer:
        """Join; if that worked, be outside again."""
        answer = self.try_to_join(code, address)
        if answer.status < 300:
            self.joiner.ok("POST", "/api/swarm/leave", {})
        return answer


@contextlib.contextmanager
def scene(*defences: str) -> Iterator[Scene]:
    """Set the scene, with daemons that lack these defences."""
    with open_lab() as lab:
        wrap = weakened(*defences) if defences else ()
        nodes = [lab.node(name, start=False, wrap=wrap) for name in ("inviter", "joiner")]
        for node in nodes:
            node.start(wait=False)
        for node in nodes:
            node.wait_ready()
        lab.found(nodes[0])
        yield Scene(lab, nodes[0], nodes[1], lab.host("mallory"))


@pytest.fixture(scope="module")
def whole() -> Iterator[Scene]:
    with scene() as made:
        yield made


@pytest.fixture
def real(whole: Scene) -> Iterator[Scene]:
    """The real daemons, with no invitation open and the joiner outside."""
    yield whole
    for row in whole.inviter.swarm()["invites"]:
        if row["state"] == "open":
            whole.inviter.ok("DELETE", f"/api/swarm/invites/{row['invite']}")
    if whole.joiner.swarm()["swarm"] is not None:
        whole.joiner.ok("POST", "/api/swarm/leave", {})


# --- in the middle -----------------------------------------------------------------------------------


def mitm(stage: Scene) -> tuple[Answer, Notebook]:
    code = stage.inviter.invite()
    with impostor(stage.mallory, (stage.inviter.host.ip, PORT)) as book:
        return stage.try_and_leave(code, stage.between), book


def test_a_man_in_the_middle_reads_everything_where_proofs_leave_out_certificates() -> None:
    with scene("transcript-without-certificates") as stage:
        answer, book = mitm(stage)
        assert answer.status == 201, answer.body
        assert b'"sig"' in book.up and b'"bundle"' in book.down


def test_a_man_in_the_middle_gets_no_proof_and_costs_no_code(real: Scene) -> None:
    answer, book = mitm(real)
    assert answer.status == 401 and answer.json["error"]["code"] == "inviter-unproved", answer.body
    assert book.connections >= 1 and HELLO.encode() in book.up
    assert CONFIRM.encode() not in book.up and b'"bundle"' not in book.down
    assert real.joiner.swarm()["swarm"] is None
    code = real.inviter.swarm()["invites"][-1]
    assert (code["state"], code["failures"]) == ("open", 0)


def test_the_code_that_met_the_man_in_the_middle_still_works(real: Scene) -> None:
    code = real.inviter.invite()
    with impostor(real.mallory, (real.inviter.host.ip, PORT)):
        assert real.try_to_join(code, real.between).status == 401
    assert real.try_and_leave(code, real.there).status == 201


# --- replay ------------------------------------------------------------------------------------------


def use_a_code_twice(stage: Scene) -> int:
    """Let a second machine use a code that somebody used, while the door is open for another."""
    stage.inviter.invite()
    code = stage.inviter.invite()
    first = Newcomer.with_code(code, name="first")
    assert first.run(stage.mallory, stage.inviter.host.ip).status == 200
    second = Newcomer.with_code(code, name="second")
    return second.run(stage.mallory, stage.inviter.host.ip).status


def test_a_code_lets_two_in_where_it_is_not_used_up() -> None:
    with scene("reusable-codes") as stage:
        assert use_a_code_twice(stage) == 200
        assert {"first", "second"} <= stage.names()


def test_a_code_lets_one_in(real: Scene) -> None:
    assert use_a_code_twice(real) == 409
    assert "first" in real.names() and "second" not in real.names()


def test_a_recorded_enrolment_admits_nobody_again(real: Scene) -> None:
    real.inviter.invite()  # somebody else's: the door stays open
    code = real.inviter.invite()
    recorded = Newcomer.with_code(code, name="recorded")
    assert recorded.run(real.mallory, real.inviter.host.ip).status == 200
    digest = real.inviter.digest
    with Talk.to(real.mallory, real.inviter.host.ip) as talk:
        assert talk.call("POST", HELLO, recorded.hello()).status == 409
        again = talk.call("POST", CONFIRM, recorded.confirm())
        # The same key with the same proof: it may ask again for an answer that was lost, and gets no more.
        assert again.status == 200 and len(recorded.statements(again)) > 1
    real.inviter.ok("POST", "/api/swarm/revoke", {"node": id_of(recorded.certificate_der), "reason": "test"})
    with Talk.to(real.mallory, real.inviter.host.ip) as talk:
        assert talk.call("POST", CONFIRM, recorded.confirm()).status == 409
    assert real.inviter.digest != digest and "recorded" not in real.names()


def test_a_recorded_proof_is_worth_nothing_with_another_key_or_another_code(real: Scene) -> None:
    code, other = real.inviter.invite(), real.inviter.invite()
    recorded = Newcomer.with_code(code, name="recorded2")
    with Talk.to(real.mallory, real.inviter.host.ip) as talk:
        assert recorded.greet(talk).status == 200
        proof = recorded.confirm()
        thief = Newcomer.guessing(code[:4], name="thief")
        thief.greet(talk)
        for session in (thief.challenge["session"],):
            assert talk.call("POST", CONFIRM, {**proof, "session": session}).status == 401
        elsewhere = Newcomer.guessing(other[:4], name="thief", key=recorded.key, nonce=recorded.nonce)
        elsewhere.greet(talk)
        answer = talk.call("POST", CONFIRM, {**proof, "session": elsewhere.challenge["session"]})
        assert answer.status == 401
        assert talk.call("POST", CONFIRM, proof).status == 200
    assert "recorded2" in real.names() and "thief" not in real.names()


def replay_the_inviter(stage: Scene) -> Answer:
    """Record how the inviter answered, then answer the same joiner in its place."""
    code = stage.inviter.invite()
    with impostor(stage.mallory, (stage.inviter.host.ip, PORT)) as book:
        stage.try_and_leave(code, stage.between)
    assert book.down, book
    answers = split_answers(book.down)
    with impostor(stage.mallory, ("", 0), reply=lambda data: answers[1 if CONFIRM.encode() in data else 0]):
        return stage.try_and_leave(code, stage.between)


def split_answers(data: bytes) -> list[bytes]:
    """Cut recorded answers apart; the same one again where there was no second."""
    found = [match.start() for match in re.finditer(rb"HTTP/1.1 ", data)] + [len(data)]
    pieces = [data[start:end] for start, end in itertools.pairwise(found)]
    return [*pieces, *pieces[-1:]]


def test_a_recorded_inviter_deceives_who_always_says_the_same() -> None:
    with scene("transcript-without-certificates", "fixed-nonces", "identity-stays") as stage:
        answer = replay_the_inviter(stage)
        assert answer.status == 201, answer.body


def test_a_recorded_inviter_deceives_nobody(real: Scene) -> None:
    answer = replay_the_inviter(real)
    assert answer.status == 401 and answer.json["error"]["code"] == "inviter-unproved", answer.body


# --- reflection --------------------------------------------------------------------------------------


def reflect(stage: Scene) -> int:
    """Know nothing, and send the inviter's own proof back to it."""
    mallory = Newcomer.guessing(stage.inviter.invite()[:4], name="mirror")
    with Talk.to(stage.mallory, stage.inviter.host.ip) as talk:
        assert mallory.greet(talk).status == 200
        proof = {**mallory.confirm(), "mac": mallory.challenge["mac"]}
        return talk.call("POST", CONFIRM, proof).status


def test_a_mirror_is_let_in_where_both_sides_prove_with_one_key() -> None:
    with scene("one-key-for-both") as stage:
        assert reflect(stage) == 200
        assert "mirror" in stage.names()


def test_a_mirror_is_not_let_in(real: Scene) -> None:
    assert reflect(real) == 401
    assert "mirror" not in real.names()


# --- frames ------------------------------------------------------------------------------------------

DAMAGE = {
    "truncated": lambda record: [record[:-7]],
    "duplicated": lambda record: [record, record],
    "flipped": lambda record: [record[:9] + bytes([record[9] ^ 1]) + record[10:]],
}


@pytest.mark.parametrize("damage", [*DAMAGE, "reordered"])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_damaged_frames_enrol_nobody_halfway(real: Scene, direction: str, damage: str) -> None:
    code = real.inviter.invite()
    kept: list[bytes] = []
    hit: list[int] = []

    def alter(where: str, index: int, record: bytes) -> Sequence[bytes]:
        # The first two protected records of each side belong to the handshake or the greeting.
        if where != direction or record[0] != APPLICATION_DATA or index < 3:
            return [record]
        if damage == "reordered":
            kept.append(record)
            return [] if len(kept) == 1 else [record, kept[0]]
        hit.append(index)
        return DAMAGE[damage](record) if len(hit) == 1 else [record]

    with tamperer(real.mallory, (real.inviter.host.ip, PORT), alter) as relay:
        result: list[Answer] = []
        thread = threading.Thread(target=lambda: result.append(real.try_to_join(code, real.between)))
        thread.start()
        wait_until(lambda: hit or kept or not thread.is_alive())
        thread.join(4)
        seen = relay.count(direction)
    thread.join()  # the relay is gone, and with it the connection
    assert seen >= 3 and (hit or kept)
    answer = result[0]
    if damage == "duplicated" and answer.status == 201:
        # The copy came after everything was said.
        real.joiner.ok("POST", "/api/swarm/leave", {})
        return
    assert answer.status in {401, 502, 503}, answer.body
    assert real.joiner.swarm()["swarm"] is None
    # Whatever was lost on the way, a new code gets this machine in.
    wait_until(lambda: real.try_and_leave(real.inviter.invite(), real.there).status == 201, every_s=1)


def test_undamaged_frames_pass_through_the_same_relay(real: Scene) -> None:
    with tamperer(real.mallory, (real.inviter.host.ip, PORT)) as relay:
        assert real.try_and_leave(real.inviter.invite(), real.between).status == 201
    assert relay.count("up") >= 3 and relay.count("down") >= 3


# --- guessing ----------------------------------------------------------------------------------------


def guess(stage: Scene, code: str, times: int) -> list[int]:
    """Guess, each time as somebody else; returns the answers to the proofs."""
    statuses = []
    for _ in range(times):
        guesser = Newcomer.guessing(code[:4], name="guesser")
        statuses.append(guess_once(stage, guesser))
    return statuses


def guess_once(stage: Scene, guesser: Newcomer) -> int:
    with Talk.to(stage.mallory, stage.inviter.host.ip) as talk:
        reply = guesser.greet(talk)
        return talk.call("POST", CONFIRM, guesser.confirm()).status if reply.status == 200 else reply.status


def test_a_code_can_be_guessed_at_for_ever_where_failures_are_not_counted() -> None:
    with scene("endless-guesses") as stage:
        code = stage.inviter.invite()
        assert guess(stage, code, 12) == [401] * 12
        assert stage.invite_row(code)["state"] == "open"


def test_five_wrong_proofs_burn_a_code_and_no_other(real: Scene) -> None:
    code, other = real.inviter.invite(), real.inviter.invite()
    assert guess(real, code, 6) == [401] * 5 + [409]
    assert real.invite_row(code)["state"] == "burnt"
    answer = real.try_to_join(code, real.there)
    assert answer.status == 409 and answer.json["error"]["code"] == "invite-burnt", answer.body
    assert real.invite_row(other)["state"] == "open"
    assert real.try_and_leave(other, real.there).status == 201


def greet_often(stage: Scene, code: str, times: int, *, there: str = "") -> Counter[int]:
    """Greet and say no more; returns how many answers there were of each kind."""
    answers: Counter[int] = Counter()
    talk: Talk | None = None
    greeting = Newcomer.guessing(code[:4], key=IDLE).hello()
    for _ in range(times):
        try:
            talk = talk or Talk.to(stage.mallory, there or stage.inviter.host.ip)
            status = talk.call("POST", HELLO, greeting).status
        except OSError:
            status = 0
        answers[status] += 1
        if talk is not None and status != 200:
            talk.close()
            talk = None
    if talk is not None:
        talk.close()
    return answers


IDLE = Key()


def test_greetings_burn_a_code_where_they_count() -> None:
    with scene("hellos-count") as stage:
        code = stage.inviter.invite()
        greet_often(stage, code, 6)
        assert stage.invite_row(code)["state"] == "burnt"
        assert stage.try_to_join(code, stage.there).status in {404, 409}


def test_a_thousand_answered_greetings_cost_nobody_a_place() -> None:
    with scene("strangers-unlimited") as stage:
        code = stage.inviter.invite()
        answers: Counter[int] = Counter()
        while answers[200] < 1000:  # who pauses for 5 s, as a busy machine may, loses the connection
            answers += greet_often(stage, code, 1000 - answers[200])
        assert set(answers) <= {0, 200}
        row = stage.invite_row(code)
        assert (row["state"], row["failures"]) == ("open", 0)
        assert stage.try_to_join(code, stage.there).status == 201


def test_a_stranger_is_not_answered_more_often_than_any_newcomer_needs(real: Scene) -> None:
    code = real.inviter.invite()
    begun_s, answers = time.monotonic(), greet_often(real, code, 60)
    while answers[429] < 80:
        answers += greet_often(real, code, 20)
    # Sixty at once, and then five a second.
    assert 50 <= answers[200] <= 65 + 5 * (time.monotonic() - begun_s), answers
    assert real.invite_row(code)["failures"] == 0


@pytest.mark.parametrize("family", ["ipv4", "link-local"])
def test_an_honest_machine_gets_in_while_another_greets_without_end(real: Scene, family: str) -> None:
    code, stop = real.inviter.invite(), threading.Event()
    there = real.inviter.host.ip if family == "ipv4" else f"{real.inviter.host.link_local}%eth0"

    def bother() -> None:
        while not stop.is_set():
            greet_often(real, code, 20, there=there)

    thread = threading.Thread(target=bother)
    thread.start()
    try:
        # The second try stands for the person's: the node takes turns with both.
        wait_until(lambda: real.try_and_leave(code, f"[{there}]:{PORT}").status == 201)
    finally:
        stop.set()
        thread.join()


def test_strangers_find_no_door_while_nobody_is_invited() -> None:
    with scene() as stage:
        assert greet_often(stage, "AAAA", 1) == {404: 1}
        code = stage.inviter.invite()
        assert greet_often(stage, code, 1) == {200: 1}


def test_the_code_is_nowhere_on_disk_or_in_a_log(real: Scene) -> None:
    code = real.inviter.invite(name="secretive")
    assert real.try_and_leave(code, real.there).status == 201
    secret = code.replace("-", "")[4:20].encode()
    for node in (real.inviter, real.joiner):
        for path in node.state.rglob("*"):
            data = path.read_bytes() if path.is_file() else b""
            assert secret not in data and code.encode() not in data, path
    assert "secretive" in json.dumps(real.inviter.swarm())


def test_the_command_line_enrols_as_the_socket_does(real: Scene) -> None:
    code = real.inviter.invite(name="typed")
    ctl = (sys.executable, "-m", "mycoswarmd.ctl.main", "--socket", str(real.joiner.socket))
    said = real.joiner.host.run(*ctl, "enroll", code, "--address", real.inviter.host.ip)
    assert "typed" in said and str(ROOT) not in said
    real.joiner.ok("POST", "/api/swarm/leave", {})
