"""The core as an appliance, without systemd: what it is passed, what it asks for, what it refuses."""

import http.client
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from mycoswarmd.sandbox.host import landlock_abi
from tests.cores import Core, accepting, appliance
from tests.dialers import ip, network
from tests.nodes import WAIT_S, UnixConnection, free_port, until, write_private
from tests.upstream import Upstream, upstream

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]

POLICY = """
schema = 1
name = "test"
[agents.scribe]
model = "*"
[[rule]]
id = "all"
why = "the owner does everything here"
effect = "allow"
action = ["infer", "task", "admin"]
zone = ["self", "lan"]
"""
DISCOVERY = (sys.executable, "-I", "-m", "mycoswarmd.outposts.discovery")
SIGNER = (sys.executable, "-I", "-m", "mycoswarmd.daemon.signerunit", "--state")
QUIET = "managed_engine = false\ndiscovery = false\n"
SAYS_HELLO = {"model": "ok", "messages": [{"role": "user", "content": "Hi"}]}


def engine_settings(engine: Upstream) -> str:
    return f'[engines.up]\nkind = "openai"\nurl = "{engine.url}"\n'


@pytest.fixture
def engine() -> Iterator[Upstream]:
    with upstream() as running:
        yield running


# --- the socket that systemd made ---------------------------------------------------------------------------


def test_it_answers_on_the_passed_socket_and_leaves_that_alone(tmp_path: Path) -> None:
    with appliance(tmp_path, QUIET, POLICY) as core:
        before = core.socket.stat()
        assert core.call("GET", "/api/status").json["listeners"] == [f"unix:{core.socket}"]
        assert f"listening on {core.socket}; next: sudo mycoswarmctl init, or enroll" in core.log()
        assert core.stop() == 0
        after = core.socket.stat()
        assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
        assert "Traceback" not in core.log()


def test_who_calls_while_it_restarts_waits_and_is_answered(tmp_path: Path) -> None:
    with appliance(tmp_path, QUIET, POLICY) as core:
        core.kill()
        early = UnixConnection(core.socket)
        early.request("GET", "/api/status")
        core.start(wait=False)
        assert early.getresponse().status == 200
        early.close()


def refused(core: Core) -> str:
    """Start a core that must not start, and return what it said."""
    core.start(wait=False)
    assert core.wait_exit() == 1
    said = core.log()
    assert "Traceback" not in said
    return said


def test_it_does_not_start_where_it_could_reach_a_network(tmp_path: Path) -> None:
    with appliance(tmp_path, QUIET, POLICY, started=False) as core:
        core.is_open = True
        said = refused(core)
        assert "mycoswarmd: cannot run as the appliance: this process can open network connections" in said
        assert "(has-network)" in said
        assert "mycoswarmd.service" in said  # what to do
        assert len(said.splitlines()) == 1
        assert not (tmp_path / "mycoswarm.db").exists()  # and nothing was begun
        core.is_open = False  # the control: nothing else was wrong
        core.start()


def test_it_does_not_start_without_its_socket(tmp_path: Path) -> None:
    with appliance(tmp_path, QUIET, POLICY, started=False) as core:
        core.name = "other"
        assert "(no-api-socket); systemctl start mycoswarmd.socket" in refused(core)
        core.passed = None
        assert refused(core).count("(no-api-socket)") == 2


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_it_does_not_serve_on_another_kind_of_socket(tmp_path: Path, kind: socket.SocketKind) -> None:
    with (
        appliance(tmp_path, QUIET, POLICY, started=False) as core,
        socket.socket(socket.AF_UNIX, kind) as bad,
    ):
        core.passed = bad.fileno()  # not a stream, or nobody listens at it
        assert "(bad-activation)" in refused(core)


# --- connections that the dialer makes ----------------------------------------------------------------------


