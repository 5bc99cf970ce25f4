"""`mycoswarmctl service`: the appliance without the Debian package, for whoever came by pipx.

Laws:

1. What systemd starts as another user is root's: code comes from a virtual environment of its own under
   /opt/mycoswarm, never from the home directory that this command may have been started from.
2. The units are those of the Debian package, character for character but for two paths (`_MOVED`).
3. Beside the package nothing is installed, and what the operator wrote is never overwritten.
4. Nothing of the system that is worked on runs, and no link on it leads out of it: the environment is made
   anew by this machine's Python, and files are made where every part of the path is root's (ctl/ground.py).

Source: systemd.unit(5) for the order of directories; design section 5 for what the package does.
"""

import difflib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mycoswarmd.ctl.ground import firm
from mycoswarmd.ctl.ownwheel import make_wheel, named_wheel
from mycoswarmd.ctl.plain import examples, make_app, typer
from mycoswarmd.ctl.session import JSON, Session, begin, guarded
from mycoswarmd.errors import ConfigError, Conflict

_HOME = "/opt/mycoswarm"
_PYTHON = "/usr/bin/python3"
_MOVED = (
    ("/usr/libexec/mycoswarm/", f"{_HOME}/libexec/"),
    ("/usr/sbin/mycoswarmd", f"{_HOME}/sbin/mycoswarmd"),
    (f"#!{_PYTHON} ", f"#!{_HOME}/venv/bin/python "),
)
_UNITS = "etc/systemd/system"
# systemd finds a mount by its path, in which a dash has another meaning.
_MOUNT = "run-mycoswarm\\x2dengine.mount"
_PACKAGED = ("usr/lib/systemd/system/mycoswarmd.service", "lib/systemd/system/mycoswarmd.service")
_COMMAND = "usr/local/bin/mycoswarmctl"
_BUILD_AGENT = (
    "import pathlib, sys; from mycoswarmd.sandbox.zipapp import build_agent; "
    "pathlib.Path(sys.argv[1]).open('xb').write(build_agent())"
)
_PIP_S = 900
_SYSTEM_S = 180

service_app = make_app("Install the node as a service where there is no Debian package.")


@service_app.callback()
def _group() -> None:
    """Install the node as a service where there is no Debian package."""


@dataclass(frozen=True, slots=True)
class Placed:
    """One file of the service.

    Attributes:
        path: where it belongs, without the leading slash.
        is_own: whether it is the operator's once it is there.
    """

    path: str
    text: str
    mode: int = 0o644
    is_own: bool = False


def service_files(share: Path) -> Iterator[Placed]:
    """Yield what belongs to the service, from the directory that has the units and the launchers."""
    units, launchers = share / "systemd", share / "launchers"
    for path in sorted([*units.glob("*.socket"), *units.glob("*.service")]):
        yield Placed(f"{_UNITS}/{path.name}", _moved(path.read_text("utf-8")))
    yield Placed(f"{_UNITS}/{_MOUNT}", (units / "engine.mount").read_text("utf-8"))
    yield Placed("etc/sysusers.d/mycoswarm.conf", (units / "sysusers.conf").read_text("utf-8"))
    yield Placed("etc/tmpfiles.d/mycoswarm.conf", (units / "tmpfiles.conf").read_text("utf-8"))
    cages = (units / "mycoswarm-task.tmpfiles.conf").read_text("utf-8")
    yield Placed("etc/tmpfiles.d/mycoswarm-task.conf", cages)
    catalog = (units / "mycoswarm.catalog").read_text("utf-8")
    yield Placed("usr/local/lib/systemd/catalog/mycoswarm.catalog", catalog)
    cards = (units / "engine-gpu.conf").read_text("utf-8")
    yield Placed(f"{_HOME.lstrip('/')}/share/engine-gpu.conf", cards)
    for path in sorted(launchers.glob("*/*")):
        where = f"{_HOME.lstrip('/')}/{path.parent.name}/{path.name}"
        yield Placed(where, _moved(path.read_text("utf-8")), mode=0o755)
    policy = (share / "policy" / "default.toml").read_text("utf-8")
    yield Placed("etc/mycoswarm/policy.toml", policy, is_own=True)
    settings = (share / "mycoswarm.toml").read_text("utf-8")
    yield Placed("etc/mycoswarm/mycoswarm.toml", settings, is_own=True)


def find_share() -> Path:
    """Return the directory with the units: of the wheel, or in a checkout one that looks like it."""
    package = Path(__file__).resolve().parent.parent
    if (package / "share" / "systemd").is_dir():
        return package / "share"
    raise ConfigError(
        "no-units",
        f"cannot find the units: {str(package / 'share' / 'systemd')!r} does not exist",
        hint="use the Debian package, or the wheel: pipx install ./mycoswarmd-VERSION-py3-none-any.whl",
    )


def _moved(text: str) -> str:
    for old, new in _MOVED:
        text = text.replace(old, new)
    return text


_ROOT = typer.Option(
    Path("/"), "--root", metavar="DIR", help="Work on the system in DIR; start and stop nothing."
)


