"""`doctor` on trees of files that are as real machines have them: what it says, and that its cures cure."""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mycoswarmd.core.policy import check as policy_check
from mycoswarmd.ctl import checks_node
from mycoswarmd.ctl.box import Finding, Severity, Space, this_box
from mycoswarmd.ctl.checks_network import Listener, listeners
from mycoswarmd.ctl.client import UnixTransport
from mycoswarmd.ctl.doctor import look
from mycoswarmd.ctl.main import make_ctl
from mycoswarmd.ctl.plain import typer
from tests.meta.test_docs_howto import parse
from tests.unit.ctl.boxes import NOW_S, PI_BOOTED, PI_CMDLINE, ROOMY, Tree, debian13, pi, ubuntu2404
from tests.unit.ctl.fakenode import FakeNode, answer, ctl

OK, NOTE, WEAK, BROKEN = Severity
Change = Callable[[Tree], object]
SHIPPED = Path(__file__).parents[3] / "policy" / "profiles" / "home.toml"
LOCKED = """schema = 1
name   = "mine"

[[rule]]
id     = "answered-here"
why    = "prompts up to private may be answered by this machine"
effect = "allow"
action = "infer"
zone   = ["self"]
label  = { max = "private" }
"""


def findings(tree: Tree, *, is_running: bool = True) -> dict[str, Finding]:
    return {one.name: one for one in look(tree.box(is_running=is_running), None, None)}


def bad(tree: Tree) -> dict[str, Severity]:
    return {name: one.severity for name, one in findings(tree).items() if one.severity is not OK}


def test_a_sound_workstation_has_nothing_to_mend(tmp_path: Path) -> None:
    tree = debian13(tmp_path)
    assert bad(tree) == {}
    assert {"clock", "cgroups", "memory", "landlock", "units", "disk", "gpu 0000:01:00.0"} <= set(
        findings(tree)
    )


def test_ubuntus_apparmor_matters_only_without_units(tmp_path: Path) -> None:
    assert bad(ubuntu2404(tmp_path / "a")) == {}
    bare = ubuntu2404(tmp_path / "b")
    shutil.rmtree(bare.root / "usr/lib/systemd/system")
    assert bad(bare) == {"user namespaces": WEAK, "units": NOTE}
    assert "apparmor_parser -r /etc/apparmor.d/mycoswarm-bwrap" in findings(bare)["user namespaces"].fix
    bare.put({"/etc/apparmor.d/mycoswarm-bwrap": "profile"})
    assert bad(bare) == {"units": NOTE}


def test_a_fresh_pi_lacks_memory_limits_and_landlock(tmp_path: Path) -> None:
    tree = pi(tmp_path)
    assert bad(tree) == {"memory": WEAK, "landlock": WEAK}
    assert findings(tree)["memory"].fix == (
        "sudo sed -i '1s/$/ cgroup_enable=memory/' /boot/firmware/cmdline.txt && sudo reboot"
    )
    assert "lsm=landlock/" in findings(tree)["landlock"].fix


def test_a_card_of_a_pi_is_looked_at_before_its_first_start(tmp_path: Path) -> None:
    tree = pi(tmp_path)
    for name in ("proc", "sys", "run"):
        shutil.rmtree(tmp_path / name)
    found = findings(tree, is_running=False)
    assert {name for name, one in found.items() if one.severity is not OK} == {"memory"}
    assert "clock" not in found and "landlock" not in found
    tree.put({"/boot/firmware/cmdline.txt": f"{PI_CMDLINE.strip()} cgroup_enable=memory\n"})
    assert "memory" not in findings(tree, is_running=False)
    ran = ctl(None, "doctor", "--root", str(tmp_path), "--json")
    assert ran.code == 0 and "memory" not in {row["name"] for row in ran.json["checks"]}
    assert ctl(None, "doctor", "--root", str(tmp_path / "none")).code == 2


def test_a_disk_without_a_node_is_not_called_fine(tmp_path: Path) -> None:
    ran = ctl(None, "doctor", "--root", str(tmp_path))
    assert ran.code == 1 and "There is no system in" in ran.out, ran.out
    tree = Tree(tmp_path).put({"/etc/os-release": "ID=debian\n"})
    found = findings(tree, is_running=False)
    assert found["units"].severity is BROKEN and f"chroot {tmp_path} apt install" in found["units"].fix
    assert list(found) == ["units"]


