"""The connections that are open: how many, to whom, and how to end them at once.

Law: every connection is counted from the moment it is accepted, in its own kind's bound, so that no kind
of caller can take the places of another, nor one account those of its neighbours and of the owner. Over the
bound a caller is told so in one answer; where even those are many, without looking at what it asks, or the
connection just ends. Who says nothing is waited for by the clock; of programs that have shown no good key yet
the oldest makes room. A member's connections can be cut while they answer.
"""

import asyncio
import inspect
import logging
import ssl
from asyncio import constants, sslproto
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import StreamResponse

from mycoswarmd.api.access import Door, Who, share_of
from mycoswarmd.api.handler import BOUNDS_ITSELF, BoundedHandler, Kept, abort
from mycoswarmd.api.porch import source_of
from mycoswarmd.core.types import Principal
from mycoswarmd.errors import BadRequest, Unavailable
from mycoswarmd.wire.openai import encode_error

_SILENT = logging.getLogger("mycoswarmd.silent")
_SILENT.disabled = True

# The OpenAI client keeps connections for a long time; an idle one costs a few KB.
KEEPALIVE_S = 75.0
# What is read at a time; twice as much may wait to be handled.
_READ_BYTES = 32 << 10
# aiohttp before 3.9 lets a handler run on when its caller has gone away; there we do what later ones do.
_CANCELS_HANDLERS = "handler_cancellation" in inspect.signature(web.Server.__init__).parameters


# Where members came from; the longest unseen one is forgotten.
_SOURCES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How many connections there may be, and how long a stranger may take for each step."""

    local: int = 1024  # on the unix socket, and as many with a good key on the API-key listener
    local_of_user: int = 64  # of one account that is neither root nor the node's
    local_kept: int = 128  # of `local`, for root, the node's account and the owner's group alone
    unproved: int = 512  # on the API-key listener, with no good key yet; more than are accepted in one go
    of_key: int = 128
    local_patience_s: float = 30.0  # until the first request, and between two when no answer is awaited
    swarm: int = 1024
    member: int = 64
    strangers: int = 16
    strangers_of_source: int = 8
    handshakes: int = 64
    handshakes_of_source: int = 32
    refused: int = 64  # that are only told that there are too many
    patience_s: float = 5.0


@dataclass(slots=True, eq=False)
class Line:
    """One connection.

    Attributes:
        node_id: the id of the key that was proved on it, or None.
        account: whose process is at the other end of a unix socket, or None.
        key: the name of the API key that a program showed, or "".
        refusal: what its first request is answered with, where there were too many.
        is_endless: it carries an answer that has no end of its own.
        kind: which kind of caller has the part that an answer takes, and `who` of them; once that is known.
    """

    transport: asyncio.Transport
    door: Door
    source: str = ""
    node_id: str | None = None
    account: Principal | None = None
    key: str = ""
    refusal: Unavailable | None = None
    is_endless: bool = False
    kind: str = Who.STRANGER
    who: str = ""
    _timer: asyncio.TimerHandle | None = None

    @property
    def is_stranger(self) -> bool:
        """Tell whether somebody unproved is at the other end."""
        return self.door is Door.SWARM and self.node_id is None

    @property
    def is_unproved(self) -> bool:
        """Tell whether this may be a program, and no good key was shown yet."""
        return self.door is Door.TCP and not self.key

    def allow(self, seconds: float | None) -> None:
        """Give the other side so long from now; None: no limit. Afterwards the connection ends."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if seconds is not None and not self.transport.is_closing():
            self._timer = asyncio.get_running_loop().call_later(seconds, abort, self.transport)


@dataclass(slots=True, eq=False)
class _Handshake:
    source: str
    task: asyncio.Task[object] | None