@service_app.command(
    "install",
    epilog=examples("sudo ~/.local/bin/mycoswarmctl service install", "systemctl status mycoswarmd"),
)
@guarded
def install(
    ctx: typer.Context,
    root: Path = _ROOT,
    source: Path = typer.Option(
        None, "--from", metavar="WHEEL", help="A wheel of the node. Default: what you are running."
    ),
    as_json: bool = JSON,
) -> None:
    """Install units, users and an environment under /opt/mycoswarm, and start the node."""
    session = begin(ctx, as_json=as_json)
    session.stay_here()
    service = Service(session, Path(root))
    service.need_root()
    service.refuse_beside_package()
    service.refuse_from_itself()
    share = find_share()
    given = ctx.params.get("source") is not None
    with tempfile.TemporaryDirectory(prefix="mycoswarm-") as scratch:
        service.install(share, str(named_wheel(source) if given else make_wheel(Path(scratch))))


@service_app.command("uninstall")
@guarded
def uninstall(ctx: typer.Context, root: Path = _ROOT, as_json: bool = JSON) -> None:
    """Stop the node and remove what `install` made; its state and its settings stay."""
    session = begin(ctx, as_json=as_json)
    session.stay_here()
    service = Service(session, Path(root))
    service.need_root()
    service.uninstall(find_share())


@service_app.command("diff")
@guarded
def diff(ctx: typer.Context, root: Path = _ROOT, as_json: bool = JSON) -> None:
    """Show how the installed service differs from this version's; exit with 1 when it does."""
    session = begin(ctx, as_json=as_json)
    session.stay_here()
    service = Service(session, Path(root))
    service.refuse_beside_package()
    found = service.differences(find_share())
    if as_json:
        session.document({"differences": [{"path": path, "diff": text} for path, text in found]})
    for _, text in found:
        if not as_json:
            session.text(text)
    if found:
        raise typer.Exit(1)
    session.aside("no difference")


