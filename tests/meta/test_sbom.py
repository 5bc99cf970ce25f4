"""The list of what the product is made of: whole, true and the same each time."""

import json
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from mycoswarmd import __version__
from mycoswarmd.ctl.engine_install import ENGINES, MODEL

ROOT = Path(__file__).parents[2]


def made(place: Path, **env: str) -> bytes:
    command = [sys.executable, str(ROOT / "packaging" / "sbom"), str(place)]
    plain = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    ran = subprocess.run(command, capture_output=True, text=True, env={**plain, **env})
    assert (ran.returncode, ran.stderr) == (0, "")
    return place.read_bytes()


@pytest.fixture(scope="module")
def sbom(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    document = json.loads(made(tmp_path_factory.mktemp("s") / "sbom.json"))
    assert isinstance(document, dict)
    return document


def test_the_same_environment_gives_the_same_bytes(tmp_path: Path) -> None:
    first = made(tmp_path / "a", PYTHONHASHSEED="1", SOURCE_DATE_EPOCH="1795000000")
    assert made(tmp_path / "b", PYTHONHASHSEED="2", SOURCE_DATE_EPOCH="1795000000", TZ="Asia/Tokyo") == first
    assert json.loads(first)["metadata"]["timestamp"] == "2026-11-18T11:06:40Z"
    other = json.loads(made(tmp_path / "c"))
    assert "timestamp" not in other["metadata"]
    assert other["serialNumber"] != json.loads(first)["serialNumber"]


def test_what_the_package_declares_is_in_it_as_it_is_installed(sbom: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {text.partition(">")[0] for text in project["dependencies"]}
    assert len(declared) >= 7
    have = {row["name"]: row["version"] for row in sbom["components"]}
    assert {name: metadata.version(name) for name in declared} == {name: have[name] for name in declared}
    assert sbom["metadata"]["component"]["version"] == __version__
    assert (
        sbom["metadata"]["component"]["purl"] == f"pkg:generic/mycoswarmd@{__version__}"
    )  # it is in no index
    assert "pytest" not in have and "ruff" not in have


def test_every_reference_leads_to_a_component(sbom: dict[str, Any]) -> None:
    refs = [row["bom-ref"] for row in (sbom["metadata"]["component"], *sbom["components"])]
    assert len(refs) == len(set(refs)) > 20
    for row in sbom["dependencies"]:
        assert {row["ref"], *row["dependsOn"]} <= set(refs)
    reached = {row["ref"] for row in sbom["dependencies"]}
    assert {row["bom-ref"] for row in sbom["components"] if row.get("scope") != "optional"} <= reached


def test_what_the_installer_may_bring_is_in_it_with_its_hash(sbom: dict[str, Any]) -> None:
    hashes = {row["hashes"][0]["content"] for row in sbom["components"] if "hashes" in row}
    assert hashes == {one.sha256 for one in (*ENGINES.values(), MODEL)}
