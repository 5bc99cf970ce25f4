"""What the node costs when nobody asks, how fast the commands answer, what it adds to a real engine."""

import http.client
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.nodes import NodeProcess, UnixConnection, node

BIN = Path(sys.executable).parent
REST_S = 10
ASKED = 12


def run(directory: Path) -> None:
    """Print resident memory and processor time at rest, time to ready, and the commands' times."""
    started_s = time.perf_counter()
    with node(directory / "node") as daemon:
        ready_ms = (time.perf_counter() - started_s) * 1000
        time.sleep(2)
        before_s = _cpu_s(daemon.pid)
        time.sleep(REST_S)
        percent = (_cpu_s(daemon.pid) - before_s) / REST_S * 100
        status_ms = _command_ms(["mycoswarmctl", "--socket", str(daemon.socket), "status"])
        rows = [
            ("ready without an engine, ms", ready_ms, 1500.0),
            ("resident memory at rest, MB", _rss_bytes(daemon.pid) / 1e6, 60.0),
            ("processor at rest, %", percent, 0.3),
            ("mycoswarmctl --help, ms", _command_ms(["mycoswarmctl", "--help"]), 200.0),
            ("mycoswarmd --help, ms", _command_ms(["mycoswarmd", "--help"]), 200.0),
            ("mycoswarmctl status, ms", status_ms, 300.0),
        ]
    print(f"{'what':<32} {'measured':>9} {'budget':>8}")
    for name, value, budget in rows:
        print(f"{name:<32} {value:>9.1f} {budget:>8.1f}")


def run_engine(directory: Path) -> None:
    """Print the time to the first token of the embedded model, asked directly and through the node."""
    state = Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "mycoswarm-bench"
    del directory
    subprocess.run([BIN / "mycoswarmctl", "engine", "install", "--state", state], check=True)
    with node(state) as daemon:
        model = _first_model(daemon)
        _first_token_ms(UnixConnection(daemon.socket), model)  # loads it
        sockets = {"through the node": daemon.socket}
        for path in state.glob("run/**/*.sock"):
            if path != daemon.socket:
                sockets["engine directly"] = path
        print(f"{'first token of ' + model:<50} {'p50 ms':>8}")
        for name, path in sorted(sockets.items()):
            times_ms = [_first_token_ms(UnixConnection(path), model) for _ in range(ASKED)]
            print(f"{name:<50} {statistics.median(times_ms):>8.1f}")


def _first_model(daemon: NodeProcess) -> str:
    for _ in range(200):
        if models := daemon.call("GET", "/api/models").json["models"]:
            return str(models[0]["name"])
        time.sleep(0.05)
    raise SystemExit(daemon.log())


def _first_token_ms(connection: http.client.HTTPConnection, model: str) -> float:
    messages = [{"role": "user", "content": "Say hi"}]
    body = {"model": model, "stream": True, "max_tokens": 2, "temperature": 0, "messages": messages}
    started_s = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    while b'"content"' not in response.readline():
        continue
    elapsed_ms = (time.perf_counter() - started_s) * 1000
    connection.close()
    return elapsed_ms


def _command_ms(command: list[str]) -> float:
    times_ms = []
    for _ in range(7):
        started_s = time.perf_counter()
        subprocess.run([BIN / command[0], *command[1:]], check=True, capture_output=True)
        times_ms.append((time.perf_counter() - started_s) * 1000)
    return statistics.median(times_ms)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
