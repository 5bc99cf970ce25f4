"""What holds for every test: nothing is left behind; and the embedded engine, installed once."""

import asyncio
import fcntl
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

# Twenty seconds in small steps: what was ended has gone by then, also where it got no processor for a while.
_GRACE_STEPS = 4000
_GRACE_STEP_S = 0.005


def children() -> set[int]:
    """Return the child processes of this one."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            found |= {int(pid) for pid in (task / "children").read_text().split()}
        except (FileNotFoundError, ProcessLookupError):
            continue  # the thread has just ended
    return found


@pytest_asyncio.fixture(autouse=True)
async def _settled() -> AsyncIterator[None]:
    """Fail any test that leaves a task or a child process behind."""
    before = children()
    yield
    me = asyncio.current_task()
    tasks: list[str] = []
    left: set[int] = set()
    for _ in range(_GRACE_STEPS):
        tasks = sorted(task.get_name() for task in asyncio.all_tasks() if task is not me)
        left = children() - before
        if not tasks and not left:
            return
        await asyncio.sleep(_GRACE_STEP_S)
    raise AssertionError(f"left behind: tasks={tasks} children={sorted(left)}")


@pytest.fixture(scope="session")
def embedded_engine() -> Path:
    """Return a state directory with the embedded engine and its model, installed by the real command."""
    base = os.environ.get("XDG_CACHE_HOME")
    state = (Path(base) if base else Path.home() / ".cache") / "mycoswarm-test"
    state.mkdir(parents=True, exist_ok=True)
    with (state / ".test-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several test processes, one installs
        command = [sys.executable, "-m", "mycoswarmd.ctl.main", "engine", "install", "--state", str(state)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return state


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the tests of the appliance could not show on this machine."""
    reports = [report for row in terminalreporter.stats.values() for report in row]
    found = [
        str(text)
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, text in report.user_properties
        if name == "unproved"
    ]
    if found:
        terminalreporter.section("not shown by the appliance tests on this machine")
        for text in found:
            terminalreporter.line(f"- {text}")
