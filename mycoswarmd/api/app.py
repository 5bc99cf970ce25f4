"""The HTTP server: admits, finds the route, asks the policy, bounds the body, turns errors into answers.

Law: in this order and for every request: who (access.py), which route, is it for this listener, does
the policy allow its action, and only then the body. Unknown paths are refused after authentication,
so a stranger learns nothing.
"""

import asyncio
import contextlib
import inspect
import logging
import os
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from aiohttp import web
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import Response, StreamResponse

from mycoswarmd.api.access import Doorman, Listener
from mycoswarmd.api.call import Call
from mycoswarmd.api.routes import Gate, Knock, Route, make_router
from mycoswarmd.api.services import Services
from mycoswarmd.core.policy.evaluate import Permit, evaluate
from mycoswarmd.core.types import Action, Principal, Request, TaskId
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
_SILENT = logging.getLogger("mycoswarmd.silent")
_SILENT.disabled = True

# A client that sends its body slower than this holds a connection for nothing.
_BODY_S = 60.0
# The OpenAI client keeps connections for a long time; an idle one costs a few KB.
_KEEPALIVE_S = 75.0
_STOP_S = 5.0
# Bodies above this are held in memory by few callers at a time.
_LARGE_BYTES = 16 << 20
_LARGE_AT_ONCE = 2


class Api:
    """Serves one set of services on any number of listeners."""

    def __init__(self, services: Services, doorman: Doorman) -> None:
        self._services = services
        self._doorman = doorman
        self._router = make_router()
        self._large = asyncio.Semaphore(_LARGE_AT_ONCE)
        self._begun = asyncio.TaskGroup()

    @asynccontextmanager
    async def begun(self) -> AsyncIterator[None]:
        """Needed around the listeners; ends when everything that was begun has ended."""
        async with self._begun:
            yield

    @asynccontextmanager
    async def listening(self, sock: socket.socket, listener: Listener) -> AsyncIterator[None]:
        """Serve on a bound socket while the context lasts."""
        runner = web.ServerRunner(self._server(listener), shutdown_timeout=_STOP_S)
        await runner.setup()
        try:
            await web.SockSite(runner, sock, backlog=256).start()
            yield
        finally:
            await runner.cleanup()

    def _server(self, listener: Listener) -> web.Server:
        async def handle(request: BaseRequest) -> StreamResponse:
            return await self._handle(listener, request)

        options: dict[str, object] = {
            "access_log": None,
            "keepalive_timeout": _KEEPALIVE_S,
            "tcp_keepalive": True,
            # Its messages quote bytes of requests, and those may be prompts.
            "logger": _SILENT,
            # A compressed body would be inflated before anybody knows who sent it.
            "auto_decompress": False,
        }
        # Without this a client that goes away does not stop the engine's work. aiohttp's own test
        # server sets it where production does not, so our tests run this very class.
        if "handler_cancellation" in inspect.signature(web.Server.__init__).parameters:
            options["handler_cancellation"] = True
        return web.Server(handle, **options)  # type: ignore[arg-type]

    async def _handle(self, listener: Listener, request: BaseRequest) -> StreamResponse:
        return await _answered(self._serve(listener, request))

    async def _serve(self, listener: Listener, request: BaseRequest) -> StreamResponse:
        principal = self._doorman.admit(listener, request)
        found = self._router.find(request.method, request.path)
        if found is None or (found[0].knock is Knock.LOCAL and not listener.is_local):
            raise self._no_route(listener, request)
        route, names = found
        await self._pass_gate(route, names, principal)
        async with self._large if route.body_bytes > _LARGE_BYTES else contextlib.nullcontext():
            body = await _read_body(request, route.body_bytes)
            call = Call(request, principal, self._services, names, body)
            if route.runs_to_its_end:
                # What changes something is not left half done when its caller goes away.
                return await asyncio.shield(self._begun.create_task(_answered(route.handler(call))))
            return await route.handler(call)

    def _no_route(self, listener: Listener, request: BaseRequest) -> MycoswarmError:
        if methods := self._router.methods(request.path, is_local=listener.is_local):
            return BadRequest(
                "method-not-allowed",
                f"cannot {request.method[:20]} this path",
                hint=f"it takes {', '.join(methods)}",
                http_status=405,
            )
        return NotFound("no-such-route", "cannot find this path", hint="/v1/models is a good start")

    def _may_post_something(self, principal: Principal) -> None:
        """Raise Denied for someone whom the policy lets post no task at all."""
        policy = self._services.policy.policy
        known = self._services.prompts.here_and_now(Request(action=Action.TASK, principal=principal))
        outcomes = [
            evaluate(policy, replace(known, agent=agent, label=label))
            for agent in (policy.agents if policy is not None else ())
            for label in (policy.labels.order if policy is not None else ())
        ]
        if all(isinstance(outcome, Denied) for outcome in outcomes):
            raise Denied("policy-denied", "cannot store a workspace for someone who may post no task")

    async def _pass_gate(self, route: Route, names: dict[str, str], principal: Principal) -> None:
        if route.gate in {Gate.OPEN, Gate.INSIDE}:
            return
        if route.gate is Gate.SOME_TASK:
            self._may_post_something(principal)
            return
        if route.gate is Gate.OWN_TASK:
            task = await self._services.task_store.get(TaskId(names["id"]))
            if task.spec.submitter.describe() == principal.describe():
                return
        outcome = evaluate(
            self._services.policy.policy,
            self._services.prompts.here_and_now(Request(action=Action.ADMIN, principal=principal)),
        )
        if isinstance(outcome, Permit):
            return
        if isinstance(outcome, Denied):
            raise outcome
        raise Denied(
            "not-approved",
            f"cannot administer this node: rule {outcome.rule!r} wants a person's approval for it",
            rule=outcome.rule,
            where=outcome.where,
            hint="give action admin to an origin with an allow rule",
        )