def test_a_prompt_reaches_an_engine_on_loopback_through_the_dialer_alone(
    tmp_path: Path, engine: Upstream
) -> None:
    core = Core(tmp_path)
    write_private(tmp_path / "mycoswarm.toml", QUIET + engine_settings(engine))
    write_private(tmp_path / "policy.toml", POLICY)
    dialer = core.dialer()
    with dialer.listener:
        try:
            core.start(wait=False)  # without a dialer that answers
            assert core.wait_for("listening on")
            assert core.call("GET", "/api/models").json["models"] == []
            dialer.start()
            until(lambda: core.call("GET", "/api/models").json["models"])
            answer = core.call("POST", "/v1/chat/completions", SAYS_HELLO)
            assert answer.status == 200, answer.body
            assert engine.count("ok") == 1
        finally:
            dialer.kill()
            core.close()


def test_what_it_is_given_stays_where_the_dialer_pointed_it(tmp_path: Path) -> None:
    # What this stands for is tried by force in tests/unit/outposts/test_notcp.py.
    with appliance(tmp_path) as core:
        if landlock_abi() >= 4:
            assert "a socket from the LAN dialer stays where it points" in core.log()
        else:
            assert "does not know TCP" in core.log()


def test_an_engine_that_the_settings_do_not_declare_is_not_dialled(tmp_path: Path, engine: Upstream) -> None:
    with appliance(tmp_path, QUIET + engine_settings(engine), POLICY) as core:
        until(lambda: core.call("GET", "/api/models").json["models"])
        core.stop()
        # Somebody else's settings: the dialer reads its own file and believes nobody.
        other = write_private(tmp_path / "elsewhere.toml", QUIET + engine_settings(engine))
        write_private(tmp_path / "mycoswarm.toml", QUIET)
        core._arguments = (*core._arguments, "--config", str(other))
        core.start()
        until(lambda: core.call("GET", "/api/status").json["engines"][0]["state"] == "down")
        assert core.call("GET", "/api/models").json["models"] == []


def test_programs_come_in_where_the_dialer_listens(tmp_path: Path, engine: Upstream) -> None:
    port = free_port()
    settings = f'listen = "127.0.0.1:{port}"\n' + QUIET + engine_settings(engine)
    with appliance(tmp_path, settings, POLICY) as core:
        secret = core.call("POST", "/api/keys", {"name": "laptop"}).json["secret"]
        until(lambda: "listening for programs" in core.log())
        until(lambda: core.call("GET", "/api/models").json["models"])
        assert core.call("GET", "/api/status").json["listeners"][1] == f"http://127.0.0.1:{port}"
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)) as program:
            program.request("GET", "/v1/models", headers={"Authorization": f"Bearer {secret}"})
            answer = program.getresponse()
            assert (answer.status, b'"ok"' in answer.read()) == (200, True)
            program.request("GET", "/v1/models")
            assert program.getresponse().status == 401


def test_a_taken_port_is_a_problem_and_no_end(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with appliance(tmp_path, f'listen = "127.0.0.1:{port}"\n' + QUIET, POLICY) as core:
            until(lambda: "(port-taken)" in core.log())
            until(lambda: any(f"cannot listen on 127.0.0.1:{port}" in one for one in problems_of(core)))
            status = core.call("GET", "/api/status").json
            assert status["listeners"] == [f"unix:{core.socket}"]  # what is not open is not said to be


# --- the swarm ----------------------------------------------------------------------------------------------


def member(base: Path, name: str, host: str, settings: str = "") -> tuple[Path, str]:
    return base / name, f'node_name = "{name}"\nswarm_listen = "{host}:7437"\n{QUIET}{settings}'


@contextmanager
def signer(core: Core) -> Iterator[Path]:
    """Be the signer's unit of this core, and yield where it keeps its key."""
    state = core.state.parent / f"signer-{core.state.name}"
    state.mkdir(mode=0o700)
    with accepting(core.outposts / "signer.sock", (*SIGNER, str(state))):
        yield state


@contextmanager
def cable(*ends: tuple[str, str]) -> Iterator[None]:
    """Connect two network namespaces, each with an address."""
    (one, _), (other, _) = ends
    ip("-n", one, "link", "add", "v0", "type", "veth", "peer", "name", "v0", "netns", other)
    for namespace, address in ends:
        ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "v0")
        ip("-n", namespace, "link", "set", "v0", "up")
    yield  # it goes with the namespaces


