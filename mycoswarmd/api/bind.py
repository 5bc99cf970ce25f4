"""The sockets that are listened on: bound at once, or an error that says who has them."""

import os
import socket
from pathlib import Path

from mycoswarmd.errors import ConfigError

BACKLOG = 256


def bind_unix(path: Path, *, mode: int) -> socket.socket:
    """Bind a unix socket; a stale one of a dead daemon is replaced."""
    if len(os.fsencode(path)) > 107:
        raise ConfigError(
            "socket-path-too-long",
            f"cannot listen on {str(path)!r}: a unix socket's path has at most 107 bytes",
            hint="choose a shorter --state directory",
        )
    if _is_answered(path):
        raise ConfigError("already-running", f"cannot listen on {str(path)!r}: another node answers there")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        path.unlink(missing_ok=True)
        sock.bind(str(path))
        path.chmod(mode)
    except OSError as exc:
        sock.close()
        raise ConfigError("bad-socket", f"cannot listen on {str(path)!r}: {exc.strerror}") from exc
    return sock


def _is_answered(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(str(path))
        except OSError:
            return False
        return True


def bind_tcp(
    host: str, port: int, *, hint: str = "choose another with --listen, or --no-listen"
) -> socket.socket:
    """Bind a TCP socket to an address in numbers; `::` is every address, also those of IPv4."""
    every = host == "::"
    if every and not socket.has_dualstack_ipv6():
        every, host = False, "0.0.0.0"  # noqa: S104 - every address, on a kernel without IPv6
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )[0]
        sock = socket.create_server(
            address, family=family, backlog=BACKLOG, reuse_port=False, dualstack_ipv6=every
        )
        sock.setblocking(False)  # noqa: FBT003
    except OSError as exc:
        raise ConfigError(
            "port-taken",
            f"cannot listen on {host}:{port}: {exc.strerror}",
            hint=f"another program has it; {hint}",
        ) from exc
    return sock


def bind_swarm(host: str, port: int) -> socket.socket:
    """Bind the swarm's listener."""
    return bind_tcp(host, port, hint='choose another with swarm_listen, or "none"')
