"""The embedded engine: serves every GGUF file of the models directory with one llama.cpp child at a time.

Rule: a model is advertised once a child has loaded it and answered a probe. One task, `_drive`, starts
and stops children; prompts only ask it for their model and wait. A child that dies is started again with
back-off; a model that others wait for gets its turn when the prompts before it are done.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

from mycoswarmd.core.policy.evaluate import Permit
from mycoswarmd.core.types import Zone
from mycoswarmd.engines.checks import check_permit, find_model
from mycoswarmd.engines.llamaproc import LOAD_S, LlamaChild, LlamaOptions, context_of, running
from mycoswarmd.engines.modelsdir import ModelFile, scan
from mycoswarmd.engines.slots import Slots
from mycoswarmd.engines.upstream import Patience
from mycoswarmd.errors import CageError, ConfigError, EngineError, MycoswarmError, Unavailable
from mycoswarmd.flow.ports import Clock, EngineHealth, EngineStarter, EngineUnitStarter, ModelInfo
from mycoswarmd.wire.prompt import Answer, Delta, Embeddings, Prompt, PromptKind

# A dropped file appears this soon; one scan of unchanged files is a few system calls.
SCAN_S = 1.0
# Doubled for each failure in a row. The first is short: most crashes are one bad prompt.
BACKOFF_S = 0.25
MAX_BACKOFF_S = 30.0
# A child that has lived this long has not crashed at once.
STABLE_S = 60.0
# Prompts that may wait for their model to be loaded.
MAX_WAITING = 64
# Two slots share the context, so that a short prompt need not wait for a long answer.
PARALLEL = 2
_ENGINES = "xllamacpp-*/xllamacpp/__init__.py"
_NOT_INSTALLED = "the embedded engine is not installed"
_INSTALL = "mycoswarmctl engine install"


class ManagedLlama:
    """The embedded engine. `run` is its lifetime: afterwards no child is left.

    With `units`, every child is a unit that PID 1 confines, and `starter` is not used.
    """

    def __init__(
        self,
        name: str,
        models_dir: Path,
        engine_dir: Path,
        runtime_dir: Path,
        *,
        starter: EngineStarter,
        units: EngineUnitStarter | None = None,
        clock: Clock,
        idle_s: float = 900.0,
        context_tokens: int = 4096,
        patience: Patience | None = None,
    ) -> None:
        self._name = name
        self._models_dir = models_dir
        self._engine_dir = engine_dir
        self._runtime_dir = runtime_dir
        self._starter = starter
        self._units = units
        self._install = _INSTALL if units is None else f"sudo {_INSTALL}"  # units are a service's
        self._clock = clock
        self._idle_s = idle_s
        self._context_tokens = context_tokens
        self._patience = patience or Patience()
        self._slots = Slots(name, limit=PARALLEL, max_waiting=MAX_WAITING, wait_s=120.0)
        self._poke = asyncio.Event()
        self._files: tuple[ModelFile, ...] = ()
        self._served: dict[ModelFile, ModelInfo] = {}  # probed at least once
        self._failed: dict[ModelFile, str] = {}  # tried, and why it is not served
        self._waiters: dict[str, list[asyncio.Future[LlamaChild]]] = {}  # by model, first come first
        self._child: LlamaChild | None = None
        self._crashed: ModelFile | None = None  # to be started again
        self._failures = 0  # in a row
        self._restarts = 0
        self._loading = ""
        self._problem = ""
        self._is_running = False

    @property
    def name(self) -> str:
        """The engine's name in settings and status."""
        return self._name

    def models(self) -> Sequence[ModelInfo]:
        """Return the models that a child has answered with."""
        return [self._served[file] for file in self._files if file in self._served]

    def health(self) -> EngineHealth:
        """Return the engine's state, with the reason for each file that is not served."""
        child = self._child
        if not self._is_running:
            state = "stopped"
        elif self._problem:
            state = "down"
        elif self._loading and not self._served:
            state = "starting"
        else:
            state = "ready"
        return EngineHealth(
            name=self._name,
            kind="managed",
            state=state,
            detail="; ".join(self._details()),
            models=len(self.models()),
            running=self._slots.running,
            waiting=self._slots.waiting + sum(len(one) for one in self._waiters.values()),
            pid=child.process.pid if child is not None else None,
            restarts=self._restarts,
        )

    def _details(self) -> list[str]:
        details = [self._problem] if self._problem else []
        if self._loading:
            details.append(f"loading {self._loading}")
        if self._child is not None and not self._child.process.confined:
            details.append("the engine's process is not confined")
        if not self._problem and not self._files:
            details.append(f"no model in {self._models_dir}: {self._install}")
        bad = [(file, file.problem or self._failed.get(file)) for file in self._files]
        return details + [f"{file.path.name}: {problem}" for file, problem in bad if problem]

    async def run(self) -> None:
        """Serve until cancelled."""
        self._is_running = True
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._scan(), name=f"engine:{self._name}:scan")
                group.create_task(self._drive(group), name=f"engine:{self._name}:drive")
        finally:
            self._is_running = False
            self._refuse_waiters("it is being stopped")

    async def _scan(self) -> None:
        while True:
            files = await asyncio.to_thread(scan, self._models_dir, self._files)
            if files != self._files:
                self._files = files
                self._served = {file: info for file, info in self._served.items() if file in files}
                self._failed = {file: why for file, why in self._failed.items() if file in files}
                self._poke.set()
            await asyncio.sleep(SCAN_S)

    async def _drive(self, group: asyncio.TaskGroup) -> None:
        while True:
            file = await self._next_file()
            engine = self._installed_engine()
            if engine is None:
                self._problem = f"{_NOT_INSTALLED}: {self._install}"
                self._refuse_waiters(self._problem)
                await asyncio.sleep(SCAN_S)
                continue
            started_s = self._clock.monotonic_s()
            self._crashed = None
            try:
                await self._serve(file, engine, group)
            except MycoswarmError as exc:
                if self._clock.monotonic_s() - started_s > STABLE_S:
                    self._failures = 0
                await self._back_off(file, exc)
            else:
                self._failures = 0

    async def _next_file(self) -> ModelFile:
        """Wait for work: a model that is waited for, one that crashed, or one that was never tried."""
        while True:
            self._poke.clear()
            wanted = next(iter(self._waiters), None)
            for file in self._files:
                if file.name == wanted and file in self._served:
                    return file
            if wanted is not None:
                self._refuse_waiters(f"the file of model {wanted!r} is gone", name=wanted)
                continue
            if self._crashed in self._files and self._crashed is not None:
                return self._crashed
            if untried := self._untried():
                return untried
            await self._poke.wait()

    def _untried(self) -> ModelFile | None:
        seen = self._served.keys() | self._failed.keys()
        return next((file for file in self._files if file.facts is not None and file not in seen), None)

    def _installed_engine(self) -> Path | None:
        found = max(self._engine_dir.glob(_ENGINES), default=None, key=lambda path: path.stat().st_mtime_ns)
        return found.parent.parent if found is not None else None

    async def _serve(self, file: ModelFile, engine: Path, group: asyncio.TaskGroup) -> None:
        """Hold a child for a model until it is no longer wanted; raise if it ends by itself."""
        options = LlamaOptions(
            engine_dir=engine,
            runtime_dir=self._runtime_dir,
            starter=self._starter,
            units=self._units,
            context_tokens=self._context_tokens,
            parallel=PARALLEL,
            threads=os.cpu_count() or 1,
            patience=self._patience,
        )
        self._loading = file.name
        try:
            async with running(self._name, file, options, group=group, poke=self._poke) as child:
                self._loading, self._problem = "", ""
                self._child = child
                self._served[file] = self._info(file, child)
                try:
                    await self._until_unwanted(child)
                finally:
                    self._child = None
                    self._served[file] = self._info(file, child)
        finally:
            self._loading = ""

    async def _until_unwanted(self, child: LlamaChild) -> None:
        while True:
            self._poke.clear()
            if child.exit_code is not None:
                raise EngineError(
                    "engine-failed", f"cannot go on: the engine ended by itself with code {child.exit_code}"
                )
            self._grant(child)
            if child.users == 0 and self._is_other_wanted(child):
                return
            try:
                async with asyncio.timeout(self._idle_s if child.users == 0 else None):
                    await self._poke.wait()
            except TimeoutError:
                if child.users == 0:
                    return

    def _is_other_wanted(self, child: LlamaChild) -> bool:
        return bool(self._waiters) or child.file not in self._files or self._untried() is not None

    def _grant(self, child: LlamaChild) -> None:
        """Let in the prompts that wait for this child's model, if they are first in line."""
        if next(iter(self._waiters), None) == child.file.name:
            for waiter in self._waiters.pop(child.file.name):
                if not waiter.done():
                    child.users += 1
                    waiter.set_result(child)

    async def _back_off(self, file: ModelFile, exc: MycoswarmError) -> None:
        """Take note of a failure and wait, longer each time in a row."""
        self._failures += 1
        if file in self._served:
            self._restarts += 1
            self._crashed = file
        elif not isinstance(exc, (CageError, ConfigError)):
            self._failed[file] = exc.message  # it is this file's fault, until it changes
            self._failures = 0
            return
        self._problem = exc.message
        if self._failures > 1:
            self._refuse_waiters(exc.message)
        await asyncio.sleep(min(BACKOFF_S * 2 ** (self._failures - 1), MAX_BACKOFF_S))

    def _refuse_waiters(self, cause: str, *, name: str | None = None) -> None:
        names = list(self._waiters) if name is None else [name]
        for one in names:
            for waiter in self._waiters.pop(one):
                if not waiter.done():
                    waiter.set_exception(self._down(cause))

    def _down(self, cause: str) -> Unavailable:
        return Unavailable(
            "engine-down",
            f"cannot answer now: engine {self._name!r}: {cause}",
            hint="mycoswarmctl status shows each engine",
            retry_after_s=5,
        )

    def _info(self, file: ModelFile, child: LlamaChild) -> ModelInfo:
        facts = file.facts
        if facts is not None and facts.is_embedding:
            kinds = frozenset({PromptKind.EMBEDDING})
        elif facts is not None and not facts.has_chat_template:
            kinds = frozenset({PromptKind.TEXT})
        else:
            kinds = frozenset({PromptKind.CHAT, PromptKind.TEXT})
        return ModelInfo(
            name=file.name,
            engine=self._name,
            zone=Zone.SELF,
            kinds=kinds,
            context_tokens=child.props.context_tokens or context_of(file, self._context_tokens),
            native_tools=child.props.supports_tools,
            loaded=self._child is child,
            size_bytes=file.size_bytes,
        )

    @asynccontextmanager
    async def _using(self, permit: Permit, prompt: Prompt) -> AsyncIterator[LlamaChild]:
        """Hold the child of a prompt's model and a place in it."""
        if not self._is_running:
            raise self._down("it is not running")
        check_permit(permit, find_model(self.models(), prompt, engine=self._name))
        child = await self._child_for(prompt.model)
        try:
            async with self._slots.taken():
                yield child
        finally:
            child.users -= 1
            if child.users == 0:
                self._poke.set()

    async def _child_for(self, model: str) -> LlamaChild:
        child = self._child
        if child is not None and child.file.name == model and child.exit_code is None and not self._waiters:
            child.users += 1
            return child
        if sum(len(one) for one in self._waiters.values()) >= MAX_WAITING:
            raise Unavailable(
                "engine-busy",
                f"cannot answer now: {MAX_WAITING} prompts wait for engine {self._name!r}",
                retry_after_s=10,
            )
        waiter: asyncio.Future[LlamaChild] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(model, []).append(waiter)
        self._poke.set()
        try:
            async with asyncio.timeout(LOAD_S):
                return await waiter
        except (TimeoutError, asyncio.CancelledError) as exc:
            self._give_up(model, waiter)
            if isinstance(exc, TimeoutError):
                raise self._down(f"model {model!r} was not ready within {LOAD_S:g} s") from exc
            raise

    def _give_up(self, model: str, waiter: asyncio.Future[LlamaChild]) -> None:
        """Take a waiter out of the line, or give back the child that it has just been granted."""
        if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
            waiter.result().users -= 1
        line = self._waiters.get(model, [])
        if waiter in line:
            line.remove(waiter)
            if not line:
                del self._waiters[model]
        self._poke.set()

    async def stream(self, permit: Permit, prompt: Prompt) -> AsyncGenerator[Delta, None]:
        """Yield the answer piece by piece; closing it stops the engine's work."""
        async with (
            self._using(permit, prompt) as child,
            aclosing(child.upstream.stream(prompt, native_tools=child.props.supports_tools)) as deltas,
        ):
            async for delta in deltas:
                yield delta

    async def complete(self, permit: Permit, prompt: Prompt) -> Answer:
        """Return the whole answer; cancelling stops the engine's work."""
        async with self._using(permit, prompt) as child:
            return await child.upstream.complete(prompt, native_tools=child.props.supports_tools)

    async def embed(self, permit: Permit, prompt: Prompt) -> Embeddings:
        """Return one vector for each input."""
        async with self._using(permit, prompt) as child:
            return await child.upstream.embed(prompt)
