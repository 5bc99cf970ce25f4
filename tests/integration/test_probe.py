"""Graphics cards as the core learns of them: from a probe that answers; one in trouble costs nothing."""

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mycoswarmd.daemon.gpuwatch import GpuWatch
from mycoswarmd.daemon.outside import PROBE_MODULE
from mycoswarmd.fleet.discovery import OutpostProcess
from mycoswarmd.sandbox.outpost import connect_outpost, start_outpost
from mycoswarmd.wire.probing import LINE_BYTES, Gpu, Gpus, Reading, encode_report
from mycoswarmd.wire.proof import EXPECTED, Check, Proof, Unit
from tests.cores import accepting, appliance
from tests.integration.apis import Clock
from tests.integration.test_appliance_core import SAYS_HELLO, engine_settings
from tests.nodes import until
from tests.upstream import upstream

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
QUIET = "managed_engine = false\ndiscovery = false\n"
CARD = Gpu(name="NVIDIA GeForce RTX 3090", memory_bytes=24 << 30, temperature_c=40)
ANSWER = Gpus(reading=Reading.READ, found=(CARD,), driver="550.163.01", detail="1 found")
NO_DRIVER = Gpus(reading=Reading.NO_DRIVER, detail="no NVIDIA driver")


def proof_of(unit: Unit) -> bytes:
    return encode_report(Proof(unit, tuple(Check(name, ok=True) for name in EXPECTED[unit])))


def program(*lines: bytes, then: str = "pass") -> str:
    said = b"".join(lines)
    return f"import os, signal, sys, time\nsys.stdout.buffer.write({said!r})\nsys.stdout.flush()\n{then}\n"


PROOF = proof_of(Unit.PROBE)
GOOD = program(PROOF, encode_report(ANSWER))
LIE = encode_report(ANSWER).replace(str(24 << 30).encode(), str(2**63).encode())
# What it does, and what the core says of that.
TROUBLE = {
    "crashes": (program(PROOF, then="os.kill(os.getpid(), signal.SIGSEGV)"), "ended without an answer"),
    "ends": (program(), "ended without an answer"),
    "ends in a line": (program(PROOF, encode_report(ANSWER)[:-1]), "ended without an answer"),
    "starts slowly": (program(then="time.sleep(60)"), "did not start within"),
    "hangs": (program(PROOF, then="time.sleep(60)"), "said nothing for"),
    "hangs for ever": (
        program(PROOF, then="signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32)); time.sleep(60)"),
        "said nothing for",
    ),
    "lies": (program(PROOF, LIE), "says what cannot be"),
    "talks": (program(PROOF, PROOF, encode_report(ANSWER)), "says what cannot be"),
    "has no end": (program(PROOF, b"x" * (1 << 20)), "no end"),
    "speaks binary": (program(bytes(range(256)), b"\n"), "says what cannot be"),
}


class Probe:
    """A socket with a program behind it, and the core's side of it."""

    def __init__(self, path: Path) -> None:
        self.socket = path / "probe.sock"
        self.script = path / "probe.py"
        self.clock = Clock()
        self.proofs: list[Proof] = []
        self.watch = GpuWatch(self.start, clock=self.clock, proved=self.proofs.append, within_s=60.0)
        self.starts = 0

    async def start(self) -> OutpostProcess:
        self.starts += 1
        return await connect_outpost(self.socket, line_bytes=LINE_BYTES)

    def look(self, source: str, *, within_s: float = 60.0) -> Gpus:
        self.watch._within_s = within_s
        self.script.write_text(source)
        with accepting(self.socket, (sys.executable, "-I", str(self.script))):
            found = asyncio.run(self.watch.look())
        self.socket.unlink()
        return found


@pytest.fixture
def probe(tmp_path: Path) -> Probe:
    return Probe(tmp_path)


@pytest.mark.parametrize("trouble", TROUBLE)
def test_a_probe_in_trouble_costs_an_answer_and_says_why(probe: Probe, trouble: str) -> None:
    source, said = TROUBLE[trouble]
    started_s = time.monotonic()
    found = probe.look(source, within_s=1.0)
    if said not in found.detail:  # on a machine that is busy it has not even begun by then
        found = probe.look(source, within_s=15.0)
    assert (found.reading, found.found) == (Reading.UNHEARD, ())
    assert said in found.detail
    assert probe.watch.gpus == found
    assert "graphics cards are unknown: " in probe.watch.problem()
    assert probe.watch.problem().isprintable() and len(probe.watch.problem()) < 400
    assert time.monotonic() - started_s < 50  # it would sleep for a minute
    assert probe.look(GOOD) == ANSWER  # the next one is heard
    assert (probe.watch.gpus, probe.watch.problem()) == (ANSWER, "")


def test_one_miss_takes_back_nothing_and_two_do(probe: Probe) -> None:
    changes: list[int] = []
    probe.watch.on_change = lambda: changes.append(len(probe.watch.gpus.found))
    probe.look(GOOD)
    probe.look(TROUBLE["crashes"][0])
    assert probe.watch.gpus == ANSWER
    probe.look(GOOD)
    probe.look(TROUBLE["crashes"][0])
    assert probe.watch.gpus == ANSWER
    probe.look(TROUBLE["crashes"][0])
    assert probe.watch.gpus.reading is Reading.UNHEARD
    assert changes == [1, 0]
    # That there is none is an answer, and believed at once.
    probe.look(GOOD)
    probe.look(program(PROOF, encode_report(NO_DRIVER)))
    assert probe.watch.gpus == NO_DRIVER


