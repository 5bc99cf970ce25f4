"""A person's own identity in a swarm: key, roster and addresses, in one private directory.

Law: the roster that is kept here grows only by statements that were verified; whom it does not name, or
names no longer, is not believed, whatever address was given. Addresses are hints.
"""

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from ssl import SSLContext

from mycoswarmd.core.roster import (
    Kind,
    Member,
    Roster,
    Statement,
    StatementSet,
    encode_statement,
    make_body,
    parse_statement,
    signed,
)
from mycoswarmd.core.types import Role
from mycoswarmd.ctl.finding import Address, show, split
from mycoswarmd.ctl.place import ROSTER_FILE, operator_dir
from mycoswarmd.errors import BadRequest, ConfigError, Conflict, NotFound, StoreError, Unauthenticated
from mycoswarmd.trust.certificate import read_certificate
from mycoswarmd.trust.identity import IdentityFile, NodeIdentity
from mycoswarmd.trust.keyfile import remove_files, write_file
from mycoswarmd.trust.keys import verify
from mycoswarmd.trust.tlsctx import Tls

_ADDRESSES_FILE = "addresses.json"
_LOCK_FILE = "lock"
_MAX_FILE_BYTES = 64 << 20
_MAX_ADDRESSES = 8
_MIN_PREFIX = 4


class Operator:
    """An enrolled operator."""

    def __init__(self, directory: Path, identity: NodeIdentity, statements: StatementSet) -> None:
        self._directory = directory
        self._set = statements
        self._tls = Tls(identity.seed, identity.cert_der)
        self.identity = identity

    @property
    def roster(self) -> Roster:
        """The swarm as this operator knows it."""
        return self._set.roster

    @property
    def name(self) -> str:
        """What the swarm calls this operator."""
        own = self.roster.members.get(self.identity.node_id)
        return own.name if own is not None else self.identity.node_id

    def nodes(self) -> list[Member]:
        """Return the members that serve anything."""
        return [member for member in self.roster.members.values() if member.role is Role.NODE]

    def find(self, text: str) -> Member | None:
        """Return the node with this name, id or beginning of an id; None for none, BadRequest for several."""
        found = [one for one in self.nodes() if text in {one.name, one.id}]
        if not found and len(text) >= _MIN_PREFIX:
            found = [one for one in self.nodes() if one.id.startswith(text)]
        if len(found) > 1:
            raise BadRequest(
                "ambiguous-node",
                f"cannot tell which node {text!r} is",
                hint=f"it fits {', '.join(one.id[:8] for one in found)}",
            )
        return found[0] if found else None

    def by_certificate(self, der: bytes) -> Member | None:
        """Return the node that presents this certificate."""
        return next((one for one in self.nodes() if one.cert_der == der), None)

    def check(self) -> None:
        """Raise Unauthenticated when the swarm has put this operator out."""
        own_id = self.identity.node_id
        if own_id not in self.roster.members:
            why = self.roster.revoked.get(own_id, "")
            raise Unauthenticated(
                "operator-revoked",
                "cannot speak to the swarm: it has put this operator out" + (f" ({why})" if why else ""),
                hint="`mycoswarmctl leave --operator` forgets it; then be invited again",
            )

    def context(self, member: Member) -> SSLContext:
        """Return the TLS context that reaches this member and nobody else."""
        return self._tls.client_context(member.cert_der)

    def hashes(self) -> list[str]:
        """Return the hash of each statement held."""
        return sorted(self.roster.hashes)

    def wanted(self, hashes: Iterable[object]) -> list[dict[str, object]]:
        """Return the statements with these hashes, as far as they are held."""
        wanted = {one for one in hashes if isinstance(one, str)}
        return [encode_statement(one) for one in self._set.missing(self.roster.hashes - wanted)]

    def merge(self, untrusted: object) -> int:
        """Verify statements, keep them on disk, then believe them; return how many were new."""
        if not isinstance(untrusted, list):
            raise BadRequest("bad-statement", "cannot read the statements that came: no list")
        parsed = [_parse(one) for one in untrusted]
        if not parsed:
            return 0
        with _locked(self._directory):  # another command may have learned of a revocation in the meantime
            whole = _load_set(self._directory)
            fresh = whole.add(parsed)
            if fresh:
                _save_set(self._directory, whole)
            self._set = whole
        return len(fresh)

    def addresses(self, node_id: str) -> list[Address]:
        """Return where a member was reached before, the last place first."""
        return _read_addresses(self._directory).get(node_id, [])

    def last(self) -> str:
        """Return the id of the member that was reached last; "" for none."""
        return next(iter(_read_addresses(self._directory)), "")

    def found(self, node_id: str, address: Address) -> None:
        """Remember where a member was reached, and that it was the last one."""
        known = _read_addresses(self._directory)
        before = known.pop(node_id, [])
        places = [address, *(one for one in before if one != address)][:_MAX_ADDRESSES]
        if places == before and self.last() == node_id:
            return
        known = {node_id: places, **known}
        kept = {one: places for one, places in known.items() if one in self.roster.members}
        text = json.dumps({one: [show(place) for place in places] for one, places in kept.items()})
        write_file(self._directory / _ADDRESSES_FILE, text.encode())

    def farewell(self) -> dict[str, object]:
        """Return the statement that this operator leaves, in wire form."""
        identity = self.identity
        body = make_body(
            Kind.LEAVE,
            swarm=self.roster.swarm_id,
            epoch=self.roster.epoch,
            node=identity.node_id,
            key=identity.public_key.hex(),
        )
        return signed(body, (identity.public_key, identity.sign))


