"""A machine with the package on it: installing, `mycoswarmctl`, a fake engine beside the node, a swarm."""

import json
import re
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.appliance.images import BUILD_S
from tests.appliance.machines import RUN_S, CommandFailed, Lab, Machine, Ran, Shell

ROOT = Path(__file__).parents[2]
ENGINE_PORT = 8000
SETTINGS = "/etc/mycoswarm/mycoswarm.toml"
POLICY = "/etc/mycoswarm/policy.toml"
STATE = "/var/lib/mycoswarm"
ENGINE_TABLE = f'\n[engines.fake]\nkind = "openai"\nurl = "http://127.0.0.1:{ENGINE_PORT}"\n'
NODE_API = (Path(__file__).parent / "node_api.py").read_text()
FINAL = frozenset({"succeeded", "failed", "cancelled", "expired", "parked"})


def build_deb(target: Path) -> Path:
    """Build the package from the working tree."""
    ran = subprocess.run(
        [str(ROOT / "packaging/build-deb"), str(target)], capture_output=True, text=True, timeout=BUILD_S
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return next(target.glob("mycoswarmd_*.deb"))


def repack(deb: Path, *, version: str) -> Path:
    """Return the same package under another version: apt upgrades to it."""
    tree, other = deb.parent / f"tree-{version}", deb.parent / f"mycoswarmd_{version}_all.deb"
    if not other.exists():
        subprocess.run(["dpkg-deb", "-R", str(deb), str(tree)], check=True)
        control = tree / "DEBIAN/control"
        control.write_text(re.sub(r"(?m)^Version: .*$", f"Version: {version}", control.read_text()))
        command = ["dpkg-deb", "--root-owner-group", "-b", str(tree), str(other)]
        subprocess.run(command, check=True, capture_output=True)
    return other


def installed_layer(lab: Lab, image: Path, deb: Path, *, suite: str) -> Path:
    """Return a layer above the image with the package installed on a machine that was never on."""
    home = lab.home / f"layer-{suite}"
    for part in ("disk", "work", "root"):
        (home / part).mkdir(parents=True)
    script = f"""
        mount -t overlay -o lowerdir={image},upperdir={home}/disk,workdir={home}/work overlay {home}/root
        mount -t proc proc {home}/root/proc
        mount -t tmpfs tmpfs {home}/root/run
        cp {deb} {home}/root/run/package.deb
        chroot {home}/root apt-get -o Dpkg::Use-Pty=0 install -y /run/package.deb
    """
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "DEBIAN_FRONTEND": "noninteractive",
        "LC_ALL": "C.UTF-8",
    }
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-euc", script],
        capture_output=True,
        text=True,
        env=environment,
        timeout=BUILD_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return home / "disk"


def apt(machine: Shell, *argv: str, check: bool = True) -> Ran:
    """Run apt-get on the machine."""
    options = ["-y", "-o", "Dpkg::Options::=--force-confold"]
    return machine.run("apt-get", *options, *argv, check=check, timeout_s=600)


def install(machine: Shell, deb: Path) -> Ran:
    """Install the package on a running machine, as a person does."""
    machine.write(f"/root/{deb.name}", deb.read_bytes())
    return apt(machine, "install", f"/root/{deb.name}")


def ctl(
    machine: Shell, *argv: str, check: bool = True, user: str | None = None, timeout_s: float = RUN_S
) -> Ran:
    """Run mycoswarmctl on the machine."""
    return machine.run("mycoswarmctl", *argv, check=check, user=user, timeout_s=timeout_s)


def ctl_json(machine: Shell, *argv: str, user: str | None = None, timeout_s: float = RUN_S) -> dict[str, Any]:
    """Run mycoswarmctl with --json and return what it prints."""
    ran = ctl(machine, *argv, "--json", user=user, timeout_s=timeout_s)
    value = json.loads(ran.out)
    assert isinstance(value, dict), ran
    return value


def node_api(machine: Shell, *words: str, timeout_s: float = RUN_S) -> Any:
    """Run node_api.py on the machine and return the JSON that it prints."""
    try:
        return json.loads(machine.run("python3", "-Ic", NODE_API, *words, timeout_s=timeout_s).out)
    except subprocess.TimeoutExpired:
        said = ctl(machine, "status", check=False)
        raise CommandFailed(f"on {machine.name}: not within {timeout_s} s: {words}; {said}") from None


def wait_ready(machine: Shell, *, within_s: float = RUN_S) -> None:
    """Wait until the node answers."""
    node_api(machine, "get", "/api/status", timeout_s=within_s)