def test_a_probe_proves_only_of_itself(probe: Probe) -> None:
    assert probe.look(program(proof_of(Unit.CORE), encode_report(ANSWER))) == ANSWER
    assert probe.proofs == []
    probe.look(GOOD)
    assert [one.unit for one in probe.proofs] == [Unit.PROBE]


def test_where_there_is_no_probe_nothing_is_known_and_nothing_is_wrong(probe: Probe) -> None:
    asyncio.run(probe.watch.look())
    assert probe.watch.gpus.reading is Reading.UNHEARD
    assert probe.watch.problem() == ""  # masked, perhaps
    probe.socket.touch()
    asyncio.run(probe.watch.look())
    assert "cannot start mycoswarm-probe" in probe.watch.problem()


def test_it_is_asked_once_and_again_only_for_who_looks_after_a_minute(probe: Probe) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            watching = group.create_task(probe.watch.run())
            while probe.watch.gpus != ANSWER:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            probe.watch.want()  # just read
            await asyncio.sleep(0.1)
            assert probe.starts == 1
            probe.clock.ahead_s += 60
            probe.watch.want()
            while probe.starts < 2:
                await asyncio.sleep(0.01)
            watching.cancel()

    probe.script.write_text(GOOD)
    with accepting(probe.socket, (sys.executable, "-I", str(probe.script))):
        asyncio.run(scenario())


def test_who_looks_while_a_probe_hangs_does_not_start_another(probe: Probe) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            watching = group.create_task(probe.watch.run())
            while probe.watch.gpus.reading is not Reading.UNHEARD:
                probe.watch.want()
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            assert probe.starts == 1
            watching.cancel()

    probe.watch._within_s = 1.0
    probe.script.write_text(TROUBLE["hangs"][0])
    with accepting(probe.socket, (sys.executable, "-I", str(probe.script))):
        asyncio.run(scenario())


async def test_without_systemd_the_same_program_is_a_child() -> None:
    proofs: list[Proof] = []

    async def start() -> OutpostProcess:
        return await start_outpost(PROBE_MODULE, line_bytes=LINE_BYTES)

    watch = GpuWatch(start, clock=Clock(), proved=proofs.append)
    found = await watch.look()
    assert found.is_known is (found.reading in {Reading.READ, Reading.NO_DRIVER})
    assert found.reading is not Reading.UNHEARD, found
    assert [one.unit for one in proofs] == [Unit.PROBE]
    # Where there is no driver, not even that is started.
    nothing = GpuWatch(None, clock=Clock(), proved=proofs.append)
    assert (await nothing.look()).reading is Reading.NO_DRIVER


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_the_node_has_the_tier_of_its_card_and_survives_its_probe(tmp_path: Path) -> None:
    script = tmp_path / "probe.py"
    script.write_text(GOOD)
    policy = """
schema = 1
name = "test"
[[rule]]
id = "all"
why = "the owner does everything here"
effect = "allow"
action = ["admin"]
[[rule]]
id = "large"
why = "prompts are for machines with a large card"
effect = "allow"
action = ["infer"]
tier = ["executive"]
"""
    with (
        upstream() as engine,
        appliance(tmp_path / "node", QUIET + engine_settings(engine), policy, started=False) as core,
        accepting(core.outposts / "probe.sock", (sys.executable, "-I", str(script))),
    ):

        def status(reading: str) -> dict[str, Any]:
            give_up_s = time.monotonic() + 60
            while True:
                found: dict[str, Any] = core.call("GET", "/api/status").json
                if found["host"]["gpu_reading"]["result"] == reading:
                    return found
                assert time.monotonic() < give_up_s, found
                time.sleep(0.02)

        def doctor() -> dict[str, Any]:
            rows = core.call("GET", "/api/doctor").json["checks"]
            return next(row for row in rows if row["name"] == "gpu")

        def prompted() -> int:
            until(lambda: core.call("GET", "/api/models").json["models"])
            return core.call("POST", "/v1/chat/completions", SAYS_HELLO).status

        core.start()
        healthy = status("read")
        assert prompted() == 200
        assert healthy["host"]["tier"] == "executive"
        assert healthy["host"]["gpus"][0]["name"] == CARD.name
        assert doctor() == {
            "name": "gpu",
            "ok": True,
            "severity": "ok",
            "detail": "NVIDIA GeForce RTX 3090, 24576 MiB; driver 550.163.01",
            "fix": "",
        }
        assert "probe" in {one["unit"] for one in core.call("GET", "/v1/security").json["proofs"]}
        assert "graphics card: NVIDIA GeForce RTX 3090, 24576 MiB, driver 550.163.01" in core.log()
        core.stop()
        script.write_text(TROUBLE["lies"][0])
        core.start()
        broken = status("unheard")
        assert broken["host"]["tier"] not in {"executive", "specialist", "worker"}
        assert any("graphics cards are unknown: the probe says" in one for one in broken["problems"])
        assert broken["state"] == "yellow"
        assert prompted() == 403  # the policy is asked about the tier that is known
        assert "mycoswarm-probe.socket" in str(doctor()["fix"])
        assert "Traceback" not in core.log()
