"""Operations, steps and probes: golden, and the laws that a golden copy would not explain."""

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import pytest

from mycoswarmd.agent import confine, prove
from mycoswarmd.core.types import Limits
from mycoswarmd.errors import CageError
from mycoswarmd.sandbox import unitspec
from mycoswarmd.sandbox.landlock import DEVICES
from mycoswarmd.sandbox.spec import absent, confinement, operations, probes, rlimits
from tests.unit.sandbox.hosts import LS, PYTHON, WHO, make_host, make_spec

MOUNTS = {"ro-bind", "symlink", "dir", "file", "proc", "dev-bind", "tmpfs", "remount-ro"}

GOLDEN = """\
unshare-user
unshare-net
unshare-pid
unshare-ipc
unshare-uts
unshare-cgroup-try
hostname cage
die-with-parent
new-session
clearenv
setenv HOME /workspace
setenv LANG C.UTF-8
setenv LC_ALL C.UTF-8
setenv PATH /usr/bin:/bin
setenv PWD /workspace
setenv TMPDIR /tmp
setenv GIT_CONFIG_NOSYSTEM 1
setenv PYTHONDONTWRITEBYTECODE 1
ro-bind /usr /usr
symlink usr/bin /bin
symlink usr/lib /lib
symlink usr/lib64 /lib64
dir /etc
ro-bind /etc/alternatives /etc/alternatives
ro-bind /etc/ld.so.cache /etc/ld.so.cache
file /etc/passwd (53 bytes)
file /etc/group (20 bytes)
file /etc/nsswitch.conf (40 bytes)
proc /proc
dir /dev
dev-bind /dev/full /dev/full
dev-bind /dev/null /dev/null
dev-bind /dev/random /dev/random
dev-bind /dev/urandom /dev/urandom
dev-bind /dev/zero /dev/zero
dir /run/mycoswarm
file /run/mycoswarm/agent.pyz (5 bytes)
size 268435456
tmpfs /workspace
size 67108864
tmpfs /tmp
remount-ro /
chdir /workspace
cap-add CAP_SYS_ADMIN
cap-add CAP_SETPCAP
"""


def test_operations_are_these() -> None:
    described = [step.describe() for step in operations(make_spec(), make_host(), WHO, b"agent")]
    assert "\n".join(described) + "\n" == GOLDEN


def test_parents_come_before_children_and_the_root_is_sealed_last() -> None:
    steps = operations(make_spec(), make_host(), WHO, b"")
    made = [step.arguments[-1] for step in steps if step.option.removeprefix("--") in MOUNTS]
    for place, path in enumerate(made):
        assert not [later for later in made[place + 1 :] if later != "/" and path.startswith(f"{later}/")]
    assert steps[[step.option for step in steps].index("--remount-ro") + 1].option == "--chdir"


def test_nothing_of_the_machine_is_writable() -> None:
    binds = [step for step in operations(make_spec(), make_host(), WHO, b"") if "bind" in step.option]
    assert {step.arguments[0] for step in binds if step.option != "--ro-bind"} == set(DEVICES)


def steps_of(body: Mapping[str, object]) -> list[dict[str, object]]:
    steps = body["steps"]
    assert isinstance(steps, list)
    return steps


def test_steps_end_with_the_filter_and_need_no_right_that_is_already_gone() -> None:
    order = [step["do"] for step in steps_of(confinement(make_spec(), make_host(), WHO))]
    kinds = list(dict.fromkeys(order))
    assert kinds == ["rlimit", "remount", "drop-capabilities", "no-new-privileges", "landlock", "seccomp"]


def test_limits_become_resource_limits() -> None:
    limits = Limits(wall_s=60, memory_bytes=1 << 29, processes=10, disk_bytes=1 << 20, cpu_percent=150)
    found = rlimits(make_spec(limits=limits))
    assert found["AS"] == found["DATA"] == 1 << 29
    assert found["NPROC"] == 12  # with bubblewrap's init and the agent
    assert found["FSIZE"] == 1 << 20
    assert found["CPU"] == 90
    assert found["CORE"] == 0


def test_the_agent_knows_every_probe_that_is_demanded() -> None:
    for name in probes(make_spec(), make_host()):
        kind, _, argument = name.partition("=")
        assert kind in (prove.FAMILIES_OF_PROBES if argument else prove.PROBES), name


