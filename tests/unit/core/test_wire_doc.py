"""docs/wire.md and the code say the same: every example value in the page is made again and compared.

`python -m tests.unit.core.test_wire_doc` prints the values as the page has them.
"""

import base64
import hashlib
import hmac
import json
import re
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from mycoswarmd.api import app, lines, peers
from mycoswarmd.api.routes import ROUTES
from mycoswarmd.core import enrol
from mycoswarmd.core.recovery import format_recovery, parse_recovery
from mycoswarmd.core.roster import (
    MAX_BODY_BYTES,
    MAX_KEEP_BODY_BYTES,
    MAX_PULL_HASHES,
    MAX_REKEYS,
    MAX_ROSTER_BYTES,
    MAX_STATEMENTS,
    Kind,
    Roster,
    Statement,
    StatementSet,
    canonical,
    encode_statement,
    make_body,
    node_id_of,
    parse_beacon,
    parse_statement,
    sign_beacon,
    signed,
)
from mycoswarmd.core.roster.statements import MAX_QUIET_STATEMENTS, RESERVED_BYTES, RESERVED_STATEMENTS
from mycoswarmd.core.words import six_words
from mycoswarmd.daemon import backup
from mycoswarmd.engines import peeranswer, peerline
from mycoswarmd.fleet import fleet, hints, link
from mycoswarmd.flow import enrol as flow_enrol
from mycoswarmd.flow import swarmexchange as flow_exchange
from mycoswarmd.trust import keys
from mycoswarmd.trust.certificate import CERTIFICATE_BYTES, make_certificate, read_certificate, server_name
from mycoswarmd.wire import peer
from mycoswarmd.wire.hints import Announcement
from mycoswarmd.wire.prompt import PromptKind

PAGE = Path(__file__).parents[3] / "docs" / "wire.md"
WIDTH = 100


def seed(name: str) -> bytes:
    return hashlib.sha256(f"mycoswarm wire example: {name}".encode()).digest()


def public(name: str) -> str:
    return keys.public_key(seed(name)).hex()


def node(name: str) -> str:
    return node_id_of(keys.public_key(seed(name)))


def cert(name: str) -> str:
    return base64.b64encode(make_certificate(seed(name))).decode()


def statement(body: bytes, *signers: str) -> Statement:
    pairs = [
        (keys.public_key(seed(one)), lambda message, one=one: keys.sign(seed(one), message))
        for one in signers
    ]
    return parse_statement(signed(body, *pairs), verify=keys.verify, read_cert=read_certificate)


@cache
def statements() -> Mapping[str, Statement]:
    """Return the statements of the page's swarm."""
    genesis = statement(
        make_body(
            Kind.GENESIS,
            name="home",
            recovery=public("recovery"),
            signer=public("desk signer"),
            nonce=seed("nonce")[:16].hex(),
            node=node("desk"),
        ),
        "desk signer",
    )
    common = {"swarm": genesis.sha256, "epoch": 0}
    by = {**common, "by": public("desk signer")}
    desk = make_body(Kind.ADMIT, cert=cert("desk"), name="desk", role="node", **by)
    pi4 = make_body(Kind.ADMIT, cert=cert("pi4"), name="pi4", role="node", **by)
    alice = make_body(Kind.ADMIT, cert=cert("alice"), name="alice", role="operator", **by)
    found = {
        "genesis": genesis,
        "admit.desk": statement(desk, "desk signer"),
        "admit.pi4": statement(pi4, "desk signer"),
        "admit.alice": statement(alice, "desk signer"),
        "signer+": statement(
            make_body(Kind.ADD_SIGNER, key=public("pi4 signer"), node=node("pi4"), **by), "desk signer"
        ),
        "signer-": statement(
            make_body(Kind.DROP_SIGNER, key=public("pi4 signer"), keep=[], **by), "desk signer"
        ),
        "revoke": statement(make_body(Kind.REVOKE, node=node("alice"), reason="lost", **by), "desk signer"),
        "rekey": statement(
            make_body(Kind.REKEY, old=node("pi4"), key=public("pi4"), cert=cert("pi4 next"), **common),
            "pi4",
            "pi4 next",
        ),
        "leave": statement(
            make_body(Kind.LEAVE, node=node("pi4 next"), key=public("pi4 next"), **common), "pi4 next"
        ),
    }
    keep = [found[name].sha256 for name in ("admit.desk", "admit.pi4", "rekey")]
    signers = [{"key": public("desk signer"), "node": node("desk")}]
    epoch = make_body(Kind.EPOCH, swarm=genesis.sha256, epoch=1, n=1, signers=signers, keep=keep)
    return {**found, "epoch": statement(epoch, "recovery")}


