"""What `doctor` looks at in the node: its files, units, engine, policy and disk, whether or not it runs.

What only the running node knows (its engines' health, the roster's age, what its units proved) comes from its
answers, which are read here too; an answer that this version does not know is left out, never guessed at.
"""

import importlib
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from pathlib import Path

from mycoswarmd.ctl.box import Box, Finding, Severity
from mycoswarmd.ctl.checks_network import API_PORT, SWARM_PORT, Listener
from mycoswarmd.ctl.refusals import Doc
from mycoswarmd.errors import BadRequest, ConfigError, LocalProtocolError, PolicyInvalid

CONFIG = "/etc/mycoswarm/mycoswarm.toml"
POLICY = "/etc/mycoswarm/policy.toml"
STATE = "/var/lib/mycoswarm"
ENGINE = "/var/lib/mycoswarm-engine"
# What makes an appliance; one that is missing or masked takes a part of the node with it.
UNITS = (
    "mycoswarmd.socket",
    "mycoswarmd.service",
    "mycoswarm-lan.socket",
    "mycoswarm-lan.service",
    "mycoswarm-discovery.socket",
    "mycoswarm-discovery@.service",
    "mycoswarm-task.socket",
    "mycoswarm-task@.service",
    "mycoswarm-engine.socket",
    "mycoswarm-engine@.service",
    "mycoswarm-probe.socket",
    "mycoswarm-probe@.service",
    "mycoswarm-signer.socket",
    "mycoswarm-signer@.service",
    "run-mycoswarm\\x2dengine.mount",
)
# Where systemd looks for units and drop-ins, in its order: the first of a name counts.
# Source: systemd.unit(5).
_CHANGING_PLACES = (
    *("/etc/systemd/system.control", "/run/systemd/system.control", "/run/systemd/transient"),
    *("/run/systemd/generator.early", "/etc/systemd/system", "/etc/systemd/system.attached"),
    *("/run/systemd/system", "/run/systemd/system.attached", "/run/systemd/generator"),
    *("/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"),
    "/run/systemd/generator.late",
)
# Whose drop-ins change ours: our units and families of them, and all of a kind.
_CHANGED = ("mycoswarm", "run-mycoswarm")
_FAMILIES = frozenset({"run-.mount", "service", "socket", "mount"})
# A slice can only take away, but for addresses: those that it allows count for all that is in it.
_SLICES = frozenset({"-.slice", "slice", "system.slice", "system-.slice"})
_ADDRESSES = "IPAddressAllow"
# What the node brings for who wants it is, unchanged, no change that a person must look at.
_SHIPPED = ("/usr/share/mycoswarmd/engine-gpu.conf", "/opt/mycoswarm/share/engine-gpu.conf")
_UNIT_PLACES = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
_DISK_LOW_BYTES, _DISK_FULL_BYTES = 1 << 30, 64 << 20
_INODES_LOW = 1000
# Signers say every six hours that they are there.
_ROSTER_OLD_S = 3 * 86_400
_DAEMONS = {"ok": Severity.OK, "warn": Severity.WEAK, "fail": Severity.BROKEN}


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Where a node keeps its things, and what its settings say.

    Attributes:
        problem: why the settings cannot be read, or "".
        is_service: systemd runs it as units.
    """

    state: str = STATE
    config: str = CONFIG
    policy: str = POLICY
    values: Doc = field(default_factory=dict)
    problem: str = ""
    is_service: bool = False

    def port(self, key: str, default: int) -> int | None:
        """Return the port of a listener; None when it is turned off."""
        said = self.values.get(key)
        if said == "none":
            return None
        last = said.rpartition(":")[2] if isinstance(said, str) else ""
        return int(last) if last.isdecimal() else default

    @property
    def swarm_port(self) -> int | None:
        """The port for other nodes."""
        return self.port("swarm_listen", SWARM_PORT)

    @property
    def api_port(self) -> int | None:
        """The port for programs with a key; a service has none unless it is told to."""
        return None if self.is_service and "listen" not in self.values else self.port("listen", API_PORT)

    @property
    def engines(self) -> Mapping[str, object]:
        """The declared engines."""
        found = self.values.get("engines")
        return found if isinstance(found, dict) else {}


def find_node(box: Box, state: Path | None) -> Node:
    """Find the node: the machine's own, that of a user, or the one under a directory."""
    if state is not None:
        own = str(state.absolute())
        node = Node(state=own, config=f"{own}/mycoswarm.toml", policy=f"{own}/policy.toml")
    elif box.is_running and os.geteuid() != 0 and not has_units(box):
        base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
        own = f"{base}/mycoswarm"
        node = Node(state=own, policy=f"{own}/policy.toml" if box.has(f"{own}/policy.toml") else POLICY)
    else:
        node = Node(is_service=has_units(box))
    text = box.read(node.config)
    if text is None:
        return node
    toml = importlib.import_module("tomllib")
    try:
        values: Doc = toml.loads(text)
    except ValueError as exc:
        return replace(node, problem=str(exc))
    said = {key: value for key in ("state_dir", "policy") if isinstance(value := values.get(key), str)}
    return replace(
        node,
        state=said.get("state_dir", node.state) if state is None else node.state,
        policy=said.get("policy", node.policy),
        values=values,
    )


