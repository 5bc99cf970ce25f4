"""A swarm as a node tells of it."""

from collections.abc import Mapping
from typing import Any

PC = "aaaaaaaabbbbbbbbccccccccdd"
PI = "eeeeeeeeffffffffgggggggghh"
LAPTOP = "iiiiiiiijjjjjjjjkkkkkkkkll"
# The public half of the recovery key whose secret is the bytes 0, 1, 2, .. 31 (Ed25519).
RECOVERY = "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"
GONE = "mmmmmmmmnnnnnnnnooooooooqq"

WORD: dict[str, Any] = {
    "id": PI,
    "version": "9.9",
    "state": "yellow",
    "tier": "light",
    "sandbox": "full",
    "uptime_s": 90,
    "running": 1,
    "waiting": 2,
    "models": [{"name": "small", "loaded": True}],
}


def row(node_id: str, name: str, **fields: object) -> dict[str, Any]:
    """Describe a member; `fields` change what is said of it."""
    return {
        "id": node_id,
        "name": name,
        "role": "node",
        "signer": False,
        "self": False,
        "state": "ready",
        "detail": "",
        "address": "10.0.0.7:7437",
        "last_seen_s": 1.2,
        "rtt_ms": 0.8,
        "verified": {"key": True, "digest_same": True, "models": 1},
        "word": None,
        "alarm": "",
        **fields,
    }


HERE = row(PC, "study-pc", self=True, signer=True, state="ready", address=None, last_seen_s=None, verified={})
THERE = row(PI, "kitchen\x1b-pi", word=WORD)
AWAY = row(
    PI,
    "kitchen-pi",
    state="unreachable",
    detail="connection refused",
    last_seen_s=7200,
    verified={"key": False, "digest_same": False, "models": 0},
)
PERSON = row(LAPTOP, "anna", role="operator", state="", address=None, last_seen_s=None, verified={})


def swarm(*nodes: Mapping[str, Any], **fields: object) -> dict[str, Any]:
    """Return what /api/swarm answers."""
    return {
        "swarm": {
            "id": "5" * 64,
            "name": "home",
            "epoch": 0,
            "recovery": RECOVERY,
            "statements": 4,
            "digest": "d1" * 32,
            "problems": [],
        },
        "self": {"id": PC, "name": "study-pc", "signer": True},
        "roster_age_s": 60,
        "nodes": list(nodes or (HERE, THERE, PERSON)),
        "revoked": [{"id": GONE, "reason": "stolen"}],
        "invites": [],
        **fields,
    }


ALONE: dict[str, Any] = {
    "swarm": None,
    "self": None,
    "roster_age_s": None,
    "nodes": [],
    "revoked": [],
    "invites": [],
}


def invited(state: str = "open", **fields: object) -> dict[str, Any]:
    """Return what is said of an invitation."""
    return {
        "invite": "79D9",
        "role": "node",
        "name": "",
        "state": state,
        "failures": 0,
        "expires_in_s": 880,
        "pending": None,
        **fields,
    }
