"""What the node adds to a prompt, beside: the upstream asked directly, nginx, a bare aiohttp pass-through,
LiteLLM's proxy and vllm-router. Same machine, same run, same canned upstream.
"""

import asyncio
import contextlib
import json
import re
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp

from tests.nodes import free_port, node, write_private

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "build" / "peers" / "bin"
KEY = "sk-bench-0123456789abcdef"
SECONDS = 5
STREAMS, CHUNKS = 20, 200
ANSWER = {
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "stub",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Paris."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 12, "completion_tokens": 2, "total_tokens": 14},
}  # fmt: skip
MODELS = {"object": "list", "data": [{"id": "stub", "object": "model", "created": 1, "owned_by": "x"}]}
POLICY = """
schema = 1
name = "bench"
[[rule]]
id = "here"
why = "answered here"
effect = "allow"
action = ["infer", "admin"]
zone = ["self"]
"""


def run(directory: Path) -> None:
    """Print latency and throughput of every proxy before a canned answer."""
    with canned_nginx(directory) as upstream_port, proxies(directory, upstream_port) as ports:
        rows = {
            name: (_wrk(directory, port, key, 1), _wrk(directory, port, key, 16))
            for name, (port, key) in ports.items()
        }
    direct, bare = rows["upstream directly"], rows["aiohttp pass-through"]
    head = ("p50 ms", "p99 ms", "added", "of bare", "req/s 16", "of bare", "errors")
    print(f"{'one process':<22} " + " ".join(f"{name:>8}" for name in head))
    added_by_bare = bare[0]["p50"] - direct[0]["p50"]
    for name, (one, many) in rows.items():
        added = one["p50"] - direct[0]["p50"]
        print(
            f"{name:<22} {one['p50']:>8.2f} {one['p99']:>8.2f} {added:>8.2f} "
            f"{added / added_by_bare:>8.2f} {many['rps']:>8,.0f} {many['rps'] / bare[1]['rps']:>8.2f} "
            f"{one['errors'] + many['errors']:>8.0f}"
        )


def run_streams(directory: Path) -> None:
    """Print how late chunks come through each proxy, twenty streams at once."""
    port = free_port()
    stub = [sys.executable, "-m", "tests.bench.stub_stream", str(port)]
    with process(stub, port), proxies(directory, port, with_nginx=False) as ports:
        print(f"{'20 streams':<22} {'chunks':>7} {'p50 ms':>8} {'p99 ms':>8} {'of bare':>8} {'chunks/s':>9}")
        measured = {name: asyncio.run(_streams(port, key)) for name, (port, key) in ports.items()}
        bare = statistics.median(measured["aiohttp pass-through"][0])
        for name, (late_ms, wall_s) in measured.items():
            if len(late_ms) < 2:
                print(f"{name:<22} {len(late_ms):>7}  no chunks")
                continue
            cuts = statistics.quantiles(late_ms, n=100)
            print(
                f"{name:<22} {len(late_ms):>7} {cuts[49]:>8.2f} {cuts[98]:>8.2f} {cuts[49] / bare:>8.2f} "
                f"{len(late_ms) / wall_s:>9,.0f}"
            )


@contextlib.contextmanager
def proxies(
    directory: Path, upstream_port: int, *, with_nginx: bool = True
) -> Iterator[dict[str, tuple[int, str]]]:
    """Start every proxy that is installed; yield name -> (port, key)."""
    upstream = f"http://127.0.0.1:{upstream_port}"
    with contextlib.ExitStack() as stack:
        found = {"upstream directly": (upstream_port, KEY)}
        if with_nginx:
            found["nginx"] = (stack.enter_context(proxying_nginx(directory, upstream_port)), KEY)
        bare = free_port()
        stack.enter_context(
            process([sys.executable, "-m", "tests.bench.passthrough", str(bare), upstream], bare)
        )
        found["aiohttp pass-through"] = (bare, KEY)
        found["mycoswarmd"] = stack.enter_context(our_node(directory / "node", upstream))
        router = free_port()
        command = [
            PEERS / "vllm-router",
            "--host",
            "127.0.0.1",
            "--port",
            str(router),
            "--worker-urls",
            upstream,
        ]
        _optional(stack, found, "vllm-router", command, router)
        litellm = free_port()
        config = directory / "litellm.yaml"
        config.write_text(
            "model_list:\n  - model_name: stub\n    litellm_params: "
            f'{{model: openai/stub, api_base: "{upstream}/v1", api_key: "x"}}\n'
            f"general_settings: {{master_key: {KEY}}}\n"
            "litellm_settings: {telemetry: false, num_retries: 0}\n"
        )
        command = [PEERS / "litellm", "--config", config, "--host", "127.0.0.1", "--port", str(litellm)]
        _optional(stack, found, "LiteLLM proxy", command, litellm)
        yield found


def _optional(
    stack: contextlib.ExitStack,
    found: dict[str, tuple[int, str]],
    name: str,
    command: list[object],
    port: int,
) -> None:
    if not Path(str(command[0])).exists():
        print(f"{name}: not installed, left out", flush=True)
        return
    stack.enter_context(process([str(part) for part in command], port))
    found[name] = (port, KEY)


