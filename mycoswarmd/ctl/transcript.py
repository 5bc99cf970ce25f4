"""A task's events as lines for people: what the model did, which rule allowed it, what was refused.

Rule: everything printed here went through `clean` or `line`; most of it was written by a model.
"""

import json
from collections.abc import Callable, Mapping

from mycoswarmd.ctl.refusals import Doc
from mycoswarmd.ctl.screen import Paint, clip, line, size, span

# One event is one glance; the whole is in --json.
_WIDE = 160
_TEXT_LINES = 12


def render(event: Doc, paint: Paint) -> str:
    """Return an event as one or a few lines; "" for what says nothing to a person."""
    data = event.get("data")
    show = _KINDS.get(str(event.get("kind")), _other)
    return show(data if isinstance(data, dict) else {}, paint)


def _state(data: Doc, paint: Paint) -> str:
    to = str(data.get("to", ""))
    colour = {"succeeded": "green", "running": "blue", "queued": "blue", "waiting": "yellow"}.get(to, "red")
    why = " - ".join(line(data[key]) for key in ("code", "message") if data.get(key))
    return f"{paint(colour, '● ' + line(to))}" + (f"  {why}" if why else "")


def _model(data: Doc, paint: Paint) -> str:
    usage = data.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    head = f"step {line(data.get('step', '?'))}: {line(data.get('model') or 'model')}"
    facts = [f"{key} {data[key]}" for key in ("zone", "rule") if data.get(key)]
    facts += [f"{tokens} tokens"] if tokens is not None else []
    facts += [_took(data)] if data.get("duration_ms") is not None else []
    lines = [paint("bold", head) + (paint("dim", f"  ({line(', '.join(facts))})") if facts else "")]
    lines += _quoted(str(data.get("text") or ""))
    return "\n".join(lines)


def _decision(data: Doc, paint: Paint) -> str:
    what = line(data.get("tool") or data.get("action") or "")
    rule = line(data.get("rule", ""))
    if data.get("decision") == "allow":
        return f"  {paint('green', '✓')} {what} allowed by rule {rule}"
    why = f": {line(data['why'])}" if data.get("why") else ""
    return f"  {paint('red', '✗')} {what} refused by rule {rule}{why}"


def _tool(data: Doc, paint: Paint) -> str:
    name = paint("cyan", "→ " + line(data.get("tool", "")))
    return f"  {name} {clip(_arguments(data.get('arguments')), _WIDE)}"


def _tool_result(data: Doc, paint: Paint) -> str:
    mark = paint("green", "←") if data.get("ok") else paint("red", "← failed")
    count = f"{size(data.get('bytes'))}, {_took(data)}"
    text = str(data.get("text") or "").strip()
    first = text.split("\n", 1)[0]
    return f"  {mark} {line(data.get('tool', ''))} ({count}) {clip(first, _WIDE)}".rstrip()


def _approval(data: Doc, paint: Paint) -> str:
    state = str(data.get("state", ""))
    if state == "pending":
        head = paint("yellow", "? waits for approval")
        return f"  {head} {line(data.get('id', ''))}: {asked(data.get('facts'))}"
    by = f" by {line(data['by'])}" if data.get("by") else ""
    return f"  {paint('green' if state == 'approved' else 'red', '? ' + line(state))}{by}"


def asked(facts: object) -> str:
    """Return in one line what an approval is about; never cut: nobody agrees to what was not shown."""
    if not isinstance(facts, dict):
        return ""
    first = [line(facts[key]) for key in ("action", "tool", "agent", "model", "dest") if facts.get(key)]
    if facts.get("arguments"):
        first.append(line(_arguments(facts["arguments"])))
    rule = f" (rule {line(facts['rule'])}: {line(facts.get('why', ''))})" if facts.get("rule") else ""
    return " ".join(first) + rule


def _proof(data: Doc, paint: Paint) -> str:
    held = data.get("held")
    count = len(held) if isinstance(held, list) else held
    absent = data.get("absent")
    lacks = f", without {', '.join(map(str, absent))}" if isinstance(absent, list) and absent else ""
    return paint("dim", line(f"cage proved itself: {data.get('level')}, {count} probes held{lacks}"))


def _note(data: Doc, paint: Paint) -> str:
    return paint("dim", f"  {line(data.get('text', ''))}")


def _changes(data: Doc, paint: Paint) -> str:
    files = data.get("files")
    rows = [row for row in files if isinstance(row, dict)] if isinstance(files, list) else []
    names = [f"{row.get('path')}{' (deleted)' if row.get('kind') == 'deleted' else ''}" for row in rows[:8]]
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    if not rows:
        return "  nothing changed"
    return f"  {paint('cyan', 'changed')} {clip(', '.join(names), _WIDE)}{more}"


def _other(data: Doc, paint: Paint) -> str:
    return paint("dim", "  " + clip(json.dumps(data, ensure_ascii=False), _WIDE)) if data else ""


_KINDS: Mapping[str, Callable[[Doc, Paint], str]] = {
    "state": _state,
    "model": _model,
    "decision": _decision,
    "tool": _tool,
    "tool-result": _tool_result,
    "approval": _approval,
    "proof": _proof,
    "note": _note,
    "changes": _changes,
}


def _took(data: Doc) -> str:
    took_ms = data.get("duration_ms")
    return span(took_ms / 1000) if isinstance(took_ms, int | float) else "?"


def _arguments(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _quoted(text: str) -> list[str]:
    lines = text.strip().split("\n") if text.strip() else []
    shown = [f"  | {clip(part, _WIDE)}" for part in lines[:_TEXT_LINES]]
    return [*shown, f"  | ({len(lines) - _TEXT_LINES} more lines)"] if len(lines) > _TEXT_LINES else shown
