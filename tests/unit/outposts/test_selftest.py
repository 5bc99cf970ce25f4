"""The self-test in processes with and without each confinement: it flips with the kernel, not with a file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mycoswarmd.wire.proof import EXPECTED, CheckName, Proof, Unit, parse_proof
from tests.dialers import control_group, ip, let_nothing_out, network

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes rights away from a process that has them")
CODE = """
import sys
from mycoswarmd.outposts.selftest import prove
from mycoswarmd.wire.proof import Unit, encode_proof
{before}
print(encode_proof(prove(Unit(sys.argv[1]))).decode())
"""
# A seccomp filter that lets a process make sockets of no family but one (-1: none at all).
FILTER = """
import ctypes, struct, platform
libc = ctypes.CDLL(None, use_errno=True)
number = 41 if platform.machine() == "x86_64" else 198
code = b"".join(struct.pack("=HBBI", *row) for row in [
    (0x20, 0, 0, 0), (0x15, 0, 3, number), (0x20, 0, 0, 16), (0x15, 1, 0, {family} & 0xFFFFFFFF),
    (0x06, 0, 0, 0x00050000 | 97), (0x06, 0, 0, 0x7FFF0000)])
buffer = ctypes.create_string_buffer(code)
program = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer)))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program, 0, 0) == 0
"""
NO_CAPABILITIES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all", "--reuid=0")


def proof_of(unit: Unit, *, before: str = "", prefix: tuple[str, ...] = ()) -> Proof:
    run = subprocess.run(
        [*prefix, sys.executable, "-I", "-c", CODE.format(before=before), unit.value],
        check=True,
        capture_output=True,
    )
    return parse_proof(run.stdout)


def held(proof: Proof) -> set[CheckName]:
    return {check.name for check in proof.checks if check.ok is True}


@pytest.mark.parametrize("unit", Unit)
def test_each_unit_tries_all_that_it_should(unit: Unit) -> None:
    assert [check.name for check in proof_of(unit).checks] == list(EXPECTED[unit])


def test_a_process_like_any_other_proves_nothing_that_matters() -> None:
    free = held(proof_of(Unit.CORE)) | held(proof_of(Unit.LAN))
    never = {CheckName.INET_SOCKET, CheckName.CANARY, CheckName.ADDRESS_FAMILIES, CheckName.NO_NEW_PRIVILEGES}
    assert free.isdisjoint(never)


def test_without_sockets_nothing_can_be_reached() -> None:
    proof = proof_of(Unit.CORE, before=FILTER.format(family=-1))
    assert held(proof) >= {
        CheckName.INET_SOCKET,
        CheckName.ADDRESS_FAMILIES,
        CheckName.DBUS,
        CheckName.RESOLVER,
        CheckName.DOCKER,
        CheckName.SECCOMP,
        CheckName.NO_NEW_PRIVILEGES,
    }
    # A network process that cannot make the socket to try it with has proved no filter.
    (canary,) = [
        one
        for one in proof_of(Unit.LAN, before=FILTER.format(family=-1)).checks
        if one.name is CheckName.CANARY
    ]
    assert (canary.ok, canary.detail) == (None, "127.0.0.2: EAFNOSUPPORT")


@pytest.mark.parametrize("family", [2, 10])
def test_one_family_of_the_internet_is_one_too_many(family: int) -> None:
    assert CheckName.INET_SOCKET not in held(proof_of(Unit.CORE, before=FILTER.format(family=family)))


@needs_root
@pytest.mark.parametrize(("family", "name"), [(16, "netlink"), (17, "packet")])
def test_one_other_family_is_found(family: int, name: str) -> None:
    before = FILTER.format(family=family)
    assert CheckName.ADDRESS_FAMILIES not in held(proof_of(Unit.CORE, before=before)), name
    # Discovery hears by netlink of a cable that was plugged in.
    assert (CheckName.ADDRESS_FAMILIES in held(proof_of(Unit.DISCOVERY, before=before))) == (
        name == "netlink"
    )


NO_DESCRIPTORS = """
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
try:
    while True:
        os.dup(0)
except OSError:
    pass
