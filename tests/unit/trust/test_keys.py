"""Keys: what verifies, what never does, and that no bytes make verification raise."""

import pytest
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given, settings
from hypothesis import strategies as st

from mycoswarmd.errors import LocalProtocolError
from mycoswarmd.trust import keys

# RFC 8032, section 7.1, TEST 2.
RFC_SEED = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
RFC_PUBLIC = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
RFC_SIGNATURE = bytes.fromhex(
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)
GROUP_ORDER = 2**252 + 27742317777372353535851937790883648493


def test_signatures_are_those_of_the_standard() -> None:
    assert keys.public_key(RFC_SEED) == RFC_PUBLIC
    assert keys.sign(RFC_SEED, b"\x72") == RFC_SIGNATURE
    assert keys.verify(RFC_PUBLIC, RFC_SIGNATURE, b"\x72")


def test_new_keys_differ() -> None:
    assert keys.make_seed() != keys.make_seed()


@given(place=st.integers(0, 63), bit=st.integers(0, 7))
@settings(max_examples=50, deadline=None)
def test_a_changed_signature_fits_nothing(place: int, bit: int) -> None:
    changed = bytearray(RFC_SIGNATURE)
    changed[place] ^= 1 << bit
    assert not keys.verify(RFC_PUBLIC, bytes(changed), b"\x72")


def test_a_second_signature_cannot_be_computed_from_the_first() -> None:
    # Ed25519 without the check of S would take S + L as well: another hash for the same statement.
    s = int.from_bytes(RFC_SIGNATURE[32:], "little")
    again = RFC_SIGNATURE[:32] + (s + GROUP_ORDER).to_bytes(32, "little")
    assert not keys.verify(RFC_PUBLIC, again, b"\x72")


@given(public=st.binary(max_size=70), signature=st.binary(max_size=70), message=st.binary(max_size=10))
@settings(max_examples=200, deadline=None)
def test_no_bytes_make_it_raise(public: bytes, signature: bytes, message: bytes) -> None:
    assert keys.verify(public, signature, message) is False
    assert keys.verify(public[:32].ljust(32, b"\0"), signature[:64].ljust(64, b"\0"), message) is False


@pytest.mark.parametrize("sign_bit", [0, 0x80])
def test_a_key_that_everybody_can_sign_for_is_refused(sign_bit: int) -> None:
    # The neutral point as the key: R = the neutral point and S = 0 fit every message in plain RFC 8032.
    neutral = bytearray(b"\x01" + bytes(31))
    neutral[31] |= sign_bit
    forged = b"\x01" + bytes(63)
    assert not keys.is_usable(bytes(neutral))
    assert not keys.verify(bytes(neutral), forged, b"anything")


def test_that_forgery_works_without_the_check() -> None:
    # The attack against the library alone, so that the test above is known to refuse something real.
    weak = ed25519.Ed25519PublicKey.from_public_bytes(b"\x01" + bytes(31))
    weak.verify(b"\x01" + bytes(63), b"anything")  # raises if it does not fit


def test_keys_survive_their_file_form() -> None:
    assert keys.from_pem(keys.to_pem(RFC_SEED)) == RFC_SEED


@pytest.mark.parametrize("text", [b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_file_without_a_key_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the library's text
        keys.from_pem(text)


def test_another_kind_of_key_is_a_value_error() -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    pem = other.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    with pytest.raises(ValueError, match="not an Ed25519 key"):
        keys.from_pem(pem)
    own = ed25519.Ed25519PrivateKey.from_private_bytes(RFC_SEED)
    locked = own.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"pass"))
    with pytest.raises(ValueError, match="cannot be read"):
        keys.from_pem(locked)


def test_a_seed_of_another_size_is_a_bug_of_ours() -> None:
    with pytest.raises(LocalProtocolError, match="32 bytes"):
        keys.sign(b"short", b"")