def test_every_probe_of_the_agent_is_demanded_of_a_young_kernel() -> None:
    of_unit = unitspec.confinement(make_spec(), make_host())
    lists = [of_unit[key] for key in ("before", "probes", "wanted")]
    assert all(isinstance(names, list) for names in lists)
    everything = [
        *probes(make_spec(), make_host()),
        *(name for names in lists for name in cast("list[str]", names)),
    ]
    assert {name.partition("=")[0] for name in everything} == {*prove.PROBES, *prove.FAMILIES_OF_PROBES}


def test_a_unit_is_asked_before_the_agent_adds_anything_and_never_for_more_than_it_can_hold() -> None:
    body = unitspec.confinement(make_spec(limits=Limits(disk_bytes=1 << 20)), make_host())
    steps = [step["do"] for step in steps_of(body)]
    assert not {"remount", "drop-capabilities"} & set(steps)
    assert steps[:2] == ["adopt", "quiet"]
    assert steps[-1] == "seccomp"
    expect = body["expect"]
    assert isinstance(expect, dict)
    # The unit's own bound is demanded, the task's only wanted.
    assert expect["sizes"]["/workspace"] == 256 << 20
    assert expect["quotas"]["/workspace"] == 1 << 20
    assert body["wanted"] == ["disk-quota"]
    larger = unitspec.confinement(make_spec(limits=Limits(disk_bytes=1 << 30)), make_host())
    assert cast("dict[str, dict[str, int]]", larger["expect"])["sizes"]["/workspace"] == 1 << 30


@pytest.mark.parametrize(
    ("abi", "missing"),
    [(0, {"landlock", "landlock-refer", "landlock-truncate"}), (2, {"landlock-truncate"}), (3, set())],
)
def test_a_unit_lacks_only_what_it_has_by_no_other_means(abi: int, missing: set[str]) -> None:
    assert set(unitspec.absent(replace(make_host(), landlock_abi=abi))) == missing


def test_the_agent_knows_every_step_and_access() -> None:
    body = confinement(make_spec(programs=(PYTHON,)), make_host(), WHO)
    for step in steps_of(body):
        assert step["do"] in confine.STEPS
    rules = next(step["rules"] for step in steps_of(body) if step["do"] == "landlock")
    assert isinstance(rules, list)
    assert {access for _, accesses in rules for access in accesses} <= set(confine.LANDLOCK_FS)


@pytest.mark.parametrize(
    ("abi", "missing"),
    [
        (
            0,
            {
                "landlock",
                "landlock-refer",
                "landlock-truncate",
                "landlock-tcp",
                "landlock-ioctl",
                "landlock-scopes",
            },
        ),
        (2, {"landlock-truncate", "landlock-tcp", "landlock-ioctl", "landlock-scopes"}),
        (4, {"landlock-ioctl", "landlock-scopes"}),
        (7, set()),
    ],
)
def test_what_a_kernel_lacks_is_said(abi: int, missing: set[str]) -> None:
    assert set(absent(make_host(landlock_abi=abi))) == {"cpu-cgroup", "memory-cgroup"} | missing


def test_a_kernel_without_landlock_gets_no_step_and_no_probe_of_it() -> None:
    body = confinement(make_spec(), make_host(landlock_abi=0), WHO)
    assert "landlock" not in {step["do"] for step in steps_of(body)}
    assert "forbidden-program" not in probes(make_spec(), make_host(landlock_abi=0))
    assert "signal-outside" not in probes(make_spec(), make_host(landlock_abi=5))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (make_spec(programs=(LS,)), "cannot limit which programs run"),
        (make_spec(write_paths=("src",)), "cannot limit the paths"),
        (make_spec(write_paths=()), "cannot limit the paths"),
        (make_spec(read_paths=("src",)), "cannot limit the paths"),
    ],
)
def test_what_cannot_be_enforced_is_refused(spec: object, says: str) -> None:
    with pytest.raises(CageError, match=says):
        confinement(spec, make_host(landlock_abi=0), WHO)  # type: ignore[arg-type]


def test_the_whole_workspace_needs_no_second_layer() -> None:
    assert confinement(make_spec(), make_host(), WHO)["narrow"] is None
    assert confinement(make_spec(write_paths=("src",)), make_host(), WHO)["narrow"] is not None
    assert confinement(make_spec(read_paths=("src",)), make_host(), WHO)["narrow"] is not None


def test_the_decoy_is_never_an_allowed_program() -> None:
    expect = confinement(make_spec(programs=(PYTHON, "/usr/bin/env")), make_host(), WHO)["expect"]
    assert isinstance(expect, dict)
    assert expect["forbidden"] == "/usr/bin/id"
