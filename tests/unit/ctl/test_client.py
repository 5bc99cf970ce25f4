"""How the client turns what goes wrong into errors, messages and exit codes."""

import json
import socket
import threading
from pathlib import Path

import pytest

from mycoswarmd.ctl.client import Client, segment
from mycoswarmd.errors import (
    BadRequest,
    Conflict,
    Denied,
    EngineError,
    MycoswarmError,
    NotFound,
    PolicyInvalid,
    Unauthenticated,
    Unavailable,
    Unreachable,
)
from tests.unit.ctl.fakenode import FakeNode, Reply, answer, ctl, events, refuse

STATUSES = [
    (400, BadRequest, 1),
    (401, Unauthenticated, 3),
    (403, Denied, 3),
    (404, NotFound, 1),
    (405, BadRequest, 1),
    (409, Conflict, 1),
    (413, BadRequest, 1),
    (429, Unavailable, 1),
    (500, MycoswarmError, 1),
    (502, EngineError, 1),
    (503, Unavailable, 1),
]


@pytest.mark.parametrize(("status", "kind", "code"), STATUSES)
def test_each_status_becomes_its_class_and_exit_code(
    node: FakeNode, status: int, kind: type[MycoswarmError], code: int
) -> None:
    node.on("GET", "/api/models", refuse(status, "some-code", "cannot list models", hint="do this"))
    with pytest.raises(kind) as caught:
        Client(node.path).get("/api/models")
    assert (caught.value.code, caught.value.message, caught.value.hint) == (
        "some-code",
        "cannot list models",
        "do this",
    )
    for_people = ctl(node, "models")
    assert for_people.code == code
    assert for_people.out == ""
    assert "cannot list models" in for_people.err and "some-code" in for_people.err
    assert for_people.err.count("do this") == 1
    for_programs = ctl(node, "models", "--json")
    assert for_programs.code == code
    assert for_programs.json["error"]["code"] == "some-code"
    assert for_programs.json["error"]["hint"] == "do this"
    assert for_programs.err == ""


def test_a_refusal_by_the_policy_says_rule_place_and_receipt(node: FakeNode) -> None:
    error = {"code": "policy-denied", "message": "cannot ask this", "rule": "stays-home", "where": "p.toml:7"}
    node.on("GET", "/api/models", answer({"error": error}, 403, {"X-Mycoswarm-Receipt": "17-89abcdef"}))
    ran = ctl(node, "models")
    assert ran.code == 3
    assert "stays-home" in ran.err and "p.toml:7" in ran.err and "17-89abcdef" in ran.err
    document = ctl(node, "models", "--json").json["error"]
    assert (document["rule"], document["where"], document["receipt"]) == (
        "stays-home",
        "p.toml:7",
        "17-89abcdef",
    )


def test_a_broken_policy_is_a_failure_with_all_its_problems(node: FakeNode) -> None:
    problems = [
        {"path": "p.toml", "line": 3, "message": "cannot use 'zoen'", "hint": "zone"},
        {"path": "p.toml", "line": 9, "message": "cannot use ''", "hint": ""},
    ]
    node.on("POST", "/api/policy/reload", refuse(403, "policy-invalid", rule="no-policy", problems=problems))
    with pytest.raises(PolicyInvalid):
        Client(node.path).post("/api/policy/reload")
    ran = ctl(node, "policy", "reload")
    assert ran.code == 1
    assert "p.toml:3" in ran.err and "p.toml:9" in ran.err and "zone" in ran.err
    assert ctl(node, "policy", "reload", "--json").json["error"]["problems"] == problems


def test_no_socket_is_unreachable_with_what_to_do(tmp_path: Path) -> None:
    ran = ctl(None, "--socket", str(tmp_path / "none.sock"), "models")
    assert ran.code == 4
    assert "none.sock" in ran.err and "mycoswarmd run" in ran.err
    document = ctl(None, "--socket", str(tmp_path / "none.sock"), "models", "--json").json["error"]
    assert document["message"].startswith("cannot ")


def test_a_socket_of_a_dead_daemon_is_unreachable(node: FakeNode) -> None:
    dead = node.path.with_name("dead")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(dead))
    assert ctl(None, "--socket", str(dead), "status").code == 4


def test_a_path_too_long_for_a_socket_is_unreachable_and_no_traceback(tmp_path: Path) -> None:
    ran = ctl(None, "--socket", str(tmp_path / ("x" * 200)), "status")
    assert ran.code == 4
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 2", b"\x00garbage\r\n\r\n"])
def test_a_daemon_that_hangs_up_or_talks_nonsense_is_unreachable(node: FakeNode, said: bytes) -> None:
    path = node.path.with_name("raw")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()

        def serve() -> None:
            connection, _ = sock.accept()
            connection.recv(65536)
            connection.sendall(said)
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(Unreachable):
            Client(path).get("/api/status")
        thread.join()


def test_an_answer_cut_short_is_unreachable(node: FakeNode) -> None:
    node.on("GET", "/api/status", Reply(body=b'{"state": "green"}', cut=True))
    with pytest.raises(Unreachable):
        Client(node.path).get("/api/status")
    assert ctl(node, "status").code == 4


def test_lines_cut_short_are_unreachable_after_what_came(node: FakeNode) -> None:
    node.on("GET", "/lines", events({"seq": 1}, {"seq": 2}, cut=True))
    seen = []

    def read() -> None:
        for row in Client(node.path).lines("/lines"):
            seen.append(row)  # noqa: PERF402 - what came before the cut counts

    with pytest.raises(Unreachable):
        read()
    assert seen == [{"seq": 1}, {"seq": 2}]


@pytest.mark.parametrize("body", [b"", b"[]", b"nonsense", b"[" * 100_000, b"\xff\xfe"])
def test_an_answer_that_is_no_object_is_an_error_and_no_traceback(node: FakeNode, body: bytes) -> None:
    node.on("GET", "/api/models", Reply(body=body))
    ran = ctl(node, "models")
    assert ran.code == 1
    assert ran.err.count("\n") <= 3 and "Traceback" not in ran.err
    node.on("GET", "/api/models", Reply(status=500, body=body))
    assert ctl(node, "models").code == 1


def test_a_refused_upload_says_why_although_the_pipe_broke(node: FakeNode) -> None:
    path = node.path.with_name("raw")
    body = json.dumps({"error": {"code": "too-large", "message": "cannot take so much"}}).encode()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()

        def serve() -> None:
            connection, _ = sock.accept()
            connection.recv(1000)
            head = b"HTTP/1.1 413 X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
            connection.sendall(head + body)
            connection.shutdown(socket.SHUT_RD)
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises((BadRequest, Unreachable)) as caught:
            Client(path).put_bytes("/api/blobs/x", bytes(8 << 20))
        thread.join()
    assert caught.value.code in {"too-large", "connection-lost"}


def test_a_name_is_one_segment_of_a_path() -> None:
    assert segment("a/../b c") == "a%2F..%2Fb%20c"
    assert segment("..") == "%2E%2E"
    assert segment("ü") == "%C3%BC"


def test_a_name_with_line_ends_cannot_split_the_request(node: FakeNode) -> None:
    node.on("DELETE", "/api/keys/a%0D%0AX-Evil%3A%201", answer({"key": {"name": "a"}}))
    assert ctl(node, "keys", "revoke", "a\r\nX-Evil: 1").code == 0
    assert "x-evil" not in node.asked[0].headers