def has_units(box: Box) -> bool:
    """Tell whether the node is installed as units."""
    return any(box.has(f"{place}/mycoswarmd.service") for place in _UNIT_PLACES)


def nothing_there(box: Box) -> Finding | None:
    """Return what is wrong with a disk that has no node, or no system; None for any other."""
    if box.is_running or has_units(box):
        return None
    if not box.has("/etc/os-release") and not box.has("/usr/lib/os-release"):
        return _broken("disk", f"There is no system in {box.root}: is the disk mounted there?", "findmnt")
    detail = f"No mycoswarmd is installed in {box.root}."
    return _broken("units", detail, f"sudo chroot {box.root} apt install ./mycoswarmd_VERSION_all.deb")


def node_files(box: Box, node: Node, listeners: Sequence[Listener]) -> Iterator[Finding]:
    """Look at what the node has on this machine, whether it runs or not."""
    if node.problem:
        yield Finding(
            name="settings",
            severity=Severity.BROKEN,
            detail=f"The settings {node.config} cannot be read: {node.problem}.",
            fix="mycoswarmd check",
        )
    yield from units(box)
    yield from joining(box)
    yield from policy(box, node)
    yield from disk(box, node)
    yield from engine(box, node, listeners)


def units(box: Box) -> Iterator[Finding]:
    """The units of the package: there, not masked, enabled."""
    if not has_units(box):
        if box.is_running and not box.has("/run/systemd/system"):
            detail = "systemd does not run this machine: the node works as one process, with smaller cages."
            yield Finding(name="units", severity=Severity.NOTE, detail=detail, fix="mycoswarmd run")
        elif box.is_running:
            detail = (
                "The node is not installed as a service: the kernel does not confine it, cages are smaller."
            )
            fix = "sudo mycoswarmctl service install"
            yield Finding(name="units", severity=Severity.NOTE, detail=detail, fix=fix)
        return
    masked = [name for name in UNITS if box.link(f"/etc/systemd/system/{name}") == "/dev/null"]
    missing = [name for name in UNITS if not any(box.has(f"{place}/{name}") for place in _UNIT_PLACES)]
    if masked:
        said = (
            f"masked, so that nothing can start {'it' if len(masked) == 1 else 'them'}: {', '.join(masked)}"
        )
        yield _broken("units", f"Units of the node are {said}.", f"sudo systemctl unmask {' '.join(masked)}")
    if missing:
        is_package = box.has("/var/lib/dpkg/info/mycoswarmd.list")
        fix = "sudo apt install --reinstall mycoswarmd" if is_package else "sudo mycoswarmctl service install"
        yield _broken("units", f"Units of the node are missing: {', '.join(missing)}.", fix)
    if not masked and not missing:
        yield from _enabled(box)
    if changes := _changes(box):
        detail = f"The node's units are not as they came: they are changed by {', '.join(changes)}."
        fix = f"cat {shlex.join(str(box.at(path)) for path in changes)}"
        yield Finding(name="changed units", severity=Severity.NOTE, detail=detail, fix=fix)


def _changes(box: Box) -> list[str]:
    """Return the files that change what units of the node say, wherever systemd takes them from."""
    shipped = {text for path in _SHIPPED if (text := box.read(path)) is not None}
    # Where it is a link it is the place before it once more.
    places = [
        place for place in _CHANGING_PLACES if not place.startswith("/lib/") or box.link("/lib") is None
    ]
    return [
        path
        for at, place in enumerate(places)
        for name in box.names(place)
        for path in (
            _drop_ins(box, f"{place}/{name}", shipped)
            if name.endswith(".d")
            # A generator's last word is for units that nobody else has.
            else _replacing(box, f"{place}/{name}", places[at + 1 : -1])
        )
    ]


