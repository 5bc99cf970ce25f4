"""The client looks where the daemon listens."""

import os
from pathlib import Path

import pytest

from mycoswarmd.ctl.place import engine_command, find_socket
from mycoswarmd.daemon.settings import Options, load_settings
from tests.unit.ctl.fakenode import ctl

HOMES = [
    {},
    {"XDG_RUNTIME_DIR": "/run/user/7"},
    {"XDG_STATE_HOME": "/srv/state"},
    {"XDG_RUNTIME_DIR": "/run/user/7", "XDG_STATE_HOME": "/srv/state"},
    {"XDG_RUNTIME_DIR": "", "XDG_STATE_HOME": ""},
]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("XDG_RUNTIME_DIR", "XDG_STATE_HOME", "MYCOSWARM_SOCKET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize("uid", [0, 1000])
@pytest.mark.parametrize("home", HOMES)
def test_the_default_is_the_daemons(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uid: int, home: dict[str, str]
) -> None:
    if uid:
        monkeypatch.setattr("mycoswarmd.ctl.place.SYSTEM_SOCKET", tmp_path / "system.sock")
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    for name, value in home.items():
        monkeypatch.setenv(name, value)
    nothing = Path("/nonexistent")
    assert find_socket(None, None) == load_settings(Options(policy=nothing)).socket_path


def test_a_state_directory_holds_its_socket(tmp_path: Path) -> None:
    assert find_socket(None, tmp_path) == load_settings(Options(state=tmp_path)).socket_path


def test_the_nearest_word_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MYCOSWARM_SOCKET", "/from/environment")
    assert find_socket(None, None) == Path("/from/environment")
    assert find_socket(None, tmp_path) == tmp_path / "run" / "api.sock"
    assert find_socket(Path("/named"), tmp_path) == Path("/named")


def test_who_runs_no_node_finds_the_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "user"))
    own, system = tmp_path / "user" / "mycoswarm" / "api.sock", tmp_path / "system.sock"
    monkeypatch.setattr("mycoswarmd.ctl.place.SYSTEM_SOCKET", system)
    assert find_socket(None, None) == own
    assert engine_command() == "mycoswarmctl engine install"
    unit = tmp_path / "mycoswarmd.service"
    monkeypatch.setattr("mycoswarmd.ctl.place.UNIT_FILES", (unit,))
    unit.touch()  # a service that was stopped is no reason to start another node beside it
    assert find_socket(None, None) == system
    assert engine_command() == "sudo mycoswarmctl engine install"
    monkeypatch.setattr("mycoswarmd.ctl.unixhttp.SYSTEM_SOCKET", system)
    ran = ctl(None, "tasks")
    assert (ran.code, ran.out) == (4, "") and "`sudo systemctl start mycoswarmd`" in ran.err
    ran = ctl(None, "engine", "install")
    assert ran.code == 1 and "hint: sudo mycoswarmctl engine install" in ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mycoswarmd.service"]
    unit.unlink()
    system.touch()
    assert find_socket(None, None) == system
    own.parent.mkdir(parents=True)
    own.touch()
    assert find_socket(None, None) == own
