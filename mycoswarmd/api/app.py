"""The HTTP server: admits, finds the route, asks the policy, bounds the body, turns errors into answers.

Law: in this order and for every request: who, in which roles (access.py), which route, is it for such a
caller, does the policy allow its action, and only then the body. Unknown paths are refused after
authentication; to a stranger at the swarm's listener everything but its own few routes is unknown.
"""

import asyncio
import contextlib
import errno
import io
import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from weakref import WeakValueDictionary

from aiohttp import web
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import Response, StreamResponse

from mycoswarmd.api.access import Caller, Door, Doorman, Listener, Who, role_needed, share_of, with_way_out
from mycoswarmd.api.call import ROSTER_HEADER, Call
from mycoswarmd.api.handler import abort
from mycoswarmd.api.lines import KEEPALIVE_S, Bounds, Line, Lines, LineServer
from mycoswarmd.api.porch import Buckets, Rate, source_of
from mycoswarmd.api.room import PER_BYTE, BodyRoom, Keep, Size, weigh
from mycoswarmd.api.routes import ROUTES, SYNC_PATH, Gate, Route, make_router
from mycoswarmd.api.services import Services
from mycoswarmd.core.policy.evaluate import Permit, evaluate
from mycoswarmd.core.types import Action, Request, TaskId
from mycoswarmd.errors import (
    BadRequest,
    ConfigError,
    Denied,
    MycoswarmError,
    NotFound,
    Unavailable,
)
from mycoswarmd.wire.openai import encode_error

log = logging.getLogger(__name__)

# A client that sends its body slower than this holds a connection for nothing.
_BODY_S = 60.0
_STOP_S = 5.0
# A member's rosters come a few at a time, so that it holds up itself and nobody else.
_MEMBER_AT_ONCE = 4
# What bodies may take of memory until they are answered: all together half of what the core may have. Each
# kind of caller has its own, so that none waits for another; six accounts fill that of accounts.
_ROOMS = {
    "owner": Size(64 << 20, 128 << 20),
    Who.LOCAL: Size(24 << 20, 144 << 20),
    Who.PROGRAM: Size(48 << 20, 96 << 20),
    Who.NODE: Size(48 << 20, 96 << 20),
    Who.STRANGER: Size(64 << 20, 64 << 20),  # never full: there are 16 connections, and 512 KiB on each
}
# The same for answers that are sent in one piece, until they are gone. They are in memory by then, so none
# waits.
_ANSWERS = {
    "owner": Size(32 << 20, 32 << 20),
    Who.LOCAL: Size(8 << 20, 32 << 20),
    Who.PROGRAM: Size(16 << 20, 32 << 20),
    Who.NODE: Size(16 << 20, 32 << 20),
    Who.STRANGER: Size(8 << 20, 8 << 20),
}
_PIECE_BYTES = 256 << 10
_BESIDE = ("Server", ROSTER_HEADER)
_READER_S = 120.0  # the largest at 0.3 MB/s
# How many tasks are being posted, which may have to wait for a person, whether or not their callers are still
# there: no bound of connections counts those.
_POSTED = Size(64, 256)
# So little is not counted: a connection's own buffers are larger, and who only says that it will send much
# takes nothing.
_UNCOUNTED_BYTES = 32 << 10
# JSON is parsed without letting any other task run.
_PARTS = (b"[", b"{", b":")
_PARTS_OF_MEMBER = 1 << 17
_PARTS_OF_STRANGER = 1 << 12
# What a stranger may ask for: a newcomer needs some ten requests, one a second while a person decides.
_KNOCKS_OF_EACH = Rate(burst=60, per_s=5)
_KNOCKS_OF_ALL = Rate(burst=240, per_s=20)
# A handshake takes 1 to 5 ms of a processor; members keep their connections.
_SHAKES_OF_EACH = Rate(burst=256, per_s=32)
_SHAKES_OF_ALL = Rate(burst=1024, per_s=128)
# For an answer to a stranger, which is at most the whole roster.
_ANSWER_S = 30.0
# A peer that does not say goodbye keeps a connection that is closed on our side for so long.
_GOODBYE_S = 2.0
_BACKLOG = 256
# What the policy does not decide before the handler runs.
_FREE = frozenset({Gate.OPEN, Gate.INSIDE, Gate.INVITED})
# What accept says of a connection that ended before it was accepted; anything else is ours, mostly too many
# open files, and would be said again at once.
_OVER_ALREADY = frozenset({errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN, errno.EHOSTUNREACH})
_FULL_S = 1.0


