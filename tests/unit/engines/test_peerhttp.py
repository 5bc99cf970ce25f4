"""HTTP to members and strangers against real TLS servers that behave, or misbehave, as told."""

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from mycoswarmd.engines import peeranswer, peerhttp, peerline
from mycoswarmd.engines.peeranswer import parse_refusal
from mycoswarmd.engines.peerhttp import MemberClient, PeerHttp
from mycoswarmd.errors import (
    BadRequest,
    Conflict,
    Denied,
    EngineError,
    MycoswarmError,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from mycoswarmd.flow.swarmports import PeerAddress
from mycoswarmd.trust.tlsctx import Tls, knock_context
from mycoswarmd.wire.peer import Word, encode_word
from tests.fakes import FakeServer, Script, Turn, serving
from tests.integration.neighbours import address_of, dead_port, hood
from tests.rosters import Key

AROUND = hood("anna", "bert", "mallory")
ANNA, BERT, MALLORY = (AROUND.keys[name] for name in ("anna", "bert", "mallory"))


class Book:
    """Where bert is said to be."""

    def __init__(self, *addresses: PeerAddress) -> None:
        self.known: list[PeerAddress] = list(addresses)

    def addresses(self, node_id: str) -> Sequence[PeerAddress]:
        assert node_id == BERT.id
        return self.known


def server_tls(key: Key, *trusted: Key) -> ssl.SSLContext:
    return Tls(key.seed, key.cert_der).server_context(lambda: [one.cert_der for one in trusted])


@asynccontextmanager
async def bert(
    script: Script, *, key: Key = BERT, trusted: Sequence[Key] = (ANNA,)
) -> AsyncIterator[FakeServer]:
    paths = ("/swarm/word", "/swarm/watch", "/swarm/sync", "/swarm/pull")
    async with serving(dict.fromkeys(paths, script), tls=server_tls(key, *trusted)) as fake:
        yield fake


def made_by(key: Key) -> PeerHttp:
    return PeerHttp(client_context=Tls(key.seed, key.cert_der).client_context, knock_context=knock_context)


@asynccontextmanager
async def client(*addresses: PeerAddress, key: Key = ANNA) -> AsyncIterator[MemberClient]:
    async with made_by(key).member(AROUND["bert"], Book(*addresses)) as one:
        yield one


async def fails(*addresses: PeerAddress, key: Key = ANNA, body: Any = None) -> MycoswarmError:
    """Ask something that cannot be answered and return why."""
    async with client(*addresses, key=key) as one:
        with pytest.raises(MycoswarmError) as caught:
            await one.ask("POST" if body else "GET", "/swarm/sync" if body else "/swarm/word", body)
    assert caught.value.message.startswith("cannot ")
    return caught.value


def word(node: Key = BERT, **more: Any) -> Word:
    return Word(
        id=node.id, version="1", boot=1, instance="0" * 16, port=1, digest="0" * 64, statements=1, **more
    )


async def echo(turn: Turn) -> None:
    await turn.answer(
        {"path": turn.path, "host": turn.headers["host"], "got": json.loads(turn.body or b"null")}
    )


# --- asking --------------------------------------------------------------------------------------


async def test_a_member_is_asked_by_its_own_name() -> None:
    async with bert(echo) as fake, client(address_of(fake)) as one:
        assert one.remote_address() is None
        for number in range(3):
            answer = await one.ask("POST", "/swarm/sync", {"n": number})
            assert answer["got"] == {"n": number}
            assert str(answer["host"]).startswith(f"{BERT.id}.mycoswarm.internal:")
        assert one.remote_address() == address_of(fake)
        assert fake.connections == 1
        (turn, *_) = fake.turns
        assert {"cookie", "origin", "authorization"}.isdisjoint(turn.headers)


async def test_another_key_gets_nothing() -> None:
    async with bert(echo, key=MALLORY) as fake:
        error = await fails(address_of(fake), body={"secret": 1})
        assert (type(error), error.code) == (Unauthenticated, "peer-unproved")
        assert fake.turns == []


@pytest.mark.parametrize("size", [10, 4 << 20])
async def test_a_member_that_does_not_want_us_is_no_dead_one(size: int) -> None:
    """In TLS 1.3 our side of the handshake succeeds; the refusal comes when something is asked."""
    async with bert(echo, trusted=[MALLORY]) as fake:
        error = await fails(address_of(fake), body={"have": "x" * size})
        assert (type(error), error.code) == (Unauthenticated, "peer-refuses-us")
        # Asked without our certificate, and without what we had to say, it answers: so it lives.
        assert [(turn.path, turn.body) for turn in fake.turns] == [("/swarm/word", b"")]
        async with client(address_of(fake), key=MALLORY) as one:  # the positive control: it wants mallory
            assert await one.ask("GET", "/swarm/word")


async def test_nobody_there_is_said_so() -> None:
    assert (await fails()).code == "peer-unreachable"
    async with dead_port() as nobody:
        error = await fails(nobody)
        assert (type(error), error.code) == (Unavailable, "peer-unreachable")
        assert str(nobody) in error.message


async def test_what_speaks_no_tls_or_no_http_is_said_so() -> None:
    async with serving({}) as plain:
        assert (await fails(address_of(plain))).code == "peer-unreachable"

    async def rubbish(turn: Turn) -> None:
        await turn.write(b"rubbish\r\n\r\n")
        turn.cut()

    async with bert(rubbish) as fake:
        assert (await fails(address_of(fake))).code == "peer-failed"


async def test_a_connection_that_is_cut_before_an_answer_is_no_answer() -> None:
    async def vanish(turn: Turn) -> None:
        turn.cut()

    async with bert(vanish) as fake:
        assert (await fails(address_of(fake), body={"n": 1})).code == "peer-unreachable"
        # A fresh connection: it may have been read, so it is not sent again.
        assert [turn.body for turn in fake.turns if turn.path == "/swarm/sync"] == [b'{"n":1}']


async def test_a_kept_connection_that_was_closed_is_made_anew() -> None:
    async def once(turn: Turn) -> None:
        if len(turn.server.turns) == 2:
            turn.cut()  # just as the second request comes
        else:
            await echo(turn)

    async with bert(once) as fake, client(address_of(fake)) as one:
        await one.ask("GET", "/swarm/word")
        assert (await one.ask("POST", "/swarm/sync", {"n": 2}))["got"] == {"n": 2}
        assert (fake.connections, len(fake.turns)) == (2, 3)


async def test_the_answer_of_the_other_side_becomes_our_error() -> None:
    async def refuse(turn: Turn) -> None:
        status = turn.json["status"]
        error = {"message": "cannot: because", "code": "some-code", "rule": "r1"}
        await turn.answer({"error": error}, status=status)

    kinds: dict[int, type[MycoswarmError]] = {
        400: BadRequest,
        401: Unauthenticated,
        403: Denied,
        404: NotFound,
        409: Conflict,
        413: BadRequest,
        429: Unavailable,
        500: EngineError,
        503: Unavailable,
        302: EngineError,
    }
    async with bert(refuse) as fake, client(address_of(fake)) as one:
        for status, kind in kinds.items():
            with pytest.raises(kind) as caught:
                await one.ask("POST", "/swarm/sync", {"status": status})
            assert type(caught.value) is kind
            if kind not in {Unauthenticated, EngineError}:
                assert caught.value.code == "some-code"
                assert caught.value.message == "cannot: because"
        assert fake.connections == 1


def test_what_is_said_in_a_refusal_is_harmless() -> None:
    error = {"message": "\x1b[2J" + "x" * 9999, "code": "NOT A CODE", "rule": "a\nb"}
    headers = {"X-Mycoswarm-Receipt": "1-zzzz\r\nX: y"}
    found = parse_refusal(403, json.dumps({"error": error}).encode(), headers, name="node 'bert'")
    assert isinstance(found, Denied)
    assert (found.code, found.rule, found.receipt) == ("peer-denied", "", "")
    assert found.message.isprintable() and len(found.message) <= 300
    for body in (b"", b"[]", b"\xff", b'{"error": 5}', b'{"error": {"code": [], "message": {}}}'):
        assert parse_refusal(404, body, {}, name="node 'bert'").code == "not-found"


async def test_an_answer_is_bounded_in_size_and_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peeranswer, "MAX_ANSWER_BYTES", 1 << 20)
    sent = 0

    async def endless(turn: Turn) -> None:
        nonlocal sent
        await turn.begin("application/json")
        try:
            while True:
                await turn.piece(b" " * 65536)
                sent += 65536
        except ConnectionError:
            turn.server.left.set()

    async with bert(endless) as fake:
        assert (await fails(address_of(fake))).code == "peer-failed"
        await fake.left.wait()
        assert sent < 64 << 20

    async def deep(turn: Turn) -> None:
        await turn.answer(b"[" * 1_000_000)

    async with bert(deep) as fake:
        assert (await fails(address_of(fake))).code == "peer-failed"

    async def no_object(turn: Turn) -> None:
        await turn.answer(b"[1, 2]")

    async with bert(no_object) as fake:
        assert (await fails(address_of(fake))).code == "peer-failed"


