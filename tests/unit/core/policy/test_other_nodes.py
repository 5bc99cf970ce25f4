"""What the policy makes of other nodes: which one a permit is for, who speaks, and whose key it is."""

from dataclasses import replace

import pytest

from mycoswarmd.core.policy.administer import NOBODY
from mycoswarmd.core.policy.evaluate import Approval, NeedsApproval, Permit, evaluate
from mycoswarmd.core.policy.model import Conditions, Origin, is_person, origins_of
from mycoswarmd.core.policy.request import fingerprint
from mycoswarmd.core.types import Action, Effect, Principal, Request, Start, Zone
from tests.policies import checked, policy_of, rule_of, word

EVERYTHING = policy_of([rule_of(0, Effect.ALLOW, Conditions())])

PI_ID = "abcdefghijklmnopqrstuvwx23"
PC_ID = "bcdefghijklmnopqrstuvwx234"
OWNER = Principal(is_owner=True, uid=0)
OPERATOR = Principal(is_owner=True, operator="anna")
PI = Principal(node="pi", node_id=PI_ID)
HEAD = 'schema = 1\nname = "p"\n'
RULE = '[[rule]]\nid = "r"\nwhy = "w"\neffect = "{}"\naction = "infer"\n{}\n'


def permit(zone: Zone, node: str | None) -> Permit:
    request = Request(action=Action.INFER, principal=OWNER, zone=zone, node=node, model="m", label="public")
    found = evaluate(EVERYTHING, request)
    assert isinstance(found, Permit), found
    return found


def test_a_permit_for_the_lan_is_for_one_node() -> None:
    one = permit(Zone.LAN, "pi")
    assert one.covers(zone=Zone.LAN, model="m", node="pi")
    assert not one.covers(zone=Zone.LAN, model="m", node="pc")
    assert not one.covers(zone=Zone.LAN, model="m")
    assert not one.covers(zone=Zone.SELF, model="m", node="pi")
    nowhere = permit(Zone.LAN, None)
    assert not nowhere.covers(zone=Zone.LAN, model="m")
    assert not nowhere.covers(zone=Zone.LAN, model="m", node="pi")
    # here, who computes is no question
    assert permit(Zone.SELF, "here").covers(zone=Zone.SELF, model="m")


def decided(policy_text: str, request: Request) -> str:
    return word(evaluate(checked(HEAD + policy_text).policy, request))


@pytest.mark.parametrize("start", Start)
def test_a_node_is_known_by_its_name_or_by_the_id_of_its_key(start: Start) -> None:
    request = Request(action=Action.INFER, principal=PI, start=start)
    rule = RULE.format("allow", 'origin = ["friend"]')
    by_name = '[origins]\nfriend = { node = "pi" }\n' + rule
    by_id = f'[origins]\nfriend = {{ node = "{PI_ID}" }}\n' + rule
    for text in (by_name, by_id):
        assert decided(text, request) == "allow"
        other = Principal(node="pc", node_id=PC_ID)
        assert decided(text, replace(request, principal=other)) == "deny"
    # another key under the same name, and the same key under another name
    thief = replace(request, principal=Principal(node="pi", node_id=PC_ID))
    renamed = replace(request, principal=Principal(node="kitchen", node_id=PI_ID))
    assert (decided(by_name, thief), decided(by_id, thief)) == ("allow", "deny")
    assert (decided(by_name, renamed), decided(by_id, renamed)) == ("deny", "allow")


def test_a_name_in_the_form_of_an_id_is_not_that_key() -> None:
    """Who may name nodes must not be able to speak as another's key."""
    friend = Origin(name="friend", kind="node", value=PI_ID)
    assert friend.is_one_of(PI)
    assert not friend.is_one_of(Principal(node=PI_ID, node_id=PC_ID))
    assert not friend.is_one_of(Principal(node=PI_ID))


def test_a_rule_about_an_id_is_proved_tested_and_explained() -> None:
    """What a proof and a test say of an id is what happens: neither overlooks it."""
    origins = f'[origins]\nfriend = {{ node = "{PI_ID}" }}\n'
    rule = RULE.format("allow", 'origin = ["friend"]\nfrom = ["peer"]')
    test = (
        '[[test]]\nname = "t"\nrequest = {{ action = "infer", from = "peer", origin = {} }}\nexpect = "{}"\n'
    )
    good = checked(
        HEAD
        + origins
        + rule
        + test.format(f'{{ node = "{PI_ID}" }}', "allow")
        + test.format('"friend"', "allow").replace('"t"', '"u"')
        + test.format('{ node = "pi" }', "deny").replace('"t"', '"v"')
    )
    # A rule that nobody could match would be warned about, too.
    assert [one.message for one in good.warnings] == [NOBODY]
    never = '[[invariant]]\nid = "i"\nnever = { action = ["infer"], from = ["peer"] }\n'
    with pytest.raises(Exception, match=PI_ID):
        checked(HEAD + origins + rule + never)


def test_an_operator_is_the_owner_at_another_machine() -> None:
    assert is_person(OPERATOR)
    assert "owner" in origins_of(EVERYTHING, OPERATOR)
    assert OPERATOR.describe() == "operator:anna"
    policy = policy_of([rule_of(0, Effect.ALLOW, Conditions(origin=("owner",)))])
    request = Request(action=Action.ADMIN, principal=OPERATOR)
    assert isinstance(evaluate(policy, request), Permit)
    # only where the key was admitted as such, and never from a node
    for who in (replace(OPERATOR, is_owner=False), replace(OPERATOR, node="pi")):
        assert not isinstance(evaluate(policy, replace(request, principal=who)), Permit)
    assert not isinstance(evaluate(policy, replace(request, start=Start.PEER)), Permit)


def test_a_yes_to_one_speaker_is_none_to_another() -> None:
    request = Request(action=Action.INFER, principal=OPERATOR, zone=Zone.LAN, node="pi")
    others = [
        replace(request, principal=replace(OPERATOR, operator="bert")),
        replace(request, principal=PI),
        replace(request, principal=replace(PI, node_id=PC_ID)),
        replace(request, node="pc"),
    ]
    prints = {fingerprint(one, label="private") for one in (request, *others)}
    assert len(prints) == 5

    asks = checked(HEAD + RULE.format("ask", "always = true").replace('action = "infer"\n', "")).policy
    needs = evaluate(asks, request)
    assert isinstance(needs, NeedsApproval)
    approval = Approval(what=needs.what, by=OWNER)
    assert isinstance(evaluate(asks, request, approval=approval), Permit)
    for other in others:
        assert isinstance(evaluate(asks, other, approval=approval), NeedsApproval)
    by_operator = Approval(what=needs.what, by=OPERATOR)
    assert isinstance(evaluate(asks, request, approval=by_operator), Permit)
    assert isinstance(evaluate(asks, request, approval=Approval(what=needs.what, by=PI)), NeedsApproval)
