"""What statements mean together: who is in, who may sign, and that doubt puts out."""

import hashlib
import json
from itertools import pairwise

import pytest

from mycoswarmd.api.routes import ROUTES
from mycoswarmd.core.roster import (
    MAX_PULL_HASHES,
    MAX_REKEYS,
    MAX_STATEMENTS,
    Kind,
    Statement,
    StatementSet,
    digest_of,
    encode_statement,
    parse_beacon,
    portions,
    read_new,
)
from mycoswarmd.core.types import Role
from mycoswarmd.errors import BadRequest, Unavailable
from mycoswarmd.trust import keys
from tests.rosters import Key, Maker, hashes, key, names, parse

M = Maker()
A, B, C, D = (key("node", name) for name in "abcd")
S1, S2, S3, S4 = M.signer, key("signer", 2), key("signer", 3), key("signer", 4)
ADMIT_A, ADMIT_B, ADMIT_C, ADMIT_D = (
    M.admit(one, name) for one, name in zip((A, B, C, D), "abcd", strict=True)
)
SYNC_BYTES, PULL_BYTES = (
    next(one.body_bytes for one in ROUTES if one.path == f"/swarm/{name}") for name in ("sync", "pull")
)
ADMIT_FIRST = M.admit(M.first, "first")  # who holds the first signing key


def live(whole: StatementSet) -> set[str]:
    return set(whole.roster.members)


def signers(whole: StatementSet) -> set[str]:
    return set(whole.roster.signers)


def refused(whole: StatementSet, *statements: Statement) -> str:
    """Add what must be refused, see that nothing changed, and return why."""
    before = whole.roster
    with pytest.raises(BadRequest) as caught:
        whole.add(statements)
    assert whole.roster == before
    return caught.value.code


def has_problem(whole: StatementSet, text: str) -> bool:
    return any(text in one for one in whole.roster.problems)


# --- the beginning -------------------------------------------------------------------------------


def test_a_swarm_begins_with_its_genesis() -> None:
    roster = M.set().roster
    assert (roster.swarm_id, roster.name, roster.epoch) == (M.genesis.sha256, "home", 0)
    assert roster.recovery == M.recovery.public
    assert roster.signers == {S1.hex: M.first.id}
    assert (roster.members, roster.revoked) == ({}, {})
    assert M.set(ADMIT_FIRST).roster.problems == ()
    assert roster.hashes == {M.genesis.sha256}
    assert roster.digest == digest_of([M.genesis.sha256])


def test_members_have_what_their_admission_says() -> None:
    whole = M.set(M.admit(M.first, "first"), ADMIT_A, M.admit(B, "anna", "operator"))
    a, b, first = (whole.roster.members[one.id] for one in (A, B, M.first))
    assert (a.id, a.name, a.given_name, a.role, a.is_signer) == (A.id, "a", "a", Role.NODE, False)
    assert (a.cert_der, a.public_key) == (A.cert_der, A.public)
    assert (b.name, b.role) == ("anna", Role.OPERATOR)
    assert (first.role, first.is_signer) == (Role.NODE, True)


def test_the_digest_tells_any_two_sets_apart_and_not_their_order() -> None:
    assert M.set(ADMIT_A, ADMIT_B).roster.digest == M.set(ADMIT_B, ADMIT_A).roster.digest
    digests = {M.set(*some).roster.digest for some in ([], [ADMIT_A], [ADMIT_B], [ADMIT_A, ADMIT_B])}
    assert len(digests) == 4
    both = hashlib.sha256(bytes.fromhex("00" * 32 + "11" * 32)).hexdigest()
    assert digest_of(["11" * 32, "00" * 32]) == both


def test_a_set_begins_with_the_genesis_that_is_pinned() -> None:
    other = Maker(name="other")
    assert StatementSet(M.genesis, pinned=M.swarm_id).roster.name == "home"
    with pytest.raises(BadRequest, match="other-swarm"):
        StatementSet(other.genesis, pinned=M.swarm_id)
    with pytest.raises(BadRequest, match="bad-statement"):
        StatementSet(ADMIT_A)
    whole = M.set()
    assert refused(whole, other.genesis) == "other-swarm"
    assert refused(whole, ADMIT_A, other.admit(A)) == "other-swarm"
    assert whole.add([M.genesis]) == ()


