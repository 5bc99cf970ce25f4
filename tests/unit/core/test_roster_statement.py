"""The form of statements and beacons: one way to say a thing, signed by exactly those who say it."""

import base64
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from mycoswarmd.core.roster import (
    BEACON_CONTEXT,
    MAX_BODY_BYTES,
    MAX_KEEP_BODY_BYTES,
    MAX_STATEMENTS,
    SIGNING_CONTEXT,
    CertFacts,
    Kind,
    Statement,
    encode_beacon,
    encode_statement,
    make_beacon_message,
    make_body,
    node_id_of,
    parse_beacon,
    parse_statement,
    signed,
)
from mycoswarmd.errors import BadRequest
from mycoswarmd.trust import keys
from mycoswarmd.trust.certificate import read_certificate
from tests.rosters import Key, Maker, key, parse

MAKER = Maker()
ONE, TWO, NEW = key("node", "one"), key("node", "two"), key("node", "new")
S2 = key("signer", 2)
ADMIT = MAKER.admit(ONE, "pi")
ALL = {
    Kind.GENESIS: MAKER.genesis,
    Kind.ADMIT: ADMIT,
    Kind.REVOKE: MAKER.revoke(ONE, "lost, 2026 … désolé"),
    Kind.LEAVE: MAKER.leave(ONE),
    Kind.ADD_SIGNER: MAKER.add_signer(S2, ONE),
    Kind.DROP_SIGNER: MAKER.drop_signer(S2, [ADMIT, MAKER.revoke(TWO)]),
    Kind.REKEY: MAKER.rekey(ONE, NEW),
    Kind.EPOCH: MAKER.new_epoch(1, {S2: ONE, MAKER.signer: MAKER.first}, [ADMIT]),
}
EVERY_KIND = pytest.mark.parametrize("statement", ALL.values(), ids=ALL)
ID = ONE.id
HEX = "ab" * 32


