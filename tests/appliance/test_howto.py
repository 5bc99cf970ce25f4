"""On booted machines: what `doctor` says is so, its cures cure, and two how-tos work as they are written."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.appliance.conftest import Images
from tests.appliance.machines import SOON_S, Lab, Machine
from tests.appliance.nodes import Swarm, ctl, ctl_json, names, wait_ready

pytestmark = pytest.mark.timeout(1200)

HOWTO = Path(__file__).parents[2] / "docs" / "howto"
# Listens as OLLAMA_HOST says; whoever asks hears whether it could send something to the outside.
OLLAMA = """
import errno, os, socket
host, _, port = os.environ.get("OLLAMA_HOST", "127.0.0.1:11434").partition(":")
server = socket.create_server((host, int(port or 11434)))
while True:
    caller = server.accept()[0]
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("198.51.100.7", 9))
        said = "sent"
    except OSError as exc:
        said = errno.errorcode[exc.errno]
    try:
        caller.sendall(said.encode())
        caller.close()
    except OSError:
        pass
"""
UNIT = "[Service]\nExecStart=/usr/bin/python3 /usr/local/bin/ollama\nEnvironment=OLLAMA_HOST=0.0.0.0:11434\n"
ASK = (
    "import socket; s = socket.create_connection(({host!r}, 11434), timeout=30); print(s.recv(100).decode())"
)


def block(page: str, kind: str) -> str:
    (found,) = re.findall(
        rf"^```{kind}\n(.*?)^```", (HOWTO / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL
    )
    return str(found)


def checks(machine: Machine, *argv: str) -> dict[str, dict[str, Any]]:
    """Run doctor; its exit status must say whether something is broken."""
    ran = ctl(machine, "doctor", "--json", *argv, check=False)
    rows = {row["name"]: row for row in json.loads(ran.out)["checks"]}
    assert ran.code == any(row["severity"] == "broken" for row in rows.values()), ran
    return rows


def bad(machine: Machine) -> dict[str, str]:
    return {name: row["severity"] for name, row in checks(machine).items() if row["severity"] != "ok"}


def cure(machine: Machine, name: str) -> None:
    """Do what doctor says, word for word, as root."""
    machine.sh(checks(machine)[name]["fix"].replace("sudo ", ""))


@pytest.fixture(scope="module")
def patient(appliance_lab: Lab, images: Images) -> Iterator[Machine]:
    machine = appliance_lab.machine("reader", *images.node_trixie)
    machine.wait_booted()
    wait_ready(machine)
    yield machine
    machine.pull_plug()


def test_a_stopped_node_and_a_masked_unit_are_said_and_mended(patient: Machine) -> None:
    before = bad(patient)
    assert "node" not in before and "units" not in before
    patient.run("systemctl", "stop", "mycoswarmd.socket", "mycoswarmd.service")
    patient.run("systemctl", "mask", "--now", "mycoswarm-task.socket")
    said = bad(patient)
    assert (said["node"], said["units"]) == ("broken", "broken")
    cure(patient, "units")
    cure(patient, "node")
    wait_ready(patient)
    give_up_s = time.monotonic() + SOON_S
    while not bad(patient).items() <= before.items():  # what it was too early for may have come meanwhile
        assert time.monotonic() < give_up_s, (bad(patient), before)


def test_an_ollama_for_everybody_is_found_and_brought_home(patient: Machine, swarm: Swarm) -> None:
    patient.write("/usr/local/bin/ollama", OLLAMA)
    patient.write("/etc/systemd/system/ollama.service", UNIT)
    patient.sh("systemctl daemon-reload && systemctl start ollama")
    patient.wait_until("python3 -c '" + ASK.format(host="127.0.0.1").replace("'", '"') + "'")
    assert swarm.one.python(ASK.format(host=patient.address)).out.strip() == "sent"
    assert checks(patient)["exposed: Ollama"]["severity"] == "broken"

    cure(patient, "exposed: Ollama")
    assert patient.run("cat", "/etc/systemd/system/ollama.service.d/at-home.conf").out == block(
        "ollama", "ini"
    )
    patient.wait_until("python3 -c '" + ASK.format(host="127.0.0.1").replace("'", '"') + "'")
    assert "exposed: Ollama" not in checks(patient)
    assert patient.python(ASK.format(host="127.0.0.1")).out.strip() == "EPERM"
    assert swarm.one.python(ASK.format(host=patient.address), check=False).code != 0


def test_a_prepared_disk_joins_the_swarm_at_its_first_start(
    appliance_lab: Lab, images: Images, swarm: Swarm
) -> None:
    code = str(ctl_json(swarm.one, "invite", "--name", "imaged", "--ttl", "24h", "--no-wait")["code"])
    machine = appliance_lab.machine("prepared", *images.node_bookworm)
    machine.wait_booted()
    machine.write("/etc/credstore/mycoswarm.enroll", f"{code}\n", mode=0o600)
    machine.write("/etc/systemd/system/mycoswarm-enroll.service", block("imaging", "ini"))
    machine.run("systemctl", "enable", "mycoswarmd.service", "mycoswarm-enroll.service")
    assert "imaged" not in names(swarm.one)
    machine.reboot()
    machine.wait_booted()
    # It tries each half minute.
    machine.wait_until("mycoswarmctl nodes --json | grep -q imaged", within_s=240)
    machine.wait_until("! test -e /etc/credstore/mycoswarm.enroll")
    assert "imaged" in names(swarm.one)
    assert code not in machine.journal()
    # Started again, there is nothing left to do, and that is no failure.
    machine.reboot()
    machine.wait_booted()
    wait_ready(machine)
    assert machine.run("systemctl", "is-failed", "mycoswarm-enroll", check=False).out.strip() == "inactive"
    machine.pull_plug()
    ctl(swarm.one, "revoke", "imaged", "--yes")  # other tests look at all that is in the swarm


def test_a_backup_comes_back_as_the_page_says(patient: Machine) -> None:
    ctl(patient, "init", "--name", "den", "--yes-i-wrote-it-down")
    before = ctl_json(patient, "nodes")["nodes"]
    ctl(patient, "backup", "/root/study-pc.tar")
    page = (HOWTO / "backup.md").read_text()
    (commands,) = (
        block
        for block in re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        if "systemctl stop" in block
    )
    patient.run("systemctl", "stop", "ollama", check=False)
    patient.sh("set -e\n" + commands.replace("sudo ", "").replace("/mnt/usb/", "/root/"))
    wait_ready(patient)
    after = ctl_json(patient, "nodes")["nodes"]
    assert [(row["id"], row["name"]) for row in after] == [(row["id"], row["name"]) for row in before]
    # It still is a signer, and can write what it has to.
    assert ctl_json(patient, "invite", "--no-wait")["code"]
    ctl(patient, "audit", "verify")