async def _answered(answer: Coroutine[None, None, StreamResponse]) -> StreamResponse:
    """Turn what goes wrong into an answer."""
    try:
        return await answer
    except MycoswarmError as exc:
        return _refusal(exc)
    except ConnectionError:  # the client is gone; there is nobody to tell
        return Response(status=499)
    except Exception:
        # A bug of ours: the log gets the traceback, the person gets neither it nor a hang.
        log.exception("a request failed")
        return _refusal(MycoswarmError("internal-error", "cannot answer: an internal error, see the log"))


async def _read_body(request: BaseRequest, at_most_bytes: int) -> bytes:
    """Read the body within the route's bound; refuse a larger one before reading it where it says so."""
    if not request.body_exists:
        return b""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise BadRequest("compressed-body", "cannot read a compressed body: send it plain", http_status=415)
    length = request.content_length
    if length is not None and length > at_most_bytes:
        raise _too_large(at_most_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for piece in request.content.iter_any():
                body += piece
                if len(body) > at_most_bytes:
                    raise _too_large(at_most_bytes)
    except web.RequestPayloadError:
        raise BadRequest("bad-body", "cannot read the request: its body is malformed") from None
    except TimeoutError as exc:
        raise BadRequest(
            "slow-body", f"cannot read the request: no end after {_BODY_S:.0f} s", http_status=408
        ) from exc
    return bytes(body)


def _too_large(at_most_bytes: int) -> BadRequest:
    return BadRequest(
        "too-large",
        f"cannot take a body of more than {at_most_bytes} bytes here",
        http_status=413,
    )


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
    if exc.http_status in {408, 413}:
        response.force_close()  # the rest of the body is not worth reading
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


def bind_tcp(host: str, port: int) -> socket.socket:
    """Bind a loopback TCP socket."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host, port), family=family, reuse_port=False)
        sock.setblocking(False)  # noqa: FBT003
    except OSError as exc:
        raise ConfigError(
            "port-taken",
            f"cannot listen on {host}:{port}: {exc.strerror}",
            hint="another program has it; choose another with --listen, or --no-listen",
        ) from exc
    return sock