class Api:
    """Serves one set of services on any number of listeners."""

    def __init__(
        self,
        services: Services,
        doorman: Doorman,
        *,
        bounds: Bounds | None = None,
        routes: Sequence[Route] = ROUTES,
    ) -> None:
        self._services = services
        self._doorman = doorman
        self._router = make_router(routes)
        self._rooms = {kind: BodyRoom(size, patience_s=_BODY_S) for kind, size in _ROOMS.items()}
        self._posted = {kind: BodyRoom(_POSTED, patience_s=0) for kind in _ROOMS}
        self._answers = {kind: BodyRoom(size, patience_s=0) for kind, size in _ANSWERS.items()}
        self._of_member: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._begun = asyncio.TaskGroup()
        self._bounds = bounds or Bounds()
        book = doorman.book
        self._lines = Lines(
            self._bounds,
            read_id=book.read_id if book is not None else None,
            account_of=doorman.account_of,
            own_uid=doorman.own_uid,
        )
        now_s = services.clock.monotonic_s
        self._knocks = Buckets(monotonic_s=now_s, each=_KNOCKS_OF_EACH, all_=_KNOCKS_OF_ALL)
        self._shakes = Buckets(monotonic_s=now_s, each=_SHAKES_OF_EACH, all_=_SHAKES_OF_ALL)
        # No crowd of others uses up what members need.
        self._member_shakes = Buckets(monotonic_s=now_s, each=_SHAKES_OF_EACH, all_=_SHAKES_OF_ALL)

    @asynccontextmanager
    async def begun(self) -> AsyncIterator[None]:
        """Needed around the listeners; ends when everything that was begun has ended."""
        async with self._begun, contextlib.AsyncExitStack() as stack:
            if self._services.swarm is not None:
                stack.callback(self._services.swarm.swarm.subscribe(self._cut_the_gone))
            yield

    def cut(self, node_ids: Iterable[str]) -> None:
        """End every connection of these keys at once, also in the middle of an answer."""
        if count := self._lines.cut(node_ids):
            log.info("cut %d connections of keys that are members no more", count)

    def _cut_the_gone(self) -> None:
        book = self._doorman.book
        if book is not None:
            self.cut([one for one in self._lines.member_ids() if book.member_of(one) is None])

    @asynccontextmanager
    async def listening(
        self, sock: socket.socket, listener: Listener, ssl_context: ssl.SSLContext | None = None
    ) -> AsyncIterator[None]:
        """Serve on a bound socket while the context lasts; the swarm's listener needs its TLS context."""

        async def handle(request: BaseRequest) -> StreamResponse:
            line = self._lines.of(request)
            if line is None:
                return Response(status=499)  # it ended before its request was looked at
            if listener.door is Door.SWARM:
                return await self._sent(line, request, await self._serve_peer(line, request))
            line.allow(None)
            response = await _answered(self._serve(listener, line, request))
            response = await self._sent(line, request, response)
            line.allow(self._lines.patience_s(line) + (0 if line.is_unproved else KEEPALIVE_S))
            return response

        server = LineServer(handle, lines=self._lines, door=listener.door)
        runner = web.ServerRunner(server, shutdown_timeout=_STOP_S)
        await runner.setup()
        try:
            if listener.door is Door.SWARM:
                assert ssl_context is not None
                async with self._accepting(sock, server, ssl_context):
                    yield
            else:
                await web.SockSite(runner, sock, backlog=_BACKLOG).start()
                yield
        finally:
            self._lines.cut_all(listener.door, only_endless=True)
            await runner.cleanup()
            self._lines.cut_all(listener.door)

    @asynccontextmanager
    async def _accepting(
        self, sock: socket.socket, server: LineServer, context: ssl.SSLContext
    ) -> AsyncIterator[None]:
        sock.setblocking(False)  # noqa: FBT003
        sock.listen(_BACKLOG)
        with sock:
            async with asyncio.TaskGroup() as group:
                accepting = group.create_task(self._accept(group, sock, server, context), name="accept")
                try:
                    yield
                finally:
                    accepting.cancel()

    async def _accept(
        self, group: asyncio.TaskGroup, sock: socket.socket, server: LineServer, context: ssl.SSLContext
    ) -> None:
        loop = asyncio.get_running_loop()
        shakes: set[asyncio.Task[None]] = set()
        try:
            while True:
                try:
                    connection, peername = await loop.sock_accept(sock)
                except OSError as exc:
                    if exc.errno not in _OVER_ALREADY:
                        log.warning("cannot accept connections of the swarm for now: %s", exc.strerror)
                    await asyncio.sleep(0 if exc.errno in _OVER_ALREADY else _FULL_S)
                    continue
                source = source_of(peername)
                shakes_left = self._member_shakes if self._lines.is_known(source) else self._shakes
                if not self._lines.has_room(source) or not shakes_left.take(source):
                    connection.close()
                else:
                    shake = group.create_task(self._shake(connection, source, server, context), name="shake")
                    shakes.add(shake)
                    shake.add_done_callback(shakes.discard)
                await asyncio.sleep(0)  # accepting at once does not give way to others
        finally:
            for shake in shakes:
                shake.cancel()

    async def _shake(
        self, connection: socket.socket, source: str, server: LineServer, context: ssl.SSLContext
    ) -> None:
        """Do the handshake; from its end on the connection is the server's."""
        with self._lines.shaking(source), contextlib.suppress(OSError):  # TLS errors are such, too
            await asyncio.get_running_loop().connect_accepted_socket(
                server,
                connection,
                ssl=context,
                ssl_handshake_timeout=self._bounds.patience_s,
                ssl_shutdown_timeout=_GOODBYE_S,
            )

    async def _sent(self, line: Line, request: BaseRequest, response: StreamResponse) -> StreamResponse:
        """Send an answer that is large, and count it for as long as that takes."""
        if not isinstance(response, Response) or response.prepared or not isinstance(response.body, bytes):
            return response
        if (size_bytes := len(whole := response.body)) <= _UNCOUNTED_BYTES or request.method == "HEAD":
            return response
        try:
            with self._answers[line.kind].taken_now(line.who, size_bytes):
                async with asyncio.timeout(_READER_S):
                    await response.prepare(request)
                    # aiohttp keeps it until the next request on this connection.
                    response.body = None
                    # In pieces: of one that is whole, TLS takes all at once, and says that it is gone.
                    for start in range(0, size_bytes, _PIECE_BYTES):
                        await response.write(whole[start : start + _PIECE_BYTES])
                    await response.write_eof()
        except Unavailable as exc:
            refusal = _refusal(exc)
            # What a member or a stranger is told beside every answer, and nothing else.
            refusal.headers.update(
                {name: response.headers[name] for name in _BESIDE if name in response.headers}
            )
            return _last(refusal) if response.keep_alive is False else refusal
        except TimeoutError:
            abort(line.transport)
        return response

    # --- local users and programs ----------------------------------------------------------------

    async def _serve(self, listener: Listener, line: Line, request: BaseRequest) -> StreamResponse:
        if line.refusal is not None:
            raise line.refusal
        caller = self._doorman.admit(listener, request)
        line.kind, line.who = self._kind_of(caller), share_of(caller.principal)
        if caller.principal.key is not None:
            self._lines.prove(request, line, caller.principal.key)
        found = self._router.find(request.method, request.path)
        if found is None or (listener.door is Door.TCP and not caller.roles & found[0].who):
            raise self._no_route(caller, request)
        # A prompt is denied for where it would go; who asks is seldom why.
        asker = None if request.path.startswith("/v1/") else caller
        return await _answered(self._enter(*found, caller, request), asker)

    # --- the swarm -------------------------------------------------------------------------------

    async def _serve_peer(self, line: Line, request: BaseRequest) -> StreamResponse:
        response = await self._answer_peer(line, request)
        if not response.prepared:
            response.headers["Server"] = "mycoswarmd"  # which versions of what is nobody's business
            book = self._doorman.book
            if book is not None and line.node_id is not None and book.member_of(line.node_id) is not None:
                response.headers[ROSTER_HEADER] = self._digest()
        return response

    async def _answer_peer(self, line: Line, request: BaseRequest) -> StreamResponse:
        try:
            if line.refusal is not None:
                raise line.refusal
            caller = self._doorman.admit_peer(line.node_id, request)
        except MycoswarmError as exc:
            return _last(_refusal(exc))
        if caller.is_stranger:
            line.who = line.source
            return await self._serve_stranger(line, caller, request)
        line.kind, line.who = self._kind_of(caller), share_of(caller.principal)
        line.allow(None)
        return await _answered(self._serve_member(line, caller, request))

    async def _serve_member(self, line: Line, caller: Caller, request: BaseRequest) -> StreamResponse:
        found = self._router.find(request.method, request.path)
        if found is None:
            raise self._no_route(caller, request)
        line.is_endless = found[0].is_endless
        return await self._enter(*found, caller, request, roster=self._digest())

    async def _serve_stranger(self, line: Line, caller: Caller, request: BaseRequest) -> StreamResponse:
        route = self._route_of_stranger(request)
        if not self._knocks.take(line.source):
            response: StreamResponse = _refusal(
                Unavailable("too-many-requests", "cannot answer strangers so often", http_status=429)
            )
        elif route is None:
            response = _refusal(NotFound("no-such-route", "cannot find this path"))
        else:
            response = await _answered(self._enter(route, {}, caller, request, line=line))
            if route.goes_on and response.keep_alive is not False:
                line.allow(self._bounds.patience_s)
                return response
            line.allow(_ANSWER_S)
            return _last(response)
        return _last(response)

    def _route_of_stranger(self, request: BaseRequest) -> Route | None:
        found = self._router.find(request.method, request.path)
        if found is None or Who.STRANGER not in found[0].who:
            return None
        desk = self._services.swarm
        if desk is None or (found[0].gate is Gate.INVITED and not desk.invitations.is_open()):
            return None
        return found[0]

    def _digest(self) -> str:
        return self._services.swarm.swarm.digest if self._services.swarm is not None else ""

    # --- everybody -------------------------------------------------------------------------------

    async def _enter(
        self,
        route: Route,
        names: dict[str, str],
        caller: Caller,
        request: BaseRequest,
        *,
        roster: str = "",
        line: Line | None = None,
    ) -> StreamResponse:
        if not caller.roles & route.who:
            raise role_needed(caller, route.who)
        if route.gate not in _FREE:
            await self._pass_gate(route, names, caller)
        async with contextlib.AsyncExitStack() as held:
            if request.body_exists and roster and route.path == SYNC_PATH:
                await held.enter_async_context(self._turn_of(caller))
            return await self._handled(held, route, names, caller, request, roster, line)

    def _hold_place(self, held: contextlib.AsyncExitStack, caller: Caller) -> None:
        try:
            places = self._posted[self._kind_of(caller)]
            held.enter_context(places.taken_now(share_of(caller.principal), 1))
        except Unavailable as exc:
            raise Unavailable(
                "too-many-waiting",
                "cannot take the task: too many wait for a person already",
                hint="mycoswarmctl approvals lists them",
                retry_after_s=5,
            ) from exc

    def _kind_of(self, caller: Caller) -> str:
        """Return which of the rooms is for this caller."""
        if caller.principal.is_owner:
            return "owner"
        return next(kind for kind in self._rooms if kind in caller.roles)

    def _turn_of(self, caller: Caller) -> asyncio.Semaphore:
        """Return what a member's rosters wait for."""
        who = caller.principal.describe()
        turn = self._of_member.get(who)
        if turn is None:
            turn = self._of_member[who] = asyncio.Semaphore(_MEMBER_AT_ONCE)
        return turn

    async def _handled(
        self,
        held: contextlib.AsyncExitStack,
        route: Route,
        names: dict[str, str],
        caller: Caller,
        request: BaseRequest,
        roster: str,
        line: Line | None,
    ) -> StreamResponse:
        body, pieces = b"", None
        if route.body_in_pieces:
            _check_head(request, route.body_bytes)
            pieces = _pieces(request, route.body_bytes)
        elif request.body_exists:

            def take_room(size_bytes: int) -> Awaitable[Keep]:
                room = self._rooms[self._kind_of(caller)]
                return held.enter_async_context(room.taken(share_of(caller.principal), size_bytes))

            body = await _read_body(request, route.body_bytes, take_room)
            if line is not None:
                _check_parts(body, _PARTS_OF_STRANGER)
            elif roster and route.gate is not Gate.INSIDE:
                _check_parts(body, _PARTS_OF_MEMBER)
        if line is not None:
            line.allow(_ANSWER_S)
        call = Call(request, caller.principal, self._services, names, body, caller.start, roster, pieces)
        if route.runs_to_its_end:
            # What changes something is not left half done when its caller goes away.
            if route.may_wait_for_people:
                self._hold_place(held, caller)
            return await asyncio.shield(
                self._begun.create_task(_to_its_end(held.pop_all(), route, call, caller))
            )
        return await route.handler(call)

    def _no_route(self, caller: Caller, request: BaseRequest) -> MycoswarmError:
        if methods := self._router.methods(request.path, caller):
            return BadRequest(
                "method-not-allowed",
                f"cannot {request.method[:20]} this path",
                hint=f"it takes {', '.join(methods)}",
                http_status=405,
            )
        return NotFound("no-such-route", "cannot find this path", hint="/v1/models is a good start")

    def _may_post_something(self, caller: Caller) -> None:
        """Raise Denied for someone whom the policy lets post no task at all."""
        policy = self._services.policy.policy
        known = self._services.prompts.here_and_now(
            Request(action=Action.TASK, principal=caller.principal, start=caller.start)
        )
        outcomes = [
            evaluate(policy, replace(known, agent=agent, label=label))
            for agent in (policy.agents if policy is not None else ())
            for label in (policy.labels.order if policy is not None else ())
        ]
        if all(isinstance(outcome, Denied) for outcome in outcomes):
            raise Denied("policy-denied", "cannot store a workspace for someone who may post no task")

    async def _pass_gate(self, route: Route, names: dict[str, str], caller: Caller) -> None:
        if route.gate is Gate.SOME_TASK:
            self._may_post_something(caller)
            return
        if route.gate is Gate.MEND and self._services.policy.policy is None and caller.principal.is_owner:
            return  # it can only become better, and a signal does the same
        if route.gate is Gate.OWN_TASK:
            task = await self._services.task_store.get(TaskId(names["id"]))
            if task.spec.submitter.describe() == caller.principal.describe():
                return
        outcome = evaluate(
            self._services.policy.policy,
            self._services.prompts.here_and_now(
                Request(action=Action.ADMIN, principal=caller.principal, start=caller.start)
            ),
        )
        if isinstance(outcome, Permit):
            return
        if isinstance(outcome, Denied):
            if caller.principal.is_owner and Who.LOCAL in caller.roles:  # root has the file, not the command
                outcome.hint = self._services.policy.way_back
            raise outcome
        raise Denied(
            "not-approved",
            f"cannot administer this node: rule {outcome.rule!r} wants a person's approval for it",
            rule=outcome.rule,
            where=outcome.where,
            hint="give action admin to an origin with an allow rule",
        )


