"""The language of the LAN dialer, and its rules: which address may be dialled, and where one may listen."""

import ipaddress
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycoswarmd.errors import BadRequest
from mycoswarmd.wire.dial import (
    PACKET_BYTES,
    Code,
    Connect,
    DialAnswer,
    DialRequest,
    Done,
    Failed,
    Listen,
    Prove,
    Rules,
    clean_host,
    encode_answer,
    encode_request,
    objection,
    parse_answer,
    parse_request,
    parse_rules,
)
from mycoswarmd.wire.proof import Check, CheckName, Proof, Unit

ANY_ENGINE = Rules(engine_ports=None)
PROOF = Proof(Unit.LAN, tuple(Check(name, None, "x" * 500) for name in CheckName))


@pytest.mark.parametrize(
    "request_",
    [Connect("10.0.0.7", 7437, 1500), Connect("fe80::1%eth0", 7437, 1), Listen("::", 7437), Prove()],
)
def test_a_request_comes_back_as_it_went(request_: DialRequest) -> None:
    assert parse_request(encode_request(request_)) == request_


@pytest.mark.parametrize("answer", [Done(), *(Failed(code, "why") for code in Code)])
def test_an_answer_comes_back_as_it_went(answer: DialAnswer) -> None:
    assert parse_answer(encode_answer(answer)) == answer


def test_the_longest_answers_fit_into_a_packet() -> None:
    assert len(encode_answer(Done(PROOF))) <= PACKET_BYTES
    long = parse_answer(encode_answer(Failed(Code.DENIED, "\x1b\u202e" + "x" * 5000)))
    assert long == Failed(Code.DENIED, "??" + "x" * 198)


def connect(**more: Any) -> bytes:
    return json.dumps(
        {"v": 1, "do": "connect", "host": "10.0.0.7", "port": 7437, "within_ms": 9} | more
    ).encode()


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\xff",
        b"[]",
        b"[" * 4000,
        b'{"v":1}',
        b'{"v":1,"do":"resolve"}',
        b'{"v":1,"do":"prove","host":"::"}',
        b'{"v":1,"do":"listen","host":"::"}',
        connect(v=2),
        connect(v=True),
        connect(host=None),
        connect(host="node.local"),
        connect(host=""),
        connect(host="10.0.0.7\0"),
        connect(host="10.0.0.7%eth0"),
        connect(host="::ffff:10.0.0.7"),
        connect(host="fe80::1"),
        connect(host="fe80::1%"),
        connect(host="fe80::1%../../x"),
        connect(host="fe80::1%" + "e" * 16),
        connect(host="fd00::1%eth0"),
        connect(host="1" * 65),
        connect(host=167772167),
        connect(host="010.0.0.7"),
        connect(host="10.7"),
        connect(port=0),
        connect(port=65536),
        connect(port="7437"),
        connect(within_ms=0),
        connect(within_ms=10_001),
        connect(bind="10.0.0.1"),
        connect() + b" " * PACKET_BYTES,
    ],
)
def test_what_is_no_request_is_refused(packet: bytes) -> None:
    assert parse_request(connect()) == Connect("10.0.0.7", 7437, 9)  # the one that is bent here is good
    with pytest.raises(BadRequest):
        parse_request(packet)


