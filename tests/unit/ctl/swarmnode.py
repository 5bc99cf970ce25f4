"""Members of a swarm for tests of an operator's commands: real keys, real TLS 1.3, a real roster and the real
inviter's mathematics, around scripted answers."""

import base64
import contextlib
import secrets
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from mycoswarmd.core.enrol import (
    CodeKeys,
    Hello,
    challenge,
    check_confirm,
    derive,
    format_code,
    make_code,
    parse_hello,
    seal_bundle,
)
from mycoswarmd.core.roster import (
    Kind,
    Roster,
    StatementSet,
    encode_statement,
    make_body,
    parse_statement,
    signed,
)
from mycoswarmd.errors import Unauthenticated
from mycoswarmd.trust import keys
from mycoswarmd.trust.certificate import read_certificate
from mycoswarmd.trust.identity import NodeIdentity
from mycoswarmd.trust.tlsctx import Tls
from tests.unit.ctl.fakenode import Asked, FakeNode, Reply, answer, refuse

Wire = dict[str, object]


def identity(seed: bytes | None = None) -> NodeIdentity:
    return NodeIdentity.of(seed or keys.make_seed())


def parse(wire: object) -> Any:
    return parse_statement(wire, verify=keys.verify, read_cert=read_certificate)


@dataclass
class Home:
    """A swarm: its statements, as some member has them, and the keys of its one signer."""

    signer_seed: bytes
    recovery_seed: bytes
    founder: NodeIdentity
    whole: StatementSet

    @classmethod
    def begin(cls, name: str = "home") -> "Home":
        signer, recovery, founder = keys.make_seed(), keys.make_seed(), identity()
        body = make_body(
            Kind.GENESIS,
            name=name,
            recovery=keys.public_key(recovery).hex(),
            signer=keys.public_key(signer).hex(),
            nonce=secrets.token_hex(16),
            node=founder.node_id,
        )
        genesis = parse(signed(body, (keys.public_key(signer), lambda message: keys.sign(signer, message))))
        home = cls(signer, recovery, founder, StatementSet(genesis))
        home.take(home.admit(founder, "study-pc"))
        return home

    @property
    def roster(self) -> Roster:
        return self.whole.roster

    def copy(self) -> "Home":
        """Return the swarm as another member knows it now; what is signed later is not in it."""
        return Home(self.signer_seed, self.recovery_seed, self.founder, self.whole.copy())

    def sign(self, kind: Kind, **facts: object) -> Wire:
        public = keys.public_key(self.signer_seed)
        roster = self.roster
        body = make_body(kind, swarm=roster.swarm_id, epoch=roster.epoch, by=public.hex(), **facts)
        return signed(body, (public, lambda message: keys.sign(self.signer_seed, message)))

    def admit(self, who: NodeIdentity, name: str, role: str = "node") -> Wire:
        return self.sign(Kind.ADMIT, cert=base64.b64encode(who.cert_der).decode(), name=name, role=role)

    def revoke(self, node_id: str, reason: str = "") -> Wire:
        return self.sign(Kind.REVOKE, node=node_id, reason=reason)

    def take(self, *wires: object) -> None:
        self.whole.add([parse(wire) for wire in wires])

    def statements(self, have: frozenset[str] = frozenset()) -> list[Wire]:
        return [encode_statement(one) for one in self.whole.missing(have)]


@dataclass
class Invitation:
    """One open invitation."""

    code: str
    keys: CodeKeys
    role: str
    pending: int = 0  # how often a proof is answered with "somebody has to say yes"
    refusal: Reply | None = None
    greetings: dict[str, tuple[Hello, bytes]] = field(default_factory=dict)


