"""TLS contexts: everything that this program ever says over TLS goes through one made here.

Laws:

1. TLS 1.3 only. No ticket, no resumption, no early data: a session that outlived a revocation would be a
   way back in, and a resumed handshake shows no certificate.
2. A server's base context has no certificate and trusts nobody. Each handshake is moved to the context of
   this moment; if that fails in any way, so does the handshake.
3. A client trusts exactly one certificate and asks for exactly its name.
4. No clock: the dates in certificates are not looked at.

A handshake that succeeded says whose key is at the other end, not what it may do: the roster is asked again
on every request. In TLS 1.3 a client is done before the server has judged it: only an answer is acceptance.

Source: SSL_set_SSL_CTX(3) (certificate and trust store come from the new context, flags from the one that
the connection began with, which is why all have the same flags), X509_VERIFY_PARAM_set_flags(3).
"""

import os
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path

from mycoswarmd.errors import LocalProtocolError
from mycoswarmd.trust.keys import to_pem

Anchors = Callable[[], Sequence[bytes]]

# X509_V_FLAG_NO_CHECK_TIME, since OpenSSL 1.1.0; the ssl module has no name for it.
_NO_CHECK_TIME = 0x200000
_VERIFY_FLAGS = ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_TRUSTED_FIRST
_OPTIONS = ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET


class Tls:
    """Makes the contexts of one node, which presents one key.

    Not safe across threads: make contexts and call `refresh` where the handshakes run, in the event loop.
    """

    def __init__(self, seed: bytes, cert_der: bytes) -> None:
        self._seed = seed
        self._cert_der = cert_der
        self._anchors: Anchors = tuple
        self._live: ssl.SSLContext | None = None
        self._trusted: frozenset[bytes] = frozenset()
        self._is_stale = True

    def server_context(self, anchors: Anchors) -> ssl.SSLContext:
        """Return the context to listen with; `anchors` gives the certificates that clients may present.

        A client may also present none, and is then a stranger: `getpeercert(True)` is None. `anchors` is
        asked again at the first handshake after `refresh`; that takes 0.2 ms for a new one among them and,
        where one is gone, 8 ms for 50.
        """
        self._anchors = anchors
        self.refresh()
        base = _context(ssl.PROTOCOL_TLS_SERVER)
        base.verify_mode = ssl.CERT_OPTIONAL
        base.sni_callback = self._move
        return base

    def refresh(self) -> None:
        """Have the next handshake ask for the anchors again. Costs nothing itself."""
        self._is_stale = True

    def replace(self, seed: bytes, cert_der: bytes) -> None:
        """Present another key from the next handshake on; contexts for clients have to be made anew."""
        self._seed, self._cert_der = seed, cert_der
        self._live = None
        self.refresh()

    def client_context(self, peer_cert_der: bytes) -> ssl.SSLContext:
        """Return the context to reach the one node that has this certificate, as `server_name(its id)`."""
        context = _context(ssl.PROTOCOL_TLS_CLIENT)
        context.verify_mode = ssl.CERT_REQUIRED
        context.check_hostname = True
        context.hostname_checks_common_name = False
        _load_key(context, self._seed, self._cert_der)
        context.load_verify_locations(cadata=peer_cert_der)
        return context

    def _move(self, connection: ssl.SSLObject, name: str | None, base: ssl.SSLContext) -> None:
        del name, base  # called without a name, too
        # An exception in here ends the handshake with an alert, which is what has to happen.
        connection.context = self._current()

    def _current(self) -> ssl.SSLContext:
        if self._live is not None and not self._is_stale:
            return self._live
        wanted = frozenset(self._anchors())
        if self._live is None or not self._trusted <= wanted:
            # A store can grow but not shrink.
            live = _context(ssl.PROTOCOL_TLS_SERVER)
            live.verify_mode = ssl.CERT_OPTIONAL
            _load_key(live, self._seed, self._cert_der)
            _trust(live, wanted)
            self._live = live
        else:
            _trust(self._live, wanted - self._trusted)
        self._trusted = wanted
        self._is_stale = False  # only now: after a failure the next handshake tries again
        return self._live


def knock_context() -> ssl.SSLContext:
    """Return a client context that presents nothing and believes nothing.

    For enrolment, where the code proves the other side's certificate, and for pulling a roster, which proves
    itself. Nothing secret may be sent over it.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.options |= _OPTIONS
    context.verify_flags |= _VERIFY_FLAGS
    context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    if not context.verify_flags & _NO_CHECK_TIME:
        raise LocalProtocolError("tls-flags", "cannot make a TLS context that looks at no clock")
    return context


def _trust(context: ssl.SSLContext, anchors: frozenset[bytes]) -> None:
    if anchors:
        context.load_verify_locations(cadata=b"".join(sorted(anchors)))


def _load_key(context: ssl.SSLContext, seed: bytes, cert_der: bytes) -> None:
    """Give the context its key; the ssl module takes files only, so an anonymous one in memory."""
    pem = to_pem(seed) + ssl.DER_cert_to_PEM_cert(cert_der).encode("ascii")
    descriptor = os.memfd_create("mycoswarm-identity", os.MFD_CLOEXEC)
    with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor, not a path
        file.write(pem)
        file.flush()
        context.load_cert_chain(Path(f"/proc/self/fd/{descriptor}"))
