"""What the probe says: whole, bounded, and harmless whoever says it."""

import json
from typing import Any

import pytest

from mycoswarmd.errors import BadRequest
from mycoswarmd.wire.probing import LINE_BYTES, MAX_GPUS, Gpu, Gpus, Reading, encode_report, parse_report
from mycoswarmd.wire.proof import Check, CheckName, Proof, Unit

CARD = {"name": "NVIDIA GeForce RTX 3090", "memory_bytes": 24 << 30}
ANSWER: dict[str, Any] = {"v": 1, "reading": "read", "driver": "550.1", "detail": "1 found", "gpus": [CARD]}


def line(**changed: object) -> bytes:
    return json.dumps({**ANSWER, **changed}).encode() + b"\n"


def of_card(**changed: object) -> bytes:
    return line(gpus=[{**CARD, **changed}])


def test_an_answer_comes_back_as_it_went() -> None:
    full = Gpu(name="a", memory_bytes=24 << 30, memory_used_bytes=0, temperature_c=-5, busy_percent=100)
    bare = Gpu(name="b", memory_bytes=1 << 20)
    said = Gpus(reading=Reading.READ, found=(full, bare), driver="550.1", detail="2 found")
    assert parse_report(encode_report(said)) == said
    proof = Proof(Unit.PROBE, (Check(CheckName.SECCOMP, ok=True),))
    assert parse_report(encode_report(proof)) == proof
    for reading in set(Reading) - {Reading.UNHEARD}:
        nothing = Gpus(reading=reading, detail="why")
        assert parse_report(encode_report(nothing)) == nothing
        assert nothing.is_known is (reading in {Reading.READ, Reading.NO_DRIVER})
    assert parse_report(line()) == Gpus(
        reading=Reading.READ, found=(Gpu(**CARD),), driver="550.1", detail="1 found"  # type: ignore[arg-type]
    )  # fmt: skip


def test_the_longest_answer_fits_and_what_a_library_says_is_made_harmless() -> None:
    worst = Gpu(name='"\\\x1b[2J\n' * 1000, memory_bytes=1 << 46, memory_used_bytes=1 << 46)
    said = encode_report(
        Gpus(reading=Reading.READ, found=(worst,) * 40, driver="\x9b" * 999, detail="\u202e" * 999)
    )
    assert len(said) <= LINE_BYTES
    heard = parse_report(said)
    assert isinstance(heard, Gpus)
    assert len(heard.found) == MAX_GPUS
    assert heard.found[0].name.startswith('"\\?[2J?"')
    assert all(text.isprintable() for text in (heard.found[0].name, heard.driver, heard.detail))


@pytest.mark.parametrize(
    "lie",
    [
        b"",
        b"\n",
        b"[]\n",
        b'{"v":1,\n',
        b"\xff\n",
        b"[" * LINE_BYTES,
        line() + b" " * LINE_BYTES,
        line(v=2),
        line(v=True),
        line(more=1),
        line(reading="unheard"),
        line(reading="no-driver"),  # and cards
        line(reading=["read"]),
        line(gpus={}),
        line(gpus=[CARD] * (MAX_GPUS + 1)),
        line(gpus=[None]),
        line(driver=7),
        line(driver="\x1b]0;owned\x07"),
        line(detail="a\nb"),
        line(detail="x" * 201),
        of_card(name=""),
        of_card(name="x" * (1 << 20)),
        of_card(name="x" * 97),
        of_card(name="\x1b[2J"),
        of_card(name="card\u202e"),
        of_card(name="\ud800"),
        of_card(name=None),
        of_card(more="x"),
        of_card(memory_bytes=0),
        of_card(memory_bytes=-1),
        of_card(memory_bytes=2**63),
        of_card(memory_bytes=1e300),
        of_card(memory_bytes=24.5),
        of_card(memory_bytes=True),
        of_card(memory_bytes="24"),
        of_card(memory_used_bytes=-1),
        of_card(memory_used_bytes=(24 << 30) + 1),
        of_card(temperature_c=float("nan")),
        of_card(temperature_c=float("inf")),
        of_card(temperature_c=1000),
        of_card(busy_percent=101),
        of_card(memory_bytes=0).replace(b'bytes": 0', b'bytes": ' + b"9" * 5000),
        b'{"proof":{"unit":"probe","checks":[{"name":"seccomp","ok":1,"detail":""}]}}\n',
        b'{"proof":{"unit":"kernel","checks":[]}}\n',
    ],
)  # fmt: skip
def test_one_value_out_of_bounds_and_nothing_is_believed(lie: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_report(lie)
    assert isinstance(parse_report(line()), Gpus)  # the control
