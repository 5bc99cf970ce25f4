"""The networks that homes have: same names, new addresses, no IPv4, no multicast, a hostile multicast."""

import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.swarm.attackers.enrol import Newcomer
from tests.swarm.attackers.mdns import announcement, flood, garbage
from tests.swarm.lab import PORT, Lab, LabNode, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300), pytest.mark.xdist_group("swarm-networks")]
CTL = (sys.executable, "-m", "mycoswarmd.ctl.main")


def pair(lab: Lab, *, settings: str = "", **machine: object) -> tuple[LabNode, LabNode]:
    """Return two members; the second one has a model."""
    one, two = lab.swarm_of(2, engines=[2], settings=settings, **machine)
    return one, two


def test_two_machines_that_are_both_called_raspberrypi(lab: Lab) -> None:
    hosts = [lab.host(name, hostname="raspberrypi") for name in ("a", "b", "c")]
    first, second, third = (
        lab.node(host.name, host=host, engine=index > 0) for index, host in enumerate(hosts)
    )
    lab.found(first)
    lab.admit(first, second)
    lab.admit(first, third)
    lab.wait_agreed([first, second, third])
    names = [row["name"] for row in first.swarm()["nodes"]]
    assert len(set(names)) == 3 and "raspberrypi" in names and all("raspberrypi" in name for name in names)
    others = set(names) - {first.row(first.id)["name"]}
    assert first.answered("who are you?").headers["X-Mycoswarm-Node"] in others
    # Where nobody could know, both are told apart by their ids.
    first.ok("POST", "/api/swarm/signers", {"node": second.id})
    wait_until(lambda: second.row(second.id)["signer"])
    mallory = lab.host("mallory")
    lab.partition([first.host], [second.host, mallory])
    there = Newcomer.with_code(second.invite(), name="pi")
    assert there.run(mallory, second.host.ip).status == 200
    lab.partition([first.host, mallory], [second.host])
    here = Newcomer.with_code(first.invite(), name="pi")
    assert here.run(mallory, first.host.ip).status == 200
    lab.heal()
    lab.wait_agreed([first, second, third])
    shown = {row["name"] for row in first.swarm()["nodes"]} - set(names)
    assert shown == {f"pi~{one.key.node_id[:4]}" for one in (here, there)}


def test_a_machine_that_gets_another_address(lab: Lab) -> None:
    one, two = pair(lab, ipv6=False)
    lab.move(two.host, "10.77.9.9")
    wait_until(lambda: "10.77.9.9" in str(one.row(two)["address"]) and one.sees(two))
    one.answered("found you?")


def test_nothing_but_link_local_ipv6(lab: Lab) -> None:
    one, two = (lab.node(name, engine=name == "n2", ipv4=False) for name in ("n1", "n2"))
    lab.found(one)
    two.enroll(one.invite(), f"[{one.host.link_local}%eth0]:{PORT}")
    lab.wait_agreed([one, two])
    one.answered("without IPv4?")
    three = lab.node("n3", ipv4=False)
    three.enroll_nearby(one.invite())
    lab.wait_agreed([one, two, three])


def test_two_members_behind_one_address(lab: Lab) -> None:
    one = lab.node("n1")
    box = lab.host("box")
    two = lab.node("n2", host=box, engine=True)
    three = lab.node("n3", host=box, settings='swarm_listen = "[::]:7439"\nlisten = "none"')
    lab.found(one)
    lab.admit(one, two)
    lab.admit(one, three)
    lab.wait_agreed([one, two, three])
    assert str(one.row(two)["address"]).endswith(":7437")
    assert str(one.row(three)["address"]).endswith(":7439")
    assert {row["name"] for row in one.swarm()["nodes"]} == {"n1", "box", "box-2"}
    assert one.answered("which one?").headers["X-Mycoswarm-Node"] == "box"


