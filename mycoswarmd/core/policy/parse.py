"""bytes -> Policy, or every problem at once: the syntax, the schema and the names, each with its line.

What needs the meaning of the whole (tests, proofs, rules that match nothing) is in core.policy.check.
"""

import hashlib
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final, TypeVar

from mycoswarmd.core.policy.conditions import HOSTS, Names, read_conditions
from mycoswarmd.core.policy.evaluate import BUILT_IN
from mycoswarmd.core.policy.lines import Path, scan_lines
from mycoswarmd.core.policy.model import (
    OWNER,
    AgentProfile,
    Destination,
    Invariant,
    Labels,
    Obligations,
    Origin,
    Policy,
    PolicyTest,
    Rule,
    ToolDecl,
)
from mycoswarmd.core.policy.reader import Reader
from mycoswarmd.core.policy.request import KINDS, near, parse_request
from mycoswarmd.core.policy.tools import TOOLS, is_interpreter
from mycoswarmd.core.types import Effect, Limits, RuleId, Zone
from mycoswarmd.core.units import parse_duration_s, parse_percent, parse_size_bytes
from mycoswarmd.errors import BadRequest, PolicyInvalid, Problem

SCHEMA: Final = 1
# A policy of 1,000 rules is about 200 KiB; more is not read by anybody in a minute.
MAX_BYTES: Final = 256 << 10
MAX_RULES: Final = 1000
# A rule's list of names lies at the fourth level.
_MAX_DEPTH: Final = 16
_TOP: Final = (
    *("schema", "name", "labels", "origins", "destinations", "routing", "tools", "agents"),
    *("rule", "invariant", "test"),
)
_RULE: Final = ("id", "why", "effect", "always", "limit", "approve_by", "log")
_AT_LINE: Final = re.compile(r"\(at line (\d+), column \d+\)")
_URL: Final = re.compile(r"https?://[A-Za-z0-9.\[\]:-]+(?:/[A-Za-z0-9._~/-]*)?")
_LIMITS: Final[Mapping[str, tuple[str, Callable[[str], int] | None]]] = {
    "wall": ("wall_s", parse_duration_s),
    "memory": ("memory_bytes", parse_size_bytes),
    "disk": ("disk_bytes", parse_size_bytes),
    "cpu": ("cpu_percent", parse_percent),
    "processes": ("processes", None),
    "steps": ("steps", None),
    "tokens": ("tokens", None),
}

Resolve = Callable[[str], str | None]
T = TypeVar("T")


def parse_policy(untrusted: bytes, *, path: str, resolve_program: Resolve) -> tuple[Policy, list[Problem]]:
    """Parse a file into a policy and its warnings; PolicyInvalid holds every problem found.

    Args:
        untrusted: the file's bytes.
        path: how the file is called in messages.
        resolve_program: a program's name -> the absolute file that would run, or None.
    """
    document, reader = _document(untrusted, path)
    parser = _Parser(document, reader, resolve_program)
    policy = parser.policy(hashlib.sha256(untrusted).hexdigest())
    if not reader.problems:
        policy = parser.with_tests(policy)
    if reader.problems:
        raise PolicyInvalid(tuple(sorted(reader.problems, key=lambda problem: problem.line)))
    return policy, parser.warnings


def _document(untrusted: bytes, path: str) -> tuple[dict[str, object], Reader]:
    def broken(line: int, message: str, hint: str = "") -> PolicyInvalid:
        return PolicyInvalid((Problem(path=path, line=line, message=message, hint=hint),))

    if len(untrusted) > MAX_BYTES:
        raise broken(1, f"cannot use a policy of {len(untrusted)} bytes", f"at most {MAX_BYTES}")
    try:
        text = untrusted.decode()
    except UnicodeDecodeError as exc:
        line = untrusted.count(b"\n", 0, exc.start) + 1
        raise broken(line, f"cannot read byte {exc.start}: it is not UTF-8") from exc
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        match = _AT_LINE.search(str(exc))
        line = int(match[1]) if match else max(1, text.count("\n"))
        raise broken(line, f"cannot read this as TOML: {_AT_LINE.sub('', str(exc)).strip()}") from exc
    except RecursionError as exc:
        raise broken(1, "cannot read this as TOML: it is nested too deeply") from exc
    except ValueError as exc:  # Python reads no number of thousands of digits
        raise broken(1, "cannot read this as TOML: a number has too many digits") from exc
    if (problem := _unprintable(document)) is not None:
        raise broken(1, f"cannot use this file: {problem}")
    try:
        lines = scan_lines(text.replace("\r\n", "\n"), document)
    except ValueError as exc:
        raise broken(1, f"cannot use this file: {exc}", "write it in a plainer way") from exc
    return document, Reader(path, lines)