def body_of(wire: dict[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(base64.b64decode(wire["body"]))
    return body


def sign_raw(body: bytes, *by: Key) -> dict[str, object]:
    return signed(body, *(one.pair for one in by))


def canon(body: object) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def code_of(wire: object) -> str:
    try:
        parse(wire)
    except BadRequest as exc:
        return exc.code if exc.message.startswith("cannot ") else exc.message
    return "accepted"


def test_there_is_an_example_of_every_kind() -> None:
    assert set(ALL) == set(Kind)


@EVERY_KIND
def test_a_statement_reads_as_it_was_written(statement: Statement) -> None:
    wire = json.loads(json.dumps(encode_statement(statement)))
    again = parse(wire)
    assert again == statement
    assert (again.body, again.facts, again.signatures) == (
        statement.body,
        statement.facts,
        statement.signatures,
    )
    assert again.swarm == MAKER.swarm_id
    assert hash(again) == hash(statement)


def test_two_statements_are_the_same_by_their_bodies() -> None:
    assert len({*ALL.values()}) == len(ALL)
    assert MAKER.admit(ONE, "pie") != ADMIT
    assert ADMIT.sha256 != ADMIT


def test_the_id_of_a_key_is_that_of_its_certificate() -> None:
    facts = read_certificate(ONE.cert_der)
    assert (facts.node_id, facts.public_key) == (ONE.id, ONE.public)
    assert ADMIT.facts["node"] == ONE.id
    assert ALL[Kind.REKEY].facts["node"] == NEW.id
    assert node_id_of(facts.public_key) == facts.node_id


@EVERY_KIND
def test_every_bit_of_a_body_is_signed(statement: Statement) -> None:
    wire = encode_statement(statement)
    for at in range(0, len(statement.body), 7):
        changed = bytearray(statement.body)
        changed[at] ^= 1
        wire["body"] = base64.b64encode(changed).decode()
        assert code_of(wire) in {"bad-statement", "bad-certificate"}, changed


@EVERY_KIND
def test_every_signature_is_needed_and_checked(statement: Statement) -> None:
    wire: dict[str, Any] = encode_statement(statement)
    for at, (public, sig) in enumerate(statement.signatures):
        others = [list(pair) for pair in statement.signatures]
        others[at] = [public, sig[:10] + ("0" if sig[10] != "0" else "1") + sig[11:]]
        assert code_of({**wire, "sigs": others}) == "bad-statement"
        assert code_of({**wire, "sigs": wire["sigs"][:at] + wire["sigs"][at + 1 :]}) == "bad-statement"
    stranger = key("stranger")
    if statement.kind is not Kind.EPOCH:  # whose key that must be is for the set to say
        assert code_of(sign_raw(statement.body, *[stranger] * len(statement.signatures))) == "bad-statement"
    own = [ONE, NEW] if statement.kind is Kind.REKEY else None
    if own is not None:
        assert code_of(sign_raw(statement.body, *own)) == "accepted"
        assert code_of(sign_raw(statement.body, *reversed(own))) == "accepted"
        assert parse(sign_raw(statement.body, *reversed(own))).signatures == statement.signatures
    added = [*wire["sigs"], [stranger.hex, stranger.sign(SIGNING_CONTEXT + statement.body).hex()]]
    assert code_of({**wire, "sigs": added}) == "bad-statement"


@pytest.mark.parametrize(
    "context", [b"", b"mycoswarm-roster-v2\0", b"mycoswarm-roster-v1", BEACON_CONTEXT, b"mycoswarm-pop"]
)
def test_a_signature_made_for_something_else_is_refused(context: bytes) -> None:
    signer = MAKER.signer
    assert encode_statement(ADMIT)["sigs"] == [
        [signer.hex, signer.sign(b"mycoswarm-roster-v1\0" + ADMIT.body).hex()]
    ]
    wire = {**encode_statement(ADMIT), "sigs": [[signer.hex, signer.sign(context + ADMIT.body).hex()]]}
    assert code_of(wire) == "bad-statement"


def test_a_beacon_is_no_statement_and_a_statement_no_beacon() -> None:
    wire = MAKER.beacon(4)
    assert code_of(wire) == "bad-statement"
    with pytest.raises(BadRequest, match="bad-beacon"):
        parse_beacon(encode_statement(ADMIT), verify=keys.verify)


@EVERY_KIND
def test_only_canonical_json_is_accepted(statement: Statement) -> None:
    body = json.loads(statement.body)
    by = {one.hex: one for one in (MAKER.signer, MAKER.recovery, ONE, NEW)}
    signers = [by[public] for public, _ in statement.signatures]
    assert code_of(sign_raw(canon(body), *signers)) == "accepted"
    first = next(iter(sorted(body)))
    variants = [
        statement.body + b"\n",
        b" " + statement.body,
        json.dumps(body).encode(),
        json.dumps(body, indent=1).encode(),
        json.dumps(dict(sorted(body.items(), reverse=True)), separators=(",", ":")).encode(),
        statement.body[:-1] + f',"{first}":{json.dumps(body[first])}'.encode() + b"}",  # said twice
        b"\xef\xbb\xbf" + statement.body,
        statement.body.decode().encode("utf-16"),
        statement.body.decode().encode("utf-32-le"),
        statement.body.replace(b'"v":1', b'"v":1.0'),
        statement.body.replace(b'"v":1', b'"v":1e0'),
        statement.body.replace(b'"kind"', b'"k\\u0069nd"'),
        b"[" + statement.body + b"]",
    ]
    for each in variants:
        assert each != statement.body
        assert code_of(sign_raw(each, *signers)) == "bad-statement", each


@EVERY_KIND
def test_a_field_more_or_less_or_of_another_type_is_refused(statement: Statement) -> None:
    body = json.loads(statement.body)
    by = {one.hex: one for one in (MAKER.signer, MAKER.recovery, ONE, NEW)}
    signers = [by[public] for public, _ in statement.signatures]
    assert code_of(sign_raw(canon({**body, "extra": 1}), *signers)) == "bad-statement"
    wrong: list[object] = [
        None,
        True,
        False,
        -1,
        1.5,
        10**30,
        "",
        "x" * 70,
        "Ä",
        "a\0b",
        [],
        [[]],
        {},
        {"a": 1},
    ]
    for name, value in body.items():
        assert (
            code_of(sign_raw(canon({k: v for k, v in body.items() if k != name}), *signers))
            == "bad-statement"
        )
        for other in wrong:
            if other == value and type(other) is type(value):
                continue
            if (statement.kind, name) in {
                (Kind.REVOKE, "reason"),
                (Kind.DROP_SIGNER, "keep"),
                (Kind.EPOCH, "keep"),
            }:
                continue  # free text, and an empty list may be meant
            assert code_of(sign_raw(canon({**body, name: other}), *signers)) == "bad-statement", (name, other)


def bad(kind: Kind, /, **facts: Any) -> Callable[[], bytes]:
    return lambda: canon({**json.loads(ALL[kind].body), **facts})


SIGNER = {"key": HEX, "node": ID}


@pytest.mark.parametrize(
    "body",
    [
        bad(Kind.ADMIT, kind="policy"),
        bad(Kind.ADMIT, v=2),
        bad(Kind.ADMIT, v=True),
        bad(Kind.ADMIT, epoch=True),
        bad(Kind.ADMIT, epoch=1_000_001),
        bad(Kind.ADMIT, epoch=0.0),
        bad(Kind.ADMIT, swarm=HEX.upper()),
        bad(Kind.ADMIT, swarm=HEX + "\n"),
        bad(Kind.ADMIT, swarm="\uff11" * 64),  # full-width digits
        bad(Kind.ADMIT, role="signer"),
        bad(Kind.ADMIT, role=["node"]),
        bad(Kind.ADMIT, name="pi~abcd"),
        bad(Kind.ADMIT, name="-pi"),
        bad(Kind.ADMIT, name="pi\n"),
        bad(Kind.ADMIT, name="p i"),
        bad(Kind.ADMIT, name="п"),
        bad(Kind.ADMIT, name="\ud800"),
        bad(Kind.ADMIT, name="a" * 65),
        bad(Kind.ADMIT, cert=""),
        bad(Kind.ADMIT, cert="AAA"),
        bad(Kind.ADMIT, cert="AA==\n"),
        bad(Kind.ADMIT, cert="AB=="),  # the same byte as AA==
        bad(Kind.ADMIT, cert="A" * 8_000),
        bad(Kind.ADMIT, cert={"A": "B"}),
        bad(Kind.REVOKE, reason="x" * 201),
        bad(Kind.REVOKE, reason="\x1b[31m"),
        bad(Kind.REVOKE, reason="\ud800"),
        bad(Kind.REVOKE, reason="a\u202eb"),
        bad(Kind.REVOKE, reason=None),
        bad(Kind.REVOKE, node=ID.upper()),
        bad(Kind.REVOKE, node="0" * 26),
        bad(Kind.LEAVE, node=TWO.id),
        bad(Kind.LEAVE, key=TWO.hex),
        bad(Kind.DROP_SIGNER, keep=[HEX, HEX]),
        bad(Kind.DROP_SIGNER, keep=["f" * 64, "0" * 64]),
        bad(Kind.DROP_SIGNER, keep=[HEX[:-1]]),
        bad(Kind.DROP_SIGNER, keep=[["f" * 64]]),
        bad(Kind.DROP_SIGNER, keep={HEX: 1}),
        bad(Kind.DROP_SIGNER, keep=[f"{n:064x}" for n in range(16_000)]),
        bad(Kind.ADMIT, keep=[], name="a" * MAX_BODY_BYTES),
        bad(Kind.EPOCH, n=2),
        bad(Kind.EPOCH, n=0, epoch=0),
        bad(Kind.EPOCH, signers=[]),
        bad(Kind.EPOCH, signers=[SIGNER, SIGNER]),
        bad(Kind.EPOCH, signers=[SIGNER, {**SIGNER, "node": TWO.id}]),
        bad(Kind.EPOCH, signers=[{**SIGNER, "x": 1}]),
        bad(Kind.EPOCH, signers=[{"key": HEX}]),
        bad(Kind.EPOCH, signers=[{"key": [HEX], "node": ID}]),
        bad(Kind.EPOCH, signers=[{"key": f"{n:064x}", "node": ID} for n in range(65)]),
        bad(Kind.EPOCH, signers={"key": HEX, "node": ID}),
        bad(Kind.REKEY, old=TWO.id),
        bad(Kind.REKEY, key=TWO.hex),
        lambda: b"",
        lambda: b"null",
        lambda: b"{}",
        lambda: b"[]",
        lambda: b'"kind"',
        lambda: b"\xff\xfe",
        lambda: b'{"kind":NaN}',
        lambda: b'{"kind":Infinity}',
        lambda: b'{"kind":{}}',
        lambda: b'{"kind":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        lambda: b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        lambda: b"[" * MAX_BODY_BYTES,
        lambda: b'{"epoch":' + b"9" * 5_000 + b"}",
        lambda: b'{"epoch":' + b"9" * 4_000 + b"}",
        lambda: b'{"epoch":1e999}',
        lambda: b" " * (MAX_BODY_BYTES + 1),
        lambda: canon({"x": "y" * MAX_BODY_BYTES}),
    ],
)
def test_a_body_out_of_bounds_is_refused_whoever_signed_it(body: Callable[[], bytes]) -> None:
    raw = body()
    for signers in ([MAKER.signer], [ONE], [TWO], [ONE, NEW], [TWO, NEW], [MAKER.recovery]):
        assert code_of(sign_raw(raw, *signers)) == "bad-statement"


PUB = MAKER.signer.hex


@pytest.mark.parametrize(
    "sigs",
    [
        None,
        {},
        "x",
        [],
        [[]],
        [[PUB]],
        [[PUB, None]],
        [[PUB, 7]],
        [[PUB, "00" * 63]],
        [[PUB, "00" * 64]],
        [[PUB, "GG" * 64]],
        [[PUB, "00" * 64, 1]],
        [{PUB: "00" * 64}],
        [[PUB.upper(), "00" * 64]],
        [[7, "00" * 64]],
        [[[PUB], "00" * 64]],
        [encode_statement(ADMIT)["sigs"]],
        [*[[PUB, "00" * 64]] * 2],
        [[PUB, "00" * 64]] * 10_000,
    ],
)
def test_signatures_of_another_shape_are_refused(sigs: object) -> None:
    assert code_of({**encode_statement(ADMIT), "sigs": sigs}) == "bad-statement"


@pytest.mark.parametrize(
    "untrusted",
    [None, 7, "x", [], {}, {"body": ""}, {"body": "", "sigs": [], "x": 1}, [encode_statement(ADMIT)], b"{}"],
)
def test_what_is_no_statement_at_all_is_refused(untrusted: object) -> None:
    assert code_of(untrusted) == "bad-statement"


@pytest.mark.parametrize(
    "body", [None, 7, [], {}, "é", "A", "A===", "AAA A", "AB==", "-_-_", "AAAA\n", "A" * 100_000]
)
def test_a_body_that_is_not_base64_is_refused(body: object) -> None:
    assert code_of({**encode_statement(ADMIT), "body": body}) == "bad-statement"


def test_the_certificate_must_be_that_of_its_key() -> None:
    def read_other(_: bytes) -> CertFacts:
        return CertFacts(node_id=TWO.id, public_key=ONE.public)

    with pytest.raises(BadRequest, match="bad-certificate"):
        parse_statement(encode_statement(ADMIT), verify=keys.verify, read_cert=read_other)
    for der in (b"x", ONE.cert_der[:-1], ONE.cert_der + b"\0", bytes(len(ONE.cert_der))):
        wire = MAKER.wire(
            Kind.ADMIT, MAKER.signer, by=PUB, cert=base64.b64encode(der).decode(), name="pi", role="node"
        )
        assert code_of(wire) == "bad-certificate"


def test_a_key_does_not_follow_itself() -> None:
    wire = MAKER.wire(Kind.REKEY, ONE, old=ONE.id, key=ONE.hex, cert=base64.b64encode(ONE.cert_der).decode())
    assert code_of(wire) == "bad-statement"


def test_nothing_is_verified_that_has_not_the_form() -> None:
    asked: list[bytes] = []

    def verify(public: bytes, sig: bytes, message: bytes) -> bool:
        asked.append(message)
        assert (len(public), len(sig)) == (32, 64)
        return True

    wire = encode_statement(ADMIT)
    for broken in ({**wire, "sigs": [[PUB, "00"]]}, {**wire, "body": "AAAA"}, sign_raw(b"{}", ONE)):
        with pytest.raises(BadRequest):
            parse_statement(broken, verify=verify, read_cert=read_certificate)
    assert asked == []
    parse_statement(wire, verify=verify, read_cert=read_certificate)
    assert asked == [SIGNING_CONTEXT + ADMIT.body]


def test_making_a_body_takes_what_a_stranger_may_say_and_no_more() -> None:
    body = make_body(Kind.DROP_SIGNER, swarm=HEX, epoch=0, key=HEX, by=HEX, keep={"f" * 64, "0" * 64})
    assert json.loads(body)["keep"] == ["0" * 64, "f" * 64]
    with pytest.raises(BadRequest) as caught:
        make_body(Kind.REVOKE, swarm=HEX, epoch=0, node=ID, by=HEX, reason="a\nb")
    assert (caught.value.code, caught.value.where) == ("bad-statement", "reason")
    assert "200 printable" in caught.value.hint
    with pytest.raises(BadRequest, match="64 letters"):
        make_body(Kind.GENESIS, name="my home", recovery=HEX, signer=HEX, nonce="0" * 32, node=ID)
    with pytest.raises(BadRequest, match="bad-statement"):
        make_body(Kind.REVOKE, swarm=HEX, epoch=0, node=ID, by=HEX)


def test_a_statement_that_nobody_would_take_is_not_made() -> None:
    keep = [f"{n:064x}" for n in range(16_000)]
    with pytest.raises(BadRequest, match="1,048,576 bytes"):
        make_body(Kind.DROP_SIGNER, swarm=HEX, epoch=0, key=HEX, by=HEX, keep=keep)
    with pytest.raises(BadRequest, match="65,536 bytes"):
        make_body(Kind.REVOKE, swarm=HEX, epoch=0, node=ID, by=HEX, reason="x" * MAX_BODY_BYTES)
    many = [{"key": one, "node": ID} for one in keep[:64]]
    body = make_body(Kind.EPOCH, swarm=HEX, epoch=1, n=1, signers=many, keep=keep[:MAX_STATEMENTS])
    assert MAX_BODY_BYTES < len(body) < MAX_KEEP_BODY_BYTES  # what a full roster can need


def test_parsing_does_not_depend_on_how_deep_the_caller_is() -> None:
    def deeper(n: int) -> Statement:
        return parse(encode_statement(ADMIT)) if n == 0 else deeper(n - 1)

    assert deeper(sys.getrecursionlimit() // 2) == ADMIT


# --- beacons ---------------------------------------------------------------------------------------


def test_a_beacon_reads_as_it_was_written() -> None:
    wire = json.loads(json.dumps(MAKER.beacon(7)))
    beacon = parse_beacon(wire, verify=keys.verify)
    assert (beacon.swarm, beacon.epoch, beacon.signer, beacon.n) == (MAKER.swarm_id, 0, MAKER.signer.hex, 7)
    assert encode_beacon(beacon) == wire
    message = make_beacon_message(swarm=beacon.swarm, epoch=0, signer=beacon.signer, n=7)
    assert message == b"mycoswarm-beacon-v1\0" + canon({k: v for k, v in wire.items() if k != "sig"})
    assert keys.verify(MAKER.signer.public, bytes.fromhex(beacon.sig), message)


@pytest.mark.parametrize(
    "change",
    [
        {"n": 8},
        {"n": 0},
        {"n": True},
        {"n": 7.0},
        {"n": 1 << 53},
        {"n": "7"},
        {"epoch": 1},
        {"epoch": -1},
        {"swarm": HEX},
        {"swarm": None},
        {"signer": ONE.hex},
        {"signer": "x"},
        {"sig": "00" * 64},
        {"sig": "00"},
        {"sig": None},
        {"more": 1},
    ],
)
def test_a_beacon_that_was_touched_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(BadRequest, match="bad-beacon"):
        parse_beacon({**MAKER.beacon(7), **change}, verify=keys.verify)


@pytest.mark.parametrize(
    ("epoch", "n"), [(0, 0), (0, -1), (0, 1 << 53), (-1, 1), (1_000_001, 1), (True, 1), (0, True)]
)
def test_a_beacon_out_of_range_is_refused_although_its_signer_signed_it(epoch: int, n: int) -> None:
    with pytest.raises(BadRequest, match="in range"):
        parse_beacon(Maker(epoch=epoch).beacon(n), verify=keys.verify)


@pytest.mark.parametrize("untrusted", [None, [], {}, "x", 7])
def test_what_is_no_beacon_is_refused(untrusted: object) -> None:
    with pytest.raises(BadRequest, match="bad-beacon"):
        parse_beacon(untrusted, verify=keys.verify)


def test_a_statement_signature_is_no_beacon_signature() -> None:
    signer = MAKER.signer
    message = make_beacon_message(swarm=MAKER.swarm_id, epoch=0, signer=signer.hex, n=1)
    wrong = signer.sign(SIGNING_CONTEXT + message.removeprefix(BEACON_CONTEXT)).hex()
    with pytest.raises(BadRequest, match="bad-beacon"):
        parse_beacon({**MAKER.beacon(1), "sig": wrong}, verify=keys.verify)
