"""packaging/lock.txt: what `mycoswarmctl service install` brings is what the tests ran with, by hashes."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
LOCK = ROOT / "packaging" / "lock.txt"
_ENTRY = re.compile(r"(?m)^(\S+)==(\S+)(?: ; (.+?))? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)")


def locked() -> dict[str, str]:
    """Return the version of each library in the lock that is for this machine."""
    return {
        name: version
        for name, version, marker, _ in _ENTRY.findall(LOCK.read_text())
        if not marker or Marker(marker).evaluate()
    }


def needed(requirements: list[str]) -> set[str]:
    """Return the libraries that these need, and those that they need, as they are installed here."""
    names: set[str] = set()
    left = list(requirements)
    while left:
        requirement = Requirement(left.pop())
        name = canonicalize_name(requirement.name)
        is_for_here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if is_for_here and name not in names:
            names.add(name)
            left += metadata.requires(name) or []
    return names


def test_it_is_nothing_but_libraries_with_hashes() -> None:
    text = LOCK.read_text()
    assert _ENTRY.sub("", text) == ""
    assert text.count("--hash=") > 100


def test_it_agrees_with_what_the_project_declares() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    have = locked()
    for requirement in map(Requirement, declared):
        assert have[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    assert set(have) == needed(declared), "make lock"


def test_the_tests_run_with_these_versions() -> None:
    assert {name: metadata.version(name) for name in locked()} == locked(), "make lock, or make clean"
