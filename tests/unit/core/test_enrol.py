"""Enrolment, message by message: who knows the code gets in, and whoever else tries gets nothing."""

import base64
import contextlib
import copy
import hashlib
import hmac
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from mycoswarmd.core import enrol
from mycoswarmd.core.enrol import Code, CodeKeys, Joiner
from mycoswarmd.core.words import WORDS, six_words
from mycoswarmd.errors import (
    BadRequest,
    Conflict,
    Denied,
    LocalProtocolError,
    MycoswarmError,
    NotFound,
    Unauthenticated,
    Unavailable,
    Unreachable,
)
from mycoswarmd.trust.certificate import make_certificate, read_certificate
from mycoswarmd.trust.keys import make_seed, sign, verify

GENESIS = "ab" * 32
CODE = enrol.make_code(bytes(range(13)))


def fast_keys(code: Code) -> CodeKeys:
    """Return keys that depend on the code; the stretching itself is tested once."""
    return CodeKeys(*(hashlib.sha256(f"{code.invite}{code.secret}{n}".encode()).digest() for n in range(3)))


@dataclass
class Inviter:
    """The inviting side as a daemon does it, in memory."""

    keys: CodeKeys
    seed: bytes = field(default_factory=make_seed)
    kept: dict[str, Any] = field(default_factory=dict)
    check: Callable[[bytes, bytes, bytes], bool] = verify

    @property
    def cert(self) -> bytes:
        return make_certificate(self.seed)

    def hello(self, message: object) -> dict[str, Any]:
        hello = enrol.parse_hello(over_the_wire(message), read_cert=read_certificate)
        nonce = make_seed()
        session = str(len(self.kept))
        self.kept[session] = (hello, nonce)
        sent = enrol.challenge(self.keys, hello, nonce=nonce, cert_der=self.cert, genesis_sha256=GENESIS)
        return wired({**sent, "session": session})

    def confirm(self, message: Mapping[str, object]) -> dict[str, Any]:
        hello, nonce = self.kept[str(message["session"])]
        transcript = enrol.check_confirm(
            self.keys,
            hello,
            over_the_wire(message),
            nonce=nonce,
            cert_der=self.cert,
            genesis_sha256=GENESIS,
            read_cert=read_certificate,
            verify=self.check,
        )
        return wired(enrol.seal_bundle(self.keys, transcript, {"statements": [{"body": "x"}]}))


def over_the_wire(message: object) -> object:
    return json.loads(json.dumps(message))


def wired(message: Mapping[str, object]) -> dict[str, Any]:
    arrived = over_the_wire(message)
    assert isinstance(arrived, dict)
    return arrived


def newcomer(keys: CodeKeys, seed: bytes, *, invite: str = CODE.invite, name: str = "pi4") -> Joiner:
    return Joiner(keys, invite, nonce=make_seed(), cert_der=make_certificate(seed), role="node", name=name)


def signing(seed: bytes) -> Callable[[bytes], bytes]:
    return lambda message: sign(seed, message)


# --- the code ----------------------------------------------------------------------------------------


def test_a_code_is_read_as_it_was_shown() -> None:
    code = enrol.make_code(bytes.fromhex("3a5448a0f0d5ef9ad3e6f2b80b00"))
    shown = enrol.format_code(code)
    assert len(shown) == 25
    assert [len(group) for group in shown.split("-")] == [5, 5, 5, 5, 1]
    assert enrol.parse_code(shown) == code
    assert (len(code.invite), len(code.secret)) == (4, 16)


@given(st.binary(min_size=13, max_size=32))
@settings(max_examples=200)
def test_every_code_survives_sloppy_typing(random_bytes: bytes) -> None:
    code = enrol.make_code(random_bytes)
    shown = enrol.format_code(code)
    sloppy = " " + shown.lower().replace("-", "  ").replace("0", "o").replace("1", "l") + "\n"
    assert enrol.parse_code(sloppy) == code
    assert enrol.parse_code(shown.replace("1", "I")) == code


