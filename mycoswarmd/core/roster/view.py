"""What a settled set means: who is a member, who may sign, who is out and why.

Law: when in doubt, out. A key that two signers quarrel about signs no more, an id that two statements claim
is nobody's, and whoever was out once stays out until the recovery key begins a new epoch.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from mycoswarmd.core.roster.settle import Settled
from mycoswarmd.core.roster.statement import Kind, Statement
from mycoswarmd.core.types import Role

_SUFFIX_CHARS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """Somebody whose key is in the swarm now."""

    id: str
    name: str  # unique: `given_name`, or `given_name~7mka` where several live members share it
    given_name: str
    role: Role  # NODE or OPERATOR
    cert_der: bytes
    public_key: bytes
    is_signer: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """A swarm as its statements have it.

    Attributes:
        epoch: how often the recovery key began anew.
        members: the live ones by id.
        signers: the keys whose statements count from now on, in hex, with the ids of their nodes.
        revoked: ids that are out, with a reason for a person.
        digest: of the whole set; equal on two nodes when, and only when, they hold the same statements.
        problems: what a person should look at, each one line.
    """

    swarm_id: str
    name: str
    recovery: bytes
    epoch: int
    members: Mapping[str, Member]
    signers: Mapping[str, str]
    revoked: Mapping[str, str]
    digest: str
    hashes: frozenset[str]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Chain:
    """One admission and the keys that took its place, oldest first."""

    admit: Statement
    rekeys: tuple[Statement, ...]

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids, the newest last."""
        return tuple(one.facts["node"] for one in (self.admit, *self.rekeys))


def digest_of(hashes: Iterable[str]) -> str:
    """Return the digest of a set of statement hashes."""
    return hashlib.sha256(b"".join(bytes.fromhex(one) for one in sorted(hashes))).hexdigest()


