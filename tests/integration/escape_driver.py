"""Opens cages as another user than the test and says on standard output what came of it, as JSON.

Requests come on standard input: {"do": "probe" | ..., ...}. Needs nothing but the standard library and
this package, so that the system's Python can run it as well as the tests' own.
"""

import asyncio
import json
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mycoswarmd.core.types import CageSpec, Limits
from mycoswarmd.errors import CageError
from mycoswarmd.sandbox.bwrap import BubblewrapCages, start_session
from mycoswarmd.sandbox.host import read_host
from mycoswarmd.sandbox.seccomp import build_filter
from mycoswarmd.sandbox.spec import Identity, Operation, command, confinement, operations
from mycoswarmd.sandbox.zipapp import build_agent, build_zip
from mycoswarmd.wire.frames import Frame, FrameType

HERE = Path(__file__).parent
NOWHERE = Path("/nonexistent")
LIMITS = Limits(wall_s=300, memory_bytes=256 << 20, processes=24, disk_bytes=8 << 20)
Body = dict[str, Any]
Mutation = Callable[[list[Operation], Body], tuple[list[Operation], Body]]


def make_spec(programs: tuple[str, ...] = ()) -> CageSpec:
    """Return the rights of the cages of this suite."""
    return CageSpec(
        task_id="escape", attempt=1, read_paths=(".",), write_paths=(".",), programs=programs, limits=LIMITS
    )


def probing_zip() -> bytes:
    """Return the agent's code with a main module that runs what the job says."""
    package = Path(sys.modules[CageError.__module__].__file__ or "").parent
    names = [
        "__init__.py",
        "errors.py",
        *(f"agent/{name}.py" for name in ("__init__", "channel", "confine", "prove")),
    ]
    names += [f"wire/{name}.py" for name in ("__init__", "frames", "jsonv")]
    modules = {f"mycoswarmd/{name}": (package / name).read_text("utf-8") for name in names}
    modules["mycoswarmd/cage_agent.py"] = (HERE / "cage_agent.py").read_text("utf-8")
    return build_zip({**modules, "__main__.py": "from mycoswarmd.cage_agent import main\n\nmain()\n"})


async def probe(request: Body) -> object:
    """Run probes in a cage; with `through` by a program that the cage allows."""
    cages = BubblewrapCages(probing_zip(), NOWHERE)
    session = await cages.open(make_spec(tuple(request["programs"])))
    source = (HERE / "escape_probes.py").read_text("utf-8")
    arguments = json.dumps(request["run"])
    text = f"__name__ = 'escape'\n{source}\nimport json\nresult = run(*json.loads({arguments!r}))\n"
    if request["through"]:
        argv = [*request["through"], text + "print(json.dumps(result))\n"]
        text = f"import json, subprocess\nresult = json.loads(subprocess.check_output({argv!r}))\n"
    try:
        await session.send(Frame(FrameType.JOB, {"prompt": text}))
        return (await session.receive()).body["result"]
    finally:
        await session.close()


async def mutate(_: Body) -> object:
    """Build one cage for each mutation and return how it was refused; "accepted" where it was not."""
    host, identity = read_host(), BubblewrapCages(b"", NOWHERE).identity(0)
    is_root = os.geteuid() == 0
    found = {}
    for name, mutation in mutations(host.python):
        spec = make_spec()
        steps, body = mutation(
            list(operations(spec, host, identity, build_agent())), confinement(spec, host, identity)
        )
        program = build_filter(host.machine, may_execute=False)
        if name == "seccomp: a filter that allows all":
            program = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)
        switched: Identity | None = identity if is_root and name != "uid: root's" else None
        found[name] = await refusal(steps, command(host), switched, Frame(FrameType.CONFINE, body, program))
    return found


async def refusal(
    steps: list[Operation], argv: tuple[str, ...], identity: Identity | None, confine: Frame
) -> str:
    session = await start_session(steps, argv, identity=identity, wall_s=30)
    try:
        await session.prove(confine)
    except CageError as exc:
        return f"{exc.code}: {exc.message}"
    await session.close()
    return "accepted"


def without(option: str, *arguments: str) -> Mutation:
    """Drop one of bubblewrap's operations."""

    def mutation(steps: list[Operation], body: Body) -> tuple[list[Operation], Body]:
        kept = [step for step in steps if (step.option, *step.arguments) != (option, *arguments)]
        assert len(kept) == len(steps) - 1
        return kept, body

    return mutation


def instead(old: tuple[str, ...], *new: tuple[str, ...]) -> Mutation:
    """Replace one of bubblewrap's operations by others."""

    def mutation(steps: list[Operation], body: Body) -> tuple[list[Operation], Body]:
        place = next(n for n, step in enumerate(steps) if (step.option, *step.arguments) == old)
        steps[place : place + 1] = [Operation(option, tuple(arguments)) for option, *arguments in new]
        return steps, body

    return mutation


