"""The HTTP interface of a real daemon: who may knock, what bad input gets, what the openai client sees."""

import json
import socket
from collections.abc import Iterator

import openai
import pytest

from tests.nodes import WAIT_S, NodeProcess, free_port, node, until, write_private
from tests.upstream import Upstream, upstream

POLICY = """
schema = 1
name = "test"
[destinations.bigcloud]
api = "openai"
url = "https://api.example.com/v1"
models = ["gpt-*"]
[agents.scribe]
model = "*"
[[rule]]
id = "owner"
why = "the owner runs this node"
effect = "allow"
action = ["task", "admin"]
origin = ["owner"]
[[rule]]
id = "here"
why = "prompts are answered here"
effect = "allow"
action = "infer"
zone = ["self"]
label = { max = "private" }
"""
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
CHAT = {"model": "ok", "messages": [{"role": "user", "content": "hi"}]}


def settings(engine: Upstream) -> str:
    return f'managed_engine = false\n[engines.up]\nkind = "openai"\nurl = "{engine.url}"\n'


@pytest.fixture(scope="module")
def engine() -> Iterator[Upstream]:
    with upstream() as running:
        yield running


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, engine: Upstream, port: int) -> Iterator[NodeProcess]:
    state = tmp_path_factory.mktemp("node")
    write_private(state / "policy.toml", POLICY)
    write_private(state / "mycoswarm.toml", settings(engine))
    with node(state, arguments=("--listen", f"127.0.0.1:{port}")) as running:
        running.wait_for_models()
        yield running


@pytest.fixture(scope="module")
def key(daemon: NodeProcess) -> str:
    return str(daemon.call("POST", "/api/keys", {"name": "tests"}).json["secret"])


@pytest.fixture
def client(port: int, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0) as made:
        yield made


def tcp(port: int, request: bytes) -> bytes:
    """Send raw bytes and return what comes back until the server has said its say."""
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as sock:
        sock.sendall(request)
        answer = b""
        try:
            while b"\r\n\r\n" not in answer:
                piece = sock.recv(65536)
                if not piece:
                    break
                answer += piece
        except TimeoutError:
            pass
        return answer


# --- the openai client --------------------------------------------------------------------------


def test_openai_client_lists_models(client: openai.OpenAI) -> None:
    assert "ok" in [model.id for model in client.models.list()]


def test_openai_client_chats_and_sees_what_served_it(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="ok", messages=[{"role": "user", "content": "hi"}]
    )
    answer = raw.parse()
    assert answer.choices[0].message.content == "Hello there"
    assert answer.model == "ok"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 8
    assert raw.headers["X-Mycoswarm-Zone"] == "self"
    assert raw.headers["X-Mycoswarm-Rule"] == "here"
    assert raw.headers["X-Mycoswarm-Node"]


def test_openai_client_streams_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="ok",
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == "Hello there"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


def test_openai_client_calls_tools_on_a_model_that_has_none(client: openai.OpenAI, engine: Upstream) -> None:
    engine.play(("get_weather", {"city": "Paris"}))
    parameters: dict[str, object] = {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    }
    answer = client.chat.completions.create(
        model="agent",
        messages=[{"role": "user", "content": "weather in Paris?"}],
        tools=[{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}],
        tool_choice="required",
    )
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].type == "function"
    assert json.loads(calls[0].function.arguments) == {"city": "Paris"}
    assert answer.choices[0].finish_reason == "tool_calls"
    assert engine.bodies[-1]["response_format"]["type"] == "json_schema"


def test_openai_client_gets_response_format_through(client: openai.OpenAI, engine: Upstream) -> None:
    client.chat.completions.create(
        model="ok", messages=[{"role": "user", "content": "json"}], response_format={"type": "json_object"}
    )
    assert engine.bodies[-1]["response_format"] == {"type": "json_object"}


def test_openai_client_completes_text(client: openai.OpenAI) -> None:
    assert client.completions.create(model="ok", prompt="Once").choices[0].text == "Hello there"


