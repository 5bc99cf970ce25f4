"""HTTP/1.1 to a member of the swarm, as an operator: TLS 1.3, each side known by its key.

Laws:

1. Nothing is sent before the other side has proved the key that the operator's roster has for it. An
   address, a name or an announcement only says where to try.
2. A roster that turns out to be old is brought up to date and verified; a member that is out is not spoken
   to again.
3. Only an answer says that the other side accepts us: in TLS 1.3 a handshake ends before it has judged.

Source: docs/wire.md.
"""

import contextlib
import http.client
import json
import re
import select
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Self

from mycoswarmd.core.roster import MAX_PULL_HASHES, Member, portions
from mycoswarmd.ctl import finding, operators
from mycoswarmd.ctl.finding import Address
from mycoswarmd.ctl.refusals import Doc, refusal
from mycoswarmd.ctl.unixhttp import HttpAnswer, exchange
from mycoswarmd.errors import (
    LocalProtocolError,
    MycoswarmError,
    NotFound,
    Unauthenticated,
    Unreachable,
)
from mycoswarmd.trust.certificate import server_name
from mycoswarmd.trust.tlsctx import knock_context

_CONNECT_S = 3.0
_SHORT_S = 10.0
_MAX_ANSWER_BYTES = 32 << 20
_ROSTER_HEADER = "x-mycoswarm-roster"
_IS_JSON = {"Content-Type": "application/json"}
_STRANGER = server_name("stranger")
_NOT_HEARD = "it may not have heard of your admission yet: try again, or ask another node"
# How OpenSSL names the alerts of a server that does not want our certificate.
_REFUSED = re.compile(r"ALERT_(?:UNKNOWN_CA|ACCESS_DENIED|DECRYPT_ERROR|[A-Z_]*CERTIFICATE[A-Z_]*)")


class TlsConnection(http.client.HTTPConnection):
    """One connection, on which the other side proved what the context asks for."""

    def __init__(self, address: Address, context: ssl.SSLContext, name: str, timeout_s: float | None) -> None:
        super().__init__(name, address[1], timeout=timeout_s)
        self._address = address
        self._context = context
        self._name = name
        self._timeout_s = timeout_s
        self.cert_der = b""

    def connect(self) -> None:
        """Connect and shake hands; OSError (of which ssl.SSLError is one) when that fails."""
        plain = socket.create_connection(self._address, _CONNECT_S)
        try:
            plain.settimeout(_SHORT_S)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tls = self._context.wrap_socket(plain, server_hostname=self._name)
        except BaseException:
            plain.close()
            raise
        self.cert_der = tls.getpeercert(binary_form=True) or b""
        tls.settimeout(self._timeout_s)
        self.sock = tls

    def is_quiet(self) -> bool:
        """Tell whether it is open and nothing has come: neither an end, nor what nobody asked for."""
        if not isinstance(self.sock, ssl.SSLSocket):
            return False
        return not self.sock.pending() and not select.select([self.sock], [], [], 0)[0]

    def putrequest(self, *args: object, **kwargs: object) -> None:
        """Begin a request; never on a second connection, whose other side nobody has looked at."""
        if self.sock is None:
            raise http.client.NotConnected
        super().putrequest(*args, **kwargs)  # type: ignore[arg-type]


class Stranger:
    """A connection to somebody unproved, for enrolment and for pulling a roster. Nothing secret goes here."""

    def __init__(self, address: Address, timeout_s: float = _SHORT_S) -> None:
        self.address = address
        self._connection = TlsConnection(address, knock_context(), _STRANGER, timeout_s)

    def __enter__(self) -> Self:
        try:
            self._connection.connect()
        except OSError as exc:
            self._connection.close()
            raise not_reached(finding.show(self.address), exc) from exc
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    @property
    def cert_der(self) -> bytes:
        """The certificate that the other side presented, and signed the handshake with."""
        return self._connection.cert_der

    def post(self, path: str, body: Mapping[str, object]) -> Doc:
        """Send and return JSON, on this one connection."""
        where = finding.show(self.address)
        try:
            self._connection.request("POST", path, json.dumps(body).encode(), dict(_IS_JSON))
            with self._connection.getresponse() as response:
                answer = HttpAnswer(response)
                untrusted = answer.body(_MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException, EOFError) as exc:
            raise not_reached(where, exc) from exc
        if answer.status >= 400:
            raise refusal(answer.status, untrusted)
        return _document(untrusted)


