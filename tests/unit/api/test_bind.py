"""Where the listeners bind."""

import socket

import pytest

from mycoswarmd.api.bind import bind_swarm, bind_tcp
from mycoswarmd.errors import ConfigError


def reaches(sock: socket.socket, host: str) -> bool:
    """Tell whether a connection to this address arrives."""
    sock.listen()
    try:
        with socket.create_connection((host, sock.getsockname()[1]), timeout=60):
            return True
    except OSError:
        return False


@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("::", {"127.0.0.1": True, "::1": True}),
        ("0.0.0.0", {"127.0.0.1": True, "::1": False}),
        ("127.0.0.1", {"127.0.0.1": True, "127.0.0.2": False}),
        ("::1", {"::1": True, "127.0.0.1": False}),
    ],
)
def test_every_address_or_the_one_given(host: str, reached: dict[str, bool]) -> None:
    with bind_swarm(host, 0) as sock:
        assert {one: reaches(sock, one) for one in reached} == reached


def test_on_a_kernel_without_ipv6_every_address_is_those_of_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with bind_swarm("::", 0) as sock:
        assert sock.family is socket.AF_INET
        assert reaches(sock, "127.0.0.1")


def test_a_taken_port_is_said_with_what_to_do() -> None:
    with bind_swarm("127.0.0.1", 0) as sock:
        sock.listen()
        with pytest.raises(ConfigError, match=r"port-taken.*swarm_listen"):
            bind_swarm("127.0.0.1", sock.getsockname()[1])
        with pytest.raises(ConfigError, match=r"port-taken.*--listen"):
            bind_tcp("127.0.0.1", sock.getsockname()[1])


@pytest.mark.parametrize("host", ["localhost", "kitchen.local", "10.0.0", "192.0.2.1"])
def test_what_is_no_address_of_this_machine_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        bind_swarm(host, 0)
