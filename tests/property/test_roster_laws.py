"""The laws of the roster, over many small swarms of real keys, hostile members and strangers included."""

import base64
import json
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mycoswarmd.core.roster import (
    SIGNING_CONTEXT,
    Kind,
    Statement,
    StatementSet,
    encode_statement,
    node_id_of,
    parse_beacon,
    read_new,
)
from mycoswarmd.errors import BadRequest
from mycoswarmd.trust import keys
from tests.rosters import Key, Maker, hashes, key, parse

# On a slow machine the most thorough of them take minutes.
pytestmark = pytest.mark.timeout(600)
many = settings(max_examples=150, deadline=None)
fewer = settings(max_examples=60, deadline=None)

NODES = [key("node", n) for n in range(5)]
SIGNERS = [key("signer", n) for n in range(1, 5)]  # the first is that of the genesis
EPOCHS = (0, 1, 2)
MAKERS = {n: Maker(epoch=n) for n in EPOCHS}
M = MAKERS[0]
GENESIS = M.genesis
STRANGER = key("stranger")

_nodes = st.integers(0, len(NODES) - 1)
_signers = st.integers(0, len(SIGNERS) - 1)
_names = st.sampled_from(("pi", "box"))


@cache
def admit(epoch: int, node: int, name: str, by: int) -> Statement:
    return MAKERS[epoch].admit(NODES[node], name, by=SIGNERS[by])


@cache
def revoke(epoch: int, node: int, by: int) -> Statement:
    return MAKERS[epoch].revoke(NODES[node], by=SIGNERS[by])


@cache
def leave(epoch: int, node: int) -> Statement:
    return MAKERS[epoch].leave(NODES[node])


@cache
def rekey(epoch: int, old: int, new: int) -> Statement:
    return MAKERS[epoch].rekey(NODES[old], NODES[new])


@cache
def add_signer(epoch: int, signer: int, node: int, by: int) -> Statement:
    return MAKERS[epoch].add_signer(SIGNERS[signer], NODES[node], by=SIGNERS[by])


@st.composite
def statements(
    draw: st.DrawFn, *, epochs: Sequence[int] = (0,), min_size: int = 0, max_size: int = 14
) -> list[Statement]:
    """Draw what signers, members and the recovery key may say, in no order; most of it hangs together."""
    found: list[Statement] = []
    # Members and signers that a swarm would have, so that there is something to lose.
    for epoch in epochs:
        found += [admit(epoch, node, "pi", 0) for node in draw(st.sets(_nodes, max_size=3))]
        found += [add_signer(epoch, one, 0, 0) for one in draw(st.sets(_signers, max_size=2)) if one]
    for _ in range(draw(st.integers(min_size, max_size))):
        epoch = draw(st.sampled_from(epochs))
        match draw(st.integers(0, 8)):
            case 0 | 1:
                found.append(admit(epoch, draw(_nodes), draw(_names), draw(_signers)))
            case 2:
                found.append(revoke(epoch, draw(_nodes), draw(_signers)))
            case 3:
                found.append(leave(epoch, draw(_nodes)))
            case 4 | 5:
                old, new = draw(st.lists(_nodes, min_size=2, max_size=2, unique=True))
                found.append(rekey(epoch, old, new))
            case 6:
                found.append(add_signer(epoch, draw(_signers), draw(_nodes), draw(_signers)))
            case 7:
                keep = draw(st.lists(st.sampled_from(found), max_size=4)) if found else []
                victim, by = SIGNERS[draw(_signers)], SIGNERS[draw(_signers)]
                found.append(MAKERS[epoch].drop_signer(victim, keep, by=by))
            case _:
                if epoch > 0:
                    found.append(draw(new_epochs(epoch, found)))
    return found


@st.composite
def new_epochs(draw: st.DrawFn, n: int, known: Sequence[Statement] = ()) -> Statement:
    roots = draw(st.sets(_signers, min_size=1, max_size=2))
    keep = draw(st.lists(st.sampled_from(known), max_size=6)) if known else []
    return M.new_epoch(n, {SIGNERS[one]: NODES[one] for one in sorted(roots)}, keep)


ANY = statements(epochs=EPOCHS)
ONE_EPOCH = statements()


def offer(whole: StatementSet, batch: Iterable[Statement]) -> bool:
    """Add a batch if the set takes it, and see that it is all or nothing; tell whether anything changed."""
    before = whole.roster.digest
    try:
        added = whole.add(batch)
    except BadRequest:
        assert whole.roster.digest == before
        return False
    assert bool(added) == (whole.roster.digest != before)
    return bool(added)


