"""An engine for virtual machines: `-m tests.appliance.virtual_engine PORT`; what it does is in calls.json.

As fake_engine.py, but what model `agent` calls is chosen by the task: the file maps a word of the prompt to
a list of calls, and how many answers a task has got says which of them is next.
"""

import json
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests import upstream as module
from tests.upstream import upstream

CALLS = Path("/opt/fake/calls.json")
# Until then tasks of the kind "steady" get no answer: they are there, whatever happens meanwhile.
GO = Path("/opt/fake/go")


def main() -> None:
    """Serve on 127.0.0.1 until killed."""
    port = int(sys.argv[1])
    scripts: dict[str, list[Any]] = json.loads(CALLS.read_text())

    class OnPort(ThreadingHTTPServer):
        def __init__(self, _address: tuple[str, int], handler: Any) -> None:
            super().__init__(("127.0.0.1", port), handler)

    def next_call(_handler: object, body: dict[str, Any]) -> str:
        messages = [(message["role"], json.dumps(message)) for message in body["messages"]]
        word = next(word for word in scripts if any(word in text for _, text in messages))
        # Before the task are examples, whose answers do not count.
        start = next(index for index, (_, text) in enumerate(messages) if word in text)
        answered = sum(role == "assistant" for role, _ in messages[start:])
        calls = scripts[word]
        while word == "steady" and not GO.exists():
            time.sleep(0.1)
        tool, arguments = calls[min(answered, len(calls) - 1)]
        return json.dumps({"tool": tool, "arguments": arguments})

    setattr(module, "ThreadingHTTPServer", OnPort)  # noqa: B010 - as in fake_engine.py
    setattr(module._Handler, "_next_call", next_call)  # noqa: B010 - it is ours, and has one script for all
    with upstream():
        threading.Event().wait()


if __name__ == "__main__":
    main()
