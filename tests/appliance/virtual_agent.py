"""The root shell of a virtual machine: runs there, on a serial port, with the system's Python alone.

One JSON object a line, both ways. `{"id", "argv", "stdin"}` runs a command; its output comes as `{"id", "to",
"data"}`, its end as `{"id", "code"}`; `{"id", "kill": true}` kills it with all that is in its process group.
Bytes are base64. The first line says that the machine is there. It must outlive what tests do to a machine:
see the unit in virtual.py.
"""

import base64
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

_CHUNK_BYTES = 1 << 16
_running: dict[int, subprocess.Popen[bytes]] = {}
_says = threading.Lock()


def main() -> None:
    """Serve the port named on the command line until the machine is off."""
    path = Path(sys.argv[1])
    while not path.exists():
        time.sleep(0.01)
    # A port is opened once; reading and writing go by two descriptors of the one.
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    with os.fdopen(fd, "rb", closefd=False) as reader, os.fdopen(fd, "wb", buffering=0) as writer:
        _say(writer, {"id": 0, "code": 0})
        for line in reader:
            request = json.loads(line)
            if request.get("kill"):
                _kill(request["id"])
            else:
                threading.Thread(target=_serve, args=(writer, request), daemon=True).start()


def _serve(writer: IO[bytes], request: dict[str, Any]) -> None:
    number = request["id"]
    try:
        process = subprocess.Popen(
            request["argv"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=request["environment"],
            start_new_session=True,
            preexec_fn=_be_ordinary,  # noqa: PLW1509 - nothing but an open, a write and a close
        )
    except OSError as exc:
        _pass_on(writer, number, "err", f"{request['argv'][0]}: {exc.strerror}\n".encode())
        _say(writer, {"id": number, "code": 127})
        return
    _running[number] = process
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    readers = [
        threading.Thread(target=_read, args=(writer, number, name, stream), daemon=True)
        for name, stream in (("out", process.stdout), ("err", process.stderr))
    ]
    for reader in readers:
        reader.start()
    with suppress(BrokenPipeError):
        process.stdin.write(base64.b64decode(request["stdin"]))
        process.stdin.close()
    for reader in readers:
        reader.join()
    code = process.wait()
    _running.pop(number, None)
    _say(writer, {"id": number, "code": code})


def _be_ordinary() -> None:
    """Be killed as any process is when memory is short, not spared as this service is."""
    fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
    os.write(fd, b"0")
    os.close(fd)


def _read(writer: IO[bytes], number: int, name: str, stream: IO[bytes]) -> None:
    while data := os.read(stream.fileno(), _CHUNK_BYTES):
        _pass_on(writer, number, name, data)
    stream.close()


def _pass_on(writer: IO[bytes], number: int, name: str, data: bytes) -> None:
    _say(writer, {"id": number, "to": name, "data": base64.b64encode(data).decode()})


def _say(writer: IO[bytes], message: dict[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    with _says:
        while data:
            data = data[writer.write(data) :]


def _kill(number: int) -> None:
    process = _running.get(number)
    if process is not None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)


if __name__ == "__main__":
    main()