_FIRST = ("admit.desk", "admit.pi4", "admit.alice", "signer+")
_THEN = (*_FIRST, "signer-", "revoke", "rekey", "leave")
STAGES = {"first": _FIRST, "then": _THEN, "last": (*_THEN, "epoch")}


def view(stage: str) -> Roster:
    known = statements()
    whole = StatementSet(known["genesis"])
    whole.add(known[name] for name in STAGES[stage])
    return whole.roster


def describe(roster: Roster) -> dict[str, str]:
    by_hash = {one.sha256: name for name, one in statements().items()}
    members = [f"{one.name}:{one.role}:{one.id}" for one in roster.members.values()]
    return {
        "holds": ",".join(sorted(by_hash[one] for one in roster.hashes)),
        "epoch": str(roster.epoch),
        "members": ",".join(sorted(members)),
        "signers": ",".join(f"{key}:{node_id}" for key, node_id in roster.signers.items()),
        "out": ",".join(f"{node_id}:{reason}" for node_id, reason in roster.revoked.items()),
        "digest": roster.digest,
    }


@cache
def examples() -> Mapping[str, str]:
    """Return every value of the page by its name."""
    found: dict[str, str] = {}
    for name in ("desk", "desk signer", "pi4", "pi4 next", "pi4 signer", "alice", "recovery"):
        found[f"seed.{name.replace(' ', '-')}"] = seed(name).hex()
        found[f"key.{name.replace(' ', '-')}"] = public(name)
    for name in ("desk", "pi4", "pi4 next", "alice"):
        found[f"id.{name.replace(' ', '-')}"] = node(name)
    found["words.pi4"] = six_words(node("pi4"))
    found["cert.desk"] = make_certificate(seed("desk")).hex()
    for name, one in statements().items():
        found[f"body.{name}"] = one.body.decode()
        found[f"hash.{name}"] = one.sha256
        found[f"sigs.{name}"] = canonical([list(pair) for pair in one.signatures]).decode()
    for stage in STAGES:
        found |= {f"view.{stage}.{key}": value for key, value in describe(view(stage)).items()}
    beacon = sign_beacon(
        swarm=statements()["genesis"].sha256,
        epoch=0,
        signer=keys.public_key(seed("desk signer")),
        n=7,
        sign=lambda message: keys.sign(seed("desk signer"), message),
    )
    found["beacon"] = canonical(beacon).decode()
    found["recovery.paper"] = format_recovery(seed("recovery"))
    return found | enrolment() | {"word": peer.encode_word(word()).decode()}


def enrolment() -> dict[str, str]:
    """Return the worked example of one enrolment."""
    random_bytes = seed("code")[:13]
    code = enrol.make_code(random_bytes)
    derived = enrol.derive(code)
    stretched = Scrypt(
        salt=b"mycoswarm-invite-v1" + code.invite.encode(), length=32, n=2**15, r=8, p=1
    ).derive(code.secret.encode())
    desk, pi4 = make_certificate(seed("desk")), make_certificate(seed("pi4"))
    genesis = statements()["genesis"].sha256
    joiner = enrol.Joiner(
        derived, code.invite, nonce=seed("nonce of the newcomer"), cert_der=pi4, role="node", name="pi4"
    )
    hello = enrol.parse_hello(joiner.hello(), read_cert=read_certificate)
    challenge = {
        **enrol.challenge(
            derived, hello, nonce=seed("nonce of the inviter"), cert_der=desk, genesis_sha256=genesis
        ),
        "session": "00",
    }
    confirm = joiner.confirm(challenge, desk, lambda message: keys.sign(seed("pi4"), message))
    transcript = enrol.check_confirm(
        derived,
        hello,
        confirm,
        nonce=seed("nonce of the inviter"),
        cert_der=desk,
        genesis_sha256=genesis,
        read_cert=read_certificate,
        verify=keys.verify,
    )
    known = [encode_statement(statements()[name]) for name in ("genesis", "admit.desk", "admit.pi4")]
    sealed = enrol.seal_bundle(derived, transcript, {"statements": known})
    assert joiner.welcome(sealed).statements == tuple(known)
    return {
        "enrol.random": random_bytes.hex(),
        "enrol.code": enrol.format_code(code),
        "enrol.invite": code.invite,
        "enrol.stretched": stretched.hex(),
        "enrol.key.inviter": derived.inviter.hex(),
        "enrol.key.joiner": derived.joiner.hex(),
        "enrol.key.bundle": derived.bundle.hex(),
        "enrol.hello": canonical(joiner.hello()).decode(),
        "enrol.transcript": transcript.hex(),
        "enrol.challenge": canonical(challenge).decode(),
        "enrol.confirm": canonical(confirm).decode(),
        "enrol.bundle.sha256": hashlib.sha256(base64.b64decode(str(sealed["bundle"]))).hexdigest(),
        "enrol.bundle.mac": str(sealed["mac"]),
    }


