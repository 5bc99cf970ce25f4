"""The recovery key as a person writes it down: 13 groups of 4 characters.

Law: what was read back wrongly must show before it is used. The paper holds the 32 bytes of the key and 4
check bits, so one slip in sixteen would pass here; it then has another public half than the roster names, and
is refused there. The text is the key: it is never logged, stored or repeated in an error.
"""

import hashlib
from typing import Final

from mycoswarmd.core.enrol import CROCKFORD, read_crockford
from mycoswarmd.errors import BadRequest, LocalProtocolError

SEED_BYTES: Final = 32
GROUPS: Final = 13
_GROUP_CHARS: Final = 4
_CHARS: Final = GROUPS * _GROUP_CHARS  # 260 bits: 256 of the key, 4 to check
_LABEL: Final = b"mycoswarm-recovery-v1\0"


def format_recovery(seed: bytes) -> str:
    """Return the key as it is shown: 13 groups of 4, with dashes."""
    if len(seed) != SEED_BYTES:
        raise LocalProtocolError("bad-seed", "cannot write down a recovery key that has not 32 bytes")
    number = int.from_bytes(seed, "big") << 4 | _check(seed)
    chars = "".join(CROCKFORD[number >> shift & 31] for shift in range(5 * (_CHARS - 1), -1, -5))
    return "-".join(chars[at : at + _GROUP_CHARS] for at in range(0, _CHARS, _GROUP_CHARS))


def parse_recovery(untrusted_text: str) -> bytes:
    """Return the key that a person typed, or raise BadRequest("bad-recovery-key"); never repeats it."""
    chars = read_crockford(untrusted_text, count=_CHARS, code="bad-recovery-key", what="the recovery key")
    number = 0
    for char in chars:
        number = number << 5 | CROCKFORD.index(char)
    seed = (number >> 4).to_bytes(SEED_BYTES, "big")
    if number & 15 != _check(seed):
        raise BadRequest(
            "bad-recovery-key",
            "cannot use the recovery key: one of its characters is wrong, or groups are swapped",
            hint="compare it with the paper, group by group",
        )
    return seed


def _check(seed: bytes) -> int:
    return hashlib.sha256(_LABEL + seed).digest()[0] >> 4
