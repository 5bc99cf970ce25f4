"""One running llama.cpp child with one model: started, waited for, probed with one token, stopped.

Rule: nobody gets to use a child before it has answered a probe, and nothing of it is left when its
context ends.
"""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mycoswarmd.engines.address import Address
from mycoswarmd.engines.modelsdir import ModelFile
from mycoswarmd.engines.upstream import USURPED, Patience, Upstream
from mycoswarmd.errors import CageError, ConfigError, EngineError, MycoswarmError, Unavailable
from mycoswarmd.flow.ports import EngineProcess, EngineStarter, EngineUnitStarter
from mycoswarmd.wire.engineunit import ENVIRONMENT, Serving, child_argv
from mycoswarmd.wire.prompt import Message, Prompt, PromptKind
from mycoswarmd.wire.upstream import Props, parse_props

CHILD = Path(__file__).with_name("llama_child.py")
# A 40 GB model from a slow disk.
LOAD_S = 900.0
_POLL_S = 0.03
# The kernel's limit for the path of a unix socket, less the final zero byte.
_SOCKET_PATH_BYTES = 107
_LOG_TAIL_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaOptions:
    """How every child is started."""

    engine_dir: Path  # of one unpacked xllamacpp
    runtime_dir: Path  # for the socket and the log
    starter: EngineStarter
    units: EngineUnitStarter | None  # where there are units, nothing is started as a child
    context_tokens: int
    parallel: int
    threads: int
    patience: Patience


@dataclass(slots=True, kw_only=True)
class LlamaChild:
    """A child that has answered its probe.

    Attributes:
        users: prompts that it works on; it is not stopped for another model while there are any.
    """

    file: ModelFile
    process: EngineProcess
    upstream: Upstream
    props: Props
    users: int = 0
    exit_code: int | None = None
    lost: CageError | None = None  # why nobody knows how it ended
    poke: asyncio.Event = field(default_factory=asyncio.Event)


@asynccontextmanager
async def running(
    name: str, file: ModelFile, options: LlamaOptions, *, group: asyncio.TaskGroup, poke: asyncio.Event
) -> AsyncIterator[LlamaChild]:
    """Hold a probed child; a task in `group` watches it, and `poke` is set when it ends by itself.

    Raises EngineError("engine-failed") when the model does not load or answer, CageError or ConfigError
    when no child can be started at all.
    """
    directory = options.runtime_dir / f"engine-{name}"
    log_path = options.runtime_dir / f"engine-{name}.log"
    process, socket = await _start(file, options, directory, log_path)
    upstream = Upstream(
        name,
        Address(base_url="http://engine", socket_path=str(socket)),
        patience=options.patience,
        # The directory of a child's socket is the node's own; that of units is theirs together.
        listener_pid=process.pid if options.units is not None else None,
    )
    child = LlamaChild(
        file=file,
        process=process,
        upstream=upstream,
        props=Props(context_tokens=None, supports_tools=False),
        poke=poke,
    )
    watcher = group.create_task(_watch(child), name=f"engine:{name}:watch")
    try:
        async with upstream.opened():
            await _wait_until_loaded(child, log_path)
            await _probe(child)
            yield child
    finally:
        # One at a time: a process has one waiter.
        watcher.cancel()
        try:
            await asyncio.wait([watcher])
        finally:
            await process.kill()
            shutil.rmtree(directory, ignore_errors=True)


def _prepare(directory: Path, log_path: Path) -> Path:
    socket = directory / "s.sock"
    if len(os.fsencode(socket)) > _SOCKET_PATH_BYTES:
        raise ConfigError(
            "engine-address",
            f"cannot start the engine: its socket's path {str(socket)!r} is too long",
            hint=f"at most {_SOCKET_PATH_BYTES} bytes: choose a shorter runtime directory",
        )
    try:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(mode=0o700, parents=True)
        log_path.write_bytes(b"")
    except OSError as exc:
        raise ConfigError(
            "engine-address", f"cannot start the engine: {str(directory)!r}: {exc.strerror}"
        ) from exc
    return socket


