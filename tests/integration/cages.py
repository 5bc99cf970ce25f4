"""Cages with a scripted agent, and what is left of them on the machine."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from mycoswarmd.core.types import CageSpec, Limits
from mycoswarmd.sandbox import zipapp
from mycoswarmd.sandbox.bwrap import BubblewrapCages
from mycoswarmd.sandbox.session import BubblewrapSession
from mycoswarmd.wire.frames import Frame, FrameType

HERE = Path(__file__).parent
PYTHON = str(Path("/usr/bin/python3").resolve())


def agent_zip(main: str | None = None) -> bytes:
    """Return the agent with another main module: by default one that runs the Python it is sent as a job."""
    modules = {"__main__.py": "from mycoswarmd.agent.main import main\n\nmain()\n"}
    for pattern in zipapp.PARTS:
        for path in sorted(zipapp.PACKAGE.glob(pattern)):
            modules[f"mycoswarmd/{path.relative_to(zipapp.PACKAGE).as_posix()}"] = path.read_text()
    modules["mycoswarmd/agent/main.py"] = main or (HERE / "cage_agent.py").read_text()
    return zipapp.build_zip(modules)


def make_spec(
    *,
    programs: tuple[str, ...] = (),
    read_paths: tuple[str, ...] = (".",),
    write_paths: tuple[str, ...] = (".",),
    limits: Limits | None = None,
) -> CageSpec:
    return CageSpec(
        task_id="t-1",
        attempt=1,
        read_paths=read_paths,
        write_paths=write_paths,
        programs=tuple(str(Path(program).resolve()) for program in programs),
        limits=limits or Limits(wall_s=60),
    )


@asynccontextmanager
async def cage(
    spec: CageSpec | None = None, *, cages: BubblewrapCages | None = None
) -> AsyncIterator[BubblewrapSession]:
    """Open a cage whose agent runs Python, and close it."""
    session = await (cages or BubblewrapCages(agent_zip(), Path("/nonexistent"))).open(spec or make_spec())
    try:
        yield session
    finally:
        await session.close()


async def do(session: BubblewrapSession, code: str) -> object:
    """Run Python in the cage and return its variable `result`, or what it raised."""
    await session.send(Frame(FrameType.JOB, {"prompt": code}))
    return (await session.receive()).body["result"]


def processes_in(namespace: str) -> set[int]:
    """Return the processes of a pid namespace that have not ended, as this machine numbers them."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                is_over = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
                if not is_over and str((entry / "ns/pid").readlink()) == namespace:
                    found.add(int(entry.name))
            except OSError:
                continue
    return found


# Where bubblewrap mounts, inside a cage and while it builds one; elsewhere others mount at any time.
_MOUNT_POINTS = re.compile(r"(/tmp)?/(newroot|oldroot|workspace)(/.*)?|/tmp")


def left_on_machine() -> tuple[list[str], list[str], int]:
    """Return what a leak would change: descriptors, mounts of cages and child processes of this process."""
    fds = sorted(path.name for path in Path("/proc/self/fd").iterdir())
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    mounts = [point for point in points if _MOUNT_POINTS.fullmatch(point)]
    children = sum(
        len(path.read_text().split()) for path in Path("/proc/self/task").glob("*/children") if path.exists()
    )
    return fds, mounts, children