def _drop_ins(box: Box, folder: str, shipped: AbstractSet[str]) -> Iterator[str]:
    """Yield the files of a folder that change a unit of ours, a family of ours, or all units of a kind."""
    unit = folder.rpartition("/")[2].removesuffix(".d")
    is_ours = unit.startswith(_CHANGED) or unit in _FAMILIES
    if not is_ours and not _is_slice(unit):
        return
    for name in box.names(folder):
        text = box.read(f"{folder}/{name}") or ""
        if name.endswith(".conf") and text not in shipped and (is_ours or _ADDRESSES in text):
            yield f"{folder}/{name}"


def _replacing(box: Box, path: str, below: Sequence[str]) -> Iterator[str]:
    """Yield a unit's file, if it stands before the one that came, or is of one instance alone."""
    name = path.rpartition("/")[2]
    template = re.sub(r"@.+(?=\.)", "@", name)
    if template in UNITS:
        is_masked = path.startswith("/etc/systemd/system/") and box.link(path) == "/dev/null"
        if not is_masked and (name != template or any(box.has(f"{place}/{name}") for place in below)):
            yield path
    elif _is_slice(name) and _ADDRESSES in (box.read(path) or ""):
        yield path


def _is_slice(unit: str) -> bool:
    """Tell whether units of the node are in it: what addresses it allows, each of them may reach."""
    return unit in _SLICES or unit.startswith("system-mycoswarm")


def _enabled(box: Box) -> Iterator[Finding]:
    # The socket alone starts the node too, when somebody asks it something.
    wanted = ("multi-user.target.wants/mycoswarmd.service", "sockets.target.wants/mycoswarmd.socket")
    if all(box.has(f"/etc/systemd/system/{path}") for path in wanted):
        yield Finding(
            name="units", severity=Severity.OK, detail="The node's units are there and start by themselves."
        )
    else:
        detail = "The node does not start by itself when this machine does."
        yield Finding(
            name="units",
            severity=Severity.NOTE,
            detail=detail,
            fix="sudo systemctl enable --now mycoswarmd"
            if box.is_running
            else f"sudo systemctl --root={box.root} enable mycoswarmd",
        )


def joining(box: Box) -> Iterator[Finding]:
    """On a disk for a first start: the code that it joins with, and the unit that uses it."""
    code = "/etc/credstore/mycoswarm.enroll"
    if box.is_running or not box.has(code):
        return
    unit = "mycoswarm-enroll.service"
    if box.at(code).stat().st_mode & 0o077:
        yield _broken("joining", f"Others may read the code in {code}.", f"sudo chmod 600 {box.at(code)}")
    elif not box.has(f"/etc/systemd/system/multi-user.target.wants/{unit}"):
        detail = f"There is a code to join with, and no unit {unit} that starts."
        yield _broken("joining", detail, f"sudo systemctl --root={box.root} enable {unit}")
    else:
        detail = "It joins a swarm at its first start."
        yield Finding(name="joining", severity=Severity.OK, detail=detail)


def policy(box: Box, node: Node) -> Iterator[Finding]:
    """The policy file, read by the node's own code."""
    if not box.has(node.policy):
        yield Finding(
            name="policy",
            severity=Severity.OK,
            detail="There is no policy file: the shipped default holds, no clouds.",
        )
        return
    try:
        mode = box.at(node.policy).stat().st_mode
        if mode & 0o022:
            detail = f"Others than its owner may write the policy {node.policy}, so the node refuses it."
            yield _broken("policy", detail, f"sudo chmod go-w {node.policy}")
            return
        report: Doc = importlib.import_module("mycoswarmd.ctl.policyfile").check(box.at(node.policy), None)
    except PermissionError:
        return
    except OSError as exc:
        yield _broken(
            "policy", f"The policy {node.policy} cannot be read: {exc.strerror}.", f"ls -lL {node.policy}"
        )
        return
    except PolicyInvalid as exc:
        first = str(exc.problems[0].message) if exc.problems else exc.message
        line = exc.problems[0].line if exc.problems else 0
        detail = f"The policy has {len(exc.problems)} problem(s), the first in line {line}: {first}."
        yield _broken("policy", detail, f"mycoswarmctl policy check {node.policy}")
        return
    except ConfigError:  # root's to read
        return
    warnings = report["warnings"]
    if report["locked"]:
        detail = 'The policy lets nobody administer this node: no rule allows action "admin" to any person.'
        reload = " && sudo systemctl reload mycoswarmd" if node.is_service else ""
        fix = f"sudoedit {node.policy}{reload}"
        yield Finding(name="policy", severity=Severity.WEAK, detail=detail, fix=fix)
    elif warnings:
        detail = f"The policy is valid, with {len(warnings)} warning(s)."
        fix = f"mycoswarmctl policy check {node.policy}"
        yield Finding(name="policy", severity=Severity.NOTE, detail=detail, fix=fix)
    else:
        yield Finding(name="policy", severity=Severity.OK, detail=f"The policy {report['name']} is valid.")


