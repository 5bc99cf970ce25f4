"""Landlock rules of a cage as plain data: which path, which accesses. Applied inside by agent/confine.py.

Law: what is not named cannot be opened. Programs are named one by one; the dynamic loader is executable
only where some program is, and writable mounts are noexec besides, so that `ld.so ./file` runs nothing.

Source: landlock(7).
"""

from collections.abc import Iterable

from mycoswarmd.core.types import CageSpec
from mycoswarmd.sandbox.host import Host

Rule = tuple[str, tuple[str, ...]]

WORKSPACE, TEMPORARY = "/workspace", "/tmp"  # noqa: S108  (the cage's own)
READ = ("read-file", "read-dir")
WRITE = (
    "write-file", "truncate", "remove-dir", "remove-file", "make-dir", "make-reg", "make-sym", "refer",
)  # fmt: skip
EXECUTE = ("read-file", "execute")
DEVICES = ("/dev/full", "/dev/null", "/dev/random", "/dev/urandom", "/dev/zero")


def compile_rules(spec: CageSpec, host: Host) -> tuple[Rule, ...]:
    """Return the rules for the time of unpacking: the system's, and all of the workspace."""
    return (*system_rules(spec, host), (WORKSPACE, READ + WRITE))


def narrow_rules(spec: CageSpec, host: Host) -> tuple[Rule, ...]:
    """Return the rules for the work itself: the system's, and the task's paths in the workspace."""
    return (
        *system_rules(spec, host),
        *((inside(path), READ) for path in spec.read_paths if path not in spec.write_paths),
        *((inside(path), READ + WRITE) for path in spec.write_paths),
    )


def is_narrow(spec: CageSpec) -> bool:
    """Tell whether the task may use less than its whole workspace."""
    return "." not in spec.write_paths


def inside(path: str) -> str:
    """Return where a workspace path is in the cage."""
    return WORKSPACE if path == "." else f"{WORKSPACE}/{path}"


def system_rules(spec: CageSpec, host: Host) -> tuple[Rule, ...]:
    """Return the rules that do not concern the workspace."""
    return tuple(_merge(_system(spec, host)).items())


def _system(spec: CageSpec, host: Host) -> Iterable[Rule]:
    yield from ((path, READ) for path in (*host.readable, *host.python_paths, "/etc", host.code))
    yield from ((path, ("read-file", "write-file", "truncate")) for path in DEVICES)
    yield from ((path, ("read-file",)) for path in host.kernel_facts)
    yield TEMPORARY, READ + WRITE
    if spec.programs:
        yield host.loader, EXECUTE
    for program in spec.programs:
        yield program, EXECUTE
        if program in host.helpers:
            yield host.helpers[program], EXECUTE + READ
    if host.python in spec.programs:
        yield from ((path, READ) for path in host.package_paths)


def _merge(rules: Iterable[Rule]) -> dict[str, tuple[str, ...]]:
    merged: dict[str, tuple[str, ...]] = {}
    for path, accesses in rules:
        merged[path] = tuple(dict.fromkeys((*merged.get(path, ()), *accesses)))
    return merged
