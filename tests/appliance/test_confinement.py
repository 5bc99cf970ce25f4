"""Attacks on the units' confinement that need no bug: names without end, a ring, and a unit that was changed.

Each is tried in copies of our units, all of them at once, and in copies without what should stop it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.appliance.images import SUITES
from tests.appliance.machines import Machine
from tests.appliance.nodes import ctl, proved, wait_ready
from tests.appliance.test_directives import SERVICES, directives

pytestmark = pytest.mark.timeout(1200)
MOST = 3000
# Makes links in a directory, with targets for which each needs a page beside its inode, as long as it may.
_FILL = f"""
import json, os, sys
made = 0
try:
    while made < {MOST}:
        os.symlink("a" * 200, f"{{sys.argv[1]}}/{{made}}")
        made += 1
except OSError:
    pass
print("SAID " + json.dumps(made))
"""
# Looks for a place for a name, and for a socket that was made without a call for sockets.
_TRY = r"""
import ctypes, errno, json, mmap, os, socket, struct

libc = ctypes.CDLL(None, use_errno=True)


def ring():
    # io_uring_setup, then IORING_OP_SOCKET by io_uring_enter; the kernel's uapi/linux/io_uring.h.
    told = ctypes.create_string_buffer(120)
    descriptor = libc.syscall(ctypes.c_long(425), ctypes.c_long(1), told)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "")
    tail, array = (struct.unpack_from("I", told, 40 + at)[0] for at in (4, 24))
    cqes = struct.unpack_from("I", told, 80 + 20)[0]
    both = mmap.PROT_READ | mmap.PROT_WRITE
    shared = mmap.mmap(descriptor, 4096, mmap.MAP_SHARED, both, offset=0)
    work = mmap.mmap(descriptor, 4096, mmap.MAP_SHARED, both, offset=0x10000000)
    work[:64] = struct.pack("=BBHiQQIIQ", 45, 0, 0, 2, 2, 0, 0, 0, 7) + bytes(24)
    struct.pack_into("I", shared, array, 0)
    struct.pack_into("I", shared, tail, 1)
    words = [ctypes.c_long(word) for word in (descriptor, 1, 1, 1, 0, 0)]
    if libc.syscall(ctypes.c_long(426), *words) < 0:
        raise OSError(ctypes.get_errno(), "")
    made = struct.unpack_from("=QiI", shared, cqes)[1]
    if made < 0:
        raise OSError(-made, "")
    return socket.socket(fileno=made).family.name


places = set()
link = "link-" + os.urandom(8).hex()  # several look at once
for top, directories, _ in os.walk("/"):
    unlike = {"/proc", "/sys", "/usr", "/etc"}
    directories[:] = [one for one in directories if os.path.join(top, one) not in unlike]
    try:
        os.symlink("a", os.path.join(top, link))
    except OSError:
        continue
    places.add(top)
    directories.clear()
    os.unlink(os.path.join(top, link))
try:
    said = ring()
except OSError as exc:
    said = errno.errorcode[exc.errno]
print("SAID " + json.dumps([sorted(places), said]))
"""
_PROVE = """
import json, sys
from mycoswarmd.outposts.selftest import prove
from mycoswarmd.wire.proof import Unit
checks = prove(Unit(sys.argv[1])).checks
print("SAID " + json.dumps({one.name.value: [one.ok, one.detail] for one in checks}))
"""
# What somebody who does not like our lines may write, and the check that says so.
CHANGES: Mapping[str, tuple[Sequence[str], str]] = {
    "root": (["User=root"], "user"),
    "the core's user": (["User=_mycoswarm"], "user"),
    "groups": (["SupplementaryGroups=shadow disk _mycoswarm"], "user"),
    "calls": (["SystemCallFilter=", "SystemCallFilter=~reboot"], "calls"),
    "half of all addresses": (["IPAddressAllow=128.0.0.0/1"], "canary"),
    "a quarter": (["IPAddressAllow=0.0.0.0/2 8.8.8.8"], "canary"),
    "namespaces": (["RestrictNamespaces=no"], "calls"),
    "code": (["MemoryDenyWriteExecute=no"], "calls"),
}
# What our pages say to write, for whoever needs it.
DOCUMENTED: Mapping[str, tuple[str, str]] = {
    "probe": ("docs/howto/gpu-workstation.md", "SupplementaryGroups=GROUP"),
    "core": ("docs/man/mycoswarm-security.7.md", "BindReadOnlyPaths=/var/lib/sss/pipes"),
}
# What a machine's owner may have where every unit sees it, and a service that is given whole.
_OWNERS = """
import os, socket
os.makedirs("/var/lib/sss/pipes")
socket.socket(socket.AF_UNIX).bind("/var/lib/sss/pipes/nss")
os.mkdir("/etc/closed", 0o711)
os.mkdir("/etc/many")
for number in range(20_100):
    open(f"/etc/many/{number}", "w").close()