def test_a_disk_for_a_first_start_is_looked_at_there_and_mended_there(tmp_path: Path) -> None:
    tree = pi(tmp_path).put({"/etc/credstore/mycoswarm.enroll": "51TCD"})
    code = tmp_path / "etc/credstore/mycoswarm.enroll"
    code.chmod(0o644)
    assert findings(tree, is_running=False)["joining"].severity is BROKEN
    code.chmod(0o600)
    (tmp_path / "etc/systemd/system/multi-user.target.wants/mycoswarmd.service").unlink()
    for one in (found := findings(tree, is_running=False)).values():
        assert "reboot" not in one.fix and ("/boot" not in one.fix or str(tmp_path) in one.fix), one
    assert found["memory"].severity is WEAK
    assert found["joining"].fix == f"sudo systemctl --root={tmp_path} enable mycoswarm-enroll.service"
    assert found["units"].fix == f"sudo systemctl --root={tmp_path} enable mycoswarmd"
    tree.link("/etc/systemd/system/multi-user.target.wants/mycoswarm-enroll.service", "../x")
    assert findings(tree, is_running=False)["joining"].severity is OK
    assert "joining" not in findings(tree)


def set_space(**changed: object) -> Change:
    def change(tree: Tree) -> None:
        values: dict[str, Any] = {
            name: changed.get(name, getattr(ROOMY, name)) for name in ROOMY.__dataclass_fields__
        }
        tree.space = Space(**values)

    return change


def at(now_s: float) -> Change:
    return lambda tree: setattr(tree, "now_s", now_s)


def kept_time(tree: Tree) -> None:
    tree.put({"/var/lib/systemd/timesync/clock": ""})
    os.utime(tree.root / "var/lib/systemd/timesync/clock", (NOW_S + 1e7, NOW_S + 1e7))


def no_landlock(tree: Tree) -> None:
    tree.put({"/sys/kernel/security/lsm": "lockdown,capability,yama,apparmor"})
    tree.landlock_abi = 0


def hybrid(tree: Tree) -> None:
    (tree.root / "sys/fs/cgroup/cgroup.controllers").unlink()
    tree.put({"/sys/fs/cgroup/memory/tasks": "", "/sys/fs/cgroup/unified/cgroup.controllers": ""})


def legacy(tree: Tree) -> None:
    (tree.root / "sys/fs/cgroup/cgroup.controllers").unlink()
    tree.put({"/sys/fs/cgroup/memory/tasks": "", "/sys/fs/cgroup/systemd/tasks": ""})


def no_driver(name: str | None) -> Change:
    def change(tree: Tree) -> None:
        link = tree.root / "sys/bus/pci/devices/0000:01:00.0/driver"
        link.unlink()
        if name:
            link.symlink_to(f"../../../../bus/pci/drivers/{name}")

    return change


def laptop(tree: Tree) -> None:
    tree.put({"/sys/class/dmi/id/chassis_type": "10\n", "/sys/class/power_supply/BAT0/status": "Charging\n"})


def policy_of_mode(mode: int) -> Change:
    def change(tree: Tree) -> None:
        tree.put({"/etc/mycoswarm/policy.toml": SHIPPED.read_text()})
        (tree.root / "etc/mycoswarm/policy.toml").chmod(mode)

    return change


def without(*paths: str) -> Change:
    def change(tree: Tree) -> None:
        for path in paths:
            (tree.root / path).unlink()

    return change


def masked(tree: Tree) -> None:
    tree.link("/etc/systemd/system/mycoswarm-task.socket", "/dev/null")


def no_engine(tree: Tree) -> None:
    shutil.rmtree(tree.root / "var/lib/mycoswarm-engine")