def test_what_is_missing_can_be_added_from_its_beginning_in_any_portion() -> None:
    nodes = [key("node", n) for n in range(8)]
    whole = M.set(
        *(M.admit(one) for one in nodes[:4]),
        M.add_signer(S2, nodes[0]),
        M.add_signer(S3, nodes[1], by=S2),
        M.add_signer(S4, nodes[2], by=S3),
        M.admit(nodes[4], by=S4),
        M.rekey(nodes[0], nodes[5]),
        M.rekey(nodes[5], nodes[6]),
        M.leave(nodes[6]),
        M.revoke(nodes[3], by=S4),
        M.drop_signer(S3, [], by=S4),
    )
    missing = whole.missing(frozenset())
    assert missing[0] == M.genesis
    for size in (1, 2, 5):
        copy = StatementSet(M.genesis)
        for at in range(0, len(missing), size):
            copy.add(missing[at : at + size])
            assert not copy.roster.members.keys() & {nodes[3].id}  # out before it could be in
        assert copy.roster == whole.roster
    have = frozenset(hashes(missing[3:7]))
    assert hashes(whole.missing(have)) == sorted(whole.roster.hashes - have)
    assert list(whole.by_hash.values()) == missing


def test_a_copy_changes_alone() -> None:
    whole = M.set(ADMIT_A)
    assert live(whole) == {A.id}
    copy = whole.copy()
    assert copy.roster is whole.roster  # not worked out anew
    assert copy.add([ADMIT_B, ADMIT_A]) == (ADMIT_B,)
    assert (live(whole), live(copy)) == ({A.id}, {A.id, B.id})
    assert copy.add([ADMIT_B]) == ()
    assert (len(whole), len(copy)) == (2, 3)


# --- who is believed -----------------------------------------------------------------------------


def test_nobody_outside_is_believed_and_one_stranger_spoils_the_batch() -> None:
    stranger = key("stranger")
    whole = M.set(ADMIT_A)
    for one in (
        M.admit(B, by=stranger),
        M.admit(B, by=A),  # a member's own key signs nothing here
        M.admit(B, by=M.recovery),
        M.revoke(A, by=stranger),
        M.add_signer(stranger, B, by=stranger),
        M.drop_signer(S1, by=stranger),
        M.new_epoch(1, {stranger: B}, by=stranger),
        M.new_epoch(1, {S1: B}, by=S1),
    ):
        assert refused(whole, ADMIT_C, one) == "bad-statement"
    assert whole.add([M.leave(stranger), M.rekey(stranger, B)]) == ()
    assert live(whole) == {A.id}


def test_a_batch_brings_its_own_signers_in_any_order() -> None:
    whole = M.set()
    batch = [M.admit(A, by=S3), M.add_signer(S3, B, by=S2), M.add_signer(S2, C), ADMIT_C, M.admit(B, by=S2)]
    assert refused(whole, *batch[:2]) == "bad-statement"
    assert set(whole.add(batch)) == set(batch)
    assert signers(whole) == {S1.hex, S2.hex, S3.hex}
    assert live(whole) == {A.id, B.id, C.id}


def test_the_future_is_refused_and_the_past_ignored() -> None:
    whole = M.set(ADMIT_A)
    assert refused(whole, Maker(epoch=1).admit(B)) == "bad-statement"
    whole.add([M.new_epoch(2, {S2: A}, [ADMIT_A])])
    assert whole.add([ADMIT_B, M.revoke(A), M.new_epoch(1, {S1: A}), M.leave(A), M.rekey(A, B)]) == ()
    assert live(whole) == {A.id}
    assert refused(whole, ADMIT_B, Maker(epoch=2).admit(B, by=S1)) == "bad-statement"


# --- out is out ----------------------------------------------------------------------------------


def test_who_is_revoked_is_out_and_stays_out() -> None:
    whole = M.set(ADMIT_A, ADMIT_B, M.revoke(A, "stolen"))
    assert live(whole) == {B.id}
    assert whole.roster.revoked == {A.id: "stolen"}
    whole.add([M.admit(A, "again"), M.add_signer(S2, B), M.admit(A, "more", by=S2)])
    assert live(whole) == {B.id}
    assert M.set(M.revoke(A, ""), ADMIT_A).roster.revoked == {A.id: "revoked"}


def test_who_leaves_is_out_and_stays_out() -> None:
    whole = M.set(ADMIT_A, ADMIT_B, M.leave(A))
    whole.add([M.admit(A, "again")])
    assert live(whole) == {B.id}
    assert whole.roster.revoked == {A.id: "left"}


def test_a_revocation_can_come_before_the_admission() -> None:
    whole = M.set(M.revoke(A))
    whole.add([ADMIT_A])
    assert live(whole) == set()


def test_one_id_admitted_twice_is_one_member_and_a_problem() -> None:
    twice = [M.admit(A, "one"), M.admit(A, "two", "operator")]
    whole = M.set(*twice)
    assert live(whole) == {A.id}
    assert has_problem(whole, "admitted twice")
    assert whole.roster == M.set(*reversed(twice)).roster


# --- names ---------------------------------------------------------------------------------------


