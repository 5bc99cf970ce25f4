"""agent/main: the order of frames from CONFINE to RESULT, and every failure as a RESULT with a code."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from mycoswarmd.agent import confine, main, threshold
from mycoswarmd.agent.channel import Channel
from mycoswarmd.errors import CageError
from mycoswarmd.wire.frames import MAX_PAYLOAD_BYTES, Frame, FrameType
from mycoswarmd.wire.workspace import Entry, EntryKind, read_workspace, write_workspace
from tests.unit.agent.scripted import Model, Node, script

JOB = {
    "task": "t-1",
    "prompt": "Do it.",
    "model": "m",
    "native_tools": True,
    "tools": ["fs_read", "fs_write"],
    "limits": {"steps": 9, "tokens": 10_000, "context_tokens": None},
}
FINISH: list[tuple[str, object]] = [("finish", {"summary": "done"})]


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the cage's /workspace into a temporary directory. The kernel's part is tested in real cages."""
    place = tmp_path / "w"
    place.mkdir()
    monkeypatch.setattr(main, "WORKSPACE", str(place))
    return place


def serve(model: Model, *frames: Frame, confinement: Mapping[str, object] | None = None) -> Node:
    node = Node(model)
    with node.serving():
        # The socket's buffer holds these small frames until they are asked for.
        for frame in frames:
            node.channel.send(frame)
        main.serve(Channel(node.near.fileno()), confinement or {"programs": []})
    return node


def given(*entries: Entry) -> Frame:
    return Frame(FrameType.WORKSPACE, {"last": True}, write_workspace(entries))


def result(node: Node) -> tuple[object, object]:
    (body,) = node.bodies(FrameType.RESULT)
    return body["state"], body["code"]


def test_a_task_from_workspace_to_result() -> None:
    node = serve(
        script([("fs_read", {"path": "a"})], [("fs_write", {"path": "b", "content": "new"})], FINISH),
        given(Entry(path="a", kind=EntryKind.FILE, data=b"old")),
        Frame(FrameType.JOB, JOB),
    )
    kinds = [frame.type for frame in node.seen]
    assert kinds[-2:] == [FrameType.CHANGES, FrameType.RESULT]
    (changes,) = [frame for frame in node.seen if frame.type is FrameType.CHANGES]
    assert changes.body == {"last": True}
    assert [(entry.path, entry.data) for entry in read_workspace(changes.payload)] == [("b", b"new")]
    assert node.seen[-1].body == {
        "state": "succeeded",
        "code": "",
        "summary": "done",
        "steps": 3,
        "deleted": [],
    }


def test_no_change_sends_no_changes() -> None:
    node = serve(script(FINISH), given(), Frame(FrameType.JOB, JOB))
    assert [frame.type for frame in node.seen] == [FrameType.MODEL, FrameType.RESULT]


def test_a_workspace_in_pieces_and_changes_in_pieces(workspace: Path) -> None:
    tar = write_workspace([Entry(path="a", kind=EntryKind.FILE, data=os.urandom(9000))])
    pieces = [
        Frame(FrameType.WORKSPACE, {"last": start + 5000 >= len(tar)}, tar[start : start + 5000])
        for start in range(0, len(tar), 5000)
    ]
    big = os.urandom(MAX_PAYLOAD_BYTES + 5)

    def model(_: object) -> list[tuple[str, object]]:
        (workspace / "big").write_bytes(big)  # as a program would
        return FINISH

    node = serve(model, *pieces, Frame(FrameType.JOB, JOB))
    changes = [frame for frame in node.seen if frame.type is FrameType.CHANGES]
    assert [frame.body["last"] for frame in changes] == [False, True]
    entries = read_workspace(b"".join(frame.payload for frame in changes))
    assert [(entry.path, entry.data) for entry in entries] == [("big", big)]


def test_what_was_done_before_a_failure_comes_back() -> None:
    node = serve(
        script([("fs_write", {"path": "b", "content": "new"})], "words"), given(), Frame(FrameType.JOB, JOB)
    )
    assert result(node) == ("failed", "agent-nonsense")
    assert len(node.bodies(FrameType.CHANGES)) == 1


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([Frame(FrameType.WORKSPACE, {"last": True}, b"PK" * 600)], "bad-workspace"),
        ([Frame(FrameType.JOB, JOB)], "bad-frame"),
        ([given(), given()], "bad-frame"),
        ([given(), Frame(FrameType.JOB, {})], "bad-request"),
        ([Frame(FrameType.WORKSPACE, {"last": "yes"}, b"")], "bad-request"),
        ([Frame(FrameType.CANCEL, {})], "cancelled"),
        ([given(), Frame(FrameType.CANCEL, {})], "cancelled"),
        ([given(), Frame(FrameType.JOB, JOB), Frame(FrameType.CANCEL, {})], "cancelled"),
    ],
)
def test_every_failure_is_a_result_with_a_code(frames: list[Frame], code: str) -> None:
    assert result(serve(script(FINISH), *frames)) == ("failed", code)


def test_a_full_disk_is_a_result_and_its_traceback_goes_to_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_root: int, _entries: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(main, "unpack", full)
    node = serve(script(FINISH), given(), Frame(FrameType.JOB, JOB))
    assert result(node) == ("failed", "agent-crashed")
    assert "No space left on device in the cage" in str(node.seen[-1].body["summary"])
    assert "Traceback" in capsys.readouterr().err


def test_a_closed_channel_ends_the_agent_without_a_word() -> None:
    node = Node(script(FINISH))
    with node.serving():
        node.far.shutdown(2)
        with pytest.raises(CageError) as caught:
            main.serve(Channel(node.near.fileno()), {"programs": []})
    assert caught.value.code == "cage-gone"


def test_what_cannot_be_confined_says_so_and_takes_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_body: object, _payload: bytes) -> None:
        raise CageError("cage-setup", "cannot confine the agent: 'landlock' failed")

    monkeypatch.setattr(confine, "apply", refuse)
    node = Node(script(FINISH))
    with node.serving():
        node.channel.send(Frame(FrameType.CONFINE, {}))
        with pytest.raises(CageError):
            threshold.prove_confinement(Channel(node.near.fileno()))
    (proof,) = node.bodies(FrameType.PROOF)
    assert (proof["level"], proof["error"]) == ("none", "cannot confine the agent: 'landlock' failed")


def test_only_confine_may_come_first() -> None:
    node = Node(script(FINISH))
    with node.serving():
        node.channel.send(Frame(FrameType.JOB, JOB))
        with pytest.raises(CageError, match="CONFINE"):
            threshold.prove_confinement(Channel(node.near.fileno()))
    assert node.seen == []
