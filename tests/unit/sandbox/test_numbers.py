"""Numbers of system calls, on every machine for every machine, as another project has them.

libseccomp keeps tables of its own, made from the kernel's; apt and systemd link it, so that it is there
wherever this runs. A number that is wrong for arm64 is found on x86-64.
"""

import ctypes
from collections.abc import Mapping

import pytest

from mycoswarmd.agent import beneath, confine
from mycoswarmd.outposts import callfilter, notcp, selftest
from mycoswarmd.outposts import confine as outposts_confine
from mycoswarmd.sandbox import host
from mycoswarmd.sandbox.seccomp import AUDIT_ARCH, CONDITIONAL
from mycoswarmd.sandbox.syscalls import ALLOWED, NUMBERS, REFUSED
from tests import onlyunix
from tests.integration import escape_probes

LIBRARY = ctypes.CDLL("libseccomp.so.2")
MACHINES = {"x86_64": b"x86_64", "aarch64": b"aarch64"}
# What its release of Debian 12 does not know yet. From 424 on all machines count alike.
YOUNGER = {"statmount": 457, "listmount": 458, "lsm_set_self_attr": 460, "open_tree_attr": 467}
YOUNGER |= {"file_setattr": 469, "cachestat": 451, "fchmodat2": 452, "map_shadow_stack": 453}
YOUNGER |= {"futex_wake": 454, "futex_wait": 455, "futex_requeue": 456}


def number(machine: str, name: str) -> int:
    """Return a call's number, or one below zero where there is no such call."""
    # A token: the kernel's AUDIT_ARCH.
    token = ctypes.c_uint32(LIBRARY.seccomp_arch_resolve_name(MACHINES[machine]))
    found = int(LIBRARY.seccomp_syscall_resolve_name_arch(token, name.encode()))
    return YOUNGER.get(name, found) if found < 0 else found


def wrong(machine: str, ours: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Return what is not as it should be: ours, and theirs."""
    return {name: (mine, theirs) for name, mine in ours.items() if (theirs := number(machine, name)) != mine}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_cage_names_each_call_by_its_number_and_forgets_none(machine: str) -> None:
    assert wrong(machine, NUMBERS[machine]) == {}
    named = {*ALLOWED, *REFUSED, *CONDITIONAL}
    forgotten = {name for name in named if number(machine, name) >= 0} - NUMBERS[machine].keys()
    assert forgotten == set()
    # The check itself can fail.
    assert wrong(machine, {"read": 1000}) == {"read": (1000, {"x86_64": 0, "aarch64": 63}[machine])}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filters_of_units_name_each_call_by_its_number(machine: str) -> None:
    assert wrong(machine, callfilter._NUMBERS[machine]) == {}
    assert callfilter._ARCHITECTURES[machine] == AUDIT_ARCH[machine]


@pytest.mark.parametrize("machine", MACHINES)
def test_architectures_are_named_as_the_kernel_does(machine: str) -> None:
    token = LIBRARY.seccomp_arch_resolve_name(MACHINES[machine])
    assert AUDIT_ARCH[machine] == ctypes.c_uint32(token).value


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_called_by_number_is_the_same_call_everywhere(machine: str) -> None:
    assert wrong(machine, selftest._IO_URING | {"openat2": beneath._OPENAT2}) == {}
    for one in (confine, host):
        assert wrong(machine, {"landlock_create_ruleset": one.LANDLOCK_CREATE}) == {}
    rest = {
        "landlock_add_rule": confine.LANDLOCK_ADD,
        "landlock_restrict_self": confine.LANDLOCK_RESTRICT,
    }
    assert wrong(machine, rest) == {}
    for module in (notcp, outposts_confine):
        ours = {
            "landlock_create_ruleset": module._LANDLOCK_CREATE,
            "landlock_restrict_self": module._LANDLOCK_RESTRICT,
        }
        assert wrong(machine, ours) == {}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_escape_suite_attacks_by_the_right_numbers(machine: str) -> None:
    column = list(MACHINES).index(machine)
    assert wrong(machine, {name: pair[column] for name, pair in escape_probes.NUMBERS.items()}) == {}
    assert onlyunix._MACHINES[machine] == (AUDIT_ARCH[machine], number(machine, "socket"))
