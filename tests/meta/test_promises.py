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


def claims(text: str) -> list[str]:
    """Return the claims of SECURITY.md: the entries of its lists."""
    section = text[text.index("## What is claimed") : text.index("## What is not claimed")]
    return re.findall(r"^- .*(?:\n  .*)*", section, flags=re.MULTILINE)


def test_every_claim_about_security_cites_tests_and_they_exist_and_run() -> None:
    found = claims((ROOT / "SECURITY.md").read_text())
    assert len(found) > 15
    for claim in found:
        cited = CITED.findall(claim)
        assert cited, claim
        assert claim.count("`tests/") == len(cited), claim
        for file, name in cited:
            source = (ROOT / file).read_text()
            match = re.search(rf"((?:^@.*\n(?:^[ )].*\n)*)*)^(?:async )?def {name}\(", source, re.MULTILINE)
            assert match, (file, name)
            assert "xfail" not in match[1] and "mark.skip(" not in match[1], (file, name)


def test_a_claim_without_a_test_would_be_noticed() -> None:
    text = "## What is claimed\n\n- One.\n  `tests/a.py::test_b`\n- Two,\n  none.\n\n## What is not claimed\n"
    assert [bool(CITED.findall(claim)) for claim in claims(text)] == [True, False]


def test_every_promise_is_in_the_threat_model() -> None:
    text = (ROOT / "docs" / "threat-model.md").read_text()
    for number in range(1, 11):
        assert re.search(rf"^### M{number} ", text, re.MULTILINE), number


def test_links_between_pages_lead_somewhere() -> None:
    for page in [
        ROOT / "README.md",
        ROOT / "SECURITY.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "policy").rglob("*.md"),
    ]:
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