def test_two_appliances_form_a_swarm_through_their_dialers(tmp_path: Path) -> None:
    """Sockets are where they were made: everything goes through namespaces that no core is in."""
    here, there = "10.77.0.1", "10.77.0.2"
    with (
        network("core-a") as one_house,
        network("core-b") as other_house,
        cable((one_house, here), (other_house, there)),
        appliance(*member(tmp_path, "ws", here), POLICY, namespace=one_house) as ws,
        appliance(*member(tmp_path, "pi", there), POLICY, namespace=other_house) as pi,
        signer(ws) as key_of_ws,
    ):
        assert "listening for the swarm" not in ws.log()
        begun = ws.call("POST", "/api/swarm/init", {"name": "home", "node_name": "ws", "recovery": "ab" * 32})
        assert begun.status == 201, begun.body
        until(lambda: "listening for the swarm at 10.77.0.1:7437" in ws.log())
        assert (key_of_ws / "signer.key").exists()
        assert not (ws.state / "signer").exists()  # what signs for it is not its own
        code = ws.call("POST", "/api/swarm/invites", {"name": "pi"}).json["code"]
        joined = pi.call("POST", "/api/swarm/enroll", {"code": code, "addresses": [f"{here}:7437"]})
        assert joined.status == 201, joined.body
        for one, other in ((ws, "pi"), (pi, "ws")):
            until(lambda one=one, other=other: reaches(one, other))  # type: ignore[misc]
        gone = ws.call("POST", "/api/swarm/revoke", {"node": "pi", "reason": "sold"})
        assert gone.status == 200, gone.body
        until(lambda: "was put out of the swarm: sold" in ws.log())
        until(lambda: "this node was put out of the swarm" in pi.log())


def reaches(core: Core, other: str) -> bool:
    nodes = core.call("GET", "/api/swarm").json["nodes"]
    return any(one["name"] == other and one["state"] == "ready" for one in nodes)


def test_discovery_is_a_connection_that_is_made_again_when_it_ends(tmp_path: Path) -> None:
    settings = 'swarm_listen = "none"\nmanaged_engine = false\n'
    with appliance(tmp_path / "ws", settings, POLICY) as core, signer(core):
        core.call("POST", "/api/swarm/init", {"name": "home", "node_name": "ws", "recovery": "ab" * 32})
        # Nobody is there yet: said, and tried again.
        until(lambda: "cannot start mycoswarm-discovery" in core.log())
        with accepting(core.outposts / "discovery.sock", DISCOVERY) as started:
            until(lambda: started)
            before = len(started)
            started[-1].kill()
            until(lambda: len(started) > before)
            until(lambda: {"discovery", "signer"} <= units_that_proved(core))
            assert core.stop() == 0
            assert started[-1].wait(WAIT_S) == 0  # it ends with the node


def units_that_proved(core: Core) -> set[str]:
    return {one["unit"] for one in core.call("GET", "/v1/security").json["proofs"]}


def test_without_the_signers_unit_no_swarm_begins_and_the_node_goes_on(tmp_path: Path) -> None:
    with appliance(tmp_path / "ws", QUIET, POLICY) as core:
        swarm = {"name": "home", "node_name": "ws", "recovery": "ab" * 32}
        refused = core.call("POST", "/api/swarm/init", swarm)
        assert (refused.status, refused.json["error"]["code"]) == (503, "signer-absent")
        assert "systemctl enable --now mycoswarm-signer.socket" in refused.json["error"]["hint"]
        assert core.call("GET", "/api/status").status == 200
        with signer(core):
            assert core.call("POST", "/api/swarm/init", swarm).status == 201
            core.stop()
        core.start()  # with a socket at which nobody listens any more
        until(
            lambda: any("this node is a signer whose key is out of reach" in one for one in problems_of(core))
        )
        core.stop()
        # Started while the unit is broken: it says so, and answers.
        with accepting(core.outposts / "broken", ("/bin/false",)):
            (core.outposts / "signer.sock").unlink()
            (core.outposts / "broken").rename(core.outposts / "signer.sock")
            core.start()
            until(lambda: any("cannot reach the signer" in one for one in problems_of(core)))
            assert core.call("GET", "/api/swarm").status == 200


