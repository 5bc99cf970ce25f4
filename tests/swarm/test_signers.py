"""Stolen and quarrelling signers, the paper key, and a disk that was copied. M3."""

import base64
import shutil

import pytest

from tests.swarm.attackers.kit import ROSTER_CONTEXT, Key, b64, statement
from tests.swarm.attackers.talk import Reply, as_member
from tests.swarm.lab import PORT, Lab, LabNode, read_seed, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300), pytest.mark.xdist_group("swarm-signers")]


def signing_key(node: LabNode) -> Key:
    """Steal a signing key from a disk."""
    (found,) = node.state.rglob("signer.key")
    return Key.from_seed(read_seed(found))


def make_signer(by: LabNode, node: LabNode, *others: LabNode) -> None:
    by.ok("POST", "/api/swarm/signers", {"node": node.id})
    wait_until(lambda: all(each.row(node)["signer"] for each in (by, node, *others)))


def names(node: LabNode) -> set[str]:
    return {row["name"] for row in node.swarm()["nodes"]}


def admit_by_hand(signer: Key, swarm: str, name: str) -> tuple[Key, dict[str, object]]:
    """Let a stolen signing key admit somebody of the thief's own."""
    key = Key()
    body: dict[str, object] = {
        "v": 1, "kind": "admit", "swarm": swarm, "epoch": 0, "by": signer.public.hex(),
        "cert": b64(key.certificate()), "name": name, "role": "node",
    }  # fmt: skip
    return key, statement(body, signer)


def push(lab: Lab, node: LabNode, key: Key, *statements: object) -> Reply:
    """Give statements to a node, as a member does."""
    mallory = lab.hosts.get("mallory") or lab.host("mallory")
    with as_member(mallory, node, key) as talk:
        return talk.call("POST", "/swarm/sync", {"have": [], "statements": list(statements)})


def test_what_a_stolen_signer_admits_after_its_removal_is_void(lab: Lab) -> None:
    one, two, three = lab.swarm_of(3)
    make_signer(one, two, three)
    four = lab.node("n4")
    lab.admit(two, four)  # honest work of the key before it was stolen
    lab.wait_agreed([one, two, three, four])
    swarm = one.swarm()["swarm"]["id"]
    stolen, member_key = signing_key(two), Key.from_seed(two.seed)
    two.kill()
    # The control: while it is a signer, the thief's statement admits.
    early, admitted = admit_by_hand(stolen, swarm, "early")
    assert push(lab, three, member_key, admitted).status == 200
    wait_until(lambda: "early" in names(one) and "early" in names(three))
    # Made before the removal, and kept back.
    late, kept_back = admit_by_hand(stolen, swarm, "late")
    grant = statement(
        {"v": 1, "kind": "signer+", "swarm": swarm, "epoch": 0, "by": stolen.public.hex(),
         "key": late.public.hex(), "node": two.id}, stolen)  # fmt: skip
    one.ok("DELETE", f"/api/swarm/signers/{two.id}")
    wait_until(lambda: not three.row(two)["signer"])
    for forged in (kept_back, grant):
        assert push(lab, three, member_key, forged).status in {200, 400}
    bystander, by_grant = admit_by_hand(late, swarm, "by-grant")
    assert push(lab, three, member_key, by_grant).status in {200, 400}
    lab.wait_agreed([one, three, four])
    for node in (one, three, four):
        assert names(node) & {"late", "by-grant"} == set()
        assert {"n1", "n2", "n3", "n4", "early"} <= names(node)
    with pytest.raises(OSError, match=r".*"), as_member(lab.hosts["mallory"], three, bystander) as talk:
        talk.call("GET", "/swarm/word")
    with as_member(lab.hosts["mallory"], three, early) as talk:
        assert talk.call("GET", "/swarm/word").status == 200
    # What remains is put out like anybody.
    one.ok("POST", "/api/swarm/revoke", {"node": "early", "reason": "admitted by a thief"})
    wait_until(lambda: "early" not in names(three))


def recover(lab: Lab, node: LabNode, paper: Key, **whom: list[str]) -> None:
    """Begin a new epoch with the paper key."""
    del lab
    drafted = node.ok("POST", "/api/swarm/recovery/draft", {"without": [], "restore": [], **whom})
    data = base64.b64decode(drafted["body"])
    signed = {
        "body": drafted["body"],
        "sigs": [[paper.public.hex(), paper.sign(ROSTER_CONTEXT + data).hex()]],
    }
    node.ok("POST", "/api/swarm/recovery", {"statement": signed})


def swarm_with_paper(lab: Lab, count: int) -> tuple[Key, list[LabNode]]:
    """Return the paper key and the nodes of a swarm."""
    paper = Key()
    nodes = [lab.node(f"n{index + 1}") for index in range(count)]
    lab.found(nodes[0], recovery_public=paper.public.hex())
    for node in nodes[1:]:
        lab.admit(nodes[0], node)
    lab.wait_agreed(nodes)
    return paper, nodes