def test_openai_client_embeds(client: openai.OpenAI) -> None:
    data = client.embeddings.create(model="ok", input=["a", "b"]).data
    assert [list(row.embedding) for row in data] == [[0.5, -0.5], [0.5, -0.5]]


def test_openai_client_sees_a_denial_as_permission_denied(client: openai.OpenAI) -> None:
    with pytest.raises(openai.PermissionDeniedError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "hi"}])
    assert caught.value.code == "policy-denied"


def test_openai_client_sees_an_unknown_model_as_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="qwen-max", messages=[{"role": "user", "content": "hi"}])
    assert caught.value.code == "model-not-found"


# --- who may knock ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "authorization", ["", "Authorization: Bearer\r\n", "Authorization: Bearer mk-wrong\r\n"]
)
def test_tcp_without_a_key_is_refused(port: int, daemon: NodeProcess, authorization: str) -> None:
    assert daemon.is_answering()
    head = f"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{authorization}\r\n"
    assert tcp(port, head.encode())[9:12] == b"401"


def test_a_revoked_key_is_refused_at_once(port: int, daemon: NodeProcess) -> None:
    secret = daemon.call("POST", "/api/keys", {"name": "short-lived"}).json["secret"]
    head = f"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {secret}\r\n\r\n"
    assert tcp(port, head.encode())[9:12] == b"200"
    assert daemon.call("DELETE", "/api/keys/short-lived").status == 200
    assert tcp(port, head.encode())[9:12] == b"401"


@pytest.mark.parametrize(
    "hosts",
    [
        "",
        "Host: evil.example\r\n",
        "Host: 127.0.0.1:{port}\r\nHost: 127.0.0.1:{port}\r\n",
        "Host: 127.0.0.1\r\n",
    ],
    ids=["missing", "other", "twice", "without-port"],
)
def test_exactly_one_right_host_is_accepted(port: int, key: str, hosts: str) -> None:
    head = f"GET /v1/models HTTP/1.1\r\n{hosts.format(port=port)}Authorization: Bearer {key}\r\n\r\n"
    assert tcp(port, head.encode())[9:12] == b"400"
    right = f"GET /v1/models HTTP/1.1\r\nHost: localhost:{port}\r\nAuthorization: Bearer {key}\r\n\r\n"
    assert tcp(port, right.encode())[9:12] == b"200"


@pytest.mark.parametrize(
    "mark", ["Origin: http://evil.example", "Sec-Fetch-Site: cross-site", "Origin: null"]
)
def test_no_web_page_may_drive_a_node(port: int, key: str, mark: str) -> None:
    head = (
        f"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {key}\r\n{mark}\r\n\r\n"
    )
    assert tcp(port, head.encode())[9:12] == b"403"


def test_control_is_not_there_on_tcp(port: int, key: str) -> None:
    head = f"GET /api/status HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {key}\r\n\r\n"
    assert tcp(port, head.encode())[9:12] == b"404"


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "JSON"),
        (b"[]", "object"),
        (b'{"model": "ok"}', "messages"),
        (b'{"model": "ok", "messages": []}', "messages"),
        (b'{"model": "ok", "messages": [{"role": "user", "content": 7}]}', "messages[0].content"),
        (b'{"model": 1, "messages": [{"role": "user", "content": "x"}]}', "model"),
        (json.dumps({**CHAT, "temperature": -1}).encode(), "temperature"),
        (json.dumps({**CHAT, "max_tokens": -5}).encode(), "max_tokens"),
        (json.dumps({**CHAT, "max_tokens": 10**12}).encode(), "max_tokens"),
        (json.dumps({**CHAT, "n": 50}).encode(), "n"),
        (b"[" * 100_000, "cannot"),
        (b'\xff\xfe{"model": "ok"}', "cannot"),
    ],
)
def test_bad_requests_get_a_clear_error(daemon: NodeProcess, body: bytes, said: str) -> None:
    answer = daemon.call("POST", "/v1/chat/completions", body)
    assert answer.status == 400
    error = answer.json["error"]
    assert error["message"].startswith("cannot")
    assert said in error["message"] + str(error.get("where")) + str(error.get("param"))


