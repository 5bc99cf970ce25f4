"""aiohttp's client on sockets that somebody else made: engines and members, over TLS and without."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from mycoswarmd.engines.dialled import DialledConnector, dial_directly
from mycoswarmd.engines.ollama import OllamaEngine
from mycoswarmd.engines.openai_http import OpenAIEngine
from mycoswarmd.engines.peerhttp import PeerHttp
from mycoswarmd.engines.upstream import Patience
from mycoswarmd.errors import Unauthenticated, Unavailable
from mycoswarmd.flow.swarmports import PeerAddress
from mycoswarmd.trust.tlsctx import Tls, knock_context
from mycoswarmd.wire.prompt import TextDelta
from tests.fakes import FakeServer, Turn, serving
from tests.integration.neighbours import address_of
from tests.permits import permit_for
from tests.unit.engines.running import PATIENT, chat, deltas_of, running, until
from tests.unit.engines.test_peerhttp import ANNA, AROUND, BERT, MALLORY, Book, bert, echo, server_tls


class Scribe:
    """A dialer that writes down where it was asked to go, and goes there or fails."""

    def __init__(self, failure: OSError | None = None) -> None:
        self.asked: list[tuple[str, int]] = []
        self.made: list[socket.socket] = []
        self.within_s: set[float] = set()
        self.failure = failure
        self.is_stuck = False

    async def __call__(self, host: str, port: int, within_s: float) -> socket.socket:
        self.asked.append((host, port))
        self.within_s.add(within_s)
        if self.is_stuck:
            await asyncio.sleep(60)
        if self.failure is not None:
            raise self.failure
        self.made.append(await dial_directly(host, port, within_s))
        return self.made[-1]


async def models(turn: Turn) -> None:
    await turn.answer({"object": "list", "data": [{"id": "small", "object": "model"}]})


async def words(turn: Turn) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}
    await turn.answer({"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})


@asynccontextmanager
async def engine_server() -> AsyncIterator[FakeServer]:
    async with serving({"/v1/models": models, "/v1/chat/completions": words}) as fake:
        yield fake


# --- engines -------------------------------------------------------------------------------------


async def test_an_engine_is_asked_over_dialled_connections() -> None:
    dial = Scribe()
    async with (
        engine_server() as fake,
        running(OpenAIEngine("e", fake.address, patience=PATIENT, dial=dial)) as one,
    ):
        answer = await one.complete(permit_for("small"), chat())
        assert answer.text == "Hello"
        assert TextDelta("Hello") in await deltas_of(one, chat())
        port = int(fake.address.rsplit(":", 1)[1])
        assert set(dial.asked) == {("127.0.0.1", port)}
        assert len(dial.asked) == fake.connections  # there are no others
        assert len(dial.asked) < len(fake.turns)  # and they are used again
        assert dial.within_s == {PATIENT.connect_s}


async def test_connections_end_with_the_engine() -> None:
    dial = Scribe()
    async with engine_server() as fake:
        async with running(OpenAIEngine("e", fake.address, patience=PATIENT, dial=dial)) as one:
            await one.complete(permit_for("small"), chat())
            assert [sock.fileno() >= 0 for sock in dial.made] == [True] * len(dial.made)
        await until(lambda: {sock.fileno() for sock in dial.made} == {-1})


@pytest.mark.parametrize("is_ollama", [False, True])
async def test_an_engine_that_may_not_be_dialled_says_why(*, is_ollama: bool) -> None:
    url = "http://127.0.0.1:11434"
    for failure, why in (
        (PermissionError(13, "no"), "ports that the settings declare"),
        (ConnectionRefusedError(111, "no"), "nothing answers"),
        (TimeoutError("no"), "nothing answers"),
        (OSError(100, "no dialer"), "nothing answers"),
    ):
        dial = Scribe(failure)
        engine = OllamaEngine("e", url, dict, dial=dial) if is_ollama else OpenAIEngine("e", url, dial=dial)
        async with running(engine) as one:
            assert one.health().state == "down"
            assert why in one.health().detail


async def test_a_dialer_that_hangs_costs_the_time_of_a_connection() -> None:
    dial = Scribe()
    dial.is_stuck = True
    patience = Patience(connect_s=0.2)
    async with running(OpenAIEngine("e", "http://127.0.0.1:11434", patience=patience, dial=dial)) as one:
        assert one.health().state == "down"
        assert "nothing answers" in one.health().detail


async def test_a_unix_socket_needs_no_dialer(tmp_path: Path) -> None:
    dial = Scribe(OSError(1, "never"))
    path = tmp_path / "e.sock"
    async with (
        serving({"/v1/models": models, "/v1/chat/completions": words}, socket=path),
        running(OpenAIEngine("e", f"unix:{path}", patience=PATIENT, dial=dial)) as one,
    ):
        assert (await one.complete(permit_for("small"), chat())).text == "Hello"
    assert dial.asked == []


# --- members -------------------------------------------------------------------------------------


def http(dial: Scribe) -> PeerHttp:
    return PeerHttp(
        client_context=Tls(ANNA.seed, ANNA.cert_der).client_context, knock_context=knock_context, dial=dial
    )


async def test_a_member_proves_its_key_over_a_dialled_connection() -> None:
    dial = Scribe()
    async with bert(echo) as fake, http(dial).member(AROUND["bert"], Book(address_of(fake))) as one:
        for number in range(3):
            assert (await one.ask("POST", "/swarm/sync", {"n": number}))["got"] == {"n": number}
        assert [PeerAddress(*asked) for asked in dial.asked] == [address_of(fake)]
        assert fake.connections == 1
        # What keeps dead machines from being waited for is set on them, too.
        assert dial.made[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 4000
        one.cut()
        await asyncio.sleep(0)
        assert dial.made[0].fileno() == -1
        assert await one.ask("GET", "/swarm/word")
        assert len(dial.asked) == 2


async def test_another_key_gets_nothing_over_a_dialled_connection() -> None:
    dial = Scribe()
    async with (
        bert(echo, key=MALLORY) as fake,
        http(dial).member(AROUND["bert"], Book(address_of(fake))) as one,
    ):
        with pytest.raises(Unauthenticated, match="does not have its key"):
            await one.ask("POST", "/swarm/sync", {"secret": 1})
        assert fake.turns == []
        assert dial.made[0].fileno() == -1


async def test_a_refusal_of_our_certificate_is_found_out_over_dialled_connections() -> None:
    dial = Scribe()
    async with (
        bert(echo, trusted=[MALLORY]) as fake,
        http(dial).member(AROUND["bert"], Book(address_of(fake))) as one,
    ):
        with pytest.raises(Unauthenticated) as caught:
            await one.ask("POST", "/swarm/sync", {"have": 1})
        assert caught.value.code == "peer-refuses-us"


@pytest.mark.parametrize(
    "failure",
    [PermissionError(13, "no"), ConnectionRefusedError(111, "no"), TimeoutError("no"), OSError(100, "no")],
)
async def test_a_member_that_cannot_be_dialled_is_unreachable(failure: OSError) -> None:
    """And the next address is tried."""
    dial = Scribe(failure)
    book = Book(PeerAddress("10.0.0.7", 7437), PeerAddress("fe80::1%eth0", 7437))
    async with http(dial).member(AROUND["bert"], book) as one:
        with pytest.raises(Unavailable) as caught:
            await one.ask("POST", "/swarm/sync", {})
        assert caught.value.code == "peer-unreachable"
    assert dial.asked == [("10.0.0.7", 7437), ("fe80::1%eth0", 7437)]


async def test_a_stranger_is_met_over_a_dialled_connection() -> None:
    dial = Scribe()
    async with bert(echo) as fake, http(dial).stranger(address_of(fake)) as one:
        assert (await one.post("/swarm/pull", {"n": 1}))["got"] == {"n": 1}
        assert one.server_cert_der == BERT.cert_der
    assert len(dial.asked) == 1


# --- the connector -------------------------------------------------------------------------------


@asynccontextmanager
async def session_to(port: int) -> AsyncIterator[tuple[aiohttp.ClientSession, Scribe]]:
    dial = Scribe()
    connector = DialledConnector(dial, "127.0.0.1", port, limit=4, keepalive_timeout=60)
    async with aiohttp.ClientSession(connector=connector, trust_env=False) as one:
        yield one, dial


async def test_a_url_leads_nowhere_else() -> None:
    async with serving({"/": echo}) as fake, session_to(address_of(fake).port) as (session, dial):
        for url in ("http://8.8.8.8:53/", "http://localhost/", "http://metadata.internal:80/"):
            async with session.get(url) as response:
                assert response.status == 200
        assert set(dial.asked) == {("127.0.0.1", address_of(fake).port)}


async def test_tls_with_whoever_the_machine_trusts_is_refused() -> None:
    async with (
        serving({"/": echo}, tls=server_tls(BERT, ANNA)) as fake,
        session_to(address_of(fake).port) as (session, dial),
    ):
        for context in (None, False):
            with pytest.raises((aiohttp.ClientConnectionError, TypeError)):
                await session.get("https://x.internal/", ssl=context)  # type: ignore[arg-type]
        assert dial.asked == []
        own = Tls(ANNA.seed, ANNA.cert_der).client_context(BERT.cert_der)
        async with session.get(f"https://{BERT.id}.mycoswarm.internal/", ssl=own) as response:
            assert response.status == 200


async def test_who_stops_waiting_in_a_handshake_leaves_nothing_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with session_to(listener.getsockname()[1]) as (session, dial):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            waiting = asyncio.create_task(session.get("https://x.internal/", ssl=context))
            await until(lambda: dial.made)
            await asyncio.sleep(0.2)  # in which nobody answers
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await until(lambda: [sock.fileno() for sock in dial.made] == [-1])
