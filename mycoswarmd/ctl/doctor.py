"""`mycoswarmctl doctor`: what is missing or weak on this machine, and the command that mends it.

Law: it changes nothing, and it works whether or not the node does. Exit 1 when something is broken.
"""

import importlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mycoswarmd.ctl.plain import examples, typer
from mycoswarmd.ctl.refusals import Doc
from mycoswarmd.ctl.screen import line
from mycoswarmd.ctl.session import JSON, Session, begin, guarded
from mycoswarmd.errors import BadRequest, Denied, NotFound, Unreachable

if TYPE_CHECKING:
    from mycoswarmd.ctl.box import Box, Finding
    from mycoswarmd.ctl.checks_node import Node

DOCTOR_EXAMPLES = examples(
    "sudo mycoswarmctl doctor", "mycoswarmctl doctor --json", "mycoswarmctl doctor --root /mnt/sdcard"
)

_COLOURS = {"broken": "red", "weak": "yellow", "note": "cyan", "ok": "green"}
# Loaded only where a command needs them.
_BOX, _NODE = "mycoswarmd.ctl.box", "mycoswarmd.ctl.checks_node"
_MACHINE, _NETWORK = "mycoswarmd.ctl.checks_machine", "mycoswarmd.ctl.checks_network"


@guarded
def doctor(
    ctx: typer.Context,
    root: Path = typer.Option(
        None, "--root", metavar="DIR", help="Look at a machine's disk that is mounted here, instead."
    ),
    as_json: bool = JSON,
) -> None:
    """Say what is missing or weak on this machine.

    With a command that mends each; works also when the node does not run. Exit 1 when something is broken.
    """
    session = begin(ctx, as_json=as_json)
    state = ctx.find_root().params.get("state")
    findings = _examine(session, root, Path(state) if state else None)
    if as_json:
        rows = importlib.import_module(_NODE)
        session.document({"checks": [rows.as_row(one) for one in findings]})
    else:
        _show(session, findings)
        if _is_partial(session, root):
            session.aside("some checks are for root's eyes only: sudo mycoswarmctl doctor")
    if any(one.severity.value == "broken" for one in findings):
        raise typer.Exit(1)


def _is_partial(session: Session, root: Path | None) -> bool:
    """Tell whether root would be told more: of this machine, by files that only root may read."""
    return root is None and not session.is_remote and os.geteuid() != 0


def _examine(session: Session, root: Path | None, state: Path | None) -> "list[Finding]":
    if root is not None:
        if not root.is_dir():
            raise BadRequest("bad-option", f"cannot look at {str(root)!r}: no such directory")
        return look(importlib.import_module(_BOX).disk_box(root), None, state)
    if session.is_remote:  # another machine: only its node can say something about it
        return in_order(importlib.import_module(_NODE).told(session.client.get("/api/doctor")))
    return look(importlib.import_module(_BOX).this_box(), session, state)


def look(box: "Box", session: Session | None, state: Path | None) -> "list[Finding]":
    """Look at a machine, and ask its node where there is a session; the worst first."""
    if missing := importlib.import_module(_NODE).nothing_there(box):
        return [missing]
    of_node, of_net = importlib.import_module(_NODE), importlib.import_module(_NETWORK)
    node = of_node.find_node(box, state)
    listeners = of_net.listeners(box)
    units = of_node.has_units(box)
    found = [
        *importlib.import_module(_MACHINE).machine(box, has_units=units),
        *of_net.network(
            box,
            swarm_port=node.swarm_port,
            api_port=node.api_port,
            discovery=node.values.get("discovery") is not False,
        ),
        *of_node.node_files(box, node, listeners),
    ]
    if session is not None:
        found += _asked(session, box, node, known={one.name: one.severity.value for one in found})
    return in_order(found)


def _asked(session: Session, box: "Box", node: "Node", *, known: dict[str, str]) -> "list[Finding]":
    """Return what the running node adds, or why it does not."""
    checks, boxes = importlib.import_module(_NODE), importlib.import_module(_BOX)
    try:
        status = session.client.get("/api/status")
    except Unreachable as exc:
        is_unit = checks.has_units(box)
        restart = "sudo systemctl restart mycoswarmd; sudo journalctl -xeu mycoswarmd"
        is_known = exc.code.startswith("service-")  # what systemd says of it, with the cure
        fix = (exc.hint if is_known else restart) if is_unit else "mycoswarmd run"
        detail = f"The node does not run, or not here: this cannot {exc.message.removeprefix('cannot ')}."
        return [boxes.Finding(name="node", severity=boxes.Severity.BROKEN, detail=detail, fix=fix)]
    # A file that cannot be used is said already, and a reload would not help.
    in_file = "" if known.get("policy") == "broken" else checks.policy_hash(box, node)
    return [
        boxes.Finding(name="node", severity=boxes.Severity.OK, detail="The node runs."),
        *(one for one in checks.told(_get(session, "/api/doctor")) if _is_news(one, known)),
        *checks.in_swarm(status, _get(session, "/api/swarm"), file_sha256=in_file),
        *checks.proofs(_get(session, "/v1/security"), has_memory_limits=known.get("memory") != "weak"),
    ]


def _is_news(one: "Finding", known: dict[str, str]) -> bool:
    """Tell whether the node says more than what was looked at here, which is said in plainer words."""
    if one.name == "policy":
        return one.severity.value == "broken" and known.get("policy") != "broken"
    if one.name == "engine: embedded":
        return "embedded engine" not in known
    name = one.name.removeprefix("cage: ").removesuffix("-cgroup")
    return name not in known


def _get(session: Session, path: str) -> Doc:
    """Return an answer, or nothing where this node has none, or not for this caller."""
    try:
        return session.client.get(path)
    except (NotFound, Denied):
        return {}


def in_order(found: "Iterable[Finding]") -> "list[Finding]":
    """Return the worst first; what is equally bad stays as it was found."""
    ranks = list(_COLOURS)
    return sorted(found, key=lambda one: ranks.index(one.severity.value))


def _show(session: Session, findings: "list[Finding]") -> None:
    width = max(map(len, _COLOURS))
    for one in findings:
        word = one.severity.value
        print(f"{session.paint(_COLOURS[word], word.ljust(width))}  {line(one.name)}: {line(one.detail)}")
        if one.fix and word != "ok":
            print(f"{' ' * width}  {session.paint('dim', line(one.fix))}")
    counts = {word: sum(one.severity.value == word for one in findings) for word in _COLOURS}
    session.aside(
        ", ".join(f"{number} {word}" for word, number in counts.items() if number) or "nothing to look at"
    )
