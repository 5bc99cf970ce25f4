"""agent/program: argv only, bounded, killed with its group, and stopped when the node says so."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mycoswarmd.agent.files import OUTPUT_BYTES, Outcome
from mycoswarmd.agent.program import Output, find_program, run_program, sweep
from mycoswarmd.agent.tools import Workbench
from mycoswarmd.errors import CageError

PYTHON = "/usr/bin/python3"


def run(
    tmp_path: Path,
    *argv: str,
    stdin: str = "",
    wall_s: float = 60,
    on_watch: Callable[[], None] = lambda: None,
    signal_now: bool = False,
) -> Outcome:
    reader, writer = os.pipe()
    try:
        if signal_now:
            os.write(writer, b"!")
        return run_program(
            list(argv),
            stdin,
            directory=str(tmp_path),
            wall_s=wall_s,
            watch=(reader, on_watch),
            sweep_rest=lambda: None,
        )
    finally:
        os.close(reader)
        os.close(writer)


def python(tmp_path: Path, code: str, **options: object) -> Outcome:
    return run(tmp_path, PYTHON, "-I", "-c", code, **options)  # type: ignore[arg-type]


def test_output_and_exit_status_come_back(tmp_path: Path) -> None:
    outcome = python(tmp_path, "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    assert not outcome.ok
    assert sorted(outcome.text.splitlines()) == ["[exit status 3]", "err", "out"]


def test_there_is_no_shell(tmp_path: Path) -> None:
    assert run(tmp_path, "/bin/echo", "$HOME; touch x", "`id`").text.startswith("$HOME; touch x `id`\n")
    assert list(tmp_path.iterdir()) == []


def test_input_is_fed_and_ends(tmp_path: Path) -> None:
    text = "line\n" * 100_000  # more than a pipe holds, both ways
    outcome = python(tmp_path, "import sys; d = sys.stdin.read(); print(len(d)); print(d)", stdin=text)
    assert outcome.text.startswith("500000\nline\n")


def test_a_program_that_reads_nothing_of_its_input_ends(tmp_path: Path) -> None:
    assert run(tmp_path, "/bin/true", stdin="x" * 1_000_000).ok


def test_output_without_end_is_bounded_head_and_tail(tmp_path: Path) -> None:
    outcome = python(tmp_path, "print('first'); print('x' * 5_000_000); print('last')")
    assert outcome.text.startswith("first\n")
    assert "bytes left out]" in outcome.text
    assert outcome.text.endswith("last\n[exit status 0]")
    assert len(outcome.text) < OUTPUT_BYTES + 200


def test_the_bound_keeps_every_byte_that_fits() -> None:
    output = Output()
    for piece in (b"a" * 10, b"b" * (OUTPUT_BYTES - 10)):
        output.add(piece)
    assert output.text() == "a" * 10 + "b" * (OUTPUT_BYTES - 10)
    output.add(b"c")
    assert "[1 bytes left out]" in output.text()


def test_the_environment_is_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "s3")
    outcome = run(tmp_path, "/usr/bin/env")
    assert "SECRET_TOKEN" not in outcome.text
    assert f"HOME={tmp_path}" in outcome.text


def test_a_program_that_runs_too_long_is_killed_with_its_group(tmp_path: Path) -> None:
    code = (
        "import os, subprocess, time\np = subprocess.Popen(['/bin/sleep', '600'])\n"
        "open('new', 'w').write(str(p.pid)); os.rename('new', 'pid')\ntime.sleep(600)"
    )
    started = time.monotonic()
    for wall_s in (1.5, 6, 24):  # longer where the machine was so slow that it had not begun
        outcome = python(tmp_path, code, wall_s=wall_s)
        assert not outcome.ok and outcome.text.endswith(f"[killed: it ran longer than {wall_s:g} s]")
        if (tmp_path / "pid").exists():
            break
    assert time.monotonic() - started < 60
    wait_gone(int((tmp_path / "pid").read_text()))


def test_a_background_child_holds_nobody_up(tmp_path: Path) -> None:
    code = (
        "import subprocess; p = subprocess.Popen(['/bin/sleep', '600'])\n"
        "open('pid', 'w').write(str(p.pid)); print('done')"
    )
    started = time.monotonic()
    assert python(tmp_path, code).text.startswith("done\n")
    assert time.monotonic() - started < 60
    wait_gone(int((tmp_path / "pid").read_text()))


def test_a_cancel_during_the_run_kills_and_goes_through(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    started = time.monotonic()
    with pytest.raises(Stop):
        run(tmp_path, "/bin/sleep", "600", on_watch=stop, signal_now=True)
    assert time.monotonic() - started < 60


def test_sweep_refuses_outside_a_process_namespace() -> None:
    # Were it not to refuse, it would kill this test, and you would see that too.
    with pytest.raises(CageError, match="namespace"):
        sweep()


def test_only_allowed_programs_are_found() -> None:
    programs = ("/usr/bin/git", "/usr/bin/python3")
    assert find_program("git", programs) == "/usr/bin/git"
    assert find_program("/usr/bin/git", programs) == "/usr/bin/git"
    assert find_program("/tmp/git", programs) is None
    assert find_program("./git", programs) is None
    assert find_program("sh", programs) is None
    assert find_program("git", ()) is None


def test_the_bench_says_what_is_allowed(root: int, tmp_path: Path) -> None:
    bench = Workbench(
        root=root,
        directory=str(tmp_path),
        programs=("/bin/echo",),
        watch=(root, lambda: None),
        sweep=lambda: None,
    )
    assert bench.perform("run", {"program": "sh", "args": ["-c", "id"]}).text.endswith("Allowed: echo.")
    assert "NUL" in bench.perform("run", {"program": "echo", "args": ["a\0b"]}).text
    assert bench.perform("fs_read", {"path": "../x"}).text.startswith("fs_read failed: ")
    assert bench.perform("fs_read", {"path": "none"}).text == "fs_read failed: No such file or directory."


def wait_gone(pid: int) -> None:
    """Wait until a killed process is gone or only waits for its parent."""
    for _ in range(1200):
        try:
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} still runs")
