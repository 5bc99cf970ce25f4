"""The policy file on disk: bad input is refused with a reason, and the last good policy stays."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from mycoswarmd.core.policy.evaluate import Permit, evaluate
from mycoswarmd.core.policy.parse import MAX_BYTES
from mycoswarmd.core.types import Action, Principal, Request
from mycoswarmd.daemon.policyfile import PolicyKeeper, load_policy, resolve_program, shipped_default
from mycoswarmd.errors import PolicyInvalid, StoreError

GOOD = b"""schema = 1
name = "good"
[[rule]]
id = "here"
why = "this machine answers"
effect = "allow"
action = "infer"
zone = ["self"]
"""
STRICTER = GOOD.replace(b'"good"', b'"stricter"') + b'label = { max = "internal" }\n'
PROMPT = Request(action=Action.INFER, principal=Principal(), model="m")


def write(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


def keep(path: Path, *, is_required: bool = False) -> PolicyKeeper:
    return PolicyKeeper(path, path.parent / "state", now_ms=lambda: 7, is_required=is_required)


def test_a_good_file_is_in_force_and_copied(tmp_path: Path) -> None:
    keeper = keep(write(tmp_path / "policy.toml", GOOD))
    assert keeper.policy is not None
    assert (keeper.policy.name, keeper.problem, keeper.loaded_at_ms) == ("good", "", 7)
    assert keeper.text == GOOD.decode()
    current = tmp_path / "state" / "policy" / "current"
    assert current.read_bytes() == GOOD
    assert current.readlink().name == f"{keeper.policy.sha256}.toml"
    assert stat.S_IMODE(current.stat().st_mode) == 0o600


def _huge(path: Path) -> None:
    write(path, GOOD + b"#" * (10 << 20))


def _not_utf8(path: Path) -> None:
    write(path, GOOD + b"# \xff\n")


def _world_writable(path: Path) -> None:
    write(path, GOOD, 0o646)


def _group_writable(path: Path) -> None:
    write(path, GOOD, 0o664)


def _link_out(path: Path) -> None:
    (path.parent / "elsewhere").mkdir()
    path.symlink_to(write(path.parent / "elsewhere" / "policy.toml", GOOD))


def _link_loop(path: Path) -> None:
    path.symlink_to(path)


def _fifo(path: Path) -> None:
    os.mkfifo(path, 0o600)


def _directory(path: Path) -> None:
    path.mkdir()


def _half(path: Path) -> None:
    write(path, GOOD[:-25])


def _binary(path: Path) -> None:
    write(path, b"\0" * 100)


def _unknown_key(path: Path) -> None:
    write(path, GOOD + b'lable = "x"\n')


def _failing_test(path: Path) -> None:
    write(path, GOOD + b'[[test]]\nname = "t"\nrequest = { action = "infer" }\nexpect = "deny"\n')


def _missing(path: Path) -> None:
    assert not path.exists()


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "huge": (_huge, "at most 262,144"),
    "not UTF-8": (_not_utf8, "not UTF-8"),
    "world-writable": (_world_writable, "others than its owner"),
    "group-writable": (_group_writable, "others than its owner"),
    "a link out": (_link_out, "link to another directory"),
    "a loop of links": (_link_loop, "circle"),
    "a FIFO": (_fifo, "not a regular file"),
    "a directory": (_directory, "not a regular file"),
    "half-written": (_half, "cannot"),
    "binary": (_binary, "TOML"),
    "an unknown key": (_unknown_key, "did you mean 'label'?"),
    "a failing test": (_failing_test, "expects deny"),
    "missing": (_missing, "no such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    make, expected = BAD[name]
    make(tmp_path / "policy.toml")
    with pytest.raises(PolicyInvalid) as caught:
        load_policy(tmp_path / "policy.toml")
    problem = caught.value.problems[0]
    assert problem.path == str(tmp_path / "policy.toml")
    assert expected in str(problem)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_at_reload_keeps_the_policy_in_force(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "policy.toml", GOOD)
    keeper = keep(path)
    path.unlink()
    BAD[name][0](path)
    before = keeper.policy
    with pytest.raises(PolicyInvalid):
        keeper.reload()
    assert keeper.policy is before
    assert "'good'" in keeper.problem
    assert "stays in force" in keeper.problem
    assert isinstance(evaluate(keeper.policy, PROMPT), Permit)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_at_start_falls_back_to_the_last_good_one(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "policy.toml", GOOD)
    keep(path)
    path.unlink()
    BAD[name][0](path)
    keeper = keep(path)
    assert keeper.text == GOOD.decode()
    assert "last good policy" in keeper.problem


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_with_no_earlier_one_denies_everything(tmp_path: Path, name: str) -> None:
    BAD[name][0](tmp_path / "policy.toml")
    keeper = keep(tmp_path / "policy.toml", is_required=True)
    assert keeper.policy is None
    assert "everything is denied" in keeper.problem
    assert not isinstance(evaluate(keeper.policy, PROMPT), Permit)


def test_a_stored_copy_that_was_changed_is_not_used(tmp_path: Path) -> None:
    path = write(tmp_path / "policy.toml", GOOD)
    keep(path)
    path.unlink()
    copy = (tmp_path / "state" / "policy" / "current").resolve()
    copy.write_bytes(GOOD.replace(b'zone = ["self"]', b'zone = ["self", "lan"]'))
    keeper = keep(path)
    assert keeper.policy is None
    assert "everything is denied" in keeper.problem


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_strangers_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "policy.toml", GOOD)
    os.chown(path, 12345, 12345)
    with pytest.raises(PolicyInvalid, match="belongs to uid 12345"):
        load_policy(path)


def test_a_link_inside_the_directory_is_read(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").symlink_to(write(tmp_path / "home.toml", GOOD))
    assert load_policy(tmp_path / "policy.toml").policy.name == "good"


def test_a_file_of_the_largest_size_is_read(tmp_path: Path) -> None:
    data = GOOD + b"#" * (MAX_BYTES - len(GOOD))
    assert load_policy(write(tmp_path / "policy.toml", data)).policy.name == "good"
    with pytest.raises(PolicyInvalid, match="262,145 bytes"):
        load_policy(write(tmp_path / "policy.toml", data + b"#"))


def test_a_file_that_grows_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "policy.toml", GOOD)
    read = os.read

    def grow(fd: int, size: int) -> bytes:
        data = read(fd, size)
        write(path, GOOD + b"# more\n")
        return data

    monkeypatch.setattr(os, "read", grow)
    with pytest.raises(PolicyInvalid, match="changed while it was read"):
        load_policy(path)


def test_reload_tells_requests_and_clears_the_problem(tmp_path: Path) -> None:
    path = write(tmp_path / "policy.toml", GOOD)
    keeper = keep(path)
    write(path, b"nonsense")
    with pytest.raises(PolicyInvalid):
        keeper.reload()
    write(path, STRICTER)
    reload = keeper.reload()
    assert reload.changed == ("now denied: infer zone=self label=private,secret (was allowed)",)
    assert keeper.problem == ""
    assert keeper.policy is not None
    assert keeper.policy.name == "stricter"
    assert keeper.reload().changed == ()


def test_without_a_file_the_shipped_policy_holds_at_every_start(tmp_path: Path) -> None:
    for _ in range(2):
        keeper = keep(tmp_path / "policy.toml")
        assert keeper.policy is not None
        assert (keeper.policy.name, keeper.problem) == ("default", "")
        assert keeper.text == shipped_default().decode()
        assert keeper.reload().changed == ()


def test_a_file_written_later_replaces_the_shipped_policy(tmp_path: Path) -> None:
    keeper = keep(tmp_path / "policy.toml")
    write(tmp_path / "policy.toml", GOOD)
    assert any("admin" in line for line in keeper.reload().changed)
    assert keeper.policy is not None
    assert keeper.policy.name == "good"


def test_a_copy_that_cannot_be_kept_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "policy.toml", GOOD)
    keeper = keep(path)
    copies = tmp_path / "state" / "policy"
    copies.rename(tmp_path / "gone")
    copies.write_text("in the way")
    write(path, STRICTER)
    with pytest.raises(StoreError, match="cannot keep a copy"):
        keeper.reload()
    assert keeper.policy is not None
    assert keeper.policy.name == "good"


def test_a_copy_that_is_there_is_not_written_again_and_a_damaged_one_is(tmp_path: Path) -> None:
    """On a full disk the node starts again all the same."""
    path = write(tmp_path / "policy.toml", GOOD)
    keep(path)
    current = tmp_path / "state" / "policy" / "current"
    before = current.stat().st_ino
    keep(path)
    assert current.stat().st_ino == before
    current.resolve().write_bytes(GOOD[:-1])
    assert keep(path).problem == ""
    assert current.read_bytes() == GOOD


def test_programs_are_those_of_the_system() -> None:
    found = resolve_program("cat")
    assert found is not None
    assert Path(found).is_absolute()
    assert resolve_program("no-such-program-anywhere") is None
    assert resolve_program(found) == found


def test_a_program_never_depends_on_where_the_node_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = write(tmp_path / "tool", b"#!/bin/sh\n", 0o755)
    monkeypatch.chdir(tmp_path)
    assert resolve_program("./tool") is None
    assert resolve_program(f"../{tmp_path.name}/tool") is None
    assert resolve_program(str(tool)) == str(tool)