def settle(batches: Iterable[Sequence[Statement]]) -> StatementSet:
    """Give a set batches as they come, and again what it does not hold, until nothing changes any more."""
    whole = StatementSet(GENESIS)
    everything: dict[str, Statement] = {}
    for batch in batches:
        everything |= {one.sha256: one for one in batch}
        offer(whole, batch)
    while True:
        before = whole.roster.digest
        for one in everything.values():
            offer(whole, [one])
        if whole.roster.digest == before:
            return whole


def merged(one: StatementSet, other: StatementSet) -> StatementSet:
    """Return the first set after it was sent what it lacks of the other; honest nodes never refuse that."""
    result = one.copy()
    result.add(other.missing(result.roster.hashes))
    return result


def live(whole: StatementSet) -> set[str]:
    return set(whole.roster.members)


def same(one: StatementSet, other: StatementSet) -> bool:
    return one.roster == other.roster and one.roster.digest == other.roster.digest


@st.composite
def portions(draw: st.DrawFn, whole: Sequence[Statement]) -> list[list[Statement]]:
    """Draw an order and a partition, with repetitions."""
    order = draw(st.permutations(whole))
    again = draw(st.lists(st.sampled_from(order), max_size=4)) if order else []
    row, cuts = [*order, *again], draw(st.lists(st.integers(0, len(order)), max_size=4))
    edges = [0, *sorted(cuts), len(row)]
    return [row[low:high] for low, high in pairwise(edges)]


# --- a set, and nothing but a set ----------------------------------------------------------------


@many
@given(ANY, st.data())
def test_order_and_portions_leave_no_trace(given_: list[Statement], data: st.DataObject) -> None:
    one = settle(data.draw(portions(given_)))
    other = settle(data.draw(portions(given_)))
    assert same(one, other)


@many
@given(ONE_EPOCH, ONE_EPOCH)
def test_merging_is_idempotent_and_commutative(a: list[Statement], b: list[Statement]) -> None:
    one, two = settle([a]), settle([b])
    assert same(merged(one, one), one)
    assert same(merged(one, two), merged(two, one))


# An epoch drops what it does not keep, and a later one may keep what an earlier one dropped; and a fork of
# one's keys drops what came behind it, to which an admission may lead later on. So who met whom first can
# leave a difference, and the next exchange levels it.
@many
@given(ANY, ANY, ANY)
@example(
    [admit(0, 0, "pi", 0), rekey(0, 0, 1), rekey(0, 1, 2)],
    [admit(0, 0, "pi", 0), rekey(0, 0, 3)],
    [admit(0, 1, "pi", 0)],
)
def test_whoever_differs_agrees_after_one_exchange(
    a: list[Statement], b: list[Statement], c: list[Statement]
) -> None:
    one, two, three = (settle([each]) for each in (a, b, c))
    left, right = merged(merged(one, two), three), merged(one, merged(two, three))
    both = merged(left, right)
    assert same(both, merged(right, left))
    assert same(merged(left, both), both)
    assert same(merged(right, both), both)


@many
@given(ANY, ANY)
def test_two_nodes_agree_after_one_exchange_each_way(a: list[Statement], b: list[Statement]) -> None:
    one, two = settle([a]), settle([b])
    one.add(two.missing(one.roster.hashes))
    two.add(one.missing(two.roster.hashes))
    assert same(one, two)
    assert one.missing(two.roster.hashes) == []


@many
@given(ANY, ANY)
def test_reading_what_another_node_holds_leaves_out_nothing_that_matters(
    a: list[Statement], b: list[Statement]
) -> None:
    one, two = settle([a]), settle([b])
    wires = [encode_statement(each) for each in two.missing(one.roster.hashes)]
    reading = one.copy()
    reading.add(read_new(wires, one, parse=parse))
    assert same(reading, merged(one, two))
    assert read_new([encode_statement(each) for each in one.missing(frozenset())], one, parse=parse) == []


@many
@given(ANY)
def test_a_set_can_be_read_again_from_what_it_holds_and_from_any_beginning(given_: list[Statement]) -> None:
    whole = settle([given_])
    held = whole.missing(frozenset())
    assert held[0] == GENESIS
    again = StatementSet(held[0])
    again.add(parse(json.loads(json.dumps(encode_statement(one)))) for one in held)
    assert same(again, whole)
    growing = StatementSet(GENESIS)
    for one in held[1:]:
        assert growing.add([one]) == (one,)
    assert same(growing, whole)


