"""Swarms made in a line: real keys and certificates, statements signed by whoever a test says."""

import base64
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from mycoswarmd.core.roster import (
    Kind,
    Statement,
    StatementSet,
    make_body,
    node_id_of,
    parse_statement,
    sign_beacon,
    signed,
)
from mycoswarmd.trust import keys
from mycoswarmd.trust.certificate import make_certificate, read_certificate


def parse(wire: object) -> Statement:
    """Parse with real signatures and certificates."""
    return parse_statement(wire, verify=keys.verify, read_cert=read_certificate)


@dataclass(frozen=True)
class Key:
    """An Ed25519 key, the same one for the same words."""

    seed: bytes

    @property
    def public(self) -> bytes:
        return _public(self.seed)

    @property
    def hex(self) -> str:
        return self.public.hex()

    @property
    def id(self) -> str:
        """The id, where this is a node's key."""
        return node_id_of(self.public)

    @property
    def cert_der(self) -> bytes:
        return _certificate(self.seed)

    def sign(self, message: bytes) -> bytes:
        return keys.sign(self.seed, message)

    @property
    def pair(self) -> tuple[bytes, Any]:
        """What `signed` takes."""
        return self.public, self.sign


def key(*words: object) -> Key:
    """Return the key of these words."""
    return Key(hashlib.sha256(repr(words).encode()).digest())


@cache
def _public(seed: bytes) -> bytes:
    return keys.public_key(seed)


@cache
def _certificate(seed: bytes) -> bytes:
    return make_certificate(seed)


@dataclass
class Maker:
    """Makes the statements of one swarm, by default signed by its first signer in epoch 0; holds no set."""

    name: str = "home"
    recovery: Key = field(default_factory=lambda: key("recovery"))
    signer: Key = field(default_factory=lambda: key("signer", 1))
    first: Key = field(default_factory=lambda: key("node", 1))
    epoch: int = 0

    @property
    def genesis(self) -> Statement:
        body = make_body(
            Kind.GENESIS,
            name=self.name,
            recovery=self.recovery.hex,
            signer=self.signer.hex,
            nonce="00" * 16,
            node=self.first.id,
        )
        return parse(signed(body, self.signer.pair))

    @property
    def swarm_id(self) -> str:
        return self.genesis.sha256

    def set(self, *statements: Statement) -> StatementSet:
        """Return a set of these, the genesis and nothing else."""
        whole = StatementSet(self.genesis)
        whole.add(statements)
        return whole

    def wire(self, kind: Kind, *signers: Key, **facts: object) -> dict[str, object]:
        """Return a signed statement in wire form, in this swarm and epoch unless told otherwise."""
        body = make_body(kind, **{"swarm": self.swarm_id, "epoch": self.epoch, **facts})
        return signed(body, *(one.pair for one in signers))

    def _by(self, kind: Kind, by: Key | None, **facts: object) -> Statement:
        by = by or self.signer
        return parse(self.wire(kind, by, by=by.hex, **facts))

    def admit(self, node: Key, name: str = "", role: str = "node", *, by: Key | None = None) -> Statement:
        return self._by(Kind.ADMIT, by, cert=_b64(node.cert_der), name=name or f"n-{node.id[:6]}", role=role)

    def revoke(self, node: Key, reason: str = "stolen", *, by: Key | None = None) -> Statement:
        return self._by(Kind.REVOKE, by, node=node.id, reason=reason)

    def add_signer(self, signer: Key, node: Key | None = None, *, by: Key | None = None) -> Statement:
        return self._by(Kind.ADD_SIGNER, by, key=signer.hex, node=(node or signer).id)

    def drop_signer(self, signer: Key, keep: Iterable[Statement] = (), *, by: Key | None = None) -> Statement:
        return self._by(Kind.DROP_SIGNER, by, key=signer.hex, keep=hashes(keep))

    def leave(self, node: Key) -> Statement:
        return parse(self.wire(Kind.LEAVE, node, node=node.id, key=node.hex))

    def rekey(self, old: Key, new: Key) -> Statement:
        wire = self.wire(Kind.REKEY, old, new, old=old.id, key=old.hex, cert=_b64(new.cert_der))
        return parse(wire)

    def new_epoch(
        self, n: int, signers: Mapping[Key, Key], keep: Iterable[Statement] = (), *, by: Key | None = None
    ) -> Statement:
        """Return an epoch; `signers` are signing keys with the keys of their nodes."""
        listed = [{"key": one.hex, "node": node.id} for one, node in signers.items()]
        wire = self.wire(Kind.EPOCH, by or self.recovery, epoch=n, n=n, signers=listed, keep=hashes(keep))
        return parse(wire)

    def beacon(self, n: int, *, by: Key | None = None) -> dict[str, object]:
        """Return a beacon in wire form."""
        by = by or self.signer
        return sign_beacon(swarm=self.swarm_id, epoch=self.epoch, signer=by.public, n=n, sign=by.sign)


def hashes(statements: Iterable[Statement]) -> list[str]:
    """Return the hashes of statements, sorted."""
    return sorted(one.sha256 for one in statements)


def names(whole: StatementSet) -> list[str]:
    """Return the names of the live members, sorted."""
    return sorted(one.name for one in whole.roster.members.values())


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
