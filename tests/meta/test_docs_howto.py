"""Every mycoswarmctl command line in the how-tos is one that the command takes."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mycoswarmd.ctl.main import make_ctl
from mycoswarmd.ctl.plain import typer
from mycoswarmd.daemon import settings

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted((DOCS / "howto").glob("*.md"))


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of each call of mycoswarmctl, in blocks and in sentences."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    lines += re.findall(r"`((?:sudo )?mycoswarmctl [^`]+)`", page.read_text())
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["sudo"]:
            words = words[1:]
        if words[:1] == ["mycoswarmctl"]:
            yield words[1 : words.index("<") if "<" in words else None]


def parse(command: Any, arguments: list[str]) -> None:
    """Parse as a real run would, and stop before anything is done."""
    with command.make_context("mycoswarmctl", arguments) as ctx:
        if hasattr(command, "commands"):
            # click 8.2 renamed it; before, the public name was the only one.
            before: list[str] = getattr(
                ctx, "_protected_args" if hasattr(ctx, "_protected_args") else "protected_args"
            )
            name, child, rest = command.resolve_command(ctx, [*before, *ctx.args])
            assert name
            if rest or not getattr(child, "invoke_without_command", False):
                parse(child, rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_is_one(page: Path) -> None:
    ctl = typer.main.get_command(make_ctl(["mycoswarmctl"]))
    found = list(commands(page))
    assert len(found) >= 3
    for arguments in found:
        parse(ctl, arguments)


@pytest.mark.parametrize(
    "wrong", [["nods"], ["revoke"], ["invite", "--nam", "x"], ["restore", "x"], ["signers", "ad"]]
)
def test_a_command_that_is_none_would_be_found(wrong: list[str]) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|missing|invalid"):
        parse(typer.main.get_command(make_ctl(["mycoswarmctl"])), wrong)


def test_the_pages_are_there() -> None:
    names = {page.stem for page in PAGES}
    assert names >= {"pairing", "revoking", "recovering", "backup", "operator-laptop", "no-multicast"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_setting_of_a_page_is_one(page: Path) -> None:
    known = {key.name: key.kind for key in settings.TABLE}
    for block in blocks(page, "toml"):
        for name, value in tomllib.loads(block).items():
            assert isinstance(value, known[name]), name
