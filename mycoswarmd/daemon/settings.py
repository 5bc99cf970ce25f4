"""The settings: one table of keys, read from mycoswarm.toml, where the operator puts paths and ports.

Law: what says where prompts may go is never here; it is in the policy. An unknown key is an error.
An engine's address must be on this machine: anything else would be a destination, which only the
policy may declare.
"""

import ipaddress
import os
import platform
import stat
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from mycoswarmd.core.names import NAME, NAME_HINT, named_after
from mycoswarmd.core.units import parse_duration_s
from mycoswarmd.errors import ConfigError
from mycoswarmd.wire.proof import Unit

DEFAULT_PORT: Final = 7436
# Where members of the swarm find this node, on every address; only roster keys are answered there.
SWARM_PORT: Final = 7437
SWARM_LISTEN: Final = ("::", SWARM_PORT)
MAX_STATIC_PEERS: Final = 64
CONFIG_DIR: Final = Path("/etc/mycoswarm")
# Of the appliance, which runs as a user of its own. What the engine's unit must read is not in the state.
STATE_DIR: Final = Path("/var/lib/mycoswarm")
RUNTIME_DIR: Final = Path("/run/mycoswarm")
ENGINE_DIR: Final = Path("/var/lib/mycoswarm-engine")
ENGINE_RUNTIME_DIR: Final = Path("/run/mycoswarm-engine")
# Where each unit of the appliance is connected to (systemd/*.socket), whatever the settings say.
OUTPOSTS_DIR: Final = Path("/run/mycoswarm-outposts")
OUTPOSTS: Final[Mapping[Unit, str]] = {
    Unit.LAN: "lan.sock",
    Unit.DISCOVERY: "discovery.sock",
    Unit.TASK: "task.sock",
    Unit.ENGINE: "engine.sock",
    Unit.SIGNER: "signer.sock",
    Unit.PROBE: "probe.sock",
}
_MAX_FILE_BYTES = 64 << 10
_ENGINE_KINDS = ("ollama", "openai")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSetting:
    """One `[engines.NAME]` table: an engine that runs on this machine beside the node."""

    name: str
    kind: str  # ollama | openai
    url: str  # http://127.0.0.1:PORT, or unix:/path
    native_tools: bool | None = None  # None: ask the engine
    concurrency: int = 4


class CageKind(StrEnum):
    """Who builds the cages."""

    SYSTEMD = "systemd"  # a unit of the appliance
    BUBBLEWRAP = "bubblewrap"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that is not policy.

    Attributes:
        appliance: whether the outside is made of systemd's units, and not of children of this process.
        outposts_dir: where the sockets of those units are.
        engine_runtime_dir: for the sockets and logs of embedded engines.
        warnings: what was taken otherwise than it is written.
    """

    state_dir: Path
    runtime_dir: Path
    policy_file: Path
    policy_is_given: bool = False
    node_name: str = ""
    listen: tuple[str, int] | None = ("127.0.0.1", DEFAULT_PORT)
    swarm_listen: tuple[str, int] | None = SWARM_LISTEN
    peers: tuple[tuple[str, int], ...] = ()
    discovery: bool = True
    models_dir: Path
    engine_dir: Path
    managed_engine: bool = True
    engine_idle_s: int = 900
    engine_context_tokens: int = 4096
    engines: tuple[EngineSetting, ...] = ()
    task_slots: int = 2
    max_open_tasks: int = 1000
    approval_s: int = 24 * 3600
    log_level: str = "info"
    cages: CageKind = CageKind.BUBBLEWRAP
    appliance: bool = False
    outposts_dir: Path = OUTPOSTS_DIR
    engine_runtime_dir: Path
    warnings: tuple[str, ...] = ()

    @property
    def socket_path(self) -> Path:
        """Where local callers find the node."""
        return self.runtime_dir / "api.sock"

    def outpost(self, unit: Unit) -> Path:
        """Return where a unit of the appliance is connected to."""
        return self.outposts_dir / OUTPOSTS[unit]


@dataclass(frozen=True, slots=True)
class _Key:
    """One row of the settings table."""

    name: str
    kind: type
    low: int = 0
    high: int = 0
    help: str = ""


# fmt: off
TABLE: tuple[_Key, ...] = (
    _Key("state_dir",             str,  help="where the queue, receipts, keys and models live"),
    _Key("runtime_dir",           str,  help="where api.sock is"),
    _Key("policy",                str,  help="the policy file"),
    _Key("node_name",             str,  help="what this node is called; default: the host name"),
    _Key("listen",                str,  help="loopback HOST:PORT for programs with an API key, or \"none\""),
    _Key("swarm_listen",          str,  help="HOST:PORT for the swarm once this node is in one, or \"none\""),
    _Key("peers",                 list, help="addresses of nodes that multicast does not reach"),
    _Key("discovery",             bool, help="whether to announce this node and look for others by mDNS"),
    _Key("models_dir",            str,  help="GGUF files here are served by name"),
    _Key("managed_engine",        bool, help="whether the node runs the embedded engine itself"),
    _Key("engine_idle",           str,  help="the embedded engine stops after this long without a prompt"),
    _Key("engine_context_tokens", int,  256, 1 << 20, "context length of the embedded engine"),
    _Key("task_slots",            int,  1, 64,        "how many tasks run at a time"),
    _Key("max_open_tasks",        int,  1, 1_000_000, "open tasks beyond this: queue full"),
    _Key("approval_time",         str,  help="how long a question to a person stands before it counts as no"),
    _Key("cages",                 str,  help="who builds cages: \"systemd\" (appliance) or \"bubblewrap\""),
    _Key("engines",               dict, help="tables [engines.NAME]: kind, url, native_tools, concurrency"),
)
# fmt: on


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line said."""

    state: Path | None = None
    config: Path | None = None
    policy: Path | None = None
    listen: str | None = None
    swarm_listen: str | None = None
    log_level: str = "info"
    appliance: bool = False
    outposts: Path | None = None


