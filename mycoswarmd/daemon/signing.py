"""Who holds this node's signing key: a file of its own, or the appliance's signer unit.

Law: the appliance makes no key outside the unit; one that is in a file already, of a backup or of a node from
before, is used where it is. A unit that cannot be reached is a signer without a key for now, and a problem
that `status` shows: reading and answering go on without it.
"""

import logging

from mycoswarmd.daemon.settings import Settings
from mycoswarmd.errors import MycoswarmError
from mycoswarmd.flow.ports import Clock
from mycoswarmd.flow.swarmports import Signer
from mycoswarmd.trust.signer import FileSigner, UnitSigner
from mycoswarmd.wire.proof import Proof, Unit

log = logging.getLogger(__name__)

KEY_FILE = "signer.key"
# Of the error for a unit whose socket is not there.
_ABSENT = "signer-absent"


class PatientSigner:
    """The signer's unit, as a node has it that goes on without. Implements flow.swarmports.Signer.

    Attributes:
        problem: why it does not say whether it has a key, or "".
    """

    def __init__(self, unit: UnitSigner) -> None:
        self._unit = unit
        self.problem = ""

    def public_key(self) -> bytes | None:
        """Return the public half, or None: there is none, or nobody has said yet."""
        return self._unit.known_key

    def create(self) -> bytes:
        """Make the key if there is none, and return its public half; Unavailable without the unit."""
        return self._unit.create()

    def wake(self) -> None:
        """Have the unit started and hear what key it has; whoever signs without it learns why."""
        try:
            self._unit.wake()
        except MycoswarmError as exc:
            if exc.code == _ABSENT:  # masked, perhaps: whoever wants no signer here
                self.problem = ""
            elif not self.problem:
                log.error("nothing is signed: %s", exc, extra={"event": "unit-gone"})  # noqa: TRY400
                self.problem = exc.message
        else:
            self.problem = ""

    def sign(self, message: bytes) -> bytes:
        """Sign; Unavailable without the unit."""
        return self._unit.sign(message)

    def destroy(self) -> None:
        """Forget the key. Idempotent."""
        self._unit.destroy()

    def prove(self) -> Proof:
        """Return what the unit finds out about its own confinement; Unavailable without it."""
        return self._unit.prove()

    def close(self) -> None:
        """End the connection, and with it the unit."""
        self._unit.close()


def make_signer(settings: Settings, clock: Clock) -> Signer:
    """Build who holds the key; nothing is asked yet."""
    directory = settings.state_dir / "signer"
    if not settings.appliance or (directory / KEY_FILE).exists():
        return FileSigner(directory)
    return PatientSigner(UnitSigner(settings.outpost(Unit.SIGNER), clock=clock))