async def _answered(
    answer: Coroutine[None, None, StreamResponse], asker: Caller | None = None
) -> StreamResponse:
    """Turn what goes wrong into an answer, with a way out for `asker`."""
    try:
        return await answer
    except MycoswarmError as exc:
        return _refusal(exc if asker is None else with_way_out(exc, asker))
    except ConnectionError:  # the client is gone; there is nobody to tell
        return Response(status=499)
    except Exception:
        # A bug of ours: the log gets the traceback, the person gets neither it nor a hang.
        log.exception("a request failed")
        return _refusal(MycoswarmError("internal-error", "cannot answer: an internal error, see the log"))


async def _to_its_end(
    held: contextlib.AsyncExitStack, route: Route, call: Call, caller: Caller
) -> StreamResponse:
    """Answer, and give back what is held for the body only then, whoever went away meanwhile."""
    async with held:
        return await _answered(route.handler(call), caller)


async def _read_body(
    request: BaseRequest, at_most_bytes: int, take_room: Callable[[int], Awaitable[Keep]]
) -> bytes:
    """Read the body within the route's bound; refuse a larger one before reading it where it says so."""
    _check_head(request, at_most_bytes)
    length = request.content_length
    body = io.BytesIO()  # hands over what it holds without a copy
    first_bytes = min(_UNCOUNTED_BYTES, at_most_bytes)
    keep: Keep | None = None
    if not await _read_on(request, body, first_bytes) and at_most_bytes > first_bytes:
        keep = await take_room(PER_BYTE * (at_most_bytes if length is None else length))
        await _read_on(request, body, at_most_bytes)
    if body.tell() > at_most_bytes:
        raise _too_large(at_most_bytes)
    whole = body.getvalue()
    weight_bytes = weigh(whole)
    if keep is not None:
        await keep(weight_bytes)
    elif weight_bytes > _UNCOUNTED_BYTES:
        await take_room(weight_bytes)
    return whole


