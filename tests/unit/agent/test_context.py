"""agent/context: shortens what is oldest, keeps the task, and says only what an engine can take back."""

import json

from mycoswarmd.agent.context import Context
from mycoswarmd.wire.prompt import ToolCall

TASK: list[dict[str, object]] = [{"role": "system", "content": "s"}, {"role": "user", "content": "the task"}]


def call(arguments: str, name: str = "fs_read") -> ToolCall:
    return ToolCall(id="c", name=name, arguments=arguments)


def size(context: Context) -> int:
    return len(json.dumps(context.messages()))


def test_old_results_go_before_the_newest() -> None:
    context = Context(TASK, budget_tokens=1000)
    for number in range(4):
        context.add_calls("", [call("{}")])
        context.add_result("c", f"{number}" * 1200)
    texts = [message["content"] for message in context.messages() if message["role"] == "tool"]
    assert texts[-1] == "3" * 1200
    assert str(texts[0]).endswith("[shortened]")
    assert context.messages()[:2] == TASK


def test_old_calls_stay_json_when_they_are_shortened() -> None:
    context = Context(TASK, budget_tokens=300)
    for _ in range(3):
        context.add_calls("", [call(json.dumps({"path": "f", "content": "x" * 700}), "fs_write")])
        context.add_result("c", "ok")
    for message in context.messages():
        for one in message.get("tool_calls", []):  # type: ignore[attr-defined]
            assert json.loads(one["function"]["arguments"])["path"] == "f"


def test_whole_exchanges_go_at_last_and_never_half_of_one() -> None:
    context = Context(TASK, budget_tokens=200)
    for _ in range(20):
        context.add_calls("", [call("{}")])
        context.add_result("c", "some text " * 10)
    messages = context.messages()
    assert size(context) < 1500
    assert [message["role"] for message in messages[2:]] == ["assistant", "tool"] * ((len(messages) - 2) // 2)


def test_even_the_newest_result_is_cut_when_alone_it_does_not_fit() -> None:
    context = Context(TASK, budget_tokens=300)
    context.add_calls("", [call("{}")])
    context.add_result("c", "x" * 30_000)
    assert str(context.messages()[-1]["content"]).endswith("[the rest does not fit]")
    assert size(context) < 1200


def test_nonsense_is_not_sent_back_to_the_engine() -> None:
    context = Context(TASK, budget_tokens=300)
    context.add_calls(
        "half \ud800 pair", [call("[" * 100_000), call("[1]"), call("{bad"), call("{}", name="")]
    )
    context.add_result("c", "\udfff")
    spelled = json.dumps(context.messages(), ensure_ascii=False).encode()  # would raise on a lone surrogate
    assert b"half ? pair" in spelled
    calls = context.messages()[2]["tool_calls"]
    assert isinstance(calls, list)
    assert [one["function"]["arguments"] for one in calls] == ["{}"] * 4
