"""The node without the Debian package, on a booted machine: pipx, `service install`, its life, its end.

The machine has no network. pip finds wheels in a directory, as the machine's own /etc/pip.conf tells it; the
wheels of libraries are those of packaging/lock.txt, fetched for the machine's Python.
"""

import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.appliance.conftest import Images
from tests.appliance.images import CACHE
from tests.appliance.machines import Lab, Machine, Ran
from tests.appliance.nodes import (
    ROOT,
    STATE,
    apt,
    ctl,
    ctl_json,
    in_parallel,
    install,
    proved,
    start_engine,
    submit,
    wait_ready,
    wait_task,
)

pytestmark = pytest.mark.timeout(1200)
PYTHON = "3.13"  # of Debian 13
WHEELS = "/opt/wheels"
CTL = "/home/alice/pipx/bin/mycoswarmctl"
NEWER = "0.1.99"
_LOCK = ROOT / "packaging/lock.txt"
_PIP_S = 600
_LEFT = re.compile(r"^/(home/alice/pipx|opt/wheels|opt/fake|root|proc|sys|var/log/journal|tmp)\b")


@dataclass(frozen=True)
class Installed:
    """A machine with the node as a service, and what was said while it became one."""

    machine: Machine
    said: str

    def service(self, *argv: str, check: bool = True) -> Ran:
        """Run `mycoswarmctl service` of the user's environment, as sudo does."""
        return self.machine.run(CTL, "service", *argv, check=check, timeout_s=_PIP_S)


def _pip(*argv: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *argv]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_S)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def _libraries() -> Path:
    """Return a directory with the wheels of the lock; they are fetched once."""
    home = CACHE / f"wheels-{hashlib.sha256(_LOCK.read_bytes() + PYTHON.encode()).hexdigest()[:12]}"
    if not home.exists():
        new = CACHE / f"{home.name}.new"
        shutil.rmtree(new, ignore_errors=True)
        platforms = [f"--platform=manylinux_2_{n}_{platform.machine()}" for n in (17, 26, 28, 31, 34, 39)]
        target = ["--python-version", PYTHON, "--implementation=cp", "--only-binary=:all:", *platforms]
        _pip("download", "--require-hashes", "-r", str(_LOCK), *target, "--dest", str(new))
        new.rename(home)
    return home


