"""HTTP to the other nodes of a swarm over TLS, and to strangers for enrolment and the roster pull.

Laws:

1. An address is a hint. Nothing is sent to a member before whoever is there has proved the member's key;
   that is the TLS context's doing, made for exactly one certificate and one name.
2. No proxy, no redirect, no cookie, no resolver of the machine; all that comes back is bounded in size and
   time, and every way to fail is one of our errors.

Source: docs/wire.md.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from ssl import SSLContext

import aiohttp

from mycoswarmd.core.roster import Member
from mycoswarmd.engines.dialled import dial_directly
from mycoswarmd.engines.peeranswer import Words, raise_refusal, read_answer
from mycoswarmd.engines.peerline import (
    Failure,
    Line,
    Race,
    explain,
    graver,
    leave,
    probe,
    refused,
    unreachable,
)
from mycoswarmd.engines.upstream import BROKEN
from mycoswarmd.errors import MycoswarmError
from mycoswarmd.flow.ports import Dial
from mycoswarmd.flow.swarmports import AddressBook, PeerAddress
from mycoswarmd.wire.peer import SILENT_S, Word

SERVER_NAME = "{}.mycoswarm.internal"
_STRANGER = SERVER_NAME.format("stranger")
MAX_ADDRESSES = 16
_WATCH_HEAD_S = 10.0
# A member's addresses are tried this far apart where none of them is proved yet.
_STAGGER_S = 0.25
# A server that refuses our certificate ends the connection at once; one that worked for longer has failed.
_EARLY_S = 5.0
_KNOCK_S = 3.0
# Words come at most 5 times a second; a node that floods is read no faster than this.
_WORD_PAUSE_S = 0.05
# Connections to old addresses are closed, the longest unused first.
_MAX_LINES = 32
# A step of the enrolment takes seconds where a code has to be stretched on a small machine.
_STRANGER_S = 15.0


def _encode(body: Mapping[str, object] | None) -> bytes | None:
    if body is None:
        return None
    return json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii")


class MemberClient:
    """HTTP to one member at whichever of its addresses it proves its key."""

    def __init__(
        self,
        member: Member,
        addresses: AddressBook,
        context: SSLContext,
        knock_context: Callable[[], SSLContext],
        dial: Dial,
    ) -> None:
        self._id = member.id
        self._cert_der = member.cert_der
        self._knock_context = knock_context
        self._name = f"node {member.name!r}"
        self._addresses = addresses
        self._context = context
        self._dial = dial
        self._lines: dict[PeerAddress, Line] = {}  # the longest unused first
        self._best: PeerAddress | None = None
        self._is_closed = False
        self._cuts = 0
        self._tries = 0
        self._failed_at: dict[PeerAddress, int] = {}  # counted in tries

    async def aclose(self) -> None:
        """Drop every connection for good."""
        self._is_closed = True
        self.cut()
        for line in list(self._lines.values()):
            await line.aclose()
        self._lines.clear()

    def remote_address(self) -> PeerAddress | None:
        """Return where the member was last reached."""
        return self._best

    def cut(self) -> None:
        """Drop every connection now, also in the middle of a stream."""
        self._cuts += 1
        for line in self._lines.values():
            line.cut()

    async def ask(
        self, method: str, path: str, body: Mapping[str, object] | None = None, *, within_s: float = 5.0
    ) -> Mapping[str, object]:
        """Return a bounded JSON answer."""
        try:
            async with asyncio.timeout(within_s):
                response = await self.send(method, path, _encode(body))
                return await read_answer(response, self._name)
        except TimeoutError as exc:
            raise unreachable(self._name, f"it did not answer within {within_s:g} s") from exc

    async def watch(self) -> AsyncGenerator[Word | None, None]:
        """Yield the member's words as they come, None for a heartbeat; ends when the connection does."""
        try:
            async with asyncio.timeout(_WATCH_HEAD_S):
                response = await self.send("GET", "/swarm/watch")
        except TimeoutError as exc:
            raise unreachable(self._name, f"it did not answer within {_WATCH_HEAD_S:g} s") from exc
        try:
            if response.status != 200:
                await raise_refusal(response, self._name)
            probe(response)
            lines = Words(self._id, self._name)
            while untrusted := await self._next_piece(response):
                word = lines.feed(untrusted)
                if word is not None or lines.has_beat:
                    yield word
                    await asyncio.sleep(_WORD_PAUSE_S)
        finally:
            leave(response)

    async def _next_piece(self, response: aiohttp.ClientResponse) -> bytes:
        """Return what has arrived, waiting for at least something; b"" where the connection has ended."""
        try:
            async with asyncio.timeout(SILENT_S):
                return await response.content.readany()
        except TimeoutError as exc:
            raise unreachable(self._name, f"it was silent for {SILENT_S:g} s") from exc
        except BROKEN:
            return b""

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> aiohttp.ClientResponse:
        """Send to the first address where the member proves its key, and return how its answer begins.

        The caller bounds the time and closes the response.
        """
        while len(self._lines) > _MAX_LINES:
            await self._lines.pop(next(iter(self._lines))).aclose()
        addresses = self._in_order()
        if method == "GET" and self._best is None and len(addresses) > 1:
            return await self._race(addresses, path, headers or {})
        worst: MycoswarmError = unreachable(self._name, "no address of it is known")
        for address in addresses:
            answer = await self._send_to(address, method, path, body, headers or {})
            if not isinstance(answer, Failure):
                return answer
            if not answer.is_nobody:
                raise answer.error
            worst = graver(answer.error, worst)
        raise worst

    async def _send_to(
        self, address: PeerAddress, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse | Failure:
        begun_s, cuts = asyncio.get_running_loop().time(), self._cuts
        try:
            response = await self._line(address).send(method, path, body, headers)
        except BROKEN as exc:
            self._tries += 1
            self._failed_at[address] = self._tries
            failure = explain(self._name, address, exc)
            is_early = asyncio.get_running_loop().time() - begun_s < _EARLY_S and cuts == self._cuts
            if failure.is_early_end and is_early and await self._hears_strangers(address):
                return Failure(refused(self._name), is_nobody=False)
            return failure
        self._best = address
        self._failed_at.pop(address, None)
        return response

    async def _hears_strangers(self, address: PeerAddress) -> bool:
        """Tell whether the member answers there, as long as it is not shown our certificate.

        A server that refuses a certificate just ends the connection: asyncio does not send the alert.
        """
        name = SERVER_NAME.format(self._id)
        line = Line(address, name, self._knock_context(), self._dial, is_single=True)
        try:
            async with asyncio.timeout(_KNOCK_S):
                response = await line.send("GET", "/swarm/word", None, {})
                response.close()
        except BROKEN:  # a TimeoutError is one of them
            return False
        finally:
            await line.aclose()
        return line.connector.cert_der == self._cert_der

    async def _race(
        self, addresses: Sequence[PeerAddress], path: str, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        """Ask at all addresses, a little apart, and return the first answer: most of them may be dead."""
        race = Race()
        try:
            async with asyncio.TaskGroup() as group:
                for address in addresses:
                    asking = self._send_to(address, "GET", path, None, headers)
                    race.runners.append(group.create_task(race.run(asking)))
                    if await race.is_over(within_s=_STAGGER_S):
                        break
        except BaseException:
            race.leave_all()
            raise
        return race.winner()

    def _in_order(self) -> list[PeerAddress]:
        """Begin with where it was reached last; what failed comes last, the longest ago first."""
        known = list(dict.fromkeys(self._addresses.addresses(self._id)))[:MAX_ADDRESSES]
        self._failed_at = {one: at for one, at in self._failed_at.items() if one in known}
        return sorted(known, key=lambda one: (self._failed_at.get(one, 0), one != self._best))

    def _line(self, address: PeerAddress) -> Line:
        if self._is_closed:
            raise aiohttp.ClientConnectionError("the client is closed")
        line = self._lines.pop(address, None)
        if line is None:
            line = Line(address, SERVER_NAME.format(self._id), self._context, self._dial)
        self._lines[address] = line
        return line


class Stranger:
    """One connection to whoever is there; nothing is ever sent over a second one."""

    def __init__(self, address: PeerAddress, context: SSLContext, dial: Dial) -> None:
        self._line = Line(address, _STRANGER, context, dial, is_single=True)
        self._name = str(address)

    @property
    def server_cert_der(self) -> bytes:
        """The certificate that the other side presented; known after the first answer."""
        return self._line.connector.cert_der

    async def post(self, path: str, body: Mapping[str, object]) -> Mapping[str, object]:
        """Send and return JSON on the same connection."""
        try:
            async with asyncio.timeout(_STRANGER_S):
                response = await self._line.send("POST", path, _encode(body), {})
                return await read_answer(response, self._name)
        except aiohttp.ServerTimeoutError as exc:  # of the connection; it is a TimeoutError, too
            raise explain(self._name, self._line.address, exc).error from exc
        except TimeoutError as exc:
            raise unreachable(self._name, f"it did not answer within {_STRANGER_S:g} s") from exc
        except BROKEN as exc:
            raise explain(self._name, self._line.address, exc).error from exc

    async def aclose(self) -> None:
        """Drop the connection."""
        await self._line.aclose()


class PeerHttp:
    """Makes clients of members and of strangers; without a dialer, this process connects by itself."""

    def __init__(
        self,
        *,
        client_context: Callable[[bytes], SSLContext],
        knock_context: Callable[[], SSLContext],
        dial: Dial | None = None,
    ) -> None:
        self._client_context = client_context
        self._knock_context = knock_context
        self._dial = dial or dial_directly

    @asynccontextmanager
    async def member(self, member: Member, addresses: AddressBook) -> AsyncIterator[MemberClient]:
        """Hold a client of one member; it dials the addresses that the book has at that moment."""
        context = self._client_context(member.cert_der)
        client = MemberClient(member, addresses, context, self._knock_context, self._dial)
        try:
            yield client
        finally:
            await client.aclose()

    @asynccontextmanager
    async def stranger(self, address: PeerAddress) -> AsyncIterator[Stranger]:
        """Hold one connection to whoever listens there; presents nothing and believes nothing."""
        client = Stranger(address, self._knock_context(), self._dial)
        try:
            yield client
        finally:
            await client.aclose()