@pytest.mark.parametrize("count", [1_000, 600_000])
async def test_an_answer_may_be_long_but_not_intricate(count: int) -> None:
    """Half a million empty lists are 2 MB to receive and a hundred to keep."""

    async def intricate(turn: Turn) -> None:
        await turn.answer(b'{"a":[' + b"[]," * count + b"0]}")

    async with bert(intricate) as fake, client(address_of(fake)) as one:
        if count == 1_000:
            assert len(cast("list[object]", (await one.ask("GET", "/swarm/word"))["a"])) == count + 1
            return
        with pytest.raises(EngineError, match="too large"):
            await one.ask("GET", "/swarm/word")


async def test_an_answer_is_bounded_in_time() -> None:
    async def silent(turn: Turn) -> None:
        await turn.server.left.wait()

    async def half(turn: Turn) -> None:
        await turn.begin("application/json")
        await turn.piece(b'{"a":')
        await turn.server.left.wait()

    for script in (silent, half):
        scripts: dict[str, Script] = {"/swarm/sync": echo, "/swarm/word": script}
        async with serving(scripts, tls=server_tls(BERT, ANNA)) as fake, client(address_of(fake)) as one:
            await one.ask("POST", "/swarm/sync", {})  # so that making a connection takes none of the time
            with pytest.raises(Unavailable) as caught:
                await one.ask("GET", "/swarm/word", within_s=0.3)
            assert caught.value.code == "peer-unreachable"
            await fake.left.wait()