def word() -> peer.Word:
    return peer.Word(
        id=node("desk"),
        version="1.0.0",
        boot=3,
        instance="00112233445566aa",
        port=7437,
        digest=view("first").digest,
        statements=len(view("first").hashes),
        tier="gpu-mid",
        sandbox="reduced",
        uptime_s=86400,
        running=1,
        models=(
            peer.ModelWord(
                name="qwen2.5-coder:7b",
                kinds=frozenset({PromptKind.CHAT}),
                context_tokens=32768,
                loaded=True,
                size_bytes=4683087332,
            ),
        ),
    )


PROBES = {name: value for level, name, value in peerline.PROBES if level == socket.IPPROTO_TCP}
# Numbers that the page gives, by the words that stand before them there.
NUMBERS = {
    "statement.bytes": MAX_BODY_BYTES,
    "statement.with_keep.bytes": MAX_KEEP_BODY_BYTES,
    "statements": MAX_STATEMENTS,
    "statements.reserved": RESERVED_STATEMENTS,
    "statements.quiet": MAX_QUIET_STATEMENTS,
    "statements.bytes": MAX_ROSTER_BYTES,
    "statements.bytes.reserved": RESERVED_BYTES,
    "rekeys": MAX_REKEYS,
    "certificate.bytes": CERTIFICATE_BYTES,
    "bundle.bytes": enrol.MAX_BUNDLE_BYTES,
    "session.chars": enrol.MAX_SESSION_CHARS,
    "invite.failures": flow_enrol.MAX_FAILURES,
    "invite.open": flow_enrol.MAX_OPEN,
    "invite.longest_s": flow_enrol.MAX_TTL_S,
    "answer.bytes": peeranswer.MAX_ANSWER_BYTES,
    "word.bytes": peer.MAX_WORD_BYTES,
    "word.models": peer.MAX_MODELS,
    "word.beacons": peer.MAX_BEACONS,
    "watch.beat_s": peer.HEARTBEAT_S,
    "watch.pause_s": peers._PACE_S,
    "watch.silent_s": peer.SILENT_S,
    "dial.first_s": link._FIRST_DELAY_S,
    "dial.longest_s": link._LONGEST_DELAY_S,
    "beacon.every_s": flow_exchange.BEACON_S,
    "beacon.asked_s": flow_exchange.BEACON_AT_MOST_S,
    "beacon.fresh_s": flow_exchange.BEACON_IN_NEED_S,
    "beacon.again_s": link._ASK_AGAIN_S,
    "peers.ids": fleet._TOLD_IDS,
    "peers.addresses": fleet._TOLD_ADDRESSES,
    "pull.hashes": MAX_PULL_HASHES,
    "probe.first_s": PROBES[socket.TCP_KEEPIDLE],
    "probe.every_s": PROBES[socket.TCP_KEEPINTVL],
    "probe.given_up_s": PROBES[socket.TCP_KEEPIDLE]
    + PROBES[socket.TCP_KEEPINTVL] * PROBES[socket.TCP_KEEPCNT],
    "unacknowledged_s": peerline.UNHEARD_MS / 1000,
    "idle.server_s": lines.KEEPALIVE_S,
    "idle.client_s": peerline.KEEPALIVE_S,
    "boot.restored": backup.RESTORED_BOOTS,
    "hints": hints.MAX_HINTS,
    "hints.addresses": hints.MAX_PROVED + hints.MAX_UNPROVED,
    "hint.lasts_s": hints.HINT_S,
    "strangers": lines.Bounds().strangers,
    "strangers.of_address": lines.Bounds().strangers_of_source,
    "strangers.per_s": app._KNOCKS_OF_ALL.per_s,
    "strangers.of_address.per_s": app._KNOCKS_OF_EACH.per_s,
    "connections.of_member": lines.Bounds().member,
    "handshake.within_s": lines.Bounds().patience_s,
    "mdns.version": Announcement(node_id="", port=0).version,
}

_LINE = re.compile(r"([a-z][a-z0-9.+_-]*) =(?: (.*))?")


def read_page(text: str) -> dict[str, str]:
    """Return the values in the page's code blocks; a line that begins with four blanks goes on."""
    found: dict[str, str] = {}
    for block in re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        name = ""
        for line in block.splitlines():
            if line.startswith("    ") and name:
                found[name] += line[4:]
            elif named := _LINE.fullmatch(line):
                name = named[1]
                assert name not in found, name
                found[name] = named[2] or ""
            else:
                name = ""
    return found


def write(name: str, value: str) -> str:
    """Return the lines of one value."""
    if len(name) + 3 + len(value) <= WIDTH:
        return f"{name} = {value}".rstrip()
    pieces = [value[at : at + WIDTH - 4] for at in range(0, len(value), WIDTH - 4)]
    return "\n    ".join([f"{name} =", *pieces])