def test_all_random_bits_are_used() -> None:
    chars = set()
    for bit in range(100):
        code = enrol.make_code((1 << (bit + 4)).to_bytes(13, "big"))
        chars.add(code.invite + code.secret)
    assert len(chars) == 100
    with pytest.raises(LocalProtocolError):
        enrol.make_code(bytes(12))


def test_each_wrong_character_and_each_swap_shows() -> None:
    chars = enrol.format_code(CODE).replace("-", "")
    for place, right in enumerate(chars):
        for wrong in set(enrol.CROCKFORD) - {right}:
            with pytest.raises(BadRequest) as caught:
                enrol.parse_code(chars[:place] + wrong + chars[place + 1 :])
            assert caught.value.code == "bad-code"
    for one in range(len(chars)):
        for other in range(one):
            swapped = list(chars)
            swapped[one], swapped[other] = swapped[other], swapped[one]
            if swapped != list(chars):
                with pytest.raises(BadRequest):
                    enrol.parse_code("".join(swapped))


@pytest.mark.parametrize("text", ["", "-", "79D96", "U" * 21, "é" * 21, "0" * 20, "0" * 22, "0" * 100_000])
def test_what_is_no_code_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        enrol.parse_code(text)
    assert caught.value.code == "bad-code"
    assert caught.value.message.startswith("cannot ")


def test_a_typo_never_shows_the_code_in_the_error() -> None:
    shown = enrol.format_code(CODE)
    with pytest.raises(BadRequest) as caught:
        enrol.parse_code(shown[:-1] + ("0" if shown[-1] != "0" else "1"))
    assert CODE.secret not in str(caught.value)
    assert CODE.secret not in repr(CODE)
    assert "'" not in repr(fast_keys(CODE))


def test_the_keys_of_a_code_are_stretched_and_separate() -> None:
    keys = enrol.derive(CODE)
    stretched = hashlib.scrypt(
        CODE.secret.encode(),
        salt=b"mycoswarm-invite-v1" + CODE.invite.encode(),
        n=32768,
        r=8,
        p=1,
        maxmem=1 << 26,
        dklen=32,
    )
    for purpose in ("inviter", "joiner", "bundle"):
        info = f"mycoswarm-enrol-v1 {purpose}".encode()
        assert getattr(keys, purpose) == HKDF(SHA256(), 32, None, info).derive(stretched)
    assert len({keys.inviter, keys.joiner, keys.bundle}) == 3


# --- the exchange ------------------------------------------------------------------------------------


def test_who_knows_the_code_joins() -> None:
    keys, seed = fast_keys(CODE), make_seed()
    inviter, joiner = Inviter(keys), newcomer(keys, seed)
    answer = joiner.confirm(inviter.hello(joiner.hello()), inviter.cert, signing(seed))
    welcome = joiner.welcome(inviter.confirm(answer))
    assert welcome.genesis_sha256 == GENESIS
    assert welcome.statements == ({"body": "x"},)


def test_whoever_stands_between_is_noticed_before_anything_is_given_away() -> None:
    keys, seed, middle = fast_keys(CODE), make_seed(), make_certificate(make_seed())
    inviter, joiner = Inviter(keys), newcomer(keys, seed)
    relayed = inviter.hello(joiner.hello())  # every byte passed on as it came
    signed: list[bytes] = []

    def sign_and_tell(message: bytes) -> bytes:
        signed.append(message)
        return sign(seed, message)

    with pytest.raises(Unauthenticated) as caught:
        joiner.confirm(relayed, middle, sign_and_tell)
    assert caught.value.code == "inviter-unproved"
    assert signed == []
    # The control: a newcomer that believed the certificate it was told about would be fooled.
    believing = newcomer(keys, seed)
    answer = believing.confirm(inviter.hello(believing.hello()), inviter.cert, signing(seed))
    assert believing.welcome(inviter.confirm(answer)).genesis_sha256 == GENESIS


