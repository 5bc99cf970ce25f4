"""The paper key of a swarm: made here, shown once, asked back, and used once in a blue moon to sign.

Law: the node never sees the secret half, and nothing writes it to a disk. It passes through this process
and the terminal alone. Loaded by the commands that need it: it brings cryptography.
"""

import base64
import importlib
import json
import re
import secrets
import sys
from dataclasses import dataclass
from types import ModuleType

from mycoswarmd.core.recovery import format_recovery, parse_recovery
from mycoswarmd.core.roster import Kind, make_body, signed
from mycoswarmd.ctl.refusals import Doc
from mycoswarmd.ctl.screen import clean
from mycoswarmd.ctl.session import Session
from mycoswarmd.errors import BadRequest, Conflict, LocalProtocolError, NotFound
from mycoswarmd.trust import keys

_TRIES = 3
_ASKED = 2
_PER_ROW = 5
# Erase the screen and what was scrolled off it, go to the top left corner (ECMA-48, and xterm's ED 3).
_WIPE = "\x1b[2J\x1b[3J\x1b[H"
_FOLD = str.maketrans("OIL", "011")
_MAX_LINE = 1024


class PaperKey:
    """A recovery key in hand."""

    def __init__(self, seed: bytes) -> None:
        self._seed = seed

    @property
    def text(self) -> str:
        """The key as it is written on paper."""
        return format_recovery(self._seed)

    @property
    def groups(self) -> list[str]:
        """The key in its groups."""
        return re.findall(r"[0-9A-Za-z]+", self.text)

    @property
    def public_hex(self) -> str:
        """The half that the swarm keeps."""
        return keys.public_key(self._seed).hex()

    def sign(self, draft: "Draft") -> Doc:
        """Sign a draft that was read, byte for byte as it was read."""
        public = keys.public_key(self._seed)
        return dict(signed(draft.body, (public, lambda message: keys.sign(self._seed, message))))


@dataclass(frozen=True, slots=True)
class Draft:
    """A new epoch of one swarm, as `read_draft` lets it pass.

    Attributes:
        body: what is signed.
        number: which epoch it begins.
        kept: how many statements it keeps.
    """

    body: bytes
    number: int
    kept: int


def read_draft(untrusted_body: str, *, swarm_id: str, epoch: int, node_id: str) -> Draft:
    """Return the draft if it is the very next epoch of this swarm, with one key of this node as its signer.

    The recovery key outranks everybody, so it signs nothing that a node made up: not a far epoch (after
    which no other could come), not another's signing key, no field that is not looked at here.
    """
    try:
        body = base64.b64decode(untrusted_body, validate=True)
        facts = json.loads(body)
        (signer,) = facts["signers"]
        kept = facts["keep"]
        expected = make_body(
            Kind.EPOCH,
            swarm=swarm_id,
            epoch=epoch + 1,
            n=epoch + 1,
            signers=[{"key": signer["key"], "node": node_id}],
            keep=kept,
        )
    except (ValueError, RecursionError, TypeError, LookupError, BadRequest) as exc:
        raise _no_draft() from exc
    if body != expected:
        raise _no_draft()
    return Draft(body, epoch + 1, len(kept))


def _no_draft() -> LocalProtocolError:
    return LocalProtocolError(
        "bad-answer",
        "cannot sign the node's draft: it is not the next epoch of this swarm with this node as its signer",
        hint="the node may be taken over: take the paper to another member",
    )


def make() -> PaperKey:
    """Make a new key."""
    return PaperKey(keys.make_seed())


def find_qr() -> ModuleType:
    """Return the library that draws QR codes, or say how to get it."""
    try:
        return importlib.import_module("qrcode")
    except ImportError as exc:
        raise NotFound(
            "no-qr-library",
            "cannot draw a QR code: the Python package qrcode is not installed",
            hint="install it (Debian: python3-qrcode), or leave out --qr",
        ) from exc


def show(session: Session, key: PaperKey, qr: ModuleType | None) -> None:
    """Print the key for a person with a pen."""
    session.text("This is the recovery key of the swarm. It is shown this once and stored nowhere.")
    session.text("Whoever has it commands the swarm; without it a swarm whose signers are lost is lost.")
    session.text("Write it on paper:\n")
    groups = key.groups
    for at in range(0, len(groups), _PER_ROW):
        row = [f"{number:>3}: {text}" for number, text in enumerate(groups[at : at + _PER_ROW], at + 1)]
        print("  " + "".join(row))
    print()
    if qr is not None:
        code = qr.QRCode(border=2)
        code.add_data(key.text)
        code.print_ascii(out=sys.stdout)


def ask_back(session: Session, key: PaperKey) -> None:
    """Have a person type two groups from the paper; Conflict when they are wrong after three tries."""
    _ask("Press Enter when it is written down. ")
    if sys.stdout.isatty():
        print(_WIPE, end="", flush=True)
    groups = key.groups
    left = sorted(secrets.SystemRandom().sample(range(len(groups)), _ASKED))
    tries = _TRIES
    while left:
        typed = _ask(f"Read from your paper, group {left[0] + 1}: ")
        if _folded(typed) == _folded(groups[left[0]]):
            left.pop(0)
            continue
        tries -= 1
        if tries == 0:
            raise Conflict(
                "key-not-written",
                "cannot begin the swarm: what you typed is not what was shown",
                hint="nothing was changed; begin again, with a new key",
            )
        session.aside(f"that is not group {left[0] + 1}; {tries} more")


def read(session: Session, *, swarm: str, public_hex: str) -> PaperKey:
    """Read the key of this swarm from a person, or from standard input, on one line or on several.

    A person may try three times; nothing is signed with the key of another swarm.
    """
    if session.is_interactive():
        session.aside("Type the recovery key from your paper. Spaces and line ends do not matter.")
    for left in reversed(range(_TRIES if session.is_interactive() else 1)):
        try:
            return _read_once(session, swarm, public_hex)
        except (BadRequest, Conflict) as exc:
            if left == 0 or exc.code == "cannot-ask":
                raise
            session.aside(f"{exc.message}; {left} more")
    raise AssertionError


def _read_once(session: Session, swarm: str, public_hex: str) -> PaperKey:
    typed = ""
    while len(_folded(typed)) < _KEY_CHARS:
        untrusted = _ask("> " if session.is_interactive() else "")
        if not untrusted.strip():
            break
        typed += untrusted
    key = PaperKey(parse_recovery(typed))
    if key.public_hex != public_hex:
        raise Conflict(
            "wrong-recovery-key",
            f"cannot take the swarm back: this is not the recovery key of swarm {swarm!r}",
            hint="nothing was changed; is it the paper of another swarm?",
        )
    return key


def _ask(question: str) -> str:
    sys.stdout.flush()
    print(clean(question), end="", file=sys.stderr, flush=True)
    untrusted = sys.stdin.readline(_MAX_LINE)
    if not untrusted and question:
        raise BadRequest("cannot-ask", "cannot go on: nothing more can be read from the terminal")
    return untrusted


def _folded(text: str) -> str:
    return "".join(re.findall(r"[0-9A-Z]", text.upper())).translate(_FOLD)


_KEY_CHARS = len(_folded(format_recovery(bytes(32))))
