"""The lines of the engine's unit: what is not expected is refused, what an engine says is bounded."""

import json
from typing import Any

import pytest

from mycoswarmd.errors import BadRequest
from mycoswarmd.wire.engineunit import (
    LOG_CHARS,
    ORDER_BYTES,
    REPORT_BYTES,
    Ended,
    Order,
    Proved,
    Refused,
    Report,
    Serving,
    Started,
    encode_order,
    encode_report,
    parse_order,
    parse_report,
)
from mycoswarmd.wire.proof import Check, CheckName, Proof, Unit

SERVING = Serving(context_tokens=4096, parallel=2, threads=8)
ORDER = Order(engine="xllamacpp-2026.10.11549", model="SmolLM2 (Q4).gguf", serving=SERVING)


def changed(**fields: object) -> bytes:
    body: dict[str, Any] = json.loads(encode_order(ORDER))
    body |= fields
    return json.dumps(body).encode() + b"\n"


def test_an_order_arrives_as_it_was() -> None:
    for order in (
        ORDER,
        Order(engine="xllamacpp-1", model="ä模.gguf", serving=SERVING),
        Order(
            engine="xllamacpp-1",
            model="m" * 250 + ".gguf",
            serving=Serving(context_tokens=1, parallel=64, threads=1024, is_embedding=True),
        ),
    ):
        assert parse_order(encode_order(order)) == order
        assert len(encode_order(order)) < ORDER_BYTES


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "../signer.key"},
        {"model": "/etc/shadow"},
        {"model": "sub/a.gguf"},
        {"model": ".."},
        {"model": ".hidden.gguf"},
        {"model": "--model.gguf"},
        {"model": "a.gguf\0"},
        {"model": "a\n.gguf"},
        {"model": "a.bin"},
        {"model": ""},
        {"model": "ä" * 126 + ".gguf"},  # 257 bytes
        {"model": None},
        {"model": ["a.gguf"]},
        {"engine": "../xllamacpp-1"},
        {"engine": "xllamacpp-/../../tmp"},
        {"engine": "xllamacpp-.."},
        {"engine": "xllamacpp-1\n"},
        {"engine": "other-1"},
        {"engine": ""},
        {"context": 0},
        {"context": 1 << 21},
        {"context": "4096"},
        {"context": True},
        {"parallel": 65},
        {"threads": 1025},
        {"threads": -1},
        {"embedding": "yes"},
        {"embedding": None},
        {"v": 2},
        {"argv": ["--rpc", "0.0.0.0"]},
        {"env": {"LD_PRELOAD": "/tmp/x.so"}},
    ],
)
def test_an_order_with_anything_else_is_refused(fields: dict[str, object]) -> None:
    assert parse_order(changed()) == ORDER  # the same way, without the change
    with pytest.raises(BadRequest):
        parse_order(changed(**fields))


def test_reports_arrive_as_they_were() -> None:
    proof = Proof(Unit.ENGINE, (Check(CheckName.INET_SOCKET, ok=True, detail="EAFNOSUPPORT"),))
    reports: list[Report] = [
        Proved(proof),
        Started(4711, "3-1234-995/engine.sock"),
        Refused("cannot load the model", is_models=True),
        Ended(-9, "one\ntwo\n"),
    ]
    for report in reports:
        assert parse_report(encode_report(report)) == report


def test_the_last_words_of_an_engine_are_bounded_and_harmless() -> None:
    line = encode_report(Ended(1, "old" * LOG_CHARS + '\x1b[31mä\0"\\' * 400 + "\nend"))
    assert len(line) <= REPORT_BYTES
    said = parse_report(line)
    assert isinstance(said, Ended)
    assert len(said.log) == LOG_CHARS
    assert said.log.endswith('?[31m??"\\\nend')
    assert all(char == "\n" or char.isprintable() for char in said.log)
    worst = encode_report(Ended(-64, '"\\\n' * LOG_CHARS))
    assert len(worst) <= REPORT_BYTES


@pytest.mark.parametrize(
    "untrusted",
    [
        b"",
        b"[]",
        b"{}",
        b'{"started":{"pid":0,"socket":"3-1-0/engine.sock"}}',
        b'{"started":{"pid":1,"socket":"engine.sock"}}',
        b'{"started":{"pid":1,"socket":"../engine.sock"}}',
        b'{"started":{"pid":1,"socket":"3-1-0/../engine.sock"}}',
        b'{"started":{"pid":1,"socket":"../../run/docker.sock"}}',
        b'{"started":{"pid":1,"socket":"/run/docker.sock"}}',
        b'{"started":{"pid":1,"socket":".sock"}}',
        b'{"ended":{"code":1000,"log":""}}',
        b'{"ended":{"code":1,"log":"' + b"x" * (LOG_CHARS + 1) + b'"}}',
        b'{"refused":{"text":"no"}}',
        b'{"proof":{"unit":"engine","checks":[{"name":"other","ok":true}]}}',
    ],
)
def test_a_report_of_another_form_is_refused(untrusted: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_report(untrusted)
