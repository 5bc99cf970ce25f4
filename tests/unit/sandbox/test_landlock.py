"""Landlock rules as data."""

import pytest

from mycoswarmd.sandbox.landlock import compile_rules, is_narrow, narrow_rules, system_rules
from tests.unit.sandbox.hosts import GIT, LS, PYTHON, make_host, make_spec

EXECUTABLE = "execute"


def may(rules: tuple[tuple[str, tuple[str, ...]], ...], access: str) -> set[str]:
    return {path for path, accesses in rules if access in accesses}


def test_without_programs_nothing_is_executable() -> None:
    assert may(compile_rules(make_spec(), make_host()), EXECUTABLE) == set()


def test_programs_their_helpers_and_the_loader_are_executable_and_nothing_else() -> None:
    host = make_host()
    rules = compile_rules(make_spec(programs=(GIT, LS)), host)
    assert may(rules, EXECUTABLE) == {GIT, LS, "/usr/lib/git-core", host.loader}


@pytest.mark.parametrize("programs", [(), (LS,), (PYTHON,)])
def test_no_program_directory_is_readable(programs: tuple[str, ...]) -> None:
    rules = compile_rules(make_spec(programs=programs), make_host())
    readable = may(rules, "read-file")
    assert not readable & {
        "/",
        "/usr",
        "/usr/bin",
        "/usr/sbin",
        "/usr/lib",
        "/usr/libexec",
        "/usr/lib/git-core",
    }
    assert {path for path in readable if path.startswith("/usr/bin/")} == set(programs)


def test_packages_are_readable_for_an_allowed_python_only() -> None:
    assert "/usr/lib/python3" not in may(compile_rules(make_spec(programs=(LS,)), make_host()), "read-file")
    assert "/usr/lib/python3" in may(compile_rules(make_spec(programs=(PYTHON,)), make_host()), "read-file")


def test_unpacking_may_write_the_whole_workspace_and_the_work_only_its_paths() -> None:
    spec = make_spec(read_paths=(".",), write_paths=("src", "out"))
    assert is_narrow(spec)
    assert {"/workspace", "/tmp"} <= may(compile_rules(spec, make_host()), "write-file")
    work = narrow_rules(spec, make_host())
    writable = may(work, "write-file")
    assert {path for path in writable if not path.startswith("/dev/")} == {
        "/tmp",
        "/workspace/src",
        "/workspace/out",
    }
    assert may(work, "read-file") >= {"/workspace", "/workspace/src", "/workspace/out"}


def test_an_empty_list_of_writable_paths_means_nothing() -> None:
    spec = make_spec(write_paths=())
    assert is_narrow(spec)
    writable = may(narrow_rules(spec, make_host()), "write-file")
    assert not {path for path in writable if path.startswith("/workspace")}


def test_no_special_files_can_be_made() -> None:
    rules = compile_rules(make_spec(programs=(PYTHON,)), make_host())
    assert not any(may(rules, access) for access in ("make-char", "make-block", "make-sock", "make-fifo"))


def test_each_path_has_one_rule() -> None:
    paths = [path for path, _ in system_rules(make_spec(programs=(GIT, PYTHON, LS)), make_host())]
    assert len(paths) == len(set(paths))
