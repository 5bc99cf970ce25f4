"""Performs a tool call inside the cage, after its permit: arguments in, an Outcome out, no exception."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mycoswarmd.agent.files import Outcome, fs_edit, fs_list, fs_read, fs_search, fs_write
from mycoswarmd.agent.program import RUN_S, find_program, run_program

_FILE_TOOLS: Mapping[str, Callable[..., Outcome]] = {
    "fs_read": fs_read,
    "fs_write": fs_write,
    "fs_edit": fs_edit,
    "fs_list": fs_list,
    "fs_search": fs_search,
}


@dataclass(kw_only=True)
class Workbench:
    """Where an agent works.

    Attributes:
        root: the workspace's directory, open.
        programs: the absolute files that may be run.
        shown_names: how a name with odd bytes is shown, and what it really is.
        watch: a descriptor, and what to call when it is readable while a program runs.
        sweep: what kills the processes that a program has left behind.
    """

    root: int
    directory: str
    programs: tuple[str, ...]
    watch: tuple[int, Callable[[], None]]
    sweep: Callable[[], None]
    shown_names: Mapping[str, str] = field(default_factory=dict)
    run_s: float = RUN_S

    def perform(self, tool: str, arguments: Mapping[str, object]) -> Outcome:
        """Do what a call says; its arguments were checked against the tool's schema."""
        try:
            if tool == "run":
                return self._run(arguments)
            path = str(arguments.get("path", "."))
            real = self.shown_names.get(path, path).removeprefix(self.directory + "/")
            return _FILE_TOOLS[tool](self.root, **{**arguments, "path": real})
        except OSError as exc:
            reason = os.strerror(exc.errno) if exc.errno else type(exc).__name__
            return Outcome(ok=False, text=f"{tool} failed: {reason}.")

    def _run(self, arguments: Mapping[str, object]) -> Outcome:
        name, args = str(arguments["program"]), arguments["args"]
        assert isinstance(args, list)
        program = find_program(name, self.programs)
        if program is None:
            allowed = ", ".join(sorted({path.rpartition("/")[2] for path in self.programs})) or "none"
            return Outcome(ok=False, text=f"There is no such program here. Allowed: {allowed}.")
        if any("\0" in arg for arg in args):
            return Outcome(ok=False, text="An argument has a NUL byte.")
        return run_program(
            [program, *args],
            str(arguments.get("stdin", "")),
            directory=self.directory,
            wall_s=self.run_s,
            watch=self.watch,
            sweep_rest=self.sweep,
        )
