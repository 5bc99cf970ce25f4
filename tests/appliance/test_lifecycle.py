"""The life of an installed node: reload, a broken policy, an upgrade, removal, purge."""

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mycoswarmd.daemon.journal import EVENTS
from tests.appliance.conftest import Images
from tests.appliance.images import BUILD_S, SUITES
from tests.appliance.machines import Lab, Machine, Ran
from tests.appliance.nodes import (
    ENGINE_TABLE,
    POLICY,
    ROOT,
    SETTINGS,
    STATE,
    apt,
    ctl,
    ctl_json,
    in_parallel,
    install,
    repack,
    restart_engine,
    start_engine,
    submit,
    wait_ready,
    wait_served,
    wait_task,
)

pytestmark = [pytest.mark.timeout(1200), pytest.mark.parametrize("suite", SUITES)]
Fresh = dict[str, tuple[Machine, str]]
NOTHING_IS_ALLOWED = """
schema = 1
name = "shut"

[[rule]]
id = "owner"
why = "the owner looks"
effect = "allow"
action = ["admin"]
origin = ["owner"]
"""
HALF = 'schema = 1\nname = "half"\n\n[[rule]]\nid = "own'
# The build before the sockets of the outposts moved and the units got roots of their own.
OLDER = "2d77fddfa1df9e02c0bacc11b55733ef9898ef3c"
OLDER_VERSION = "0.0.1"
ENGINES_MOUNT = "run-mycoswarm\\x2dengine.mount"
ENGINES = "/run/mycoswarm-engine"
EDIT = "\n# a line of mine\n"


@dataclass(frozen=True)
class Older:
    """A package to upgrade from, and whether it was built from an older commit."""

    deb: Path
    is_old: bool


def _policy_name(machine: Machine) -> str:
    return str(ctl_json(machine, "status")["policy"]["name"])


def test_reload_takes_a_new_policy_and_refuses_a_broken_one(fresh: Fresh, suite: str) -> None:
    machine, _ = fresh[suite]
    start_engine(machine)
    machine.run("systemctl", "restart", "mycoswarmd")
    wait_ready(machine)
    shipped = machine.run("cat", POLICY).out
    name = _policy_name(machine)
    machine.wait_until("mycoswarmctl ask --model ok hello")
    pid = machine.run("systemctl", "show", "-P", "MainPID", "mycoswarmd").out

    machine.write(POLICY, NOTHING_IS_ALLOWED)
    machine.run("systemctl", "reload", "mycoswarmd")
    machine.wait_until("mycoswarmctl policy show | grep -q shut")
    assert ctl(machine, "ask", "--model", "ok", "hello", check=False).code == 3

    machine.write(POLICY, HALF)
    reloaded = machine.run("systemctl", "reload", "mycoswarmd", check=False)
    assert (reloaded.code, "failed" in reloaded.err) == (1, True), reloaded
    machine.wait_until(f"journalctl -b -u mycoswarmd | grep -qF 'cannot use the policy: {POLICY}:'")
    machine.wait_until("mycoswarmctl status | grep -qi 'policy.*not\\|last good\\|broken\\|cannot'")
    assert _policy_name(machine) == "shut"
    assert ctl(machine, "ask", "--model", "ok", "hello", check=False).code == 3

    machine.write(f"{POLICY}.new", shipped, mode=0o666)
    machine.run("mv", f"{POLICY}.new", POLICY)  # never there with another mode
    reloaded = machine.run("systemctl", "reload", "mycoswarmd", check=False)
    assert reloaded.code == 1, reloaded
    machine.wait_until("journalctl -b -u mycoswarmd | grep -q 'others than its owner may write it'")
    assert _policy_name(machine) == "shut"

    settings = machine.run("cat", SETTINGS).out
    machine.write(SETTINGS, f"{settings}\na line that is none\n")  # which a reload does not read
    machine.write(POLICY, NOTHING_IS_ALLOWED.replace('"shut"', '"shut-again"'))
    machine.run("systemctl", "reload", "mycoswarmd")
    machine.wait_until("mycoswarmctl policy show | grep -q 'shut-again'")
    machine.write(POLICY, HALF)
    assert machine.run("systemctl", "reload", "mycoswarmd", check=False).code == 1
    assert _policy_name(machine) == "shut-again"
    machine.write(SETTINGS, settings)

    machine.write(POLICY, shipped)
    machine.run("systemctl", "reload", "mycoswarmd")
    machine.wait_until(f"mycoswarmctl policy show | grep -q '{name}'")
    machine.wait_until("mycoswarmctl ask --model ok hello")
    assert machine.run("systemctl", "show", "-P", "MainPID", "mycoswarmd").out == pid


