"""The life of an installed node: reload, a broken policy, an upgrade, removal, purge."""

import pytest

from tests.appliance.conftest import Images
from tests.appliance.images import SUITES
from tests.appliance.machines import Machine
from tests.appliance.nodes import (
    ENGINE_TABLE,
    POLICY,
    SETTINGS,
    STATE,
    apt,
    ctl,
    ctl_json,
    repack,
    start_engine,
    submit,
    wait_ready,
    wait_task,
)

pytestmark = [pytest.mark.timeout(600), pytest.mark.parametrize("suite", SUITES)]
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
EDIT = "\n# a line of mine\n"


def _policy_name(machine: Machine) -> str:
    return str(ctl_json(machine, "status")["policy"]["name"])


def test_reload_takes_a_new_policy_and_refuses_a_broken_one(fresh: Fresh, suite: str) -> None:
    machine, _ = fresh[suite]
    start_engine(machine)
    machine.run("systemctl", "restart", "mycoswarmd")
    wait_ready(machine)
    shipped = machine.run("cat", POLICY).out
    name = _policy_name(machine)
    assert ctl(machine, "ask", "--model", "ok", "hello").code == 0
    pid = machine.run("systemctl", "show", "-P", "MainPID", "mycoswarmd").out

    machine.write(POLICY, NOTHING_IS_ALLOWED)
    machine.run("systemctl", "reload", "mycoswarmd")
    machine.wait_until("mycoswarmctl policy show | grep -q shut", within_s=5)
    assert ctl(machine, "ask", "--model", "ok", "hello", check=False).code == 3

    machine.write(POLICY, HALF)
    machine.run("systemctl", "reload", "mycoswarmd", check=False)
    machine.wait_until("journalctl -b -u mycoswarmd | grep -qi policy", within_s=5)
    machine.wait_until(
        "mycoswarmctl status | grep -qi 'policy.*not\\|last good\\|broken\\|cannot'", within_s=5
    )
    assert _policy_name(machine) == "shut"
    assert ctl(machine, "ask", "--model", "ok", "hello", check=False).code == 3

    machine.write(POLICY, shipped)
    machine.run("systemctl", "reload", "mycoswarmd")
    machine.wait_until(f"mycoswarmctl policy show | grep -q '{name}'", within_s=5)
    assert ctl(machine, "ask", "--model", "ok", "hello").code == 0
    assert machine.run("systemctl", "show", "-P", "MainPID", "mycoswarmd").out == pid


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
    machine.wait_until("mycoswarmctl policy check " + POLICY, within_s=5)


def test_an_upgrade_keeps_the_state_the_edits_and_the_promises(
    fresh: Fresh, images: Images, suite: str
) -> None:
    machine, _ = fresh[suite]
    start_engine(machine)
    wait_ready(machine)
    key = ctl(machine, "keys", "create", "editor").out.strip()
    done = submit(machine, "before the upgrade")
    wait_task(machine, done)
    head = ctl_json(machine, "audit", "head")
    for conffile in (SETTINGS, POLICY):
        machine.sh(f"printf '%s' '{EDIT}' >> {conffile}")
    machine.run("systemctl", "restart", "mycoswarmd")
    wait_ready(machine)

    newer = repack(images.deb, version="99.0")
    machine.write("/root/newer.deb", newer.read_bytes())
    said = apt(machine, "install", "/root/newer.deb").out
    assert "Unpacking mycoswarmd (99.0)" in said, said
    wait_ready(machine)
    assert machine.run("systemctl", "is-active", "mycoswarmd").out == "active\n"
    for conffile in (SETTINGS, POLICY):
        assert EDIT in machine.run("cat", conffile).out
    assert ENGINE_TABLE in machine.run("cat", SETTINGS).out
    assert ctl_json(machine, "task", done)["task"]["id"] == done
    assert "editor" in ctl(machine, "keys", "list").out and key
    ctl(machine, "audit", "verify")
    assert ctl_json(machine, "audit", "head")["seq"] >= head["seq"]


def test_remove_keeps_the_state_and_purge_takes_it(fresh: Fresh, images: Images, suite: str) -> None:
    machine, _ = fresh[suite]
    ctl(machine, "keys", "create", "keeper")
    apt(machine, "remove", "mycoswarmd")
    assert machine.run("sh", "-c", "command -v mycoswarmctl", check=False).code != 0
    assert machine.run("systemctl", "is-active", "mycoswarmd.socket", check=False).out != "active\n"
    assert machine.run("pgrep", "-f", "mycoswarmd", check=False).out == ""
    assert machine.path(STATE).is_dir() and list(machine.path(STATE).iterdir())
    machine.write("/root/again.deb", images.deb.read_bytes())
    apt(machine, "install", "/root/again.deb")
    wait_ready(machine)
    assert "keeper" in ctl(machine, "keys", "list").out  # the state was taken up again
    models = "/var/lib/mycoswarm-engine/models"  # on a disk of its own, as gigabytes are
    machine.sh(f"mkdir -p /srv/films; echo kept > /srv/films/film; mount --bind /srv/films {models}")
    purged = apt(machine, "purge", "mycoswarmd")
    said = purged.out + purged.err
    assert "roster" in said and "revoke" in said and "mounted" in said, said
    assert machine.run("cat", "/srv/films/film").out == "kept\n"
    assert not machine.path(STATE).exists()
    machine.sh(f"umount {models}; rm -r /var/lib/mycoswarm-engine")
    left = machine.sh(
        "find / -xdev -name '*mycoswarm*' -not -path '/root/*' -not -path '/proc/*' 2>/dev/null; true"
    ).out
    left = "\n".join(
        line
        for line in left.splitlines()
        if "/var/log/journal" not in line and "/var/lib/systemd" not in line
    )
    assert left == "", left
    assert machine.run("systemctl", "--failed", "--no-legend", check=False).out == ""