@many
@given(ANY, ANY)
def test_what_is_told_to_be_dropped_and_new_is_the_difference(a: list[Statement], b: list[Statement]) -> None:
    whole = settle([a])
    before = whole.roster.hashes
    try:
        added = whole.add(b)
    except BadRequest:
        added = ()
    after = whole.roster.hashes
    assert set(hashes(added)) == after - before
    if added:
        assert set(whole.pruned) == before - after


# --- what it means: against a naive reading of the specification ---------------------------------


def naive_signers(
    held: Sequence[Statement], roots: dict[str, str], kept: Iterable[str] = ()
) -> tuple[set[str], dict[str, list[set[str]]]]:
    """Return the keys whose statements may count, and for each removed key what each removal keeps."""
    removals: dict[str, list[set[str]]] = {}
    for one in held:
        if one.kind is Kind.DROP_SIGNER:
            removals.setdefault(one.facts["key"], []).append(set(one.facts["keep"]))
    edges = [(one.facts["old"], one.facts["node"]) for one in held if one.kind is Kind.REKEY]

    def origin(node: str) -> str:
        path = [node]
        while len(olds := [old for old, new in edges if new == path[-1]]) == 1:
            if olds[0] in path:
                return node
            path += olds
        return path[-1]

    def pairs(silent: set[str]) -> set[tuple[str, str]]:
        found = {(key, origin(node)) for key, node in roots.items()}
        while True:
            keys = {key for key, _ in found}
            counting = [
                one
                for one in held
                if one.facts.get("by") in keys - silent
                and all(one.sha256 in keep for keep in removals.get(one.facts["by"], []))
            ]
            counting += [one for one in held if one.sha256 in kept]
            admitted = {
                one.facts["node"]
                for one in counting
                if one.kind is Kind.ADMIT and one.facts["role"] == "node"
            } | set(map(origin, roots.values()))
            more = {
                (one.facts["key"], origin(one.facts["node"]))
                for one in counting
                if one.kind is Kind.ADD_SIGNER
            }
            more = {(key, node) for key, node in more if node in admitted and key not in roots}
            if more <= found:
                return found
            found |= more

    said = pairs(set())
    used = [(key, node) for key, node in said if key not in removals]
    disputed = {
        key
        for key, node in used
        if key not in roots
        and sum(key == other for other, _ in used) + sum(node == other for _, other in used) > 2
    }
    return {key for key, _ in pairs(disputed)} - disputed, removals


def naive_members(whole: StatementSet) -> dict[str, str]:
    """Return id -> given name, as docs/wire.md says it, for sets without two epochs of one number."""
    held = list(whole.by_hash.values())
    epochs = [one for one in held if one.kind is Kind.EPOCH]
    assume(len(epochs) <= 1)
    roots = {one["key"]: one["node"] for epoch in epochs for one in epoch.facts["signers"]}
    roots = roots or {SIGNERS[0].hex: M.first.id}
    n = max((epoch.epoch for epoch in epochs), default=0)
    kept = {
        sha256
        for epoch in epochs
        for sha256 in epoch.facts["keep"]
        if whole.by_hash.get(sha256, epoch).epoch < n
    }
    legitimate, removals = naive_signers(held, roots, kept)
    out = {one.facts["node"] for one in held if one.kind in (Kind.REVOKE, Kind.LEAVE)}
    edges = [(one.facts["old"], one.facts["node"]) for one in held if one.kind is Kind.REKEY]
    names: dict[str, str] = {}
    for one in sorted(held, key=lambda one: one.sha256):
        by = str(one.facts.get("by"))
        stands = all(one.sha256 in keep for keep in removals.get(by, []))
        if one.kind is Kind.ADMIT and (one.sha256 in kept or (by in legitimate and stands)):
            names.setdefault(one.facts["node"], one.facts["name"])
    members = {}
    for start, name in names.items():
        path = [start]
        while [new for old, new in edges if old == path[-1]] and len(path) <= len(edges):
            path.append(next(new for old, new in edges if old == path[-1]))
        lone = all(sum(old == each for old, _ in edges) <= 1 for each in path)
        once = all(sum(new == each for _, new in edges) + (each in names) <= 1 for each in path) and not any(
            new == start for _, new in edges
        )
        if lone and once and not out & set(path):
            members[path[-1]] = name
    return members