@dataclass(slots=True)
class _Reader:
    path: str
    table: Mapping[str, object]
    seen: set[str] = field(default_factory=set)

    def get(self, key: _Key) -> object | None:
        value = self.table.get(key.name)
        if value is None:
            return None
        is_right = isinstance(value, key.kind) and not (key.kind is int and isinstance(value, bool))
        if not is_right:
            raise _invalid(self.path, key.name, f"must be a {key.kind.__name__}, not {value!r}")
        if key.kind is int and not key.low <= value <= key.high:  # type: ignore[operator]
            raise _invalid(self.path, key.name, f"must be from {key.low} to {key.high}, not {value!r}")
        return value


def load_settings(options: Options, *, only: Collection[str] | None = None) -> Settings:
    """Read the settings file, if there is one, and put the command line over it.

    Raises ConfigError with the file and the key.

    Args:
        options: the command line.
        only: keys of text that are read where they can be; all else in the file is left out, right or not.
    """
    state = options.state.absolute() if options.state is not None else None
    options = replace(options, state=state, policy=options.policy and options.policy.absolute())
    config = options.config or _first_existing(options)
    table, where = _read(config, only) if config is not None else ({}, "no file")
    unknown = set(table) - {key.name for key in TABLE}
    if unknown:
        known = ", ".join(key.name for key in TABLE)
        raise _invalid(where, min(unknown), f"is not a setting; settings are {known}")
    reader = _Reader(where, table)
    values = {key.name: reader.get(key) for key in TABLE}

    def text(name: str) -> str | None:
        value = values[name]
        return value if isinstance(value, str) else None

    def number(name: str, default: int) -> int:
        value = values[name]
        return value if isinstance(value, int) else default

    is_system = options.appliance and options.state is None  # where the appliance's units expect everything
    state_dir = options.state or Path(text("state_dir") or (STATE_DIR if is_system else default_state_dir()))
    runtime = text("runtime_dir")
    if options.state is not None:
        runtime_dir = options.state / "run"
    elif is_system:
        runtime_dir = RUNTIME_DIR  # systemd's socket is there
    else:
        runtime_dir = Path(runtime) if runtime else default_runtime_dir(state_dir)
    policy_file = options.policy or (Path(text("policy") or "") if text("policy") else None)
    if policy_file is None and is_system:
        beside = CONFIG_DIR / "policy.toml"
    else:
        beside = _policy_beside(state_dir, is_own=options.state is not None)
    listen_text = options.listen if options.listen is not None else text("listen")
    listen_text = listen_text or ("none" if options.appliance else f"127.0.0.1:{DEFAULT_PORT}")
    engine_home = ENGINE_DIR if is_system else state_dir
    engines = values["engines"]
    node_name, warnings = _node_name(text("node_name"), where)
    return Settings(
        state_dir=state_dir,
        runtime_dir=runtime_dir,
        policy_file=policy_file or beside,
        policy_is_given=policy_file is not None,
        node_name=node_name,
        listen=parse_listen(listen_text, where),
        swarm_listen=_swarm_listen(options.swarm_listen or text("swarm_listen"), where),
        peers=_peers(values["peers"], where),
        discovery=values["discovery"] is not False,
        models_dir=Path(text("models_dir") or engine_home / "models"),
        engine_dir=engine_home / "engine",
        managed_engine=values["managed_engine"] is not False,
        engine_idle_s=_duration(text("engine_idle"), 900, where, "engine_idle"),
        engine_context_tokens=number("engine_context_tokens", 4096),
        engines=tuple(
            _engine(where, name, entry)
            for name, entry in (engines if isinstance(engines, dict) else {}).items()
        ),
        task_slots=number("task_slots", 2),
        max_open_tasks=number("max_open_tasks", 1000),
        approval_s=_duration(text("approval_time"), 24 * 3600, where, "approval_time"),
        log_level=options.log_level,
        cages=_cages(text("cages"), where, is_appliance=options.appliance),
        appliance=options.appliance,
        outposts_dir=options.outposts or OUTPOSTS_DIR,
        engine_runtime_dir=ENGINE_RUNTIME_DIR if is_system else runtime_dir,
        warnings=warnings,
    )