def test_one_host_name_for_two_machines(lab: Lab) -> None:
    one, two = lab.node("n1"), lab.node("n2")
    dead = lab.host("dead")
    lab.found(one)
    table = lab.directory / "hosts"
    table.write_text(f"127.0.0.1 localhost\n{dead.ip} swarm.home\n{one.host.ip} swarm.home\n")
    Path("/etc/hosts").touch()  # the smallest installations have none to mount over
    two.host.run("mount", "--bind", str(table), "/etc/hosts")
    code = one.invite()
    said = two.host.run(*CTL, "--socket", str(two.socket), "enroll", code, "--address", "swarm.home")
    assert "n1" in said
    two.id = two.swarm()["self"]["id"]
    lab.wait_agreed([one, two])
    # A name in the settings is refused where it stands: who answers to it is not what was written.
    three = lab.node("n3", start=False, settings='peers = ["swarm.home"]')
    three.start(wait=False)
    assert three.wait_exit() != 0
    assert "swarm.home" in three.log() and "numbers" in three.log()


def test_static_peers_where_multicast_is_swallowed(lab: Lab) -> None:
    silent: dict[str, Any] = {"multicast": False, "ipv6": False}
    one = lab.node("n1", settings='discovery = false\npeers = ["10.77.0.2"]', **silent)
    two = lab.node("n2", engine=True, settings='discovery = false\npeers = ["10.77.0.1"]', **silent)
    lab.found(one)
    with lab.capture() as cable:
        lab.admit(one, two)
        lab.wait_agreed([one, two])
        one.answered("by hand?")
        one.restart()
        two.restart()
        lab.wait_agreed([one, two])
    one.answered("still?")
    assert cable.frames and not cable.tshark("-Y", "mdns")


def test_an_unknown_code_and_nobody_there_are_said_plainly(lab: Lab) -> None:
    alone = lab.node("n1")
    answer = alone.call("POST", "/api/swarm/enroll", {"code": "79D96-8QGKT-TQ75Z-9H5C1-5", "addresses": []})
    assert answer.status in {400, 503} and "cannot" in answer.json["error"]["message"]
    answer = alone.call("POST", "/api/swarm/enroll", {"code": "nonsense", "addresses": ["10.77.0.9"]})
    assert answer.status == 400 and answer.json["error"]["code"] == "bad-code"


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_prompts_cross_while_multicast_is_flooded_with_garbage(lab: Lab) -> None:
    one, two = pair(lab)
    mallory = lab.host("mallory")
    seed = time.time_ns()
    print("seed", seed)
    fakes = [
        announcement(f"{index:026d}".translate(str.maketrans("0189", "abcd")), mallory.ip, txt={"v": "1"})
        for index in range(300)
    ]
    packets = [*garbage(600, seed), *fakes]
    before = resident_bytes(one.pid)
    with flood(mallory, packets, per_second=1000) as sent:
        wait_until(lambda: sent[0] > 500)
        for _ in range(10):
            one.answered("still there?")
        # Somebody new is found in the middle of it.
        newcomer = Newcomer.with_code(one.invite(), name="n3")
        assert newcomer.run(mallory, one.host.ip).status == 200
        assert sent[0] > 500
    one.answered("and after?")
    assert resident_bytes(one.pid) - before < 40 << 20
    assert one.swarm()["swarm"]["problems"] == []
    three = lab.node("n4")
    three.enroll_nearby(one.invite())  # which works again
    lab.wait_agreed([one, two, three])


def test_the_cable_is_pulled_in_the_middle_of_an_answer(lab: Lab) -> None:
    one, two = pair(lab)
    took_s = []
    for _ in range(3):  # a busy machine may hold up the one or the other try
        took_s.append(cut_off_s(lab, one, two))
        if took_s[-1] < 7:
            break
    assert min(took_s) < 7, took_s


def cut_off_s(lab: Lab, one: LabNode, two: LabNode) -> float:
    """Pull the cable in the middle of an answer and put it back; return how long it took to be noticed."""
    gone: list[float] = []
    before = two.book.count("slow")

    def pull() -> None:
        wait_until(lambda: two.book.count("slow") > before)
        lab.unplug(two.host)
        gone.append(time.monotonic())

    thread = threading.Thread(target=pull)
    thread.start()
    answer = one.ask("count", model="slow")
    ended_s = time.monotonic()
    thread.join()
    assert answer.status in {502, 503, 504}, answer.body
    wait_until(lambda: one.row(two)["state"] == "unreachable")
    assert one.ask("again").status in {404, 503}
    lab.plug(two.host)
    wait_until(lambda: one.sees(two))
    one.answered("again")
    return ended_s - gone[0]
