"""Serves one model to the node: the program of the engine's unit, `python3 -I -m mycoswarmd.outposts.engine`.

PID 1 builds its confinement (systemd/README.md) and hands it the node's connection as descriptor 0.
It says what it proved about itself, takes one order, starts llama.cpp on a unix socket, and says when that
ends. When the connection ends, for whatever reason, nothing is left.

Laws:

1. The node is not believed: an order holds names and numbers (wire/engineunit.py); a name is looked up in
   the directories of the unit file, and what it resolves to lies in them or is refused.
2. No code from whoever may write models: an engine that others than root could have changed is not run.
3. What the engine says is kept short, in memory, and told once: at its end.
4. An engine may end this program, and with it the unit, but not stop it: then nobody would end the engine.

Source: systemd.socket(5) for Accept=yes; unix(7); pidfd_open(2).
"""

import argparse
import os
import select
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mycoswarmd.errors import ConfigError, EngineError, MycoswarmError
from mycoswarmd.outposts.callfilter import forbid_stopping
from mycoswarmd.outposts.selftest import prove
from mycoswarmd.wire.engineunit import (
    ENVIRONMENT,
    ORDER_BYTES,
    Ended,
    Order,
    Proved,
    Refused,
    Report,
    Started,
    child_argv,
    encode_report,
    parse_order,
)
from mycoswarmd.wire.proof import Unit

CONNECTION_FD = 0
# Whoever connects has its order ready.
ORDER_S = 10.0
# The unit's own end, by the node or by its order.
EXIT_DONE, EXIT_REFUSED = 0, 1
_PROGRAM = Path(__file__).parent.parent / "engines" / "llama_child.py"
_SOCKET = "engine.sock"
_LOG_BYTES = 4096
_PIPE_BYTES = 65536
# The kernel's limit for the path of a unix socket, less the final zero byte.
_SOCKET_PATH_BYTES = 107


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where things are; said by the unit file, never by the node.

    Attributes:
        sockets: a directory for this engine's socket and no other's; PID 1 makes it and removes it.
    """

    models: Path
    engines: Path
    sockets: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """An order whose every name was found where it belongs."""

    order: Order
    engine: Path
    model: Path
    name: str
    socket: Path


class Connection:
    """The node, at the other end of descriptor 0."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def fileno(self) -> int:
        """Return the descriptor, for polling."""
        return self._sock.fileno()

    def say(self, report: Report) -> bool:
        """Send a line, and tell whether somebody was there to get it."""
        try:
            self._sock.sendall(encode_report(report))
        except OSError:  # it has gone; that is seen as the end of the connection
            return False
        return True

    def read_order(self) -> Order | None:
        """Return the one order, or None where the connection ends without; BadRequest for anything else."""
        self._sock.settimeout(ORDER_S)
        line = b""
        while not line.endswith(b"\n"):
            try:
                piece = self._sock.recv(ORDER_BYTES - len(line))
            except OSError:  # also for a node that has no order to give
                return None
            if not piece:
                return None
            line += piece
            if len(line) >= ORDER_BYTES and not line.endswith(b"\n"):
                raise ConfigError("engine-order", f"cannot take an order of more than {ORDER_BYTES} bytes")
        return parse_order(line)


