"""The rules of docs/wire.md, "What a set of statements means", written down anew from the page alone.

This second reading shares nothing with core/roster but the parsed statements; both must say the same of
every set. Where it differs, the page or the code is wrong.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings

from mycoswarmd.core.roster import Kind, Statement, StatementSet
from mycoswarmd.errors import BadRequest
from tests.property.test_roster_laws import ANY, GENESIS, M
from tests.rosters import Maker, key

Ids = set[str]


def of(kind: Kind, statements: Iterable[Statement]) -> list[Statement]:
    return sorted((one for one in statements if one.kind is kind), key=lambda one: one.sha256)


@dataclass
class Reading:
    """What the page says of a set; the steps have the page's numbers."""

    genesis: Statement
    given: list[Statement]
    belongs: list[Statement] = field(default_factory=list)
    refused: list[Statement] = field(default_factory=list)
    overtaken: list[Statement] = field(default_factory=list)

    def __post_init__(self) -> None:
        current = self.step_1_to_3()
        self.step_4_and_5(current)
        self.step_6_and_7(current)

    # --- which statements belong ---

    def step_1_to_3(self) -> list[Statement]:
        ours: list[Statement] = []
        for one in self.given:
            forged = one.kind is Kind.EPOCH and one.signatures[0][0] != self.genesis.facts["recovery"]
            (self.refused if one.swarm != self.genesis.sha256 or forged else ours).append(one)
        epochs = of(Kind.EPOCH, ours)
        self.epoch = max((one.facts["n"] for one in epochs), default=0)
        newest = [one for one in epochs if one.facts["n"] == self.epoch]
        self.belongs += newest
        self.overtaken += [one for one in epochs if one not in newest]
        if newest:
            named = [{each["key"]: each["node"] for each in one.facts["signers"]} for one in newest]
            self.roots = {key: node for key, node in named[0].items() if all(key in each for each in named)}
            self.suspects = {key for each in named for key in each} - set(self.roots)
            self.keep = set.intersection(*(set(one.facts["keep"]) for one in newest))
        else:
            self.roots = {self.genesis.facts["signer"]: self.genesis.facts["node"]}
            self.suspects, self.keep = set(), set()
        current = []
        for one in ours:
            if one.kind is Kind.EPOCH:
                continue
            if one.facts["epoch"] > self.epoch:
                self.refused.append(one)
            elif one.facts["epoch"] == self.epoch or self.is_kept(one):
                current.append(one)
            else:
                self.overtaken.append(one)
        return current

    def is_kept(self, one: Statement) -> bool:
        fits = one.kind in (Kind.ADMIT, Kind.REKEY) and one.facts["epoch"] < self.epoch
        return fits and one.sha256 in self.keep

    def step_4_and_5(self, current: list[Statement]) -> None:
        additions = of(Kind.ADD_SIGNER, current)
        ever = set(self.roots) | self.suspects
        while more := {one.facts["key"] for one in additions if one.facts["by"] in ever} - ever:
            ever |= more
        for one in additions:
            (self.belongs if one.facts["by"] in ever else self.refused).append(one)
        for kind in (Kind.DROP_SIGNER, Kind.REVOKE, Kind.ADMIT):
            for one in of(kind, current):
                fits = one.facts["by"] in ever or self.is_kept(one)
                (self.belongs if fits else self.refused).append(one)

    def step_6_and_7(self, current: list[Statement]) -> None:
        rekeys, leaves = of(Kind.REKEY, current), of(Kind.LEAVE, current)
        depth = {one.facts["node"]: 0 for one in of(Kind.ADMIT, self.belongs)}
        queue = list(depth)
        while queue:
            node = queue.pop(0)
            following = [one for one in rekeys if one.facts["old"] == node][:2] if depth[node] < 16 else []
            self.belongs += following
            if len(following) == 1 and (new := following[0].facts["node"]) not in depth:
                depth[new] = depth[node] + 1
                queue.append(new)
        self.belongs += [one for one in leaves if one.facts["node"] in depth]
        self.overtaken += [one for one in [*rekeys, *leaves] if one not in self.belongs]

    # --- what they say ---

    def view(self) -> Mapping[str, Any]:
        kept_of: dict[str, Ids] = {}
        for one in of(Kind.DROP_SIGNER, self.belongs):
            keep = set(one.facts["keep"])
            kept_of[one.facts["key"]] = kept_of.get(one.facts["key"], keep) & keep

        def stands(one: Statement) -> bool:
            return one.facts["by"] not in kept_of or one.sha256 in kept_of[one.facts["by"]]

        named = self.named(stands)
        disputed = {
            one
            for one in set(named) - set(self.roots) - set(kept_of)
            if len(named[one]) > 1
            or any(named[one] & named[other] for other in set(named) - set(kept_of) - {one})
        }
        named = self.named(lambda one: stands(one) and one.facts["by"] not in disputed)

        rekeys = of(Kind.REKEY, self.belongs)
        out = {one.facts["node"] for one in self.belongs if one.kind in (Kind.REVOKE, Kind.LEAVE)}
        while more := {one.facts["node"] for one in rekeys if one.facts["old"] in out} - out:
            out |= more

        admits: dict[str, Statement] = {}
        for one in of(Kind.ADMIT, self.belongs):
            by = one.facts["by"]
            if self.is_kept(one) or (stands(one) and by in named and by not in disputed):
                admits.setdefault(one.facts["node"], one)
        chains = [chain for one in admits.values() if (chain := self.chain(one, rekeys, set(admits)))]
        newest = {node: chain[-1] for chain in chains for node in chain}
        signers = {
            key: newest.get(min(nodes), min(nodes))
            for key, nodes in named.items()
            if key not in kept_of and key not in disputed
        }
        members = {}
        for chain in chains:
            if chain[-1] not in out:
                first = admits[chain[0]].facts
                members[chain[-1]] = (first["name"], first["role"], chain[-1] in signers.values())
        return {"members": members, "signers": signers, "out": out}

    def origin(self, node: str) -> str:
        first = node
        seen = {node}
        while (
            len(
                before := {
                    one.facts["old"] for one in of(Kind.REKEY, self.belongs) if one.facts["node"] == node
                }
            )
            == 1
        ):
            node = before.pop()
            if node in seen:
                return first
            seen.add(node)
        return node

    def named(self, counts: Callable[[Statement], bool]) -> dict[str, Ids]:
        """Return L: each key with the origins that count for it."""
        found = {key: {self.origin(node)} for key, node in self.roots.items()}
        while True:
            nodes = set.union(set(), *(found[key] for key in self.roots)) | {
                one.facts["node"]
                for one in of(Kind.ADMIT, self.belongs)
                if one.facts["role"] == "node"
                and (self.is_kept(one) or (counts(one) and one.facts["by"] in found))
            }
            before = {key: set(origins) for key, origins in found.items()}
            for one in of(Kind.ADD_SIGNER, self.belongs):
                origin, key = self.origin(one.facts["node"]), one.facts["key"]
                if one.facts["by"] in before and counts(one) and origin in nodes and key not in self.roots:
                    found.setdefault(key, set()).add(origin)
            if found == before:
                return found

    def chain(self, admit: Statement, rekeys: list[Statement], admitted: Ids) -> list[str]:
        """Return the ids of a chain, or none where it is nobody's."""
        chain = [admit.facts["node"]]
        if any(one.facts["node"] == chain[0] for one in rekeys):
            return []
        while following := [one for one in rekeys if one.facts["old"] == chain[-1]]:
            new = following[0].facts["node"]
            claims = [one for one in rekeys if one.facts["node"] == new]
            if len(following) > 1 or len(claims) > 1 or new in admitted:
                return []
            chain.append(new)
        return chain