@pytest.fixture(scope="module")
def page() -> dict[str, str]:
    return read_page(PAGE.read_text())


def test_every_example_in_the_page_is_what_the_code_makes(page: dict[str, str]) -> None:
    made = examples()
    assert {name for name in page if not name.startswith("n.")} == set(made)
    for name, value in made.items():
        assert page[name] == value, name


def test_every_number_in_the_page_is_the_codes(page: dict[str, str]) -> None:
    said = {name.removeprefix("n."): float(value) for name, value in page.items() if name.startswith("n.")}
    assert said == {name: float(value) for name, value in NUMBERS.items()}


def test_the_routes_in_the_page_are_those_that_there_are() -> None:
    rows = re.findall(
        r"^\| (GET|POST) +\| `(/swarm/[^`]+)` +\| ([a-z, ]+?) +\| ([0-9,]+) +\|",
        PAGE.read_text(),
        re.MULTILINE,
    )
    said = {
        (method, path, frozenset(who.split(", ")), int(size.replace(",", "")))
        for method, path, who, size in rows
    }
    real = {
        (one.method, one.path, frozenset(one.who), one.body_bytes)
        for one in ROUTES
        if one.path.startswith("/swarm/")
    }
    assert said == {(m, p, frozenset(str(role) for role in who), b) for m, p, who, b in real}


def test_somebody_with_the_page_and_common_libraries_gets_the_same(page: dict[str, str]) -> None:
    """Follow the page's words without our code: statements, transcript, proofs."""
    for name in ("genesis", "admit.pi4", "rekey", "epoch"):
        body = page[f"body.{name}"].encode()
        assert hashlib.sha256(body).hexdigest() == page[f"hash.{name}"]
        assert json.dumps(json.loads(body), sort_keys=True, separators=(",", ":")).encode() == body
        for key, signature in json.loads(page[f"sigs.{name}"]):
            verifier = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
            verifier.verify(bytes.fromhex(signature), b"mycoswarm-roster-v1\0" + body)
    info = bytes.fromhex("302a300506032b6570032100") + bytes.fromhex(page["key.desk"])
    assert base64.b32encode(hashlib.sha256(info).digest()).decode()[:26].lower() == page["id.desk"]

    hello = json.loads(page["enrol.hello"])
    challenge, confirm = json.loads(page["enrol.challenge"]), json.loads(page["enrol.confirm"])
    parts = [
        hello["invite"].encode(),
        bytes.fromhex(hello["nonce"]),
        bytes.fromhex(challenge["nonce"]),
        hashlib.sha256(bytes.fromhex(page["cert.desk"])).digest(),
        hashlib.sha256(base64.b64decode(hello["cert"])).digest(),
        bytes.fromhex(challenge["genesis"]),
        hello["role"].encode(),
        hello["name"].encode(),
    ]
    data = b"mycoswarm-enrol-v1" + b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    transcript = hashlib.sha256(data).digest()
    assert transcript.hex() == page["enrol.transcript"]
    stretched = bytes.fromhex(page["enrol.stretched"])
    for purpose, proof in (("inviter", challenge["mac"]), ("joiner", confirm["mac"])):
        key = HKDF(SHA256(), 32, None, f"mycoswarm-enrol-v1 {purpose}".encode()).derive(stretched)
        assert key.hex() == page[f"enrol.key.{purpose}"]
        assert hmac.new(key, transcript, "sha256").hexdigest() == proof
    owner = Ed25519PublicKey.from_public_bytes(bytes.fromhex(page["key.pi4"]))
    owner.verify(bytes.fromhex(confirm["sig"]), b"mycoswarm-pop" + transcript)

    held = sorted(page[f"hash.{name}"] for name in page["view.last.holds"].split(","))
    digest = hashlib.sha256(b"".join(bytes.fromhex(one) for one in held)).hexdigest()
    assert digest == page["view.last.digest"]


def test_what_the_page_shows_is_accepted(page: dict[str, str]) -> None:
    assert read_certificate(bytes.fromhex(page["cert.desk"])).node_id == page["id.desk"]
    assert parse_beacon(json.loads(page["beacon"]), verify=keys.verify).n == 7
    assert peer.parse_word(page["word"].encode()) == word()
    assert parse_recovery(page["recovery.paper"]).hex() == page["seed.recovery"]
    assert enrol.parse_code(page["enrol.code"]).invite == page["enrol.invite"]
    assert server_name(page["id.desk"]) in bytes.fromhex(page["cert.desk"]).decode("latin-1")


if __name__ == "__main__":
    for one, what in (
        dict(examples()) | {f"n.{name}": str(value) for name, value in NUMBERS.items()}
    ).items():
        print(write(one, what))
