import json
from typing import Any

import pytest

from mycoswarmd import __version__
from mycoswarmd.errors import Unreachable
from tests.unit.ctl.fakenode import Asked, FakeNode, Reply, answer, ctl, refuse
from tests.unit.ctl.swarm_data import HERE, LAPTOP, PERSON, PI, THERE, WORD, row, swarm

STATUS: dict[str, Any] = {
    "node": "box\x1b[2J",
    "version": "9.9",
    "state": "yellow",
    "problems": ["engine local is down: no model"],
    "uptime_s": 3700,
    "pid": 42,
    "policy": {
        "name": "home",
        "sha256": "ab" * 32,
        "path": "/etc/mycoswarm/policy.toml",
        "loaded_at_ms": 1,
        "problem": "",
        "rules": 3,
        "invariants_proved": 1,
    },
    "engines": [
        {
            "name": "local",
            "kind": "managed",
            "state": "down",
            "detail": "no model",
            "models": 0,
            "running": 0,
            "waiting": 0,
            "pid": None,
            "restarts": 2,
        }
    ],
    "tasks": {"queued": 2, "running": 1, "waiting": 0},
    "receipts": {"count": 17, "head": "17-89abcdef"},
    "sandbox": {
        "level": "reduced",
        "facts": [{"name": "landlock", "ok": False, "detail": "no kernel support", "hint": "a newer kernel"}],
    },
    "listeners": ["unix:/run/x"],
    "host": {
        "hostname": "box",
        "cpus": 4,
        "memory_bytes": 8 << 30,
        "own_memory_bytes": 60 << 20,
        "gpus": [{"name": "Big GPU", "memory_bytes": 24 << 30}],
        "tier": "gpu",
    },
}
MODELS = {
    "models": [
        {
            "name": "small",
            "engine": "local",
            "zone": "self",
            "dest": None,
            "context_tokens": 4096,
            "kinds": ["chat", "text"],
            "native_tools": False,
            "loaded": True,
            "size_bytes": 98 << 20,
        },
        {
            "name": "big\x1b:cloud",
            "engine": "ollama",
            "zone": "cloud",
            "dest": "bigcloud",
            "context_tokens": None,
            "kinds": ["chat"],
            "native_tools": True,
            "loaded": False,
            "size_bytes": None,
        },
    ]
}


def test_status_shows_what_is_wrong_and_what_is_running(node: FakeNode) -> None:
    node.on("GET", "/api/status", answer(STATUS))
    ran = ctl(node, "status")
    assert ran.code == 0
    for words in (
        "yellow",
        "engine local is down",
        "1h 1m",
        "home",
        "3 rules",
        "2 queued",
        "17-89abcdef",
        "reduced",
        "unix:/run/x",
        "Big GPU",
        "24.0 GiB",
    ):
        assert words in ran.out, words
    assert "\x1b" not in ran.out
    assert ctl(node, "status", "--json").json == STATUS


def test_an_engine_without_a_model_is_not_called_ready(node: FakeNode) -> None:
    engine = {**STATUS["engines"][0], "state": "ready", "detail": "no model in /models: install one"}
    broken = {**STATUS["policy"], "problem": "line 3 is wrong"}
    node.on("GET", "/api/status", answer({**STATUS, "engines": [engine], "policy": broken}))
    shown = ctl(node, "status").out
    assert "\nengine    local: no model\n          no model in /models: install one\n" in shown, shown
    assert "line 3" not in shown  # it is among the problems, and said there
    node.on("GET", "/api/status", answer({**STATUS, "engines": [{**engine, "models": 2, "running": 1}]}))
    assert "local: ready, 2 models, 1 running\n" in ctl(node, "status").out


def test_status_shows_what_the_kernel_enforces_when_asked(node: FakeNode) -> None:
    node.on("GET", "/api/status", answer(STATUS))
    assert "a newer kernel" not in ctl(node, "status").out
    assert "a newer kernel" in ctl(node, "status", "--security").out


SECURITY = {
    "appliance": True,
    "proofs": [
        {
            "unit": "lan",
            "checks": [
                {"name": "canary", "ok": False, "detail": "a packet went to 127.0.0.2"},
                {"name": "memory", "ok": None, "detail": "absent"},
            ],
        }
    ],
    "unheard": [{"unit": "engine", "problem": "has not run yet"}],
    "cages": {"by": "systemd", "level": "full", "held": ["a", "b"], "absent": [], "problem": ""},
}


