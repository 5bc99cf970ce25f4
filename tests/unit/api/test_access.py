"""Roles and doors."""

import pytest

from mycoswarmd.api.access import SWARM_LISTENER, Caller, Door, Listener, Who, check_roles
from mycoswarmd.core.types import Principal
from mycoswarmd.errors import Denied


def test_a_listener_with_names_is_for_programs() -> None:
    assert Listener().door is Door.UNIX
    assert Listener(hosts=frozenset({"127.0.0.1:7436"})).door is Door.TCP
    assert SWARM_LISTENER.door is Door.SWARM


def test_one_role_of_those_needed_is_enough() -> None:
    caller = Caller(Principal(node="n"), frozenset({Who.NODE, Who.SIGNER}))
    check_roles(caller, frozenset({Who.SIGNER}))
    check_roles(caller, frozenset({Who.OPERATOR, Who.NODE}))


def test_a_role_that_is_not_enough_is_said_with_the_one_needed() -> None:
    caller = Caller(Principal(node="n"), frozenset({Who.NODE}))
    with pytest.raises(Denied) as caught:
        check_roles(caller, frozenset({Who.LOCAL, Who.OPERATOR}))
    assert (caught.value.code, caught.value.http_status) == ("role-needed", 403)
    assert caught.value.message == "cannot do this as node: it needs role local or operator"
    with pytest.raises(Denied, match="needs role signer"):
        check_roles(caller, frozenset({Who.SIGNER}))


def test_nobody_enters_a_route_without_roles() -> None:
    for role in Who:
        with pytest.raises(Denied):
            check_roles(Caller(Principal(), frozenset({role})), frozenset())
