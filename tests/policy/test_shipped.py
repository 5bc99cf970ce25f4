"""Each shipped policy loads, proves, and defends itself: no rule or condition can go unnoticed."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mycoswarmd.core.policy.check import check_policy
from mycoswarmd.core.policy.diff import changed_requests
from mycoswarmd.core.policy.evaluate import Permit, evaluate
from mycoswarmd.core.policy.space import Space
from mycoswarmd.core.policy.table import table_of
from mycoswarmd.core.types import Action, Principal, Request, Zone
from mycoswarmd.errors import PolicyInvalid
from tests.policies import checked

ROOT = Path(__file__).parents[2]
SHIPPED = [ROOT / "policy" / "default.toml", *sorted((ROOT / "policy" / "profiles").glob("*.toml"))]
OTHERS = [ROOT / "docs" / "demo" / "policy.toml"]
# Each case below is one such mutant, so a mistake in making them cannot pass for success.
SECTION = re.compile(r"^(?=\[)", re.MULTILINE)
# What may go without a test noticing: it explains, or it is what is tested.
NOT_CONDITIONS = {"id", "why", "effect", "limit"}


def mutants(text: str) -> Iterator[tuple[str, str]]:
    """Yield the policy without one rule or without one condition of a rule, and what was taken."""
    sections = SECTION.split(text)
    for i, section in enumerate(sections):
        if not section.startswith("[[rule]]"):
            continue
        name = re.search(r'^id\s*=\s*"(.*)"', section, re.MULTILINE)
        assert name is not None
        yield f"rule {name[1]}", "".join([*sections[:i], *sections[i + 1 :]])
        for line in section.splitlines(keepends=True)[1:]:
            key = line.partition("=")[0].strip()
            if "=" in line and key not in NOT_CONDITIONS:
                less = section.replace(line, "")
                yield f"{key} of rule {name[1]}", "".join([*sections[:i], less, *sections[i + 1 :]])


CASES = [(path, what, text) for path in SHIPPED for what, text in mutants(path.read_text())]


@pytest.mark.parametrize("path", [*SHIPPED, *OTHERS], ids=lambda path: path.stem)
def test_a_shipped_policy_loads_and_proves(path: Path) -> None:
    found = checked(path.read_text())
    assert found.proofs
    assert all(proof.holds for proof in found.proofs)
    assert found.tests
    assert all("any code in the cage" in warning.message for warning in found.warnings)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_policy_sends_nothing_to_a_cloud(path: Path) -> None:
    policy = checked(path.read_text()).policy
    assert not policy.destinations
    assert "web_fetch" not in policy.tools
    for shape in Space(policy, table_of(policy)).shapes:
        if shape.zone is Zone.CLOUD:
            assert not isinstance(evaluate(policy, shape), Permit)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_policy_loads_where_no_program_is_installed(path: Path) -> None:
    policy = check_policy(path.read_bytes(), path=str(path), resolve_program=lambda _: None).policy
    assert all(not tool.programs for tool in policy.tools.values())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_owner_is_never_locked_out(path: Path) -> None:
    policy = checked(path.read_text()).policy
    owner = Principal(is_owner=True, uid=0)
    for request in (
        Request(action=Action.ADMIN, principal=owner),
        Request(action=Action.TASK, principal=owner, agent="scribe"),
        Request(action=Action.INFER, principal=owner, model="any"),
    ):
        assert isinstance(evaluate(policy, request), Permit)


@pytest.mark.parametrize(
    ("path", "what", "text"), CASES, ids=[f"{path.stem}: {what}" for path, what, _ in CASES]
)
def test_nothing_can_be_taken_from_a_shipped_policy_unnoticed(path: Path, what: str, text: str) -> None:
    assert text != path.read_text()
    before = checked(path.read_text()).policy
    try:
        after = checked(text).policy
    except PolicyInvalid:
        return
    # What still loads must say the same: the condition was there for the reader.
    assert changed_requests(before, after) == (), f"{path.name} without {what}"


def test_there_are_mutants_of_every_shipped_policy() -> None:
    for path in SHIPPED:
        rules = len(checked(path.read_text()).policy.rules)
        mine = [what for other, what, _ in CASES if other == path]
        assert sum(what.startswith("rule ") for what in mine) == rules
        assert len(mine) > 2 * rules


def test_the_default_names_no_program() -> None:
    assert "run" not in checked(SHIPPED[0].read_text()).policy.tools
