"""What the three shells offer, asked of the shells; the scripts are the same wherever they are made."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mycoswarmd.ctl.main import make_ctl
from mycoswarmd.ctl.plain import typer

ROOT = Path(__file__).parents[2]
GENERATOR = ROOT / "packaging" / "completions"


def made(where: Path, python: str = sys.executable, **env: str) -> Path:
    ran = subprocess.run(
        [python, GENERATOR, where], capture_output=True, text=True, env={**os.environ, **env}
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    return where


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("completions"))


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


def whole() -> Any:
    return typer.main.get_command(make_ctl(["mycoswarmctl", "engine"]))


def bash(scripts: Path, program: str, *words: str) -> list[str]:
    line = " ".join(f"'{word}'" for word in (program, *words))
    script = (
        f"source {scripts}/bash-completion/completions/{program}; COMP_WORDS=({line}); "
        f"COMP_CWORD={len(words)}; _{program}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    ran = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return sorted(ran.stdout.split())


def fish(scripts: Path, program: str, *words: str) -> list[str]:
    line = " ".join((program, *words))
    script = f"source {scripts}/fish/vendor_completions.d/{program}.fish; complete --do-complete '{line}'"
    ran = subprocess.run(["fish", "--no-config", "-c", script], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, ""), ran.stderr
    return sorted(row.split("\t")[0] for row in ran.stdout.splitlines())


def zsh(scripts: Path, program: str, *words: str) -> list[str]:
    """Run the script's function with the line; what it hands to zsh's own functions is its answer."""
    line = " ".join(f"'{word}'" for word in (program, *words))
    script = (
        "compdef() { }; "
        "_describe() { local -a rows=(${(P)argv[-1]}); print -l -- ${rows%%:*} }; "
        "_files() { print -- FILES }; _message() { }; compadd() { shift; print -l -- $@ }; "
        f"source {scripts}/zsh/vendor-completions/_{program}; words=({line}); "
        f"CURRENT={len(words) + 1}; _{program}"
    )
    ran = subprocess.run(["zsh", "-f", "-c", script], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) in {(0, ""), (1, "")}, ran.stderr
    return sorted(word for word in ran.stdout.split() if word.startswith(words[-1]) or word == "FILES")


SHELLS = [
    pytest.param(
        shell,
        id=shell.__name__,
        marks=pytest.mark.skipif(shutil.which(shell.__name__) is None, reason="is not installed"),
    )
    for shell in (bash, fish, zsh)
]


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_and_option_is_offered(shell: Any, scripts: Path) -> None:
    seen = 0
    for path, command in commands(whole()):
        children = set(getattr(command, "commands", {}))
        if children:
            assert set(shell(scripts, "mycoswarmctl", *path, "")) >= children, path
        options = {
            name
            for param in command.params
            if param.param_type_name == "option"
            for name in (*param.opts, *param.secondary_opts)
            if name.startswith("--")
        } - {"--install-completion", "--show-completion", "--help"}
        assert set(shell(scripts, "mycoswarmctl", *path, "--")) == {*options, "--help"}, path
        seen += 1
    assert seen > 40


@pytest.mark.parametrize("shell", SHELLS)
def test_only_what_fits_is_offered(shell: Any, scripts: Path) -> None:
    assert shell(scripts, "mycoswarmctl", "po") == ["policy"]
    assert shell(scripts, "mycoswarmctl", "--node", "policy", "po") == ["policy"]
    assert shell(scripts, "mycoswarmctl", "policy", "explain", "--zone", "") == ["cloud", "lan", "self"]
    assert shell(scripts, "mycoswarmctl", "tasks", "--state", "que") == ["queued"]
    assert shell(scripts, "mycoswarmctl", "ask", "--model", "") == []
    assert shell(scripts, "mycoswarmd", "ch") == ["check"]
    assert "--swarm-listen" in shell(scripts, "mycoswarmd", "run", "--")
    assert shell(scripts, "mycoswarmd", "run", "--log-level", "w") == ["warning"]


@pytest.mark.parametrize("shell", SHELLS[:2])
def test_files_are_offered_where_files_are_meant(
    shell: Any, scripts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my policy.toml").touch()
    monkeypatch.chdir(tmp_path)
    assert "policy.toml" in " ".join(shell(scripts, "mycoswarmctl", "policy", "check", "my"))
    assert "policy.toml" in " ".join(shell(scripts, "mycoswarmctl", "enroll", "--token-file", "my"))
    assert shell(scripts, "mycoswarmctl", "revoke", "my") == []


@pytest.mark.skipif(shutil.which("zsh") is None, reason="is not installed")
def test_files_are_offered_by_zsh(scripts: Path) -> None:
    assert "FILES" in zsh(scripts, "mycoswarmctl", "policy", "check", "my")
    assert zsh(scripts, "mycoswarmctl", "enroll", "--token-file", "my") == ["FILES"]
    assert "FILES" not in zsh(scripts, "mycoswarmctl", "revoke", "my")


def text_of(directory: Path) -> dict[str, str]:
    return {str(one.relative_to(directory)): one.read_text() for one in directory.rglob("*") if one.is_file()}


def test_the_same_commands_give_the_same_scripts(scripts: Path, tmp_path: Path) -> None:
    assert len(text_of(scripts)) == 6
    again = made(tmp_path / "a", LC_ALL="C", PYTHONHASHSEED="7", COLUMNS="40", TERM="dumb")
    assert text_of(again) == text_of(scripts)


def test_the_distributions_typer_gives_the_same_scripts(scripts: Path, tmp_path: Path) -> None:
    python = "/usr/bin/python3"
    if subprocess.run([python, "-c", "import typer"], capture_output=True).returncode:
        pytest.skip("the distribution's typer is not installed")
    assert text_of(made(tmp_path / "a", python)) == text_of(scripts)
