"""What the client makes of what systemd says, by the words of a systemctl that a test writes."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from mycoswarmd.ctl import unitstate
from mycoswarmd.errors import Unreachable

Says = Callable[..., None]
ERROR = "cannot use settings in /etc/mycoswarm/mycoswarm.toml: 'x' is not a setting (config-invalid)"
NOW_S = 100_000.0
IN_BETWEEN = {"ActiveState": "activating", "SubState": "auto-restart"}


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Says:
    """Put the service in a state; how long ago it was active last is `gone_s`, None for never."""
    monkeypatch.setattr(unitstate, "time", SimpleNamespace(monotonic=lambda: NOW_S))
    monkeypatch.setattr(unitstate, "_ANSWER_S", 60)

    def write(gone_s: float | None = None, **state: str) -> None:
        active_us = 0 if gone_s is None else int((NOW_S - gone_s) * 1e6)
        state = {"LoadState": "loaded", "ActiveExitTimestampMonotonic": str(active_us)} | state
        lines = "\n".join(f"{name}={value}" for name, value in state.items())
        for program, said in (("systemctl", lines), ("journalctl", "the end of the log")):
            path = tmp_path / program
            path.write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\n")
            path.chmod(0o755)
            monkeypatch.setattr(unitstate, f"_{program.upper()}", str(path))

    return write


def test_a_node_that_cannot_start_is_named_at_once_by_its_own_words(says: Says) -> None:
    says(1, **IN_BETWEEN, Result="exit-code", StatusText=ERROR, NRestarts="0")
    with pytest.raises(Unreachable, match="does not start: cannot use settings"):
        unitstate.may_answer_yet()


def test_one_that_ended_before_it_said_anything_is_named_by_its_log(says: Says) -> None:
    says(1, **IN_BETWEEN, Result="exit-code", StatusText="", NRestarts="0")
    with pytest.raises(Unreachable, match="does not start: the end of the log"):
        unitstate.may_answer_yet()


@pytest.mark.parametrize("result", ["signal", "exit-code", "watchdog", "oom-kill", "core-dump"])
def test_one_that_ran_until_now_comes_back_however_often_it_was_restarted(says: Says, result: str) -> None:
    says(1, **IN_BETWEEN, Result=result, StatusText="in its swarm", NRestarts="17")
    assert unitstate.may_answer_yet()
    says(1, ActiveState="active", SubState="running", Result="success", NRestarts="17")
    assert not unitstate.may_answer_yet()


def test_one_that_is_killed_at_each_start_is_named_and_not_by_what_it_said_when_it_ran(says: Says) -> None:
    for gone_s in (60, None):
        says(
            gone_s,
            **IN_BETWEEN,
            Result="signal",
            ExecMainStatus="9",
            StatusText="in its swarm",
            NRestarts="3",
        )
        with pytest.raises(Unreachable) as caught:
            unitstate.may_answer_yet()
        assert caught.value.message.endswith("does not start: it ended (signal, status 9)")
    says(60, **IN_BETWEEN, Result="signal", ExecMainStatus="9", NRestarts="2")
    assert unitstate.may_answer_yet()


def test_a_service_that_does_not_listen_is_stopped_masked_failing_or_none(says: Says) -> None:
    said = {}
    for word, state in {
        "stopped": {"ActiveState": "inactive", "SubState": "dead"},
        "masked": {"LoadState": "masked"},
        "failing": {"ActiveState": "failed", "Result": "exit-code", "StatusText": ERROR},
    }.items():
        says(60, **state)
        found = unitstate.stopped()
        assert found is not None
        said[word] = found.message.removeprefix("cannot reach the node: its service ")
    assert said == {"stopped": "is stopped", "masked": "is masked", "failing": f"does not start: {ERROR}"}
    says(LoadState="not-found")
    assert unitstate.stopped() is None
