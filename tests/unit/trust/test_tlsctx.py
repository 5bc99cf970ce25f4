"""TLS over real sockets; each refusal is shown beside the same attempt where the defence is removed."""

import asyncio
import contextlib
import datetime as dt
import gc
import ssl
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mycoswarmd.errors import BadRequest
from mycoswarmd.trust.certificate import read_certificate
from mycoswarmd.trust.keys import to_pem
from mycoswarmd.trust.tlsctx import Tls, knock_context
from tests.unit.trust.handshake import Node, build_certificate, connect

NO_CHECK_TIME = 0x200000


def plain_server(
    node: Node, tmp_path: Path, trusted: Sequence[bytes] = (), *, cert: bytes | None = None
) -> ssl.SSLContext:
    """Make the server that the ssl module makes by itself: the defences removed."""
    path = tmp_path / f"{node.id}.pem"
    path.write_bytes(to_pem(node.seed) + ssl.DER_cert_to_PEM_cert(cert or node.cert).encode())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VerifyFlags(NO_CHECK_TIME)
    for der in trusted:
        context.load_verify_locations(cadata=der)
    return context


def test_members_prove_their_keys_to_each_other() -> None:
    server, client = Node(), Node()
    seen = connect(
        server.tls.server_context(lambda: [client.cert]), client.tls.client_context(server.cert), server.name
    )
    assert seen.ok
    assert seen.client_cert == client.cert
    assert seen.server_cert == server.cert
    assert seen.version == "TLSv1.3"
    assert read_certificate(seen.client_cert).node_id == client.id


def test_an_unlisted_client_is_refused() -> None:
    server, stranger = Node(), Node()
    listed = connect(
        server.tls.server_context(lambda: [stranger.cert]),
        stranger.tls.client_context(server.cert),
        server.name,
    )
    assert listed.ok  # so it is the list that refuses it
    seen = connect(
        server.tls.server_context(lambda: [Node().cert, server.cert]),
        stranger.tls.client_context(server.cert),
        server.name,
    )
    assert not seen.ok
    assert seen.client_cert is None
    assert "self-signed certificate" in seen.server_error
    assert seen.client_error  # "unknown ca", unless the connection was gone first


def test_whoever_presents_nothing_is_a_stranger_and_shows() -> None:
    server = Node()
    context = server.tls.server_context(lambda: [Node().cert])
    for name in (server.name, None, "anything.example"):
        seen = connect(context, knock_context(), name)
        assert seen.ok
        assert seen.client_cert is None
        assert seen.server_cert == server.cert  # the newcomer needs it for its proof


def test_a_client_refuses_another_key_under_the_right_name(tmp_path: Path) -> None:
    server, thief, client = Node(), Node(), Node()
    imposter = plain_server(thief, tmp_path)
    assert connect(imposter, knock_context(), server.name).ok  # believed where nothing is checked
    seen = connect(imposter, client.tls.client_context(server.cert), server.name)
    assert not seen.ok
    assert "self-signed certificate" in seen.client_error
    # The victim's name in a certificate of the thief's key is not even one that OpenSSL would present.
    with pytest.raises(ssl.SSLError, match="KEY_VALUES_MISMATCH"):
        plain_server(thief, tmp_path, cert=build_certificate(server.seed, signed_with=thief.seed))


def test_a_client_refuses_another_name() -> None:
    server, client, other = Node(), Node(), Node()
    context = server.tls.server_context(lambda: [client.cert])
    believing = client.tls.client_context(server.cert)
    believing.check_hostname = False
    assert connect(context, believing, other.name).ok
    seen = connect(context, client.tls.client_context(server.cert), other.name)
    assert not seen.ok
    assert "Hostname mismatch" in seen.client_error


def test_older_versions_are_refused(tmp_path: Path) -> None:
    server = Node()
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname = False
    old.verify_mode = ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert connect(plain_server(server, tmp_path), old, None).version == "TLSv1.2"
    seen = connect(server.tls.server_context(tuple), old, None)
    assert not seen.ok
    assert "protocol version" in seen.client_error


