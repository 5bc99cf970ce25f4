"""Connections of aiohttp's client that go to one address, made by this process or by the LAN dialer for it.

Laws:

1. Bytes go to the address that was given at the start, whatever a request's URL names: that name is only
   what TLS expects in the certificate. No resolver is asked and no proxy.
2. A socket that somebody else made is treated like one's own: what fails is the same exception of aiohttp.
   TLS is this process's business; whoever dialled sees what a router sees.

Source: aiohttp 3.8 to 3.14, whose connectors all make their connections in `_create_connection`.
"""

import asyncio
import socket
from ssl import CertificateError, SSLContext, SSLError
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.tracing import Trace

from mycoswarmd.flow.ports import Dial

# Where a session bounds it otherwise, this is not used.
_CONNECT_S = 10.0
# An end in the way of TLS waits for the other side, and keeps the descriptor as long.
_SHUTDOWN_S = 1.0


async def dial_directly(host: str, port: int, within_s: float) -> socket.socket:
    """Connect with a socket of this process; the `Dial` of a node that has a network."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.settimeout(0)
        async with asyncio.timeout(within_s):
            await asyncio.get_running_loop().sock_connect(sock, (host, port))
    except BaseException:
        sock.close()
        raise
    return sock


class DialledConnector(aiohttp.BaseConnector):
    """Keeps connections to one address."""

    def __init__(self, dial: Dial, host: str, port: int, *, limit: int, keepalive_timeout: float) -> None:
        super().__init__(limit=limit, keepalive_timeout=keepalive_timeout)
        self._dial = dial
        self._where = (host, port)

    async def _create_connection(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - as aiohttp has it
    ) -> ResponseHandler:
        """Return a new connection, behind TLS where the request says so."""
        del traces
        within_s = timeout.sock_connect or _CONNECT_S
        context = req.ssl if isinstance(req.ssl, SSLContext) else None
        if req.is_ssl() != (context is not None):
            raise aiohttp.ClientConnectionError("TLS needs a context of its own, made for one member")
        tls: dict[str, Any] = {}
        if context is not None:
            tls = {
                "ssl": context,
                "server_hostname": req.url.raw_host,
                "ssl_shutdown_timeout": _SHUTDOWN_S,
            }
        try:
            async with asyncio.timeout(within_s):
                sock = await self._dial(*self._where, within_s)
                # From here on the transport owns the socket, also where this fails.
                _, protocol = await self._loop.create_connection(self._factory, sock=sock, **tls)
        except CertificateError as exc:
            raise aiohttp.ClientConnectorCertificateError(req.connection_key, exc) from exc
        except SSLError as exc:
            raise aiohttp.ClientConnectorSSLError(req.connection_key, exc) from exc
        except TimeoutError:
            raise  # aiohttp makes its own of it
        except OSError as exc:
            raise aiohttp.ClientConnectorError(req.connection_key, exc) from exc
        return protocol
