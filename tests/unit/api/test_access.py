"""Roles and doors."""

from mycoswarmd.api.access import SWARM_LISTENER, Caller, Door, Listener, Who, role_needed
from mycoswarmd.core.types import Principal


def test_a_listener_with_names_is_for_programs() -> None:
    assert Listener().door is Door.UNIX
    assert Listener(hosts=frozenset({"127.0.0.1:7436"})).door is Door.TCP
    assert SWARM_LISTENER.door is Door.SWARM


def test_a_refusal_names_the_roles_that_there_are_and_those_needed() -> None:
    signer = Caller(Principal(node="n"), frozenset({Who.NODE, Who.SIGNER}))
    refusal = role_needed(signer, frozenset({Who.LOCAL, Who.OPERATOR}))
    assert (refusal.code, refusal.http_status) == ("role-needed", 403)
    assert refusal.message == "cannot do this as node and signer: it needs role local or operator"
    assert "on that machine" in refusal.hint
    assert role_needed(signer, frozenset({Who.OPERATOR})).hint == ""
