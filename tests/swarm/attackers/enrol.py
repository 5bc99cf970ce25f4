"""Enrolment by hand: each message made, kept, changed and sent as an attacker likes."""

import base64
import hashlib
import hmac
import json
from dataclasses import dataclass, field, replace

from tests.swarm.attackers.kit import CodeKeys, Key, b64, derive, nonce, split_code, transcript
from tests.swarm.attackers.talk import Reply, Talk
from tests.swarm.lab import PORT, Host

HELLO = "/swarm/enroll/hello"
CONFIRM = "/swarm/enroll/confirm"
POSSESSION = b"mycoswarm-pop"


@dataclass
class Newcomer:
    """Somebody who wants in, and what he has seen so far."""

    invite: str
    keys: CodeKeys
    key: Key = field(default_factory=Key)
    name: str = "mallory"
    role: str = "node"
    certificate_der: bytes = b""
    nonce: bytes = field(default_factory=nonce)
    challenge: dict = field(default_factory=dict)  # type: ignore[type-arg]
    server_cert_der: bytes = b""

    def __post_init__(self) -> None:
        self.certificate_der = self.certificate_der or self.key.certificate()

    @classmethod
    def with_code(cls, code: str, **more: object) -> "Newcomer":
        """Know the code."""
        invite, secret = split_code(code)
        return cls(invite, derive(invite, secret), **more)  # type: ignore[arg-type]

    @classmethod
    def guessing(cls, invite: str, **more: object) -> "Newcomer":
        """Know the public part only, and make the rest up."""
        return cls(invite, CodeKeys(nonce(), nonce(), nonce()), **more)  # type: ignore[arg-type]

    def hello(self) -> dict[str, object]:
        """Return the greeting."""
        return {
            "v": 1,
            "invite": self.invite,
            "nonce": self.nonce.hex(),
            "cert": b64(self.certificate_der),
            "role": self.role,
            "name": self.name,
        }

    def transcript(self) -> bytes:
        """Return what both sides should agree on, as this side has seen it."""
        return transcript(
            self.invite.encode(),
            self.nonce,
            bytes.fromhex(self.challenge["nonce"]),
            hashlib.sha256(self.server_cert_der).digest(),
            hashlib.sha256(self.certificate_der).digest(),
            bytes.fromhex(self.challenge["genesis"]),
            self.role.encode(),
            self.name.encode(),
        )

    def inviter_is_proved(self) -> bool:
        """Tell whether the other side knows the code."""
        expected = hmac.digest(self.keys.inviter, self.transcript(), "sha256").hex()
        return bool(self.challenge["mac"] == expected)

    def confirm(self) -> dict[str, object]:
        """Return the proof."""
        covered = self.transcript()
        return {
            "session": self.challenge["session"],
            "mac": hmac.digest(self.keys.joiner, covered, "sha256").hex(),
            "sig": self.key.sign(POSSESSION + covered).hex(),
        }

    def statements(self, reply: Reply) -> list[dict[str, object]]:
        """Open what was handed over."""
        data = base64.b64decode(reply.json["bundle"])
        assert reply.json["mac"] == hmac.digest(self.keys.bundle, self.transcript() + data, "sha256").hex()
        found = json.loads(data)["statements"]
        assert isinstance(found, list)
        return found

    def greet(self, talk: Talk) -> Reply:
        """Send the greeting and keep the answer."""
        reply = talk.call("POST", HELLO, self.hello())
        if reply.status == 200:
            self.challenge = reply.json
        self.server_cert_der = talk.server_cert_der
        return reply

    def run(self, source: Host, address: str, *, port: int = PORT) -> Reply:
        """Enrol; returns the last answer."""
        with Talk.to(source, address, port=port) as talk:
            reply = self.greet(talk)
            if reply.status != 200:
                return reply
            assert self.inviter_is_proved()
            return talk.call("POST", CONFIRM, self.confirm())


def changed(newcomer: Newcomer, **changes: object) -> Newcomer:
    """Return a copy with changes."""
    return replace(newcomer, **changes)  # type: ignore[arg-type]
