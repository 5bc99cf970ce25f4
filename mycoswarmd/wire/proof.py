"""What a unit of the node proved about its own confinement: the self-test's results, as they travel.

Law: a proof is what the kernel answered to the unit itself, never what a unit file says. True is proved,
False is disproved, None could not be found out; None is no proof. Whoever says it is believed only about
itself: each part is bounded, and a check that is missing has not held.
Source: systemd/README.md for what confines each unit; the self-test is outposts/selftest.py.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from mycoswarmd.wire.jsonv import as_list, as_object, bad_range, get_choice, get_str, parse_object

# A whole proof fits into one packet of the LAN dialer, and into one line of an outpost.
MAX_CHECKS = 16
DETAIL_CHARS = 120
MAX_PROOF_BYTES = 4000


class Unit(StrEnum):
    """Who proves something."""

    CORE = "core"
    LAN = "lan"
    DISCOVERY = "discovery"
    ENGINE = "engine"
    TASK = "task"
    SIGNER = "signer"
    PROBE = "probe"


class CheckName(StrEnum):
    """What is proved. The values are stable: people and policies name them."""

    INET_SOCKET = "inet-socket"  # no socket of the internet families can be made
    CANARY = "canary"  # the kernel's IP filter refuses 127.0.0.2, and addresses outside
    ADDRESS_FAMILIES = "address-families"  # no netlink, packet, vsock or crypto sockets
    DBUS = "dbus"  # no message bus can be reached
    RESOLVER = "resolver"  # nor a resolver's socket, which is a way out in itself
    DOCKER = "docker"  # nor a container engine's, which is root
    DOORS = "doors"  # nor any other socket that this unit was not given
    NO_NEW_PRIVILEGES = "no-new-privileges"
    SECCOMP = "seccomp"
    CALLS = "calls"  # what the filter of calls is for is refused by it
    CAPABILITIES = "capabilities"
    USER = "user"  # it is the user that it should be, and in no group beside its own
    MEMORY = "memory"  # the bound of the own control group is finite


_COMMON = (
    CheckName.ADDRESS_FAMILIES,
    CheckName.DBUS,
    CheckName.RESOLVER,
    CheckName.DOCKER,
    CheckName.DOORS,
    CheckName.NO_NEW_PRIVILEGES,
    CheckName.SECCOMP,
    CheckName.CALLS,
    CheckName.CAPABILITIES,
    CheckName.USER,
    CheckName.MEMORY,
)
# What each unit proves at its start. A unit with a network proves its filter, the others that they have none.
EXPECTED: Mapping[Unit, tuple[CheckName, ...]] = {
    unit: (CheckName.CANARY if unit in {Unit.LAN, Unit.DISCOVERY} else CheckName.INET_SOCKET, *_COMMON)
    for unit in Unit
}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried.

    Attributes:
        ok: whether it holds; None where it could not be found out.
        detail: what the kernel said, for a person; printable ASCII.
    """

    name: CheckName
    ok: bool | None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Proof:
    """What one unit found out about itself."""

    unit: Unit
    checks: tuple[Check, ...]

    def holds(self, name: CheckName) -> bool:
        """Tell whether this was proved."""
        return any(check.name is name and check.ok is True for check in self.checks)

    def weak(self) -> tuple[Check, ...]:
        """Return what this unit should have proved and did not."""
        found = {check.name: check for check in self.checks}
        return tuple(
            found.get(name, Check(name, None, "was not tried"))
            for name in EXPECTED[self.unit]
            if not self.holds(name)
        )


def proof_body(proof: Proof) -> dict[str, object]:
    """Return a proof as JSON values, cut to its bounds."""
    return {
        "unit": proof.unit.value,
        "checks": [
            {"name": check.name.value, "ok": check.ok, "detail": _clean(check.detail)}
            for check in proof.checks[:MAX_CHECKS]
        ],
    }


def parse_proof_body(untrusted: object, *, where: str = "proof") -> Proof:
    """Read a proof out of JSON values; names twice or unknown are refused."""
    body = as_object(untrusted, where=where)
    unit = Unit(get_choice(body, "unit", where=where, choices=[one.value for one in Unit]))
    checks = []
    for position, item in enumerate(
        as_list(body.get("checks"), where=f"{where}.checks", max_items=MAX_CHECKS)
    ):
        checks.append(
            _check(as_object(item, where=f"{where}.checks[{position}]"), f"{where}.checks[{position}]")
        )
    if len({check.name for check in checks}) != len(checks):
        raise bad_range(f"{where}.checks", "each name once")
    return Proof(unit, tuple(checks))


def encode_proof(proof: Proof) -> bytes:
    """Encode a proof as one line without its end."""
    return json.dumps(proof_body(proof), separators=(",", ":"), ensure_ascii=True).encode("ascii")


def parse_proof(untrusted: bytes) -> Proof:
    """Parse what `encode_proof` made, or what somebody pretends it did."""
    if len(untrusted) > MAX_PROOF_BYTES:
        raise bad_range("proof", f"at most {MAX_PROOF_BYTES} bytes, found {len(untrusted)}")
    return parse_proof_body(parse_object(untrusted, what="a proof"))


def _check(item: dict[str, object], where: str) -> Check:
    name = CheckName(get_choice(item, "name", where=where, choices=[one.value for one in CheckName]))
    ok = item.get("ok")
    if not (ok is None or isinstance(ok, bool)):
        raise bad_range(f"{where}.ok", "true, false or null")
    return Check(name, ok, _clean(get_str(item, "detail", where=where, max_len=DETAIL_CHARS, default="")))


def _clean(text: str) -> str:
    """Make text harmless on a terminal and cheap in JSON."""
    kept = "".join(char if char.isascii() and char.isprintable() else "?" for char in text[:DETAIL_CHARS])
    return kept.replace("\\", "/").replace('"', "'")