def without_step(do: str, **fields: object) -> Mutation:
    """Drop one of the agent's own steps."""

    def mutation(steps: list[Operation], body: Body) -> tuple[list[Operation], Body]:
        wanted = {"do": do, **fields}
        kept = [step for step in body["steps"] if not wanted.items() <= step.items()]
        assert len(kept) == len(body["steps"]) - 1
        return steps, {**body, "steps": kept}

    return mutation


def with_rule(path: str, *accesses: str) -> Mutation:
    """Add a Landlock rule."""

    def mutation(steps: list[Operation], body: Body) -> tuple[list[Operation], Body]:
        for step in body["steps"]:
            if step["do"] == "landlock":
                step["rules"] = [*step["rules"], [path, list(accesses)]]
        return steps, body

    return mutation


def changed_step(do: str, path: str, **fields: object) -> Mutation:
    """Weaken one of the agent's own steps."""

    def mutation(steps: list[Operation], body: Body) -> tuple[list[Operation], Body]:
        for step in body["steps"]:
            if step["do"] == do and step.get("path") == path:
                step.update(fields)
        return steps, body

    return mutation


def unchanged(steps: list[Operation], body: Body) -> tuple[list[Operation], Body]:
    """Change nothing: what is wrong is elsewhere."""
    return steps, body


def mutations(python: str) -> Iterator[tuple[str, Mutation]]:
    """Name each mechanism with a cage that lacks it, or has it weakened."""
    yield "nothing", unchanged
    # Without --unshare-user an unprivileged bubblewrap makes a user namespace all the same, and it always
    # sets no_new_privs: those two have nothing to lose here.
    for kind in ("net", "pid", "ipc", "uts", "cgroup-try"):
        yield f"namespace: {kind}", without(f"--unshare-{kind}")
    yield "bubblewrap: dies with the node", without("--die-with-parent")
    yield "bubblewrap: new session", without("--new-session")
    yield "bubblewrap: environment", instead(("--clearenv",), ("--setenv", "ESCAPE_SECRET", "1"))
    yield "bubblewrap: /usr is read-only", instead(("--ro-bind", "/usr", "/usr"), ("--bind", "/usr", "/usr"))
    yield "bubblewrap: the root is read-only", without("--remount-ro", "/")
    yield "bubblewrap: few devices", instead(("--dir", "/dev"), ("--dev", "/dev"))
    yield "bubblewrap: own processes", instead(("--proc", "/proc"), ("--ro-bind", "/proc", "/proc"))
    yield "bubblewrap: capabilities to confine with", without("--cap-add", "CAP_SETPCAP")
    for path in ("/workspace", "/tmp"):
        flags = ["nosuid", "nodev"]
        yield f"mount: {path} runs nothing", changed_step("remount", path, flags=flags)
        yield f"mount: {path} is bounded", changed_step("remount", path, bytes=1 << 40)
        yield f"mount: {path} holds few files", changed_step("remount", path, files=1 << 30)
    for name in ("AS", "DATA", "NPROC", "FSIZE", "CPU", "NOFILE", "CORE"):
        yield f"rlimit: {name}", without_step("rlimit", name=name)
    yield "capabilities", without_step("drop-capabilities")
    yield "landlock", without_step("landlock")
    yield "landlock: reads /usr/bin", with_rule("/usr/bin", "read-file", "read-dir")
    yield "landlock: reads /proc", with_rule("/proc", "read-file", "read-dir")
    yield "landlock: runs a program", with_rule(python, "read-file", "execute")
    yield "seccomp", without_step("seccomp")
    yield "seccomp: a filter that allows all", unchanged
    if os.geteuid() == 0:
        yield "uid: root's", unchanged


async def old_kernels(_: Body) -> object:
    """Open a cage as on kernels with each Landlock, from none to the newest; say what it lacked."""
    found = []
    for abi in range(8):
        host = replace(read_host(), landlock_abi=abi)
        who = BubblewrapCages(b"", NOWHERE).identity(0)
        spec = make_spec()
        session = await start_session(
            operations(spec, host, who, build_agent()),
            command(host),
            identity=who if os.geteuid() == 0 else None,
            wall_s=30,
        )
        program = build_filter(host.machine, may_execute=False)
        await session.prove(Frame(FrameType.CONFINE, confinement(spec, host, who), program))
        found.append({"held": len(session.proof.held), "absent": session.proof.absent})
        await session.close()
    return found


async def measure(request: Body) -> object:
    """Return the milliseconds to an open cage, the least of some."""
    cages, found = BubblewrapCages(build_agent(), NOWHERE), []
    for _ in range(request["count"]):
        started_s = time.perf_counter()
        session = await cages.open(replace(make_spec(), limits=Limits()))
        found.append((time.perf_counter() - started_s) * 1000)
        await session.close()
    return {"best_ms": min(found)}


ACTIONS = {"probe": probe, "mutate": mutate, "old-kernels": old_kernels, "measure": measure}

if __name__ == "__main__":
    asked = json.load(sys.stdin)
    print(json.dumps(asyncio.run(ACTIONS[asked["do"]](asked))))
