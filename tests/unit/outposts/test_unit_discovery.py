"""Discovery as a unit: it says what it proved, and ends by itself when it hangs."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from mycoswarmd.errors import BadRequest
from mycoswarmd.outposts.discovery import _HUNG_S, BEAT_S
from mycoswarmd.wire.hints import Proved, encode_report, parse_report
from mycoswarmd.wire.proof import CheckName, Proof, Unit

HANGS = """
import asyncio
from mycoswarmd.outposts import discovery
discovery._HUNG_S = 1
async def hang(self):
    while True:
        pass
discovery.Discovery._refresh = hang
discovery.main([])
"""


def test_started_for_a_connection_it_proves_itself_first() -> None:
    near, far = socket.socketpair()
    with (
        near,
        subprocess.Popen(
            [sys.executable, "-I", "-m", "mycoswarmd.outposts.discovery"],
            stdin=far.fileno(),
            stdout=far.fileno(),
        ) as process,
    ):
        far.close()
        near.settimeout(60)
        report = parse_report(near.makefile("rb").readline())
        assert isinstance(report, Proved)
        assert report.proof.unit is Unit.DISCOVERY
        # Nothing confines it here, and it says so.
        assert not report.proof.holds(CheckName.CANARY)
        near.shutdown(socket.SHUT_WR)
        assert process.wait(60) == 0


def test_as_a_child_it_proves_nothing_that_nobody_confined() -> None:
    with subprocess.Popen(
        [sys.executable, "-I", "-m", "mycoswarmd.outposts.discovery"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert not isinstance(parse_report(process.stdout.readline()), Proved)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0


def test_hung_the_kernel_ends_it() -> None:
    orders, held = os.pipe()
    try:
        with subprocess.Popen(
            [sys.executable, "-I", "-c", HANGS], stdin=orders, stdout=subprocess.DEVNULL
        ) as process:
            assert process.wait(60) == -signal.SIGALRM
    finally:
        os.close(orders)
        os.close(held)
    assert BEAT_S * 3 < _HUNG_S


def test_a_proof_of_another_unit_is_refused() -> None:
    line = encode_report(Proved(Proof(Unit.CORE, ())))
    with pytest.raises(BadRequest):
        parse_report(line)