def find_job(order: Order, places: Places) -> Job:
    """Look up what an order names; ConfigError or EngineError where the engine or the model is no use."""
    engine = _inside(places.engines, order.engine, what="engine")
    _check_engine(engine)
    try:
        model = _inside(places.models, order.model, what="model")
        # What cannot be read is said here, before an engine says less; a pipe is not waited for.
        descriptor = os.open(model, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        os.close(descriptor)
    except OSError as exc:
        raise EngineError("engine-failed", f"cannot load the model {order.model!r}: {exc.strerror}") from exc
    except ConfigError as exc:
        raise EngineError("engine-failed", exc.message) from exc
    if not is_file:
        raise EngineError("engine-failed", f"cannot load the model {order.model!r}: it is no file")
    sock = places.sockets / _SOCKET
    if len(os.fsencode(sock)) > _SOCKET_PATH_BYTES:
        raise ConfigError("engine-order", f"cannot listen: the path {str(sock)!r} is too long for a socket")
    return Job(order=order, engine=engine, model=model, name=Path(order.model).stem, socket=sock)


def _inside(directory: Path, name: str, *, what: str) -> Path:
    """Return what a name in a directory leads to, as long as that lies in the directory as well."""
    try:
        root = directory.resolve(strict=True)
        path = (root / name).resolve(strict=True)
    except (OSError, RuntimeError) as exc:  # RuntimeError: links in a circle, before Python 3.13
        cause = exc.strerror if isinstance(exc, OSError) else "its links lead nowhere"
        raise ConfigError("engine-order", f"cannot load the {what} {name!r}: {cause}") from exc
    if root not in path.parents:
        raise ConfigError(
            "engine-order",
            f"cannot load the {what} {name!r}: it is a link out of {str(directory)!r}, where the engine's "
            "unit sees nothing; put the file itself there",
        )
    return path


def _check_engine(engine: Path) -> None:
    """Refuse an engine that somebody could have changed who is neither root nor this unit itself."""
    for path in (engine, engine / "xllamacpp", engine / "xllamacpp" / "__init__.py"):
        try:
            found = path.lstat()
        except OSError as exc:
            raise ConfigError(
                "engine-order", f"cannot load the engine {engine.name!r}: {path.name!r}: {exc.strerror}"
            ) from exc
        if found.st_uid not in {0, os.geteuid()} or found.st_mode & 0o022:
            raise ConfigError(
                "engine-order",
                f"cannot load the engine {engine.name!r}: others than root may change {path.name!r}; "
                "install it again as root: mycoswarmctl engine install",
            )


class Log:
    """The end of what the engine wrote."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._tail = b""

    def read(self) -> bool:
        """Take what is there, and tell whether there may be more."""
        try:
            piece = os.read(self.fd, _PIPE_BYTES)
        except BlockingIOError:
            return False
        self._tail = (self._tail + piece)[-_LOG_BYTES:]
        return bool(piece)

    def text(self) -> str:
        """Return it, with what is left in the pipe."""
        while self.read():
            pass
        return self._tail.decode("utf-8", "replace")


def serve(node: Connection, job: Job) -> None:
    """Hold the engine's process until it or the connection ends; nothing of it is left then."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(reader, False)
    log = Log(reader)
    try:
        try:
            child = _start(job, writer)
        finally:
            os.close(writer)
        try:
            is_told = node.say(Started(child.pid, f"{job.socket.parent.name}/{job.socket.name}"))
            if is_told and _watch(node, child, log):
                node.say(Ended(child.wait(), log.text()))
        finally:
            _kill(child)
    finally:
        os.close(reader)
        job.socket.unlink(missing_ok=True)


def _start(job: Job, output: int) -> subprocess.Popen[bytes]:
    argv = child_argv(
        job.order.serving,
        program=str(_PROGRAM),
        engine=str(job.engine),
        model=str(job.model),
        name=job.name,
        socket=str(job.socket),
    )
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", **ENVIRONMENT},
        cwd="/",
        start_new_session=True,
    )


def _watch(node: Connection, child: subprocess.Popen[bytes], log: Log) -> bool:
    """Wait; tell whether it was the engine that ended."""
    pidfd = os.pidfd_open(child.pid)
    try:
        poll = select.poll()
        poll.register(node.fileno(), select.POLLIN | select.POLLRDHUP)
        poll.register(pidfd, select.POLLIN)
        poll.register(log.fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            # The node has gone, or says more than its order: both are the end.
            if node.fileno() in ready:
                return False
            if log.fd in ready and not log.read():
                poll.unregister(log.fd)  # closed by the engine
            if pidfd in ready:
                return True
    finally:
        os.close(pidfd)


def _kill(child: subprocess.Popen[bytes]) -> None:
    # Until it is collected its number cannot be another's, and it leads a group of that number.
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def run(node: Connection, places: Places) -> int:
    """Prove, take the order, carry it out; return the exit code."""
    if not node.say(Proved(prove(Unit.ENGINE))):
        return EXIT_DONE
    try:
        order = node.read_order()
        if order is None:
            return EXIT_DONE
        job = find_job(order, places)
        if not forbid_stopping():  # on a machine of another kind, say
            print("the engine could stop its unit's own program", file=sys.stderr)  # noqa: T201
        serve(node, job)
    except MycoswarmError as exc:
        node.say(Refused(exc.message, isinstance(exc, EngineError)))
        return EXIT_REFUSED
    except OSError as exc:
        node.say(Refused(f"cannot start the engine: {exc.strerror}", is_models=False))
        return EXIT_REFUSED
    return EXIT_DONE


def main(argv: Iterable[str]) -> None:
    """Serve the connection on descriptor 0 until it ends."""
    parser = argparse.ArgumentParser(prog="mycoswarmd.outposts.engine")
    parser.add_argument("--models", type=Path, default=Path("/var/lib/mycoswarm-engine/models"))
    parser.add_argument("--engines", type=Path, default=Path("/var/lib/mycoswarm-engine/engine"))
    parser.add_argument("--sockets", type=Path, required=True)
    options = parser.parse_args(list(argv))
    places = Places(models=options.models, engines=options.engines, sockets=options.sockets)
    with socket.socket(fileno=CONNECTION_FD) as sock:
        sys.exit(run(Connection(sock), places))


if __name__ == "__main__":
    main(sys.argv[1:])