def take_variables(*names: str) -> dict[str, str]:
    """Return these variables of the environment and remove them: they are not for our children."""
    return {name: os.environ.pop(name) for name in names if name in os.environ}


def default_state_dir() -> Path:
    """Return where state lives when nobody said: the system's place for root, XDG for others."""
    if os.geteuid() == 0:
        return Path("/var/lib/mycoswarm")
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "mycoswarm"


def default_runtime_dir(state_dir: Path) -> Path:
    """Return where the socket lives when nobody said."""
    if os.geteuid() == 0:
        return Path("/run/mycoswarm")
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "mycoswarm" if base else state_dir / "run"


def parse_listen(text: str, where: str = "--listen") -> tuple[str, int] | None:
    """Parse HOST:PORT; only loopback addresses are taken. "none" is no listener."""
    if text == "none":
        return None
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback or not port.isascii() or not port.isdigit() or len(port) > 5 or int(port) > 65535:
        raise _invalid(where, "listen", f"must be a loopback HOST:PORT, such as 127.0.0.1:7436, not {text!r}")
    return host, int(port)


def parse_address(text: str, *, default_port: int) -> tuple[str, int] | None:
    """Parse an IP address in numbers with or without a port, IPv6 in brackets where it has one."""
    host, port = text, str(default_port)
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":") if rest else port
    elif text.count(":") == 1:
        host, port = text.split(":")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return None
    if not port.isascii() or not port.isdigit() or len(port) > 5 or not 1 <= int(port) <= 65535:
        return None
    return host, int(port)


def _swarm_listen(text: str | None, where: str) -> tuple[str, int] | None:
    if text is None:
        return SWARM_LISTEN
    if text == "none":
        return None
    found = parse_address(text, default_port=SWARM_PORT)
    if found is None:
        raise _invalid(where, "swarm_listen", f"must be ADDRESS:PORT, such as [::]:7437, not {text!r}")
    return found


def _node_name(text: str | None, where: str) -> tuple[str, tuple[str, ...]]:
    """Return the name and what is to be said of it: a node that ran until now is not stopped by its name."""
    if text is None:
        host = platform.node().split(".")[0]
        return (host if NAME.fullmatch(host) else "node"), ()
    if NAME.fullmatch(text):
        return text, ()
    near = named_after(text)
    if not near:
        raise _invalid(where, "node_name", f"cannot be {text[:80]!r}; accepted: {NAME_HINT}")
    said = f"{where}: 'node_name' cannot be {text[:80]!r}, so it is {near!r}; accepted: {NAME_HINT}"
    return near, (said,)


def _cages(text: str | None, where: str, *, is_appliance: bool) -> CageKind:
    if text is None:
        return CageKind.SYSTEMD if is_appliance else CageKind.BUBBLEWRAP
    if text not in list(CageKind):
        raise _invalid(where, "cages", f"must be one of {', '.join(CageKind)}, not {text!r}")
    if text == CageKind.SYSTEMD and not is_appliance:
        raise _invalid(where, "cages", "can be 'systemd' only where systemd runs the node")
    return CageKind(text)