def test_members_that_share_a_name_are_shown_apart() -> None:
    whole = M.set(M.admit(A, "pi"), M.admit(B, "pi"), M.admit(C, "pie"), ADMIT_FIRST)
    shown = {one.id: (one.name, one.given_name) for one in whole.roster.members.values()}
    assert shown == {
        A.id: (f"pi~{A.id[:4]}", "pi"),
        B.id: (f"pi~{B.id[:4]}", "pi"),
        C.id: ("pie", "pie"),
        M.first.id: ("first", "first"),
    }
    assert has_problem(whole, "2 members are called 'pi'")
    whole.add([M.revoke(A)])
    assert whole.roster.members[B.id].name == "pi"
    assert whole.roster.problems == ()


def test_names_stay_apart_when_ids_begin_alike() -> None:
    seen: dict[str, Key] = {}
    for n in range(100_000):
        one = key("alike", n)
        other = seen.setdefault(one.id[:4], one)
        if other is not one:
            break
    else:
        raise AssertionError("no two ids begin alike")
    whole = M.set(M.admit(one, "pi"), M.admit(other, "pi"))
    shown = [each.name for each in whole.roster.members.values()]
    assert len(set(shown)) == 2
    assert all(each.startswith(f"pi~{one.id[:4]}") and len(each) > len("pi~1234") for each in shown)


# --- signers -------------------------------------------------------------------------------------


def test_a_removed_signer_keeps_what_its_removal_says() -> None:
    kept, voided = M.admit(A, by=S2), M.admit(B, by=S2)
    whole = M.set(ADMIT_C, M.add_signer(S2, C), kept, voided, M.drop_signer(S2, [kept]))
    assert (live(whole), signers(whole)) == ({A.id, C.id}, {S1.hex})
    assert has_problem(whole, "1 statements of removed signers are void")
    whole.add([M.admit(D, by=S2), M.add_signer(S3, C, by=S2), M.admit(B, by=S3)])  # dated back, perhaps
    assert (live(whole), signers(whole)) == ({A.id, C.id}, {S1.hex})


def test_a_removed_signer_stays_removed() -> None:
    whole = M.set(ADMIT_A, ADMIT_B, M.add_signer(S2, A), M.drop_signer(S2), M.add_signer(S3, B))
    whole.add([M.add_signer(S2, A, by=S3), M.admit(C, by=S2)])
    assert signers(whole) == {S1.hex, S3.hex}
    assert live(whole) == {A.id, B.id}


def test_of_several_removals_only_what_all_keep_stays() -> None:
    one, two = M.admit(A, by=S2), M.admit(B, by=S2)
    base = [ADMIT_C, ADMIT_D, M.add_signer(S2, C), M.add_signer(S3, D)]
    whole = M.set(*base, one, two, M.drop_signer(S2, [one, two]))
    assert live(whole) == {A.id, B.id, C.id, D.id}
    whole.add([M.drop_signer(S2, [two], by=S3)])
    assert live(whole) == {B.id, C.id, D.id}
    whole.add([M.drop_signer(S2, [one], by=S2)])  # by itself counts too
    assert live(whole) == {C.id, D.id}


def test_two_signers_that_remove_each_other_are_both_out_and_the_recovery_key_mends_it() -> None:
    whole = M.set(ADMIT_A, M.add_signer(S2, A), M.drop_signer(S1, by=S2), M.drop_signer(S2))
    assert signers(whole) == set()
    assert live(whole) == set()
    assert has_problem(whole, "no signer is left")
    whole.add([M.new_epoch(1, {S3: A}, [ADMIT_A])])
    assert (signers(whole), live(whole), whole.roster.problems) == ({S3.hex}, {A.id}, ())


def test_a_removed_signer_can_still_take_away() -> None:
    whole = M.set(ADMIT_A, ADMIT_B, M.add_signer(S2, A), M.drop_signer(S2), M.revoke(B, by=S2))
    assert live(whole) == {A.id}


def test_a_chain_of_signers_holds_where_each_link_is_kept() -> None:
    add3 = M.add_signer(S3, B, by=S2)
    base = [ADMIT_A, ADMIT_B, M.add_signer(S2, A), add3, M.admit(C, by=S3)]
    assert live(M.set(*base)) == {A.id, B.id, C.id}
    assert live(M.set(*base, M.drop_signer(S2))) == {A.id, B.id}
    kept = M.set(*base, M.drop_signer(S2, [add3]))
    assert (live(kept), signers(kept)) == ({A.id, B.id, C.id}, {S1.hex, S3.hex})


def test_a_signer_is_legitimate_by_any_way_that_counts() -> None:
    """S3 by the removed S2, which comes first in the walk or not, and by S4: all its statements count."""
    for two, four in ((S2, S4), (S4, S2)):
        whole = M.set(
            *(ADMIT_A, ADMIT_B, ADMIT_C, ADMIT_D),
            M.add_signer(two, A),
            M.add_signer(four, B),
            M.add_signer(S3, C, by=two),
            M.add_signer(S3, C, by=four),
            M.add_signer(key("signer", 5), D, by=S3),
            M.drop_signer(two),
        )
        assert signers(whole) == {S1.hex, four.hex, S3.hex, key("signer", 5).hex}


