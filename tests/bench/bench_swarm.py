"""How fast the swarm is: joining, finding, losing and asking one another, over cables. Needs root."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.swarm.attackers.kit import Key, b64, statement
from tests.swarm.attackers.talk import Talk, as_member, client_context
from tests.swarm.lab import PORT, Lab, LabNode, read_seed, wait_until, why_not
from tests.swarm.laptop import Laptop

ANCHORS = 50
ASKED = 200
REST_S = 20


def run(directory: Path) -> None:
    """Print what people and programs wait for, beside its budget."""
    del directory
    if reason := why_not():
        print(f"left out: {reason}")
        return
    rows: list[tuple[str, float, float]] = []
    with Lab() as lab:
        rows += _joining(lab)
    with Lab() as lab:
        rows += _asking(lab)
    with Lab() as lab:
        rows += _ten(lab)
    print(f"{'what':<52} {'measured':>9} {'budget':>8}")
    for name, value, budget in rows:
        print(f"{name:<52} {value:>9.1f} {budget:>8.1f}")


def _ctl(node: LabNode, *words: str) -> float:
    """Run a command on a machine; returns milliseconds."""
    command = [sys.executable, "-m", "mycoswarmd.ctl.main", "--socket", str(node.socket), *words]
    begun_s = time.perf_counter()
    subprocess.run([*node.host.prefix, *command], check=True, capture_output=True)
    return (time.perf_counter() - begun_s) * 1000


def _until(what: Callable[[], object]) -> float:
    begun_s = time.perf_counter()
    wait_until(what, within_s=30, every_s=0.005)
    return (time.perf_counter() - begun_s) * 1000


def _joining(lab: Lab) -> list[tuple[str, float, float]]:
    one, two = lab.node("n1", engine=True), lab.node("n2")
    one.wait_for_models()
    lab.found(one)
    code = one.invite()
    typed_ms = _ctl(two, "enroll", code)
    asked_ms = _until(lambda: two.ask("hello").status == 200)
    two.id = two.swarm()["self"]["id"]
    lab.wait_agreed([one, two])
    two.restart()
    known_ms = _until(lambda: one.sees(two))
    two.kill()
    killed_ms = _until(lambda: not one.sees(two))
    two.start()
    wait_until(lambda: one.sees(two), within_s=15)
    lab.unplug(two.host)
    silent_ms = _until(lambda: not one.sees(two))
    return [
        ("enrolment, code typed to first prompt, ms", typed_ms + asked_ms, 3000),
        ("a member is known after its daemon is ready, ms", known_ms, 1000),
        ("a member is given up after its daemon died, ms", killed_ms, 5000),
        ("a member is given up after its cable was pulled, ms", silent_ms, 5000),
    ]


def _asking(lab: Lab) -> list[tuple[str, float, float]]:
    one, two = lab.swarm_of(2, engines=[2])
    two.wait_for_models()
    mallory, key = lab.host("prober"), Key()
    _admit_many(lab, one, key)
    wait_until(lambda: two.row(key.node_id), within_s=30)
    times_ms = [_handshake_ms(lab, two, key) for _ in range(40)]
    with as_member(mallory, two, key) as talk:
        words_ms = [_timed(lambda: talk.call("GET", "/swarm/word")) for _ in range(ASKED)]
    for node in (one, two):
        node.ask("warm")
    there_ms = statistics.median(_timed(lambda: one.ask("hello")) for _ in range(ASKED))
    here_ms = statistics.median(_timed(lambda: two.ask("hello")) for _ in range(ASKED))
    return [
        (f"TLS handshake with {ANCHORS} members, p50 ms", statistics.median(times_ms), 15),
        ("a request on a kept connection, p50 ms", statistics.median(words_ms), 3),
        ("a prompt to this node's engine, p50 ms", here_ms, 0),
        ("a prompt to another node's engine, p50 ms", there_ms, 0),
        ("added by the way to the other node, p50 ms", there_ms - here_ms, 3),
    ]


def _admit_many(lab: Lab, signer: LabNode, *wanted: Key) -> None:
    """Fill a roster with the signer's own key: enrolling so many takes a minute."""
    (path,) = signer.state.rglob("signer.key")
    signing = Key.from_seed(read_seed(path))
    swarm = signer.swarm()["swarm"]["id"]
    admits = [
        statement(
            {"v": 1, "kind": "admit", "swarm": swarm, "epoch": 0, "by": signing.public.hex(),
             "cert": b64(key.certificate()), "name": f"m{index}", "role": "operator"}, signing)
        for index, key in enumerate((*wanted, *(Key() for _ in range(ANCHORS - 2 - len(wanted)))))
    ]  # fmt: skip
    member = next(node for node in lab.nodes if node is not signer)
    with as_member(lab.hosts["prober"], signer, Key.from_seed(member.seed)) as talk:
        assert talk.call("POST", "/swarm/sync", {"have": [], "statements": admits}).status == 200