@settings(max_examples=300, deadline=None)
@given(st.one_of(ONE_EPOCH, ANY))
def test_the_members_are_those_of_the_specification(given_: list[Statement]) -> None:
    whole = settle([given_])
    assert {one.id: one.given_name for one in whole.roster.members.values()} == naive_members(whole)


@many
@given(ANY)
def test_names_ids_and_signers_fit_together(given_: list[Statement]) -> None:
    roster = settle([given_]).roster
    shown = [one.name for one in roster.members.values()]
    assert len(set(shown)) == len(shown)
    for node_id, one in roster.members.items():
        assert node_id == one.id == node_id_of(one.public_key)
        assert one.is_signer == (node_id in roster.signers.values())
    assert not roster.members.keys() & roster.revoked.keys()


# --- out is out ----------------------------------------------------------------------------------


@many
@given(ONE_EPOCH, ONE_EPOCH)
def test_whoever_was_put_out_or_left_is_never_back_in_the_epoch(
    a: list[Statement], b: list[Statement]
) -> None:
    whole = settle([a])
    named = {one.facts["node"] for one in whole.by_hash.values() if one.kind in (Kind.REVOKE, Kind.LEAVE)}
    assert named <= whole.roster.revoked.keys()
    after = settle([a, b])
    assert not named & live(after)
    # And so is who follows, unless the key that it follows turns out to have two tongues; then it follows
    # nobody, and could be admitted anew by a signer.
    for old, new in (
        (one.facts["old"], one.facts["node"]) for one in after.by_hash.values() if one.kind is Kind.REKEY
    ):
        if old in after.roster.revoked:
            assert new not in live(after)


@many
@given(ONE_EPOCH, st.sampled_from([0, 1, 2]), ONE_EPOCH)
def test_descendants_of_a_revoked_id_are_out_however_they_come(
    a: list[Statement], first: int, b: list[Statement]
) -> None:
    """0 -> 1 -> 2 is one machine; revoking any of its ids puts it out, before or after it changes keys.

    Where an id has two followers, they follow nobody: a signer could admit one of them anew, as any new key.
    """
    chain = [admit(0, 0, "pi", 0), rekey(0, 0, 1), rekey(0, 1, 2)]
    whole = settle([a, chain, [revoke(0, first, 0)], b])
    out = {NODES[each].id for each in range(first, 3)}
    if {rekey(0, 0, 1).sha256, rekey(0, 1, 2).sha256} <= whole.roster.hashes:
        assert out <= whole.roster.revoked.keys()
        assert not out & live(whole)
    else:
        admitted = {one.facts["node"] for one in whole.by_hash.values() if one.kind is Kind.ADMIT}
        assert out & live(whole) <= admitted - {NODES[first].id}


@many
@given(ANY)
def test_a_key_with_two_followers_counts_for_nobody(given_: list[Statement]) -> None:
    whole = settle([given_])
    followers: dict[str, set[str]] = {}
    for one in whole.by_hash.values():
        if one.kind is Kind.REKEY:
            followers.setdefault(one.facts["old"], set()).add(one.facts["node"])
    for old, news in followers.items():
        assert old not in live(whole)
        assert len(news) <= 2
        if len(news) == 2:
            assert not news & live(whole)


# --- signers -------------------------------------------------------------------------------------


@many
@given(ONE_EPOCH, st.integers(1, 3), ONE_EPOCH)
def test_a_removed_signer_admits_nobody_any_more(a: list[Statement], thief: int, b: list[Statement]) -> None:
    whole = settle([a, [M.drop_signer(SIGNERS[thief], [])]])
    assume(SIGNERS[thief].hex not in whole.roster.signers)
    before, signers = live(whole), set(whole.roster.signers)
    late = [one for one in b if one.facts.get("by") == SIGNERS[thief].hex]
    after = settle([[*whole.by_hash.values()], late])
    assert live(after) <= before
    assert set(after.roster.signers) <= signers


@many
@given(ONE_EPOCH, ONE_EPOCH)
def test_a_removed_key_never_signs_again_in_the_epoch(a: list[Statement], b: list[Statement]) -> None:
    whole = settle([a])
    removed = {one.facts["key"] for one in whole.by_hash.values() if one.kind is Kind.DROP_SIGNER}
    assert not removed & settle([a, b]).roster.signers.keys()