async def _start(
    file: ModelFile, options: LlamaOptions, directory: Path, log_path: Path
) -> tuple[EngineProcess, Path]:
    """Start a process, and say where it will listen."""
    serving = Serving(
        context_tokens=context_of(file, options.context_tokens),
        parallel=options.parallel,
        threads=options.threads,
        is_embedding=file.facts is not None and file.facts.is_embedding,
    )
    socket = _prepare(directory, log_path)
    if options.units is not None:
        unit = await options.units(
            engine=options.engine_dir.name, model=file.path.name, serving=serving, log_path=log_path
        )
        return unit, unit.socket_path
    argv = child_argv(
        serving,
        program=str(CHILD),
        engine=str(options.engine_dir),
        model=str(file.path),
        name=file.name,
        socket=str(socket),
    )
    process = options.starter(
        argv,
        read_paths=[options.engine_dir, file.path, CHILD],
        write_paths=[directory],
        env=ENVIRONMENT,
        log_path=log_path,
    )
    return process, socket


def context_of(file: ModelFile, wanted_tokens: int) -> int:
    """Return the context to serve a model with: what is wanted, at most what it was trained for."""
    trained = file.facts.context_tokens if file.facts is not None else None
    return min(wanted_tokens, trained) if trained else wanted_tokens


async def _watch(child: LlamaChild) -> None:
    try:
        child.exit_code = await child.process.wait()
    except CageError as exc:
        child.exit_code, child.lost = -1, exc
    child.poke.set()


async def _wait_until_loaded(child: LlamaChild, log_path: Path) -> None:
    try:
        async with asyncio.timeout(LOAD_S):
            while child.exit_code is None:
                if await _is_healthy(child):
                    return
                await asyncio.sleep(_POLL_S)
    except TimeoutError as exc:
        raise _failed(child.file, f"it did not load within {LOAD_S:g} s") from exc
    if child.lost is not None:
        raise child.lost  # not the model's doing
    raise _failed(child.file, _reason(child.exit_code, log_path))


async def _is_healthy(child: LlamaChild) -> bool:
    try:
        status, _ = await child.upstream.fetch("/health")
    except EngineError:
        return False
    except Unavailable as exc:
        if exc.code == USURPED:  # no model's fault, and nothing to wait for
            raise CageError(exc.code, exc.message, hint=exc.hint) from exc
        return False
    return status == 200


async def _probe(child: LlamaChild) -> None:
    """Ask for one token, or one vector: a model can load and still crash its engine (M6 for engines)."""
    facts = child.file.facts
    try:
        if facts is not None and facts.is_embedding:
            await child.upstream.embed(
                Prompt(kind=PromptKind.EMBEDDING, model=child.file.name, inputs=("Hi",), params={})
            )
        else:
            hello = Message(role="user", content="Hi")
            await child.upstream.complete(
                Prompt(
                    kind=PromptKind.CHAT, model=child.file.name, messages=(hello,), params={"max_tokens": 1}
                ),
                native_tools=True,
            )
        status, untrusted = await child.upstream.fetch("/props")
        if status == 200:
            child.props = parse_props(untrusted)
    except MycoswarmError as exc:
        raise _failed(child.file, f"it loads but does not answer: {exc.message}") from exc


def _reason(exit_code: int, log_path: Path) -> str:
    """Say why a child ended, in its own last words where it had some."""
    try:
        tail = log_path.read_bytes()[-_LOG_TAIL_BYTES:].decode("utf-8", "replace")
    except OSError:
        tail = ""
    lines = [line.strip() for line in tail.splitlines() if "cannot load" in line or "error loading" in line]
    said = lines[0] if lines else "it said nothing"
    return f"the engine ended with code {exit_code}: {said[:300]}"


def _failed(file: ModelFile, cause: str) -> EngineError:
    return EngineError("engine-failed", f"cannot serve model {file.name!r}: {cause}")