def compare(statements: list[Statement]) -> None:
    """Read a set both ways and see that they agree."""
    given_ones = list({one.sha256: one for one in statements}.values())
    reading = Reading(GENESIS, given_ones)
    whole = StatementSet(GENESIS)
    try:
        whole.add(given_ones)
    except BadRequest:
        assert reading.refused
        # An honest node has none of those; what is left must be read alike.
        refused = {one.sha256 for one in reading.refused}
        given_ones = [one for one in given_ones if one.sha256 not in refused]
        reading = Reading(GENESIS, given_ones)
        if reading.refused:  # they rested on what is gone
            return
        whole.add(given_ones)
    else:
        assert not reading.refused
    roster, view = whole.roster, reading.view()
    assert roster.hashes == {GENESIS.sha256, *(one.sha256 for one in reading.belongs)}
    assert roster.epoch == reading.epoch
    assert dict(roster.signers) == view["signers"]
    assert set(roster.revoked) == view["out"]
    members = {one.id: (one.given_name, one.role.value, one.is_signer) for one in roster.members.values()}
    assert members == view["members"]


@settings(max_examples=300, deadline=None)
@given(ANY)
def test_the_page_and_the_code_read_every_set_alike(statements: list[Statement]) -> None:
    compare(statements)


def test_a_key_with_three_followers_is_read_alike() -> None:
    old, news = key("old"), [key("new", n) for n in range(3)]
    compare([M.admit(old), *(M.rekey(old, new) for new in news)])
    compare([M.admit(old), *(M.rekey(old, new) for new in news), *(M.leave(new) for new in news)])


