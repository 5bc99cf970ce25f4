"""typer without rich and without pydantic: it answers at once. The only door to typer in this package.

Old typer (0.7) imports rich as soon as it is imported itself, if rich is there; 0.1 s of the 0.2 s that
`--help` may take. It does without when the import fails, so the import is made to fail, once.

New typer (0.29) converts each argument by pydantic, also text to text; loading that takes 0.1 s of each
command. What needs no conversion, or a plain one, is done here; all else, and every error, is typer's own.
"""

import gc
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

os.environ.setdefault("TYPER_USE_RICH", "0")  # newer typer asks this
_hidden = "rich" not in sys.modules
if _hidden:
    sys.modules["rich"] = cast("ModuleType", None)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Load modules without the collector, which finds nothing there and takes a tenth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


with quick_imports():
    import typer as typer  # noqa: PLC0414 - exported on purpose, after the lines above

if _hidden:
    del sys.modules["rich"]

_INTEGER = re.compile(r"-?[0-9]{1,18}")
# What a path is looked at for, where an option says nothing about it (typer.Option).
_ANY_PATH = {
    "exists": False,
    "file_okay": True,
    "dir_okay": True,
    "writable": False,
    "readable": True,
    "resolve_path": False,
    "allow_dash": False,
    "path_type": None,
}
_OTHER = object()


class _Light:
    """Converts the arguments of one parameter as typer does; whatever is not plain is left to typer."""

    def __init__(self, real: Callable[[], Any]) -> None:
        self._real = real

    def coerce(self, value: object, param: object, ctx: object) -> object:
        """Return the value for the command's function."""
        known: Any = param
        if value is None:
            return () if known.multiple or known.nargs == -1 else None
        kind = known.type_descriptor
        converted = _converted(value, kind.annotation, kind.parameter_info)
        return self._real().coerce(value, param=param, ctx=ctx) if converted is _OTHER else converted


def _converted(value: object, annotation: object, info: object) -> object:
    """Return the converted value, or _OTHER where that takes more than can be seen here."""
    if getattr(info, "parser", None) is not None or getattr(info, "click_type", None) is not None:
        return _OTHER
    if annotation is str:
        return value if isinstance(value, str) else _OTHER
    if annotation == list[str]:
        many = list(value) if isinstance(value, list | tuple) else [None]
        return many if all(isinstance(one, str) for one in many) else _OTHER
    if annotation is int:
        return _number(value, info)
    return _path(value, info) if annotation is Path else _OTHER


def _number(value: object, info: object) -> object:
    if isinstance(value, bool) or not _INTEGER.fullmatch(str(value)):
        return _OTHER
    number, bounds = int(str(value)), cast("Any", info)
    is_in = (bounds.min is None or bounds.min <= number) and (bounds.max is None or number <= bounds.max)
    return number if is_in else _OTHER


def _path(value: object, info: object) -> object:
    is_plain = all(getattr(info, name, _OTHER) == usual for name, usual in _ANY_PATH.items())
    if not is_plain or not isinstance(value, str) or "\0" in value:
        return _OTHER
    path = Path(value)
    return path if not path.exists() or os.access(path, os.R_OK) else _OTHER


def _lighten() -> None:
    """Have this typer convert lightly, if it is one that converts by pydantic."""
    parameter: Any = getattr(sys.modules.get("typer.core"), "_TyperParameter", None)
    real = getattr(parameter, "get_runtime_param", None)
    if real is not None:
        parameter.get_runtime_param = lambda self: _Light(lambda: real(self))


_lighten()


def make_app(help_text: str, *, epilog: str | None = None, completes: bool = False) -> typer.Typer:
    """Make an application or a group whose help is plain text."""
    return typer.Typer(
        help=help_text,
        epilog=epilog,
        no_args_is_help=True,
        add_completion=completes,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


def examples(*lines: str) -> str:
    r"""Format example command lines for the end of a command's help; \b keeps them as they are."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
