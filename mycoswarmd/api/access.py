"""Who is asking: a local user by SO_PEERCRED, a program by its API key, a member of the swarm by its key.

Law: who speaks, and in which role, is what the transport proved, never what the request claims. A member's
roles are read in the roster again on every request, so that one who was put out has none. On TCP exactly
one `Host` that names this listener is accepted, the request target must be a path, and anything a browser
sends along (`Origin`, `Sec-Fetch-Site`) is refused, on every listener: no page may drive a node.
Source: unix(7) SO_PEERCRED; RFC 9112 section 3.2; docs/wire.md.
"""

import asyncio
import grp
import hashlib
import os
import pwd
import re
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from aiohttp.web_request import BaseRequest

from mycoswarmd.core.policy.evaluate import DEFAULT_DENY
from mycoswarmd.core.roster import Member
from mycoswarmd.core.types import Principal, Role, Start
from mycoswarmd.errors import BadRequest, Denied, MycoswarmError, Unauthenticated
from mycoswarmd.flow.ports import Clock, KeyRow

# Members of this group own the node, as uid 0 and the daemon's own uid do.
OWNER_GROUP = "mycoswarm"
_UCRED = struct.Struct("3i")
# A user's groups may change while the daemon runs; a minute is soon enough and saves a lookup per call.
_GROUPS_KEPT_S = 60
# What may stand in the Host of somebody who does not know yet whom it is talking to.
_ANY_HOST = re.compile(rb"[A-Za-z0-9.\-_\[\]:%]{1,255}")
_PORT = re.compile(r":[0-9]{1,5}\Z")
_ROSTER_NAMES = ".mycoswarm.internal"


class Who(StrEnum):
    """The roles that a route may be open to. Who is node, operator or signer says the roster alone."""

    LOCAL = "local"  # the unix socket: everybody with an account here
    PROGRAM = "program"  # has an API key
    NODE = "node"  # a live member that computes
    OPERATOR = "operator"  # a live member that is a person's key
    SIGNER = "signer"  # a node whose signatures count
    STRANGER = "stranger"  # came to the swarm's listener and proved nothing


_LOCAL = frozenset({Who.LOCAL})
_PROGRAM = frozenset({Who.PROGRAM})
_STRANGER = frozenset({Who.STRANGER})
_NODE = frozenset({Who.NODE})
_SIGNER = frozenset({Who.NODE, Who.SIGNER})
_OPERATOR = frozenset({Who.OPERATOR})
_NOBODY = Principal()


class Door(StrEnum):
    """The kinds of listeners."""

    UNIX = "unix"  # callers are known by SO_PEERCRED
    TCP = "tcp"  # by an API key
    SWARM = "swarm"  # by the key that they proved in TLS


@dataclass(frozen=True, slots=True)
class Listener:
    """One place where the node listens. `hosts` are the names of a TCP listener."""

    hosts: frozenset[str] | None = None
    door: Door = Door.UNIX

    def __post_init__(self) -> None:
        if self.hosts is not None:
            object.__setattr__(self, "door", Door.TCP)