@contextlib.contextmanager
def our_node(state: Path, upstream: str) -> Iterator[tuple[int, str]]:
    """Run the node before the upstream, with one key."""
    write_private(state / "policy.toml", POLICY)
    engine = f'[engines.stub]\nkind = "openai"\nurl = "{upstream}"\nconcurrency = 64\n'
    write_private(state / "mycoswarm.toml", f"managed_engine = false\n{engine}")
    port = free_port()
    with node(state, arguments=("--listen", f"127.0.0.1:{port}")) as daemon:
        for _ in range(100):
            if daemon.call("GET", "/api/models").json["models"]:
                break
            time.sleep(0.05)
        yield port, str(daemon.call("POST", "/api/keys", {"name": "bench"}).json["secret"])


@contextlib.contextmanager
def canned_nginx(directory: Path) -> Iterator[int]:
    """Answer every prompt at once with the same text."""
    port = free_port()
    server = (
        f"listen 127.0.0.1:{port} reuseport backlog=1024; default_type application/json;\n"
        "location /health { return 200 '{}'; }\n"
        f"location /v1/models {{ return 200 '{json.dumps(MODELS)}'; }}\n"
        f"location / {{ return 200 '{json.dumps(ANSWER)}'; }}"
    )
    with _nginx(directory / "canned", server, port):
        yield port


@contextlib.contextmanager
def proxying_nginx(directory: Path, upstream_port: int) -> Iterator[int]:
    """Pass prompts on with nginx: the floor."""
    port = free_port()
    server = (
        f"listen 127.0.0.1:{port}; location / {{ proxy_pass http://up; proxy_http_version 1.1; "
        'proxy_set_header Connection ""; }'
    )
    upstream = f"upstream up {{ server 127.0.0.1:{upstream_port}; keepalive 64; }}"
    with _nginx(directory / "proxy", server, port, upstream):
        yield port


@contextlib.contextmanager
def _nginx(directory: Path, server: str, port: int, more: str = "") -> Iterator[None]:
    directory.mkdir(parents=True)
    temporary = " ".join(
        f"{kind}_temp_path {directory}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = directory / "nginx.conf"
    config.write_text(
        f"worker_processes 1; pid {directory}/pid; error_log {directory}/error.log; daemon off;\n"
        "events { worker_connections 1024; }\n"
        f"http {{ access_log off; keepalive_requests 1000000; {temporary} {more}\nserver {{ {server} }} }}\n"
    )
    with process(["/usr/sbin/nginx", "-p", str(directory), "-c", str(config)], port):
        yield


@contextlib.contextmanager
def process(command: list[str], port: int) -> Iterator[None]:
    """Run a server while the context lasts; it is there when its port answers."""
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(lambda: _answers(port), running)
        yield
    finally:
        running.terminate()
        running.wait(20)


def _wait_for(check: Callable[[], bool], running: subprocess.Popen[bytes]) -> None:
    give_up_s = time.monotonic() + 90
    while not check():
        if running.poll() is not None or time.monotonic() > give_up_s:
            raise SystemExit(f"cannot start {running.args!r}")
        time.sleep(0.1)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def _wrk(directory: Path, port: int, key: str, connections: int) -> dict[str, float]:
    """Load one proxy for some seconds and return milliseconds, requests per second and errors."""
    script = directory / "post.lua"
    prompt = {
        "model": "stub",
        "max_tokens": 16,
        "messages": [{"role": "user", "content": "Capital of France?"}],
    }
    script.write_text(
        'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\n'
        f'wrk.headers["Authorization"] = "Bearer {key}"\nwrk.body = [[{json.dumps(prompt)}]]\n'
        "done = function(s, l, r) io.write(string.format('RESULT %f %f %f %d\\n', l:percentile(50) / 1000, "
        "l:percentile(99) / 1000, s.requests / (s.duration / 1e6), s.errors.status + s.errors.connect + "
        "s.errors.read + s.errors.timeout)) end\n"
    )
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    command = ["wrk", "-t1", f"-c{connections}", f"-d{SECONDS}s", "-s", str(script), url]
    subprocess.run([*command[:3], "-d1s", *command[4:]], capture_output=True, check=False)  # warm
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"RESULT (\S+) (\S+) (\S+) (\S+)", out)
    assert found is not None, out
    return dict(zip(("p50", "p99", "rps", "errors"), map(float, found.groups()), strict=True))


async def _streams(port: int, key: str) -> tuple[list[float], float]:
    """Read twenty streams; each chunk carries when it was sent, on the same machine's clock."""
    late_ms: list[float] = []

    async def one(session: aiohttp.ClientSession) -> None:
        body = {"model": "stub", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
        headers = {"Authorization": f"Bearer {key}"}
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        async with session.post(url, json=body, headers=headers) as response:
            async for piece in response.content.iter_any():
                now_s = time.monotonic()
                late_ms.extend((now_s - float(sent)) * 1000 for sent in re.findall(rb"T(\d+\.\d{9})", piece))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await one(session)
        late_ms.clear()
        started_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(STREAMS):
                group.create_task(one(session))
        return late_ms, time.monotonic() - started_s