def test_a_signer_whose_node_is_out_is_a_problem_and_follows_its_node() -> None:
    whole = M.set(ADMIT_FIRST, ADMIT_A, M.add_signer(S2, A), M.rekey(A, B))
    assert whole.roster.signers[S2.hex] == B.id
    assert whole.roster.members[B.id].is_signer
    assert whole.roster.problems == ()
    whole.add([M.revoke(B)])
    assert has_problem(whole, f"belongs to no live member: mycoswarmctl signers remove {S2.hex[:16]}")
    whole.add([M.drop_signer(S2)])
    assert whole.roster.problems == ()


def test_signed_by_is_what_a_removal_should_keep() -> None:
    admit, add = M.admit(A, by=S2), M.add_signer(S3, B, by=S2)
    whole = M.set(ADMIT_C, M.add_signer(S2, C), admit, add, M.revoke(D, by=S2), ADMIT_B)
    assert whole.signed_by(S2.hex) == set(hashes([admit, add]))
    before = (live(whole), signers(whole))
    whole.add([M.drop_signer(S2, [admit, add])])
    assert (live(whole), signers(whole)) == (before[0], before[1] - {S2.hex})
    whole.add([M.admit(D, by=S2)])
    assert whole.signed_by(S2.hex) == set(hashes([admit, add]))
    assert whole.signed_by("00" * 32) == set()


# --- whose key a signing key is ------------------------------------------------------------------


def test_a_signing_key_counts_once_its_node_is_admitted() -> None:
    add, by_it = M.add_signer(S2, A), M.admit(B, by=S2)
    whole = M.set(add, by_it)
    assert (live(whole), signers(whole)) == (set(), {S1.hex})
    whole.add([ADMIT_A])
    assert (live(whole), signers(whole)) == ({A.id, B.id}, {S1.hex, S2.hex})


def test_an_operator_holds_no_signing_key() -> None:
    whole = M.set(M.admit(A, "a", "operator"), M.add_signer(S2, A), M.admit(B, by=S2))
    assert (live(whole), signers(whole)) == ({A.id}, {S1.hex})


def test_nobody_vouches_for_themselves() -> None:
    """S2 admits the very node that is said to hold S2, and S3's; none of it begins anywhere."""
    whole = M.set(M.add_signer(S2, A), M.admit(A, by=S2), M.add_signer(S3, B, by=S2), M.admit(B, by=S3))
    assert (live(whole), signers(whole)) == (set(), {S1.hex})


def test_a_thief_leaves_no_key_behind_for_a_node_that_nobody_has() -> None:
    """What it did: a key of its own for an invented id; then the thief is put out, keeping what it gave."""
    back_door, ghost = key("back door"), key("ghost")
    base = M.set(ADMIT_A, ADMIT_B, M.add_signer(S2, A))
    thief = [M.add_signer(back_door, ghost, by=S2), M.admit(C, by=back_door)]
    base.add(thief)
    assert (live(base), signers(base)) == ({A.id, B.id}, {S1.hex, S2.hex})
    admitted = M.admit(ghost, "ghost", by=S2)
    base.add([admitted])  # now it shows
    assert signers(base) == {S1.hex, S2.hex, back_door.hex}
    base.add([M.revoke(ghost)])
    assert has_problem(base, f"signers remove {back_door.hex[:16]}")
    assert base.signed_by(S2.hex) == {admitted.sha256}  # not the key of who is out
    base.add([M.revoke(A), M.drop_signer(S2, [admitted])])
    assert (live(base), signers(base)) == ({B.id}, {S1.hex})


def test_what_a_removed_signer_named_stays_where_its_own_signatures_must() -> None:
    """S3's node is out and S3 removed, with what it gave kept; S2, who named S3, is removed later."""
    add, given = M.add_signer(S3, B, by=S2), M.admit(C, by=S3)
    whole = M.set(ADMIT_A, ADMIT_B, M.add_signer(S2, A), add, given, M.revoke(B), M.drop_signer(S3, [given]))
    assert whole.signed_by(S2.hex) == {add.sha256}
    whole.add([M.drop_signer(S2, [add])])
    assert (live(whole), signers(whole)) == ({A.id, C.id}, {S1.hex})