SWARM_LISTENER = Listener(door=Door.SWARM)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is asking, in which roles, and whether from this machine or another."""

    principal: Principal
    roles: frozenset[Who]
    start: Start = Start.LOCAL

    @property
    def is_stranger(self) -> bool:
        """Tell whether nothing at all was proved."""
        return self.roles is _STRANGER


@dataclass(frozen=True, slots=True, kw_only=True)
class RosterBook:
    """What the roster says of keys, asked anew on every request.

    Attributes:
        read_id: the id of the key in a certificate; BadRequest for what is no certificate of ours.
        member_of: the live member with an id, or None.
        self_id: this node's own id, once it has one.
    """

    read_id: Callable[[bytes], str]
    member_of: Callable[[str], Member | None]
    self_id: Callable[[], str | None]


class Doorman:
    """Turns a connection into a Caller."""

    def __init__(
        self,
        *,
        key_of: Callable[[str], KeyRow | None],
        clock: Clock,
        own_uid: int,
        book: RosterBook | None = None,
    ) -> None:
        self._key_of = key_of
        self._clock = clock
        self.own_uid = own_uid
        self.book = book

    def admit(self, listener: Listener, request: BaseRequest) -> Caller:
        """Name the caller; raise BadRequest for a forged request, Unauthenticated for an unknown one."""
        check_browser_marks(request)
        if listener.hosts is None:
            return Caller(self._local_user(request), _LOCAL)
        check_host(request, listener.hosts)
        return Caller(self._program(request), _PROGRAM)

    def admit_peer(self, node_id: str | None, request: BaseRequest) -> Caller:
        """Name who is at the other end of a connection on which the key of `node_id`, or none, was proved."""
        check_browser_marks(request)
        check_target(request)
        book = self.book
        assert book is not None  # nobody is admitted here without
        own_id = book.self_id()
        host = single_host(request)
        if node_id is None:
            if not _ANY_HOST.fullmatch(host):
                raise _bad_host(f"{own_id}{_ROSTER_NAMES}")
            return Caller(_NOBODY, _STRANGER)
        if _PORT.sub("", host.decode("latin-1").lower()) != f"{own_id}{_ROSTER_NAMES}":
            raise _bad_host(f"{own_id}{_ROSTER_NAMES}")
        if node_id == own_id:
            raise Unauthenticated(
                "own-call", "cannot answer this node's own key: it was copied, or we called us"
            )
        member = book.member_of(node_id)
        if member is None:
            raise Unauthenticated(
                "not-a-member",
                "cannot answer this key: it is not in the swarm, or it was put out",
                hint="mycoswarmctl nodes, on another node, shows who is",
            )
        if member.role is Role.OPERATOR:
            return Caller(Principal(is_owner=True, operator=member.name, operator_id=member.id), _OPERATOR)
        principal = Principal(node=member.name, node_id=member.id)
        return Caller(principal, _SIGNER if member.is_signer else _NODE, Start.PEER)

    def _local_user(self, request: BaseRequest) -> Principal:
        transport = request.transport
        sock = transport.get_extra_info("socket") if transport is not None else None
        if sock is None:
            raise Unauthenticated("no-credentials", "cannot tell who is calling: the connection is gone")
        pid, uid, gid = _credentials(sock)
        if pid == os.getpid():
            # An engine that puts a link to our socket in place of its own would have us ask ourselves,
            # and be the owner.
            raise Unauthenticated("own-call", "cannot answer this node's own call")
        return self._account(uid, gid)

    def account_of(self, transport: asyncio.BaseTransport) -> Principal:
        """Name the account whose process is at the other end of a unix socket."""
        _, uid, gid = _credentials(transport.get_extra_info("socket"))
        return self._account(uid, gid)

    def _account(self, uid: int, gid: int) -> Principal:
        user, groups = _user_and_groups(uid, gid, int(self._clock.monotonic_s()) // _GROUPS_KEPT_S)
        is_owner = uid in {0, self.own_uid} or OWNER_GROUP in groups
        return Principal(is_owner=is_owner, uid=uid, user=user, groups=groups)

    def _program(self, request: BaseRequest) -> Principal:
        values = request.headers.getall("Authorization", [])
        if len(values) != 1 or not values[0].startswith("Bearer "):
            raise Unauthenticated(
                "no-credentials",
                "cannot answer without an API key",
                hint="mycoswarmctl keys create NAME makes one; send it as Authorization: Bearer KEY",
            )
        untrusted_secret = values[0].removeprefix("Bearer ").strip()
        row = self._key_of(hashlib.sha256(untrusted_secret.encode("utf-8", "replace")).hexdigest())
        if row is None:
            raise Unauthenticated(
                "bad-key",
                "cannot accept this API key: it is unknown or revoked",
                hint="mycoswarmctl keys list",
            )
        return Principal(key=row.name)


def with_way_out(exc: MycoswarmError, caller: Caller) -> MycoswarmError:
    """Tell a local user whom no rule knows how the machine's owner becomes the node's."""
    principal = caller.principal
    is_nobodys = isinstance(exc, Denied) and exc.code == "policy-denied" and exc.rule in {"", DEFAULT_DENY}
    if is_nobodys and not exc.hint and principal.user is not None and not principal.is_owner:
        joining = f"sudo usermod -aG {OWNER_GROUP} {principal.user}"
        exc.hint = f"if this machine is yours: use sudo; or {joining}, which counts within a minute"
    return exc


def share_of(principal: Principal) -> str:
    """Name whose part of what there is somebody takes: accounts without a name have one together.

    One account may have 65,536 of those (subuid(5)).
    """
    is_nameless = principal.uid is not None and principal.user is None and not principal.is_owner
    return "accounts without a name" if is_nameless else principal.describe()


def _credentials(sock: socket.socket) -> tuple[int, int, int]:
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid, gid


def role_needed(caller: Caller, who: frozenset[Who]) -> Denied:
    """Make the refusal of a caller that has none of these roles."""
    needed = " or ".join(role.value for role in Who if role in who)
    return Denied(
        "role-needed",
        f"cannot do this as {' and '.join(sorted(caller.roles))}: it needs role {needed}",
        hint="run mycoswarmctl on that machine itself" if Who.LOCAL in who else "",
    )


def check_browser_marks(request: BaseRequest) -> None:
    """Refuse whatever a browser's page sent."""
    for mark in ("Origin", "Sec-Fetch-Site"):
        if mark in request.headers:
            raise BadRequest(
                "browser-refused",
                f"cannot serve a web page: the request carries {mark}",
                http_status=403,
            )


def check_host(request: BaseRequest, hosts: frozenset[str]) -> None:
    """Accept exactly one Host that names this listener, and a request target that is a path."""
    raw = [value for name, value in request.raw_headers if name.lower() == b"host"]
    if len(raw) != 1 or raw[0].decode("latin-1").lower() not in hosts:
        raise BadRequest(
            "bad-host",
            f"cannot serve a request with {len(raw)} Host headers or one that is not this listener's",
            hint=f"use http://{min(hosts)}",
        )
    check_target(request)


def check_target(request: BaseRequest) -> None:
    """Refuse a request target that is not a path: a whole URL would name another host than Host does."""
    if not request.raw_path.startswith("/"):
        raise BadRequest("bad-target", "cannot serve a request whose target is not a path")


def single_host(request: BaseRequest) -> bytes:
    """Return the one Host of a request."""
    raw = [value for name, value in request.raw_headers if name.lower() == b"host"]
    if len(raw) != 1:
        raise BadRequest("bad-host", f"cannot serve a request with {len(raw)} Host headers")
    return raw[0]


def _bad_host(name: str) -> BadRequest:
    return BadRequest(
        "bad-host",
        "cannot serve a request with a Host that is not this node's",
        hint=f"the name of this node is {name}",
    )


@lru_cache(maxsize=256)
def _user_and_groups(uid: int, gid: int, minute: int) -> tuple[str | None, frozenset[str]]:
    del minute  # part of the cache's key only
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        return None, _group_names([gid])
    return user, _group_names(os.getgrouplist(user, gid))


def _group_names(gids: list[int]) -> frozenset[str]:
    names = set()
    for gid in gids:
        try:
            names.add(grp.getgrgid(gid).gr_name)
        except KeyError:
            continue
    return frozenset(names)
