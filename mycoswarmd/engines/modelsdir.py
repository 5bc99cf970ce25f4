"""The models directory: every GGUF file in it is a model, named by the file's stem.

Rule: a file is looked at again only when its size or time has changed; one that cannot be read is
reported with its reason and never served. Symbolic links are followed: people keep models elsewhere.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from mycoswarmd.errors import MycoswarmError
from mycoswarmd.wire.gguf import GgufFacts, read_gguf

# A directory with more files than this is somebody's archive.
MAX_FILES = 1000
# Fits OpenAI's names and a socket's log line.
MAX_NAME_CHARS = 200
_SUFFIX = ".gguf"
# Reading a vocabulary of 50,000 words through a buffer takes some 30 ms; without, a second.
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """One file of the directory; equal as long as the file has not changed.

    Attributes:
        facts: what its head says, or None when it cannot be served; `problem` says why.
    """

    name: str
    path: Path
    size_bytes: int
    changed_at_ns: int
    facts: GgufFacts | None
    problem: str = ""


def scan(directory: Path, known: tuple[ModelFile, ...]) -> tuple[ModelFile, ...]:
    """List the directory's models by name, taking over what is known of unchanged files."""
    before = {(one.path, one.size_bytes, one.changed_at_ns): one for one in known}
    try:
        names = sorted(one.name for one in directory.iterdir() if one.suffix == _SUFFIX)[:MAX_FILES]
    except OSError:
        return ()  # the directory comes with the first model
    files = []
    for name in names:
        path = directory / name
        stem = name.removesuffix(_SUFFIX)
        if not stem or stem.startswith(".") or not stem.isprintable() or len(stem) > MAX_NAME_CHARS:
            continue
        try:
            status = path.stat()
        except OSError:
            continue  # it has just gone, or it is a link to nowhere
        if stat.S_ISREG(status.st_mode):
            key = (path, status.st_size, status.st_mtime_ns)
            files.append(before.get(key) or _look(stem, path, status))
    return tuple(files)


def _look(name: str, path: Path, status: os.stat_result) -> ModelFile:
    facts, problem = None, ""
    try:
        with path.open("rb", buffering=_BUFFER_BYTES) as file:
            facts = read_gguf(file)
    except MycoswarmError as exc:
        problem = exc.message
    except OSError as exc:
        problem = f"cannot read the model file: {exc.strerror}"
    return ModelFile(
        name=name,
        path=path,
        size_bytes=status.st_size,
        changed_at_ns=status.st_mtime_ns,
        facts=facts,
        problem=problem,
    )
