"""agent/loop: what it does with good models, bad models and refusals, against a scripted node."""

import json
import threading
import time
from pathlib import Path

import pytest

from mycoswarmd.agent.channel import Channel
from mycoswarmd.agent.link import Cancelled, Link
from mycoswarmd.agent.loop import Ending, Job, Loop, parse_job
from mycoswarmd.agent.tools import Workbench
from mycoswarmd.errors import BadRequest, CageError
from mycoswarmd.wire.frames import Frame, FrameType
from tests.unit.agent.scripted import Model, Node, result_of, script

FILE_TOOLS = ("fs_read", "fs_write", "fs_edit", "fs_list", "fs_search")
FINISH: list[tuple[str, object]] = [("finish", {"summary": "done"})]


def job(prompt: str = "Do it.", *, steps: int = 20, tokens: int = 10_000, guided: bool = False) -> Job:
    return Job(
        prompt=prompt,
        tools=(*FILE_TOOLS, "run"),
        steps=steps,
        tokens=tokens,
        context_tokens=4096,
        is_guided=guided,
    )


def loop(node: Node, root: int, tmp_path: Path, task: Job, files: tuple[str, ...] = ()) -> Loop:
    link = Link(Channel(node.near.fileno()))
    bench = Workbench(
        root=root,
        directory=str(tmp_path / "w"),
        programs=("/bin/echo", "/bin/sleep"),
        watch=(link.fileno(), link.check),
        sweep=lambda: None,
    )
    return Loop(job=task, link=link, bench=bench, files=files)


def work(
    node: Node, root: int, tmp_path: Path, task: Job | None = None, files: tuple[str, ...] = ()
) -> Ending:
    with node.serving():
        return loop(node, root, tmp_path, task or job(), files).run()


def ending(model: Model, root: int, tmp_path: Path, task: Job | None = None) -> Ending:
    return work(Node(model), root, tmp_path, task)


def test_a_task_is_read_written_and_finished(root: int, tmp_path: Path) -> None:
    (tmp_path / "w/notes.txt").write_text("buy milk")
    node = Node(
        script(
            [("fs_read", {"path": "notes.txt"})],
            [("fs_write", {"path": "SUMMARY.md", "content": "Milk."})],
            FINISH,
        )
    )
    assert work(node, root, tmp_path, files=("notes.txt",)) == Ending(
        is_ok=True, code="", summary="done", steps=3
    )
    assert (tmp_path / "w/SUMMARY.md").read_text() == "Milk."
    asked = node.bodies(FrameType.MODEL)
    assert result_of(asked[1]["messages"])["content"] == "buy milk"
    assert {one["function"]["name"] for one in asked[0]["tools"]} == {*FILE_TOOLS, "run", "finish"}  # type: ignore[attr-defined]
    assert (asked[0]["tool_choice"], asked[0]["temperature"]) == ("required", 0)
    done = node.bodies(FrameType.TOOL_DONE)
    assert [(one["tool"], one["ok"], one["text"]) for one in done[:1]] == [("fs_read", True, "buy milk")]


def test_nothing_is_done_before_the_permit_and_never_after_a_refusal(root: int, tmp_path: Path) -> None:
    target = tmp_path / "w/x"
    seen: list[bool] = []
    node = Node(script([("fs_write", {"path": "x", "content": "1"})], FINISH), refuse=["fs_write"])

    def look(_: Frame) -> None:
        seen.append(target.exists())

    node.on_tool = look
    assert work(node, root, tmp_path).is_ok
    assert seen == [False]
    assert not target.exists()
    told = result_of(node.bodies(FrameType.MODEL)[1]["messages"])
    assert told["content"] == "Error: not allowed: cannot use it: no rule"
    assert node.bodies(FrameType.TOOL_DONE) == []


def test_a_fatal_refusal_ends_the_task_with_its_code(root: int, tmp_path: Path) -> None:
    node = Node(script([("fs_list", {"path": "."})]))
    node.on_tool = lambda frame: Frame(
        FrameType.REFUSED,
        {
            "id": frame.body["id"],
            "code": "not-approved",
            "message": "cannot: said no",
            "rule": "",
            "fatal": True,
        },
    )
    assert work(node, root, tmp_path) == Ending(
        is_ok=False, code="not-approved", summary="cannot: said no", steps=1
    )


def test_a_model_call_that_the_node_refuses_ends_with_its_code(root: int, tmp_path: Path) -> None:
    refusal = Frame(
        FrameType.REFUSED,
        {"code": "model-timeout", "message": "cannot go on: the model never answered", "fatal": True},
    )
    assert ending(script(refusal), root, tmp_path).code == "model-timeout"