def test_of_two_keys_of_one_node_none_counts_until_one_is_removed() -> None:
    given = [M.admit(C, by=S2), M.admit(D, by=S3)]
    whole = M.set(ADMIT_A, ADMIT_B, M.add_signer(S2, A), given[0])
    assert (live(whole), signers(whole)) == ({A.id, B.id, C.id}, {S1.hex, S2.hex})
    whole.add([M.rekey(A, key("new a")), M.add_signer(S3, key("new a")), given[1]])  # the same machine
    assert (live(whole), signers(whole)) == ({key("new a").id, B.id}, {S1.hex})
    assert has_problem(whole, f"signing key {S2.hex[:16]} of {key('new a').id} is in dispute")
    assert whole.signing_keys() == {
        S1.hex: {M.first.id},
        S2.hex: {key("new a").id},
        S3.hex: {key("new a").id},
    }
    whole.add([M.drop_signer(S3)])
    assert (live(whole), signers(whole)) == ({key("new a").id, B.id, C.id}, {S1.hex, S2.hex})
    assert not has_problem(whole, "in dispute")


def test_a_key_that_two_nodes_are_said_to_hold_is_nobodys() -> None:
    whole = M.set(ADMIT_A, ADMIT_B, M.add_signer(S2, A), M.admit(C, by=S2))
    whole.add([M.add_signer(S2, B)])
    assert (live(whole), signers(whole)) == ({A.id, B.id}, {S1.hex})
    assert has_problem(whole, "in dispute")


def test_the_first_key_is_not_in_dispute_and_its_node_has_no_other() -> None:
    whole = M.set(ADMIT_FIRST, ADMIT_A, ADMIT_B, M.add_signer(S2, A))
    whole.add([M.add_signer(S3, M.first, by=S2), M.add_signer(S1, A, by=S2), M.admit(C, by=S3)])
    assert signers(whole) == {S1.hex, S2.hex}
    assert live(whole) == {M.first.id, A.id, B.id}
    whole.add([M.drop_signer(S1, [ADMIT_FIRST, ADMIT_A, ADMIT_B, M.add_signer(S2, A)], by=S2)])
    assert S3.hex in signers(whole)  # who loses its key may get another


def test_the_holder_of_a_removed_key_may_get_another() -> None:
    given = M.admit(B, by=S2)
    whole = M.set(ADMIT_A, M.add_signer(S2, A), given, M.drop_signer(S2, [given]), M.add_signer(S3, A))
    assert (live(whole), signers(whole)) == ({A.id, B.id}, {S1.hex, S3.hex})
    assert whole.removed_keys() == {S2.hex}


def test_a_person_is_told_of_the_gravest_problems_first_and_of_few() -> None:
    twice = [M.admit(key("many", n), f"m{n}", role) for n in range(100) for role in ("node", "operator")]
    whole = M.set(*twice, M.drop_signer(S1, twice))
    assert len(whole.roster.problems) == 65
    assert whole.roster.problems[0].startswith("no signer is left")
    assert whole.roster.problems[-1] == "and 37 more like these"


# --- keys that follow keys -----------------------------------------------------------------------


def test_a_new_key_takes_the_place_of_the_old() -> None:
    whole = M.set(ADMIT_FIRST, M.admit(A, "pi"), M.rekey(A, B), M.rekey(B, C))
    member, _ = sorted(whole.roster.members.values(), key=lambda one: one.name == "first")
    assert (member.id, member.name, member.role) == (C.id, "pi", Role.NODE)
    assert (member.cert_der, member.public_key) == (C.cert_der, C.public)
    assert whole.roster.problems == ()
    assert whole.roster.revoked == {}


@pytest.mark.parametrize("gone", [A, B, C, D], ids="abcd")
def test_revoking_any_id_of_a_chain_puts_out_what_follows(gone: Key) -> None:
    whole = M.set(ADMIT_A, M.rekey(A, B), M.rekey(B, C), M.rekey(C, D))
    assert live(whole) == {D.id}
    whole.add([M.revoke(gone, "lost")])
    assert live(whole) == set()
    chain = [A, B, C, D]
    assert set(whole.roster.revoked) == {one.id for one in chain[chain.index(gone) :]}


def test_an_old_key_that_leaves_takes_the_new_one_with_it() -> None:
    assert live(M.set(ADMIT_A, M.rekey(A, B), M.leave(A))) == set()


def test_two_followers_of_one_key_are_nobody() -> None:
    whole = M.set(ADMIT_A, M.admit(D, "d"), M.rekey(A, B), M.rekey(A, C))
    assert live(whole) == {D.id}
    assert has_problem(whole, "two followers")
    assert whole.add([M.rekey(B, key("more"))]) == ()  # what stands on a fork is not kept
    assert whole.add([M.leave(B)]) == ()


def test_one_member_cannot_fill_the_roster() -> None:
    flood = [M.rekey(A, key("flood", n)) for n in range(100)]
    chain = [key("chain", n) for n in range(100)]
    whole = M.set(ADMIT_A, ADMIT_B)
    for at in range(0, 100, 10):
        whole.add(flood[at : at + 10])
    assert len(whole) == 5
    assert whole.roster.digest == M.set(ADMIT_A, ADMIT_B, *reversed(flood)).roster.digest
    links = [M.rekey(old, new) for old, new in zip([B, *chain], chain, strict=False)]
    whole.add(links[:MAX_REKEYS])
    assert whole.add([links[MAX_REKEYS]]) == ()
    assert len(M.set(ADMIT_B, *links)) == 2 + MAX_REKEYS
    assert live(whole) == {chain[MAX_REKEYS - 1].id}
    assert whole.add([M.leave(chain[MAX_REKEYS - 1])]) != ()
    assert live(whole) == set()


