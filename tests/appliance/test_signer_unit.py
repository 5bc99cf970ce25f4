"""The signer as a unit on a booted machine: the node gets signatures, and nobody gets the key."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.appliance.conftest import Images
from tests.appliance.machines import Lab, Machine
from tests.appliance.nodes import ctl, ctl_json, wait_ready

KEY = "/var/lib/mycoswarm-signer/signer.key"
pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]
# What the node does, as its user.
NODE = """
import json, os
from pathlib import Path
from mycoswarmd.core.roster import SIGNING_CONTEXT, Kind, make_beacon_message, make_body
from mycoswarmd.daemon.clock import SystemClock
from mycoswarmd.errors import MycoswarmError
from mycoswarmd.trust.keys import verify
from mycoswarmd.trust.signer import UnitSigner
node = UnitSigner(Path("/run/mycoswarm-outposts/signer.sock"), clock=SystemClock())
public = node.create()
said = {"public": public.hex(), "uid": os.getuid()}
swarm, by = "0" * 64, public.hex()
body = make_body(Kind.REVOKE, swarm=swarm, epoch=0, node="a" * 26, reason="", by=by)
for name, message in {"statement": SIGNING_CONTEXT + body, "garbage": SIGNING_CONTEXT + b"{}",
                      "beacon": make_beacon_message(swarm=swarm, epoch=0, signer=by, n=1),
                      "tls": b" " * 64 + b"TLS 1.3, server CertificateVerify"}.items():
    try:
        said[name] = verify(public, node.sign(message), message)
    except MycoswarmError as exc:
        said[name] = exc.code
said["weak"] = {check.name.value: check.detail for check in node.prove().weak()}
for name, path in {"key": "KEY", "directory": "/var/lib/mycoswarm-signer"}.items():
    try:
        os.close(os.open(path, os.O_RDONLY))
        said[name] = "done"
    except OSError as exc:
        said[name] = exc.errno
print(json.dumps(said))
""".replace("KEY", KEY)


@pytest.fixture(scope="module", params=["trixie", "bookworm"])
def node(request: pytest.FixtureRequest, appliance_lab: Lab, images: Images) -> Iterator[Machine]:
    """A machine with the package."""
    layers = images.node_trixie if request.param == "trixie" else images.node_bookworm
    machine = appliance_lab.machine(f"signer-{request.param}", *layers)
    machine.wait_booted()
    wait_ready(machine)
    machine.run("systemctl", "start", "mycoswarm-signer.socket")
    yield machine
    machine.pull_plug()


def test_a_swarm_is_signed_by_the_unit(node: Machine) -> None:
    node.run("systemctl", "stop", "mycoswarm-signer.socket")
    refused = ctl(node, "init", "--name", "home", "--yes-i-wrote-it-down", check=False)
    assert refused.code != 0
    assert "mycoswarm-signer.socket" in refused.err + refused.out
    node.run("systemctl", "start", "mycoswarm-signer.socket")
    ctl(node, "init", "--name", "home", "--yes-i-wrote-it-down")
    (row,) = ctl_json(node, "nodes")["nodes"]
    assert row["signer"] is True
    assert node.run("stat", "-c", "%U %a", KEY).out == "_mycoswarm-signer 600\n"
    assert not node.disk("/var/lib/mycoswarm/signer").exists()
    # Both are killed, and it is still the signer of its swarm.
    node.sh("systemctl kill --signal=KILL mycoswarmd.service 'mycoswarm-signer@*' || true")
    wait_ready(node)
    assert ctl_json(node, "invite", "--no-wait", "--name", "other")["code"]


def test_the_node_gets_signatures_and_never_the_key(node: Machine) -> None:
    said = json.loads(node.python(NODE, user="_mycoswarm").out)
    assert (said["statement"], said["beacon"], said["tls"]) == (True, True, "not-signable")
    assert said["garbage"] == "not-signable"
    assert "signs revoke " in node.journal("-u", "mycoswarm-signer@*")
    assert (said["key"], said["directory"]) == (13, 13)
    said["weak"].pop("memory", None)  # the outer machine may keep that controller
    assert said["weak"] == {}
    assert node.run("stat", "-c", "%U %a", KEY).out == "_mycoswarm-signer 600\n"
    assert node.run("stat", "-c", "%U %a", str(Path(KEY).parent)).out == "_mycoswarm-signer 700\n"
    # Root could: with the same program, what is refused to the node is not refused to everybody.
    root = json.loads(node.python(NODE).out)
    assert (root["key"], root["directory"], root["public"]) == ("done", "done", said["public"])
    # Each connection was a unit of its own, and none is left but the node's, for a minute.
    node.wait_until("test $(systemctl list-units --no-legend 'mycoswarm-signer@*' | wc -l) -le 1")


def test_nobody_else_may_ask(node: Machine) -> None:
    assert "Permission denied" in node.python(NODE, user="daemon", check=False).err
    assert "Permission denied" in node.python(NODE, user="_mycoswarm-lan", check=False).err


def test_its_unit_is_tight(node: Machine) -> None:
    score = node.run(
        "systemd-analyze", "security", "--threshold=5", "mycoswarm-signer@x.service", check=False
    )
    assert score.code == 0, score.out.splitlines()[-1]