def test_unknown_fields_are_not_passed_on(daemon: NodeProcess, engine: Upstream) -> None:
    answer = daemon.call(
        "POST", "/v1/chat/completions", {**CHAT, "n_discard": -7, "grammar": "x", "user": "me"}
    )
    assert answer.status == 200
    assert not {"n_discard", "grammar", "user"} & set(engine.bodies[-1])


def test_a_huge_body_is_refused_before_it_is_read(port: int, key: str) -> None:
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {key}\r\n"
        "Content-Length: 104857600\r\n\r\n"
    )
    assert tcp(port, head.encode())[9:12] == b"413"


def test_an_endless_chunked_body_is_cut_off(port: int, key: str) -> None:
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {key}\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as sock:
        sock.sendall(head.encode())
        piece = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
        answer = b""
        try:
            for _ in range(40):
                sock.sendall(piece)
        except OSError:
            pass
        try:
            answer = sock.recv(100)
        except OSError:
            answer = b"HTTP/1.1 413 the connection was reset while the client still sent"
    assert b"413" in answer


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("DELETE", "/v1/chat/completions", 405), ("GET", "/api/tasks/t-unknown", 404),
     ("GET", "/api/receipts/999999", 404), ("DELETE", "/api/keys/nobody", 404),
     ("POST", "/api/approvals/a-0", 400),
     ("GET", "/api/receipts?limit=-1", 400), ("GET", "/api/tasks?state=pending", 400)],
)  # fmt: skip
def test_wrong_paths_and_names_say_so(daemon: NodeProcess, method: str, path: str, status: int) -> None:
    answer = daemon.call(method, path)
    assert answer.status == status
    assert answer.json["error"]["message"].startswith("cannot")


def test_a_label_that_is_too_high_is_refused(daemon: NodeProcess, engine: Upstream) -> None:
    before = engine.count("ok")
    answer = daemon.call("POST", "/v1/chat/completions", CHAT, {"X-Mycoswarm-Label": "secret"})
    assert answer.status == 403
    assert answer.json["error"]["rule"] == "default-deny"
    assert engine.count("ok") == before


def test_an_unknown_label_counts_as_the_highest(daemon: NodeProcess) -> None:
    assert daemon.call("POST", "/v1/chat/completions", CHAT, {"X-Mycoswarm-Label": "whatever"}).status == 403
    assert daemon.call("POST", "/v1/chat/completions", CHAT, {"X-Mycoswarm-Label": "public"}).status == 200


# --- engines that misbehave ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "status", "code"), [("garbage", 502, "engine-failed"), ("refuses", 400, "context-too-long")]
)
def test_a_broken_engine_is_a_clear_error(daemon: NodeProcess, model: str, status: int, code: str) -> None:
    answer = daemon.call("POST", "/v1/chat/completions", {**CHAT, "model": model})
    assert (answer.status, answer.json["error"]["code"]) == (status, code)


def test_an_engine_that_dies_in_the_middle_says_so_in_the_stream(daemon: NodeProcess) -> None:
    answer = daemon.call("POST", "/v1/chat/completions", {**CHAT, "model": "dies", "stream": True})
    lines = [line for line in answer.body.splitlines() if line.startswith(b"data: ")]
    assert json.loads(lines[0][6:])["choices"][0]["delta"]["content"] == "begin"
    assert json.loads(lines[-1][6:])["error"]["code"] == "engine-failed"
    assert b"[DONE]" not in answer.body


def cancelled(daemon: NodeProcess) -> int:
    """Return how many answers nobody waited for."""
    rows = daemon.call("GET", "/api/receipts?last=1000").json["receipts"]
    return sum(row["kind"] == "outcome" and row["body"]["code"] == "cancelled" for row in rows)


def test_a_client_that_goes_away_stops_the_engine(daemon: NodeProcess, engine: Upstream) -> None:
    engine.gone.clear()
    before = cancelled(daemon)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(daemon.socket))
        body = json.dumps({**CHAT, "model": "slow", "stream": True}).encode()
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        assert b"200" in sock.recv(20)
    assert engine.gone.wait(WAIT_S)
    until(lambda: cancelled(daemon) == before + 1)


