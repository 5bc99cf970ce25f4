"""A signing key in a file of this node, for where no separate signing process holds it."""

from pathlib import Path

from mycoswarmd.errors import NotFound
from mycoswarmd.trust.keyfile import read_key, remove_files, write_key
from mycoswarmd.trust.keys import make_seed, public_key, sign


class FileSigner:
    """Keeps the key in `signer.key` of a directory; implements flow.swarmports.Signer."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "signer.key"
        self._seed: bytes | None = None

    def public_key(self) -> bytes | None:
        """Return the public half, or None: this node signs nothing; ConfigError for a key of no use."""
        seed = self._load()
        return public_key(seed) if seed is not None else None

    def create(self) -> bytes:
        """Make the key if there is none, durably, and return its public half."""
        seed = self._load()
        if seed is None:
            seed = make_seed()
            write_key(self._path, seed)
            self._seed = seed
        return public_key(seed)

    def sign(self, message: bytes) -> bytes:
        """Sign; raise NotFound("not-a-signer") where there is no key."""
        seed = self._load()
        if seed is None:
            raise NotFound("not-a-signer", "cannot sign: this node holds no signing key")
        return sign(seed, message)

    def destroy(self) -> None:
        """Forget the key. Idempotent."""
        self._seed = None
        remove_files(self._path)

    def _load(self) -> bytes | None:
        if self._seed is None:
            self._seed = read_key(self._path)
        return self._seed
