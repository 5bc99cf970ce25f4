"""A person joins a swarm, or leaves it, as an operator: from this process, without a daemon.

Law: as for a node. The code is never sent; the inviter proves that it knows it, over the certificate of this
very connection, before we prove anything.
"""

import secrets
import time
from collections.abc import Iterator, Sequence

from mycoswarmd.core.enrol import Code, CodeKeys, Joiner, Welcome, derive, most_telling, parse_code, six_words
from mycoswarmd.ctl import finding, operators
from mycoswarmd.ctl.finding import Address
from mycoswarmd.ctl.refusals import Doc
from mycoswarmd.ctl.session import Session
from mycoswarmd.ctl.tlshttp import Remote, Stranger
from mycoswarmd.errors import BadRequest, MycoswarmError, NotFound, Unauthenticated, Unreachable
from mycoswarmd.trust.identity import NodeIdentity

_HELLO = "/swarm/enroll/hello"
_CONFIRM = "/swarm/enroll/confirm"
# The inviter may have to stretch the code on a small machine.
_STEP_S = 20.0
_AGAIN_S = 1.0
# A little more than the inviting node gives its person.
_DECIDE_TRIES = 130


def join(session: Session, code_text: str, addresses: Sequence[Address], name: str) -> Doc:
    """Enrol this person; each address is tried in turn, and without any, whoever is announced."""
    code = parse_code(code_text)
    identity = operators.prepare()
    keys = derive(code)
    tried: list[tuple[str, MycoswarmError]] = []
    for address in addresses or _announced():
        try:
            with Stranger(address, _STEP_S) as stranger:
                welcome = _exchange(session, stranger, code, keys, identity, name)
        except MycoswarmError as exc:
            tried.append((finding.show(address), exc))
            continue
        try:
            own = operators.begin(identity, welcome.statements, genesis_sha256=welcome.genesis_sha256)
        except BadRequest as exc:
            raise _theirs(exc) from exc
        inviter = own.by_certificate(stranger.cert_der)
        if inviter is not None:
            own.found(inviter.id, address)
        return _summary(own)
    if tried:
        raise _theirs(most_telling(tried))
    raise NotFound(
        "no-swarm-found",
        "cannot find a swarm on this network",
        hint="say where a node is: mycoswarmctl enroll --operator --address HOST",
    )


def leave(session: Session) -> Doc:
    """Tell some node that this operator leaves, then destroy the key."""
    own = operators.load()
    if own.identity.node_id in own.roster.members:
        body = {"have": own.hashes(), "statements": [own.farewell()]}
        node = Remote(own, "", session.aside)
        try:
            node.post("/swarm/sync", body)
        except (Unauthenticated, Unreachable):
            node.hear()  # whoever is out is cut off, also in the middle of the answer to its farewell
            if own.identity.node_id in own.roster.members:
                raise
    operators.forget()
    return {"swarm": own.roster.name, "id": own.identity.node_id}


def _exchange(
    session: Session, stranger: Stranger, code: Code, keys: CodeKeys, identity: NodeIdentity, name: str
) -> Welcome:
    joiner = Joiner(
        keys,
        code.invite,
        nonce=secrets.token_bytes(32),
        cert_der=identity.cert_der,
        role="operator",
        name=name,
    )
    challenge = stranger.post(_HELLO, joiner.hello())
    proof = joiner.confirm(challenge, stranger.cert_der, identity.sign)
    answer = stranger.post(_CONFIRM, proof)
    if answer.get("pending") is True:
        session.aside(f"your six words: {six_words(identity.node_id)}")
        session.aside("waiting for the inviting node; somebody has to say yes there")
    tries = 0
    while answer.get("pending") is True:
        tries += 1
        if tries > _DECIDE_TRIES:
            raise Unreachable("no-answer", "cannot wait longer: nobody said yes or no at the inviting node")
        time.sleep(_AGAIN_S)
        answer = stranger.post(_CONFIRM, proof)
    return joiner.welcome(answer)


def _announced() -> Iterator[Address]:
    seen = set()
    for _, address in finding.announced():
        if address not in seen:
            seen.add(address)
            yield address


def _theirs(exc: MycoswarmError) -> MycoswarmError:
    """Make what the other side did wrong no error of the command line."""
    if exc.exit_code == BadRequest.exit_code:
        exc.exit_code = MycoswarmError.exit_code
    return exc


def _summary(own: operators.Operator) -> Doc:
    members = own.roster.members.values()
    return {
        "swarm": own.roster.name,
        "id": own.identity.node_id,
        "name": own.name,
        "nodes": [
            {"id": one.id, "name": one.name, "role": one.role.value, "signer": one.is_signer}
            for one in members
        ],
    }
