"""The Debian package: the same bytes every time, nothing for lintian to find, the right things in it."""

import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import tarfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = (
    "LICENSE",
    "README.md",
    "SECURITY.md",
    "docs",
    "mycoswarmd",
    "packaging",
    "policy",
    "pyproject.toml",
    "systemd",
)
_BUILD_S = 600

pytestmark = [
    pytest.mark.timeout(1500),
    pytest.mark.xdist_group("deb"),
    pytest.mark.skipif(
        any(shutil.which(program) is None for program in ("dpkg-buildpackage", "dh_python3", "pandoc")),
        reason="needs dpkg-dev, debhelper, dh-python and pandoc",
    ),
]


def build(source: Path, target: Path, **environment: str) -> Path:
    command = [str(source / "packaging/build-deb"), str(target)]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=_BUILD_S, env={**os.environ, **environment}
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return next(target.glob("mycoswarmd_*_all.deb"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the working tree, which somebody may be working in."""
    copied = tmp_path_factory.mktemp("tree")
    for part in PARTS:
        origin = ROOT / part
        if origin.is_dir():
            shutil.copytree(origin, copied / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(origin, copied / part)
    return copied


@pytest.fixture(scope="module")
def deb(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tree, tmp_path_factory.mktemp("deb"))


def members(deb: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    data = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(deb)], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=BytesIO(data)) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            yield member, file.read() if file is not None else b""


def test_it_is_the_same_from_another_directory_at_another_time_by_somebody_else(
    deb: Path, tree: Path, tmp_path: Path
) -> None:
    other = tmp_path / "a longer name" / "elsewhere"
    shutil.copytree(tree, other)
    for path in other.rglob("*"):  # checked out by somebody with another umask, long ago
        os.utime(path, (1_000_000_000, 1_000_000_000))
        path.chmod(stat.S_IMODE(path.stat().st_mode) & 0o700 | 0o700 * path.is_dir())
    surroundings = {"TZ": "Pacific/Kiritimati", "LANG": "C", "LC_ALL": "C", "HOME": str(tmp_path)}
    again = build(other, tmp_path / "out", **surroundings)
    assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(deb.read_bytes()).digest()
    with (other / "policy/default.toml").open("a") as file:
        file.write("# another\n")
    changed = build(other, tmp_path / "changed")
    assert hashlib.sha256(changed.read_bytes()).digest() != hashlib.sha256(deb.read_bytes()).digest()


@pytest.mark.skipif(shutil.which("lintian") is None, reason="needs lintian")
def test_lintian_finds_nothing(deb: Path, tmp_path: Path) -> None:
    def lintian(path: Path) -> subprocess.CompletedProcess[str]:
        command = [
            "lintian",
            "-i",
            "-E",
            "--pedantic",
            "--fail-on",
            "error,warning",
            "--allow-root",
            str(path),
        ]
        return subprocess.run(command, capture_output=True, text=True)

    done = lintian(next(deb.parent.glob("*.changes")))
    assert done.returncode == 0, done.stdout
    unpacked = tmp_path / "unpacked"
    subprocess.run(["dpkg-deb", "-R", str(deb), str(unpacked)], check=True)
    (unpacked / "usr/share/doc/mycoswarmd/copyright").unlink()
    bad = tmp_path / "mycoswarmd_0.1.0_all.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-b", str(unpacked), str(bad)], check=True, capture_output=True
    )
    assert lintian(bad).returncode != 0


def test_what_is_in_it(deb: Path, tree: Path) -> None:
    found = {member.name.removeprefix("./"): (member, data) for member, data in members(deb)}
    for name, (member, data) in found.items():
        assert member.uid == member.gid == 0 and not member.mode & 0o7022, name
        if member.isfile() and member.mode & 0o111:
            assert data.startswith(b"#!/usr/bin/python3 -I\n"), name
            assert name.split("/")[1] in {"bin", "sbin", "libexec"}, name
    units = {path.name for path in (tree / "systemd").iterdir() if path.suffix in {".service", ".socket"}}
    assert units == {Path(name).name for name in found if name.startswith("usr/lib/systemd/system/my")}
    for unit in units:
        assert found[f"usr/lib/systemd/system/{unit}"][1] == (tree / "systemd" / unit).read_bytes()
    assert found["etc/mycoswarm/policy.toml"][1] == (tree / "policy/default.toml").read_bytes()
    assert not [
        name for name in found if name.endswith((".pyc", ".pth")) or name.startswith(("lib/", "opt/"))
    ]
    for page in (tree / "docs/man").glob("*.md"):
        name = page.name.removesuffix(".md")
        assert f"usr/share/man/man{name[-1]}/{name}.gz" in found
    for wanted in (
        "usr/lib/sysusers.d/mycoswarmd.conf",
        "usr/lib/tmpfiles.d/mycoswarmd.conf",
        "usr/lib/tmpfiles.d/mycoswarm-task.conf",
        "usr/lib/systemd/catalog/mycoswarm.catalog",
        "usr/share/bash-completion/completions/mycoswarmctl",
        "usr/share/zsh/vendor-completions/_mycoswarmctl",
        "usr/share/fish/vendor_completions.d/mycoswarmctl.fish",
    ):
        assert wanted in found, wanted
    control = subprocess.run(["dpkg-deb", "-I", str(deb), "conffiles"], capture_output=True, text=True).stdout
    assert control.split() == ["/etc/mycoswarm/mycoswarm.toml", "/etc/mycoswarm/policy.toml"]


def test_every_page_that_the_readme_leads_to_is_in_it(deb: Path) -> None:
    pages = {member.name.removeprefix("./usr/share/doc/mycoswarmd/"): data for member, data in members(deb)}
    for page in ("README.md", "docs/quickstart.md", "docs/howto/pairing.md", "docs/howto/upgrade.md"):
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", pages[page].decode())
        targets = {os.path.normpath(f"{Path(page).parent}/{link}") for link in links}
        assert targets and targets <= set(pages), (page, targets - set(pages))
    assert "examples/profiles/home.toml" in pages  # named in the policy itself


def test_the_list_of_what_it_is_made_of_is_in_it(deb: Path) -> None:
    found = {member.name.removeprefix("./"): data for member, data in members(deb)}
    sbom = json.loads(found["usr/share/mycoswarmd/sbom.cdx.json"])
    assert sbom["bomFormat"] == "CycloneDX" and sbom["metadata"]["component"]["version"] == "0.1.0"
    assert sbom["metadata"]["component"]["purl"] == "pkg:generic/mycoswarmd@0.1.0"
    have = {row["name"]: row for row in sbom["components"]}
    argv = ["dpkg-deb", "-f", str(deb), "Depends", "Recommends"]
    fields = subprocess.run(argv, capture_output=True, text=True).stdout
    asked = {text.split()[0] for line in fields.splitlines() for text in line.partition(":")[2].split(",")}
    assert {"python3-aiohttp", "systemd", "bubblewrap"} <= asked
    assert asked - set(have) <= {"python3", "python3:any"}  # which debhelper names
    engines = [row for row in have.values() if row.get("hashes")]
    assert engines and all(len(row["hashes"][0]["content"]) == 64 for row in engines)
    assert not [row for row in have.values() if row["purl"].startswith("pkg:deb/") and "version" in row]


def test_its_programs_start_quickly(deb: Path, tmp_path: Path) -> None:
    """The launchers import what they need and nothing more; `-I` keeps the environment out."""
    subprocess.run(["dpkg-deb", "-x", str(deb), str(tmp_path)], check=True)
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "argparse.py").write_text("raise SystemExit('taken over')\n")
    launcher = tmp_path / "usr/sbin/mycoswarmd"
    # The package's code, in place of the system's: what differs from an installation is the path.
    packages = tmp_path / "usr/lib/python3/dist-packages"
    own = f'"""\n\nimport sys\n\nsys.path.insert(0, {str(packages)!r})\n'
    text = launcher.read_text().replace('"""\n\n', own, 1)
    launcher.write_text(text)
    command = ["/usr/bin/python3", "-I", str(launcher), "version"]
    took_s = []
    for _ in range(5):
        started_s = time.monotonic()
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=evil,
            env={"PYTHONPATH": str(evil), "HOME": str(evil)},
        )
        took_s.append(time.monotonic() - started_s)
        assert done.stdout.strip() == "0.1.0", done
    assert min(took_s) < 2