def test_a_middle_that_swaps_the_newcomers_certificate_gets_no_further() -> None:
    keys, seed, thief = fast_keys(CODE), make_seed(), make_seed()
    inviter, joiner = Inviter(keys), newcomer(keys, seed)
    hello = joiner.hello() | {"cert": base64.b64encode(make_certificate(thief)).decode()}
    with pytest.raises(Unauthenticated, match="inviter-unproved"):
        joiner.confirm(inviter.hello(hello), inviter.cert, signing(seed))


@pytest.mark.parametrize(
    "change", [{"role": "operator"}, {"name": "pi5"}, {"nonce": "00" * 32}, {"invite": "0000"}]
)
def test_whatever_is_changed_in_the_greeting_shows(change: dict[str, str]) -> None:
    keys, seed = fast_keys(CODE), make_seed()
    inviter, joiner = Inviter(keys), newcomer(keys, seed)
    with pytest.raises(Unauthenticated, match="inviter-unproved"):
        joiner.confirm(inviter.hello(joiner.hello() | change), inviter.cert, signing(seed))


@pytest.mark.parametrize("change", [{"nonce": "00" * 32}, {"genesis": "cd" * 32}, {"mac": "00" * 32}])
def test_whatever_is_changed_in_the_challenge_shows(change: dict[str, str]) -> None:
    keys, seed = fast_keys(CODE), make_seed()
    inviter, joiner = Inviter(keys), newcomer(keys, seed)
    with pytest.raises(Unauthenticated, match="inviter-unproved"):
        joiner.confirm(inviter.hello(joiner.hello()) | change, inviter.cert, signing(seed))


def test_a_wrong_code_fails_on_either_side() -> None:
    right, wrong, seed = fast_keys(CODE), fast_keys(Code(CODE.invite, "0" * 16)), make_seed()
    inviter, joiner = Inviter(right), newcomer(wrong, seed)
    challenge = inviter.hello(joiner.hello())
    with pytest.raises(Unauthenticated, match="inviter-unproved"):
        joiner.confirm(challenge, inviter.cert, signing(seed))
    # A newcomer that skips that check is refused by the inviter.
    careless = newcomer(CodeKeys(right.inviter, wrong.joiner, wrong.bundle), seed)
    answer = careless.confirm(inviter.hello(careless.hello()), inviter.cert, signing(seed))
    with pytest.raises(Unauthenticated) as caught:
        inviter.confirm(answer)
    assert caught.value.code == "joiner-unproved"


def test_the_inviters_own_proof_sent_back_is_none() -> None:
    keys, seed = fast_keys(CODE), make_seed()
    inviter, joiner = Inviter(keys), newcomer(keys, seed)
    challenge = inviter.hello(joiner.hello())
    answer = joiner.confirm(challenge, inviter.cert, signing(seed))
    with pytest.raises(Unauthenticated, match="joiner-unproved"):
        inviter.confirm(answer | {"mac": challenge["mac"]})
    # The control: with one key for both directions it would be the same proof.
    one = CodeKeys(keys.inviter, keys.inviter, keys.bundle)
    weak, joiner = Inviter(one), newcomer(one, seed)
    challenge = weak.hello(joiner.hello())
    answer = joiner.confirm(challenge, weak.cert, signing(seed))
    assert weak.confirm(answer | {"mac": challenge["mac"]})


def test_a_certificate_without_its_key_is_refused() -> None:
    keys, victim, thief = fast_keys(CODE), make_seed(), make_seed()
    inviter, joiner = Inviter(keys), newcomer(keys, victim)
    answer = joiner.confirm(inviter.hello(joiner.hello()), inviter.cert, signing(thief))
    with pytest.raises(Unauthenticated, match="joiner-unproved"):
        inviter.confirm(answer)
    inviter.check = lambda *_: True  # the control
    assert inviter.confirm(answer)


