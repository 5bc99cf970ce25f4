"""Opens cages on a machine as the node does, and says on standard output what came of it, as JSON.

Runs on a booted machine with the system's Python. Requests come on standard input: {"do": ..., ...}.
"""

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mycoswarmd.core.types import CageSpec, Limits
from mycoswarmd.errors import CageError
from mycoswarmd.sandbox.systemdcage import SOCKET, SystemdCages, SystemdSession
from mycoswarmd.wire.frames import Frame, FrameType

Body = dict[str, Any]
HERE = Path(__file__).parent


def make_spec(programs: tuple[str, ...] = (), **limits: int) -> CageSpec:
    """Return the rights of a task."""
    return CageSpec(
        task_id="t",
        attempt=1,
        read_paths=(".",),
        write_paths=(".",),
        programs=programs,
        limits=Limits(**limits),
    )


@asynccontextmanager
async def cage(request: Body, cages: SystemdCages | None = None) -> AsyncIterator[SystemdSession]:
    """Open a cage as the request says, and close it."""
    path = Path(request.get("socket", SOCKET))
    makes = cages or SystemdCages(path, keep_spare=False)
    spec = make_spec(tuple(request.get("programs", ())), **request.get("limits", {}))
    session = await makes.open(spec)
    try:
        yield session
    finally:
        await session.close()


async def do(session: SystemdSession, code: str) -> Any:
    """Run Python in a cage whose agent does that; return its variable `result`."""
    await session.send(Frame(FrameType.JOB, {"prompt": code}))
    return (await session.receive()).body["result"]


async def prove(request: Body) -> object:
    """Open a cage and return what it proved, or why it did not."""
    try:
        async with cage(request) as session:
            proof = session.proof
            return {
                "level": proof.level,
                "held": proof.held,
                "absent": proof.absent,
                "can": SystemdCages().level,
            }
    except CageError as exc:
        return {"refused": f"{exc.code}: {exc.message}"}


async def mutate(request: Body) -> object:
    """Open a cage of each unit, one after the other; say how each was refused, or what it lacked."""
    found = {}
    for name in request["units"]:
        said = await prove(
            {**request, "socket": f"/run/mycoswarm-outposts/{name.removeprefix('mycoswarm-')}.sock"}
        )
        assert isinstance(said, dict)
        found[name] = said.get("refused") or f"accepted, absent: {' '.join(said['absent'])}"
    return found


async def probe(request: Body) -> object:
    """Run probes of the escape suite in a cage; with `through` by a program that the cage allows."""
    source = (HERE / "escape_probes.py").read_text("utf-8")
    arguments = json.dumps(request["run"])
    text = f"__name__ = 'escape'\n{source}\nimport json\nresult = run(*json.loads({arguments!r}))\n"
    if request["through"]:
        argv = [*request["through"], text + "print(json.dumps(result))\n"]
        text = f"import json, subprocess\nresult = json.loads(subprocess.check_output({argv!r}))\n"
    async with cage(request) as session:
        return await do(session, text)


async def run(request: Body) -> object:
    """Run Python in a cage, close it, and return what it gave, and how long the end took."""
    async with cage(request) as session:
        result = await do(session, request["code"])
        started_s = time.perf_counter()
    return {"result": result, "pid": session.pid, "closed_s": time.perf_counter() - started_s}


async def hold(request: Body) -> object:
    """Run Python in a cage, say what it gave, and wait to be killed."""
    async with cage(request) as session:
        print(json.dumps(await do(session, request["code"])), flush=True)
        await asyncio.sleep(600)
    return None


async def ends(request: Body) -> object:
    """Run Python that does not answer; return the code of the error with which it, or its beginning, ends."""
    try:
        async with cage(request) as session:
            return {"result": await do(session, request["code"])}
    except CageError as exc:
        return {"code": exc.code}


async def several(request: Body) -> object:
    """Run Python in some cages, one after the other, of one maker that keeps a spare."""
    cages = SystemdCages()
    found = []
    try:
        for _ in range(request["count"]):
            async with cage(request, cages) as session:
                found.append(await do(session, request["code"]))
    finally:
        cages.close()
    return found


async def beside(request: Body) -> object:
    """Run Python in two cages at the same time."""
    cages = SystemdCages(Path(request.get("socket", SOCKET)), keep_spare=False)
    async with cage(request, cages) as first, cage(request, cages) as second:
        return [await do(session, request["code"]) for session in (first, second)]


async def measure(request: Body) -> object:
    """Return the milliseconds to an open cage: built anew each time, or with one that waits."""
    found: dict[str, list[float]] = {"cold": [], "spare": []}
    for kind, times in found.items():
        cages = SystemdCages(keep_spare=kind == "spare")
        for _ in range(request["count"]):
            started_s = time.perf_counter()
            async with cage({}, cages):
                times.append((time.perf_counter() - started_s) * 1000)
                await asyncio.sleep(request["task_s"])
        cages.close()
    return {kind: statistics.median(times) for kind, times in found.items()}


ACTIONS = {
    action.__name__: action for action in (prove, mutate, probe, run, hold, ends, several, beside, measure)
}

if __name__ == "__main__":
    asked = json.loads(sys.argv[1]) if len(sys.argv) > 1 else json.load(sys.stdin)
    os.umask(0o077)
    print(json.dumps(asyncio.run(ACTIONS[asked["do"]](asked))))