def test_a_fork_that_makes_another_chain_too_long_is_taken_all_the_same() -> None:
    """C follows A, and follows the last of a long chain too; when A forks, what follows C is too far out."""
    chain = [B, *(key("chain", n) for n in range(MAX_REKEYS - 1)), C]
    whole = M.set(ADMIT_A, ADMIT_B, M.rekey(A, C), *(M.rekey(*pair) for pair in pairwise(chain)))
    whole.add([M.rekey(C, D)])
    fork = M.rekey(A, key("fork"))
    assert whole.add([fork]) == (fork,)
    assert M.rekey(C, D).sha256 in whole.pruned
    assert live(whole) == set()


def test_a_key_that_is_claimed_twice_is_nobody() -> None:
    admitted = M.set(ADMIT_A, ADMIT_B, M.rekey(A, B))
    assert live(admitted) == set()
    assert has_problem(admitted, "claimed twice")
    joined = M.set(ADMIT_A, ADMIT_B, M.rekey(A, C), M.rekey(B, C))
    assert live(joined) == set()
    circle = M.set(ADMIT_A, M.rekey(A, B), M.rekey(B, A))
    assert live(circle) == set()
    lasso = M.set(ADMIT_A, M.rekey(A, B), M.rekey(B, C), M.rekey(C, B))
    assert live(lasso) == set()
    for one in (admitted, joined, circle, lasso):
        assert one.roster.problems


# --- the recovery key ----------------------------------------------------------------------------


def test_an_epoch_replaces_everything_but_what_it_keeps() -> None:
    rekey = M.rekey(B, D)
    whole = M.set(ADMIT_A, ADMIT_B, ADMIT_C, rekey, M.revoke(C), M.add_signer(S2, A))
    before = whole.roster.hashes
    epoch = M.new_epoch(1, {S3: A}, [ADMIT_A, ADMIT_B, ADMIT_C, rekey])
    assert whole.add([epoch]) == (epoch,)
    assert live(whole) == {A.id, D.id, C.id}  # the paper key may restore
    assert whole.roster.revoked == {}
    assert whole.roster.signers == {S3.hex: A.id}
    assert whole.roster.hashes == {M.swarm_id, epoch.sha256, *hashes([ADMIT_A, ADMIT_B, ADMIT_C, rekey])}
    assert set(whole.pruned) == before - whole.roster.hashes
    later = Maker(epoch=1)
    whole.add([later.admit(key("late"), "late", by=S3), later.revoke(C, by=S3)])
    assert names(whole) == ["a", "b", "late"]
    assert whole.pruned == ()


def test_an_epoch_keeps_admissions_and_rekeys_and_nothing_else() -> None:
    revoke, add, drop = M.revoke(A), M.add_signer(S2, A), M.drop_signer(S1)
    whole = M.set(ADMIT_A, revoke, add)
    whole.add([M.new_epoch(1, {S3: A}, [ADMIT_A, revoke, add, drop])])
    assert (live(whole), signers(whole)) == ({A.id}, {S3.hex})
    assert whole.add([revoke, add, drop]) == ()


def test_an_epoch_works_where_the_statements_that_it_keeps_come_later() -> None:
    epoch = M.new_epoch(3, {S3: A}, [ADMIT_A])
    whole = M.set(epoch)
    assert live(whole) == set()
    assert whole.add([ADMIT_B]) == ()
    assert whole.add([ADMIT_A]) == (ADMIT_A,)
    assert live(whole) == {A.id}


def test_an_epoch_keeps_what_is_older_and_vouches_for_nothing_of_its_own() -> None:
    by_stranger = Maker(epoch=1).admit(B, by=key("stranger"))
    whole = M.set(ADMIT_A, M.new_epoch(1, {S2: A}, [ADMIT_A, by_stranger]))
    assert refused(whole, by_stranger) == "bad-statement"
    assert live(whole) == {A.id}


def test_nothing_that_is_held_stands_in_the_way_of_an_epoch() -> None:
    """It keeps a rekey, and neither the admission nor the other rekey that led to it."""
    rekeys = [M.rekey(A, B), M.rekey(B, C)]
    whole = M.set(ADMIT_A, *rekeys)
    epoch = M.new_epoch(1, {S2: D}, [rekeys[1]])
    assert whole.add([epoch]) == (epoch,)
    assert (live(whole), whole.roster.epoch) == (set(), 1)
    assert whole.add([ADMIT_A, *rekeys]) == ()
    assert whole.add([rekeys[1]]) == ()
    assert whole.roster.hashes == M.set(epoch).roster.hashes