def test_a_node_that_was_killed_often_is_waited_for_each_time(fresh: Fresh, suite: str) -> None:
    machine, _ = fresh[suite]
    wait_ready(machine)
    for _ in range(6):
        machine.run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", "mycoswarmd")
        ctl(machine, "status")
    assert int(machine.run("systemctl", "show", "-P", "NRestarts", "mycoswarmd").out) >= 6


def test_the_node_sees_the_directory_of_the_engines_that_there_is(fresh: Fresh, suite: str) -> None:
    machine, _ = fresh[suite]

    def is_seen_when_made_anew(name: str) -> bool:
        machine.run("systemctl", "restart", "mycoswarmd")
        machine.run("systemctl", "restart", ENGINES_MOUNT)
        wait_ready(machine)
        pid = machine.run("systemctl", "show", "-P", "MainPID", "mycoswarmd").out.strip()
        machine.sh(f"mkdir {ENGINES}/{name}")
        return name in machine.run("ls", f"/proc/{pid}/root{ENGINES}").out.split()

    assert is_seen_when_made_anew("a")
    # The control: without the bond it goes on with a file system that nobody else sees any more.
    unit = "/run/systemd/system/mycoswarmd.service"
    machine.sh(
        f"sed /^PartOf=/d /usr/lib/systemd/system/mycoswarmd.service > {unit}; systemctl daemon-reload"
    )
    assert not is_seen_when_made_anew("b")
    machine.sh(f"rm {unit}; systemctl daemon-reload")
    assert is_seen_when_made_anew("c")


def test_with_half_a_policy_at_boot_the_last_good_one_holds(fresh: Fresh, suite: str) -> None:
    machine, _ = fresh[suite]
    shipped = machine.run("cat", POLICY).out
    machine.write(POLICY, HALF)
    machine.reboot()
    wait_ready(machine)
    machine.write(POLICY, shipped)
    said = ctl(machine, "status").out
    assert _policy_name(machine) != "half"
    assert "cannot" in said or "last good" in said or "broken" in said, said
    machine.run("systemctl", "reload", "mycoswarmd")
    machine.wait_until("mycoswarmctl policy check " + POLICY)


@pytest.fixture(scope="module")
def older(appliance_lab: Lab, images: Images) -> Older:
    """Build the package of an older commit; where a shallow clone lacks it, repack today's as older."""
    home = appliance_lab.home / "older"
    home.mkdir()
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT)]
    packed = subprocess.run([*git, "archive", "--format=tar", OLDER], capture_output=True)
    if packed.returncode != 0:
        return Older(repack(images.deb, version=OLDER_VERSION), is_old=False)
    subprocess.run(["tar", "-x", "-C", str(home)], input=packed.stdout, check=True)
    build = [str(home / "packaging/build-deb"), str(home / "deb")]
    built = subprocess.run(build, capture_output=True, text=True, timeout=BUILD_S)
    assert built.returncode == 0, built.stdout + built.stderr
    return Older(repack(next((home / "deb").glob("*.deb")), version=OLDER_VERSION), is_old=True)


