"""A process to be killed: writes blobs piece by piece and prints the name of each that is acknowledged."""

import asyncio
import os
import sys
from pathlib import Path

from mycoswarmd.store import blobs
from mycoswarmd.store.blobs import DirectoryBlobStore

BLOBS, PIECES = 2, 3


async def main(directory: Path) -> None:
    blobs._THREADS = 1  # all system calls of the store in one, so that they can be counted
    store = DirectoryBlobStore(directory, max_bytes=1 << 20)
    for n in range(BLOBS):
        async with store.writing() as blob:
            for piece in range(PIECES):
                await blob.write(bytes([n, piece]) * 10_000)
            os.write(1, f"{await blob.finish()}\n".encode())
    os.write(1, b"done\n")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
