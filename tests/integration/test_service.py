"""`mycoswarmctl service`: the appliance from a wheel, on a disk of its own and as systemd would find it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_PIP_S = 240

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root installs services"),
]


def ctl(site: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run the command of the package that lies in `site`, as pipx would have put it there."""
    start = "import sys; sys.path.insert(0, sys.argv.pop(1)); from mycoswarmd.ctl.main import main; main()"
    command = [sys.executable, "-c", start, str(site), "service", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=_PIP_S)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the package as the wheel has it, with its share directory."""
    site = tmp_path_factory.mktemp("site")
    package = site / "mycoswarmd"
    shutil.copytree(ROOT / "mycoswarmd", package, ignore=shutil.ignore_patterns("__pycache__"))
    share = package / "share"
    for origin, name in ((ROOT / "policy", "policy"), (ROOT / "systemd", "systemd")):
        shutil.copytree(origin, share / name)
    shutil.copytree(ROOT / "packaging/launchers", share / "launchers")
    shutil.copy(ROOT / "packaging/mycoswarm.toml", share)
    return site


@pytest.fixture
def disk(tmp_path: Path, site: Path) -> Path:
    """Return a system's disk on which the environment is made already: pip needs a network and a minute."""
    home = tmp_path / "disk/opt/mycoswarm/venv/bin"
    home.mkdir(parents=True)
    python = home / "python"
    # What pip would do is written down, all else is done.
    python.write_text(
        f'#!/bin/sh\nif [ "$3" = pip ]; then echo "$@" >>{tmp_path}/pip; exit 0; fi\n'
        f'shift; exec env PYTHONPATH={site} {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    return tmp_path / "disk"


def files(disk: Path) -> set[str]:
    return {str(path.relative_to(disk)) for path in disk.rglob("*") if not path.is_dir()}


def test_it_is_installed_compared_and_taken_away(site: Path, disk: Path, tmp_path: Path) -> None:
    root = ("--root", str(disk))
    done = ctl(site, "install", *root, "--from", "some.whl")
    assert done.returncode == 0, done
    assert "mycoswarmctl init" in done.stderr
    assert (tmp_path / "pip").read_text().endswith(" some.whl\n")
    units = {path.name for path in (ROOT / "systemd").iterdir() if path.suffix in {".service", ".socket"}}
    assert units == {path.name for path in (disk / "etc/systemd/system").iterdir()}
    agent = disk / "opt/mycoswarm/libexec/task"
    assert agent.read_bytes().startswith(b"PK") and agent.stat().st_mode & 0o777 == 0o644
    for path in disk.rglob("*"):
        if not path.is_symlink():
            assert path.stat().st_uid == 0 and not path.stat().st_mode & 0o022, path
    assert ctl(site, "diff", *root).returncode == 0

    unit = disk / "etc/systemd/system/mycoswarm-lan.service"
    unit.write_text(unit.read_text().replace("IPAddressDeny=any\n", ""))
    dropin = disk / "etc/systemd/system/mycoswarmd.service.d/mine.conf"
    dropin.parent.mkdir()
    dropin.write_text("[Service]\nPrivateNetwork=no\n")
    policy = disk / "etc/mycoswarm/policy.toml"
    policy.write_text("# the operator's\n")
    shown = ctl(site, "diff", *root)
    assert (
        shown.returncode == 1 and "-IPAddressDeny=any" in shown.stdout and "PrivateNetwork=no" in shown.stdout
    )
    listed = json.loads(ctl(site, "diff", *root, "--json").stdout)
    paths = [one["path"] for one in listed["differences"]]
    assert paths == [f"/{unit.relative_to(disk)}", f"/{dropin.relative_to(disk)}"]

    assert ctl(site, "install", *root).returncode == 0
    assert "IPAddressDeny=any\n" in unit.read_text() and policy.read_text() == "# the operator's\n"
    assert "mycoswarmd==" in (tmp_path / "pip").read_text().splitlines()[-1]
    done = ctl(site, "uninstall", *root)
    assert done.returncode == 0, done
    kept = {"etc/mycoswarm/policy.toml", "etc/mycoswarm/mycoswarm.toml", str(dropin.relative_to(disk))}
    assert files(disk) == kept
    again = ctl(site, "uninstall", *root, "--json")
    assert json.loads(again.stdout)["error"]["code"] == "not-installed" and again.returncode == 1


def test_it_refuses_beside_the_package(site: Path, disk: Path) -> None:
    unit = disk / "usr/lib/systemd/system/mycoswarmd.service"
    unit.parent.mkdir(parents=True)
    before = files(disk)
    unit.touch()
    for command in ("install", "diff"):
        done = ctl(site, command, "--root", str(disk), "--json")
        assert json.loads(done.stdout)["error"]["code"] == "packaged", done
    assert files(disk) == before | {str(unit.relative_to(disk))}
    unit.unlink()
    assert ctl(site, "install", "--root", str(disk)).returncode == 0


def test_it_says_what_went_wrong_with_pip(site: Path, disk: Path) -> None:
    python = disk / "opt/mycoswarm/venv/bin/python"
    python.write_text("#!/bin/sh\necho ERROR: no such thing >&2\nexit 1\n")
    done = ctl(site, "install", "--root", str(disk), "--json")
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    assert error["code"] == "service-failed" and "no such thing" in error["message"]
    assert not (disk / "etc").exists()


def test_only_root_changes_services(site: Path) -> None:
    start = (
        "import os, sys; sys.path.insert(0, sys.argv.pop(1)); import mycoswarmd.ctl.service; "
        "from mycoswarmd.ctl.main import main; os.seteuid(65534); main()"
    )
    for command in ("install", "uninstall"):
        argv = [sys.executable, "-c", start, str(site), "service", command, "--root", "/proc", "--json"]
        environment = {**os.environ, "HOME": "/nonexistent"}
        done = subprocess.run(argv, capture_output=True, text=True, env=environment)
        assert json.loads(done.stdout)["error"]["code"] == "not-root", done
