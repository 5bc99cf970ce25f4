"""Settings: every key checked, every engine on this machine, nothing guessed."""

import functools
import os
from pathlib import Path

import pytest

from mycoswarmd.daemon.outside import make_cages
from mycoswarmd.daemon.policyfile import shipped_default
from mycoswarmd.daemon.serve import check
from mycoswarmd.daemon.settings import (
    ENGINE_DIR,
    OUTPOSTS,
    OUTPOSTS_DIR,
    CageKind,
    Options,
    Settings,
    check_local_url,
    load_settings,
    parse_listen,
)
from mycoswarmd.errors import ConfigError, PolicyInvalid
from mycoswarmd.sandbox.bwrap import BubblewrapCages
from mycoswarmd.sandbox.systemdcage import SystemdCages
from mycoswarmd.wire.proof import Unit

UNITS = Path(__file__).resolve().parents[3] / "systemd"


def load(tmp_path: Path, text: str = "") -> Settings:
    (tmp_path / "mycoswarm.toml").write_text(text)
    return load_settings(Options(state=tmp_path))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("living room", "living-room"),
        ("Küche (oben)", "Kuche-oben"),
        ("-pi", "pi"),
        ("x" * 65, "x" * 64),
        ("x" * 63 + " y", "x" * 63),
    ],
)
def test_a_name_that_was_good_until_now_is_turned_into_one_and_said(
    tmp_path: Path, text: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = load(tmp_path, f'node_name = "{text}"')
    assert settings.node_name == name
    assert len(settings.warnings) == 1
    for part in (str(tmp_path / "mycoswarm.toml"), "node_name", repr(text), repr(name), "accepted: 1 to 64"):
        assert part in settings.warnings[0]
    check(state=tmp_path, config=None, policy=None, listen=None)
    assert capsys.readouterr().err == f"mycoswarmd: {settings.warnings[0]}\n"
    assert load(tmp_path, f'node_name = "{name}"').warnings == ()


@pytest.mark.parametrize("name", ["", "---", "居間", "  "])
def test_a_node_is_not_called_what_is_no_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"mycoswarm\.toml: 'node_name' cannot be .*; accepted: 1 to 64"):
        load(tmp_path, f'node_name = "{name}"')
    with pytest.raises(ConfigError):
        check(state=tmp_path, config=None, policy=None, listen=None)
    load(tmp_path, f'node_name = "{"x" * 64}"')


@pytest.mark.parametrize(("host", "name"), [("pi.lan", "pi"), ("küche", "node"), ("", "node"), ("-", "node")])
def test_a_host_name_that_is_no_name_names_no_node(
    tmp_path: Path, host: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.node", lambda: host)
    assert load_settings(Options(state=tmp_path)).node_name == name


def test_everything_lies_under_the_given_state_directory(tmp_path: Path) -> None:
    settings = load_settings(Options(state=tmp_path))
    assert settings.socket_path == tmp_path / "run" / "api.sock"
    assert settings.policy_file == tmp_path / "policy.toml"
    assert settings.models_dir == tmp_path / "models"
    assert settings.listen == ("127.0.0.1", 7436)


def test_declared_engines_are_read(tmp_path: Path) -> None:
    text = '[engines.ollama]\nkind = "ollama"\nurl = "http://127.0.0.1:11434"\nconcurrency = 2\n'
    (tmp_path / "mycoswarm.toml").write_text(text)
    (engine,) = load_settings(Options(state=tmp_path)).engines
    assert (engine.name, engine.kind, engine.concurrency) == ("ollama", "ollama", 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense = 1", "'nonsense' is not a setting"),
        ("task_slots = 0", "must be from 1 to 64"),
        ("task_slots = true", "must be a int"),
        ('task_slots = "2"', "must be a int"),
        ('engine_idle = "soon"', "'soon'"),
        ("[engines.x]\nkind = 'magic'\nurl = 'http://127.0.0.1:1'", "engines.x"),
        ("[engines.x]\nkind = 'openai'\nurl = 'http://10.0.0.7:8000'", "only the policy declares"),
        ("[engines.x]\nkind = 'openai'\nurl = 'http://127.0.0.1:1'\ntls = true", "engines.x.tls"),
        ("a = [", "mycoswarm.toml"),
        ('listen = "0.0.0.0:7436"', "loopback"),
    ],
)
def test_bad_settings_are_refused_with_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert said in caught.value.message
    assert "mycoswarm.toml" in caught.value.message


def test_settings_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mycoswarm.toml").write_bytes(b'node_name = "\xff"')
    with pytest.raises(ConfigError, match="cannot use settings"):
        load_settings(Options(state=tmp_path))


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://[::1]:8000/v1", "unix:/run/llama.sock"])
def test_local_addresses_are_accepted(url: str) -> None:
    check_local_url(url, "file", "url")


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:8000",  # a name: what it stands for is somebody else's decision
        "http://127.0.0.1.example.com:80",
        "https://127.0.0.1:8000",
        "http://user@127.0.0.1:8000",
        "http://0x7f000001:80",
        "http://169.254.169.254/",
        "ftp://127.0.0.1/",
        "",
    ],
)
def test_addresses_elsewhere_are_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        check_local_url(url, "file", "url")