def _unprintable(document: object) -> str | None:
    """Return what no message could show of a document: numbers beyond TOML's 64 bits, endless nesting."""
    layer = [document]
    for _ in range(_MAX_DEPTH):
        below: list[object] = []
        for value in layer:
            if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
                return "a number does not fit in 64 bits"
            if isinstance(value, dict | list):
                below += value.values() if isinstance(value, dict) else value
        layer = below
    return "it is nested too deeply" if layer else None


class _Parser:
    """Reads the sections in the order of who names whom: labels and names first, then rules."""

    def __init__(self, document: dict[str, object], reader: Reader, resolve: Resolve) -> None:
        self.doc = reader.table(document, (), _TOP)
        self.reader = reader
        self.resolve = resolve
        self.warnings: list[Problem] = []

    def policy(self, sha256: str) -> Policy:
        reader, doc = self.reader, self.doc
        if doc.get("schema") != SCHEMA or isinstance(doc.get("schema"), bool):
            reader.fault(
                ("schema",), f"cannot use schema {doc.get('schema')!r}", f"accepted: schema = {SCHEMA}"
            )
        name = reader.name(doc.get("name", ""), ("name",))
        labels = self._labels()
        tools = self._each("tools", self._tool)
        origins = self._each("origins", self._origin)
        destinations = self._each("destinations", self._destination)
        agents = self._each("agents", lambda key, value, at: self._agent(key, value, at, tools))
        names = Names(
            labels=labels.order,
            origins=(OWNER, *origins),
            destinations=tuple(destinations),
            tools=tools,
            agents=tuple(agents),
        )
        people = (OWNER, *(one.name for one in origins.values() if one.kind in {"user", "group"}))
        rules = self._elements("rule", lambda value, at: self._rule(value, at, names, people))
        if len(rules) > MAX_RULES:
            reader.fault(("rule",), f"cannot use {len(rules)} rules", f"at most {MAX_RULES}")
        return Policy(
            name=name,
            sha256=sha256,
            path=reader.path,
            labels=labels,
            origins=MappingProxyType(origins),
            destinations=MappingProxyType(destinations),
            prefer=self._prefer(destinations),
            tools=MappingProxyType(tools),
            agents=MappingProxyType(agents),
            rules=tuple(rules),
            invariants=tuple(
                self._elements("invariant", lambda value, at: self._invariant(value, at, names))
            ),
            tests=(),
        )

    def with_tests(self, policy: Policy) -> Policy:
        """Read the tests, which may name anything that a valid policy declares."""
        tests = tuple(self._elements("test", lambda value, at: self._test(value, at, policy)))
        return replace(policy, tests=tests)

    def _each(self, section: str, read: Callable[[str, object, Path], T | None]) -> dict[str, T]:
        found: dict[str, T] = {}
        for key, value in self.reader.named_tables(self.doc.get(section, {}), (section,)).items():
            one = read(key, value, (section, key))
            if one is not None:
                found[key] = one
        return found

    def _elements(self, section: str, read: Callable[[object, Path], T | None]) -> list[T]:
        """Read an array of tables whose ids (or names) must differ."""
        seen: dict[str, int] = {}
        found: list[T] = []
        for i, value in enumerate(self.reader.elements(self.doc.get(section, []), (section,))):
            at: Path = (section, i)
            key = "name" if section == "test" else "id"
            name = value.get(key) if isinstance(value, dict) else None
            if isinstance(name, str):
                if name in seen:
                    line = self.reader.lines.at((section, seen[name]))
                    self.reader.fault((*at, key), f"cannot use {name!r} twice: line {line} has it")
                seen[name] = i
            one = read(value, at)
            if one is not None:
                found.append(one)
        return found

    def _labels(self) -> Labels:
        reader, at, standard = self.reader, ("labels",), Labels()
        table = reader.table(self.doc.get("labels", {}), at, ("order", "default"))
        order = reader.words(table.get("order", list(standard.order)), (*at, "order")) or standard.order
        for label in order:
            reader.name(label, (*at, "order"))
        default = reader.choice(table.get("default", standard.default), (*at, "default"), order)
        return Labels(order=order, default=default or order[-1])

    def _origin(self, name: str, value: object, at: Path) -> Origin | None:
        table = self.reader.table(value, at, KINDS)
        if name == OWNER:
            self.reader.fault(at, "cannot declare origin 'owner': it is built in")
        if len(table) != 1:
            self.reader.fault(
                at, f"cannot use origin {name!r}: it names not one speaker", f"one of {', '.join(KINDS)}"
            )
            return None
        kind = next(iter(table))
        return Origin(name=name, kind=kind, value=self.reader.text(table, kind, at))

    def _destination(self, name: str, value: object, at: Path) -> Destination:
        reader = self.reader
        table = reader.table(value, at, ("api", "url", "credential", "models"))
        if name in set(Zone):
            reader.fault(at, f"cannot call a destination {name!r}: that is a zone")
        url = reader.text(table, "url", at)
        if url and not _URL.fullmatch(url):
            reader.fault(
                (*at, "url"),
                f"cannot use {url!r} as a url",
                "accepted: https://HOST/PATH without a user or query",
            )
        credential = reader.text(table, "credential", at) if "credential" in table else None
        if credential:
            reader.name(credential, (*at, "credential"))
        return Destination(
            name=name,
            api=reader.choice(table.get("api", "openai"), (*at, "api"), ("openai", "anthropic")) or "",
            url=url,
            credential=credential,
            models=reader.words(table["models"], (*at, "models")) if "models" in table else None,
        )

    def _prefer(self, destinations: Mapping[str, Destination]) -> tuple[str, ...]:
        table = self.reader.table(self.doc.get("routing", {}), ("routing",), ("prefer",))
        if "prefer" not in table:
            return ()
        return self.reader.words(table["prefer"], ("routing", "prefer"), known=(*Zone, *destinations))

    def _tool(self, name: str, value: object, at: Path) -> ToolDecl | None:
        reader, tool = self.reader, TOOLS.get(name)
        if tool is None:
            reader.fault(at, f"cannot use tool {name!r}: there is no such tool", near(name, TOOLS))
            return None
        table = reader.table(value, at, ("programs",) * tool.runs_programs + ("hosts",) * tool.way_out)
        programs: list[str] = []
        for key, needed in (("programs", tool.runs_programs), ("hosts", tool.way_out)):
            if needed and key not in table:
                reader.fault(
                    at,
                    f"cannot use tool {name!r} without {key!r}",
                    "list them; a tool for nothing is left out",
                )
        for program in reader.words(table["programs"], (*at, "programs")) if "programs" in table else ():
            resolved = self.resolve(program)
            if resolved is None:
                self._warn(
                    (*at, "programs"), f"program {program!r} is not on this node, so nobody can run it"
                )
            elif resolved not in programs:
                programs.append(resolved)
            if is_interpreter(program) or is_interpreter(resolved or ""):
                self._warn(
                    (*at, "programs"),
                    f"program {program!r} runs whatever it is given: allowing it allows any code in the cage",
                )
        hosts = reader.words(table["hosts"], (*at, "hosts")) if "hosts" in table else ()
        for host in hosts:
            if not HOSTS.fullmatch(host):
                reader.fault(
                    (*at, "hosts"), f"cannot use host {host!r}", "accepted: docs.python.org or *.python.org"
                )
        return ToolDecl(name=name, programs=tuple(programs), hosts=hosts)

    def _agent(self, name: str, value: object, at: Path, tools: Mapping[str, ToolDecl]) -> AgentProfile:
        reader = self.reader
        known = ("model", "tools", "paths", "limit", "i_accept_the_lethal_trifecta")
        table = reader.table(value, at, known)
        paths = reader.table(table.get("paths", {}), (*at, "paths"), ("read", "write"))
        return AgentProfile(
            name=name,
            model=reader.text(table, "model", at) if "model" in table else None,
            tools=reader.words(table["tools"], (*at, "tools"), known=tools) if "tools" in table else (),
            read_paths=self._paths(paths.get("read", ["."]), (*at, "paths", "read")),
            write_paths=self._paths(paths["write"], (*at, "paths", "write")) if "write" in paths else (),
            limits=self._limits(table.get("limit", {}), (*at, "limit")),
            i_accept_the_lethal_trifecta=reader.text(table, known[-1], at, default=""),
            line=reader.lines.at(at),
        )

    def _paths(self, value: object, at: Path) -> tuple[str, ...]:
        found = self.reader.words(value, at)
        for path in found:
            parts = path.split("/")
            if path.startswith("/") or ".." in parts or (path != "." and {"", "."} & set(parts)):
                self.reader.fault(
                    at, f"cannot use path {path!r}", 'accepted: "." or a plain path inside of the workspace'
                )
        return found

    def _limits(self, value: object, at: Path) -> Limits:
        table, found = self.reader.table(value, at, _LIMITS), {}
        for key, (field, parse) in _LIMITS.items():
            if key in table:
                spot = (*at, key)
                amount = (
                    self.reader.quantity(table[key], spot, parse)
                    if parse
                    else self.reader.count(table, key, at)
                )
                if amount is not None:
                    found[field] = amount
        return Limits(**found)

    def _rule(self, value: object, at: Path, names: Names, people: tuple[str, ...]) -> Rule | None:
        reader = self.reader
        if not isinstance(value, dict):
            reader.fault(at, "cannot use this rule: it is not a table")
            return None
        conditions = read_conditions(reader, value, at, names, also=_RULE)
        always = reader.flag(value, "always", at)
        if not (always or conditions.named()):
            reader.fault(
                at, "cannot use a rule without a condition", "if it is meant for everything: always = true"
            )
        if always and conditions.named():
            reader.fault((*at, "always"), "cannot use always = true together with conditions")
        effect = reader.choice(value.get("effect", ""), (*at, "effect"), list(Effect))
        for key, holders in (("approve_by", {Effect.ASK}), ("limit", {Effect.ALLOW, Effect.ASK})):
            if key in value and effect is not None and effect not in holders:
                reader.fault(
                    (*at, key), f"cannot use {key!r} with effect {effect!r}: it has no meaning there"
                )
        approvers = value.get("approve_by", [OWNER])
        return Rule(
            id=RuleId(self._id(value, at)),
            why=reader.text(value, "why", at),
            effect=Effect(effect or Effect.FORBID),
            conditions=conditions,
            limits=self._obligations(value, at),
            approve_by=reader.words(approvers, (*at, "approve_by"), known=people),
            path=reader.path,
            line=reader.lines.at(at),
        )

    def _id(self, table: Mapping[str, object], at: Path) -> str:
        name = self.reader.name(table.get("id", ""), (*at, "id"))
        if name in BUILT_IN:
            self.reader.fault((*at, "id"), f"cannot use id {name!r}: it is one of the built-in answers")
        return name

    def _obligations(self, rule: Mapping[str, object], at: Path) -> Obligations:
        keys, spot = ("tokens_per_day", "requests_per_minute", "max_tokens"), (*at, "limit")
        table = self.reader.table(rule.get("limit", {}), spot, keys)
        amounts = [self.reader.count(table, key, spot) for key in keys]
        return Obligations(
            tokens_per_day=amounts[0],
            requests_per_minute=amounts[1],
            max_tokens=amounts[2],
            log=self.reader.flag(rule, "log", at),
        )

    def _invariant(self, value: object, at: Path, names: Names) -> Invariant:
        table = self.reader.table(value, at, ("id", "why", "never"))
        never = table.get("never")
        spot = (*at, "never")
        if not isinstance(never, dict) or not never:
            self.reader.fault(
                spot, "cannot use this invariant: it does not say what never happens", "never = { … }"
            )
            never = {}
        conditions = read_conditions(self.reader, never, spot, names)
        return Invariant(id=self._id(table, at), never=conditions, line=self.reader.lines.at(at))

    def _test(self, value: object, at: Path, policy: Policy) -> PolicyTest | None:
        reader = self.reader
        table = reader.table(value, at, ("name", "why", "request", "expect", "rule"))
        expect = reader.choice(table.get("expect", ""), (*at, "expect"), ("allow", "ask", "deny"))
        known = {*BUILT_IN, *(rule.id for rule in policy.rules)}
        rule = reader.choice(table["rule"], (*at, "rule"), known) if "rule" in table else None
        facts = table.get("request")
        if not isinstance(facts, dict):
            reader.fault(at, "cannot use a test without a request", "request = { action = … }")
            return None
        for key, names in (("label", policy.labels.order), ("tool", TOOLS), ("agent", policy.agents)):
            if key in facts:
                reader.choice(facts[key], (*at, "request", key), names)
        try:
            request = parse_request(facts, policy)
        except BadRequest as exc:
            reader.fault((*at, "request", exc.where), exc.message, exc.hint)
            return None
        name = reader.text(table, "name", at)
        return PolicyTest(
            name=name, request=request, expect=expect or "", rule=rule, line=reader.lines.at(at)
        )

    def _warn(self, at: Path, message: str) -> None:
        self.warnings.append(Problem(path=self.reader.path, line=self.reader.lines.at(at), message=message))
