"""Every mycoswarmctl command line in the how-tos is one that the command takes."""

import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mycoswarmd.ctl.checks_network import OLLAMA_AT_HOME, OLLAMA_DROP_IN
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
            yield words[
                1 : next((at for at, word in enumerate(words) if word in {"<", "|", ">", "&&"}), None)
            ]


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
    ctl = typer.main.get_command(make_ctl(["mycoswarmctl", "engine"]))
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
    assert names >= {
        "pi",
        "gpu-workstation",
        "laptop",
        "imaging",
        "ollama",
        "firewall",
        "upgrade",
        "debug-a-cage",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_setting_of_a_page_is_one(page: Path) -> None:
    known = {key.name: key.kind for key in settings.TABLE}
    for block in blocks(page, "toml"):
        for name, value in tomllib.loads(block).items():
            assert isinstance(value, known[name]), name


def test_the_drop_in_for_ollama_is_the_one_that_doctor_writes() -> None:
    (found,) = blocks(DOCS / "howto" / "ollama.md", "ini")
    assert found == OLLAMA_AT_HOME.replace("\\n", "\n")
    assert OLLAMA_DROP_IN in (DOCS / "howto" / "ollama.md").read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize(
    ("page", "unit", "around"),
    [
        ("ollama", "ollama.service", "[Service]\nExecStart=/bin/true\n"),
        ("imaging", "mycoswarm-enroll.service", ""),
    ],
)
def test_systemd_takes_what_the_page_has_for_it(page: str, unit: str, around: str, tmp_path: Path) -> None:
    """With the programs and the unit that it needs stood in for: this machine has not installed the node."""
    (text,) = blocks(DOCS / "howto" / f"{page}.md", "ini")
    text = text.replace("/usr/bin/mycoswarmctl", "/bin/true")
    (tmp_path / "mycoswarmd.service").write_text("[Service]\nExecStart=/bin/true\n")

    def complaints(body: str) -> str:
        (tmp_path / unit).write_text(around + body)
        command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit)]
        ran = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"}
        )
        return "".join(row for row in ran.stderr.splitlines(keepends=True) if unit in row)

    assert complaints(text) == ""
    assert "Unknown key" in complaints(text.replace("[Service]", "[Service]\nIPAdressDeny=any"))
