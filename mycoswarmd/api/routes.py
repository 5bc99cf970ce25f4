"""THE TABLE of routes: method, path, who may knock, which action the policy decides, how large a body.

Law: a route that is not here does not exist; a route whose `gate` is a policy action is not entered
before the policy has allowed that action for the caller. `{name}` matches one path segment.
"""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from enum import StrEnum

from aiohttp.web_response import StreamResponse

from mycoswarmd.api import control, openai
from mycoswarmd.api.call import Call


class Knock(StrEnum):
    """Which listeners serve a route."""

    LOCAL = "local"  # the unix socket: everybody with an account here
    ANY = "any"  # also programs with an API key


class Gate(StrEnum):
    """What the policy decides before the handler runs."""

    OPEN = "open"  # says only what a denied caller may know
    INSIDE = "inside"  # the handler decides, per prompt or per task
    ADMIN = "admin"  # action `admin`
    SOME_TASK = "some-task"  # whoever may post some task
    OWN_TASK = "own-task"  # the task's submitter, or action `admin`


Handler = Callable[[Call], Coroutine[None, None, StreamResponse]]

# Longest conversations in practice are a few MB (a 1M-token context is about 4 MB of text).
PROMPT_BODY_BYTES = 8 << 20
# A tar of a workspace; larger ones do not belong in a queue.
BLOB_BODY_BYTES = 256 << 20
_SMALL = 256 << 10


@dataclass(frozen=True, slots=True)
class Route:
    """One row."""

    method: str
    path: str
    knock: Knock
    gate: Gate
    body_bytes: int
    handler: Handler

    @property
    def runs_to_its_end(self) -> bool:
        """Tell whether the handler goes on when its caller has gone away."""
        return self.method != "GET" and self.knock is Knock.LOCAL


# fmt: off
ROUTES: tuple[Route, ...] = (
    Route("GET",    "/v1/models",                   Knock.ANY,   Gate.OPEN,     0,                 openai.models),
    Route("POST",   "/v1/chat/completions",         Knock.ANY,   Gate.INSIDE,   PROMPT_BODY_BYTES, openai.chat),
    Route("POST",   "/v1/completions",              Knock.ANY,   Gate.INSIDE,   PROMPT_BODY_BYTES, openai.completions),
    Route("POST",   "/v1/embeddings",               Knock.ANY,   Gate.INSIDE,   PROMPT_BODY_BYTES, openai.embeddings),
    Route("GET",    "/api/status",                  Knock.LOCAL, Gate.OPEN,     0,                 control.status),
    Route("GET",    "/api/models",                  Knock.LOCAL, Gate.OPEN,     0,                 control.models),
    Route("GET",    "/api/doctor",                  Knock.LOCAL, Gate.ADMIN,    0,                 control.doctor),
    Route("PUT",    "/api/blobs/{sha256}",          Knock.LOCAL, Gate.SOME_TASK, BLOB_BODY_BYTES,   control.put_blob),
    Route("POST",   "/api/tasks",                   Knock.LOCAL, Gate.INSIDE,   PROMPT_BODY_BYTES, control.submit),
    Route("GET",    "/api/tasks",                   Knock.LOCAL, Gate.INSIDE,   0,                 control.tasks),
    Route("GET",    "/api/tasks/{id}",              Knock.LOCAL, Gate.OWN_TASK, 0,                 control.task),
    Route("GET",    "/api/tasks/{id}/events",       Knock.LOCAL, Gate.OWN_TASK, 0,                 control.events),
    Route("GET",    "/api/tasks/{id}/changes",      Knock.LOCAL, Gate.OWN_TASK, 0,                 control.changes),
    Route("GET",    "/api/tasks/{id}/workspace",    Knock.LOCAL, Gate.OWN_TASK, 0,                 control.workspace),
    Route("POST",   "/api/tasks/{id}/cancel",       Knock.LOCAL, Gate.OWN_TASK, _SMALL,            control.cancel),
    Route("POST",   "/api/tasks/{id}/retry",        Knock.LOCAL, Gate.OWN_TASK, _SMALL,            control.retry),
    Route("GET",    "/api/approvals",               Knock.LOCAL, Gate.ADMIN,    0,                 control.approvals),
    Route("POST",   "/api/approvals/{id}",          Knock.LOCAL, Gate.INSIDE,   _SMALL,            control.approve),
    Route("GET",    "/api/keys",                    Knock.LOCAL, Gate.ADMIN,    0,                 control.keys),
    Route("POST",   "/api/keys",                    Knock.LOCAL, Gate.ADMIN,    _SMALL,            control.create_key),
    Route("DELETE", "/api/keys/{name}",             Knock.LOCAL, Gate.ADMIN,    0,                 control.revoke_key),
    Route("GET",    "/api/policy",                  Knock.LOCAL, Gate.ADMIN,    0,                 control.policy),
    Route("POST",   "/api/policy/explain",          Knock.LOCAL, Gate.ADMIN,    _SMALL,            control.explain),
    Route("POST",   "/api/policy/reload",           Knock.LOCAL, Gate.ADMIN,    _SMALL,            control.reload),
    Route("GET",    "/api/receipts",                Knock.LOCAL, Gate.ADMIN,    0,                 control.receipts),
    Route("GET",    "/api/receipts/head",           Knock.LOCAL, Gate.ADMIN,    0,                 control.receipts_head),
    Route("POST",   "/api/receipts/verify",         Knock.LOCAL, Gate.ADMIN,    _SMALL,            control.receipts_verify),
    Route("GET",    "/api/receipts/{id}",           Knock.LOCAL, Gate.ADMIN,    0,                 control.receipt),
)
# fmt: on


@dataclass(slots=True)
class Router:
    """Finds a route by method and path."""

    exact: dict[tuple[str, str], Route] = field(default_factory=dict)
    patterns: list[tuple[tuple[str, ...], Route]] = field(default_factory=list)

    def find(self, method: str, path: str) -> tuple[Route, dict[str, str]] | None:
        """Return the route and what its braces matched, or None."""
        if (route := self.exact.get((method, path))) is not None:
            return route, {}
        parts = tuple(path.split("/"))
        for pattern, route in self.patterns:
            if route.method == method and (found := _match(pattern, parts)) is not None:
                return route, found
        return None

    def methods(self, path: str, *, is_local: bool) -> list[str]:
        """List the methods that a path has on a listener, for a 405."""
        found = (self.find(method, path) for method in sorted({route.method for route in ROUTES}))
        return [row.method for row, _ in filter(None, found) if is_local or row.knock is Knock.ANY]


def make_router() -> Router:
    """Index the table."""
    router = Router()
    for route in ROUTES:
        if "{" in route.path:
            router.patterns.append((tuple(route.path.split("/")), route))
        else:
            router.exact[route.method, route.path] = route
    return router


def _match(pattern: tuple[str, ...], parts: tuple[str, ...]) -> dict[str, str] | None:
    if len(pattern) != len(parts):
        return None
    found = {}
    for want, have in zip(pattern, parts, strict=True):
        if want.startswith("{"):
            if not have:
                return None
            found[want.strip("{}")] = have
        elif want != have:
            return None
    return found