@pytest.mark.parametrize("length", [15, 16, 17, 18])
def test_a_long_chain_of_keys_is_read_alike(length: int) -> None:
    nodes = [key("chain", n) for n in range(length + 1)]
    rekeys = [M.rekey(old, new) for old, new in pairwise(nodes)]
    compare([M.admit(nodes[0]), *rekeys])
    compare([M.admit(nodes[0]), *rekeys[:16], M.leave(nodes[min(length, 16)])])


def test_a_signer_that_two_removed_is_read_alike() -> None:
    signer, nodes = key("another signer"), [key("given", n) for n in range(3)]
    admits = [M.admit(one, by=signer) for one in nodes]
    added = M.add_signer(signer)
    for keeps in ([[0, 1], [1, 2]], [[0], [1]], [[0, 1, 2], []]):
        drops = [M.drop_signer(signer, [admits[n] for n in keep]) for keep in keeps]
        compare([added, *admits, *drops])


def test_two_epochs_of_one_number_are_read_alike() -> None:
    nodes, signers = [key("kept", n) for n in range(3)], [key("root", n) for n in range(3)]
    admits = [M.admit(one) for one in nodes]
    one = M.new_epoch(1, {signers[0]: nodes[0], signers[1]: nodes[1]}, admits[:2])
    other = M.new_epoch(1, {signers[1]: nodes[2], signers[2]: nodes[1]}, admits[1:])
    late = Maker(epoch=1)
    compare([*admits, one, other])
    compare([*admits, one, other, *(late.revoke(nodes[1], by=signer) for signer in signers)])
    compare([*admits, one, other, *(late.admit(key("late", n), by=signers[n]) for n in range(3))])


def test_signers_that_a_removed_signer_named_are_read_alike() -> None:
    first, second, node = key("first of two"), key("second of two"), key("their node")
    added, more = M.add_signer(first), M.add_signer(second, by=first)
    for keep in ([], [more]):
        compare([added, more, M.admit(node, by=second), M.drop_signer(first, keep)])


def test_a_key_that_two_nodes_are_said_to_hold_is_read_alike() -> None:
    nodes, roots, claimed = (
        [key("holder", n) for n in range(3)],
        [key("root", n) for n in range(3)],
        key("key"),
    )
    epoch = M.new_epoch(1, dict(zip(roots, nodes, strict=True)))
    late = Maker(epoch=1)
    compare([epoch, *(late.add_signer(claimed, nodes[n], by=roots[n]) for n in range(3))])
    others = [key("another", n) for n in range(2)]
    admits = [late.admit(one, by=roots[0]) for one in others]
    claims = [late.add_signer(claimed, one, by=roots[0]) for one in others]
    compare([epoch, *admits, claims[0], late.admit(key("given"), by=claimed)])
    compare([epoch, *admits, *claims, late.admit(key("given"), by=claimed)])


def test_signing_keys_of_one_node_are_read_alike() -> None:
    nodes, keys = [key("of one", n) for n in range(3)], [key("its key", n) for n in range(3)]
    admits = [M.admit(nodes[0]), M.admit(nodes[1], role="operator"), M.rekey(nodes[0], nodes[2])]
    adds = [M.add_signer(keys[0], nodes[0]), M.add_signer(keys[1], nodes[2]), M.add_signer(keys[2], nodes[1])]
    given = [M.admit(key("given", n), by=keys[n]) for n in range(3)]
    for last in (1, 2, 3):
        compare([*admits, *adds[:last], *given])
        compare([*admits, *adds[:last], *given, M.drop_signer(keys[0], given)])
        compare([*admits, *adds[:last], *given, M.rekey(nodes[0], key("fork"))])
    compare([*admits[1:], *adds, *given])
    compare([*admits, M.add_signer(M.signer, nodes[0]), M.add_signer(keys[0], M.first), *given])
