"""The wheel that this program came in, made again from its files.

Law: root installs what root has just run, or a file that root named. No index is asked for the node: its name
there belongs to whoever took it first.

Source: the binary distribution format of PyPA.
"""

import base64
import hashlib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from mycoswarmd import __version__
from mycoswarmd.errors import BadRequest

_NAME = "mycoswarmd"
_WHEEL = "Wheel-Version: 1.0\nGenerator: mycoswarmctl\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def named_wheel(given: Path) -> Path:
    """Return the wheel that was named, from the root; BadRequest for what is no file on this machine."""
    if given.suffix == ".whl" and given.is_file():
        return given.absolute()
    raise BadRequest(
        "no-wheel",
        f"cannot install from {str(given)!r}: it is no wheel on this machine",
        hint="a file such as mycoswarmd-0.1.0-py3-none-any.whl; without --from, what you are running",
    )


def make_wheel(into: Path) -> Path:
    """Write the wheel of this very program into a directory."""
    package = Path(__file__).resolve().parent.parent
    info = f"{_NAME}-{__version__}.dist-info"
    files = {
        f"{_NAME}/{path.relative_to(package).as_posix()}": path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and not path.is_symlink() and "__pycache__" not in path.parts
    }
    files[f"{info}/METADATA"] = _metadata().encode()
    files[f"{info}/WHEEL"] = _WHEEL.encode()
    record = "".join(f"{name},{_digest(data)},{len(data)}\n" for name, data in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    target = into / f"{_NAME}-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(target, "x") as wheel:
        for name, data in files.items():
            wheel.writestr(zipfile.ZipInfo(name), data)
    return target


def _metadata() -> str:
    """Return what was said at its own installation, such as what it needs."""
    try:
        said = distribution(_NAME)
    except PackageNotFoundError:
        said = None
    text = said.read_text("METADATA") if said is not None and said.version == __version__ else None
    return text or f"Metadata-Version: 2.1\nName: {_NAME}\nVersion: {__version__}\n"


def _digest(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
