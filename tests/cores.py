"""The node as an appliance without systemd: what its units would be, made by hand around a real core."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.dialers import Dialer
from tests.nodes import WAIT_S, NodeProcess, write_private

_STARTER = str(Path(__file__).with_name("onlyunix.py"))
_NO_NETWORK = ("unshare", "-n")


class Core(NodeProcess):
    """`mycoswarmd run --appliance`, with a socket that outlives it, in a network namespace of its own."""

    def __init__(self, state: Path, *, arguments: tuple[str, ...] = (), at: Path | None = None) -> None:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.outposts = state / "units"
        self.outposts.mkdir(exist_ok=True)
        super().__init__(state, arguments=("--appliance", "--outposts", str(self.outposts), *arguments))
        self.socket = at or self.socket
        self.socket.parent.mkdir(exist_ok=True)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(self.socket))
        self.socket.chmod(0o666)
        self.listener.listen(64)
        # What a test changes about how it is started.
        self.as_user: tuple[str, ...] = ()
        self.is_open = False  # the kernel does not refuse sockets of the internet
        self.passed: int | None = self.listener.fileno()
        self.name = "api"
        self.environment: dict[str, str] = {}

    def start(self, *, prefix: tuple[str, ...] = (), wait: bool = True) -> None:
        fd = -1 if self.passed is None else self.passed
        opened = ("--open",) if self.is_open else ()
        starter = (sys.executable, _STARTER, *opened, str(fd), self.name)
        command = [*prefix, *_NO_NETWORK, *self.as_user, *starter, sys.executable, "-m"]
        command += ["mycoswarmd.daemon.main", "run", "--state", str(self.state), *self._arguments]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stderr=log,
                stdout=log,
                pass_fds=() if fd < 0 else (fd,),
                env={**os.environ, **self.environment},
            )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Wait for its own word: the socket takes connections before there is a node."""
        assert self.wait_for("listening on"), self.log()

    def wait_for(self, text: str, within_s: float = WAIT_S) -> bool:
        waited = threading.Event()
        for _ in range(round(within_s / 0.02)):
            if text in self.log():
                return True
            if not self.is_running():
                return text in self.log()
            waited.wait(0.02)
        return False

    def close(self) -> None:
        if self.is_running():
            self.stop()
        self.listener.close()

    def dialer(self, *, namespace: str = "", user: int = 0) -> Dialer:
        """Make the LAN dialer that this core asks; whoever calls starts and kills it."""
        path = self.outposts / "lan.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(path))
        path.chmod(0o666)
        listener.listen(200)
        prefix = ("ip", "netns", "exec", namespace) if namespace else ()
        options = ("--user", str(user), "--settings", str(self.state / "mycoswarm.toml"))
        return Dialer(
            path=path,
            listener=listener,
            options=options,
            prefix=prefix,
            program=("-I", "-m", "mycoswarmd.outposts.lan"),
        )


@contextmanager
def appliance(
    state: Path, settings: str = "", policy: str = "", *, namespace: str = "", started: bool = True
) -> Iterator[Core]:
    """Run a core with its LAN dialer while the context lasts."""
    core = Core(state)
    write_private(state / "mycoswarm.toml", settings)
    if policy:
        write_private(state / "policy.toml", policy)
    with ExitStack() as stack:
        dialer = core.dialer(namespace=namespace)
        stack.enter_context(dialer.listener)
        dialer.start()
        stack.callback(dialer.kill)
        stack.callback(core.close)
        if started:
            core.start()
        yield core


@contextmanager
def accepting(path: Path, program: tuple[str, ...]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Be PID 1 for a socket with Accept=yes: each connection is a process with it as descriptors 0 and 1."""
    started: list[subprocess.Popen[bytes]] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(16)

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    one = subprocess.Popen(program, stdin=connection.fileno(), stdout=connection.fileno())
                    started.append(one)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield started
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for one in started:
                one.kill()
                one.wait()