def _peers(value: object, where: str) -> tuple[tuple[str, int], ...]:
    if value is None:
        return ()
    assert isinstance(value, list)
    if len(value) > MAX_STATIC_PEERS:
        raise _invalid(where, "peers", f"may have at most {MAX_STATIC_PEERS} addresses")
    found = []
    for one in value:
        address = parse_address(one, default_port=SWARM_PORT) if isinstance(one, str) else None
        if address is None:
            raise _invalid(where, "peers", f"must be IP addresses in numbers, such as 10.0.0.7, not {one!r}")
        found.append(address)
    return tuple(found)


def check_local_url(url: str, where: str, key: str) -> None:
    """Accept unix:/absolute/path or http://LOOPBACK-IP:PORT; anything else would leave this machine."""
    if url.startswith("unix:/"):
        return
    parts = urlsplit(url)
    try:
        is_local = ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        is_local = False
    if parts.scheme != "http" or not is_local or parts.username or parts.query or parts.fragment:
        raise _invalid(
            where,
            key,
            f"must be http://127.0.0.1:PORT or unix:/path, not {url!r}: an engine elsewhere is a "
            "destination, and only the policy declares those",
        )


def _first_existing(options: Options) -> Path | None:
    places = (
        [options.state / "mycoswarm.toml"] if options.state is not None else [CONFIG_DIR / "mycoswarm.toml"]
    )
    return next((place for place in places if place.exists()), None)


def _policy_beside(state_dir: Path, *, is_own: bool) -> Path:
    if is_own or os.geteuid() != 0:
        own = state_dir / "policy.toml"
        if is_own or own.exists():
            return own
    return CONFIG_DIR / "policy.toml"


def _read(path: Path, only: Collection[str] | None) -> tuple[Mapping[str, object], str]:
    if only is None:
        return _read_all(path), str(path)
    try:
        table = _read_all(path)
    except ConfigError:
        table = {}
    return {key: value for key, value in table.items() if key in only and isinstance(value, str)}, str(path)


def _read_all(path: Path) -> Mapping[str, object]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ConfigError("config-unreadable", f"cannot read settings {str(path)!r}: not a file")
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise ConfigError("config-unreadable", f"cannot read settings {str(path)!r}: {exc.strerror}") from exc
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError("config-invalid", f"cannot use settings {str(path)!r}: larger than 64 KiB")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigError("config-invalid", f"cannot use settings {str(path)!r}: {exc}") from exc


def _engine(where: str, name: str, entry: object) -> EngineSetting:
    key = f"engines.{name}"
    if not isinstance(entry, dict):
        raise _invalid(where, key, "must be a table")
    unknown = set(entry) - {"kind", "url", "native_tools", "concurrency"}
    if unknown:
        raise _invalid(
            where, f"{key}.{min(unknown)}", "is not a setting: kind, url, native_tools, concurrency are"
        )
    kind, url = entry.get("kind"), entry.get("url")
    if kind not in _ENGINE_KINDS or not isinstance(url, str):
        raise _invalid(where, key, f"needs url and kind, which is one of {', '.join(_ENGINE_KINDS)}")
    check_local_url(url, where, f"{key}.url")
    native, concurrency = entry.get("native_tools"), entry.get("concurrency", 4)
    if not (native is None or isinstance(native, bool)) or not isinstance(concurrency, int):
        raise _invalid(where, key, "native_tools is true or false, concurrency a number")
    if not 1 <= concurrency <= 1024:
        raise _invalid(where, f"{key}.concurrency", "must be from 1 to 1024")
    return EngineSetting(name=name, kind=kind, url=url, native_tools=native, concurrency=concurrency)


def _duration(text: str | None, default_s: int, where: str, key: str) -> int:
    if text is None:
        return default_s
    try:
        return int(parse_duration_s(text))
    except ValueError as exc:
        raise _invalid(where, key, f"cannot be {text!r}; accepted: {exc}") from exc


def _invalid(path: str, key: str, problem: str) -> ConfigError:
    return ConfigError("config-invalid", f"cannot use settings in {path}: {key!r} {problem}")
