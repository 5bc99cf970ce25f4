"""Engines as units: PID 1 builds the confinement, a connection is the engine's life.

Law: nothing is started here. Whoever connects to the socket of mycoswarm-engine@.service gets a unit of its
own, which proves its confinement, looks up what it is asked for by itself and ends with the connection. What
it says is bounded and checked (wire/engineunit.py).

Source: systemd.socket(5) for Accept=yes; systemd/README.md.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mycoswarmd.errors import BadRequest, CageError, ConfigError, EngineError
from mycoswarmd.wire.engineunit import (
    REPORT_BYTES,
    Ended,
    Order,
    Proved,
    Refused,
    Report,
    Serving,
    Started,
    encode_order,
    parse_report,
)
from mycoswarmd.wire.proof import CheckName, Proof

log = logging.getLogger(__name__)

# systemd needs 0.1 s, the self-test less; a Pi that swaps gets this long.
START_S = 30.0
# After the connection's end the kernel needs milliseconds to end an engine of many gigabytes.
END_S = 10.0
# What makes a confinement; the memory bound is for the machine's sake.
_CONFINED = (
    CheckName.INET_SOCKET,
    CheckName.ADDRESS_FAMILIES,
    CheckName.NO_NEW_PRIVILEGES,
    CheckName.SECCOMP,
    CheckName.CAPABILITIES,
)
_HINT = "systemctl status mycoswarm-engine.socket; journalctl -u 'mycoswarm-engine@*'"


class EngineUnit:
    """A unit with a running engine; whoever started it must await `kill`.

    Attributes:
        pid: the engine's own process.
        proof: what the unit found out about its confinement.
        confined: whether that is enough.
        socket_path: where the engine will listen.
    """

    def __init__(self, lines: "_Lines", *, pid: int, proof: Proof, socket_path: Path, log_path: Path) -> None:
        self._lines = lines
        self._log_path = log_path
        self._code: int | None = None
        self.pid = pid
        self.proof = proof
        self.confined = all(proof.holds(name) for name in _CONFINED)
        self.socket_path = socket_path

    async def wait(self) -> int:
        """Wait for the engine's end, write down its last words, and return its code.

        Raises CageError("engine-unit") when the unit ends without a word, as it does when PID 1 ends it.
        """
        if self._code is None:
            report = await self._lines.read()
            if not isinstance(report, Ended):
                raise _garbage()
            with suppress(OSError):  # a full disk: then there are no last words
                self._log_path.write_text(report.log, encoding="utf-8")
            self._code = report.code
        return self._code

    async def kill(self) -> None:
        """End the engine with its unit, and wait until both are gone. Idempotent."""
        await self._lines.close()


class _Lines:
    """The connection to one unit."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self) -> Report:
        """Return the next report; CageError where there is none any more, or something else."""
        try:
            line = await self._reader.readline()
        except ValueError as exc:  # longer than the reader's limit
            raise _garbage() from exc
        except OSError as exc:
            raise _gone() from exc
        if not line.endswith(b"\n"):
            raise _gone()
        try:
            return parse_report(line)
        except BadRequest as exc:
            raise _garbage() from exc

    def send(self, line: bytes) -> None:
        """Send a line that fits into any buffer."""
        self._writer.write(line)

    async def close(self) -> None:
        """End the connection, and wait until the unit has ended it too: then its engine is gone."""
        if self._writer.is_closing():
            return
        try:
            # In a task of its own: in one that is being cancelled, Python 3.11.2 takes the end of a timeout
            # for one more cancellation.
            async with asyncio.TaskGroup() as group:
                group.create_task(self._end(), name="unit-end")
        finally:  # cancelled or not: the unit ends without us as well
            self._writer.close()

    async def _end(self) -> None:
        try:
            self._writer.write_eof()
            async with asyncio.timeout(END_S):
                while await self._reader.read(REPORT_BYTES):
                    pass
        except TimeoutError:
            log.error(  # noqa: TRY400 - where it happened says nothing
                "an engine's unit did not end within %g s; see: %s",
                END_S,
                _HINT,
                extra={"event": "engine-lingers"},
            )
        except OSError:
            pass  # it has ended already


class EngineUnits:
    """Starts engines as units: an implementation of flow.ports.EngineUnitStarter.

    `proved` is told each unit's proof, for status.
    """

    def __init__(self, path: Path, *, sockets: Path, proved: Callable[[Proof], None] | None = None) -> None:
        self._path = path
        self._sockets = sockets
        self._proved = proved

    async def __call__(self, *, engine: str, model: str, serving: Serving, log_path: Path) -> EngineUnit:
        """Start an engine; the directories of `engine` and `model` are the unit's own affair.

        Raises CageError("engine-unit") when there is no unit; with the unit's own words when it refuses,
        EngineError("engine-refused") for this model and ConfigError("engine-refused") for any.
        """
        order = Order(engine=engine, model=model, serving=serving)
        try:
            async with asyncio.timeout(START_S):
                lines = await self._connect()
                try:
                    return await self._start(lines, order, log_path)
                except BaseException:
                    await lines.close()
                    raise
        except TimeoutError as exc:
            raise CageError(
                "engine-unit", f"cannot start the engine: its unit said nothing for {START_S:g} s", hint=_HINT
            ) from exc

    async def _connect(self) -> _Lines:
        try:
            reader, writer = await asyncio.open_unix_connection(str(self._path), limit=REPORT_BYTES)
        except OSError as exc:
            raise CageError(
                "engine-unit",
                f"cannot start the engine: {str(self._path)!r}: {exc.strerror}",
                hint="systemctl enable --now mycoswarm-engine.socket",
            ) from exc
        return _Lines(reader, writer)

    async def _start(self, lines: _Lines, order: Order, log_path: Path) -> EngineUnit:
        lines.send(encode_order(order))
        proved = await lines.read()
        if not isinstance(proved, Proved):
            raise _garbage()
        if self._proved is not None:
            self._proved(proved.proof)
        answer = await lines.read()
        if isinstance(answer, Refused):
            failure = EngineError if answer.is_models else ConfigError
            raise failure("engine-refused", answer.text)
        if not isinstance(answer, Started):
            raise _garbage()
        return EngineUnit(
            lines,
            pid=answer.pid,
            proof=proved.proof,
            socket_path=self._sockets / answer.socket,
            log_path=log_path,
        )


def _gone() -> CageError:
    return CageError("engine-unit", "cannot hear the engine: its unit ended without a word", hint=_HINT)


def _garbage() -> CageError:
    return CageError("engine-unit", "cannot understand the engine's unit: it says something else", hint=_HINT)
