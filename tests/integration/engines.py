"""The embedded engine in tests: one that runs, as the daemon runs it."""

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from mycoswarmd.daemon.clock import SystemClock
from mycoswarmd.engines.llamacpp import ManagedLlama
from mycoswarmd.sandbox.process import start_engine

MODEL = "SmolLM2-135M-Instruct-Q4_1"
MODEL_FILE = f"{MODEL}.gguf"
WAIT_S = 120.0


@asynccontextmanager
async def managed(
    state: Path, *, models: Path | None = None, idle_s: float = 900.0
) -> AsyncIterator[ManagedLlama]:
    """Run an embedded engine; its socket needs a short path, so not tmp_path."""
    with tempfile.TemporaryDirectory(prefix="e-") as runtime:
        engine = ManagedLlama(
            name="embedded",
            models_dir=models or state / "models",
            engine_dir=state / "engine",
            runtime_dir=Path(runtime),
            starter=start_engine,
            clock=SystemClock(),
            idle_s=idle_s,
        )
        async with asyncio.TaskGroup() as group:
            runner = group.create_task(engine.run(), name="engine")
            try:
                yield engine
            finally:
                runner.cancel()


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"still not: {what}"
        await asyncio.sleep(0.02)


async def ready(engine: ManagedLlama, model: str = MODEL) -> None:
    """Wait until a model is served."""
    await until(lambda: any(one.name == model for one in engine.models()), f"{model}: {engine.health()}")


def is_alive(pid: int) -> bool:
    """Tell whether a process exists and has not ended."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
