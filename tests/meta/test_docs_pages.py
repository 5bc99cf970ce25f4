"""The manual pages about files and security say what the code has: every key, condition, unit and proof."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mycoswarmd.core.policy.check import check_policy
from mycoswarmd.core.policy.conditions import _READ
from mycoswarmd.core.policy.parse import _LIMITS, _RULE, _TOP
from mycoswarmd.daemon.settings import TABLE, Options, load_settings
from mycoswarmd.wire.proof import CheckName

ROOT = Path(__file__).parents[2]
MAN = ROOT / "docs" / "man"
NEW = ["mycoswarm-policy.5.md", "mycoswarm.toml.5.md", "mycoswarm-security.7.md"]


def section(page: str, name: str) -> str:
    text = (MAN / page).read_text()
    found = re.search(rf"^# {name}$(.*?)(?=^# )", text, re.MULTILINE | re.DOTALL)
    assert found, (page, name)
    return found[1]


def terms(text: str) -> list[str]:
    return re.findall(r"^([a-z_@.-]+)\n:", text, flags=re.MULTILINE)


def block(page: str) -> str:
    (found,) = re.findall(r"^```toml\n(.*?)^```", (MAN / page).read_text(), re.MULTILINE | re.DOTALL)
    return str(found)


def test_every_section_rule_key_and_condition_of_the_policy_is_in_its_page() -> None:
    page = "mycoswarm-policy.5.md"
    assert terms(section(page, "SECTIONS")) == list(_TOP)
    assert set(terms(section(page, "RULES"))) == set(_RULE) - {"id", "why", "always"}
    assert set(terms(section(page, "CONDITIONS"))) == set(_READ)
    for limit in _LIMITS:
        assert limit in section(page, "SECTIONS"), limit


def test_every_built_in_answer_is_in_the_page() -> None:
    table = (ROOT / "docs" / "policy.md").read_text()
    named = set(re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE))
    assert len(named) >= 7
    assert set(terms(section("mycoswarm-policy.5.md", "BUILT-IN ANSWERS"))) == named


def test_the_example_of_the_policys_page_is_a_valid_policy() -> None:
    checked = check_policy(
        block("mycoswarm-policy.5.md").encode(),
        path="example",
        resolve_program=lambda name: f"/usr/bin/{name}",
    )
    assert (len(checked.tests), len(checked.proofs)) == (1, 1)  # one that fails would have been refused
    assert [str(problem) for problem in checked.warnings] == []


def test_every_setting_is_in_its_page_and_the_example_is_taken(tmp_path: Path) -> None:
    assert terms(section("mycoswarm.toml.5.md", "KEYS")) == [key.name for key in TABLE]
    file = tmp_path / "mycoswarm.toml"
    file.write_text(block("mycoswarm.toml.5.md"))
    settings = load_settings(Options(state=tmp_path, config=file))
    assert (settings.node_name, settings.engine_idle_s) == ("study-pc", 1800)
    assert [engine.name for engine in settings.engines] == ["ollama"]


def test_every_unit_and_every_proof_is_in_the_page_about_security() -> None:
    page = "mycoswarm-security.7.md"
    units = {one.name for one in (ROOT / "systemd").glob("*.service")}
    assert set(terms(section(page, "UNITS"))) >= units
    assert set(terms(section(page, "PROOFS"))) == {name.value for name in CheckName}


def test_pages_name_each_other_and_only_pages_that_there_are() -> None:
    mine = {one.name.removesuffix(".md").rpartition(".")[::2] for one in MAN.glob("*.md")}
    assert len(mine) == 5
    for page in NEW:
        named = set(re.findall(r"\*\*(mycoswarm[a-z.-]*)\*\*\((\d)\)", (MAN / page).read_text()))
        assert named and named <= mine, page


@pytest.mark.skipif(
    shutil.which("pandoc") is None and not os.environ.get("CI"), reason="pandoc is not installed"
)
@pytest.mark.parametrize("name", NEW)
def test_the_pages_become_roff_without_complaint(name: str, tmp_path: Path) -> None:
    out = tmp_path / name.removesuffix(".md")
    command = ["pandoc", "-s", "-t", "man", str(MAN / name), "-o", str(out)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert (built.returncode, built.stderr) == (0, "")
    title, _, number = out.name.rpartition(".")
    roff = out.read_text()
    assert f'.TH "{title.upper()}" "{number}"' in roff.replace("\\-", "-")
    assert "–" not in roff and "—" not in roff  # noqa: RUF001 - what pandoc makes of two hyphens not escaped
    if shutil.which("man"):
        env = {**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "100"}
        shown = subprocess.run(["man", "--warnings", "-l", str(out)], capture_output=True, text=True, env=env)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert "SEE ALSO" in shown.stdout
