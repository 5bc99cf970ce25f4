"""One finished task as a conversation: what a small model imitates better than it follows instructions."""

import json
from collections.abc import Collection, Mapping

_TASK = "Files:\nshopping.txt\nclub.txt\n\nTask: Read club.txt and write a short summary to result.md"
_TEXT = (
    "Garden club, Monday evening\n\nThere: Eva, Tom.\n\n"
    "- The pump is broken and the pond is empty. Tom repairs it on Saturday.\n"
    "- Eva buys seeds for the school before May.\n- The fence is painted green.\n\n"
    "We meet again in a month.\n"
)
_SUMMARY = (
    "The pump is broken and Tom repairs it on Saturday. Eva buys seeds for the school before May. "
    "The fence is painted green."
)
_CALLS: tuple[tuple[str, Mapping[str, str], str], ...] = (
    ("fs_read", {"path": "club.txt"}, _TEXT),
    ("fs_write", {"path": "result.md", "content": _SUMMARY}, f"Wrote {len(_SUMMARY)} bytes to result.md."),
    ("finish", {"summary": "I read club.txt and wrote a short summary to result.md."}, "Done."),
)


def demonstration(tools: Collection[str]) -> list[dict[str, object]]:
    """Return the messages of the finished task; none when the agent has not the tools for it."""
    if not {"fs_read", "fs_write"} <= set(tools):
        return []
    messages: list[dict[str, object]] = [{"role": "user", "content": _TASK}]
    for number, (name, arguments, result) in enumerate(_CALLS):
        function = {"name": name, "arguments": json.dumps(arguments)}
        call_id = f"demo-{number}"
        messages.append(
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": call_id, "type": "function", "function": function}],
            }
        )
        messages.append({"role": "tool", "tool_call_id": call_id, "content": result})
    return messages
