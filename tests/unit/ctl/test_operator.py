"""An operator: joins without a daemon, speaks to nodes over the network, believes only the roster."""

import contextlib
import json
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mycoswarmd.core.roster import StatementSet
from mycoswarmd.core.words import six_words
from mycoswarmd.ctl import finding, operators
from tests.unit.ctl.fakenode import Asked, FakeNode, Ran, Reply, answer, ctl, events, refuse
from tests.unit.ctl.swarmnode import Home, Invitation, Relay, SwarmNode, identity

MODELS = answer({"models": [{"name": "small", "zone": "self"}]})


class Laptop:
    """A person's computer: no daemon, a home directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.data = directory / "data"
        self.directory = self.data / "mycoswarm" / "operator"
        self.env = {
            "XDG_DATA_HOME": str(self.data),
            "XDG_RUNTIME_DIR": str(directory / "run"),
            "XDG_STATE_HOME": str(directory / "state"),
            "HOME": str(directory),
        }

    def ctl(self, *arguments: str, stdin: str = "", terminal: bool = False) -> Ran:
        return ctl(None, *arguments, env=self.env, stdin=stdin, terminal=terminal)

    def own(self) -> operators.Operator:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_DATA_HOME", str(self.data))
            return operators.load()


@pytest.fixture(autouse=True)
def quiet_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is announced, unless a test says so; root's socket is looked for where no daemon is."""
    monkeypatch.setattr(finding, "announced", lambda listen_s=3: iter(()))
    monkeypatch.setattr("mycoswarmd.ctl.joining._AGAIN_S", 0.001)
    for limit in ("joining._STEP_S", "tlshttp._CONNECT_S", "tlshttp._SHORT_S"):
        monkeypatch.setattr(f"mycoswarmd.ctl.{limit}", 60.0)
    monkeypatch.setattr("mycoswarmd.ctl.place._runtime_dir", lambda: Path("/nonexistent"))
    for name in ("MYCOSWARM_NODE", "MYCOSWARM_SOCKET"):
        monkeypatch.delenv(name, raising=False)


def announce(monkeypatch: pytest.MonkeyPatch, *rows: tuple[str, int]) -> None:
    def announced(listen_s: int = 3) -> Iterator[tuple[str, finding.Address]]:
        del listen_s
        yield from ((node_id, ("127.0.0.1", port)) for node_id, port in rows)

    monkeypatch.setattr(finding, "announced", announced)


@pytest.fixture
def home() -> Home:
    return Home.begin()


@pytest.fixture
def pc(home: Home) -> Iterator[SwarmNode]:
    with SwarmNode(home, home.founder).listening() as node:
        node.on("GET", "/api/models", MODELS)
        yield node


@pytest.fixture
def laptop(tmp_path: Path) -> Laptop:
    return Laptop(tmp_path)


@pytest.fixture
def anna(laptop: Laptop, pc: SwarmNode, home: Home) -> Laptop:
    """A laptop whose person is an operator already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(laptop.data))
        own = operators.prepare()
        home.take(home.admit(own, "anna", "operator"))
        enrolled = operators.begin(own, home.statements(), genesis_sha256=home.roster.swarm_id)
        enrolled.found(pc.own.node_id, ("127.0.0.1", pc.port))
    return laptop


@contextlib.contextmanager
def second(home: Home, name: str, *, knows: Home | None = None) -> Iterator[SwarmNode]:
    """Admit a second node and run it, with the swarm's own roster or the one that it `knows`."""
    own = identity()
    wire = home.admit(own, name)
    home.take(wire)
    if knows is not None:
        knows.take(wire)
    with SwarmNode(knows or home, own).listening() as node:
        node.on("GET", "/api/models", MODELS)
        yield node


# --- joining ---------------------------------------------------------------------------------