@dataclass(slots=True)
class _Tried:
    """What was tried, for the message when nothing worked."""

    problems: list[MycoswarmError] = field(default_factory=list)

    def add(self, problem: MycoswarmError) -> None:
        """Note a failure; a wrong key says more than an address where nobody is."""
        if isinstance(problem, Unauthenticated):
            self.problems.insert(0, problem)
        else:
            self.problems.append(problem)


class Remote:
    """The way to one node of the swarm, as an operator; ctl/client.py's Transport."""

    def __init__(self, own: operators.Operator, where: str, say: Callable[[str], None]) -> None:
        self._own = own
        self._where = where
        self._say = say
        self._at: tuple[str, Address] | None = None
        self._kept: tuple[Member, Address, TlsConnection] | None = None
        self._has_said = False

    @contextlib.contextmanager
    def open(
        self,
        method: str,
        target: str,
        body: bytes | None,
        headers: Mapping[str, str],
        *,
        timeout_s: float | None,
        on_wait: Callable[[], None] | None = None,
    ) -> Iterator[HttpAnswer]:
        """Send a request to the node and hold its answer; the roster is brought up to date afterwards."""
        self._own.check()
        # Only reading is asked for on a connection that was kept: it may be asked for again.
        kept = self._take_kept(timeout_s) if method == "GET" else None
        member, address, connection = kept or self._connect(timeout_s)
        heard: list[str] = []

        def ask() -> AbstractContextManager[HttpAnswer]:
            return exchange(
                connection,
                method,
                target,
                body,
                headers,
                who=f"node {member.name}",
                on_wait=on_wait,
                on_head=lambda head: heard.append(head.get(_ROSTER_HEADER, "")),
                keeps=True,
            )

        try:
            with contextlib.ExitStack() as stack:
                try:
                    answer = stack.enter_context(ask())
                except Unreachable as exc:
                    if kept is None or exc.code != "connection-lost":
                        raise
                    member, address, connection = self._connect(timeout_s)  # it had ended
                    answer = stack.enter_context(ask())
                self._name(member)
                yield answer
        except Unreachable as exc:
            self._pull(address)  # whoever has been put out is cut off, also in the middle
            self._own.check()
            if isinstance(exc.__cause__, ssl.SSLError) and _REFUSED.search(str(exc.__cause__)):
                raise self._not_accepted(member) from exc
            if not heard:  # its alert is easily lost behind the end of the connection
                exc.hint = f"is it restarting? {_NOT_HEARD}"
            raise
        except Unauthenticated:
            self._pull(address)
            self._own.check()
            raise
        except MycoswarmError as exc:
            self._keep_up(heard, member, address)
            if isinstance(exc, NotFound) and not self._where:
                asked = f"{member.name} was asked; --node NAME asks another"
                exc.hint = f"{asked}; {exc.hint}" if exc.hint else asked
            raise
        self.close()
        self._kept = (member, address, connection)
        self._keep_up(heard, member, address)

    def close(self) -> None:
        """End the connection that was kept. Idempotent."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept[2].close()

    def post(self, path: str, body: Mapping[str, object]) -> Doc:
        """Send and return JSON on a connection of its own, without looking at the roster."""
        member, _, connection = self._connect(_SHORT_S)
        return _ask(connection, member, path, body)

    def hear(self) -> None:
        """Ask the node that was spoken to last for its roster, as anybody may."""
        if self._at is not None:
            self._pull(self._at[1])

    def _take_kept(self, timeout_s: float | None) -> tuple[Member, Address, TlsConnection] | None:
        """Return the connection of the request before, if it is open and the member still is one."""
        kept, self._kept = self._kept, None
        if kept is None:
            return None
        member, _, connection = kept
        if self._own.roster.members.get(member.id) != member or not connection.is_quiet():
            connection.close()
            return None
        connection.sock.settimeout(timeout_s)
        return kept

    def _name(self, member: Member) -> None:
        """Say once which node it is, where nobody has named one."""
        if not self._where and not self._has_said:
            self._say(f"node: {member.name}")
        self._has_said = True

    # --- finding the node ------------------------------------------------------------------------

    def _connect(self, timeout_s: float | None) -> tuple[Member, Address, TlsConnection]:
        tried = _Tried()
        if (found := self._reconnect(timeout_s, tried)) is not None:
            return found
        for _ in range(2):
            learned = False
            for member, address in self._candidates(tried):
                try:
                    return member, address, self._dial(member, address, timeout_s)
                except Unauthenticated as exc:
                    tried.add(exc)
                    learned = self._pull(address) or learned  # it may have a new key: rekey
                    self._own.check()
                except Unreachable as exc:
                    tried.add(exc)
            if not learned:
                break
        raise self._not_found(tried)

    def _reconnect(
        self, timeout_s: float | None, tried: _Tried
    ) -> tuple[Member, Address, TlsConnection] | None:
        if self._at is None:
            return None
        node_id, address = self._at
        member = self._own.roster.members.get(node_id)
        if member is None:
            raise Unauthenticated(
                "node-revoked", f"cannot speak to {node_id}: it is not in the swarm any more"
            )
        try:
            return member, address, self._dial(member, address, timeout_s)
        except (Unreachable, Unauthenticated) as exc:
            if not self._where:  # a run is about one node: another one knows nothing of its tasks
                raise
            tried.add(exc)
            return None

    def _dial(self, member: Member, address: Address, timeout_s: float | None) -> TlsConnection:
        connection = TlsConnection(address, self._own.context(member), server_name(member.id), timeout_s)
        try:
            connection.connect()
        except ssl.SSLCertVerificationError as exc:
            connection.close()
            raise Unauthenticated(
                "peer-unproved",
                f"cannot speak to {member.name}: whoever answers at {finding.show(address)} has another key",
                hint="the address may have gone to another machine; give another one with --node HOST",
            ) from exc
        except OSError as exc:
            connection.close()
            raise not_reached(f"{member.name} at {finding.show(address)}", exc) from exc
        self._at = (member.id, address)
        self._own.found(member.id, address)
        return connection

    def _candidates(self, tried: _Tried) -> Iterator[tuple[Member, Address]]:
        if not self._where:
            yield from self._nearest()
        elif (member := self._own.find(self._where)) is not None:
            yield from self._of_member(member)
        elif re.search(r"[.:]", self._where) or self._where == "localhost":
            yield from self._at_address(tried)
        elif (member := self._find_news()) is not None:
            yield from self._of_member(member)
        else:
            raise NotFound(
                "unknown-node",
                f"cannot find a node {self._where!r} in swarm {self._own.roster.name!r}",
                hint=f"nodes: {', '.join(sorted(one.name for one in self._own.nodes()))}; or give HOST:PORT",
            )

    def _nearest(self) -> Iterator[tuple[Member, Address]]:
        seen = set()
        members = {one.id: one for one in self._own.nodes()}
        # First the one that was spoken to last: what a person has asked of it, only it knows.
        if (last := self._own.last()) in members:
            for address in self._own.addresses(last):
                seen.add(address)
                yield members[last], address
        for node_id, address in finding.announced():
            if node_id in members and address not in seen:
                seen.add(address)
                yield members[node_id], address
        for node_id, member in members.items():
            for address in self._own.addresses(node_id):
                if address not in seen:
                    yield member, address

    def _of_member(self, member: Member) -> Iterator[tuple[Member, Address]]:
        known = self._own.addresses(member.id)
        for address in known:
            yield member, address
        for node_id, address in finding.announced():
            if node_id == member.id and address not in known:
                known.append(address)
                yield member, address

    def _at_address(self, tried: _Tried) -> Iterator[tuple[Member, Address]]:
        for address in finding.resolve(self._where):
            try:
                with Stranger(address) as stranger:
                    member = self._own.by_certificate(stranger.cert_der)
                    if member is None and self._take(stranger):
                        member = self._own.by_certificate(stranger.cert_der)
            except Unreachable as exc:
                tried.add(exc)
                continue
            if member is not None:
                yield member, address
            else:
                tried.add(
                    Unauthenticated(
                        "peer-unproved",
                        f"cannot speak to {finding.show(address)}: it is no node of your swarm",
                        hint=f"your swarm is {self._own.roster.name!r}",
                    )
                )

    def _find_news(self) -> Member | None:
        """Look again for the node after asking the nearest one for a newer roster."""
        for member, address in self._nearest():
            try:
                self._sync(member, address)
            except MycoswarmError:
                continue  # the next one may know; what was asked for is reported below
            break
        return self._own.find(self._where)

    def _not_found(self, tried: _Tried) -> MycoswarmError:
        if tried.problems:
            return tried.problems[0]
        where = f"node {self._where!r}" if self._where else "any node of the swarm"
        return Unreachable(
            "node-not-found",
            f"cannot find {where}: none is announced on this network, and no address is known",
            hint="say where one is: --node HOST or --node HOST:PORT",
        )

    # --- the roster ------------------------------------------------------------------------------

    def _keep_up(self, heard: Sequence[str], member: Member, address: Address) -> None:
        """Bring the roster up to date when the answer came from somebody who has another one."""
        if not heard or heard[0] in {"", self._own.roster.digest}:
            return
        try:
            self._sync(member, address)
        except MycoswarmError as exc:
            self._say(f"your roster could not be brought up to date: {exc.message}")
        if member.id not in self._own.roster.members:
            self._say(f"{member.name}, which answered this, has been put out of the swarm; do not rely on it")

    def _sync(self, member: Member, address: Address) -> None:
        path = "/swarm/sync"
        body: Doc = {"have": self._own.hashes(), "statements": []}
        answer = _ask(self._dial(member, address, _SHORT_S), member, path, body)
        self._own.merge(answer.get("statements"))
        want = answer.get("want")
        news = self._own.wanted(want) if isinstance(want, list) else []
        for portion in portions(news) if member.id in self._own.roster.members else ():
            body = {"have": self._own.hashes(), "statements": portion}
            _ask(self._dial(member, address, _SHORT_S), member, path, body)

    def _pull(self, address: Address) -> bool:
        """Take what whoever is there says of the roster, if it proves itself; tell whether it was new."""
        try:
            with Stranger(address) as stranger:
                return self._take(stranger)
        except MycoswarmError:
            return False  # a courtesy: the reason for asking is reported by who asked

    def _take(self, stranger: Stranger) -> bool:
        try:
            answer = stranger.post("/swarm/pull", {"have": self._own.hashes()[:MAX_PULL_HASHES]})
            return self._own.merge(answer.get("statements")) > 0
        except MycoswarmError:
            return False

    def _not_accepted(self, member: Member) -> MycoswarmError:
        return Unauthenticated(
            "not-accepted",
            f"cannot speak to {member.name}: it does not know you, {self._own.name!r}",
            hint=_NOT_HEARD,
        )


def open_remote(where: str, say: Callable[[str], None]) -> Remote:
    """Return the way to a node, as the operator that this person is; "" is the nearest one."""
    return Remote(operators.load(), where, say)


def not_reached(where: str, exc: Exception) -> Unreachable:
    """Return why there is nobody at an address."""
    if isinstance(exc, TimeoutError):
        why = "no answer in time"
    elif isinstance(exc, ssl.SSLError):
        why = "it does not speak TLS as a node does"
    elif isinstance(exc, http.client.HTTPException | EOFError):
        why = "it went away in the middle"
    else:
        why = (getattr(exc, "strerror", None) or str(exc) or "it went away").lower()
    return Unreachable(
        "node-unreachable",
        f"cannot reach {where}: {why}",
        hint="is it on, and on this network? `mycoswarmctl nodes` on another node shows what that one sees",
    )


def _ask(connection: TlsConnection, member: Member, path: str, body: Mapping[str, object]) -> Doc:
    data = json.dumps(body).encode()
    with exchange(connection, "POST", path, data, _IS_JSON, who=f"node {member.name}") as answer:
        return _document(answer.body(_MAX_ANSWER_BYTES))


def _document(untrusted: bytes) -> Doc:
    try:
        document = json.loads(untrusted)
    except (ValueError, RecursionError) as exc:
        raise LocalProtocolError("bad-answer", "cannot read the node's answer: it is not JSON") from exc
    if not isinstance(document, dict):
        raise LocalProtocolError("bad-answer", "cannot read the node's answer: it is not an object")
    return document
