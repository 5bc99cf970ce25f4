"""Who is asking: a local user by SO_PEERCRED on the unix socket, a program by its API key on TCP.

Law: who speaks is what the transport proved, never what the request claims. On TCP exactly one `Host`
that names this listener is accepted, the request target must be a path, and anything a browser sends
along (`Origin`, `Sec-Fetch-Site`) is refused, on every listener: no page may drive a node.
Source: unix(7) SO_PEERCRED; RFC 9112 section 3.2.
"""

import grp
import hashlib
import os
import pwd
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from aiohttp.web_request import BaseRequest

from mycoswarmd.core.types import Principal
from mycoswarmd.errors import BadRequest, Unauthenticated
from mycoswarmd.flow.ports import Clock, KeyRow

# Members of this group own the node, as uid 0 and the daemon's own uid do.
OWNER_GROUP = "mycoswarm"
_UCRED = struct.Struct("3i")
# A user's groups may change while the daemon runs; a minute is soon enough and saves a lookup per call.
_GROUPS_KEPT_S = 60


@dataclass(frozen=True, slots=True)
class Listener:
    """One place where the node listens. `hosts` is None on a unix socket."""

    hosts: frozenset[str] | None

    @property
    def is_local(self) -> bool:
        """Tell whether callers are known by SO_PEERCRED."""
        return self.hosts is None


class Doorman:
    """Turns a connection into a Principal."""

    def __init__(self, *, key_of: Callable[[str], KeyRow | None], clock: Clock, own_uid: int) -> None:
        self._key_of = key_of
        self._clock = clock
        self._own_uid = own_uid

    def admit(self, listener: Listener, request: BaseRequest) -> Principal:
        """Name the caller; raise BadRequest for a forged request, Unauthenticated for a stranger."""
        check_browser_marks(request)
        if listener.hosts is None:
            return self._local_user(request)
        check_host(request, listener.hosts)
        return self._program(request)

    def _local_user(self, request: BaseRequest) -> Principal:
        transport = request.transport
        sock = transport.get_extra_info("socket") if transport is not None else None
        if sock is None:
            raise Unauthenticated("no-credentials", "cannot tell who is calling: the connection is gone")
        pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if pid == os.getpid():
            # An engine that puts a link to our socket in place of its own would have us ask ourselves,
            # and be the owner.
            raise Unauthenticated("own-call", "cannot answer this node's own call")
        user, groups = _user_and_groups(uid, gid, int(self._clock.monotonic_s()) // _GROUPS_KEPT_S)
        is_owner = uid in {0, self._own_uid} or OWNER_GROUP in groups
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
    if not request.path_qs.startswith("/"):
        raise BadRequest("bad-target", "cannot serve a request whose target is not a path")


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