class Service:
    """The service on one system."""

    def __init__(self, session: Session, root: Path) -> None:
        self._session = session
        self._root = root.absolute()
        self._is_here = self._root == Path("/")

    def refuse_beside_package(self) -> None:
        """Raise Conflict where the Debian package has its units."""
        if any((self._root / path).exists() for path in _PACKAGED):
            raise Conflict(
                "packaged",
                "cannot do this beside the Debian package: it has the units already",
                hint="apt remove mycoswarmd first; what differs from the package: dpkg -V mycoswarmd",
            )

    def refuse_from_itself(self) -> None:
        """Raise Conflict for the command that is a part of the service: it could only bring what is there."""
        if self._is_here and Path(sys.prefix) == Path(_HOME) / "venv":
            raise Conflict(
                "is-the-service",
                "cannot install the service from itself: this command is a part of it, of this version",
                hint="run that of pipx, by its path: sudo ~/.local/bin/mycoswarmctl service install",
            )

    def need_root(self) -> None:
        """Raise ConfigError for anybody but root."""
        if os.geteuid() != 0:
            raise ConfigError(
                "not-root",
                "cannot change services of the system as this user",
                hint="use sudo",
            )
        if not self._root.is_dir():
            raise ConfigError("no-system", f"cannot find a system in {str(self._root)!r}")

    def install(self, share: Path, source: str) -> None:
        """Make everything and start it; what is there already is brought to this version."""
        placed_files = list(service_files(share))
        for placed in placed_files:  # all are looked at before anything is made
            self._firm(placed.path)
        command = self._firm(_COMMAND)
        self._make_environment(source, share / "lock.txt")
        for placed in placed_files:
            self._place(placed)
        self._make_agent()
        if not command.exists() and not command.is_symlink():
            command.parent.mkdir(parents=True, exist_ok=True)
            command.symlink_to(f"{_HOME}/bin/mycoswarmctl")
        if self._is_here:
            self._system("systemd-sysusers", "/etc/sysusers.d/mycoswarm.conf")
            places = ("/etc/tmpfiles.d/mycoswarm.conf", "/etc/tmpfiles.d/mycoswarm-task.conf")
            self._system("systemd-tmpfiles", "--create", *places)
            self._system("journalctl", "--update-catalog")
            self._system("systemctl", "daemon-reload")
            self._system("systemctl", "enable", "--quiet", *_started(share))
            self._system("systemctl", "restart", *_started(share))
        self._session.aside(
            "the node is installed; next: sudo mycoswarmctl init --name home (first machine), or enroll"
        )

    def uninstall(self, share: Path) -> None:
        """Take everything away again but what the operator may want."""
        if not (self._root / _UNITS / "mycoswarmd.service").exists():
            raise Conflict("not-installed", "cannot uninstall: nothing was installed by this command")
        ours = [self._firm(placed.path) for placed in service_files(share) if not placed.is_own]
        home = self._firm(f"{_HOME.lstrip('/')}/venv").parent
        command = self._firm(_COMMAND)
        if self._is_here:
            self._system("systemctl", "disable", "--quiet", "--now", *_started(share))
            if (self._root / _UNITS / _MOUNT).exists():
                self._system("systemctl", "stop", _MOUNT)
        for path in ours:
            path.unlink(missing_ok=True)
        if command.is_symlink() and str(command.readlink()).startswith(f"{_HOME}/"):
            command.unlink()
        shutil.rmtree(home, ignore_errors=True)
        if self._is_here:
            made = sorted(str(path) for path in Path("/run").glob("mycoswarm*"))  # of tmpfiles.d
            self._system("rm", "-rf", "--one-file-system", "--", *made)
            self._system("journalctl", "--update-catalog")
            self._system("systemctl", "daemon-reload")
        self._session.aside(
            "the service is removed; /var/lib/mycoswarm, /var/lib/mycoswarm-engine, /etc/mycoswarm stay"
        )

    def differences(self, share: Path) -> list[tuple[str, str]]:
        """Return for each file that is not as it should be its path and a unified diff; drop-ins count."""
        found = []
        for placed in service_files(share):
            path = self._root / placed.path
            text = path.read_text("utf-8", errors="replace") if path.exists() else ""
            if text != placed.text and not (placed.is_own and text):
                found.append((f"/{placed.path}", _diff(placed, text)))
        for extra in sorted((self._root / _UNITS).glob("mycoswarm*.d/*.conf")):
            said = f"+++ /{extra.relative_to(self._root)}\n{extra.read_text('utf-8', errors='replace')}"
            found.append((f"/{extra.relative_to(self._root)}", said))
        return found

    def _make_environment(self, source: str, lock: Path) -> None:
        """Make the environment beside the one that is used, which stays if this fails, and change them."""
        venv = self._firm(f"{_HOME.lstrip('/')}/venv", make=True)
        new, old = venv.with_name(".venv.new"), venv.with_name(".venv.old")
        _remove(new)
        self._session.aside(f"making {venv} ...")
        try:
            self._system(_PYTHON, "-I", "-m", "venv", str(new), within_s=_PIP_S)
            self._pip(new, source, lock)
            _remove(old)
            if venv.exists() or venv.is_symlink():
                venv.rename(old)
            new.rename(venv)
            _remove(old)
        finally:
            _remove(new)

    def _pip(self, venv: Path, source: str, lock: Path) -> None:
        """Install the libraries that were tested, byte for byte, then the node, which may need no other."""
        self._session.aside(f"installing {source} ...")
        pip = [str(venv / "bin" / "python"), "-I", "-m", "pip", "--quiet", "--disable-pip-version-check"]
        wheels = [*pip, "install", "--only-binary", ":all:"]  # an sdist's own code would run as root
        self._system(*wheels, "--require-hashes", "--requirement", str(lock), within_s=_PIP_S)
        self._system(*wheels, "--no-deps", source, within_s=_PIP_S)
        self._system(*pip, "check")

    def _make_agent(self) -> None:
        """Build what runs in a cage, as one file, compiled for the Python that will run it."""
        target = self._firm(f"{_HOME.lstrip('/')}/libexec/task", make=True)
        new = target.with_name(".task.new")
        new.unlink(missing_ok=True)
        python = target.parent.parent / "venv" / "bin" / "python"
        self._system(str(python), "-I", "-c", _BUILD_AGENT, str(new))
        new.chmod(0o644)
        new.replace(target)

    def _place(self, placed: Placed) -> None:
        path = self._firm(placed.path, make=True)
        if placed.is_own and path.exists():
            return
        new = path.with_name(f".{path.name}.new")
        new.unlink(missing_ok=True)
        with new.open("x", encoding="utf-8") as file:  # x: follows no link
            file.write(placed.text)
        new.chmod(placed.mode)
        new.replace(path)

    def _firm(self, path: str, *, make: bool = False) -> Path:
        """Return where a file is, in a directory that is root's and on this system; make the directory.

        Here a group of administrators may write in /usr/local.
        """
        whole = self._root / path
        if self._is_here and path.startswith("usr/local/"):
            if make:
                whole.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            return whole
        return firm(whole.parent, within=self._root, make=make) / whole.name

    def _system(self, *command: str, within_s: int = _SYSTEM_S) -> None:
        try:
            done = subprocess.run(  # noqa: S603 - fixed programs; only pip is told what the operator said
                [*command],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                umask=0o022,
                timeout=within_s,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise ConfigError("service-failed", f"cannot run {command[0]!r}: {exc}") from exc
        if done.returncode != 0:
            words = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
            raise ConfigError(
                "service-failed",
                f"cannot finish: {command[0]} exited with {done.returncode}: {words}",
            )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _started(share: Path) -> Sequence[str]:
    """Return what is enabled: every socket, and the node."""
    return [*sorted(path.name for path in (share / "systemd").glob("*.socket")), "mycoswarmd.service"]


def _diff(placed: Placed, text: str) -> str:
    lines = difflib.unified_diff(
        placed.text.splitlines(),
        text.splitlines(),
        f"this version: /{placed.path}",
        f"installed: /{placed.path}" if text else "installed: nothing",
        lineterm="",
    )
    return "\n".join(lines)
