"""The unit files, their table in systemd/README.md, and what the package promises beside them."""

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from mycoswarmd import __version__
from mycoswarmd.ctl.service import service_files
from mycoswarmd.daemon.journal import EVENTS
from mycoswarmd.daemon.settings import TABLE, Options, load_settings

ROOT = Path(__file__).parents[3]
UNITS, PACKAGING = ROOT / "systemd", ROOT / "packaging"
SERVICES = {
    "core": "mycoswarmd.service",
    "lan": "mycoswarm-lan.service",
    **{name: f"mycoswarm-{name}@.service" for name in ("discovery", "engine", "probe", "signer", "task")},
}
SOCKETS = {
    "core": "mycoswarmd.socket",
    **{name: f"mycoswarm-{name}.socket" for name in SERVICES if name != "core"},
}
MOUNTS = {"engine": "engine.mount"}
EXPOSURE = {"core": 0.5, "task": 0.3}
_OTHERS_EXPOSURE = 1.2


def directives(file: str, folder: Path = UNITS) -> list[str]:
    lines = [line.strip() for line in (folder / file).read_text().splitlines()]
    return [line for line in lines if "=" in line and not line.startswith("#")]


def rows(heading: str, *, units: list[str]) -> Iterator[tuple[str, set[str]]]:
    """Yield each row of a table: the directive, with its value where that is the point, and whose it is."""
    part = (UNITS / "README.md").read_text().split(f"### {heading}\n")[1].split("\n#")[0]
    for line in part.splitlines():
        if not line.startswith("| `"):
            continue
        key, who, why, by = (cell.strip() for cell in line.strip("|").split(" | "))
        assert why and by, line
        yield key.strip("`"), set(units if who == "all" else who.split())


def disagreements(files: dict[str, str], heading: str, folder: Path = UNITS) -> set[str]:
    table = list(rows(heading, units=list(files)))
    assert len({key for key, _ in table}) == len(table)
    found = set()
    for unit, file in files.items():
        listed = {key for key, who in table if unit in who}
        used = set()
        for line in directives(file, folder):
            name = line.partition("=")[0] + "="
            # `CapabilityBoundingSet=` is the whole of it; `User=` stands for any value.
            keys = {line, name} & listed
            used |= keys
            if len(keys) != 1:
                found.add(f"{unit}: {line}: {len(keys)} rows")
        found |= {f"{unit}: {key}: not in the unit" for key in listed - used}
    return found


def test_the_table_has_a_row_for_every_directive_and_no_other() -> None:
    assert disagreements(SERVICES, "Services") == set()
    assert disagreements(SOCKETS, "Sockets") == set()
    assert disagreements(MOUNTS, "Mounts") == set()
    on_disk = {path.name for kind in ("service", "socket", "mount") for path in UNITS.glob(f"*.{kind}")}
    assert on_disk == {*SERVICES.values(), *SOCKETS.values(), *MOUNTS.values()}


@pytest.mark.parametrize("unit", SERVICES)
def test_a_directive_that_goes_or_weakens_is_noticed(tmp_path: Path, unit: str) -> None:
    for file in SERVICES.values():
        shutil.copy(UNITS / file, tmp_path)
    path = tmp_path / SERVICES[unit]
    text = path.read_text()
    for line in directives(SERVICES[unit]):
        path.write_text(text.replace(f"\n{line}\n", "\n", 1))
        assert disagreements(SERVICES, "Services", tmp_path), f"{line} can go"
    for change in (("NoNewPrivileges=yes", "NoNewPrivileges=no"), ("IPAddressDeny=any", "IPAddressDeny=")):
        path.write_text(text.replace(*change))
        assert disagreements(SERVICES, "Services", tmp_path), change


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("unit", SERVICES)
def test_how_exposed_a_unit_is(tmp_path: Path, unit: str) -> None:
    def exposure(path: Path) -> float:
        command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(path)]
        said = subprocess.run(command, capture_output=True, text=True).stdout
        found = re.search(r"exposure level for \S+: ([0-9.]+)", said)
        assert found is not None, said
        return float(found[1])

    bound = EXPOSURE.get(unit, _OTHERS_EXPOSURE)
    assert exposure(UNITS / SERVICES[unit]) <= bound
    weaker = tmp_path / SERVICES[unit]
    hardening = re.compile(r"(?m)^(Capability|Protect|Restrict|SystemCall|IPAddress|Private).*\n")
    weaker.write_text(hardening.sub("", (UNITS / SERVICES[unit]).read_text()))
    assert exposure(weaker) > bound


def test_only_the_units_with_a_network_have_one() -> None:
    for unit, file in SERVICES.items():
        lines = directives(file)
        assert "IPAddressDeny=any" in lines
        has_inet = any(line.startswith("RestrictAddressFamilies=AF_INET") for line in lines)
        assert has_inet is (unit in {"lan", "discovery"})
        assert ("PrivateNetwork=yes" in lines) is not has_inet
        allowed = [line for line in lines if line.startswith("IPAddressAllow=")]
        assert bool(allowed) is has_inet
        for line in allowed:
            assert ("127.0.0.1/32" in line) is (unit == "lan")
            assert not re.search(
                r"127\.0\.0\.0|\blocalhost|169\.254|link-local|\bany\b|[= ]0\.0\.0\.0|[= ]::/0", line
            )


