"""The facts a decision rests on. No text of a prompt is ever among them.

A fact is a value, None (known to be absent: a person's own prompt has no agent), or UNKNOWN (it
cannot be told now, for example the hour on a box without a clock). UNKNOWN counts against the
request: it fails the conditions of `allow` and `ask` rules and satisfies those of `forbid` rules.
"""

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Final, Literal, NewType

TaskId = NewType("TaskId", str)
RuleId = NewType("RuleId", str)


class Unknown(Enum):
    """The type of UNKNOWN, a fact that cannot be told now."""

    UNKNOWN = "unknown"


UNKNOWN: Final[Literal[Unknown.UNKNOWN]] = Unknown.UNKNOWN


class Action(StrEnum):
    """What is asked for."""

    INFER = "infer"
    TOOL = "tool"
    TASK = "task"
    ADMIN = "admin"


class Zone(StrEnum):
    """Where bytes would go: a fact of the transport, never of a model's name."""

    SELF = "self"
    LAN = "lan"
    CLOUD = "cloud"


class Start(StrEnum):
    """Whether the request started on this node or arrived from another (the key `from`)."""

    LOCAL = "local"
    PEER = "peer"


class Effect(StrEnum):
    """What a rule says. Forbid beats ask beats allow."""

    ALLOW = "allow"
    ASK = "ask"
    FORBID = "forbid"


class SandboxLevel(StrEnum):
    """What the kernel enforces around an agent here, weakest first."""

    NONE = "none"
    REDUCED = "reduced"
    FULL = "full"


class Role(StrEnum):
    """What the roster says that a key may be. A signer is a node that also holds a signing key."""

    NODE = "node"
    OPERATOR = "operator"
    SIGNER = "signer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who is speaking, as the transport proved it. At most one of user, key, node, operator, agent is set.

    An agent that works for the owner is not the owner: its principal is `agent` alone. An operator is the
    owner at another machine: a signer admitted that key as such.
    """

    is_owner: bool = False  # uid 0, the daemon's uid, a member of group mycoswarm, or an operator
    uid: int | None = None
    user: str | None = None
    groups: frozenset[str] = frozenset()
    key: str | None = None  # the name of an API key
    node: str | None = None  # the roster's name for the key that was proved
    node_id: str | None = None  # and its id
    operator: str | None = None  # the roster's name for a person's key
    operator_id: str | None = None  # and its id
    agent: str | None = None

    def describe(self) -> str:
        """Name the speaker in one word for receipts and lists, such as `user:alice`."""
        for kind in ("agent", "key", "node", "operator", "user"):
            value = getattr(self, kind)
            if value is not None:
                return f"{kind}:{value}"
        return f"uid:{self.uid}" if self.uid is not None else "nobody"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One thing that somebody wants done, as the policy sees it."""

    action: Action
    principal: Principal
    zone: Zone = Zone.SELF
    start: Start = Start.LOCAL
    label: str | None = None  # None: the policy's default label; an unknown one: the highest
    model: str | None = None
    dest: str | None = None  # a declared destination, or web:<host>
    node: str | None = None  # where it would run
    tags: frozenset[str] = frozenset()  # of that node
    tier: str | None = None  # of that node
    agent: str | None = None  # whose task, or which agent a task is for
    tool: str | None = None
    tainted: bool = False
    minute_of_day: int | Unknown = UNKNOWN  # local time, 0..1439
    roster_age_s: int | Unknown = UNKNOWN
    sandbox: SandboxLevel | Unknown = UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one task of an agent may use."""

    wall_s: int = 1200
    memory_bytes: int = 1 << 30
    processes: int = 64
    disk_bytes: int = 256 << 20
    cpu_percent: int = 100
    steps: int = 40
    tokens: int = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CageSpec:
    """What a cage may do, compiled from the policy; the kernel enforces it.

    Paths are relative to the workspace; "." is all of it. Programs are absolute, resolved files.
    """

    task_id: str
    attempt: int
    read_paths: tuple[str, ...]
    write_paths: tuple[str, ...]  # empty: nothing in the workspace can be written
    programs: tuple[str, ...]  # empty: nothing can be executed
    limits: Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What a cage found when it tried to break out, before it was given its task.

    Attributes:
        held: each probe that had to fail and did, by name.
        broken: each probe that succeeded although it had to fail: the cage must not be used.
        absent: mechanisms this kernel does not have, such as `landlock`.
        level: FULL only where nothing is absent.
    """

    held: tuple[str, ...]
    broken: tuple[str, ...]
    absent: tuple[str, ...]
    level: SandboxLevel