@pytest.mark.parametrize(
    "packet",
    [b"", b"{}", b'{"ok":1}', b'{"ok":false}', b'{"ok":false,"code":"x"}', b'{"ok":true,"proof":{}}'],
)
def test_what_is_no_answer_is_refused(packet: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_answer(packet)


LAN = (
    "10.0.0.7",
    "10.255.255.255",
    "172.16.0.1",
    "172.31.255.1",
    "192.168.178.20",
    "fd00::1",
    "fd00:ec2::253",
    "fe80::1%eth0",
    "fe80::a9fe:a9ff%eth0",
)
NOT_LAN = {
    "public": "8.8.8.8",
    "public IPv6": "2001:4860:4860::8888",
    "the clouds' keys": "169.254.169.254",
    "the keys of Amazon's": "fd00:ec2::254",
    "the keys of Google's": "fd20:ce::254",
    "the keys of OpenStack's": "fe80::a9fe:a9fe%eth0",
    "the same by another interface": "fe80::a9fe:a9fe%br0",
    "link-local IPv4": "169.254.3.4",
    "multicast": "224.0.0.251",
    "multicast IPv6": "ff02::fb",
    "broadcast": "255.255.255.255",
    "nowhere": "0.0.0.0",
    "nowhere IPv6": "::",
    "loopback IPv6": "::1",
    "the canary": "127.0.0.2",
    "the resolver": "127.0.0.53",
    "below 172.16": "172.15.255.255",
    "above 172.31": "172.32.0.1",
    "beside 192.168": "192.169.0.1",
    "carrier's": "100.64.0.1",
    "site-local, which is history": "fec0::1",
    "6to4 of a private address": "2002:a00:7::1",
    "NAT64 of a private address": "64:ff9b::a00:7",
    "IPv4-compatible": "::10.0.0.7",
    "mapped": "::ffff:10.0.0.7",
    "mapped, as bytes": "::ffff:a00:7",
}


@pytest.mark.parametrize("host", LAN)
def test_home_networks_may_be_dialled(host: str) -> None:
    assert objection(Connect(host, 7437, 1), Rules()) is None
    assert objection(Connect(host, 1023, 1), Rules()) is not None
    assert objection(Connect(host, 22, 1), ANY_ENGINE) is not None


@pytest.mark.parametrize("host", NOT_LAN.values(), ids=NOT_LAN)
def test_nothing_else_may(host: str) -> None:
    assert objection(Connect(host, 7437, 1), ANY_ENGINE) is not None


def test_loopback_is_for_declared_engines() -> None:
    declared = Rules(engine_ports=frozenset({11434, 80}))
    assert objection(Connect("127.0.0.1", 11434, 1), declared) is None
    assert objection(Connect("127.0.0.1", 11435, 1), declared) is not None
    assert objection(Connect("127.0.0.1", 80, 1), declared) is not None
    assert objection(Connect("127.0.0.1", 11434, 1), Rules()) is not None
    assert objection(Connect("127.0.0.1", 11435, 1), ANY_ENGINE) is None


@pytest.mark.parametrize("host", ["fd00:0::1", "FD00::1", "fd00:0:0:0:0:0:0:1", "::ffff:10.0.0.7"])
def test_one_address_has_one_spelling(host: str) -> None:
    assert objection(Connect(host, 7437, 1), Rules()) is not None
    cleaned = clean_host(host)
    assert cleaned is None or objection(Connect(cleaned, 7437, 1), Rules()) is None


@pytest.mark.parametrize(
    ("host", "port", "is_allowed"),
    [
        ("::", 7437, True),
        ("0.0.0.0", 7437, True),
        ("192.168.1.2", 7437, True),
        ("fe80::1%eth0", 7437, True),
        ("127.0.0.1", 7436, True),
        ("127.0.0.1", 7437, False),
        ("::", 7436, False),
        ("0.0.0.0", 7436, False),
        ("::", 8080, False),
        ("8.8.8.8", 7437, False),
        ("::1", 7436, False),
        ("127.0.0.2", 7436, False),
        ("169.254.1.1", 7437, False),
        ("fd00:ec2::254", 7437, False),
    ],
)
def test_where_one_may_listen(host: str, port: int, *, is_allowed: bool) -> None:
    assert (objection(Listen(host, port), Rules()) is None) == is_allowed
    if not is_allowed:  # and no operator is asked twice
        assert objection(Listen(host, port), Rules(listen=frozenset({(host, port)}))) is None


def test_the_settings_say_where_engines_are() -> None:
    rules = parse_rules(
        {
            "engines": {
                "a": {"kind": "ollama", "url": "http://127.0.0.1:11434"},
                "b": {"url": "http://127.0.0.1:8080/v1/"},
                "c": {"url": "unix:/run/engine.sock"},
                "d": {"url": "http://[::1]:9001"},
                "e": {"url": "http://127.0.0.2:9002"},
                "f": {"url": "http://127.0.0.1:9003@10.0.0.1:9004"},
                "g": {"url": "http://10.0.0.1:9005"},
                "h": {"url": 9006},
                "i": "http://127.0.0.1:9007",
                "j": {"url": "http://127.0.0.1:9008/\n"},
            },
            "listen": "127.0.0.1:7500",
            "swarm_listen": "[::]:7501",
        }
    )
    assert rules.engine_ports == frozenset({11434, 8080})
    assert rules.listen == {("127.0.0.1", 7500), ("::", 7501)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.168.1.2:7500", ("192.168.1.2", 7500)),
        ("[fd00::1]:7500", ("fd00::1", 7500)),
        ("[fe80::1%eth0]:7500", ("fe80::1%eth0", 7500)),
        ("0.0.0.0:7500", ("0.0.0.0", 7500)),
        ("8.8.8.8:7500", None),
        ("127.0.0.2:7500", None),
        ("[::ffff:10.0.0.1]:7500", None),
        ("none", None),
        ("7500", None),
        (7500, None),
    ],
)
def test_the_settings_say_where_one_listens(text: object, expected: tuple[str, int] | None) -> None:
    assert parse_rules({"swarm_listen": text}).listen == ({expected} if expected else set())


@pytest.mark.parametrize("table", [{}, {"engines": []}, {"engines": {"a": 1}}, {"listen": {}}])
def test_settings_that_say_nothing_add_nothing(table: dict[str, object]) -> None:
    assert parse_rules(table) == Rules()


@given(
    st.binary(max_size=200)
    | st.dictionaries(st.text(max_size=9), st.text(max_size=9)).map(lambda one: json.dumps(one).encode())
)
def test_no_bytes_break_the_parsers(untrusted: bytes) -> None:
    for parse in (parse_request, parse_answer):
        with suppress(BadRequest):
            parse(untrusted)


@given(st.ip_addresses(), st.integers(1, 65535))
def test_what_is_dialled_is_private_by_pythons_own_judgement(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int
) -> None:
    """A second opinion: `is_private` was written by others."""
    host = clean_host(str(address))
    if host is not None and objection(Connect(host, port, 1), Rules()) is None:
        assert address.is_private
        assert port >= 1024
        assert not (address.is_loopback or address.is_multicast or address.is_unspecified)
        assert address.version == 6 or not address.is_link_local