def test_two_signers_who_put_each_other_out_are_both_out_until_the_paper_key_speaks(lab: Lab) -> None:
    paper, (one, two, three) = swarm_with_paper(lab, 3)
    make_signer(one, two, three)
    lab.partition([one.host], [two.host], [three.host])
    one.ok("DELETE", f"/api/swarm/signers/{two.id}")
    two.ok("DELETE", f"/api/swarm/signers/{one.id}")
    lab.heal()
    lab.wait_agreed([one, two, three])
    for node in (one, two, three):
        assert [row["name"] for row in node.swarm()["nodes"] if row["signer"]] == []
        assert names(node) == {"n1", "n2", "n3"}
    for node in (one, two):
        assert node.call("POST", "/api/swarm/invites", {}).status == 409
    wrong = Key()
    with pytest.raises(AssertionError, match="recovery"):
        recover(lab, three, wrong)
    recover(lab, three, paper)
    lab.wait_agreed([one, two, three])
    for node in (one, two, three):
        state = node.swarm()
        assert [row["name"] for row in state["nodes"] if row["signer"]] == ["n3"]
        assert state["swarm"]["epoch"] == 1 and names(node) == {"n1", "n2", "n3"}
    four = lab.node("n4")
    lab.admit(three, four)
    lab.wait_agreed([one, two, three, four])


def test_the_paper_key_outranks_a_thief_who_holds_the_only_signer(lab: Lab) -> None:
    paper, (one, two, three) = swarm_with_paper(lab, 3)
    swarm = one.swarm()["swarm"]["id"]
    stolen, member_key = signing_key(one), Key.from_seed(one.seed)
    one.kill()
    # The thief puts out whom he can.
    revoke = statement({"v": 1, "kind": "revoke", "swarm": swarm, "epoch": 0, "by": stolen.public.hex(),
                        "node": three.id, "reason": "mine now"}, stolen)  # fmt: skip
    assert push(lab, two, member_key, revoke).status == 200
    wait_until(lambda: "n3" not in names(two))  # the control: he can
    recover(lab, two, paper, without=["n1"], restore=[three.id])
    wait_until(lambda: names(three) == {"n2", "n3"} and names(two) == {"n2", "n3"})
    lab.wait_agreed([two, three])
    # Nothing of the old epoch counts any more, not even what was never shown.
    _, late = admit_by_hand(stolen, swarm, "late")
    with pytest.raises(OSError, match=r".*"):
        push(lab, two, member_key, late)
    assert push(lab, two, Key.from_seed(three.seed), late, revoke).status in {200, 400}
    assert names(two) == {"n2", "n3"}
    with pytest.raises(OSError, match=r".*"), as_member(lab.hosts["mallory"], three, member_key) as talk:
        talk.call("GET", "/swarm/word")


def test_a_copied_disk_raises_an_alarm_and_a_restart_does_not(lab: Lab) -> None:
    one, two, three = lab.swarm_of(3)
    three.restart()
    wait_until(lambda: one.sees(three) and two.sees(three))
    assert not one.row(three)["alarm"] and not two.row(three)["alarm"]
    three.kill()
    copy = lab.directory / "copy"
    shutil.copytree(three.state, copy, ignore=lambda *_: ["run", "log"])
    clone = LabNode(lab.host("thief"), copy)
    clone.id = three.id
    lab.nodes.append(clone)
    three.start()
    wait_until(lambda: one.sees(three))
    clone.start()

    def both_alarmed() -> bool:
        return all("cloned" in node.row(three)["alarm"] for node in (one, two))

    wait_until(both_alarmed, why=lambda: lab.story([one, two, three, clone]))
    said = one.host.run("sh", "-c", f".venv/bin/mycoswarmctl --socket {one.socket} nodes; true")
    assert "cloned" in said or "alarm" in said, said


def is_closed(one: LabNode, other: LabNode) -> bool:
    try:
        one.host.connect(other.host.ip, PORT).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_machine_that_left_comes_back_with_another_id(lab: Lab) -> None:
    one, two, three = lab.swarm_of(3)
    old = three.id
    three.ok("POST", "/api/swarm/leave", {})
    wait_until(lambda: names(one) == {"n1", "n2"} == names(two))
    wait_until(lambda: is_closed(two, three))
    lab.admit(one, three)
    assert three.id != old
    lab.wait_agreed([one, two, three])


def test_a_new_key_keeps_the_place_and_retires_the_old_one(lab: Lab) -> None:
    one, two = lab.swarm_of(2, engines=[2])
    old = Key.from_seed(two.seed)
    answer = two.ok("POST", "/api/swarm/rekey", {})
    assert answer["old"] == two.id != answer["id"]
    two.id = answer["id"]
    wait_until(lambda: one.sees(two.id), why=lambda: lab.story([one, two]))
    assert one.row(two.id)["name"] == "n2"
    one.answered("still there?")
    mallory = lab.host("mallory")
    with pytest.raises(OSError, match=r".*"), as_member(mallory, one, old) as talk:
        talk.call("GET", "/swarm/word")