def test_a_recorded_exchange_cannot_be_played_back() -> None:
    keys, seed = fast_keys(CODE), make_seed()
    inviter, joiner = Inviter(keys), newcomer(keys, seed)
    hello = joiner.hello()
    answer = joiner.confirm(inviter.hello(hello), inviter.cert, signing(seed))
    bundle = inviter.confirm(answer)
    again = inviter.hello(hello)  # the same greeting, hence another nonce of the inviter
    with pytest.raises(Unauthenticated, match="joiner-unproved"):
        inviter.confirm(answer | {"session": again["session"]})
    later = newcomer(keys, seed)
    later.confirm(inviter.hello(later.hello()), inviter.cert, signing(seed))
    with pytest.raises(Unauthenticated, match="inviter-unproved"):
        later.welcome(bundle)


def test_a_changed_bundle_shows() -> None:
    keys, seed = fast_keys(CODE), make_seed()
    inviter, joiner = Inviter(keys), newcomer(keys, seed)
    answer = joiner.confirm(inviter.hello(joiner.hello()), inviter.cert, signing(seed))
    bundle = inviter.confirm(answer)
    other = base64.b64encode(b'{"statements":[{"body":"y"}]}').decode()
    with pytest.raises(Unauthenticated, match="changed on its way"):
        joiner.welcome(bundle | {"bundle": other})
    assert joiner.welcome(bundle).genesis_sha256 == GENESIS


@pytest.mark.parametrize(
    "bundle", [b"", b"[]", b"{}", b'{"statements":[]}', b'{"statements":{}}', b"\xff", b"[" * 100_000]
)
def test_a_bundle_of_somebody_with_the_code_is_still_checked(bundle: bytes) -> None:
    keys, seed = fast_keys(CODE), make_seed()
    inviter, joiner = Inviter(keys), newcomer(keys, seed)
    joiner.confirm(inviter.hello(joiner.hello()), inviter.cert, signing(seed))
    transcript = joiner._transcript
    assert transcript is not None
    message = {
        "bundle": base64.b64encode(bundle).decode(),
        "mac": hmac.digest(keys.bundle, transcript + bundle, "sha256").hex(),
    }
    with pytest.raises(BadRequest) as caught:
        joiner.welcome(message)
    assert caught.value.code == "bad-enrolment"


def test_the_parts_cannot_run_into_each_other() -> None:
    hello = enrol.parse_hello(newcomer(fast_keys(CODE), make_seed()).hello(), read_cert=read_certificate)
    one = enrol._transcript(
        replace(hello, role="node", name="a"), nonce=bytes(32), cert_der=b"", genesis=bytes(32)
    )
    other = enrol._transcript(
        replace(hello, role="nodea", name=""), nonce=bytes(32), cert_der=b"", genesis=bytes(32)
    )
    assert one != other


def test_the_steps_have_one_order() -> None:
    keys, seed = fast_keys(CODE), make_seed()
    inviter, joiner = Inviter(keys), newcomer(keys, seed)
    with pytest.raises(LocalProtocolError):
        joiner.welcome({"bundle": "", "mac": "00" * 32})
    challenge = inviter.hello(joiner.hello())
    joiner.confirm(challenge, inviter.cert, signing(seed))
    with pytest.raises(LocalProtocolError):
        joiner.confirm(challenge, inviter.cert, signing(seed))
    with pytest.raises(LocalProtocolError):
        Joiner(keys, CODE.invite, nonce=b"short", cert_der=b"", role="node", name="x")


def test_a_roster_too_big_to_hand_over_is_said() -> None:
    with pytest.raises(Conflict, match="roster-too-big"):
        enrol.seal_bundle(fast_keys(CODE), bytes(32), {"statements": ["x" * enrol.MAX_BUNDLE_BYTES]})