def _wheel(target: Path) -> None:
    """Build the project's wheel, and one of a later version."""
    later = target / "source"
    shutil.copytree(ROOT, later, ignore=shutil.ignore_patterns(".*", "build", "tests", "__pycache__"))
    _pip("wheel", "--no-deps", "--wheel-dir", str(target / "wheels"), str(ROOT))
    about = later / "mycoswarmd/__init__.py"
    text = about.read_text()
    about.write_text(re.sub(r'__version__ = "[^"]+"', f'__version__ = "{NEWER}"', text))
    assert about.read_text() != text
    _pip("wheel", "--no-deps", "--wheel-dir", str(target / "later"), str(later))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with two: `wheels`, which is all that pip needs, and `later`, with a newer node."""
    top = tmp_path_factory.mktemp("service")
    libraries, _ = in_parallel(_libraries, lambda: _wheel(top))
    for path in libraries.iterdir():
        shutil.copy(path, top / "wheels")
    return top


@pytest.fixture(scope="module")
def installed(appliance_lab: Lab, images: Images, wheels: Path) -> Iterator[Installed]:
    """A machine on which a user has the node in an environment of their own, and root made it a service."""
    machine = appliance_lab.machine("piper", images.trixie)
    machine.wait_booted()
    machine.push(wheels / "wheels", "/opt")
    machine.write("/etc/pip.conf", f"[global]\nno-index = true\nfind-links = {WHEELS}\n")
    machine.run("python3", "-m", "venv", "/home/alice/pipx", user="alice")
    machine.run("/home/alice/pipx/bin/pip", "install", "-q", "mycoswarmd", user="alice", timeout_s=_PIP_S)
    done = machine.run(CTL, "service", "install", timeout_s=_PIP_S)
    wait_ready(machine)
    start_engine(machine)
    machine.run("systemctl", "restart", "mycoswarmd")
    wait_ready(machine)
    yield Installed(machine, done.err)
    machine.pull_plug()


def test_the_node_is_a_service_that_has_proved_all_it_should(installed: Installed) -> None:
    machine = installed.machine
    assert "mycoswarmctl init" in installed.said
    assert machine.run("systemctl", "--failed", "--no-legend", check=False).out == ""
    command = machine.run("readlink", "-f", "/usr/local/bin/mycoswarmctl").out
    assert command == "/opt/mycoswarm/bin/mycoswarmctl\n"
    owners = machine.sh("find /opt/mycoswarm ! -user root -o -perm /022 ! -type l").out
    assert owners == ""  # nothing that runs as another user is anybody's but root's
    assert wait_task(machine, submit(machine, "so that a cage has proved itself"))["state"] == "succeeded"
    said = proved(machine, "core", "lan")
    refuted = [(row["unit"], c["name"]) for row in said["proofs"] for c in row["checks"] if c["ok"] is False]
    assert refuted == [] and said["cages"]["held"], said
    running = machine.run("systemctl", "show", "-P", "ExecStart", "mycoswarmd").out
    assert "/opt/mycoswarm/sbin/mycoswarmd" in running
    machine.wait_until("journalctl -b -x -u mycoswarmd | grep -q 'The node has read its policy'")


def test_what_was_edited_is_shown_and_an_installation_again_brings_this_version(
    installed: Installed, wheels: Path
) -> None:
    machine = installed.machine
    assert installed.service("diff").out == ""
    key = ctl(machine, "keys", "create", "editor").out.strip()
    unit = "/etc/systemd/system/mycoswarm-task@.service"
    machine.sh(f"sed -i /^NoNewPrivileges/d {unit}")
    shown = installed.service("diff", check=False)
    assert shown.code == 1 and "-NoNewPrivileges=yes" in shown.out, shown
    settings = machine.run("cat", "/etc/mycoswarm/mycoswarm.toml").out

    machine.push(next((wheels / "later").glob("*.whl")), WHEELS)
    machine.run(
        "/home/alice/pipx/bin/pip", "install", "-q", "-U", "mycoswarmd", user="alice", timeout_s=_PIP_S
    )
    before = machine.run("systemctl", "show", "-P", "MainPID", "mycoswarmd").out
    itself = ctl(machine, "service", "install", check=False)  # which is still of the version before
    assert itself.code == 1 and "sudo ~/.local/bin/mycoswarmctl service install" in itself.err, itself
    installed.service("install")
    wait_ready(machine)
    assert machine.run("systemctl", "show", "-P", "MainPID", "mycoswarmd").out != before
    assert ctl_json(machine, "status")["version"] == NEWER
    assert installed.service("diff").out == ""
    assert machine.run("cat", "/etc/mycoswarm/mycoswarm.toml").out == settings
    assert "editor" in ctl(machine, "keys", "list").out and key
    assert wait_task(machine, submit(machine, "after the upgrade"))["state"] == "succeeded"
    ctl(machine, "audit", "verify")


def test_it_and_the_package_do_not_meet_and_one_takes_up_what_the_other_left(
    installed: Installed, images: Images
) -> None:
    machine = installed.machine
    ctl(machine, "keys", "create", "keeper")
    deb = f"/root/{images.deb.name}"
    machine.write(deb, images.deb.read_bytes())
    refused = apt(machine, "install", deb, check=False)
    assert refused.code != 0 and "sudo mycoswarmctl service uninstall" in refused.out + refused.err, refused
    assert machine.run("dpkg-query", "-W", "-f", "${Status}", "mycoswarmd").out.endswith(" not-installed")
    assert "keeper" in ctl(machine, "keys", "list").out  # the service does not mind

    ctl(machine, "service", "uninstall")  # as apt has just said
    # A cage that waited goes with the node, and systemd forgets it a moment later.
    machine.wait_until("! pgrep -f '[m]ycoswarm' && ! ls /run/systemd/units /var/tmp | grep '[m]ycoswarm'")
    found = machine.sh("find / /run -xdev -name '*mycoswarm*' 2>/dev/null; true").out.splitlines()
    left = {line for line in found if not _LEFT.match(line)}
    state = {STATE, f"{STATE}/mycoswarm.db", f"{STATE}-engine", f"{STATE}-signer"}
    assert left <= {*state, "/etc/mycoswarm", "/etc/mycoswarm/mycoswarm.toml"}, left
    assert STATE in left

    install(machine, images.deb)
    wait_ready(machine)
    assert "keeper" in ctl(machine, "keys", "list").out
    assert machine.run("systemctl", "show", "-P", "FragmentPath", "mycoswarmd").out.startswith("/usr/lib/")
    refused = installed.service("install", "--json", check=False)
    assert json.loads(refused.out.splitlines()[-1])["error"]["code"] == "packaged", refused
