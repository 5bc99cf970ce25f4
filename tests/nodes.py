"""Real daemons for tests: started as a person would, spoken to over their sockets, killed by pid."""

import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

# How long is waited for what comes: a busy machine may stop a process for seconds, again and again.
WAIT_S = 60.0


def until(condition: Callable[[], object], within_s: float = WAIT_S) -> None:
    """Wait for something to become true."""
    give_up_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < give_up_s, "it did not come true in time"
        time.sleep(0.02)


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path, timeout_s: float = WAIT_S) -> None:
        super().__init__("mycoswarm", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Answer:
    """What came back."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def json(self) -> dict:  # type: ignore[type-arg]
        value = json.loads(self.body)
        assert isinstance(value, dict)
        return value


class NodeProcess:
    """One `mycoswarmd run` with its own state directory."""

    def __init__(self, state: Path, *, arguments: tuple[str, ...] = ("--no-listen",)) -> None:
        self.state = state
        self.socket = state / "run" / "api.sock"
        self.log_path = state / "log"
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, *, prefix: tuple[str, ...] = (), wait: bool = True) -> None:
        command = [*prefix, sys.executable, "-m", "mycoswarmd.daemon.main", "run", "--state", str(self.state)]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen([*command, *self._arguments], stderr=log, stdout=log)
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        give_up_s = time.monotonic() + WAIT_S
        while time.monotonic() < give_up_s:
            if self.is_answering():
                return
            assert self._process is not None
            assert self._process.poll() is None, self.log()
            time.sleep(0.02)
        raise AssertionError(f"not ready: {self.log()}")

    def is_answering(self) -> bool:
        try:
            return self.call("GET", "/api/status").status == 200
        except OSError:
            return False

    def call(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = WAIT_S,
    ) -> Answer:
        connection = UnixConnection(self.socket, timeout_s)
        try:
            data = (
                body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
            )
            connection.request(method, path, data, dict(headers or {}))
            response = connection.getresponse()
            return Answer(response.status, dict(response.headers), response.read())
        finally:
            connection.close()

    def submit(self, prompt: str, **fields: object) -> str:
        answer = self.call("POST", "/api/tasks", {"prompt": prompt, "agent": "scribe", **fields})
        assert answer.status in {200, 202}, answer.body
        return str(answer.json["task"]["id"])

    def task(self, task_id: str) -> dict:  # type: ignore[type-arg]
        answer = self.call("GET", f"/api/tasks/{task_id}")
        assert answer.status == 200, answer.body
        task = answer.json["task"]
        assert isinstance(task, dict)
        return task

    def wait_task(self, task_id: str, *states: str, within_s: float = WAIT_S) -> dict:  # type: ignore[type-arg]
        give_up_s = time.monotonic() + within_s
        task = self.task(task_id)
        while task["state"] not in states:
            assert time.monotonic() < give_up_s, (task, self.events(task_id), self.log())
            time.sleep(0.05)
            task = self.task(task_id)
        return task

    def events(self, task_id: str) -> list[dict]:  # type: ignore[type-arg]
        answer = self.call("GET", f"/api/tasks/{task_id}/events")
        return [json.loads(line) for line in answer.body.splitlines()]

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def stop(self) -> int:
        """SIGTERM, and wait for a clean end."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise

    def wait_exit(self, within_s: float = WAIT_S) -> int:
        assert self._process is not None
        return self._process.wait(within_s)

    def is_running(self) -> bool:
        """Tell whether the process (or what wraps it) still runs."""
        return self._process is not None and self._process.poll() is None

    def wait_for_models(self) -> None:
        """Wait until some engine serves something."""
        give_up_s = time.monotonic() + WAIT_S
        while not self.call("GET", "/api/models").json["models"]:
            assert time.monotonic() < give_up_s, self.log()
            time.sleep(0.05)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""


@contextmanager
def node(state: Path, *, arguments: tuple[str, ...] = ("--no-listen",)) -> Iterator[NodeProcess]:
    """Run a node while the context lasts."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    process = NodeProcess(state, arguments=arguments)
    process.start()
    try:
        yield process
    finally:
        process.stop()


def free_port() -> int:
    """Return a port that is free and stays so: below those that the kernel gives to whoever connects."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def write_private(path: Path, text: str) -> Path:
    """Write a file that only its owner may write, whatever the umask."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o600)
    return path
