"""`mycoswarmctl service`: the appliance from a wheel, on a disk of its own and as systemd would find it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mycoswarmd import __version__

ROOT = Path(__file__).parents[2]
_PIP_S = 240

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root installs services"),
]


# The environment's Python in place of a real one: what pip would do is written down, all else is done.
_STAND_IN = """#!/bin/sh
if [ "$3" = pip ]; then echo "$@" >>{pip}; exit 0; fi
shift; exec env PYTHONPATH={site} {python} "$@"
"""
# The system's Python in place of a real one: makes that environment.
_SYSTEM = """#!/bin/sh
[ "$*" = "-I -m venv $4" ] && mkdir -p "$4/bin" && cp "$0.venv" "$4/bin/python"
"""

_NO_LOOK = (
    "service.firm = lambda path, make=False, **_: make and path.mkdir(parents=True, exist_ok=True) or path"
)


def ctl(site: Path, *argv: str, without: str = "pass") -> subprocess.CompletedProcess[str]:
    """Run the command of the package that lies in `site`, as pipx would have put it there."""
    start = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from mycoswarmd.ctl import service; "
        f"service._PYTHON = {str(site / 'python3')!r}; {without}; "
        "from mycoswarmd.ctl.main import main; main()"
    )
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
    for name in ("mycoswarm.toml", "lock.txt"):
        shutil.copy(ROOT / "packaging" / name, share)
    return site


@pytest.fixture
def disk(tmp_path: Path, site: Path) -> Path:
    """Return an empty disk; pip needs a network and a minute, so an environment is made without it."""
    make_python(site, tmp_path)
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


def make_python(site: Path, tmp_path: Path) -> None:
    stand_in = _STAND_IN.format(pip=tmp_path / "pip", site=site, python=sys.executable)
    for name, text in (("python3", _SYSTEM), ("python3.venv", stand_in)):
        (site / name).write_text(text)
        (site / name).chmod(0o755)


def files(disk: Path) -> set[str]:
    return {str(path.relative_to(disk)) for path in disk.rglob("*") if not path.is_dir()}


def test_what_runs_is_what_is_installed_and_no_index_is_asked(site: Path, disk: Path, tmp_path: Path) -> None:
    for name in ("mycoswarmd", f"mycoswarmd=={__version__}", str(tmp_path), str(tmp_path / "none.whl")):
        done = ctl(site, "install", "--root", str(disk), "--from", name)
        assert done.returncode == 2 and "no-wheel" in done.stderr, (name, done)
    assert files(disk) == set() and not (tmp_path / "pip").exists()
    make = "from pathlib import Path; from mycoswarmd.ctl.ownwheel import make_wheel; "
    make = f"import sys; sys.path.insert(0, {str(site)!r}); {make}print(make_wheel(Path({str(tmp_path)!r})))"
    wheel = subprocess.run([sys.executable, "-c", make], capture_output=True, text=True, check=True).stdout
    pip = [sys.executable, "-I", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", str(tmp_path / "there"), wheel.strip()], check=True, timeout=_PIP_S)
    want = {name: (site / "mycoswarmd" / name).read_bytes() for name in files(site / "mycoswarmd")}
    want = {name: data for name, data in want.items() if "__pycache__" not in name}
    there = tmp_path / "there/mycoswarmd"
    assert len(want) > 200 and want == {name: (there / name).read_bytes() for name in files(there)}


def test_it_is_installed_compared_and_taken_away(site: Path, disk: Path, tmp_path: Path) -> None:
    root = ("--root", str(disk))
    wheel = tmp_path / "some.whl"
    wheel.touch()
    done = ctl(site, "install", *root, "--from", str(wheel))
    assert done.returncode == 0, done
    assert "mycoswarmctl init" in done.stderr
    libraries, node, check = (tmp_path / "pip").read_text().splitlines()
    lock = site / "mycoswarmd/share/lock.txt"
    assert libraries.endswith(f" install --only-binary :all: --require-hashes --requirement {lock}")
    assert node.endswith(f" install --only-binary :all: --no-deps {wheel}") and check.endswith(" check")
    units = {path.name for path in (ROOT / "systemd").iterdir() if path.suffix in {".service", ".socket"}}
    units.add("run-mycoswarm\\x2dengine.mount")
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
    own = (tmp_path / "pip").read_text().splitlines()[-2].split()[-1]
    assert own.startswith("/") and own.endswith(f"/mycoswarmd-{__version__}-py3-none-any.whl")
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


def test_it_says_what_went_wrong_with_pip_and_leaves_what_is_there(site: Path, disk: Path) -> None:
    (site / "python3.venv").write_text("#!/bin/sh\necho ERROR: no such thing >&2\nexit 1\n")
    old = disk / "opt/mycoswarm/venv/bin/python"
    old.parent.mkdir(parents=True)
    old.write_text("that of before")
    done = ctl(site, "install", "--root", str(disk), "--json")
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    assert error["code"] == "service-failed" and "no such thing" in error["message"]
    assert files(disk) == {"opt/mycoswarm/venv/bin/python"} and old.read_text() == "that of before"


@pytest.mark.parametrize("user", [0, 1000])
def test_no_program_of_the_disk_runs(site: Path, disk: Path, tmp_path: Path, user: int) -> None:
    trap = disk / "opt/mycoswarm/venv/bin/python"
    trap.parent.mkdir(parents=True)
    trap.write_text(f"#!/bin/sh\nid >>{tmp_path}/ran\nexit 1\n")
    trap.chmod(0o755)
    os.chown(disk / "opt/mycoswarm", user, user)
    # The control: an installer that takes the environment that is there, as it once did, is caught.
    reuse = (
        f"{_NO_LOOK}; service.Service._make_environment = lambda self, source, lock: self._pip(self._root / "
        "'opt/mycoswarm/venv', source, lock)"
    )
    assert ctl(site, "install", "--root", str(disk), without=reuse).returncode == 1
    assert "uid=0" in (tmp_path / "ran").read_text()
    (tmp_path / "ran").unlink()
    done = ctl(site, "install", "--root", str(disk), "--json")
    assert not (tmp_path / "ran").exists()
    if user:
        assert json.loads(done.stdout.splitlines()[-1])["error"]["code"] == "not-only-roots", done
        assert trap.exists() and not (disk / "etc").exists()
    else:
        assert done.returncode == 0 and "id >>" not in trap.read_text()
        assert {path.name for path in (disk / "opt/mycoswarm").iterdir()} == {
            "bin",
            "libexec",
            "sbin",
            "share",
            "venv",
        }


@pytest.mark.parametrize("link", ["etc/systemd/system", "etc", "opt/mycoswarm", "usr/local/bin"])
@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_no_link_of_the_disk_leads_to_this_machine(
    site: Path, disk: Path, tmp_path: Path, link: str, command: str
) -> None:
    host = tmp_path / "host"
    host.mkdir()
    if command == "uninstall":
        assert ctl(site, "install", "--root", str(disk)).returncode == 0
        shutil.move(disk / link, host / "there")
        (disk / link).symlink_to(host / "there")
    else:
        (disk / link).parent.mkdir(parents=True, exist_ok=True)
        (disk / link).symlink_to(host)
    before = files(host)
    done = ctl(site, command, "--root", str(disk), "--json")
    assert json.loads(done.stdout.splitlines()[-1])["error"]["code"] == "leads-out", done
    assert files(host) == before
    # The control: without the look at the path the same command changes this machine.
    ctl(site, command, "--root", str(disk), without=_NO_LOOK)
    assert files(host) != before


def test_no_file_is_written_through_a_link_that_waits_for_it(site: Path, disk: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    waiting = [
        disk / "etc/systemd/system/.mycoswarmd.service.new",
        disk / "etc/systemd/system/mycoswarmd.service",
        disk / "opt/mycoswarm/libexec/.task.new",
        disk / "opt/mycoswarm/.venv.new",
    ]
    for path in waiting:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(victim)
    assert ctl(site, "install", "--root", str(disk)).returncode == 0
    assert victim.read_text() == "precious"
    assert not any(path.is_symlink() for path in waiting)


def test_only_root_changes_services(site: Path) -> None:
    start = "import sys; sys.path.insert(0, sys.argv.pop(1)); from mycoswarmd.ctl.main import main; main()"
    for command in ("install", "uninstall"):
        # Nobody, in a user namespace without a map, who reads what this user reads.
        argv = ["unshare", "--user", sys.executable, "-c", start, str(site)]
        argv += ["service", command, "--root", "/proc", "--json"]
        environment = {**os.environ, "HOME": "/nonexistent"}
        done = subprocess.run(argv, capture_output=True, text=True, env=environment)
        assert json.loads(done.stdout)["error"]["code"] == "not-root", done