def test_status_shows_what_units_have_proved(node: FakeNode) -> None:
    node.on("GET", "/api/status", answer(STATUS))
    node.on("GET", "/v1/security", answer(SECURITY))
    said = [" ".join(row.split()) for row in ctl(node, "status", "--security").out.splitlines()]
    assert "lan canary NO a packet went to 127.0.0.2" in said
    assert "lan memory unknown absent" in said
    assert "engine ? has not run yet" in said
    assert "task cages by systemd yes full, 2 probes held" in said
    assert ctl(node, "status", "--security", "--json").json == STATUS | {"security": SECURITY}


def test_status_of_an_empty_answer_is_no_traceback(node: FakeNode) -> None:
    node.on("GET", "/api/status", answer({}))
    assert ctl(node, "status").code == 0


def test_status_is_watched_across_a_restart_of_the_node(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mycoswarmd.ctl.node._EVERY_S", 0.001)
    gone, over = Reply(body=b"{", cut=True), refuse(500, "internal-error")
    node.on("GET", "/api/status", [answer(STATUS), gone, answer(STATUS), over])
    ran = ctl(node, "status", "--watch", "--json")
    assert ran.code == 1
    assert [row.get("state") for row in ran.lines] == ["yellow", "yellow", None]
    assert ran.lines[-1]["error"]["code"] == "internal-error"


def test_status_is_not_watched_where_there_is_no_node(node: FakeNode) -> None:
    node.on("GET", "/api/status", Reply(body=b"{", cut=True))
    assert ctl(node, "status", "--watch").code == 4


SUMMARY = {"name": "home", "id": "5" * 64, "nodes": 3, "reachable": 1, "roster_age_s": 60, "digest": "d1"}


def in_swarm(node: FakeNode, *members: dict[str, Any], **fields: object) -> FakeNode:
    node.on("GET", "/api/status", answer({**STATUS, "swarm": {**SUMMARY, **fields}}))
    return node.on("GET", "/api/swarm", answer(swarm(*members)))


def test_status_has_each_nodes_own_word_beside_what_was_verified(node: FakeNode) -> None:
    told = row(PI, "kitchen-pi", word=WORD, verified={"key": True, "digest_same": False, "models": 1})
    ran = ctl(in_swarm(node, HERE, told, row(LAPTOP, "den-pc", **GONE_QUIET), PERSON), "status")
    assert ran.code == 0
    head, titles, here, pi, den = ran.out.splitlines()[-5:]
    assert "home" in head and "1 of 3 nodes reached" in head and "confirmed 1m ago" in head
    assert titles.split()[:2] == ["NODE", "SAYS"]
    assert here.startswith("study-pc *") and here.endswith("this node")
    assert pi.split()[:7] == ["kitchen-pi", "yellow", "light", "full", "1", "(1", "loaded)"]
    assert "1 +2" in pi and pi.endswith("its key, 0.8 ms, another roster")
    assert "unreachable: connection refused, last seen 2h ago" in den and "ALARM: cloned" in den
    assert "anna" not in ran.out


def test_the_head_of_status_has_the_name_that_the_swarm_gave(node: FakeNode) -> None:
    def head(name: str) -> str:
        return ctl(in_swarm(node, {**HERE, "name": name}), "status").out.splitlines()[0]

    own = "box\\x1b[2J"
    assert f"kitchen-pi ({own} in its settings) 9.9" in head("kitchen-pi")
    assert f"{own} 9.9" in head(STATUS["node"]) and "settings" not in head(STATUS["node"])


GONE_QUIET: dict[str, Any] = {
    "state": "unreachable",
    "detail": "connection refused",
    "last_seen_s": 7200,
    "alarm": "cloned",
}


def test_status_as_json_has_the_members_and_what_is_wrong_with_the_roster(node: FakeNode) -> None:
    found = ctl(in_swarm(node, HERE, THERE), "status", "--json").json["swarm"]
    assert {key: found[key] for key in SUMMARY} == SUMMARY
    assert found["members"] == [HERE, THERE]
    assert found["revoked"] and found["problems"] == []
    node.on("GET", "/api/swarm", answer({**swarm(), "swarm": {"problems": ["two are called pi"]}}))
    assert "! two are called pi" in ctl(node, "status").out


def test_status_is_there_for_who_may_not_see_the_members(node: FakeNode) -> None:
    in_swarm(node, roster_age_s=None).on(
        "GET", "/api/swarm", refuse(403, "default-deny", rule="default-deny")
    )
    ran = ctl(node, "status")
    assert ran.code == 0
    assert "1 of 3 nodes reached" in ran.out and "not confirmed" in ran.out and "VERIFIED" not in ran.out


def test_status_does_not_say_verified_of_what_was_not(node: FakeNode) -> None:
    unproved = row(PI, "kitchen-pi", verified={"key": False}, rtt_ms=None)
    assert "NOT its key" in ctl(in_swarm(node, HERE, unproved), "status").out
    assert "unknown" in ctl(in_swarm(node, HERE, {"id": PI}), "status").out


def test_models_say_where_a_prompt_would_go(node: FakeNode) -> None:
    node.on("GET", "/api/models", answer(MODELS))
    ran = ctl(node, "models")
    assert ran.code == 0
    _, small, big = ran.out.splitlines()
    assert small.split()[:4] == ["small", "self", "local", "4096"]
    assert "98.0 MiB" in small
    assert big.split()[:3] == ["big\\x1b:cloud", "cloud", "bigcloud"]
    assert ctl(node, "models", "--json").json == MODELS
    node.on("GET", "/api/models", answer({"models": []}))
    assert "engine install" in ctl(node, "models").err


def test_version_works_with_and_without_a_node(node: FakeNode) -> None:
    node.on("GET", "/api/status", answer(STATUS))
    ran = ctl(node, "version")
    assert __version__ in ran.out and "9.9" in ran.out
    assert ctl(node, "version", "--json").json == {"mycoswarmctl": __version__, "mycoswarmd": "9.9"}
    alone = ctl(None, "--socket", str(node.path.with_name("none")), "version")
    assert (alone.code, __version__ in alone.out, alone.err) == (0, True, "")


def test_version_says_that_a_node_was_not_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise Unreachable("node-unreachable", "cannot reach 10.0.0.9:7437: no answer in time")

    monkeypatch.setattr("mycoswarmd.ctl.tlshttp.open_remote", gone)
    ran = ctl(None, "--node", "10.0.0.9", "version")
    assert ran.code == 0 and __version__ in ran.out
    assert "cannot reach 10.0.0.9:7437" in ran.err


def test_the_socket_is_found_by_option_then_directory_then_environment(node: FakeNode) -> None:
    node.on("GET", "/api/models", answer(MODELS))
    state = node.path.with_name("state")
    (state / "run").mkdir(parents=True)
    (state / "run" / "api.sock").symlink_to(node.path)
    env = {"MYCOSWARM_SOCKET": str(node.path)}
    assert ctl(None, "--state", str(state), "models", env={"MYCOSWARM_SOCKET": "/nowhere"}).code == 0
    assert ctl(None, "models", env=env).code == 0
    assert ctl(None, "--socket", "/nowhere", "models", env=env).code == 4


# --- keys ------------------------------------------------------------------------------------

KEY = {
    "id": "k-00112233",
    "name": "editor",
    "created_at_ms": 1_790_000_000_000,
    "last_used_at_ms": None,
    "revoked_at_ms": None,
}


def test_a_new_keys_secret_alone_is_on_stdout(node: FakeNode) -> None:
    node.on("POST", "/api/keys", answer({"key": KEY, "secret": "mk-abc"}, 201))
    ran = ctl(node, "keys", "create", "editor")
    assert (ran.code, ran.out) == (0, "mk-abc\n")
    assert "nothing listens" not in ran.err
    node.on("GET", "/api/status", answer({**STATUS, "listeners": ["unix:/run/mycoswarm/api.sock"]}))
    ran = ctl(node, "keys", "create", "editor")
    assert ran.out == "mk-abc\n" and 'listen = "127.0.0.1:7436"' in ran.err
    node.on("GET", "/api/status", answer({**STATUS, "listeners": ["http://127.0.0.1:7436"]}))
    assert "nothing listens" not in ctl(node, "keys", "create", "editor").err
    assert "once" in ran.err
    assert json.loads(next(one.body for one in node.asked if one.method == "POST")) == {"name": "editor"}
    assert ctl(node, "keys", "create", "editor", "--json").json == {"key": KEY, "secret": "mk-abc"}
    node.on("POST", "/api/keys", refuse(409, "key-exists", "cannot make this key: there is one"))
    assert ctl(node, "keys", "create", "editor").code == 1


def test_keys_are_listed_and_revoked(node: FakeNode) -> None:
    node.on("GET", "/api/keys", answer({"keys": [KEY]}))
    assert "editor" in ctl(node, "keys", "list").out
    assert ctl(node, "keys", "list", "--json").json == {"keys": [KEY]}
    node.on("DELETE", "/api/keys/editor", answer({"key": KEY}))
    assert ctl(node, "keys", "revoke", "editor").code == 0
    assert ctl(node, "keys", "revoke", "editor", "--json").json == {"key": KEY}
    assert ctl(node, "keys", "revoke", "other").code == 1


# --- audit -----------------------------------------------------------------------------------


def receipt(seq: int, **body: object) -> dict[str, Any]:
    return {
        "seq": seq,
        "id": f"{seq}-0123abcd",
        "at_ms": 1_790_000_000_000 + seq,
        "kind": "decision",
        "body": body,
        "prev_sha256": "00" * 32,
        "sha256": "11" * 32,
    }


ROWS = [
    receipt(1, decision="allow", rule="r1", model="a\x1bb"),
    receipt(2, decision="deny", rule="default-deny", tainted=True),
]


def test_the_newest_receipts_are_shown(node: FakeNode) -> None:
    node.on("GET", "/api/receipts", answer({"receipts": ROWS}))
    ran = ctl(node, "audit", "tail", "-n", "2")
    assert ran.code == 0
    first, second = ran.out.splitlines()
    assert "1-0123abcd" in first and "decision=allow" in first and "model=a\\x1bb" in first
    assert "default-deny" in second
    assert node.asked[-1].path == "/api/receipts?last=2"
    assert ctl(node, "audit", "tail", "--json").lines == ROWS


def test_receipts_are_followed_from_the_last_one_seen(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mycoswarmd.ctl.audit._EVERY_S", 0.001)

    def pages(asked: Asked) -> Reply:
        if "last=" in asked.path:
            return answer({"receipts": ROWS[:1]})
        if "after=1&" in asked.path:
            return answer({"receipts": ROWS[1:]})
        return refuse(503, "receipts-unwritable")

    node.on("GET", "/api/receipts", pages)
    ran = ctl(node, "audit", "tail", "-f", "--json")
    assert ran.code == 1
    assert [row.get("seq") for row in ran.lines] == [1, 2, None]
    assert "after=2&" in node.asked[-1].path


def test_one_receipt_is_shown_whole(node: FakeNode) -> None:
    node.on("GET", "/api/receipts/1-0123abcd", answer(ROWS[0]))
    ran = ctl(node, "audit", "show", "1-0123abcd")
    assert ran.code == 0
    assert "11" * 32 in ran.out and "r1" in ran.out and "a\\x1bb" in ran.out
    assert ctl(node, "audit", "show", "1-0123abcd", "--json").json == ROWS[0]
    assert ctl(node, "audit", "show", "99").code == 1


def test_a_good_chain_exits_0_and_a_broken_one_1(node: FakeNode) -> None:
    good = {"ok": True, "count": 17, "bad_seq": None, "reason": ""}
    node.on("POST", "/api/receipts/verify", answer(good))
    ran = ctl(node, "audit", "verify")
    assert (ran.code, "17" in ran.out) == (0, True)
    assert ctl(node, "audit", "verify", "--json").json == good
    bad = {"ok": False, "count": 17, "bad_seq": 5, "reason": "the record was changed"}
    node.on("POST", "/api/receipts/verify", answer(bad))
    ran = ctl(node, "audit", "verify", "--head", "17-89abcdef")
    assert ran.code == 1
    assert "5" in ran.out and "changed" in ran.out
    assert json.loads(node.asked[-1].body) == {"head": "17-89abcdef"}
    machine = ctl(node, "audit", "verify", "--json")
    assert (machine.code, machine.json) == (1, bad)


def test_an_answer_that_does_not_say_ok_is_not_ok(node: FakeNode) -> None:
    node.on("POST", "/api/receipts/verify", answer({"ok": "yes"}))
    assert ctl(node, "audit", "verify").code == 1


def test_the_head_is_one_line_to_keep(node: FakeNode) -> None:
    head = {"seq": 17, "id": "17-89abcdef", "sha256": "22" * 32, "count": 17}
    node.on("GET", "/api/receipts/head", answer(head))
    assert ctl(node, "audit", "head").out == f"17-89abcdef {'22' * 32}\n"
    assert ctl(node, "audit", "head", "--json").json == head
