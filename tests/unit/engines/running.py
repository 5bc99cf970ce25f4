"""Engines in tests: an adapter that runs beside a scripted server."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from mycoswarmd.engines.openai_http import OpenAIEngine
from mycoswarmd.engines.upstream import Patience
from mycoswarmd.flow.ports import Engine
from mycoswarmd.wire.openai import parse_chat
from mycoswarmd.wire.prompt import Delta, Prompt, Via
from tests.permits import permit_for

# Whatever comes is waited for.
PATIENT = Patience(connect_s=60, first_byte_s=60, idle_s=60, answer_s=60, probe_s=60)
# An answer that never comes is waited for in a test.
QUICK = replace(PATIENT, first_byte_s=0.8, idle_s=0.8, answer_s=0.8)
E = TypeVar("E", bound=OpenAIEngine)


@asynccontextmanager
async def running(engine: E) -> AsyncIterator[E]:
    """Run an engine until the end of the context, from when it has first looked at its server."""
    async with asyncio.TaskGroup() as group:
        runner = group.create_task(engine.run(), name="engine")
        try:
            await until(lambda: engine.health().state != "starting")
            yield engine
        finally:
            runner.cancel()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.002)


def chat(model: str = "small", **more: Any) -> Prompt:
    body = {"model": model, "messages": [{"role": "user", "content": "SECRET-MARKER"}], **more}
    return parse_chat(json.dumps(body).encode())


async def deltas_of(engine: Engine, prompt: Prompt) -> list[Delta]:
    async with aclosing(engine.stream(permit_for(prompt.model), prompt)) as stream:
        return [delta async for delta in stream if not isinstance(delta, Via)]
