"""The program of the signer's unit, `python3 -I -m mycoswarmd.daemon.signerunit`: a key, and a connection.

It is here since it puts together what do not know each other: outposts/signer.py decides what is signed,
trust/signer.py keeps the key. The connection is descriptor 0; when that ends, so does the program.
"""

import argparse
import logging
import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path

from mycoswarmd.daemon.clock import SystemClock
from mycoswarmd.outposts.signer import serve
from mycoswarmd.trust.signer import FileSigner

CONNECTION_FD = 0


def main(argv: Iterable[str]) -> None:
    """Serve the connection on descriptor 0 until it ends."""
    parser = argparse.ArgumentParser(prog="mycoswarmd.daemon.signerunit")
    parser.add_argument("--state", type=Path, default=Path("/var/lib/mycoswarm-signer"))
    options = parser.parse_args(list(argv))
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with socket.socket(fileno=CONNECTION_FD) as node:
        serve(node, options.state, lambda: FileSigner(options.state), now_ms=SystemClock().now_ms)


if __name__ == "__main__":
    main(sys.argv[1:])
