"""A program that opens a cage, says who is in it, and waits to be killed. Started by test_cage.py."""

import asyncio
import sys
from pathlib import Path

from mycoswarmd.core.types import CageSpec, Limits
from mycoswarmd.sandbox.bwrap import BubblewrapCages
from mycoswarmd.wire.frames import Frame, FrameType


async def main() -> None:
    spec = CageSpec(
        task_id="t", attempt=1, read_paths=(".",), write_paths=(".",), programs=(), limits=Limits()
    )
    session = await BubblewrapCages(Path(sys.argv[1]).read_bytes(), Path("/nonexistent")).open(spec)
    job = (
        "import time\nif os.fork() == 0:\n os.setsid()\n time.sleep(600)\n"
        "result = os.readlink('/proc/self/ns/pid')"
    )
    await session.send(Frame(FrameType.JOB, {"prompt": job}))
    print((await session.receive()).body["result"], flush=True)
    await asyncio.sleep(600)


asyncio.run(main())