def test_a_client_that_goes_away_before_the_first_byte_stops_the_engine(
    daemon: NodeProcess, engine: Upstream
) -> None:
    engine.gone.clear()
    before = cancelled(daemon)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(daemon.socket))
        body = json.dumps({**CHAT, "model": "silent"}).encode()
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        until(lambda: engine.count("silent"))
    assert engine.gone.wait(WAIT_S)
    until(lambda: cancelled(daemon) == before + 1)  # or its receipt would come between those of others


# --- M1, M2, M10 --------------------------------------------------------------------------------

VENDOR_NAMES = (
    "qwen-max", "qwen2.5-72b-instruct", "gpt-4o", "gpt-5", "o3-mini", "claude-opus-4", "claude-3-haiku",
    "gemini-2.0-pro",
    "glm-4", "glm-4.6:cloud", "deepseek-chat", "deepseek-reasoner", "mistral-large-latest", "command-r-plus",
    "grok-3",
    "moonshot-v1", "kimi-k2", "ernie-4.5", "hunyuan-large", "gpt-oss:120b-cloud",
)  # fmt: skip


@pytest.mark.parametrize("name", VENDOR_NAMES)
def test_m2_a_name_routes_nothing(daemon: NodeProcess, engine: Upstream, name: str) -> None:
    before = len(engine.bodies)
    answer = daemon.call("POST", "/v1/chat/completions", {**CHAT, "model": name})
    assert answer.json["error"]["code"] in {"model-not-found", "policy-denied"}
    assert len(engine.bodies) == before  # M10: nor is it served by something else
    last = daemon.call("GET", "/api/receipts?last=1").json["receipts"][0]
    assert (last["kind"], last["body"]["decision"], last["body"]["model"]) == ("decision", "deny", name)


# --- receipts -----------------------------------------------------------------------------------


def test_every_answer_names_a_receipt_that_exists(daemon: NodeProcess) -> None:
    answer = daemon.call("POST", "/v1/chat/completions", CHAT)
    receipt = daemon.call("GET", f"/api/receipts/{answer.headers['X-Mycoswarm-Receipt']}")
    assert receipt.status == 200
    assert receipt.json["body"]["rule"] == "here"
    assert receipt.json["body"]["label"] == "private"
    refused = daemon.call("POST", "/v1/chat/completions", {**CHAT, "model": "gpt-4o"})
    denied = daemon.call("GET", f"/api/receipts/{refused.headers['X-Mycoswarm-Receipt']}").json
    assert denied["body"]["decision"] == "deny"


def test_the_chain_verifies_over_the_interface(daemon: NodeProcess) -> None:
    daemon.call("POST", "/v1/chat/completions", CHAT)
    head = daemon.call("GET", "/api/receipts/head").json
    checked = daemon.call("POST", "/api/receipts/verify", {"head": head["id"]}).json
    assert checked["ok"]
    assert checked["count"] >= head["seq"]


def test_no_prompt_text_is_in_receipts_logs_or_errors(daemon: NodeProcess) -> None:
    marker = "MARKER-7f3a-zebra"
    message = [{"role": "user", "content": marker}]
    for model in ("ok", "garbage", "refuses", "gpt-4o", "qwen-max"):
        answer = daemon.call("POST", "/v1/chat/completions", {"model": model, "messages": message})
        assert marker.encode() not in answer.body
    for body in (
        {"model": "ok", "messages": marker},
        {"model": "ok", "messages": message, "temperature": marker},
    ):
        assert marker.encode() not in daemon.call("POST", "/v1/chat/completions", body).body
    daemon.call("POST", "/v1/completions", {"model": "ok", "prompt": marker})
    daemon.call("POST", "/v1/embeddings", {"model": "ok", "input": marker})
    daemon.call("GET", "/api/receipts/head")
    assert marker not in daemon.log()
    for file in daemon.state.rglob("*"):
        if file.is_file():
            assert marker.encode() not in file.read_bytes(), file