def test_a_stolen_signer_ends_with_the_epoch() -> None:
    whole = M.set(ADMIT_A, ADMIT_B)
    whole.add([M.new_epoch(1, {S2: A}, [ADMIT_A, ADMIT_B])])
    assert refused(whole, Maker(epoch=1).revoke(B)) == "bad-statement"
    assert live(whole) == {A.id, B.id}


def test_admissions_are_what_an_epoch_should_keep() -> None:
    rekeys = [M.rekey(A, B), M.rekey(B, C)]
    admit_d = M.admit(D, "d")
    whole = M.set(ADMIT_A, *rekeys, admit_d, M.revoke(D), M.admit(key("else"), "else"))
    assert whole.admissions([C.id]) == set(hashes([ADMIT_A, *rekeys]))
    assert whole.admissions([B.id]) == set(hashes([ADMIT_A, rekeys[0]]))
    assert whole.admissions([D.id, "unknown"]) == {admit_d.sha256}
    whole.add([M.new_epoch(1, {S2: C}, [ADMIT_A, *rekeys, admit_d])])
    assert live(whole) == {C.id, D.id}
    assert whole.admissions([C.id]) == set(hashes([ADMIT_A, *rekeys]))


def test_of_two_epochs_with_one_number_what_both_say_counts() -> None:
    one = M.new_epoch(1, {S2: A, S3: B}, [ADMIT_A, ADMIT_B])
    two = M.new_epoch(1, {S3: B, S4: C}, [ADMIT_B, ADMIT_C])
    later = Maker(epoch=1)
    whole = M.set(ADMIT_A, ADMIT_B, ADMIT_C, one)
    whole.add([later.admit(D, by=S2)])
    whole.add([two])
    assert (live(whole), signers(whole)) == ({B.id}, {S3.hex})
    assert has_problem(whole, "used twice")
    other = M.set(ADMIT_A, ADMIT_B, ADMIT_C, two)
    other.add([one, later.admit(D, by=S2)])
    assert other.roster == whole.roster
    whole.add([later.revoke(B, by=S4)])
    assert live(whole) == set()
    whole.add([M.new_epoch(2, {S4: A}, [ADMIT_A]), ADMIT_A])
    assert (live(whole), whole.roster.problems) == ({A.id}, ())


def test_a_node_behind_an_equal_epoch_is_not_refused() -> None:
    """It holds only one of the two, and sends what rests on that one alone."""
    one = M.new_epoch(1, {S2: A}, [ADMIT_A])
    two = M.new_epoch(1, {S2: A}, [ADMIT_B])
    later = Maker(epoch=1)
    behind = M.set(one, ADMIT_A, later.rekey(A, C), later.leave(C))
    ahead = M.set(one, two)
    ahead.add(behind.missing(ahead.roster.hashes))
    behind.add(ahead.missing(behind.roster.hashes))
    assert ahead.roster == behind.roster
    assert live(ahead) == set()


def test_an_epoch_brings_what_it_keeps_also_where_another_dropped_it() -> None:
    """And where the signer that admitted it was never heard of."""
    added = [M.add_signer(S2, A), ADMIT_A, M.admit(B, by=S2)]
    ahead = M.set(*added)
    ahead.add([M.new_epoch(2, {S3: A}, added)])
    for behind in (M.set(), M.set(M.new_epoch(1, {S4: C}))):
        wires = [encode_statement(one) for one in ahead.missing(behind.roster.hashes)]
        behind.add(read_new(wires, behind, parse=parse))
        assert behind.roster == ahead.roster
        assert live(behind) == {A.id, B.id}


# --- bounds --------------------------------------------------------------------------------------


def test_a_full_roster_takes_what_puts_somebody_out_and_a_new_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mycoswarmd.core.roster.statements.MAX_STATEMENTS", 16)
    monkeypatch.setattr("mycoswarmd.core.roster.statements.RESERVED_STATEMENTS", 4)
    many = [M.admit(key("many", n)) for n in range(8)]
    whole = M.set(ADMIT_FIRST, ADMIT_A, M.add_signer(S2, A), *many)
    assert len(whole) == 12
    stranger = key("stranger")
    for one in (ADMIT_B, M.revoke(stranger), M.drop_signer(stranger), M.add_signer(S3, A), M.rekey(A, B)):
        full(whole, one)
    full(whole, M.revoke(A), ADMIT_B)
    assert whole.urgent([M.revoke(A), ADMIT_B, M.revoke(A, by=S3)]) == [M.revoke(A)]
    whole.add([M.revoke(A), M.drop_signer(S2), M.revoke(key("many", 1))])
    assert not {A.id, key("many", 1).id} & live(whole)
    assert signers(whole) == {S1.hex}
    full(whole, M.revoke(key("many", 2), by=S2))  # who was put out puts nobody out in a full roster
    full(whole, M.leave(key("many", 3)))  # nobody is in danger if that is not heard
    whole.add([M.revoke(key("many", 3))])
    assert len(whole) == 16
    full(whole, M.revoke(key("many", 4)))
    again = StatementSet(M.genesis)
    again.add(whole.missing(frozenset()), whole=True)
    assert again.roster == whole.roster
    whole.add([M.new_epoch(1, {S2: A}, [ADMIT_A, *many]), ADMIT_A])
    assert {A.id, key("many", 1).id} <= live(whole)


