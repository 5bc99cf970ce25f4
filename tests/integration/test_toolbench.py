"""Tool calls of a model with 135 million parameters that knows no tools: 20 prompts, 4 tools, temperature 0.

The way is a client's: the OpenAI dialect, the engine's adapter, wire/tools, and back.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from mycoswarmd.flow.ports import Engine
from mycoswarmd.wire.openai import parse_chat
from tests.integration.engines import MODEL, managed, ready
from tests.permits import permit_for

pytestmark = [pytest.mark.engine, pytest.mark.integration, pytest.mark.xdist_group("engine")]
TEXT = {"type": "string"}


def tool(name: str, description: str, properties: dict[str, object], *required: str) -> dict[str, object]:
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [
    tool(
        "get_weather",
        "Get the current weather for a city",
        {"city": TEXT, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
        "city",
    ),
    tool(
        "set_light",
        "Turn a light on or off in a room",
        {"room": TEXT, "on": {"type": "boolean"}},
        "room",
        "on",
    ),
    tool("search_web", "Search the web for a query", {"query": TEXT}, "query"),
    tool("run_shell", "Run a shell command on the host", {"command": TEXT}, "command"),
]
# A request, the right tool, and what its arguments must mention.
PROMPTS = (
    ("What is the weather in Paris in celsius?", "get_weather", "Paris"),
    ("How hot is it in Tokyo right now?", "get_weather", "Tokyo"),
    ("Will I need an umbrella in London? Check the weather.", "get_weather", "London"),
    ("Weather for Berlin, fahrenheit please.", "get_weather", "Berlin"),
    ("Tell me the temperature in Oslo.", "get_weather", "Oslo"),
    ("Turn on the light in the kitchen.", "set_light", "kitchen"),
    ("Switch off the bedroom light.", "set_light", "bedroom"),
    ("Please make the garage light on.", "set_light", "garage"),
    ("Lights off in the bathroom.", "set_light", "bathroom"),
    ("Turn the office light on.", "set_light", "office"),
    ("Search the web for mushroom recipes.", "search_web", "mushroom"),
    ("Look up the latest news about Debian online.", "search_web", "Debian"),
    ("Find information on the internet about RTX 3090 power usage.", "search_web", "3090"),
    ("Google the height of Mount Everest.", "search_web", "Everest"),
    ("Search for cheap Raspberry Pi cases.", "search_web", "Raspberry"),
    ("Run the command 'uptime' on the host.", "run_shell", "uptime"),
    ("Execute 'df -h' in the shell.", "run_shell", "df"),
    ("Use the shell to list files with ls.", "run_shell", "ls"),
    ("Run 'free -m' for me.", "run_shell", "free"),
    ("Execute the shell command whoami.", "run_shell", "whoami"),
)


async def call_of(engine: Engine, request: str, choice: str) -> tuple[str, dict[str, Any]]:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": request}],
        "tools": TOOLS,
        "tool_choice": choice,
        "temperature": 0,
        "max_tokens": 100,
    }
    answer = await engine.complete(permit_for(MODEL), parse_chat(json.dumps(body).encode()))
    if not answer.tool_calls:
        return "", {}
    (call,) = answer.tool_calls
    assert answer.finish == "tool_calls"
    arguments = json.loads(call.arguments)
    assert isinstance(arguments, dict)
    return call.name, arguments


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("choice", "least"),
    [
        ("required", 18),
        # Here it may also answer in words, which so small a model does now and then.
        ("auto", 14),
    ],
)
async def test_the_small_model_chooses_the_right_tool(choice: str, least: int, embedded_engine: Path) -> None:
    right_tool = right_arguments = 0
    wrong = []
    async with managed(embedded_engine) as engine:
        await ready(engine)
        for request, wanted, mention in PROMPTS:
            name, arguments = await call_of(engine, request, choice)
            if name == wanted:
                right_tool += 1
                right_arguments += mention.lower() in json.dumps(arguments).lower()
            else:
                wrong.append((request, name))
    assert right_tool >= least, wrong
    assert right_arguments >= least - 3