@pytest.mark.parametrize(
    ("say", "code"),
    [
        ("I would rather talk about mushrooms.", "agent-nonsense"),
        ("", "agent-silent"),
        (" \n ", "agent-silent"),
        ([("fs_read", "{not json")], "agent-nonsense"),
        ([("fs_read", "[]")], "agent-nonsense"),
        ([("fs_read", "[" * 100_000)], "agent-nonsense"),
        ([("fs_read", {})], "agent-nonsense"),
        ([("fs_read", {"path": 7})], "agent-nonsense"),
        ([("fs_read", {"path": "a", "extra": 1})], "agent-nonsense"),
        ([("launch_rocket", {"to": "moon"})], "agent-nonsense"),
        ([("web_fetch", {"url": "x"})], "agent-nonsense"),
        ([("fs_write", {"path": "x", "content": "\ud800"})], "agent-nonsense"),
        ([("fs_write", {"path": "x", "content": "x" * 600_000})], "agent-nonsense"),
        ([("fs_list", {"path": "."})], "agent-looped"),
        ([("fs_read", {"path": "none"})], "agent-looped"),
        ([("run", {"program": "echo", "args": ["again"]})], "agent-looped"),
    ],
)
def test_a_bad_model_ends_in_a_clear_state(say: str, code: str, root: int, tmp_path: Path) -> None:
    end = ending(script(say), root, tmp_path)
    assert (end.is_ok, end.code, end.steps) == (False, code, 3)
    assert end.summary.startswith("cannot go on: ")
    assert "mushrooms" not in end.summary


def test_a_tool_that_is_not_in_the_job_is_not_even_asked_for(root: int, tmp_path: Path) -> None:
    task = Job(prompt="x", tools=("fs_read",), steps=9, tokens=999, context_tokens=4096, is_guided=False)
    node = Node(script([("run", {"program": "echo", "args": []})], FINISH))
    assert work(node, root, tmp_path, task).is_ok
    assert node.bodies(FrameType.TOOL) == []
    assert "not among your tools" in str(result_of(node.bodies(FrameType.MODEL)[1]["messages"])["content"])


def test_ten_megabytes_of_nonsense_are_nonsense(root: int, tmp_path: Path) -> None:
    # The node's frames stop at 4 MiB, so this is the most that can arrive in one answer.
    assert ending(script("x" * 4_000_000), root, tmp_path).code == "agent-nonsense"


def test_one_slip_is_forgiven(root: int, tmp_path: Path) -> None:
    model = script("hm", "", [("fs_list", {"path": "."})], "hm", [("fs_read", "{")], FINISH)
    assert ending(model, root, tmp_path) == Ending(is_ok=True, code="", summary="done", steps=6)


def test_the_first_repeat_is_told_and_not_done_again(root: int, tmp_path: Path) -> None:
    call: list[tuple[str, object]] = [("fs_list", {"path": "."})]
    node = Node(script(call, call, FINISH))
    assert work(node, root, tmp_path).is_ok
    assert len(node.bodies(FrameType.TOOL)) == 1
    assert "did this already" in str(result_of(node.bodies(FrameType.MODEL)[2]["messages"])["content"])


def test_the_same_call_after_a_change_is_no_loop(root: int, tmp_path: Path) -> None:
    steps: list[list[tuple[str, object]]] = []
    for number in range(4):
        steps.append([("run", {"program": "echo", "args": ["test"]})])
        steps.append([("fs_write", {"path": "f", "content": str(number)})])
    assert ending(script(*steps, FINISH), root, tmp_path).is_ok


def test_writing_the_same_over_and_over_is_a_loop(root: int, tmp_path: Path) -> None:
    end = ending(script([("fs_write", {"path": "f", "content": "x"})]), root, tmp_path)
    assert end.code == "agent-looped"


def test_steps_and_tokens_are_bounded(root: int, tmp_path: Path) -> None:
    count = iter(range(10**6))

    def busy(_: object) -> list[tuple[str, object]]:
        return [("fs_write", {"path": "f", "content": str(next(count))})]

    end = ending(busy, root, tmp_path, job(steps=5))
    assert (end.code, end.steps) == ("step-limit", 5)
    end = work(Node(busy, usage=400), root, tmp_path, job(tokens=1000))
    assert (end.code, end.steps) == ("token-limit", 3)


def test_several_calls_in_one_answer_are_done_in_order_up_to_a_bound(root: int, tmp_path: Path) -> None:
    calls: list[tuple[str, object]] = [("fs_write", {"path": f"f{n}", "content": "x"}) for n in range(20)]
    assert ending(script(calls, FINISH), root, tmp_path).is_ok
    assert len(list((tmp_path / "w").iterdir())) == 8


def test_what_follows_finish_is_not_done(root: int, tmp_path: Path) -> None:
    assert ending(script([*FINISH, ("fs_write", {"path": "f", "content": "x"})]), root, tmp_path).is_ok
    assert list((tmp_path / "w").iterdir()) == []