@dataclass(slots=True)
class Lines:
    """Every connection of every listener."""

    bounds: Bounds = field(default_factory=Bounds)
    read_id: Callable[[bytes], str] | None = None
    account_of: Callable[[asyncio.BaseTransport], Principal] | None = None
    own_uid: int = 0
    refused: set[RequestHandler] = field(default_factory=set)
    _lines: dict[RequestHandler, Line] = field(default_factory=dict)
    _members: dict[str, set[Line]] = field(default_factory=dict)
    _doors: Counter[str] = field(default_factory=Counter)
    _strangers: Counter[str] = field(default_factory=Counter)
    _users: Counter[str] = field(default_factory=Counter)
    _unproved: dict[RequestHandler, Line] = field(default_factory=dict)  # oldest first
    _keys: Counter[str] = field(default_factory=Counter)
    _handshakes: list[_Handshake] = field(default_factory=list)
    _proved: OrderedDict[str, None] = field(default_factory=OrderedDict)  # sources of members

    def of(self, request: BaseRequest) -> Line | None:
        """Return the line of a request, or None when it has ended."""
        return self._lines.get(request.protocol)

    def opened(self, handler: RequestHandler, transport: asyncio.Transport, door: Door) -> None:
        """Count a new connection and find out whose it is."""
        line = Line(transport, door)
        if door is Door.SWARM:
            line.source = source_of(transport.get_extra_info("peername"))
            try:
                line.node_id = self._proved_id(transport)
            except BadRequest:
                abort(transport)
                return
            line.allow(self.bounds.patience_s)
        else:
            if door is Door.UNIX:
                assert self.account_of is not None
                line.account = self.account_of(transport)
            line.allow(self.patience_s(line))
        line.refusal = self._refusal_of(line)
        if line.refusal is not None:
            if len(self.refused) >= self.bounds.refused:
                line.allow(None)
                if door is Door.UNIX:
                    transport.write(_answer(line.refusal))  # the kernel keeps it for whoever reads
                    transport.close()
                else:
                    abort(transport)
                return
            self.refused.add(handler)
            line.allow(self.bounds.patience_s)
        self._lines[handler] = line
        self._count(line, +1)
        if line.is_unproved:
            self._let_wait(handler, line)
        if line.node_id is not None:
            self._proved[line.source] = None
            self._proved.move_to_end(line.source)
            if len(self._proved) > _SOURCES:
                self._proved.popitem(last=False)

    def closed(self, handler: RequestHandler) -> None:
        """Forget a connection."""
        line = self._lines.pop(handler, None)
        if line is None:
            return
        line.allow(None)
        self._count(line, -1)
        self._unproved.pop(handler, None)
        self.refused.discard(handler)

    def _let_wait(self, handler: RequestHandler, line: Line) -> None:
        """List a connection that may be a program's; the oldest of those makes room."""
        if len(self._unproved) >= self.bounds.unproved:
            oldest = next(iter(self._unproved))
            abort(self._unproved[oldest].transport)
            self.closed(oldest)
        self._unproved[handler] = line

    def patience_s(self, line: Line) -> float:
        """Return how long to wait for a local caller's next request."""
        return self.bounds.patience_s if line.is_unproved else self.bounds.local_patience_s

    def prove(self, request: BaseRequest, line: Line, key: str) -> None:
        """Count a connection on which a good key was shown as that key's; Unavailable when it has enough."""
        if line.key == key:
            return
        if self._keys[key] >= self.bounds.of_key or self._doors[Door.TCP] >= self.bounds.local:
            raise _too_many()
        self._count(line, -1)
        line.key = key
        self._count(line, +1)
        self._unproved.pop(request.protocol, None)

    def is_known(self, source: str) -> bool:
        """Tell whether some member proved its key from there lately."""
        return source in self._proved

    def member_ids(self) -> list[str]:
        """Return the ids whose keys were proved on some open connection."""
        return list(self._members)

    def cut(self, node_ids: Iterable[str]) -> int:
        """End every connection of these keys at once, also in the middle of an answer; return how many."""
        found = [line for node_id in node_ids for line in self._members.get(node_id, ())]
        for line in found:
            abort(line.transport)
        return len(found)

    def cut_all(self, door: Door, *, only_endless: bool = False) -> None:
        """End the connections of a kind of listener."""
        for line in list(self._lines.values()):
            if line.door is door and (line.is_endless or not only_endless):
                abort(line.transport)

    def _proved_id(self, transport: asyncio.Transport) -> str | None:
        tls: ssl.SSLObject = transport.get_extra_info("ssl_object")
        der = tls.getpeercert(binary_form=True)
        assert self.read_id is not None
        return self.read_id(der) if der else None

    def _refusal_of(self, line: Line) -> Unavailable | None:
        bounds, open_ = self.bounds, self._doors
        if line.account is not None:
            account = line.account
            is_over = open_[Door.UNIX] >= bounds.local - (0 if account.is_owner else bounds.local_kept) or (
                account.uid not in {0, self.own_uid}
                and self._users[share_of(account)] >= bounds.local_of_user
            )
        elif line.door is Door.TCP:
            is_over = False  # the oldest makes room, and a key is counted when it is shown
        elif line.node_id is None:
            of_source = self._strangers[line.source]
            is_over = of_source >= bounds.strangers_of_source or (
                self._strangers.total() >= bounds.strangers and not self._make_room(of_source)
            )
        else:
            is_over = (
                open_[Door.SWARM] >= bounds.swarm or len(self._members.get(line.node_id, ())) >= bounds.member
            )
        return _too_many() if is_over else None

    def _make_room(self, of_source: int) -> bool:
        """End the oldest connection of whoever has most, if that is more than the one who wants in."""
        hoarder, most = self._strangers.most_common(1)[0]
        if most <= of_source + 1:
            return False
        handler, oldest = next(
            (handler, one)
            for handler, one in self._lines.items()
            if one.is_stranger and one.source == hoarder and one.refusal is None
        )
        self.closed(handler)
        abort(oldest.transport)
        return True

    def _count(self, line: Line, by: int) -> None:
        """Count a line in or out; the refused ones take nobody's place."""
        if line.refusal is not None:
            if line.node_id is not None:
                self._list_member(line, by)  # it can be cut all the same
            return
        if line.is_unproved:
            return
        self._doors[line.door] += by
        if line.key:
            _add(self._keys, line.key, by)
        if line.account is not None:
            _add(self._users, share_of(line.account), by)
        if line.node_id is not None:
            self._list_member(line, by)
        elif line.door is Door.SWARM:
            _add(self._strangers, line.source, by)

    def _list_member(self, line: Line, by: int) -> None:
        assert line.node_id is not None
        lines = self._members.setdefault(line.node_id, set())
        if by > 0:
            lines.add(line)
        else:
            lines.discard(line)
            if not lines:
                del self._members[line.node_id]

    # --- handshakes ------------------------------------------------------------------------------

    def has_room(self, source: str) -> bool:
        """Tell whether one more handshake from here may begin; may end one of a source that hoards them."""
        bounds = self.bounds
        of = Counter(one.source for one in self._handshakes)
        if of[source] >= bounds.handshakes_of_source:
            return False
        if self._doors[Door.SWARM] + len(self._handshakes) >= bounds.swarm + bounds.handshakes:
            return False
        if len(self._handshakes) < bounds.handshakes:
            return True
        hoarder, most = of.most_common(1)[0]
        if most <= of[source] + 1:
            return False
        oldest = next(one for one in self._handshakes if one.source == hoarder)
        self._handshakes.remove(oldest)
        if oldest.task is not None:
            oldest.task.cancel()
        return True

    @contextmanager
    def shaking(self, source: str) -> Iterator[None]:
        """Count a handshake while the context lasts."""
        one = _Handshake(source, asyncio.current_task())
        self._handshakes.append(one)
        try:
            yield
        finally:
            if one in self._handshakes:  # or it had to make room
                self._handshakes.remove(one)