@pytest.fixture(scope="module")
def aged(appliance_lab: Lab, images: Images, older: Older) -> Iterator[dict[str, Machine]]:
    """One machine of each release with the older package, an engine and a person's edits."""
    made = {suite: appliance_lab.machine(f"aged-{suite}", getattr(images, suite)) for suite in SUITES}

    def prepare(machine: Machine) -> None:
        machine.wait_booted()
        install(machine, older.deb)
        start_engine(machine)
        for conffile in (SETTINGS, POLICY):
            machine.sh(f"printf '%s' '{EDIT}' >> {conffile}")
        machine.run("systemctl", "restart", "mycoswarmd")
        wait_ready(machine)

    in_parallel(*(lambda machine=machine: prepare(machine) for machine in made.values()))
    yield made
    for machine in made.values():
        machine.pull_plug()


def test_an_upgrade_from_an_older_build_keeps_the_state_the_edits_and_the_promises(
    aged: dict[str, Machine],
    older: Older,
    images: Images,
    suite: str,
    record_property: Callable[[str, object], None],
) -> None:
    if not older.is_old:
        record_property("unproved", f"an upgrade from an older build: {OLDER[:7]} is not in this clone")
    machine = aged[suite]
    assert "ii  mycoswarmd     0.0.1" in machine.run("dpkg", "-l", "mycoswarmd").out
    ctl(machine, "keys", "create", "editor")
    done = submit(machine, "before the upgrade")
    wait_task(machine, done)
    head = ctl_json(machine, "audit", "head")
    restart_engine(machine, pause_s=3600)  # nothing ends by itself while apt takes its time
    wait_served(machine)
    once = submit(machine, "in the middle, never twice", "--once")
    running = submit(machine, "in the middle")
    wait_task(machine, once, "running")
    waiting = [submit(machine, f"in the queue {number}") for number in range(6)]
    assert ctl_json(machine, "task", waiting[-1])["task"]["state"] == "queued"

    machine.write("/root/newer.deb", images.deb.read_bytes())
    said = apt(machine, "install", "/root/newer.deb").out
    assert "Unpacking mycoswarmd (0.1.0) over (0.0.1)" in said, said
    restart_engine(machine)
    wait_ready(machine)
    assert machine.run("systemctl", "is-active", "mycoswarmd").out == "active\n"
    for conffile in (SETTINGS, POLICY):
        assert EDIT in machine.run("cat", conffile).out
    assert ENGINE_TABLE in machine.run("cat", SETTINGS).out
    assert ctl_json(machine, "task", done)["task"]["state"] == "succeeded"
    assert "editor" in ctl(machine, "keys", "list").out
    ends = {task: wait_task(machine, task)["state"] for task in (once, running, *waiting)}
    assert ends.pop(once) == "parked"  # it may not run twice: a person decides
    assert set(ends.values()) == {"succeeded"}, ends
    ctl(machine, "retry", once)
    wait_task(machine, once, "succeeded")
    ctl(machine, "audit", "verify")
    assert ctl_json(machine, "audit", "head")["seq"] > head["seq"]
    assert machine.run("systemctl", "--failed", "--no-legend", check=False).out == ""


def _asked_in_vain(machine: Machine, command: str, *, tries: int, user: str | None = None) -> Ran:
    """Ask a node that cannot start, and hear so before it has tried so often again.

    It does about every two seconds on a machine that is not busy; on one that is, once of five times will do.
    """
    count = ("systemctl", "show", "-P", "NRestarts", "mycoswarmd")
    asked = 0
    while True:
        before = int(machine.run(*count).out)
        ran = ctl(machine, command, check=False, user=user, timeout_s=300)
        if int(machine.run(*count).out) < before + tries:
            return ran
        asked += 1
        assert asked < 5, ran