def test_a_session_is_never_resumed_and_no_ticket_is_sent(tmp_path: Path) -> None:
    server, client = Node(), Node()
    # The attack: keep the session of a member and come back with it, as after a revocation.
    weak = plain_server(server, tmp_path, [client.cert])
    context = client.tls.client_context(server.cert)
    first = connect(weak, context, server.name)
    assert first.ok and first.tickets
    assert connect(weak, context, server.name, session=first.session).reused

    strict = server.tls.server_context(lambda: [client.cert])
    context = client.tls.client_context(server.cert)
    first = connect(strict, context, server.name)
    assert first.ok
    assert not first.tickets
    again = connect(strict, context, server.name, session=first.session)
    assert again.ok
    assert not again.reused
    assert again.client_cert == client.cert


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (dt.datetime(2090, 1, 1, tzinfo=dt.UTC), dt.datetime(2095, 1, 1, tzinfo=dt.UTC)),
        (dt.datetime(1970, 1, 2, tzinfo=dt.UTC), dt.datetime(1971, 1, 1, tzinfo=dt.UTC)),
    ],
    ids=["not-yet-valid", "expired"],
)
def test_no_clock_is_asked(start: dt.datetime, end: dt.datetime) -> None:
    # What a node at 1970, or one at 2100, makes of today's certificates.
    server, client = Node(), Node()
    server_cert = build_certificate(server.seed, start=start, end=end)
    client_cert = build_certificate(client.seed, start=start, end=end)
    listening = Tls(server.seed, server_cert).server_context(lambda: [client_cert])
    calling = Tls(client.seed, client_cert).client_context(server_cert)
    seen = connect(listening, calling, server.name)
    assert seen.ok, seen
    assert seen.client_cert == client_cert

    with_clock = Tls(client.seed, client_cert).client_context(server_cert)
    with_clock.verify_flags = ssl.VerifyFlags(int(with_clock.verify_flags) & ~NO_CHECK_TIME)
    assert "certificate" in connect(listening, with_clock, server.name).client_error


def test_a_change_of_the_anchors_holds_from_the_next_handshake() -> None:
    server, client, other = Node(), Node(), Node()
    trusted: list[bytes] = []
    tls = server.tls
    listening = tls.server_context(lambda: trusted)
    calling = client.tls.client_context(server.cert)
    assert not connect(listening, calling, server.name).ok
    for change, accepted in (
        ([client.cert], True),  # admitted
        ([client.cert, other.cert], True),  # one more
        ([other.cert], False),  # revoked
        ([client.cert], True),
        ([], False),
    ):
        trusted[:] = change
        tls.refresh()
        assert connect(listening, calling, server.name).ok is accepted


def test_where_the_roster_cannot_be_read_nobody_gets_in(monkeypatch: pytest.MonkeyPatch) -> None:
    server, client = Node(), Node()
    broken = False

    def anchors() -> Sequence[bytes]:
        if broken:
            raise OSError("the disk is gone")
        return [client.cert]

    reported: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: reported.append(str(args.exc_value)))
    tls = server.tls
    listening = tls.server_context(anchors)
    calling = client.tls.client_context(server.cert)
    assert connect(listening, calling, server.name).ok
    broken = True
    tls.refresh()
    seen = connect(listening, calling, server.name)
    assert not seen.ok
    assert "alert handshake failure" in seen.client_error
    assert reported == ["the disk is gone"]
    broken = False  # and it is no lasting damage
    assert connect(listening, calling, server.name).ok


def test_without_the_move_there_is_nothing_to_show() -> None:
    # The base context has neither certificate nor anchors: a forgotten callback lets nobody in.
    server, client = Node(), Node()
    listening = server.tls.server_context(lambda: [client.cert])
    listening.sni_callback = None
    seen = connect(listening, client.tls.client_context(server.cert), server.name)
    assert not seen.ok
    assert seen.server_cert is None