def start_engine(machine: Shell, *, pause_s: float = 0.0) -> None:
    """Start the fake engine beside the node and declare it in the settings."""
    machine.push(ROOT / "tests/upstream.py", "/opt/fake/tests")
    machine.push(ROOT / "tests/appliance/fake_engine.py", "/opt/fake/tests/appliance")
    restart_engine(machine, pause_s=pause_s)
    text = machine.run("cat", SETTINGS, check=False).out
    if ENGINE_TABLE not in text:
        machine.write(SETTINGS, text + ENGINE_TABLE)


def boot_with_engine(machine: Machine) -> None:
    """Wait until a machine with the package is a node with an engine beside it."""
    machine.wait_booted()
    start_engine(machine)
    machine.run("systemctl", "restart", "mycoswarmd")
    wait_ready(machine)
    wait_served(machine)


def wait_served(machine: Shell, model: str = "ok") -> None:
    """Wait until the node knows who serves a model; engines come up behind it."""
    machine.wait_until(f"mycoswarmctl models | grep -q '^{model} '", within_s=RUN_S)


def proved(machine: Shell, *units: str) -> dict[str, Any]:
    """Return what the units have proved, once these were heard and none is in trouble.

    The node asks them when it is asked, and has less patience with them than a busy machine may need.
    """
    give_up_s = time.monotonic() + RUN_S
    while True:
        said: dict[str, Any] = ctl_json(machine, "status", "--security")["security"]
        missing = {*units} - {row["unit"] for row in said["proofs"]}
        troubled = [row for row in said["unheard"] if row["problem"] != "has not run yet"]
        if not missing and not troubled and said["cages"]["problem"] != "has not run yet":
            return said
        assert time.monotonic() < give_up_s, said
        time.sleep(0.5)


def enroll(machine: Shell, code: str) -> dict[str, Any]:
    """Have a machine join by a code; it looks for a swarm for five seconds, here as often as it takes."""
    give_up_s = time.monotonic() + RUN_S
    while True:
        ran = ctl(machine, "enroll", code, "--json", check=False)
        said: dict[str, Any] = json.loads(ran.out)
        if ran.code == 0:
            return said
        is_spent = said["error"]["code"] in {"invite-used", "invite-burnt"}
        assert not is_spent and time.monotonic() < give_up_s, ran


def restart_engine(machine: Shell, *, pause_s: float = 0.0) -> None:
    """Start the fake engine, its script from the beginning."""
    machine.sh("systemctl stop fake-engine 2>/dev/null || true; rm -f /tmp/asked")
    unit = ["systemd-run", "--quiet", "--unit=fake-engine", "--working-directory=/opt/fake"]
    machine.run(*unit, "python3", "-m", "tests.appliance.fake_engine", str(ENGINE_PORT), str(pause_s))
    machine.wait_until("test -e /tmp/asked")


def asked(machine: Shell) -> list[dict[str, Any]]:
    """Return the bodies of all requests that the fake engine got."""
    return [json.loads(line) for line in machine.run("cat", "/tmp/asked").out.splitlines()]


@dataclass(frozen=True)
class Swarm:
    """Three nodes: `one` founded the swarm, `two` has the engine, `three` is there to be put out."""

    one: Machine
    two: Machine
    three: Machine

    def __iter__(self) -> Any:
        return iter((self.one, self.two, self.three))


def in_parallel(*work: Any) -> list[Any]:
    """Do all of it at once: most of a boot or an installation is waiting."""
    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result() for future in [pool.submit(one) for one in work]]


def names(machine: Shell) -> set[str]:
    """Return the names of the members as this node knows them."""
    return {str(row["name"]) for row in ctl_json(machine, "nodes")["nodes"]}


def invite(machine: Shell, name: str) -> str:
    """Make a code for one newcomer."""
    return str(ctl_json(machine, "invite", "--no-wait", "--name", name)["code"])


def submit(machine: Shell, prompt: str, *argv: str) -> str:
    """Post a task for the model `agent`; return its id once it was acknowledged."""
    return ctl(machine, "submit", "--model", "agent", *argv, prompt).out.strip()


def wait_task(machine: Shell, task_id: str, *states: str, within_s: float = RUN_S) -> dict[str, Any]:
    """Wait until a task is in one of these states, else until it has ended, and return it."""
    task = node_api(machine, "wait", ",".join(states or FINAL), task_id, timeout_s=within_s)[task_id]
    assert isinstance(task, dict)
    return task


def wait_all_succeeded(machine: Shell, acknowledged: Sequence[str], *, within_s: float = 300) -> None:
    """Wait until every acknowledged task has ended: once, with success. The receipts are whole then."""
    node_api(machine, "wait", ",".join(FINAL), *acknowledged, timeout_s=within_s)
    steps = node_api(machine, "steps", *acknowledged)
    ends = {task: [step["to"] for step in steps[task] if step["to"] in FINAL] for task in acknowledged}
    others = {task: steps[task] for task in acknowledged if ends[task] != ["succeeded"]}
    assert others == {}, others
    ctl(machine, "audit", "verify")
