"""Where members may listen: addresses that a person gives, and what the network's announcements say.

Law: whatever is found here is a hint. Who is there is proved by a key before anything is sent.
Announcements are parsed in a process of its own, which holds no key: the parser reads what any machine
on the network sends.
"""

import socket
import subprocess
import sys
from collections.abc import Iterator

from mycoswarmd.errors import BadRequest, NotFound
from mycoswarmd.wire.hints import LINE_BYTES, Sighting, parse_report

PORT = 7437
_LISTEN_S = 3
_MAX_LINES = 256
_DISCOVERY = "mycoswarmd.outposts.discovery"

Address = tuple[str, int]


def show(address: Address) -> str:
    """Return an address as people write it."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split(text: str) -> Address:
    """Split HOST, HOST:PORT, [HOST]:PORT or a bare IPv6 address; BadRequest("bad-address")."""
    host, port = text.strip(), str(PORT)
    if host.startswith("["):
        host, bracket, rest = host[1:].partition("]")
        port = rest[1:] if rest.startswith(":") else port if bracket and not rest else ""
    elif host.count(":") == 1:
        host, _, port = host.partition(":")
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) <= 65_535
    if not host or not is_port or not host.isprintable() or set(host) & set(" /@?#[]"):
        raise BadRequest(
            "bad-address", f"cannot read {text!r} as an address", hint="such as 10.0.0.7 or 10.0.0.7:7437"
        )
    return host, int(port)


def resolve(text: str) -> list[Address]:
    """Return the addresses, in numbers, that a person's HOST[:PORT] stands for; NotFound when none."""
    host, port = split(text)
    try:
        rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        why = getattr(exc, "strerror", None) or "no such name"
        raise NotFound("unknown-host", f"cannot find {host!r} on the network: {why}") from exc
    return list(dict.fromkeys((_host(row[4]), port) for row in rows))


def announced(listen_s: int = _LISTEN_S) -> Iterator[tuple[str, Address]]:
    """Yield (node id, address) as announcements come in, for so many seconds."""
    command = [sys.executable, "-I", "-m", _DISCOVERY, "--once", str(listen_s)]
    with subprocess.Popen(  # noqa: S603 - our own module, by the interpreter that runs us
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdout is not None
        try:
            for _ in range(_MAX_LINES):
                untrusted = child.stdout.readline(LINE_BYTES)
                if not untrusted:
                    return
                yield from parse_line(untrusted)
        finally:
            child.kill()


def parse_line(untrusted: bytes) -> Iterator[tuple[str, Address]]:
    """Yield what one line of the listener says of where somebody is; often that is nothing."""
    try:
        report = parse_report(untrusted)
    except BadRequest:
        return
    if isinstance(report, Sighting):
        for host in report.addresses:
            yield report.node_id, (host, report.port)


def _host(sockaddr: tuple[object, ...]) -> str:
    host = str(sockaddr[0])
    scope = sockaddr[3] if len(sockaddr) == 4 else 0
    return f"{host}%{scope}" if scope and "%" not in host else host
