import json

import pytest

from tests.unit.ctl.fakenode import Asked, FakeNode, Reply, answer, ctl, refuse, sse

MODELS = {
    "models": [
        {"name": "far", "zone": "cloud", "kinds": ["chat"], "loaded": True},
        {"name": "vectors", "zone": "self", "kinds": ["embedding"], "loaded": True},
        {"name": "small", "zone": "self", "kinds": ["chat", "text"], "loaded": False},
    ]
}
SAID = {
    "X-Mycoswarm-Node": "box",
    "X-Mycoswarm-Zone": "self",
    "X-Mycoswarm-Rule": "answered-here",
    "X-Mycoswarm-Receipt": "7-0123abcd",
    "X-Mycoswarm-Model": "small",
}
CHAT = ("POST", "/v1/chat/completions")


def chunk(text: str | None, finish: str | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


def whole(text: str) -> dict[str, object]:
    message = {"role": "assistant", "content": text}
    return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"total_tokens": 9}}


@pytest.fixture
def asked(node: FakeNode) -> FakeNode:
    node.on("GET", "/api/models", answer(MODELS))
    return node.on(*CHAT, sse(chunk("Hel"), chunk("lo\n"), chunk(None, "stop"), headers=SAID))


def test_the_answer_streams_to_stdout_and_the_choice_of_model_to_stderr(asked: FakeNode) -> None:
    ran = ctl(asked, "ask", "hi")
    assert (ran.code, ran.out) == (0, "Hello\n")
    assert "small" in ran.err
    body = asked.asked[-1].json
    assert (body["model"], body["stream"]) == ("small", True)
    assert body["messages"] == [{"role": "user", "content": "hi"}]
    assert body.keys().isdisjoint({"max_tokens", "temperature"})


def test_options_reach_the_node_and_no_model_is_chosen_where_one_is_named(asked: FakeNode) -> None:
    said = ("--label", "secret", "--system", "be brief", "--max-tokens", "5", "--temperature", "0")
    ran = ctl(asked, "ask", "--model", "m", *said, "hi")
    assert (ran.code, ran.err) == (0, "")
    assert asked.paths() == ["POST /v1/chat/completions"]
    request = asked.asked[0]
    assert request.headers["x-mycoswarm-label"] == "secret"
    assert request.json["max_tokens"] == 5
    assert request.json["temperature"] == 0
    assert request.json["messages"][0] == {"role": "system", "content": "be brief"}


def test_verbose_says_who_answered_and_by_which_rule(asked: FakeNode) -> None:
    ran = ctl(asked, "ask", "-v", "hi")
    for fact in ("box", "self", "answered-here", "7-0123abcd"):
        assert fact in ran.err
    assert ran.out == "Hello\n"


def test_json_is_one_document_with_the_answer_and_who_gave_it(asked: FakeNode) -> None:
    asked.on(*CHAT, answer(whole("Hello"), headers=SAID))
    ran = ctl(asked, "ask", "--json", "hi")
    assert ran.code == 0
    assert ran.json["choices"][0]["message"]["content"] == "Hello"
    assert ran.json["mycoswarm"] == {
        "node": "box",
        "model": "small",
        "zone": "self",
        "rule": "answered-here",
        "receipt": "7-0123abcd",
    }
    assert not asked.asked[-1].json.get("stream")


def test_no_stream_prints_the_whole_answer(asked: FakeNode) -> None:
    asked.on(*CHAT, answer(whole("Hello"), headers=SAID))
    ran = ctl(asked, "ask", "--no-stream", "hi")
    assert (ran.code, ran.out) == (0, "Hello\n")


def test_the_prompt_comes_from_stdin_for_a_dash(asked: FakeNode) -> None:
    assert ctl(asked, "ask", "-", stdin="from a pipe\n").code == 0
    assert asked.asked[-1].json["messages"][0]["content"].startswith("from a pipe")


@pytest.mark.parametrize("stdin", [b"", b" \n", b"\xff\xfe", b"x" * (8 << 20)])
def test_a_prompt_that_is_none_is_refused_before_anything_is_sent(node: FakeNode, stdin: bytes) -> None:
    ran = ctl(node, "ask", "--model", "m", "-", stdin=stdin)
    assert ran.code == 2
    assert "cannot" in ran.err
    assert node.asked == []