class SwarmNode(FakeNode):
    """A member that listens on TCP; answers by its script whom its roster has, and strangers' two questions.

    Attributes:
        believes_anybody: break it on purpose: answer also whom the roster does not have.
        cuts_off: end connections of who is out without an answer, as a daemon does.
        keeps_alive: leave connections open for another request, as a daemon does.
        connections: how many there were.
        hands_over: break it on purpose: give newcomers the roster of this swarm instead.
    """

    def __init__(self, home: Home, own: NodeIdentity) -> None:
        self.home = home
        self.own = own
        self.tls = Tls(own.seed, own.cert_der)
        self.script = {}
        self.asked: list[Asked] = []
        self.changed = threading.Condition()
        self.port = 0
        self.callers: list[str | None] = []
        self.invitations: dict[str, Invitation] = {}
        self.lock = threading.RLock()
        self.believes_anybody = False
        self.hands_over: Home | None = None
        self.cuts_off = False
        self.keeps_alive = False
        self.connections = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def invite(self, role: str = "operator", **fields: Any) -> str:
        code = make_code(secrets.token_bytes(13))
        self.invitations[code.invite] = Invitation(format_code(code), derive(code), role, **fields)
        return format_code(code)

    def certificates(self) -> list[bytes]:
        return [one.cert_der for one in self.home.roster.members.values() if one.id != self.own.node_id]

    def handle(self, asked: Asked, caller: str | None) -> Reply:
        """Answer one request of whoever proved this id, or none."""
        with self.lock:
            self.callers.append(caller)
            reply = self._handle(asked, caller)
        if self.cuts_off and caller is not None and caller in self.home.roster.revoked:
            raise ConnectionAbortedError
        roster = {"X-Mycoswarm-Roster": self.home.roster.digest} if caller is not None else {}
        return Reply(
            status=reply.status,
            body=reply.body,
            headers={**roster, **reply.headers},
            pieces=reply.pieces,
            cut=reply.cut,
        )

    def _handle(self, asked: Asked, caller: str | None) -> Reply:
        ours = {
            "/swarm/pull": self._pull,
            "/swarm/enroll/hello": self._hello,
            "/swarm/enroll/confirm": self._confirm,
        }
        if asked.path in ours:
            self.note(asked)
            return ours[asked.path](asked.json)
        if not self.believes_anybody and (caller is None or caller not in self.home.roster.members):
            self.note(asked)
            return refuse(401, "not-a-member", "cannot answer this key")
        if asked.path == "/swarm/sync":
            self.note(asked)
            return self._sync(asked.json)
        return self.reply(asked)

    def note(self, asked: Asked) -> None:
        with self.changed:
            self.asked.append(asked)
            self.changed.notify_all()

    def _pull(self, body: Mapping[str, Any]) -> Reply:
        return answer(
            {"statements": self.home.statements(frozenset(body["have"])), "digest": self.home.roster.digest}
        )

    def _sync(self, body: Mapping[str, Any]) -> Reply:
        self.home.take(*body["statements"])
        self.tls.refresh()
        have = frozenset(body["have"])
        return answer(
            {
                "statements": self.home.statements(have),
                "want": sorted(have - self.home.roster.hashes),
                "digest": self.home.roster.digest,
                "beacons": [],
            }
        )

    def _hello(self, body: Mapping[str, Any]) -> Reply:
        hello = parse_hello(body, read_cert=read_certificate)
        invitation = self.invitations.get(hello.invite)
        if invitation is None:
            return refuse(404, "invite-unknown", "cannot join: there is no such invitation here")
        if invitation.refusal is not None:
            return invitation.refusal
        nonce, session = secrets.token_bytes(32), secrets.token_hex(16)
        invitation.greetings[session] = (hello, nonce)
        sent = challenge(
            invitation.keys,
            hello,
            nonce=nonce,
            cert_der=self.own.cert_der,
            genesis_sha256=self.home.roster.swarm_id,
        )
        return answer({**sent, "session": session})

    def _confirm(self, body: Mapping[str, Any]) -> Reply:
        for invitation in self.invitations.values():
            if body["session"] in invitation.greetings:
                break
        else:
            return refuse(400, "bad-session", "cannot go on")
        hello, nonce = invitation.greetings[body["session"]]
        try:
            transcript = check_confirm(
                invitation.keys,
                hello,
                body,
                nonce=nonce,
                cert_der=self.own.cert_der,
                genesis_sha256=self.home.roster.swarm_id,
                read_cert=read_certificate,
                verify=keys.verify,
            )
        except Unauthenticated as exc:
            return refuse(401, exc.code, exc.message)
        if invitation.pending:
            invitation.pending -= 1
            return answer({"pending": True})
        newcomer = NodeIdentity(read_certificate(hello.cert_der).node_id, b"", hello.cert_der, b"")
        home = self.hands_over or self.home
        home.take(home.admit(newcomer, hello.name, invitation.role))
        self.tls.refresh()
        return answer(seal_bundle(invitation.keys, transcript, {"statements": home.statements()}))

    @contextlib.contextmanager
    def listening(self) -> Iterator["SwarmNode"]:
        """Listen while the context lasts; the second time at the same port."""
        node = self
        context = self.tls.server_context(self.certificates)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                with node.lock:  # Tls is for one thread
                    node.connections += 1
                    self.request.settimeout(60)
                    self.request = context.wrap_socket(self.request, server_side=True)
                super().setup()

            def finish(self) -> None:
                with contextlib.suppress(OSError):
                    super().finish()
                self.request.close()

            def handle_any(self) -> None:
                der = self.request.getpeercert(binary_form=True)
                caller = read_certificate(der).node_id if der else None
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                asked = Asked(method=self.command, path=self.path, headers=headers, body=body)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.answer(node.handle(asked, caller))

            do_GET = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815 - http.server's names

            def answer(self, reply: Reply) -> None:
                self.close_connection = not (node.keeps_alive or self.path.startswith("/swarm/enroll/"))
                self.send_response(reply.status)
                for name, value in ({"Content-Type": "application/json"} | dict(reply.headers)).items():
                    self.send_header(name, value)
                pieces = reply.pieces if reply.pieces is not None else (reply.body,)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for piece in filter(None, pieces):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                    self.wfile.flush()
                if not reply.cut:
                    self.wfile.write(b"0\r\n\r\n")

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Say nothing."""

        class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
            daemon_threads = True
            allow_reuse_address = True
            request_queue_size = 64

            def handle_error(self, *_: object) -> None:
                """Say nothing: a handshake that fails is what many tests are about."""

        server = Server(("127.0.0.1", self.port), Handler)
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class Relay:
    """Somebody between: takes TLS with a key of its own and passes on what is said in it, both ways."""

    def __init__(self, to_port: int, own: NodeIdentity) -> None:
        self.to_port = to_port
        self.context = Tls(own.seed, own.cert_der).server_context(tuple)
        self.heard = b""
        self.port = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator["Relay"]:
        relay = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                outside = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                outside.check_hostname, outside.verify_mode = False, ssl.CERT_NONE
                with (
                    contextlib.suppress(OSError),
                    relay.context.wrap_socket(self.request, server_side=True) as inside,
                    socket.create_connection(("127.0.0.1", relay.to_port)) as plain,
                    outside.wrap_socket(plain, server_hostname="x.mycoswarm.internal") as there,
                ):
                    there.settimeout(0.2)
                    inside.settimeout(0.2)
                    while True:
                        for source, target in ((inside, there), (there, inside)):
                            with contextlib.suppress(TimeoutError):
                                if not (data := source.recv(65536)):
                                    return
                                relay.heard += data
                                target.sendall(data)

        class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """Say nothing."""

        with Server(("127.0.0.1", 0), Handler) as server:
            self.port = server.server_address[1]
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()
