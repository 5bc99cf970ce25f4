"""The process: logging, signals, ready, watchdog, stop."""

import asyncio
import logging
import os
import resource
import signal
import socket
import sys
from asyncio import sslproto
from dataclasses import replace
from pathlib import Path

from mycoswarmd.daemon import journal
from mycoswarmd.daemon.activation import Manager, take_api_socket
from mycoswarmd.daemon.clock import SystemClock
from mycoswarmd.daemon.policyfile import load_policy
from mycoswarmd.daemon.settings import Options, Settings, load_settings
from mycoswarmd.daemon.wiring import Running, running_node
from mycoswarmd.errors import ConfigError, MycoswarmError
from mycoswarmd.outposts.notcp import forbid_tcp

log = logging.getLogger("mycoswarmd")

# Connections are bounded to about 3,200 in all (api/lines.py).
_OPEN_FILES = 8_192
# asyncio reserves 256 KiB for each end of a TLS connection; a swarm of ten has forty ends.
_TLS_BUFFER_BYTES = 32 << 10
# Where a package or `mycoswarmctl service install` puts the unit of the machine's node.
UNIT_FILES = tuple(Path(f"/{place}/systemd/system/mycoswarmd.service") for place in ("etc", "usr/lib", "lib"))
_WHERE_THE_POLICY_IS = ("policy", "state_dir")
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def run_forever(
    *,
    state: Path | None,
    config: Path | None,
    policy: Path | None,
    listen: str | None,
    swarm_listen: str | None,
    log_level: str,
    appliance: bool = False,
    outposts: Path | None = None,
) -> None:
    """Run a node until SIGTERM or SIGINT; raise MycoswarmError when it cannot start."""
    if log_level not in _LEVELS:
        raise ConfigError("bad-option", f"cannot log at {log_level!r}: one of {', '.join(_LEVELS)}")
    journal.set_up(_LEVELS[log_level])
    os.umask(0o077)
    _raise_file_limit()
    sslproto.SSLProtocol.max_size = _TLS_BUFFER_BYTES
    manager = Manager(SystemClock())
    options = Options(
        state=state,
        config=config,
        policy=policy,
        listen=listen,
        swarm_listen=swarm_listen,
        log_level=log_level,
        appliance=appliance,
        outposts=outposts,
    )
    try:
        _run(options, manager)
    except MycoswarmError as exc:
        manager.failed(str(exc))
        if not appliance:
            raise
        log.error("%s", exc, extra={"event": "cannot-run"})  # noqa: TRY400
        sys.exit(exc.exit_code)


def _run(options: Options, manager: Manager) -> None:
    settings = load_settings(options)
    for warning in settings.warnings:
        log.warning("%s", warning)
    api_socket, is_held = None, False
    if settings.appliance:
        is_held = forbid_tcp()  # before the first thread
        api_socket = take_api_socket()
        settings = replace(settings, runtime_dir=Path(api_socket.getsockname()).parent)
    try:
        asyncio.run(_serve(settings, api_socket, manager, is_held=is_held))
    except ExceptionGroup as group:
        deliberate = group.subgroup(MycoswarmError)
        if deliberate is None:
            raise
        raise _first(deliberate) from None


def _raise_file_limit() -> None:
    """Allow as many open files as the bounds on connections add up to, where the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _serve(
    settings: Settings, api_socket: socket.socket | None, manager: Manager, *, is_held: bool
) -> None:
    stop, reload = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    async with asyncio.TaskGroup() as group:
        watch = group.create_task(
            manager.watch(), name="watchdog"
        )  # from now on: starting may take long, too
        async with running_node(settings, api_socket) as node:
            _say_ready(settings, node, is_held=is_held)
            manager.ready(_standing(node))
            reloader = group.create_task(_reload_on(reload, node, manager), name="reload")
            await stop.wait()
            reloader.cancel()
            manager.stopping()
            log.info("stopping", extra={"event": "stopping"})
        watch.cancel()


def _say_ready(settings: Settings, node: Running, *, is_held: bool) -> None:
    if not settings.appliance:
        log.info("ready: unix:%s", settings.socket_path, extra={"event": "ready"})
        if settings.listen is not None:
            log.info("ready: http://%s:%d/v1 (API key needed)", *settings.listen)
        return
    if is_held:
        log.info("a socket from the LAN dialer stays where it points")
    else:
        log.warning(
            "a node that is taken over could point a socket from the LAN dialer at any address that the"
            " kernel's filter allows: this kernel's Landlock does not know TCP (Linux 6.7)"
        )
    log.info("listening on %s; %s", settings.socket_path, _standing(node), extra={"event": "ready"})


def _standing(node: Running) -> str:
    """Say in a few words what the node is, and what to do with one that is new."""
    return "next: sudo mycoswarmctl init, or enroll" if node.is_alone() else "in its swarm"


async def _reload_on(reload: asyncio.Event, node: Running, manager: Manager) -> None:
    while True:
        await reload.wait()
        reload.clear()
        manager.reloading()
        try:
            result = await node.policy.reload()
        except MycoswarmError as exc:
            log.error("the old policy stays: %s", exc, extra={"event": "policy-broken"})  # noqa: TRY400
        else:
            log.info("policy reloaded: %s", result["sha256"], extra={"event": "policy-reloaded"})
        manager.ready(_standing(node))


def check(
    *,
    state: Path | None,
    config: Path | None,
    policy: Path | None,
    listen: str | None,
    appliance: bool = False,
    policy_only: bool = False,
) -> str:
    """Load settings and policy as `run` would and describe them: as the service's, where this node is one.

    With `policy_only` as a reload, which reads no settings: what is wrong with them is said, and no failure.
    """
    is_service = appliance or (state is None and any(path.exists() for path in UNIT_FILES))
    options = Options(state=state, config=config, policy=policy, listen=listen, appliance=is_service)
    try:
        settings = load_settings(options)
    except ConfigError as exc:
        if not policy_only:
            raise
        sys.stderr.write(f"mycoswarmd: {exc}; a node that runs keeps those of its start\n")
        settings = load_settings(options, only=_WHERE_THE_POLICY_IS)
    for warning in settings.warnings:
        sys.stderr.write(f"mycoswarmd: {warning}\n")
    listening = f"http://{settings.listen[0]}:{settings.listen[1]}" if settings.listen else "unix socket only"
    if (
        settings.policy_is_given
        or os.path.lexists(settings.policy_file)
        or os.path.lexists(settings.state_dir / "policy" / "current")  # once there was one: it must not go
    ):
        checked = load_policy(settings.policy_file)
        said = f"{checked.policy.name!r}, {len(checked.policy.rules)} rules, {len(checked.warnings)} warnings"
    else:
        said = "the file does not exist: the shipped default would be used"
    return "\n".join(
        (
            f"runs as  {'a service of systemd' if is_service else 'a process of whoever starts it'}",
            f"state    {settings.state_dir}",
            f"socket   {settings.socket_path}",
            f"listen   {listening}",
            f"models   {settings.models_dir}",
            f"cages    {settings.cages.value}",
            f"engines  {', '.join(e.name for e in settings.engines) or 'the embedded one only'}",
            f"policy   {settings.policy_file}: {said}",
        )
    )


def _first(group: ExceptionGroup[Exception]) -> Exception:
    found: Exception = group
    while isinstance(found, ExceptionGroup):
        found = found.exceptions[0]
    return found
