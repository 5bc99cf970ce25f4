"""Every exception raised on purpose: one class per reaction, a stable kebab-case code for each case.

A message starts with "cannot", names the thing, then the cause; what to do about it goes in `hint`.
Neither ever holds text of a prompt or of a result. A broken policy *is* a denial, by type: whoever
forgets to handle `PolicyInvalid` has denied.
"""

from dataclasses import dataclass


class MycoswarmError(Exception):
    """The base of all deliberate errors; never raised itself.

    Attributes:
        code: stable, kebab-case; what programs and tests match.
        message: one line for a person, starting with "cannot".
        hint: what the reader can do, or "".
        http_status: the status this error has on the HTTP interfaces.
        exit_code: what mycoswarmctl exits with (design section 7).
        receipt: the id of the receipt of the decision or outcome, where there is one.
    """

    http_status = 500
    exit_code = 1
    retryable = False

    def __init__(self, code: str, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.receipt = ""

    def __str__(self) -> str:
        return f"{self.message} ({self.code})" + (f"; {self.hint}" if self.hint else "")


class ConfigError(MycoswarmError):
    """A settings file, a directory or an option is wrong. The operator acts."""

    exit_code = 1


class Denied(MycoswarmError):
    """The policy, or the lack of one, says no. An outcome, not a failure.

    Attributes:
        rule: the id of the deciding rule, or a built-in one such as `default-deny`.
        where: `file:line` of that rule, or "".
    """

    http_status = 403
    exit_code = 3

    def __init__(self, code: str, message: str, *, hint: str = "", rule: str = "", where: str = "") -> None:
        super().__init__(code, message, hint=hint)
        self.rule = rule
        self.where = where


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing wrong with a file: where, what, and what would have been accepted."""

    path: str
    line: int
    message: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}" + (f" ({self.hint})" if self.hint else "")


class PolicyInvalid(Denied, ConfigError):
    """A policy file that cannot be used; holds every problem found, not only the first."""

    exit_code = 1

    def __init__(self, problems: tuple[Problem, ...], *, hint: str = "") -> None:
        first = str(problems[0]) if problems else "no reason given"
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        super().__init__(
            "policy-invalid", f"cannot use the policy: {first}{more}", hint=hint, rule="no-policy"
        )
        self.problems = problems


class Unauthenticated(MycoswarmError):
    """The caller did not prove who it is."""

    http_status = 401
    exit_code = 3


class BadRequest(MycoswarmError):
    """The other side broke the protocol or asked for something malformed. They act."""

    http_status = 400
    exit_code = 2

    def __init__(
        self, code: str, message: str, *, hint: str = "", where: str = "", http_status: int = 400
    ) -> None:
        super().__init__(code, message, hint=hint)
        self.where = where
        self.http_status = http_status


class NotFound(MycoswarmError):
    """There is no such task, model, key, receipt or route. Unknown is unknown, never pending."""

    http_status = 404


class Conflict(MycoswarmError):
    """The thing exists but is in a state, or has contents, that do not permit this."""

    http_status = 409


class Unavailable(MycoswarmError):
    """Not now: queue full, engine down, no route. Time may cure it.

    Attributes:
        retry_after_s: when to try again, in seconds.
    """

    http_status = 503
    retryable = True

    def __init__(
        self,
        code: str,
        message: str,
        *,
        hint: str = "",
        retry_after_s: int = 1,
        http_status: int = 503,
    ) -> None:
        super().__init__(code, message, hint=hint)
        self.retry_after_s = retry_after_s
        self.http_status = http_status


class EngineError(MycoswarmError):
    """An engine answered with an error or with garbage, or died in the middle."""

    http_status = 502
    retryable = True


class CageError(MycoswarmError):
    """A cage could not be built, did not prove its confinement, or its agent ended badly."""

    http_status = 502


class CageNotUp(CageError):
    """A cage did not come up this time, and was told nothing. Time may cure it: a busy boot, an upgrade."""

    http_status = 503
    retryable = True


class StoreError(MycoswarmError):
    """The disk or the database refused: full, damaged, locked by another daemon, newer."""

    http_status = 503
    retryable = True


class Unreachable(MycoswarmError):
    """mycoswarmctl cannot reach the daemon."""

    exit_code = 4


class LocalProtocolError(MycoswarmError):
    """We broke our own protocol: a bug here."""
