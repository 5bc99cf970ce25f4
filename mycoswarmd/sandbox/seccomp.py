"""The cage's system call filter, assembled here: BPF bytes for x86-64 and arm64.

What is named is allowed, allowed under a condition, or refused with EPERM; a call that is not named at
all gives ENOSYS, so that programs fall back as on an older kernel. A foreign architecture or an x32
number kills.

Law: no socket of any family can be made, no namespace entered, no memory turned into a file that runs.

Source: seccomp(2), linux/bpf_common.h; numbers from asm/unistd_64.h and asm-generic/unistd.h.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mycoswarmd.errors import CageError
from mycoswarmd.sandbox.syscalls import ALLOWED, NUMBERS, REFUSED

LD, JEQ, JGE, JSET, AND, RET = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
NUMBER_AT, ARCH_AT, ARGUMENTS_AT = 0, 4, 16
ALLOW, KILL = 0x7FFF0000, 0x80000000
EPERM, ENOSYS = 0x00050001, 0x00050026
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_BIT = 0x40000000

# NEWTIME NEWNS NEWCGROUP NEWUTS NEWIPC NEWUSER NEWPID NEWNET. NEWTIME shares its bit with the exit signal's
# byte in clone's flags; no signal is that large.
NAMESPACE_FLAGS = (
    0x80 | 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
)
SETID_BITS = 0o6000
O_CREAT_OR_TMPFILE = 0o100 | 0o20000000
AF_UNIX, SOCK_STREAM = 1, 1
TIOCSTI, TIOCLINUX = 0x5412, 0x541C
NO_PERSONALITY, ASK_PERSONALITY = 0, 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Test:
    """A condition on the low 32 bits of an argument, which is all the kernel reads of each of these."""

    argument: int
    mask: int
    values: tuple[int, ...]  # of the masked argument


@dataclass(frozen=True, slots=True)
class Conditional:
    """Refuse when every test of `refuse_if` holds; or, turned round, allow only when they hold."""

    tests: tuple[Test, ...]
    refuse: bool = True


def _has_setid(argument: int) -> Test:
    return Test(argument, SETID_BITS, (0o2000, 0o4000, 0o6000))


_CREATES = (0o100, 0o20000000, 0o20000100)

CONDITIONAL: Mapping[str, Conditional] = {
    "clone": Conditional((Test(0, NAMESPACE_FLAGS, (0,)),), refuse=False),
    # Stream pairs stay connected to each other; a datagram pair could send to any address.
    "socketpair": Conditional((Test(0, 0xFFFFFFFF, (AF_UNIX,)), Test(1, 0xF, (SOCK_STREAM,))), refuse=False),
    "personality": Conditional((Test(0, 0xFFFFFFFF, (NO_PERSONALITY, ASK_PERSONALITY)),), refuse=False),
    "ioctl": Conditional((Test(1, 0xFFFFFFFF, (TIOCSTI, TIOCLINUX)),)),
    "chmod": Conditional((_has_setid(1),)),
    "fchmod": Conditional((_has_setid(1),)),
    "fchmodat": Conditional((_has_setid(2),)),
    "fchmodat2": Conditional((_has_setid(2),)),
    "creat": Conditional((_has_setid(1),)),
    "open": Conditional((Test(1, O_CREAT_OR_TMPFILE, _CREATES), _has_setid(2))),
    "openat": Conditional((Test(2, O_CREAT_OR_TMPFILE, _CREATES), _has_setid(3))),
}

# Whoever watches over a cage from within may be killed, which ends the cage, but not be stopped.
_F_SETSIG, _SIGSTOP = 10, 19
NO_STOPPING: Mapping[str, Conditional] = {
    **{
        name: Conditional((Test(argument, 0xFFFFFFFF, (_SIGSTOP,)),))
        for name, argument in (
            ("kill", 1), ("tkill", 1), ("tgkill", 2), ("rt_sigqueueinfo", 1), ("rt_tgsigqueueinfo", 2),
            ("pidfd_send_signal", 1),
        )
    },
    # The signal that tells of a ready descriptor, to whom its owner likes.
    "fcntl": Conditional((Test(1, 0xFFFFFFFF, (_F_SETSIG,)),)),
}  # fmt: skip

Instruction = tuple[int, int, int, int]


def build_filter(machine: str, *, may_execute: bool = True, may_stop: bool = True) -> bytes:
    """Assemble the filter for a machine as `uname -m` names it."""
    if machine not in NUMBERS:
        raise CageError(
            "cage-setup",
            f"cannot filter system calls on {machine!r}",
            hint=f"cages are built on {' and '.join(sorted(NUMBERS))}",
        )
    actions = _actions(NUMBERS[machine], may_execute=may_execute)
    if not may_stop:
        actions |= {NUMBERS[machine][name]: test for name, test in NO_STOPPING.items()}
    code: list[Instruction] = [
        (LD, 0, 0, ARCH_AT),
        (JEQ, 1, 0, AUDIT_ARCH[machine]),
        (RET, 0, 0, KILL),
        (LD, 0, 0, NUMBER_AT),
    ]
    if machine == "x86_64":
        code += [(JGE, 0, 1, X32_BIT), (RET, 0, 0, KILL)]
    code += _search(_intervals(actions))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _actions(numbers: Mapping[str, int], *, may_execute: bool) -> dict[int, int | Conditional]:
    actions: dict[int, int | Conditional] = {numbers[name]: ALLOW for name in ALLOWED if name in numbers}
    actions |= {numbers[name]: EPERM for name in REFUSED if name in numbers}
    actions |= {numbers[name]: test for name, test in CONDITIONAL.items() if name in numbers}
    # glibc falls back to clone, whose flags can be read here; those of clone3 are behind a pointer.
    actions[numbers["clone3"]] = ENOSYS
    if not may_execute:
        actions[numbers["execve"]] = EPERM
    return actions


def _intervals(actions: Mapping[int, int | Conditional]) -> list[tuple[int, int | Conditional]]:
    """Turn numbers into the ascending starts of intervals that share an action; the gaps are ENOSYS."""
    starts: list[tuple[int, int | Conditional]] = [(0, ENOSYS)]
    for number in range(max(actions) + 2):
        action = actions.get(number, ENOSYS)
        if action != starts[-1][1]:
            starts.append((number, action))
    return starts


def _search(starts: Sequence[tuple[int, int | Conditional]]) -> list[Instruction]:
    """Emit a binary search over the intervals, whose leaves end the program."""
    if len(starts) == 1:
        return _leaf(starts[0][1])
    middle = len(starts) // 2
    lower, upper = _search(starts[:middle]), _search(starts[middle:])
    if len(lower) > 255:
        # A jump reaches 255 instructions; a JA (0x05) reaches all.
        return [(JGE, 0, 1, starts[middle][0]), (0x05, 0, 0, len(lower)), *lower, *upper]
    return [(JGE, len(lower), 0, starts[middle][0]), *lower, *upper]


def _leaf(action: int | Conditional) -> list[Instruction]:
    if isinstance(action, int):
        return [(RET, 0, 0, action)]
    met, unmet = (EPERM, ALLOW) if action.refuse else (ALLOW, EPERM)
    code: list[Instruction] = [(RET, 0, 0, met)]
    for test in reversed(action.tests):
        # Each test falls through to the next when it holds, and to its own RET when it does not.
        code = [*_test(test), (RET, 0, 0, unmet), *code]
    return code


def _test(test: Test) -> list[Instruction]:
    code: list[Instruction] = [(LD, 0, 0, ARGUMENTS_AT + 8 * test.argument), (AND, 0, 0, test.mask)]
    for place, value in enumerate(test.values):
        # One past the RET that follows the tests.
        code.append((JEQ, len(test.values) - place, 0, value))
    return code
