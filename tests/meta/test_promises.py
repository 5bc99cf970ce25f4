"""Every promise in the threat model cites tests that exist; the product names nothing it should not."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
CITED = re.compile(r"`(tests/[a-z_/]+\.py)::(test_[a-z0-9_]+)`")


def test_every_cited_test_exists() -> None:
    cited = CITED.findall((ROOT / "docs" / "threat-model.md").read_text())
    assert len(cited) > 20
    for file, name in cited:
        assert f"def {name}(" in (ROOT / file).read_text(), (file, name)


def test_every_promise_is_in_the_threat_model() -> None:
    text = (ROOT / "docs" / "threat-model.md").read_text()
    for number in range(1, 11):
        assert re.search(rf"^### M{number} ", text, re.MULTILINE), number


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "policy").rglob("*.md")]:
        for target, anchor in re.findall(r"\]\((?!https?:|#)([^)#]+)#?([^)]*)\)", page.read_text()):
            assert (page.parent / target).exists(), (page, target)
            if anchor:
                headings = re.findall(r"^#+ (.+)$", (page.parent / target).read_text(), re.MULTILINE)
                assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, (page, anchor)


def test_nothing_is_left_for_later() -> None:
    found = subprocess.run(
        ["git", "grep", "-nE", r"\b(TODO|FIXME|XXX)\b|NotImplementedError", "--", "mycoswarmd", "packaging"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.stdout == ""