# --- what is proved -----------------------------------------------------------------------------------------


def test_security_shows_what_each_unit_proved_and_the_weak_ones_are_problems(tmp_path: Path) -> None:
    with appliance(tmp_path, QUIET, POLICY) as core:
        until(lambda: units_that_proved(core) == {"core", "lan"})
        said = core.call("GET", "/v1/security").json
        proofs = {one["unit"]: one for one in said["proofs"]}
        held = {one["name"]: one["ok"] for one in proofs["core"]["checks"]}
        assert held["inet-socket"] is True
        assert held["seccomp"] is True
        assert held["capabilities"] is False  # this one is root's own
        lan = {one["name"]: one["ok"] for one in proofs["lan"]["checks"]}
        assert lan["canary"] is False  # no filter here
        assert {"unit": "engine", "problem": "has not run yet"} in said["unheard"]
        problems = core.call("GET", "/api/status").json["problems"]
        assert any(one.startswith("unit lan is weak: canary") for one in problems)
        assert any(one.startswith("unit core is weak: capabilities") for one in problems)
        assert "unit lan is weak: canary" in core.log()


def test_without_a_dialer_the_problem_is_said_until_there_is_one(tmp_path: Path) -> None:
    core = Core(tmp_path)
    write_private(tmp_path / "mycoswarm.toml", QUIET)
    write_private(tmp_path / "policy.toml", POLICY)
    try:
        core.start()
        until(lambda: any("unit lan cannot be asked" in one for one in problems_of(core)))
        dialer = core.dialer()
        with dialer.listener:
            dialer.start()
            until(lambda: not any("unit lan cannot be asked" in one for one in problems_of(core)))
            dialer.kill()
    finally:
        core.close()


def problems_of(core: Core) -> list[str]:
    return list(core.call("GET", "/api/status").json["problems"])


def test_where_no_cage_can_be_proved_tasks_fail_and_nothing_weaker_steps_in(
    tmp_path: Path, engine: Upstream
) -> None:
    with appliance(tmp_path, QUIET + engine_settings(engine), POLICY) as core:
        until(lambda: core.call("GET", "/api/models").json["models"])
        status = core.call("GET", "/api/status").json
        assert status["sandbox"]["level"] == "none"
        assert status["sandbox"]["facts"][0]["hint"].startswith("systemctl status mycoswarm-task.socket")
        engine.play(("finish", {"summary": "done"}))
        # It was told nothing, so what may not be repeated is tried again all the same.
        posted = [core.submit("x", model="agent", repeatable=repeatable) for repeatable in (True, False)]
        for task_id in posted:
            task = core.wait_task(task_id, "failed", "parked", "succeeded", within_s=200)
            assert (task["state"], task["code"]) == ("failed", "cage-setup"), task
            assert task["message"].endswith("; given up after 5 attempts"), task
        assert engine.count("agent") == 0
        cages = core.call("GET", "/v1/security").json["cages"]
        assert (cages["by"], cages["level"]) == ("systemd", "")
        assert "cannot reach systemd for a cage" in cages["problem"]


# --- who is who ---------------------------------------------------------------------------------------------


