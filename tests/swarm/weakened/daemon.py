"""The daemon with one defence removed: `daemon.py DEFENCE,... [python -m mycoswarmd.daemon.main] run ...`.

A test of an attack is worth something only if the attack succeeds where the defence is missing. Each function
here takes out exactly one; the tests run the attack against it first, then against the real daemon.
"""

import ssl
import sys
from collections.abc import Callable, Mapping
from typing import Any

from mycoswarmd.api.access import RosterBook
from mycoswarmd.api.porch import Buckets
from mycoswarmd.core import enrol
from mycoswarmd.daemon.membership import NodeTls
from mycoswarmd.flow import enrol as flow_enrol
from mycoswarmd.store.roster import SqliteRosterStore
from mycoswarmd.trust import tlsctx
from mycoswarmd.trust.identity import IdentityFile
from mycoswarmd.trust.tlsctx import Tls

WEAKENINGS: dict[str, Callable[[], None]] = {}


def weakening(function: Callable[[], None]) -> Callable[[], None]:
    """Register under the function's name."""
    WEAKENINGS[function.__name__.replace("_", "-")] = function
    return function


def swap(owner: object, name: str, make: Callable[[Any], object]) -> None:
    """Put what `make` makes of a function in the function's place; a name that is gone is an error."""
    setattr(owner, name, make(getattr(owner, name)))


# --- between members ---------------------------------------------------------------------------------


@weakening
def believes_any_server() -> None:
    """Reach members without asking whose key answers."""

    def careless(real: Callable[..., ssl.SSLContext]) -> Callable[..., ssl.SSLContext]:
        def client_context(self: Tls, peer_cert_der: bytes) -> ssl.SSLContext:
            context = real(self, peer_cert_der)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            return context

        return client_context

    swap(Tls, "client_context", careless)


@weakening
def members_for_ever() -> None:
    """Serve whoever was a member once, and cut nobody's connection."""
    known: dict[str, Any] = {}

    def remembering(member_of: Callable[[str], Any]) -> Callable[[str], Any]:
        def look(node_id: str) -> object:
            member = member_of(node_id)
            if member is not None:
                known[node_id] = member
            return known.get(node_id)

        return look

    def made(real: Callable[..., None]) -> Callable[..., None]:
        def init(self: RosterBook, *, member_of: Callable[[str], Any], **facts: object) -> None:
            real(self, member_of=remembering(member_of), **facts)

        return init

    swap(RosterBook, "__init__", made)


@weakening
def anchors_for_ever() -> None:
    """Let whoever was a member once finish his handshake."""
    known: dict[bytes, None] = {}

    def remembering(real: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def anchors(self: object) -> list[bytes]:
            known.update(dict.fromkeys(real(self)))
            return list(known)

        return anchors

    swap(NodeTls, "_anchors", remembering)


@weakening
def tickets() -> None:
    """Let TLS sessions be resumed."""

    def resumable(real: Callable[[int], ssl.SSLContext]) -> Callable[[int], ssl.SSLContext]:
        def context(protocol: int) -> ssl.SSLContext:
            made = real(protocol)
            made.options &= ~ssl.OP_NO_TICKET
            if protocol == ssl.PROTOCOL_TLS_SERVER:
                made.num_tickets = 2
            return made

        return context

    swap(tlsctx, "_context", resumable)


# --- enrolment ---------------------------------------------------------------------------------------


@weakening
def transcript_without_certificates() -> None:
    """Prove the code alone, not over which connection."""
    swap(enrol, "_transcript", lambda real: lambda hello, **facts: real(hello, **{**facts, "cert_der": b""}))


@weakening
def fixed_nonces() -> None:
    """Say the same in every enrolment."""
    swap(
        flow_enrol, "Joiner", lambda real: lambda *words, **more: real(*words, **{**more, "nonce": bytes(32)})
    )


@weakening
def identity_stays() -> None:
    """Keep the node's key when a swarm is left."""
    swap(IdentityFile, "destroy", lambda _: lambda _self: None)


@weakening
def reusable_codes() -> None:
    """Never use a code up."""
    swap(
        SqliteRosterStore,
        "add",
        lambda real: lambda self, statements, **more: real(self, statements, **{**more, "invite": None}),
    )
    swap(flow_enrol.Invitations, "_set_state", lambda _: lambda *_: None)


@weakening
def one_key_for_both() -> None:
    """Derive the same key for every purpose."""
    swap(enrol, "_expand", lambda real: lambda stretched, _purpose: real(stretched, b""))


@weakening
def endless_guesses() -> None:
    """Count failures, and do nothing about them."""
    swap(flow_enrol, "MAX_FAILURES", lambda _: 1 << 30)


@weakening
def hellos_count() -> None:
    """Count a greeting as a failure, as a first sketch of the protocol did."""

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        async def hello(self: flow_enrol.Invitations, body: Mapping[str, object]) -> object:
            answer = await real(self, body)
            row = self._rows[str(body["invite"])]
            failures = await self._store.count_failure(row.invite, at_most=flow_enrol.MAX_FAILURES)
            state = "burnt" if failures >= flow_enrol.MAX_FAILURES else row.state
            self._rows[row.invite] = flow_enrol._with(row, failures, state)
            return answer

        return hello

    swap(flow_enrol.Invitations, "hello", counted)


@weakening
def strangers_unlimited() -> None:
    """Answer strangers as often as they ask."""
    swap(Buckets, "take", lambda _: lambda _self, _source: True)


def main() -> None:
    """Weaken, then be the daemon."""
    name, arguments = sys.argv[1], sys.argv[2:]
    for one in name.split(","):
        WEAKENINGS[one]()
    from mycoswarmd.daemon.main import main as daemon  # noqa: PLC0415 - after the change

    sys.argv = ["mycoswarmd", *arguments[arguments.index("run") :]]
    daemon()


if __name__ == "__main__":
    main()
