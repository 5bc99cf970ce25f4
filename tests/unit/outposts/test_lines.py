"""The lines between the node and its discovery process: nothing but hints of home networks gets through."""

import json
from typing import Any

import pytest

from mycoswarmd.errors import BadRequest
from mycoswarmd.wire.hints import (
    LINE_BYTES,
    Announcement,
    Beat,
    Gone,
    Order,
    Ready,
    Report,
    Sighting,
    Trouble,
    clean_address,
    encode_order,
    encode_report,
    parse_order,
    parse_report,
)

ID = "abcdefghijklmnopqrstuvwx27"
GOOD: dict[str, Any] = {
    "id": ID, "addresses": ["10.0.0.7"], "port": 7437, "v": 1, "d": "0123456789abcdef"
}  # fmt: skip


@pytest.mark.parametrize(
    "order",
    [
        Order(),
        Order(stop=True),
        Order(announce=Announcement(node_id=ID, port=7437, digest="0123456789abcdef")),
        Order(announce=Announcement(node_id=ID, port=1, digest="")),
    ],
)
def test_orders_come_back_as_they_were(order: Order) -> None:
    assert parse_order(encode_order(order)) == order


@pytest.mark.parametrize(
    "report",
    [
        Sighting(node_id=ID, addresses=("10.0.0.7", "fe80::1%eth0"), port=7437, digest="0123456789abcdef"),
        Gone(ID), Ready(), Beat(), Trouble("cannot listen for other nodes: no network"),
    ],
)  # fmt: skip
def test_reports_come_back_as_they_were(report: Report) -> None:
    assert parse_report(encode_report(report)) == report


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("id", ID[:-1]), ("id", ID + "a"), ("id", ID.upper()), ("id", ID[:-1] + "1"), ("id", ID[:-1] + "\n"),
        ("id", None), ("id", 7), ("id", "../../../etc/passwd"), ("id", ID[:-1] + "é"),
        ("port", 0), ("port", 65536), ("port", -1), ("port", "7437"), ("port", 1.5), ("port", True),
        ("port", None), ("v", 0), ("v", "1"), ("v", 2**40), ("d", "0" * 15), ("d", "0" * 17), ("d", "G" * 16),
        ("d", None), ("d", "0" * 16 + "\n"), ("addresses", None), ("addresses", "10.0.0.7"),
        ("addresses", ["10.0.0.7"] * 9), ("addresses", {}),
    ],
)  # fmt: skip
def test_each_field_of_a_hint_is_checked(key: str, value: object) -> None:
    assert isinstance(parse_report(json.dumps({"hint": GOOD}).encode()), Sighting)  # so the case below tells
    with pytest.raises(BadRequest):
        parse_report(json.dumps({"hint": GOOD | {key: value}}).encode())


@pytest.mark.parametrize(
    "text",
    ["10.0.0.7", "172.16.0.1", "172.31.255.254", "192.168.1.1", "169.254.1.1", "127.0.0.1", "::1", "fd00::1",
     "fe80::1%eth0", "fe80::1%wlp0s20f3", "fc00::"],
)  # fmt: skip
def test_home_addresses_are_taken(text: str) -> None:
    assert clean_address(text) == text


@pytest.mark.parametrize(
    ("text", "one_spelling"),
    [("FD00:0::1", "fd00::1"), ("::ffff:192.168.1.9", "192.168.1.9"), ("fe80:0:0::1%eth0", "fe80::1%eth0")],
)
def test_an_address_has_one_spelling(text: str, one_spelling: str) -> None:
    assert clean_address(text) == one_spelling


@pytest.mark.parametrize(
    "untrusted",
    ["", "8.8.8.8", "172.32.0.1", "192.169.0.1", "0.0.0.0", "255.255.255.255", "224.0.0.251", "2001:db8::1",
     "::", "ff02::fb", "::ffff:8.8.8.8", "fe80::1", "fe80::1%", "fe80::1%a b", "fe80::1%" + "x" * 16,
     "fe80::1%eth0%eth1", "fe80::1%../x", "10.0.0.7%eth0", "fd00::1%eth0", "10.0.0.7:7437", "010.0.0.7",
     "10.0.0", "example.org", "localhost", "10.0.0.7\n", " 10.0.0.7", "1" * 100, 167772167, None,
     ["10.0.0.7"], "100.64.0.1", "64:ff9b::a00:1"],
)  # fmt: skip
def test_other_addresses_are_dropped(untrusted: object) -> None:
    assert clean_address(untrusted) is None
    line = json.dumps({"hint": GOOD | {"addresses": [untrusted, "10.0.0.7"]}}).encode()
    report = parse_report(line)
    assert isinstance(report, Sighting) and report.addresses == ("10.0.0.7",)


@pytest.mark.parametrize(
    "line",
    [b"", b"\n", b"null\n", b"{}\n", b'{"announce":7}\n', b'{"announce":{}}\n', b'{"stop":1}\n', b"\xff\n",
     b'{"announce":{"id":"x","port":1,"v":1,"d":""}}\n'],
)  # fmt: skip
def test_bad_orders_are_refused(line: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_order(line)


def test_the_longest_report_fits_a_line() -> None:
    longest = tuple(f"fe80:1111:2222:3333:4444:5555:6666:777{n}%abcdefghijklmno" for n in range(8))
    line = encode_report(Sighting(node_id=ID, addresses=longest, port=65535, version=65535, digest="f" * 16))
    assert len(line) < LINE_BYTES
    with pytest.raises(BadRequest):
        encode_report(Sighting(node_id=ID, addresses=("x" * 5000,), port=1))


def test_trouble_is_bounded_and_harmless() -> None:
    report = parse_report(encode_report(Trouble("x" * 500)))
    assert isinstance(report, Trouble) and len(report.text) == 200
    with pytest.raises(BadRequest):
        parse_report(json.dumps({"trouble": "x" * 201}).encode())