def disk(box: Box, node: Node) -> Iterator[Finding]:
    """Room for receipts and tasks: without it the node answers nothing."""
    place = box.at(node.state)
    while not place.exists() and place not in {box.root, place.parent}:
        place = place.parent
    space = box.space(place)
    if space is None:
        return
    free = f"{space.free_bytes >> 20:,} MiB are free under {node.state}"
    find = f"sudo du -xh --max-depth=2 {node.state} | sort -h | tail"
    if space.is_read_only:
        detail = (
            f"The disk under {node.state} can only be read: the node can keep no receipt and answers nothing."
        )
        yield _broken("disk", detail, "journalctl -k -p err")
    elif space.free_bytes < _DISK_FULL_BYTES:
        yield _broken("disk", f"Only {free}: the node will refuse prompts and tasks.", find)
    elif space.free_inodes is not None and space.free_inodes < _INODES_LOW:
        yield _broken(
            "disk", f"The disk under {node.state} has room for only {space.free_inodes} more files.", find
        )
    elif space.free_bytes < _DISK_LOW_BYTES:
        yield Finding(name="disk", severity=Severity.WEAK, detail=f"Only {free}.", fix=find)
    else:
        yield Finding(name="disk", severity=Severity.OK, detail=f"Of the disk, {free}.")


def engine(box: Box, node: Node, listeners: Sequence[Listener]) -> Iterator[Finding]:
    """Something that answers prompts: installed here, or declared."""
    has_ollama = any(one.port == 11434 for one in listeners)
    if node.engines:
        yield Finding(
            name="engine", severity=Severity.OK, detail=f"Declared engines: {', '.join(node.engines)}."
        )
    elif has_ollama and not node.problem:
        text = '\\n[engines.ollama]\\nkind = "ollama"\\nurl = "http://127.0.0.1:11434"\\n'
        yield Finding(
            name="engine",
            severity=Severity.NOTE,
            detail="Ollama runs here and the node does not know it.",
            fix=f"sudo mkdir -p /etc/mycoswarm && printf '{text}' | sudo tee -a {node.config}",
        )
    places = [node.state, ENGINE] if has_units(box) or node.state == STATE else [node.state]
    if not all(_is_readable(box, place) for place in places):
        return
    if any(_models(box, f"{place}/models") for place in places) and any(
        box.has(f"{place}/engine") and box.names(f"{place}/engine") for place in places
    ):
        yield Finding(
            name="embedded engine", severity=Severity.OK, detail="The embedded engine and a model are here."
        )
    elif not node.engines and not has_ollama:
        detail = "No engine was found: this node can answer nothing by itself."
        yield Finding(
            name="embedded engine",
            severity=Severity.WEAK,
            detail=detail,
            fix=f"{'' if box.is_running else 'there, when it runs: '}sudo mycoswarmctl engine install",
        )


def _models(box: Box, place: str) -> list[str]:
    return [name for name in box.names(place) if name.endswith(".gguf")]


def _is_readable(box: Box, place: str) -> bool:
    """Tell whether what is in a directory can be known; one that is not there is known to be empty."""
    return not box.has(place) or os.access(box.at(place), os.R_OK | os.X_OK)


# --- what the node says of itself -------------------------------------------------------------------


def told(answer: Doc) -> Iterator[Finding]:
    """Return the node's own checks (GET /api/doctor) as findings."""
    for row in answer.get("checks") or []:
        severity = _DAEMONS.get(str(row.get("severity")))
        try:
            severity = severity or Severity(str(row.get("severity")))
        except ValueError:
            severity = Severity.NOTE
        yield Finding(
            name=str(row.get("name")),
            severity=severity,
            detail=str(row.get("detail", "")),
            fix=str(row.get("fix") or ""),
        )


