"""The parameters of a prompt: name, kind and range of each one that may reach an engine.

Rule: what is not in the table is dropped and never forwarded; what is in it and out of range is
refused, with its name. A parameter that would change the answer's form in a way we do not deliver
(several choices, log probabilities) is refused and not dropped: no silent substitution (M10).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from mycoswarmd.errors import BadRequest
from mycoswarmd.wire.jsonv import as_bool, as_int, as_list, as_number, as_str

# OpenAI's own bounds for the number of stop texts; the length bound is ours.
MAX_STOPS = 4
MAX_STOP_CHARS = 64
# No model we know writes more in one answer; a larger number is a slip of the keyboard.
MAX_TOKENS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    """One accepted parameter: its name in a Prompt and how to check it."""

    name: str
    check: Callable[..., object]


def _stops(value: object, *, where: str) -> list[str]:
    if isinstance(value, str):
        value = [value]
    items = as_list(value, where=where, max_items=MAX_STOPS)
    return [
        as_str(item, where=f"{where}[{i}]", min_len=1, max_len=MAX_STOP_CHARS) for i, item in enumerate(items)
    ]


_TOKENS = Param(name="max_tokens", check=partial(as_int, low=1, high=MAX_TOKENS))
_PENALTY = partial(as_number, low=-2.0, high=2.0)

SAMPLING: Mapping[str, Param] = {
    "max_tokens": _TOKENS,
    "max_completion_tokens": _TOKENS,
    "temperature": Param(name="temperature", check=partial(as_number, low=0.0, high=2.0)),
    "top_p": Param(name="top_p", check=partial(as_number, low=0.0, high=1.0)),
    "top_k": Param(name="top_k", check=partial(as_int, low=0, high=100_000)),
    "min_p": Param(name="min_p", check=partial(as_number, low=0.0, high=1.0)),
    "seed": Param(name="seed", check=partial(as_int, low=0, high=2**63 - 1)),
    "stop": Param(name="stop", check=_stops),
    "frequency_penalty": Param(name="frequency_penalty", check=_PENALTY),
    "presence_penalty": Param(name="presence_penalty", check=_PENALTY),
}
CHAT: Mapping[str, Param] = {
    **SAMPLING,
    "parallel_tool_calls": Param(name="parallel_tool_calls", check=as_bool),
}

# name -> the only values that ask for what we deliver anyway; any other value is refused.
_ONLY: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (),
    "logit_bias": ({},),
    "functions": (),  # the forerunner of tools
    "function_call": (),
    "audio": (),
    "dimensions": (),
}
_HINTS = {
    "functions": "use `tools`",
    "function_call": "use `tool_choice`",
    "n": "send the request several times",
}


def parse_params(body: Mapping[str, object], table: Mapping[str, Param]) -> dict[str, object]:
    """Return the parameters of a request that are in the table, checked; refuse what cannot be honoured."""
    for key, accepted in _ONLY.items():
        value = body.get(key)
        if value is not None and not any(value == one and type(value) is type(one) for one in accepted):
            raise _unsupported(key, accepted)
    params: dict[str, object] = {}
    for key, param in table.items():
        value = body.get(key)
        if value is not None:
            params[param.name] = param.check(value, where=key)
    return params


def _unsupported(key: str, accepted: tuple[object, ...]) -> BadRequest:
    expected = f"only {accepted[0]!r} is" if accepted else "this is not"
    return BadRequest(
        "bad-request", f"cannot accept {key!r}: {expected} supported", where=key, hint=_HINTS.get(key, "")
    )