def load() -> Operator:
    """Return this person's identity; NotFound when there is none, ConfigError when it cannot be used."""
    directory = operator_dir()
    identity = IdentityFile(directory).load()
    if identity is None or not (directory / ROSTER_FILE).exists():
        raise NotFound(
            "no-operator",
            "cannot speak to another node: you are not enrolled as an operator here",
            hint="`mycoswarmctl invite --operator` on a node, then `mycoswarmctl enroll --operator` here",
        )
    return Operator(directory, identity, _load_set(directory))


def prepare() -> NodeIdentity:
    """Return the key to enrol with, made if there is none; Conflict for who is enrolled already."""
    directory = operator_dir()
    if (directory / ROSTER_FILE).exists():
        name = _load_set(directory).roster.name
        raise Conflict(
            "already-in-swarm",
            f"cannot join: you are an operator of swarm {name!r} already",
            hint="mycoswarmctl leave --operator first",
        )
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    return IdentityFile(directory).create()


def begin(identity: NodeIdentity, untrusted: Sequence[object], *, genesis_sha256: str) -> Operator:
    """Keep the roster of the swarm that admitted this key; BadRequest when it does not."""
    whole = _make_set(untrusted, pinned=genesis_sha256)
    own = whole.roster.members.get(identity.node_id)
    if own is None or own.role is not Role.OPERATOR:
        raise BadRequest("bad-bundle", "cannot join: the roster that came does not admit you as an operator")
    directory = operator_dir()
    with _locked(directory):
        _save_set(directory, whole)
    return Operator(directory, identity, whole)


def forget() -> None:
    """Destroy key and roster. Idempotent."""
    directory = operator_dir()
    remove_files(*(directory / name for name in (ROSTER_FILE, _ADDRESSES_FILE)))
    IdentityFile(directory).destroy()


def _parse(untrusted: object) -> Statement:
    return parse_statement(untrusted, verify=verify, read_cert=read_certificate)


def _make_set(untrusted: Sequence[object], *, pinned: str | None = None) -> StatementSet:
    parsed = [_parse(one) for one in untrusted]
    if not parsed:
        raise BadRequest("bad-statement", "cannot read a roster without a statement")
    whole = StatementSet(parsed[0], pinned=pinned)
    whole.add(parsed[1:])
    return whole


def _load_set(directory: Path) -> StatementSet:
    path = directory / ROSTER_FILE
    try:
        document = json.loads(_read(path))
        statements = document["statements"]
        return _make_set(statements)
    except (ValueError, RecursionError, TypeError, KeyError, BadRequest) as exc:
        raise ConfigError(
            "roster-damaged",
            f"cannot use the roster {str(path)!r}: it is damaged",
            hint="`mycoswarmctl leave --operator` forgets it; then be invited again",
        ) from exc


def _save_set(directory: Path, whole: StatementSet) -> None:
    statements = [encode_statement(one) for one in whole.missing(frozenset())]
    write_file(directory / ROSTER_FILE, json.dumps({"v": 1, "statements": statements}).encode())


def _read(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if (
                not stat.S_ISREG(found.st_mode)
                or found.st_uid not in {0, os.geteuid()}
                or found.st_mode & 0o022
            ):
                raise ConfigError(
                    "roster-exposed",
                    f"cannot use {str(path)!r}: others may change it",
                    hint=f"chown {os.geteuid()} {path}; chmod 600 {path}",
                )
            return file.read(_MAX_FILE_BYTES)
    except OSError as exc:
        raise ConfigError("roster-unreadable", f"cannot read {str(path)!r}: {exc.strerror}") from exc


def _read_addresses(directory: Path) -> dict[str, list[Address]]:
    """Read the hints; none where they cannot be read."""
    try:
        document: Mapping[str, Sequence[str]] = json.loads(_read(directory / _ADDRESSES_FILE))
        return {str(one): [split(place) for place in places] for one, places in document.items()}
    except (ValueError, RecursionError, TypeError, AttributeError, BadRequest, ConfigError):
        return {}


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    try:
        descriptor = os.open(
            directory / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
    except OSError as exc:
        raise StoreError("roster-unwritable", f"cannot write in {str(directory)!r}: {exc.strerror}") from exc
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