def test_a_person_joins_without_a_daemon(laptop: Laptop, pc: SwarmNode) -> None:
    ran = laptop.ctl(
        "enroll", "--operator", pc.invite().lower(), "--address", pc.address, "--name", "anna", "--json"
    )
    assert ran.code == 0, ran.out
    own = laptop.own()
    assert ran.json["swarm"] == "home" and ran.json["name"] == "anna"
    assert ran.json["id"] == own.identity.node_id
    assert [(one["name"], one["role"]) for one in ran.json["nodes"]] == [
        (one.name, one.role.value) for one in pc.home.roster.members.values()
    ]
    assert own.roster.digest == pc.home.roster.digest
    assert own.addresses(pc.own.node_id) == [("127.0.0.1", pc.port)]
    assert pc.callers == [None, None]
    for path in [laptop.directory, *laptop.directory.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_the_code_itself_is_never_sent(laptop: Laptop, pc: SwarmNode) -> None:
    code = pc.invite()
    assert laptop.ctl("enroll", "--operator", code, "--address", pc.address).code == 0
    sent = b"".join(asked.body for asked in pc.asked).decode()
    assert code.replace("-", "")[4:20] not in sent and code[6:11] not in sent
    assert code[:4] in sent


def test_a_name_is_made_of_account_and_host(laptop: Laptop, pc: SwarmNode) -> None:
    ran = laptop.ctl("enroll", "--operator", pc.invite(), "--address", pc.address, "--json")
    assert ran.code == 0
    assert ran.json["name"][0].isalnum()


def test_somebody_between_learns_nothing_and_joins_nothing(laptop: Laptop, pc: SwarmNode) -> None:
    code = pc.invite()
    with Relay(pc.port, identity()).listening() as relay:
        ran = laptop.ctl("enroll", "--operator", code, "--address", f"127.0.0.1:{relay.port}", "--json")
    assert (ran.code, ran.json["error"]["code"]) == (3, "inviter-unproved")
    assert b"/swarm/enroll/hello" in relay.heard and b'"genesis"' in relay.heard
    assert b"/swarm/enroll/confirm" not in relay.heard  # our own proof was not given
    assert not (laptop.directory / "roster.json").exists()
    assert len(pc.home.roster.members) == 1
    assert laptop.ctl("enroll", "--operator", code, "--address", pc.address).code == 0


def test_the_relay_would_succeed_if_the_certificate_were_not_in_the_proof(
    laptop: Laptop, pc: SwarmNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above: with the check of the certificate taken out, the attack works."""
    code = pc.invite()
    monkeypatch.setattr(
        "mycoswarmd.ctl.tlshttp.Stranger.cert_der", property(lambda _: pc.own.cert_der), raising=True
    )
    with Relay(pc.port, identity()).listening() as relay:
        assert laptop.ctl("enroll", "--operator", code, "--address", f"127.0.0.1:{relay.port}").code == 0
    assert b"/swarm/enroll/confirm" in relay.heard


def test_whoever_does_not_know_the_code_cannot_pose_as_the_inviter(laptop: Laptop, pc: SwarmNode) -> None:
    code = pc.invite()
    thief = Home.begin("home")
    with SwarmNode(thief, thief.founder).listening() as impostor:
        known = pc.invitations[code[:4]]
        impostor.invite()
        (guessed,) = impostor.invitations.values()
        impostor.invitations = {code[:4]: Invitation(code, guessed.keys, "operator")}
        ran = laptop.ctl("enroll", "--operator", code, "--address", impostor.address, "--json")
        assert ran.json["error"]["code"] == "inviter-unproved"
        impostor.invitations = {code[:4]: Invitation(code, known.keys, "operator")}  # the control: it knows
        assert laptop.ctl("enroll", "--operator", code, "--address", impostor.address).code == 0


@pytest.mark.parametrize(
    ("refusal", "code", "exit_code"),
    [
        (refuse(409, "invite-used", "cannot join with this code: it was used already"), "invite-used", 1),
        (refuse(409, "invite-expired", "cannot join with this code: it has expired"), "invite-expired", 1),
        (refuse(409, "invite-burnt", "cannot join with this code: it was burnt"), "invite-burnt", 1),
        (refuse(400, "wrong-role", "cannot join as operator"), "wrong-role", 1),
        (refuse(429, "too-many", "cannot answer so often"), "too-many", 1),
    ],
)
def test_a_code_that_does_not_work_is_one_sentence(
    laptop: Laptop, pc: SwarmNode, refusal: Reply, code: str, exit_code: int
) -> None:
    ran = laptop.ctl("enroll", "--operator", pc.invite(refusal=refusal), "--address", pc.address)
    assert ran.code == exit_code and f"({code})" in ran.err
    assert len(ran.err.splitlines()) == 1 and ran.err.startswith("error: cannot ")


def test_a_code_of_nobody_and_an_address_of_nobody(laptop: Laptop, pc: SwarmNode) -> None:
    code = pc.invite()
    pc.invitations.clear()
    ran = laptop.ctl("enroll", "--operator", code, "--address", pc.address, "--json")
    assert ran.json["error"]["code"] == "nobody-invited"
    ran = laptop.ctl("enroll", "--operator", code, "--address", "127.0.0.1:1", "--json")
    assert (ran.code, ran.json["error"]["code"]) == (4, "node-unreachable")
    ran = laptop.ctl("enroll", "--operator", code, "--json")
    assert ran.json["error"]["code"] == "no-swarm-found"
    assert "--address" in ran.json["error"]["hint"]


def test_a_word_on_the_code_beats_an_address_where_nobody_is(laptop: Laptop, pc: SwarmNode) -> None:
    code = pc.invite(refusal=refuse(409, "invite-used", "cannot join: it was used"))
    both = ["--address", pc.address, "--address", "127.0.0.1:1"]
    for order in (both, [*both[2:], *both[:2]]):
        ran = laptop.ctl("enroll", "--operator", code, *order, "--json")
        assert ran.json["error"]["code"] == "invite-used"
    closed = pc.invite(refusal=refuse(404, "no-such-route", "cannot find this path"))
    ran = laptop.ctl("enroll", "--operator", closed, *both, "--json")
    assert ran.json["error"]["code"] == "nobody-invited"
    good = pc.invite()
    assert laptop.ctl("enroll", "--operator", good, "--address", "127.0.0.1:1", *both[:2]).code == 0


def test_the_inviter_is_found_by_its_announcement(
    laptop: Laptop, pc: SwarmNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(monkeypatch, ("z" * 26, 1), (pc.own.node_id, pc.port))
    assert laptop.ctl("enroll", "--operator", pc.invite()).code == 0


@pytest.mark.parametrize("lie", ["as a node", "another swarm"])
def test_a_roster_that_does_not_admit_the_person_is_not_kept(laptop: Laptop, pc: SwarmNode, lie: str) -> None:
    if lie == "another swarm":
        pc.hands_over = Home.begin("home")
    code = pc.invite(role="node" if lie == "as a node" else "operator")
    ran = laptop.ctl("enroll", "--operator", code, "--address", pc.address, "--json")
    assert (ran.code, ran.json["error"]["code"]) == (1, "bad-bundle" if lie == "as a node" else "other-swarm")
    assert not (laptop.directory / "roster.json").exists()


def test_while_a_person_decides_the_words_are_shown_and_the_proof_is_repeated(
    laptop: Laptop, pc: SwarmNode
) -> None:
    ran = laptop.ctl("enroll", "--operator", pc.invite(pending=3), "--address", pc.address)
    assert ran.code == 0, ran.err
    assert six_words(laptop.own().identity.node_id) in ran.err
    assert [asked.path for asked in pc.asked].count("/swarm/enroll/confirm") == 4


def test_who_is_enrolled_is_not_enrolled_twice(anna: Laptop, pc: SwarmNode) -> None:
    before = anna.own().identity.node_id
    ran = anna.ctl("enroll", "--operator", pc.invite(), "--address", pc.address, "--json")
    assert ran.json["error"]["code"] == "already-in-swarm"
    assert "leave --operator" in ran.json["error"]["hint"]
    assert anna.own().identity.node_id == before
    assert pc.asked == []


# --- speaking to nodes ---------------------------------------------------------------------


@pytest.mark.parametrize("how", ["name", "id", "beginning", "address", "environment"])
def test_a_node_is_reached_by_name_id_or_address(anna: Laptop, pc: SwarmNode, how: str) -> None:
    where = {
        "name": "study-pc",
        "id": pc.own.node_id,
        "beginning": pc.own.node_id[:5],
        "address": pc.address,
        "environment": "study-pc",
    }[how]
    if how == "environment":
        anna.env["MYCOSWARM_NODE"] = where
        ran = anna.ctl("models")
    else:
        ran = anna.ctl("--node", where, "models")
    assert ran.code == 0, ran.err
    assert "small" in ran.out
    assert pc.callers[-1] == anna.own().identity.node_id
    assert pc.asked[-1].headers["host"].startswith(f"{pc.own.node_id}.mycoswarm.internal")


def test_streams_and_refusals_come_through(anna: Laptop, pc: SwarmNode) -> None:
    found = {"task": {"id": "t-1", "state": "succeeded"}}
    pc.on("GET", "/api/tasks/t-1", answer(found))
    pc.on("GET", "/api/tasks/t-1/events", events({"seq": 1, "kind": "note"}, {"seq": 2, "kind": "note"}))
    ran = anna.ctl("--node", "study-pc", "logs", "t-1", "--json")
    assert [row["seq"] for row in ran.lines] == [1, 2]
    pc.on("GET", "/api/tasks", refuse(403, "default-deny", rule="default-deny"))
    assert anna.ctl("--node", "study-pc", "tasks").code == 3
    pc.on("GET", "/api/tasks/t-1/events", events({"seq": 1}, cut=True))
    assert anna.ctl("--node", "study-pc", "logs", "t-1").code == 4


def test_without_a_daemon_the_nearest_member_is_asked(
    anna: Laptop, pc: SwarmNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(monkeypatch, ("z" * 26, 1), (pc.own.node_id, pc.port))
    ran = anna.ctl("models")
    assert ran.code == 0, ran.err
    announce(monkeypatch)
    assert anna.ctl("models").code == 0  # where it was reached before
    (anna.directory / "addresses.json").unlink()
    ran = anna.ctl("models", "--json")
    assert (ran.code, ran.json["error"]["code"]) == (4, "node-not-found")


def test_a_daemon_on_this_machine_comes_first(anna: Laptop, pc: SwarmNode, tmp_path: Path) -> None:
    there = tmp_path / "sock"
    there.touch()
    for arguments in (["--socket", str(there)], ["--state", str(tmp_path)]):
        assert anna.ctl(*arguments, "models").code == 4
    anna.env["MYCOSWARM_SOCKET"] = str(there)
    assert anna.ctl("models").code == 4
    assert pc.asked == []
    assert anna.ctl("--node", "study-pc", "models").code == 0


def test_a_socket_with_a_daemon_at_the_usual_place_comes_first(
    anna: Laptop, pc: SwarmNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(prefix="ctl-") as directory:
        monkeypatch.setattr("mycoswarmd.ctl.place._runtime_dir", lambda: Path(directory))
        assert anna.ctl("models").code == 0  # nothing is there, so the nearest node is asked
        path = Path(directory) / "api.sock"
        with FakeNode(path).serving() as daemon:
            daemon.on("GET", "/api/models", answer({"models": []}))
            pc.asked.clear()
            assert anna.ctl("models").code == 0
            assert pc.asked == [] and daemon.paths() == ["GET /api/models"]
            assert anna.ctl("--node", pc.address, "models").code == 0
            assert "GET /api/models" in pc.paths()
        with socket.socket(socket.AF_UNIX) as left_behind:
            left_behind.bind(str(path))
        pc.asked.clear()
        assert path.exists() and anna.ctl("models").code == 0
        assert "GET /api/models" in pc.paths()


def test_an_operator_is_no_node(anna: Laptop, home: Home) -> None:
    bob = identity()
    home.take(home.admit(bob, "bob", "operator"))
    anna.own().merge(home.statements())
    with SwarmNode(home, bob).listening() as posing:
        posing.on("GET", "/api/models", MODELS)
        assert anna.ctl("--node", "bob", "models", "--json").json["error"]["code"] == "unknown-node"
        ran = anna.ctl("--node", posing.address, "models", "--json")
    assert ran.json["error"]["code"] == "peer-unproved"
    assert {asked.path for asked in posing.asked} <= {"/swarm/pull"}


def test_without_an_identity_the_way_to_one_is_said(laptop: Laptop, pc: SwarmNode) -> None:
    ran = laptop.ctl("--node", pc.address, "models", "--json")
    assert (ran.code, ran.json["error"]["code"]) == (1, "no-operator")
    assert "enroll --operator" in ran.json["error"]["hint"]
    assert laptop.ctl("models", "--json").json["error"]["code"] == "daemon-not-running"
    assert pc.asked == []


def test_a_name_that_nobody_has_is_refused_with_those_that_are(anna: Laptop) -> None:
    ran = anna.ctl("--node", "den-pc", "models", "--json")
    assert ran.json["error"]["code"] == "unknown-node"
    assert "study-pc" in ran.json["error"]["hint"]


def test_whoever_sits_at_the_address_of_a_node_hears_nothing(anna: Laptop, pc: SwarmNode, home: Home) -> None:
    thief = SwarmNode(home.copy(), identity())
    thief.believes_anybody = True
    thief.on("GET", "/api/models", MODELS)
    with thief.listening():
        (anna.directory / "addresses.json").write_text(
            json.dumps({pc.own.node_id: [f"127.0.0.1:{thief.port}"]})
        )
        ran = anna.ctl("--node", "study-pc", "models", "--json")
        assert (ran.code, ran.json["error"]["code"]) == (3, "peer-unproved")
        ran = anna.ctl("--node", thief.address, "models", "--json")
        assert (ran.code, ran.json["error"]["code"]) == (3, "peer-unproved")
    # Strangers may ask for the roster, which is no secret and proves itself; nothing else was said.
    assert {asked.path for asked in thief.asked} <= {"/swarm/pull"}
    assert set(thief.callers) <= {None}


def test_the_thief_would_be_believed_if_nobody_looked_at_its_key(
    anna: Laptop, pc: SwarmNode, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above: a context that believes anybody hands the request over."""
    thief = SwarmNode(home.copy(), identity())
    thief.believes_anybody = True
    thief.on("GET", "/api/models", MODELS)

    def careless(self: operators.Operator, member: object) -> object:
        del self, member
        from mycoswarmd.trust.tlsctx import knock_context  # noqa: PLC0415

        return knock_context()

    monkeypatch.setattr(operators.Operator, "context", careless)
    with thief.listening():
        (anna.directory / "addresses.json").write_text(
            json.dumps({pc.own.node_id: [f"127.0.0.1:{thief.port}"]})
        )
        assert anna.ctl("--node", "study-pc", "models").code == 0
    assert "/api/models" in {asked.path for asked in thief.asked}


# --- the roster ------------------------------------------------------------------------------


def test_the_roster_is_brought_up_to_date_by_any_answer(anna: Laptop, pc: SwarmNode, home: Home) -> None:
    assert anna.ctl("--node", "study-pc", "models").code == 0
    assert [asked.path for asked in pc.asked] == ["/api/models"]  # nothing was new
    with second(home, "kitchen-pi") as pi:
        pc.tls.refresh()
        assert anna.ctl("--node", "study-pc", "models").code == 0
        assert anna.own().roster.digest == home.roster.digest
        assert anna.ctl("--node", pi.address, "models").code == 0
        assert anna.own().addresses(pi.own.node_id) == [("127.0.0.1", pi.port)]


def test_a_refusal_brings_news_too(anna: Laptop, pc: SwarmNode, home: Home) -> None:
    pc.on("GET", "/api/models", refuse(403, "default-deny", rule="default-deny"))
    home.take(home.admit(identity(), "den-pc"))
    assert anna.ctl("--node", "study-pc", "models").code == 3
    assert anna.own().roster.digest == home.roster.digest


def test_a_node_that_is_new_is_found_by_its_name(anna: Laptop, pc: SwarmNode, home: Home) -> None:
    with second(home, "kitchen-pi") as pi:
        ran = anna.ctl("--node", "kitchen-pi", "models", "--json")
        assert ran.json["error"]["code"] == "node-not-found"  # known now, but nowhere to be found
        assert anna.own().find("kitchen-pi") is not None
        with pytest.MonkeyPatch.context() as patch:
            announce(patch, (pi.own.node_id, pi.port))
            assert anna.ctl("--node", "kitchen-pi", "models").code == 0


def test_a_node_at_an_address_brings_the_news_of_itself(anna: Laptop, home: Home) -> None:
    with second(home, "kitchen-pi") as pi:
        assert anna.own().find("kitchen-pi") is None
        assert anna.ctl("--node", pi.address, "models").code == 0


def test_a_revoked_node_is_not_spoken_to_again(anna: Laptop, pc: SwarmNode, home: Home) -> None:
    stale = home.copy()
    with second(home, "kitchen-pi", knows=stale) as pi:
        pc.tls.refresh()
        assert anna.ctl("--node", "study-pc", "models").code == 0
        assert anna.ctl("--node", pi.address, "models").code == 0  # the control: it was believed
        home.take(home.revoke(pi.own.node_id, "stolen"))
        assert anna.ctl("--node", "study-pc", "models").code == 0
        pi.asked.clear()
        for where in ("kitchen-pi", pi.own.node_id, pi.address):
            ran = anna.ctl("--node", where, "models", "--json")
            assert ran.code in {1, 3}, ran.out
            assert ran.json["error"]["code"] in {"unknown-node", "peer-unproved"}
        assert {asked.path for asked in pi.asked} <= {"/swarm/pull"}


def test_news_are_carried_to_a_node_that_was_away(anna: Laptop, pc: SwarmNode, home: Home) -> None:
    away = home.copy()
    with second(home, "kitchen-pi", knows=away) as pi:
        home.take(home.revoke(home.founder.node_id), home.admit(identity(), "den-pc"))
        anna.own().merge(home.statements())
        assert away.roster.digest != home.roster.digest
        ran = anna.ctl("--node", pi.address, "models")
        assert ran.code == 0, ran.err
        assert away.roster.digest == home.roster.digest
        assert home.founder.node_id in away.roster.revoked


def test_who_answers_and_turns_out_to_be_put_out_is_named(anna: Laptop, pc: SwarmNode, home: Home) -> None:
    home.take(home.revoke(home.founder.node_id, "stolen"))
    ran = anna.ctl("--node", "study-pc", "models")
    assert ran.code == 0
    assert "study-pc" in ran.err and "put out" in ran.err
    assert anna.ctl("--node", pc.address, "models").code == 3


@pytest.mark.parametrize("cuts_off", [False, True])
def test_a_revoked_operator_hears_that_it_is(anna: Laptop, pc: SwarmNode, home: Home, cuts_off: bool) -> None:
    pc.cuts_off = cuts_off
    home.take(home.revoke(anna.own().identity.node_id, "laptop lost"))
    pc.tls.refresh()
    for _ in range(2):
        ran = anna.ctl("--node", "study-pc", "models", "--json")
        assert (ran.code, ran.json["error"]["code"]) == (3, "operator-revoked")
        assert "laptop lost" in ran.json["error"]["message"]


def test_a_node_that_has_not_heard_of_the_operator_says_so(anna: Laptop, pc: SwarmNode, home: Home) -> None:
    early = home.copy()
    early.whole = StatementSet(home.whole.by_hash[home.roster.swarm_id])
    with second(home, "kitchen-pi") as pi:
        anna.own().merge(home.statements())
        early.take(home.admit(home.founder, "study-pc"))
        pi.home = early
        pi.tls.refresh()
        ran = anna.ctl("--node", pi.address, "models", "--json")
    # The server's alert may be lost behind the end of the connection.
    assert (ran.code, ran.json["error"]["code"]) in {(3, "not-accepted"), (4, "connection-lost")}
    assert "not have heard of your admission" in ran.json["error"]["hint"]


@pytest.mark.parametrize("lie", ["other-swarm", "unsigned", "garbage", "no-list"])
def test_a_lying_node_changes_nothing_in_the_roster(
    anna: Laptop, pc: SwarmNode, home: Home, lie: str
) -> None:
    stranger = Home.begin("home")
    bad: object = {
        "other-swarm": stranger.statements(),
        "unsigned": [{**home.revoke(home.founder.node_id), "sigs": []}],
        "garbage": [{"body": "x"}, 7],
        "no-list": {"a": 1},
    }[lie]
    before = (anna.directory / "roster.json").read_bytes()
    real = pc._sync
    pc._sync = lambda body: answer({"statements": bad, "want": 7})  # type: ignore[method-assign]
    wrong = Reply(body=b'{"models": []}', headers={"X-Mycoswarm-Roster": "0" * 64})
    pc.on("GET", "/api/models", wrong)
    ran = anna.ctl("--node", "study-pc", "models")
    assert ran.code == 0 and "could not be brought up to date" in ran.err
    assert (anna.directory / "roster.json").read_bytes() == before
    pc._sync = real  # type: ignore[method-assign]


def test_a_roster_that_others_can_change_is_not_used(anna: Laptop) -> None:
    path = anna.directory / "roster.json"
    path.chmod(0o666)
    assert anna.ctl("--node", "study-pc", "models", "--json").json["error"]["code"] == "roster-exposed"
    path.chmod(0o600)
    text = path.read_text()
    path.write_text(text.replace("admit", "admin", 1).replace(text[60:64], "AAAA", 1))
    assert anna.ctl("--node", "study-pc", "models", "--json").json["error"]["code"] == "roster-damaged"
    path.write_text("[" * 100_000)
    assert anna.ctl("--node", "study-pc", "models", "--json").json["error"]["code"] == "roster-damaged"


def test_damaged_addresses_are_only_forgotten(anna: Laptop, pc: SwarmNode) -> None:
    for text in ("", "[]", '{"a": 7}', "{" * 10):
        (anna.directory / "addresses.json").write_text(text)
        assert anna.ctl("--node", pc.address, "models").code == 0


def test_two_commands_at_once_lose_no_revocation(anna: Laptop, home: Home) -> None:
    one, other = anna.own(), anna.own()
    first = home.admit(identity(), "den-pc")
    gone = home.revoke(home.founder.node_id)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(anna.data))
        one.merge([gone])
        other.merge([first])
    assert home.founder.node_id in anna.own().roster.revoked


# --- leaving ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts_off", [False, True])
def test_an_operator_leaves_in_peace(anna: Laptop, pc: SwarmNode, home: Home, cuts_off: bool) -> None:
    pc.cuts_off = cuts_off
    own_id = anna.own().identity.node_id
    assert anna.ctl("leave", "--operator").code == 2
    ran = anna.ctl("leave", "--operator", "--yes")
    assert ran.code == 0, ran.err
    assert home.roster.revoked[own_id]
    assert [path.name for path in anna.directory.iterdir()] == ["lock"]
    assert anna.ctl("--node", "study-pc", "models", "--json").json["error"]["code"] == "no-operator"
    assert anna.ctl("enroll", "--operator", pc.invite(), "--address", pc.address).code == 0
    assert anna.own().identity.node_id != own_id


def test_an_operator_that_was_put_out_can_still_forget(anna: Laptop, pc: SwarmNode, home: Home) -> None:
    home.take(home.revoke(anna.own().identity.node_id))
    pc.tls.refresh()
    assert anna.ctl("--node", "study-pc", "models").code == 3
    assert anna.ctl("leave", "--operator", "--yes").code == 0
    assert not (anna.directory / "node.key").exists()


def test_leaving_where_nobody_can_be_told_keeps_the_key(anna: Laptop) -> None:
    (anna.directory / "addresses.json").unlink()
    ran = anna.ctl("leave", "--operator", "--yes", "--json")
    assert ran.code == 4
    assert (anna.directory / "node.key").exists()


# --- one node, one connection ----------------------------------------------------------------


@pytest.fixture
def telling(pc: SwarmNode) -> SwarmNode:
    pc.on("GET", "/api/status", answer({"node": "pc", "state": "green", "swarm": {"name": "home"}}))
    pc.on("GET", "/api/tasks", answer({"tasks": []}))
    pc.on("GET", "/api/swarm", answer({"swarm": {"name": "home"}, "nodes": []}))
    return pc


def test_all_that_a_command_reads_is_read_on_one_connection(anna: Laptop, telling: SwarmNode) -> None:
    telling.keeps_alive = True
    assert anna.ctl("status").code == 0
    assert telling.paths() == ["GET /api/status", "GET /api/swarm"]
    assert telling.connections == 1


def test_a_connection_that_ended_unseen_is_made_anew_for_reading(
    anna: Laptop, telling: SwarmNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mycoswarmd.ctl.tlshttp.TlsConnection.is_quiet", lambda self: self.sock is not None)
    ran = anna.ctl("status")
    assert ran.code == 0, ran.err
    assert telling.paths() == ["GET /api/status", "GET /api/swarm"]
    assert telling.connections == 2


def test_a_member_that_was_put_out_is_not_spoken_to_on_the_connection_that_is_open(
    anna: Laptop, telling: SwarmNode
) -> None:
    telling.keeps_alive = True

    def out_now(asked: Asked) -> Reply:
        del asked
        telling.home.take(telling.home.revoke(telling.own.node_id))
        return answer({"node": "pc", "state": "green", "swarm": {"name": "home"}})

    telling.on("GET", "/api/status", out_now)
    ran = anna.ctl("status")
    assert ran.code != 0 and "put out of the swarm" in ran.err
    assert "GET /api/swarm" not in telling.paths()


def test_the_node_is_named_where_nobody_named_one(anna: Laptop, telling: SwarmNode) -> None:
    ran = anna.ctl("status")
    assert ran.err == "node: study-pc\n"
    assert anna.ctl("--node", "study-pc", "status").err == ""
    assert anna.ctl("status", "--json").err == ""
    ran = anna.ctl("cancel", "t-1")
    assert ran.code == 1
    assert "study-pc was asked; --node NAME asks another" in ran.err
    assert "was asked" not in anna.ctl("--node", "study-pc", "cancel", "t-1").err


def test_the_node_that_was_spoken_to_last_is_asked_again(
    anna: Laptop, telling: SwarmNode, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    with second(home, "kitchen-pi") as pi:
        announce(monkeypatch, (pi.own.node_id, pi.port), (telling.own.node_id, telling.port))
        for name in ("kitchen-pi", "study-pc", "kitchen-pi"):
            assert anna.ctl("--node", name, "models").code == 0
            assert anna.ctl("models").err == f"node: {name}\n"
    assert anna.ctl("models").err == "node: study-pc\n"  # the other one is off