"""


@pytest.fixture(scope="module", params=SUITES)
def machine(fresh: dict[str, tuple[Machine, str]], request: pytest.FixtureRequest) -> Machine:
    machine, _ = fresh[request.param]
    for name, text in (("fill", _FILL), ("try", _TRY), ("prove", _PROVE)):
        machine.write(f"/usr/lib/confined/{name}.py", text)
    return machine


def said(machine: Machine, units: Mapping[str, tuple[Sequence[str], str]]) -> dict[str, Any]:
    """Run a program in each of these units, all at once, and return what each said."""
    names = {key: f"confined-{number}.service" for number, key in enumerate(units)}
    for key, (lines, program) in units.items():
        run = f"ExecStart=/usr/bin/python3 -I /usr/lib/confined/{program}"
        text = ["[Service]", *lines, "Type=oneshot", "StandardOutput=journal", run, ""]
        machine.write(f"/run/systemd/system/{names[key]}", "\n".join(text))
    machine.run("systemctl", "daemon-reload")
    since = machine.run("date", "+%s").out.strip()
    machine.run("systemctl", "start", *names.values(), check=False, timeout_s=600)
    machine.run("journalctl", "--sync")
    found = {}
    for key, name in names.items():
        journal = machine.run("journalctl", f"--since=@{since}", "-o", "cat", "-u", name).out
        assert "SAID " in journal, (key, journal[-2000:])
        found[key] = json.loads(journal.rsplit("SAID ", 1)[1].splitlines()[0])
    return found


def wait_told(machine: Machine, text: str, become: str = "") -> None:
    """Wait until doctor says this; it leaves out what systemd does not tell it within a few seconds."""
    machine.wait_until(f"{become}mycoswarmctl doctor | grep -qF '{text}'")


def without(lines: Sequence[str], *names: str) -> list[str]:
    return [line for line in lines if line.partition("=")[0] not in names]


def test_an_engine_that_makes_names_without_end_fills_its_own_file_system(machine: Machine) -> None:
    lines = [*directives("engine"), "DynamicUser=yes"]
    at, beside = "mycoswarm-engine/filled", "of-all/filled"
    units = {
        place: ([*lines, f"RuntimeDirectory={place}", "RuntimeDirectoryMode=0750"], f"fill.py /run/{place}")
        for place in (at, beside)
    }
    assert machine.run("stat", "-f", "-c", "%c", "/run/mycoswarm-engine").out == "256\n"
    found = said(machine, units)
    assert found[beside] == MOST
    assert 100 < found[at] < 256
    machine.run("rm", "-r", "/run/of-all")
    # It is all gone with the unit, and the next engine has a place.
    machine.wait_until('test -z "$(ls -A /run/mycoswarm-engine)"')


def test_who_writes_nothing_has_no_place_for_a_name_and_nobody_has_a_ring(machine: Machine) -> None:
    machine.run("mkdir", "-p", "/var/lib/mycoswarm", "/var/lib/mycoswarm-signer")
    confined = {unit: (directives(unit), "try.py") for unit in SERVICES}
    loose = {
        f"loose {unit}": (without(lines, "InaccessiblePaths", "SystemCallFilter"), program)
        for unit, (lines, program) in confined.items()
    }
    found = said(machine, confined | loose)
    able = json.loads(machine.python(_TRY.replace('os.walk("/")', "()")).out.removeprefix("SAID "))[1]
    may = {"core": {"/tmp", "/var/tmp", "/var/lib/mycoswarm"}, "signer": {"/var/lib/mycoswarm-signer"}}
    for unit in SERVICES:
        places, ring = found[unit]
        assert set(places) == may.get(unit, set()), (unit, places)
        assert ring == "EPERM", unit
        places, ring = found[f"loose {unit}"]
        assert {"/tmp", "/var/tmp"} <= set(places), (unit, places)
        assert ring == able, unit  # a kernel may have no rings for anybody


def test_the_dialer_says_how_it_was_changed(machine: Machine) -> None:
    units = {key: ([*directives("lan"), *lines], "prove.py lan") for key, (lines, _) in CHANGES.items()}
    found = said(machine, units | {"": (directives("lan"), "prove.py lan")})
    weak = {
        key: {name for name, (ok, _) in checks.items() if ok is not True} for key, checks in found.items()
    }
    for names in weak.values():
        names.discard("memory")  # the outer machine may keep that controller
    assert weak.pop("") == set(), found[""]
    assert weak == {key: {check} for key, (_, check) in CHANGES.items()}, found


def test_a_machine_that_was_set_up_as_our_pages_say_is_not_called_weak(machine: Machine) -> None:
    def units(also: Sequence[str] = ()) -> dict[str, tuple[Sequence[str], str]]:
        return {
            unit: ([*directives(unit), line.replace("GROUP", "games"), *also], f"prove.py {unit}")
            for unit, (_, line) in DOCUMENTED.items()
        }

    for page, line in DOCUMENTED.values():
        assert line in (Path(__file__).parents[2] / page).read_text(), page
    try:
        machine.python(_OWNERS)
        told = said(machine, units())
        more = said(machine, units(["SupplementaryGroups=disk"]))
    finally:
        machine.sh("rm -rf /var/lib/sss /etc/closed /etc/many")
    for unit, checks in told.items():
        weak = {name for name, (ok, _) in checks.items() if ok is not True}
        assert not weak - {"memory"}, (unit, checks)
    assert "sssd's" in told["core"]["doors"][1] and "/etc/closed" in told["core"]["doors"][1]
    assert more["probe"]["user"][0] is False and more["core"]["user"][0] is False, more


@pytest.fixture
def changed(machine: Machine) -> Iterator[Machine]:
    """The dialer that runs, with a drop-in of three lines."""
    place = "/etc/systemd/system/mycoswarm-lan.service.d/of-a-forum.conf"
    lines = ["[Service]", "User=root", "SystemCallFilter=", "SystemCallFilter=~reboot"]
    machine.write(place, "\n".join([*lines, "IPAddressAllow=128.0.0.0/1", ""]))
    try:
        machine.sh("systemctl daemon-reload; systemctl restart mycoswarm-lan")
        yield machine
    finally:
        machine.sh(f"rm -r {Path(place).parent}; systemctl daemon-reload; systemctl restart mycoswarm-lan")
        machine.run("sleep", "2.1")  # nobody is told what the changed one proved


def test_the_node_and_doctor_say_so(changed: Machine) -> None:
    wait_ready(changed)
    changed.run("sleep", "2.1")  # so long a proof is fresh
    (proof,) = [one for one in proved(changed, "lan")["proofs"] if one["unit"] == "lan"]
    weak = {one["name"] for one in proof["checks"] if one["ok"] is False}
    assert weak == {"user", "calls", "canary"}, proof
    status = ctl(changed, "status").out
    assert all(f"unit lan is weak: {name}: " in status for name in weak), status
    for become in ("", "runuser -u nobody -- "):
        wait_told(changed, "mycoswarm-lan.service.d/of-a-forum.conf", become)


# Ways to let the dialer, or a door, do more, from elsewhere than /etc and our units' names.
_LAN, _SIGNER, _AT = "mycoswarm-lan.service", "mycoswarm-signer.socket", "lib/systemd/system"
ELSEWHERE: Mapping[str, tuple[str, str, str]] = {
    f"/run/systemd/system/{_LAN}": (_LAN, "Service", "IPAddressAllow=203.0.113.0/24"),
    f"/usr/local/{_AT}/{_LAN}": (_LAN, "Service", "IPAddressAllow=203.0.113.0/24"),
    f"/usr/{_AT}/{_LAN}.d/of-a-package.conf": (_LAN, "Service", "IPAddressAllow=203.0.113.0/24"),
    "/etc/systemd/system/socket.d/z.conf": (_SIGNER, "Socket", "SocketMode=0666"),
}


def test_doctor_names_each_file_that_systemd_takes_lines_from(machine: Machine) -> None:
    for path, (unit, section, line) in ELSEWHERE.items():
        shipped = "" if path.endswith(".conf") else machine.run("cat", f"/usr/{_AT}/{unit}").out
        machine.write(path, f"{shipped}\n[{section}]\n{line}\n")
        try:
            machine.run("systemctl", "daemon-reload")
            key, _, value = line.partition("=")
            assert value in machine.run("systemctl", "show", "-P", key, unit).out.split(), path
            wait_told(machine, path)
        finally:
            machine.sh(
                f"rm {path}; rmdir --ignore-fail-on-non-empty {Path(path).parent}; systemctl daemon-reload"
            )
        assert path not in machine.run("mycoswarmctl", "doctor", check=False).out


def test_what_a_slice_allows_counts_for_the_units_in_it_and_is_named(machine: Machine) -> None:
    path = "/etc/systemd/system/system.slice.d/of-a-forum.conf"
    machine.write(path, "[Slice]\nIPAddressAllow=203.0.113.0/24\n")
    try:
        found = said(machine, {"lan": (directives("lan"), "prove.py lan")})
        assert "203.0.113.1" in found["lan"]["canary"][1] and found["lan"]["canary"][0] is False, found
        wait_told(machine, path)
    finally:
        machine.sh(f"rm -r {Path(path).parent}; systemctl daemon-reload")
