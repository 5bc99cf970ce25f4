"""Every command and option is in its manual page, and the other way round; the pages build."""

import argparse
import importlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mycoswarmd.ctl.main import make_ctl
from mycoswarmd.ctl.plain import typer
from mycoswarmd.daemon import main as daemon_main
from mycoswarmd.daemon import settings

MAN = Path(__file__).parents[2] / "docs" / "man"
# Python's typer writes rich text of its own for these where it is asked to; they are no command's options.
COMMON = {"-h", "--help"}


def page(name: str) -> str:
    return (MAN / name).read_text()


def ctl() -> Any:
    """The whole command, with the installer that other runs do not load."""
    return typer.main.get_command(make_ctl(["mycoswarmctl", "engine"]))


def daemon() -> dict[str, set[str]]:
    return {
        path: {
            name
            for action in parser._actions
            if action.help != argparse.SUPPRESS  # for tests
            for name in action.option_strings
        }
        - COMMON
        for path, parser in daemon_parsers()
    }


def daemon_parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    parser = daemon_main.make_parser()
    yield "", parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def client() -> dict[str, set[str]]:
    return dict(commands(ctl()))


def commands(command: Any, path: str = "") -> Iterator[tuple[str, set[str]]]:
    """Yield each command that can be run with its options; "" is the program itself."""
    params = [param for param in command.params if param.param_type_name == "option"]
    options = {name for param in params for name in (*param.opts, *param.secondary_opts)}
    children = getattr(command, "commands", {})
    if not children or not path or command.invoke_without_command:
        yield path, options - COMMON
    for name, child in children.items():
        yield from commands(child, f"{path} {name}".strip())


def documented(text: str) -> dict[str, set[str]]:
    """Read the commands (headings `## name`) and the options (`**--name**`) of a page."""
    found: dict[str, set[str]] = {}
    for section in re.split(r"^(?=# |## )", text, flags=re.MULTILINE):
        head = section.split("\n", 1)[0]
        if head.startswith("## "):
            name = re.sub(r"\s*\[?\*.*", "", head.removeprefix("## "))
        elif "OPTIONS" in head:
            name = ""
        else:
            continue
        terms = re.findall(r"^(\*\*\\?-.*)\n:", section, flags=re.MULTILINE)
        found[name] = {
            option for term in terms for option in re.findall(r"\*\*\\?(-[^*]+)\*\*", term)
        } - COMMON
    return found


@pytest.mark.parametrize(("make", "name"), [(client, "mycoswarmctl.1.md"), (daemon, "mycoswarmd.8.md")])
def test_the_page_has_every_command_and_option_and_no_other(make: Any, name: str) -> None:
    has = make()
    says = documented(page(name))
    assert says.keys() == has.keys()
    for command, options in has.items():
        assert says[command] == options, command


def test_every_argument_is_in_its_heading() -> None:
    def walk(command: Any, path: str) -> Iterator[tuple[str, list[str]]]:
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, f"{path} {name}".strip())
        names = [param.metavar for param in command.params if param.param_type_name == "argument"]
        if names:
            yield path, names

    text = page("mycoswarmctl.1.md")
    seen = 0
    for path, names in walk(ctl(), ""):
        shown = " ".join(f"[*{name[1:-1]}*]" if name.startswith("[") else f"*{name}*" for name in names)
        assert f"\n## {path} {shown}\n" in text
        seen += 1
    assert seen >= 10


def test_every_command_of_the_client_has_json() -> None:
    without = [path for path, options in commands(ctl()) if path and "--json" not in options]
    assert [path for path in without if not path.startswith("engine")] == []


def test_every_command_has_help_that_starts_with_one_short_sentence() -> None:
    def walk(command: Any, path: str) -> Iterator[tuple[str, str]]:
        yield path, (command.help or "").strip()
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, f"{path} {name}")

    daemons = [(f"mycoswarmd {path}", parser.description or "") for path, parser in daemon_parsers()]
    for path, text in [*walk(ctl(), "mycoswarmctl"), *daemons]:
        first = text.split("\n\n", 1)[0].replace("\n", " ")
        assert 5 < len(first) <= 120, path
        assert first.endswith("."), path


def test_every_setting_is_in_the_daemons_page() -> None:
    text = page("mycoswarmd.8.md")
    section = text[text.index("# SETTINGS") : text.index("# SIGNALS")]
    assert re.findall(r"^([a-z_]+)\n:", section, flags=re.MULTILINE) == [key.name for key in settings.TABLE]


def test_the_exit_codes_of_the_page_are_those_of_the_errors() -> None:
    errors = importlib.import_module("mycoswarmd.errors")
    codes = {kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")}
    text = page("mycoswarmctl.1.md")
    section = text[text.index("# EXIT STATUS") : text.index("# ENVIRONMENT")]
    assert codes <= {int(code) for code in re.findall(r"^([0-9]+)\n:", section, flags=re.MULTILINE)}


@pytest.mark.skipif(
    shutil.which("pandoc") is None and not os.environ.get("CI"), reason="pandoc is not installed"
)
@pytest.mark.parametrize("name", ["mycoswarmctl.1.md", "mycoswarmd.8.md"])
def test_the_pages_become_roff_without_complaint(name: str, tmp_path: Path) -> None:
    out = tmp_path / name.removesuffix(".md")
    built = subprocess.run(
        ["pandoc", "-s", "-t", "man", str(MAN / name), "-o", str(out)], capture_output=True, text=True
    )
    assert (built.returncode, built.stderr) == (0, "")
    title = out.name.rpartition(".")[0]
    roff = out.read_text()
    assert f'.TH "{title.upper()}"' in roff.replace("\\-", "-")
    assert "–" not in roff and "—" not in roff  # noqa: RUF001 - what pandoc makes of two hyphens not escaped
    assert "--state" in roff.replace("\\-", "-")
    if shutil.which("man"):
        env = {**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "100"}
        shown = subprocess.run(["man", "--warnings", "-l", str(out)], capture_output=True, text=True, env=env)
        assert shown.returncode == 0
        assert "EXIT STATUS" in shown.stdout