def test_root_and_the_nodes_own_user_are_the_owner_and_others_are_not(tmp_path: Path) -> None:
    own, other = 61_234, 61_235
    with tempfile.TemporaryDirectory() as public:
        Path(public).chmod(0o755)
        core = Core(tmp_path, at=Path(public) / "api.sock")
        write_private(core.state / "mycoswarm.toml", QUIET)
        write_private(core.state / "policy.toml", OWNERS)
        for path in (core.state, *core.state.rglob("*")):
            os.chown(path, own, own)
        # As the unit does; and this one may read the tests' own Python, wherever that is.
        may_read = ("--inh-caps=+dac_override", "--ambient-caps=+dac_override")
        core.as_user = ("setpriv", f"--reuid={own}", f"--regid={own}", "--clear-groups", *may_read, "--")
        try:
            core.start()
            assert f"Uid:\t{own}\t{own}" in Path(f"/proc/{core.pid}/status").read_text()
            assert [called_by(core, uid) for uid in (0, own, other)] == [200, 200, 403]
        finally:
            core.close()


OWNERS = """
schema = 1
name = "test"
[[rule]]
id = "owner"
why = "owners only"
effect = "allow"
action = ["admin"]
origin = ["owner"]
"""


def called_by(core: Core, uid: int) -> int:
    """Call as a user, and return the status."""
    connection = UnixConnection(core.socket)
    os.setresuid(-1, uid, 0)
    try:
        connection.connect()
    finally:
        os.setresuid(-1, 0, 0)
    connection.request("GET", "/api/policy")
    status = connection.getresponse().status
    connection.close()
    return status


# --- the service manager ------------------------------------------------------------------------------------


def test_the_service_manager_is_told_how_it_goes(tmp_path: Path) -> None:
    where = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(where))
        manager.settimeout(WAIT_S)
        with appliance(tmp_path / "node", QUIET, POLICY, started=False) as core:
            # Seldom: ten words that are not heard at once stop the node.
            core.environment = {"NOTIFY_SOCKET": str(where), "WATCHDOG_USEC": "3000000"}
            core.start(wait=False)
            heard = hear(manager, "READY=1")
            # Truly ready: it answers at once, and had a receipt of its start before.
            assert core.call("GET", "/api/status").status == 200
            assert "STATUS=next: sudo mycoswarmctl init, or enroll" in heard
            hear(manager, "WATCHDOG=1")
            hear(manager, "WATCHDOG=1")
            before_us = time.monotonic_ns() // 1000
            os.kill(core.pid, 1)
            said = hear(manager, "RELOADING=1")
            at_us = int(next(one for one in said if one.startswith("MONOTONIC_USEC=")).partition("=")[2])
            assert before_us <= at_us <= time.monotonic_ns() // 1000
            hear(manager, "READY=1")  # also when the policy is bad:
            write_private(core.state / "policy.toml", "schema = nonsense")
            os.kill(core.pid, 1)
            hear(manager, "RELOADING=1")
            hear(manager, "READY=1")
            assert "the old policy stays" in core.log()
            os.kill(core.pid, 15)
            hear(manager, "STOPPING=1")
            assert core.wait_exit() == 0


def hear(manager: socket.socket, wanted: str) -> list[str]:
    while True:
        lines = manager.recv(4096).decode().split("\n")
        if wanted in lines:
            return lines
        assert lines == ["WATCHDOG=1"], lines


def test_with_a_journal_lines_have_priorities_and_no_times(tmp_path: Path) -> None:
    with appliance(tmp_path, QUIET, POLICY, started=False) as core:
        core.log_path.touch()
        about = core.log_path.stat()
        core.environment = {"JOURNAL_STREAM": f"{about.st_dev}:{about.st_ino}"}
        core.start()
        assert core.wait_for("<4>mycoswarmd.daemon.security: unit core is weak"), core.log()
        core.stop()
        lines = core.log().splitlines()
        assert any(line.startswith("<6>mycoswarmd: listening on") for line in lines), lines
        assert all(line[:1] == "<" and line[2:3] == ">" for line in lines), lines


def test_a_policy_of_the_operators_is_what_is_reported(tmp_path: Path) -> None:
    """A positive control for the helpers: the answers are this node's."""
    with appliance(tmp_path, QUIET, POLICY) as core:
        assert json.loads(core.call("GET", "/api/policy").body)["name"] == "test"
