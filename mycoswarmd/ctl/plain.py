"""typer without rich: plain help that answers at once. The only door to typer in this package.

Old typer (0.7) imports rich as soon as it is imported itself, if rich is there; 0.1 s of the 0.2 s that
`--help` may take. It does without when the import fails, so the import is made to fail, once.
"""

import os
import sys
from types import ModuleType
from typing import cast

os.environ.setdefault("TYPER_USE_RICH", "0")  # newer typer asks this
_hidden = "rich" not in sys.modules
if _hidden:
    sys.modules["rich"] = cast("ModuleType", None)

import typer as typer  # noqa: E402, PLC0414 - exported on purpose, after the lines above

if _hidden:
    del sys.modules["rich"]


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