"""


def test_no_free_descriptors_are_no_proof() -> None:
    proof = proof_of(Unit.CORE, before=NO_DESCRIPTORS)
    needs_none = {CheckName.DOORS, CheckName.CALLS}
    assert {check.ok for check in proof.checks if check.name not in needs_none} == {None}


# A root with nothing in it, as units have; what is done before it is sealed comes in between.
ROOT = """
import ctypes, os, resource, socket
libc = ctypes.CDLL(None)
assert libc.unshare(0x20000) == 0
assert libc.mount(None, b"/", None, 0x44000, None) == 0
assert libc.mount(b"tmpfs", b"/mnt", b"tmpfs", 0, None) == 0
os.chdir("/mnt")
def listen(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    door = socket.socket(socket.AF_UNIX)
    door.bind(path)
    door.close()
{inside}
os.chroot("/mnt")
{seal}
"""
SEAL = 'assert libc.mount(None, b"/", None, 0x21, None) == 0'
OUTPOST = 'listen("run/mycoswarm-outposts/lan.sock")'
MOUNTED = """
listen("elsewhere/x")
open("door", "w").close()
assert libc.mount(b"elsewhere/x", b"door", None, 0x1000, None) == 0
assert libc.mount(b"tmpfs", b"elsewhere", b"tmpfs", 0, None) == 0
"""
NOBODY = "; os.setuid(65534)"
MANY = "for number in range(20100): open('{}' + str(number), 'w').close()"
ETC = "os.makedirs('etc/x')\n"
LISTED = "os.makedirs('etc/x/y'); open('etc/x/z', 'w').close(); os.chmod('etc/x', 0o744)"
# What an engine can do in its own directory.
ENGINES = "os.makedirs('run/mycoswarm-engine/0/x')\n"
SECRET = "os.chmod('run/mycoswarm-engine/0', 0o711)"


@needs_root
@pytest.mark.parametrize(
    ("unit", "inside", "seal", "ok", "detail"),
    [
        (Unit.SIGNER, "", SEAL, True, "none in sight"),
        (Unit.CORE, OUTPOST, SEAL, True, "none in sight"),  # not looked at: such directories are given whole
        (Unit.CORE, 'listen("run/mycoswarm/api.sock")', SEAL, True, "1 in sight, all given"),
        (Unit.SIGNER, OUTPOST, SEAL, False, "/run/mycoswarm-outposts/lan.sock is in sight"),
        (Unit.CORE, 'listen("srv/of-others/x")', SEAL, False, "/srv/of-others/x is in sight"),
        (Unit.CORE, 'listen("run/mycoswarm-outposts-not/x")', SEAL, False, "-not/x is in sight"),
        (Unit.CORE, MOUNTED, SEAL, False, "/door is in sight"),
        (Unit.CORE, "", "", False, "the whole machine is in sight"),
        (Unit.CORE, "", SEAL + NO_DESCRIPTORS, None, "EMFILE"),
        (Unit.CORE, 'os.mkdir("closed"); os.chmod("closed", 0o111)', SEAL + NOBODY, None, "EACCES"),
        (Unit.CORE, 'os.mkdir("closed"); os.chmod("closed", 0)', SEAL + NOBODY, True, "none"),
        (Unit.CORE, MANY.format(""), SEAL, None, "more than 20000 files"),
        (Unit.CORE, ENGINES + MANY.format("run/mycoswarm-engine/0/"), SEAL, True, "none in sight"),
        (Unit.CORE, ENGINES + SECRET, SEAL + NOBODY, True, "none in sight"),
        # What a machine's owner may have, and what our own pages say to write.
        (Unit.LAN, ETC + "os.chmod('etc/x', 0o711)", SEAL + NOBODY, True, "of /etc/: 1, such as /etc/x"),
        (Unit.LAN, LISTED, SEAL + NOBODY, True, "none in sight"),
        (Unit.LAN, ETC + MANY.format("etc/x/"), SEAL, True, "none in sight"),
        (Unit.LAN, ETC + 'listen("etc/x/y")', SEAL, False, "/etc/x/y is in sight"),
        (Unit.CORE, 'listen("var/lib/sss/pipes/nss")', SEAL, True, "none in sight; sssd's beside"),
        (Unit.CORE, 'listen("var/lib/sss/other")', SEAL, False, "/var/lib/sss/other is in sight"),
        (Unit.LAN, 'listen("var/lib/sss/pipes/nss")', SEAL, False, "/var/lib/sss/pipes/nss is in sight"),
    ],
)
def test_a_socket_that_was_not_given_is_found(
    unit: Unit, inside: str, seal: str, ok: bool | None, detail: str
) -> None:
    proof = proof_of(unit, before=ROOT.format(inside=inside, seal=seal))
    (found,) = [one for one in proof.checks if one.name is CheckName.DOORS]
    assert found.ok is ok and detail in found.detail, found


# As PrivateUsers=yes has it: of groups that are not the unit's own no number is left.
NAMESPACE = """
import ctypes, os
import encodings.ascii  # while it can be read
from pathlib import Path
libc = ctypes.CDLL(None)
assert libc.unshare(0x20000) == 0
assert libc.mount(None, b"/", None, 0x44000, None) == 0
for file in (b"passwd", b"group"):
    assert libc.mount(b"{at}/" + file, b"/etc/" + file, None, 0x1000, None) == 0
os.setgroups({groups})
os.setresgid(4242, 4242, 4242)
os.setresuid(4242, 4242, 4242)
assert libc.prctl(4, 1, 0, 0, 0) == 0
assert libc.unshare(0x10000000) == 0
for file, text in (("setgroups", "deny"), ("uid_map", "4242 4242 1"), ("gid_map", "4242 4242 1")):
    Path("/proc/self", file).write_text(text)
"""


@needs_root
@pytest.mark.parametrize(
    ("unit", "user", "groups", "ok", "detail"),
    [
        (Unit.PROBE, "_mycoswarm-probe", [], True, ":_mycoswarm-probe"),
        (Unit.PROBE, "_mycoswarm-probe", [4444], True, "not in sight: 1"),
        (Unit.PROBE, "_mycoswarm-probe", [4444, 4445], True, "not in sight: 2"),  # one as a page says
        (Unit.PROBE, "_mycoswarm-probe", [4444, 4445, 4446], False, "3 that are not in sight"),
        (Unit.SIGNER, "_mycoswarm-signer", [4444], False, "1 that are not in sight"),
        (Unit.PROBE, "_mycoswarm-signer", [], False, "_mycoswarm-signer:"),
    ],
)
def test_groups_that_are_not_in_sight_are_counted(
    unit: Unit, user: str, groups: list[int], ok: bool, detail: str, tmp_path: Path
) -> None:
    (tmp_path / "passwd").write_text(f"{user}:x:4242:4242::/:/bin/false\n")
    (tmp_path / "group").write_text(f"{user}:x:4242:\n")
    proof = proof_of(unit, before=NAMESPACE.format(at=tmp_path, groups=groups))
    (found,) = [one for one in proof.checks if one.name is CheckName.USER]
    assert found.ok is ok and detail in found.detail, found


@needs_root
def test_capabilities_are_all_looked_at() -> None:
    prefix = NO_CAPABILITIES
    assert CheckName.CAPABILITIES not in held(proof_of(Unit.CORE))
    # For root an empty bounding set alone leaves nothing after execve.
    assert CheckName.CAPABILITIES in held(proof_of(Unit.CORE, prefix=prefix))


@needs_root
@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("dbus/system_bus_socket", CheckName.DBUS),
        ("systemd/private", CheckName.DBUS),
        ("systemd/resolve/io.systemd.Resolve", CheckName.RESOLVER),
        ("nscd/socket", CheckName.RESOLVER),
        ("avahi-daemon/socket", CheckName.RESOLVER),
        ("docker.sock", CheckName.DOCKER),
        ("podman/podman.sock", CheckName.DOCKER),
    ],
)
def test_an_open_door_is_found(path: str, name: CheckName) -> None:
    """In a mount namespace of its own, somebody listens where a service of the machine would."""
    before = f"""
import ctypes, os, socket
libc = ctypes.CDLL(None)
assert libc.unshare(0x20000) == 0
assert libc.mount(None, b"/", None, 0x44000, None) == 0
assert libc.mount(b"tmpfs", b"/run", b"tmpfs", 0, None) == 0
if {{is_open}}:
    os.makedirs(os.path.dirname("/run/{path}"), exist_ok=True)
    door = socket.socket(socket.AF_UNIX, {{kind}})
    door.bind("/run/{path}")
    if {{kind}} == 1:
        door.listen()
"""
    assert name in held(proof_of(Unit.CORE, before=before.format(is_open=False, kind=1)))
    assert name not in held(proof_of(Unit.CORE, before=before.format(is_open=True, kind=1)))
    assert name not in held(proof_of(Unit.CORE, before=before.format(is_open=True, kind=2)))
    shut = before.format(is_open=True, kind=1) + "door.close()\n"  # nobody listens any more
    assert name in held(proof_of(Unit.CORE, before=shut))


@needs_root
@pytest.mark.parametrize(
    ("cgroup", "file", "text", "expected"),
    [
        ("0::/x\n", "x/memory.max", "536870912\n", True),
        ("0::/x\n", "x/memory.max", "max\n", False),
        ("0::/x\n", "x/other", "", None),
        ("4:memory:/x\n0::/\n", "memory/x/memory.limit_in_bytes", "536870912\n", True),
        ("4:memory:/x\n0::/\n", "memory/x/memory.limit_in_bytes", "9223372036854771712\n", False),
        ("4:cpu,memory:/x\n", "memory/x/memory.limit_in_bytes", "rubbish\n", False),
        ("rubbish\n", "x", "", None),
    ],
)
def test_the_memory_bound_is_read_in_either_version(
    cgroup: str, file: str, text: str, expected: bool | None, tmp_path: Path
) -> None:
    (tmp_path / "cgroup").write_text(cgroup)
    (tmp_path / "fs" / file).parent.mkdir(parents=True)
    (tmp_path / "fs" / file).write_text(text)
    before = (
        "from mycoswarmd.outposts import selftest; from pathlib import Path\n"
        f"selftest._CGROUP = Path({str(tmp_path / 'cgroup')!r})\n"
        f"selftest._CGROUPS = Path({str(tmp_path / 'fs')!r})"
    )
    (memory,) = [one for one in proof_of(Unit.CORE, before=before).checks if one.name is CheckName.MEMORY]
    assert memory.ok is expected, memory.detail


# --- the canary, in a control group with a filter of its own --------------------------------------


@needs_root
def test_the_canary_dies_where_the_kernel_filters(tmp_path: Path) -> None:
    with control_group(tmp_path) as group:
        let_nothing_out(group)
        enter = f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))"
        checks = {one.name: one for one in proof_of(Unit.LAN, before=enter).checks}
        found = checks[CheckName.CANARY]
        assert found.ok is True and found.detail.startswith(f"EPERM: {' '.join(OUTSIDE)}"), found
    assert not proof_of(Unit.LAN).holds(CheckName.CANARY)


OUTSIDE = ("127.0.0.2", "0.0.0.1", "169.254.0.1", "192.0.2.1", "198.51.100.1", "203.0.113.1")


@needs_root
@pytest.mark.parametrize("also", OUTSIDE[1:])
def test_a_filter_that_lets_something_else_out_is_too_wide(also: str, tmp_path: Path) -> None:
    """Without a route, too: nothing that could be sent leaves the machine, and the filter is asked."""
    with control_group(tmp_path) as group, network("wide") as there:
        ip("-n", there, "link", "set", "lo", "up")
        let_nothing_out(group, but=also)
        enter = f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))"
        proof = proof_of(Unit.LAN, before=enter, prefix=("ip", "netns", "exec", there))
    (canary,) = [one for one in proof.checks if one.name is CheckName.CANARY]
    assert (canary.ok, canary.detail) == (False, f"a packet was sent to {also}: the IP filter is too wide")


@needs_root
def test_a_route_that_refuses_is_no_filter() -> None:
    with network("canary") as there:
        ip("-n", there, "route", "add", "prohibit", "127.0.0.2/32", "table", "local")
        proof = proof_of(Unit.LAN, prefix=("ip", "netns", "exec", there))
    (canary,) = [one for one in proof.checks if one.name is CheckName.CANARY]
    assert (canary.ok, canary.detail) == (False, "127.0.0.2: EACCES")


def test_the_line_is_short_enough_for_whoever_reads_it() -> None:
    run = subprocess.run(
        [sys.executable, "-I", "-c", CODE.format(before=""), "core"], check=True, capture_output=True
    )
    assert len(run.stdout) <= 4000
    assert json.loads(run.stdout)["unit"] == "core"