def _handshake_ms(lab: Lab, node: LabNode, key: Key) -> float:
    context = client_context(key)
    sock = lab.hosts["prober"].connect(node.host.ip, PORT)
    begun_s = time.perf_counter()
    with Talk(sock, context, server_name=f"{node.id}.mycoswarm.internal") as talk:
        elapsed_ms = (time.perf_counter() - begun_s) * 1000
        talk.call("GET", "/v1/models")
    time.sleep(0.05)
    return elapsed_ms


def _timed(act: Callable[[], object]) -> float:
    begun_s = time.perf_counter()
    act()
    return (time.perf_counter() - begun_s) * 1000


def _ten(lab: Lab) -> list[tuple[str, float, float]]:
    nodes = lab.swarm_of(10)
    status_ms = statistics.median(_ctl(nodes[0], "status") for _ in range(5))
    nodes_ms = statistics.median(_ctl(nodes[0], "nodes") for _ in range(5))
    with tempfile.TemporaryDirectory() as home:
        laptop = Laptop(lab.host("laptop"), Path(home))
        laptop.ok("enroll", "--operator", nodes[0].invite(role="operator", name="anna"))
        laptop.ok("--node", "n7", "status")  # now it has addresses to try
        afar_ms = statistics.median(_timed(lambda: laptop.ok("--node", "n7", "status")) for _ in range(5))
    percent, sent_bytes = cost_at_rest(nodes, REST_S)
    return [
        ("mycoswarmctl status with ten nodes, ms", status_ms, 300),
        ("the same from a laptop, asking one of them, ms", afar_ms, 300),
        ("mycoswarmctl nodes with ten nodes, ms", nodes_ms, 300),
        ("processor of each of ten nodes at rest, %", percent, 0.3),
        ("sent by each of ten nodes at rest, bytes/s", sent_bytes, 0),
    ]


def cost_at_rest(nodes: list[LabNode], seconds: float) -> tuple[float, float]:
    """Return processor time in percent of a core, and bytes sent a second, of one node when nobody asks."""
    time.sleep(5)
    cpu_s, sent = sum(map(_cpu_s, nodes)), sum(map(_sent_bytes, nodes))
    begun_s = time.monotonic()
    time.sleep(seconds)
    elapsed_s = (time.monotonic() - begun_s) * len(nodes)
    return (
        (sum(map(_cpu_s, nodes)) - cpu_s) / elapsed_s * 100,
        (sum(map(_sent_bytes, nodes)) - sent) / elapsed_s,
    )


def _cpu_s(node: LabNode) -> float:
    """Processor time of a daemon and of its discovery process."""
    pids = [node.pid]
    for task in Path(f"/proc/{node.pid}/task").iterdir():
        pids += [int(pid) for pid in (task / "children").read_text().split()]
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _sent_bytes(node: LabNode) -> int:
    (line,) = [line for line in node.host.run("cat", "/proc/net/dev").splitlines() if "eth0" in line]
    return int(line.partition(":")[2].split()[8])