# --- what strangers send -----------------------------------------------------------------------------

GOOD_HELLO = newcomer(fast_keys(CODE), make_seed()).hello()
LONG_CERT = base64.b64encode(bytes(5_000)).decode()


def _loose_base64(text: str) -> str:
    """Return another text that lenient decoders read as the same bytes."""
    assert text.endswith("=")
    at = len(text.rstrip("=")) - 1
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    loose = text[:at] + alphabet[alphabet.index(text[at]) + 1] + text[at + 1 :]
    assert base64.b64decode(loose) == base64.b64decode(text)
    return loose


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"v": 2}, "unknown-version"),
        ({"v": True}, "unknown-version"),
        ({"v": "1"}, "unknown-version"),
        ({"invite": "UUUU"}, "bad-enrolment"),
        ({"invite": "00000"}, "bad-enrolment"),
        ({"invite": ["0000"]}, "bad-enrolment"),
        ({"nonce": "AB" * 32}, "bad-enrolment"),
        ({"nonce": "ab" * 31}, "bad-enrolment"),
        ({"nonce": "ab" * 33}, "bad-enrolment"),
        ({"nonce": "zz" * 32}, "bad-enrolment"),
        ({"nonce": 7}, "bad-enrolment"),
        ({"role": "signer"}, "bad-enrolment"),
        ({"role": None}, "bad-enrolment"),
        ({"name": ""}, "bad-enrolment"),
        ({"name": "a b"}, "bad-enrolment"),
        ({"name": "x" * 65}, "bad-enrolment"),
        ({"name": "a\n"}, "bad-enrolment"),
        ({"name": {"a": 1}}, "bad-enrolment"),
        ({"cert": "!"}, "bad-enrolment"),
        ({"cert": "é"}, "bad-enrolment"),
        ({"cert": LONG_CERT}, "bad-enrolment"),
        ({"cert": None}, "bad-enrolment"),
        ({"cert": "AAAA"}, "bad-certificate"),
        ({"cert": str(GOOD_HELLO["cert"]) + "\n"}, "bad-enrolment"),
        ({"cert": _loose_base64(str(GOOD_HELLO["cert"]))}, "bad-enrolment"),
        ({"extra": 1}, "bad-enrolment"),
    ],
)
def test_a_greeting_has_exactly_its_form(change: dict[str, object], code: str) -> None:
    assert enrol.parse_hello(GOOD_HELLO, read_cert=read_certificate).role == "node"
    with pytest.raises(BadRequest) as caught:
        enrol.parse_hello(GOOD_HELLO | change, read_cert=read_certificate)
    assert caught.value.code == code
    assert caught.value.message.startswith("cannot ")


@pytest.mark.parametrize("name", sorted(GOOD_HELLO))
def test_no_field_of_a_greeting_may_be_missing(name: str) -> None:
    hello = copy.copy(GOOD_HELLO)
    del hello[name]
    with pytest.raises(BadRequest, match="bad-enrolment"):
        enrol.parse_hello(hello, read_cert=read_certificate)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=70),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=6),
    max_leaves=8,
)
FIELDS = ["v", "invite", "nonce", "cert", "role", "name", "session", "genesis", "mac", "sig", "bundle"]
MESSAGES = ANYTHING | st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=7)


@given(MESSAGES)
@settings(max_examples=300, deadline=None)
def test_no_message_breaks_either_side(message: object) -> None:
    keys, seed = fast_keys(CODE), b"\x07" * 32
    with contextlib.suppress(BadRequest, Unauthenticated):
        enrol.parse_hello(message, read_cert=read_certificate)
    with contextlib.suppress(BadRequest, Unauthenticated):
        newcomer(keys, seed).confirm(message, b"", signing(seed))
    joiner = newcomer(keys, seed)
    joiner._transcript = bytes(32)
    with contextlib.suppress(BadRequest, Unauthenticated):
        joiner.welcome(message)
    with contextlib.suppress(BadRequest, Unauthenticated):
        enrol.check_confirm(
            keys,
            joiner._hello,
            message,
            nonce=bytes(32),
            cert_der=b"",
            genesis_sha256=GENESIS,
            read_cert=read_certificate,
            verify=verify,
        )