# --- addresses -----------------------------------------------------------------------------------


@asynccontextmanager
async def black_hole() -> AsyncIterator[PeerAddress]:
    """Hold an address where connections are neither accepted nor refused."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(0)
        address = sock.getsockname()
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(address)
            fillers.append(filler)
        try:
            yield PeerAddress("127.0.0.1", address[1])
        finally:
            for filler in fillers:
                filler.close()


async def test_the_living_address_is_found_among_dead_ones() -> None:
    async with (
        bert(echo) as fake,
        bert(echo, key=MALLORY) as impostor,
        dead_port() as dead,
        black_hole() as hole,
        client(hole, dead, address_of(impostor), hole, address_of(fake)) as one,
    ):
        begun_s = asyncio.get_running_loop().time()
        await one.ask("GET", "/swarm/word")
        assert asyncio.get_running_loop().time() - begun_s < peerline.CONNECT_S
        assert one.remote_address() == address_of(fake)
        assert impostor.turns == []
        # from now on it is the first
        await one.ask("POST", "/swarm/sync", {"n": 1})
        assert fake.connections == 1


async def test_a_member_that_moved_is_followed() -> None:
    book = Book()
    async with made_by(ANNA).member(AROUND["bert"], book) as one:
        async with bert(echo) as old:
            book.known = [address_of(old)]
            await one.ask("GET", "/swarm/word")
        async with bert(echo) as new:
            book.known = [address_of(old), address_of(new)]
            # Nothing was sent to the old address: the next one is tried at once, whatever is asked.
            await one.ask("POST", "/swarm/sync", {"n": 1})
            assert one.remote_address() == address_of(new)


async def test_the_gravest_failure_is_told() -> None:
    async with bert(echo, key=MALLORY) as impostor, dead_port() as dead, bert(echo, trusted=[]) as proud:
        assert (await fails(address_of(impostor), dead)).code == "peer-unproved"
        assert (await fails(dead, address_of(impostor))).code == "peer-unproved"
        assert (await fails(dead, address_of(proud), address_of(impostor))).code == "peer-refuses-us"


async def test_only_so_many_addresses_are_tried() -> None:
    async with bert(echo) as fake:
        dead = [PeerAddress("127.0.0.1", port) for port in range(1, 17)]
        assert (await fails(*dead, address_of(fake))).code == "peer-unreachable"
        assert fake.turns == []


async def test_ipv6_and_its_scopes_work() -> None:
    found = link_local()
    if found is None:
        pytest.skip("this machine has no link-local IPv6 address")
    context = server_tls(BERT, ANNA)
    seen: list[Any] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        seen.append(writer.get_extra_info("peername"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, found, 0, ssl=context)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with client(PeerAddress(found, port)) as one:
            assert await one.ask("GET", "/swarm/word") == {}
    assert seen[0][3] != 0  # the scope


def link_local() -> str | None:
    """Return a link-local address of this machine with its scope, as in /proc/net/if_inet6."""
    try:
        rows = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return None
    for row in rows:
        digits, _index, _prefix, scope, _flags, name = row.split()
        if scope == "20":
            return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)) + f"%{name}"
    return None


# --- watching ------------------------------------------------------------------------------------


def watching(*pieces: bytes) -> Script:
    """Make a script that says these pieces and then waits until it is left."""

    async def script(turn: Turn) -> None:
        await turn.begin("application/x-ndjson")
        for piece in pieces:
            await turn.piece(piece)
        await turn.server.left.wait()

    return script


async def test_words_and_heartbeats_come_as_they_are_said() -> None:
    lines = encode_word(word(running=1)) + b"\n"
    script = watching(lines[:40], lines[40:])
    async with bert(script) as fake, client(address_of(fake)) as one:
        async with aclosing(one.watch()) as words:
            first = await anext(words)
            assert first is not None and first.running == 1
        await fake.left.wait()

    heard: list[int | None] = []

    async def one_by_one(turn: Turn) -> None:
        await turn.begin("application/x-ndjson")
        for count, piece in enumerate((b"\n", encode_word(word(running=2)) + b"\n", b"\n"), 1):
            await turn.piece(piece)
            while len(heard) < count:
                await asyncio.sleep(0.01)
        await turn.end()

    async with bert(one_by_one) as fake, client(address_of(fake)) as one:
        async with aclosing(one.watch()) as words:
            async for said in words:
                heard.append(None if said is None else said.running)  # noqa: PERF401 - it is looked at meanwhile
        assert heard == [None, 2, None]


async def test_of_many_words_at_once_the_last_counts() -> None:
    flood = b"".join(encode_word(word(running=number)) + b"\n" for number in range(50))
    heard = []
    async with (
        bert(watching(flood)) as fake,
        client(address_of(fake)) as one,
        aclosing(one.watch()) as words,
    ):
        async for said in words:
            assert said is not None
            heard.append(said.running)
            if said.running == 49:
                break
    assert heard[-1] == 49
    assert len(heard) < 10


@pytest.mark.parametrize(
    "piece",
    [
        b"garbage\n",
        b"{}\n",
        encode_word(word(MALLORY)) + b"\n",
        b"x" * (300 << 10),
    ],
    ids=["garbage", "empty", "of another", "endless"],
)
async def test_a_bad_word_ends_the_watch(piece: bytes) -> None:
    async with bert(watching(piece)) as fake, client(address_of(fake)) as one:
        async with aclosing(one.watch()) as words:
            with pytest.raises(EngineError) as caught:
                await anext(words)
        assert caught.value.code == "peer-failed"
        await fake.left.wait()


async def test_silence_ends_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    script = watching(encode_word(word()) + b"\n")
    async with bert(script) as fake, client(address_of(fake)) as one, aclosing(one.watch()) as words:
        assert await anext(words) is not None
        monkeypatch.setattr(peerhttp, "SILENT_S", 0.3)
        with pytest.raises(Unavailable) as caught:
            await anext(words)
        assert caught.value.code == "peer-unreachable"
        assert "silent" in caught.value.message


async def test_a_refused_watch_says_why() -> None:
    async def refuse(turn: Turn) -> None:
        await turn.answer({"error": {"code": "role-needed", "message": "cannot: no"}}, status=403)

    async with bert(refuse) as fake, client(address_of(fake)) as one, aclosing(one.watch()) as words:
        with pytest.raises(Denied) as caught:
            await anext(words)
        assert caught.value.code == "role-needed"


async def test_cut_ends_everything_at_once() -> None:
    # A machine that stops for a while does not each time.
    assert min([await _cut_s() for _ in range(3)]) < 1


async def _cut_s() -> float:
    """Cut a client off in the middle of everything, and return how long it took to end."""

    async def silent(turn: Turn) -> None:
        await turn.server.left.wait()

    script = watching(encode_word(word()) + b"\n")
    async with (
        serving({"/swarm/watch": script, "/swarm/sync": silent}, tls=server_tls(BERT, ANNA)) as fake,
        client(address_of(fake)) as one,
        aclosing(one.watch()) as words,
    ):
        await anext(words)

        async def ask() -> str:
            with pytest.raises(MycoswarmError) as caught:
                await one.ask("POST", "/swarm/sync", {}, within_s=30)
            return caught.value.code

        async with asyncio.TaskGroup() as group:
            asking = group.create_task(ask())
            while len(fake.turns) < 2:
                await asyncio.sleep(0.01)
            begun_s = asyncio.get_running_loop().time()
            one.cut()
            assert await asking == "peer-unreachable"
            assert [said async for said in words] == []
            took_s = asyncio.get_running_loop().time() - begun_s
        assert fake.connections == 2
    return took_s


# --- strangers -----------------------------------------------------------------------------------


async def test_a_stranger_is_asked_on_one_connection_and_shows_its_certificate() -> None:
    async with bert(echo, trusted=[]) as fake, made_by(ANNA).stranger(address_of(fake)) as one:
        assert one.server_cert_der == b""
        assert (await one.post("/swarm/pull", {"n": 1}))["got"] == {"n": 1}
        assert one.server_cert_der == BERT.cert_der
        await one.post("/swarm/pull", {"n": 2})
        assert fake.connections == 1


async def test_nothing_goes_to_a_stranger_over_a_second_connection() -> None:
    async def once(turn: Turn) -> None:
        await echo(turn)
        turn.writer.transport.close()

    async with bert(once) as fake, made_by(ANNA).stranger(address_of(fake)) as one:
        await one.post("/swarm/pull", {"n": 1})
        for _ in range(2):
            with pytest.raises(Unavailable) as caught:
                await one.post("/swarm/pull", {"n": 2})
            assert caught.value.code == "peer-unreachable"
        assert [turn.json for turn in fake.turns] == [{"n": 1}]


async def test_a_stranger_is_shown_no_certificate_of_ours() -> None:
    shown: list[bytes | None] = []

    async def look(turn: Turn) -> None:
        shown.append(turn.writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
        await turn.answer({})

    async with bert(look, trusted=[ANNA]) as fake:
        async with made_by(ANNA).stranger(address_of(fake)) as one:
            await one.post("/swarm/pull", {})
        async with client(address_of(fake)) as member:  # the positive control
            await member.ask("GET", "/swarm/word")
    assert shown == [None, ANNA.cert_der]


async def test_a_silent_or_absent_stranger_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peerhttp, "_STRANGER_S", 0.3)

    async def silent(turn: Turn) -> None:
        await turn.server.left.wait()

    async with bert(silent) as fake, made_by(ANNA).stranger(address_of(fake)) as one:
        with pytest.raises(Unavailable, match=r"within 0\.3 s"):
            await one.post("/swarm/pull", {})
    async with dead_port() as nobody, made_by(ANNA).stranger(nobody) as one:
        with pytest.raises(Unavailable):
            await one.post("/swarm/pull", {})