def _add(counter: Counter[str], who: str, by: int) -> None:
    counter[who] += by
    if not counter[who]:
        del counter[who]


def _too_many() -> Unavailable:
    return Unavailable(
        "too-many-connections",
        "cannot answer on one more connection: there are too many of your kind",
        hint="close some, or use one for several requests",
    )


def _answer(refusal: Unavailable) -> bytes:
    body = encode_error(refusal)
    head = (
        f"HTTP/1.1 {refusal.http_status} Service Unavailable\r\nContent-Type: application/json\r\n"
        f"Retry-After: {refusal.retry_after_s}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


class LineServer(web.Server):
    """aiohttp's server of one listener, which reports its connections."""

    def __init__(
        self, handle: Callable[[BaseRequest], Awaitable[StreamResponse]], *, lines: Lines, door: Door
    ) -> None:
        options: dict[str, object] = {
            "access_log": None,
            "keepalive_timeout": KEEPALIVE_S,
            "tcp_keepalive": True,
            # Its messages quote bytes of requests, and those may be prompts.
            "logger": _SILENT,
            # A compressed body would be inflated before anybody knows who sent it.
            "auto_decompress": False,
            "read_bufsize": _READ_BYTES,
        }
        # Without this a client that goes away does not stop the engine's work. aiohttp's own test
        # server sets it where production does not, so our tests run this very class.
        if _CANCELS_HANDLERS:
            options["handler_cancellation"] = True
        super().__init__(handle, **options)  # type: ignore[arg-type]
        # Each TLS connection has a buffer of that size from its beginning, and lets eight as large fill up.
        sslproto.SSLProtocol.max_size = _READ_BYTES
        setattr(constants, "FLOW_CONTROL_HIGH_WATER_SSL_READ", _READ_BYTES >> 10)  # noqa: B010 - Final
        self._open_lines = lines
        self._door = door
        self._kept = Kept()

    def __call__(self) -> RequestHandler:
        """Make the handler of one connection."""
        if BOUNDS_ITSELF:
            return RequestHandler(self, loop=self._loop, **self._kwargs)
        handler = BoundedHandler(self, loop=self._loop, **self._kwargs)
        handler.kept = self._kept
        return handler

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Count the connection, when its handshake is done."""
        super().connection_made(handler, transport)
        # asyncio reads 256 KiB at a time, aiohttp goes on until it has more than twice its own bound: a
        # thousand connections that wait for room would fill the memory before any has room.
        setattr(transport, "max_size", _READ_BYTES)  # noqa: B010 - not of every kind of transport
        self._open_lines.opened(handler, transport, self._door)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Forget the connection, and end what still works for it."""
        self._open_lines.closed(handler)
        if not _CANCELS_HANDLERS and (task := handler._task_handler) is not None:  # noqa: SLF001
            task.cancel()
        super().connection_lost(handler, exc)