@pytest.mark.parametrize(
    "text", ["0.0.0.0:1", "192.168.1.2:7436", "localhost:7436", "127.0.0.1", "127.0.0.1:70000", ":7436"]
)
def test_only_loopback_is_listened_on(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_listen(text)


def test_none_is_no_listener() -> None:
    assert parse_listen("none") is None
    assert parse_listen("[::1]:7436") == ("::1", 7436)


def test_a_relative_state_directory_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings(Options(state=Path("here"), policy=Path("mine.toml")))
    assert settings.state_dir == tmp_path / "here"
    assert settings.policy_file == tmp_path / "mine.toml"


# --- the appliance ------------------------------------------------------------------------------------------


@pytest.fixture
def no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mycoswarmd.daemon.settings.CONFIG_DIR", tmp_path)


@pytest.mark.usefixtures("no_file")
def test_the_appliances_places_are_the_units_whoever_it_runs_as(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 987)
    monkeypatch.setenv("XDG_STATE_HOME", "/srv/elsewhere")
    settings = load_settings(Options(appliance=True))
    assert settings.state_dir == Path("/var/lib/mycoswarm")
    assert settings.socket_path == Path("/run/mycoswarm/api.sock")
    assert settings.models_dir == Path("/var/lib/mycoswarm-engine/models")
    assert settings.engine_dir == Path("/var/lib/mycoswarm-engine/engine")
    assert settings.engine_runtime_dir == Path("/run/mycoswarm-engine")
    assert settings.policy_file == tmp_path / "policy.toml"
    assert settings.outpost(Unit.LAN) == Path("/run/mycoswarm-outposts/lan.sock")
    assert settings.listen is None
    assert settings.cages is CageKind.SYSTEMD


def test_the_sockets_of_the_appliance_are_those_of_its_units() -> None:
    for unit in OUTPOSTS:
        path = UNITS / f"mycoswarm-{OUTPOSTS[unit]}et"
        assert f"={OUTPOSTS_DIR / OUTPOSTS[unit]}\n" in path.read_text(), path


@pytest.mark.usefixtures("no_file")
def test_programs_are_listened_for_only_when_somebody_says_so(tmp_path: Path) -> None:
    (tmp_path / "mycoswarm.toml").write_text('listen = "127.0.0.1:7436"\n')
    assert load_settings(Options(appliance=True)).listen == ("127.0.0.1", 7436)


def test_weaker_cages_are_the_operators_own_decision(tmp_path: Path) -> None:
    (tmp_path / "mycoswarm.toml").write_text('cages = "bubblewrap"\n')
    assert load_settings(Options(state=tmp_path, appliance=True)).cages is CageKind.BUBBLEWRAP
    assert isinstance(make_cages(load_settings(Options(state=tmp_path, appliance=True))), BubblewrapCages)
    (tmp_path / "mycoswarm.toml").unlink()
    assert isinstance(make_cages(load_settings(Options(state=tmp_path, appliance=True))), SystemdCages)


@pytest.mark.parametrize(
    ("text", "said"),
    [('cages = "docker"', "must be one of systemd, bubblewrap"), ('cages = "systemd"', "where systemd runs")],
)
def test_cages_that_cannot_be_are_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(tmp_path, text)


def test_check_describes_the_service_where_the_node_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unit, config = tmp_path / "mycoswarmd.service", tmp_path / "mycoswarm.toml"
    config.write_text("")
    monkeypatch.setattr("mycoswarmd.daemon.serve.UNIT_FILES", (unit,))

    def said(state: Path | None = None) -> str:
        nothing = tmp_path / "policy.toml"
        return check(state=state, config=config, policy=nothing if nothing.exists() else None, listen=None)

    assert "a process" in said() and "http://127.0.0.1:7436" in said()
    unit.touch()
    assert "a service" in said() and "unix socket only" in said()
    assert f"models   {ENGINE_DIR}/models" in said() and "cages    systemd" in said()
    assert "a process" in said(tmp_path)


@pytest.mark.parametrize("settings", ["nonsense = 1", "a line that is none", "task_slots = 0", "policy = 7"])
def test_what_is_wrong_with_the_settings_is_no_failure_of_a_reload(
    tmp_path: Path, settings: str, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_bytes(shipped_default())
    (tmp_path / "mycoswarm.toml").write_text(settings)
    given = functools.partial(check, state=tmp_path, config=None, policy=None, listen=None)
    given(policy_only=True)
    assert "cannot use settings" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        given()
    policy.write_text("schema = nonsense")
    with pytest.raises(PolicyInvalid, match=r"policy\.toml"):
        given(policy_only=True)


def test_a_reload_reads_the_policy_that_wrong_settings_name(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_bytes(shipped_default())
    elsewhere = tmp_path / "elsewhere.toml"
    (tmp_path / "mycoswarm.toml").write_text(f'policy = "{elsewhere}"\nnonsense = 1')
    with pytest.raises(PolicyInvalid, match=r"elsewhere\.toml"):
        check(state=tmp_path, config=None, policy=None, listen=None, policy_only=True)