@many
@given(ONE_EPOCH, st.data())
def test_two_signers_that_remove_each_other_are_both_out(
    given_: list[Statement], data: st.DataObject
) -> None:
    pair = [
        add_signer(0, 1, 1, 0),
        M.drop_signer(SIGNERS[0], [], by=SIGNERS[1]),
        M.drop_signer(SIGNERS[1], [], by=SIGNERS[0]),
    ]
    whole = settle(data.draw(portions([*given_, *pair])))
    assert not {SIGNERS[0].hex, SIGNERS[1].hex} & whole.roster.signers.keys()
    assert whole.roster.signers == {}  # nobody was added by anybody who still may
    assert live(whole) == set()
    mended = settle(
        [[*whole.by_hash.values()], [M.new_epoch(1, {SIGNERS[2]: NODES[2]}, [admit(0, 2, "pi", 0)])]]
    )
    mended.add([admit(0, 2, "pi", 0)])
    assert live(mended) == {NODES[2].id}


@many
@given(
    ANY,
    st.lists(st.sampled_from(["admit", "revoke", "signer", "drop", "epoch", "leave", "rekey"]), min_size=1),
)
def test_strangers_change_nothing(given_: list[Statement], acts: list[str]) -> None:
    whole = settle([given_])
    maker = MAKERS[whole.roster.epoch]
    made = {
        "admit": lambda: maker.admit(STRANGER, by=STRANGER),
        "revoke": lambda: maker.revoke(NODES[0], by=STRANGER),
        "signer": lambda: maker.add_signer(STRANGER, by=STRANGER),
        "drop": lambda: maker.drop_signer(SIGNERS[0], by=STRANGER),
        "epoch": lambda: maker.new_epoch(whole.roster.epoch + 1, {STRANGER: STRANGER}, by=STRANGER),
        "leave": lambda: maker.leave(STRANGER),
        "rekey": lambda: maker.rekey(STRANGER, NODES[0]),
    }
    before = whole.roster
    assert not offer(whole, [*(made[act]() for act in acts), *given_])
    assert whole.roster == before


@many
@given(ONE_EPOCH, ONE_EPOCH)
def test_new_machines_come_by_signers_that_count_only(a: list[Statement], b: list[Statement]) -> None:
    """Whatever is added: who is new was admitted by such a signer, or follows somebody who was."""
    whole = settle([a, b])
    held = list(whole.by_hash.values())
    legitimate, _ = naive_signers(held, {SIGNERS[0].hex: M.first.id})
    origin = {one.facts["node"]: one.facts["old"] for one in held if one.kind is Kind.REKEY}
    admitted = {one.facts["node"] for one in held if one.kind is Kind.ADMIT and one.facts["by"] in legitimate}
    for node in live(whole):
        path = [node]
        while path[-1] not in admitted:
            path.append(origin[path[-1]])
            assert len(path) <= len(NODES)


# --- the recovery key ----------------------------------------------------------------------------


@many
@given(ONE_EPOCH, ONE_EPOCH, st.data())
def test_an_epoch_makes_nodes_equal_whatever_they_had_seen(
    a: list[Statement], b: list[Statement], data: st.DataObject
) -> None:
    one, two = settle([a]), settle([b])
    epoch = data.draw(new_epochs(1, [*a, *b]))
    kept = [each for each in (*a, *b) if each.sha256 in epoch.facts["keep"]]
    for whole in (one, two):
        for each in (epoch, *sorted(kept, key=lambda each: each.kind is Kind.REKEY)):
            offer(whole, [each])
        for each in kept * len(NODES):
            offer(whole, [each])
    assert same(one, two)
    assert one.roster.epoch == 1
    assert one.roster.signers.keys() == {each["key"] for each in epoch.facts["signers"]}
    allowed = {GENESIS.sha256, epoch.sha256, *epoch.facts["keep"]}
    assert one.roster.hashes <= allowed
    assert {each.kind for each in one.by_hash.values()} <= {Kind.GENESIS, Kind.EPOCH, Kind.ADMIT, Kind.REKEY}


