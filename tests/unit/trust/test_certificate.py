"""Certificates: the bytes another library would make, and nothing else is taken for one."""

import base64
import datetime as dt
import hashlib

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from mycoswarmd.core.roster import node_id_of
from mycoswarmd.errors import BadRequest
from mycoswarmd.trust import keys
from mycoswarmd.trust.certificate import (
    CERTIFICATE_BYTES,
    make_certificate,
    node_id,
    read_certificate,
    server_name,
)
from tests.unit.trust.handshake import Node, build_certificate


def test_it_is_what_another_library_builds_of_the_same_fields() -> None:
    for _ in range(20):
        seed = keys.make_seed()
        assert make_certificate(seed) == build_certificate(seed)


def test_another_library_reads_the_fields_that_the_protocol_names() -> None:
    node = Node()
    read = x509.load_der_x509_certificate(node.cert)
    info = read.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert node.id == base64.b32encode(hashlib.sha256(info).digest()).decode()[:26].lower()
    assert read.subject == read.issuer
    assert read.subject.rfc4514_string() == f"CN={node.id}"
    names = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [f"{node.id}.mycoswarm.internal"]
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"mycoswarm:node:{node.id}"]
    assert read.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False


def test_reading_tells_whose_it_is() -> None:
    node = Node()
    facts = read_certificate(node.cert)
    assert (facts.node_id, facts.public_key) == (node.id, node.public)
    assert len(node.cert) == CERTIFICATE_BYTES == 485
    assert node_id(node.public) == node_id_of(node.public)
    assert server_name(node.id) == f"{node.id}.mycoswarm.internal"


def test_no_single_changed_byte_is_accepted() -> None:
    der = Node().cert
    for place in range(len(der)):
        changed = bytearray(der)
        changed[place] ^= 0x01
        with pytest.raises(BadRequest) as caught:
            read_certificate(bytes(changed))
        assert caught.value.code == "bad-certificate"


@pytest.mark.parametrize("der", [b"", b"\x30\x00", b"\x30\x82\x01\xe1", bytes(485), bytes(100_000)])
def test_what_is_no_certificate_is_refused(der: bytes) -> None:
    with pytest.raises(BadRequest, match="bad-certificate"):
        read_certificate(der)


def test_bytes_after_the_end_are_refused() -> None:
    with pytest.raises(BadRequest, match="486 bytes"):
        read_certificate(Node().cert + b"\x00")


def test_other_fields_under_a_valid_signature_are_refused() -> None:
    # A second certificate of one key would be a second name for it, and two nodes could disagree on which.
    seed = keys.make_seed()
    for other in (
        build_certificate(seed, serial=2),
        build_certificate(seed, end=dt.datetime(2030, 1, 1, tzinfo=dt.UTC)),
    ):
        x509.load_der_x509_certificate(other)
        with pytest.raises(BadRequest, match="bad-certificate"):
            read_certificate(other)


def test_somebody_elses_signature_is_refused() -> None:
    victim, thief = Node(), Node()
    forged = build_certificate(victim.seed, signed_with=thief.seed)
    assert len(forged) == CERTIFICATE_BYTES
    assert forged[:-64] == victim.cert[:-64]
    with pytest.raises(BadRequest, match="not signed by its own key"):
        read_certificate(forged)


def test_a_key_that_everybody_can_sign_for_gets_no_certificate() -> None:
    neutral = b"\x01" + bytes(31)
    der = Node().cert
    at = der.index(read_certificate(der).public_key)
    weak = der[:at] + neutral + der[at + 32 :]
    with pytest.raises(BadRequest, match="bad-certificate"):
        read_certificate(weak)
