"""THE TABLE of routes: method, path, which roles may call, which action the policy decides, how large a body.

Law: a route that is not here does not exist; a caller without one of a route's roles does not enter it; a
route whose `gate` is a policy action is not entered before the policy has allowed that action for the
caller. `{name}` matches one path segment.
"""

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from aiohttp.web_response import StreamResponse

from mycoswarmd.api import control, openai, peers, swarm
from mycoswarmd.api.access import Caller, Who
from mycoswarmd.api.call import Call


class Gate(StrEnum):
    """What the policy decides before the handler runs."""

    OPEN = "open"  # says only what a denied caller may know
    INSIDE = "inside"  # the handler decides, per prompt or per task
    ADMIN = "admin"  # action `admin`
    MEND = "mend"  # action `admin`; the owner also while there is no policy at all
    SOME_TASK = "some-task"  # whoever may post some task
    OWN_TASK = "own-task"  # the task's submitter, or action `admin`
    INVITED = "invited"  # exists only while an invitation is open


Handler = Callable[[Call], Coroutine[None, None, StreamResponse]]

# Longest conversations in practice are a few MB (a 1M-token context is about 4 MB of text).
PROMPT_BODY_BYTES = 8 << 20
# A tar of a workspace; larger ones do not belong in a queue.
BLOB_BODY_BYTES = 256 << 20
_SMALL = 256 << 10
# A greeting has one certificate in it.
_ENROL = 64 << 10
# The hashes that a stranger has, or the statements that a member sends: at most 10,000.
_PULL = 512 << 10
# A member with more to give comes again.
_SYNC = 4 << 20
# An epoch that keeps 10,000 statements, in base64.
_RECOVERY = 2 << 20
# The way of statements between members.
SYNC_PATH = "/swarm/sync"

LOCAL = frozenset({Who.LOCAL})
# What a person does from another machine. Not what would outlive the roster's word on that person: keys,
# invitations, signers and the recovery of the swarm are for somebody at this machine.
PERSON = frozenset({Who.LOCAL, Who.OPERATOR})
PROMPTS = frozenset({Who.LOCAL, Who.PROGRAM, Who.NODE, Who.OPERATOR})
MEMBER = frozenset({Who.NODE, Who.OPERATOR})
NODE = frozenset({Who.NODE})
SIGNER = frozenset({Who.SIGNER})
STRANGER = frozenset({Who.STRANGER})
ANYBODY = frozenset({Who.STRANGER, Who.NODE, Who.OPERATOR})


@dataclass(frozen=True, slots=True)
class Route:
    """One row."""

    method: str
    path: str
    who: frozenset[Who]
    gate: Gate
    body_bytes: int
    handler: Handler

    @property
    def runs_to_its_end(self) -> bool:
        """Tell whether the handler goes on when its caller has gone away; what is in pieces then has no end."""
        is_asked_for = self.method == "GET" or self.path.startswith(("/v1/", "/swarm/enroll/"))
        return not is_asked_for and not self.body_in_pieces

    @property
    def body_in_pieces(self) -> bool:
        """Tell whether the handler reads the body itself, so that it is never in memory."""
        return self.handler is control.put_blob

    @property
    def may_wait_for_people(self) -> bool:
        """Tell whether a rule may have the handler ask a person first."""
        return (self.method, self.path) == ("POST", "/api/tasks")

    @property
    def is_endless(self) -> bool:
        """Tell whether the answer has no end of its own."""
        return self.handler is peers.watch

    @property
    def goes_on(self) -> bool:
        """Tell whether a stranger may send its next request on the same connection."""
        return self.gate is Gate.INVITED