@many
@given(ANY, statements(epochs=EPOCHS), st.data())
def test_there_is_no_way_back(given_: list[Statement], old: list[Statement], data: st.DataObject) -> None:
    """After an epoch, nothing older that it does not keep changes anything, alone or with anything else."""
    whole = settle([given_])
    n = whole.roster.epoch
    current = [one for one in whole.by_hash.values() if one.kind is Kind.EPOCH]
    keep = {sha256 for one in current for sha256 in one.facts["keep"]}
    before = whole.roster
    for one in data.draw(st.permutations(old)):
        if one.epoch < n and one.sha256 not in keep:
            assert not offer(whole, [one])
    assert whole.roster == before
    after = settle([[*whole.by_hash.values()], old])
    assert after.roster.epoch >= n


# --- garbage -------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
EVERY_KIND = [
    GENESIS,
    admit(0, 0, "pi", 0),
    revoke(0, 0, 0),
    leave(0, 0),
    rekey(0, 0, 1),
    add_signer(0, 1, 0, 0),
    M.drop_signer(SIGNERS[1], [admit(0, 0, "pi", 1)]),
    M.new_epoch(1, {SIGNERS[1]: NODES[0]}, [admit(0, 0, "pi", 0)]),
]
BY_HEX = {one.hex: one for one in (*SIGNERS, *NODES, M.recovery)}


def read(untrusted: object) -> Statement | None:
    """Parse; anything but a statement or BadRequest fails the test."""
    try:
        return parse(untrusted)
    except BadRequest as exc:
        if exc.code in {"bad-statement", "bad-certificate"} and exc.message.isascii():
            return None
        raise


@many
@given(JSON)
def test_garbage_is_refused(untrusted: object) -> None:
    assert read(untrusted) is None
    assert read({"body": untrusted, "sigs": []}) is None
    assert read({**encode_statement(EVERY_KIND[1]), "sigs": untrusted}) is None
    with pytest.raises(BadRequest, match="bad-beacon"):
        parse_beacon(untrusted, verify=keys.verify)


def sign_again(statement: Statement, body: bytes, context: bytes = SIGNING_CONTEXT) -> dict[str, object]:
    """Sign other bytes with the keys of a statement: what a hostile member can do."""
    pairs = [[public, BY_HEX[public].sign(context + body).hex()] for public, _ in statement.signatures]
    return {"body": base64.b64encode(body).decode(), "sigs": pairs}


@many
@given(st.sampled_from(EVERY_KIND), st.data())
def test_a_body_changed_by_its_own_signer_is_well_formed_or_refused(
    statement: Statement, data: st.DataObject
) -> None:
    body: dict[str, Any] = json.loads(statement.body)
    match data.draw(st.integers(0, 3)):
        case 0:
            body[data.draw(st.sampled_from(sorted(body)))] = data.draw(JSON)
        case 1:
            body[data.draw(st.text(max_size=8))] = data.draw(JSON)
        case 2:
            del body[data.draw(st.sampled_from(sorted(body)))]
        case _:
            body |= json.loads(data.draw(st.sampled_from(EVERY_KIND)).body)
    raw = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    again = read(sign_again(statement, raw))
    if again is not None:
        assert again.body == raw
        offer(settle([EVERY_KIND[1:6]]), [again])


@many
@given(st.sampled_from(EVERY_KIND), st.data())
def test_bytes_changed_by_their_own_signer_are_canonical_or_refused(
    statement: Statement, data: st.DataObject
) -> None:
    raw = bytearray(statement.body)
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    again = read(sign_again(statement, bytes(raw)))
    if again is not None:
        assert json.dumps(json.loads(raw), sort_keys=True, separators=(",", ":")).encode() == bytes(raw)


@fewer
@given(st.sampled_from(EVERY_KIND), st.binary(max_size=40))
def test_a_signature_under_any_other_context_is_refused(statement: Statement, context: bytes) -> None:
    assume(context != SIGNING_CONTEXT)
    assert read(sign_again(statement, statement.body, context)) is None
    assert read(sign_again(statement, statement.body)) == statement


@fewer
@given(st.sampled_from(EVERY_KIND), st.sampled_from([*SIGNERS, *NODES, STRANGER, M.recovery]))
def test_a_signature_by_any_other_key_is_refused(statement: Statement, other: Key) -> None:
    own = [public for public, _ in statement.signatures]
    assume(other.hex not in own and statement.kind is not Kind.EPOCH)
    sig = other.sign(SIGNING_CONTEXT + statement.body).hex()
    wire = encode_statement(statement)
    for at in range(len(own)):
        for public in (other.hex, own[at]):
            pairs = [list(pair) for pair in statement.signatures]
            pairs[at] = [public, sig]
            assert read({**wire, "sigs": pairs}) is None
