"""A machine as data, so that what is compiled for it does not depend on the one that runs the tests."""

from mycoswarmd.core.types import CageSpec, Limits
from mycoswarmd.sandbox.host import Host
from mycoswarmd.sandbox.spec import Identity

WHO = Identity(1_900_000_007, 1_900_000_007)
GIT, PYTHON, LS = "/usr/bin/git", "/usr/bin/python3.11", "/usr/bin/ls"


def make_host(*, landlock_abi: int = 7, machine: str = "x86_64") -> Host:
    return Host(
        machine=machine,
        landlock_abi=landlock_abi,
        namespaces={"net": "net:[1]", "user": "user:[2]", "cgroup": ""},
        root_links={"bin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64"},
        etc=("/etc/alternatives", "/etc/ld.so.cache"),
        python=PYTHON,
        loader="/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
        readable=("/usr/lib/x86_64-linux-gnu", "/usr/share"),
        python_paths=("/usr/lib/python3.11",),
        package_paths=("/usr/lib/python3",),
        helpers={GIT: "/usr/lib/git-core"},
        decoys=("/usr/bin/env", "/usr/bin/id"),
    )


def make_spec(
    *,
    programs: tuple[str, ...] = (),
    read_paths: tuple[str, ...] = (".",),
    write_paths: tuple[str, ...] = (".",),
    limits: Limits | None = None,
) -> CageSpec:
    return CageSpec(
        task_id="t-1",
        attempt=2,
        read_paths=read_paths,
        write_paths=write_paths,
        programs=programs,
        limits=limits or Limits(),
    )
