"""The scripted engine of `tests/upstream.py` as a program: `-m tests.appliance.fake_engine PORT [PAUSE_S]`.

It runs on a machine of the lab, beside the node, where an Ollama or a vLLM would. The first task that model
`agent` serves writes a file; every later one just finishes. What it was asked is
at /tmp/asked, one JSON body a line.
"""

import json
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests import upstream as module
from tests.upstream import Upstream, upstream

READ = ("fs_read", {"path": "notes.txt"})
WRITE = ("fs_write", {"path": "SUMMARY.md", "content": "in short\n"})
FINISH = ("finish", {"summary": "done"})
ASKED = Path("/tmp/asked")


class _Bodies(list[dict[str, Any]]):
    """Keeps no bodies in memory and writes each down."""

    def append(self, body: dict[str, Any]) -> None:
        with ASKED.open("a") as out:
            out.write(json.dumps(body) + "\n")


def main() -> None:
    """Serve on 127.0.0.1 until killed."""
    port = int(sys.argv[1])

    class OnPort(ThreadingHTTPServer):
        def __init__(self, _address: tuple[str, int], handler: Any) -> None:
            super().__init__(("127.0.0.1", port), handler)

    setattr(module, "ThreadingHTTPServer", OnPort)  # noqa: B010 - it is ours, and chooses a port by itself
    with upstream() as book:
        book.bodies = _Bodies()
        _play(book)
        ASKED.touch()  # whoever waits for it finds somebody who listens
        threading.Event().wait()


def _play(book: Upstream) -> None:
    book.play(READ, WRITE, FINISH, pause_s=float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)


if __name__ == "__main__":
    main()
