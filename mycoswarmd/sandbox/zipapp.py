"""The agent's code as one file for the system's Python: a zip whose bytes depend on its sources alone.

Compiled modules lie beside the sources: a Python with another magic number ignores them, and one with the
same starts twice as fast.
"""

import importlib.util
import io
import marshal
import zipfile
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
PARTS = ("__init__.py", "errors.py", "agent/*.py", "wire/*.py")
# The rest of the agent is imported when the cage is proved: see agent/threshold.py.
MAIN = """
from mycoswarmd.agent.threshold import cross

confined = cross()

from mycoswarmd.agent.main import main

main(*confined)
"""
# The earliest time a zip can hold.
EPOCH = (1980, 1, 1, 0, 0, 0)


def build_agent() -> bytes:
    """Return the zip of what runs in a cage: the agent, wire and errors, and nothing else of this package."""
    return build_zip({"__main__.py": MAIN, **{name: path.read_text("utf-8") for name, path in _sources()}})


def build_zip(modules: dict[str, str]) -> bytes:
    """Return a deterministic zip of modules by name, each with its compiled form."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(modules):
            archive.writestr(zipfile.ZipInfo(name, EPOCH), modules[name])
            archive.writestr(zipfile.ZipInfo(f"{name}c", EPOCH), _compile(name, modules[name]))
    return target.getvalue()


def _compile(name: str, source: str) -> bytes:
    # Flag 1 without 2: identified by hash, not checked; there is no other source than the one beside it.
    code = compile(source, name, "exec", dont_inherit=True, optimize=0)
    flags = (1).to_bytes(4, "little")
    digest = importlib.util.source_hash(source.encode())
    return importlib.util.MAGIC_NUMBER + flags + digest + marshal.dumps(code)


def _sources() -> Iterator[tuple[str, Path]]:
    for pattern in PARTS:
        for path in sorted(PACKAGE.glob(pattern)):
            yield f"mycoswarmd/{path.relative_to(PACKAGE).as_posix()}", path