async def _read_on(request: BaseRequest, body: io.BytesIO, to_bytes: int) -> bool:
    """Read until the end, or until there is more than so much; tell whether that was the end."""
    with _body_errors():
        async with asyncio.timeout(_BODY_S):
            async for piece in request.content.iter_any():
                body.write(piece)
                if body.tell() > to_bytes:
                    return False
    return True


def _check_head(request: BaseRequest, at_most_bytes: int) -> None:
    """Refuse a body by what its request says of it."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise BadRequest("compressed-body", "cannot read a compressed body: send it plain", http_status=415)
    if request.content_length is not None and request.content_length > at_most_bytes:
        raise _too_large(at_most_bytes)


async def _pieces(request: BaseRequest, at_most_bytes: int) -> AsyncIterator[bytes]:
    """Yield the body within the route's bound as it comes; what its taker does with it costs no time."""
    clock = asyncio.get_running_loop().time
    left_s, size_bytes = _BODY_S, 0
    while True:
        asked_s = clock()
        with _body_errors():
            async with asyncio.timeout(left_s):
                piece = await request.content.readany()
        left_s -= clock() - asked_s
        size_bytes += len(piece)
        if size_bytes > at_most_bytes:
            raise _too_large(at_most_bytes)
        if not piece:
            return
        yield piece


