"""A laptop without a daemon, on a network of its own: it finds the nodes by their announcements."""

import json
from pathlib import Path

import pytest

from tests.swarm.lab import Lab, wait_until
from tests.swarm.laptop import Laptop

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def test_a_laptop_finds_the_swarm_and_follows_a_node_that_moves(lab: Lab, tmp_path: Path) -> None:
    one, two = lab.swarm_of(2)
    laptop = Laptop(lab.host("laptop"), tmp_path)
    joined = laptop.ok("enroll", "--operator", one.invite(role="operator", name="anna"))
    assert joined["name"] == "anna"
    # No --node: whoever is nearest. Both nodes are this near.
    assert laptop.ok("status")["swarm"]["id"] == one.swarm()["swarm"]["id"]
    assert laptop.ok("--node", "n2", "nodes")["self"]["id"] == two.id

    lab.move(two.host, "10.77.9.9")
    wait_until(lambda: laptop.ctl("--node", "n2", "nodes").returncode == 0)
    places = json.loads((tmp_path / "mycoswarm" / "operator" / "addresses.json").read_text())
    assert any("10.77.9.9" in place or place.startswith("[fe80") for place in places[two.id])

    # A node that goes is not there any more, and which one is asked does not depend on it.
    two.kill()
    gone = laptop.ctl("--node", "n2", "nodes", "--json")
    assert gone.returncode == 4, gone.stdout
    assert laptop.ok("nodes")["self"]["id"] == one.id
    one.ok("POST", "/api/swarm/revoke", {"node": "anna", "reason": "laptop lost"})
    lost = wait_until(lambda: laptop.answered("nodes", "--json"))
    assert lost is not None
    assert (lost.returncode, json.loads(lost.stdout)["error"]["code"]) == (3, "operator-revoked")


def test_where_nothing_is_announced_an_address_is_enough(lab: Lab, tmp_path: Path) -> None:
    node = lab.node("n1", settings="discovery = false")
    lab.found(node)
    laptop = Laptop(lab.host("laptop"), tmp_path)
    code = node.invite(role="operator", name="anna")
    lost = laptop.ctl("enroll", "--operator", code, "--json")
    assert json.loads(lost.stdout)["error"]["code"] == "no-swarm-found"
    laptop.ok("enroll", "--operator", code, "--address", node.host.ip)
    assert laptop.ok("status")["node"]  # where it was reached before