UNIT = "usr/lib/systemd/system"
# What happens to a sound machine, what doctor says of it, and a word that must be in the cure.
CASES: dict[str, tuple[Change, dict[str, Severity], str]] = {
    "a clock at 1970": (at(86_400.0), {"clock": NOTE}, "timedatectl"),
    "a clock before its own past": (kept_time, {"clock": NOTE}, "timedatectl"),
    "no landlock": (no_landlock, {"landlock": WEAK}, "lsm=landlock,lockdown,yama,apparmor"),
    "hybrid cgroups": (hybrid, {"cgroups": WEAK}, "systemd.unified_cgroup_hierarchy=1"),
    "old cgroups": (legacy, {"cgroups": WEAK}, "systemd.unified_cgroup_hierarchy=1"),
    "memory turned off": (
        lambda tree: tree.put({"/sys/fs/cgroup/cgroup.controllers": "cpuset cpu io pids\n"}),
        {"memory": WEAK},
        "cgroup_enable=memory",
    ),
    "no limits at all": (
        lambda tree: tree.put({"/sys/fs/cgroup/cgroup.controllers": "\n"}),
        {"memory": WEAK, "pids": WEAK, "cpu": WEAK},
        "cgroup_enable=memory",
    ),
    "no user namespaces": (
        lambda tree: tree.put({"/proc/sys/user/max_user_namespaces": "0\n"}),
        {"user namespaces": BROKEN},
        "user.max_user_namespaces=15000",
    ),
    "nouveau": (no_driver("nouveau"), {"gpu 0000:01:00.0": WEAK}, "apt install nvidia-driver"),
    "no driver at all": (no_driver(None), {"gpu 0000:01:00.0": WEAK}, "apt install nvidia-driver"),
    "a lent card": (no_driver("vfio-pci"), {}, ""),
    "a laptop": (laptop, {"sleep": NOTE}, "HandleLidSwitchExternalPower=ignore"),
    "a full disk": (set_space(free_bytes=1 << 20), {"disk": BROKEN}, "du -xh"),
    "a nearly full disk": (set_space(free_bytes=500 << 20), {"disk": WEAK}, "du -xh"),
    "no inodes": (set_space(free_inodes=3), {"disk": BROKEN}, "du -xh"),
    "no count of inodes": (set_space(free_inodes=None), {}, ""),
    "a read-only disk": (set_space(is_read_only=True), {"disk": BROKEN}, "journalctl -k"),
    "a masked unit": (masked, {"units": BROKEN}, "systemctl unmask mycoswarm-task.socket"),
    "a missing unit": (without(f"{UNIT}/mycoswarm-lan.socket"), {"units": BROKEN}, "service install"),
    "not enabled": (
        without("etc/systemd/system/multi-user.target.wants/mycoswarmd.service"),
        {"units": NOTE},
        "systemctl enable --now mycoswarmd",
    ),
    "a socket that is not enabled": (
        without("etc/systemd/system/sockets.target.wants/mycoswarmd.socket"),
        {"units": NOTE},
        "systemctl enable --now mycoswarmd",
    ),
    "no engine": (no_engine, {"embedded engine": WEAK}, "engine install"),
    "broken settings": (
        lambda tree: tree.put({"/etc/mycoswarm/mycoswarm.toml": "listen = \n"}),
        {"settings": BROKEN},
        "mycoswarmd check",
    ),
    "a half-written policy": (
        lambda tree: tree.put({"/etc/mycoswarm/policy.toml": SHIPPED.read_text().rpartition('"')[0]}),
        {"policy": BROKEN},
        "policy check /etc/mycoswarm/policy.toml",
    ),
    "a policy for all to write": (policy_of_mode(0o646), {"policy": BROKEN}, "chmod go-w"),
    "a policy for a group to write": (policy_of_mode(0o664), {"policy": BROKEN}, "chmod go-w"),
    "a policy that lets nobody administer": (
        lambda tree: tree.put({"/etc/mycoswarm/policy.toml": LOCKED}),
        {"policy": WEAK},
        "sudoedit /etc/mycoswarm/policy.toml && sudo systemctl reload mycoswarmd",
    ),
    "a sound policy": (
        lambda tree: tree.put({"/etc/mycoswarm/policy.toml": SHIPPED.read_text()}),
        {},
        "",
    ),
    "Ollama for everybody": (
        lambda tree: tree.listen("::", 11434, "ollama").put({"/etc/systemd/system/ollama.service": ""}),
        {"exposed: Ollama": BROKEN, "engine": NOTE},
        "IPAddressDeny=any",
    ),
    "Ollama at home": (
        lambda tree: tree.listen("127.0.0.1", 11434, "ollama"),
        {"engine": NOTE},
        "[engines.ollama]",
    ),
    "Ollama at home, by IPv6": (lambda tree: tree.listen("::1", 11434, "ollama"), {"engine": NOTE}, ""),
    "Ollama at home, mapped": (lambda tree: tree.listen("::ffff:127.0.0.1", 11434), {"engine": NOTE}, ""),
    "LM Studio on the LAN's address": (
        lambda tree: tree.listen("192.168.1.20", 1234),
        {"exposed: LM Studio": BROKEN},
        "127.0.0.1",
    ),
    "llama-server on a port of its own": (
        lambda tree: tree.listen("0.0.0.0", 9999, "llama-server"),
        {"exposed: llama.cpp": BROKEN},
        ":9999",
    ),
    "somebody's web server": (
        lambda tree: tree.listen("0.0.0.0", 8080, "nginx"),
        {"open port 8080": NOTE},
        ":8080",
    ),
    "ssh": (lambda tree: tree.listen("0.0.0.0", 22, "sshd"), {}, ""),
    "the node's own ports": (
        lambda tree: tree.listen("::", 7437, "python3", command="/usr/bin/python3 /usr/sbin/mycoswarmd run"),
        {},
        "",
    ),
    "a taken port": (
        lambda tree: tree.listen("::", 7437, "nginx", command="nginx: worker"),
        {"port 7437": BROKEN},
        ":7437",
    ),
    "a port that the service does not use": (lambda tree: tree.listen("127.0.0.1", 7436, "nginx"), {}, ""),
    "a taken port of the API": (
        lambda tree: tree.listen("127.0.0.1", 7436, "nginx").put(
            {"/etc/mycoswarm/mycoswarm.toml": 'listen = "127.0.0.1:7436"\n'}
        ),
        {"port 7436": BROKEN},
        ":7436",
    ),
    "another port in the settings": (
        lambda tree: tree.listen("::", 7437, "nginx").put(
            {"/etc/mycoswarm/mycoswarm.toml": 'swarm_listen = "[::]:7000"\n'}
        ),
        {},
        "",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_trouble_is_found_and_no_other(tmp_path: Path, name: str) -> None:
    change, expected, word = CASES[name]
    tree = debian13(tmp_path)
    change(tree)
    assert bad(tree) == expected
    cures = [one.fix for one in findings(tree).values() if one.severity is not OK]
    assert all(cures) and any(word in fix for fix in cures) == bool(expected)


def test_each_finding_is_one_sentence_and_one_command(tmp_path: Path) -> None:
    """Over all cases: a sentence ends with a dot, a cure has no line end, its commands are ones we have."""
    whole = typer.main.get_command(make_ctl(["mycoswarmctl", "engine"]))
    seen = 0
    for number, (change, _, _) in enumerate(CASES.values()):
        tree = debian13(tmp_path / str(number))
        change(tree)
        for one in findings(tree).values():
            assert one.detail.endswith(".") and one.detail[0].isupper(), one
            assert "\n" not in one.detail + one.fix
            for part in one.fix.removeprefix("sudo ").split(" && "):
                if part.startswith("mycoswarmctl "):
                    parse(whole, part.split()[1:])
                    seen += 1
    assert seen >= 2


def test_the_units_that_are_looked_for_are_those_of_the_package() -> None:
    units = Path(__file__).parents[3] / "systemd"
    assert set(checks_node.UNITS) == {
        *(one.name for one in units.iterdir() if one.suffix in {".service", ".socket"}),
        "run-mycoswarm\\x2dengine.mount",
    }


LAN = "mycoswarm-lan.service"


@pytest.mark.parametrize(
    ("path", "is_said"),
    [
        (f"/etc/systemd/system/{LAN}.d/of-a-forum.conf", True),
        (f"/etc/systemd/system/{LAN}.d/of-a-forum.conf.off", False),
        (f"/run/systemd/system/{LAN}.d/x.conf", True),
        (f"/etc/systemd/system.control/{LAN}.d/50-CPUQuota.conf", True),
        ("/usr/local/lib/systemd/system/mycoswarm-.service.d/x.conf", True),
        ("/etc/systemd/system/service.d/x.conf", True),
        (f"/etc/systemd/system/{LAN}", True),
        (f"/run/systemd/system/{LAN}", True),
        (f"/run/systemd/transient/{LAN}", True),
        (f"/usr/local/lib/systemd/system/{LAN}", True),
        (f"/run/systemd/generator.late/{LAN}", False),  # systemd looks there last
        ("/run/systemd/system/mycoswarm-task@7.service", True),
        ("/etc/systemd/system/mycoswarm-task@7.service", True),
        ("/etc/systemd/system/mycoswarm-mine.service", False),
        (f"/usr/lib/systemd/system/{LAN}.d/of-a-package.conf", True),
        (f"/lib/systemd/system/{LAN}.d/of-a-package.conf", True),
        (f"/run/systemd/generator/{LAN}.d/x.conf", True),
        ("/etc/systemd/system/socket.d/z.conf", True),
        ("/etc/systemd/system/mount.d/z.conf", True),
        ("/etc/systemd/system/run-.mount.d/z.conf", True),
        ("/etc/systemd/system/timer.d/z.conf", False),
        ("/usr/lib/systemd/system/ssh.service", False),
        ("/etc/systemd/system/ollama.service.d/x.conf", False),
        ("/etc/systemd/system/mycoswarm-engine@.service.d/gpu.conf", False),  # as it was brought
    ],
)
def test_a_unit_that_was_changed_is_named(tmp_path: Path, path: str, is_said: bool) -> None:
    tree = debian13(tmp_path)
    for place in ("/usr/share/mycoswarmd/engine-gpu.conf", "/opt/mycoswarm/share/engine-gpu.conf"):
        gpu = f"[Service]\n# {place}\n"
        own = gpu if path.endswith("gpu.conf") else "[Service]\nUser=root\n"
        tree.put({place: gpu, path: own})
        found = findings(tree).get("changed units")
        assert (found is not None) is is_said
        if found is not None:
            assert found.severity is NOTE and path in found.detail and path in found.fix
    if path.endswith("gpu.conf"):
        tree.put({path: "[Service]\nPrivateNetwork=no\n"})
        assert path in findings(tree)["changed units"].detail


@pytest.mark.parametrize(
    "path",
    [
        "/etc/systemd/system/system.slice.d/x.conf",
        "/run/systemd/system/-.slice.d/x.conf",
        "/etc/systemd/system/system-.slice.d/x.conf",
        "/etc/systemd/system/system-mycoswarm\\x2dprobe.slice.d/x.conf",
        "/etc/systemd/system/system.slice",
    ],
)
def test_a_slice_is_named_where_it_allows_addresses(tmp_path: Path, path: str) -> None:
    tree = debian13(tmp_path).put({path: "[Slice]\nIPAddressAllow=8.0.0.0/5\n"})
    assert path in findings(tree)["changed units"].detail
    # A bound that a distribution sets, such as systemd-oomd's, adds nothing.
    assert "changed units" not in findings(tree.put({path: "[Slice]\nManagedOOMSwap=kill\n"}))


def test_a_place_that_is_a_link_is_read_once(tmp_path: Path) -> None:
    tree = debian13(tmp_path).link("/lib", "usr/lib")
    assert "changed units" not in findings(tree)
    path = f"/usr/lib/systemd/system/{LAN}.d/x.conf"
    assert findings(tree.put({path: "[Service]\n"}))["changed units"].detail.count("x.conf") == 1
    # What is masked is said as that, and to be asked no second time.
    tree = debian13(tmp_path / "masked")
    masked(tree)
    assert set(bad(tree)) == {"units"}


# --- cures ---------------------------------------------------------------------------------------

_STAND_INS = 'sudo() { case $1 in mkdir|tee|sed|ln|chmod) "$@";; esac; }\nset -e -o pipefail\n'
_PLACES = ("/boot/", "/etc/", "/var/")


def cure(tree: Tree, fix: str) -> None:
    """Run a cure by a real shell: paths are put under the tree, what needs a running system is left out."""
    for place in _PLACES:
        fix = fix.replace(f" {place}", f" {tree.root}{place}")
    ran = subprocess.run(["bash", "-c", _STAND_INS + fix], capture_output=True, text=True)
    assert ran.returncode == 0, (fix, ran.stderr)


def test_the_pis_cure_cures_after_a_restart(tmp_path: Path) -> None:
    tree = pi(tmp_path)
    cure(tree, findings(tree)["memory"].fix)
    text = (tmp_path / "boot/firmware/cmdline.txt").read_text()
    assert text == f"{PI_CMDLINE.strip()} cgroup_enable=memory\n"
    assert findings(tree)["memory"].fix == "sudo reboot"
    cure(tree, findings(tree)["landlock"].fix)
    assert (tmp_path / "boot/firmware/cmdline.txt").read_text().count("\n") == 1
    tree.put({"/sys/fs/cgroup/cgroup.controllers": "cpu memory pids\n", "/proc/cmdline": PI_BOOTED})
    assert set(bad(tree)) == {"landlock"}


OLD_GROUPS = (
    "systemd.unified_cgroup_hierarchy=0 systemd.legacy_systemd_cgroup_controller=yes"
    " SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1"
)


def test_old_control_groups_are_cured_where_they_are_asked_for(tmp_path: Path) -> None:
    # GRUB puts this variable last, and the last word counts: adding another before it would be no cure.
    tree = debian13(tmp_path)
    hybrid(tree)
    tree.put(
        {
            "/proc/cmdline": f"BOOT_IMAGE=/boot/vmlinuz root=UUID=0 ro {OLD_GROUPS} quiet\n",
            "/etc/default/grub": f'GRUB_CMDLINE_LINUX_DEFAULT="{OLD_GROUPS} quiet"\nGRUB_CMDLINE_LINUX=""\n',
            "/etc/default/grub.d/other.cfg": 'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX nosmt"\n',
        }
    )
    fix = findings(tree)["cgroups"].fix
    assert "other.cfg" not in fix and fix.endswith(" && sudo update-grub && sudo reboot")
    cure(tree, fix)
    assert (tmp_path / "etc/default/grub").read_text().splitlines()[0].split() == [
        'GRUB_CMDLINE_LINUX_DEFAULT="',
        'quiet"',
    ]


def test_what_is_said_of_address_filters_depends_on_the_control_groups(tmp_path: Path) -> None:
    # systemd attaches filters to the new ones, and to them alone.
    for name, change, says in (
        ("a", legacy, "filters of units silently do nothing"),
        ("b", hybrid, "filters of units may do nothing"),
    ):
        tree = debian13(tmp_path / name)
        change(tree)
        assert says in findings(tree)["cgroups"].detail


def test_old_control_groups_of_a_pi_are_cured(tmp_path: Path) -> None:
    tree = pi(tmp_path)
    hybrid(tree)
    line = f"{PI_CMDLINE.strip()} {OLD_GROUPS}\n"
    tree.put({"/boot/firmware/cmdline.txt": line, "/proc/cmdline": line})
    cure(tree, findings(tree)["cgroups"].fix)
    assert (tmp_path / "boot/firmware/cmdline.txt").read_text() == f"{PI_CMDLINE.strip()}\n"


def test_old_control_groups_that_another_boot_loader_asks_for_are_named(tmp_path: Path) -> None:
    tree = debian13(tmp_path)
    hybrid(tree)
    tree.put({"/proc/cmdline": f"root=UUID=0 {OLD_GROUPS}\n"})
    assert f"take {OLD_GROUPS} out of" in findings(tree)["cgroups"].fix


@pytest.mark.parametrize("name", ["a laptop", "a policy for all to write", "no landlock"])
def test_a_cure_cures(tmp_path: Path, name: str) -> None:
    change, expected, _ = CASES[name]
    tree = debian13(tmp_path)
    change(tree)
    (which,) = expected
    cure(tree, findings(tree)[which].fix)
    if which == "landlock":
        written = (tmp_path / "etc/default/grub.d/mycoswarm-lsm.cfg").read_text()
        assert written == 'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX lsm=landlock,lockdown,yama,apparmor"\n'
    else:
        assert bad(tree) == {}


def test_the_cure_of_an_open_ollama_is_a_drop_in_that_systemd_takes(tmp_path: Path) -> None:
    tree = debian13(tmp_path).listen("0.0.0.0", 11434, "ollama")
    service = "[Service]\nExecStart=/bin/true\nEnvironment=OLLAMA_HOST=0.0.0.0\n"
    tree.put({"/etc/systemd/system/ollama.service": service})
    cure(tree, findings(tree)["exposed: Ollama"].fix)
    drop_in = (tmp_path / "etc/systemd/system/ollama.service.d/at-home.conf").read_text()
    assert "OLLAMA_HOST=127.0.0.1:11434\n" in drop_in and "IPAddressDeny=any\n" in drop_in
    said = verified(tmp_path / "etc/systemd/system/ollama.service")
    assert said == ""
    (tmp_path / "etc/systemd/system/ollama.service.d/at-home.conf").write_text(drop_in + "IPAdressDeny=any\n")
    assert "IPAdressDeny" in verified(tmp_path / "etc/systemd/system/ollama.service")


def verified(unit: Path) -> str:
    """Return what systemd-analyze has to say of a unit with its drop-ins."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    ran = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    return "".join(row for row in ran.stderr.splitlines(keepends=True) if "at-home" in row or "ollama" in row)


def test_the_cure_of_an_unknown_ollama_is_a_setting_that_the_node_takes(tmp_path: Path) -> None:
    tree = debian13(tmp_path).listen("127.0.0.1", 11434, "ollama")
    cure(tree, findings(tree)["engine"].fix)
    assert bad(tree) == {}
    assert findings(tree)["engine"].detail == "Declared engines: ollama."


# --- the node's own word -------------------------------------------------------------------------


@pytest.fixture
def sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """This machine is a sound one for the length of a test."""
    tree = debian13(tmp_path)
    monkeypatch.setattr("mycoswarmd.ctl.box.this_box", tree.box)
    return tree


def rows(document: dict[str, Any]) -> dict[str, str]:
    return {row["name"]: row["severity"] for row in document["checks"]}


def test_a_node_that_does_not_run_is_said_and_the_rest_is_looked_at(sound: Tree, tmp_path: Path) -> None:
    ran = ctl(None, "--socket", str(tmp_path / "none"), "doctor", "--json")
    assert ran.code == 1
    assert rows(ran.json)["node"] == "broken" and rows(ran.json)["disk"] == "ok"
    shown = ctl(None, "--socket", str(tmp_path / "none"), "doctor")
    assert shown.out.startswith("broken  node: The node does not run")
    assert "systemctl restart mycoswarmd" in shown.out.splitlines()[1]
    assert "1 broken" in shown.err and "ok" in shown.err


def test_a_broken_policy_is_said_once_and_never_cured_by_a_reload(node: FakeNode, sound: Tree) -> None:
    sound.put({"/etc/mycoswarm/policy.toml": "schema = 1\n[["})
    check = {"name": "policy", "severity": "fail", "detail": "broken", "fix": "x"}
    node.on("GET", "/api/status", answer({"policy": {"sha256": "a" * 64}}))
    node.on("GET", "/api/doctor", answer({"checks": [check]}))
    shown = ctl(node, "doctor").out
    assert shown.count("policy:") == 1 and "policy in force" not in shown and "reload" not in shown, shown


def test_an_older_node_that_knows_less_is_no_trouble(sound: Tree, node: FakeNode) -> None:
    node.on("GET", "/api/status", answer({"policy": {}, "swarm": None}))
    ran = ctl(node, "doctor", "--json")
    assert ran.code == 0
    assert set(rows(ran.json).values()) == {"ok"} and rows(ran.json)["node"] == "ok"


def test_nothing_is_said_twice(sound: Tree, node: FakeNode) -> None:
    names = ("policy", "disk", "clock", "cage: landlock", "engine: embedded")
    facts = [{"name": name, "severity": "ok", "detail": "as it should be"} for name in names]
    node.on("GET", "/api/status", answer({})).on("GET", "/api/doctor", answer({"checks": facts}))
    said = [row["name"] for row in ctl(node, "doctor", "--json").json["checks"]]
    assert len(said) == len(set(said))
    assert not {"cage: landlock", "engine: embedded"} & set(said)
    broken = {"name": "policy", "severity": "fail", "detail": "in force is an old one", "fix": "look"}
    node.on("GET", "/api/doctor", answer({"checks": [broken]}))
    assert "in force is an old one" in ctl(node, "doctor").out


@pytest.mark.parametrize(
    ("severity", "shown", "code"), [("ok", "ok", 0), ("warn", "weak", 0), ("fail", "broken", 1)]
)
def test_what_the_node_says_is_shown_and_counts(
    sound: Tree, node: FakeNode, severity: str, shown: str, code: int
) -> None:
    check = {"name": "engine: up", "severity": severity, "detail": "gone\x07", "fix": "look"}
    node.on("GET", "/api/status", answer({})).on("GET", "/api/doctor", answer({"checks": [check]}))
    assert (ctl(node, "doctor", "--json").code, rows(ctl(node, "doctor", "--json").json)["engine: up"]) == (
        code,
        shown,
    )
    ran = ctl(node, "doctor")
    assert "gone\\x07" in ran.out
    assert ("\n        look\n" in ran.out) == (severity != "ok")


def test_a_policy_that_was_changed_and_not_read_again(sound: Tree, node: FakeNode) -> None:
    text = SHIPPED.read_text()
    sound.put({"/etc/mycoswarm/policy.toml": text})
    in_force = policy_check.check_policy(text.encode(), path="p", resolve_program=lambda name: name).policy
    node.on("GET", "/api/status", answer({"policy": {"sha256": in_force.sha256}}))
    assert "policy in force" not in rows(ctl(node, "doctor", "--json").json)
    sound.put({"/etc/mycoswarm/policy.toml": text + "# more\n"})
    assert rows(ctl(node, "doctor", "--json").json)["policy in force"] == "weak"
    assert "sudo mycoswarmctl policy reload" in ctl(node, "doctor").out


@pytest.mark.parametrize(
    ("age_s", "same", "expected"),
    [(60, True, "ok"), (None, True, "ok"), (60, False, "weak"), (9e5, True, "weak")],
)
def test_a_roster_that_is_older_than_the_swarms(
    sound: Tree, node: FakeNode, age_s: float | None, same: bool, expected: str
) -> None:
    other = {"name": "pi", "state": "ready", "self": False, "verified": {"digest_same": same}}
    me = {"name": "here", "state": "ready", "self": True, "verified": {"digest_same": True}}
    node.on("GET", "/api/status", answer({"swarm": {"roster_age_s": age_s}}))
    node.on("GET", "/api/swarm", answer({"swarm": {"problems": []}, "nodes": [me, other]}))
    assert rows(ctl(node, "doctor", "--json").json)["roster"] == expected


def test_a_node_that_was_put_out_is_broken(sound: Tree, node: FakeNode) -> None:
    other = {"name": "pi", "state": "unreachable", "self": False}
    me = {"name": "here", "state": "ready", "self": True}
    node.on("GET", "/api/status", answer({"swarm": {"name": "home", "roster_age_s": 60}}))
    said = {"swarm": {"name": "home"}, "self": {"id": "a" * 26}}
    node.on("GET", "/api/swarm", answer({**said, "nodes": [me, other]}))
    assert "membership" not in rows(ctl(node, "doctor", "--json").json)
    node.on("GET", "/api/swarm", answer({**said, "nodes": [other]}))
    found = ctl(node, "doctor", "--json").json
    assert rows(found)["membership"] == "broken"
    (row,) = (one for one in found["checks"] if one["name"] == "membership")
    assert "put out of swarm home" in row["detail"]
    assert row["fix"] == "sudo mycoswarmctl leave && sudo mycoswarmctl enroll"


def test_what_a_unit_did_not_prove_is_weak_and_what_it_refuted_is_broken(sound: Tree, node: FakeNode) -> None:
    wire = pytest.importorskip("mycoswarmd.wire.proof")
    names = [name.value for name in wire.EXPECTED[wire.Unit.CORE]]

    def proved(**other: bool | None) -> dict[str, Any]:
        checks = [
            {"name": name, "ok": other.get(name.replace("-", "_"), True), "detail": ""} for name in names
        ]
        return {"proofs": [{"unit": "core", "checks": checks}, {"unit": "of a newer node"}]}

    node.on("GET", "/api/status", answer({}))
    for document, expected in (
        (proved(), "ok"),
        (proved(memory=None), "weak"),
        (proved(inet_socket=False), "broken"),
        (proved(inet_socket=False, memory=None), "broken"),
        ({"proofs": [{"unit": "core", "checks": []}]}, "weak"),
    ):
        node.on("GET", "/v1/security", answer(document))
        assert rows(ctl(node, "doctor", "--json").json)["confinement: core"] == expected
    # One cause is said once: what the machine lacks, no unit can prove.
    sound.put({"/sys/fs/cgroup/cgroup.controllers": "\n"})
    node.on("GET", "/v1/security", answer(proved(memory=None)))
    facts = [
        {"name": f"cage: {name}-cgroup", "severity": "warn", "detail": "absent"}
        for name in ("memory", "pids")
    ]
    node.on("GET", "/api/doctor", answer({"checks": facts}))
    said = rows(ctl(node, "doctor", "--json").json)
    assert {name for name, severity in said.items() if severity != "ok"} == {"memory", "pids", "cpu"}
    node.on("GET", "/v1/security", answer(proved(memory=False)))
    assert rows(ctl(node, "doctor", "--json").json)["confinement: core"] == "broken"


def test_another_machine_is_asked_and_not_looked_at(
    sound: Tree, monkeypatch: pytest.MonkeyPatch, node: FakeNode
) -> None:
    check = {"name": "disk", "severity": "fail", "detail": "full", "fix": "free some"}
    node.on("GET", "/api/doctor", answer({"checks": [check]}))
    monkeypatch.setattr("mycoswarmd.ctl.tlshttp.open_remote", lambda *_: UnixTransport(node.path))
    ran = ctl(None, "--node", "pi", "doctor", "--json")
    assert (ran.code, rows(ran.json)) == (1, {"disk": "broken"})


def test_listeners_are_read_as_the_kernel_writes_them() -> None:
    """Against the kernel of this machine."""
    with (
        socket.create_server(("127.0.0.1", 0)) as near,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as near6,
        socket.create_server(("0.0.0.0", 0)) as wide,
    ):
        ports = [one.getsockname()[1] for one in (near, near6, wide)]
        found: dict[int, Listener] = {one.port: one for one in listeners(this_box())}
        assert [found[port].is_open for port in ports] == [False, False, True]
        assert found[ports[0]].program  # this very process


def test_findings_are_one_json_document(sound: Tree, node: FakeNode) -> None:
    node.on("GET", "/api/status", answer({}))
    checks = json.loads(ctl(node, "doctor", "--json").out)["checks"]
    assert all(set(row) == {"name", "severity", "detail", "fix"} for row in checks)
    assert all(row["fix"] == "" for row in checks if row["severity"] == "ok")