def test_a_models_text_cannot_steer_the_terminal(asked: FakeNode) -> None:
    asked.on(*CHAT, sse(chunk("a\x1b[2J\tb\n"), chunk("\u202ec"), chunk(None, "stop")))
    assert ctl(asked, "ask", "hi").out == "a\\x1b[2J\tb\n\\u202ec\n"


def test_a_refusal_exits_3_with_its_rule_and_nothing_on_stdout(asked: FakeNode) -> None:
    asked.on(*CHAT, refuse(403, "policy-denied", "cannot send this", rule="default-deny", where=""))
    ran = ctl(asked, "ask", "--model", "gpt-4o", "hi")
    assert (ran.code, ran.out) == (3, "")
    assert "default-deny" in ran.err


def test_an_error_in_the_middle_is_reported_after_the_text_so_far(asked: FakeNode) -> None:
    asked.on(
        *CHAT, sse(chunk("Hel"), {"error": {"code": "engine-failed", "message": "cannot go on"}}, done=False)
    )
    ran = ctl(asked, "ask", "hi")
    assert (ran.code, ran.out) == (1, "Hel\n")
    assert "engine-failed" in ran.err


def test_a_node_that_goes_away_in_the_middle_is_unreachable(asked: FakeNode) -> None:
    asked.on(*CHAT, sse(chunk("Hel"), done=False, cut=True))
    ran = ctl(asked, "ask", "hi")
    assert (ran.code, ran.out) == (4, "Hel\n")


def test_a_stream_that_just_ends_is_a_failure_not_an_answer(asked: FakeNode) -> None:
    asked.on(*CHAT, sse(chunk("Hel"), done=False))
    ran = ctl(asked, "ask", "hi")
    assert (ran.code, ran.out) == (1, "Hel\n")


def test_an_answer_cut_by_its_limit_says_so(asked: FakeNode) -> None:
    asked.on(*CHAT, sse(chunk("Hel"), chunk(None, "length")))
    ran = ctl(asked, "ask", "hi")
    assert ran.code == 0
    assert "limit" in ran.err


def test_no_model_on_this_node_says_how_to_get_one(node: FakeNode) -> None:
    node.on("GET", "/api/models", answer({"models": MODELS["models"][:2]}))
    ran = ctl(node, "ask", "hi")
    assert ran.code == 1
    assert "engine install" in ran.err


def test_where_others_have_models_they_are_named(node: FakeNode) -> None:
    """A prompt leaves this node only for what a person named."""
    afar = [{"name": f"m{i}", "zone": "lan", "kinds": ["chat"]} for i in (2, 1, 1)]
    vectors = {"name": "v", "zone": "lan", "kinds": ["embedding"]}
    node.on("GET", "/api/models", answer({"models": [*MODELS["models"][:2], vectors, *afar]}))
    ran = ctl(node, "ask", "hi")
    assert ran.code == 1 and node.paths() == ["GET /api/models"]
    assert "hint: say which one of the swarm's: --model m1 or m2\n" in ran.err
    afar += [{"name": f"n{i}", "zone": "lan", "kinds": ["chat"]} for i in range(4)]
    node.on("GET", "/api/models", answer({"models": afar}))
    assert "m1 or m2 or n0 or n1, and 2 more: mycoswarmctl models" in ctl(node, "ask", "hi").err


@pytest.mark.parametrize("label", ["a\r\nX-Evil: 1", "ü"])
def test_a_label_that_is_no_word_is_refused_here(node: FakeNode, label: str) -> None:
    ran = ctl(node, "ask", "--model", "m", "--label", label, "hi")
    assert ran.code == 2
    assert node.asked == []


def test_a_prompt_may_hold_anything(asked: FakeNode) -> None:
    def echo(request: Asked) -> Reply:
        return sse(chunk(json.loads(request.body)["messages"][0]["content"], "stop"))

    asked.on(*CHAT, echo)
    assert ctl(asked, "ask", "--", "--ü 世界 \"'\\").out == "--ü 世界 \"'\\\n"
