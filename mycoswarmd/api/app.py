"""The HTTP server: admits, finds the route, asks the policy, bounds the body, turns errors into answers.

Law: in this order and for every request: who, in which roles (access.py), which route, is it for such a
caller, does the policy allow its action, and only then the body. Unknown paths are refused after
authentication; to a stranger at the swarm's listener everything but its own few routes is unknown.
"""

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from weakref import WeakValueDictionary

from aiohttp import web
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import Response, StreamResponse

from mycoswarmd.api.access import Caller, Door, Doorman, Listener, Who, role_needed, share_of, with_way_out
from mycoswarmd.api.answer import last, refusal, send
from mycoswarmd.api.bind import BACKLOG
from mycoswarmd.api.body import BODY_S, check_head, check_parts, pieces_of, read_body
from mycoswarmd.api.call import ROSTER_HEADER, Call
from mycoswarmd.api.lines import KEEPALIVE_S, Bounds, Line, Lines, LineServer
from mycoswarmd.api.porch import Buckets, Rate, source_of
from mycoswarmd.api.room import BodyRoom, Keep, Size
from mycoswarmd.api.routes import ROUTES, SYNC_PATH, Gate, Route, make_router
from mycoswarmd.api.services import Services
from mycoswarmd.core.policy.evaluate import Permit, evaluate
from mycoswarmd.core.types import Action, Request, TaskId
from mycoswarmd.errors import BadRequest, Denied, MycoswarmError, NotFound, Unavailable

log = logging.getLogger(__name__)

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
# How many tasks are being posted, which may have to wait for a person, whether or not their callers are still
# there: no bound of connections counts those.
_POSTED = Size(64, 256)
# JSON is parsed without letting any other task run.
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
        self._rooms = {kind: BodyRoom(size, patience_s=BODY_S) for kind, size in _ROOMS.items()}
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
                response = await self._serve_peer(line, request)
                return await send(line, request, response, self._answers[line.kind])
            line.allow(None)
            response = await _answered(self._serve(listener, line, request))
            response = await send(line, request, response, self._answers[line.kind])
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
                await web.SockSite(runner, sock, backlog=BACKLOG).start()
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
        sock.listen(BACKLOG)
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
            return last(refusal(exc))
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
            response: StreamResponse = refusal(
                Unavailable("too-many-requests", "cannot answer strangers so often", http_status=429)
            )
        elif route is None:
            response = refusal(NotFound("no-such-route", "cannot find this path"))
        else:
            response = await _answered(self._enter(route, {}, caller, request, line=line))
            if route.goes_on and response.keep_alive is not False:
                line.allow(self._bounds.patience_s)
                return response
            line.allow(_ANSWER_S)
            return last(response)
        return last(response)

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
            check_head(request, route.body_bytes)
            pieces = pieces_of(request, route.body_bytes)
        elif request.body_exists:

            def take_room(size_bytes: int) -> Awaitable[Keep]:
                room = self._rooms[self._kind_of(caller)]
                return held.enter_async_context(room.taken(share_of(caller.principal), size_bytes))

            body = await read_body(request, route.body_bytes, take_room)
            if line is not None:
                check_parts(body, _PARTS_OF_STRANGER)
            elif roster and route.gate is not Gate.INSIDE:
                check_parts(body, _PARTS_OF_MEMBER)
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
        return refusal(exc if asker is None else with_way_out(exc, asker))
    except ConnectionError:  # the client is gone; there is nobody to tell
        return Response(status=499)
    except Exception:
        # A bug of ours: the log gets the traceback, the person gets neither it nor a hang.
        log.exception("a request failed")
        return refusal(MycoswarmError("internal-error", "cannot answer: an internal error, see the log"))


async def _to_its_end(
    held: contextlib.AsyncExitStack, route: Route, call: Call, caller: Caller
) -> StreamResponse:
    """Answer, and give back what is held for the body only then, whoever went away meanwhile."""
    async with held:
        return await _answered(route.handler(call), caller)