@contextlib.contextmanager
def _body_errors() -> Iterator[None]:
    """Say what can go wrong while a body comes."""
    try:
        yield
    except web.RequestPayloadError:
        raise BadRequest("bad-body", "cannot read the request: its body is malformed") from None
    except TimeoutError as exc:
        raise BadRequest(
            "slow-body", f"cannot read the request: no end after {_BODY_S:.0f} s", http_status=408
        ) from exc


def _check_parts(body: bytes, at_most: int) -> None:
    """Refuse what would take long to parse, and a lot of memory."""
    if len(body) > at_most and sum(map(body.count, _PARTS)) > at_most:
        raise BadRequest("too-intricate", "cannot read the request: it has too many parts", http_status=413)


def _too_large(at_most_bytes: int) -> BadRequest:
    return BadRequest(
        "too-large",
        f"cannot take a body of more than {at_most_bytes} bytes here",
        http_status=413,
    )


def _last(response: StreamResponse) -> StreamResponse:
    """Make a response the last one of its connection."""
    if not response.prepared:
        response.force_close()
    return response


def _refusal(exc: MycoswarmError) -> Response:
    headers = {}
    if isinstance(exc, Unavailable):
        headers["Retry-After"] = str(exc.retry_after_s)
    if exc.receipt:
        headers["X-Mycoswarm-Receipt"] = exc.receipt
    if isinstance(exc, Denied) and exc.rule:
        headers["X-Mycoswarm-Rule"] = exc.rule
    if exc.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    response = Response(
        body=encode_error(exc), status=exc.http_status, content_type="application/json", headers=headers
    )
    if exc.http_status in {408, 413} or exc.code == "too-many-connections":
        response.force_close()  # the rest of the body, or of the connection, is not worth having
    return response