def _check_it_is_named_at_once(machine: Machine) -> None:
    """A node that cannot start: whoever asks hears so in about two seconds, and systemd says why."""
    for user in (None, "alice"):
        failed = _asked_in_vain(machine, "status", tries=4, user=user)
        assert failed.code == 4, failed
        assert "does not start" in failed.err and SETTINGS in failed.err, failed
        assert "systemctl status mycoswarmd" in failed.err, failed
    looked = _asked_in_vain(machine, "doctor", tries=10)
    assert looked.code == 1, looked
    assert "does not start" in looked.out and SETTINGS in looked.out, looked
    assert "systemctl restart" not in looked.out, looked  # which helps nothing here
    machine.wait_until(f"systemctl status mycoswarmd | grep -q 'Status: .cannot.*{SETTINGS}'")
    # Whose it is, the journal may not learn of a process that has ended; there is another every two seconds.
    wanted = f"MESSAGE_ID={EVENTS['cannot-run']} _SYSTEMD_UNIT=mycoswarmd.service"
    machine.wait_until(f"journalctl -b {wanted} | grep -qF {SETTINGS}")
    entry = json.loads(machine.run("journalctl", "-b", "-o", "json", "-n", "1", *wanted.split()).out)
    assert SETTINGS in entry["MESSAGE"] and entry["PRIORITY"] == "3", entry


def _hold_the_engines_directory(machine: Machine) -> None:
    """Have somebody in it, so that it cannot be unmounted."""
    machine.sh(f"mkdir -p {ENGINES}/held; systemctl stop holder 2>/dev/null || true")
    held = f"--working-directory={ENGINES}/held"
    machine.run("systemd-run", "--quiet", "--unit=holder", "--property=Type=exec", held, "sleep", "600")
    assert machine.run("umount", ENGINES, check=False).code != 0


def test_remove_keeps_the_state_and_purge_takes_it(fresh: Fresh, images: Images, suite: str) -> None:
    machine, _ = fresh[suite]
    ctl(machine, "keys", "create", "keeper")
    _hold_the_engines_directory(machine)
    apt(machine, "remove", "mycoswarmd")
    assert ENGINES not in machine.run("cat", "/proc/self/mounts").out
    assert machine.run("sh", "-c", "command -v mycoswarmctl", check=False).code != 0
    assert machine.run("systemctl", "is-active", "mycoswarmd.socket", check=False).out != "active\n"
    machine.wait_until("! pgrep -f '[m]ycoswarmd'")
    assert machine.path(STATE).is_dir() and list(machine.path(STATE).iterdir())
    machine.write("/root/again.deb", images.deb.read_bytes())
    machine.sh(f"cp {SETTINGS} /root/good.toml; echo 'a line that is none' >> {SETTINGS}")
    again = apt(machine, "install", "/root/again.deb")
    told = [line for line in (again.out + again.err).splitlines() if "did not start" in line]
    assert len(told) == 1 and SETTINGS in told[0] and "journalctl -xeu mycoswarmd" in told[0], again
    assert "mycoswarmctl init" not in again.out
    _check_it_is_named_at_once(machine)
    machine.run("cp", "/root/good.toml", SETTINGS)
    wait_ready(machine)  # by itself
    assert "keeper" in ctl(machine, "keys", "list").out  # the state was taken up again
    models = "/var/lib/mycoswarm-engine/models"  # on a disk of its own, as gigabytes are
    machine.sh(f"mkdir -p /srv/films; echo kept > /srv/films/film; mount --bind /srv/films {models}")
    _hold_the_engines_directory(machine)
    purged = apt(machine, "purge", "mycoswarmd")
    said = purged.out + purged.err
    assert "roster" in said and "revoke" in said and "mounted" in said, said
    assert machine.run("cat", "/srv/films/film").out == "kept\n"
    machine.wait_until("test -z \"$(find /run -maxdepth 1 -name 'mycoswarm*')\"")
    assert not machine.path(STATE).exists()
    machine.sh(f"umount {models}; rm -r /var/lib/mycoswarm-engine")
    # systemd removes the unit's own /tmp a moment later.
    left = "find / -xdev -name '*mycoswarm*' -not -path '/root/*' -not -path '/proc/*' 2>/dev/null"
    machine.wait_until(f"! {left} | grep -v -e /var/log/journal -e /var/lib/systemd")
    assert machine.run("systemctl", "--failed", "--no-legend", check=False).out == ""
