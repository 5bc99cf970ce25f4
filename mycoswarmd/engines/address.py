"""Where an engine on this machine listens: a loopback address or a unix socket, and nothing else.

Rule (M1): an address that could be another machine is a destination, which the policy declares and a
node's engines never are. A host *name* is refused too: what it means is somebody else's decision.
"""

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from mycoswarmd.errors import ConfigError

_HINT = "an engine is at http://127.0.0.1:PORT, http://[::1]:PORT or unix:/path/of/its.sock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A checked address: what to put before a path, and the socket's path where it is one."""

    base_url: str
    socket_path: str | None


def parse_address(text: str, *, engine: str) -> Address:
    """Check where an engine listens, or raise ConfigError("engine-address")."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path.startswith("/") or "\0" in path:
            raise _bad(engine, text, "a socket's path must be absolute")
        return Address(base_url="http://engine", socket_path=path)
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError as exc:
        raise _bad(engine, text, str(exc)) from exc
    if url.scheme != "http":
        raise _bad(engine, text, "its scheme must be http")
    if url.username is not None or url.password is not None or url.query or url.fragment:
        raise _bad(engine, text, "it may have a host, a port and the path /v1, and nothing else")
    if url.path not in {"", "/", "/v1", "/v1/"}:
        raise _bad(engine, text, "its path may only be /v1")
    try:
        ip = ipaddress.ip_address(url.hostname or "")
    except ValueError as exc:
        raise _bad(engine, text, "its host must be a loopback address in numbers") from exc
    if not ip.is_loopback:
        raise _bad(engine, text, "its host must be a loopback address: another machine is a destination")
    host = f"[{ip}]" if ip.version == 6 else str(ip)
    return Address(base_url=f"http://{host}:{port or 80}", socket_path=None)


def _bad(engine: str, text: str, cause: str) -> ConfigError:
    return ConfigError("engine-address", f"cannot use engine {engine!r} at {text!r}: {cause}", hint=_HINT)