def bind_unix(path: Path, *, mode: int) -> socket.socket:
    """Bind a unix socket; a stale one of a dead daemon is replaced."""
    if len(os.fsencode(path)) > 107:
        raise ConfigError(
            "socket-path-too-long",
            f"cannot listen on {str(path)!r}: a unix socket's path has at most 107 bytes",
            hint="choose a shorter --state directory",
        )
    if _is_answered(path):
        raise ConfigError("already-running", f"cannot listen on {str(path)!r}: another node answers there")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        path.unlink(missing_ok=True)
        sock.bind(str(path))
        path.chmod(mode)
    except OSError as exc:
        sock.close()
        raise ConfigError("bad-socket", f"cannot listen on {str(path)!r}: {exc.strerror}") from exc
    return sock


def _is_answered(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(str(path))
        except OSError:
            return False
        return True


def bind_tcp(
    host: str, port: int, *, hint: str = "choose another with --listen, or --no-listen"
) -> socket.socket:
    """Bind a TCP socket to an address in numbers; `::` is every address, also those of IPv4."""
    every = host == "::"
    if every and not socket.has_dualstack_ipv6():
        every, host = False, "0.0.0.0"  # noqa: S104 - every address, on a kernel without IPv6
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )[0]
        sock = socket.create_server(
            address, family=family, backlog=_BACKLOG, reuse_port=False, dualstack_ipv6=every
        )
        sock.setblocking(False)  # noqa: FBT003
    except OSError as exc:
        raise ConfigError(
            "port-taken",
            f"cannot listen on {host}:{port}: {exc.strerror}",
            hint=f"another program has it; {hint}",
        ) from exc
    return sock


def bind_swarm(host: str, port: int) -> socket.socket:
    """Bind the swarm's listener."""
    return bind_tcp(host, port, hint='choose another with swarm_listen, or "none"')