def test_a_line_of_signers_that_floods_the_roster_has_none_of_the_last_places(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("MAX_STATEMENTS", 40), ("RESERVED_STATEMENTS", 10), ("MAX_QUIET_STATEMENTS", 12)):
        monkeypatch.setattr(f"mycoswarmd.core.roster.statements.{name}", value)
    accomplice = key("accomplice")
    whole = M.set(ADMIT_FIRST, ADMIT_A, ADMIT_B, M.add_signer(S2, A), M.add_signer(S4, B))
    whole.add([M.admit(accomplice, by=S2), M.add_signer(S3, accomplice, by=S2), M.add_signer(S4, B, by=S2)])
    junk = [key("junk", n) for n in range(20)]
    whole.add([M.admit(one, by=S2 if n % 2 else S3) for n, one in enumerate(junk)])
    assert len(whole) == 29
    whole.add([ADMIT_C])
    for thief in (S2, S3):  # its own junk, and the honest
        full(whole, M.revoke(junk[1], by=thief))
        full(whole, M.drop_signer(S1, by=thief))
    whole.add([M.revoke(junk[3], by=S4)])  # whom a thief names, too, is no thief
    whole.add([M.revoke(A), M.drop_signer(S2, by=S1)])
    assert signers(whole) == {S1.hex, S4.hex}


def full(whole: StatementSet, *statements: Statement) -> None:
    before = whole.roster
    with pytest.raises(Unavailable, match="roster-full"):
        whole.add(statements)
    assert whole.roster == before


def test_a_roster_has_a_bound_in_bytes_and_an_epoch_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mycoswarmd.core.roster.statements.MAX_ROSTER_BYTES", 400_000)
    monkeypatch.setattr("mycoswarmd.core.roster.statements.RESERVED_BYTES", 100_000)
    junk = [f"{n:064x}" for n in range(4_400)]
    drop = parse(M.wire(Kind.DROP_SIGNER, S1, by=S1.hex, key=key("x").hex, keep=junk))
    assert len(drop.body) > 290_000
    whole = M.set(ADMIT_A, M.add_signer(S2, A), drop)
    full(whole, *(M.admit(key("many", n)) for n in range(10)))
    big = parse(M.wire(Kind.DROP_SIGNER, S1, by=S1.hex, key=S2.hex, keep=junk[:1_000]))
    whole.add([big])
    assert signers(whole) == {S1.hex}
    whole.add([M.new_epoch(1, {S2: A}, [ADMIT_A])])
    assert live(whole) == {A.id}


def test_a_beacon_of_another_swarm_says_so_itself() -> None:
    beacon = parse_beacon(Maker(name="other").beacon(3), verify=keys.verify)
    assert beacon.swarm != M.swarm_id


def test_what_a_person_reads_never_has_a_strangers_escape_codes() -> None:
    with pytest.raises(BadRequest):
        parse(M.wire(Kind.REVOKE, S1, by=S1.hex, node=A.id, reason="\x1b]0;x"))


# --- what one request carries --------------------------------------------------------------------


@pytest.mark.parametrize("large", [False, True], ids=["many-small", "few-large"])
def test_a_portion_and_all_hashes_fit_into_one_request(large: bool) -> None:
    small = M.wire(Kind.LEAVE, A, node=A.id, key=A.hex)  # of its kind, what is around the body is most
    wires = [
        {**small, "body": "x" * 1_398_104 if large else small["body"]} for _ in range(9 if large else 9_500)
    ]
    have = [f"{n:064x}" for n in range(MAX_STATEMENTS)]
    parts = list(portions(wires))
    assert [one for part in parts for one in part] == wires
    for part in parts:
        body = json.dumps({"have": have, "statements": part, "port": 65535, "fresh": True})
        assert len(body) <= SYNC_BYTES
    assert len(parts) <= (9 if large else 3)
    assert list(portions([])) == []


def test_the_hashes_of_a_pull_fit_into_one_request() -> None:
    have = [f"{n:064x}" for n in range(MAX_PULL_HASHES)]
    assert len(json.dumps({"have": have, "port": 65535})) <= PULL_BYTES