class View:
    """Reads a settled set; made anew whenever the set changes."""

    def __init__(self, settled: Settled) -> None:
        self._settled = settled
        self._problems: set[str] = set()
        self._kept_of = self._removals()
        self._legitimate = self._legitimate_signers()
        self._parents, self._children = self._family()
        self._revoked = self._find_revoked()
        self._chains = {chain.ids[-1]: chain for chain in self._find_chains()}
        self._current = {node: ids[-1] for ids in (one.ids for one in self._chains.values()) for node in ids}

    def roster(self) -> Roster:
        """Return the view for everybody else."""
        genesis = self._settled.genesis.facts
        signers = {
            key: self._current.get(node, node)
            for key, node in sorted(self._legitimate.items())
            if key not in self._kept_of
        }
        nodes = frozenset(signers.values())
        members = self._named(
            self._member(chain, nodes)
            for end, chain in sorted(self._chains.items())
            if end not in self._revoked
        )
        self._check_signers(signers)
        hashes = frozenset(one.sha256 for one in self._settled.ordered())
        return Roster(
            swarm_id=self._settled.genesis.sha256,
            name=genesis["name"],
            recovery=bytes.fromhex(genesis["recovery"]),
            epoch=self._settled.footing.epoch,
            members=MappingProxyType(members),
            signers=MappingProxyType(signers),
            revoked=MappingProxyType(self._revoked),
            digest=digest_of(hashes),
            hashes=hashes,
            problems=tuple(sorted(self._problems)),
        )

    def signed_by(self, key: str) -> frozenset[str]:
        """Return the statements of a key that give something and count: what its removal should keep."""
        given = (*self._of(Kind.ADMIT), *self._of(Kind.ADD_SIGNER))
        return frozenset(one.sha256 for one in given if one.facts["by"] == key and self._counts(one))

    def admissions(self, ids: Iterable[str]) -> frozenset[str]:
        """Return the admissions and rekeys that make these ids what they are, also of ids that are out."""
        wanted = set(ids)
        found = set()
        for chain in self._chains.values():
            places = [at for at, node in enumerate(chain.ids) if node in wanted]
            if places:
                found |= {one.sha256 for one in (chain.admit, *chain.rekeys)[: places[-1] + 1]}
        return frozenset(found)

    def _of(self, kind: Kind) -> list[Statement]:
        return self._settled.by_kind[kind]

    # --- who may sign ----------------------------------------------------------------------------

    def _removals(self) -> dict[str, frozenset[str]]:
        """Return the removed keys, each with the statements of it that every removal keeps."""
        kept_of: dict[str, frozenset[str]] = {}
        for one in self._of(Kind.DROP_SIGNER):
            keep = frozenset(one.facts["keep"])
            kept_of[one.facts["key"]] = kept_of.get(one.facts["key"], keep) & keep
        return kept_of

    def _stands(self, one: Statement) -> bool:
        """Tell whether no removal of its signer voids a statement."""
        return one.facts["by"] not in self._kept_of or one.sha256 in self._kept_of[one.facts["by"]]

    def _legitimate_signers(self) -> dict[str, str]:
        """Return the keys that statements which count lead to, removed ones too, with their nodes."""
        by_signer = defaultdict(list)
        for one in self._of(Kind.ADD_SIGNER):
            if self._stands(one):
                by_signer[one.facts["by"]].append(one)
        legitimate = dict(self._settled.footing.roots)
        for key in (reached := sorted(legitimate)):  # grows while it is walked
            for one in by_signer[key]:
                if one.facts["key"] not in legitimate:
                    legitimate[one.facts["key"]] = one.facts["node"]
                    reached.append(one.facts["key"])
        return legitimate

    def _counts(self, one: Statement) -> bool:
        """Tell whether a statement that gives something does."""
        is_given = one.facts["by"] in self._legitimate and self._stands(one)
        return is_given or self._settled.footing.keeps(one)

    def _check_signers(self, signers: Mapping[str, str]) -> None:
        if not signers:
            self._problems.add(
                "no signer is left: only the recovery key can mend this (mycoswarmctl recover)"
            )
        for node in signers.values():
            if node in self._revoked:
                self._problems.add(f"{node} is out, but its signing key still signs: remove that signer")
        if len(self._settled.footing.statements) > 1:
            self._problems.add(
                "the recovery key was used twice for one epoch, and only what both say counts: recover again"
            )
        void = sum(not self._counts(one) for one in (*self._of(Kind.ADMIT), *self._of(Kind.ADD_SIGNER)))
        if void:
            self._problems.add(f"{void} statements of removed signers are void")

    # --- who is a member -------------------------------------------------------------------------

    def _family(self) -> tuple[Mapping[str, set[str]], Mapping[str, list[Statement]]]:
        """Return the ids that each id follows, and the rekeys of each id."""
        parents: dict[str, set[str]] = defaultdict(set)
        children: dict[str, list[Statement]] = defaultdict(list)
        for one in self._of(Kind.REKEY):
            parents[one.facts["node"]].add(one.facts["old"])
            children[one.facts["old"]].append(one)
        return parents, children

    def _find_revoked(self) -> dict[str, str]:
        """Return who is out: by name, by its own wish, or because an id that it follows is."""
        revoked: dict[str, str] = {}
        for one in self._of(Kind.REVOKE):
            revoked.setdefault(one.facts["node"], one.facts["reason"] or "revoked")
        for one in self._of(Kind.LEAVE):
            revoked.setdefault(one.facts["node"], "left")
        for node in (reached := sorted(revoked)):  # grows while it is walked
            for child in self._children.get(node, ()):
                if child.facts["node"] not in revoked:
                    revoked[child.facts["node"]] = revoked[node]
                    reached.append(child.facts["node"])
        return dict(sorted(revoked.items()))

    def _find_chains(self) -> Iterator[Chain]:
        admits: dict[str, Statement] = {}
        for one in self._of(Kind.ADMIT):
            if not self._counts(one):
                continue
            if admits.setdefault(one.facts["node"], one) is not one:
                self._doubt(one.facts["node"], "was admitted twice: one of its names and roles is not used")
        for admit in admits.values():
            rekeys = self._follow(admit.facts["node"], admits)
            if rekeys is not None:
                yield Chain(admit, rekeys)

    def _follow(self, node: str, admits: Mapping[str, Statement]) -> tuple[Statement, ...] | None:
        """Return the rekeys from an admitted id to its newest one, or None: it is in doubt whose that is."""
        if node in self._parents:
            self._doubt(node, "was admitted and also follows another id: it is nobody's")
            return None
        rekeys: list[Statement] = []
        while branches := self._children.get(node):
            if len(branches) > 1:
                self._doubt(node, "has two followers, so neither counts: somebody else has its key")
                return None
            node = branches[0].facts["node"]
            if len(self._parents[node]) > 1 or node in admits:
                self._doubt(node, "is claimed twice: it is nobody's")
                return None
            rekeys.append(branches[0])
        return tuple(rekeys)

    def _doubt(self, node: str, what: str) -> None:
        if node not in self._revoked:
            self._problems.add(f"{node} {what}")

    def _member(self, chain: Chain, signers: frozenset[str]) -> Member:
        newest = (chain.admit, *chain.rekeys)[-1].facts
        name = chain.admit.facts["name"]
        return Member(
            id=newest["node"],
            name=name,
            given_name=name,
            role=Role(chain.admit.facts["role"]),
            cert_der=newest["cert_der"],
            public_key=newest["public_key"],
            is_signer=newest["node"] in signers,
        )

    def _named(self, members: Iterable[Member]) -> dict[str, Member]:
        """Return members by id, with names made unique by the beginning of the id where they are not."""
        by_name = defaultdict(list)
        for one in members:
            by_name[one.given_name].append(one)
        named = {}
        for name, namesakes in by_name.items():
            if len(namesakes) > 1:
                self._problems.add(f"{len(namesakes)} members are called {name!r}")
            chars = _SUFFIX_CHARS
            while len({one.id[:chars] for one in namesakes}) < len(namesakes):
                chars += 1
            for one in namesakes:
                shown = f"{name}~{one.id[:chars]}" if len(namesakes) > 1 else name
                named[one.id] = replace(one, name=shown)
        return dict(sorted(named.items()))