@pytest.mark.parametrize(
    "other_fields",
    [{"serial": 2}, {"start": dt.datetime(2021, 1, 1, tzinfo=dt.UTC)}],
    ids=["serial", "dates"],
)
def test_another_certificate_of_a_listed_key_gets_nobody_in(other_fields: dict[str, Any]) -> None:
    """A revocation is of a key, so a second certificate of it must be no way round (cf. Nebula #1600)."""
    server, client = Node(), Node()
    other = build_certificate(client.seed, **other_fields)
    calling = Tls(client.seed, other).client_context(server.cert)
    alone = server.tls.server_context(lambda: [other])
    assert connect(alone, calling, server.name).client_cert == other  # it can be presented
    seen = connect(server.tls.server_context(lambda: [client.cert]), calling, server.name)
    assert not seen.ok
    assert "certificate verify failed" in seen.server_error
    # One that got through all the same would be nobody's: there is one certificate for each key.
    with pytest.raises(BadRequest):
        read_certificate(other)


def test_the_key_presented_changes_with_the_next_handshake() -> None:
    old, new, client = Node(), Node(), Node()
    tls = old.tls
    listening = tls.server_context(lambda: [client.cert])
    assert connect(listening, client.tls.client_context(old.cert), old.name).ok
    tls.replace(new.seed, new.cert)
    assert connect(listening, client.tls.client_context(new.cert), new.name).ok
    assert not connect(listening, client.tls.client_context(old.cert), old.name).ok


def test_no_key_is_left_in_a_file_or_a_descriptor() -> None:
    server, client = Node(), Node()
    gc.collect()
    before = set(Path("/proc/self/fd").iterdir())
    contexts = [server.tls.client_context(client.cert) for _ in range(5)]
    assert connect(server.tls.server_context(lambda: [client.cert]), knock_context(), None).ok
    gc.collect()
    left = set(Path("/proc/self/fd").iterdir()) - before
    assert not [link for link in left if link.is_symlink() and "memfd" in str(link.readlink())]
    assert len(contexts) == 5


async def test_an_event_loop_sees_the_same() -> None:
    server, client = Node(), Node()
    trusted = [client.cert]
    tls = server.tls
    seen: list[bytes | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("ssl_object")
        seen.append(connection.getpeercert(binary_form=True))
        writer.write(await reader.readexactly(4))
        await writer.drain()
        writer.close()

    listening = await asyncio.start_server(
        serve, "127.0.0.1", 0, ssl=tls.server_context(lambda: trusted), ssl_handshake_timeout=60
    )
    port = listening.sockets[0].getsockname()[1]

    async def call() -> bytes:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=client.tls.client_context(server.cert), server_hostname=server.name
        )
        with contextlib.suppress(OSError):  # what a refusal looks like depends on who is first
            writer.write(b"ping")
            answer = await reader.read(4)
            writer.close()
            await writer.wait_closed()
            return answer
        return b""

    async with listening:
        assert await call() == b"ping"
        trusted.clear()
        tls.refresh()
        assert await call() == b""
    assert seen == [client.cert]


def test_a_handshake_among_fifty_members_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    server, client = Node(), Node()
    anchors = [Node().cert for _ in range(49)] + [client.cert]
    tls = server.tls
    listening = tls.server_context(lambda: anchors)
    calling = client.tls.client_context(server.cert)
    times_ms = []
    for _ in range(60):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        one = calling.wrap_bio(incoming, outgoing, server_hostname=server.name)
        other = listening.wrap_bio(outgoing, incoming, server_side=True)
        start = time.process_time()
        shake_hands(one, other)
        times_ms.append(1000 * (time.process_time() - start))
        assert other.getpeercert(binary_form=True) == client.cert
    start = time.process_time()
    anchors.pop(0)
    tls.refresh()
    tls._current()
    rebuilt_ms = 1000 * (time.process_time() - start)
    p50_ms = statistics.median(times_ms)
    with capsys.disabled():
        print(f"\n50 anchors: p50 of processor {p50_ms:.1f} ms, both ends; a removal + {rebuilt_ms:.1f} ms")
    assert p50_ms < 15


def shake_hands(client: ssl.SSLObject, server: ssl.SSLObject) -> None:
    waiting = [client, server]
    while waiting:
        one = waiting.pop(0)
        try:
            one.do_handshake()
        except ssl.SSLWantReadError:
            waiting.append(one)
