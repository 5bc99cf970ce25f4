"""The assembled filter, run by a simulator of the kernel's BPF, for both architectures on any machine."""

import struct

import pytest

from mycoswarmd.errors import CageError
from mycoswarmd.sandbox.seccomp import build_filter
from mycoswarmd.sandbox.syscalls import ALLOWED, NUMBERS, REFUSED

ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
OTHER_ARCH = {"i386": 0x40000003, "arm": 0x40000028}
MACHINES = ["x86_64", "aarch64"]
WORD = 0xFFFFFFFF


def simulate(program: bytes, number: int, arch: int, *arguments: int) -> int:
    """Run a filter as linux/net/core/filter.c does, for the instructions that seccomp permits."""
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("<IIQ6Q", number & WORD, arch, 0, *(value & (1 << 64) - 1 for value in padded))
    code = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    accumulator = at = 0
    while True:
        operation, if_true, if_false, k = code[at]
        at += 1
        match operation:
            case 0x20:
                assert k % 4 == 0
                (accumulator,) = struct.unpack_from("<I", data, k)
            case 0x15:
                at += if_true if accumulator == k else if_false
            case 0x35:
                at += if_true if accumulator >= k else if_false
            case 0x45:
                at += if_true if accumulator & k else if_false
            case 0x54:
                accumulator &= k
            case 0x05:
                at += k
            case 0x06:
                return int(k)
            case _:
                pytest.fail(f"the kernel knows no instruction {operation:#x}")


def ask(machine: str, name: str, *arguments: int, may_execute: bool = True) -> int:
    program = build_filter(machine, may_execute=may_execute)
    return simulate(program, NUMBERS[machine][name], ARCH[machine], *arguments)


@pytest.mark.parametrize("machine", MACHINES)
def test_every_number_gets_what_its_list_says(machine: str) -> None:
    program = build_filter(machine)
    numbers = NUMBERS[machine]
    by_number = {numbers[name]: ALLOW for name in ALLOWED if name in numbers}
    by_number |= {numbers[name]: EPERM for name in REFUSED if name in numbers}
    conditional = {numbers[name] for name in numbers if name not in ALLOWED and name not in REFUSED}
    for number in set(range(600)) - conditional:
        assert simulate(program, number, ARCH[machine]) == by_number.get(number, ENOSYS), number


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("number", [0, 1, 39, 59, 0x40000000 | 39])
def test_a_foreign_architecture_kills(machine: str, number: int) -> None:
    program = build_filter(machine)
    others = [arch for name, arch in (*ARCH.items(), *OTHER_ARCH.items()) if name != machine]
    assert {simulate(program, number, arch) for arch in others} == {KILL}


@pytest.mark.parametrize("number", [0x40000000, 0x40000000 | 39, 0x40000000 | 521, WORD])
def test_an_x32_number_kills(number: int) -> None:
    assert simulate(build_filter("x86_64"), number, ARCH["x86_64"]) == KILL


@pytest.mark.parametrize("machine", MACHINES)
def test_no_socket_of_any_family(machine: str) -> None:
    assert {ask(machine, "socket", family, 1, 0) for family in range(64)} == {EPERM}


CONDITIONS = [
    ("clone", (0x11,), ALLOW),  # fork
    ("clone", (0x003D0F00,), ALLOW),  # a thread
    *((("clone", (0x11 | flag,), EPERM)) for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000)),
    *((("clone", (0x11 | flag,), EPERM)) for flag in (0x10000000, 0x20000000, 0x40000000)),
    ("clone", (0x11 | 1 << 40,), ALLOW),  # the kernel reads 32 bits of the flags
    ("clone3", (0, 0), ENOSYS),
    ("socketpair", (1, 1, 0), ALLOW),
    ("socketpair", (2, 1, 0), EPERM),
    ("personality", (0,), ALLOW),
    ("personality", (WORD,), ALLOW),
    ("personality", (0x40000,), EPERM),
    ("ioctl", (0, 0x5401), ALLOW),
    ("ioctl", (0, 0x5412), EPERM),  # TIOCSTI
    ("ioctl", (0, 0x541C), EPERM),  # TIOCLINUX
    ("ioctl", (0, 0x5412 | 1 << 32), EPERM),  # CVE-2019-10063
    ("fchmod", (3, 0o755), ALLOW),
    ("fchmod", (3, 0o1777), ALLOW),
    ("fchmod", (3, 0o4755), EPERM),
    ("fchmod", (3, 0o2755), EPERM),
    ("fchmodat", (-100, 0, 0o6755), EPERM),
    ("fchmodat2", (-100, 0, 0o4755, 0), EPERM),
    ("openat", (-100, 0, 0, 0o4755), ALLOW),  # without O_CREAT the mode is not read
    ("openat", (-100, 0, 0o101, 0o644), ALLOW),
    ("openat", (-100, 0, 0o101, 0o4755), EPERM),
    ("openat", (-100, 0, 0o20200001, 0o2755), EPERM),  # O_TMPFILE
]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("name", "arguments", "expected"), CONDITIONS)
def test_arguments_decide(machine: str, name: str, arguments: tuple[int, ...], expected: int) -> None:
    assert ask(machine, name, *arguments) == expected


@pytest.mark.parametrize(
    ("name", "arguments"), [("chmod", (0, 0o4755)), ("creat", (0, 0o4755)), ("open", (0, 0o101, 0o4755))]
)
def test_the_older_calls_of_x86_are_not_forgotten(name: str, arguments: tuple[int, ...]) -> None:
    assert ask("x86_64", name, *arguments) == EPERM


@pytest.mark.parametrize("machine", MACHINES)
def test_without_programs_nothing_executes(machine: str) -> None:
    assert ask(machine, "execve") == ALLOW
    assert ask(machine, "execve", may_execute=False) == EPERM
    assert ask(machine, "execveat", may_execute=False) == EPERM


def test_an_unknown_machine_has_no_filter() -> None:
    with pytest.raises(CageError, match="cannot filter system calls on 'riscv64'"):
        build_filter("riscv64")


@pytest.mark.parametrize("machine", MACHINES)
def test_numbers_are_distinct_and_lists_are_disjoint(machine: str) -> None:
    numbers = NUMBERS[machine]
    assert len(set(numbers.values())) == len(numbers)
    assert not set(ALLOWED) & set(REFUSED)


def test_known_numbers() -> None:
    """Spot checks against the kernel's tables: a shifted table would refuse the wrong calls consistently."""
    x86, arm = NUMBERS["x86_64"], NUMBERS["aarch64"]
    assert [x86[name] for name in ("read", "socket", "execve", "ptrace", "mount", "bpf")] == [
        0,
        41,
        59,
        101,
        165,
        321,
    ]
    assert [arm[name] for name in ("read", "socket", "execve", "ptrace", "mount", "bpf")] == [
        63,
        198,
        221,
        117,
        40,
        280,
    ]
    assert x86["io_uring_setup"] == arm["io_uring_setup"] == 425
