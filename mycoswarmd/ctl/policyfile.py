"""A policy file read on this side, by the same code as the daemon's: check, test, prove.

Reading is simpler than the daemon's, since nothing is put in force here: a regular file of at most
256 KiB. Owner and mode are the daemon's to judge.
"""

import os
import shutil
import stat
from pathlib import Path

from mycoswarmd.core.policy.check import PolicyTestResult, check_policy, run_tests
from mycoswarmd.core.policy.parse import parse_policy
from mycoswarmd.core.policy.prove import ProofResult, prove
from mycoswarmd.core.policy.request import describe
from mycoswarmd.ctl.refusals import Doc
from mycoswarmd.errors import ConfigError, Problem

# As the daemon has it: a policy is read by people; a larger file is no policy.
_MAX_BYTES = 256 << 10
# As the daemon has it: programs of the system, never those of the caller's PATH.
_PATH = "/usr/bin:/bin"


def check(path: Path, text: str | None) -> Doc:
    """Check a policy wholly; PolicyInvalid holds every problem.

    Args:
        path: the file.
        text: what to check instead of the file's contents, for a policy that is in no file.
    """
    checked = check_policy(_data(path, text), path=str(path), resolve_program=find_program)
    policy = checked.policy
    return {
        "name": policy.name,
        "path": str(path),
        "sha256": policy.sha256,
        "rules": len(policy.rules),
        "locked": checked.is_locked,
        "warnings": [_row(problem) for problem in checked.warnings],
        "tests": [_case(result) for result in checked.tests],
        "proofs": [_proof(result) for result in checked.proofs],
    }


def run_cases(path: Path, text: str | None) -> Doc:
    """Run the [[test]] cases of a file that parses, and report also those that fail."""
    policy, _ = parse_policy(_data(path, text), path=str(path), resolve_program=find_program)
    rows = [_case(result) for result in run_tests(policy)]
    return {"path": str(path), "ok": all(row["ok"] for row in rows), "tests": rows}


def prove_all(path: Path, text: str | None) -> Doc:
    """Try to prove each invariant of a file that parses, and report also those that do not hold."""
    policy, _ = parse_policy(_data(path, text), path=str(path), resolve_program=find_program)
    rows = [_proof(result) for result in prove(policy)]
    return {"path": str(path), "ok": all(row["holds"] for row in rows), "proofs": rows}


def read_file(path: Path) -> bytes:
    """Read a regular file of bounded size; ConfigError otherwise."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ConfigError("policy-unreadable", f"cannot read {str(path)!r}: it is no regular file")
            data = file.read(_MAX_BYTES + 1)
    except OSError as exc:
        raise ConfigError("policy-unreadable", f"cannot read {str(path)!r}: {exc.strerror}") from exc
    if len(data) > _MAX_BYTES:
        raise ConfigError("policy-unreadable", f"cannot read {str(path)!r}: more than {_MAX_BYTES} bytes")
    return data


def find_program(name: str) -> str | None:
    """Return the file that would run for a program's name, or None."""
    found = shutil.which(name, path=_PATH)
    return os.path.realpath(found) if found else None


def _data(path: Path, text: str | None) -> bytes:
    return read_file(path) if text is None else text.encode("utf-8", "replace")


def _row(problem: Problem) -> Doc:
    return {
        "path": problem.path,
        "line": problem.line,
        "message": problem.message,
        "hint": problem.hint,
        "text": str(problem),
    }


def _case(result: PolicyTestResult) -> Doc:
    return {
        "name": result.name,
        "line": result.line,
        "ok": result.passed,
        "request": result.request,
        "expected": result.expected,
        "actual": result.got,
    }


def _proof(result: ProofResult) -> Doc:
    example = result.counterexample
    return {
        "invariant": result.invariant,
        "line": result.line,
        "holds": result.holds,
        "points": result.points,
        "counterexample": describe(example) if example is not None else None,
        "rule": result.by_rule,
        "too_large": result.is_too_large,
    }