def test_cancel_between_steps(root: int, tmp_path: Path) -> None:
    node = Node(script(FINISH))
    node.channel.send(Frame(FrameType.CANCEL, {}))
    with node.serving(), pytest.raises(Cancelled):
        loop(node, root, tmp_path, job()).run()
    assert node.seen == []


def test_cancel_instead_of_an_answer(root: int, tmp_path: Path) -> None:
    with Node(lambda _: Frame(FrameType.CANCEL, {})).serving() as node, pytest.raises(Cancelled):
        loop(node, root, tmp_path, job()).run()


def test_cancel_while_a_program_runs_kills_it(root: int, tmp_path: Path) -> None:
    node = Node(script([("run", {"program": "sleep", "args": ["600"]})]))
    timers: list[threading.Timer] = []

    def later(_: Frame) -> None:
        timers.append(threading.Timer(0.5, lambda: node.channel.send(Frame(FrameType.CANCEL, {}))))
        timers[0].start()

    node.on_tool = later
    started = time.monotonic()
    with node.serving(), pytest.raises(Cancelled):
        loop(node, root, tmp_path, job()).run()
    assert time.monotonic() - started < 60
    timers[0].join()


def test_the_end_of_the_channel_ends_the_work_at_any_time(root: int, tmp_path: Path) -> None:
    node = Node(script(FINISH))
    with node.serving():
        node.far.shutdown(2)
        with pytest.raises(CageError) as caught:
            loop(node, root, tmp_path, job()).run()
    assert caught.value.code == "cage-gone"


def test_an_answer_to_another_question_is_refused(root: int, tmp_path: Path) -> None:
    node = Node(script(FINISH))
    node.channel.send(Frame(FrameType.PERMIT, {"id": 99}))
    with node.serving(), pytest.raises(BadRequest):
        loop(node, root, tmp_path, job()).run()


def test_files_with_odd_names_can_be_read_by_what_is_shown(root: int, tmp_path: Path) -> None:
    (tmp_path / "w/two\nlines").write_text("found")
    node = Node(script([("fs_read", {"path": "two\\nlines"})], FINISH))
    with node.serving():
        one = loop(node, root, tmp_path, job(), ("two\\nlines",))
        one.bench.shown_names = {"two\\nlines": "two\nlines"}
        assert one.run().is_ok
    assert node.bodies(FrameType.TOOL_DONE)[0]["text"] == "found"


def test_long_work_stays_within_the_context_and_keeps_the_task(root: int, tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"w/f{number}").write_text(f"{number} " * 3000)
    reads: list[list[tuple[str, object]]] = [[("fs_read", {"path": f"f{number}"})] for number in range(30)]
    node = Node(script(*reads, FINISH))
    assert work(node, root, tmp_path, job("Count the mushrooms.", steps=40)).is_ok
    for body in node.bodies(FrameType.MODEL):
        assert len(json.dumps(body["messages"])) < 4096 * 3
        messages = body["messages"]
        assert isinstance(messages, list)
        assert "Count the mushrooms." in messages[1]["content"]
    assert "29 29" in str(result_of(node.bodies(FrameType.MODEL)[-1]["messages"])["content"])


def test_a_guided_model_sees_only_what_makes_sense(root: int, tmp_path: Path) -> None:
    (tmp_path / "w/notes.txt").write_text("buy milk")
    (tmp_path / "w/other.txt").write_text("other")
    node = Node(
        script(
            [("fs_read", {"path": "notes.txt"})],
            [("fs_write", {"path": "SUMMARY.md", "content": "Milk."})],
            FINISH,
        )
    )
    task = job("Read notes.txt and write a short summary to SUMMARY.md.", guided=True)
    assert work(node, root, tmp_path, task, ("notes.txt", "other.txt")).is_ok
    offers = [
        {one["function"]["name"]: one["function"]["parameters"]["properties"] for one in body["tools"]}  # type: ignore[attr-defined]
        for body in node.bodies(FrameType.MODEL)
    ]
    assert offers[0]["fs_read"]["path"]["enum"] == ["notes.txt"]
    assert "fs_write" not in offers[0]
    assert offers[1]["fs_write"]["path"]["enum"] == ["SUMMARY.md"]
    assert "fs_read" not in offers[1]
    assert [name for name in offers[2] if name.startswith("fs_")] == []
    assert all("finish" in offer for offer in offers)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "x", "tools": ["fs_read"], "limits": {"steps": 0, "tokens": 1}},
        {"prompt": 1, "tools": [], "limits": {"steps": 1, "tokens": 1}},
        {"prompt": "x", "tools": "all", "limits": {"steps": 1, "tokens": 1}},
    ],
)
def test_a_bad_job_is_refused(body: dict[str, object]) -> None:
    with pytest.raises(BadRequest):
        parse_job(body)
