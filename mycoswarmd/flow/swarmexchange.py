"""What this node tells others of the roster and hears from them, and how fresh it is.

Law: statements prove themselves, so whoever asks may have them. Nothing here rests on the wall clock:
freshness is counted by signers and measured by the time since boot.
Source: docs/wire.md.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence

from mycoswarmd.core.roster import MAX_STATEMENTS, encode_beacon, parse_beacon, sign_beacon
from mycoswarmd.core.types import UNKNOWN, Unknown
from mycoswarmd.errors import BadRequest, StoreError, Unavailable
from mycoswarmd.flow.swarmports import BeaconRow
from mycoswarmd.flow.swarmroster import INLINE_ROSTER, SwarmRoster

log = logging.getLogger(__name__)

# Signers say this often that they are there; a node's roster is as old as the last word it heard.
BEACON_S = 6 * 3600.0
# A peer that asks hears a new one, but not more often than this; and where it does not know how old its
# roster is, because it was just started, that.
BEACON_AT_MOST_S = 60.0
BEACON_IN_NEED_S = 5.0
_HASH_CHARS = 64


class SwarmExchange(SwarmRoster):
    """Gives and takes statements and beacons."""

    async def run(self) -> None:
        """Sign a beacon now and then, where this node is a signer."""
        while True:
            await self._try_beacon()
            await asyncio.sleep(BEACON_S)

    async def pull(self, untrusted_body: Mapping[str, object]) -> dict[str, object]:
        """Answer anybody's question for the statements it lacks: they prove themselves."""
        self._require_roster()
        return {"statements": await self._lacked(_hashes(untrusted_body)), "digest": self.digest}

    async def sync(self, untrusted_body: Mapping[str, object]) -> dict[str, object]:
        """Take what a member sends and answer with what it lacks and what we still want."""
        given = untrusted_body.get("statements", [])
        if not isinstance(given, list):
            raise BadRequest("bad-request", "cannot take statements: not a list", where="statements")
        have = _hashes(untrusted_body)
        if given:
            await self.merge(given)
        is_needed = untrusted_body.get("fresh") is True
        await self._beacon_if_older(BEACON_IN_NEED_S if is_needed else BEACON_AT_MOST_S)
        mine = frozenset(self.hashes())
        return {
            "statements": await self._lacked(have),
            "want": sorted(have - mine),
            "digest": self.digest,
            "beacons": self.beacons(),
            "peers": dict(self.reached()),
        }

    async def _lacked(self, have: frozenset[str]) -> list[dict[str, object]]:
        if self._set is None or len(self._set) - len(have) < INLINE_ROSTER:
            return self.missing(have)
        return await asyncio.to_thread(self.missing, have)

    # --- freshness ---------------------------------------------------------------------------------

    def age_s(self) -> int | Unknown:
        """Return for how long no signer was heard; UNKNOWN since a boot without any word."""
        roster = self.roster
        if roster is None:
            return UNKNOWN
        heard = [at_s for signer, at_s in self._heard_at_s.items() if signer in roster.signers]
        if not heard:
            return UNKNOWN
        return max(0, int(self._clock.boot_s() - max(heard)))

    def beacons(self) -> list[Mapping[str, object]]:
        """Return the newest beacon of each signer, in wire form."""
        return [row.beacon for row in self._beacons.values()]

    async def merge_beacons(self, untrusted: Sequence[object]) -> None:
        """Take the beacons that are newer than what was heard; ignore all others."""
        roster = self.roster
        if roster is None:
            return
        known_ones = self.beacons()
        for one in untrusted[:64]:
            if one in known_ones:
                continue
            beacon = parse_beacon(one, verify=self._verify)
            known = self._beacons.get(beacon.signer)
            is_ours = beacon.swarm == roster.swarm_id and beacon.signer in roster.signers
            if not is_ours or (known is not None and beacon.n <= known.n):
                continue
            await self._keep_beacon(BeaconRow(signer=beacon.signer, n=beacon.n, beacon=encode_beacon(beacon)))

    async def _keep_beacon(self, row: BeaconRow) -> None:
        async with self._lock:
            if self.roster is None or row.beacon["swarm"] != self.roster.swarm_id:
                return  # it was left meanwhile
            await self._store.put_beacon(row)
            self._beacons[row.signer] = row
            self._heard_at_s[row.signer] = self._clock.boot_s()

    async def _try_beacon(self) -> None:
        """Sign a beacon; that the disk is full or the signer away is no reason to stop anything else."""
        try:
            await self._wake_signer()
            await self._beacon()
        except (StoreError, Unavailable) as exc:
            log.warning("no beacon was signed: %s", exc.message)

    async def _beacon_if_older(self, than_s: float) -> None:
        key = self._signer.public_key()
        if key is None:
            return
        heard_s = self._heard_at_s.get(key.hex())
        if heard_s is None or self._clock.boot_s() - heard_s >= than_s:
            await self._try_beacon()

    async def _beacon(self) -> None:
        key, roster = self._signer.public_key(), self.roster
        if key is None or roster is None or not self.is_signer():
            return
        known = self._beacons.get(key.hex())
        beacon = sign_beacon(
            swarm=roster.swarm_id,
            epoch=roster.epoch,
            signer=key,
            n=(known.n if known is not None else 0) + 1,
            sign=self._signer.sign,
        )
        await self._keep_beacon(BeaconRow(signer=key.hex(), n=_number(beacon), beacon=beacon))


def _hashes(untrusted_body: Mapping[str, object]) -> frozenset[str]:
    have = untrusted_body.get("have", [])
    if not isinstance(have, list) or len(have) > MAX_STATEMENTS:
        raise BadRequest("bad-request", "cannot compare rosters: have is no list of hashes", where="have")
    for one in have:
        if not isinstance(one, str) or len(one) != _HASH_CHARS:
            raise BadRequest("bad-request", "cannot compare rosters: not a sha256 in hex", where="have")
    return frozenset(have)


def _number(beacon: Mapping[str, object]) -> int:
    n = beacon["n"]
    assert isinstance(n, int)
    return n
