"""Which tools a model is offered at each step.

A model with its own tool support is offered all it may use. Any other is guided: its answer is
constrained to the offered calls anyway, so we offer the ones that make sense now, with the real paths as
the only choices. What makes sense is read off the task and the work so far, by these rules:

1. Files that the task names are read before others, and none twice unless something changed.
2. Writing is offered once something was read, or where there is nothing to read.
3. A file that the task names and that does not exist, or is not yet written, is where writing goes.
4. When every named file was dealt with, what remains is to finish.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mycoswarmd.wire.agent_tools import FINISH, TOOL_SCHEMAS

# A grammar of some hundred alternatives is still compiled in milliseconds.
_CHOICES = 64
# What a small model can write without losing the thread, and llama.cpp's grammar can count to.
_CONTENT_CHARS = 500
_SUMMARY_CHARS = 160
_FILE_NAME = re.compile(r"[\w@+-][\w./@+-]*\.\w{1,8}")


@dataclass(kw_only=True)
class Progress:
    """What was done so far.

    Attributes:
        files: the regular files of the workspace, as far as we know.
        named: names in the task that look like files, in its order.
    """

    files: list[str]
    named: tuple[str, ...]
    read: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    listed: set[str] = field(default_factory=set)

    def note(self, tool: str, path: str, *, has_changed: bool) -> None:
        """Take in a call that succeeded."""
        if tool == "fs_read":
            self.read.add(path)
        elif tool in {"fs_write", "fs_edit"}:
            self.written.add(path)
            self.read.discard(path) if has_changed and path in self.named_files() else None
            if path not in self.files:
                self.files.append(path)
        elif tool == "fs_list":
            self.listed.add(path)

    def named_files(self) -> list[str]:
        """Return the files of the workspace that the task names."""
        return [path for path in self.files if path in self.named]

    def unread(self) -> list[str]:
        """Return what to read next: named files, then, where none is named, all others."""
        named = [path for path in self.named_files() if path not in self.read | self.written]
        if named or self.named_files():
            return named
        return [path for path in self.files if path not in self.read | self.written]

    def targets(self) -> list[str]:
        """Return the named files that are to be written: those that were not there to be read."""
        return [
            name for name in self.named if name not in self.read | self.written and name not in self.files
        ]


def find_names(task: str, files: Collection[str]) -> tuple[str, ...]:
    """Return what looks like file names in the task, and the files that it names, in order."""
    names = dict.fromkeys(match.group().rstrip(".") for match in _FILE_NAME.finditer(task))
    words = set(re.split(r"[\s,;:'\"`()]+", task))
    return tuple(names | dict.fromkeys(path for path in files if path in words))


def offer_tools(tools: Sequence[str], progress: Progress, *, is_guided: bool) -> list[dict[str, object]]:
    """Return the tools of this step in the OpenAI dialect's form."""
    names = [name for name in tools if name in TOOL_SCHEMAS and name != FINISH]
    if not is_guided:
        return [_spell(name, {}) for name in (*names, FINISH)]
    narrowed = {name: _narrow(name, progress) for name in names}
    offered = [_spell(name, properties) for name, properties in narrowed.items() if properties is not None]
    return [
        *offered,
        _spell(FINISH, {"summary": {"type": "string", "minLength": 1, "maxLength": _SUMMARY_CHARS}}),
    ]


def _narrow(name: str, progress: Progress) -> Mapping[str, object] | None:
    """Return the properties that replace the tool's own, or None to leave the tool out."""
    unread, targets = progress.unread(), progress.targets()
    has_material = bool(progress.read) or not progress.files
    is_done = bool(progress.written) and not targets
    match name:
        case "fs_read":
            return {"path": _choice(unread)} if unread else None
        case "fs_write":
            if not has_material or is_done or (unread and progress.named_files()):
                return None
            path = _choice(targets) if targets else {"type": "string", "minLength": 1, "maxLength": 64}
            return {"path": path, "content": {"type": "string", "minLength": 1, "maxLength": _CONTENT_CHARS}}
        case "fs_edit":
            editable = [path for path in progress.files if path in progress.read]
            if not editable or targets or is_done:
                return None
            text = {"type": "string", "maxLength": _CONTENT_CHARS // 4}
            return {"path": _choice(editable), "old": {**text, "minLength": 1}, "new": text}
        case "fs_list":
            return None  # the task's message lists the files
        case "fs_search":
            return (
                None
                if progress.named_files() or has_material
                else {"pattern": {"type": "string", "maxLength": 64}}
            )
        case _:
            return {}


def _choice(paths: Iterable[str]) -> Mapping[str, object]:
    return {"type": "string", "enum": list(paths)[:_CHOICES]}


def _spell(name: str, properties: Mapping[str, object]) -> dict[str, object]:
    tool = TOOL_SCHEMAS[name]
    schema = dict(tool.parameters)
    if properties:
        schema = {**schema, "properties": properties, "required": list(properties)}
    return {
        "type": "function",
        "function": {"name": name, "description": tool.description, "parameters": schema},
    }
