"""Proofs as they travel: whole, bounded, and never believed about more than they say."""

import json

import pytest

from mycoswarmd.errors import BadRequest
from mycoswarmd.wire.proof import (
    DETAIL_CHARS,
    EXPECTED,
    MAX_PROOF_BYTES,
    Check,
    CheckName,
    Proof,
    Unit,
    encode_proof,
    parse_proof,
)


@pytest.mark.parametrize("unit", Unit)
def test_a_proof_comes_back_as_it_went(unit: Unit) -> None:
    values = (True, False, None)
    checks = tuple(Check(name, values[at % 3], f"{name}!") for at, name in enumerate(EXPECTED[unit]))
    assert parse_proof(encode_proof(Proof(unit, checks))) == Proof(unit, checks)


def test_the_longest_proof_fits_and_is_harmless() -> None:
    checks = tuple(Check(name, None, '"\\\x1b[2J\u202e' + "x" * 500) for name in CheckName)
    line = encode_proof(Proof(Unit.CORE, checks))
    assert len(line) <= MAX_PROOF_BYTES
    for check in parse_proof(line).checks:
        assert check.detail == ("'/?[2J?" + "x" * 500)[:DETAIL_CHARS]


def test_what_is_missing_unknown_or_false_does_not_hold() -> None:
    some = Proof(
        Unit.CORE, (Check(CheckName.INET_SOCKET, ok=True), Check(CheckName.DBUS, ok=False, detail="open"))
    )
    assert some.holds(CheckName.INET_SOCKET)
    assert not some.holds(CheckName.DBUS)
    assert not some.holds(CheckName.MEMORY)
    weak = {check.name: check for check in some.weak()}
    assert weak.keys() == set(EXPECTED[Unit.CORE]) - {CheckName.INET_SOCKET}
    assert weak[CheckName.DBUS].detail == "open"
    assert weak[CheckName.MEMORY].ok is None


def test_every_unit_without_a_network_proves_that() -> None:
    for unit in Unit:
        filtered = unit in {Unit.LAN, Unit.DISCOVERY}
        assert (CheckName.CANARY in EXPECTED[unit]) == filtered
        assert (CheckName.INET_SOCKET in EXPECTED[unit]) == (not filtered)


CHECK = {"name": "canary", "ok": True, "detail": "EPERM"}
GOOD = {"unit": "lan", "checks": [CHECK]}


@pytest.mark.parametrize(
    "bad",
    [
        {},
        {"unit": "kernel", "checks": []},
        {"unit": "lan"},
        {"unit": "lan", "checks": {}},
        {"unit": "lan", "checks": [1]},
        {"unit": "lan", "checks": [{"name": "magic", "ok": True}]},
        {"unit": "lan", "checks": [{"name": "canary", "ok": "yes"}]},
        {"unit": "lan", "checks": [{"name": "canary", "ok": 1}]},
        {"unit": "lan", "checks": [{"name": "canary", "ok": True, "detail": "x" * 121}]},
        {"unit": "lan", "checks": [CHECK, CHECK]},
        {"unit": "lan", "checks": [CHECK] * 17},
    ],
)
def test_what_is_no_proof_is_refused(bad: object) -> None:
    assert parse_proof(json.dumps(GOOD).encode()).holds(CheckName.CANARY)
    with pytest.raises(BadRequest):
        parse_proof(json.dumps(bad).encode())


def test_a_proof_that_is_too_long_is_not_read() -> None:
    padded = json.dumps(GOOD).encode() + b" " * MAX_PROOF_BYTES
    assert json.loads(padded) == GOOD
    with pytest.raises(BadRequest):
        parse_proof(padded)
