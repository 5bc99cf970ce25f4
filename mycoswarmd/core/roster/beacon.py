"""Beacons: counters that signers sign now and then, so that a node can tell how old its roster is.

Law: a beacon is no statement. It changes nothing in the roster, and its signature fits nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from mycoswarmd.core.roster.statement import (
    MAX_EPOCH,
    Verify,
    canonical,
    check_signature,
    is_number,
    is_public_key,
)
from mycoswarmd.errors import BadRequest

BEACON_CONTEXT: Final = b"mycoswarm-beacon-v1\0"
MAX_COUNTER: Final = (1 << 53) - 1  # what every JSON reader takes for the same integer
_FIELDS: Final = {"swarm", "epoch", "signer", "n", "sig"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Beacon:
    """A counter whose form and signature were checked; whether its key is a signer, the roster says."""

    swarm: str
    epoch: int
    signer: str  # public key, hex
    n: int
    sig: str


def make_beacon_message(*, swarm: str, epoch: int, signer: str, n: int) -> bytes:
    """Return the bytes that a signer signs."""
    return BEACON_CONTEXT + canonical({"swarm": swarm, "epoch": epoch, "signer": signer, "n": n})


def sign_beacon(
    *, swarm: str, epoch: int, signer: bytes, n: int, sign: Callable[[bytes], bytes]
) -> dict[str, object]:
    """Return a beacon in wire form."""
    message = make_beacon_message(swarm=swarm, epoch=epoch, signer=signer.hex(), n=n)
    return {"swarm": swarm, "epoch": epoch, "signer": signer.hex(), "n": n, "sig": sign(message).hex()}


def encode_beacon(beacon: Beacon) -> dict[str, object]:
    """Return the wire form."""
    return {
        "swarm": beacon.swarm,
        "epoch": beacon.epoch,
        "signer": beacon.signer,
        "n": beacon.n,
        "sig": beacon.sig,
    }


def parse_beacon(untrusted: object, *, verify: Verify) -> Beacon:
    """Check form and signature of a beacon; raise BadRequest("bad-beacon")."""
    if not isinstance(untrusted, dict) or untrusted.keys() != _FIELDS:
        raise _refused("it has not exactly the fields of one")
    swarm, epoch, signer, n = (untrusted[name] for name in ("swarm", "epoch", "signer", "n"))
    if not is_public_key(swarm) or not is_public_key(signer):
        raise _refused("swarm or signer is not 32 bytes in hex")
    if not is_number(epoch, 0, MAX_EPOCH) or not is_number(n, 1, MAX_COUNTER):
        raise _refused("epoch or counter is not a number in range")
    message = make_beacon_message(swarm=swarm, epoch=epoch, signer=signer, n=n)
    try:
        sig = check_signature(signer, untrusted["sig"], message, verify)
    except BadRequest:
        raise _refused("its signature is not of its key over these fields") from None
    return Beacon(swarm=swarm, epoch=epoch, signer=signer, n=n, sig=sig)


def _refused(why: str) -> BadRequest:
    return BadRequest("bad-beacon", f"cannot accept the beacon: {why}")