def test_every_program_and_every_user_of_a_unit_exists() -> None:
    programs = {path.name for path in (PACKAGING / "launchers/libexec").iterdir()}
    users = set(re.findall(r"(?m)^u (\S+)", (UNITS / "sysusers.conf").read_text()))
    seen: set[str] = set()
    for unit, file in SERVICES.items():
        text = (UNITS / file).read_text()
        found = re.search(r"(?m)^User=(\S+)$", text)
        if unit in {"engine", "task"}:  # one for each instance
            assert "DynamicUser=yes" in text and found is not None and found[1].endswith("-%i"), unit
        else:
            assert found is not None and found[1] in users - seen, unit
            seen.add(found[1])
        for name in re.findall(r"(?m)^ExecStart=/usr/libexec/mycoswarm/(\S+)", text):
            assert name in programs
    assert seen == users
    for path in (PACKAGING / "launchers").glob("*/*"):
        assert path.read_text().startswith("#!/usr/bin/python3 -I\n") and path.stat().st_mode & 0o111


def test_only_the_core_may_connect_to_the_outposts() -> None:
    for unit, file in SOCKETS.items():
        lines = directives(file)
        if unit == "core":
            assert "ListenStream=/run/mycoswarm/api.sock" in lines and "FileDescriptorName=api" in lines
            assert "SocketMode=0666" in lines
        else:
            assert {"SocketMode=0600", "SocketUser=_mycoswarm"} <= set(lines)
            assert any(
                re.fullmatch(rf"Listen\w+=/run/mycoswarm-outposts/{unit}\.sock", line) for line in lines
            )


def test_the_catalog_explains_every_event_and_no_other() -> None:
    text = (UNITS / "mycoswarm.catalog").read_text()
    assert sorted(re.findall(r"(?m)^-- ([0-9a-f]{32})$", text)) == sorted(EVENTS.values())
    for entry in text.split("\n-- ")[1:]:
        assert re.match(
            r"[0-9a-f]{32}\nSubject: .+\nDefined-By: mycoswarmd\nDocumentation: .+\n\n\S", entry
        ), entry


def test_the_settings_of_the_package_are_the_defaults_and_all_of_them(tmp_path: Path) -> None:
    shipped = PACKAGING / "mycoswarm.toml"
    text = shipped.read_text()
    assert tomllib.loads(text) == {}
    named = set(re.findall(r"(?m)^# (?:\[)?(\w+)(?: =|\.)", text))
    places = {"state_dir", "runtime_dir", "policy", "models_dir", "cages"}  # the units say these
    assert named == {key.name for key in TABLE} - places | {"kind", "url"}
    told = tmp_path / "mycoswarm.toml"
    told.write_text(re.sub(r"(?m)^# (\w+ = |\[engines)", r"\1", text))
    given = load_settings(Options(state=tmp_path, config=told, appliance=True))
    default = load_settings(Options(state=tmp_path, config=shipped, appliance=True))
    assert [engine.url for engine in given.engines] == ["http://127.0.0.1:11434"]
    for key in named - {"node_name", "kind", "url", "engines"}:
        name = {"engine_idle": "engine_idle_s", "approval_time": "approval_s"}.get(key, key)
        assert getattr(given, name) == getattr(default, name), key


def test_the_package_asks_for_what_the_project_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    control = (PACKAGING / "debian/control").read_text()
    depends = dict(re.findall(r"(?m)^ python3-([\w-]+) \(>= ([\w.]+)\),$", control))
    wanted = dict(line.split(">=") for line in project["dependencies"])
    assert depends == wanted
    first = (PACKAGING / "debian/changelog").read_text().partition("\n")[0]
    assert first.startswith(f"mycoswarm ({__version__}) ")


def test_pip_and_package_install_the_same_units(tmp_path: Path) -> None:
    share = tmp_path / "share"
    shutil.copytree(UNITS, share / "systemd")
    shutil.copytree(PACKAGING / "launchers", share / "launchers")
    shutil.copytree(ROOT / "policy", share / "policy")
    shutil.copy(PACKAGING / "mycoswarm.toml", share)
    placed = {file.path: file for file in service_files(share)}
    for name in (*SERVICES.values(), *SOCKETS.values()):
        text = placed[f"etc/systemd/system/{name}"].text
        assert "/usr/libexec" not in text and "/usr/sbin" not in text
        back = text.replace("/opt/mycoswarm/libexec/", "/usr/libexec/mycoswarm/")
        assert (
            back.replace("/opt/mycoswarm/sbin/mycoswarmd", "/usr/sbin/mycoswarmd")
            == (UNITS / name).read_text()
        )
    mount = placed["etc/systemd/system/run-mycoswarm\\x2dengine.mount"]
    assert mount.text == (UNITS / MOUNTS["engine"]).read_text()
    assert (
        "'$(ROOT)/lib/systemd/system/run-mycoswarm\\x2dengine.mount'"
        in (PACKAGING / "debian/rules").read_text()
    )
    launched = placed["opt/mycoswarm/libexec/lan"]
    assert launched.text.startswith("#!/opt/mycoswarm/venv/bin/python -I\n") and launched.mode == 0o755
    assert placed["etc/mycoswarm/policy.toml"].text == (ROOT / "policy/default.toml").read_text()
