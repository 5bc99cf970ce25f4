"""One call on the HTTP interface: who, what, with which body; and how answers are written."""

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from aiohttp.web_request import BaseRequest
from aiohttp.web_response import Response, StreamResponse

from mycoswarmd.api.services import Services
from mycoswarmd.core.types import Principal, Start
from mycoswarmd.errors import BadRequest

# Every answer to a member says which roster it rests on, so that either side sees that it lacks something.
ROSTER_HEADER = "X-Mycoswarm-Roster"


@dataclass(frozen=True, slots=True)
class Call:
    """What a handler gets. `untrusted_body` is bounded by the route's row.

    Attributes:
        start: whether it came from this machine or from another node.
        roster: the digest that goes with each answer to a member, or "".
        untrusted_pieces: the body where the route's row says that it comes in pieces, bounded, too.
    """

    request: BaseRequest
    principal: Principal
    services: Services
    path: Mapping[str, str]
    untrusted_body: bytes
    start: Start = Start.LOCAL
    roster: str = ""
    untrusted_pieces: AsyncIterator[bytes] | None = None

    def stream(self, headers: Mapping[str, str]) -> StreamResponse:
        """Begin an answer that is sent piece by piece."""
        given = {**headers, ROSTER_HEADER: self.roster, "Server": "mycoswarmd"} if self.roster else headers
        return StreamResponse(headers=given)

    def json(self) -> dict[str, object]:
        """Parse the body as a JSON object; an empty body is an empty object."""
        if not self.untrusted_body:
            return {}
        try:
            value = json.loads(self.untrusted_body.decode("utf-8"))  # not what else it may look like
        except (ValueError, RecursionError) as exc:
            raise BadRequest("bad-json", "cannot read the request: the body is not JSON") from exc
        if not isinstance(value, dict):
            raise BadRequest("bad-json", "cannot read the request: the body is not a JSON object")
        return value

    def number(self, name: str, default: int, *, low: int, high: int) -> int:
        """Return a whole number from the query string, in its range."""
        text = self.request.query.get(name)
        if text is None:
            return default
        is_number = text.isascii() and text.isdigit() and len(text) <= 18
        if not is_number or not low <= int(text) <= high:
            raise BadRequest(
                "bad-request",
                f"cannot use {name}={text[:40]!r}: it must be a number from {low} to {high}",
                where=name,
            )
        return int(text)


def json_answer(value: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Answer with a JSON document."""
    body = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    return Response(body=body, status=status, content_type="application/json", headers=headers)