def in_swarm(status: Doc, swarm: Doc, *, file_sha256: str) -> Iterator[Finding]:
    """Return what the node knows about its swarm and its policy: GET /api/status and /api/swarm."""
    in_force = str((status.get("policy") or {}).get("sha256") or "")
    if in_force and file_sha256 and in_force != file_sha256:
        detail = "The policy file is not the policy in force: it was changed since it was read."
        yield Finding(
            name="policy in force",
            severity=Severity.WEAK,
            detail=detail,
            fix="sudo mycoswarmctl policy reload",
        )
    summary = status.get("swarm")
    if not isinstance(summary, dict):
        return
    own = swarm.get("self") or {}
    if own.get("id") and not any(row.get("self") for row in swarm.get("nodes") or []):
        detail = f"This node was put out of swarm {summary.get('name')}: the others refuse it."
        yield _broken("membership", detail, "sudo mycoswarmctl leave && sudo mycoswarmctl enroll")
        return
    age_s = summary.get("roster_age_s")
    rows = [row for row in swarm.get("nodes") or [] if isinstance(row, dict) and row.get("state") == "ready"]
    others = [row for row in rows if not row.get("self")]
    differing = [str(row.get("name")) for row in others if not (row.get("verified") or {}).get("digest_same")]
    if isinstance(age_s, int | float) and age_s > _ROSTER_OLD_S:
        detail = f"No signer was heard for {int(age_s) // 86_400} days: revocations may not have come here."
        yield Finding(name="roster", severity=Severity.WEAK, detail=detail, fix="mycoswarmctl nodes ping")
    elif differing:
        detail = f"These nodes have another roster than this one: {', '.join(differing)}."
        yield Finding(name="roster", severity=Severity.WEAK, detail=detail, fix="mycoswarmctl nodes ping")
    else:
        yield Finding(
            name="roster", severity=Severity.OK, detail="The roster is that of the nodes that were reached."
        )
    for problem in (swarm.get("swarm") or {}).get("problems") or []:
        yield Finding(name="swarm", severity=Severity.WEAK, detail=str(problem), fix="mycoswarmctl nodes")


def proofs(answer: Doc, *, has_memory_limits: bool) -> Iterator[Finding]:
    """Return what units did not prove about their confinement (GET /v1/security).

    Where the kernel has no memory limits, that was said once already.
    """
    wire = importlib.import_module("mycoswarmd.wire.proof")
    rows = answer.get("proofs") if isinstance(answer.get("proofs"), list) else []
    for row in rows or []:
        try:
            proof = wire.parse_proof_body(row.get("proof", row) if isinstance(row, dict) else row)
        except (BadRequest, LocalProtocolError, ValueError):
            continue  # of a newer node
        weak = [
            check
            for check in proof.weak()
            if has_memory_limits or check.ok is False or check.name is not wire.CheckName.MEMORY
        ]
        name = f"confinement: {proof.unit.value}"
        if not weak:
            held = sum(check.ok is True for check in proof.checks)
            detail = f"The unit proved {held} things of its confinement."
            yield Finding(name=name, severity=Severity.OK, detail=detail)
            continue
        said = "; ".join(f"{check.name.value}{': ' + check.detail if check.detail else ''}" for check in weak)
        is_refuted = any(check.ok is False for check in weak)
        detail = (
            f"The unit {'is not confined as it should be' if is_refuted else 'could not prove all'}: {said}."
        )
        severity = Severity.BROKEN if is_refuted else Severity.WEAK
        yield Finding(name=name, severity=severity, detail=detail, fix="mycoswarmctl status --security")


def as_row(finding: Finding) -> Doc:
    """Return a finding as JSON."""
    return {
        "name": finding.name,
        "severity": finding.severity.value,
        "detail": finding.detail,
        "fix": "" if finding.severity is Severity.OK else finding.fix,
    }


def policy_hash(box: Box, node: Node) -> str:
    """Return the SHA-256 of the policy file, or "" where there is none to read."""
    try:
        data = box.at(node.policy).read_bytes()
    except OSError:
        return ""
    return str(importlib.import_module("hashlib").sha256(data).hexdigest())


def dumps(rows: Sequence[Finding]) -> str:
    """Return findings as one JSON document."""
    return json.dumps({"checks": [as_row(row) for row in rows]}, indent=2)


def _broken(name: str, detail: str, fix: str) -> Finding:
    return Finding(name=name, severity=Severity.BROKEN, detail=detail, fix=fix)
