"""The daemon's refusals as our errors: the class by the status, the words by the answer."""

import json
from collections.abc import Mapping
from typing import Any

from mycoswarmd.errors import (
    BadRequest,
    Conflict,
    Denied,
    EngineError,
    LocalProtocolError,
    MycoswarmError,
    NotFound,
    PolicyInvalid,
    Problem,
    Unauthenticated,
    Unavailable,
)

Doc = dict[str, Any]

_CLASSES: Mapping[int, type[MycoswarmError]] = {
    400: BadRequest,
    401: Unauthenticated,
    404: NotFound,
    405: BadRequest,
    408: BadRequest,
    409: Conflict,
    413: BadRequest,
    429: Unavailable,
    502: EngineError,
    503: Unavailable,
}


def refusal(status: int, untrusted: bytes, *, receipt: str = "") -> MycoswarmError:
    """Turn an error answer into the class of its status, with the receipt that its header names."""
    try:
        document = json.loads(untrusted)
    except (ValueError, RecursionError):
        document = None
    error = document.get("error") if isinstance(document, dict) else None
    made = to_error(status, error if isinstance(error, dict) else {})
    made.receipt = receipt
    return made


def to_error(status: int, error: Doc) -> MycoswarmError:
    """Turn an error object into the class of its status; exit code 3 is kept for refusals alone."""
    code = str(error.get("code") or f"http-{status}")
    message = str(error.get("message") or f"cannot do this: the daemon answered {status} without a reason")
    hint = str(error.get("hint") or "")
    message = message.removesuffix(f"; {hint}")  # for OpenAI clients, which know no hint, it is in both
    made: MycoswarmError
    if code == "policy-invalid" and isinstance(error.get("problems"), list):
        made = PolicyInvalid(tuple(_problem(row) for row in error["problems"]), hint=hint)
    elif status == 403:
        rule, where = str(error.get("rule") or ""), str(error.get("where") or "")
        made = Denied(code, message, hint=hint, rule=rule, where=where)
    else:
        made = _CLASSES.get(status, LocalProtocolError)(code, message, hint=hint)
        if made.exit_code == BadRequest.exit_code:
            made.exit_code = 1  # the daemon refused what our own checks let through: no usage error
    return made


def _problem(row: object) -> Problem:
    fields: Doc = row if isinstance(row, dict) else {}
    line = fields.get("line")
    return Problem(
        path=str(fields.get("path", "")),
        line=line if isinstance(line, int) else 0,
        message=str(fields.get("message", row)),
        hint=str(fields.get("hint") or ""),
    )
