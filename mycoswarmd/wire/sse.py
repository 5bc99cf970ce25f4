"""Server-sent events, read piece by piece and bounded.

Only what OpenAI-compatible servers send: the `data` of each event. Lines end in LF or CRLF; comments
and other fields are skipped. Source: WHATWG HTML, "Server-sent events".
"""

from mycoswarmd.errors import BadRequest

# One event holds one token, or one whole tool call; a megabyte is far beyond either.
MAX_EVENT_BYTES = 1 << 20


class SseParser:
    """Turns bytes, however they are cut, into the data of events."""

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._rest = b""
        self._data: list[bytes] = []
        self._data_bytes = 0

    def feed(self, untrusted: bytes) -> list[bytes]:
        """Return the data of each event that is now complete; BadRequest for an event too large."""
        lines = (self._rest + untrusted if self._rest else untrusted).split(b"\n")
        self._rest = lines.pop()
        events: list[bytes] = []
        for line in lines:
            self._take(line[:-1] if line.endswith(b"\r") else line, events)
        if len(self._rest) > self._max_event_bytes:
            raise self._too_large()
        return events

    def _take(self, line: bytes, events: list[bytes]) -> None:
        if not line:
            if self._data:
                events.append(b"\n".join(self._data))
                self._data = []
                self._data_bytes = 0
            return
        if not line.startswith(b"data:"):
            return
        data = line[6:] if line.startswith(b"data: ") else line[5:]
        self._data_bytes += len(data) + 1
        if self._data_bytes > self._max_event_bytes:
            raise self._too_large()
        self._data.append(data)

    def _too_large(self) -> BadRequest:
        return BadRequest("bad-sse", f"cannot read an event of more than {self._max_event_bytes} bytes")
