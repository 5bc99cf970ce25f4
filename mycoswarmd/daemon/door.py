"""The listener for programs with an API key, where somebody else makes it: opened as soon as that can be.

Law: a door that cannot be opened is a problem that `status` shows; the rest of the node works on.
"""

import asyncio
import logging

from mycoswarmd.api.access import Listener
from mycoswarmd.api.app import Api
from mycoswarmd.daemon.outside import Outside
from mycoswarmd.errors import ConfigError

log = logging.getLogger(__name__)

_AGAIN_S = 5.0
HINT = "choose another with listen in the settings"


def program_listener(host: str, port: int) -> Listener:
    """Return what a listener at a loopback address is called by those who know it."""
    bracketed = host if ":" not in host else f"[{host}]"
    return Listener(hosts=frozenset({f"{bracketed}:{port}", f"localhost:{port}"}))


class ProgramDoor:
    """One loopback listener, or none.

    Attributes:
        is_open: whether programs can come in here.
        problem: why not, or "".
    """

    def __init__(self, outside: Outside, where: tuple[str, int] | None) -> None:
        self._outside = outside
        self._where = where
        self.is_open = False
        self.problem = ""

    async def run(self, api: Api) -> None:
        """Keep it open until cancelled."""
        while self._where is not None:
            try:
                sock = await self._outside.listen(*self._where, HINT)
            except ConfigError as exc:
                if self.problem != exc.message:
                    log.error("%s", exc, extra={"event": "listener-down"})  # noqa: TRY400 - in its own words
                self.problem = exc.message
                await asyncio.sleep(_AGAIN_S)
                continue
            self.problem = ""
            async with api.listening(sock, program_listener(*self._where)):
                log.info("listening for programs at http://%s:%d/v1 (API key needed)", *self._where)
                self.is_open = True
                await asyncio.get_running_loop().create_future()  # until cancelled