# fmt: off
ROUTES: tuple[Route, ...] = (
    Route("GET",    "/v1/models",                     PROMPTS,  Gate.OPEN,      0,                 openai.models),
    Route("POST",   "/v1/chat/completions",           PROMPTS,  Gate.INSIDE,    PROMPT_BODY_BYTES, openai.chat),
    Route("POST",   "/v1/completions",                PROMPTS,  Gate.INSIDE,    PROMPT_BODY_BYTES, openai.completions),
    Route("POST",   "/v1/embeddings",                 PROMPTS,  Gate.INSIDE,    PROMPT_BODY_BYTES, openai.embeddings),
    Route("GET",    "/v1/security",                   PERSON,   Gate.OPEN,      0,                 control.security),
    Route("GET",    "/api/status",                    PERSON,   Gate.OPEN,      0,                 control.status),
    Route("GET",    "/api/models",                    PERSON,   Gate.OPEN,      0,                 control.models),
    Route("GET",    "/api/doctor",                    PERSON,   Gate.ADMIN,     0,                 control.doctor),
    Route("PUT",    "/api/blobs/{sha256}",            PERSON,   Gate.SOME_TASK, BLOB_BODY_BYTES,   control.put_blob),
    Route("POST",   "/api/tasks",                     PERSON,   Gate.INSIDE,    PROMPT_BODY_BYTES, control.submit),
    Route("GET",    "/api/tasks",                     PERSON,   Gate.INSIDE,    0,                 control.tasks),
    Route("GET",    "/api/tasks/{id}",                PERSON,   Gate.OWN_TASK,  0,                 control.task),
    Route("GET",    "/api/tasks/{id}/events",         PERSON,   Gate.OWN_TASK,  0,                 control.events),
    Route("GET",    "/api/tasks/{id}/changes",        PERSON,   Gate.OWN_TASK,  0,                 control.changes),
    Route("GET",    "/api/tasks/{id}/workspace",      PERSON,   Gate.OWN_TASK,  0,                 control.workspace),
    Route("POST",   "/api/tasks/{id}/cancel",         PERSON,   Gate.OWN_TASK,  _SMALL,            control.cancel),
    Route("POST",   "/api/tasks/{id}/retry",          PERSON,   Gate.OWN_TASK,  _SMALL,            control.retry),
    Route("GET",    "/api/approvals",                 PERSON,   Gate.ADMIN,     0,                 control.approvals),
    Route("POST",   "/api/approvals/{id}",            PERSON,   Gate.INSIDE,    _SMALL,            control.approve),
    Route("GET",    "/api/keys",                      LOCAL,    Gate.ADMIN,     0,                 control.keys),
    Route("POST",   "/api/keys",                      LOCAL,    Gate.ADMIN,     _SMALL,            control.create_key),
    Route("DELETE", "/api/keys/{name}",               LOCAL,    Gate.ADMIN,     0,                 control.revoke_key),
    Route("GET",    "/api/policy",                    PERSON,   Gate.ADMIN,     0,                 control.policy),
    Route("POST",   "/api/policy/explain",            PERSON,   Gate.ADMIN,     _SMALL,            control.explain),
    Route("POST",   "/api/policy/reload",             PERSON,   Gate.MEND,      _SMALL,            control.reload),
    Route("GET",    "/api/receipts",                  PERSON,   Gate.ADMIN,     0,                 control.receipts),
    Route("GET",    "/api/receipts/head",             PERSON,   Gate.ADMIN,     0,                 control.receipts_head),
    Route("POST",   "/api/receipts/verify",           PERSON,   Gate.ADMIN,     _SMALL,            control.receipts_verify),
    Route("GET",    "/api/receipts/{id}",             PERSON,   Gate.ADMIN,     0,                 control.receipt),
    Route("GET",    "/api/backup",                    LOCAL,    Gate.ADMIN,     0,                 swarm.backup),
    Route("GET",    "/api/swarm",                     PERSON,   Gate.OPEN,      0,                 swarm.show),
    Route("GET",    "/api/swarm/nodes/{node}/ping",   PERSON,   Gate.ADMIN,     0,                 swarm.ping),
    Route("POST",   "/api/swarm/init",                LOCAL,    Gate.ADMIN,     _SMALL,            swarm.init),
    Route("POST",   "/api/swarm/invites",             LOCAL,    Gate.ADMIN,     _SMALL,            swarm.invite),
    Route("POST",   "/api/swarm/invites/{invite}",    LOCAL,    Gate.ADMIN,     _SMALL,            swarm.decide),
    Route("DELETE", "/api/swarm/invites/{invite}",    LOCAL,    Gate.ADMIN,     0,                 swarm.cancel_invite),
    Route("POST",   "/api/swarm/enroll",              LOCAL,    Gate.ADMIN,     _SMALL,            swarm.enroll),
    Route("POST",   "/api/swarm/revoke",              LOCAL,    Gate.ADMIN,     _SMALL,            swarm.revoke),
    Route("POST",   "/api/swarm/signers",             LOCAL,    Gate.ADMIN,     _SMALL,            swarm.add_signer),
    Route("DELETE", "/api/swarm/signers/{node}",      LOCAL,    Gate.ADMIN,     0,                 swarm.remove_signer),
    Route("POST",   "/api/swarm/leave",               LOCAL,    Gate.ADMIN,     _SMALL,            swarm.leave),
    Route("POST",   "/api/swarm/rekey",               LOCAL,    Gate.ADMIN,     _SMALL,            swarm.rekey),
    Route("POST",   "/api/swarm/recovery/draft",      LOCAL,    Gate.ADMIN,     _SMALL,            swarm.recovery_draft),
    Route("POST",   "/api/swarm/recovery",            LOCAL,    Gate.ADMIN,     _RECOVERY,         swarm.recover),
    Route("POST",   "/swarm/enroll/hello",            STRANGER, Gate.INVITED,   _ENROL,            peers.hello),
    Route("POST",   "/swarm/enroll/confirm",          STRANGER, Gate.INVITED,   _ENROL,            peers.confirm),
    Route("POST",   "/swarm/pull",                    ANYBODY,  Gate.OPEN,      _PULL,             peers.pull),
    Route("POST",   "/swarm/sync",                    MEMBER,   Gate.OPEN,      _SYNC,             peers.sync),
    Route("GET",    "/swarm/watch",                   NODE,     Gate.OPEN,      0,                 peers.watch),
    Route("GET",    "/swarm/word",                    MEMBER,   Gate.OPEN,      0,                 peers.word),
    Route("POST",   "/swarm/signer-key",              SIGNER,   Gate.OPEN,      _SMALL,            peers.signer_key),
)
# fmt: on


_METHODS = sorted({route.method for route in ROUTES})


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

    def methods(self, path: str, caller: Caller) -> list[str]:
        """List the methods that a path has for a caller, for a 405."""
        found = (self.find(method, path) for method in _METHODS)
        return [row.method for row, _ in filter(None, found) if caller.roles & row.who]


def make_router(routes: Sequence[Route] = ROUTES) -> Router:
    """Index the table."""
    router = Router()
    for route in routes:
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
