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
# A stolen signer can make thousands of things to complain of; a person reads a few.
_MAX_PROBLEMS = 64


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
        self._alarms: set[str] = set()  # about who may sign: before all others
        self._problems: set[str] = set()
        self._kept_of = self._removals()
        self._parents, self._children = self._family()
        self._claims = self._find_claims(frozenset())
        self._disputed = self._find_disputed()
        self._legitimate = self._find_claims(self._disputed) if self._disputed else self._claims
        self._revoked = self._find_revoked()
        self._chains = {chain.ids[-1]: chain for chain in self._find_chains()}
        self._current = {node: ids[-1] for ids in (one.ids for one in self._chains.values()) for node in ids}

    def roster(self) -> Roster:
        """Return the view for everybody else."""
        genesis = self._settled.genesis.facts
        signers = {
            key: self._newest(node)
            for key, (node, *_) in sorted(self._legitimate.items())
            if key not in self._kept_of and key not in self._disputed
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
            problems=self._told(),
        )

    @property
    def removed(self) -> frozenset[str]:
        """The keys that sign no more in this epoch."""
        return frozenset(self._kept_of)

    def claims(self) -> dict[str, frozenset[str]]:
        """Return the keys that were not removed, disputed ones too, with the ids that are said to hold each.

        A key stands after the one that named it.
        """
        return {
            key: frozenset(map(self._newest, nodes))
            for key, nodes in self._claims.items()
            if key not in self._kept_of
        }

    def lines(self) -> dict[str, str]:
        """Return for each signing key, removed ones too, the root or the key named by one that led to it."""
        roots = self._settled.footing.roots
        namers: dict[str, set[str]] = defaultdict(set)
        for one in self._of(Kind.ADD_SIGNER):
            namers[one.facts["key"]].add(one.facts["by"])
        lines = {key: key for key in roots}
        for key in self._claims:  # each after one that named it
            known = sorted(by for by in namers[key] if by in lines)
            if key not in lines and known:
                lines[key] = key if roots.keys() & known else lines[known[0]]
        return lines

    def led_to(self, keys: frozenset[str]) -> list[str]:
        """Return the keys in use that would be none without the word of these.

        None where one of these is a root: then everything rests on it, the honest and the others alike.
        """
        if keys & self._settled.footing.roots.keys():
            return []
        without = self._find_claims(keys)
        return [key for key in self._claims if key not in (without.keys() | self._kept_of.keys() | keys)]

    def signed_by(self, key: str, *, but: frozenset[str]) -> frozenset[str]:
        """Return the statements of a key that give something and count: what its removal should keep.

        Not the signing keys that belong to no live member: they would be a way back in; nor those in `but`.
        """
        given = (*self._of(Kind.ADMIT), *self._of(Kind.ADD_SIGNER))
        return frozenset(
            one.sha256
            for one in given
            if one.facts["by"] == key
            and self._counts(one)
            and (one.kind is Kind.ADMIT or self._is_to_keep(one, but))
        )

    def _is_to_keep(self, addition: Statement, but: frozenset[str]) -> bool:
        key, node = addition.facts["key"], self._newest(self._origin(addition.facts["node"]))
        return key not in but and (key in self._kept_of or self._is_live(node))

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

    def _find_claims(self, silent: frozenset[str]) -> dict[str, dict[str, None]]:
        """Return the keys that statements which count lead to, removed ones too, with who holds each.

        A key counts once somebody who was admitted as a node is said to hold it, whatever came first; so
        keys and admissions are found together. A holder is named by the id that its chain began with.
        What the keys in `silent` say does not count.
        """
        roots = self._settled.footing.roots
        claims = {key: {self._origin(node): None} for key, node in sorted(roots.items())}
        nodes = {origin for origins in claims.values() for origin in origins}
        nodes.update(one.facts["node"] for one in self._node_admits() if self._settled.footing.keeps(one))
        given: dict[str, list[Statement]] = defaultdict(list)
        for one in (*self._node_admits(), *self._of(Kind.ADD_SIGNER)):
            if self._stands(one) and one.facts["by"] not in silent:
                given[one.facts["by"]].append(one)
        waiting: dict[str, list[Statement]] = defaultdict(list)  # signing keys of who is not admitted yet
        for key in (reached := list(claims)):  # grows while it is walked
            todo = list(given[key])
            for one in todo:  # grows too
                node = one.facts["node"]
                if one.kind is Kind.ADMIT:
                    nodes.add(node)
                    todo += waiting.pop(node, ())
                elif (origin := self._origin(node)) not in nodes:
                    waiting[origin].append(one)
                elif (new := one.facts["key"]) not in roots:
                    if new not in claims:
                        reached.append(new)
                    claims.setdefault(new, {})[origin] = None
        return claims

    def _node_admits(self) -> list[Statement]:
        return [one for one in self._of(Kind.ADMIT) if one.facts["role"] == Role.NODE]

    def _origin(self, node: str) -> str:
        """Return the id that others follow up to this one, as far as that is not in doubt."""
        path = [node]
        while len(parents := self._parents.get(path[-1], set())) == 1:
            if parents <= set(path):
                return node  # a circle
            path += parents
        return path[-1]

    def _newest(self, origin: str) -> str:
        return self._current.get(origin, origin)

    def _is_live(self, node: str) -> bool:
        return node in self._chains and node not in self._revoked

    def _find_disputed(self) -> frozenset[str]:
        """Return the keys that share a holder, or have several: one of them is a thief's, so none signs.

        The word of the genesis and of the recovery key is never in dispute.
        """
        keys_of: dict[str, set[str]] = defaultdict(set)
        for key, origins in self._claims.items():
            for origin in origins if key not in self._kept_of else ():
                keys_of[origin].add(key)
        shared = {key for keys in keys_of.values() if len(keys) > 1 for key in keys}
        several = {key for key, origins in self._claims.items() if len(origins) > 1}
        return frozenset((shared | several) - self._kept_of.keys() - self._settled.footing.roots.keys())

    def _counts(self, one: Statement) -> bool:
        """Tell whether a statement that gives something does."""
        by = one.facts["by"]
        is_given = by in self._legitimate and by not in self._disputed and self._stands(one)
        return is_given or self._settled.footing.keeps(one)

    def _check_signers(self, signers: Mapping[str, str]) -> None:
        if not signers:
            self._alarms.add("no signer is left: only the recovery key can mend this (mycoswarmctl recover)")
        for key, node in signers.items():
            if not self._is_live(node):
                self._alarms.add(
                    f"a signing key belongs to no live member: mycoswarmctl signers remove {key[:16]}"
                )
        for key in self._disputed:
            holders = ", ".join(sorted(map(self._newest, self._claims[key])))
            self._alarms.add(
                f"signing key {key[:16]} of {holders} is in dispute and does not count: remove it"
            )
        if len(self._settled.footing.statements) > 1:
            self._alarms.add(
                "the recovery key was used twice for one epoch, and only what both say counts: recover again"
            )
        void = sum(not self._counts(one) for one in (*self._of(Kind.ADMIT), *self._of(Kind.ADD_SIGNER)))
        if void:
            self._problems.add(f"{void} statements of removed signers are void")

    def _told(self) -> tuple[str, ...]:
        told = [*sorted(self._alarms), *sorted(self._problems)]
        rest = len(told) - _MAX_PROBLEMS
        return (*told[:_MAX_PROBLEMS], f"and {rest} more like these") if rest > 0 else tuple(told)

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