def test_a_malformed_confirm_is_no_failed_proof() -> None:
    # Failed proofs burn the invitation, so noise must not count as one.
    keys, seed = fast_keys(CODE), make_seed()
    inviter, joiner = Inviter(keys), newcomer(keys, seed)
    answer = joiner.confirm(inviter.hello(joiner.hello()), inviter.cert, signing(seed))
    for change in ({"mac": "00"}, {"sig": "00" * 63}, {"sig": None}, {"more": 1}):
        with pytest.raises(BadRequest, match="bad-enrolment"):
            inviter.confirm({**answer, **change})


# --- the words ---------------------------------------------------------------------------------------


def test_the_words_are_256_and_cannot_be_mixed_up() -> None:
    assert len(set(WORDS)) == 256
    assert list(WORDS) == sorted(WORDS)
    assert all(word.isascii() and word.islower() and 3 <= len(word) <= 8 for word in WORDS)


def test_an_id_has_its_words() -> None:
    node_id = "a" * 26
    digest = hashlib.sha256(node_id.encode()).digest()
    assert six_words(node_id).split() == [WORDS[byte] for byte in digest[:6]]
    assert six_words(node_id) != six_words("b" * 26)


# --- what is told when every address has failed ---------------------------------------------

HOLDER = ("10.0.0.7:7437", Conflict("invite-used", "cannot join: used"))
UNPROVED = ("10.0.0.7:7437", Unauthenticated("inviter-unproved", "cannot trust it"))
DECLINED = ("10.0.0.7:7437", Denied("invite-declined", "cannot join: no"))
STRANGE = ("10.0.0.6:7437", LocalProtocolError("bad-answer", "cannot read it"))
CLOSED = ("10.0.0.8:7437", NotFound("no-such-route", "cannot find this path"))
ANOTHER = ("10.0.0.9:7437", NotFound("invite-unknown", "cannot join: no such invitation"))
SILENT = ("10.0.0.5:7437", Unavailable("peer-unreachable", "cannot reach it"))
SILENT_TOO = ("10.0.0.4:7437", Unreachable("node-unreachable", "cannot reach it"))


@pytest.mark.parametrize("told", [HOLDER, UNPROVED, DECLINED])
def test_the_word_of_who_holds_the_invitation_goes_before_any_other(
    told: tuple[str, MycoswarmError],
) -> None:
    others = [CLOSED, ANOTHER, SILENT, STRANGE]
    for at in range(len(others) + 1):
        assert enrol.most_telling([*others[:at], told, *others[at:]]) is told[1]


def test_where_nobody_holds_the_code_it_is_not_said_to_be_used_up() -> None:
    for tried in ([SILENT, CLOSED, ANOTHER], [ANOTHER, CLOSED, SILENT]):
        told = enrol.most_telling(tried)
        assert isinstance(told, NotFound) and told.code == "nobody-invited"
        assert "10.0.0.8:7437" in told.message and "10.0.0.9:7437" in told.message
        assert "no answer came from 10.0.0.5:7437" in told.message
        assert told.hint.startswith("is the machine that made the code on")
    alone = enrol.most_telling([CLOSED])
    assert alone.message == "cannot join: no invitation with this code is open at 10.0.0.8:7437"


def test_where_nobody_answers_that_is_said_and_where() -> None:
    told = enrol.most_telling([SILENT, SILENT_TOO])
    assert told is SILENT[1]
    assert "is the machine that made the code on" in told.hint and "10.0.0.4:7437" in told.hint
